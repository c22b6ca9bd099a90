"""The reference product and linear layer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_ref.reference.matmul import MAX_K, linear, matmul
from bitnet_ref.reference.packing import PackedTernary, pack, schemes
from bitnet_ref.reference.quantize import quantize_activations, quantize_weights

F32 = np.float32
every_scheme = pytest.mark.parametrize("scheme", schemes())


@settings(max_examples=40)
@given(
    scheme=st.sampled_from(schemes()),
    m=st.integers(1, 70),
    k=st.integers(1, 70),
    batch=st.sampled_from([(), (1,), (3,), (2, 3), (0,)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_matmul_is_the_integer_product(scheme, m, k, batch, seed):
    rng = np.random.default_rng(seed)
    w_q = rng.integers(-1, 2, (m, k)).astype(np.int8)
    x_q = rng.integers(-128, 128, (*batch, k)).astype(np.int8)
    out = matmul(x_q, pack(w_q, scheme))
    assert out.dtype == np.int32 and out.shape == (*batch, m)
    # float64 is exact here: every partial sum is an integer below 128 * 70
    np.testing.assert_array_equal(out, np.einsum("...k,mk->...m", x_q.astype(float), w_q.astype(float)))


@every_scheme
@pytest.mark.parametrize(("weight", "activation"), [(1, 127), (1, -128), (-1, -128), (-1, 127)])
def test_worst_cases(scheme, weight, activation):
    k = 20000  # 128 * 20000 needs 22 bits
    out = matmul(np.full(k, activation, np.int8), pack(np.full((6, k), weight, np.int8), scheme))
    np.testing.assert_array_equal(out, np.full(6, weight * activation * k, np.int32))


def test_matmul_refuses():
    packed = pack(np.ones((3, 5), np.int8), "i2")
    with pytest.raises(TypeError, match="x_q must be an int8 array, got float32"):
        matmul(np.ones(5, F32), packed)
    for shape in [(), (4,), (5, 4)]:
        with pytest.raises(ValueError, match=r"x_q must have shape \(\.\.\., 5\) for this matrix of K = 5"):
            matmul(np.ones(shape, np.int8), packed)


def test_matmul_refuses_sums_that_int32_cannot_hold():
    assert 128 * MAX_K < 2**31 <= 128 * (MAX_K + 1)
    k = MAX_K + 1
    packed = PackedTernary(np.broadcast_to(np.uint8(0x55), (1, k)), (1, k), "i2")
    with pytest.raises(ValueError, match="K must be at most 16777215 so that no int32 sum overflows, got 16777216"):
        matmul(np.broadcast_to(np.int8(0), (k,)), packed)


@every_scheme
def test_linear_order_of_operations(scheme):
    rng = np.random.default_rng(6)
    w_q, w_scale = quantize_weights(rng.standard_normal((50, 90)).astype(F32))
    x = rng.standard_normal((4, 2, 90)).astype(F32)
    before = x.copy()
    y = linear(x, pack(w_q, scheme), w_scale)
    np.testing.assert_array_equal(x, before)
    assert y.dtype == F32 and y.shape == (4, 2, 50)
    x_q, x_scale = quantize_activations(x)
    for token in np.ndindex(4, 2):
        scale = F32(x_scale[token][0] * w_scale)
        for m in range(50):
            acc = sum(int(a) * int(b) for a, b in zip(x_q[token], w_q[m], strict=True))
            assert y[(*token, m)] == F32(F32(acc) * scale)  # bit for bit
    # one scale after the other is a different function: the test above can tell
    acc = matmul(x_q, pack(w_q, scheme)).astype(F32)
    assert (acc * x_scale * w_scale != y).any()


def test_linear_is_near_the_float_product():
    rng = np.random.default_rng(7)
    w_q, w_scale = quantize_weights(rng.standard_normal((40, 200)).astype(F32))
    x = rng.standard_normal((5, 200)).astype(F32)
    exact = x.astype(float) @ (float(w_scale) * w_q.T)
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    # Each activation is off by at most half a step, so each output by half a step times the number of non-zero weights.
    bound = 0.5 * step * w_scale * np.count_nonzero(w_q, axis=1)
    assert (np.abs(linear(x, pack(w_q, "i2"), w_scale) - exact) <= bound * 1.001).all()  # 1.001: float32 rounding


def test_linear_of_a_zero_token_is_zero():
    y = linear(np.zeros((2, 5), F32), pack(np.ones((3, 5), np.int8), "i2"), F32(2))
    assert not y.any()


@pytest.mark.parametrize("w_scale", [np.nan, np.inf, np.ones(2, F32)])
def test_linear_refuses_scales(w_scale):
    with pytest.raises(ValueError, match="w_scale must be one finite float32 number"):
        linear(np.ones(5, F32), pack(np.ones((3, 5), np.int8), "i2"), w_scale)
