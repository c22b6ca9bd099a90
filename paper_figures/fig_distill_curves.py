"""Losses and accuracy of the stages of a run of distillation over their steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bitnet_ref.paper_figures import BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILION, main, select, styled, title

SECTION = "results"
KINDS = ("measured",)
CAPTION = (
    "Losses of a run's stages while they train, in nats, each before its weight: continued pre-training on plain text "
    "(a token); on the task cross-entropy (a label), the divergence of outputs from the teacher's (a compared "
    "position) and of relations of queries, keys and values (a token); then the score on the development split, fully "
    "quantised. Where quantisation rises, a loss is that of the network as it is at the step. Lines: mean of the "
    "seeds; bands: least and largest. A point is the mean of up to one fiftieth of the steps."
)

STAGES = {
    "teacher": (GREY, "-"),
    "direct": (VERMILION, "-"),
    "subln": (PINK, "-"),
    "pretrain": ("black", "-"),
    "subln-ct": (ORANGE, "-"),
    "subln-distill": (SKY, "-"),
    "ct-ld": (GREEN, "-"),
    "ct-ad": (GREEN, "--"),
    "bitdistill": (BLUE, "-"),
    "blocks-ce": (ORANGE, ":"),
    "blocks-ld": (GREEN, ":"),
    "blocks-distill": (BLUE, ":"),
}
"""Colour and line of each stage."""

PANELS = (
    ("text: next token", "loss", ("pretrain",)),
    ("task: cross-entropy", "ce", tuple(stage for stage in STAGES if stage != "pretrain")),
    ("task: outputs, $L_{LD}$", "ld", tuple(STAGES)),
    ("task: attention relations, $L_{AD}$", "ad", tuple(STAGES)),
)


def _plot(axes: Axes, stage: str, steps: list[list[int]], values: list[list[float]]) -> None:
    n = min(map(len, values))  # a seed that was stopped early has fewer
    columns = np.array([row[:n] for row in values])
    colour, line = STAGES[stage]
    axes.plot(steps[0][:n], columns.mean(0), color=colour, ls=line, label=stage, marker="." if n < 12 else None)
    axes.fill_between(steps[0][:n], columns.min(0), columns.max(0), color=colour, alpha=0.15, linewidth=0)


def _trained(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages with steps; blocks have a figure of their own, and tables of older versions no losses."""
    rows = results["results"]
    return [row for row in rows if row["stage"] in STAGES and row.get("training", {}).get("step")]


def drawable(results: dict[str, Any]) -> bool:
    """Whether a stage with losses is there."""
    return bool(_trained(results))


@styled
def draw(results: dict[str, Any]) -> Figure:
    """``tables.json`` of a run: a panel for each loss that a stage has, and one of the scores."""
    rows = _trained(results)
    shown = []
    for text, key, stages in PANELS:
        lines = {}
        for stage in stages:
            # What only learns labels has one loss, which is cross-entropy.
            runs = [row["training"] for row in select(rows, stage=stage)]
            runs = [run for run in runs if key in run or (key == "ce" and "ld" not in run and "ad" not in run)]
            if runs:
                lines[stage] = [run["step"] for run in runs], [run.get(key, run["loss"]) for run in runs]
        if lines:
            shown.append((text, "nats (measured)", lines))
    scores = {}
    for stage in STAGES:
        runs = [row["development"] for row in select(rows, stage=stage) if row["development"] and stage != "pretrain"]
        if runs:
            scores[stage] = [[e["step"] for e in run] for run in runs], [[e["score"] for e in run] for run in runs]
    if scores:
        shown.append(("task: development split", "score (measured)", scores))
    deep = -(-len(shown) // 2)
    figure = Figure(figsize=(7.2, 0.7 + 2.4 * deep), layout="constrained")
    grid = figure.subplots(deep, 2 if len(shown) > 1 else 1, squeeze=False)
    names: dict[str, Any] = {}
    for axes, (text, unit, lines) in zip(grid.flat, shown, strict=False):
        for stage, (steps, values) in lines.items():
            _plot(axes, stage, steps, values)
        axes.set(title=text, xlabel="step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
        names |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    names = {stage: names[stage] for stage in STAGES if stage in names}
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=6, fontsize=7, handlelength=3)
    seeds = len({row["seed"] for row in rows})
    title(figure, f"Training, {seeds} seed{'s' if seeds > 1 else ''}")
    return figure


if __name__ == "__main__":
    main(draw)
