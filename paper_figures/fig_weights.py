"""Distribution of a model's weights around the thresholds of absmean ternarisation."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bitnet_ref.paper_figures import BLUE, GAUSSIAN_ZEROS, GREY, VERMILION, main, percent, styled, title

SECTION = "weights"
KINDS = ("measured", "modelled")
CAPTION = (
    "What absmean ternarisation [B158, Eq. 1-3] would make of the linear layers of the given file, each with its own "
    "scale mean|w|. Bars and dots: counted in the file. Dashed: modelled, a Gaussian of the same mean|w|, 31.0 % of "
    "which becomes zero. Weights between -0.5 and 0.5 become zero, the others -1 or 1. The relative error is that of "
    "rounding these weights; it says nothing about a model that is then trained further."
)


def caption(results: dict[str, Any]) -> str:
    """The caption, which says so where the layers are not stored as the floats that are counted."""
    types = results["weights"]["histogram"]["dequantised_from"]
    if not types:
        return CAPTION
    return (
        f"{CAPTION} Layers that the file stores as {' and '.join(types)} were dequantised: what is counted are those "
        "values, on the few levels of each block, not the weights before they were quantised."
    )


# A Gaussian of sigma 1 has mean|w| = s = sqrt(2 / pi) and its threshold at t = s / 2.
_SCALE = math.sqrt(2 / math.pi)
# mean((w - s q)^2) = 1 - 2 s mean(|w|; |w| > t) + s^2 P(|w| > t), and mean(|w|; |w| > t) = s exp(-t^2 / 2)
_GAUSSIAN_ERROR = math.sqrt(1 - 2 * _SCALE**2 * math.exp(-(_SCALE**2) / 8) + _SCALE**2 * (1 - GAUSSIAN_ZEROS))


@styled
def draw(results: dict[str, Any]) -> Figure:
    """The pooled histogram above, zeros and relative error of each layer below."""
    weights = results["weights"]
    histogram = weights["histogram"]
    edges, counts = histogram["edges"], histogram["counts"]
    total = sum(counts) + histogram["n_outside"]
    widths = [b - a for a, b in pairwise(edges)]
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    density = [count / total / width for count, width in zip(counts, widths, strict=True)]
    layers = [row for row in weights["tensors"] if row["role"] == "linear" and row["relative_error"] is not None]

    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.5, 1))
    axes = figure.add_subplot(grid[0, :])
    colours = [GREY if abs(centre) < 0.5 else BLUE for centre in centres]
    axes.bar(centres, density, widths, color=colours)
    # w / mean|w| of a Gaussian has variance pi / 2.
    axes.plot(centres, [math.exp(-x * x / math.pi) / math.pi for x in centres], "--", color=VERMILION)
    ceiling = 1.2 * max(density)
    for threshold in (-0.5, 0.5):
        axes.axvline(threshold, color="black", linewidth=1)
    axes.set_ylim(0, ceiling)
    axes.set_xlim(edges[0], edges[-1])
    for x, text in ((-2.2, "-1"), (0.0, f"0: {percent(histogram['fraction_zeros'], 1)}"), (2.2, "+1")):
        axes.text(x, 0.95 * ceiling, text, ha="center", va="top", fontweight="bold")
    axes.annotate("Gaussian (modelled)", (1.55, math.exp(-1.55 * 1.55 / math.pi) / math.pi), (12, 12),
                  textcoords="offset points", fontsize=8, color=VERMILION)  # fmt: skip
    types = histogram["dequantised_from"]
    dequantised = f" (dequantised from {', '.join(types)})" if types else ""
    axes.set_xlabel(f"weight / mean|weight| of its layer{dequantised}")
    axes.set_ylabel("density")

    for place, key, label, reference in (
        (grid[1, 0], "fraction_zeros", "fraction of zeros", GAUSSIAN_ZEROS),
        (grid[1, 1], "relative_error", "relative error of rounding", _GAUSSIAN_ERROR),
    ):
        panel = figure.add_subplot(place)
        values = [row[key] for row in layers]
        panel.plot(values, ".", color=BLUE, markersize=4)
        panel.axhline(reference, ls="--", color=VERMILION)
        low, high = min(reference, *values), max(reference, *values)
        panel.set_ylim(low - 0.2 * (high - low + 0.01), high + 0.08 * (high - low + 0.01))
        panel.annotate(
            f"Gaussian {percent(reference, 1)} (modelled)",
            (1, reference),
            (0, -3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=7.5,
            color=VERMILION,
        )
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        panel.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        panel.set_title(label)
        panel.set_xlabel("linear layer, in order of the file")
        panel.grid()
    title(figure, f"{weights['file']}: {len(layers)} linear layers")
    return figure


if __name__ == "__main__":
    main(draw)
