"""``tl1``: a 4-bit index for two weights, for kernels that look sums up in tables instead of multiplying.

Two neighbouring weights of a row, (w0, w1) at columns 2p and 2p + 1, have nine values::

    index = 3 w0 + w1 + 4 = 3 (w0 + 1) + (w1 + 1)          0..8

    index     0     1     2     3     4     5     6     7     8
    (w0,w1)  -,-   -,0   -,+   0,-   0,0   0,+   +,-   +,0   +,+

A tile is 64 rows. Byte 64 q + r of a tile holds the four columns 4q .. 4q + 3 of its row r::

    tile t, byte 64 q + r    bit   7   6   5   4   3   2   1   0
                                 +---------------+---------------+
                                 | 4q+2, 4q+3    | 4q, 4q+1      |     of row 64 t + r
                                 +---------------+---------------+

Indices 9..15 are unused. K is padded to blocks of 16 columns (4 x 64 bytes); a byte of four zeros is 0x44.

A kernel makes, once per token, a table of 16 sums for each pair of activations (:func:`entries_tl1`), and one byte
shuffle then reads that table for as many rows as a vector has bytes. The tables are exact: each int16 sum is stored
as two int8 digits (:func:`tables_tl1`).
"""

from __future__ import annotations

import numpy as np

from bitnet_ref.reference.packing.base import Scheme, base28_digits, first_true, padded_activations

__all__ = ["TL1", "entries_tl1", "pack_tl1", "tables_tl1", "unpack_tl1"]

# Weights that each index stands for; the unused indices 9..15 have weights 0 and so entries 0.
PAIRS = np.zeros((16, 2), np.int16)
PAIRS[:9] = [(w0, w1) for w0 in (-1, 0, 1) for w1 in (-1, 0, 1)]


def _encode(w: np.ndarray) -> np.ndarray:
    """(64 T, 4 Q) int8 -> (T, 64 Q) uint8."""
    pair = w.reshape(-1, 64, w.shape[1] // 4, 2, 2)  # (T, 64, Q, half, w0 w1)
    index = (3 * pair[..., 0] + pair[..., 1] + 4).astype(np.uint8)  # (T, 64, Q, half)
    data = index[..., 0] | index[..., 1] << 4  # (T, 64, Q)
    return np.ascontiguousarray(data.transpose(0, 2, 1)).reshape(data.shape[0], -1)


def _decode(data: np.ndarray) -> np.ndarray:
    """(T, 64 Q) uint8 -> (64 T, 4 Q) int8."""
    unused = ((data & 15) > 8) | (data >> 4 > 8)
    if unused.any():
        t, byte = first_true(unused)
        half = 0 if data[t, byte] & 15 > 8 else 1
        column = 4 * (byte // 64) + 2 * half
        index = data[t, byte] >> 4 * half & 15
        raise TL1.unused(f"index {index} (above 8)", t, byte, data[t, byte], 64 * t + byte % 64, column)
    data = data.reshape(data.shape[0], -1, 64).transpose(0, 2, 1)  # (T, 64, Q)
    w = np.empty((*data.shape, 4), np.int8)
    for half, index in enumerate((data & 15, data >> 4)):
        w[..., 2 * half] = index // 3
        w[..., 2 * half + 1] = index % 3
    w -= 1
    return w.reshape(64 * data.shape[0], -1)


def entries_tl1(x_q: np.ndarray) -> np.ndarray:
    """The exact table of each pair of activations.

        entry i of pair p = w0 * x_q[2p] + w1 * x_q[2p + 1]          with (w0, w1) of index i

    Parameters
    ----------
    x_q : ndarray of shape (K,), int8. Padded with zeros to Kp, a multiple of 16.

    Returns
    -------
    ndarray of shape (Kp / 2, 16), int16, |entry| <= 2 * 128 = 256; entries 9..15 are 0

    Raises
    ------
    TypeError, ValueError
        If x_q is not int8, not 1-D, or empty.
    """
    x = padded_activations(x_q, TL1.block).reshape(-1, 2)  # (Kp / 2, 2)
    return x @ PAIRS.T  # (Kp / 2, 2) @ (2, 16) -> (Kp / 2, 16) int16


def tables_tl1(x_q: np.ndarray) -> np.ndarray:
    """The tables of :func:`entries_tl1` as a kernel holds them: each entry as 28 * high + low.

    Parameters
    ----------
    x_q : ndarray of shape (K,), int8. Padded with zeros to Kp, a multiple of 16.

    Returns
    -------
    ndarray of shape (Kp / 2, 2, 16), int8: [p, 0] the low digits of pair p, [p, 1] the high digits; all within -14..14

    Raises
    ------
    TypeError, ValueError
        If x_q is not int8, not 1-D, or empty.

    Notes
    -----
    Signed base-28 digits rather than low and high bytes, so that eight of them add up within int8 (8 * 14 = 112 <=
    127) and a kernel widens once per eight lookups; see :func:`~bitnet_ref.reference.packing.base.base28_digits`.
    """
    return base28_digits(entries_tl1(x_q))


TL1 = Scheme(
    name="tl1",
    rows=64,
    block=16,
    tile_block_bytes=256,
    summary="4-bit index of two weights, for table lookup",
    encode=_encode,
    decode=_decode,
)
pack_tl1 = TL1.pack
unpack_tl1 = TL1.unpack
