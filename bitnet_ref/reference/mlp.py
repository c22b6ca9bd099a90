"""The gate of the feed-forward network. The linear layers around it belong to :mod:`bitnet_ref.reference.model`."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["activate"]


def activate(x: np.ndarray, activation: str) -> np.ndarray:
    """The activation function of the gate, element by element.

    ==============  ==================================================================  ===========================
    ``relu2``       max(x, 0)^2                                                         BitNet b1.58 2B4T
    ``silu``        x / (1 + exp(-x))                                                   Llama, Falcon, Qwen3, 1bitLLM
    ``gelu_tanh``   x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2                   Gemma 3
    ==============  ==================================================================  ===========================

    Parameters
    ----------
    x : ndarray, float32
    activation : str

    Returns
    -------
    ndarray of the shape of x, float32

    Raises
    ------
    ValueError
        If there is no such activation.

    Notes
    -----
    relu2 is one float32 rounding, and its result leaves the range of float16 from |x| = 256 on, so it must not be
    stored in float16. The other two are computed in float64 and rounded once, because exponentials in float32 differ
    between processors.
    """
    if activation == "relu2":
        return np.square(np.maximum(x, np.float32(0)))
    wide = x.astype(np.float64)
    if activation == "silu":
        # exp(-x) may overflow to infinity for x < -709, where the quotient is then the right -0.
        with np.errstate(over="ignore"):
            return (wide / (1 + np.exp(-wide))).astype(np.float32)
    if activation == "gelu_tanh":
        return (0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))).astype(np.float32)
    raise ValueError(f"activation must be relu2, silu or gelu_tanh, got {activation!r}")
