"""Quantisers of BitNet: ternary weights, int8 activations, the 1-bit baseline, and their straight-through gradients.

Everything is computed in float32, in the order written in each docstring, so that a compiled or PyTorch version can
be held to the same integers. The one exception is the mean over a weight matrix, which is accumulated in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "SCALE_CLAMP",
    "TernaryStatistics",
    "dequantize",
    "quantize_activations",
    "quantize_activations_grad",
    "quantize_weights",
    "quantize_weights_b1",
    "quantize_weights_blocks",
    "quantize_weights_grad",
    "ternary_statistics",
]

SCALE_CLAMP = np.float32(1e-5)
"""Lower bound on mean|w| and on max|x| before anything is divided by them (released code of [2B4T])."""


def quantize_weights(w: ArrayLike) -> tuple[np.ndarray, np.float32]:
    """Ternary weights and their scale, per tensor, by absmean rounding.

        w_scale = max(mean(|w|), 1e-5)
        w_q     = clip(rint(w * (1 / w_scale)), -1, 1)

    so the edge between 0 and +-1 lies at *half* the mean magnitude.

    Parameters
    ----------
    w : array of shape (M, K), float32 (float16 and float64 are converted to float32 first)

    Returns
    -------
    w_q : ndarray of shape (M, K), int8, C order, values in {-1, 0, 1}
    w_scale : float32, so that ``w ~ w_scale * w_q``

    Raises
    ------
    TypeError
        If w is not float16, float32 or float64.
    ValueError
        If w is not 2-D, has no element, or holds a value that is not finite as float32.

    Notes
    -----
    Precision: |w| is summed in float64 in row-major order and the mean rounded once to float32, so w_scale is the
    float32 nearest to the exact mean or its neighbour. The reciprocal, the product and the rounding are float32; ties
    round to even (``np.rint``, as ``torch.round``), so a product of exactly 0.5 becomes 0.

    An all-zero matrix has integers 0 and w_scale 1e-5; there is no division by zero.

    Differs: [B158, Eq. 1-3] and [BitDistill, Eq. 1-2] divide by ``mean(|w|) + eps`` with a small eps added. The
    released code clamps the mean at 1e-5 instead and multiplies by the reciprocal; this function follows the code.
    The two agree except for weights within a relative eps / mean(|w|) of an edge (0.05 % for a mean of 0.02 and eps
    of 1e-5), and for matrices of mean magnitude below 1e-5. The released code takes the mean in the precision of the
    tensor; here it is float64, which can move w_scale in its last bits.
    """
    w = _finite_float32(w, "w")
    _check_matrix(w)
    w_scale = np.maximum(_mean(np.abs(w)), SCALE_CLAMP)
    inverse = np.float32(1) / w_scale
    w_q = np.clip(np.rint(w * inverse), -1, 1).astype(np.int8)
    return w_q, w_scale


def quantize_activations(x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Int8 activations and their scales, per token (last axis), by absmax rounding; there is no zero point.

        limit   = max(max(|x|), 1e-5)
        x_q     = clip(rint(x * (127 / limit)), -128, 127)
        x_scale = limit / 127

    Parameters
    ----------
    x : array of shape (..., K), float32 (float16 and float64 are converted to float32 first)

    Returns
    -------
    x_q : ndarray of shape (..., K), int8, C order
    x_scale : ndarray of shape (..., 1), float32, so that ``x ~ x_scale * x_q``

    Raises
    ------
    TypeError
        If x is not float16, float32 or float64.
    ValueError
        If x is 0-D, has K = 0, or holds a value that is not finite as float32. No tokens at all, shape (0, K), is
        allowed.

    Notes
    -----
    Precision: float32 throughout. ``127 / limit`` is rounded once, the product once, then ``np.rint`` rounds half to
    even. Code that rounds by adding 1.5 * 2**23 must keep the compiler from fusing that addition with the product,
    which would skip a rounding. ``limit / 127`` is its own single rounding, not the reciprocal of ``127 / limit``;
    their product is 1 to within 2**-23.

    The range is [-128, 127] as in the released code, but -128 never occurs: |x| <= limit, so the float32 product is
    at most 127 * (1 + 2**-22), which rounds to 127.

    An all-zero token has integers 0 and x_scale = 1e-5 / 127. A token whose largest magnitude is below 1e-5 does not
    use the whole range.

    Differs: [BitNet] has ``clip(x * Q_b / max(|x|), -Q_b + eps, Q_b - eps)`` with Q_b = 128 and leaves the rounding
    unsaid; [BitDistill, Eq. 3] adds eps to the maximum. The released code of [2B4T] clamps the maximum at 1e-5, and
    this function follows it. [bitnet.cpp] clamps in the same way on its I2_S path; its TL1 and TL2 paths have no
    lower bound, so an all-zero token has an infinite multiplier there.
    """
    x = _finite_float32(x, "x")
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape (..., K) with K >= 1, got shape {x.shape}")
    limit = np.maximum(np.abs(x).max(axis=-1, keepdims=True), SCALE_CLAMP)  # (..., 1)
    x_q = np.clip(np.rint(x * (np.float32(127) / limit)), -128, 127).astype(np.int8)  # (..., K)
    return x_q, limit / np.float32(127)


def quantize_weights_b1(w: ArrayLike) -> tuple[np.ndarray, np.float32]:
    """One-bit weights and their scale, per tensor: the centred sign quantiser of the original [BitNet], as a baseline.

        alpha   = mean(w)
        w_q     = Sign(w - alpha),   Sign(v) = +1 for v > 0, -1 for v <= 0
        w_scale = mean(|w|)

    Parameters
    ----------
    w : array of shape (M, K), float32 (float16 and float64 are converted to float32 first)

    Returns
    -------
    w_q : ndarray of shape (M, K), int8, C order, values in {-1, 1}
    w_scale : float32, [BitNet]'s beta, so that ``w ~ w_scale * w_q``

    Raises
    ------
    TypeError, ValueError
        As :func:`quantize_weights`.

    Notes
    -----
    alpha only decides the signs: [BitNet] multiplies the product by beta and does not add alpha back, so alpha is not
    returned. beta is the mean magnitude of the weights *before* centring. Both means are accumulated in float64 and
    rounded to float32.

    Nothing is divided by beta, so it needs no clamp: an all-zero matrix has integers -1 (Sign(0) = -1) and w_scale 0,
    which multiply to zero. A constant matrix is all -1 for the same reason, also when the constant is positive.
    """
    w = _finite_float32(w, "w")
    _check_matrix(w)
    # v > 0 for v = w - alpha is w > alpha, without the rounding of the difference.
    w_q = np.where(w > _mean(w), np.int8(1), np.int8(-1))
    return w_q, _mean(np.abs(w))


def quantize_weights_blocks(w: ArrayLike, block: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Ternary weights with an absmean scale for each `block` columns of a row: Block-Quant of [BitDistill, Table 4].

    Parameters
    ----------
    w : array of shape (M, K), float32 (float16 and float64 are converted to float32 first)
    block : int
        Columns that share a scale; it divides K. 256 in the authors' code.

    Returns
    -------
    w_q : ndarray of shape (M, K), int8, C order, values in {-1, 0, 1}
    w_scale : ndarray of shape (M, K / block), float32, so that ``w[m, k] ~ w_scale[m, k // block] * w_q[m, k]``

    Raises
    ------
    TypeError, ValueError
        As :func:`quantize_weights`; also ValueError if block is not a positive divisor of K.

    Notes
    -----
    Each block is quantised as :func:`quantize_weights` does a matrix, mean in float64 and the rest in float32. The
    packings and kernels of this package have one scale for a matrix, so this is for training experiments.

    Differs: the paper does not say how blocks lie. The authors' code reshapes the matrix to rows of 256 weights in
    storage order, which is the same wherever 256 divides K.
    """
    w = _finite_float32(w, "w")
    _check_matrix(w)
    m, k = w.shape
    if block < 1 or k % block:
        raise ValueError(f"block must be a positive divisor of K, got block {block} and K = {k}")
    blocks = w.reshape(m, -1, block)  # (M, K / block, block)
    means = np.mean(np.abs(blocks), axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)
    w_scale = np.maximum(means, SCALE_CLAMP)
    w_q = np.clip(np.rint(blocks * (np.float32(1) / w_scale)), -1, 1).astype(np.int8)
    return w_q.reshape(m, k), w_scale[..., 0]


def quantize_weights_grad(grad_out: np.ndarray) -> np.ndarray:
    """Straight-through gradient of the weight quantiser, for both the ternary and the one-bit one: the identity.

    The forward pass uses ``w + stop_gradient(w_scale * w_q - w)``. Its value is the dequantised weight, and its
    derivative by w is 1 everywhere: at the rounding steps, where the weight was clipped, and with no term through
    w_scale (released code of [2B4T]; [BitDistill] uses the same estimator).

    Parameters
    ----------
    grad_out : ndarray of shape (M, K), floating point
        Gradient of the loss by the dequantised weights ``w_scale * w_q``.

    Returns
    -------
    grad_w : ndarray of shape (M, K), same dtype, a new array
        Gradient of the loss by w.

    Raises
    ------
    TypeError
        If grad_out is not floating point.
    """
    return _identity_grad(grad_out)


def quantize_activations_grad(grad_out: np.ndarray) -> np.ndarray:
    """Straight-through gradient of the activation quantiser: the identity, as in :func:`quantize_weights_grad`.

    Parameters
    ----------
    grad_out : ndarray of shape (..., K), floating point
        Gradient of the loss by the dequantised activations ``x_scale * x_q``.

    Returns
    -------
    grad_x : ndarray of shape (..., K), same dtype, a new array
        Gradient of the loss by x, also for the element that set the maximum of its token.

    Raises
    ------
    TypeError
        If grad_out is not floating point.
    """
    return _identity_grad(grad_out)


def dequantize(q: np.ndarray, scale: np.float32 | np.ndarray) -> np.ndarray:
    """Floats that the integers stand for: ``scale * q`` in float32, one rounding.

    Parameters
    ----------
    q : ndarray, int8
    scale : float32, or an ndarray of float32 that broadcasts to the shape of q (such as (..., 1))

    Returns
    -------
    ndarray of the shape of q, float32

    Raises
    ------
    TypeError
        If q is not int8 or scale is not floating point.
    ValueError
        If scale does not broadcast to the shape of q.
    """
    q, scale = np.asarray(q), np.asarray(scale)
    if q.dtype != np.int8:
        raise TypeError(f"q must be int8, got {q.dtype}")
    if scale.dtype.kind != "f":
        raise TypeError(f"scale must be floating point, got {scale.dtype}")
    scale = np.broadcast_to(scale.astype(np.float32), q.shape)
    return q.astype(np.float32) * scale


@dataclass(frozen=True)
class TernaryStatistics:
    """What absmean ternarisation makes of one matrix.

    Attributes
    ----------
    scale : float
        w_scale of :func:`quantize_weights`.
    fraction_zeros : float
        Share of weights that become 0; 0.310 for Gaussian weights, 0.25 for uniform ones centred on 0.
    entropy_bits : float
        Entropy of the weights -1, 0, 1 by their frequencies, in bits per weight; at most log2(3) = 1.585.
    relative_error : float
        ``||w - scale * w_q|| / ||w||`` in the Frobenius norm; 0 for an all-zero matrix, which is reproduced exactly.
    """

    scale: float
    fraction_zeros: float
    entropy_bits: float
    relative_error: float


def ternary_statistics(w: ArrayLike) -> TernaryStatistics:
    """Scale, share of zeros, entropy and relative error of a matrix under :func:`quantize_weights`.

    Parameters
    ----------
    w : array of shape (M, K), float16, float32 or float64

    Returns
    -------
    TernaryStatistics

    Raises
    ------
    TypeError, ValueError
        As :func:`quantize_weights`.
    """
    w = _finite_float32(w, "w")
    w_q, w_scale = quantize_weights(w)
    share = np.array([np.count_nonzero(w_q == value) for value in (-1, 0, 1)]) / w_q.size
    present = share[share > 0]
    norm = _frobenius_norm(w)
    return TernaryStatistics(
        scale=float(w_scale),
        fraction_zeros=float(share[1]),
        entropy_bits=float(np.sum(present * np.log2(1 / present))),
        relative_error=_frobenius_norm(w - dequantize(w_q, w_scale)) / norm if norm > 0 else 0.0,
    )


def _finite_float32(a: ArrayLike, name: str) -> np.ndarray:
    """The array as native float32 in C order, refused if its dtype is another or a value is not finite as float32."""
    a = np.asarray(a)
    if a.dtype.type not in (np.float16, np.float32, np.float64):
        raise TypeError(f"{name} must be float16, float32 or float64, got {a.dtype}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused below
        a32 = a.astype(np.float32, order="C", copy=False)
    finite = np.isfinite(a32)
    if not finite.all():
        where = tuple(int(i) for i in np.unravel_index(np.argmin(finite), a.shape))
        raise ValueError(f"{name} must be finite in float32, got {a[where]} at index {where}")
    return a32


def _check_matrix(w: np.ndarray) -> None:
    """Refuses what is not a matrix of at least one element."""
    if w.ndim != 2 or w.size == 0:
        raise ValueError(f"w must have shape (M, K) with M >= 1 and K >= 1, got shape {w.shape}")


def _mean(a: np.ndarray) -> np.float32:
    """Mean over all elements of a C-ordered array, summed in float64, rounded once to float32."""
    return np.float32(np.mean(a, dtype=np.float64))


def _frobenius_norm(a: np.ndarray) -> float:
    """Root of the sum of squares in float64 (squares of float32 can leave its range), without a float64 copy of a."""
    return float(np.sqrt(np.einsum("mk,mk->", a, a, dtype=np.float64)))


def _identity_grad(grad_out: np.ndarray) -> np.ndarray:
    """A copy, so that the caller may change the gradient in place without changing the one that came in."""
    grad_out = np.asarray(grad_out)
    if grad_out.dtype.kind != "f":
        raise TypeError(f"grad_out must be floating point, got {grad_out.dtype}")
    return grad_out.copy()
