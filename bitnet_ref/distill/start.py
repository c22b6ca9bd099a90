"""Where students begin: what norms and ternary layers do to a trained network before anything is trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bitnet_ref.distill import models, stages
from bitnet_ref.distill.config import Config
from bitnet_ref.distill.student import input_sizes, insert_subln, ternarise
from bitnet_ref.distill.text import TextEncoder
from bitnet_ref.distill.trainer import set_strength

__all__ = ["STRENGTHS", "start_losses"]

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def start_losses(config: Config) -> list[dict[str, Any]]:
    """The loss of a configuration's model without SubLN, with it, and with its gains, from float to ternary.

    Parameters
    ----------
    config : Config

    Returns
    -------
    list of dict
        subln ("none", "one" or "input"), strength, and loss: nats a token of 32 training prompts, in float32.
    """
    tokenizer = models.load_tokenizer(config.model)
    encoder = TextEncoder.of(tokenizer)
    ids, mask = stages.first_prompts(config, stages.splits_of(config), encoder, config.seeds[0])
    base = models.load_base(config.model, config.seeds[0], encoder.vocabulary_size).eval()
    rows = []
    for subln in ("none", "one", "input"):
        model = copy.deepcopy(base)
        if subln != "none":
            where = config.student.subln
            insert_subln(model, where, input_sizes(model, ids, mask, where) if subln == "input" else None)
        ternarise(model, config.student.quantizer, config.student.block)
        for strength in STRENGTHS:
            set_strength(model, strength)
            rows.append({"subln": subln, "strength": strength, "loss": _loss(model, ids, mask)})
    return rows


def _loss(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> float:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    real = mask[:, 1:].bool() & mask[:, :-1].bool()
    return float(functional.cross_entropy(logits[real].float(), ids[:, 1:][real]))
