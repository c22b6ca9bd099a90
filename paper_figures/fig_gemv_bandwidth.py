"""How much of the memory bandwidth each kernel uses for one token."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from bitnet_ref.paper_figures import (
    kernel_colours,
    kernels_in,
    main,
    name_rows,
    read_bandwidth,
    select,
    shape_label,
    styled,
    thread_counts,
    threads_label,
    title,
)

SECTION = "speed"
KINDS = ("measured",)
CAPTION = (
    "Bytes of weights read a second, as a share of the read bandwidth that a compiled loop of plain reads reached in "
    "the same rounds on the same number of threads; both measured. The loop is an ordinary program, not a proven "
    "bound: with weights that come from memory a kernel may come out slightly above 100 %. Activations and results "
    "are not in the bytes."
)

_MARKERS = "osD^vP"


@styled
def draw(results: dict[str, Any]) -> Figure:
    """One panel for each number of threads, a marker for each shape."""
    rows = select(results["speed"], tokens=1)
    shapes = sorted({(row["m"], row["k"]) for row in rows}, key=lambda shape: (shape[0] * shape[1], shape))
    markers = {shape: _MARKERS[i % len(_MARKERS)] for i, shape in enumerate(shapes)}
    names, threads, colours = kernels_in(rows), thread_counts(rows), kernel_colours(rows)
    figure = Figure(figsize=(7.2, 1.5 + 0.23 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(threads), sharex=True, sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, threads, strict=True):
        axes.axvline(1, color="black", linewidth=1)
        for row in select(rows, threads=count):
            axes.plot(
                row["read_bandwidth_fraction"],
                names.index(row["kernel"]),
                markers[row["m"], row["k"]],
                markersize=5,
                color=colours[row["kernel"]],
                alpha=0.8,
                markeredgecolor="none",
            )
        bandwidth = read_bandwidth(results["limits"], count)
        measured = "" if bandwidth is None else f": 100 % is {bandwidth / 1e9:.1f} GB/s"
        axes.set_title(threads_label(count) + measured, fontsize=8.5)
        axes.grid(axis="both")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set_xlabel("of the measured read bandwidth")
        axes.tick_params(axis="y", length=0)
    panels[0].set_xlim(-0.03, max(1.05, 1.05 * max(row["read_bandwidth_fraction"] for row in rows)))
    name_rows(panels[0], names)
    handles = [
        Line2D([], [], ls="", marker=markers[shape], color="#444444", markeredgecolor="none", label=shape_label(shape))
        for shape in shapes
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    title(figure, "One token: share of the memory bandwidth that reads weights")
    return figure


if __name__ == "__main__":
    main(draw)
