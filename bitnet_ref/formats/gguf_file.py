"""Read and write GGUF checkpoints with ternary tensors: I2_S, TQ1_0, TQ2_0, and matrices stored as floats.

Reading goes through ``tensors.open_tensor_file``, writing through the header of ``gguf.GGUFWriter``.

The scale. I2_S has a float32 behind the integers. TQ blocks have a float16, so the float32 scale of a BitNet matrix
cannot be in them. Files written here keep it exactly, in a way that llama.cpp honours where it can:

- architecture ``bitnet``: the blocks have scale 1 and a tensor ``blk.N.x.scale`` holds the float32, which llama.cpp
  multiplies into the product;
- architecture ``llama``, which has no such tensor: the blocks have the scale rounded to float16, which is what
  llama.cpp computes with, and the arrays ``bitnet_ref.scale_tensors`` and ``bitnet_ref.scales`` hold the float32.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType

from bitnet_ref.errors import FormatError
from bitnet_ref.formats import tensors as _tensors
from bitnet_ref.formats.checkpoint import (
    Checkpoint,
    Entry,
    FloatTensor,
    TernaryTensor,
    check_scale,
    is_linear,
    map_bytes,
    ternary_of_floats,
)
from bitnet_ref.formats.float_types import row_bytes
from bitnet_ref.formats.gguf_names import (
    ARCHITECTURES,
    config_from_metadata,
    permutes,
    tensor_from_gguf,
    unpermute_rows,
)
from bitnet_ref.formats.i2s import I2S_TAIL_BYTES, unpack_i2s
from bitnet_ref.formats.i2s_layout import detect_i2s_layout
from bitnet_ref.formats.tensors import StoredTensor, TensorFile, open_tensor_file
from bitnet_ref.formats.ternary_gguf import TQ_BLOCK, TQ_TYPES, unpack_tq

__all__ = [
    "GGML_TYPE_NUMBERS",
    "SCALES_KEY",
    "SCALE_TENSORS_KEY",
    "GgufPlan",
    "GgufStream",
    "open_gguf_checkpoint",
    "read_gguf_metadata",
]

SCALE_TENSORS_KEY = "bitnet_ref.scale_tensors"
SCALES_KEY = "bitnet_ref.scales"

# I2_S has a number of bitnet.cpp's own, which upstream ggml has retired.
GGML_TYPE_NUMBERS = {"I2_S": 36, **{name: GGMLQuantizationType[name].value for name in TQ_TYPES}}

_MAX_STRINGS = 1 << 21  # of one array; the largest vocabularies have 262,144 tokens
_QUANTIZATION_CONFIG = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}


class _FullCursor(_tensors._GgufCursor):
    """Reads metadata completely, where the base class shortens; number arrays stay NumPy arrays."""

    def value(self, kind: int, what: str) -> Any:
        value_type = self.value_type(kind, what)
        if value_type == GGUFValueType.STRING:
            return self.text(what)
        if value_type != GGUFValueType.ARRAY:
            return self.number(_tensors._GGUF_SCALARS[value_type], what)
        element = self.value_type(self.number("I", what), what)
        if element == GGUFValueType.ARRAY:
            raise FormatError(f"{self.path}: {what} must not be an array of arrays")
        n = self.number("Q", f"the length of {what}")
        if element != GGUFValueType.STRING:
            code = "<" + _tensors._GGUF_SCALARS[element]
            start = self.skip(n * struct.calcsize(code), what)
            return np.frombuffer(self.data, np.dtype(code), n, start).copy()
        if self.count(n, 8, f"strings in {what}") > _MAX_STRINGS:
            raise FormatError(f"{self.path}: {what} must have at most {_MAX_STRINGS:,} strings, got {n:,}")
        return [self.text(what) for _ in range(n)]

    def text(self, what: str) -> str:
        """A string; bytes that are not UTF-8 (a few vocabularies have them) become surrogates and are written back."""
        return self.string(what).decode(errors="surrogateescape")


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """All metadata of a GGUF file, complete: str, int, float, bool, list of str, or a 1-D ndarray of numbers.

    Raises
    ------
    FormatError
        If the file cannot be read.
    """
    path = Path(path)
    open_tensor_file(path)  # checks every rule of the header once
    with _tensors._map(path) as data:
        cursor = _FullCursor(path, data)
        if data[:4] != b"GGUF":
            raise FormatError(f"{path}: a GGUF file must begin with GGUF")
        cursor.skip(16, "the header")  # magic, version, number of tensors
        metadata = {}
        for _ in range(cursor.number("Q", "the number of metadata values")):
            key = cursor.name("a metadata key")
            metadata[key] = cursor.value(cursor.number("I", f"the type of {key}"), key)
    return metadata


def open_gguf_checkpoint(
    path: str | Path, *, layout: str | None = None, quantize: bool = False, opened: TensorFile | None = None
) -> Checkpoint:
    """Open a GGUF file of architecture bitnet, bitnet-25, bitnet-b1.58 or llama.

    Parameters
    ----------
    layout : the I2_S layout; found from the file if it is not given
    quantize : whether matrices that are not ternary may be rounded
    opened : what ``open_tensor_file`` gave, if that is at hand

    Raises
    ------
    FormatError
        If the file cannot be read, or is I2_S and its layout cannot be told.
    """
    path = Path(path)
    opened = open_tensor_file(path) if opened is None else opened
    metadata = read_gguf_metadata(path)
    stored = {tensor.name: tensor for tensor in opened.tensors}
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise FormatError(f"{path}: general.architecture must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    if metadata.get("split.count", 1) != 1:
        raise FormatError(f"{path}: a GGUF file in {metadata['split.count']} parts must be joined first")
    if "token_embd.weight" not in stored:
        raise FormatError(f"{path}: the file must have a tensor token_embd.weight")
    freqs = stored.get("rope_freqs.weight")
    config, notes = config_from_metadata(
        metadata,
        vocab_rows=stored["token_embd.weight"].shape[0],
        tied="output.weight" not in stored,
        factors=None if freqs is None else freqs.to_float32(),
    )
    exact_scales = _exact_scales(path, metadata)

    if any(tensor.type == "I2_S" for tensor in opened.tensors):
        verdict = detect_i2s_layout(opened, metadata) if layout is None else None
        if verdict is not None:
            if verdict.layout is None:
                raise FormatError(f"{path}: {verdict.why}")
            layout = verdict.layout
            notes.append(f"I2_S layout {layout}, {verdict.certainty}: {verdict.why}")
    if any(tensor.type in TQ_TYPES or tensor.type == "I2_S" for tensor in opened.tensors):
        config["quantization_config"] = dict(_QUANTIZATION_CONFIG)

    entries = {}
    for name, tensor in stored.items():
        if name == "rope_freqs.weight":
            continue
        if name.endswith(".scale") and is_linear(tensor_from_gguf(name.removesuffix("scale") + "weight") or ""):
            continue  # read with its matrix
        hf = tensor_from_gguf(name)
        if hf is None:
            raise FormatError(f"{path}: tensor {name} is of no layer known for architecture {arch}")
        source = _Source(
            tensor=tensor,
            name=hf,
            scale_tensor=stored.get(name.removesuffix("weight") + "scale"),
            exact_scale=exact_scales.get(name),
            layout=layout,
            reorder=_row_order(hf, arch, config),
            quantize=quantize,
        )
        ternary = is_linear(hf)
        entries[hf] = Entry(hf, tensor.shape, ternary, source.load_linear if ternary else source.load_float)
    types = sorted({tensor.type for tensor in opened.tensors if is_linear(tensor_from_gguf(tensor.name) or "")})
    kept = {key: value for key, value in metadata.items() if key.startswith(("tokenizer.", "general."))}
    assets = {}
    if isinstance(text := metadata.get("tokenizer.huggingface.json"), str):
        assets["tokenizer.json"] = text.encode(errors="surrogateescape")
    if isinstance(text := metadata.get("tokenizer.chat_template"), str):
        assets["chat_template.jinja"] = text.encode(errors="surrogateescape")
    suffix = f", layout {layout}" if layout and "I2_S" in types else ""
    return Checkpoint(
        path=path,
        format=f"GGUF, architecture {arch}, {', '.join(types)}{suffix}",
        config=config,
        entries=entries,
        assets=assets,
        gguf_metadata=kept,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Source:
    """One tensor of a GGUF file and all that decides its values."""

    tensor: StoredTensor
    name: str
    scale_tensor: StoredTensor | None
    exact_scale: np.float32 | None
    layout: str | None
    reorder: Callable[[np.ndarray], np.ndarray] | None
    quantize: bool

    def load_float(self) -> FloatTensor:
        return FloatTensor(self.name, self.tensor, self.reorder)

    def load_linear(self) -> TernaryTensor | FloatTensor:
        """The integers if the tensor is ternary, else the floats as they are."""
        tensor = self.tensor
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise FormatError(
                f"tensor {tensor.name} must be a matrix with at least one element, got shape {tensor.shape}"
            )
        factor = np.float32(1)
        if self.scale_tensor is not None:
            if self.scale_tensor.n_weights != 1 or not self.scale_tensor.is_float:
                raise FormatError(f"tensor {self.scale_tensor.name} must hold one float")
            factor = check_scale(tensor.name, self.scale_tensor.to_float32().reshape(-1)[0])
        if tensor.type == "I2_S":
            try:
                w_q, scale = unpack_i2s(map_bytes(tensor), tensor.shape, self.layout or "")
            except FormatError as error:
                raise FormatError(f"{tensor.path}: tensor {tensor.name}: {error}") from error
        elif tensor.type in TQ_TYPES:
            w_q, scale = self._unpack_tq()
            if w_q is None:
                return self._not_ternary(factor)
        else:
            return self._not_ternary(factor)
        w_q = w_q if self.reorder is None else self.reorder(w_q)
        return TernaryTensor(self.name, w_q, check_scale(tensor.name, scale * factor))

    def _unpack_tq(self) -> tuple[np.ndarray | None, np.float32]:
        tensor = self.tensor
        try:
            w_q, block_scales = unpack_tq(map_bytes(tensor), tensor.shape, tensor.type)
        except FormatError as error:
            raise FormatError(f"{tensor.path}: tensor {tensor.name}: {error}") from error
        used = w_q.reshape(*block_scales.shape, TQ_BLOCK).any(axis=2)  # the scale of a block of zeros says nothing
        scales = np.unique(block_scales[used])
        if len(scales) > 1:
            return None, np.float32(0)
        stored = scales[0] if len(scales) else block_scales.flat[0]
        if self.exact_scale is None:
            if len(scales) == 0:
                return w_q, np.float32(stored) if stored > 0 else np.float32(1e-5)
            return w_q, np.float32(stored)
        if np.float16(self.exact_scale) != stored:
            raise FormatError(
                f"{tensor.path}: {SCALES_KEY} of tensor {tensor.name} must round to the scale of its blocks {stored}, "
                f"got {self.exact_scale}"
            )
        return w_q, self.exact_scale

    def _not_ternary(self, factor: np.float32) -> TernaryTensor | FloatTensor:
        """Float values: ternary all the same if they have one magnitude."""
        if not self.tensor.is_float:
            raise FormatError(
                f"{self.tensor.path}: tensor {self.tensor.name} is of type {self.tensor.type}, which is not read here"
            )
        values = self.tensor.to_float32()
        ternary = ternary_of_floats(self.name, values if self.reorder is None else self.reorder(values), self.quantize)
        if ternary is not None:
            return TernaryTensor(self.name, ternary.stored, check_scale(self.name, ternary.w_scale * factor))
        if factor != 1:
            raise FormatError(f"{self.tensor.path}: tensor {self.tensor.name} is not ternary, yet has a .scale tensor")
        return self.load_float()


def _row_order(name: str, arch: str, config: Mapping[str, Any]) -> Callable[[np.ndarray], np.ndarray] | None:
    """What puts the rows of a tensor into Hugging Face's order, or None if they are."""
    kind = name.rsplit(".", 2)[-2]
    if not permutes(arch) or kind not in ("q_proj", "k_proj"):
        return None
    n_heads = config["num_attention_heads" if kind == "q_proj" else "num_key_value_heads"]

    def reorder(w: np.ndarray) -> np.ndarray:
        if len(w) % (2 * n_heads):
            raise FormatError(f"tensor {name} must have a multiple of {2 * n_heads} rows, got {len(w)}")
        return unpermute_rows(w, n_heads)

    return reorder


def _exact_scales(path: Path, metadata: Mapping[str, Any]) -> dict[str, np.float32]:
    names, scales = metadata.get(SCALE_TENSORS_KEY, []), metadata.get(SCALES_KEY, np.empty(0, np.float32))
    if not (isinstance(names, list) and isinstance(scales, np.ndarray) and len(names) == len(scales)):
        raise FormatError(f"{path}: {SCALE_TENSORS_KEY} and {SCALES_KEY} must be arrays of one length")
    return {name: check_scale(name, scale) for name, scale in zip(names, scales, strict=True)}


@dataclass(frozen=True)
class GgufPlan:
    """One tensor to be written: GGUF name, logical shape, type name."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def n_bytes(self) -> int:
        m = int(np.prod(self.shape[:-1], dtype=np.int64))
        if self.type == "I2_S":
            return m * self.shape[-1] // 4 + I2S_TAIL_BYTES
        return m * row_bytes(self.shape[-1], self.type)


class GgufStream:
    """Writes a GGUF file tensor by tensor, in the planned order, with bytes that come in pieces.

    Parameters
    ----------
    path : file to write
    architecture : value of general.architecture
    metadata : keys and values; int becomes uint32, float float32, ndarray an array of its own type
    plans : the tensors in file order
    scale_tensors : GGUF names whose float32 scales :meth:`finish` fills into the header
    """

    def __init__(
        self,
        path: Path,
        architecture: str,
        metadata: Mapping[str, Any],
        plans: list[GgufPlan],
        scale_tensors: list[str],
    ) -> None:
        self._writer = gguf.GGUFWriter(path, architecture)
        try:
            for key, value in metadata.items():
                self._add(key, value)
            if scale_tensors:
                self._add(SCALE_TENSORS_KEY, scale_tensors)
                self._add(SCALES_KEY, np.zeros(len(scale_tensors), np.float32))  # last: see below
            for plan in plans:
                number = GGML_TYPE_NUMBERS.get(plan.type) or GGMLQuantizationType[plan.type].value
                # Under uint8 the writer would take the shape for one in bytes; it does not know I2_S at all.
                self._writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float32), plan.n_bytes, number)
            self._writer.write_header_to_file()
            self._writer.write_kv_data_to_file()
            self._stream = self._writer.fout[0]
            # The scales are known when the tensors have been read; their array ends where the metadata ends.
            self._scales_at = self._stream.tell() - 4 * len(scale_tensors)
            self._writer.write_ti_data_to_file()
            self._pad()
        except BaseException:
            self._writer.close()
            raise

    def write(self, data: np.ndarray) -> None:
        """Append bytes of the present tensor."""
        self._stream.write(np.ascontiguousarray(data).data)

    def end_tensor(self) -> None:
        """Fill up to the alignment."""
        self._pad()

    def finish(self, scales: list[np.float32]) -> None:
        """Write the scales into the header."""
        if scales:
            self._stream.seek(self._scales_at)
            self._stream.write(np.array(scales, "<f4").tobytes())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _pad(self) -> None:
        self._writer.write_padding(self._stream, self._stream.tell())

    def _add(self, key: str, value: Any) -> None:
        try:
            self._add_value(key, value)
        except (UnicodeEncodeError, struct.error) as error:  # half a surrogate pair; a number beyond 64 bits
            raise ValueError(f"GGUF cannot hold the value of {key}: {error}") from error

    def _add_value(self, key: str, value: Any) -> None:
        kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
        if isinstance(value, str):
            self._writer.add_key_value(key, value.encode(errors="surrogateescape"), GGUFValueType.STRING)
        elif isinstance(value, np.ndarray):
            if value.size:
                sub_type = GGUFValueType["BOOL" if value.dtype == bool else value.dtype.name.upper()]
                self._writer.add_key_value(key, value.tolist(), GGUFValueType.ARRAY, sub_type)
        elif isinstance(value, list):
            if value:
                texts = [text.encode(errors="surrogateescape") for text in value]
                self._writer.add_key_value(key, texts, GGUFValueType.ARRAY, GGUFValueType.STRING)
        else:
            kind = kinds[type(value)]
            if kind == GGUFValueType.UINT32 and not 0 <= value < 2**32:
                kind = GGUFValueType.INT64
            self._writer.add_key_value(key, value, kind)
