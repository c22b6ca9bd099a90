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
a block type is multiplied with activations in int8, see :func:`head_logits`; the runtime keeps its rows in groups of
sixteen, see :func:`group_rows`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from bitnet_ref.reference.quantize import quantize_activations

__all__ = [
    "GROUP_ROWS",
    "TABLE_TYPES",
    "FloatTable",
    "GroupedTable",
    "decode_rows",
    "group_rows",
    "head_logits",
    "stored_rows",
]

TABLE_TYPES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q6_K": (256, 210), "Q4_0": (32, 18)}
"""Name -> (weights, bytes) of a block."""

GROUP_ROWS = 16
"""Rows of a table of integers that lie together in a :class:`GroupedTable`."""

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


@dataclass(frozen=True, eq=False)
class GroupedTable:
    """A table of integers in the order in which one token reads it: :func:`group_rows` of a :class:`FloatTable`.

    Parameters
    ----------
    data : ndarray of shape (ceil(V / 16), 16 * bytes of a row), uint8
    type : str
    rows, columns : int
        V and K.

    Raises
    ------
    ValueError
        If there is no such type of integers, or data has another shape or is not uint8.
    """

    data: np.ndarray
    type: str
    rows: int
    columns: int

    def __post_init__(self) -> None:
        block, block_bytes = _integer_type(self.type)
        shape = (-(-self.rows // GROUP_ROWS), self.columns // block * block_bytes * GROUP_ROWS)
        if self.columns < 1 or self.columns % block or self.data.shape != shape or self.data.dtype != np.uint8:
            raise ValueError(
                f"{self.rows} grouped rows of {self.columns} {self.type} values must be uint8 of shape {shape}, got "
                f"{self.data.dtype} of shape {self.data.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(V, K)."""
        return self.rows, self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the whole table, with the rows that fill the last group up."""
        return self.data.nbytes

    @property
    def raw(self) -> np.ndarray:
        """The rows as a :class:`FloatTable` stores them, made anew; shape (V, bytes of a row), uint8."""
        return stored_rows(self.data, self.type, np.arange(self.rows))

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """These rows as float32, shape (n, K)."""
        if isinstance(rows, slice):
            rows = np.arange(self.rows)[rows]
        elif len(rows) and not 0 <= np.min(rows) <= np.max(rows) < self.rows:  # the last group may have room for more
            raise IndexError(f"rows must lie between 0 and {self.rows - 1}, got {np.min(rows)} to {np.max(rows)}")
        return decode_rows(stored_rows(self.data, self.type, np.asarray(rows)), self.type)


def _integer_type(type_name: str) -> tuple[int, int]:
    found = TABLE_TYPES.get(type_name, (1, 0))
    if found[0] == 1:
        names = [name for name, (block, _) in TABLE_TYPES.items() if block > 1]
        raise ValueError(f"rows of {', '.join(names)} can be grouped, got {type_name!r}")
    return found


def group_rows(raw: np.ndarray, type_name: str) -> np.ndarray:
    """Rows of a block type, sixteen together, so that a vector holds a piece of each.

    Parameters
    ----------
    raw : ndarray of shape (V, bytes of a row), uint8
    type_name : "Q8_0", "Q6_K" or "Q4_0"

    Returns
    -------
    ndarray of shape (ceil(V / 16), 16 * bytes of a row), uint8

    Notes
    -----
    A group is: for each block the sixteen d; Q6_K: for each block and each of its sixteen scales that scale of the
    sixteen rows; for each block and each four bytes of its quants those four of the sixteen rows. In Q6_K these bytes
    are taken, for each half of a block and j = 0, 4, .. 28, in the order: low bits of columns j .. j + 3 and j + 64 ..,
    low bits of j + 32 .. and j + 96 .., high bits of all four. Missing rows of the last group are zeros, d among them.
    """
    block_bytes = _integer_type(type_name)[1]
    n_groups = -(-len(raw) // GROUP_ROWS)
    filled = np.zeros((n_groups * GROUP_ROWS, raw.shape[1]), np.uint8)
    filled[: len(raw)] = raw
    blocks = filled.reshape(n_groups, GROUP_ROWS, -1, block_bytes)
    blocks = blocks.swapaxes(1, 2)  # (groups, blocks, rows, bytes)
    parts = []
    for starts, size in _parts(type_name):
        pieces = blocks[..., starts[:, None] + np.arange(size)]  # (groups, blocks, rows, pieces, bytes)
        parts.append(pieces.swapaxes(2, 3).reshape(n_groups, -1))
    return np.concatenate(parts, axis=1)


def stored_rows(data: np.ndarray, type_name: str, rows: np.ndarray) -> np.ndarray:
    """Single rows of what :func:`group_rows` made, as they were: shape (n, bytes of a row), uint8."""
    block_bytes = _integer_type(type_name)[1]
    n_blocks = data.shape[1] // (GROUP_ROWS * block_bytes)
    groups, lanes = np.divmod(rows, GROUP_ROWS)
    out = np.empty((len(rows), n_blocks, block_bytes), np.uint8)
    begin = 0
    for starts, size in _parts(type_name):
        end = begin + GROUP_ROWS * n_blocks * len(starts) * size
        part = data[:, begin:end].reshape(len(data), n_blocks, len(starts), GROUP_ROWS, size)
        out[..., starts[:, None] + np.arange(size)] = part[groups, :, :, lanes]
        begin = end
    return out.reshape(len(rows), -1)


@functools.cache  # a step of decoding would notice
def _parts(type_name: str) -> tuple[tuple[np.ndarray, int], ...]:
    """Pieces of a block that a group has together of all its rows, in its order: their first bytes and their size."""
    if type_name != "Q6_K":
        return (np.array([0]), 2), (np.arange(2, TABLE_TYPES[type_name][1], 4), 4)
    half, j, third = np.ix_(np.arange(2), np.arange(0, 32, 4), np.arange(3))
    quants = np.where(third < 2, 64 * half + 32 * third + j, 128 + 32 * half + j)
    return (np.array([208]), 2), (np.arange(192, 208), 1), (quants.reshape(-1), 4)


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


def head_logits(x: np.ndarray, table: np.ndarray | FloatTable | GroupedTable) -> np.ndarray:
    """Logits: the product of the final norm's output with the head.

    Parameters
    ----------
    x : ndarray of shape (T, K), float32
    table : ndarray of shape (V, K), floating point, or FloatTable, or GroupedTable

    Returns
    -------
    ndarray of shape (T, V), float32

    Raises
    ------
    ValueError
        If x is not finite and the table holds integers.

    Notes
    -----
    For an array this is one float32 product, summed as BLAS pleases. For a table every rounding is defined, so that
    compiled code can give the same bits.

    ``F32``, ``F16``, ``BF16``: sixteen float32 sums; sum l takes columns l, l + 16, l + 32, ... in this order, each
    product and each addition rounded to float32. At the end sums l and l + 8 are added, of these l and l + 4, l and
    l + 2, and the last two.

    ``Q8_0``, ``Q6_K``, ``Q4_0``: x becomes int8 by :func:`quantize_activations`, 32 columns a scale (so magnitudes
    below 1e-5 / 254 become 0). The products of 32 columns (times the scale of their group, for Q6_K) are added as
    integers: at most 32 * 127 * 32 * 128 < 2^24, so exact in float32 as well. They are multiplied by the float32
    product of the scale of the weights' block and that of the activations' block, rounded, and added to the sum of the
    columns before them, rounded.
    """
    if isinstance(table, np.ndarray):
        return x @ table.astype(np.float32, copy=False).T  # (T, K) @ (K, V) -> (T, V)
    multiply = _float_products if TABLE_TYPES[table.type][0] == 1 else _integer_products
    raw = table.raw
    out = np.empty((len(x), len(raw)), np.float32)
    step = max(1, (1 << 22) // (len(x) * table.columns))  # rows at a time: the products take 16 MiB
    for i in range(0, out.shape[1], step):
        out[:, i : i + step] = multiply(x, raw[i : i + step], table.type)
    return out


def _float_products(x: np.ndarray, raw: np.ndarray, type_name: str) -> np.ndarray:
    """Logits (T, rows) of products in float32."""
    padding = -x.shape[1] % _LANES
    a = np.pad(x, ((0, 0), (0, padding))).reshape(len(x), 1, -1, _LANES)  # (T, 1, steps, lanes)
    w = np.pad(decode_rows(raw, type_name), ((0, 0), (0, padding))).reshape(1, len(raw), -1, _LANES)
    products = a * w  # (T, rows, steps, lanes)
    sums = np.zeros((len(x), len(raw), _LANES), np.float32)
    for j in range(a.shape[2]):
        sums += products[:, :, j]
    width = _LANES
    while width > 1:
        width //= 2
        sums = sums[..., :width] + sums[..., width : 2 * width]
    return sums[..., 0]


def _integer_products(x: np.ndarray, raw: np.ndarray, type_name: str) -> np.ndarray:
    """Logits (T, rows) of int8 products and a float32 scale for 32 columns."""
    (t, k), n = x.shape, len(raw)
    x_q, x_scale = quantize_activations(x.reshape(t, -1, _ACTIVATION_BLOCK))  # (T, blocks, 32), (T, blocks, 1)
    q, scales, d = _integers(raw, type_name)
    scales, d = scales.reshape(n, -1).astype(np.int32), d[:, :, None]
    w = q * np.repeat(scales, k // scales.shape[1], axis=1)  # (rows, K), int32
    products = x_q.reshape(t, 1, -1, _ACTIVATION_BLOCK).astype(np.int32) * w.reshape(1, n, -1, _ACTIVATION_BLOCK)
    sums = products.sum(axis=-1, dtype=np.int32).astype(np.float32)  # (T, rows, blocks), exact
    d = np.broadcast_to(d, (*d.shape[:2], x_q.shape[1] // d.shape[1])).reshape(1, n, -1)  # (1, rows, blocks)
    terms = sums * (d * x_scale.reshape(t, 1, -1))
    out = np.zeros((t, n), np.float32)
    for j in range(terms.shape[2]):
        out += terms[:, :, j]
    return out
