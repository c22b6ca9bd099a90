"""I2_S of [bitnet.cpp]: two bits a weight in one of three layouts under one type number, and a float32 scale behind.

A matrix of (M, K) weights takes M * K / 4 bytes and a tail of 32: the scale as float32, then 28 zeros. Code = w + 1;
code 3 is never written. Which byte holds which weight was chosen when the *writing* program was compiled, and nothing
in the file says how:

============== ======================= ==================================================================
layout         cut into                element j of a block, or (row, column)
============== ======================= ==================================================================
x86-128        128 weights = 32 bytes  byte j % 32, bits 7-6 for j < 32, then 5-4, 3-2, 1-0
arm-64         64 weights = 16 bytes   byte j % 16, bits 7-6 for j < 16, then 5-4, 3-2, 1-0
interleaved-4  4 rows                  byte (row / 4) * K + column, bits 7-6 for row % 4 = 0, then 5-4, 3-2, 1-0
============== ======================= ==================================================================

The first two cut the whole matrix, row after row, so a block may cross into the next row unless K is a multiple of the
block. bitnet.cpp's kernels are wrong for such K and check nothing; this reader follows the bytes, and the writer
refuses.
"""

from __future__ import annotations

import numpy as np

from bitnet_ref.errors import FormatError

__all__ = ["I2S_LAYOUTS", "I2S_TAIL_BYTES", "check_i2s_shape", "fits_i2s", "pack_i2s", "unpack_i2s"]

I2S_LAYOUTS = ("x86-128", "arm-64", "interleaved-4")
"""The layouts in which bitnet.cpp has written type I2_S."""

I2S_TAIL_BYTES = 32
_BLOCK = {"x86-128": 128, "arm-64": 64}


def fits_i2s(shape: tuple[int, int], layout: str) -> bool:
    """Whether bytes of this layout can hold an (M, K) matrix; ValueError for an unknown layout."""
    _check_layout(layout)
    m, k = shape
    return m % 4 == 0 if layout == "interleaved-4" else m * k % _BLOCK[layout] == 0


def check_i2s_shape(name: str, shape: tuple[int, int], layout: str) -> None:
    """ValueError unless bitnet.cpp reads an (M, K) matrix of this layout right."""
    _check_layout(layout)
    m, k = shape
    if layout == "interleaved-4":
        if m % 4:
            raise ValueError(f"I2_S {layout} needs rows in fours, {name} has {m} rows")
    elif k % _BLOCK[layout]:
        raise ValueError(
            f"I2_S {layout} needs a multiple of {_BLOCK[layout]} columns (bitnet.cpp drops the rest), {name} has {k}"
        )


def pack_i2s(w_q: np.ndarray, w_scale: np.float32, layout: str) -> np.ndarray:
    """The bytes of a ternary matrix as I2_S.

    Parameters
    ----------
    w_q : ndarray of shape (M, K), int8, values in {-1, 0, 1}. Not modified.
    w_scale : float32
    layout : one of I2S_LAYOUTS

    Returns
    -------
    ndarray of shape (M * K / 4 + 32,), uint8

    Raises
    ------
    TypeError
        If w_q is not int8.
    ValueError
        If w_q is not 2-D, holds another value, or does not fill whole blocks of the layout.
    """
    if w_q.dtype != np.int8:
        raise TypeError(f"w_q must be int8, got {w_q.dtype}")
    if w_q.ndim != 2 or not fits_i2s(w_q.shape, layout):
        raise ValueError(f"I2_S {layout} needs a matrix of whole blocks, got shape {w_q.shape}")
    if w_q.size and (w_q.min() < -1 or w_q.max() > 1):
        raise ValueError(f"w_q must hold only -1, 0 and 1, got values from {w_q.min()} to {w_q.max()}")
    fields = _as_fields((w_q + 1).view(np.uint8), layout)  # (blocks, 4, bytes of a block)
    data = np.zeros(w_q.size // 4 + I2S_TAIL_BYTES, np.uint8)
    body = data[: w_q.size // 4].reshape(len(fields), -1)
    for i, shift in enumerate((6, 4, 2, 0)):
        body |= fields[:, i] << shift
    data[w_q.size // 4 :][:4] = np.array([w_scale], "<f4").view(np.uint8)
    return data


def unpack_i2s(data: np.ndarray, shape: tuple[int, int], layout: str) -> tuple[np.ndarray, np.float32]:
    """The integers and the scale of an I2_S tensor; the inverse of :func:`pack_i2s`.

    Returns
    -------
    w_q : ndarray of shape (M, K), int8
    w_scale : float32

    Raises
    ------
    FormatError
        If the bytes have not the size of the shape, the matrix does not fill whole blocks of the layout, a code is 3,
        or the scale is not a finite number above 0.
    """
    n = shape[0] * shape[1]
    if not fits_i2s(shape, layout):
        raise FormatError(f"I2_S {layout} needs a matrix of whole blocks, got shape {shape}")
    if data.shape != (n // 4 + I2S_TAIL_BYTES,):
        raise FormatError(f"I2_S of shape {shape} must have {n // 4 + I2S_TAIL_BYTES:,} bytes, got {data.size:,}")
    scale = data[n // 4 :][:4].copy().view("<f4")[0]
    if not (np.isfinite(scale) and scale > 0):
        raise FormatError(f"the scale of an I2_S tensor must be finite and above 0, got {scale}")
    body = data[: n // 4]
    if (unused := body & body >> 1 & 0x55).any():
        where = int(np.argmax(unused != 0))
        raise FormatError(f"I2_S must not hold code 3, got it in byte {where:,} (0x{body[where]:02x})")
    n_blocks = shape[0] // 4 if layout == "interleaved-4" else n // _BLOCK[layout]
    body = body.reshape(n_blocks, -1)
    w_q = np.empty(shape, np.int8)
    fields = _as_fields(w_q, layout)
    for i, shift in enumerate((6, 4, 2, 0)):
        fields[:, i] = (body >> shift & 3).view(np.int8) - 1
    return w_q, np.float32(scale)


def _as_fields(w: np.ndarray, layout: str) -> np.ndarray:
    """A view of a C-ordered (M, K) matrix as (blocks, field of the byte, byte of the block)."""
    if layout == "interleaved-4":
        return w.reshape(-1, 4, w.shape[1])
    return w.reshape(-1, 4, _BLOCK[layout] // 4)


def _check_layout(layout: str) -> None:
    if layout not in I2S_LAYOUTS:
        raise ValueError(f"an I2_S layout must be one of {', '.join(I2S_LAYOUTS)}, got {layout!r}")
