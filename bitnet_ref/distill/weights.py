"""How training moves weights: their distribution before and after, zeros, and weights that became another one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from bitnet_ref.distill.bitlinear import SCALE_CLAMP, BitLinear, quantize_weights, quantize_weights_blocks

__all__ = ["BINS", "WeightsBefore", "histogram", "ternary_weights"]

BINS = np.linspace(-3, 3, 61)
"""Edges of histograms, in units of mean|w|."""


def ternary_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the ternary layers of a model hold now, int8, by name; layers of one-bit weights are left out."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear) and layer.quantizer != "b1":
            w = layer.weight.detach()
            blocks = layer.quantizer == "absmean-block"
            w_q, _ = quantize_weights_blocks(w, layer.block) if blocks else quantize_weights(w)
            found[name.removesuffix(".linear")] = w_q.to("cpu", torch.int8)
    return found


def histogram(model: nn.Module) -> list[int]:
    """Counts of weight / mean|weight| over all linear layers of the blocks, in BINS.

    The mean is that of the matrix, or of the block of columns where each has a scale of its own. What lies outside
    counts in the first or last bin.
    """
    counts = np.zeros(len(BINS) - 1, np.int64)
    for name, layer in model.named_modules():
        if "_proj" in name and isinstance(layer, (nn.Linear, BitLinear)):
            w = layer.weight.detach().float()
            if getattr(layer, "quantizer", "") == "absmean-block":
                w = w.unflatten(1, (-1, layer.block))
                mean = w.abs().mean(-1, keepdim=True)
            else:
                mean = w.abs().mean()
            w = (w / mean.clamp(min=SCALE_CLAMP)).clamp(BINS[0], BINS[-1]).cpu().numpy()
            counts += np.histogram(w, len(BINS) - 1, (BINS[0], BINS[-1]))[0]  # ten times as fast as with given edges
    return counts.tolist()


class WeightsBefore:
    """The weights of a student before a stage, to be compared with those after it: a byte for each weight.

    Parameters
    ----------
    model : Module
    """

    def __init__(self, model: nn.Module) -> None:
        self._counts, self._ternary = histogram(model), ternary_weights(model)

    def compare(self, model: nn.Module) -> dict[str, Any]:
        """Before and after.

        Returns
        -------
        dict
            ``edges``, and ``before`` and ``after``, counts between them (:func:`histogram`); for each of ``layers``, in
            the order of the network, ``zeros_before`` and ``zeros``, shares of its weights, and ``changed``, the share
            that is another one of -1, 0, 1 than before.
        """
        now = ternary_weights(model)
        pairs = [(w, now[name]) for name, w in self._ternary.items()]
        return {
            "edges": [round(edge, 6) for edge in BINS.tolist()],
            "before": self._counts,
            "after": histogram(model),
            "layers": list(now),
            "zeros_before": [_share(before == 0) for before, _ in pairs],
            "zeros": [_share(after == 0) for _, after in pairs],
            "changed": [_share(before != after) for before, after in pairs],
        }


def _share(chosen: torch.Tensor) -> float:
    return round(float(chosen.double().mean()), 6)
