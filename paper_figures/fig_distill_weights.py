"""Weights of the students of a run of distillation, before and after their training."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bitnet_ref.paper_figures import (
    BLUE,
    GAUSSIAN_ZEROS,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    main,
    mean_line,
    percent,
    seeds_label,
    select,
    share_of_zeros,
    styled,
    title,
    weight_densities,
)

SECTION = "results"
KINDS = ("measured",)
CAPTION = (
    "Above: master weights of all ternary layers, each divided by the mean|w| that it is rounded with, all seeds "
    "together; weights beyond 3 count in the last bar, and rounding changes at the two vertical lines. Below: of each "
    "block, the share of zeros, and the share of ternary weights that are another one of -1, 0, 1 than when the stage "
    "began; for BitDistill that is behind continued pre-training. Lines: mean over the matrices of a block and the "
    "seeds that a stage was run with; bands: the least and the largest seed. Zeros of Gaussian weights would be 31.0 "
    "%."
)

STAGES = {
    "direct": ("direct", VERMILION),
    "pretrain": ("continued pre-training", ORANGE),
    "bitdistill": ("BitDistill", BLUE),
    "blocks": ("blocks one by one", GREEN),
}
"""Those whose weights are shown; name and colour."""


def _shown(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = results["results"]
    return [row for row in rows if row["stage"] in STAGES and row.get("weights", {}).get("layers")]


def drawable(results: dict[str, Any]) -> bool:
    """Whether one of those stages is there, with ternary layers."""
    return bool(_shown(results))


@styled
def draw(results: dict[str, Any]) -> Figure:
    """``tables.json`` of a run: histograms, and zeros and changes by block."""
    runs = {stage: [row["weights"] for row in select(_shown(results), stage=stage)] for stage in STAGES}
    runs = {stage: found for stage, found in runs.items() if found}
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.3, 1))
    above = figure.add_subplot(grid[0, :])
    below = {"zeros": figure.add_subplot(grid[1, 0]), "changed": figure.add_subplot(grid[1, 1])}
    # The stage that begins with the model as it is given, if one does.
    first = next(stage for stage in ("direct", "pretrain", "blocks", "bitdistill") if stage in runs)
    edges = runs[first][0]["edges"]
    sums = [(f"before {STAGES[first][0]}", GREY, np.sum([run["before"] for run in runs[first]], axis=0))]
    sums += [(*STAGES[stage], np.sum([run["after"] for run in found], axis=0)) for stage, found in runs.items()]
    series = [(n, f"{label}: {percent(share_of_zeros(edges, n), 1)} zeros", colour) for label, colour, n in sums]
    weight_densities(above, edges, series)
    above.set_xlabel("master weight / mean|weight| (measured)")
    of_layer = np.array([int(re.search(r"layers\.(\d+)\.", name)[1]) for name in runs[first][0]["layers"]])
    blocks = np.unique(of_layer)
    for stage, found in runs.items():
        for key, axes in below.items():
            by_block = np.array([[np.array(run[key])[of_layer == block].mean() for block in blocks] for run in found])
            mean_line(axes, blocks + 1, by_block, STAGES[stage][1], marker=".")
    below["zeros"].axhline(GAUSSIAN_ZEROS, color="black", ls="--", linewidth=1)
    below["zeros"].set_title("zeros (measured); dashed: Gaussian weights")
    below["changed"].set_title("ternary weights changed (measured)")
    below["changed"].set_ylim(0, None)
    for axes in below.values():
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=None))
        axes.grid()
    title(figure, f"Weights before and after training, {seeds_label(max(map(len, runs.values())))}")
    return figure


if __name__ == "__main__":
    main(draw)
