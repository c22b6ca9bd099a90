"""Train the small model from scratch: ``python -m bitnet_ref.distill.pretrain CONFIG --texts DIR --out DIR``.

Ternary from the first step, as BitNet b1.58; with ``--full-precision`` its twin: the same texts, tokenizer, seeds,
windows, steps and network, with plain linear layers. The output folder holds ``tokenizer.json``, ``metrics.jsonl``, a
checkpoint to go on from, and ``config.json`` with ``model.safetensors`` in the form of ``transformers``.

Learning rate and weight decay come in two stages, as in the "Training Tips, Code, FAQ" of [B158]: warm-up, then
``peak * (1 - step / steps)``, with the second peak and no decay of weights from half-way on. AdamW moves all weights,
unless the configuration has ``muon_learning_rates``: with these peaks and that schedule ``torch.optim.Muon`` then moves
the matrices of the layers.

A run that is interrupted and started again ends in the same bits. It may be given another number of steps then, which
changes the schedule from there on; every start is a line of the metrics.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional

from bitnet_ref.distill.small_model import SmallModel, hf_config, save_model
from bitnet_ref.distill.text import END_OF_TEXT, train_tokenizer
from bitnet_ref.reference.config import ModelConfig

__all__ = ["BOS", "clean_text", "evaluate", "learning_rate", "main", "split", "train", "windows"]

BOS = END_OF_TEXT
"""Stands before every chapter, so a model asked to go on from it alone begins one."""

_CHAPTER = re.compile(r"\n(?=(?:CHAPTER|Chapter) [\dIVXL]+\b)")
_PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "\r": None})


def clean_text(text: str) -> str:
    """A text with one paragraph per line, :data:`BOS` before each chapter, plain quotes and dashes, no _emphasis_.

    Line breaks within a paragraph only show the width of the edition's page, and a model would spend much of its small
    capacity on them.
    """
    text = text.translate(_PLAIN).replace("_", "")
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    lines = "\n" + "\n".join(part for part in paragraphs if part) + "\n"
    return BOS + _CHAPTER.sub(BOS, lines).removeprefix("\n").removeprefix(BOS)


def split(text: str, held_out: float) -> tuple[str, str]:
    """The first and the last part of a cleaned text, cut at the end of a paragraph."""
    at = text.index("\n", int(len(text) * (1 - held_out))) + 1
    return text[:at], text[at:]


def windows(tokens: np.ndarray, seed: int, step: int, batch: int, context: int) -> torch.Tensor:
    """The sequences of one step, drawn with replacement: shape (batch, context + 1), int64.

    They depend on (seed, step) alone, so nothing about the data has to be saved to resume exactly.
    """
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - context, batch)
    return torch.from_numpy(np.stack([tokens[i : i + context + 1] for i in starts]).astype(np.int64))


def learning_rate(step: int, training: Mapping[str, Any], peaks: str = "learning_rates") -> float:
    """Of step 0..steps-1; see the module's docstring. `peaks` is the key of the two peaks."""
    steps = training["steps"]
    peak = training[peaks][_stage(step, steps)]
    return peak * min(1.0, (step + 1) / training["warm_up"]) * (1 - step / steps)


def _stage(step: int, steps: int) -> int:
    return int(2 * step >= steps)


def evaluate(model: SmallModel, tokens: np.ndarray, n_bytes: int, *, batch: int = 16) -> dict[str, float]:
    """Held-out loss in float32.

    The text is cut into windows of the model's context that follow each other without overlap, each scored from its
    own beginning; every token but the first of the text is predicted once.

    Parameters
    ----------
    model : SmallModel
    tokens : ndarray of shape (n,), integers, n >= 2
    n_bytes : int
        UTF-8 length of the text.

    Returns
    -------
    dict
        ``nats`` (sum), ``tokens`` (predicted), ``perplexity_per_token`` = exp(nats / tokens), ``perplexity_per_byte`` =
        exp(nats / n_bytes), ``bits_per_byte``.
    """
    context = model.config.context
    model.eval()
    nats, predicted = 0.0, 0
    ids = torch.from_numpy(tokens.astype(np.int64))
    n_full = (len(ids) - 1) // context * context
    # All full windows in batches, then the rest on its own.
    inputs = [*ids[:n_full].view(-1, context).split(batch), ids[None, n_full:-1]]
    targets = [*ids[1 : n_full + 1].view(-1, context).split(batch), ids[None, n_full + 1 :]]
    with torch.inference_mode():
        for x, y in zip(inputs, targets, strict=True):
            if x.numel():
                nats += functional.cross_entropy(model(x).flatten(0, 1).double(), y.flatten(), reduction="sum").item()
                predicted += y.numel()
    model.train()
    return {
        "nats": nats,
        "tokens": predicted,
        "perplexity_per_token": math.exp(nats / predicted),
        "perplexity_per_byte": math.exp(nats / n_bytes),
        "bits_per_byte": nats / n_bytes / math.log(2),
    }


def train(config: Mapping[str, Any], texts: Path, out: Path, *, full_precision: bool = False) -> None:
    """Train, or go on from the checkpoint in `out`, and write the model there.

    Parameters
    ----------
    config : mapping
        The parsed TOML: ``data``, ``tokenizer``, ``model``, ``training``.
    texts : Path
        Folder with the files that ``data.texts`` names.
    out : Path
        Made if missing.
    full_precision : bool
        Train the twin.

    Raises
    ------
    ValueError
        If the checkpoint in `out` is of another configuration; the number of steps alone may differ.
    FileNotFoundError
        If a text is missing.
    """
    torch.set_flush_denormal(True)  # denormal gradients of fresh ternary layers make a step many times slower
    out.mkdir(parents=True, exist_ok=True)
    raw = [(texts / name).read_bytes() for name in config["data"]["texts"]]
    parts = [split(clean_text(data.decode()), config["data"]["held_out"]) for data in raw]
    identity = {
        "config": config,
        "full_precision": full_precision,
        "sha256": [hashlib.sha256(t).hexdigest() for t in raw],
    }
    tokenizer = train_tokenizer([part for part, _ in parts], config["tokenizer"]["vocabulary"])
    tokenizer.save(str(out / "tokenizer.json"))
    tokens = np.concatenate([tokenizer.encode(part).ids for part, _ in parts]).astype(np.uint16)
    held = [(np.array(tokenizer.encode(part).ids), len(part.encode())) for _, part in parts]

    network = hf_config(
        **config["model"],
        vocabulary=config["tokenizer"]["vocabulary"],
        bos=tokenizer.token_to_id(BOS),
        ternary=not full_precision,
    )
    model = SmallModel(ModelConfig.from_hf(network, ternary=not full_precision))
    training = config["training"]
    model.init_weights(training["seed"])
    optimizers = _optimizers(model, training)
    state_file = out / "checkpoint.safetensors"
    step, seconds = _restore(state_file, model, optimizers, identity) if state_file.exists() else (0, 0.0)
    losses: list[float] = []  # since the last line of metrics
    clock = time.perf_counter()
    with (out / "metrics.jsonl").open("a") as metrics:

        def log(**row: Any) -> None:
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()

        log(
            event="start",
            step=step,
            steps=training["steps"],
            train_tokens=len(tokens),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        while step < training["steps"]:
            for optimizer, peaks in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, training, peaks)
                # The first group is that of matrices; norms are not drawn to zero.
                optimizer.param_groups[0]["weight_decay"] = training["weight_decays"][_stage(step, training["steps"])]
            batch = windows(tokens, training["seed"], step, training["batch"], model.config.context)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training["clip"])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            losses.append(loss.item())
            if step % training["log_every"] == 0:
                now = seconds + time.perf_counter() - clock
                rate = learning_rate(step - 1, training)
                log(step=step, loss=sum(losses) / len(losses), learning_rate=rate, seconds=round(now, 2))
                losses.clear()
            if step % training["save_every"] == 0 or step == training["steps"]:
                _save(state_file, model, optimizers, identity, step, seconds + time.perf_counter() - clock)
                save_model(model, network, out)
        model.eval()
        for name, (ids, n_bytes) in zip(config["data"]["texts"], held, strict=True):
            log(event="held out", step=step, text=name, bytes=n_bytes, **evaluate(model, ids, n_bytes))


def _optimizers(model: SmallModel, training: Mapping[str, Any]) -> dict[torch.optim.Optimizer, str]:
    """Each with the key of its learning rates; its first group holds matrices."""
    layers = [p for p in model.model.layers.parameters() if p.ndim == 2]
    embedding = [model.model.embed_tokens.weight]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    muon = "muon_learning_rates" in training
    groups = [{"params": embedding if muon else [*embedding, *layers]}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = {torch.optim.AdamW(groups, betas=tuple(training["betas"]), fused=True): "learning_rates"}
    return optimizers | ({torch.optim.Muon(layers): "muon_learning_rates"} if muon else {})


def _save(
    path: Path,
    model: SmallModel,
    optimizers: Iterable[torch.optim.Optimizer],
    identity: Mapping[str, Any],
    step: int,
    seconds: float,
) -> None:
    """Weights and moments in one safetensors file, under its name only when it is complete."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight:{name}"] = parameter.detach()
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}:{name}"] = value
    about = {"identity": json.dumps(identity), "step": str(step), "seconds": repr(seconds)}
    temporary = path.with_name("." + path.name)
    save_file(tensors, temporary, metadata=about)
    os.replace(temporary, path)


def _restore(
    path: Path, model: SmallModel, optimizers: Iterable[torch.optim.Optimizer], identity: Mapping[str, Any]
) -> tuple[int, float]:
    """Step and seconds of the checkpoint, whose weights and moments are put in place."""
    with safe_open(path, "pt") as stored, torch.no_grad():
        about = stored.metadata()
        if _without_steps(json.loads(about["identity"])) != _without_steps(identity):
            raise ValueError(f"{path} must be of this configuration and these texts to go on from, it is of others")
        for name, parameter in model.named_parameters():
            parameter.copy_(stored.get_tensor(f"weight:{name}"))
        parameters = dict(model.named_parameters())
        for optimizer in optimizers:
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for key in stored.keys():  # noqa: SIM118 - safe_open is no mapping
                state, name = key.split(":", 1)
                if state != "weight" and id(parameters[name]) in mine:
                    optimizer.state[parameters[name]][state] = stored.get_tensor(key)
    return int(about["step"]), float(about["seconds"])


def _without_steps(identity: Mapping[str, Any]) -> dict[str, Any]:
    config = identity["config"]
    return {**identity, "config": {**config, "training": {**config["training"], "steps": None}}}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bitnet_ref.distill.pretrain", description=__doc__.split(":")[0])
    parser.add_argument("config", type=Path, help="TOML file, such as bitnet_ref/distill/configs/small.toml")
    parser.add_argument("--texts", type=Path, required=True, help="folder with the texts that the config names")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; a run found there goes on")
    parser.add_argument("--full-precision", action="store_true", help="train the twin without quantisation")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with options.config.open("rb") as file:
        config = tomllib.load(file)
    train(config, options.texts, options.out, full_precision=options.full_precision)


if __name__ == "__main__":
    main()
