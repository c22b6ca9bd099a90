"""Quantisers against their equations, and against the numbers that wrong implementations miss."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import erf

from bitnet_ref.reference.quantize import (
    SCALE_CLAMP,
    dequantize,
    quantize_activations,
    quantize_activations_grad,
    quantize_weights,
    quantize_weights_b1,
    quantize_weights_blocks,
    quantize_weights_grad,
    ternary_statistics,
)

F32 = np.float32
U = 2.0**-24  # unit roundoff of float32: one rounding changes a value by at most this share

# Magnitudes for which no product or reciprocal below leaves the normal range of float32; 0 is drawn as well.
ordinary = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda v: v == 0 or abs(v) > 2.0**-100)
matrices = hnp.arrays(F32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=ordinary)
tokens = hnp.arrays(F32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9), elements=ordinary)


def gaussian(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


# --- weights: the numbers of the rule -------------------------------------------------------------------------------


def test_gaussian_weights_have_31_percent_zeros():
    # The edge is mean|w| / 2 = sigma / sqrt(2 pi), so P(0) = erf(1 / (2 sqrt(pi))) = 0.3101.
    expected = erf(1 / (2 * math.sqrt(math.pi)))
    assert expected == pytest.approx(0.3101, abs=5e-5)
    w = gaussian((1000, 1000))
    w_q, w_scale = quantize_weights(w)
    # The standard deviation of the share of 10**6 draws is 4.6e-4; 3e-3 is more than six of them.
    assert np.mean(w_q == 0) == pytest.approx(expected, abs=3e-3)
    assert w_scale == pytest.approx(math.sqrt(2 / math.pi), abs=4e-3)  # mean|w|; six times 0.6 / sqrt(10**6)
    # The common mistake, an edge at mean|w| itself, gives erf(1 / sqrt(pi)) = 57.5 % on the same matrix.
    wrong = np.mean(np.abs(w) < w_scale)
    assert wrong == pytest.approx(erf(1 / math.sqrt(math.pi)), abs=3e-3)
    assert wrong == pytest.approx(0.575, abs=3e-3)


def test_uniform_weights_have_25_percent_zeros():
    w = np.random.default_rng(1).uniform(-1, 1, (1000, 1000)).astype(F32)
    w_q, w_scale = quantize_weights(w)
    assert np.mean(w_q == 0) == pytest.approx(0.25, abs=3e-3)  # more than six standard deviations of 4.3e-4
    assert w_scale == pytest.approx(0.5, abs=2e-3)


def test_entropy_of_gaussian_weights_is_1_58_bits():
    zero = erf(1 / (2 * math.sqrt(math.pi)))
    expected = -zero * math.log2(zero) - (1 - zero) * math.log2((1 - zero) / 2)
    assert expected == pytest.approx(1.583, abs=5e-4)
    statistics = ternary_statistics(gaussian((1000, 1000), seed=2))
    # d(entropy)/d(share of zeros) = log2((1 - p) / (2 p)) = 0.15, times 3e-3
    assert statistics.entropy_bits == pytest.approx(expected, abs=5e-4)
    assert statistics.entropy_bits < math.log2(3)


def test_relative_error_of_gaussian_weights():
    # With c = mean|w|, P = P(|w| > c/2) and B = E[|w|; |w| > c/2] of a standard Gaussian, E[(w - c q)^2] = 1 - 2 c B
    # + c^2 P.
    c = math.sqrt(2 / math.pi)
    p = 1 - erf(c / 2 / math.sqrt(2))
    b = c * math.exp(-(c**2) / 8)
    expected = math.sqrt(1 - 2 * c * b + c**2 * p)
    statistics = ternary_statistics(gaussian((1000, 1000), seed=3))
    assert statistics.relative_error == pytest.approx(expected, abs=3e-3)  # sampling, as above


def test_scale_multiplies():
    w_q, w_scale = quantize_weights(F32(0.02) * np.array([[1, -1], [-1, 1]], F32))
    assert w_scale == F32(0.02)  # a stored reciprocal would be 50
    np.testing.assert_array_equal(w_q, [[1, -1], [-1, 1]])
    np.testing.assert_array_equal(dequantize(w_q, w_scale), F32(0.02) * w_q)


def test_weight_ties_round_to_even():
    w = np.array([[0.5, 1.5, -0.5, -1.5]], F32)  # mean magnitude 1
    w_q, w_scale = quantize_weights(w)
    assert w_scale == 1
    np.testing.assert_array_equal(w_q, [[0, 1, 0, -1]])  # halves rounded away from zero would give 1, 1, -1, -1


def test_mean_is_clamped_not_shifted():
    # mean 1e-3, and the first weight 0.2 % above the edge at half of it: +1. With eps = 1e-5 added to the mean, as
    # the papers write it, the edge would lie 1 % higher and the weight become 0.
    first = 0.501e-3
    w = np.array([[first, 2e-3 - first, 1e-3, 1e-3]], F32)
    w_q, w_scale = quantize_weights(w)
    assert w_scale == pytest.approx(1e-3, rel=1e-6)  # float32 inputs
    assert w_q[0, 0] == 1
    assert np.rint(first / (1e-3 + 1e-5)) == 0


def test_weights_below_the_clamp():
    w_q, w_scale = quantize_weights(np.array([[4e-6, -4e-6, 8e-6, 0]], F32))  # mean 4e-6 < 1e-5
    assert w_scale == F32(1e-5) == SCALE_CLAMP
    np.testing.assert_array_equal(w_q, [[0, 0, 1, 0]])


def test_all_zero_weights():
    w_q, w_scale = quantize_weights(np.zeros((3, 4), F32))
    assert w_scale == F32(1e-5)
    assert not w_q.any()
    statistics = ternary_statistics(np.zeros((3, 4), F32))
    assert (statistics.fraction_zeros, statistics.entropy_bits, statistics.relative_error) == (1.0, 0.0, 0.0)


def test_weights_types_and_order():
    w = gaussian((5, 7))
    w_q, w_scale = quantize_weights(w)
    assert w_q.dtype == np.int8 and w_q.shape == (5, 7) and w_q.flags.c_contiguous
    assert type(w_scale) is np.float32
    fortran_q, fortran_scale = quantize_weights(np.asfortranarray(w))
    assert fortran_q.flags.c_contiguous and fortran_scale == w_scale
    np.testing.assert_array_equal(fortran_q, w_q)
    double_q, double_scale = quantize_weights(w.astype(np.float64))
    assert double_scale == w_scale
    np.testing.assert_array_equal(double_q, w_q)
    half = w.astype(np.float16)
    assert quantize_weights(half)[1] == quantize_weights(half.astype(F32))[1]
    assert quantize_weights(w.tolist())[1] == w_scale  # Python floats are float64


def test_mean_of_many_weights_is_accumulated_in_float64():
    w = np.full((2048, 4096), 0.1, F32)
    w[0, 0] = 3e4
    exact = math.fsum([*([float(F32(0.1))] * (w.size - 1)), 3e4]) / w.size
    _, w_scale = quantize_weights(w)
    assert abs(float(w_scale) - exact) <= np.spacing(F32(exact))  # the nearest float32 or its neighbour


# --- activations ----------------------------------------------------------------------------------------------------


def test_activation_ties_round_to_even():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127], F32)
    x_q, x_scale = quantize_activations(x)
    np.testing.assert_array_equal(x_q, [0, 2, 2, 0, -2, -2, 127])
    np.testing.assert_array_equal(x_scale, F32([1]))


def test_activation_scale_is_per_token_and_multiplies():
    x = np.array([[1, -2, 0.5], [100, 25, -50]], F32)
    x_q, x_scale = quantize_activations(x)
    np.testing.assert_array_equal(x_scale, F32([[2], [100]]) / F32(127))
    np.testing.assert_array_equal(x_q, [[64, -127, 32], [127, 32, -64]])  # 63.5, 31.75 and 31.75, -63.5
    assert x_q.dtype == np.int8 and x_scale.dtype == F32 and x_scale.shape == (2, 1)


def test_all_zero_token():
    x = np.array([[0, 0], [3, -1]], F32)
    x_q, x_scale = quantize_activations(x)
    np.testing.assert_array_equal(x_q, [[0, 0], [127, -42]])
    np.testing.assert_array_equal(x_scale[0], F32(1e-5) / F32(127))


def test_token_below_the_clamp():
    x_q, x_scale = quantize_activations(F32([5e-6, -2e-6]))
    np.testing.assert_array_equal(x_scale, F32([1e-5]) / F32(127))
    np.testing.assert_array_equal(x_q, [64, -25])  # 63.5000009 and -25.4: the range is not used up


def test_no_tokens():
    x_q, x_scale = quantize_activations(np.zeros((0, 5), F32))
    assert x_q.shape == (0, 5) and x_scale.shape == (0, 1)


# --- the 1-bit baseline ---------------------------------------------------------------------------------------------


def test_b1_is_centred_and_scaled_by_mean_magnitude():
    w = np.array([[1, 2, 3, -2]], F32)  # mean 1, mean magnitude 2
    w_q, w_scale = quantize_weights_b1(w)
    np.testing.assert_array_equal(w_q, [[-1, 1, 1, -1]])  # Sign(1 - 1) = Sign(0) = -1; without centring +1
    assert w_scale == 2 and type(w_scale) is np.float32 and w_q.dtype == np.int8


def test_b1_of_zeros_multiplies_to_zero():
    w_q, w_scale = quantize_weights_b1(np.zeros((2, 3), F32))
    assert (w_q == -1).all() and w_scale == 0
    assert not dequantize(w_q, w_scale).any()


@given(w=matrices)
def test_b1_has_no_zeros(w):
    w_q, w_scale = quantize_weights_b1(w)
    assert set(np.unique(w_q)) <= {-1, 1}
    # The float64 sum is off by a share of a few 2**-53, and one rounding to float32 follows.
    assert float(w_scale) == pytest.approx(np.mean(np.abs(w), dtype=np.float64), rel=2 * U)


# --- properties -----------------------------------------------------------------------------------------------------


@given(w=matrices)
def test_weight_error_is_at_most_half_a_step(w):
    w_q, w_scale = quantize_weights(w)
    assert set(np.unique(w_q)) <= {-1, 0, 1}
    w, scale = w.astype(np.float64), float(w_scale)
    # With r = fl(1 / scale) and p = fl(w r), p = (w / scale)(1 + d) with |d| <= 2 U + U^2, and |rint(p) - p| <= 1/2.
    # Where nothing is clipped |p| <= 1.5, so |w / scale - q| <= 1/2 + 1.5 * 2 U (1 + ...) < 1/2 + 4 U.
    inside = np.abs(w) <= 1.5 * scale
    assert (np.abs(w - scale * w_q)[inside] <= scale * (0.5 + 4 * U)).all()
    np.testing.assert_array_equal(w_q[~inside], np.sign(w[~inside]))


@given(w=matrices)
def test_weights_are_symmetric_in_sign(w):
    w_q, w_scale = quantize_weights(w)
    minus_q, minus_scale = quantize_weights(-w)
    assert minus_scale == w_scale
    np.testing.assert_array_equal(minus_q, -w_q)


@given(w=matrices, exponent=st.integers(-10, 10))
def test_weights_scale_by_powers_of_two(w, exponent):
    w_q, w_scale = quantize_weights(w)
    scaled_q, scaled_scale = quantize_weights(np.ldexp(w, exponent))
    assume(min(w_scale, scaled_scale) > SCALE_CLAMP)  # the clamp is an absolute size
    assert scaled_scale == np.ldexp(w_scale, exponent)
    np.testing.assert_array_equal(scaled_q, w_q)


@given(x=tokens)
def test_activation_error_is_at_most_half_a_step(x):
    x_q, x_scale = quantize_activations(x)
    limit = np.maximum(np.abs(x).max(axis=-1, keepdims=True), SCALE_CLAMP)
    np.testing.assert_array_equal(x_scale, limit / F32(127))
    assert x_q.min() >= -127  # -128 is in the range of the rule but cannot come out
    # In steps of limit / 127: p = fl(x fl(127 / limit)) is off by at most 127 (2 U + U^2), rint(p) by 1/2, and
    # x_scale being rounded moves q x_scale by at most 127 U; 381 U in all, of which 400 U of x_scale is a bound.
    x, scale = x.astype(np.float64), x_scale.astype(np.float64)
    assert (np.abs(x - scale * x_q) <= scale * (0.5 + 400 * U)).all()
    largest = np.abs(x) == np.abs(x).max(axis=-1, keepdims=True)
    whole_range = np.broadcast_to(limit > SCALE_CLAMP, x.shape) & largest
    assert (np.abs(x_q[whole_range].astype(int)) == 127).all()


@given(x=tokens)
def test_multiplier_and_scale_are_consistent(x):
    _, x_scale = quantize_activations(x)
    limit = np.maximum(np.abs(x).max(axis=-1, keepdims=True), SCALE_CLAMP)
    product = (F32(127) / limit).astype(np.float64) * x_scale
    assert (np.abs(product - 1) <= 2 * U + U**2).all()  # two roundings


@given(x=tokens)
def test_activations_are_symmetric_in_sign(x):
    x_q, x_scale = quantize_activations(x)
    minus_q, minus_scale = quantize_activations(-x)
    np.testing.assert_array_equal(minus_scale, x_scale)
    np.testing.assert_array_equal(minus_q, -x_q)


@given(x=hnp.arrays(F32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=ordinary))
def test_tokens_do_not_see_each_other(x):
    x_q, x_scale = quantize_activations(x)
    for where in np.ndindex(x.shape[:-1]):
        one_q, one_scale = quantize_activations(x[where])
        np.testing.assert_array_equal(one_q, x_q[where])
        np.testing.assert_array_equal(one_scale, x_scale[where])


@settings(max_examples=50)
@given(w=matrices)
def test_statistics_are_what_they_say(w):
    w_q, w_scale = quantize_weights(w)
    statistics = ternary_statistics(w)
    assert statistics.scale == w_scale
    assert statistics.fraction_zeros == np.mean(w_q == 0)
    assert 0 <= statistics.entropy_bits <= math.log2(3) + 1e-12  # float64 sums of three terms
    exact = w.astype(np.float64)
    if exact.any():
        error = np.linalg.norm(exact - float(w_scale) * w_q) / np.linalg.norm(exact)
        # Per element, the product scale * q is off by U scale, and where q != 0 that is at most 2 U |w|; the
        # difference is off by U |w| at most. So the norm of all that is below 3 U ||w|| (1 + ...), and the float64
        # sums add nothing to see.
        assert abs(statistics.relative_error - error) <= 4 * U


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [quantize_weights_grad, quantize_activations_grad])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_straight_through_gradient_is_the_identity(gradient, dtype):
    grad_out = gaussian((3, 4)).astype(dtype)
    before = grad_out.copy()
    grad_in = gradient(grad_out)
    assert grad_in.dtype == dtype
    np.testing.assert_array_equal(grad_in, before)
    grad_in[:] = 0
    np.testing.assert_array_equal(grad_out, before)  # a copy, not the same memory
    with pytest.raises(TypeError, match="floating point, got int64"):
        gradient(np.zeros((2, 2), np.int64))


# --- refusals -------------------------------------------------------------------------------------------------------

QUANTISERS = [quantize_weights, quantize_weights_b1, quantize_activations, ternary_statistics]


@pytest.mark.parametrize("quantise", QUANTISERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(quantise, bad):
    a = np.ones((4, 6), F32)
    a[2, 3] = bad
    with pytest.raises(ValueError, match=rf"must be finite in float32, got {bad} at index \(2, 3\)"):
        quantise(a)


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_refuses_float64_beyond_float32(quantise):
    with pytest.raises(ValueError, match=r"finite in float32, got 1e\+300 at index \(0, 1\)"):
        quantise(np.array([[1.0, 1e300]]))


@pytest.mark.parametrize("quantise", QUANTISERS)
@pytest.mark.parametrize("dtype", [np.int8, np.int64, bool, object, complex])
def test_refuses_other_dtypes(quantise, dtype):
    with pytest.raises(TypeError, match="must be float16, float32 or float64, got"):
        quantise(np.ones((2, 2), dtype))


@pytest.mark.parametrize("quantise", [quantize_weights, quantize_weights_b1, ternary_statistics])
@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2), (0, 4), (4, 0)])
def test_weights_refuse_other_ranks(quantise, shape):
    with pytest.raises(ValueError, match=r"w must have shape \(M, K\)"):
        quantise(np.ones(shape, F32))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_activations_refuse_other_ranks(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., K\)"):
        quantize_activations(np.ones(shape, F32))


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_inputs_are_not_modified(quantise):
    a = gaussian((6, 9))
    before = a.copy()
    a.setflags(write=False)
    quantise(a)
    np.testing.assert_array_equal(a, before)


def test_dequantize():
    q = np.array([[1, -2], [3, 0]], np.int8)
    np.testing.assert_array_equal(dequantize(q, F32([[0.5], [2]])), F32([[0.5, -1], [6, 0]]))
    assert dequantize(q, F32(0.5)).dtype == F32
    with pytest.raises(TypeError, match="q must be int8, got int64"):
        dequantize(q.astype(np.int64), F32(1))
    with pytest.raises(TypeError, match="scale must be floating point"):
        dequantize(q, 2)
    with pytest.raises(ValueError, match="broadcast"):
        dequantize(q, F32([1, 2, 3]))


# --- weights: one scale for each block of columns ---------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2, 7]))
def test_a_block_is_quantised_as_a_matrix_of_its_own(seed, m, n_blocks, block):
    w = gaussian((m, n_blocks * block), seed)
    w_q, w_scale = quantize_weights_blocks(w, block)
    assert w_q.dtype == np.int8 and w_scale.shape == (m, n_blocks) and w_scale.dtype == F32
    for i in range(m):
        for j in range(n_blocks):
            part = slice(j * block, (j + 1) * block)
            expected, expected_scale = quantize_weights(w[i : i + 1, part])
            np.testing.assert_array_equal(w_q[i, part], expected[0])
            assert w_scale[i, j] == expected_scale


@pytest.mark.parametrize("block", [0, -1, 3, 5])
def test_blocks_divide_the_columns(block):
    with pytest.raises(ValueError, match=f"block must be a positive divisor of K, got block {block} and K = 4"):
        quantize_weights_blocks(gaussian((2, 4)), block)
