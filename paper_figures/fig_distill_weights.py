"""Weights of the students of a run of distillation, before and after their training."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bitnet_ref.paper_figures import BLUE, GREEN, GREY, ORANGE, VERMILION, main, percent, select, styled, title

SECTION = "results"
KINDS = ("measured",)
CAPTION = (
    "Above: master weights of all ternary layers, each divided by its matrix's mean|w|, all seeds together; weights "
    "beyond 3 count in the last bar, and rounding changes at the two vertical lines. Below: of each block, the share "
    "of zeros, and the share of ternary weights that are another one of -1, 0, 1 than when the stage began; for "
    "BitDistill that is behind continued pre-training. Lines: mean over the matrices of a block and the seeds; bands: "
    "the least and the largest seed. Zeros of Gaussian weights would be 31.0 %."
)

STAGES = {
    "direct": ("direct", VERMILION),
    "pretrain": ("continued pre-training", ORANGE),
    "bitdistill": ("BitDistill", BLUE),
    "blocks": ("blocks one by one", GREEN),
}
"""Those whose weights are shown; name and colour."""


def drawable(results: dict[str, Any]) -> bool:
    """Whether one of those stages is there, with ternary layers."""
    return any(row["stage"] in STAGES and row.get("weights", {}).get("layers") for row in results["results"])


@styled
def draw(results: dict[str, Any]) -> Figure:
    """``tables.json`` of a run: histograms, and zeros and changes by block."""
    rows = [row for row in results["results"] if row["stage"] in STAGES and row.get("weights", {}).get("layers")]
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.3, 1))
    above = figure.add_subplot(grid[0, :])
    below = {"zeros": figure.add_subplot(grid[1, 0]), "changed": figure.add_subplot(grid[1, 1])}
    edges = rows[0]["weights"]["edges"]
    widths = np.diff(edges)
    centres = np.array([(a + b) / 2 for a, b in pairwise(edges)])

    def stairs(counts: Any, label: str, colour: str) -> None:
        zeros = counts[np.abs(centres) < 0.5].sum() / counts.sum()
        text = f"{label}: {percent(zeros, 1)} zeros"
        above.stairs(counts / counts.sum() / widths, edges, color=colour, linewidth=1.4, label=text)

    # The stage that begins with the model as it is given, if one does.
    first = min(rows, key=lambda row: ("direct", "pretrain", "blocks", "bitdistill").index(row["stage"]))
    stairs(np.array(first["weights"]["before"]), f"before {STAGES[first['stage']][0]}", GREY)
    of_layer = np.array([int(re.search(r"layers\.(\d+)\.", name)[1]) for name in rows[0]["weights"]["layers"]])
    blocks = np.unique(of_layer)
    for stage, (label, colour) in STAGES.items():
        runs = [row["weights"] for row in select(rows, stage=stage)]
        if not runs:
            continue
        stairs(np.sum([run["after"] for run in runs], axis=0), label, colour)
        for key, axes in below.items():
            found = np.array([[np.array(run[key])[of_layer == block].mean() for block in blocks] for run in runs])
            axes.plot(blocks, found.mean(0), color=colour, marker=".")
            axes.fill_between(blocks, found.min(0), found.max(0), color=colour, alpha=0.2, linewidth=0)
    for edge in (-0.5, 0.5):
        above.axvline(edge, color="black", linewidth=1)
    above.set(xlabel="master weight / mean|weight| of its matrix (measured)", ylabel="density")
    above.set_ylim(0, 1.3 * above.get_ylim()[1])
    above.legend(loc="upper right", fontsize=7)
    below["zeros"].axhline(0.3101, color="black", ls="--", linewidth=1)
    below["zeros"].set_title("zeros (measured)")
    below["changed"].set_title("ternary weights changed (measured)")
    below["changed"].set_ylim(0, None)
    for axes in (above, *below.values()):
        axes.grid()
    for axes in below.values():
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=None))
    seeds = len({row["seed"] for row in rows})
    title(figure, f"Weights before and after training, {seeds} seed{'s' if seeds > 1 else ''}")
    return figure


if __name__ == "__main__":
    main(draw)
