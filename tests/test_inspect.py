"""What is reported of weight files written by the libraries themselves, against values known in advance."""

from __future__ import annotations

import json
import math
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from safetensors import TensorSpec, safe_open, serialize_file
from safetensors.numpy import save_file

from bitnet_ref.formats import inspect_file, open_tensor_file, weight_distribution
from bitnet_ref.formats.tensors import _float8_e4m3_values

# mean|w| = 1, so the codes are 0, 0, 1, -1. Every value is exact in all float types down to 8 bits.
PATTERN = np.array([0.25, -0.25, 1.5, -2.0], np.float32)
KNOWN = np.tile(PATTERN, (64, 64))  # (64, 256)
KNOWN_ENTROPY_BITS = 1.5  # 1/2 log2(2) + 2 * 1/4 log2(4)
KNOWN_RELATIVE_ERROR = math.sqrt(1.375 / 6.375)  # squares of (1/4, 1/4, 1/2, 1) over squares of the pattern
TERNARY = np.random.default_rng(7).choice(np.array([-0.5, 0.0, 0.5], np.float32), (32, 256))


def write_safetensors(path, name, shape, dtype, raw):
    """One tensor of any type, bf16 and 8-bit floats included, which NumPy does not have."""
    raw = np.ascontiguousarray(raw)
    spec = TensorSpec(dtype=dtype, shape=shape, data_ptr=raw.ctypes.data, data_len=raw.nbytes)
    serialize_file({name: spec}, path)


def write_gguf(path, tensors, metadata=()):
    """``tensors`` maps a name to (float32 array, type); ``metadata`` holds (adder, key, value)."""
    writer = gguf.GGUFWriter(path, "llama")
    for adder, key, value in metadata:
        getattr(writer, adder)(key, value)
    for name, (values, ggml_type) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(values, ggml_type), raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_known(row):
    assert row.scale == 1.0
    assert row.fraction_zeros == 0.5
    assert row.entropy_bits == KNOWN_ENTROPY_BITS
    # The reference sums float32 errors in float64: a few units in the last place of float64.
    assert row.relative_error == pytest.approx(KNOWN_RELATIVE_ERROR, rel=1e-12)
    assert not row.already_ternary
    assert row.n_non_finite == 0


def float32_bits(w):
    return w.view(np.uint32)


# E4M3 and E5M2 codes of the pattern, by hand: sign, exponent with bias 7 or 15, mantissa.
E4M3_PATTERN = np.array([0b0_0101_000, 0b1_0101_000, 0b0_0111_100, 0b1_1000_000], np.uint8)
E5M2_PATTERN = np.array([0b0_01101_00, 0b1_01101_00, 0b0_01111_10, 0b1_10000_00], np.uint8)


@pytest.mark.parametrize(
    ("dtype", "stored", "raw"),
    [
        ("float64", "F64", KNOWN.astype(np.float64)),
        ("float32", "F32", KNOWN),
        ("float16", "F16", KNOWN.astype(np.float16)),
        ("bfloat16", "BF16", (float32_bits(KNOWN) >> 16).astype(np.uint16)),
        ("float8_e4m3fn", "F8_E4M3", np.tile(E4M3_PATTERN, (64, 64))),
        ("float8_e5m2", "F8_E5M2", np.tile(E5M2_PATTERN, (64, 64))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_safetensors_float_types(tmp_path, dtype, stored, raw):
    path = tmp_path / "weights.bin"  # the name does not decide the format
    write_safetensors(path, "model.layers.0.mlp.up_proj.weight", KNOWN.shape, dtype, raw)
    report = inspect_file(path)
    (row,) = report.tensors
    assert report.format == "safetensors"
    assert report.file_bytes == path.stat().st_size
    assert (row.name, row.shape, row.type) == ("model.layers.0.mlp.up_proj.weight", KNOWN.shape, stored)
    assert row.stored_bytes == raw.nbytes
    assert row.role == "linear"
    assert not row.dequantised
    assert_known(row)
    assert np.array_equal(open_tensor_file(path).tensors[0].to_float32(), KNOWN)


@pytest.mark.parametrize("ggml_type", [GgmlType.F32, GgmlType.F16, GgmlType.BF16], ids=lambda t: t.name)
def test_gguf_float_types(tmp_path, ggml_type):
    path = tmp_path / "weights.bin"
    write_gguf(path, {"blk.0.ffn_up.weight": (KNOWN, ggml_type)})
    report = inspect_file(path)
    (row,) = report.tensors
    assert report.format == "GGUF version 3"
    assert (row.name, row.shape, row.type) == ("blk.0.ffn_up.weight", KNOWN.shape, ggml_type.name)
    assert not row.dequantised
    assert_known(row)


def test_all_e4m3_values():
    """All 256 codes against the definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits; NaN at the top, no inf."""
    expected = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        magnitude = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        if code & 127 == 127:
            magnitude = math.nan
        expected.append(-magnitude if code & 128 else magnitude)
    assert np.array_equal(_float8_e4m3_values(), np.array(expected, np.float32), equal_nan=True)


def test_q8_0_is_dequantised_and_says_so(tmp_path):
    path = tmp_path / "w.gguf"
    write_gguf(path, {"blk.0.attn_q.weight": (KNOWN, GgmlType.Q8_0)})
    report = inspect_file(path)
    (row,) = report.tensors
    assert row.stored_bytes == KNOWN.size // 32 * 34
    assert row.dequantised
    assert row.note == "dequantised from Q8_0, not the original weights"
    assert len(report.notes) == 1
    assert "Q8_0" in report.notes[0]
    # Q8_0 rounds to steps of 2/127 = 0.016, far from the thresholds at 0.5: same codes, slightly other values.
    assert row.fraction_zeros == 0.5
    assert row.entropy_bits == KNOWN_ENTROPY_BITS
    assert row.scale == pytest.approx(1.0, abs=0.008)
    assert row.scale != 1.0


@pytest.mark.parametrize(
    ("ggml_type", "block_bytes"), [(GgmlType.TQ1_0, 54), (GgmlType.TQ2_0, 66)], ids=["TQ1_0", "TQ2_0"]
)
def test_ternary_gguf_types_come_back_as_already_ternary(tmp_path, ggml_type, block_bytes):
    path = tmp_path / "w.gguf"
    write_gguf(path, {"blk.0.attn_q.weight": (TERNARY, ggml_type)})
    (tensor,) = open_tensor_file(path).tensors
    assert np.array_equal(tensor.to_float32(), TERNARY)
    (row,) = inspect_file(path).tensors
    assert row.stored_bytes == TERNARY.size // 256 * block_bytes
    assert row.dequantised
    assert row.already_ternary
    assert row.scale == 0.5
    assert row.relative_error == 0.0
    assert row.fraction_zeros == np.mean(TERNARY == 0)


def test_ternary_float_matrix(tmp_path):
    binary = np.where(TERNARY == 0, np.float32(0.5), TERNARY)
    save_file({"a": TERNARY, "b": binary, "c": np.zeros_like(TERNARY)}, tmp_path / "w.safetensors")
    a, b, c = inspect_file(tmp_path / "w.safetensors").tensors
    assert (a.already_ternary, a.scale, a.relative_error) == (True, 0.5, 0.0)
    assert (b.already_ternary, b.scale, b.fraction_zeros, b.entropy_bits) == (True, 0.5, 0.0, b.entropy_bits)
    assert 0 < b.entropy_bits < 1
    assert (c.already_ternary, c.fraction_zeros, c.entropy_bits, c.relative_error) == (False, 1.0, 0.0, 0.0)


def test_tiny_ternary_matrix(tmp_path):
    """A magnitude below the quantiser's smallest scale, 1e-5, is still found and nothing is lost."""
    save_file({"a": TERNARY * np.float32(1e-6)}, tmp_path / "w.safetensors")
    (row,) = inspect_file(tmp_path / "w.safetensors").tensors
    assert row.already_ternary
    assert row.scale == np.float32(0.5) * np.float32(1e-6)
    assert row.fraction_zeros == np.mean(TERNARY == 0)


def test_one_deviating_weight_is_not_ternary(tmp_path):
    w = TERNARY.copy()
    w[-1, -1] = np.nextafter(np.float32(0.5), np.float32(1))
    save_file({"a": w}, tmp_path / "w.safetensors")
    (row,) = inspect_file(tmp_path / "w.safetensors").tensors
    assert not row.already_ternary
    assert 0 < row.scale < 0.5


def test_same_directory_as_the_gguf_reader(tmp_path):
    """Names, shapes, sizes, offsets and values agree with the gguf package's own reader."""
    path = tmp_path / "w.gguf"
    rng = np.random.default_rng(0)
    types = [t for t in GgmlType if t.name in {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0"}]
    tensors = {f"blk.{i}.w": (rng.standard_normal((3 + i, 256), np.float32), t) for i, t in enumerate(types)}
    tensors["stack"] = (rng.standard_normal((2, 5, 64), np.float32), GgmlType.F16)
    tensors["vector"] = (rng.standard_normal(7, np.float32), GgmlType.F32)
    write_gguf(path, tensors)
    ours = open_tensor_file(path)
    theirs = gguf.GGUFReader(path).tensors
    assert len(types) == 9
    assert [t.name for t in ours.tensors] == [t.name for t in theirs]
    for a, b in zip(ours.tensors, theirs, strict=True):
        assert a.shape == tuple(reversed(b.shape.tolist()))
        assert (a.type, a.stored_bytes, a.offset) == (b.tensor_type.name, b.n_bytes, b.data_offset)
        values = gguf.quants.dequantize(b.data, b.tensor_type).reshape(a.shape)
        assert np.array_equal(a.to_float32(), values)


def test_same_directory_as_the_safetensors_library(tmp_path):
    path = tmp_path / "w.safetensors"
    rng = np.random.default_rng(0)
    arrays = {
        "b": rng.standard_normal((3, 5), np.float32),
        "a": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "scalar": np.array(2.5, np.float64),
        "empty": np.zeros((0, 4), np.float32),
        "ids": np.arange(6, dtype=np.int64),
    }
    save_file(arrays, path, metadata={"format": "np", "long": "x\n" * 1000})
    ours = open_tensor_file(path)
    with safe_open(path, framework="np") as theirs:
        assert {t.name for t in ours.tensors} == set(theirs.keys())
        for t in ours.tensors:
            assert t.shape == tuple(theirs.get_slice(t.name).get_shape())
            if t.is_float:
                assert np.array_equal(t.to_float32(), theirs.get_tensor(t.name).astype(np.float32))
    assert [t.name for t in ours.tensors if not t.is_float] == ["ids"]
    with pytest.raises(TypeError, match="ids is I64"):
        next(t for t in ours.tensors if t.name == "ids").to_float32()
    assert ours.metadata["format"] == "np"
    assert len(ours.metadata["long"]) <= 120
    assert ours.metadata["long"].isprintable()


def test_gguf_metadata(tmp_path):
    path = tmp_path / "w.gguf"
    metadata = [
        ("add_uint32", "count", 7),
        ("add_float32", "broken", math.nan),
        ("add_bool", "flag", True),
        ("add_string", "template", "a\n" * 500),
        ("add_array", "short", ["x", "y"]),
        ("add_array", "tokens", [f"t{i}" for i in range(5000)]),
        ("add_array", "ids", list(range(300))),
    ]
    write_gguf(path, {"w": (KNOWN, GgmlType.F32)}, metadata)
    report = inspect_file(path)
    assert report.metadata["general.architecture"] == "llama"
    assert report.metadata["count"] == 7
    assert report.metadata["flag"] is True
    assert len(report.metadata["template"]) == 120
    assert report.metadata["short"] == ["x", "y"]
    assert report.metadata["tokens"] == "5,000 string values, first t0, t1, t2, t3"
    assert report.metadata["ids"].startswith("300 int32 values, first 0, 1, 2, 3")
    assert report.as_dict()["metadata"]["broken"] is None
    assert_known(report.tensors[0])


def test_gguf_alignment(tmp_path):
    """Data start at the alignment that the file names, not at the usual 32."""
    path = tmp_path / "w.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(4096)
    writer.add_tensor("w", KNOWN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = open_tensor_file(path).tensors
    assert tensor.offset == 4096
    assert np.array_equal(tensor.to_float32(), KNOWN)


def test_what_is_not_analysed_says_why(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {
        "experts": np.ones((4, 32, 32), np.float32),
        "norm": np.ones(4096, np.float32),
        "packed": np.zeros((64, 64), np.uint8),
        "small": np.ones((31, 33), np.float32),
        "just_large_enough": np.tile(PATTERN, (32, 8)),
    }
    save_file(tensors, path)
    rows = {row.name: row for row in inspect_file(path).tensors}
    assert rows["experts"].note == "stack of 4 matrices, not a matrix"
    assert rows["norm"].note == "not a matrix"
    assert rows["packed"].note == "U8 is not a float type"
    assert rows["small"].note == "fewer than 1,024 weights"
    assert all(rows[name].scale is None for name in ("experts", "norm", "packed", "small"))
    assert rows["just_large_enough"].scale == 1.0


def test_non_finite_weights_are_reported(tmp_path):
    path = tmp_path / "w.safetensors"
    damaged = KNOWN.copy()
    damaged[3, 5], damaged[0, 0] = np.nan, -np.inf
    too_large = KNOWN.astype(np.float64)
    too_large[0, 0] = 1e300
    save_file({"a": damaged, "b": KNOWN, "c": too_large}, path)
    report = inspect_file(path)
    rows = {row.name: row for row in report.tensors}
    assert rows["a"].n_non_finite == 2
    assert rows["a"].scale is None
    assert rows["a"].note == "2 weights are NaN or infinite"
    assert rows["c"].n_non_finite == 1
    assert_known(rows["b"])
    assert any("2 of 3 tensors hold NaN or infinity" in note for note in report.notes)
    distribution = weight_distribution(path)
    assert sorted(distribution.skipped) == ["a", "c"]
    assert [layer.name for layer in distribution.layers] == ["b"]


def test_extreme_finite_weights(tmp_path):
    """The largest and the smallest float32 values stay figures, not warnings or infinities."""
    path = tmp_path / "w.safetensors"
    largest = np.tile(np.array([3e38, -3e38, 1e38, 0], np.float32), (32, 32))
    smallest = np.tile(np.array([1e-45, 3e-45, 0, -1e-44], np.float32), (32, 32))
    save_file({"a": largest, "b": smallest}, path)
    report = inspect_file(path)
    for row in report.tensors:
        assert row.n_non_finite == 0
        assert math.isfinite(row.scale)
        assert math.isfinite(row.relative_error)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("token_embd.weight", "embedding"),
        ("model.embed_tokens.weight", "embedding"),
        ("tok_embeddings.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("wpe", "embedding"),
        ("output.weight", "head"),
        ("lm_head.weight", "head"),
        ("embed_out.weight", "head"),
        ("blk.0.attn_output.weight", "linear"),
        ("model.layers.3.self_attn.o_proj.weight", "linear"),
    ],
)
def test_roles(tmp_path, name, role):
    save_file({name: KNOWN}, tmp_path / "w.safetensors")
    (row,) = inspect_file(tmp_path / "w.safetensors").tensors
    assert row.role == role
    assert_known(row)  # embeddings and heads are analysed too, and flagged


def test_totals_and_json(tmp_path):
    path = tmp_path / "w.gguf"
    tensors = {
        "blk.0.ffn_up.weight": (KNOWN, GgmlType.F16),
        "blk.0.ffn_down.weight": (KNOWN, GgmlType.F16),
        "blk.0.norm.weight": (np.ones(64, np.float32), GgmlType.F32),
    }
    write_gguf(path, tensors)
    report = inspect_file(path)
    assert report.totals == {
        "F16": {"tensors": 2, "weights": 2 * KNOWN.size, "stored_bytes": 4 * KNOWN.size},
        "F32": {"tensors": 1, "weights": 64, "stored_bytes": 256},
    }
    as_dict = report.as_dict()
    assert json.loads(json.dumps(as_dict, allow_nan=False)) == as_dict
    assert as_dict["tensors"][0]["scale"] == 1.0
    assert as_dict["tensors"][0]["shape"] == [64, 256]
    assert as_dict["totals"] == report.totals
    assert as_dict["path"] == str(path)


def test_progress(tmp_path):
    save_file({"a": KNOWN, "b": np.ones(3, np.float32)}, tmp_path / "w.safetensors")
    expected = [(1, 2, "a"), (2, 2, "b")]
    for run in (inspect_file, weight_distribution):
        calls = []
        run(tmp_path / "w.safetensors", progress=lambda *call, calls=calls: calls.append(call))
        assert calls == expected


def test_distribution_counts(tmp_path):
    """The pattern's ratios to mean|w| = 1 fall in four known bins; embeddings, heads and vectors stay out."""
    path = tmp_path / "w.safetensors"
    outlier = np.tile(np.array([1, -1, 1, 1, 1, 1, 1, 9], np.float32), (16, 8))  # mean 2: 0.5 and 4.5
    tensors = {"a.weight": KNOWN, "b.weight": outlier, "model.embed_tokens.weight": KNOWN, "lm_head.weight": KNOWN}
    save_file({**tensors, "norm": np.ones(4096, np.float32)}, path)
    distribution = weight_distribution(path, bins=16)
    assert np.array_equal(distribution.edges, np.arange(-4, 4.5, 0.5))
    a, b = distribution.layers
    assert (a.name, a.scale, a.fraction_zeros, a.n_outside) == ("a.weight", 1.0, 0.5, 0)
    quarter = KNOWN.size // 4
    # -2 opens its bin, -0.25 and 0.25 lie beside zero, 1.5 opens its bin.
    assert {int(i): int(a.counts[i]) for i in np.flatnonzero(a.counts)} == {
        4: quarter,
        7: quarter,
        8: quarter,
        11: quarter,
    }
    # 0.5 is a tie and rounds to even: seven of eight weights become zero.
    assert (b.scale, b.fraction_zeros, b.n_outside) == (2.0, 7 / 8, outlier.size // 8)
    assert np.array_equal(distribution.counts, a.counts + b.counts)
    assert distribution.n_outside == b.n_outside
    expected = (KNOWN.size * 0.5 + outlier.size * 7 / 8) / (KNOWN.size + outlier.size)
    assert distribution.fraction_zeros == pytest.approx(expected, rel=1e-15)
    assert distribution.dequantised_from == ()


def test_distribution_of_a_gaussian(tmp_path):
    """31.0 % of Gaussian weights lie below half of mean|w| = sqrt(2 / pi); 57.5 % would lie below mean|w| itself."""
    w = np.random.default_rng(1).standard_normal((512, 512), np.float32)
    write_gguf(tmp_path / "w.gguf", {"w": (w, GgmlType.Q8_0)})
    distribution = weight_distribution(tmp_path / "w.gguf")
    below = (distribution.edges[:-1] >= -0.5 - 1e-9) & (distribution.edges[1:] <= 0.5 + 1e-9)
    exact = math.erf(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2))
    assert exact == pytest.approx(0.310, abs=5e-4)
    # Standard error of a share of 262,144 weights is 0.0009; four of them.
    assert distribution.fraction_zeros == pytest.approx(exact, abs=0.0036)
    assert distribution.counts[below].sum() / w.size == pytest.approx(exact, abs=0.0036)
    assert distribution.dequantised_from == ("Q8_0",)


def test_distribution_needs_a_linear_layer(tmp_path):
    zeros = np.zeros((64, 64), np.float32)  # no distribution either
    save_file({"norm": np.ones(4096, np.float32), "zeros": zeros}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="found none"):
        weight_distribution(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="bins must be positive, got 0"):
        weight_distribution(tmp_path / "w.safetensors", bins=0)


def test_memory_is_about_one_tensor(tmp_path):
    """16 tensors of 1 MiB, one after the other: the float32 copy and one decoded chunk, never the file."""
    one = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float16)  # 1 MiB stored, 2 MiB as float32
    save_file({f"w{i:02}": one for i in range(16)}, tmp_path / "w.safetensors")
    opened = open_tensor_file(tmp_path / "w.safetensors")
    tracemalloc.start()
    try:
        for tensor in opened.tensors:
            tensor.to_float32()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Two float32 copies at most while one array is let go of and the next is made, and small objects.
    assert peak_bytes < 2.2 * one.size * 4


def test_large_tensors_are_decoded_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "bitnet_ref.formats.tensors._CHUNK_WEIGHTS", 1000
    )  # 3 rows of 256 at a time; 32 rows is no multiple
    write_gguf(tmp_path / "w.gguf", {"w": (TERNARY, GgmlType.TQ2_0)})
    (tensor,) = open_tensor_file(tmp_path / "w.gguf").tensors
    assert np.array_equal(tensor.to_float32(), TERNARY)
