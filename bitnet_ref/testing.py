"""Hypothesis strategies for ternary matrices and their products, for this project's tests and for yours.

    from hypothesis import given
    from bitnet_ref import testing

    @given(testing.products(rows=4, block=64))
    def test_my_kernel(problem):
        w_q, x_q = problem
        assert (my_kernel(w_q, x_q) == x_q.astype("int32") @ w_q.T.astype("int32")).all()

Shapes are drawn around whole tiles and blocks and shrink towards 1 x 1. Arrays come from three kinds, because each
misses what another finds: element by element (shrinks well, but mostly holds one value), dense from a drawn seed (no
symmetry to hide behind), and constant at the extremes (fills accumulators). Needs the extra ``[testing]``.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

__all__ = ["activations", "products", "shapes", "ternary_matrices"]

_ELEMENTWISE = 1024  # above this, element-by-element drawing exceeds Hypothesis's data limit


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")


def shapes(
    *, rows: int = 4, block: int = 64, max_tiles: int = 3, max_blocks: int = 3
) -> st.SearchStrategy[tuple[int, int]]:
    """Shapes (M, K) of whole tiles and blocks, plus or minus one row and up to five columns; at least 1 x 1.

    Parameters
    ----------
    rows, block : int
        Rows per tile and columns per block of the layout under test.
    max_tiles, max_blocks : int
    """
    _positive(rows=rows, block=block, max_tiles=max_tiles, max_blocks=max_blocks)

    def around(unit: int, most: int, slack: int) -> st.SearchStrategy[int]:
        return st.builds(
            lambda whole, rest: max(1, whole * unit + rest), st.integers(0, most), st.integers(-slack, slack)
        )

    return st.tuples(around(rows, max_tiles, 1), around(block, max_blocks, 5))


def ternary_matrices(
    shape: tuple[int, int] | st.SearchStrategy[tuple[int, int]] | None = None,
) -> st.SearchStrategy[np.ndarray]:
    """int8 matrices of -1, 0 and +1 of the given shape, or of shapes drawn from :func:`shapes`."""
    return _arrays(shapes() if shape is None else shape, -1, 1)


def activations(shape: tuple[int, ...] | st.SearchStrategy[tuple[int, ...]]) -> st.SearchStrategy[np.ndarray]:
    """int8 arrays over the whole range -128..127 of the given shape."""
    return _arrays(shape, -128, 127)


@st.composite
def products(
    draw: st.DrawFn, *, rows: int = 4, block: int = 64, max_tiles: int = 3, max_blocks: int = 3, max_tokens: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (w_q of shape (M, K), x_q of shape (T, K)) to multiply."""
    _positive(max_tokens=max_tokens)
    m, k = draw(shapes(rows=rows, block=block, max_tiles=max_tiles, max_blocks=max_blocks))
    t = draw(st.integers(1, max_tokens))
    return draw(ternary_matrices((m, k))), draw(activations((t, k)))


@st.composite
def _arrays(draw: st.DrawFn, shape: object, low: int, high: int) -> np.ndarray:
    drawn = draw(shape) if isinstance(shape, st.SearchStrategy) else shape
    kinds = ["dense", "constant"]
    if int(np.prod(drawn)) <= _ELEMENTWISE:
        kinds.insert(0, "elements")
    kind = draw(st.sampled_from(kinds))
    if kind == "elements":
        return draw(hnp.arrays(np.int8, drawn, elements=st.integers(low, high)))
    if kind == "constant":
        return np.full(drawn, draw(st.sampled_from([high, low, 0])), np.int8)
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).integers(low, high, drawn, dtype=np.int8, endpoint=True)
