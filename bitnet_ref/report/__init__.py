"""The paper report: measure, draw, and write one self-contained page.

    collect(...)  -> results          everything shown, plain values, each row with its kind and source
    write(results, out)               figures/*.png and *.pdf, results.json, report.html
    build(out, ...)                   both

Nothing in the page is typed in by hand that a table of the results could say: the figures, the summary and the tables
are made from ``results.json`` and can be made again from it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bitnet_ref.paper_figures import FIGURES
from bitnet_ref.report.collect import Progress, check_directory, collect
from bitnet_ref.report.html import figures_of, render

__all__ = ["Progress", "build", "collect", "write"]


def build(out: Path, *, quick: bool, weights: Path | None, command: str, progress: Progress | None = None) -> Path:
    """Measure this machine and write the report.

    Parameters
    ----------
    out : Path
        Directory of the report; made if it does not exist.
    quick : bool
        Fewer shapes and kernels, under a minute.
    weights : Path, optional
        A safetensors or GGUF file whose weights the report shows.
    command : str
        What was run, for the record.
    progress : callable(label, fraction done), optional

    Returns
    -------
    Path
        The page, ``out/report.html``.

    Raises
    ------
    BitnetRefError
        If the directory cannot be written, the weight file cannot be read, or a kernel gives a wrong result.
    ValueError
        If the weight file has no linear layer.
    """
    check_directory(out)
    results = collect(quick=quick, weights=weights, command=command, progress=progress)
    if progress:
        progress("drawing", 0.92)
    page = write(results, out)
    if progress:
        progress("report written", 1.0)
    return page


def write(results: dict[str, Any], out: Path) -> Path:
    """Draw the figures and write results, figures and page; return the path of the page.

    All files are made in a directory beside their places and moved there when the last one is done, so a failure leaves
    what was there before. Figures of an older report that this one has not are removed.

    Raises
    ------
    ValueError
        If a number in the results is NaN or infinite.
    """
    check_directory(out)
    new = Path(tempfile.mkdtemp(prefix=".report-", dir=out))
    try:
        (new / "results.json").write_text(json.dumps(results, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        (new / "figures").mkdir()
        figures = figures_of(results, new / "figures")
        (new / "report.html").write_text(render(results, figures), encoding="utf-8")
        (out / "figures").mkdir(exist_ok=True)
        _remove_old_figures(out / "figures", keep={path.name for path in (new / "figures").iterdir()})
        for path in (new / "figures").iterdir():
            os.replace(path, out / "figures" / path.name)
        for name in ("results.json", "report.html"):
            os.replace(new / name, out / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return out / "report.html"


def _remove_old_figures(folder: Path, keep: set[str]) -> None:
    for name in FIGURES:
        for suffix in (".png", ".pdf"):
            if name + suffix not in keep:
                (folder / (name + suffix)).unlink(missing_ok=True)
