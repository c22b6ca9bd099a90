"""How fast llama.cpp runs a full-precision or quantised network: one process, one JSON line, as teacher_speed does it.

``python -m bitnet_ref.measure.gguf_speed FILE.gguf --threads 2 --prompt 128 --generate 32``. The file for a comparison
has random weights: speed and memory hang on their bytes alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bitnet_ref.errors import BitnetRefError
from bitnet_ref.measure.model_bench import peak_resident_bytes
from bitnet_ref.measure.peers.llama_model import LlamaModel, add_metadata
from bitnet_ref.reference.config import ModelConfig

__all__ = ["TYPES", "write_float_gguf"]

TYPES = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
"""Of all matrices and tables of such a file, and their bits per weight."""

_ROWS = 64  # of a matrix that are drawn; the others repeat them
_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}


def write_float_gguf(path: Path, raw: Mapping[str, Any], type_name: str) -> None:
    """Write a network of random weights, all matrices and tables of one type, norms in float32.

    Parameters
    ----------
    path : Path
        Written under a temporary name first.
    raw : mapping
        A ``config.json`` of Llama or Qwen3.
    type_name : str
        A key of :data:`TYPES`.

    Raises
    ------
    BitnetRefError
        If llama.cpp's name for the architecture is not known here.
    """
    config = ModelConfig.from_hf(raw, ternary=False)
    if config.architecture not in _ARCHITECTURES:
        raise BitnetRefError(f"GGUF is written of {', '.join(_ARCHITECTURES)} here, got {config.architecture}")
    architecture = _ARCHITECTURES[config.architecture]
    kind = gguf.GGMLQuantizationType[type_name.upper()]
    rng = np.random.default_rng(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.layers)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(temporary, architecture)
    try:
        add_metadata(writer, raw, architecture)
        for name, shape in config.tensor_shapes().items():
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if len(shape) == 1:
                writer.add_tensor(gguf_name, np.ones(shape, np.float32))
                continue
            values = rng.standard_normal((min(_ROWS, shape[0]), shape[1]), np.float32) * np.float32(shape[1] ** -0.5)
            rows = gguf.quants.quantize(values, kind)
            writer.add_tensor(gguf_name, np.resize(rows, (shape[0], rows.shape[1])), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    model = LlamaModel("llama.cpp", str(options.model), options.threads, options.prompt + options.generate)
    rng = np.random.default_rng(0)
    prompt, written = (rng.integers(0, options.vocabulary, n).tolist() for n in (options.prompt, options.generate))
    prefill = [model.prefill(prompt) for _ in range(3)]
    return {
        "prefill_tokens_per_s": options.prompt / min(prefill[1:]),
        "decode_tokens_per_s": 1 / statistics.median(model.decode(written)),
        "peak_resident_bytes": peak_resident_bytes(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    for number in ("--threads", "--prompt", "--generate", "--vocabulary"):
        parser.add_argument(number, type=int, required=True)
    print(json.dumps(_measure(parser.parse_args())))
