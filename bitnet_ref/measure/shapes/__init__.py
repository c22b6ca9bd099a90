"""Lists of layer shapes to time, as data: JSON files of ``{"name", "m", "k"}``, named after models."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

__all__ = ["load_shapes", "shape_lists"]


def shape_lists() -> tuple[str, ...]:
    """Names of the lists that come with the package."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def load_shapes(name: str) -> list[tuple[int, int]]:
    """(M, K) of every shape of a list.

    Parameters
    ----------
    name : str
        One of :func:`shape_lists`, or the path of such a file.

    Raises
    ------
    ValueError
        If there is no such list, or the file is no list of shapes.
    """
    if name in shape_lists():
        text = resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(f"shapes must be {', '.join(shape_lists())} or the path of a JSON file, got {name!r}")
    try:
        found = [(entry["m"], entry["k"]) for entry in json.loads(text)]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{name}: shapes are a JSON list of {{"name": ..., "m": ..., "k": ...}}: {error}') from None
    if not found or not all(isinstance(n, int) and n >= 1 for shape in found for n in shape):
        raise ValueError(f"{name}: a list of shapes needs at least one, each with whole m and k of at least 1")
    return found
