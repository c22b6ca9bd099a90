"""Products with a packed matrix: exact integers first, one rescale after."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from bitnet_ref.reference.packing import PackedTernary
from bitnet_ref.reference.quantize import quantize_activations

__all__ = ["MAX_K", "linear", "matmul"]

MAX_K = 2**24 - 1
"""Largest number of inputs: the sum of K products of magnitude at most 128 must stay below 2**31, so K < 2**24."""


def matmul(x_q: np.ndarray, packed: PackedTernary) -> np.ndarray:
    """Exact product of int8 activations with a packed ternary matrix.

        out[..., m] = sum over k of x_q[..., k] * w_q[m, k]

    Parameters
    ----------
    x_q : ndarray of shape (..., K), int8
    packed : PackedTernary of shape (M, K)

    Returns
    -------
    ndarray of shape (..., M), int32

    Raises
    ------
    TypeError
        If x_q is not an int8 array.
    ValueError
        If the last axis of x_q is not K, or K is above 16,777,215, where int32 could overflow.
    """
    if not isinstance(x_q, np.ndarray) or x_q.dtype != np.int8:
        raise TypeError(f"x_q must be an int8 array, got {getattr(x_q, 'dtype', type(x_q).__name__)}")
    k = packed.shape[1]
    if x_q.ndim < 1 or x_q.shape[-1] != k:
        raise ValueError(f"x_q must have shape (..., {k}) for this matrix of K = {k}, got shape {x_q.shape}")
    if k > MAX_K:
        raise ValueError(f"K must be at most {MAX_K} so that no int32 sum overflows, got {k}")
    w_q = packed.unpack().astype(np.int32)
    return x_q.astype(np.int32) @ w_q.T  # (..., K) @ (K, M) -> (..., M) int32


def linear(x: ArrayLike, packed: PackedTernary, w_scale: np.float32 | float) -> np.ndarray:
    """Linear layer with a packed ternary matrix, ``y ~ x @ (w_scale * w_q).T``, without bias.

        x_q, x_scale = quantize_activations(x)
        acc          = matmul(x_q, packed)              int32, exact
        y            = float32(acc) * (x_scale * w_scale)

    Parameters
    ----------
    x : array of shape (..., K), float32 (float16 and float64 are converted to float32 first)
    packed : PackedTernary of shape (M, K)
    w_scale : float32, the scale that multiplies the weights

    Returns
    -------
    ndarray of shape (..., M), float32

    Raises
    ------
    TypeError
        If x is not floating point, or w_scale not a number.
    ValueError
        If x has the wrong shape or is not finite, or w_scale is not one finite float32 number.

    Notes
    -----
    The order of the rescale is part of the definition, so that a fast layer can match it bit for bit. Three float32
    roundings: the product ``x_scale * w_scale`` once per token; the conversion of acc, to nearest even (exact below
    2**24); their product. Multiplying acc by one scale after the other would round differently.
    """
    w_scale = checked_scale(w_scale)
    x_q, x_scale = quantize_activations(x)
    scale = x_scale * w_scale  # (..., 1) float32
    return matmul(x_q, packed).astype(np.float32) * scale  # (..., M)


def checked_scale(w_scale: np.float32 | float) -> np.float32:
    """The scale of a weight matrix as float32; TypeError unless a number, ValueError unless one and finite."""
    value = np.asarray(w_scale)
    if value.dtype.kind not in "fiu":
        raise TypeError(f"w_scale must be a number, got {type(w_scale).__name__}")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinity, and is refused as such
        value = value.astype(np.float32)
    if value.ndim != 0 or not np.isfinite(value):
        raise ValueError(f"w_scale must be one finite float32 number, got {w_scale}")
    return np.float32(value)
