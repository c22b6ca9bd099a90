"""Our own packed form: one safetensors file with the bytes that the kernels read.

Metadata (text, as safetensors has it)::

    format      "bitnet_ref.packed"
    version     "1"
    scheme      "i2", "base3", "tl1" or "tl2"
    config      the model's config.json
    tensors     {name: {"shape": [M, K]} of a ternary matrix, {"shape": [...], "type": "Q6_K"} of a float tensor}
    assets      [file names]
    provenance  {"source": name, "source_format": what it was, "writer": program and version}

Tensors: the bytes of each ternary matrix, uint8 (n_tiles, tile_stride_bytes), under its name; its scale, float32 (1,),
under ``<name>_scale``; float tensors as F32, F16 or BF16, or as uint8 rows of a block type; each asset as uint8 under
``asset:<file name>``. The ternary matrices come first and the header is padded, so that every one of them begins on a
64-byte boundary; the reader hands out the mapped bytes without a copy.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from bitnet_ref.errors import FormatError
from bitnet_ref.formats import tensors as _tensors
from bitnet_ref.formats.checkpoint import (
    Checkpoint,
    Entry,
    FloatTensor,
    TernaryTensor,
    check_scale,
    load_json_object,
    map_bytes,
)
from bitnet_ref.formats.tensors import StoredTensor, TensorFile, open_tensor_file
from bitnet_ref.reference.packing import SCHEMES, PackedTernary

__all__ = [
    "ASSET_PREFIX",
    "GGUF_METADATA_ASSET",
    "PACKED_FORMAT",
    "PACKED_VERSION",
    "gguf_metadata_asset",
    "is_packed",
    "open_packed_checkpoint",
    "read_gguf_metadata_asset",
]

PACKED_FORMAT = "bitnet_ref.packed"
PACKED_VERSION = "1"
ASSET_PREFIX = "asset:"
GGUF_METADATA_ASSET = "gguf_metadata.json"
"""Metadata of a GGUF source, kept as an asset so that a later GGUF has it again."""

_NATIVE = ("F32", "F16", "BF16")
_MAX_DIMS = 4
_GGUF_DTYPES = {np.dtype(code).name for code in "bBhHiIqQfd?"}


def is_packed(opened: TensorFile) -> bool:
    """Whether an opened file is of our packed form."""
    return opened.format == "safetensors" and opened.metadata.get("format") == PACKED_FORMAT


def open_packed_checkpoint(path: str | Path, opened: TensorFile | None = None) -> Checkpoint:
    """Open a file of our packed form.

    Raises
    ------
    FormatError
        If it is not one, of another version, or its metadata and tensors do not agree.
    """
    path = Path(path)
    opened = open_tensor_file(path) if opened is None else opened
    if not is_packed(opened):
        raise FormatError(f"{path}: metadata format must be {PACKED_FORMAT}, got {opened.metadata.get('format')!r}")
    metadata = _full_metadata(path)
    if metadata.get("version") != PACKED_VERSION:
        raise FormatError(f"{path}: version must be {PACKED_VERSION}, got {metadata.get('version')!r}")
    scheme = metadata.get("scheme")
    if scheme not in SCHEMES:
        raise FormatError(f"{path}: scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    config, described = (load_json_object(path, metadata.get(key, "")) for key in ("config", "tensors"))
    if not isinstance(config.get("quantization_config"), (dict, type(None))):
        raise FormatError(f"{path}: quantization_config of the config must be an object")

    stored = {tensor.name: tensor for tensor in opened.tensors}
    entries: dict[str, Entry] = {}
    used = set()
    for name, description in described.items():
        if name not in stored:
            raise FormatError(f"{path}: the file must have tensor {name[:200]}, it has none")
        shape = _shape(path, name, description)
        used.add(name)
        if "type" in description:
            source = _float_source(path, stored[name], shape, description["type"])
            entries[name] = Entry(name, shape, False, _FloatSource(name, source).load)
            continue
        scale = stored.get(name + "_scale")
        if scale is None or scale.type != "F32" or scale.n_weights != 1:
            raise FormatError(f"{path}: ternary tensor {name} needs {name}_scale with one float32")
        if len(shape) != 2 or stored[name].type != "U8" or stored[name].shape != SCHEMES[scheme].data_shape(shape):
            raise FormatError(
                f"{path}: tensor {name} must be the {scheme} bytes of a {' x '.join(map(str, shape))} matrix, got "
                f"{stored[name].type} of shape {stored[name].shape}"
            )
        used.add(name + "_scale")
        entries[name] = Entry(name, shape, True, _TernarySource(name, stored[name], scale, shape, scheme).load)
    assets = {}
    for name, tensor in stored.items():
        if name.startswith(ASSET_PREFIX) and tensor.type == "U8":
            assets[_asset_name(path, name.removeprefix(ASSET_PREFIX))] = map_bytes(tensor).tobytes()
        elif name not in used:
            raise FormatError(f"{path}: metadata must describe tensor {name}")
    gguf_metadata = {}
    if GGUF_METADATA_ASSET in assets:
        gguf_metadata = read_gguf_metadata_asset(path, assets.pop(GGUF_METADATA_ASSET))
    return Checkpoint(
        path=path,
        format=f"bitnet_ref packed, scheme {scheme}",
        config=config,
        entries=entries,
        assets=assets,
        gguf_metadata=gguf_metadata,
    )


def gguf_metadata_asset(metadata: dict[str, Any]) -> bytes:
    """GGUF metadata as JSON; arrays of numbers keep their type."""

    def plain(value: Any) -> Any:
        return {"dtype": value.dtype.name, "values": value.tolist()} if isinstance(value, np.ndarray) else value

    return json.dumps({key: plain(value) for key, value in metadata.items()}).encode()


def read_gguf_metadata_asset(path: Path, text: bytes | None) -> dict[str, Any]:
    """The inverse of :func:`gguf_metadata_asset`, from text or from a file.

    Raises
    ------
    FormatError
        If it is not such JSON.
    """
    result: dict[str, Any] = {}
    for key, value in load_json_object(path, text).items():
        if not key.startswith(("tokenizer.", "general.")):
            raise FormatError(f"{path}: {GGUF_METADATA_ASSET} must hold tokenizer.* and general.*, got {key[:200]}")
        if isinstance(value, dict):
            dtype = value.get("dtype")
            try:
                if not isinstance(dtype, str) or dtype not in _GGUF_DTYPES:
                    raise ValueError("no such type")
                value = np.array(value["values"], np.dtype(dtype))
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise FormatError(
                    f"{path}: {GGUF_METADATA_ASSET} must give numbers of a type for {key[:200]}"
                ) from error
            if value.ndim != 1:
                raise FormatError(f"{path}: {GGUF_METADATA_ASSET} must give a list for {key[:200]}")
        elif isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise FormatError(f"{path}: {GGUF_METADATA_ASSET} must give strings for {key[:200]}")
        elif not isinstance(value, (str, int, float, bool, list)):
            raise FormatError(f"{path}: {GGUF_METADATA_ASSET} must give a value for {key[:200]}")
        result[key] = value
    return result


@dataclass(frozen=True)
class _TernarySource:
    name: str
    tensor: StoredTensor
    scale: StoredTensor
    shape: tuple[int, int]
    scheme: str

    def load(self) -> TernaryTensor:
        data = map_bytes(self.tensor).reshape(self.tensor.shape)  # read-only, so PackedTernary takes it as it is
        scale = check_scale(self.name, self.scale.to_float32().reshape(-1)[0])
        return TernaryTensor(self.name, PackedTernary(data, self.shape, self.scheme), scale)


@dataclass(frozen=True)
class _FloatSource:
    name: str
    tensor: StoredTensor

    def load(self) -> FloatTensor:
        return FloatTensor(self.name, self.tensor)


def _asset_name(path: Path, name: str) -> str:
    """The name under which a conversion writes an asset into a folder: no way out of it, nor over the model there."""
    plain = re.fullmatch(r"\w[\w.+-]{0,199}", name, re.ASCII) is not None
    if not plain or name.lower() == "config.json" or ".safetensors" in name.lower():
        raise FormatError(
            f"{path}: an asset must be a plain file name, and none of the model's own, got {name[:200]!r}"
        )
    return name


def _shape(path: Path, name: str, description: Any) -> tuple[int, ...]:
    shape = description.get("shape") if isinstance(description, dict) else None
    if not (
        isinstance(shape, list)
        and 1 <= len(shape) <= _MAX_DIMS
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31 for n in shape)
    ):
        raise FormatError(f"{path}: metadata must give the shape of tensor {name[:200]} as 1 to {_MAX_DIMS} numbers")
    return tuple(shape)


def _float_source(path: Path, tensor: StoredTensor, shape: tuple[int, ...], type_name: Any) -> StoredTensor:
    """The stored tensor with its logical shape and decoder."""
    if type_name in _NATIVE:
        if tensor.type != type_name or tensor.shape != shape:
            raise FormatError(f"{path}: tensor {tensor.name} must be {type_name} of shape {shape}, got {tensor.type}")
        return tensor
    if type_name not in ("Q8_0", "Q6_K", "Q4_0"):
        raise FormatError(f"{path}: the type of tensor {tensor.name} must be one known here, got {type_name!r}")
    ggml_type = GGMLQuantizationType[type_name]
    block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if shape[-1] % block or tensor.type != "U8" or tensor.shape != (*shape[:-1], shape[-1] // block * block_bytes):
        raise FormatError(f"{path}: tensor {tensor.name} must be the {type_name} bytes of shape {shape}")
    return replace(tensor, shape=shape, type=type_name, dequantised=True, _decode=_tensors._gguf_decoder(ggml_type))


def _full_metadata(path: Path) -> dict[str, str]:
    """The metadata that ``open_tensor_file`` has checked and shortened, complete."""
    with _tensors._map(path) as data:
        n = int.from_bytes(data[:8], "little")
        return json.loads(data[8 : 8 + n]).get("__metadata__", {})
