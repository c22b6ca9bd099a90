"""``base3r``: five weights of one *row* in a byte, so that single rows can be read and all others left alone.

A tile is one row. A block is 320 columns in 64 bytes, and byte j of a block holds columns j, j + 64, ... j + 256 of it
as digits c = w + 1::

    row, block b, byte j    digit    4         3         2         1        0
                                 +---------+---------+---------+--------+--------+
                                 | j + 256 | j + 192 | j + 128 | j + 64 |   j    |     column 320 b + ...
                                 +---------+---------+---------+--------+--------+
                         value       81        27        9         3        1

    byte = c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4          0..242

The activations of one digit are contiguous, 64 of them for the 64 bytes of a block, whatever the width of a vector.
Values 243..255 are unused; a byte of five zeros is 121 = 0x79. A row of 2,560 weights takes 512 bytes.

It is not one of the schemes of dense products (:data:`bitnet_ref.reference.packing.SCHEMES`); its products take a list
of rows: :mod:`bitnet_ref.reference.sparse`.
"""

from __future__ import annotations

import numpy as np

from bitnet_ref.reference.packing.base import Scheme, first_true

__all__ = ["BASE3R"]


def _encode(w: np.ndarray) -> np.ndarray:
    """(M, 320 B) int8 -> (M, 64 B) uint8."""
    c = (w + 1).astype(np.uint8).reshape(len(w), -1, 5, 64)
    data = c[:, :, 4].copy()  # (M, B, 64)
    for digit in (3, 2, 1, 0):  # Horner's rule; the largest value is 242, so uint8 does not wrap
        data *= 3
        data += c[:, :, digit]
    return data.reshape(len(w), -1)


def _decode(data: np.ndarray) -> np.ndarray:
    """(M, 64 B) uint8 -> (M, 320 B) int8."""
    if (data > 242).any():
        row, byte = first_true(data > 242)
        first = byte // 64 * 320 + byte % 64
        raise BASE3R.unused(
            f"value {data[row, byte]} (above 242)", row, byte, data[row, byte], row, f"{first} to {first + 256}"
        )
    rest = data.reshape(len(data), -1, 64)
    w = np.empty((*rest.shape[:2], 5, 64), np.int8)
    for digit in range(5):
        w[:, :, digit] = rest % 3
        rest = rest // 3
    w -= 1
    return w.reshape(len(data), -1)


BASE3R = Scheme(
    name="base3r",
    rows=1,
    block=320,
    tile_block_bytes=64,
    summary="five ternary digits a byte, five columns of one row",
    encode=_encode,
    decode=_decode,
)
