"""Which I2_S layout has this file?

Nothing in a GGUF file names the layout of its I2_S tensors (unless this package wrote it), no code tells them apart,
and a wrong guess gives a model that runs and talks nonsense. Three things can be said from the bytes:

- a layout whose blocks a matrix cannot fill is out;
- in a trained model, the columns of a matrix are not alike. How many zeros a column has goes with the weight that the
  norm before it gives that channel, and the columns of ``ffn_down`` go with the rows of ``ffn_gate`` and ``ffn_up``.
  Norm weights are plain float32, in order; a wrong layout puts columns elsewhere and breaks the tie;
- in a random model there is nothing to see, and then nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_ref.errors import FormatError
from bitnet_ref.formats.checkpoint import map_bytes
from bitnet_ref.formats.i2s import I2S_LAYOUTS, fits_i2s, unpack_i2s
from bitnet_ref.formats.tensors import StoredTensor, TensorFile

__all__ = ["LAYOUT_KEY", "LayoutVerdict", "detect_i2s_layout"]

LAYOUT_KEY = "bitnet_ref.i2_s_layout"
"""Metadata key under which files written here state their layout."""

_MAX_LAYERS = 4  # looked at, spread over the model; each costs about half a second at the size of [2B4T]
_MAX_ROWS = 2048  # looked at in a matrix: enough to know a column's share of zeros to 1 %

# Under "no tie", each rank correlation r over K channels gives r^2 (K - 1) ~ chi2 with one degree of freedom, so the
# sum over n pairs has mean n and standard deviation sqrt(2 n). The best layout must stand this many of them above what
# chance gives, and be this many times the second best: a wrong layout keeps a little of the order, because it moves a
# column by less than a block. Both are chosen, not derived; ten deviations come by chance with probability 1e-7 for 8
# pairs and less for more. The matrices of SmolLM2-135M, made ternary by absmean, give
# 388 for the right layout and at most 36 for a wrong one; the layout of none of the three gives at most 2.
_LEAST_DEVIATIONS = 10.0
_LEAST_RATIO = 3.0

# Column statistics of a matrix and the norm whose output it multiplies.
_NORM_OF = {
    "attn_q": "attn_norm",
    "attn_k": "attn_norm",
    "attn_v": "attn_norm",
    "attn_output": "attn_sub_norm",
    "ffn_gate": "ffn_norm",
    "ffn_up": "ffn_norm",
    "ffn_down": "ffn_sub_norm",
}


@dataclass(frozen=True)
class LayoutVerdict:
    """Which I2_S layout a file has.

    Attributes
    ----------
    layout : str or None
        None where it cannot be told.
    certainty : "certain", "likely" or "cannot tell"
    why : str
    evidence : dict of layout to float
        Standard deviations above chance at which columns agree with norms; empty if that was not looked at.
    """

    layout: str | None
    certainty: str
    why: str
    evidence: dict[str, float]


def detect_i2s_layout(opened: TensorFile, metadata: Mapping[str, Any]) -> LayoutVerdict:
    """Tell the I2_S layout of a GGUF file.

    Parameters
    ----------
    opened : the file
    metadata : its metadata

    Raises
    ------
    FormatError
        If the file states a layout that does not exist, its matrices fit none, or it has none of type I2_S.
    """
    stated = metadata.get(LAYOUT_KEY)
    if stated is not None:
        if stated not in I2S_LAYOUTS:
            raise FormatError(f"{opened.path}: {LAYOUT_KEY} must be one of {', '.join(I2S_LAYOUTS)}, got {stated!r}")
        return LayoutVerdict(stated, "certain", f"the file says so in {LAYOUT_KEY}", {})
    tensors = {tensor.name: tensor for tensor in opened.tensors}
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.type == "I2_S"}
    if not matrices:
        raise FormatError(f"{opened.path}: an I2_S layout needs tensors of type I2_S, there is none")
    for name, tensor in matrices.items():
        if len(tensor.shape) != 2:
            raise FormatError(f"{opened.path}: I2_S tensor {name} must be a matrix, got shape {tensor.shape}")
    possible = [layout for layout in I2S_LAYOUTS if all(fits_i2s(t.shape, layout) for t in matrices.values())]
    if not possible:
        raise FormatError(f"{opened.path}: the I2_S matrices must fill whole blocks of a layout, they fit none")
    if len(possible) == 1:
        return LayoutVerdict(possible[0], "certain", "the matrices fit no other layout", {})

    chi2 = {layout: _agreement(tensors, matrices, layout) for layout in possible}
    n_pairs = chi2[possible[0]][1]
    ask = f"say which of {', '.join(possible)} it is (--layout)"
    if n_pairs == 0:
        return LayoutVerdict(None, "cannot tell", f"the file has no norm weights to compare with; {ask}", {})
    evidence = {layout: float((total - n_pairs) / np.sqrt(2 * n_pairs)) for layout, (total, _) in chi2.items()}
    best, second = sorted(evidence, key=evidence.__getitem__, reverse=True)[:2]
    figures = ", ".join(f"{layout} {value:.1f}" for layout, value in evidence.items())
    said = f"agreement of columns with norm weights, in standard deviations above chance: {figures}"
    if evidence[best] > max(_LEAST_DEVIATIONS, _LEAST_RATIO * evidence[second]):
        return LayoutVerdict(best, "likely", said, evidence)
    return LayoutVerdict(None, "cannot tell", f"{said}; {ask}", evidence)


def _agreement(
    tensors: Mapping[str, StoredTensor], matrices: Mapping[str, StoredTensor], layout: str
) -> tuple[float, int]:
    """Sum of r^2 (K - 1) over pairs of things that belong to the same channels, and the number of pairs."""
    layers = sorted({name.rsplit(".", 2)[0] for name in matrices}, key=lambda prefix: (len(prefix), prefix))
    chosen = {layers[i] for i in np.linspace(0, len(layers) - 1, min(_MAX_LAYERS, len(layers))).astype(int)}
    total, n_pairs = 0.0, 0
    for layer in sorted(chosen):
        columns: dict[str, np.ndarray] = {}
        rows: dict[str, np.ndarray] = {}
        for kind in _NORM_OF:
            tensor = matrices.get(f"{layer}.{kind}.weight")
            if tensor is not None:
                w_q, _ = unpack_i2s(map_bytes(tensor), tensor.shape, layout)
                zero = w_q == 0
                columns[kind], rows[kind] = zero[:_MAX_ROWS].mean(axis=0), zero.mean(axis=1)
        pairs = [
            (columns[kind], np.abs(norm.to_float32().reshape(-1)))
            for kind in columns
            if (norm := tensors.get(f"{layer}.{_NORM_OF[kind]}.weight")) is not None and norm.is_float
        ]
        pairs += [
            (columns["ffn_down"], rows[kind])
            for kind in ("ffn_gate", "ffn_up")
            if kind in rows and "ffn_down" in columns
        ]
        for a, b in pairs:
            if len(a) == len(b):
                r = _rank_correlation(a, b)
                if r is not None:
                    total += r * r * (len(a) - 1)
                    n_pairs += 1
    return total, n_pairs


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's correlation with mean ranks for ties; None if one of them is constant or not finite."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    ranks = []
    for x in (a, b):
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        if len(counts) < 2:
            return None
        ranks.append((np.cumsum(counts) - (counts + 1) / 2)[inverse])
    return float(np.corrcoef(*ranks)[0, 1])
