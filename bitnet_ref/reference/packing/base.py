"""What the four packing schemes share: the packed matrix, checks, padding, and table entries split in two digits."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

__all__ = ["PackedTernary", "Scheme", "base28_digits", "freeze"]


@dataclass(frozen=True)
class Scheme:
    """A way to store a ternary matrix in bytes.

    Rows are grouped in tiles of ``rows``, columns in blocks of ``block``; a shape that does not divide is padded with
    weights 0. One tile after the other, and within a tile one block after the other, takes ``tile_block_bytes``
    bytes. The layout belongs to the scheme alone: the same matrix gives the same bytes on every machine, for every
    instruction set.

    Attributes
    ----------
    name : str
    rows : int
        Rows of a tile.
    block : int
        Columns of a block.
    tile_block_bytes : int
        Bytes of one tile x one block.
    summary : str
        The scheme in a few words, for tables.
    encode : callable
        Padded int8 weights (n_tiles * rows, n_blocks * block) -> uint8 (n_tiles, tile_stride_bytes). Checks nothing.
    decode : callable
        The inverse; raises ValueError for a bit pattern that no weights have.
    """

    name: str
    rows: int
    block: int
    tile_block_bytes: int
    summary: str
    encode: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    decode: Callable[[np.ndarray], np.ndarray] = field(repr=False)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of a matrix that needs no padding."""
        return self.tile_block_bytes * 8 / (self.rows * self.block)

    def padded_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(M, K) rounded up to whole tiles and blocks."""
        m, k = shape
        return -(-m // self.rows) * self.rows, -(-k // self.block) * self.block

    def data_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(n_tiles, tile_stride_bytes) of the packed bytes of an (M, K) matrix."""
        m_padded, k_padded = self.padded_shape(shape)
        return m_padded // self.rows, k_padded // self.block * self.tile_block_bytes

    def pack(self, w_q: np.ndarray) -> PackedTernary:
        """Bytes of a ternary matrix.

        Parameters
        ----------
        w_q : ndarray of shape (M, K), int8, values in {-1, 0, 1}; M >= 1, K >= 1, any memory order. Not modified.

        Returns
        -------
        PackedTernary

        Raises
        ------
        TypeError
            If w_q is not an int8 array.
        ValueError
            If w_q is not 2-D, has no element, or holds another value; the message names the first such index.
        """
        if not isinstance(w_q, np.ndarray) or w_q.dtype != np.int8:
            raise TypeError(f"w_q must be an int8 array, got {getattr(w_q, 'dtype', type(w_q).__name__)}")
        if w_q.ndim != 2 or w_q.size == 0:
            raise ValueError(f"w_q must have shape (M, K) with M >= 1 and K >= 1, got shape {w_q.shape}")
        if w_q.min() < -1 or w_q.max() > 1:
            row, column = first_true((w_q < -1) | (w_q > 1))
            raise ValueError(f"w_q must hold only -1, 0 and 1, got {w_q[row, column]} at row {row}, column {column}")
        m, k = w_q.shape
        padded = w_q
        if self.padded_shape((m, k)) != (m, k):
            padded = np.zeros(self.padded_shape((m, k)), np.int8)
            padded[:m, :k] = w_q
        data = self.encode(padded)
        freeze(data)
        return PackedTernary(data, (m, k), self.name)

    def unpack(self, data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The matrix that the bytes stand for; the exact inverse of :meth:`pack`.

        Parameters
        ----------
        data : ndarray of shape (n_tiles, tile_stride_bytes), uint8. Not modified.
        shape : (M, K)

        Returns
        -------
        ndarray of shape (M, K), int8, C order, values in {-1, 0, 1}

        Raises
        ------
        TypeError
            If data is not a uint8 array.
        ValueError
            If data has not the size that the shape needs, holds a bit pattern that stands for no weights, or holds a
            weight other than 0 in the padding; the message says where.
        """
        self._check(data, shape)
        m, k = shape
        w = self.decode(data)
        if w[m:].any() or w[:, k:].any():
            w[:m, :k] = 0
            row, column = first_true(w != 0)
            raise ValueError(
                f"{self.name} padding must hold weight 0, got {w[row, column]} at row {row}, column {column} "
                f"outside the {m} x {k} matrix"
            )
        return np.ascontiguousarray(w[:m, :k])

    def unused(self, what: str, tile: int, byte: int, value: int, row: int | str, column: int | str) -> ValueError:
        """The error of :attr:`decode` for a bit pattern that stands for no weights."""
        return ValueError(
            f"{self.name} data must not hold {what}, got it in tile {tile}, byte {byte} (0x{value:02x}), "
            f"row {row}, column {column}"
        )

    def _check(self, data: np.ndarray, shape: tuple[int, int]) -> None:
        """Refuses bytes whose dtype or size is not that of an (M, K) matrix."""
        m, k = _checked_shape(shape)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
            raise TypeError(f"data must be a uint8 array, got {getattr(data, 'dtype', type(data).__name__)}")
        if data.shape != self.data_shape(shape):
            raise ValueError(
                f"{self.name} data of a {m} x {k} matrix must have shape {self.data_shape(shape)}, got {data.shape}"
            )


@dataclass(frozen=True, eq=False, repr=False)
class PackedTernary:
    """A ternary matrix in packed bytes. It cannot be changed; equal bytes of one scheme and shape compare equal.

    Parameters
    ----------
    data : ndarray of shape (n_tiles, tile_stride_bytes), uint8
        Kept C-contiguous and read-only. An array that could still be written to, by itself or through one that it is a
        view of, is copied; a read-only one (from a memory map, say) is taken as it is.
    shape : (M, K)
        Outputs and inputs of the matrix, without padding.
    scheme : str
        Name of the packing scheme.

    Raises
    ------
    TypeError
        If data is not a uint8 array.
    ValueError
        If the scheme is unknown or data has not the size that it needs. The bytes themselves are checked by
        :meth:`unpack`.
    """

    data: np.ndarray
    shape: tuple[int, int]
    scheme: str

    # NumPy would compare a packed matrix with an array element by element.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        shape = _checked_shape(self.shape)
        _scheme(self.scheme)._check(self.data, shape)
        data = self.data.copy() if _writable(self.data) else np.ascontiguousarray(self.data)
        data.setflags(write=False)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "shape", shape)

    def __reduce__(self) -> tuple[object, ...]:
        return PackedTernary, (self.data, self.shape, self.scheme)

    @property
    def nbytes(self) -> int:
        """Bytes of ``data``, padding included."""
        return self.data.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight of the (M, K) matrix, padding included: above nominal where the shape does not fit."""
        m, k = self.shape
        return self.nbytes * 8 / (m * k)

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Rows and columns that ``data`` has room for."""
        return _scheme(self.scheme).padded_shape(self.shape)

    def unpack(self) -> np.ndarray:
        """The int8 matrix of shape (M, K); see :meth:`Scheme.unpack`."""
        return _scheme(self.scheme).unpack(self.data, self.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedTernary):
            return NotImplemented
        return (self.scheme, self.shape) == (other.scheme, other.shape) and np.array_equal(self.data, other.data)

    def __hash__(self) -> int:
        return hash((self.scheme, self.shape, self.data.tobytes()))

    def __repr__(self) -> str:
        m, k = self.shape
        return f"PackedTernary({self.scheme}, {m} x {k}, {self.nbytes:,} bytes, {self.bits_per_weight:.4f} bits/weight)"

    def _repr_html_(self) -> str:
        m, k = self.shape
        m_padded, k_padded = self.padded_shape
        first = self.data[0, :12].tobytes().hex(" ")
        cells = {
            "scheme": f"<b>{self.scheme}</b>: {_scheme(self.scheme).summary}",
            "matrix": f"{m} outputs &times; {k} inputs",
            "stored": f"{m_padded} &times; {k_padded} with padding",
            "size": f"{self.nbytes:,} bytes, {self.bits_per_weight:.4f} bits per weight",
            "first bytes": f"<code>{first} &hellip;</code>",
        }
        rows = "".join(
            f'<tr><th style="text-align:left">{name}</th><td style="text-align:left">{text}</td></tr>'
            for name, text in cells.items()
        )
        return f"<table><caption>PackedTernary</caption>{rows}</table>"


def _checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """(M, K) as plain integers; ValueError unless it is two of at least 1."""
    try:
        m, k = (operator.index(size) for size in shape)
    except (TypeError, ValueError):
        raise ValueError(f"shape must be two integers (M, K), got {shape!r}") from None
    if m < 1 or k < 1:
        raise ValueError(f"shape must be (M, K) with M >= 1 and K >= 1, got {shape}")
    return m, k


def freeze(data: np.ndarray) -> None:
    """Make an array read-only together with every array that it is a view of."""
    while isinstance(data, np.ndarray):
        data.setflags(write=False)
        data = data.base


def _writable(data: np.ndarray) -> bool:
    """Whether anybody can still change these bytes: through the array, or through one that it is a view of."""
    while isinstance(data, np.ndarray):
        if data.flags.writeable:
            return True
        data = data.base
    return False


def first_true(mask: np.ndarray) -> tuple[int, ...]:
    """Index of the first True in row-major order."""
    return tuple(int(i) for i in np.unravel_index(np.argmax(mask), mask.shape))


def base28_digits(entries: np.ndarray) -> np.ndarray:
    """Table entries as two signed base-28 digits that a byte shuffle can look up.

        high = (1170 * e + 16384) >> 15      (arithmetic shift; e / 28 to the nearest integer, halves towards 0)
        low  = e - 28 * high                 so that e = 28 * high + low exactly

    For |e| <= 384, the most that three activations of -128 reach, both digits lie within -14..14,
    and the digits of -e are minus those of e.

    Reason: eight such digits add up to at most 8 * 14 = 112 in magnitude, so a kernel may add the looked-up digits of
    eight groups in int8 lanes and widen once per eight lookups. Split into a low and a high *byte*, the usual way
    ([bitnet.cpp]'s TL2), the low bytes fill 0..255, and every lookup must be widened before it is added.

    Parameters
    ----------
    entries : ndarray of shape (n, 16), int16, |entries| <= 384

    Returns
    -------
    ndarray of shape (n, 2, 16), int8: [:, 0] the low digits, [:, 1] the high digits
    """
    e = entries.astype(np.int32)  # 1170 * 384 needs more than 16 bits
    high = (1170 * e + 16384) >> 15
    return np.stack([e - 28 * high, high], axis=1).astype(np.int8)


def padded_activations(x_q: np.ndarray, block: int) -> np.ndarray:
    """One token, checked, as int16 and padded with zeros to a multiple of block: what table entries are summed from."""
    if not isinstance(x_q, np.ndarray) or x_q.dtype != np.int8:
        raise TypeError(f"x_q must be an int8 array, got {getattr(x_q, 'dtype', type(x_q).__name__)}")
    if x_q.ndim != 1 or x_q.size == 0:
        raise ValueError(f"x_q must be one token of shape (K,) with K >= 1, got shape {x_q.shape}")
    padded = np.zeros(-(-x_q.size // block) * block, np.int16)
    padded[: x_q.size] = x_q
    return padded


def _scheme(name: str) -> Scheme:
    """The scheme by name; imported late because the scheme modules import this one."""
    from bitnet_ref.reference.packing import get_scheme

    return get_scheme(name)
