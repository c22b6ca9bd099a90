"""``base3``: five weights in a byte, as the digits of a number to base 3. The smallest scheme: 3**5 = 243 <= 256.

A tile is 5 rows. Byte k of a tile holds column k of its rows as digits c = w + 1::

    tile g, byte k     digit   4       3       2       1       0
                           +-------+-------+-------+-------+-------+
                           | row 4 | row 3 | row 2 | row 1 | row 0 |     row r = row 5g + r of the matrix, column k
                           +-------+-------+-------+-------+-------+
                     value    81      27       9       3       1

    byte = c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4          0..242

Values 243..255 are unused. K is padded to blocks of 64 columns; a byte of five zeros is 1 + 3 + 9 + 27 + 81 = 121 =
0x79.
"""

from __future__ import annotations

import numpy as np

from bitnet_ref.reference.packing.base import Scheme, first_true

__all__ = ["BASE3", "pack_base3", "unpack_base3"]


def _encode(w: np.ndarray) -> np.ndarray:
    """(5 G, K) int8 -> (G, K) uint8."""
    c = (w + 1).astype(np.uint8).reshape(-1, 5, w.shape[1])  # (G, 5, K)
    data = c[:, 4].copy()
    for r in (3, 2, 1, 0):  # Horner's rule; the largest value is 242, so uint8 does not wrap
        data *= 3
        data += c[:, r]
    return data


def _decode(data: np.ndarray) -> np.ndarray:
    """(G, K) uint8 -> (5 G, K) int8."""
    if (data > 242).any():
        g, k = first_true(data > 242)
        raise BASE3.unused(f"value {data[g, k]} (above 242)", g, k, data[g, k], f"{5 * g} to {5 * g + 4}", k)
    w = np.empty((data.shape[0], 5, data.shape[1]), np.int8)
    rest = data
    for r in range(5):
        w[:, r] = rest % 3
        rest = rest // 3
    w -= 1
    return w.reshape(-1, data.shape[1])


BASE3 = Scheme(
    name="base3",
    rows=5,
    block=64,
    tile_block_bytes=64,
    summary="five ternary digits a byte, one column of five rows",
    encode=_encode,
    decode=_decode,
)
pack_base3 = BASE3.pack
unpack_base3 = BASE3.unpack
