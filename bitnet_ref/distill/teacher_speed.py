"""How fast a full-precision model runs in PyTorch: one process, one JSON line, for comparisons with a student.

``python -m bitnet_ref.distill.teacher_speed MODEL --threads 2 --prompt 128 --generate 32`` where MODEL is a folder of
``transformers`` or a ``config.json``, whose network then gets random weights. Batch 1, bfloat16 weights and
activations, the key/value cache of ``transformers``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = ["main", "measure"]


def load(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a folder, or one of random weights for a config file."""
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype).eval()


@torch.inference_mode()
def measure(model: torch.nn.Module, n_prompt: int, n_generate: int) -> dict[str, Any]:
    """Time reading a prompt (best of three, the first being warm-up) and writing (median of steps), apart.

    Returns
    -------
    dict
        prefill_tokens_per_s, decode_tokens_per_s, peak_resident_bytes (of this process so far, on Linux).
    """
    prompt = torch.randint(0, model.config.vocab_size, (1, n_prompt), generator=torch.Generator().manual_seed(0))
    prefill = []
    for _ in range(3):
        start = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        prefill.append(time.perf_counter() - start)
    steps = []
    for _ in range(n_generate):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        start = time.perf_counter()
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        steps.append(time.perf_counter() - start)
    return {
        "prefill_tokens_per_s": n_prompt / min(prefill[1:]),
        "decode_tokens_per_s": 1 / statistics.median(steps),
        "peak_resident_bytes": _peak_resident_bytes(),
    }


def _peak_resident_bytes() -> int:
    """As bitnet_ref.measure.model_bench has it; on Linux ru_maxrss would begin with the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    row = measure(load(options.model, getattr(torch, options.dtype)), options.prompt, options.generate)
    print(json.dumps(row | {"torch": torch.__version__}), file=sys.stdout)


if __name__ == "__main__":
    main()
