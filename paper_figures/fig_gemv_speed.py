"""Speed of every kernel for one token, on one layer of BitNet b1.58 2B4T."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bitnet_ref.paper_figures import (
    kernel_colours,
    kernels_in,
    main,
    main_shape,
    name_rows,
    select,
    shape_label,
    styled,
    thread_counts,
    threads_label,
    three_digits,
    title,
)

SECTION = "speed"
KINDS = ("measured",)
CAPTION = (
    "Weights multiplied a second for one token, measured in this run. Bars: median; black lines: quartiles. A "
    "colour is a packing, grey is NumPy float32 on the same shape, which reads 4 bytes a weight. “scalar” is compiled "
    "without vector instructions: the baseline for a speed-up. Weights come from memory, not from the cache."
)


@styled
def draw(results: dict[str, Any]) -> Figure:
    """Bars of G weights/s, one for each number of threads, and their quartiles."""
    rows = select(results["speed"], tokens=1)
    shape = main_shape(rows)
    rows = select(rows, m=shape[0], k=shape[1])
    names, threads, colours = kernels_in(rows), thread_counts(rows), kernel_colours(rows)
    figure = Figure(figsize=(7.2, 1.3 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.76 / len(threads)
    for row in rows:
        i = threads.index(row["threads"])
        y = names.index(row["kernel"]) + (i - (len(threads) - 1) / 2) * height
        rate = row["weights_per_s"] / 1e9
        fastest, slowest = (rate * row["median_ns"] / row[key] for key in ("low_ns", "high_ns"))
        axes.barh(y, rate, 0.92 * height, color=colours[row["kernel"]], alpha=1.0 if i == len(threads) - 1 else 0.5)
        axes.plot([slowest, fastest], [y, y], color="black", linewidth=1.2)
        axes.annotate(
            three_digits(rate), (max(rate, fastest), y), (4, 0), textcoords="offset points", va="center", fontsize=7
        )
    name_rows(axes, names)
    axes.grid(axis="x")
    axes.set_xlim(0, 1.1 * max(row["weights_per_s"] * row["median_ns"] / row["low_ns"] for row in rows) / 1e9)
    axes.set_xlabel("10⁹ weights/s (measured: median and quartiles)")
    axes.legend(
        handles=[
            Patch(color="#444444", alpha=1.0 if count == threads[-1] else 0.5, label=threads_label(count))
            for count in threads
        ],
        loc="lower right",
    )
    title(figure, f"One token through a {shape_label(shape)} layer")
    return figure


if __name__ == "__main__":
    main(draw)
