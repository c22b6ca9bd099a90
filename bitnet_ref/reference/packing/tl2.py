"""``tl2``: a sign and a 4-bit index for three weights: five bits for three, for table lookup.

Three neighbouring weights of a row, (w0, w1, w2) at columns 3p .. 3p + 2, have 27 values. Negating all three negates
their sum with any activations, so a table of 14 entries and a sign are enough::

    v = 9 w0 + 3 w1 + w2           -13..13
    index = |v|                    0..13,   sign = 1 if v < 0

    index       0    1    2    3    4    5    6    7    8    9   10   11   12   13
    (w0,w1,w2) 000  00+  0+-  0+0  0++  +--  +-0  +-+  +0-  +00  +0+  ++-  ++0  +++

A tile is 64 rows. One tile x one block of 24 columns (8 triples) is 320 bytes, block b at byte 320 b of its tile:
four runs of 64 index bytes, then 64 sign bytes::

    byte 64 j + r (j = 0..3)   bit   7   6   5   4   3   2   1   0
                                   +---------------+---------------+
                                   | triple 2j+1   | triple 2j     |     indices of row 64 t + r;
                                   +---------------+---------------+     triple p is columns 24 b + 3 p .. + 2

    byte 256 + r               bit   7   6   5   4   3   2   1   0
                                   +---+---+---+---+---+---+---+---+
                                   |t 7|t 6|t 5|t 4|t 3|t 2|t 1|t 0|     signs of row 64 t + r
                                   +---+---+---+---+---+---+---+---+

Indices 14 and 15 are unused, and so is a sign bit with index 0. Padding weights 0 are bytes 0x00.

Tables are made and stored as for ``tl1``, one per triple of activations: :func:`entries_tl2`, :func:`tables_tl2`. A
kernel negates the looked-up sum where the sign bit is set.
"""

from __future__ import annotations

import numpy as np

from bitnet_ref.reference.packing.base import Scheme, base28_digits, first_true, padded_activations

__all__ = ["TL2", "entries_tl2", "pack_tl2", "tables_tl2", "unpack_tl2"]

# Weights that each index (with sign 0) stands for; the unused indices 14 and 15 have weights 0 and so entries 0.
TRIPLES = np.zeros((16, 3), np.int16)
TRIPLES[:14] = [(w0, w1, w2) for w0 in (-1, 0, 1) for w1 in (-1, 0, 1) for w2 in (-1, 0, 1)][13:]


def _encode(w: np.ndarray) -> np.ndarray:
    """(64 T, 24 B) int8 -> (T, 320 B) uint8."""
    triple = w.reshape(-1, 64, w.shape[1] // 24, 8, 3)  # (T, 64, B, 8, w0 w1 w2)
    v = 9 * triple[..., 0] + 3 * triple[..., 1] + triple[..., 2]  # (T, 64, B, 8) int8
    index = np.abs(v).astype(np.uint8)
    nibbles = index[..., 0::2] | index[..., 1::2] << 4  # (T, 64, B, 4)
    signs = np.packbits(v < 0, axis=-1, bitorder="little")  # (T, 64, B, 1)
    runs = np.concatenate([nibbles, signs], axis=-1)  # (T, 64, B, 5)
    return np.ascontiguousarray(runs.transpose(0, 2, 3, 1)).reshape(runs.shape[0], -1)


def _decode(data: np.ndarray) -> np.ndarray:
    """(T, 320 B) uint8 -> (64 T, 24 B) int8."""
    runs = data.reshape(data.shape[0], -1, 5, 64)  # (T, B, 5, 64)
    nibbles = runs[:, :, :4]  # (T, B, 4, 64)
    index = np.stack([nibbles & 15, nibbles >> 4], axis=3).reshape(*runs.shape[:2], 8, 64)  # (T, B, 8, 64)
    negative = np.unpackbits(runs[:, :, 4:], axis=2, bitorder="little").view(bool)  # (T, B, 8, 64)
    if (index > 13).any():
        t, b, p, r = first_true(index > 13)
        byte = 320 * b + 64 * (p // 2) + r
        raise TL2.unused(f"index {index[t, b, p, r]} (above 13)", t, byte, data[t, byte], 64 * t + r, 24 * b + 3 * p)
    if (negative & (index == 0)).any():
        t, b, p, r = first_true(negative & (index == 0))
        byte = 320 * b + 256 + r
        raise TL2.unused("a sign bit with index 0", t, byte, data[t, byte], 64 * t + r, 24 * b + 3 * p)

    v = index.view(np.int8)
    np.negative(v, out=v, where=negative)
    v = (v.transpose(0, 3, 1, 2) + 13).astype(np.uint8)  # (T, 64, B, 8): 9 (w0 + 1) + 3 (w1 + 1) + (w2 + 1)
    w = np.empty((*v.shape, 3), np.int8)
    for i, digit in enumerate((v // 9, v // 3 % 3, v % 3)):
        w[..., i] = digit
    w -= 1
    return w.reshape(64 * v.shape[0], -1)


def entries_tl2(x_q: np.ndarray) -> np.ndarray:
    """The exact table of each triple of activations.

        entry i of triple p = w0 * x_q[3p] + w1 * x_q[3p + 1] + w2 * x_q[3p + 2]      with (w0, w1, w2) of index i

    Parameters
    ----------
    x_q : ndarray of shape (K,), int8. Padded with zeros to Kp, a multiple of 24.

    Returns
    -------
    ndarray of shape (Kp / 3, 16), int16, |entry| <= 3 * 128 = 384; entries 14 and 15 are 0

    Raises
    ------
    TypeError, ValueError
        If x_q is not int8, not 1-D, or empty.
    """
    x = padded_activations(x_q, TL2.block).reshape(-1, 3)  # (Kp / 3, 3)
    return x @ TRIPLES.T  # (Kp / 3, 3) @ (3, 16) -> (Kp / 3, 16) int16


def tables_tl2(x_q: np.ndarray) -> np.ndarray:
    """The tables of :func:`entries_tl2` as a kernel holds them: each entry as 28 * high + low.

    Parameters
    ----------
    x_q : ndarray of shape (K,), int8. Padded with zeros to Kp, a multiple of 24.

    Returns
    -------
    ndarray of shape (Kp / 3, 2, 16), int8: [p, 0] the low digits of triple p, [p, 1] the high digits; all within
    -14..14

    Raises
    ------
    TypeError, ValueError
        If x_q is not int8, not 1-D, or empty.

    Notes
    -----
    Signed base-28 digits rather than low and high bytes, so that eight of them, negated or not, add up within int8
    (8 * 14 = 112 <= 127) and a kernel widens once per eight lookups; see
    :func:`~bitnet_ref.reference.packing.base.base28_digits`.
    """
    return base28_digits(entries_tl2(x_q))


TL2 = Scheme(
    name="tl2",
    rows=64,
    block=24,
    tile_block_bytes=320,
    summary="sign and 4-bit index of three weights, for table lookup",
    encode=_encode,
    decode=_decode,
)
pack_tl2 = TL2.pack
unpack_tl2 = TL2.unpack
