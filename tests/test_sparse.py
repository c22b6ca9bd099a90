"""Products with listed rows: the layout, every kernel against the reference, and why skipping changes no bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import POISON, at_offset, guarded
from test_runtime import CONFIGS, model_of

import bitnet_ref as br
from bitnet_ref import kernels
from bitnet_ref._native import rows as native_rows
from bitnet_ref.commands.model import packaged_model
from bitnet_ref.measure.sparse_ffn import SPARSITIES, measure_speed
from bitnet_ref.paper_figures import fig_sparse_ffn
from bitnet_ref.reference import sparse
from bitnet_ref.reference.mlp import activate
from bitnet_ref.reference.norm import rms_norm
from bitnet_ref.reference.packing import ROW_SCHEMES, PackedTernary, get_scheme
from bitnet_ref.reference.quantize import quantize_activations
from bitnet_ref.runtime import sparse as runtime_sparse
from bitnet_ref.runtime.load import load
from bitnet_ref.runtime.model import Model
from bitnet_ref.runtime.pages import huge_array
from bitnet_ref.runtime.steps import Blocks, TernaryLayer, load_steps, step_isas

SHAPES = [(1, 1), (3, 319), (4, 320), (5, 321), (33, 645), (70, 2560)]

every_kernel = pytest.mark.parametrize("name", kernels.compiled("dotrows", "addrows"), ids=str)


@pytest.fixture(autouse=True)
def no_cap(monkeypatch):
    """A cap in the caller's environment must not hide kernels from these tests."""
    monkeypatch.delenv("BITNET_REF_ISA", raising=False)


@pytest.fixture
def kernel(name, runnable):
    """The variant that the test's parameter names."""
    runnable(name)
    return kernels.get(name)


def call(kernel, x_q, packed, rows, **options):
    product = kernel.dot_rows if kernel.name.op == "dotrows" else kernel.add_rows
    return product(x_q, packed, rows, **options)


def expected(name, w_q, x_q, rows):
    """NumPy's int32 product of the integers that went in, not of packed ones."""
    listed = w_q[rows].astype(np.int32)
    return listed @ x_q.astype(np.int32) if name.op == "dotrows" else x_q[rows].astype(np.int32) @ listed


def problem(rng, name, m, k):
    x_q = rng.integers(-128, 128, k if name.op == "dotrows" else m, dtype=np.int8)
    return rng.integers(-1, 2, (m, k), dtype=np.int8), x_q


def lists(rng, m):
    """No row, one, every second, some in order, all, and more than all in any order."""
    some = np.flatnonzero(rng.random(m) < 0.4)
    candidates = [[], [m - 1], range(0, m, 2), some, range(m), rng.integers(0, m, m + 7)]
    return [np.array(list(rows), np.int32) for rows in candidates]


# --- the layout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape):
    w_q = np.random.default_rng(1).integers(-1, 2, shape, dtype=np.int8)
    packed = br.pack(w_q, "base3r")
    assert packed.data.shape == (shape[0], -(-shape[1] // 320) * 64)
    np.testing.assert_array_equal(packed.unpack(), w_q)


def test_bytes_by_hand():
    """Column 64 i + j of a block is digit i of byte j."""
    w_q = np.zeros((2, 320), np.int8)
    w_q[1, [0, 65, 64 * 2 + 2, 64 * 3 + 63, 64 * 4 + 63]] = 1, -1, 1, -1, 1
    data = br.pack(w_q, "base3r").data
    assert (data[0] == 121).all()
    assert data[1, [0, 1, 2, 63, 5]].tolist() == [122, 118, 130, 121 - 27 + 81, 121]


def test_refuses_unused_values_and_names_the_place():
    data = np.full((2, 128), 121, np.uint8)
    data[1, 65] = 243
    with pytest.raises(ValueError, match=r"value 243 \(above 242\), got it in tile 1, byte 65 .* column 321 to 577"):
        get_scheme("base3r").unpack(data, (2, 640))


def test_it_is_no_scheme_of_dense_products():
    assert list(ROW_SCHEMES) == ["base3r"] and "base3r" not in br.schemes()
    with pytest.raises(br.errors.KernelUnavailable, match="no gemv kernel for scheme base3r"):
        br.matmul(np.ones(5, np.int8), br.pack(np.ones((3, 5), np.int8), "base3r"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_products(shape):
    """All rows give the dense product, and the product with the transpose."""
    rng = np.random.default_rng(2)
    w_q = rng.integers(-1, 2, shape, dtype=np.int8)
    packed, rows = br.pack(w_q, "base3r"), np.arange(shape[0])
    x_q, columns = (rng.integers(-128, 128, size, dtype=np.int8) for size in shape[::-1])
    np.testing.assert_array_equal(sparse.dot_rows(x_q, packed, rows), br.matmul(x_q, br.pack(w_q, "i2")))
    transposed = br.pack(np.ascontiguousarray(w_q.T), "i2")
    np.testing.assert_array_equal(sparse.add_rows(columns, packed, rows), br.matmul(columns, transposed))


# --- every kernel ---------------------------------------------------------------------------------------------------


@every_kernel
def test_dense_random(name, kernel):
    rng = np.random.default_rng(3)
    for m, k in SHAPES:
        w_q, x_q = problem(rng, name, m, k)
        packed = br.pack(w_q, "base3r")
        for n_threads, rows in enumerate(lists(rng, m)):
            got = call(kernel, x_q, packed, rows, n_threads=1 + n_threads % 3)
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, expected(name, w_q, x_q, rows), err_msg=f"{m} x {k}, {len(rows)} rows")


@every_kernel
def test_drawn_lists_and_values(name, kernel):
    @given(st.data(), st.integers(1, 40), st.integers(1, 700), st.integers(1, 3))
    def check(data, m, k, n_threads):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
        w_q, x_q = problem(rng, name, m, k)
        if data.draw(st.booleans()):
            w_q[:] = data.draw(st.sampled_from([-1, 0, 1]))
            x_q[:] = data.draw(st.sampled_from([-128, -1, 0, 1, 127]))
        rows = np.array(data.draw(st.lists(st.integers(0, m - 1), max_size=70)), np.int32)
        got = call(kernel, x_q, br.pack(w_q, "base3r"), rows, n_threads=n_threads)
        np.testing.assert_array_equal(got, expected(name, w_q, x_q, rows))

    check()


@every_kernel
@pytest.mark.parametrize("weight", [1, -1])
@pytest.mark.parametrize("activation", [127, -128])
def test_worst_cases_fill_no_accumulator(name, kernel, weight, activation):
    """The longest sums that are taken, of constant extremes."""
    n = kernels.SEGMENT_COLUMNS
    for terms in (*range(320, 4000, 320), 6912, n):
        m, k = (5, terms) if name.op == "dotrows" else (terms, 5)
        w_q = np.full((m, k), weight, np.int8)
        x_q = np.full(terms, activation, np.int8)
        got = call(kernel, x_q, br.pack(w_q, "base3r"), np.arange(m, dtype=np.int32), n_threads=2)
        assert (got == weight * activation * terms).all(), f"{terms} terms: {got[:5]}"


@every_kernel
def test_each_digit_alone(name, kernel):
    """One column +1 and the others -1, in every place of a block."""
    x_q = np.array([-128, 127, 3, -77, 1], np.int8)
    for column in range(320):
        w_q = np.full((5, 320), -1, np.int8)
        w_q[:, column] = 1
        x = x_q if name.op == "addrows" else np.resize(x_q, 320)
        rows = np.arange(5, dtype=np.int32)
        np.testing.assert_array_equal(call(kernel, x, br.pack(w_q, "base3r"), rows), expected(name, w_q, x, rows))


@every_kernel
@pytest.mark.parametrize("offset_bytes", [0, 1, 31, 63])
def test_memory(name, kernel, offset_bytes):
    """Writes nothing but out, depends on nothing beside its inputs and changes none; any alignment, read-only."""
    rng = np.random.default_rng(4)
    for m, k in ((7, 320), (40, 321)):
        w_q, x_q = problem(rng, name, m, k)
        packed = br.pack(w_q, "base3r")
        data = at_offset(packed.data, offset_bytes)
        assert PackedTernary(data, (m, k), "base3r").data.ctypes.data == data.ctypes.data
        rows = np.flatnonzero(rng.random(m) < 0.6).astype(np.int32)
        for surroundings in (127, -128):
            x, x_untouched = guarded(x_q.shape, np.int8, surroundings, offset_bytes)
            x[...] = x_q
            out, out_untouched = guarded((len(rows) if name.op == "dotrows" else k,), np.int32, POISON)
            product = native_rows.dot_rows if name.op == "dotrows" else native_rows.add_rows
            product(kernel.capsules()[0], data, rows, x, out, 2)
            assert out_untouched() and x_untouched() and np.array_equal(x, x_q)
            np.testing.assert_array_equal(out, expected(name, w_q, x_q, rows))
        np.testing.assert_array_equal(data, packed.data)


@every_kernel
def test_rows_that_are_not_listed_are_not_read(name, kernel):
    """Their bytes may be anything, even such as stand for no weights."""
    w_q, x_q = problem(np.random.default_rng(5), name, 40, 640)
    rows = np.arange(1, 40, 3, dtype=np.int32)
    packed = br.pack(w_q, "base3r")
    data = np.full_like(packed.data, 255)
    data[rows] = packed.data[rows]
    got = call(kernel, x_q, PackedTernary(data, (40, 640), "base3r"), rows, n_threads=2)
    np.testing.assert_array_equal(got, expected(name, w_q, x_q, rows))


@every_kernel
def test_refusals(name, kernel):
    packed, rows = br.pack(np.ones((3, 5), np.int8), "base3r"), np.arange(3, dtype=np.int32)
    x_q = np.ones(5 if name.op == "dotrows" else 3, np.int8)
    for bad in (rows.astype(np.int64), [0, 1]):
        with pytest.raises(TypeError, match="rows must be an int32 array"):
            call(kernel, x_q, packed, bad)
    for bad in (rows + 1, rows - 1, rows.reshape(1, 3)):
        with pytest.raises(ValueError, match=r"rows must be a list of indices in 0\.\.2"):
            call(kernel, x_q, packed, bad)
    with pytest.raises(TypeError, match="x_q must be an int8 array"):
        call(kernel, x_q.astype(float), packed, rows)
    with pytest.raises(ValueError, match=r"x_q must have shape \(\d,\), got shape \(7,\)"):
        call(kernel, np.ones(7, np.int8), packed, rows)
    with pytest.raises(ValueError, match="reads scheme base3r, got a matrix packed as i2"):
        call(kernel, x_q, br.pack(np.ones((3, 5), np.int8), "i2"), rows)
    with pytest.raises(ValueError, match="multiplies no matrix; name a gemv or gemm kernel"):
        kernel(np.ones(5, np.int8), packed)
    other = kernel.add_rows if name.op == "dotrows" else kernel.dot_rows
    with pytest.raises(ValueError, match=f"is a {name.op} kernel"):
        other(x_q, packed, rows)
    n = kernels.SEGMENT_COLUMNS + 1
    with pytest.raises(ValueError, match=f"at most {n - 1} products to stay in int32, got {n}"):
        if name.op == "dotrows":
            call(kernel, np.ones(n, np.int8), br.pack(np.ones((1, n), np.int8), "base3r"), rows[:1])
        else:
            call(kernel, x_q, packed, np.zeros(n, np.int32))


# --- skipping is exact ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.95, 1.0])
def test_the_feed_forward_network_is_the_same_to_the_bit(sparsity):
    """y = W_down SubLN(relu(W_gate z)^2 * (W_up z)) from the rows and columns that count, and from all of them."""
    rng = np.random.default_rng(6)
    hidden, ffn = 330, 700
    w_up, w_down = (rng.integers(-1, 2, shape, dtype=np.int8) for shape in ((ffn, hidden), (hidden, ffn)))
    z_q, z_scale = quantize_activations(rng.standard_normal(hidden, np.float32))
    gate = rng.standard_normal(ffn, np.float32)
    gate[rng.random(ffn) < sparsity] *= np.float32(-1) if sparsity < 1 else np.float32(0)
    gate = gate if sparsity else np.abs(gate)
    norm = rng.standard_normal(ffn, np.float32)
    up_scale, down_scale = np.float32(0.013), np.float32(-0.02)

    def subln(up):
        h_q, h_scale = quantize_activations(rms_norm(activate(gate, "relu2") * up, norm, 1e-5))
        return h_q, h_scale

    dense_q, dense_scale = subln(br.matmul(z_q, br.pack(w_up, "base3")).astype(np.float32) * (z_scale * up_scale))
    dense = br.matmul(dense_q, br.pack(w_down, "base3")).astype(np.float32) * (dense_scale * down_scale)

    rows = np.flatnonzero(gate > 0).astype(np.int32)
    up = np.zeros(ffn, np.float32)
    sums = kernels.select("dotrows", "base3r").dot_rows(z_q, br.pack(w_up, "base3r"), rows)
    up[rows] = sums.astype(np.float32) * (z_scale * up_scale)
    h_q, h_scale = subln(up)
    columns = np.flatnonzero(h_q).astype(np.int32)
    by_columns = br.pack(np.ascontiguousarray(w_down.T), "base3r")
    sums = kernels.select("addrows", "base3r").add_rows(h_q, by_columns, columns)
    assert len(rows) < ffn * (1.05 - sparsity / 2) and len(columns) <= len(rows)
    np.testing.assert_array_equal(h_q, dense_q)
    assert h_scale.tobytes() == dense_scale.tobytes()
    assert (sums.astype(np.float32) * (h_scale * down_scale)).tobytes() == dense.tobytes()


# --- the runtime ----------------------------------------------------------------------------------------------------

RELU2 = dataclasses.replace(CONFIGS["bitnet"], hidden=330, ffn=700)
LIMITS = {"always": (0.0, 0.0), "never": (2.0, 2.0), "up": (0.0, 2.0), "down": (2.0, 0.0), "by token": None}


def set_limits(monkeypatch, up, down):
    monkeypatch.setattr(runtime_sparse, "SPARSE_FROM", dict.fromkeys(kernels.ISAS, (up, down)))


def decoded(model, prompt, n):
    """The logits of n tokens after a prompt, each step of one token."""
    cache = model.new_cache(len(prompt) + n)
    steps = [model.prefill(prompt, cache)]
    for _ in range(n):
        steps.append(model.forward([int(np.argmax(steps[-1][-1]))], cache))
    return np.concatenate(steps)


@pytest.mark.parametrize("isa", step_isas())
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("which", ["packaged", "base3", "tl2"])
def test_a_sparse_model_has_the_logits_of_the_dense_one_to_the_bit(monkeypatch, which, limits, isa):
    """And leaves rows out where the limits say so: all layers and tokens, none, or some of them."""
    monkeypatch.setenv("BITNET_REF_ISA", isa)

    def model_with(limits):
        set_limits(monkeypatch, *limits)
        if which == "packaged":
            return load(packaged_model(), n_threads=2, sparse=True)
        return model_of(RELU2, scheme=which, n_threads=3, sparse=True)

    model = model_with(LIMITS[limits] or (0.0, 0.0))
    if limits == "by token":  # means lie between the least and the most
        decoded(model, [1, 2, 3], 8)
        counts = model.take_sparse_counts()
        rows = counts["tokens"] * model.config.ffn
        model = model_with((1 - counts["up_rows"] / rows, 1 - counts["down_rows"] / rows))
    expected_logits = decoded(model.dense(), [1, 2, 3], 8)
    assert model.sparse and not model.dense().sparse and not any(model.take_sparse_counts().values())
    assert decoded(model, [1, 2, 3], 8).tobytes() == expected_logits.tobytes()
    counts = model.take_sparse_counts()
    tokens, ffn = 8 * model.config.layers, model.config.ffn
    assert counts["tokens"] == tokens and 0 < counts["down_rows"] < counts["up_rows"] < tokens * ffn
    listed = counts["up_listed"], counts["down_listed"]
    if limits == "by token":
        assert all(0 < n < tokens for n in listed)
    else:
        assert listed == tuple(tokens if limit == 0 else 0 for limit in LIMITS[limits])
    if limits == "always":
        row_bytes = -(-model.config.hidden // 320) * 64
        assert counts["read_bytes"] == row_bytes * (counts["up_rows"] + counts["down_rows"])
    assert (counts["read_bytes"] > 0) == any(listed)


def test_threads_share_the_rows_and_change_nothing(monkeypatch):
    set_limits(monkeypatch, 0.0, 0.0)
    model = model_of(RELU2, n_threads=1, sparse=True)
    expected_logits = decoded(model.dense(), [5], 4)
    for n_threads in (1, 2, 7, 64):
        assert decoded(model.with_threads(n_threads), [5], 4).tobytes() == expected_logits.tobytes()
    assert model.take_sparse_counts()["up_listed"] == 4 * 5 * model.config.layers


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("positive", [0, 1, 2, 160])
def test_few_and_all_gates(positive, sign):
    """Lists shorter than the threads are many, empty and full ones, and a scale below zero."""
    rng = np.random.default_rng(7)
    ops = load_steps(3)
    x = np.abs(rng.standard_normal((1, 96), np.float32)) + 1
    w_gate = np.full((160, 96), -sign, np.int8)
    w_gate[rng.permutation(160)[:positive]] *= -1
    inner = rng.standard_normal(160, np.float32)
    dense, by_rows, listed = networks(w_gate, rng.integers(-1, 2, (160, 96), np.int8), inner, gate_scale=0.01 * sign)
    expected = through(ops, dense, x)
    assert through(ops, by_rows, x).tobytes() == expected.tobytes()
    counts = listed.take_counts()
    assert counts["up_rows"] == positive and counts["up_listed"] == counts["down_listed"] == 1
    assert (expected != x).any() == (positive > 0)


def test_a_row_that_overflows_is_seen_though_it_does_not_count():
    rng = np.random.default_rng(8)
    ops = load_steps(2)
    x = np.abs(rng.standard_normal((1, 96), np.float32)) + 1
    w_gate = np.where(np.arange(160) % 2, 1, -1).astype(np.int8)[:, None].repeat(96, 1)
    w_up = np.where(w_gate > 0, 0, 1).astype(np.int8)  # only where the gate is negative
    for up_scale, finite in ((1e33, True), (1e38, False)):
        *both, listed = networks(w_gate, w_up, np.ones(160, np.float32), up_scale=up_scale)
        for blocks in both:
            if finite:
                through(ops, blocks, x)
            else:
                with pytest.raises(ValueError, match="x must be finite"):
                    through(ops, blocks, x)
        assert listed.take_counts()["up_listed"] == finite


def networks(w_gate, w_up, inner, gate_scale=0.01, up_scale=0.01, activation="relu2", listed=None):
    """One feed-forward network behind an attention that adds nothing, read whole and always by lists; and the lists."""
    (ffn, hidden), rng = w_up.shape, np.random.default_rng(9)
    w_down = rng.integers(-1, 2, (hidden, ffn), np.int8)
    ops = load_steps(1)
    nothing = [(np.zeros(shape, np.int8), 1) for shape in (*[(2, hidden)] * 3, (hidden, 2))]
    matrices = [
        TernaryLayer(br.pack(w, "base3"), np.float32(scale), ops, 1).matrix
        for w, scale in (*nothing, (w_gate, gate_scale), (w_up, up_scale), (w_down, 0.01))
    ]
    if listed is None:
        dot, add = (kernels.select(op, "base3r").capsules()[0] for op in ("dotrows", "addrows"))
        by_rows = [br.pack(np.ascontiguousarray(w), "base3r").data for w in (w_up, w_down.T)]
        listed = runtime_sparse.ListedRows(dot, add, *by_rows, hidden, ffn, ffn)
    norms = (np.ones(hidden, np.float32), None, np.ones(hidden, np.float32), inner)
    dense, sparse = (
        Blocks([(matrices, norms, None, None, None, rows)], 1, 2, 1e-5, 0.0, 1.0, activation) for rows in (None, listed)
    )
    return dense, sparse, listed


def through(ops, blocks, x):
    """The network's output, added to its input."""
    turns = np.ones((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32)
    return ops.blocks(blocks, x, turns, turns, *np.zeros((2, 1, 1, 1, 2), np.float32))


def test_lists_must_be_of_the_network():
    w, inner = np.ones((160, 96), np.int8), np.ones(160, np.float32)
    with pytest.raises(ValueError, match="listed rows must be of this network, and its activation relu2"):
        networks(w, w, inner, activation="silu")
    with pytest.raises(ValueError, match="listed rows must be of this network"):
        networks(w, w, inner, listed=networks(w[:, :95], w[:, :95], inner)[2])
    with pytest.raises(ValueError, match="listed rows must be of this network"):
        networks(w, w, inner, listed=networks(w[:159], w[:159], inner[:159])[2])


@pytest.mark.parametrize("isa", step_isas())
def test_limits_are_those_of_the_dense_instruction_set(monkeypatch, isa):
    monkeypatch.setenv("BITNET_REF_ISA", isa)
    monkeypatch.setattr(runtime_sparse, "SPARSE_FROM", {"avx512vbmi": (2.0, 2.0), isa: (0.0, 2.0)})
    model = model_of(RELU2, sparse=True)
    model.forward([1])
    dense_isa = kernels.select("gemv", "base3").name.isa
    assert model.take_sparse_counts()["up_listed"] == (2 if dense_isa == isa else 0)


def test_other_tokens_are_dense(monkeypatch):
    """Prompts, batches and traces read all rows."""
    set_limits(monkeypatch, 0.0, 0.0)
    model = model_of(RELU2, sparse=True)
    model.logits([1, 2, 3])
    model.generate([[1], [2, 3]], 3, stream=False)
    assert model.take_sparse_counts()["tokens"] == model.config.layers, "the prompt of one token alone"


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (CONFIGS["swiglu"], "ternary one of silu without SubLN$"),
        (CONFIGS["gemma"], "ternary one of gelu_tanh with SubLN and a norm behind it$"),
        (dataclasses.replace(RELU2, ternary=False), "full-precision one of relu2 with SubLN$"),
    ],
    ids=["swiglu", "gemma", "full precision"],
)
def test_other_networks_are_refused(config, found):
    with pytest.raises(ValueError, match=f"sparse needs a ternary feed-forward network of squared ReLU.* {found}"):
        runtime_sparse.check_sparse(config)
    if config.ternary:
        with pytest.raises(ValueError, match="sparse needs"):
            model_of(config, sparse=True)


def test_rows_lie_together_at_the_beginning_of_a_huge_page(monkeypatch):
    made = []
    monkeypatch.setattr(runtime_sparse, "huge_array", lambda shape: made.append(huge_array(shape)) or made[-1])
    model_of(RELU2, sparse=True)
    assert [array.shape for array in made] == [(2, 2, 700, 128)] and made[0].ctypes.data % (1 << 21) == 0


# --- the measurement ------------------------------------------------------------------------------------------------


def test_the_measurement_times_every_product_and_can_be_drawn():
    rows = measure_speed(["scalar"], [1], n_rounds=1, ffn=60, hidden=330, copies=2)
    found = [(row["part"], row["program"], row["sparsity"]) for row in rows]
    assert len(set(found)) == len(found) == 3 + 2 * len(SPARSITIES)
    assert all(row["isa"] == "scalar" and row["threads"] == 1 and row["median_ns"] > 0 for row in rows)
    axes = fig_sparse_ffn.draw({"sparse_ffn": rows}).axes
    assert [len(line.get_xdata()) for line in axes[0].get_lines()[:3]] == [len(SPARSITIES)] * 3


def test_the_measurement_refuses_a_wrong_product(monkeypatch):
    monkeypatch.setattr(kernels.Kernel, "add_rows", lambda self, x, packed, *rest, **options: np.ones(330, np.int32))
    with pytest.raises(RuntimeError, match=r"addrows.* differs from .* at a sparsity of 0%"):
        measure_speed(["scalar"], [1], n_rounds=1, ffn=60, hidden=330, copies=2)


def test_matrices_of_one_token_in_several_packings_are_refused():
    """Such a network takes its steps one by one, where no row is left out."""
    dense = model_of(RELU2, scheme="base3")
    other = model_of(RELU2, scheme="i2")
    mixed = dict(dense.weights)
    name = next(name for name in mixed if name.endswith("k_proj.weight"))
    mixed[name] = other.weights[name]
    weights = {
        name: (w.w_packed, w.w_scale) if isinstance(w, TernaryLayer) else w for name, w in mixed.items()
    }  # fmt: skip
    assert not Model(dense.config, weights).sparse
    with pytest.raises(ValueError, match="sparse needs q, k and v of a block in one packing, and gate and up"):
        Model(dense.config, weights, sparse=True)
