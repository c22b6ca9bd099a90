"""Damaged and hostile weight files: one sentence of FormatError or a true report, quickly and in little memory."""

from __future__ import annotations

import json
import os
import signal
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from safetensors.numpy import save

from bitnet_ref.errors import FormatError
from bitnet_ref.formats import inspect_file, open_tensor_file

RNG = np.random.default_rng(3)
MATRIX = RNG.standard_normal((16, 64), np.float32)  # the smallest that is analysed


@pytest.fixture
def bounded():
    """A minute, and 512 MiB of address space beyond what is mapped now: MemoryError and TimeoutError are failures."""
    resource = pytest.importorskip("resource", reason="needs POSIX resource limits")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs /proc/self/statm to know the present size")

    def too_slow(signum, frame):
        raise TimeoutError("a hostile file took longer than a minute")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped_bytes = int(statm.read_text().split()[0]) * resource.getpagesize()
    previous = signal.signal(signal.SIGALRM, too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + (512 << 20), hard))
    signal.alarm(60)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.signal(signal.SIGALRM, previous)


def gguf_bytes(tmp_path, endianness=gguf.GGUFEndian.LITTLE):
    path = tmp_path / "valid.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=endianness)
    writer.add_string("key.one", "text")
    writer.add_array("key.two", ["a", "b", "c"])
    writer.add_array("key.six", [1, 2, 3, 4, 5, 6])
    writer.add_uint32("general.alignment", 32)
    for name, ggml_type in (("a.weight", GgmlType.F32), ("b.weight", GgmlType.Q8_0)):
        writer.add_tensor(name, gguf.quants.quantize(MATRIX, ggml_type), raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def safetensors_bytes(tmp_path):
    tensors = {"a.weight": MATRIX, "b.weight": MATRIX.astype(np.float16), "ids": np.arange(4)}
    return save(tensors, metadata={"format": "np"})


BUILDERS = {"gguf": gguf_bytes, "safetensors": safetensors_bytes}


def header_bytes(content):
    """Where the values of the first tensor begin."""
    return content.index(MATRIX.tobytes()[:32])


def safetensors_file(header, data=b""):
    raw = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(raw)) + raw + data


def outcome(path, content):
    """The report on these bytes, or None if they are refused; any other exception fails the test."""
    path.write_bytes(content)
    try:
        report = inspect_file(path)
    except FormatError as error:
        message = str(error)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert len(message) < 2000
        return None
    json.dumps(report.as_dict(), allow_nan=False)
    assert sum(t.stored_bytes for t in report.tensors) <= len(content)
    return report


def refusal(path, content=None):
    """The message that refuses these bytes, or the file that is there."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        open_tensor_file(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_truncation_is_refused(tmp_path, bounded, builder):
    content = BUILDERS[builder](tmp_path)
    path = tmp_path / "mutant"
    assert outcome(path, content) is not None
    *_, last = inspect_order = open_tensor_file(path).tensors
    assert len(inspect_order) >= 2
    end = last.offset + last.stored_bytes  # GGUF pads the file after it
    header = header_bytes(content)
    for n in [*range(header), *range(header, end, 7), end - 1]:
        assert outcome(path, content[:n]) is None, n


@pytest.mark.parametrize("builder", BUILDERS)
def test_flipped_header_bytes(tmp_path, bounded, builder):
    content = BUILDERS[builder](tmp_path)
    path = tmp_path / "mutant"
    n_refused = 0
    for i in range(header_bytes(content)):
        for flip in (0x01, 0x80, 0xFF):
            mutant = bytearray(content)
            mutant[i] ^= flip
            n_refused += outcome(path, bytes(mutant)) is None
    assert n_refused > 100  # else this test would not be reaching the checks


@pytest.mark.parametrize("builder", BUILDERS)
def test_flipped_data_bytes_are_still_reported(tmp_path, bounded, builder):
    content = BUILDERS[builder](tmp_path)
    path = tmp_path / "mutant"
    n_non_finite = 0
    for i in range(header_bytes(content), len(content), 13):
        mutant = bytearray(content)
        mutant[i] = 0xFF
        mutant[i - 1] = 0xFF
        report = outcome(path, bytes(mutant))
        assert report is not None
        n_non_finite += any(t.n_non_finite for t in report.tensors)
    assert n_non_finite > 0


@pytest.mark.parametrize("count", [2**64 - 1, 2**63, 2**63 - 1, 2**61, 2**40, 2**32, 10**6])
@pytest.mark.parametrize("builder", BUILDERS)
def test_oversized_counts_anywhere(tmp_path, bounded, builder, count):
    """A huge number over any eight bytes of the header: every count, length, dimension and offset gets one."""
    content = BUILDERS[builder](tmp_path)
    path = tmp_path / "mutant"
    for i in range(header_bytes(content) - 7):
        outcome(path, content[:i] + struct.pack("<Q", count) + content[i + 8 :])


def test_not_a_regular_file(tmp_path):
    assert "must be a regular file, this is a directory" in refusal(tmp_path)
    assert "must exist and be readable: No such file" in refusal(tmp_path / "missing")
    (tmp_path / "empty").touch()
    assert "must not be empty" in refusal(tmp_path / "empty")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "must exist and be readable" in refusal(tmp_path / "loop")
    with pytest.raises(FormatError, match=r"must exist and be readable: .*null"):
        open_tensor_file("a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_does_not_block(tmp_path, bounded):
    os.mkfifo(tmp_path / "pipe")
    assert "this is a device, pipe or socket" in refusal(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    (tmp_path / "secret").write_bytes(b"GGUF")
    (tmp_path / "secret").chmod(0)
    assert "must exist and be readable: Permission denied" in refusal(tmp_path / "secret")


def test_open_refused_by_the_system(tmp_path, monkeypatch):
    """The path of a permission error for whoever runs the tests, root included."""
    path = tmp_path / "w.gguf"
    path.write_bytes(b"GGUF")

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "must exist and be readable: Permission denied" in refusal(path)


def test_file_that_shrinks_after_opening(tmp_path):
    path = tmp_path / "w.safetensors"
    content = safetensors_bytes(tmp_path)
    path.write_bytes(content)
    tensors = open_tensor_file(path).tensors
    path.write_bytes(content[:100])
    with pytest.raises(FormatError, match=r"the bytes of tensor b\.weight must be in the file"):
        next(t for t in tensors if t.name == "b.weight").to_float32()


@pytest.mark.parametrize(
    "content",
    [b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(60), b"GGU", b"FUGG" + bytes(60), bytes(64), b"{" * 8 + b" {}"],
    ids=["pickle", "zip", "three bytes", "reversed magic", "zeros", "no brace at byte 8"],
)
def test_other_formats(tmp_path, content):
    assert "begins with neither" in refusal(tmp_path / "w", content)


def entry(name, begin, end, dtype="F32", n=2):
    """One key of a safetensors header; ``name`` is written as it stands, escapes included."""
    return f'"{name}":{{"dtype":"{dtype}","shape":[{n}],"data_offsets":[{begin},{end}]}}'


def listing(*entries, data_bytes):
    return safetensors_file("{" + ",".join(entries) + "}", bytes(data_bytes))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (struct.pack("<Q", 2**62) + b"{}", "header length of a safetensors file must be at most 2 bytes"),
        (struct.pack("<Q", 3) + b"{}", "header length of a safetensors file must be at most 2 bytes"),
        (
            listing(entry("a", 0, 8), entry("a", 0, 8), data_bytes=8),
            "header must be valid: keys must be unique, 'a' comes twice",
        ),
        (
            listing(entry("a", 0, 8), entry("\\u0061", 0, 8), data_bytes=8),
            "header must be valid: keys must be unique, 'a' comes twice",
        ),
        (
            listing('"__metadata__":{"x":"1","x":"2"}', data_bytes=0),
            "header must be valid: keys must be unique, 'x' comes twice",
        ),
        (listing('"a":["F32",[2],[0,8]]', data_bytes=8), "must be a JSON object"),
        (listing(entry("a", 0, 8), data_bytes=4), "header must be valid"),
        (listing(entry("a", 0, 8), data_bytes=9), "header must be valid"),
        (listing(entry("a", 4, 12), data_bytes=12), "header must be valid"),
        (listing(entry("a", 0, 8), entry("b", 4, 12), data_bytes=12), "header must be valid"),
        (listing(entry("a", 0, 8, n=3), data_bytes=8), "header must be valid"),
        (listing(entry("a", 0, 8, n=2**62), data_bytes=8), "header must be valid"),
        (listing(entry("a", 0, 8, dtype="F99"), data_bytes=8), "header must be valid"),
        (safetensors_file(b'{"\xff":1}'), "header must be valid"),
        (safetensors_file('{"a":' * 100_000), "header must be valid"),
        (safetensors_file('{"a":{"extra":' + "1" * 5000 + "}}"), "header must be valid"),
        (listing(entry("a\\u001b[2J", 0, 8), data_bytes=8), "names must be printable"),
        (listing(entry("n" * 513, 0, 8), data_bytes=8), "at most 512 characters"),
    ],
)
def test_safetensors_rules(tmp_path, bounded, content, rule):
    assert rule in refusal(tmp_path / "w", content)


def test_huge_safetensors_header_length(tmp_path):
    """A file with room for it may still not have a header beyond the library's own limit."""
    path = tmp_path / "w"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001) + b"{")
        stream.truncate(200_000_000)  # sparse: takes no space
    assert "must be at most 100,000,000 bytes" in refusal(path)


def with_number(content, name, offset, layout, number):
    """Overwrite a number ``offset`` bytes after the end of a name in a GGUF header."""
    i = content.index(name) + len(name) + offset
    raw = struct.pack("<" + layout, number)
    return content[:i] + raw + content[i + len(raw) :]


# After a tensor's name: u32 dimensions, two u64 of shape, u32 type, u64 offset. After a key: u32 type, then the value.
@pytest.mark.parametrize(
    ("mutate", "rule"),
    [
        (lambda c: c[:4] + struct.pack("<I", 1) + c[8:], "GGUF version must be 2 or 3, got 1"),
        (lambda c: c[:8] + struct.pack("<Q", 2**60) + c[16:], "number of tensors must fit in the file"),
        (lambda c: c[:16] + struct.pack("<Q", 2**60) + c[24:], "number of metadata values must fit in the file"),
        (lambda c: c.replace(b"key.two", b"key.one"), "metadata keys must be unique, 'key.one' comes twice"),
        (lambda c: c.replace(b"b.weight", b"a.weight"), "tensor names must be unique, 'a.weight' comes twice"),
        (lambda c: c.replace(b"b.weight", b"b.\xffeight"), "a tensor name must be UTF-8"),
        (lambda c: c.replace(b"b.weight", b"b.\x1beight"), "names must be printable"),
        (lambda c: with_number(c, b"key.one", 0, "I", 99), "key.one must have a type that GGUF defines, got number 99"),
        (lambda c: with_number(c, b"key.one", 4, "Q", 2**50), "key.one must fit in the file"),
        (lambda c: with_number(c, b"key.two", 4, "I", 9), "key.two must not be an array of arrays"),
        (lambda c: with_number(c, b"key.two", 8, "Q", 2**50), "strings in key.two must fit in the file"),
        (lambda c: with_number(c, b"key.six", 8, "Q", 2**62), "key.six must fit in the file"),
        (lambda c: with_number(c, b"general.alignment", 4, "I", 0), "general.alignment must be a power of two, got 0"),
        (
            lambda c: with_number(c, b"general.alignment", 4, "I", 48),
            "general.alignment must be a power of two, got 48",
        ),
        (lambda c: with_number(c, b"general.alignment", 4, "I", 2**31), "must end inside the file"),
        (lambda c: with_number(c, b"general.alignment", 0, "I", 5), "must be a 32-bit unsigned number"),
        (lambda c: with_number(c, b"a.weight", 0, "I", 5), "must have at most 4 dimensions, got 5"),
        (lambda c: with_number(c, b"b.weight", 4, "Q", 65), "whole blocks of 32 weights"),
        (lambda c: with_number(c, b"b.weight", 12, "Q", 2**62), "must end inside the file"),
        (
            lambda c: with_number(c, b"b.weight", 20, "I", 200),
            "type of tensor b.weight must be one of ggml, got number 200",
        ),
        (lambda c: with_number(c, b"b.weight", 24, "Q", 0), "tensors must not overlap"),
        (lambda c: with_number(c, b"b.weight", 24, "Q", 4097), "must be a multiple of 32, got 4,097"),
        (lambda c: with_number(c, b"b.weight", 24, "Q", 2**63), "must end inside the file"),
    ],
)
def test_gguf_rules(tmp_path, bounded, mutate, rule):
    content = gguf_bytes(tmp_path)
    mutant = mutate(content)
    assert mutant != content
    assert rule in refusal(tmp_path / "w", mutant)


def test_big_endian_gguf(tmp_path):
    assert "must be little-endian" in refusal(tmp_path / "w", gguf_bytes(tmp_path, gguf.GGUFEndian.BIG))


@pytest.mark.parametrize(("number", "name"), [(36, "I2_S"), (38, "TL1")])
def test_types_of_bitnet_cpp_are_listed_but_not_decoded(tmp_path, number, name):
    """A quarter byte per weight and a tail of 32 bytes, as [bitnet.cpp] lays out its own types."""
    report = outcome(tmp_path / "w", with_number(gguf_bytes(tmp_path), b"b.weight", 20, "I", number))
    row = report.tensors[1]
    assert (row.name, row.type, row.stored_bytes) == ("b.weight", name, MATRIX.size // 4 + 32)
    assert row.scale is None
    assert row.note == f"{name} is not a float type"


def test_type_without_a_dequantiser_is_listed(tmp_path):
    """Q8_1 exists in ggml for activations; the gguf package knows its size and cannot decode it."""
    content = with_number(gguf_bytes(tmp_path), b"b.weight", 20, "I", GgmlType.Q8_1) + bytes(4096)
    row = outcome(tmp_path / "w", content).tensors[1]
    assert (row.type, row.stored_bytes, row.scale) == ("Q8_1", MATRIX.size // 32 * 40, None)
    assert row.note == "Q8_1 is not a float type"


def test_large_arrays_in_the_header_are_cheap(tmp_path, bounded):
    """32 MiB of metadata array: the gguf package's own reader would make 32 million NumPy objects of it."""
    n = 32 << 20
    key = b"x"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, n)
    report = outcome(tmp_path / "w", header + bytes(n))
    assert report.tensors == ()
    assert report.metadata == {"x": f"{n:,} uint8 values, first 0, 0, 0, 0"}
