"""Record what a network computes, tensor by tensor, so that two programs can be compared step by step.

A trace is one safetensors file. Its tensors are those of ``trace`` of :func:`bitnet_ref.reference.model.forward`
(``embedding``, ``layers.N.`` and each of ``BLOCK_STEPS``, ``final_norm``, ``logits``), float32, and before the matrices
that first read an input its quantised form: ``layers.N.q_proj.x_scale`` (T, 1) float32 and ``layers.N.q_proj.x_q``
(T, K) int8, also of ``o_proj``, ``gate_proj`` and ``down_proj``. Metadata (text)::

    format      "bitnet_ref.trace"
    version     "1"
    tokens      JSON list of integers
    program     who wrote it
    config      JSON object, the fields of ModelConfig                         optional
    model       {"name", "format", "sha256": of all integers and scales}       optional
    matrices    {"layers.N.q_proj": {"scale", "counts": [-1, 0, +1], "sha256"}} optional
    complete    "yes" if every step of the network is there                     optional

:mod:`bitnet_ref.runtime.trace_diff` compares two of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bitnet_ref.errors import FormatError
from bitnet_ref.formats import TernaryTensor, open_checkpoint, open_tensor_file
from bitnet_ref.formats.checkpoint import Checkpoint, load_json_object, map_bytes
from bitnet_ref.reference import matmul
from bitnet_ref.reference import model as reference
from bitnet_ref.reference.config import Llama3Scaling, ModelConfig, canonical_name
from bitnet_ref.reference.model import BLOCK_STEPS
from bitnet_ref.reference.packing import PackedTernary
from bitnet_ref.reference.quantize import quantize_activations, quantize_weights

__all__ = [
    "STEPS",
    "TRACE_FORMAT",
    "TRACE_VERSION",
    "CheckpointWeights",
    "MappedWeights",
    "Network",
    "Trace",
    "load_trace",
    "open_network",
    "record",
    "save_trace",
]

TRACE_FORMAT = "bitnet_ref.trace"
TRACE_VERSION = "1"

_READERS = ("q_proj", "o_proj", "gate_proj", "down_proj")
"""k and v read what q reads, and up what gate reads; their input is recorded once."""

STEPS = tuple(
    step for name in BLOCK_STEPS for step in ((f"{name}.x_scale", f"{name}.x_q", name) if name in _READERS else (name,))
)
"""The steps of a block in a trace, in the order of computation."""

Quantise = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class MappedWeights(Mapping[str, Any]):
    """Weights that go through ``change(name, weight)`` each time they are read; nothing is kept."""

    def __init__(self, weights: Mapping[str, Any], change: Callable[[str, Any], Any]) -> None:
        self._weights, self._change = weights, change

    def __getitem__(self, name: str) -> Any:
        return self._change(name, self._weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class CheckpointWeights(Mapping[str, Any]):
    """The tensors of a checkpoint as :func:`~bitnet_ref.reference.model.forward` takes them, read when asked for.

    A ternary matrix is ``(w_q, w_scale)``, everything else a float32 array. One tensor is in memory at a time.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = {canonical_name(name): name for name in checkpoint.entries}

    def __getitem__(self, name: str) -> Any:
        tensor = self._checkpoint[self._names[name]]
        if isinstance(tensor, TernaryTensor):
            return tensor.w_q, tensor.w_scale
        return tensor.to_float32()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Network:
    """A configuration, its weights, and what computes with them.

    Attributes
    ----------
    config : ModelConfig
        What the network states about itself; it is written into the trace.
    weights : mapping of str to weights
        As :func:`~bitnet_ref.reference.model.forward` takes them. Float matrices of a ternary network are rounded by
        absmean when they are read.
    forward : callable
        With the signature of :func:`~bitnet_ref.reference.model.forward`.
    quantize : callable(x) -> (x_q, x_scale)
        What makes int8 of the input of a ternary matrix.
    name, form : str
        Where the weights are from, for the trace.
    """

    config: ModelConfig
    weights: Mapping[str, Any] = field(repr=False)
    forward: Callable[..., np.ndarray] = field(default=reference.forward, repr=False)
    quantize: Quantise = field(default=quantize_activations, repr=False)
    name: str = ""
    form: str = ""

    def run(
        self,
        tokens: Sequence[int] | np.ndarray,
        trace: Callable[[str, np.ndarray], None] | None = None,
        matrix: Callable[[np.ndarray, np.ndarray, Any], None] | None = None,
    ) -> np.ndarray:
        """Logits of every token, shape (T, V), float32.

        Parameters
        ----------
        tokens : sequence of T integers
        trace : callable(name, array), optional
            As in :func:`~bitnet_ref.reference.model.forward`.
        matrix : callable(x_q, x_scale, (w, w_scale)), optional
            Called for every ternary product, before `trace` is told of its result.

        Raises
        ------
        ValueError, TypeError, KeyError
            As :func:`~bitnet_ref.reference.model.forward`.
        """

        def linear(x: np.ndarray, weight: Any) -> np.ndarray:
            if not isinstance(weight, tuple):
                return reference.linear(x, weight)
            w, w_scale = weight
            x_q, x_scale = self.quantize(x)
            if matrix is not None:
                matrix(x_q, x_scale, weight)
            # The definition of the reference (matmul.linear), with the integers in hand.
            packed = isinstance(w, PackedTernary)
            sums = matmul.matmul(x_q, w) if packed else x_q.astype(np.int32) @ w.T.astype(np.int32)
            return sums.astype(np.float32) * (x_scale * np.float32(w_scale))

        weights = self.weights
        if self.config.ternary:
            matrices = self.config.linear_shapes().keys()
            weights = MappedWeights(
                weights, lambda name, w: quantize_weights(w) if name in matrices and isinstance(w, np.ndarray) else w
            )
        return self.forward(self.config, weights, tokens, linear=linear, trace=trace)


@dataclass(frozen=True, eq=False)
class Trace:
    """Named tensors of one run.

    Attributes
    ----------
    tensors : dict of str to ndarray
        float32, and int8 under ``.x_q``.
    tokens : tuple of int
    config : ModelConfig or None
    model : dict
        ``name``, ``format`` and ``sha256`` of the integers and scales; empty if the file does not say.
    matrices : dict of str to dict
        ``scale``, ``counts`` of -1, 0 and +1, and ``sha256`` of the integers of each matrix that was used.
    complete : bool
        Whether a step that is not here was not computed.
    program : str
    types : dict of str to str
        Stored type of each tensor by its safetensors name ("F32", "BF16", "I8").
    """

    tensors: dict[str, np.ndarray] = field(repr=False)
    tokens: tuple[int, ...]
    config: ModelConfig | None = None
    model: dict[str, Any] = field(default_factory=dict)
    matrices: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    complete: bool = False
    program: str = ""
    types: dict[str, str] = field(default_factory=dict, repr=False)


def open_network(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    convention: str | None = None,
    quantize: bool = False,
) -> Network:
    """The network of a checkpoint. Its tensors stay on disk and are read one at a time.

    Parameters
    ----------
    path, layout, convention
        As in :func:`bitnet_ref.formats.open_checkpoint`.
    quantize : bool
        Whether matrices that are not ternary may be rounded by absmean.

    Raises
    ------
    FormatError
        If the files cannot be read.
    ValueError
        If they do not describe a network known here, or hold matrices that are not ternary and `quantize` is False.
    """
    # Master weights come as floats, so that a known bug of the rounding can have them (known_bugs).
    checkpoint = open_checkpoint(path, layout=layout, convention=convention)
    config = ModelConfig.from_hf(checkpoint.config, checkpoint.entries, ternary=True if quantize else None)
    if config.layers > len(checkpoint.entries):  # before as many names are made
        raise FormatError(f"{path}: a network of {config.layers} layers must have more tensors than the file has")
    config.check_names(map(canonical_name, checkpoint.entries))
    weights = CheckpointWeights(checkpoint)
    shapes = config.tensor_shapes()
    for name, entry in checkpoint.entries.items():
        if shapes.get(canonical_name(name), entry.shape) != entry.shape:
            raise FormatError(
                f"{path}: tensor {name} must have shape {shapes[canonical_name(name)]}, got {entry.shape}"
            )
    matrices = config.linear_shapes().keys()

    def check(name: str, weight: Any) -> Any:
        if name in matrices and config.ternary and isinstance(weight, np.ndarray) and not quantize:
            raise ValueError(
                f"linear layers must be ternary, {name} is not (its non-zeros have more than one magnitude); rounding "
                "it changes the model, allow it with quantize (--quantize)"
            )
        if name in matrices and not config.ternary and isinstance(weight, tuple):
            return weight[0] * weight[1]  # a full-precision network whose matrix happens to have one magnitude
        return weight

    return Network(config, MappedWeights(weights, check), name=Path(path).name, form=checkpoint.format)


def record(network: Network, tokens: Sequence[int] | np.ndarray) -> Trace:
    """Run a network and keep every intermediate value.

    Parameters
    ----------
    network : Network
        From :func:`open_network`, :func:`bitnet_ref.runtime.known_bugs.with_bug`, or ``Network(config, weights)``.
    tokens : sequence of T integers

    Returns
    -------
    Trace
        About 4 T (20 hidden + 6 ffn + 2 heads T) bytes a layer.

    Raises
    ------
    ValueError, TypeError, KeyError
        As :func:`~bitnet_ref.reference.model.forward`.
    """
    tensors: dict[str, np.ndarray] = {}
    matrices: dict[str, dict[str, Any]] = {}
    product: list[tuple[np.ndarray, np.ndarray, Any]] = []

    def note(name: str, array: np.ndarray) -> None:
        if product:
            x_q, x_scale, (w, w_scale) = product.pop()
            if name.endswith(_READERS):
                tensors[f"{name}.x_scale"], tensors[f"{name}.x_q"] = x_scale, x_q
            matrices[name] = _describe(w.unpack() if isinstance(w, PackedTernary) else w, w_scale)
        tensors[name] = np.array(array)

    network.run(tokens, trace=note, matrix=lambda *parts: product.append(parts))
    model: dict[str, Any] = {"name": network.name, "format": network.form}
    model["sha256"] = hashlib.sha256(json.dumps(matrices, sort_keys=True).encode()).hexdigest()
    from bitnet_ref import __version__

    return Trace(
        tensors=tensors,
        tokens=tuple(int(token) for token in tokens),
        config=network.config,
        model=model,
        matrices=matrices,
        complete=True,
        program=f"bitnet_ref {__version__}",
        types={name: "I8" if array.dtype == np.int8 else "F32" for name, array in tensors.items()},
    )


def save_trace(trace: Trace, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a trace, under a temporary name that becomes `path` when it is complete.

    Raises
    ------
    FileExistsError
        If path is there and overwrite is False.
    FileNotFoundError
        If its folder is not.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of the output must exist, {path.parent} does not")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there; replacing it must be asked for (overwrite, --overwrite)")
    metadata = {
        "format": TRACE_FORMAT,
        "version": TRACE_VERSION,
        "tokens": json.dumps(trace.tokens),
        "program": trace.program,
        "model": json.dumps(trace.model),
        "matrices": json.dumps(trace.matrices),
        "complete": "yes" if trace.complete else "no",
    }
    if trace.config is not None:
        metadata["config"] = json.dumps(dataclasses.asdict(trace.config))
    temporary = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in trace.tensors.items()}, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace, of this program or of another one.

    Float tensors of any type become float32; a leading axis of one (a batch) is not removed.

    Raises
    ------
    FormatError
        If the file is not a trace of this version, or not a valid one.
    """
    path = Path(path)
    opened = open_tensor_file(path)
    metadata = _metadata(path) if opened.format == "safetensors" else {}
    if metadata.get("format") != TRACE_FORMAT or metadata.get("version") != TRACE_VERSION:
        raise FormatError(
            f"{path}: a trace must be a safetensors file with metadata format {TRACE_FORMAT} and version "
            f"{TRACE_VERSION}, got {opened.format} with {metadata.get('format')!r} and {metadata.get('version')!r}"
        )
    tensors: dict[str, np.ndarray] = {}
    for tensor in opened.tensors:
        if tensor.name.endswith(".x_q"):
            if tensor.type != "I8":
                raise FormatError(f"{path}: tensor {tensor.name} must be I8, got {tensor.type}")
            tensors[tensor.name] = map_bytes(tensor).view(np.int8).reshape(tensor.shape)
        elif tensor.is_float:
            tensors[tensor.name] = tensor.to_float32()
        else:
            raise FormatError(f"{path}: tensor {tensor.name} must be of a float type, got {tensor.type}")

    def part(key: str) -> dict[str, Any]:
        return load_json_object(path, metadata[key]) if key in metadata else {}

    tokens = load_json_object(path, f'{{"tokens": {metadata.get("tokens", "null")}}}').get("tokens")
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise FormatError(f"{path}: metadata tokens must be a JSON list of integers")
    matrices = part("matrices")
    if not all(map(_is_matrix, matrices.values())):
        raise FormatError(f"{path}: metadata matrices must give scale, counts and sha256 of each")
    return Trace(
        tensors=tensors,
        tokens=tuple(tokens),
        config=_config(path, part("config")) if "config" in metadata else None,
        model=part("model"),
        matrices=matrices,
        complete=metadata.get("complete") == "yes",
        program=metadata.get("program", ""),
        types={tensor.name: tensor.type for tensor in opened.tensors},
    )


def _describe(w_q: np.ndarray, w_scale: np.float32) -> dict[str, Any]:
    counts = [int(np.count_nonzero(w_q == value)) for value in (-1, 0, 1)]
    return {
        "scale": float(w_scale),
        "counts": counts,
        "sha256": hashlib.sha256(np.ascontiguousarray(w_q).data).hexdigest(),
    }


def _is_matrix(value: Any) -> bool:
    if not (isinstance(value, dict) and isinstance(value.get("sha256"), str)):
        return False
    scale, counts = value.get("scale"), value.get("counts")
    return (
        type(scale) in (int, float)
        and isinstance(counts, list)
        and len(counts) == 3
        and all(type(count) is int and count >= 0 for count in counts)
    )


def _metadata(path: Path) -> dict[str, str]:
    """The metadata that ``open_tensor_file`` has checked and shortened, complete."""
    try:
        with safe_open(path, framework="np") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: the safetensors header must be valid: {error}") from error


def _config(path: Path, values: dict[str, Any]) -> ModelConfig:
    try:
        if isinstance(values.get("rope_scaling"), dict):
            values["rope_scaling"] = Llama3Scaling(**values["rope_scaling"])
        if isinstance(values.get("sliding_layers"), list):
            values["sliding_layers"] = tuple(values["sliding_layers"])
        return ModelConfig(**values)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: metadata config must hold the fields of a ModelConfig: {error}") from error
