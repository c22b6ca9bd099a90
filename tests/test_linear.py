"""BitLinear on compiled kernels: the reference layer to the last bit, whatever the packing, kernel and threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import bitnet_ref as br
from bitnet_ref import kernels
from bitnet_ref.kernels import Kernel
from bitnet_ref.reference.matmul import linear

F32 = np.float32
every_scheme = pytest.mark.parametrize("scheme", br.schemes())


@pytest.fixture(autouse=True)
def no_cap(monkeypatch):
    """A cap in the caller's environment must not hide kernels from these tests."""
    monkeypatch.delenv("BITNET_REF_ISA", raising=False)


def problem(m, k, batch=(), seed=0, scheme="base3"):
    """A layer, what it is made of, and activations."""
    rng = np.random.default_rng(seed)
    w_q, w_scale = br.quantize_weights(rng.standard_normal((m, k)).astype(F32) * F32(0.02))
    packed = br.pack(w_q, scheme)
    return br.BitLinear(packed, w_scale), packed, w_scale, rng.standard_normal((*batch, k)).astype(F32)


def assert_same_bits(got, expected):
    """Equal as bits: tells +0 from -0, which == does not."""
    assert got.dtype == expected.dtype == F32 and got.shape == expected.shape
    np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32))


# --- equal to the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kernels.compiled(), ids=str)
def test_equals_the_reference_with_every_kernel(name, runnable):
    runnable(name)
    for m, k, t in [(1, 1, 1), (name.rows + 1, name.block + 1, 3), (3 * name.rows, 4 * name.block - 3, 6)]:
        layer, packed, w_scale, x = problem(m, k, (t,), seed=k, scheme=name.scheme)
        assert_same_bits(layer(x, kernel=name, n_threads=2), linear(x, packed, w_scale))
        assert_same_bits(layer(x[0], kernel=str(name)), linear(x[0], packed, w_scale))


# Finite float32 of every size, and so also ties, subnormals, and products that overflow or vanish.
anything = hnp.arrays(
    F32,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=7),
    elements=st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=True),
)


@given(x=anything, scheme=st.sampled_from(br.schemes()), scale=st.floats(2.0**-60, 2.0**60, width=32), data=st.data())
def test_equals_the_reference_on_anything_finite(x, scheme, scale, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    w_q = np.random.default_rng(seed).integers(-1, 2, (data.draw(st.integers(1, 9)), x.shape[-1]), dtype=np.int8)
    packed = br.pack(w_q, scheme)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # 0 * inf, where x_scale * w_scale overflows
        assert_same_bits(br.BitLinear(packed, F32(scale))(x), linear(x, packed, F32(scale)))


@every_scheme
def test_large_sums_round_as_in_the_reference(scheme):
    """Sums above 2**24 are not exact in float32: the conversion must round, and to even."""
    k = 150_001  # 127 * 150,001 > 2**24
    x = np.ones((2, k), F32)
    x[1, ::3] = F32(0.5)
    w_q = np.ones((3, k), np.int8)
    w_q[1, ::7], w_q[2, 1::5] = 0, -1
    packed = br.pack(w_q, scheme)
    sums = br.matmul(br.quantize_activations(x)[0], packed)
    assert sums.max() > 2**24 and (sums.astype(F32).astype(np.int64) != sums).any()  # that a rounding happens at all
    assert_same_bits(br.BitLinear(packed, F32(0.3))(x), linear(x, packed, F32(0.3)))


@every_scheme
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (1, 1, 2), (0,), (3, 0)], ids=str)
def test_batch_shapes(scheme, batch):
    layer, packed, w_scale, x = problem(9, 70, batch, scheme=scheme)
    y = layer(x)
    assert y.shape == (*batch, 9)
    assert_same_bits(y, linear(x, packed, w_scale))


@pytest.mark.parametrize("n_threads", [None, 1, 2, 3])
def test_result_does_not_depend_on_threads(n_threads):
    layer, packed, w_scale, x = problem(130, 200, (5, 40))  # more outputs than NumPy buffers at once when it converts
    assert_same_bits(layer(x, n_threads=n_threads), linear(x, packed, w_scale))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floating_types_are_converted_first(dtype):
    layer, packed, w_scale, x = problem(9, 70, (3,))
    x = x.astype(dtype)
    assert_same_bits(layer(x), linear(x, packed, w_scale))
    assert_same_bits(layer(x.tolist()), linear(x.astype(np.float64), packed, w_scale))


def test_memory_order_does_not_matter_and_inputs_stay():
    layer, packed, w_scale, x = problem(9, 70, (4, 3))
    expected = linear(x, packed, w_scale)
    before = x.copy()
    x.setflags(write=False)
    assert_same_bits(layer(x), expected)
    assert_same_bits(layer(np.asfortranarray(x)), expected)
    np.testing.assert_array_equal(x, before)


def test_scale_multiplies():
    packed = br.pack(np.array([[1, 1, -1, 0]], np.int8), "i2")
    x = F32([1, 2, 0.5, 4])
    assert br.BitLinear(packed, 1.0)(x) == pytest.approx([2.5], rel=0.02)  # int8 activations in steps of 4 / 127
    for factor in (0.5, 2, 1024):  # powers of two, so that no rounding differs
        assert_same_bits(br.BitLinear(packed, factor)(x), br.BitLinear(packed, 1.0)(x) * F32(factor))
    assert not br.BitLinear(packed, 0.0)(x).any()


def test_zero_tokens_give_zero():
    layer, *_ = problem(9, 70)
    assert not layer(np.zeros((2, 70), F32)).any()


# --- the named kernel and the out parameter -------------------------------------------------------------------------


def test_runs_the_named_kernel(monkeypatch):
    ran = []
    call = Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda self, *a, **k: ran.append(self.name) or call(self, *a, **k))
    layer, _, _, x = problem(9, 70, (3,), scheme="i2")
    names = [name for name in kernels.supported() if name.scheme == "i2"]
    for name in names:
        layer(x, kernel=name)
    layer(x)
    layer(x[0])
    assert ran == [*names, kernels.select("gemm", "i2").name, kernels.select("gemv", "i2").name]
    with pytest.raises(br.KernelUnavailable, match=r"^no kernel is called 'fast'"):
        layer(x, kernel="fast")
    other = next(name for name in kernels.compiled() if name.scheme == "tl1" and name.isa == "scalar")
    with pytest.raises(ValueError, match=f"^{other} reads scheme tl1, got a matrix packed as i2$"):
        layer(x, kernel=other)


@every_scheme
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)], ids=str)
def test_out_is_written_inside_its_bounds_and_returned(scheme, batch):
    layer, packed, w_scale, x = problem(9, 70, batch, scheme=scheme)
    count = int(np.prod(batch)) * 9
    whole = np.full(count + 200, np.nan, F32)
    out = whole[100 : 100 + count].reshape(*batch, 9)
    assert layer(x, out=out) is out
    assert_same_bits(out, linear(x, packed, w_scale))
    assert np.isnan(whole[:100]).all() and np.isnan(whole[100 + count :]).all()
    again = out.copy()
    layer(x, out=out)  # what out held before does not matter
    assert_same_bits(out, again)


def test_refuses_other_outputs():
    layer, _, _, x = problem(9, 70, (2,))
    for dtype in (np.float64, np.int32, np.float16):
        with pytest.raises(TypeError, match=f"^out must be a float32 array, got {np.dtype(dtype)}$"):
            layer(x, out=np.zeros((2, 9), dtype))
    with pytest.raises(TypeError, match=r"^out must be a float32 array, got list$"):
        layer(x, out=[[0.0] * 9] * 2)
    read_only = np.zeros((2, 9), F32)
    read_only.setflags(write=False)
    for out in (np.zeros((2, 8), F32), np.zeros(9, F32), np.zeros((1, 2, 9), F32), np.zeros((9, 2), F32).T, read_only):
        with pytest.raises(
            ValueError, match=r"^out must be a writable, aligned, C-contiguous array of shape \(2, 9\), got "
        ):
            layer(x, out=out)


# --- refusals and representation ------------------------------------------------------------------------------------


def test_refuses_what_is_no_packed_matrix():
    w_q = np.ones((2, 3), np.int8)
    with pytest.raises(TypeError, match=r"^w_packed must be a PackedTernary, made by bitnet_ref.pack, got ndarray$"):
        br.BitLinear(w_q, 1.0)


@pytest.mark.parametrize("w_scale", [np.nan, np.inf, -np.inf, np.ones(2, F32), [1.0]])
def test_refuses_scales(w_scale):
    packed = br.pack(np.ones((2, 3), np.int8), "i2")
    with pytest.raises(ValueError, match=r"^w_scale must be one finite float32 number, got"):
        br.BitLinear(packed, w_scale)


def test_refuses_activations():
    layer, *_ = problem(9, 70)
    with pytest.raises(TypeError, match="x must be float16, float32 or float64, got int8"):
        layer(np.ones(70, np.int8))
    for shape in [(), (0,)]:
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., K\)"):
            layer(np.ones(shape, F32))
    for shape in [(69,), (70, 2)]:
        with pytest.raises(ValueError, match=r"^x must have shape \(\.\.\., 70\) for this layer of K = 70, got shape"):
            layer(np.ones(shape, F32))
    for bad in (np.nan, np.inf):
        x = np.ones((2, 70), F32)
        x[1, 2] = bad
        with pytest.raises(ValueError, match=rf"x must be finite in float32, got {bad} at index \(1, 2\)"):
            layer(x)
    with pytest.raises(ValueError, match="n_threads must be between 1 and 1024, got 0"):
        layer(np.ones(70, F32), n_threads=0)


def test_representations():
    layer = br.BitLinear(br.pack(np.ones((2, 3), np.int8), "tl2"), 0.25)
    assert repr(layer) == f"BitLinear({layer.w_packed!r}, w_scale=0.25)"
    assert layer._repr_html_() == f"<p>BitLinear, w_scale = 0.25</p>{layer.w_packed._repr_html_()}"
    assert type(layer.w_scale) is np.float32
