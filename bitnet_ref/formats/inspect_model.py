"""What a whole checkpoint holds: its network, zeros of every layer, and where each byte of its files goes.

Beside the tensors as they are stored (:mod:`bitnet_ref.formats.inspect`) this reads them as a model: packed matrices
show their integers, whatever the form.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ref.errors import FormatError
from bitnet_ref.formats.checkpoint import TernaryTensor, is_linear
from bitnet_ref.formats.convert import open_checkpoint
from bitnet_ref.formats.gguf_names import tensor_from_gguf
from bitnet_ref.formats.hf import weight_files
from bitnet_ref.formats.inspect import Progress, TensorReport, json_safe, tensor_report
from bitnet_ref.formats.packed import ASSET_PREFIX
from bitnet_ref.formats.tensors import StoredTensor, open_tensor_file
from bitnet_ref.reference.quantize import ternary_statistics

__all__ = ["AccountPart", "LayerReport", "ModelReport", "inspect_model"]

PARTS = (
    "ternary matrices",
    "float matrices",
    "scales",
    "norms and biases",
    "embedding",
    "head",
    "other tensors",
    "headers and vocabulary",
)
"""Parts of an account, in its order. The last holds all bytes in no tensor, and the files beside the weights."""

_I2S_TRAILER_BYTES = 32  # one float32 scale and padding behind the integers of a matrix


@dataclass(frozen=True)
class AccountPart:
    """One part of the bytes of a checkpoint: `stored_bytes` for `n_weights` weights."""

    name: str
    stored_bytes: int
    n_weights: int


@dataclass(frozen=True)
class LayerReport:
    """The ternary matrices of one decoder layer together."""

    layer: int
    n_weights: int
    n_zeros: int

    @property
    def fraction_zeros(self) -> float:
        """Share of zeros."""
        return self.n_zeros / self.n_weights


@dataclass(frozen=True)
class ModelReport:
    """What ``inspect_model`` found. `account` sums to `file_bytes`, the size of all files of the checkpoint."""

    path: str
    format: str
    file_bytes: int
    config: dict[str, Any]
    tied_head: bool
    tensors: tuple[TensorReport, ...]
    layers: tuple[LayerReport, ...]
    account: tuple[AccountPart, ...]
    notes: tuple[str, ...]

    @property
    def n_ternary(self) -> int:
        """Ternary weights of all matrices."""
        return sum(layer.n_weights for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-safe values."""
        result = asdict(self)
        result["layers"] = [{**asdict(layer), "fraction_zeros": layer.fraction_zeros} for layer in self.layers]
        return json_safe(result)


def inspect_model(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    convention: str | None = None,
    progress: Progress | None = None,
) -> ModelReport:
    """Report the network, the tensors, the zeros of each layer and the bytes of a checkpoint.

    Parameters
    ----------
    path : Hugging Face folder, GGUF file, or packed file
    layout, convention : as in :func:`bitnet_ref.formats.open_checkpoint`
    progress : called after each tensor

    Returns
    -------
    ModelReport

    Raises
    ------
    FormatError
        If it cannot be read, or what it holds cannot be told with the options given.
    ValueError
        If an option does not belong to this kind of file.
    """
    path = Path(path)
    checkpoint = open_checkpoint(path, layout=layout, convention=convention)
    files = weight_files(path) if path.is_dir() else [path]
    beside = [path / name for name in ("config.json", *checkpoint.assets)] if path.is_dir() else []
    opened = [open_tensor_file(file) for file in files]
    sizes = {part: [0, 0] for part in PARTS}
    rows: list[TensorReport] = []
    zeros: dict[int, list[int]] = {}
    stored = [tensor for file in opened for tensor in file.tensors]
    is_gguf = opened[0].format.startswith("GGUF")
    for done, tensor in enumerate(stored, 1):
        if not tensor.name.startswith(ASSET_PREFIX):
            name = (tensor_from_gguf(tensor.name) if is_gguf else tensor.name) or tensor.name
            entry = checkpoint.entries.get(name)
            ternary = entry.load() if entry is not None and entry.ternary else None
            if isinstance(ternary, TernaryTensor):
                row = _ternary_row(tensor, ternary)
                count = zeros.setdefault(int(re.search(r"layers\.(\d+)\.", name)[1]), [0, 0])  # type: ignore[index]
                count[0] += row.n_weights
                count[1] += row.n_weights - int(np.count_nonzero(ternary.w_q))
            else:
                row = tensor_report(tensor)
            rows.append(row)
            _add(sizes, name, tensor, row)
        if progress is not None:
            progress(done, len(stored), tensor.name)
    file_bytes = sum(file.file_bytes for file in opened) + sum(f.stat().st_size for f in beside if f.is_file())
    sizes["headers and vocabulary"][0] = file_bytes - sum(n_bytes for n_bytes, _ in sizes.values())
    tied = "lm_head.weight" not in checkpoint.entries
    return ModelReport(
        path=str(path),
        format=checkpoint.format,
        file_bytes=file_bytes,
        config=checkpoint.config,
        tied_head=tied,
        tensors=tuple(rows),
        layers=tuple(LayerReport(layer, *count) for layer, count in sorted(zeros.items())),
        account=tuple(AccountPart(part, *size) for part, size in sizes.items() if size[0]),
        notes=checkpoint.notes,
    )


def _ternary_row(tensor: StoredTensor, ternary: TernaryTensor) -> TensorReport:
    """A stored matrix with the integers that it stands for."""
    statistics = ternary_statistics(ternary.w_q.astype(np.float32))
    return replace(
        TensorReport(tensor.name, ternary.shape, tensor.type, tensor.stored_bytes, "linear", False),
        scale=float(ternary.w_scale),
        fraction_zeros=float(statistics.fraction_zeros),
        entropy_bits=float(statistics.entropy_bits),
        relative_error=0.0,
        already_ternary=True,
    )


def _add(sizes: dict[str, list[int]], name: str, tensor: StoredTensor, row: TensorReport) -> None:
    """Count the bytes of a tensor to its part."""
    trailer = 0
    if name.endswith((".weight_scale", ".scale")):
        part = "scales"
    elif is_linear(name):
        part = "ternary matrices" if row.already_ternary else "float matrices"
        trailer = _I2S_TRAILER_BYTES if tensor.type == "I2_S" else 0
    elif name in ("model.embed_tokens.weight", "lm_head.weight"):
        part = "head" if name == "lm_head.weight" else "embedding"
    elif len(tensor.shape) == 1 and (name.endswith(".bias") or "norm" in name or "_ln" in name):
        part = "norms and biases"
    else:
        part = "other tensors"
    sizes[part][0] += tensor.stored_bytes - trailer
    sizes[part][1] += row.n_weights
    sizes["scales"][0] += trailer
    sizes["scales"][1] += trailer > 0
    if tensor.stored_bytes < trailer:
        raise FormatError(f"tensor {tensor.name} must have a trailer of {trailer} bytes, it has {tensor.stored_bytes}")
