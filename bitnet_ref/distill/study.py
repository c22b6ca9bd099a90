"""Ternary training, small and with seeds: ``bitnet-ref distill study``.

A Llama of under a million parameters is trained from scratch on public-domain text: in full precision, as b1.58 with
SubLN, as b1.58 without, and as b1. Then each full-precision model is made ternary and trained further, as in stage 2 of
[BitDistill]. Everything else is the same for all: texts, tokenizer, windows, steps, learning rate, initial weights of a
seed. The results are for paper_figures/fig_training_*.py, which read them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet_ref.distill.config import Training
from bitnet_ref.distill.pretrain import clean_text, split, train_tokenizer, windows
from bitnet_ref.distill.student import insert_subln, ternarise
from bitnet_ref.distill.trainer import Devices
from bitnet_ref.distill.weights import BINS, histogram, ternary_weights

__all__ = ["KINDS", "TEXTS", "Study", "run"]

TEXTS = ("jane_austen.txt", "moby_dick.txt")
HELD_OUT = 0.05
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024, "max_position_embeddings": 64}
SIZES |= {"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
BATCH, RATE, WARM_UP, CLIP = 16, 3e-3, 25, 1.0
LOG_EVERY = 10

KINDS = {
    "full precision": (None, False),
    "b1.58": ("absmean", True),
    "b1.58 without SubLN": ("absmean", False),
    "b1": ("b1", True),
}
"""What is trained from scratch: the quantiser of weights, and whether SubLN is there."""


class Study:
    """The texts, and the training loop that all models share."""

    def __init__(self, folder: Path, steps: int) -> None:
        parts = [split(clean_text((folder / name).read_text()), HELD_OUT) for name in TEXTS]
        tokenizer = train_tokenizer([part for part, _ in parts], SIZES["vocab_size"])
        self.tokens = np.concatenate([tokenizer.encode(part).ids for part, _ in parts]).astype(np.uint16)
        held = np.concatenate([tokenizer.encode(part).ids for _, part in parts])
        context = SIZES["max_position_embeddings"]
        n = (len(held) - 1) // context * context
        self.held = torch.tensor(held[:n]).view(-1, context), torch.tensor(held[1 : n + 1]).view(-1, context)
        self.steps = steps
        self.bfloat16 = Devices(torch.device("cpu")).uses_bfloat16(Training())

    def train(self, model: nn.Module, seed: int, first: int, label: str) -> dict[str, Any]:
        """Train for `steps` steps on the windows from step `first` on; losses, and zeros and flips of each matrix."""
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        rows: list[dict[str, Any]] = []
        losses: list[float] = []
        before = ternary_weights(model)
        for step in range(self.steps):
            cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * cosine
            batch = windows(self.tokens, seed, first + step, BATCH, SIZES["max_position_embeddings"])
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                logits = model(batch[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the loss must stay finite, {label} has {losses[-1]} at step {step}")
            if (step + 1) % LOG_EVERY == 0:
                now = ternary_weights(model)
                row = {"step": step + 1, "loss": float(np.mean(losses))}
                if now:
                    row["zeros"] = [float((q == 0).float().mean()) for q in now.values()]
                    row["flips"] = [float((before[name] != q).float().mean()) / LOG_EVERY for name, q in now.items()]
                rows.append(row)
                losses, before = [], now
        curve = {key: [row[key] for row in rows] for key in rows[0]}
        return {"curve": curve, "held_out_nats": self.held_out(model)}

    @torch.inference_mode()
    def held_out(self, model: nn.Module) -> float:
        """Mean loss in float32 on windows of the held-out text, in nats per token."""
        total = 0.0
        for x, y in zip(self.held[0].split(32), self.held[1].split(32), strict=True):
            logits = model(x, use_cache=False).logits
            total += functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        return total / self.held[1].numel()


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def run(texts: Path, steps: int, seeds: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Train all models of all seeds.

    Parameters
    ----------
    texts : path
        Folder with the files of TEXTS.
    steps, seeds : int
    report : callable(sentence)
        Is told of each model when it is done.

    Returns
    -------
    dict
        torch (version), settings, scratch and continued (a row for each model).

    Raises
    ------
    FileNotFoundError
        If a text is missing.
    ValueError
        If a loss is not finite.
    """
    torch.set_flush_denormal(True)
    study = Study(texts, steps)
    scratch, continued = [], []
    for seed in range(seeds):
        for kind, (quantizer, subln) in KINDS.items():
            start = time.perf_counter()
            model = _model(seed)
            if subln:
                insert_subln(model)
            if quantizer:
                ternarise(model, quantizer)
            made = study.train(model, seed, 0, f"{kind}, seed {seed}")
            scratch.append({"model": kind, "seed": seed, **made})
            report(f"{kind}, seed {seed}: held out {made['held_out_nats']:.4f}, {time.perf_counter() - start:.0f} s")
            if kind != "full precision":
                continue
            # Stage 2 of [BitDistill]: the trained model gets SubLN and ternary layers, and goes on with a new schedule.
            for placed in (True, False):
                student = _model(seed)
                student.load_state_dict(model.state_dict())
                if placed:
                    insert_subln(student)
                ternarise(student)
                row = {"subln": placed, "seed": seed, "histogram_before": histogram(student)}
                row["held_out_nats_before"] = study.held_out(student)
                row |= study.train(student, seed, steps, f"continued, seed {seed}")
                continued.append(row | {"histogram_after": histogram(student)})
                report(f"continued, SubLN {placed}, seed {seed}: held out {row['held_out_nats']:.4f}")
    settings = {"texts": TEXTS, "steps": steps, "seeds": seeds, "batch": BATCH, "rate": RATE, "warm_up": WARM_UP}
    settings |= {"autocast": "bfloat16" if study.bfloat16 else "float32"}
    settings |= {"sizes": SIZES, "bins": BINS.tolist(), "tokens_per_step": BATCH * SIZES["max_position_embeddings"]}
    settings["layers"] = list(ternary_weights(student))
    return _rounded({"torch": torch.__version__, "settings": settings, "scratch": scratch, "continued": continued})


def _rounded(value: Any) -> Any:
    """Numbers to six significant digits, which is more than a figure shows."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
