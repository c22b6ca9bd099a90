"""Figures of the report, one module each. A figure reads results and nothing else: nothing is timed or computed here
that is not a sum, a difference or a ratio of what stands in the results.

Every figure module has

- ``SECTION``, the key of the results that it needs, and the section of the report that it belongs to;
- ``KINDS``, which of measured, modelled and quoted its figures are;
- ``CAPTION``, what is shown, of which kind and from which source; ``caption(results)`` where that depends on results;
- ``draw(results)``, which returns a matplotlib ``Figure``.

It runs as a script, too: ``python -m bitnet_ref.paper_figures.fig_roofline results.json roofline.pdf``.

No figure uses pyplot, so neither a display nor a choice of backend is needed.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

__all__ = [
    "DISTILL_FIGURES",
    "FIGURES",
    "GAUSSIAN_ZEROS",
    "NUMPY_COLOUR",
    "PART_COLOURS",
    "QUOTED",
    "kernel_colours",
    "kernel_label",
    "kernels_in",
    "load",
    "main",
    "main_shape",
    "mean_line",
    "name_rows",
    "percent",
    "plain_log_ticks",
    "probe_macs_per_s",
    "read_bandwidth",
    "save",
    "seeds_label",
    "select",
    "shape_label",
    "share_of_zeros",
    "styled",
    "thread_counts",
    "threads_label",
    "three_digits",
    "title",
    "weight_densities",
]

FIGURES = (
    "fig_memory_steps",
    "fig_memory_rivals",
    "fig_memory_embedding",
    "fig_energy_published",
    "fig_energy_left_out",
    "fig_gemv_speed",
    "fig_gemv_shapes",
    "fig_gemv_bandwidth",
    "fig_gemm_speed",
    "fig_roofline",
    "fig_training_losses",
    "fig_training_signs",
    "fig_training_weights",
    "fig_weights",
)
"""Modules of this package, in the order of the report."""

DISTILL_FIGURES = ("fig_distill_curves", "fig_distill_weights", "fig_distill_blocks")
"""Those of a run of distillation, which read its ``tables.json``; ``drawable(results)`` says whether one can."""

STYLE = Path(__file__).with_name("style.mplstyle")

# Okabe and Ito's palette: distinct with every common colour blindness.
BLUE, VERMILION, GREEN, PINK, SKY, ORANGE, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#8A8A8A",
)
_SERIES = (BLUE, VERMILION, GREEN, PINK, SKY, ORANGE)
NUMPY_COLOUR = GREY
PART_COLOURS = {
    "body": BLUE,
    "embedding": ORANGE,
    "cache": GREEN,
    "linear": BLUE,
    "attention": PINK,
    "head": ORANGE,
    "moved": GREEN,
}
"""Parts of a model keep their colour through all figures."""

QUOTED: dict[str, Any] = {"facecolor": "white", "edgecolor": "#444444", "hatch": "/////", "linewidth": 0.8}
"""Bars of quoted figures are hatched, those of modelled and measured ones are filled."""

GAUSSIAN_ZEROS = math.erf(1 / (2 * math.sqrt(math.pi)))
"""Share of Gaussian weights that becomes zero, 31.0 %: those below half of mean|w|, which is sigma sqrt(2 / pi)."""

_LARGEST_FFN = (6912, 2560)


def load(name: str) -> ModuleType:
    """The figure module of this name."""
    return importlib.import_module(f"{__name__}.{name}")


def styled(draw: Callable[[dict[str, Any]], Figure]) -> Callable[[dict[str, Any]], Figure]:
    """Make `draw` use the style file, whatever settings the caller has."""

    @functools.wraps(draw)
    def wrapper(results: dict[str, Any]) -> Figure:
        with matplotlib.rc_context(fname=STYLE):
            return draw(results)

    return wrapper


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the type follows the suffix. The same figure gives the same bytes: no date is stored."""
    metadata: dict[str, Any] = {".pdf": {"CreationDate": None}, ".png": {"Software": None}}.get(path.suffix, {})
    with matplotlib.rc_context(fname=STYLE):
        figure.savefig(path, metadata=metadata)


def main(draw: Callable[[dict[str, Any]], Figure]) -> None:
    """Draw from the command line: arguments are results.json and the file to write."""
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: {Path(sys.argv[0]).name} results.json output.png|output.pdf")
    save(draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), Path(sys.argv[2]))


def title(figure: Figure, text: str) -> None:
    """Put the subject or finding over the whole figure, left-aligned."""
    figure.suptitle(text, x=0.012, ha="left", fontsize=10, fontweight="bold")


def seeds_label(seeds: int) -> str:
    return f"{seeds} seed" if seeds == 1 else f"{seeds} seeds"


def percent(share: float, digits: int = 0) -> str:
    """A share as it is printed everywhere: 0.5 -> "50 %"."""
    return f"{100 * share:.{digits}f} %"


def three_digits(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def plain_log_ticks(axis: Axis) -> None:
    """Write 0.1, 1, 10 at the ticks of a logarithmic axis, whose unit is a power of ten itself."""
    axis.set_major_formatter(lambda value, _: f"{value:,g}")


def mean_line(axes: Axes, x: Any, runs: np.ndarray, colour: str, **line: Any) -> Line2D:
    """Draw the mean of runs, shape (runs, len(x)), over a band from the least to the largest."""
    axes.fill_between(x, runs.min(0), runs.max(0), color=colour, alpha=0.15, linewidth=0)
    return axes.plot(x, runs.mean(0), color=colour, **line)[0]


# --------------------------------------------------------------------------------------------------------- weights
def share_of_zeros(edges: list[float], counts: list[int]) -> float:
    """Of weights counted by weight / mean|w|: those that become zero."""
    inside = np.abs(np.add(edges[1:], edges[:-1]) / 2) < 0.5
    return float(np.array(counts)[inside].sum() / np.sum(counts))


def weight_densities(axes: Axes, edges: list[float], series: list[tuple[list[int], str, str]]) -> None:
    """Draw counts of weight / mean|w|, each with label and colour, as densities; lines where rounding changes."""
    for counts, label, colour in series:
        density = np.array(counts) / np.sum(counts) / np.diff(edges)
        axes.stairs(density, edges, color=colour, linewidth=1.6, label=label)
    for limit in (-0.5, 0.5):
        axes.axvline(limit, color="black", linewidth=1)
    axes.set_ylabel("density")
    axes.legend(loc="upper right", fontsize=7)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.grid()


# ------------------------------------------------------------------------------------------------------ speed rows
Rows = list[dict[str, Any]]


def select(rows: Iterable[dict[str, Any]], **where: Any) -> Rows:
    """The rows whose columns have these values."""
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def main_shape(rows: Rows) -> tuple[int, int]:
    """(M, K) that single-shape figures show: gate and up of BitNet b1.58 2B4T if measured, else the largest."""
    shapes = {(row["m"], row["k"]) for row in rows}
    return _LARGEST_FFN if _LARGEST_FFN in shapes else max(shapes, key=lambda shape: (shape[0] * shape[1], shape))


def thread_counts(rows: Rows) -> list[int]:
    """The thread counts that were measured, in rising order."""
    return sorted({row["threads"] for row in rows})


def threads_label(threads: int) -> str:
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def shape_label(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"


def kernels_in(rows: Rows) -> list[str]:
    """Kernel names in the order of the results, which is that of the registry, NumPy last."""
    names = dict.fromkeys(row["kernel"] for row in rows if row["program"] != "numpy")
    return [*names, *dict.fromkeys(row["kernel"] for row in rows if row["program"] == "numpy")]


def kernel_label(name: str) -> str:
    return "NumPy float32" if name == "numpy_float32" else name


def kernel_colours(rows: Rows) -> dict[str, str]:
    """Kernel name -> colour of its scheme."""
    schemes = list(dict.fromkeys(row["scheme"] for row in rows if row["scheme"] is not None))
    colours = dict(zip(schemes, _SERIES, strict=False))
    return {row["kernel"]: colours.get(row["scheme"], NUMPY_COLOUR) for row in rows}


def read_bandwidth(limits: Rows, threads: int) -> float | None:
    """Measured read bandwidth at this number of threads, bytes/s; None if it was not measured."""
    found = select(limits, what="read_bandwidth", threads=threads)
    return found[0]["median_per_s"] if found else None


def probe_macs_per_s(limits: Rows, isa: str | None, threads: int) -> float | None:
    """Int8 multiply-add rate that a probe reached in an instruction set, MAC/s; None without one.

    An instruction set without a probe of its own (avx512vbmi adds permutes; its multiply-adds are those of avx512vnni)
    takes the highest that was measured.
    """
    rates = {row["isa"]: row["median_per_s"] for row in select(limits, what="int8_multiply_adds", threads=threads)}
    if isa is None or not rates:
        return None
    return rates.get(isa, max(rates.values()))


def name_rows(axes: Axes, names: list[str]) -> None:
    """Label horizontal rows with kernel names, the first on top."""
    axes.set_yticks(range(len(names)), [kernel_label(name) for name in names], family="monospace", fontsize=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
