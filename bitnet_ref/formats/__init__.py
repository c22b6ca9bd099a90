"""Files of other programs: what tensors they hold and what ternarisation would do to them.

``tensors`` opens a safetensors or GGUF file and hands out its tensors one at a time; ``inspect`` makes the report and
the weight distribution from them. A file that cannot be read raises ``bitnet_ref.errors.FormatError``, one sentence.
"""

from __future__ import annotations

from bitnet_ref.formats.inspect import (
    FileReport,
    LayerHistogram,
    TensorReport,
    WeightDistribution,
    inspect_file,
    weight_distribution,
)
from bitnet_ref.formats.tensors import StoredTensor, TensorFile, open_tensor_file

__all__ = [
    "FileReport",
    "LayerHistogram",
    "StoredTensor",
    "TensorFile",
    "TensorReport",
    "WeightDistribution",
    "inspect_file",
    "open_tensor_file",
    "weight_distribution",
]
