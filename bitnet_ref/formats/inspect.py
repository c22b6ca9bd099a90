"""What a weight file holds, and what absmean ternarisation would make of its matrices.

Nothing here changes or converts a file. The figures are those of rounding each matrix as it is stored, by
``reference.quantize``; they say nothing about a model that is then trained further.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bitnet_ref.formats.tensors import StoredTensor, TensorFile, open_tensor_file
from bitnet_ref.reference.quantize import ternary_statistics

__all__ = [
    "FileReport",
    "LayerHistogram",
    "Progress",
    "TensorReport",
    "WeightDistribution",
    "inspect_file",
    "json_safe",
    "tensor_report",
    "weight_distribution",
]

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, name)`` after each tensor, in tensors."""

# The fraction of zeros of n random weights has a standard error of about 0.46 / sqrt(n): 1.4 points at this size.
_MIN_WEIGHTS = 1024

# Words of the usual names: GGUF, Hugging Face, GPT-2, original Llama.
_EMBEDDING = re.compile(r"embd|embed(?!_out)|(^|\.)(wte|wpe)(\.|$)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)(\.|$)|^output\.weight$")

_HISTOGRAM_LIMIT = 4.0  # in units of mean|w|; a Gaussian has 0.14 % of its weights beyond


@dataclass(frozen=True)
class TensorReport:
    """One row of the report.

    ``role`` is "linear", "embedding" or "head" for a matrix (told by its name) and "other" for anything else. The four
    figures of ternarisation are None unless the tensor is a float matrix of at least 1,024 weights, all finite;
    ``note`` says why. A matrix is ``already_ternary`` if its non-zeros all have one magnitude, which is then ``scale``.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    stored_bytes: int
    role: str
    dequantised: bool
    scale: float | None = None
    fraction_zeros: float | None = None
    entropy_bits: float | None = None
    relative_error: float | None = None
    already_ternary: bool = False
    n_non_finite: int = 0
    note: str = ""

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileReport:
    """What ``inspect_file`` found: the header, one row per tensor in file order, and remarks on the whole."""

    path: str
    format: str
    file_bytes: int
    metadata: dict[str, Any]
    tensors: tuple[TensorReport, ...]

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Number of tensors, weights and stored bytes for each type, the largest first."""
        result: dict[str, dict[str, int]] = {}
        for t in self.tensors:
            row = result.setdefault(t.type, {"tensors": 0, "weights": 0, "stored_bytes": 0})
            row["tensors"] += 1
            row["weights"] += t.n_weights
            row["stored_bytes"] += t.stored_bytes
        return dict(sorted(result.items(), key=lambda item: -item[1]["stored_bytes"]))

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that must stand beside the figures."""
        notes = []
        quantised = sorted({t.type for t in self.tensors if t.dequantised and t.scale is not None})
        if quantised:
            notes.append(
                f"Matrices of type {', '.join(quantised)} are dequantised: their figures describe those values, not "
                "the original weights."
            )
        if any(t.type.startswith("F8_") and t.scale is not None for t in self.tensors):
            notes.append("8-bit floats are read as stored, without the scales that the file may keep in other tensors.")
        if damaged := [t for t in self.tensors if t.n_non_finite]:
            notes.append(
                f"{len(damaged)} of {len(self.tensors)} tensors hold NaN or infinity, first: {damaged[0].name}"
            )
        return tuple(notes)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-safe values: numbers that are NaN or infinite become None."""
        result = asdict(self)
        result["totals"] = self.totals
        result["notes"] = self.notes
        return json_safe(result)


@dataclass(frozen=True)
class LayerHistogram:
    """Counts of w / scale for one linear layer; ``counts`` belong to the edges of the whole distribution."""

    name: str
    shape: tuple[int, ...]
    scale: float
    fraction_zeros: float
    counts: np.ndarray
    n_outside: int


@dataclass(frozen=True)
class WeightDistribution:
    """Histograms of w / scale over the linear layers of a file; scale is mean|w|, at least 1e-5, for each layer.

    Weights between -0.5 and 0.5 become zero. ``edges`` has one value more than ``counts``, which is the sum over
    ``layers``; ``n_outside`` counts the weights beyond the edges. ``dequantised_from`` names the quantised types among
    the layers, empty if all are stored as floats. ``skipped`` names layers that are all zero or hold NaN or infinity.
    """

    path: str
    edges: np.ndarray
    counts: np.ndarray
    n_outside: int
    layers: tuple[LayerHistogram, ...]
    dequantised_from: tuple[str, ...]
    skipped: tuple[str, ...]

    @property
    def fraction_zeros(self) -> float:
        """Share of zeros over all layers together, each layer with its own scale."""
        n_weights = [math.prod(layer.shape) for layer in self.layers]
        return sum(n * layer.fraction_zeros for n, layer in zip(n_weights, self.layers, strict=True)) / sum(n_weights)


def inspect_file(path: str | os.PathLike[str], progress: Progress | None = None) -> FileReport:
    """Report what a safetensors or GGUF file holds and what ternarisation would make of it.

    Parameters
    ----------
    path : path of the file; the format is told by its content
    progress : called after each tensor

    Returns
    -------
    FileReport

    Raises
    ------
    FormatError
        If the file cannot be read.

    Notes
    -----
    Tensors are read one after the other, so memory is a few times the largest matrix in float32. A stack of matrices
    (the experts of a mixture) is listed and not analysed: each expert has a scale of its own.
    """
    opened = open_tensor_file(path)
    rows = []
    for i, tensor in enumerate(opened.tensors):
        rows.append(tensor_report(tensor))
        if progress is not None:
            progress(i + 1, len(opened.tensors), tensor.name)
    return FileReport(str(opened.path), opened.format, opened.file_bytes, opened.metadata, tuple(rows))


def weight_distribution(
    path: str | os.PathLike[str], bins: int = 160, progress: Progress | None = None
) -> WeightDistribution:
    """Histogram w / mean|w| over [-4, 4], for each linear layer of a file and for all together.

    Parameters
    ----------
    path : path of a safetensors or GGUF file
    bins : number of equal bins; a multiple of 16 puts edges on -0.5 and 0.5
    progress : called after each tensor

    Raises
    ------
    ValueError
        If bins is not positive, or the file has no float matrix that is a linear layer of finite weights.
    FormatError
        If the file cannot be read.
    """
    if bins < 1:
        raise ValueError(f"bins must be positive, got {bins}")
    opened = open_tensor_file(path)
    layers = []
    skipped = []
    quantised = set()
    for tensor, w in _linear_layers(opened, progress):
        if _count_non_finite(w) or not w.any():
            skipped.append(tensor.name)
            continue
        statistics = ternary_statistics(w)
        scale = float(statistics.scale)
        counts, _ = np.histogram(w, bins=bins, range=(-_HISTOGRAM_LIMIT * scale, _HISTOGRAM_LIMIT * scale))
        layers.append(
            LayerHistogram(
                name=tensor.name,
                shape=tensor.shape,
                scale=scale,
                fraction_zeros=float(statistics.fraction_zeros),
                counts=counts,
                n_outside=w.size - int(counts.sum()),
            )
        )
        if tensor.dequantised:
            quantised.add(tensor.type)
    if not layers:
        raise ValueError(f"{path}: a weight distribution needs a float matrix that is a linear layer, found none")
    return WeightDistribution(
        path=str(opened.path),
        edges=np.linspace(-_HISTOGRAM_LIMIT, _HISTOGRAM_LIMIT, bins + 1),
        counts=np.sum([layer.counts for layer in layers], axis=0),
        n_outside=sum(layer.n_outside for layer in layers),
        layers=tuple(layers),
        dequantised_from=tuple(sorted(quantised)),
        skipped=tuple(skipped),
    )


def _linear_layers(opened: TensorFile, progress: Progress | None) -> Iterator[tuple[StoredTensor, np.ndarray]]:
    """The linear layers of a file with their weights, one in memory at a time."""
    for i, tensor in enumerate(opened.tensors):
        if _role(tensor) == "linear" and tensor.is_float and tensor.n_weights >= _MIN_WEIGHTS:
            yield tensor, tensor.to_float32()
        if progress is not None:
            progress(i + 1, len(opened.tensors), tensor.name)


def _role(tensor: StoredTensor) -> str:
    if len(tensor.shape) != 2:
        return "other"
    if _EMBEDDING.search(tensor.name):
        return "embedding"
    return "head" if _HEAD.search(tensor.name) else "linear"


def _row(tensor: StoredTensor) -> TensorReport:
    """The row of a tensor without the figures of ternarisation."""
    note = f"dequantised from {tensor.type}, not the original weights" if tensor.dequantised else ""
    return TensorReport(
        tensor.name, tensor.shape, tensor.type, tensor.stored_bytes, _role(tensor), tensor.dequantised, note=note
    )


def tensor_report(tensor: StoredTensor) -> TensorReport:
    """The row of one tensor, read as it is stored."""
    row = _row(tensor)
    if len(tensor.shape) == 3:
        return replace(row, note=f"stack of {tensor.shape[0]:,} matrices, not a matrix")
    if len(tensor.shape) != 2:
        return replace(row, note="not a matrix")
    if not tensor.is_float:
        return replace(row, note=f"{tensor.type} is not a float type")
    if tensor.n_weights < _MIN_WEIGHTS:
        return replace(row, note=f"fewer than {_MIN_WEIGHTS:,} weights")
    return _ternary_figures(row, tensor.to_float32())


def _ternary_figures(row: TensorReport, w: np.ndarray) -> TensorReport:
    """Add to a row what absmean ternarisation gives for w, float32 (M, K), or that it cannot be applied."""
    if n_non_finite := _count_non_finite(w):
        return replace(row, n_non_finite=n_non_finite, note=f"{n_non_finite:,} weights are NaN or infinite")
    magnitude = _single_magnitude(w)
    # The scale of a ternary matrix is its magnitude, known exactly; absmean would take the mean over the zeros as well.
    statistics = ternary_statistics(w if magnitude is None else w / np.float32(magnitude))
    return replace(
        row,
        scale=float(statistics.scale) if magnitude is None else magnitude,
        fraction_zeros=float(statistics.fraction_zeros),
        entropy_bits=float(statistics.entropy_bits),
        relative_error=float(statistics.relative_error) if magnitude is None else 0.0,
        already_ternary=magnitude is not None,
    )


def _count_non_finite(w: np.ndarray) -> int:
    return w.size - int(np.count_nonzero(np.isfinite(w)))


def _single_magnitude(w: np.ndarray) -> float | None:
    """The magnitude of all non-zeros of w if they have only one, else None; None also for an all-zero matrix."""
    magnitudes = np.abs(w)
    largest = magnitudes.max()
    ternary = largest > 0 and bool(np.all((magnitudes == largest) | (magnitudes == 0)))
    return float(largest) if ternary else None


def json_safe(value: Any) -> Any:
    """The same value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
