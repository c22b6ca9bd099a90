"""Ratios between rows of a benchmark: only of like things.

Two speeds have a ratio where the same work was done under the same conditions in the same run. :func:`ratio` is the one
place that divides; it raises a sentence where anything differs that the ratio is not about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitnet_ref.errors import BitnetRefError

__all__ = ["LIKE", "UnlikeError", "ratio"]

LIKE = {
    "kernels": ("run", "op", "m", "k", "tokens", "threads"),
    "model": ("run", "model", "network", "head", "cache", "n_prompt", "n_generate", "batch", "threads"),
}
"""What must be equal, by the kind of benchmark."""

_BEFORE = {"network": "dense"}
"""What rows of results are that were written before there was anything else."""

_WORDS = {
    "run": "run",
    "op": "operation",
    "m": "number of outputs",
    "k": "number of inputs",
    "tokens": "batch (tokens)",
    "threads": "number of threads",
    "model": "model",
    "network": "network (dense or sparse)",
    "head": "type of embedding and head",
    "cache": "type of keys and values",
    "n_prompt": "prompt length",
    "n_generate": "number of generated tokens",
    "batch": "batch",
}


class UnlikeError(BitnetRefError, ValueError):
    """A ratio was asked for between things that are not alike."""


def ratio(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    column: str,
    *,
    kind: str = "kernels",
    but: tuple[str, ...] = (),
) -> float:
    """``ours[column] / theirs[column]``, if the two rows tell of the same work.

    Parameters
    ----------
    ours, theirs : mapping
        Rows of one result.
    column : str
        A rate: larger is better.
    kind : {"kernels", "model"}
    but : tuple of str
        What the ratio is about, and may differ: ``("threads",)`` for scaling.

    Raises
    ------
    UnlikeError
        If anything else of :data:`LIKE` differs or is unknown, or a row was not verified.
    """
    names = " and ".join(_name(row) for row in (ours, theirs))
    for key in LIKE[kind]:
        if key in but:
            continue
        mine, other = (row.get(key, _BEFORE.get(key)) for row in (ours, theirs))
        if mine is None or other is None:
            raise UnlikeError(f"a ratio needs the {_WORDS[key]} of both rows, which is unknown here: {names}")
        if mine != other:
            raise UnlikeError(f"a ratio needs the same {_WORDS[key]} on both sides, got {mine} and {other}: {names}")
    for row in (ours, theirs):
        if row.get("verified") is not True:
            raise UnlikeError(f"a ratio needs results that were verified, got an unverified row: {_name(row)}")
        if row.get(column) is None:
            raise UnlikeError(f"a ratio of {column} needs both figures, {_name(row)} has none")
    return ours[column] / theirs[column]


def _name(row: Mapping[str, Any]) -> str:
    return f"{row.get('program', '?')} {row.get('type', '?')}"
