"""Bit layouts of other programs: golden bytes from their formulas, and the programs' own packers as oracles."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ref.errors import FormatError
from bitnet_ref.formats.float_types import FLOAT_TYPES, encode_floats, quantize_q6_k, row_bytes
from bitnet_ref.formats.gguf_names import permute_rows, unpermute_rows
from bitnet_ref.formats.hf import pack_hf, unpack_hf
from bitnet_ref.formats.i2s import I2S_LAYOUTS, check_i2s_shape, pack_i2s, unpack_i2s
from bitnet_ref.formats.ternary_gguf import TQ_TYPES, pack_tq, unpack_tq


def ternary(shape, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, shape, dtype=np.int8)


# I2_S ----------------------------------------------------------------------------------------------------------------


def i2s_address(layout, row, column, n_columns):
    """Byte and shift of a weight, written from the published formula, one weight at a time."""
    if layout == "interleaved-4":
        return row // 4 * n_columns + column, 6 - 2 * (row % 4)
    block = {"x86-128": 128, "arm-64": 64}[layout]
    at, j = divmod(row * n_columns + column, block)
    return at * block // 4 + j % (block // 4), 6 - 2 * (j // (block // 4))


@pytest.mark.parametrize("layout", I2S_LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 128), (8, 192), (4, 96), (12, 256)])
def test_i2s_bytes_are_those_of_the_formula(layout, shape):
    w_q, scale = ternary(shape), np.float32(0.3)
    expected = bytearray(w_q.size // 4)
    for row, column in np.ndindex(shape):
        byte, shift = i2s_address(layout, row, column, shape[1])
        expected[byte] |= (int(w_q[row, column]) + 1) << shift
    data = pack_i2s(w_q, scale, layout)
    assert data.tobytes() == bytes(expected) + scale.tobytes() + bytes(28)
    back, back_scale = unpack_i2s(data, shape, layout)
    np.testing.assert_array_equal(back, w_q)
    assert back_scale == scale


def test_i2s_golden_bytes():
    # One weight of +1 at element 33 of the first block, all else -1: field 1 of byte 1 (x86), field 2 of byte 1 (ARM).
    w_q = np.full((4, 128), -1, np.int8)
    w_q[0, 33] = 1
    assert {layout: np.flatnonzero(pack_i2s(w_q, np.float32(1), layout)[:128]).tolist() for layout in I2S_LAYOUTS} == {
        "x86-128": [1],
        "arm-64": [1],
        "interleaved-4": [33],
    }
    assert pack_i2s(w_q, np.float32(1), "x86-128")[1] == 0b00100000
    assert pack_i2s(w_q, np.float32(1), "arm-64")[1] == 0b00001000
    assert pack_i2s(w_q, np.float32(1), "interleaved-4")[33] == 0b10000000


def test_i2s_layouts_differ():
    w_q = ternary((8, 128))
    packed = [pack_i2s(w_q, np.float32(1), layout).tobytes() for layout in I2S_LAYOUTS]
    assert len(set(packed)) == 3


@pytest.mark.parametrize("layout", I2S_LAYOUTS)
def test_i2s_refuses_code_3(layout):
    data = pack_i2s(ternary((4, 128)), np.float32(1), layout)
    data[7] |= 0b00001100
    with pytest.raises(FormatError, match="code 3, got it in byte 7"):
        unpack_i2s(data, (4, 128), layout)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_i2s_refuses_a_bad_scale(scale):
    with pytest.raises(FormatError, match="finite and above 0"):
        unpack_i2s(pack_i2s(ternary((4, 128)), np.float32(scale), "arm-64"), (4, 128), "arm-64")


def test_i2s_refuses_wrong_shapes():
    with pytest.raises(ValueError, match="whole blocks"):
        pack_i2s(ternary((4, 100)), np.float32(1), "x86-128")
    with pytest.raises(FormatError, match="whole blocks"):
        unpack_i2s(np.zeros(132, np.uint8), (4, 100), "x86-128")
    with pytest.raises(FormatError, match="must have 160 bytes, got 159"):
        unpack_i2s(np.zeros(159, np.uint8), (4, 128), "x86-128")
    with pytest.raises(ValueError, match="drops the rest"):
        check_i2s_shape("w", (2, 192), "x86-128")
    with pytest.raises(ValueError, match="rows in fours"):
        check_i2s_shape("w", (6, 128), "interleaved-4")
    with pytest.raises(ValueError, match="one of x86-128, arm-64"):
        pack_i2s(ternary((4, 128)), np.float32(1), "x86")
    with pytest.raises(ValueError, match="only -1, 0 and 1"):
        pack_i2s(ternary((4, 128)) * np.int8(2), np.float32(1), "x86-128")
    with pytest.raises(TypeError, match="int8"):
        pack_i2s(ternary((4, 128)).astype(np.int32), np.float32(1), "x86-128")


# TQ1_0, TQ2_0 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", TQ_TYPES)
@given(m=st.integers(1, 9), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_tq_equals_the_library(type_name, m, blocks, seed):
    w_q = ternary((m, 256 * blocks), seed)
    w_q[0, ::256] = 1  # the library takes the scale of a block from its largest weight
    w_q[:, ::256] = 1
    scale = np.float16(0.75)
    ggml_type = GGMLQuantizationType[type_name]
    data = pack_tq(w_q, scale, type_name)
    np.testing.assert_array_equal(data, quants.quantize(w_q * np.float32(scale), ggml_type))
    np.testing.assert_array_equal(quants.dequantize(data, ggml_type), w_q * np.float32(scale))
    back, scales = unpack_tq(data, w_q.shape, type_name)
    np.testing.assert_array_equal(back, w_q)
    assert (scales == scale).all() and scales.shape == (m, blocks)


def test_tq_refuses():
    with pytest.raises(ValueError, match="multiple of 256"):
        pack_tq(ternary((2, 128)), np.float16(1), "TQ2_0")
    with pytest.raises(ValueError, match="only -1, 0 and 1"):
        pack_tq(ternary((2, 256)) * np.int8(2), np.float16(1), "TQ1_0")
    with pytest.raises(TypeError, match="int8"):
        pack_tq(ternary((2, 256)).astype(np.float32), np.float16(1), "TQ1_0")
    with pytest.raises(ValueError, match="TQ1_0, TQ2_0"):
        pack_tq(ternary((2, 256)), np.float16(1), "TQ3_0")
    data = pack_tq(ternary((1, 256)), np.float16(1), "TQ2_0")
    data[0, 5] |= 0b11000000
    with pytest.raises(FormatError, match="code 3"):
        unpack_tq(data, (1, 256), "TQ2_0")
    with pytest.raises(FormatError, match="got 66 bytes"):
        unpack_tq(data, (2, 256), "TQ2_0")


def test_every_tq1_byte_decodes_as_in_the_library():
    data = np.zeros((256, 54), np.uint8)
    data[:, :52] = np.arange(256)[:, None]
    data[:, 52:] = np.array([1.0], "<f2").view(np.uint8)
    w_q, _ = unpack_tq(data, (256, 256), "TQ1_0")
    np.testing.assert_array_equal(w_q, quants.dequantize(data, GGMLQuantizationType.TQ1_0))


# Hugging Face --------------------------------------------------------------------------------------------------------


def test_hf_golden_bytes():
    w_q = np.array([[-1], [0], [1], [-1], [0], [1], [1], [0]], np.int8)  # M = 8, so n = 2
    # byte 0: rows 0, 2, 4, 6 = codes 0, 2, 1, 2; byte 1: rows 1, 3, 5, 7 = codes 1, 0, 2, 1
    assert pack_hf(w_q).tolist() == [[0b10_01_10_00], [0b01_10_00_01]]


@pytest.mark.parametrize("shape", [(4, 1), (8, 3), (12, 7), (5, 3), (6, 4), (7, 2)])
def test_hf_reads_what_transformers_packs(shape):
    torch = pytest.importorskip("torch", reason="transformers' packer needs torch")
    bitnet = pytest.importorskip("transformers.integrations.bitnet", reason="needs transformers' packer")
    w_q = ternary(shape)
    theirs = bitnet.pack_weights(torch.from_numpy(w_q.copy())).numpy()
    np.testing.assert_array_equal(unpack_hf(theirs, len(w_q)), w_q)
    if shape[0] % 4 == 0:
        np.testing.assert_array_equal(pack_hf(w_q), theirs)
        np.testing.assert_array_equal(unpack_hf(theirs), w_q)


def test_hf_refuses():
    with pytest.raises(FormatError, match="code 3"):
        unpack_hf(np.array([[0b00110000]], np.uint8))
    with pytest.raises(FormatError, match="zero beyond row 3"):
        unpack_hf(np.array([[0b01000000]], np.uint8), 3)
    with pytest.raises(FormatError, match="9 rows must be packed in 3 rows"):
        unpack_hf(np.zeros((2, 1), np.uint8), 9)
    with pytest.raises(ValueError, match="rows in fours"):
        pack_hf(ternary((5, 3)))
    with pytest.raises(ValueError, match="only -1, 0 and 1"):
        pack_hf(np.full((4, 1), 2, np.int8))
    with pytest.raises(TypeError, match="int8"):
        pack_hf(np.zeros((4, 1), np.float32))


# RoPE order ----------------------------------------------------------------------------------------------------------


def test_permutation_turns_halves_into_neighbours():
    rows = np.arange(16).reshape(16, 1)  # two heads of eight: halves 0-3 and 4-7
    assert permute_rows(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    np.testing.assert_array_equal(unpermute_rows(permute_rows(rows, 2), 2), rows)


# Embeddings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FLOAT_TYPES))
def test_float_types_decode_in_the_library(name):
    type_name = FLOAT_TYPES[name]
    x = np.random.default_rng(1).standard_normal((17, 512), np.float32)
    x[3] = 0
    x[4, :16] = 0
    data = encode_floats("x", x, type_name)
    assert data.shape == (17, row_bytes(512, type_name)) and data.dtype == np.uint8
    decoded = quants.dequantize(data, GGMLQuantizationType[type_name])
    # Largest error as a share of the largest value of a group: half a step, and for block types the rounding of the
    # scale to float16 (2^-11) or int8 (2^-8) times the largest code, 32. Q4_0's top code is 7 of -8: one whole step.
    bound = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.51 / 127 + 2**-11, "Q6_K": 1.05 / 31, "Q4_0": 1.01 / 8}
    group = 16 if type_name == "Q6_K" else 32
    largest = np.abs(x).reshape(17, -1, group).max(axis=2).repeat(group, axis=1)
    assert (np.abs(decoded - x) <= bound[type_name] * largest).all()


def test_q6_k_keeps_what_it_can_hold():
    rng = np.random.default_rng(2)
    q = rng.integers(-32, 32, (4, 16, 16))
    q[:, :, 0] = -32
    scales = rng.integers(1, 128, (4, 16, 1))
    scales[:, 0] = -128  # the largest fixes the super-scale exactly
    x = (q * scales * 0.25).astype(np.float32).reshape(2, 512)
    np.testing.assert_array_equal(quants.dequantize(quantize_q6_k(x), GGMLQuantizationType.Q6_K), x)


def test_q6_k_error_of_gaussian_weights():
    x = np.random.default_rng(3).standard_normal((64, 1024), np.float32)
    error = quants.dequantize(quantize_q6_k(x), GGMLQuantizationType.Q6_K) - x
    # A step of max / 32 for 16 normal values, whose largest averages 2.1 in magnitude: rms step / sqrt(12) = 0.019.
    assert np.sqrt(np.mean(error**2)) < 0.0195


def test_encoders_refuse():
    x = np.ones((1, 256), np.float32)
    with pytest.raises(ValueError, match="multiple of 256 columns, x has 96"):
        encode_floats("x", x[:, :96], "Q6_K")
    with pytest.raises(ValueError, match="finite values"):
        encode_floats("x", x * np.float32(np.nan), "Q8_0")
    with pytest.raises(ValueError, match="65,504"):
        encode_floats("x", x * np.float32(1e5), "F16")
    with pytest.raises(ValueError, match="65,504"):
        encode_floats("x", x * np.float32(1e9), "Q4_0")
    special = np.array([[np.nan, np.inf, -np.inf, 65504]], np.float32)
    np.testing.assert_array_equal(encode_floats("x", special, "F16").view(np.float16).astype(np.float32), special)
