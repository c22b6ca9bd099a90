"""What every checkpoint is to the rest of the package: a configuration and named tensors, one in memory at a time.

Names and configuration keys are those of Hugging Face, whatever the file: ``model.layers.0.self_attn.q_proj.weight``,
``num_attention_heads``. A linear layer that is ternary is a :class:`TernaryTensor`, anything else a
:class:`FloatTensor` that stays on disk until its rows are asked for. Scales always multiply.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ref.errors import FormatError
from bitnet_ref.formats.tensors import StoredTensor
from bitnet_ref.reference.packing import PackedTernary, pack
from bitnet_ref.reference.quantize import SCALE_CLAMP, quantize_weights

__all__ = [
    "Checkpoint",
    "Entry",
    "FloatTensor",
    "TernaryTensor",
    "check_scale",
    "expected_rows",
    "is_embedding_or_head",
    "is_linear",
    "load_json_object",
    "map_bytes",
    "ternary_of_floats",
]

_CHUNK_WEIGHTS = 1 << 22  # rows are handed out in pieces of about this many weights: 16 MiB of float32
_MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json in use is under 40 MB

_LINEAR = re.compile(r"(?:^|\.)layers\.\d+\..*\b(?:q|k|v|o|gate|up|down)_proj\.weight$")
_EMBEDDING_OR_HEAD = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, eq=False)
class TernaryTensor:
    """A ternary matrix and its scale.

    Attributes
    ----------
    name : str
    stored : ndarray of shape (M, K), int8, or PackedTernary
        The integers, as they came: bytes of our own form are kept packed, and mapped if the file was.
    w_scale : float32
        So that the weights are ``w_scale * w_q``.
    """

    name: str
    stored: np.ndarray | PackedTernary = field(repr=False)
    w_scale: np.float32

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K): outputs, inputs."""
        return self.stored.shape

    @cached_property
    def w_q(self) -> np.ndarray:
        """The integers, shape (M, K), int8; unpacked once if they are stored packed.

        Raises
        ------
        FormatError
            If the packed bytes hold a pattern that stands for no weights.
        """
        if not isinstance(self.stored, PackedTernary):
            return self.stored
        try:
            return self.stored.unpack()
        except ValueError as error:
            raise FormatError(f"tensor {self.name}: {error}") from error

    def packed(self, scheme: str) -> PackedTernary:
        """The matrix in the named packing; without a copy if it is stored so."""
        if isinstance(self.stored, PackedTernary) and self.stored.scheme == scheme:
            return self.stored
        return pack(self.w_q, scheme)


@dataclass(frozen=True, eq=False)
class FloatTensor:
    """A tensor of a float type, or of a block-quantised one that stands for floats; values stay on disk.

    Attributes
    ----------
    name : str
    type : str
        "F32", "F16", "BF16", "Q8_0", "Q6_K" and so on, by their GGUF and safetensors names.
    shape : tuple of int
    """

    name: str
    _source: StoredTensor = field(repr=False)
    _row_order: Callable[[np.ndarray], np.ndarray] | None = field(default=None, repr=False)

    @property
    def type(self) -> str:
        return self._source.type

    @property
    def shape(self) -> tuple[int, ...]:
        return self._source.shape

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    def raw(self) -> np.ndarray:
        """The stored bytes, a read-only map of the file: uint8 of shape (rows, bytes of a row)."""
        return self._order(map_bytes(self._source).reshape(math.prod(self.shape[:-1]), -1))

    def to_float32(self) -> np.ndarray:
        """All values, float32, in new memory."""
        return self._order(self._source.to_float32())

    def chunks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Go through the rows: (first row, stored bytes (n, row bytes), float32 values (n, K)), some MiB at a time.

        Raises
        ------
        FormatError
            If the type cannot be read as floats, or the file has become shorter.
        """
        if not self._source.is_float:
            raise FormatError(f"tensor {self.name} must be of a type that can be read as floats, got {self.type}")
        for i, piece in self._pieces():
            raw = map_bytes(piece).reshape(piece.shape[0], -1)
            yield i, self._order(raw), self._order(piece.to_float32())

    def raw_chunks(self) -> Iterator[np.ndarray]:
        """The stored bytes of the rows, (n, row bytes), some MiB at a time, each mapped only while it is looked at."""
        for _, piece in self._pieces():
            yield self._order(map_bytes(piece).reshape(piece.shape[0], -1))

    def _pieces(self) -> Iterator[tuple[int, StoredTensor]]:
        """Whole sixteens of rows, but for the last piece: so they lie together in tables of integers."""
        n_rows, n_columns = math.prod(self.shape[:-1]), self.shape[-1] if self.shape else 1
        step = n_rows if self._row_order is not None else max(16, _CHUNK_WEIGHTS // max(1, n_columns) // 16 * 16)
        row_bytes = self._source.stored_bytes // max(1, n_rows)
        for i in range(0, n_rows, max(1, step)):
            n = min(step, n_rows - i)
            offset = self._source.offset + i * row_bytes
            yield i, replace(self._source, shape=(n, n_columns), offset=offset, stored_bytes=n * row_bytes)

    def _order(self, rows: np.ndarray) -> np.ndarray:
        if self._row_order is None:
            return rows
        return self._row_order(rows.reshape(self.shape[0], -1)).reshape(rows.shape)  # biases: one value a row


@dataclass(frozen=True)
class Entry:
    """A tensor by name: ``load()`` reads it. ``shape`` is the logical one, also of a packed matrix."""

    name: str
    shape: tuple[int, ...]
    ternary: bool
    load: Callable[[], TernaryTensor | FloatTensor] = field(repr=False)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; its tensors are read when asked for.

    Attributes
    ----------
    path : Path
    format : str
        What the file is, in words, with its layout.
    config : dict
        Keys and values of a Hugging Face config.json.
    entries : mapping of name to Entry, in file order
    assets : mapping of file name to bytes
        Small files that belong to the model: tokenizer.json, chat_template.jinja and so on.
    gguf_metadata : dict
        ``tokenizer.*`` and ``general.*`` values of a GGUF file, complete; empty for other formats.
    notes : tuple of str
        Sentences the user should see: what was inferred and why, what is missing.
    """

    path: Path
    format: str
    config: dict[str, Any]
    entries: Mapping[str, Entry] = field(repr=False)
    assets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    gguf_metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> TernaryTensor | FloatTensor:
        """Read one tensor; KeyError if the checkpoint has none of that name."""
        return self.entries[name].load()

    def tensors(self) -> Iterator[TernaryTensor | FloatTensor]:
        """Every tensor in file order, read one at a time."""
        for entry in self.entries.values():
            yield entry.load()


def map_bytes(tensor: StoredTensor) -> np.ndarray:
    """The stored bytes of a tensor, uint8, as a read-only map of its part of the file.

    Raises
    ------
    FormatError
        If the file has become shorter since it was opened.
    """
    if tensor.stored_bytes == 0:
        return np.empty(0, np.uint8)
    try:
        mapped = np.memmap(tensor.path, np.uint8, mode="r", offset=tensor.offset, shape=(tensor.stored_bytes,))
    except (OSError, ValueError) as error:
        raise FormatError(f"{tensor.path}: the bytes of tensor {tensor.name} must be in the file: {error}") from error
    return mapped.view(np.ndarray)


def is_linear(name: str) -> bool:
    """Whether the name is that of a linear layer inside a decoder layer: what BitNet makes ternary."""
    return _LINEAR.search(name) is not None


def is_embedding_or_head(name: str) -> bool:
    """Whether the name is that of the token embedding or of the output head."""
    return name in _EMBEDDING_OR_HEAD


def ternary_of_floats(name: str, w: np.ndarray, quantize: bool) -> TernaryTensor | None:
    """A float matrix as a ternary one: exactly if it already is ternary, else by absmean rounding if allowed.

    A matrix whose non-zeros all have one magnitude is ternary already and that magnitude is its scale; its absmean
    would be smaller by the share of zeros. A matrix of zeros has scale 1e-5, as the quantiser gives it.

    Parameters
    ----------
    w : ndarray of shape (M, K), float32
    quantize : whether other matrices may be rounded

    Returns
    -------
    TernaryTensor, or None if the matrix is not ternary and quantize is False

    Raises
    ------
    FormatError
        If a value is NaN or infinite, or the tensor is not a matrix.
    """
    if w.ndim != 2 or w.size == 0:
        raise FormatError(f"tensor {name}: a linear layer must be a matrix with at least one element, got {w.shape}")
    largest = np.float32(max(w.max(), -w.min()))  # NaN stays NaN
    if not np.isfinite(largest):
        raise FormatError(f"tensor {name} must be finite, it holds NaN or infinity")
    if largest == 0:
        return TernaryTensor(name, np.zeros(w.shape, np.int8), SCALE_CLAMP)
    w_q = np.sign(w).astype(np.int8)
    if np.array_equal(w_q * largest, w):
        return TernaryTensor(name, w_q, largest)
    return TernaryTensor(name, *quantize_weights(w)) if quantize else None


def check_scale(name: str, value: Any) -> np.float32:
    """A scale as float32; FormatError unless it is one finite number above zero."""
    scale = np.float32(value)
    if not (np.isfinite(scale) and scale > 0):
        raise FormatError(f"the scale of {name} must be finite and above 0, got {scale}")
    return scale


def expected_rows(name: str, config: Mapping[str, Any]) -> int | None:
    """Outputs of a linear layer by the configuration, or None where the configuration does not say."""

    def number(key: str) -> int | None:
        value = config.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    head_dim = number("head_dim") or (hidden // heads if hidden and heads else None)
    match = re.search(r"\.(\w+)_proj\.weight$", name)
    kind = match.group(1) if match else ""
    if kind in ("o", "down"):
        return hidden
    if kind in ("gate", "up"):
        return number("intermediate_size")
    if kind in ("q", "k", "v"):
        n = heads if kind == "q" else number("num_key_value_heads") or heads
        return n * head_dim if n and head_dim else None
    return None


def load_json_object(path: Path, text: bytes | str | None = None) -> dict[str, Any]:
    """A JSON object from a file (or from text that came with it), without duplicate keys, NaN or bottomless nesting.

    Raises
    ------
    FormatError
        If it is not there, too large, or not such an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("keys must be unique")
        return result

    def no_constant(constant: str) -> Any:
        raise ValueError(f"numbers must be finite, got {constant}")

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else no_constant(number)

    try:
        if text is None:
            if not path.is_file():
                raise FormatError(f"{path} must be a regular file")
            if path.stat().st_size > _MAX_JSON_BYTES:
                raise FormatError(f"{path} must be at most {_MAX_JSON_BYTES:,} bytes, got {path.stat().st_size:,}")
            text = path.read_bytes()
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
    except FormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} must hold valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
