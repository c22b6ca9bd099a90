"""The one norm of these networks, used before, inside (SubLN) and, in Gemma, after each part of a block."""

from __future__ import annotations

import numpy as np

__all__ = ["rms_norm"]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, offset: float = 0.0) -> np.ndarray:
    """Root-mean-square norm over the last axis.

        y = x * (1 / sqrt(mean(x^2) + eps)) * (weight + offset)

    Parameters
    ----------
    x : ndarray of shape (..., K), float32
    weight : ndarray of shape (K,), floating point
    eps : float
        Added under the root, as a float32.
    offset : float
        0, or 1 for weights stored as w - 1 (Gemma).

    Returns
    -------
    ndarray of shape (..., K), float32

    Raises
    ------
    ValueError
        If weight does not have shape (K,).

    Notes
    -----
    The mean square is summed in float64 and rounded once to float32, so it does not depend on the order of summation;
    every other step is one float32 rounding, in the order written.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"a norm over {x.shape[-1]} values needs a weight of that length, got shape {weight.shape}")
    mean_square = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True).astype(np.float32)  # (..., 1)
    inverse = np.float32(1) / np.sqrt(mean_square + np.float32(eps))
    return (x * inverse) * (weight.astype(np.float32) + np.float32(offset))  # (..., K)
