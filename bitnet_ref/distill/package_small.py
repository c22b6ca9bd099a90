"""Make ``bitnet_ref/models/small`` of two finished runs: ``python -m bitnet_ref.distill.package_small --help``.

The embedding is rounded to float16 and the linear layers to ternary; the perplexities are of what is written. Before
anything counts as made, the written file is run by the reference and compared with PyTorch (:func:`compare`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from bitnet_ref.distill.bitlinear import BitLinear, quantize_activations, quantize_weights
from bitnet_ref.distill.pretrain import BOS, clean_text, evaluate, split
from bitnet_ref.distill.small_model import SmallModel, load_model, save_model
from bitnet_ref.formats import TernaryTensor, convert, open_checkpoint
from bitnet_ref.reference.attention import KVCache
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.model import forward, linear
from bitnet_ref.reference.quantize import quantize_activations as reference_quantize_activations

__all__ = ["TIE", "compare", "main", "reference_weights", "sample"]

TIE = 1e-3
"""A differing int8 activation must lie this near to a half in the reference; the values rounded are up to 127."""

PROMPTS = ("", "Call me Ishmael.", "It is a truth universally acknowledged,", "Mr. Knightley", "The whale")
WEIGHTS = "small-base3.safetensors"


def reference_weights(path: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and weights of a checkpoint as :func:`bitnet_ref.reference.model.forward` takes them."""
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.config, checkpoint.entries)
    config.check_names(checkpoint.entries)
    return config, {
        t.name: (t.w_q, t.w_scale) if isinstance(t, TernaryTensor) else t.to_float32() for t in checkpoint.tensors()
    }


def compare(model: SmallModel, weights: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, float]:
    """Hold a PyTorch model and the reference to the same integers and logits.

    Both sum norms and attention in another order, which moves values by about 1e-7 of their size. An activation that
    near to a half may become another int8. So the reference is given PyTorch's integers where its own differ, after
    checking that each of those lies within :data:`TIE` of a half; see ``docs/model.md``.

    Parameters
    ----------
    model : SmallModel
        Ternary, in float32.
    weights : mapping
        Of the same network, as :func:`reference_weights` makes them.
    tokens : sequence of int

    Returns
    -------
    dict
        ``activations`` compared, ``differing``, ``logits_error`` (largest, over the range of the logits).

    Raises
    ------
    ValueError
        If an integer weight or a scale differs, or an activation that is not at a tie.
    """
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, BitLinear)}
    inputs: dict[int, np.ndarray] = {}
    named: dict[str, Any] = dict(weights)
    hooks = []
    for name, layer in layers.items():
        w_q, w_scale = quantize_weights(layer.weight.detach())
        if not np.array_equal(w_q.numpy(), weights[name][0]) or w_scale.item() != weights[name][1]:
            raise ValueError(f"integers and scale must be those of PyTorch, {name} has others")
        named[name] = (name, weights[name])
        hooks.append(
            layer.register_forward_pre_hook(
                lambda _, x, name=name: inputs.__setitem__(name, quantize_activations(x[0].detach())[0][0].numpy())
            )
        )
    try:
        with torch.no_grad():
            expected = model(torch.tensor([list(tokens)]))[0].numpy()
    finally:
        for hook in hooks:
            hook.remove()
    counts = {"activations": 0, "differing": 0}

    def follow(x: np.ndarray, weight: tuple[str, Any]) -> np.ndarray:
        name, (w_q, w_scale) = weight
        x_q, x_scale = reference_quantize_activations(x)
        theirs = inputs[name].astype(np.int8)
        differs = x_q != theirs
        if differs.any():
            scaled = (x * (np.float32(127) / np.abs(x).max(axis=-1, keepdims=True)))[differs]
            away = np.abs(np.abs(scaled - np.floor(scaled)) - 0.5).max()
            if away > TIE or np.abs(x_q.astype(int) - theirs)[differs].max() > 1:
                raise ValueError(f"activations may differ only at a half, {name} has one that is {away:.3g} off it")
        counts["activations"] += x_q.size
        counts["differing"] += int(differs.sum())
        sums = theirs.astype(np.int32) @ w_q.T.astype(np.int32)
        return sums.astype(np.float32) * (x_scale * w_scale)

    got = forward(model.config, named, tokens, linear=follow)
    return {**counts, "logits_error": float(np.abs(got - expected).max() / np.ptp(expected))}


def sample(
    config: ModelConfig,
    weights: Mapping[str, Any],
    tokens: Sequence[int],
    n_tokens: int,
    *,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 40,
) -> list[int]:
    """`n_tokens` tokens drawn by the reference from its `top_k` likeliest, after the prompt `tokens`."""
    rng = np.random.default_rng(seed)
    cache = KVCache(config, len(tokens) + n_tokens)
    written: list[int] = []
    tokens = list(tokens)
    while len(written) < n_tokens:
        logits = forward(config, weights, tokens, cache, linear)[-1].astype(np.float64) / temperature  # (V,)
        best = np.argsort(-logits, kind="stable")[:top_k]
        p = np.exp(logits[best] - logits[best[0]])
        written.append(int(rng.choice(best, p=p / p.sum())))
        tokens = written[-1:]
    return written


def _run_record(folder: Path) -> dict[str, Any]:
    """What the run's checkpoint and metrics say: configuration, steps, seconds, losses."""
    with safe_open(folder / "checkpoint.safetensors", "pt") as stored:
        about = stored.metadata()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    step = int(about["step"])
    steps = {row["step"]: row["loss"] for row in rows if "loss" in row and row["step"] <= step}
    return {
        "identity": json.loads(about["identity"]),
        "step": step,
        "seconds": round(float(about["seconds"]), 1),
        "starts": [row for row in rows if row.get("event") == "start" and row["step"] < step],
        "training_loss": {str(key): round(value, 4) for key, value in sorted(steps.items())},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bitnet_ref.distill.package_small", description=__doc__)
    parser.add_argument("--ternary", type=Path, required=True, help="folder of the ternary run")
    parser.add_argument("--twin", type=Path, required=True, help="folder of the full-precision run")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True, help="commit of the sources that trained")
    parser.add_argument("--machine", default=platform.machine(), help="what the runs were made on, in words")
    options = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)  # the work is small, and threads that wait for it spin

    runs = {"ternary": _run_record(options.ternary), "twin": _run_record(options.twin)}
    if runs["ternary"]["step"] != runs["twin"]["step"]:
        raise ValueError(f"both must have the same steps, got {[run['step'] for run in runs.values()]}")
    identity = runs["ternary"].pop("identity")
    twin_identity = runs["twin"].pop("identity")
    if {**identity, "full_precision": True} != twin_identity:
        raise ValueError("both runs must be of the same configuration and texts")
    config = identity["config"]
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(options.ternary / "tokenizer.json"))

    model, twin = load_model(options.ternary), load_model(options.twin)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.half().float())
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        save_model(model, json.loads((options.ternary / "config.json").read_text()), source)
        shutil.copy(options.ternary / "tokenizer.json", source)
        convert(source, options.out / WEIGHTS, "packed", scheme="base3", embedding="f16", overwrite=True)
    shutil.copy(options.ternary / "tokenizer.json", options.out)
    opened = open_checkpoint(options.out / WEIGHTS)
    (options.out / "config.json").write_text(json.dumps(opened.config, indent=2) + "\n")

    perplexities: dict[str, Any] = {}
    held_text = ""
    for name in config["data"]["texts"]:
        raw = (options.texts / name).read_bytes()
        part = split(clean_text(raw.decode()), config["data"]["held_out"])[1]
        held_text = held_text or part
        ids, n_bytes = np.array(tokenizer.encode(part).ids), len(part.encode())
        uniform = len(ids[1:]) * np.log(config["tokenizer"]["vocabulary"])
        perplexities[name] = {
            "held_out_bytes": n_bytes,
            "held_out_tokens": len(ids) - 1,
            "ternary": evaluate(model, ids, n_bytes),
            "twin": evaluate(twin, ids, n_bytes),
            "uniform": {
                "perplexity_per_token": float(config["tokenizer"]["vocabulary"]),
                "perplexity_per_byte": float(np.exp(uniform / n_bytes)),
                "bits_per_byte": float(uniform / n_bytes / np.log(2)),
            },
        }
    model.eval()
    network, weights = reference_weights(options.out / WEIGHTS)
    agreement = compare(model, weights, tokenizer.encode(held_text).ids[: network.context])
    samples = []
    for seed, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt or BOS).ids
        drawn = sample(network, weights, ids, 100, seed=seed)
        samples.append({"prompt": prompt, "seed": seed, "text": tokenizer.decode(drawn, skip_special_tokens=False)})
    record = {
        "config": config,
        "texts": dict(zip(config["data"]["texts"], identity["sha256"], strict=True)),
        "tokens_seen": runs["ternary"]["step"] * config["training"]["batch"] * config["model"]["context"],
        "machine": options.machine,
        "torch": torch.__version__,
        "commit": options.commit,
        "runs": runs,
        "held_out": perplexities,
        "reference_agreement": agreement,
        "sampling": {"temperature": 0.8, "top_k": 40, "tokens": 100},
        "samples": samples,
    }
    temporary_file = options.out / ".losses.json"
    temporary_file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary_file, options.out / "losses.json")
    print(json.dumps({"held_out": perplexities, "reference_agreement": agreement, "samples": samples}, indent=1))


if __name__ == "__main__":
    main()
