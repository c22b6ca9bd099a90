"""TQ1_0 and TQ2_0 of llama.cpp: blocks of 256 weights with a float16 scale each.

======  =====  ===================================================================================================
type    bytes  contents of a block
======  =====  ===================================================================================================
TQ1_0   54     32 bytes of five digits 32 weights apart (weights 0-159), 16 bytes of five digits 16 apart (160-239),
               4 bytes of four digits 4 apart (240-255), then the scale
TQ2_0   66     32 bytes of four 2-bit codes 32 weights apart, low bits first (weights 0-127), 32 more (128-255),
               then the scale
======  =====  ===================================================================================================

Codes and digits are w + 1. A TQ1_0 byte is the fixed-point fraction ceil(n * 256 / 243) of n = sum of
digit i * 3^(4-i), so that digit i is the integer part of 3 * frac(byte * 3^i / 256).

A BitNet matrix has one float32 scale, a block only a float16. See ``gguf_file`` for where the exact scale is kept.
"""

from __future__ import annotations

import numpy as np

from bitnet_ref.errors import FormatError

__all__ = ["TQ_BLOCK", "TQ_TYPES", "check_tq_shape", "pack_tq", "unpack_tq"]

TQ_BLOCK = 256
TQ_TYPES = {"TQ1_0": 54, "TQ2_0": 66}
"""Bytes of a block by type."""

# TQ1_0: (first weight, digits of a byte, bytes) of the three parts of a block.
_TQ1_PARTS = ((0, 5, 32), (160, 5, 16), (240, 4, 4))
_POWERS = np.array([81, 27, 9, 3, 1], np.uint16)


def check_tq_shape(name: str, shape: tuple[int, int], type_name: str) -> None:
    """ValueError unless the rows are whole blocks of 256 weights."""
    if shape[1] % TQ_BLOCK:
        raise ValueError(f"{type_name} needs a multiple of {TQ_BLOCK} columns, {name} has {shape[1]}")


def pack_tq(w_q: np.ndarray, block_scale: np.float16, type_name: str) -> np.ndarray:
    """The bytes of a ternary matrix as TQ1_0 or TQ2_0, every block with the same scale.

    Parameters
    ----------
    w_q : ndarray of shape (M, K), int8, values in {-1, 0, 1}; K a multiple of 256. Not modified.
    block_scale : float16
    type_name : "TQ1_0" or "TQ2_0"

    Returns
    -------
    ndarray of shape (M, K / 256 * bytes of a block), uint8

    Raises
    ------
    TypeError
        If w_q is not int8.
    ValueError
        If w_q is not such a matrix, or the type is another.
    """
    _check_type(type_name)
    if w_q.dtype != np.int8:
        raise TypeError(f"w_q must be int8, got {w_q.dtype}")
    if w_q.ndim != 2 or w_q.shape[1] % TQ_BLOCK:
        raise ValueError(f"{type_name} needs a matrix with a multiple of {TQ_BLOCK} columns, got shape {w_q.shape}")
    if w_q.size and (w_q.min() < -1 or w_q.max() > 1):
        raise ValueError(f"w_q must hold only -1, 0 and 1, got values from {w_q.min()} to {w_q.max()}")
    codes = (w_q + 1).view(np.uint8).reshape(-1, TQ_BLOCK)
    blocks = np.empty((len(codes), TQ_TYPES[type_name]), np.uint8)
    blocks[:, -2:] = np.array([block_scale], "<f2").view(np.uint8)
    if type_name == "TQ2_0":
        fields = codes.reshape(-1, 2, 4, 32)
        packed = fields[:, :, 0] | fields[:, :, 1] << 2 | fields[:, :, 2] << 4 | fields[:, :, 3] << 6
        blocks[:, :64] = packed.reshape(-1, 64)
    else:
        at = 0
        for first, n_digits, n_bytes in _TQ1_PARTS:
            digits = codes[:, first : first + n_digits * n_bytes].reshape(-1, n_digits, n_bytes)
            n = sum(digits[:, i].astype(np.uint16) * _POWERS[i] for i in range(n_digits))
            blocks[:, at : at + n_bytes] = (n * 256 + 242) // 243  # at most 242 * 256 + 242 < 65536
            at += n_bytes
    return blocks.reshape(len(w_q), -1)


def unpack_tq(data: np.ndarray, shape: tuple[int, int], type_name: str) -> tuple[np.ndarray, np.ndarray]:
    """The integers and the block scales of a TQ1_0 or TQ2_0 tensor.

    Parameters
    ----------
    data : ndarray of shape (M, K / 256 * bytes of a block), uint8
    shape : (M, K)

    Returns
    -------
    w_q : ndarray of shape (M, K), int8
    block_scales : ndarray of shape (M, K / 256), float16

    Raises
    ------
    FormatError
        If the size is not that of the shape, or a TQ2_0 code is 3.
    """
    _check_type(type_name)
    m, k = shape
    block_bytes = TQ_TYPES[type_name]
    if k % TQ_BLOCK or data.size != m * k // TQ_BLOCK * block_bytes:
        raise FormatError(
            f"{type_name} of shape {shape} must be rows of whole blocks of {TQ_BLOCK} weights in {block_bytes} bytes, "
            f"got {data.size:,} bytes"
        )
    blocks = data.reshape(-1, block_bytes)
    scales = np.ascontiguousarray(blocks[:, -2:]).view("<f2").reshape(m, k // TQ_BLOCK)
    w_q = np.empty(shape, np.int8)
    if type_name == "TQ2_0":
        codes = blocks[:, :64]
        if (codes & codes >> 1 & 0x55).any():
            raise FormatError("TQ2_0 must not hold code 3")
        fields = w_q.reshape(-1, 2, 4, 32)
        for i in range(4):
            fields[:, :, i] = (codes >> 2 * i & 3).view(np.int8).reshape(-1, 2, 32) - 1
    else:
        flat, at = w_q.reshape(-1, TQ_BLOCK), 0
        for first, n_digits, n_bytes in _TQ1_PARTS:
            rest = blocks[:, at : at + n_bytes]
            for i in range(n_digits):
                thrice = rest.astype(np.uint16) * 3
                digits = (thrice >> 8).astype(np.int8)
                flat[:, first + i * n_bytes :][:, :n_bytes] = digits - 1
                rest = thrice.astype(np.uint8)  # the fraction that is left
            at += n_bytes
    return w_q, scales


def _check_type(type_name: str) -> None:
    if type_name not in TQ_TYPES:
        raise ValueError(f"the type must be one of {', '.join(TQ_TYPES)}, got {type_name!r}")
