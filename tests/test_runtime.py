"""The fast model against the reference: the compiled steps, logits, generation, perplexity."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import platform
import time

import numpy as np
import pytest

from bitnet_ref import kernels
from bitnet_ref.errors import KernelUnavailable
from bitnet_ref.formats.float_types import encode_floats
from bitnet_ref.measure.head_cost import measure_heads
from bitnet_ref.reference.attention import KVCache, attention
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.head import (
    TABLE_TYPES,
    FloatTable,
    GroupedTable,
    decode_rows,
    group_rows,
    head_logits,
    stored_rows,
)
from bitnet_ref.reference.mlp import activate
from bitnet_ref.reference.model import (
    Block,
    Steps,
    all_blocks,
    feed_forward,
    forward,
    generate_greedy,
    linear,
    random_weights,
    ternary_weights,
)
from bitnet_ref.reference.norm import rms_norm
from bitnet_ref.reference.packing import pack, schemes
from bitnet_ref.reference.quantize import quantize_activations
from bitnet_ref.reference.rope import frequencies, rotate, rotations
from bitnet_ref.runtime import sparse as runtime_sparse
from bitnet_ref.runtime.model import HEADS, PREFILL_TOKENS, BatchCache, Model
from bitnet_ref.runtime.pages import HugePages
from bitnet_ref.runtime.perplexity import perplexity
from bitnet_ref.runtime.sampling import Sampler, log_softmax
from bitnet_ref.runtime.steps import (
    Blocks,
    DecodeStep,
    TernaryLayer,
    TiedTable,
    apply_layer,
    compiled_steps,
    load_steps,
    make_table,
    step_isas,
)

BITNET = ModelConfig(
    architecture="test",
    hidden=96,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=14,
    ffn=160,
    vocabulary=203,
    context=400,
    norm_eps=1e-5,
    activation="relu2",
    rope_theta=10000.0,
    tied_head=True,
    sub_norm=True,
)
SWIGLU = dataclasses.replace(BITNET, activation="silu", sub_norm=False, tied_head=False, kv_heads=3, head_dim=32)
GEMMA = dataclasses.replace(
    BITNET,
    activation="gelu_tanh",
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    embedding_scale=96**0.5,
    sliding_layers=(0,),
    sliding_window=5,
    sliding_rope_theta=500.0,
)
CONFIGS = {"bitnet": BITNET, "swiglu": SWIGLU, "gemma": GEMMA}

every_isa = pytest.mark.parametrize("isa", step_isas())
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def model_of(config, seed=0, scheme="base3", head="f32", **options):
    return Model.from_weights(config, ternary_weights(config, random_weights(config, seed)), scheme, head, **options)


def normal(*shape, seed=0, scale=1.0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32) * np.float32(scale)


# --- steps ----------------------------------------------------------------------------------------------------------
# Where a step sums, reference and compiled code sum in float64 in different orders and round once to float32. Two such
# sums differ by some 1e-16 of the sum of magnitudes, so the float32 differs only if the exact value lies that near to a
# rounding edge: about once in 1e7 values. With these seeds it happens to none, and equality can be asked for.


@every_isa
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("k", [1, 7, 16, 33, 2571])
def test_norm_and_quantiser_equal_the_reference(isa, n_threads, k):
    ops = load_steps(n_threads, isa)
    x, weight = normal(5, k, scale=3), normal(k, seed=1)
    for offset in (0.0, 1.0):
        np.testing.assert_array_equal(ops.rms_norm(x, weight, 1e-5, offset), rms_norm(x, weight, 1e-5, offset))
    heads = x.reshape(5, 1, k)
    np.testing.assert_array_equal(ops.rms_norm(heads, weight, 1e-6), rms_norm(heads, weight, 1e-6))
    x[1] = 0
    x[2] *= np.float32(1e-8)
    x[3, 0] = -3e38
    for got, expected in zip(ops.quantize(x), quantize_activations(x), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype


@every_isa
def test_quantiser_rounds_halves_to_even(isa):
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], np.float32)
    assert load_steps(1, isa).quantize(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@every_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantiser_refuses_what_is_not_finite(isa, bad):
    x = normal(3, 40)
    x[2, 39] = bad
    with pytest.raises(ValueError, match="x must be finite"):
        load_steps(2, isa).quantize(x)


@every_isa
def test_rotation_equals_the_reference(isa):
    x = normal(3, 4, 26)
    cos, sin = rotations(np.array([0, 5, 3999]), frequencies(26, 10000.0))
    np.testing.assert_array_equal(load_steps(2, isa).rotate(x, cos, sin), rotate(x, cos, sin))


EDGES = np.array([0, -0.0, 1e-30, -1e-30, 88, -88, 104, -104, 708, -708, 800, -800, 1e18, -1e18], np.float32)


@every_isa
@pytest.mark.parametrize("activation", ["relu2", "silu"])
def test_activation_equals_the_reference(isa, activation):
    x = np.concatenate([normal(20011, scale=6), EDGES])
    got, expected = load_steps(2, isa).activate(x, activation), activate(x, activation)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


@every_isa
def test_gelu_equals_the_reference_where_that_does_not_cancel(isa):
    x = np.concatenate([normal(20011, scale=3), EDGES[:12]])  # the cube of 1e18 leaves float64 in neither
    got, expected = load_steps(2, isa).activate(x, "gelu_tanh"), activate(x, "gelu_tanh")
    # The reference adds 1 and a tanh rounded to float64: an absolute error of 2^-53 in a factor of x / 2, and as much
    # again for the tanh itself. Beyond that, one float32 rounding.
    bound = 2.0**-53 * np.abs(x).astype(np.float64) + np.spacing(np.abs(expected))
    assert (np.abs(got.astype(np.float64) - expected) <= bound).all()
    positive = x > 0
    np.testing.assert_array_equal(got[positive], expected[positive])


@every_isa
def test_nan_is_not_swallowed(isa):
    x = np.full(9, np.nan, np.float32)
    for activation in ("relu2", "silu", "gelu_tanh"):
        assert np.isnan(load_steps(1, isa).activate(x, activation)).all()


@every_isa
@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("t", "heads", "kv", "d", "s", "window", "dtype"),
    [
        (1, 20, 5, 128, 77, None, np.float32),
        (3, 9, 3, 64, 70, None, np.float16),
        (1, 6, 2, 10, 33, 7, np.float32),
        (4, 6, 1, 14, 9, 2, np.float16),
        (2, 5, 1, 18, 2, None, np.float32),
        (5, 4, 4, 16, 5, 1, np.float32),
        # Widths in pieces of 128, 64 and 16 columns, with a tail and without; windows of several runs of rows.
        (1, 8, 2, 208, 40, None, np.float16),
        (2, 4, 2, 256, 67, 50, np.float32),
        (1, 4, 1, 80, 97, 65, np.float16),
        (1, 2, 1, 131, 33, None, np.float16),
        # Tokens that share keys and values, the first of which see nothing of the last run of rows.
        (13, 8, 2, 128, 77, None, np.float32),
        (8, 12, 4, 50, 34, None, np.float32),
        (9, 6, 3, 50, 41, None, np.float16),
        (11, 3, 3, 24, 35, None, np.float16),
        (17, 5, 5, 144, 66, 66, np.float16),
        (12, 8, 2, 96, 65, 64, np.float32),
    ],
)
def test_attention_equals_the_reference(isa, n_threads, t, heads, kv, d, s, window, dtype):
    q = normal(t, heads, d, scale=2)
    # As a cache lies in memory: the tokens of one head behind each other, and more of them than are in use.
    k, v = (normal(kv, s + 3, d, seed=i).astype(dtype).swapaxes(0, 1)[:s] for i in (1, 2))
    got = load_steps(n_threads, isa).attention(q, k, v, d**-0.5, window)
    np.testing.assert_array_equal(got, attention(q, k, v, d**-0.5, window))


@every_isa
@pytest.mark.parametrize("t", [1, 9])
@pytest.mark.parametrize("at", [0, 3, 40, 60, 76])
def test_a_key_that_is_nan_is_not_swallowed(isa, t, at):
    q, k, v = normal(t, 8, 32), normal(77, 2, 32, seed=1), normal(77, 2, 32, seed=2)
    k[at, 0, 5] = np.nan
    got = load_steps(1, isa).attention(q, k, v, 1.0)
    np.testing.assert_array_equal(got, attention(q, k, v, 1.0))
    assert np.isnan(got[-1, :4]).all() and not np.isnan(got[-1, 4:]).any()


HALVES = np.array([0, -0.0, 6e-8, -6e-8, 6.1e-5, 6e-5, 65504, -65504], np.float16)


@every_isa
def test_attention_of_subnormal_float16(isa):
    k = v = np.tile(HALVES, (1, 1, 2))
    np.testing.assert_array_equal(
        load_steps(1, isa).attention(np.ones((1, 1, 16), np.float32), k, v, 1.0)[0, 0], v[0, 0].astype(np.float32)
    )


@contextlib.contextmanager
def subnormals_taken_for_zero():
    """Both ways, for this thread, as libraries made with -ffast-math leave it: bits 6 and 15 of MXCSR."""
    libm, before = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)()
    assert libm.fegetenv(before) == 0
    changed = type(before)(*before)
    changed[7] |= 1 << 6 | 1 << 15  # the last word of glibc's fenv_t
    assert libm.fesetenv(changed) == 0
    try:
        yield
    finally:
        assert libm.fesetenv(before) == 0


@every_isa
@pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="sets MXCSR through glibc on x86-64"
)
def test_float16_does_not_depend_on_how_the_processor_treats_subnormals(isa):
    ops, (heads, d) = load_steps(1, isa), (4, 48)
    halves = np.resize(HALVES[:6], (33, 1, d))
    q, table = np.ones((1, heads, d), np.float32), FloatTable(halves[:, 0].copy().view(np.uint8), "F16", d)
    expected = attention(q, halves, halves, 1.0), head_logits(q[0], table)
    with subnormals_taken_for_zero():
        assert np.float32(1e-40) * np.float32(0.5) == 0
        got = ops.attention(q, halves, halves, 1.0), ops.head(q[0], table.raw, "F16")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def head_of(ops, x, table):
    """Logits of compiled steps, for a table of any type."""
    if TABLE_TYPES[table.type][0] == 1:
        return ops.head(x, table.raw, table.type)
    return ops.grouped_head(x, ops.group_rows(table.raw, table.type), table.type, len(table.raw))


@pytest.mark.parametrize(("stored", "columns"), [("Q6_K", 512), ("Q8_0", 96), ("Q4_0", 96)])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_grouped_rows_come_back(stored, columns, rows):
    raw = np.random.default_rng(rows).integers(
        0, 256, (rows, columns // TABLE_TYPES[stored][0] * TABLE_TYPES[stored][1])
    )
    raw = raw.astype(np.uint8)
    grouped = group_rows(raw, stored)
    np.testing.assert_array_equal(load_steps(2).group_rows(raw, stored), grouped)
    table = GroupedTable(grouped, stored, rows, columns)
    assert table.shape == (rows, columns) and table.nbytes == -(-rows // 16) * 16 * raw.shape[1]
    np.testing.assert_array_equal(table.raw, raw)
    some = [rows - 1, 0]
    np.testing.assert_array_equal(stored_rows(grouped, stored, np.array(some)), raw[some])
    encoded = encode_floats("w", normal(rows, columns), stored).reshape(rows, -1)
    table = GroupedTable(group_rows(encoded, stored), stored, rows, columns)
    np.testing.assert_array_equal(table[some], decode_rows(encoded[some], stored))
    with pytest.raises(ValueError, match="grouped rows"):
        GroupedTable(grouped, stored, rows + 16, columns)
    with pytest.raises(IndexError, match=f"between 0 and {rows - 1}, got {rows} to {rows}"):
        table[[rows]]


def test_a_table_is_made_of_whole_groups():
    parts = [np.full((16, 34), 1, np.uint8), np.full((4, 34), 2, np.uint8)]
    np.testing.assert_array_equal(make_table(parts, (20, 32), "Q8_0").raw, np.concatenate(parts))
    np.testing.assert_array_equal(make_table([p[:, :4] for p in parts[::-1]], (20, 2), "F16").raw[:4], 2)
    for wrong, rule in (
        (parts[::-1], "got 16 rows behind 4"),
        (parts[:1], "must have them all, got 16"),
        ([*parts[:1], parts[0]], "got 16 rows behind 16"),
    ):
        with pytest.raises(ValueError, match=rule):
            make_table(wrong, (20, 32), "Q8_0")


def test_a_group_of_rows_byte_by_byte():
    """Rows of one block of Q4_0, whose byte i is 10 * row + i: scales first, then four columns of each row in turn."""
    raw = (np.arange(18)[None] + 10 * np.arange(16)[:, None]).astype(np.uint8)
    grouped = group_rows(raw, "Q4_0")[0]
    assert grouped[:4].tolist() == [0, 1, 10, 11] and grouped[32:40].tolist() == [2, 3, 4, 5, 12, 13, 14, 15]
    assert grouped[-4:].tolist() == [164, 165, 166, 167]


@every_isa
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("stored", TABLE_TYPES)
@pytest.mark.parametrize(("tokens", "rows"), [(1, 37), (19, 6), (2, 1), (3, 64), (1, 15), (2, 16), (5, 17)])
def test_head_equals_its_definition(isa, n_threads, stored, tokens, rows):
    k = {"Q6_K": 512, "Q8_0": 288, "Q4_0": 288}.get(stored, 301)
    table = FloatTable(encode_floats("w", normal(rows, k), stored).reshape(rows, -1), stored, k)
    x = normal(tokens, k)
    np.testing.assert_array_equal(head_of(load_steps(n_threads, isa), x, table), head_logits(x, table))


@every_isa
@pytest.mark.parametrize("stored", ["Q8_0", "Q6_K", "Q4_0"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_integer_head_at_its_extremes(isa, stored, tokens):
    """The largest magnitudes of weights, scales and activations, all signs: what an int16 on the way would not hold."""
    row_bytes, d_at = {"Q8_0": (34 * 24, 0), "Q6_K": (210 * 3, 208), "Q4_0": (18 * 24, 0)}[stored]
    raw = np.repeat(np.array([0x00, 0x7F, 0x80, 0xFF, 0x0F, 0xF0], np.uint8)[:, None], row_bytes, axis=1)
    blocks = raw.reshape(-1, TABLE_TYPES[stored][1])
    blocks[:, d_at : d_at + 2] = np.array([-2.5], "<f2").view(np.uint8)
    x = np.ones((tokens, 768), np.float32)
    x[:, 256:512] = -1
    x[:, 512::3] = 0.25
    table = FloatTable(raw, stored, 768)
    np.testing.assert_array_equal(head_of(load_steps(2, isa), x, table), head_logits(x, table))
    x[-1, 700] = np.nan
    for multiply in (lambda: head_of(load_steps(2, isa), x, table), lambda: head_logits(x, table)):
        with pytest.raises(ValueError, match="x must be finite"):
            multiply()


@pytest.mark.parametrize("stored", TABLE_TYPES)
def test_head_definition_is_the_product(stored):
    """Sums of K products in float32: an error of at most (K/16 + 5) units of 2^-24 of the sum of magnitudes.

    Heads of integers multiply the rounded activations; that rounding is at most half a step of their block.
    """
    w, x = normal(40, 512), normal(3, 512, seed=1)
    table = FloatTable(encode_floats("w", w, stored).reshape(40, -1), stored, 512)
    decoded, wide = table[np.arange(40)].astype(np.float64), x.astype(np.float64)
    if TABLE_TYPES[stored][0] > 1:
        x_q, x_scale = quantize_activations(x.reshape(3, -1, 32))
        wide = (x_q * x_scale.astype(np.float64)).reshape(3, 512)
        step = np.repeat(np.abs(x.reshape(3, -1, 32)).max(axis=2), 32, axis=1) / 127
        assert (np.abs(wide - x) <= step * 0.5001).all()
    bound = (512 / 16 + 5) * 2.0**-24 * (np.abs(wide) @ np.abs(decoded).T)
    assert (np.abs(head_logits(x, table) - wide @ decoded.T) <= bound).all()


@pytest.mark.parametrize("stored", ["Q8_0", "Q6_K", "Q4_0", "BF16"])
def test_tables_decode_as_the_gguf_library_does(stored):
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    raw = encode_floats("w", normal(7, 512), stored).reshape(7, -1)
    expected = quants.dequantize(raw, GGMLQuantizationType[stored]).reshape(7, 512)
    np.testing.assert_array_equal(decode_rows(raw, stored), expected)


def test_what_heads_cost():
    """On the same hidden states: nothing for the exact head, and more the fewer bits there are."""
    tokens = np.random.default_rng(2).integers(0, 203, 100)
    rows = {row["head"]: row for row in measure_heads(model_of(SWIGLU), tokens, 32)}
    assert list(rows) == list(HEADS) and {row["n_scored"] for row in rows.values()} == {3 * 15}
    exact = rows["f32"]
    assert exact["change"] == exact["rms_error"] == exact["largest_error"] == 0 and exact["same_best"] == 1
    errors = [rows[head]["rms_error"] for head in ("f32", "f16", "bf16", "q8_0", "q6_k", "q4_0")]
    assert errors == sorted(set(errors)) and errors[-1] < 0.3
    assert rows["q6_k"]["padded"] == 160 and rows["q8_0"]["padded"] == 0  # of 96 columns
    losses = [losses_of(model_of(SWIGLU, head="q8_0"), tokens[i : i + 32])[16:] for i in (0, 32, 64)]
    assert rows["q8_0"]["perplexity"] == pytest.approx(math.exp(np.concatenate(losses).mean()), rel=1e-6)
    with pytest.raises(ValueError, match="must be float32"):
        measure_heads(model_of(SWIGLU, head="f16"), tokens, 32)
    with pytest.raises(ValueError, match="at least one chunk"):
        measure_heads(model_of(SWIGLU), tokens, 101)


def test_steps_refuse_wrong_arguments():
    ops = load_steps(1)
    with pytest.raises(ValueError, match="as long as the weight"):
        ops.rms_norm(normal(2, 5), normal(4), 1e-5)
    with pytest.raises(TypeError, match="float32"):
        ops.rms_norm(normal(2, 5).astype(np.float64), normal(5), 1e-5)
    with pytest.raises(ValueError, match="activation must be"):
        ops.activate(normal(3), "gelu")
    with pytest.raises(ValueError, match="k and v must have shape"):
        ops.attention(normal(1, 4, 8), normal(3, 3, 8), normal(3, 3, 8), 1.0)
    with pytest.raises(ValueError, match="must have 32 bytes, got 31"):
        ops.head(normal(1, 8), np.zeros((2, 31), np.uint8), "F32")
    with pytest.raises(ValueError, match="F32, F16 or BF16, got 'Q8_0'"):
        ops.head(normal(1, 32), np.zeros((2, 34), np.uint8), "Q8_0")
    with pytest.raises(ValueError, match="Q8_0, Q6_K or Q4_0, got 'F16'"):
        ops.grouped_head(normal(1, 8), np.zeros((1, 256), np.uint8), "F16", 16)
    with pytest.raises(ValueError, match="17 grouped rows of 32 Q8_0 values must have 2 groups of 544 bytes"):
        ops.grouped_head(normal(1, 32), np.zeros((1, 544), np.uint8), "Q8_0", 17)
    with pytest.raises(ValueError, match="grouped rows must be Q8_0, Q6_K or Q4_0, got 'F16'"):
        ops.grouped_rows(np.zeros((1, 544), np.uint8), "F16", 16, np.zeros(1, np.int64))
    for data, vocabulary in ((np.zeros((1, 544), np.uint8), 17), (np.zeros((2, 540), np.uint8), 17)):
        with pytest.raises(ValueError, match="17 grouped rows must have a group of whole blocks for each 16 rows"):
            ops.grouped_rows(data, "Q8_0", vocabulary, np.zeros(1, np.int64))
    for row in (-1, 17):
        with pytest.raises(IndexError, match=f"between 0 and 16, got {row}"):
            ops.grouped_rows(np.zeros((2, 544), np.uint8), "Q8_0", 17, np.array([3, row]))
    with pytest.raises(TypeError, match="rows must be int64"):
        ops.grouped_rows(np.zeros((2, 544), np.uint8), "Q8_0", 17, np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="can be grouped, got 'F16'"):
        ops.group_rows(np.zeros((1, 64), np.uint8), "F16")
    with pytest.raises(ValueError, match="whole blocks of 34 bytes, got 33"):
        ops.group_rows(np.zeros((1, 33), np.uint8), "Q8_0")
    with pytest.raises(ValueError, match="cos and sin"):
        ops.rotate(normal(2, 3, 8), normal(2, 1, 3), normal(2, 1, 3))
    with pytest.raises(KernelUnavailable, match="neon9"):
        load_steps(1, "neon9")


@pytest.mark.parametrize("stored", ["Q8_0", "Q6_K", "Q4_0"])
def test_rows_of_an_embedding_equal_the_reference(stored):
    """Any bytes, and every float16 as the scale of a block: subnormals, infinities and NaN, which no good file has."""
    block, block_bytes = TABLE_TYPES[stored]
    raw = np.random.default_rng(4).integers(0, 256, (37, 2, block_bytes), np.uint8)
    table = GroupedTable(group_rows(raw.reshape(37, -1), stored), stored, 37, 2 * block)
    rows = np.array([36, 0, 16, 15, 5, 5])
    embedding = compiled_steps(load_steps(2)).embedding
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(embedding(table, rows), table[rows])
    np.testing.assert_array_equal(embedding(TiedTable(table, None), rows[:1]), table[rows[:1]])
    assert embedding(table, rows[:0]).shape == (0, 2 * block)

    every = np.zeros((1 << 16, block_bytes), np.uint8)
    place = slice(208, 210) if stored == "Q6_K" else slice(0, 2)
    every[:, place] = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    every[:, 192:208] = 1  # scales of Q6_K; quants otherwise
    with np.errstate(all="ignore"):
        expected = decode_rows(every, stored)
    table = GroupedTable(group_rows(every, stored), stored, 1 << 16, block)
    np.testing.assert_array_equal(embedding(table, np.arange(1 << 16)), expected)


@every_isa
@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_gate_of_several_tokens_equals_the_reference(isa, n_threads):
    """Rows longer than the pieces of the loop, in the memory of their sums."""
    ops, rng = load_steps(n_threads, isa), np.random.default_rng(3)
    x_scale, weight = (rng.random((5, 1)) + 0.5).astype(np.float32), normal(700, seed=1)
    drawn = rng.integers(-9000, 9000, (2, 5, 700), dtype=np.int32)
    floats = [sums.astype(np.float32) * (x_scale * np.float32(s)) for sums, s in zip(drawn, (0.01, 0.002), strict=True)]
    for activation in ("relu2", "silu"):
        for norm in (weight, None):
            a = activate(floats[0], activation) * floats[1]
            expected = quantize_activations(a if norm is None else rms_norm(a, norm, 1e-5, 0.5))
            gate, up = (sums.copy() for sums in drawn)
            got = ops.gate_quantize(gate, up, x_scale, 0.01, 0.002, activation, norm, 1e-5, 0.5)
            for mine, other in zip(got, expected, strict=True):
                np.testing.assert_array_equal(mine, other)
    gate, up = (sums.copy() for sums in drawn)
    with pytest.raises(ValueError, match="up_sums must have shape"):
        ops.gate_quantize(gate, up[:, 1:].copy(), x_scale, 0.01, 0.002, "relu2", None, 1e-5, 0.0)
    with pytest.raises(ValueError, match="activation must be"):
        ops.gate_quantize(gate, up, x_scale, 0.01, 0.002, "gelu", None, 1e-5, 0.0)
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.gate_quantize(gate, up, x_scale, 0.01, 0.002, "relu2", weight[1:], 1e-5, 0.0)
    with pytest.raises(ValueError, match="x must be finite"):
        ops.gate_quantize(gate, up, x_scale, np.inf, 0.002, "relu2", weight, 1e-5, 0.0)


# What a decode step has a call for; "odd" has tiles that are not full in every matrix.
FUSED = {
    "bitnet": BITNET,
    "odd": dataclasses.replace(BITNET, hidden=130, ffn=37, heads=3, kv_heads=1, layers=3),
    "swiglu": SWIGLU,
    "qwen2": dataclasses.replace(SWIGLU, qkv_bias=True),
    "qwen3": dataclasses.replace(SWIGLU, qk_norm=True),
    "gemma": dataclasses.replace(GEMMA, post_norms=False, attention_scale=0.3),
}


def weight_pair(config, ops, scheme="base3", seed=2):
    """The same weights for the reference and for the compiled steps."""
    weights = ternary_weights(config, random_weights(config, seed))
    layers = {n: TernaryLayer(pack(w[0], scheme), w[1], ops, 1) for n, w in weights.items() if isinstance(w, tuple)}
    return weights, weights | layers


def never(*args):
    raise AssertionError("a decode step multiplies by itself")


def turns_at(config, cache):
    """Of the next token, for blocks without and with a window."""
    thetas = (config.rope_theta, config.sliding_rope_theta or config.rope_theta)
    return dict(enumerate(rotations(cache.positions(1), frequencies(config.head_dim, theta)) for theta in thetas))


def fused_blocks(config, weights, ops, x, cache):
    """The residual stream behind all blocks, in one call."""
    steps = compiled_steps(ops, DecodeStep(config, weights))
    return steps.blocks(config, weights, x, turns_at(config, cache), cache, never, steps, None)


def check_decode_step(config, weights, compiled, ops, dtype):
    """Residual stream and cache of one token, behind none, some, and after the last ones were forgotten."""
    rng = np.random.default_rng(5)
    caches = [KVCache(config, 300, dtype) for _ in range(2)]
    for length, forgotten in ((0, 0), (6, 0), (130, 3), (40, 0)):
        missing = length - caches[0].length
        if missing > 0:
            drawn = rng.standard_normal((config.layers, 2, missing, config.kv_heads, config.head_dim), np.float32)
            for cache in caches:
                for layer, pair in enumerate(drawn):
                    cache.store(layer, *pair)
        for cache in caches:
            cache.length = length - forgotten
        x = normal(1, config.hidden, seed=length, scale=2)
        kept = x.copy()
        turns = turns_at(config, caches[0])
        expected = all_blocks(config, weights, x, turns, caches[0], linear, Steps(), None)
        got = fused_blocks(config, compiled, ops, x, caches[1])
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(x, kept)
        for mine, other in zip(*(cache.room(1) for cache in caches), strict=True):
            np.testing.assert_array_equal(mine, other)


@every_isa
@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("config", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_decode_step_equals_the_reference(isa, n_threads, config, dtype):
    ops = load_steps(n_threads, isa)
    weights, compiled = weight_pair(config, ops, schemes()[n_threads])
    check_decode_step(config, weights, compiled, ops, dtype)


@every_isa
@pytest.mark.parametrize("scheme", schemes())
def test_a_decode_step_multiplies_in_every_packing(isa, scheme):
    for config in (FUSED["odd"], FUSED["qwen2"]):
        ops = load_steps(2, isa)
        weights, compiled = weight_pair(config, ops, scheme)
        check_decode_step(config, weights, compiled, ops, np.float32)


def test_blocks_may_differ_in_packing():
    """And within a block what does not read the same token; so memory differs from block to block."""
    config, ops = FUSED["odd"], load_steps(2)
    weights, compiled = weight_pair(config, ops)
    for scheme, names in (("tl2", ("layers.1.",)), ("i2", ("0.self_attn.o_", "0.mlp.down")), ("tl1", ("2.mlp",))):
        other = weight_pair(config, ops, scheme)[1]
        compiled |= {name: other[name] for name in other if any(part in name for part in names)}
    check_decode_step(config, weights, compiled, ops, np.float32)


def test_other_networks_take_steps_one_by_one(monkeypatch):
    """Packings that differ where the same token is read, and rows that are cut; their logits are the same."""
    config, ops = SWIGLU, load_steps(2)
    weights, compiled = weight_pair(config, ops)
    other = weight_pair(config, ops, "tl2")[1]
    expected = forward(config, weights, [5])

    def check(weights):
        step = DecodeStep(config, weights)
        assert step.blocks is None
        got = forward(config, weights, [5], linear=apply_layer, steps=compiled_steps(ops, step))
        np.testing.assert_array_equal(got, expected)

    assert DecodeStep(config, compiled).blocks is not None
    check(compiled | {name: other[name] for name in other if "1.self_attn.k_proj.weight" in name})
    check(compiled | {name: other[name] for name in other if "1.mlp.up_proj.weight" in name})
    monkeypatch.setattr(kernels, "SEGMENT_COLUMNS", 100)  # only those of W_down are longer
    check(weight_pair(config, ops)[1])
    assert DecodeStep(GEMMA, weight_pair(GEMMA, ops)[1]).blocks is None


def noting(names):
    """A wrapper for `with_threads` that adds the name of each function that is called."""

    def wrap(name, function):
        def run(*args):
            names.append(name)
            return function(*args)

        return run

    return wrap


@pytest.mark.parametrize("config", FUSED.values(), ids=FUSED)
def test_one_call_has_the_bits_of_the_steps_one_by_one(config):
    """In a model; and one token passes the call only if it is alone, with the weights it was made of and no trace."""
    model = model_of(config, n_threads=2)
    calls = []
    counted = model.with_threads(2, noting(calls))
    plain = counted.with_steps(dataclasses.replace(counted.steps, blocks=all_blocks))
    caches = [model.new_cache(12) for _ in range(6)]
    for cache in caches:
        counted.prefill([5, 1, 7], cache)

    def step(run, *arguments, **options):
        calls.clear()
        return run(*arguments, **options), calls.count("blocks")

    expected, fused = step(plain.forward, [9], caches[0])
    assert not fused
    options = {"linear": counted.linear, "steps": counted.steps}
    ways = {
        "the model": (lambda: counted.forward([9], caches[1]), 1),
        "a batch of one": (lambda: counted.forward([9], BatchCache(caches[2:3])), 0),
        "a trace": (
            lambda: forward(config, counted.weights, [9], caches[3], trace=lambda *_: None, **options),
            0,
        ),
        "other weights": (lambda: forward(config, dict(counted.weights), [9], caches[4], **options), 0),
        "another config": (
            lambda: forward(dataclasses.replace(config), counted.weights, [9], caches[5], **options),
            0,
        ),
    }
    for name, (run, expected_calls) in ways.items():
        got, fused = step(run)
        assert (fused, got.tobytes()) == (expected_calls, expected.tobytes()), name
    assert all(cache.length == 4 for cache in caches)
    for token in (2, 8, 2):
        expected, fused = step(plain.forward, [token], caches[0])[0], step(counted.forward, [token], caches[1])
        assert fused[1] == 1 and fused[0].tobytes() == expected.tobytes()
    assert step(counted.forward, [1, 2], caches[1])[1] == 0
    with pytest.raises(TypeError, match="assignment"):
        counted.weights["model.norm.weight"] = normal(96)


@every_isa
@pytest.mark.parametrize("scheme", schemes())
@pytest.mark.parametrize("config", FUSED.values(), ids=FUSED)
def test_the_feed_forward_network_of_several_tokens_equals_the_reference(isa, config, scheme):
    ops = load_steps(2, isa)
    weights, compiled = weight_pair(config, ops, scheme)
    x = normal(5, config.hidden, scale=2)
    kept = x.copy()
    expected = feed_forward(Block(config, weights, 0, linear, Steps(), None), x)
    got = compiled_steps(ops).feed_forward(Block(config, compiled, 0, never, Steps(), None), x)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(x, kept)


def test_a_batch_of_one_is_that_sequence():
    model = model_of(SWIGLU, head="q8_0")
    caches = [model.new_cache(9) for _ in range(2)]
    for cache in caches:
        model.prefill([5, 1, 7], cache)
    expected = model.forward([9], caches[0])
    np.testing.assert_array_equal(model.forward([9], BatchCache(caches[1:])), expected)
    assert caches[1].length == 4


def test_a_decode_step_refuses_what_does_not_fit():
    config = FUSED["qwen2"]
    ops = load_steps(2)
    _, compiled = weight_pair(config, ops)
    step = DecodeStep(config, compiled)
    x, turns = normal(1, 96), rotations(np.arange(1), frequencies(32, 1e4))
    keys, values = KVCache(config, 9).room(1)

    def call(x=x, turns=turns, sliding=turns, keys=keys, values=values):
        return ops.blocks(step.blocks, x, turns, sliding, keys, values)

    for _ in range(2):
        call()  # nothing below is refused for another reason
    short = rotations(np.arange(1), frequencies(30, 1e4))
    half = keys.astype(np.float16)
    for arguments, error, message in (
        ({"x": normal(1, 95)}, ValueError, r"x must have shape \(1, 96\), got \(1, 95\)"),
        ({"x": normal(2, 96)}, ValueError, "x must have shape"),
        ({"x": x.astype(np.float64)}, TypeError, "x must be float32"),
        ({"turns": short}, ValueError, r"cos and sin must have shape \(1, 1, 16\), got \(1, 1, 15\)"),
        ({"sliding": short}, ValueError, "cos and sin must have shape"),
        ({"sliding": (turns[0], short[1])}, ValueError, "cos and sin must have shape"),
        ({"keys": keys[:1], "values": values[:1]}, ValueError, r"must have shape \(2, S, 3, 32\), got \(1, 1, 3, 32\)"),
        ({"values": values[:1]}, ValueError, "keys and values must have shape"),
        ({"keys": keys[:, :0], "values": values[:, :0]}, ValueError, "keys and values must have shape"),
        ({"keys": keys[:, :, :2], "values": values[:, :, :2]}, ValueError, "keys and values must have shape"),
        ({"keys": keys[..., :16], "values": values[..., :16]}, ValueError, "keys and values must have shape"),
        ({"values": values[:, :, :2]}, ValueError, r"the same shape \(S, KV, D\)"),
        ({"keys": keys[0], "values": values[0]}, ValueError, "keys must have 4 axes"),
        ({"keys": half}, TypeError, "values must be float16, got float32"),
        ({"keys": keys[..., ::2], "values": values[..., ::2]}, ValueError, "side by side"),
    ):
        with pytest.raises(error, match=message):
            call(**arguments)
    with pytest.raises(ValueError, match="read-only"):
        frozen = keys.copy()
        frozen.flags.writeable = False
        call(keys=frozen)
    full = KVCache(config, 2)
    full.length = 2
    with pytest.raises(ValueError, match="the cache holds at most 2 tokens, got 3"):
        full.room(1)


def test_blocks_refuse_what_does_not_fit():
    config = FUSED["qwen3"]
    _, compiled = weight_pair(config, load_steps(1))
    name = "model.layers.1.{}.weight"

    def call(changes=None, **options):
        DecodeStep(dataclasses.replace(config, **options), compiled | (changes or {}))

    def matrix(tensor):
        return compiled[name.format(tensor)]

    call()
    query, up = matrix("self_attn.q_proj"), matrix("mlp.up_proj")
    narrow = TernaryLayer(pack(np.zeros((96, 95), np.int8), "base3"), np.float32(1), load_steps(1), 1)
    for changes, message in (
        ({"self_attn.k_proj": narrow}, "the same K and packing"),
        ({"self_attn.k_proj": query}, r"q, k, v and o must fit 3 heads of 32 keys, .* got 192, 192 and 96 rows"),
        ({"self_attn.q_proj": matrix("self_attn.v_proj")}, "q, k, v and o must fit"),
        ({"self_attn.o_proj": query}, "q, k, v and o must fit"),
        ({"mlp.gate_proj": matrix("self_attn.q_proj")}, "transposed shape"),
        ({"mlp.up_proj": matrix("self_attn.q_proj")}, "transposed shape"),
        ({"mlp.down_proj": up}, "transposed shape"),
        ({"input_layernorm": normal(95)}, r"the norm must have shape \(96,\), got \(95,\)"),
        ({"post_attention_layernorm": normal(97)}, "the norm must have shape"),
        ({"self_attn.k_norm": normal(30)}, r"the norm of heads must have shape \(32,\), got \(30,\)"),
        ({"self_attn.q_norm": normal(32).astype(np.float64)}, "the norm of heads must be float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call({name.format(tensor): weight for tensor, weight in changes.items()})
    for config, tensor, message in (
        (FUSED["qwen2"], "self_attn.q_proj.bias", r"the bias must have shape \(192,\), got \(5,\)"),
        (FUSED["bitnet"], "self_attn.attn_sub_norm.weight", r"the inner norm must have shape \(84,\), got \(5,\)"),
        (FUSED["bitnet"], "mlp.ffn_sub_norm.weight", r"the inner norm must have shape \(160,\), got \(5,\)"),
    ):
        _, compiled = weight_pair(config, load_steps(1))
        with pytest.raises(ValueError, match=message):
            DecodeStep(config, compiled | {f"model.layers.1.{tensor}": normal(5)})
    with pytest.raises(ValueError, match="activation must be relu2, silu or gelu_tanh, got 'relu'"):
        Blocks([()], 1, 2, 1e-5, 0.0, 1.0, "relu")
    with pytest.raises(ValueError, match="at least one block"):
        Blocks([], 1, 2, 1e-5, 0.0, 1.0, "relu2")
    with pytest.raises(ValueError, match="an even number of values, got 1 of 3"):
        Blocks([()], 1, 3, 1e-5, 0.0, 1.0, "relu2")


@pytest.mark.parametrize("n_threads", [1, 2])
def test_an_error_leaves_the_cache_as_long_as_it_was(n_threads):
    """Found in the first block, in a later one, and in the cache; what follows is as if it had not happened."""
    config = FUSED["qwen2"]
    weights = ternary_weights(config, random_weights(config, 2))
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.embed_tokens.weight"][7, 3] = np.inf  # a word that cannot be read
    good = Model.from_weights(config, weights, head="f32", n_threads=n_threads)
    cache, untouched = good.new_cache(9), good.new_cache(9)
    for held in (cache, untouched):
        good.prefill([5, 1], held)
    with pytest.raises(ValueError, match=r"^x must be finite in float32, got NaN or infinity$"):
        good.forward([7], cache)
    assert cache.length == 2
    np.testing.assert_array_equal(good.forward([4], cache), good.forward([4], untouched))
    for tensor, bad, kept, message in (
        ("post_attention_layernorm.weight", np.nan, "f32", "x must be finite"),
        ("self_attn.q_proj.bias", np.inf, "f32", "x must be finite"),
        ("self_attn.v_proj.bias", np.nan, "f32", "x must be finite"),
        (
            "self_attn.v_proj.bias",
            7e4,
            "f16",
            "keys and values must be within 65,504 to be kept as float16, got larger",
        ),
        ("self_attn.v_proj.bias", -np.inf, "f16", "65,504"),
        ("self_attn.k_proj.bias", np.nan, "f16", "65,504"),
    ):
        for layer in range(2):
            name = f"model.layers.{layer}.{tensor}"
            value = weights[name].copy()
            value[7] = bad
            model = Model.from_weights(config, weights | {name: value}, head="f32", n_threads=n_threads, cache=kept)
            cache = model.new_cache(9)
            drawn = normal(config.layers, 2, 3, 3, 32)
            for i, pair in enumerate(drawn):
                cache.store(i, *pair)
            cache.length = 3
            with pytest.raises(ValueError, match=message):
                model.forward([5], cache)
            assert cache.length == 3
            for held, put in zip(cache.room(0), (drawn[:, 0], drawn[:, 1]), strict=True):
                np.testing.assert_array_equal(held, put.astype(held.dtype))
            if kept == "f16":  # nothing is stored of what it refuses
                assert not any(held[layer:, 3].any() for held in cache.room(1))


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitiser ends a program that asks for so much"
)
def test_memory_for_scores_that_is_not_there():
    """The same tokens 2^44 times over."""
    config, ops = FUSED["swiglu"], load_steps(2)
    step = DecodeStep(config, weight_pair(config, ops)[1])
    turns = rotations(np.arange(1), frequencies(32, 1e4))
    one = np.zeros((2, 1, 3, 32), np.float32)
    many = np.lib.stride_tricks.as_strided(one, (2, 1 << 44, 3, 32), (one.strides[0], 0, *one.strides[2:]))
    with pytest.raises(MemoryError, match=r"^no memory for the scores of attention$"):
        ops.blocks(step.blocks, normal(1, 96), turns, turns, many, many)
    with pytest.raises(MemoryError, match=r"^no memory for the scores of attention$"):
        ops.attention(normal(1, 6, 32), many[0], many[0], 1.0)


def test_every_float16_comes_out_of_the_cache_as_it_went_in():
    """Stored by a decode step: each finite value, what lies between two, halves to even, subnormals."""
    config = dataclasses.replace(FUSED["qwen2"], head_dim=2048, heads=1, kv_heads=1, hidden=32, layers=1)
    ops = load_steps(1)
    _, compiled = weight_pair(config, ops)
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (finite[:-1] + finite[1:]) / 2
    values = np.concatenate((finite, between, np.nextafter(between, 0), np.nextafter(between, 9e9), [65519.0, 1e-30]))
    values = np.concatenate((values, -values)).astype(np.float32)
    values = values[np.abs(values) <= 65504]
    values.resize(-(-len(values) // 2048) * 2048)
    zero = {f"model.layers.0.self_attn.v_proj.{part}": part for part in ("weight", "bias")}
    layer = TernaryLayer(pack(np.zeros((2048, 32), np.int8), "base3"), np.float32(1), ops, 1)
    for part in values.reshape(-1, 2048):
        cache = KVCache(config, 1, np.float16)
        held = dict(zip(zero, (layer, part), strict=True))
        fused_blocks(config, compiled | held, ops, normal(1, 32), cache)
        expected = (0 + part).astype(np.float16)  # the sum with a bias leaves no minus 0
        np.testing.assert_array_equal(cache.room(1)[1].view(np.uint16)[0, 0, 0], expected.view(np.uint16))


def test_a_cache_grows_with_its_tokens():
    """Not with its capacity; what it holds stays."""
    cache = KVCache(dataclasses.replace(BITNET, context=1 << 20))
    k = normal(400, 2, 14)
    for start, end in ((0, 3), (3, 130), (130, 400)):
        for layer in (0, 1):
            keys, values = cache.store(layer, k[start:end], -k[start:end])
            np.testing.assert_array_equal(keys, k[:end])
            np.testing.assert_array_equal(values, -k[:end])
        cache.advance(end - start)
    assert cache._keys.nbytes == 2 * k.nbytes  # two layers
    cache.store(0, k[:1], k[:1])
    assert cache._keys.nbytes == 2 * k.nbytes * 5 // 4


def test_a_cache_reserves_what_is_asked_for():
    """Up to its capacity, which it takes as soon as no other growth would follow."""
    cache = KVCache(dataclasses.replace(BITNET, context=1000))
    k = normal(100, 2, 14)
    cache.store(0, k, -k)
    cache.advance(100)
    for asked, expected in ((90, 128), (300, 300), (310, 375), (700, 700), (800, 1000), (5000, 1000)):
        cache.reserve(asked)
        assert cache._keys.shape[1] == cache._values.shape[1] == expected
    keys, values = cache.room(0)
    np.testing.assert_array_equal(keys[0], k)
    np.testing.assert_array_equal(values[0], -k)


# --- the model ------------------------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("scheme", schemes())
def test_greedy_tokens_equal_the_reference(config, scheme):
    weights = ternary_weights(config, random_weights(config, 3))
    expected = generate_greedy(config, weights, [5, 1, 7], 40)
    done = Model.from_weights(config, weights, scheme, "f32").generate([5, 1, 7], 40, stream=False)
    assert list(done.tokens) == expected and done.finish == "length" and done.prompt_tokens == (5, 1, 7)
    assert len(set(expected)) > 3  # a model that repeats one token would prove little


@pytest.mark.parametrize("config", [BITNET, SWIGLU], ids=["bitnet", "swiglu"])
@pytest.mark.parametrize("head", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_logits_equal_the_reference_to_the_last_bit(config, head):
    """With the same head table; gelu is left out, see the test of that step."""
    weights = ternary_weights(config, random_weights(config, 1))
    model = Model.from_weights(config, weights, "tl2", head)
    tokens = np.arange(20) * 7 % 203
    reference = forward(config, weights | {n: model.weights[n] for n in weights if "embed" in n or "head" in n}, tokens)
    np.testing.assert_array_equal(model.logits(tokens), reference)
    np.testing.assert_array_equal(model.reference_logits(tokens), reference)


@every_config
def test_instruction_sets_and_threads_give_the_same_bits(config):
    tokens = np.arange(30) * 5 % 203
    expected = model_of(config, n_threads=1).logits(tokens)
    for isa in step_isas():
        for n_threads in (1, 2, 3):
            np.testing.assert_array_equal(model_of(config, isa=isa, n_threads=n_threads).logits(tokens), expected)


@every_config
@pytest.mark.parametrize("cache", ["f32", "f16"])
def test_a_prompt_in_pieces_gives_the_same_bits(config, cache):
    model = model_of(config, head="q8_0", cache=cache)
    tokens = np.random.default_rng(0).integers(0, 203, PREFILL_TOKENS + 20)
    whole = model.forward(tokens, model.new_cache(len(tokens)))
    np.testing.assert_array_equal(model.logits(tokens), whole)
    for cuts in ([1, 2, 3], [100], [PREFILL_TOKENS, PREFILL_TOKENS + 1]):
        held = model.new_cache(len(tokens))
        pieces = [model.forward(piece, held) for piece in np.split(tokens, cuts)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    for n in (1, 20, 21, PREFILL_TOKENS + 5):
        np.testing.assert_array_equal(model.prefill(tokens, model.new_cache(len(tokens)), n), whole[-n:])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_cache_begins_a_line(dtype):
    cache = KVCache(SWIGLU, 300, dtype)
    k, v = normal(2, 150, SWIGLU.kv_heads, SWIGLU.head_dim)
    for start in (0, 100):  # the second call makes it larger
        views = cache.store(0, k[start : start + 100], v[start : start + 100])
        assert [view.ctypes.data % 64 for view in views] == [0, 0]
        cache.advance(len(k[start : start + 100]))
    np.testing.assert_array_equal(views, (k.astype(dtype), v.astype(dtype)))


def test_float16_cache_is_the_reference_with_a_float16_cache():
    weights = ternary_weights(BITNET, random_weights(BITNET, 1))
    model = Model.from_weights(BITNET, weights, "i2", "f32", cache="f16")
    tokens = np.arange(12)
    table = {"model.embed_tokens.weight": model.table}
    expected = forward(BITNET, weights | table, tokens, KVCache(BITNET, 12, np.float16))
    np.testing.assert_array_equal(model.logits(tokens), expected)
    assert not np.array_equal(expected, forward(BITNET, weights | table, tokens))


@pytest.mark.parametrize("bad", [65520.0, -7e4, np.nan])
def test_float16_cache_refuses_what_it_cannot_hold(bad):
    cache, k = KVCache(BITNET, 4, np.float16), np.zeros((1, 2, 14), np.float32)
    v = k.copy()
    v[0, 1, 3] = bad
    cache.store(0, k, k)
    for pair in ((k, v), (v, k)):
        with pytest.raises(ValueError, match="65,504"):
            cache.store(0, *pair)


@every_config
def test_a_batch_equals_its_sequences(config):
    model = model_of(config)
    prompts = [[1, 2, 3, 4, 5, 6], [9], [7, 8]]
    options = {"temperature": 0.8, "top_k": 50, "repetition_penalty": 1.1, "stream": False, "stop": [11, 45]}
    batch = model.generate(prompts, 25, seed=4, **options)
    assert batch == [model.generate(p, 25, seed=4 + i, **options) for i, p in enumerate(prompts)]


def test_seeds():
    model = model_of(BITNET)
    runs = [model.generate([1], 20, temperature=1.0, seed=seed, stream=False).tokens for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_streaming_gives_the_same_tokens_as_they_come():
    model = model_of(BITNET)
    pieces = list(model.generate([[1], [2, 3]], 6))
    whole = model.generate([[1], [2, 3]], 6, stream=False)
    for i in (0, 1):
        assert tuple(p.token for p in pieces if p.sequence == i) == whole[i].tokens
        assert [p.finish for p in pieces if p.sequence == i] == [None] * 5 + ["length"]
    iterator = model.generate([1], 5)
    assert next(iterator).finish is None and iterator.close() is None  # can be left early


def test_generation_ends_at_the_context_and_at_stop_tokens():
    config = dataclasses.replace(BITNET, context=12)
    model = model_of(config)
    done = model.generate([1, 2, 3], 100, stream=False)
    assert done.finish == "context" and len(done.tokens) == 9
    stop = done.tokens[4]
    cut = model.generate([1, 2, 3], 100, stop=stop, stream=False)
    assert cut.finish == "stop" and cut.tokens == done.tokens[: done.tokens.index(stop) + 1]


def test_random_model():
    config = dataclasses.replace(BITNET, hidden=256)
    model = Model.random(config, 5, "tl1", "q6_k")
    again = Model.random(config, 5, "tl1", "q6_k")
    logits = model.logits([1, 2, 3])
    np.testing.assert_array_equal(logits, again.logits([1, 2, 3]))
    assert not np.array_equal(logits, Model.random(config, 6, "tl1", "q6_k").logits([1, 2, 3]))
    assert 0.05 < logits.std() < 20  # neither dead nor exploding
    sizes = model.bytes_per_token()
    assert sizes["head"] == 208 * 210 and sizes["layers"] == sum(
        w.w_packed.nbytes for n, w in model.weights.items() if n in config.linear_shapes()
    )
    assert model.cache_bytes_per_token() == 2 * 2 * 2 * 14 * 4


def test_matrices_are_packed_side_by_side_on_huge_pages():
    """Each begins a cache line behind the one before, the first a huge page; they stay what they were."""
    model = Model.random(BITNET)
    layers = [model.weights[name].w_packed for name in BITNET.linear_shapes()]
    begins = [layer.data.ctypes.data for layer in layers]
    assert begins[0] % (1 << 21) == 0
    sizes = [-(-layer.nbytes // 64) * 64 for layer in layers]
    assert np.diff(begins).tolist() == sizes[:-1]
    rng = np.random.default_rng(0)
    rng.standard_normal((203, 96), np.float32)
    for name, shape in BITNET.linear_shapes().items():
        layer = model.weights[name].w_packed
        np.testing.assert_array_equal(layer.unpack(), rng.integers(-1, 2, shape, np.int8))
        with pytest.raises(ValueError, match="read-only"):
            layer.data[0, 0] = 0


def test_a_matrix_that_was_not_planned_gets_an_array_of_its_own():
    packed = pack(np.random.default_rng(0).integers(-1, 2, (96, 160), np.int8), "base3")
    pages = HugePages("base3", [packed.shape] * 2)
    placed = [pages.place(packed) for _ in range(4)]
    begins = [matrix.data.ctypes.data for matrix in placed]
    assert [begin % (1 << 21) == 0 for begin in begins] == [True, False, True, True]
    for matrix in placed:
        np.testing.assert_array_equal(matrix.unpack(), packed.unpack())


def test_with_threads_shares_weights():
    model = model_of(BITNET, n_threads=1)
    names = []
    other = model.with_threads(2, noting(names))
    assert other.n_threads == 2 and model.n_threads == 1
    np.testing.assert_array_equal(other.logits([1, 2]), model.logits([1, 2]))
    assert names.count("product") == 2 * 7 and names.count("head") == 1 and names.count("attention") == 2
    names.clear()
    np.testing.assert_array_equal(other.forward([1]), model.forward([1]))
    assert names == ["blocks", "rms_norm", "head"]
    names.clear()
    model_of(SWIGLU, head="q8_0").with_threads(2, noting(names)).forward([1])
    assert names == ["blocks", "rms_norm", "grouped_head"]  # its embedding is of floats
    names.clear()
    model_of(dataclasses.replace(SWIGLU, tied_head=True), head="q8_0").with_threads(2, noting(names)).forward([1])
    assert names == ["grouped_rows", "blocks", "rms_norm", "grouped_head"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert other.weights[name].w_packed is model.weights[name].w_packed


@pytest.mark.parametrize("sparse", [False, True])
def test_the_time_inside_of_a_decode_step_is_told(monkeypatch, sparse):
    """Products and attention are positive, and part of the one call; asking again gives nothing."""
    monkeypatch.setattr(runtime_sparse, "SPARSE_FROM", dict.fromkeys(kernels.ISAS, (0.0, 0.0)))
    spent = []

    def wrap(name, function):
        def run(*args):
            start = time.perf_counter_ns()
            result = function(*args)
            if name == "blocks":
                spent.append(time.perf_counter_ns() - start)
            return result

        return run

    other = model_of(BITNET, n_threads=2, sparse=sparse).with_threads(2, wrap)
    cache = other.new_cache(9)
    other.forward([1], cache)
    first = other.take_inner_ns()
    assert set(first) == {"product", "attention"} and min(first.values()) > 0 and sum(first.values()) < spent[0]
    assert not any(other.take_inner_ns().values())
    for token in (2, 3, 4):
        other.forward([token], cache)
    assert 0 < sum(other.take_inner_ns().values()) < sum(spent[1:]) and len(spent) == 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.logits([]), ValueError, "1 to 400 integers"),
        (lambda m: m.logits([[1]]), ValueError, "1 to 400 integers"),
        (lambda m: m.logits([203]), ValueError, r"0\.\.202"),
        (lambda m: m.logits([0.5]), TypeError, "integers"),
        (lambda m: m.logits([1] * 401), ValueError, "1 to 400"),
        (lambda m: m.generate("text"), ValueError, "needs a tokenizer"),
        (lambda m: m.generate([1], stop="x"), ValueError, "stop strings need a tokenizer"),
        (lambda m: m.generate([1], stop=""), ValueError, "must not be empty"),
        (lambda m: m.generate([1], 0), ValueError, "max_tokens"),
        (lambda m: m.generate([1], seed=-1), ValueError, "seed"),
        (lambda m: m.generate([]), ValueError, "at least one prompt"),
        (lambda m: m.generate([[]]), ValueError, "at least one token"),
        (lambda m: m.generate([[1], [-1]]), ValueError, "got -1"),
        (lambda m: m.generate([1] * 400), ValueError, "leave room"),
        (lambda m: m.generate([1], temperature=-1.0), ValueError, "temperature"),
        (lambda m: m.generate([1], temperature=math.nan), ValueError, "temperature"),
        (lambda m: m.generate([1], top_k=-1), ValueError, "top_k"),
        (lambda m: m.generate([1], top_p=0.0), ValueError, "top_p"),
        (lambda m: m.generate([1], min_p=1.5), ValueError, "min_p"),
        (lambda m: m.generate([1], repetition_penalty=0.0), ValueError, "repetition_penalty"),
        (lambda m: m.prefill([1, 2], m.new_cache(9), 3), ValueError, "n_logits"),
        (lambda m: m.new_cache(401), ValueError, "capacity"),
        (lambda m: perplexity(m, [1] * 9, 10), ValueError, "at least 10 tokens"),
        (lambda m: perplexity(m, [1] * 9, 3), ValueError, "between 4"),
        (lambda m: perplexity(m, [1] * 9, 401), ValueError, "between 4"),
        (lambda m: perplexity(m, [1] * 9, 4, stride=2), ValueError, "belongs to"),
        (lambda m: perplexity(m, [1] * 9, 4, convention="hf"), ValueError, "convention"),
        (lambda m: perplexity(m, "text"), ValueError, "needs a tokenizer"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(model_of(BITNET))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "i3"}, "scheme must be"),
        ({"head": "q5_0"}, "head must be"),
        ({"head": "q6_k"}, "multiple of 256"),
        ({"cache": "f8"}, "cache must be"),
        ({"n_threads": 0}, "n_threads"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        model_of(BITNET, **options)


def test_missing_or_wrong_weights():
    weights = ternary_weights(BITNET, random_weights(BITNET, 0))
    with pytest.raises(ValueError, match="1 missing"):
        Model.from_weights(BITNET, {k: v for k, v in weights.items() if k != "model.norm.weight"}, "i2")
    name = "model.layers.1.mlp.up_proj.weight"
    w_q, scale = weights[name]
    with pytest.raises(ValueError, match=r"up_proj.* must have shape"):
        Model.from_weights(BITNET, weights | {name: (w_q[:-1], scale)}, "i2")
    with pytest.raises(ValueError, match="must be ternary"):
        Model.from_weights(BITNET, weights | {name: w_q.astype(np.float32)}, "i2")


def test_a_full_precision_network_runs():
    config = dataclasses.replace(SWIGLU, ternary=False)
    weights = random_weights(config, 0)
    model = Model.from_weights(config, weights, head="f32")
    # BLAS sums in both, here with another head: a float32 product apart.
    np.testing.assert_allclose(model.logits([1, 2, 3]), forward(config, weights, [1, 2, 3]), rtol=0, atol=2e-5)


def test_forward_takes_steps_and_gives_last_logits():
    weights = ternary_weights(BITNET, random_weights(BITNET, 0))
    calls = []

    def counting(x, weight, eps, offset=0.0):
        calls.append(x.shape)
        return rms_norm(x, weight, eps, offset)

    tokens = [1, 2, 3]
    full = forward(BITNET, weights, tokens, steps=Steps(rms_norm=counting))
    assert len(calls) == 2 * 4 + 1
    # The BLAS product of the head may sum otherwise for one row than for three.
    np.testing.assert_allclose(forward(BITNET, weights, tokens, n_logits=1), full[-1:], rtol=0, atol=1e-5)
    for bad in (0, 4):
        with pytest.raises(ValueError, match="n_logits"):
            forward(BITNET, weights, tokens, n_logits=bad)


# --- sampling and perplexity ----------------------------------------------------------------------------------------


def test_sampling_filters_by_hand():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    one = {"temperature": 1.0}

    def check(expected, **options):
        np.testing.assert_allclose(Sampler(**(one | options)).probabilities(logits), expected, atol=1e-7)

    check([0.4, 0.3, 0.2, 0.1])
    check([4 / 7, 3 / 7, 0, 0], top_k=2)
    check([4 / 9, 3 / 9, 2 / 9, 0], top_p=0.75)  # 0.4 + 0.3 do not reach it
    check([1, 0, 0, 0], top_p=0.3)
    check([4 / 9, 3 / 9, 2 / 9, 0], min_p=0.4)
    check([16 / 30, 9 / 30, 4 / 30, 1 / 30], temperature=0.5)
    check([1, 0, 0, 0], temperature=0.0)
    check([1, 0, 0, 0], temperature=1e-300)
    sampler = Sampler(temperature=0.0, repetition_penalty=2.0)
    values = np.array([3.0, 2.0, -1.0], np.float32)
    assert sampler.penalised(values, [0, 2, 0]).tolist() == [1.5, 2.0, -2.0]
    assert sampler.choose(values, [0], np.random.default_rng(0)) == 1
    assert values.tolist() == [3, 2, -1]


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1 - 1e-12])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_top_p_of_a_large_vocabulary_is_that_of_all_its_tokens_sorted(top_p, spread):
    """Flat and steep, with ties: only the likeliest are sorted where they suffice."""
    logits = np.round(normal(5000, scale=spread), 1)
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    p[order[np.cumsum(p[order]) - p[order] >= top_p]] = 0
    got = Sampler(temperature=1.0, top_p=top_p).probabilities(logits)
    np.testing.assert_array_equal(got, p / p.sum())


def test_sampling_draws_by_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    rng = np.random.default_rng(0)
    drawn = np.bincount([Sampler(temperature=1.0).choose(logits, [], rng) for _ in range(4000)], minlength=3) / 4000
    # Standard deviations are at most 0.0079; five of them.
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.2], atol=0.04)


def test_sampling_refuses_nan():
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN"):
            Sampler(temperature=temperature).choose(np.array([1, np.nan], np.float32), [], np.random.default_rng(0))


def losses_of(model, tokens):
    """-log p of tokens 1, 2, ... of a sequence, each from all before it."""
    return -log_softmax(model.logits(tokens))[np.arange(len(tokens) - 1), tokens[1:]]


def test_perplexity_of_chunks():
    model = model_of(BITNET)
    tokens = np.random.default_rng(1).integers(0, 203, 47)
    found = perplexity(model, tokens, 20)
    # Two chunks of 20; of each, tokens 11 to 19, which positions 10 to 18 predict.
    expected = np.concatenate([losses_of(model, tokens[i : i + 20])[10:] for i in (0, 20)])
    assert found.n_scored == 18 == len(expected) and found.n_tokens == 47
    assert found.value == pytest.approx(math.exp(expected.mean()), rel=1e-12)  # the same float64 sums in another order
    assert found.error == pytest.approx(found.value * expected.std(ddof=1) / math.sqrt(18), rel=1e-9)
    assert perplexity(model, tokens, 20, max_chunks=1).n_scored == 9


@pytest.mark.parametrize(("n", "stride"), [(20, 8), (20, 20), (47, 3), (100, 50), (6, 1)])
def test_perplexity_of_a_sliding_window(n, stride):
    model = model_of(BITNET)
    tokens = np.random.default_rng(1).integers(0, 203, 47)
    running = []
    found = perplexity(
        model, tokens, n, convention="transformers", stride=stride, progress=lambda *values: running.append(values)
    )
    expected, scored = [], 1
    for begin in range(0, 47, stride):
        end = min(begin + n, 47)
        window = losses_of(model, tokens[begin:end])  # of tokens begin + 1 .. end - 1
        expected.append(window[max(scored, begin + 1) - begin - 1 :])
        scored = end
        if end == 47:
            break
    expected = np.concatenate(expected)
    assert found.n_scored == len(expected) == (46 if stride < n else 46 - 2)
    assert found.value == pytest.approx(math.exp(expected.mean()), rel=1e-12)
    assert running[-1][:2] == (len(running), len(running)) and running[-1][2] == pytest.approx(found.value)
