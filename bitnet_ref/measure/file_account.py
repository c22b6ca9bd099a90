"""Where the bytes of real files go, beside the figure that the paper prints for 2B4T.

Bytes of files are *measured*; what a model of the same shapes would take at log2(3) bits is *modelled*; "0.4 GB" is
*quoted* from [2B4T, Table 1].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitnet_ref.formats import ModelReport, convert, inspect_model
from bitnet_ref.measure.architectures import BITNET_2B4T
from bitnet_ref.measure.memory import IDEAL_BITS, PUBLISHED_NON_EMBEDDING_GB, account

__all__ = ["account_beside_paper", "form_rows", "model_form_rows"]

FORMS = (
    ("packed base3", "packed", {"scheme": "base3"}, "base3"),
    ("packed tl2", "packed", {"scheme": "tl2"}, "tl2"),
    ("packed i2", "packed", {"scheme": "i2"}, "i2"),
    ("packed tl1", "packed", {"scheme": "tl1"}, "tl1"),
    ("GGUF TQ1_0", "gguf-tq1_0", {}, "TQ1_0"),
    ("GGUF TQ2_0", "gguf-tq2_0", {}, "TQ2_0"),
    ("GGUF I2_S", "gguf-i2_s", {}, "I2_S"),
)
"""Name, target of ``convert``, its options, and the layout in the account of shapes."""

EMBEDDINGS = {"f16": "f16", "q8_0": "q8_0", "q6_k": "q6_K"}
"""Type as an option of ``convert`` -> its name in the account of shapes."""


def account_beside_paper(report: ModelReport) -> list[dict[str, Any]]:
    """The parts of a checkpoint, their sum, and what the paper's way of counting makes of the same model.

    Returns
    -------
    list of dict
        part, bytes, weights, kind, source.
    """
    rows = [
        {"part": p.name, "bytes": p.stored_bytes, "weights": p.n_weights, "kind": "measured", "source": "the files"}
        for p in report.account
    ]
    rows.append({"part": "all files", "bytes": report.file_bytes, "weights": 0, "kind": "measured", "source": "files"})
    if report.n_ternary:
        rows.append(
            {
                "part": "as the paper counts: ternary matrices at log2(3) bits",
                "bytes": round(report.n_ternary * IDEAL_BITS / 8),
                "weights": report.n_ternary,
                "kind": "modelled",
                "source": "log2(3) bits a weight, nothing else",
            }
        )
    rows.append(
        {
            "part": "printed for BitNet b1.58 2B4T (2.08e9 ternary weights), without embedding",
            "bytes": round(PUBLISHED_NON_EMBEDDING_GB[BITNET_2B4T.name] * 1e9),
            "weights": 0,
            "kind": "quoted",
            "source": "[2B4T, Table 1]",
        }
    )
    return rows


def model_form_rows() -> list[dict[str, Any]]:
    """A 2B4T-size model in every form that ``convert`` writes and three types of embedding, from shapes alone.

    Headers and vocabulary (some MB) are not in it.
    """
    rows = []
    for form, _, _, body in FORMS:
        for embedding in EMBEDDINGS.values():
            done = account(BITNET_2B4T, body, embedding)
            rows.append(
                {
                    "model": BITNET_2B4T.name,
                    "form": form,
                    "embedding": embedding,
                    "matrices_bytes": done.part_bytes("body"),
                    "small_bytes": done.part_bytes("scales", "norms", "biases"),
                    "embedding_bytes": done.head_bytes,
                    "header_bytes": None,
                    "total_bytes": done.total_bytes,
                    "kind": "modelled",
                    "source": "shapes of BitNet b1.58 2B4T times the bytes of each layout",
                }
            )
    return rows


def form_rows(model: Path, folder: Path) -> list[dict[str, Any]]:
    """Write a model in every form into a folder and account for the files.

    Parameters
    ----------
    model : Path
        Any checkpoint that :func:`bitnet_ref.formats.convert` reads and every form can hold.
    folder : Path
        Where the files go; they stay there.

    Returns
    -------
    list of dict
        As `model_form_rows`, of files: ``header_bytes`` holds all that is in no tensor.
    """
    rows = []
    for form, target, options, _ in FORMS:
        for embedding in EMBEDDINGS:
            path = folder / f"{form}-{embedding}".replace(" ", "-")
            convert(model, path, target, embedding=embedding, **options)
            found = inspect_model(path)
            parts = {part.name: part.stored_bytes for part in found.account}
            rows.append(
                {
                    "model": model.stem,
                    "form": form,
                    "embedding": EMBEDDINGS[embedding],
                    "matrices_bytes": parts["ternary matrices"],
                    "small_bytes": parts.get("scales", 0) + parts["norms and biases"] + parts.get("other tensors", 0),
                    "embedding_bytes": parts["embedding"] + parts.get("head", 0),
                    "header_bytes": parts["headers and vocabulary"],
                    "total_bytes": found.file_bytes,
                    "kind": "measured",
                    "source": f"{model.name}, written in each form in this run",
                }
            )
    return rows
