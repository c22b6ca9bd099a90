"""Losses and accuracy of the stages of a run of distillation over their steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from bitnet_ref.paper_figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    main,
    mean_line,
    plain_log_ticks,
    seeds_label,
    select,
    styled,
    title,
)

SECTION = "results"
KINDS = ("measured",)
CAPTION = (
    "Losses of a run's stages while they train, each before its weight: continued pre-training on plain text (nats a "
    "token); on the task cross-entropy (nats a label), the divergence of outputs from the teacher's (nats a compared "
    "position) and of relations of queries, keys and values (nats a token), the distance of hidden states where it is "
    "asked for; then the score on the development split, fully quantised. Where quantisation rises, a loss is that of "
    "the network as it is at the step. Lines: mean of the seeds that a stage was run with; bands: least and largest. A "
    "point is the mean of the steps since the one before."
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
    ("text: next token", "nats", "text"),
    ("task: cross-entropy", "nats", "ce"),
    ("task: outputs, $L_{LD}$", "nats", "ld"),
    ("task: attention relations, $L_{AD}$", "nats", "ad"),
    ("task: hidden states", "squared distance", "hd"),
    ("task: development split", "score", "score"),
)


def _curves(row: dict[str, Any]) -> dict[str, dict[int, float]]:
    """The last part of PANELS -> step -> value."""
    training, scores = row.get("training", {}), row["development"]
    columns = {key: training[key] for key in ("ce", "ld", "ad", "hd") if key in training}
    if row["stage"] == "pretrain":
        columns, scores = {"text": training["loss"]} if "loss" in training else {}, []
    elif "loss" in training and "ce" not in training:  # what learns labels alone has one loss
        columns["ce"] = training["loss"]
    found = {key: dict(zip(training["step"], values, strict=True)) for key, values in columns.items()}
    return found | ({"score": {e["step"]: e["score"] for e in scores}} if scores else {})


def drawable(results: dict[str, Any]) -> bool:
    """Whether a stage with losses is there: blocks have a figure of their own, tables of older versions no losses."""
    return any(row["stage"] in STAGES and row.get("training", {}).get("step") for row in results["results"])


@styled
def draw(results: dict[str, Any]) -> Figure:
    """``tables.json`` of a run: a panel for each loss that a stage has, and one of the scores."""
    curves = {stage: [_curves(row) for row in select(results["results"], stage=stage)] for stage in STAGES}
    panels = [panel for panel in PANELS if any(panel[2] in run for runs in curves.values() for run in runs)]
    deep = -(-len(panels) // 2)
    figure = Figure(figsize=(7.2, 0.7 + 2.4 * deep), layout="constrained")
    grid = figure.subplots(deep, 2 if len(panels) > 1 else 1, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, (text, unit, key) in zip(grid.flat, panels, strict=False):
        for stage, (colour, line) in STAGES.items():
            runs = [run[key] for run in curves[stage] if key in run]
            if not runs:
                continue
            # A seed that was stopped early ends before the others: only what all of them have.
            steps = [step for step in runs[0] if all(step in run for run in runs)]
            values = np.array([[run[step] for step in steps] for run in runs])
            marker = "." if len(steps) < 12 else None
            handles[stage] = mean_line(axes, steps, values, colour, ls=line, marker=marker, label=stage)
        axes.set(title=text, xlabel="step", ylabel=f"{unit} (measured)")
        drawn = np.concatenate([line.get_ydata() for line in axes.get_lines()])
        if drawn.min() > 0 and drawn.max() > 10 * drawn.min():
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
            plain_log_ticks(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    handles = {stage: handles[stage] for stage in STAGES if stage in handles}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=7, handlelength=3)
    title(figure, f"Training, {seeds_label(max(map(len, curves.values())))}")
    return figure


if __name__ == "__main__":
    main(draw)
