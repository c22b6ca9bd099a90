"""Four ways to store a ternary matrix, each on a page of its own.

=========  ====  =======  ===============  ==========================================
scheme     tile  block    bits per weight  what a byte holds
=========  ====  =======  ===============  ==========================================
``i2``     4     64       2                four 2-bit codes of one column
``base3``  5     64       1.6              five ternary digits of one column
``tl1``    64    16       2                two 4-bit indices of two weights each
``tl2``    64    24       5/3              two 4-bit indices, or signs, of three weights each
=========  ====  =======  ===============  ==========================================

``i2`` and ``base3`` interleave *rows* in a byte, so that one vector of activations serves every weight of a vector of
bytes. ``tl1`` and ``tl2`` are made for lookup tables: a byte shuffle reads the same table for 64 rows at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from bitnet_ref.reference.packing.base import PackedTernary, Scheme
from bitnet_ref.reference.packing.base3 import BASE3, pack_base3, unpack_base3
from bitnet_ref.reference.packing.base3r import BASE3R
from bitnet_ref.reference.packing.i2 import I2, pack_i2, unpack_i2
from bitnet_ref.reference.packing.tl1 import TL1, entries_tl1, pack_tl1, tables_tl1, unpack_tl1
from bitnet_ref.reference.packing.tl2 import TL2, entries_tl2, pack_tl2, tables_tl2, unpack_tl2

__all__ = [
    "ROW_SCHEMES",
    "SCHEMES",
    "PackedTernary",
    "Scheme",
    "entries_tl1",
    "entries_tl2",
    "get_scheme",
    "pack",
    "pack_base3",
    "pack_i2",
    "pack_tl1",
    "pack_tl2",
    "schemes",
    "tables_tl1",
    "tables_tl2",
    "unpack",
    "unpack_base3",
    "unpack_i2",
    "unpack_tl1",
    "unpack_tl2",
]

SCHEMES: Mapping[str, Scheme] = MappingProxyType({scheme.name: scheme for scheme in (I2, BASE3, TL1, TL2)})

ROW_SCHEMES: Mapping[str, Scheme] = MappingProxyType({BASE3R.name: BASE3R})
"""Layouts by single rows, for products with a list of rows only; see :mod:`bitnet_ref.reference.sparse`."""


def schemes() -> tuple[str, ...]:
    """Names of the packing schemes."""
    return tuple(SCHEMES)


def get_scheme(name: str) -> Scheme:
    """The packing scheme of that name, one of rows (:data:`ROW_SCHEMES`) too; ValueError if there is none."""
    if isinstance(name, str) and name in ROW_SCHEMES:
        return ROW_SCHEMES[name]
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {name!r}")
    return SCHEMES[name]


def pack(w_q: np.ndarray, scheme: str) -> PackedTernary:
    """Pack a ternary matrix.

    Parameters
    ----------
    w_q : ndarray of shape (M, K), int8, values in {-1, 0, 1}; M >= 1, K >= 1. Not modified.
    scheme : str
        One of :func:`schemes`.

    Returns
    -------
    PackedTernary
        Its ``unpack()`` gives w_q back exactly.

    Raises
    ------
    TypeError
        If w_q is not an int8 array.
    ValueError
        If the scheme is unknown, or w_q is not 2-D, has no element or holds another value; the message says where.
    """
    return get_scheme(scheme).pack(w_q)


def unpack(packed: PackedTernary) -> np.ndarray:
    """The int8 matrix of a :class:`PackedTernary`; see :meth:`Scheme.unpack`."""
    return packed.unpack()
