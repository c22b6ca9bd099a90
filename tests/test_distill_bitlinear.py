"""The BitNet linear layer in PyTorch against the NumPy reference: the same integers, scales and outputs to the bit."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_ref.reference import quantize
from bitnet_ref.reference.matmul import linear as reference_linear
from bitnet_ref.reference.packing import pack

torch = pytest.importorskip("torch", reason="training needs the extra [distill]: no torch here")

from bitnet_ref.distill import bitlinear  # noqa: E402  (it imports torch)


def normal(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def layer(w):
    made = bitlinear.BitLinear(w.shape[1], w.shape[0])
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(w))
    return made


def quantized_by_torch(function, a):
    q, scale = function(torch.from_numpy(a))
    return q.numpy(), scale.numpy()


shapes = st.tuples(st.integers(1, 40), st.integers(1, 300))
scales = st.sampled_from([1e-7, 1e-5, 0.02, 1.0, 1e4])


@given(st.integers(0, 2**32 - 1), shapes, scales)
@settings(max_examples=60)
def test_weights_become_the_integers_and_the_scale_of_the_reference(seed, shape, scale):
    w = normal(seed, *shape, scale=scale)
    w_q, w_scale = quantized_by_torch(bitlinear.quantize_weights, w)
    expected, expected_scale = quantize.quantize_weights(w)
    np.testing.assert_array_equal(w_q, expected)
    assert w_scale == expected_scale and w_scale.dtype == np.float32


@given(st.integers(0, 2**32 - 1), shapes, scales)
@settings(max_examples=60)
def test_activations_become_the_integers_and_scales_of_the_reference(seed, shape, scale):
    x = normal(seed, *shape, scale=scale)
    x[0] = 0  # a token of zeros has scale 1e-5 / 127
    x_q, x_scale = quantized_by_torch(bitlinear.quantize_activations, x)
    expected, expected_scale = quantize.quantize_activations(x)
    np.testing.assert_array_equal(x_q, expected)
    np.testing.assert_array_equal(x_scale, expected_scale)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 6), st.sampled_from([1, 3, 32]), scales)
@settings(max_examples=60)
def test_blocks_become_the_integers_and_scales_of_the_reference(seed, m, n_blocks, block, scale):
    w = normal(seed, m, n_blocks * block, scale=scale)
    expected, expected_scale = quantize.quantize_weights_blocks(w, block)
    w_q, w_scale = bitlinear.quantize_weights_blocks(torch.from_numpy(w), block)
    np.testing.assert_array_equal(w_q.numpy(), expected)
    np.testing.assert_array_equal(w_scale.numpy(), expected_scale)


@given(st.integers(0, 2**32 - 1), shapes, scales)
@settings(max_examples=60)
def test_signs_are_those_of_the_reference(seed, shape, scale):
    w = normal(seed, *shape, scale=scale)
    w_q, w_scale = quantized_by_torch(bitlinear.quantize_weights_b1, w)
    expected, expected_scale = quantize.quantize_weights_b1(w)
    np.testing.assert_array_equal(w_q, expected)
    assert w_scale == expected_scale


@pytest.mark.parametrize("quantizer", bitlinear.QUANTIZERS)
def test_every_quantiser_multiplies_what_it_dequantises_to(quantizer):
    w, x, bias = normal(6, 20, 64, scale=0.02), normal(7, 5, 64), normal(8, 20)
    if quantizer == "absmean-block":
        w_q, scale = quantize.quantize_weights_blocks(w, 16)
        scale = np.repeat(scale, 16, axis=1)
    else:
        w_q, scale = (quantize.quantize_weights if quantizer == "absmean" else quantize.quantize_weights_b1)(w)
    w_hat = quantize.dequantize(w_q, scale).astype(np.float64)
    x_hat = quantize.dequantize(*quantize.quantize_activations(x)).astype(np.float64)
    made = bitlinear.BitLinear(64, 20, bias=True, quantizer=quantizer, block=16)
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(w))
        made.bias.copy_(torch.from_numpy(bias))
    x_in = torch.from_numpy(x).requires_grad_()
    y = made(x_in)
    # Sums of 64 products in float32: relative to the largest sum of magnitudes, a few units of 2**-24 each.
    np.testing.assert_allclose(y.detach().numpy(), x_hat @ w_hat.T + bias, rtol=0, atol=64 * 2**-24 * 3)
    y.sum().backward()
    np.testing.assert_allclose(x_in.grad.numpy(), np.tile(w_hat.sum(0), (5, 1)), rtol=0, atol=64 * 2**-24)
    np.testing.assert_allclose(made.weight.grad.numpy(), np.tile(x_hat.sum(0), (20, 1)), rtol=0, atol=64 * 2**-22)
    assert (made.bias.grad == 5).all()


def test_ties_round_to_even():
    """Mean 1, so the products are the weights: 0.5 becomes 0, not 1. Largest 127, so they are the activations."""
    w = np.array([[0.5, -0.5, 1.5, -1.5, 0.50000006, 1.49999994]], np.float32)
    w_q, w_scale = quantized_by_torch(bitlinear.quantize_weights, w)
    assert w_scale == 1
    np.testing.assert_array_equal(w_q, [[0, 0, 1, -1, 1, 1]])
    x_q, _ = quantized_by_torch(
        bitlinear.quantize_activations, np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)
    )
    np.testing.assert_array_equal(x_q, [[127, 0, 2, 2, 0, -2]])


def test_the_multiplier_of_activations_is_rounded_once():
    """PyTorch's ``127 / tensor`` is 127 * (1 / tensor), another float32 in about a third of all cases."""
    limit = np.linspace(1, 2, 4096, dtype=np.float32)
    x = np.stack([limit, limit * np.float32(0.3)], axis=1)
    twice_rounded = np.float32(127) * (np.float32(1) / limit)
    assert (twice_rounded != np.float32(127) / limit).mean() > 0.1  # or this test could not fail
    np.testing.assert_array_equal(
        quantized_by_torch(bitlinear.quantize_activations, x)[0], quantize.quantize_activations(x)[0]
    )


@given(st.integers(0, 2**32 - 1), shapes, st.integers(1, 9))
@example(0, (3, 4099), 2)
@settings(max_examples=40)
def test_the_output_is_that_of_the_reference_to_the_bit(seed, shape, n_tokens):
    w, x = normal(seed, *shape, scale=0.02), normal(seed + 1, n_tokens, shape[1], scale=3)
    w_q, w_scale = quantize.quantize_weights(w)
    expected = reference_linear(x, pack(w_q, "base3"), w_scale)
    with torch.no_grad():
        got = layer(w)(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(got, expected)


def test_autocast_rounds_the_sum_to_bfloat16_and_nothing_else():
    w, x = normal(1, 48, 256, scale=0.02), normal(2, 7, 256)
    made = layer(w)
    with torch.no_grad():
        exact = made(torch.from_numpy(x)).numpy()
        with torch.autocast("cpu", torch.bfloat16):
            got = made(torch.from_numpy(x)).numpy()
    assert got.dtype == np.float32 and (got != exact).any()
    # Half a unit of a significand of 8 bits is at most 2**-8 of the value; two float32 roundings follow.
    assert (np.abs(got - exact) <= np.abs(exact) * (2**-8 + 2**-22)).all()


def test_gradients_are_those_of_the_straight_through_estimator():
    """Against autograd of the formula in float64: ``x + (dequantised - x).detach()``, the same for w."""
    w, x, weights_of_loss = normal(3, 20, 50, scale=0.02), normal(4, 2, 6, 50), normal(5, 2, 6, 20)
    made, x_in = layer(w), torch.from_numpy(x).requires_grad_()
    (made(x_in) * torch.from_numpy(weights_of_loss)).sum().backward()

    a, b = torch.from_numpy(x).double().requires_grad_(), torch.from_numpy(w).double().requires_grad_()
    x_hat = torch.from_numpy(quantize.dequantize(*quantize.quantize_activations(x))).double()
    w_hat = torch.from_numpy(quantize.dequantize(*quantize.quantize_weights(w))).double()
    y = (a + (x_hat - a).detach()) @ (b + (w_hat - b).detach()).T
    (y * torch.from_numpy(weights_of_loss)).sum().backward()
    # At most 50 products are summed in float32, each off by a few units of 2**-24 of the largest sum of magnitudes.
    for got, expected in ((x_in.grad, a.grad), (made.weight.grad, b.grad)):
        bound = 64 * 2**-24 * expected.abs().max()
        assert (got.double() - expected).abs().max() <= bound
        assert expected.abs().max() > 0


def test_a_clipped_weight_still_gets_its_gradient():
    made = layer(np.array([[10.0, 0.1, -0.1]], np.float32))
    made(torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert (made.weight.grad != 0).all()


@pytest.mark.parametrize("n_inputs, n_outputs", [(0, 1), (1, 0), (bitlinear.MAX_EXACT_INPUTS + 1, 1)])
def test_a_layer_that_could_not_sum_exactly_is_refused(n_inputs, n_outputs):
    with pytest.raises(ValueError, match="1 to 132104 inputs"):
        bitlinear.BitLinear(n_inputs, n_outputs)


@pytest.mark.parametrize("quantizer", bitlinear.QUANTIZERS)
def test_a_partly_quantised_layer_lies_between(quantizer):
    """At strength 0 it is a linear layer; at 0.25 operands lie a quarter of the way; gradients pass the rounding."""
    torch.manual_seed(3)
    layer = bitlinear.BitLinear(64, 8, bias=True, quantizer=quantizer, block=32)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(5, 64, requires_grad=True)
    layer.strength = 0.0
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    layer.strength = 0.25
    y = layer(x)
    x_q, x_scale = bitlinear.quantize_activations(x.detach())
    wide = torch.eye(64) * 127  # as activations these are exact and give the quantised weights back
    layer.strength = 1.0
    w = layer.weight.detach()
    quantised = ((layer(wide) - layer.bias).detach() / 127).T
    x_near, w_near = x.detach() * 0.75 + 0.25 * x_q * x_scale, w * 0.75 + 0.25 * quantised
    torch.testing.assert_close(y, x_near @ w_near.T + layer.bias)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, w_near.sum(0).expand(5, -1))
    torch.testing.assert_close(layer.weight.grad, x_near.sum(0).expand(8, -1))


def test_gradients_that_nobody_asks_for_are_not_made():
    """Those of the other operand are the same."""
    torch.manual_seed(3)
    layer, x = bitlinear.BitLinear(32, 8), torch.randn(5, 32)
    torch.nn.init.normal_(layer.weight)

    def gradients(of_x, of_w):
        layer.weight.grad = None
        layer.weight.requires_grad_(of_w)
        entered = x.clone().requires_grad_(of_x)
        (layer(entered) ** 2).sum().backward()
        return entered.grad, layer.weight.grad

    by_x, by_w = gradients(True, True)
    assert torch.equal(gradients(True, False)[0], by_x) and gradients(True, False)[1] is None
    assert torch.equal(gradients(False, True)[1], by_w) and gradients(False, True)[0] is None
