"""Speed of every kernel for one token over all layer shapes."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bitnet_ref.paper_figures import (
    kernel_colours,
    kernels_in,
    main,
    name_rows,
    plain_log_ticks,
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
    "The same as the figure before for every layer shape (outputs × inputs) of BitNet b1.58 2B4T, medians measured in "
    "this run. The scale is logarithmic: one grid line to the next is ten times."
)


@styled
def draw(results: dict[str, Any]) -> Figure:
    """One panel for each shape; hollow dots are one thread, filled dots all."""
    rows = select(results["speed"], tokens=1)
    shapes = sorted({(row["m"], row["k"]) for row in rows}, key=lambda shape: (shape[0] * shape[1], shape))
    names, threads, colours = kernels_in(rows), thread_counts(rows), kernel_colours(rows)
    figure = Figure(figsize=(7.2, 1.3 + 0.21 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, shape in zip(panels, shapes, strict=True):
        for row in select(rows, m=shape[0], k=shape[1]):
            filled = row["threads"] == threads[-1]
            colour = colours[row["kernel"]]
            axes.plot(
                row["weights_per_s"] / 1e9,
                names.index(row["kernel"]),
                "o",
                markersize=5,
                color=colour if filled else "white",
                markeredgecolor=colour,
                zorder=2 if filled else 3,
            )
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
        axes.grid(axis="both")
        axes.set_title(shape_label(shape), fontsize=8.5)
    name_rows(panels[0], names)
    for axes in panels[1:]:
        axes.tick_params(axis="y", length=0)
    figure.supxlabel("10⁹ weights/s (measured medians)", fontsize=8.5)
    handles = [
        Line2D(
            [], [], ls="", marker="o", color="#444444" if t == threads[-1] else "white", markeredgecolor="#444444",
            label=threads_label(t),
        )
        for t in threads
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles))
    title(figure, "One token, every layer shape")
    return figure


if __name__ == "__main__":
    main(draw)
