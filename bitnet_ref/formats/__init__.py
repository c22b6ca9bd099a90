"""Files of other programs and our own: read, described, converted.

``tensors`` opens a safetensors or GGUF file and hands out its tensors one at a time; ``inspect`` reports what they hold
and what ternarisation would make of them. ``checkpoint`` is the model in them, whatever the file: ``open_checkpoint``
reads a Hugging Face folder (``hf``), a GGUF file (``gguf_file``) or our packed form (``packed``); ``convert`` writes
them; ``detect`` says which one a file is. The bit layouts have a module each: ``i2s``, ``ternary_gguf``, ``hf``,
``float_types``. A file that cannot be read raises ``bitnet_ref.errors.FormatError``, one sentence.
"""

from __future__ import annotations

from bitnet_ref.formats.checkpoint import Checkpoint, Entry, FloatTensor, TernaryTensor
from bitnet_ref.formats.convert import TARGETS, ConversionReport, convert, open_checkpoint
from bitnet_ref.formats.detect import FileKind, detect
from bitnet_ref.formats.gguf_file import read_gguf_metadata
from bitnet_ref.formats.i2s_layout import LayoutVerdict, detect_i2s_layout
from bitnet_ref.formats.inspect import (
    FileReport,
    LayerHistogram,
    TensorReport,
    WeightDistribution,
    inspect_file,
    weight_distribution,
)
from bitnet_ref.formats.inspect_model import ModelReport, inspect_model
from bitnet_ref.formats.tensors import StoredTensor, TensorFile, open_tensor_file

__all__ = [
    "TARGETS",
    "Checkpoint",
    "ConversionReport",
    "Entry",
    "FileKind",
    "FileReport",
    "FloatTensor",
    "LayerHistogram",
    "LayoutVerdict",
    "ModelReport",
    "StoredTensor",
    "TensorFile",
    "TensorReport",
    "TernaryTensor",
    "WeightDistribution",
    "convert",
    "detect",
    "detect_i2s_layout",
    "inspect_file",
    "inspect_model",
    "open_checkpoint",
    "open_tensor_file",
    "read_gguf_metadata",
    "weight_distribution",
]
