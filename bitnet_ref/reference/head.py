"""The output head, and the tables that it and the embedding may be stored as.

========  ===========================================================  ================  ===============
type      a row of K values                                            bits per weight   product
========  ===========================================================  ================  ===============
``F32``   float32                                                      32                float32
``F16``   float16                                                      16                float32
``BF16``  the upper half of a float32                                  16                float32
``Q8_0``  blocks of 32: float16 d, int8 q;  w = d q                    8.5               int8
``Q6_K``  blocks of 256: low four and high two bits of q in 0..63,     6.5625            int8
          sixteen int8 scales s, float16 d;  w = (d s) (q - 32)
``Q4_0``  blocks of 32: float16 d, 16 bytes of q in 0..15, columns     4.5               int8
          0-15 low, 16-31 high;  w = d (q - 8)
========  ===========================================================  ================  ===============

The block types are those of llama.cpp, byte for byte. Encoders are in :mod:`bitnet_ref.formats.float_types`. A head of
a block type is multiplied with activations in int8, see :func:`head_logits`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitnet_ref.reference.quantize import quantize_activations

__all__ = ["TABLE_TYPES", "FloatTable", "decode_rows", "head_logits"]

TABLE_TYPES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q6_K": (256, 210), "Q4_0": (32, 18)}
"""Name -> (weights, bytes) of a block."""

_LANES = 16
_ACTIVATION_BLOCK = 32  # columns that share a scale where activations of the head are int8


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
    q, scales, d = _integers(raw, type_name)
    scale = d[:, :, None] * scales.astype(np.float32)  # (n, blocks, groups)
    groups = q.reshape(*scale.shape, -1).astype(np.float32)  # (n, blocks, groups, columns)
    return (scale[..., None] * groups).reshape(n, -1)


def _integers(raw: np.ndarray, type_name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a block type as integers: w = (d scale) q, with one d a block and one scale a group of its columns.

    Returns
    -------
    q : ndarray of shape (n, K), int8
    scales : ndarray of shape (n, blocks, groups), int8
    d : ndarray of shape (n, blocks), float32
    """
    n = len(raw)
    blocks = np.ascontiguousarray(raw).reshape(-1, TABLE_TYPES[type_name][1])
    d_bytes = blocks[:, 208:] if type_name == "Q6_K" else blocks[:, :2]
    d = np.ascontiguousarray(d_bytes).view("<f2").astype(np.float32).reshape(n, -1)
    scales = np.ones((*d.shape, 1), np.int8)
    if type_name == "Q8_0":
        q = blocks[:, 2:].view(np.int8)
    elif type_name == "Q4_0":
        q = (blocks[:, None, 2:] >> np.array([0, 4], np.uint8)[:, None] & 15).astype(np.int8) - np.int8(8)
    else:
        low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
        low = low >> np.array([0, 4], np.uint8)[:, None] & 15  # (blocks, halves, nibbles, 64)
        high = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3  # (blocks, halves, quarters, 32)
        q = (low.reshape(-1, 256) | high.reshape(-1, 256) << 4).astype(np.int8) - np.int8(32)
        scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).reshape(*d.shape, 16)
    return q.reshape(n, -1), scales, d


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
    that compiled code can give the same bits. Sixteen float32 sums take the columns in turns; at the end sums l and
    l + 8 are added, of these l and l + 4, l and l + 2, and the last two.

    ``F32``, ``F16``, ``BF16``: sum l takes columns l, l + 16, l + 32, ... in this order, each product and each addition
    rounded to float32.

    ``Q8_0``, ``Q6_K``, ``Q4_0``: x becomes int8 by :func:`quantize_activations`, 32 columns a scale (so magnitudes
    below 1e-5 / 254 become 0). Sum l takes columns 4 l .. 4 l + 3 of each 64 in turn. Its four products (times the
    scale of the group, for Q6_K) are added as integers, exactly: below 2^24, so exact in float32 as well. They are
    multiplied by the float32 product of the scale of the weights' block and that of the activations' block, rounded,
    and added, rounded.
    """
    if isinstance(table, np.ndarray):
        return x @ table.astype(np.float32, copy=False).T  # (T, K) @ (K, V) -> (T, V)
    multiply = _float_sums if TABLE_TYPES[table.type][0] == 1 else _integer_sums
    out = np.empty((len(x), len(table.raw)), np.float32)
    step = max(1, (1 << 22) // (len(x) * table.columns))  # rows at a time: the products take 16 MiB
    for i in range(0, out.shape[1], step):
        sums = multiply(x, table.raw[i : i + step], table.type)  # (T, rows, lanes)
        width = _LANES
        while width > 1:
            width //= 2
            sums = sums[..., :width] + sums[..., width : 2 * width]
        out[:, i : i + step] = sums[..., 0]
    return out


def _float_sums(x: np.ndarray, raw: np.ndarray, type_name: str) -> np.ndarray:
    """The sixteen sums of each row, shape (T, rows, lanes), of products in float32."""
    padding = -x.shape[1] % _LANES
    a = np.pad(x, ((0, 0), (0, padding))).reshape(len(x), 1, -1, _LANES)  # (T, 1, steps, lanes)
    w = np.pad(decode_rows(raw, type_name), ((0, 0), (0, padding))).reshape(1, len(raw), -1, _LANES)
    products = a * w  # (T, rows, steps, lanes)
    sums = np.zeros((len(x), len(raw), _LANES), np.float32)
    for j in range(a.shape[2]):
        sums += products[:, :, j]
    return sums


def _integer_sums(x: np.ndarray, raw: np.ndarray, type_name: str) -> np.ndarray:
    """The sixteen sums of each row, shape (T, rows, lanes), of int8 products and a float32 scale for 32 columns."""
    (t, k), n = x.shape, len(raw)
    x_q, x_scale = quantize_activations(x.reshape(t, -1, _ACTIVATION_BLOCK))  # (T, blocks, 32), (T, blocks, 1)
    q, scales, d = _integers(raw, type_name)
    scales, d = scales.reshape(n, -1).astype(np.int32), d[:, :, None]
    products = x_q.reshape(t, 1, -1, 4).astype(np.int32) * q.reshape(1, n, -1, 4)  # (T, rows, K / 4, 4)
    fours = products.sum(axis=-1, dtype=np.int32) * np.repeat(scales, k // 4 // scales.shape[1], axis=1)
    fours = fours.reshape(t, n, -1, _ACTIVATION_BLOCK // 4).astype(np.float32)  # (T, rows, blocks, 8), exact
    d = np.broadcast_to(d, (*d.shape[:2], x_q.shape[1] // d.shape[1])).reshape(1, n, -1)  # (1, rows, blocks)
    terms = fours * (d * x_scale.reshape(t, 1, -1))[..., None]
    sums = np.zeros((t, n, 2, _ACTIVATION_BLOCK // 4), np.float32)
    for j in range(terms.shape[2]):
        sums[:, :, j % 2] += terms[:, :, j]
    return sums.reshape(t, n, _LANES)
