"""Convert a checkpoint from any form that is read here to any that is written.

Exact: the integers and float32 scales of a checkpoint are the same after every conversion; other tensors keep their
values unless another type is asked for. Streaming: one matrix, or a few MiB of an embedding, is in memory at a time.
The output gets its name when it is complete; an interrupted conversion leaves nothing.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from bitnet_ref.errors import FormatError
from bitnet_ref.formats.checkpoint import (
    Checkpoint,
    Entry,
    FloatTensor,
    TernaryTensor,
    expected_rows,
    is_embedding_or_head,
)
from bitnet_ref.formats.float_types import FLOAT_TYPES, check_float_type, encode_floats, row_bytes
from bitnet_ref.formats.gguf_file import GgufPlan, GgufStream, open_gguf_checkpoint
from bitnet_ref.formats.gguf_names import (
    architecture_for,
    checked_rope_factors,
    hyperparameters,
    permute_rows,
    permutes,
    rope_of,
    tensor_to_gguf,
)
from bitnet_ref.formats.gguf_tokenizer import tokenizer_metadata
from bitnet_ref.formats.hf import SafetensorsStream, hf_config, open_hf_checkpoint, pack_hf
from bitnet_ref.formats.i2s import I2S_LAYOUTS, check_i2s_shape, pack_i2s
from bitnet_ref.formats.i2s_layout import LAYOUT_KEY
from bitnet_ref.formats.packed import (
    ASSET_PREFIX,
    GGUF_METADATA_ASSET,
    PACKED_FORMAT,
    PACKED_VERSION,
    gguf_metadata_asset,
    is_packed,
    open_packed_checkpoint,
)
from bitnet_ref.formats.tensors import open_tensor_file
from bitnet_ref.formats.ternary_gguf import check_tq_shape, pack_tq
from bitnet_ref.reference.packing import get_scheme

__all__ = ["TARGETS", "ConversionReport", "convert", "open_checkpoint"]

TARGETS = ("hf-packed", "gguf-tq1_0", "gguf-tq2_0", "gguf-i2_s", "packed")
"""What ``convert`` writes."""

Progress = Callable[[int, int, str], None]

_FILE_TYPES = {"tq1_0": 36, "tq2_0": 37, "i2_s": 40}  # general.file_type: llama.cpp's, and bitnet.cpp's own for I2_S
_SAFETENSORS_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class ConversionReport:
    """What ``convert`` did: where it wrote, from what, how many bytes, and sentences the user should see."""

    path: Path
    source_format: str
    target: str
    n_ternary: int
    n_float: int
    written_bytes: int
    notes: tuple[str, ...]


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    convention: str | None = None,
    quantize: bool = False,
) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file, or a file of our packed form.

    Parameters
    ----------
    layout : "x86-128", "arm-64" or "interleaved-4", for I2_S files whose layout cannot be told
    convention : "multiply" or "divide", for packed Hugging Face weights whose configuration does not say
    quantize : whether linear layers that are not ternary are rounded by absmean; else they come as floats

    Raises
    ------
    FormatError
        If the files cannot be read, or what they hold cannot be told with the options given.
    ValueError
        If an option has a value that does not exist, or does not belong to this kind of file.
    """
    path = Path(path)
    if layout is not None and layout not in I2S_LAYOUTS:
        raise ValueError(f"an I2_S layout must be one of {', '.join(I2S_LAYOUTS)}, got {layout!r}")
    if path.is_dir():
        if layout is not None:
            raise ValueError("layout is for I2_S in GGUF files, this is a Hugging Face folder")
        return open_hf_checkpoint(path, quantize=quantize, convention=convention)
    if convention is not None:
        raise ValueError("convention is for Hugging Face folders, this is a file")
    opened = open_tensor_file(path)
    if is_packed(opened):
        if layout is not None:
            raise ValueError("layout is for I2_S in GGUF files, this is a packed file")
        return open_packed_checkpoint(path, opened)
    if opened.format == "safetensors":
        raise FormatError(f"{path}: a single safetensors file has no configuration; give the folder with config.json")
    return open_gguf_checkpoint(path, layout=layout, quantize=quantize, opened=opened)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    scheme: str = "base3",
    embedding: str | None = None,
    i2s_layout: str = "x86-128",
    layout: str | None = None,
    convention: str | None = None,
    quantize: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a checkpoint.

    Parameters
    ----------
    src : Hugging Face folder, GGUF file, or packed file
    dst : folder for "hf-packed", else a file; its folder must exist
    to : one of TARGETS
    scheme : packing of "packed"
    embedding : "f32", "f16", "bf16", "q8_0", "q6_k" or "q4_0" for the embedding and the head; None keeps their type
    i2s_layout : the layout that "gguf-i2_s" is written in
    layout, convention : how to read the source, where it does not say; see :func:`open_checkpoint`
    quantize : round linear layers that are not ternary, by absmean
    overwrite : replace dst if it is there
    progress : called as ``progress(done, total, name)`` after each tensor

    Returns
    -------
    ConversionReport

    Raises
    ------
    ValueError
        If the model cannot be written in that form: shapes, activation, a type that the form has not, weights that are
        not ternary; or an option is wrong.
    FormatError
        If the source cannot be read.
    FileExistsError
        If dst is there and overwrite is False.
    """
    src, dst = Path(src), Path(dst)
    if to not in TARGETS:
        raise ValueError(f"to must be one of {', '.join(TARGETS)}, got {to!r}")
    if embedding is not None and embedding not in FLOAT_TYPES:
        raise ValueError(f"embedding must be one of {', '.join(FLOAT_TYPES)}, got {embedding!r}")
    get_scheme(scheme)
    if i2s_layout not in I2S_LAYOUTS:
        raise ValueError(f"an I2_S layout must be one of {', '.join(I2S_LAYOUTS)}, got {i2s_layout!r}")
    if src.resolve() == dst.resolve() or (to == "packed" and src.resolve() == dst.resolve().parent):
        raise ValueError(f"the output must not take the place of the source or join its weight files, got {dst}")
    _check_destination(dst, to, overwrite)
    source = open_checkpoint(src, layout=layout, convention=convention, quantize=quantize)
    job = _Job(source, FLOAT_TYPES.get(embedding or ""), progress)
    with _temporary(dst) as temporary:
        if to == "hf-packed":
            notes = _write_hf(job, temporary)
        elif to == "packed":
            notes = _write_packed(job, temporary, scheme)
        else:
            notes = _write_gguf(job, temporary, to.removeprefix("gguf-"), i2s_layout)
        written_bytes = _sync(temporary)
        _put(temporary, dst)
    return ConversionReport(
        path=dst,
        source_format=source.format,
        target=to,
        n_ternary=sum(entry.ternary for entry in source.entries.values()),
        n_float=sum(not entry.ternary for entry in source.entries.values()),
        written_bytes=written_bytes,
        notes=(*source.notes, *notes),
    )


class _Job:
    """The source, the type asked for embeddings, and progress over tensors."""

    def __init__(self, source: Checkpoint, embedding: str | None, progress: Progress | None) -> None:
        self.source = source
        self._embedding = embedding
        self._progress = progress
        self._done = 0

    @property
    def ternary(self) -> list[Entry]:
        return [entry for entry in self.source.entries.values() if entry.ternary]

    @property
    def floats(self) -> list[tuple[Entry, FloatTensor]]:
        """Tensors that are not linear layers, opened and not read."""
        return [(entry, entry.load()) for entry in self.source.entries.values() if not entry.ternary]

    def float_type(self, tensor: FloatTensor) -> str:
        """The type that a tensor gets: the one asked for if it is an embedding or head, else its own."""
        if self._embedding is not None and is_embedding_or_head(tensor.name):
            check_float_type(tensor.name, tensor.shape[-1], self._embedding)
            return self._embedding
        return tensor.type

    def load_ternary(self, entry: Entry) -> TernaryTensor:
        tensor = entry.load()
        if not isinstance(tensor, TernaryTensor):
            raise ValueError(
                f"linear layers must be ternary, {entry.name} is not (its non-zeros have more than one magnitude); "
                "rounding it changes the model, allow it with quantize (--quantize)"
            )
        return tensor

    def copy_floats(self, tensor: FloatTensor, type_name: str, write: Callable[[np.ndarray], None]) -> None:
        """Write a float tensor: its bytes if it keeps its type, else encoded anew."""
        for _, raw, values in tensor.chunks():
            write(raw if type_name == tensor.type else encode_floats(tensor.name, values, type_name))

    def done(self, name: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, len(self.source.entries), name)


def _write_hf(job: _Job, folder: Path) -> list[str]:
    """config.json, model.safetensors and the tokenizer's files, for transformers' AutoBitLinear."""
    for entry in job.ternary:
        if entry.shape[0] % 4:
            raise ValueError(
                f"hf-packed needs rows in fours (transformers' layer has no room for the rest), {entry.name} has "
                f"{entry.shape[0]}"
            )
        wanted = expected_rows(entry.name, job.source.config)
        if wanted is not None and wanted != entry.shape[0]:
            raise ValueError(f"{entry.name} must have the {wanted} rows of the configuration, got {entry.shape[0]}")
    plans: list[tuple[str, str, tuple[int, ...], int]] = []
    for entry in job.ternary:
        m, k = entry.shape
        plans.append((entry.name, "U8", (m // 4, k), m // 4 * k))
    floats = []
    for entry, tensor in job.floats:
        type_name = job.float_type(tensor)
        if type_name not in _SAFETENSORS_TYPES:
            raise ValueError(
                f"transformers reads embeddings as F32, F16 or BF16, {entry.name} would be {type_name}; "
                "choose one (--embedding)"
            )
        plans.append((entry.name, type_name, entry.shape, _n_bytes(entry.shape, type_name)))
        floats.append((tensor, type_name))
    plans += [(entry.name + "_scale", "F32", (1,), 4) for entry in job.ternary]

    folder.mkdir()
    config = hf_config(job.source.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    assets = dict(job.source.assets)
    notes = []
    if "tokenizer.json" not in assets and "tokenizer.model" not in assets:
        notes.append("The source has no tokenizer.json; transformers needs one from elsewhere.")
    if job.source.gguf_metadata:
        assets[GGUF_METADATA_ASSET] = gguf_metadata_asset(dict(job.source.gguf_metadata))
    for name, data in assets.items():
        (folder / name).write_bytes(data)
    stream = SafetensorsStream(folder / "model.safetensors", plans, {"format": "pt"})
    try:
        scales = []
        for entry in job.ternary:
            tensor = job.load_ternary(entry)
            stream.write(pack_hf(tensor.w_q))
            scales.append(tensor.w_scale)
            job.done(entry.name)
        for tensor, type_name in floats:
            job.copy_floats(tensor, type_name, stream.write)
            job.done(tensor.name)
        stream.write(np.array(scales, "<f4").view(np.uint8))
    finally:
        stream.close()
    return notes


def _write_packed(job: _Job, path: Path, scheme: str) -> list[str]:
    """Our packed form."""
    from bitnet_ref import __version__

    layout = get_scheme(scheme)
    plans: list[tuple[str, str, tuple[int, ...], int]] = []
    described: dict[str, Any] = {}
    for entry in job.ternary:
        shape = layout.data_shape(entry.shape)
        plans.append((entry.name, "U8", shape, math.prod(shape)))
        described[entry.name] = {"shape": list(entry.shape)}
    floats = []
    for entry, tensor in job.floats:
        type_name = job.float_type(tensor)
        if type_name not in FLOAT_TYPES.values():
            raise ValueError(
                f"the packed form holds {', '.join(FLOAT_TYPES.values())}, {entry.name} is {type_name}; "
                "choose one (--embedding)"
            )
        n_bytes = _n_bytes(entry.shape, type_name)
        if type_name in _SAFETENSORS_TYPES:
            plans.append((entry.name, type_name, entry.shape, n_bytes))
        else:
            plans.append((entry.name, "U8", (*entry.shape[:-1], row_bytes(entry.shape[-1], type_name)), n_bytes))
        described[entry.name] = {"shape": list(entry.shape), "type": type_name}
        floats.append((tensor, type_name))
    plans += [(entry.name + "_scale", "F32", (1,), 4) for entry in job.ternary]
    assets = dict(job.source.assets)
    if job.source.gguf_metadata:
        assets[GGUF_METADATA_ASSET] = gguf_metadata_asset(dict(job.source.gguf_metadata))
    plans += [(ASSET_PREFIX + name, "U8", (len(data),), len(data)) for name, data in assets.items()]
    metadata = {
        "format": PACKED_FORMAT,
        "version": PACKED_VERSION,
        "scheme": scheme,
        "config": json.dumps(hf_config(job.source.config)),
        "tensors": json.dumps(described),
        "assets": json.dumps(sorted(assets)),
        "provenance": json.dumps(
            {
                "source": job.source.path.name,
                "source_format": job.source.format,
                "writer": f"bitnet_ref {__version__}",
            }
        ),
    }
    stream = SafetensorsStream(path, plans, metadata)
    try:
        scales = []
        for entry in job.ternary:
            tensor = job.load_ternary(entry)
            packed = tensor.packed(scheme)
            if packed is tensor.stored:
                tensor.w_q  # noqa: B018  refuses bytes that stand for no weights; copying them would pass them on
            stream.write(packed.data)
            scales.append(tensor.w_scale)
            job.done(entry.name)
        for tensor, type_name in floats:
            job.copy_floats(tensor, type_name, stream.write)
            job.done(tensor.name)
        stream.write(np.array(scales, "<f4").view(np.uint8))
        for data in assets.values():
            stream.write(np.frombuffer(data, np.uint8))
    finally:
        stream.close()
    return []


def _write_gguf(job: _Job, path: Path, target: str, i2s_layout: str) -> list[str]:
    """GGUF with the linear layers as TQ1_0, TQ2_0 or I2_S."""
    source, config, type_name = job.source, job.source.config, target.upper()
    if (config.get("quantization_config") or {}).get("use_rms_norm"):
        raise ValueError("GGUF has no place for a norm inside every linear layer (use_rms_norm of quantization_config)")
    names = {name: tensor_to_gguf(name) for name in source.entries}
    if unknown := [name for name, gguf_name in names.items() if gguf_name is None]:
        raise ValueError(
            f"GGUF's bitnet and llama architectures have no name for {len(unknown)} tensors, first: {unknown[0]}"
        )
    sub_norms = any(name.endswith("sub_norm.weight") for name in names.values())
    architecture = architecture_for(config, sub_norms, target)
    for entry in job.ternary:
        if target == "i2_s":
            check_i2s_shape(entry.name, entry.shape, i2s_layout)
        else:
            check_tq_shape(entry.name, entry.shape, type_name)
    values = hyperparameters(config, architecture)
    head_dim = values["rope.dimension_count"]
    embedding = source.entries.get("model.embed_tokens.weight")
    if embedding is None or embedding.shape[0] != values["vocab_size"]:
        raise ValueError(
            f"the embedding must have vocab_size = {values['vocab_size']} rows, got "
            f"{'none' if embedding is None else embedding.shape[0]}"
        )
    scale_tensors = target != "i2_s" and architecture == "bitnet"

    plans, floats = [], {}
    for entry in source.entries.values():
        if entry.ternary:
            plans.append(GgufPlan(names[entry.name], entry.shape, type_name))
            if scale_tensors:
                plans.append(GgufPlan(names[entry.name].removesuffix("weight") + "scale", (1,), "F32"))
        else:
            tensor = entry.load()
            # Readers take vectors as float32 only.
            float_type = "F32" if len(entry.shape) == 1 else job.float_type(tensor)
            if float_type not in GGMLQuantizationType.__members__:
                raise ValueError(f"GGUF has no type {float_type}, which {entry.name} is; choose one (--embedding)")
            floats[entry.name] = tensor, float_type
            plans.append(GgufPlan(names[entry.name], entry.shape, floats[entry.name][1]))
    theta, scaling = rope_of(config)
    factors = None
    if scaling is not None and scaling["rope_type"] == "llama3":
        factors = checked_rope_factors(scaling, theta, head_dim)
        plans.append(GgufPlan("rope_freqs.weight", factors.shape, "F32"))

    metadata, notes = _gguf_metadata(source, architecture, values)
    metadata["general.file_type"] = _FILE_TYPES[target]
    if target == "i2_s":
        metadata[LAYOUT_KEY] = i2s_layout
    if "lm_head.weight" in names and architecture == "bitnet":
        notes.append("llama.cpp's architecture bitnet has no head of its own and does not load this file.")
    in_header = [] if target == "i2_s" or scale_tensors else [names[entry.name] for entry in job.ternary]
    stream = GgufStream(path, architecture, metadata, plans, in_header)
    try:
        scales = []
        for entry in source.entries.values():
            order = _row_order(entry.name, architecture, config)
            if not entry.ternary:
                tensor, float_type = floats[entry.name]
                if order is None:
                    job.copy_floats(tensor, float_type, stream.write)
                else:
                    stream.write(encode_floats(entry.name, order(tensor.to_float32())[None], float_type))
                stream.end_tensor()
                job.done(entry.name)
                continue
            tensor = job.load_ternary(entry)
            w_q = tensor.w_q if order is None else order(tensor.w_q)
            if target == "i2_s":
                stream.write(pack_i2s(w_q, tensor.w_scale, i2s_layout))
            elif scale_tensors:
                stream.write(pack_tq(w_q, np.float16(1), type_name))
                stream.end_tensor()
                stream.write(np.array([tensor.w_scale], "<f4").view(np.uint8))
            else:
                stream.write(pack_tq(w_q, _half(entry.name, tensor.w_scale), type_name))
                scales.append(tensor.w_scale)
            stream.end_tensor()
            job.done(entry.name)
        if factors is not None:
            stream.write(factors.view(np.uint8))
            stream.end_tensor()
        stream.finish(scales)
    finally:
        stream.close()
    return notes


def _gguf_metadata(source: Checkpoint, architecture: str, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """All metadata but what depends on the target; a GGUF source's own tokenizer is passed on as it is."""
    ours = ("general.architecture", "general.file_type", "general.alignment", "general.quantization_version")
    kept = {key: value for key, value in source.gguf_metadata.items() if key not in ours}
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": source.path.stem,
        "general.quantization_version": 2,
    }
    metadata |= {f"{architecture}.{key}": value for key, value in values.items()}
    notes: list[str] = []
    if "tokenizer.ggml.model" not in kept:
        tokenizer, notes = tokenizer_metadata(source.assets, source.config, values["vocab_size"])
        metadata |= tokenizer
    return metadata | kept, notes


def _row_order(name: str, architecture: str, config: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray] | None:
    kind = name.rsplit(".", 2)[-2]
    if not permutes(architecture) or kind not in ("q_proj", "k_proj"):
        return None
    heads = config["num_attention_heads"]
    n_heads = heads if kind == "q_proj" else config.get("num_key_value_heads") or heads

    def order(w: np.ndarray) -> np.ndarray:
        if len(w) % (2 * n_heads):
            raise ValueError(f"{name} must have a multiple of {2 * n_heads} rows, got {len(w)}")
        return permute_rows(w, n_heads)

    return order


def _half(name: str, scale: np.float32) -> np.float16:
    with np.errstate(over="ignore", under="ignore"):
        half = np.float16(scale)
    if not (np.isfinite(half) and half > 0):
        raise ValueError(f"the scale of {name} must be in the range of float16 for this type, got {scale}")
    return half


def _n_bytes(shape: tuple[int, ...], type_name: str) -> int:
    return math.prod(shape[:-1]) * row_bytes(shape[-1], type_name)


# Files --------------------------------------------------------------------------------------------------------------


def _check_destination(dst: Path, to: str, overwrite: bool) -> None:
    if not dst.parent.is_dir():
        raise FileNotFoundError(f"the folder of the output must exist, {dst.parent} does not")
    if to != "hf-packed" and dst.is_dir():
        raise ValueError(f"{to} is one file, {dst} is a folder")
    if to == "hf-packed" and dst.exists():
        if not dst.is_dir():
            raise ValueError(f"hf-packed is a folder, {dst} is a file")
        if not any(dst.iterdir()):
            return
        if others := [f.name for f in dst.glob("*.safetensors*") if f.name != "model.safetensors"]:
            raise ValueError(f"{dst} must not hold other weights, it has {others[0]}")
    if dst.exists() and not overwrite:
        raise FileExistsError(f"{dst} is there; replacing it must be asked for (overwrite, --overwrite)")


@contextmanager
def _temporary(dst: Path) -> Iterator[Path]:
    """A name beside dst that is free, and is free again afterwards, whatever happens."""
    temporary = dst.parent / f".{dst.name}.{os.getpid()}.partial"
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _sync(path: Path) -> int:
    """Have the disk hold what was written, so that the name never stands for less; returns the bytes."""
    n_bytes = 0
    for file in _files(path):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        n_bytes += file.stat().st_size
    return n_bytes


def _put(temporary: Path, dst: Path) -> None:
    """Give the output its name; into a folder that is there, file by file, the configuration last."""
    if temporary.is_dir() and dst.is_dir():
        for file in sorted(_files(temporary), key=lambda file: file.name == "config.json"):
            os.replace(file, dst / file.name)
    else:
        os.replace(temporary, dst)
