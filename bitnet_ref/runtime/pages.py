"""Weights on huge pages: what is read once for every token misses small pages often.

NumPy asks the system for huge pages for an array of 4 MiB and more; packed matrices are mostly smaller, 3.5 MB in the
feed-forward network of BitNet b1.58 2B4T. So they are put together in one array.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from bitnet_ref.reference.packing import PackedTernary, get_scheme
from bitnet_ref.reference.packing.base import freeze

__all__ = ["HugePages", "huge_array"]

HUGE_PAGE = 1 << 21
LINE = 64  # bytes; where a matrix begins


def huge_array(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised uint8 array that begins a huge page."""
    n_bytes = int(np.prod(shape))
    raw, start = _memory(n_bytes)
    return raw[start : start + n_bytes].reshape(shape)


def _memory(n_bytes: int) -> tuple[np.ndarray, int]:
    """An array with so many bytes behind the first beginning of a huge page in it, and where that is."""
    raw = np.empty(n_bytes + HUGE_PAGE, np.uint8)
    return raw, -raw.ctypes.data % HUGE_PAGE


class HugePages:
    """Places packed matrices side by side.

    Parameters
    ----------
    scheme : str
    shapes : iterable of (M, K)
        Of the matrices that will be placed. One array has room for them all: each further one would leave a part of its
        last page empty, which is memory nevertheless. What is never placed takes none.
    """

    def __init__(self, scheme: str, shapes: Iterable[tuple[int, int]]) -> None:
        data_shape = get_scheme(scheme).data_shape
        self._planned = sum(_whole_lines(math.prod(data_shape(shape))) for shape in shapes)
        self._raw, self._next, self._end = np.empty(0, np.uint8), 0, 0

    def place(self, packed: PackedTernary) -> PackedTernary:
        """A copy, beside those placed before; in an array of its own if it was not among the shapes."""
        if self._next + packed.nbytes > self._end:
            n_bytes, self._planned = max(self._planned, packed.nbytes), 0
            self._raw, self._next = _memory(n_bytes)
            self._end = self._next + n_bytes
        self._raw.setflags(write=True)  # what was placed before stays read-only: those views have flags of their own
        data = self._raw[self._next : self._next + packed.nbytes].reshape(packed.data.shape)
        data[...] = packed.data
        freeze(data)
        self._next += _whole_lines(packed.nbytes)
        return PackedTernary(data, packed.shape, packed.scheme)


def _whole_lines(n_bytes: int) -> int:
    return -(-n_bytes // LINE) * LINE
