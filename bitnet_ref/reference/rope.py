"""Rotary position embedding in the Hugging Face layout: dimension i of a head turns together with i + D/2.

The original Llama layout and GGUF files of architecture ``llama`` pair 2i with 2i + 1 instead. Rotating one layout with
the other's rule gives fluent beginnings that decay, so a converter must reorder the rows of q and k, never this code.
"""

from __future__ import annotations

import math

import numpy as np

from bitnet_ref.reference.config import Llama3Scaling

__all__ = ["frequencies", "rotate", "rotations"]


def frequencies(head_dim: int, theta: float, scaling: float | Llama3Scaling | None = None) -> np.ndarray:
    """Rotation speeds in radians per position.

        f_i = 1 / theta^(2i / D),   i = 0 .. D/2 - 1

    A number as `scaling` divides all of them. :class:`Llama3Scaling` divides those with a wavelength 2 pi / f above
    original_context / low_freq_factor by its factor, keeps those below original_context / high_freq_factor, and blends
    linearly in original_context / wavelength between.

    Parameters
    ----------
    head_dim : int, even
    theta : float
    scaling : float, Llama3Scaling or None

    Returns
    -------
    ndarray of shape (D/2,), float32

    Notes
    -----
    The exponent 2i / D, the power, its reciprocal and every step of the blend are each rounded to float32, in the order
    of the PyTorch code that these models were trained with. Rounding less would be worse: at position 4,000 a relative
    change of 1e-7 in the fastest speeds turns their halves by 4e-4 radians.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # The power of a float32 exponent, rounded once: float32 power functions differ in their last bit.
    power = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    speed = np.float32(1) / power
    if scaling is None:
        return speed
    if not isinstance(scaling, Llama3Scaling):
        return speed / np.float32(scaling)
    one, low, original = np.float32(1), np.float32(scaling.low_freq_factor), scaling.original_context
    # PyTorch divides a number by an array as number * (1 / array), which rounds twice.
    wavelength = np.float32(2 * math.pi) * (one / speed)
    slow = wavelength > np.float32(original / scaling.low_freq_factor)
    fast = wavelength < np.float32(original / scaling.high_freq_factor)
    share = (np.float32(original) * (one / wavelength) - low) / np.float32(scaling.high_freq_factor - low)
    divided = speed / np.float32(scaling.factor)
    blended = (one - share) * speed / np.float32(scaling.factor) + share * speed
    return np.where(slow, divided, np.where(fast, speed, blended))


def rotations(positions: np.ndarray, speeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every angle position * speed.

    Parameters
    ----------
    positions : ndarray of shape (T,), integer
    speeds : ndarray of shape (D/2,), float32

    Returns
    -------
    cos, sin : ndarray of shape (T, 1, D/2), float32
        The angle is rounded to float32 before its cosine is taken; the cosine itself is rounded once.
    """
    angle = positions.astype(np.float32)[:, None, None] * speeds  # (T, 1, D/2)
    exact = angle.astype(np.float64)
    return np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn every head: (a, b) -> (a cos - b sin, b cos + a sin) for its first half a and second half b.

    Parameters
    ----------
    x : ndarray of shape (T, H, D), float32
    cos, sin : ndarray of shape (T, 1, D/2), float32

    Returns
    -------
    ndarray of shape (T, H, D), float32
    """
    a, b = np.split(x, 2, axis=-1)  # (T, H, D/2) each
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)  # (T, H, D)
