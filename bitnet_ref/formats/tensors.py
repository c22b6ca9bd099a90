"""Named tensors of a safetensors or GGUF file, read lazily.

The format is told by content: a GGUF file begins with ``GGUF``, a safetensors file with an eight-byte header length and
a JSON object. Opening reads the header only. Each tensor maps its own part of the file when its values are asked for,
so going through a file in order needs memory for about one tensor.

Hostile input. Every count and length is compared with the bytes that are left in the file before anything is allocated
or looped over, so the work of opening is linear in the header's real size. This is why the GGUF header is walked here:
``gguf.GGUFReader`` 0.19 makes a NumPy object of every array element (212 MB and 2.7 s for a 300 kB array of bytes) and
trusts the counts it reads. The ``gguf`` package still gives the type numbers, the block sizes and the de-quantisers,
and ``safetensors`` checks its own header first.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from safetensors import SafetensorError, safe_open

from bitnet_ref.errors import FormatError

__all__ = ["StoredTensor", "TensorFile", "open_tensor_file"]

_GGUF_MAGIC = b"GGUF"
_GGUF_VERSIONS = (2, 3)  # version 1 counted in 32 bits and was replaced within weeks
_GGUF_MAX_DIMS = 4  # GGML_MAX_DIMS
_GGUF_DEFAULT_ALIGNMENT = 32
_SAFETENSORS_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

_MAX_NAME_CHARACTERS = 512  # ggml allows 63; without a bound one name could fill the file, and then the error message
_SHOWN_CHARACTERS = 120  # of a metadata string
_SHOWN_ELEMENTS = 4  # of a metadata array
_CHUNK_WEIGHTS = 1 << 22  # weights decoded at a time: 16 MiB of float32

_Decoder = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file; its values stay on disk until ``to_float32`` is called.

    ``shape`` is in NumPy order, outputs before inputs: (M, K) for a linear layer. ``dequantised`` says that
    ``to_float32`` gives what a block-quantised type stands for, not the weights that were quantised.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    stored_bytes: int
    dequantised: bool = False
    _decode: _Decoder | None = field(default=None, repr=False, compare=False)

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether ``to_float32`` works: a float type, or a quantised one with a known de-quantiser."""
        return self._decode is not None

    def to_float32(self) -> np.ndarray:
        """The values as float32 of shape ``self.shape``, in new memory.

        float64 values beyond the float32 range become infinite.

        Raises
        ------
        TypeError
            If the type has no float values (``is_float`` is False).
        FormatError
            If the file has become shorter since it was opened.
        """
        if self._decode is None:
            raise TypeError(f"to_float32 needs a float or de-quantisable type, {self.name} is {self.type}")
        out = np.empty(self.shape, np.float32)
        if out.size == 0:
            return out
        try:
            raw = np.memmap(self.path, np.uint8, mode="r", offset=self.offset, shape=(self.stored_bytes,))
        except (OSError, ValueError) as error:
            raise FormatError(f"{self.path}: the bytes of tensor {self.name} must be in the file: {error}") from error
        n_rows = math.prod(self.shape[:-1])
        rows = raw.reshape(n_rows, -1)  # blocks never cross a row
        flat = out.reshape(n_rows, -1)
        step = max(1, _CHUNK_WEIGHTS // flat.shape[1])
        # A block scale may be infinite or NaN in a damaged file: the result says so, a warning adds nothing.
        with np.errstate(all="ignore"):
            for i in range(0, n_rows, step):
                flat[i : i + step] = self._decode(np.asarray(rows[i : i + step]))
        return out


@dataclass(frozen=True)
class TensorFile:
    """An opened weight file: header metadata (strings shortened, arrays summarised) and tensors in file order."""

    path: Path
    format: str
    file_bytes: int
    metadata: dict[str, Any]
    tensors: tuple[StoredTensor, ...]


def open_tensor_file(path: str | os.PathLike[str]) -> TensorFile:
    """Open a safetensors or GGUF file by its content and check its header.

    Raises
    ------
    FormatError
        If the file is missing, not readable, not a regular file, of another format, or breaks a rule of its own format.
        The message names the file and the rule.
    """
    path = Path(path)
    with _map(path) as data:
        if data[:4] == _GGUF_MAGIC:
            return _open_gguf(path, data)
        if data[8:9] == b"{":
            return _open_safetensors(path, data)
    raise FormatError(
        f"{path}: a weight file must begin with the GGUF magic or with a safetensors header (eight bytes of length, "
        "then a JSON object); this one begins with neither"
    )


def _map(path: Path) -> mmap.mmap:
    """The bytes of a regular file that is not empty, mapped for reading."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # before opening: a named pipe would block
            kind = "a directory" if stat.S_ISDIR(mode) else "a device, pipe or socket"
            raise FormatError(f"{path}: a weight file must be a regular file, this is {kind}")
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise FormatError(f"{path}: a weight file must not be empty")
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FormatError:
        raise
    except (OSError, ValueError) as error:  # ValueError: NUL in the path, or a file emptied before it was mapped
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: a weight file must exist and be readable: {reason}") from error


# safetensors ---------------------------------------------------------------------------------------------------------


def _bfloat16(raw: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _float8_e5m2(raw: np.ndarray) -> np.ndarray:
    """E5M2 is the upper half of a float16."""
    return (raw.astype(np.uint16) << 8).view(np.float16)


@cache
def _float8_e4m3_values() -> np.ndarray:
    """The 256 values of E4M3 as written by ML libraries: bias 7, no infinity, NaN only where all seven bits are set."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8.0 + mantissa, exponent - 10))
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code & 128, -magnitude, magnitude).astype(np.float32)


_FLOAT_DECODERS: dict[str, _Decoder] = {
    "F64": lambda raw: raw.view("<f8"),
    "F32": lambda raw: raw.view("<f4"),
    "F16": lambda raw: raw.view("<f2"),
    "BF16": _bfloat16,
    "F8_E5M2": _float8_e5m2,
    "F8_E4M3": lambda raw: _float8_e4m3_values()[raw],
}


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object hook: Python and the safetensors library would both keep the last of two equal keys, unsaid."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"keys must be unique, {_shorten(key)!r} comes twice")
            seen.add(key)
    return result


def _open_safetensors(path: Path, data: mmap.mmap) -> TensorFile:
    """Let the library check the header, then read names, shapes and byte ranges from it."""
    header_bytes = int.from_bytes(data[:8], "little")
    limit = min(len(data) - 8, _SAFETENSORS_MAX_HEADER_BYTES)
    if header_bytes > limit:
        raise FormatError(
            f"{path}: the header length of a safetensors file must be at most {limit:,} bytes here (the rest of the "
            f"file, or {_SAFETENSORS_MAX_HEADER_BYTES:,}), got {header_bytes:,}"
        )
    try:
        # The library checks the JSON's form, that sizes match shapes, and that the byte ranges tile the data exactly.
        with safe_open(path, framework="np"):
            pass
        header = json.loads(data[8 : 8 + header_bytes].decode(), object_pairs_hook=_refuse_duplicates)
        metadata = header.pop("__metadata__", None) or {}
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path}: the safetensors header must be valid: {error}") from error
    except TypeError as error:  # the library takes a list of the three fields for the object that the format asks for
        raise FormatError(f"{path}: each tensor of a safetensors header must be a JSON object") from error
    tensors = []
    for name, entry in entries:
        begin, end = entry["data_offsets"]
        tensors.append(
            StoredTensor(
                path=path,
                name=_printable(path, name),
                shape=tuple(entry["shape"]),
                type=entry["dtype"],
                offset=8 + header_bytes + begin,
                stored_bytes=end - begin,
                _decode=_FLOAT_DECODERS.get(entry["dtype"]),
            )
        )
    shown = {_shorten(key): _shorten(value) for key, value in metadata.items()}
    return TensorFile(path, "safetensors", len(data), shown, tuple(tensors))


# GGUF ----------------------------------------------------------------------------------------------------------------

_GGUF_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}

# Type numbers that bitnet.cpp gives to its own layouts, where upstream ggml has retired the number. Both take a quarter
# byte per weight and a 32-byte tail with the scale [bitnet.cpp]. Its TL2 is number 39, which upstream uses for MXFP4.
_BITNET_CPP_TYPES = {36: "I2_S", 38: "TL1"}
_BITNET_CPP_TAIL_BYTES = 32


@cache
def _gguf_decoder(ggml_type: GGMLQuantizationType) -> _Decoder | None:
    """The function from stored rows to float values, or None for integers and types without a de-quantiser."""
    if (decoder := _FLOAT_DECODERS.get(ggml_type.name)) is not None:
        return decoder
    try:  # the package has no list of the types it can de-quantise; one block of zeros tells
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[ggml_type][1]), np.uint8), ggml_type)
    except NotImplementedError:
        return None
    return lambda raw: quants.dequantize(raw, ggml_type)


class _GgufCursor:
    """Reads the header of a GGUF file in order; every read is checked against the end of the file first."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def skip(self, n_bytes: int, what: str) -> int:
        """Step over ``n_bytes`` and return where they begin."""
        start = self.position
        if n_bytes > len(self.data) - start:
            raise FormatError(
                f"{self.path}: {what} must fit in the file: {n_bytes:,} bytes wanted at byte {start:,}, "
                f"{len(self.data) - start:,} left"
            )
        self.position = start + n_bytes
        return start

    def number(self, code: str, what: str) -> Any:
        layout = "<" + code
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout), what))[0]

    def string(self, what: str) -> bytes:
        n_bytes = self.number("Q", f"the length of {what}")
        start = self.skip(n_bytes, what)
        return self.data[start : start + n_bytes]

    def count(self, n: int, least_bytes: int, what: str) -> int:
        """Return ``n`` if that many entries of at least ``least_bytes`` can be left in the file."""
        left = len(self.data) - self.position
        if n * least_bytes > left:
            raise FormatError(
                f"{self.path}: the number of {what} must fit in the file: {n:,}, with {left:,} bytes left"
            )
        return n

    def name(self, what: str) -> str:
        try:
            return _printable(self.path, self.string(what).decode())
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path}: {what} must be UTF-8, got {error.object[:40]!r}") from error

    def value(self, kind: int, what: str) -> Any:
        """One metadata value: a number, a shortened string, or the first elements and the length of an array."""
        value_type = self.value_type(kind, what)
        if value_type == GGUFValueType.STRING:
            return _shorten(self.string(what).decode(errors="replace"))
        if value_type != GGUFValueType.ARRAY:
            return self.number(_GGUF_SCALARS[value_type], what)
        element = self.value_type(self.number("I", what), what)
        if element == GGUFValueType.ARRAY:  # ggml refuses these too
            raise FormatError(f"{self.path}: {what} must not be an array of arrays")
        n = self.number("Q", f"the length of {what}")
        shown = []
        if element == GGUFValueType.STRING:
            for i in range(self.count(n, 8, f"strings in {what}")):
                text = self.string(what)
                if i < _SHOWN_ELEMENTS:
                    shown.append(_shorten(text.decode(errors="replace")))
        else:
            code = _GGUF_SCALARS[element]
            size = struct.calcsize("<" + code)
            start = self.skip(n * size, what)
            shown = list(struct.unpack_from(f"<{min(n, _SHOWN_ELEMENTS)}{code}", self.data, start))
        if n <= _SHOWN_ELEMENTS:
            return shown
        return f"{n:,} {element.name.lower()} values, first {', '.join(map(str, shown))}"

    def value_type(self, kind: int, what: str) -> GGUFValueType:
        try:
            return GGUFValueType(kind)
        except ValueError:
            raise FormatError(f"{self.path}: {what} must have a type that GGUF defines, got number {kind}") from None


def _open_gguf(path: Path, data: mmap.mmap) -> TensorFile:
    """Walk the header: version, counts, metadata, tensor descriptions; then check the byte ranges."""
    cursor = _GgufCursor(path, data)
    cursor.skip(len(_GGUF_MAGIC), "the magic")
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0:
        raise FormatError(f"{path}: a GGUF file must be little-endian, this one is written for a big-endian machine")
    if version not in _GGUF_VERSIONS:
        raise FormatError(f"{path}: the GGUF version must be 2 or 3, got {version}")
    n_tensors = cursor.number("Q", "the number of tensors")
    n_values = cursor.number("Q", "the number of metadata values")
    # Least sizes: key length + type + one byte of value; name length + dimensions + one dimension + type + offset.
    cursor.count(n_values, 13, "metadata values")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise FormatError(f"{path}: metadata keys must be unique, {_shorten(key)!r} comes twice")
        kind = cursor.number("I", f"the type of {key}")
        if key == "general.alignment" and kind != GGUFValueType.UINT32:
            raise FormatError(f"{path}: general.alignment must be a 32-bit unsigned number, got type {kind}")
        metadata[key] = cursor.value(kind, _shorten(key))
    alignment = metadata.get("general.alignment", _GGUF_DEFAULT_ALIGNMENT)
    if alignment == 0 or alignment & (alignment - 1):
        raise FormatError(f"{path}: general.alignment must be a power of two, got {alignment}")

    cursor.count(n_tensors, 24, "tensors")
    described = [_describe_gguf_tensor(cursor) for _ in range(n_tensors)]
    seen: set[str] = set()
    for name, *_ in described:
        if name in seen:
            raise FormatError(f"{path}: tensor names must be unique, {_shorten(name)!r} comes twice")
        seen.add(name)

    data_start = -(-cursor.position // alignment) * alignment
    tensors = []
    end = data_start
    for name, shape, type_number, relative_offset in sorted(described, key=lambda entry: entry[3]):
        type_name, stored_bytes, decode, dequantised = _gguf_type(path, name, shape, type_number)
        offset = data_start + relative_offset
        if relative_offset % alignment:
            raise FormatError(
                f"{path}: the offset of tensor {name} must be a multiple of {alignment}, got {relative_offset:,}"
            )
        # Overlap is refused so that a small file cannot describe the same bytes a million times.
        if stored_bytes and offset < end:
            raise FormatError(f"{path}: tensors must not overlap, {name} begins at byte {offset:,} before byte {end:,}")
        if offset + stored_bytes > len(data):
            raise FormatError(
                f"{path}: tensor {name} must end inside the file: it ends at byte {offset + stored_bytes:,}, "
                f"the file at {len(data):,}"
            )
        end = max(end, offset + stored_bytes)
        tensors.append(StoredTensor(path, name, shape, type_name, offset, stored_bytes, dequantised, decode))
    return TensorFile(path, f"GGUF version {version}", len(data), metadata, tuple(tensors))


def _describe_gguf_tensor(cursor: _GgufCursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape in NumPy order (GGUF counts from the innermost), type number, offset from the start of the data."""
    name = cursor.name("a tensor name")
    n_dims = cursor.number("I", f"the number of dimensions of tensor {name}")
    if n_dims > _GGUF_MAX_DIMS:
        raise FormatError(f"{cursor.path}: tensor {name} must have at most {_GGUF_MAX_DIMS} dimensions, got {n_dims:,}")
    dims = [cursor.number("Q", f"the shape of tensor {name}") for _ in range(n_dims)]
    type_number = cursor.number("I", f"the type of tensor {name}")
    return name, tuple(reversed(dims)), type_number, cursor.number("Q", f"the offset of tensor {name}")


def _gguf_type(
    path: Path, name: str, shape: tuple[int, ...], type_number: int
) -> tuple[str, int, _Decoder | None, bool]:
    """Type name, stored bytes, decoder, and whether that decoder de-quantises."""
    n_weights = math.prod(shape)
    if type_number in _BITNET_CPP_TYPES:
        return _BITNET_CPP_TYPES[type_number], n_weights // 4 + _BITNET_CPP_TAIL_BYTES, None, False
    try:
        ggml_type = GGMLQuantizationType(type_number)
    except ValueError:
        raise FormatError(f"{path}: the type of tensor {name} must be one of ggml, got number {type_number}") from None
    block_weights, block_bytes = GGML_QUANT_SIZES[ggml_type]
    row_weights = shape[-1] if shape else 1
    if row_weights % block_weights:
        raise FormatError(
            f"{path}: rows of {ggml_type.name} must be whole blocks of {block_weights} weights, tensor {name} has "
            f"{row_weights:,} in a row"
        )
    decode = _gguf_decoder(ggml_type)
    dequantised = decode is not None and ggml_type.name not in _FLOAT_DECODERS
    return ggml_type.name, n_weights // block_weights * block_bytes, decode, dequantised


def _printable(path: Path, name: str) -> str:
    """Return a tensor name or key if it can be shown on a terminal as it is."""
    if not name.isprintable() or len(name) > _MAX_NAME_CHARACTERS:
        raise FormatError(
            f"{path}: names must be printable and at most {_MAX_NAME_CHARACTERS} characters long, got "
            f"{len(name):,} characters: {_shorten(ascii(name[:_SHOWN_CHARACTERS]))}"
        )
    return name


def _shorten(text: str) -> str:
    """At most ``_SHOWN_CHARACTERS`` printable characters of a string."""
    shown = "".join(c if c.isprintable() else " " for c in text[: _SHOWN_CHARACTERS + 1])
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 1] + "…"
