"""Which file do I have? What a path holds, and what decides it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitnet_ref.formats.checkpoint import is_linear, load_json_object
from bitnet_ref.formats.gguf_file import read_gguf_metadata
from bitnet_ref.formats.gguf_names import tensor_from_gguf
from bitnet_ref.formats.hf import scale_convention
from bitnet_ref.formats.i2s_layout import detect_i2s_layout
from bitnet_ref.formats.packed import is_packed
from bitnet_ref.formats.tensors import open_tensor_file

__all__ = ["FileKind", "detect"]


@dataclass(frozen=True)
class FileKind:
    """What a path holds.

    Attributes
    ----------
    format : "gguf", "packed", "hf" or "safetensors"
    summary : str
    details : tuple of str
        Layout, scale convention and so on, each with its reason.
    """

    format: str
    summary: str
    details: tuple[str, ...]


def detect(path: str | Path) -> FileKind:
    """Say which kind of file or folder this is, and what decides it.

    Raises
    ------
    FormatError
        If it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        config = load_json_object(path / "config.json")
        convention = scale_convention(config)
        if convention is None:
            detail = "no quantization_config of BitNet: float weights, or packed ones of unknown scale convention"
        else:
            verb = "multiplies" if convention == "multiply" else "divides"
            detail = f"where weights are packed, weight_scale {verb} (quantization_config)"
        return FileKind("hf", f"Hugging Face folder of a {config.get('model_type')} model", (detail,))
    opened = open_tensor_file(path)
    if is_packed(opened):
        scheme = opened.metadata.get("scheme")
        return FileKind("packed", f"bitnet_ref packed form, scheme {scheme}", ("layout stated in the file",))
    if opened.format == "safetensors":
        return FileKind(
            "safetensors", "one safetensors file", ("convert its folder, which has the config.json that it needs",)
        )
    metadata = read_gguf_metadata(path)
    types = sorted({t.type for t in opened.tensors if is_linear(tensor_from_gguf(t.name) or "")})
    details = [f"linear layers of type {', '.join(types)}"] if types else []
    if "I2_S" in types:
        verdict = detect_i2s_layout(opened, metadata)
        details.append(f"I2_S layout: {verdict.layout or 'cannot tell'} ({verdict.certainty}): {verdict.why}")
    summary = f"{opened.format}, architecture {metadata.get('general.architecture')}"
    return FileKind("gguf", summary, tuple(details))
