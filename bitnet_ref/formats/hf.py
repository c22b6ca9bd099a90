"""Hugging Face folders: config.json, safetensors in one file or shards, weights as floats or packed in uint8.

Packed ternary matrices of ``quant_method: bitnet`` (``transformers``, integrations/bitnet.py) are uint8 of shape
(M / 4, K): with n = M / 4, row r of the packed matrix holds rows r, r + n, r + 2n and r + 3n at bits 1-0, 3-2, 5-4
and 7-6, as codes w + 1. Beside it stands ``weight_scale``, one number, in one of two conventions:

=====================================  =============  ====================================
quantization_config                    layer class    weight
=====================================  =============  ====================================
linear_class "autobitlinear", offline  AutoBitLinear  w_q * weight_scale
linear_class "bitlinear" or absent     BitLinear      w_q / weight_scale
=====================================  =============  ====================================

Absent means "bitlinear" because that is the default of ``transformers``' ``BitNetQuantConfig``: the class that would
load the file. The size of the number is no evidence; the scales of [2B4T] lie on both sides of 1. Without a
quantization_config there is no convention, and a packed matrix is refused unless the caller names one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ref.errors import FormatError
from bitnet_ref.formats.checkpoint import (
    Checkpoint,
    Entry,
    FloatTensor,
    TernaryTensor,
    check_scale,
    expected_rows,
    is_linear,
    load_json_object,
    map_bytes,
    ternary_of_floats,
)
from bitnet_ref.formats.packed import GGUF_METADATA_ASSET, read_gguf_metadata_asset
from bitnet_ref.formats.tensors import StoredTensor, open_tensor_file

__all__ = [
    "ASSET_NAMES",
    "SCALE_CONVENTIONS",
    "SafetensorsStream",
    "hf_config",
    "open_hf_checkpoint",
    "pack_hf",
    "scale_convention",
    "unpack_hf",
]

SCALE_CONVENTIONS = ("multiply", "divide")

ASSET_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
"""Small files that go with a model from one form to another."""

_INDEX = "model.safetensors.index.json"
_MAX_ASSET_BYTES = 256 << 20


def pack_hf(w_q: np.ndarray) -> np.ndarray:
    """The uint8 matrix of ``transformers`` for a ternary one.

    Parameters
    ----------
    w_q : ndarray of shape (M, K), int8, values in {-1, 0, 1}; M a multiple of 4. Not modified.

    Returns
    -------
    ndarray of shape (M / 4, K), uint8

    Raises
    ------
    TypeError
        If w_q is not int8.
    ValueError
        If w_q is not such a matrix.
    """
    if w_q.dtype != np.int8:
        raise TypeError(f"w_q must be int8, got {w_q.dtype}")
    if w_q.ndim != 2 or len(w_q) % 4:
        raise ValueError(f"the packing of transformers needs rows in fours, got shape {w_q.shape}")
    if w_q.size and (w_q.min() < -1 or w_q.max() > 1):
        raise ValueError(f"w_q must hold only -1, 0 and 1, got values from {w_q.min()} to {w_q.max()}")
    c = (w_q + 1).view(np.uint8).reshape(4, -1, w_q.shape[1])
    return c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6


def unpack_hf(data: np.ndarray, n_rows: int | None = None) -> np.ndarray:
    """The int8 matrix of a packed one; the inverse of :func:`pack_hf`.

    Parameters
    ----------
    data : ndarray of shape (ceil(M / 4), K), uint8
    n_rows : M, if it is not a multiple of 4 (``transformers`` rounds up and leaves the rest zero)

    Returns
    -------
    ndarray of shape (M, K), int8

    Raises
    ------
    FormatError
        If a code is 3, n_rows does not fit, or the rows beyond it are not zero bits.
    """
    n_rows = 4 * len(data) if n_rows is None else n_rows
    if not 4 * len(data) - 4 < n_rows <= 4 * len(data):
        raise FormatError(f"{n_rows} rows must be packed in {-(-n_rows // 4)} rows of bytes, got {len(data)}")
    if (data & data >> 1 & 0x55).any():
        raise FormatError("packed weights must not hold code 3")
    w_q = np.empty((4, *data.shape), np.int8)
    for i in range(4):
        w_q[i] = data >> 2 * i & 3
    w_q = w_q.reshape(4 * len(data), -1)
    if w_q[n_rows:].any():
        raise FormatError(f"packed weights must be zero beyond row {n_rows}")
    w_q -= 1
    return w_q[:n_rows]


def scale_convention(config: Mapping[str, Any]) -> str | None:
    """ "multiply" or "divide" by the quantization_config, or None where it has none of BitNet.

    Raises
    ------
    FormatError
        If the configuration names a class or a mode that ``transformers`` does not have.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "bitnet":
        return None
    linear_class = quantization.get("linear_class", "bitlinear")
    mode = quantization.get("quantization_mode", "offline")
    if linear_class not in ("bitlinear", "autobitlinear"):
        raise FormatError(f"quantization_config.linear_class must be bitlinear or autobitlinear, got {linear_class!r}")
    if mode not in ("offline", "online"):
        raise FormatError(f"quantization_config.quantization_mode must be offline or online, got {mode!r}")
    return "multiply" if linear_class == "autobitlinear" else "divide"


def hf_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it is written beside packed weights: scales multiply, weights are packed already."""
    quantization = {
        key: value
        for key, value in (config.get("quantization_config") or {}).items()
        if key in ("modules_to_not_convert", "use_rms_norm", "rms_norm_eps")
    }
    quantization |= {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    return {**config, "quantization_config": quantization}


def open_hf_checkpoint(path: str | Path, *, quantize: bool = False, convention: str | None = None) -> Checkpoint:
    """Open a Hugging Face folder.

    Parameters
    ----------
    quantize : whether float matrices that are not ternary may be rounded. A quantization_config with mode "online"
        allows it too: rounding the master weights is what such a model does each time it runs.
    convention : "multiply" or "divide", for packed weights whose configuration does not say

    Raises
    ------
    FormatError
        If a file is missing or bad, or packed weights come without a scale or a convention.
    ValueError
        If convention is another, or contradicts the configuration.
    """
    path = Path(path)
    config = load_json_object(path / "config.json")
    stated = scale_convention(config)
    if convention is not None:
        if convention not in SCALE_CONVENTIONS:
            raise ValueError(f"a scale convention must be multiply or divide, got {convention!r}")
        if stated is not None and stated != convention:
            raise ValueError(f"{path / 'config.json'} says that scales {stated}, the caller that they {convention}")
    convention = stated or convention
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise FormatError(f"{path / 'config.json'}: quantization_config must be an object")
    method = quantization.get("quant_method")
    if method not in (None, "bitnet"):
        raise FormatError(f"{path / 'config.json'}: quant_method must be bitnet, got {method!r}")
    quantize = quantize or (stated == "multiply" and quantization.get("quantization_mode") == "online")
    kept = quantization.get("modules_to_not_convert") or []
    if not (isinstance(kept, list) and all(isinstance(item, str) for item in kept)):
        raise FormatError(f"{path / 'config.json'}: modules_to_not_convert must be a list of names")

    stored = _stored_tensors(path)
    notes = []
    if config.get("tie_word_embeddings") and "lm_head.weight" in stored and "model.embed_tokens.weight" in stored:
        del stored["lm_head.weight"]
        notes.append("lm_head.weight is left out: the configuration ties the head to the embedding.")
    packed = [name for name, tensor in stored.items() if tensor.type == "U8" and name.endswith(".weight")]
    if packed and convention is None:
        raise FormatError(
            f"{path}: packed weights need a quantization_config that says whether weight_scale multiplies or divides; "
            "config.json has none, name the convention"
        )
    entries: dict[str, Entry] = {}
    for name, tensor in stored.items():
        if name.endswith(".weight_scale") and name.removesuffix("_scale") in packed:
            continue
        if name.endswith(".rotary_emb.inv_freq"):  # a buffer of old versions, computed from the configuration
            continue
        if name in packed:
            scale = stored.get(name + "_scale")
            if scale is None:
                raise FormatError(f"{path}: packed tensor {name} needs a tensor {name}_scale, there is none")
            if len(tensor.shape) != 2:
                raise FormatError(f"{path}: packed tensor {name} must be a matrix, got shape {tensor.shape}")
            rows = expected_rows(name, config)
            rows = rows if rows is not None and -(-rows // 4) == tensor.shape[0] else 4 * tensor.shape[0]
            source = _Packed(name, tensor, scale, rows, convention)
            entries[name] = Entry(name, (rows, tensor.shape[1]), True, source.load)
        elif is_linear(name) and not _is_kept(name, kept):
            entries[name] = Entry(name, tensor.shape, True, _Floats(name, tensor, quantize).load)
        elif tensor.type in ("U8", "I8") or not tensor.is_float:
            raise FormatError(f"{path}: tensor {name} must be of a float type, got {tensor.type}")
        else:
            entries[name] = Entry(name, tensor.shape, False, _Floats(name, tensor, quantize).load_float)
    if packed:
        source = "by quantization_config" if stated else "as the caller says"
        notes.append(f"weight_scale {'multiplies' if convention == 'multiply' else 'divides'}, {source}")
    kind = "packed uint8" if packed else "float weights"
    return Checkpoint(
        path=path,
        format=f"Hugging Face folder, {kind}",
        config=config,
        entries=entries,
        assets=_assets(path),
        gguf_metadata=_gguf_metadata(path),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Packed:
    """A packed matrix with its scale beside it."""

    name: str
    tensor: StoredTensor
    scale: StoredTensor
    n_rows: int
    convention: str

    def load(self) -> TernaryTensor:
        if self.scale.n_weights != 1 or not self.scale.is_float:
            raise FormatError(
                f"{self.scale.path}: {self.scale.name} must hold one float, got {self.scale.type} of shape "
                f"{self.scale.shape}"
            )
        scale = check_scale(self.name, self.scale.to_float32().reshape(-1)[0])
        if self.convention == "divide":
            scale = check_scale(self.name, np.float32(1) / scale)
        try:
            w_q = unpack_hf(map_bytes(self.tensor).reshape(self.tensor.shape), self.n_rows)
        except FormatError as error:
            raise FormatError(f"{self.tensor.path}: tensor {self.name}: {error}") from error
        return TernaryTensor(self.name, w_q, scale)


@dataclass(frozen=True)
class _Floats:
    """A tensor stored as floats."""

    name: str
    tensor: StoredTensor
    quantize: bool

    def load_float(self) -> FloatTensor:
        return FloatTensor(self.name, self.tensor)

    def load(self) -> TernaryTensor | FloatTensor:
        if not self.tensor.is_float:
            raise FormatError(f"{self.tensor.path}: tensor {self.name} must be of a float type, got {self.tensor.type}")
        try:
            ternary = ternary_of_floats(self.name, self.tensor.to_float32(), self.quantize)
        except FormatError as error:
            raise FormatError(f"{self.tensor.path}: {error}") from error
        return self.load_float() if ternary is None else ternary


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up a folder's model: model.safetensors, or the shards of its index.

    Raises
    ------
    FormatError
        If there are none, or it cannot be told which.
    """
    return [path / file for file in _weight_map(path)[0]]


def _weight_map(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the files, and the shard of each tensor if the folder has an index."""
    index = path / _INDEX
    if index.exists():
        weight_map = load_json_object(index).get("weight_map")
        if not (isinstance(weight_map, dict) and weight_map and all(isinstance(f, str) for f in weight_map.values())):
            raise FormatError(f"{index}: weight_map must be an object of file names")
        files = sorted(set(weight_map.values()))
        for file in files:
            if not re.fullmatch(r"[\w.+-]{1,200}\.safetensors", file):  # no path out of the folder
                raise FormatError(f"{index}: shards must be safetensors files of this folder, got {file[:200]!r}")
        return files, weight_map
    found = sorted(file.name for file in path.glob("*.safetensors"))
    files = ["model.safetensors"] if "model.safetensors" in found else found
    if len(files) != 1:
        have = f"{len(files)} files without an index" if files else "none"
        pickles = " (pickled .bin and .pt weights are not read: loading one runs the code in it)"
        raise FormatError(f"{path} must hold model.safetensors or {_INDEX}, got {have}{'' if files else pickles}")
    return files, None


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards by name."""
    index = path / _INDEX
    files, weight_map = _weight_map(path)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        opened = open_tensor_file(path / file)
        if opened.format != "safetensors":
            raise FormatError(f"{path / file} must be a safetensors file, it is {opened.format}")
        for tensor in opened.tensors:
            if tensor.name in tensors:
                raise FormatError(f"{path}: tensor {tensor.name} must be in one shard, it is in two")
            if weight_map is not None and weight_map.get(tensor.name) != file:
                raise FormatError(f"{index}: weight_map must name {file} for tensor {tensor.name}")
            tensors[tensor.name] = tensor
    if weight_map is not None and (missing := sorted(set(weight_map) - set(tensors))):
        raise FormatError(f"{index}: {len(missing)} tensors are in no shard, first: {missing[0][:200]}")
    return tensors


def _is_kept(name: str, modules: list[str]) -> bool:
    """Whether a module is named in modules_to_not_convert, by its whole name, a parent or its last part."""
    module = name.removesuffix(".weight")
    return any(f".{item}." in f".{module}." for item in modules if item)


def _gguf_metadata(path: Path) -> dict[str, Any]:
    """What a conversion from GGUF left beside the weights, for a conversion back."""
    file = path / GGUF_METADATA_ASSET
    return read_gguf_metadata_asset(file, None) if file.exists() else {}


def _assets(path: Path) -> dict[str, bytes]:
    assets = {}
    for name in ASSET_NAMES:
        file = path / name
        if file.is_file():
            if file.stat().st_size > _MAX_ASSET_BYTES:
                raise FormatError(f"{file} must be at most {_MAX_ASSET_BYTES:,} bytes, got {file.stat().st_size:,}")
            assets[name] = file.read_bytes()
    return assets


class SafetensorsStream:
    """Writes a safetensors file tensor by tensor, in the planned order, with bytes that come in pieces.

    The library's own writer takes all tensors at once, which a 5 GB model does not allow.

    Parameters
    ----------
    path : file to write
    plans : (name, dtype by its safetensors name, shape, bytes) in file order
    metadata : text by key
    """

    def __init__(self, path: Path, plans: list[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]):
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        at = 0
        for name, dtype, shape, n_bytes in plans:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n_bytes]}
            at += n_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % 64)  # data begins on a cache line, so that kernels may read it in place
        self._stream = path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, data: np.ndarray) -> None:
        """Append bytes."""
        self._stream.write(np.ascontiguousarray(data).data)

    def close(self) -> None:
        self._stream.close()
