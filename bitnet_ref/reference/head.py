"""The output head, and the tables that it and the embedding may be stored as.

========  ===========================================================  ================
type      a row of K values                                            bits per weight
========  ===========================================================  ================
``F32``   float32                                                      32
``F16``   float16                                                      16
``BF16``  the upper half of a float32                                  16
``Q8_0``  blocks of 32: float16 d, int8 q;  w = d q                    8.5
``Q6_K``  blocks of 256: low four and high two bits of q in 0..63,     6.5625
          sixteen int8 scales s, float16 d;  w = (d s) (q - 32)
========  ===========================================================  ================

The block types are those of llama.cpp, byte for byte. Encoders are in :mod:`bitnet_ref.formats.float_types`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["TABLE_TYPES", "FloatTable", "decode_rows", "head_logits"]

TABLE_TYPES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q6_K": (256, 210)}
"""Name -> (weights, bytes) of a block."""

_LANES = 16


@dataclass(frozen=True, eq=False)
class FloatTable:
    """A matrix (V, K) of one of :data:`TABLE_TYPES`, kept as stored bytes; indexing it by tokens decodes their rows.

    Parameters
    ----------
    raw : ndarray of shape (V, bytes of a row), uint8
    type : str
    columns : int
        K.

    Raises
    ------
    ValueError
        If there is no such type, or K is not whole blocks of it, or raw has not that many bytes.
    TypeError
        If raw is not uint8.
    """

    raw: np.ndarray
    type: str
    columns: int

    def __post_init__(self) -> None:
        if self.type not in TABLE_TYPES:
            raise ValueError(f"the type of a table must be one of {', '.join(TABLE_TYPES)}, got {self.type!r}")
        block, block_bytes = TABLE_TYPES[self.type]
        if self.columns < 1 or self.columns % block:
            raise ValueError(f"{self.type} needs a multiple of {block} columns, got {self.columns}")
        if self.raw.dtype != np.uint8:
            raise TypeError(f"the bytes of a table must be uint8, got {self.raw.dtype}")
        if self.raw.ndim != 2 or self.raw.shape[1] != self.columns // block * block_bytes:
            raise ValueError(
                f"rows of {self.columns} {self.type} values must have {self.columns // block * block_bytes} bytes, "
                f"got shape {self.raw.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(V, K)."""
        return len(self.raw), self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the whole table."""
        return self.raw.nbytes

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """These rows as float32, shape (n, K)."""
        return decode_rows(self.raw[rows], self.type)


def decode_rows(raw: np.ndarray, type_name: str) -> np.ndarray:
    """The float32 values of stored rows.

    Parameters
    ----------
    raw : ndarray of shape (n, bytes of a row), uint8
    type_name : one of :data:`TABLE_TYPES`

    Returns
    -------
    ndarray of shape (n, K), float32

    Notes
    -----
    Exact but for Q6_K, where (d s) (q - 32) is rounded once.
    """
    n = len(raw)
    raw = np.ascontiguousarray(raw)
    if type_name == "F32":
        return raw.view("<f4").astype(np.float32, copy=False)
    if type_name == "F16":
        return raw.view("<f2").astype(np.float32)
    if type_name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = raw.reshape(-1, TABLE_TYPES[type_name][1])
    if type_name == "Q8_0":
        d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)  # (blocks, 1)
        return (d * blocks[:, 2:].view(np.int8).astype(np.float32)).reshape(n, -1)
    low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = low >> np.array([0, 4], np.uint8)[:, None] & 15  # (blocks, halves, nibbles, 64)
    high = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3  # (blocks, halves, quarters, 32)
    q = (low.reshape(-1, 256) | high.reshape(-1, 256) << 4).astype(np.float32) - 32  # (blocks, 256)
    d = np.ascontiguousarray(blocks[:, 208:]).view("<f2").astype(np.float32)  # (blocks, 1)
    scale = d * blocks[:, 192:208].view(np.int8).astype(np.float32)  # (blocks, 16)
    return (scale[:, :, None] * q.reshape(-1, 16, 16)).reshape(n, -1)


def head_logits(x: np.ndarray, table: np.ndarray | FloatTable) -> np.ndarray:
    """Logits: the product of the final norm's output with the head.

    Parameters
    ----------
    x : ndarray of shape (T, K), float32
    table : ndarray of shape (V, K), floating point, or FloatTable

    Returns
    -------
    ndarray of shape (T, V), float32

    Notes
    -----
    For an array this is one float32 product, summed as BLAS pleases. For a FloatTable every rounding is defined, so
    that compiled code can give the same bits: sixteen sums, of which sum l takes columns l, l + 16, l + 32, ... in this
    order, each product and each addition rounded to float32; then sums l and l + 8 are added, of these l and l + 4,
    l and l + 2, and the last two.
    """
    if isinstance(table, np.ndarray):
        return x @ table.astype(np.float32, copy=False).T  # (T, K) @ (K, V) -> (T, V)
    t, k = x.shape
    padding = -k % _LANES
    a = np.pad(x, ((0, 0), (0, padding))).reshape(t, 1, -1, _LANES)  # (T, 1, steps, lanes)
    out = np.empty((t, len(table.raw)), np.float32)
    step = max(1, (1 << 22) // (t * (k + padding)))  # rows at a time: the products take 16 MiB
    for i in range(0, out.shape[1], step):
        w = np.pad(table[i : i + step], ((0, 0), (0, padding))).reshape(1, -1, a.shape[2], _LANES)
        products = a * w  # (T, rows, steps, lanes)
        sums = np.zeros((*products.shape[:2], _LANES), np.float32)
        for j in range(a.shape[2]):
            sums += products[:, :, j]
        width = _LANES
        while width > 1:
            width //= 2
            sums = sums[..., :width] + sums[..., width : 2 * width]
        out[:, i : i + step] = sums[..., 0]
    return out
