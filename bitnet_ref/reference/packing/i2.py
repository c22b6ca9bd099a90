"""``i2``: four weights in a byte, two bits each. The plain scheme.

A tile is 4 rows. Byte k of a tile holds column k of its rows as codes c = w + 1::

    tile g, byte k     bit   7   6   5   4   3   2   1   0
                           +-------+-------+-------+-------+
                           | row 3 | row 2 | row 1 | row 0 |     row r = row 4g + r of the matrix, column k
                           +-------+-------+-------+-------+

    byte = c0 + 4 c1 + 16 c2 + 64 c3

Code 3 is unused. K is padded to blocks of 64 columns; a padded weight 0 has code 1, so a byte of four zeros is 0x55.
Each vector of bytes meets contiguous activations, whatever the vector width, and each of its four fields feeds its
own output row.
"""

from __future__ import annotations

import numpy as np

from bitnet_ref.reference.packing.base import Scheme, first_true

__all__ = ["I2", "pack_i2", "unpack_i2"]


def _encode(w: np.ndarray) -> np.ndarray:
    """(4 G, K) int8 -> (G, K) uint8."""
    c = (w + 1).astype(np.uint8).reshape(-1, 4, w.shape[1])  # (G, 4, K)
    return c[:, 0] | c[:, 1] << 2 | c[:, 2] << 4 | c[:, 3] << 6


def _decode(data: np.ndarray) -> np.ndarray:
    """(G, K) uint8 -> (4 G, K) int8."""
    unused = data & data >> 1 & 0x55  # bit 2r is set where row r has both its bits set: code 3
    if unused.any():
        g, k = first_true(unused)
        r = next(r for r in range(4) if unused[g, k] >> 2 * r & 1)
        raise I2.unused("code 3", g, k, data[g, k], 4 * g + r, k)
    w = np.empty((data.shape[0], 4, data.shape[1]), np.int8)
    for r in range(4):
        w[:, r] = data >> 2 * r & 3
    w -= 1
    return w.reshape(-1, data.shape[1])


I2 = Scheme(
    name="i2",
    rows=4,
    block=64,
    tile_block_bytes=64,
    summary="four 2-bit codes a byte, one column of four rows",
    encode=_encode,
    decode=_decode,
)
pack_i2 = I2.pack
unpack_i2 = I2.unpack
