"""The exported strategies: they draw what they say, refuse what they cannot, and shrink without losing density."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from bitnet_ref import testing

# Enough that a kind of one in three is missing with probability (2/3)**200 < 1e-35.
many = settings(max_examples=200, phases=[Phase.generate], derandomize=True, database=None)


def draw_many(strategy):
    """200 draws."""
    drawn = []

    @many
    @given(strategy)
    def collect(value):
        drawn.append(value)

    collect()
    return drawn


def smallest(strategy, condition):
    """What Hypothesis shrinks to."""
    return find(strategy, condition, settings=settings(database=None, derandomize=True, max_examples=500))


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "block", "max_tiles", "max_blocks"), [(4, 64, 3, 3), (64, 24, 2, 1), (1, 1, 1, 1)])
def test_shapes_lie_around_tiles_and_blocks(rows, block, max_tiles, max_blocks):
    drawn = draw_many(testing.shapes(rows=rows, block=block, max_tiles=max_tiles, max_blocks=max_blocks))
    for m, k in drawn:
        assert type(m) is int and type(k) is int
        assert 1 <= m <= max_tiles * rows + 1 and 1 <= k <= max_blocks * block + 5
        assert min(abs(m - i * rows) for i in range(max_tiles + 1)) <= 1
        assert min(abs(k - i * block) for i in range(max_blocks + 1)) <= 5
    heights, widths = {m for m, _ in drawn}, {k for _, k in drawn}
    assert heights >= {1, max(1, rows - 1), rows, rows + 1}
    assert {block, block + 1} <= widths and (block == 1 or block - 1 in widths)


def test_shapes_default_to_a_layout_with_partial_tiles_and_blocks():
    drawn = draw_many(testing.shapes())
    assert any(m % 4 for m, _ in drawn) and any(k % 64 for _, k in drawn)
    assert any(m > 4 for m, _ in drawn) and any(k > 64 for _, k in drawn)


def test_shapes_shrink_to_one_by_one():
    assert smallest(testing.shapes(), lambda shape: True) == (1, 1)


# --- arrays ---------------------------------------------------------------------------------------------------------


def test_ternary_matrices_are_ternary():
    for w_q in draw_many(testing.ternary_matrices()):
        assert w_q.dtype == np.int8 and w_q.ndim == 2 and w_q.size > 0
        assert set(np.unique(w_q)) <= {-1, 0, 1}


@pytest.mark.parametrize("shape", [(3, 5), (40, 40)])
def test_shapes_can_be_given_or_drawn(shape):
    assert {w_q.shape for w_q in draw_many(testing.ternary_matrices(shape))} == {shape}
    assert {x_q.shape for x_q in draw_many(testing.activations(shape))} == {shape}
    sizes = st.tuples(st.integers(1, 3), st.just(7))
    assert {w_q.shape for w_q in draw_many(testing.ternary_matrices(sizes))} == {(1, 7), (2, 7), (3, 7)}
    assert {x_q.shape for x_q in draw_many(testing.activations(sizes))} == {(1, 7), (2, 7), (3, 7)}


@pytest.mark.parametrize("shape", [(9,), (2, 3, 4), (64, 64)])
def test_activations_take_any_shape_and_the_whole_range(shape):
    drawn = draw_many(testing.activations(shape))
    assert all(x_q.dtype == np.int8 and x_q.shape == shape for x_q in drawn)
    values = np.unique(np.concatenate([x_q.reshape(-1) for x_q in drawn]))
    assert values.min() == -128 and values.max() == 127 and len(values) > 200


def kinds(arrays, extremes):
    """How many of the arrays are constant at an extreme (or zero), dense, and neither."""
    constant = [a for a in arrays if (a == a.flat[0]).all() and a.flat[0] in extremes]
    # Dense: no value holds much more than its share. Filled arrays are mostly one value.
    dense = [a for a in arrays if np.unique(a, return_counts=True)[1].max() < 0.6 * a.size]
    return len(constant), len(dense), len(arrays) - len(constant) - len(dense)


def test_all_three_kinds_appear_in_small_arrays():
    for strategy, extremes in (
        (testing.ternary_matrices((20, 30)), (-1, 0, 1)),
        (testing.activations((20, 30)), (-128, 0, 127)),
    ):
        drawn = draw_many(strategy)
        constant, dense, other = kinds(drawn, extremes)
        assert constant >= 3 and dense >= 20 and other >= 20  # other: drawn element by element, mostly one value
        constants = {int(a.flat[0]) for a in drawn if (a == a.flat[0]).all()}
        assert constants >= set(extremes)


def test_large_arrays_are_dense_or_constant():
    """Element by element they would exceed Hypothesis's limit on data."""
    drawn = draw_many(testing.ternary_matrices((70, 100)))
    constant, dense, other = kinds(drawn, (-1, 0, 1))
    # There are only three constant matrices of one shape, and Hypothesis draws nothing twice.
    assert constant == 3 and dense >= 30 and other == 0


def test_dense_arrays_do_not_shrink_to_constant_ones():
    """A failure that needs density keeps it: the seed shrinks, the entries do not become zeros one by one."""
    w_q = smallest(testing.ternary_matrices((40, 40)), lambda a: (a != a[0, 0]).any())
    assert min(np.mean(w_q == value) for value in (-1, 0, 1)) > 0.25
    x_q = smallest(testing.activations((40, 40)), lambda a: (a != a[0, 0]).any())
    assert len(np.unique(x_q)) > 200


def test_small_arrays_shrink_to_few_elements_where_that_is_the_failure():
    w_q = smallest(testing.ternary_matrices((3, 4)), lambda a: np.count_nonzero(a) == 1)
    assert np.count_nonzero(w_q) == 1


# --- products -------------------------------------------------------------------------------------------------------


def test_products_fit_together():
    drawn = draw_many(testing.products(rows=5, block=16, max_tiles=2, max_blocks=2, max_tokens=3))
    for w_q, x_q in drawn:
        assert w_q.dtype == x_q.dtype == np.int8
        assert w_q.shape[1] == x_q.shape[1] <= 2 * 16 + 5
        assert 1 <= w_q.shape[0] <= 2 * 5 + 1 and 1 <= x_q.shape[0] <= 3
        assert set(np.unique(w_q)) <= {-1, 0, 1}
    assert {len(x_q) for _, x_q in drawn} == {1, 2, 3}
    assert {w_q.shape[0] for w_q, _ in drawn} >= {1, 4, 5, 6}


def test_products_shrink_to_one_by_one():
    w_q, x_q = smallest(testing.products(), lambda problem: problem[0].any() and problem[1].any())
    assert w_q.shape == x_q.shape == (1, 1)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1, 2.0, "4", None])
def test_sizes_must_be_positive_integers(bad):
    for size in ("rows", "block", "max_tiles", "max_blocks"):
        with pytest.raises(ValueError, match=f"^{size} must be an integer of at least 1, got {bad!r}$"):
            testing.shapes(**{size: bad})
    for size in ("rows", "block", "max_tiles", "max_blocks", "max_tokens"):
        # Hypothesis adds notes to what is raised while drawing, so the message goes on after this.
        with pytest.raises(ValueError, match=f"^{size} must be an integer of at least 1, got {bad!r}"):
            smallest(testing.products(**{size: bad}), lambda problem: True)


def test_exported_names_are_documented():
    assert testing.__all__ == sorted(testing.__all__)
    for name in testing.__all__:
        assert getattr(testing, name).__doc__
