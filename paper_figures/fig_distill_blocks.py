"""Students whose blocks were trained one by one, beside direct ternarisation; see docs/distillation.md."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bitnet_ref.paper_figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    main,
    mean_line,
    percent,
    seeds_label,
    select,
    styled,
    title,
)

SECTION = "results"
KINDS = ("measured",)
CAPTION = (
    "Left: squared distance of the student's residual stream from its teacher's, in units of the teacher's squared "
    "length, behind each block on held-out sentences, before the block is trained and after (the blocks before it are "
    "trained). Right: accuracy on the development split over the work that was done: tokens of training, where a token "
    "in one block counts as one block's share of the network. Lines: mean of the seeds that a stage was run with; "
    "bands: least and largest. The teacher's own work is not counted."
)


def drawable(results: dict[str, Any]) -> bool:
    """Whether blocks were trained, for a task with accuracies, and its development split was looked at."""
    rows = results["results"]
    teachers = select(rows, stage="teacher")
    looked = all(row["development"] and "accuracy" in row["test"] for row in teachers)
    return bool(teachers and select(rows, stage="blocks")) and looked


@styled
def draw(results: dict[str, Any]) -> Figure:
    """``tables.json`` of a run with teacher, blocks and students behind them; baselines if they are there."""
    rows = results["results"]
    blocks = {row["seed"]: row for row in select(rows, stage="blocks")}
    figure = Figure(figsize=(7.2, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    n = len(next(iter(blocks.values()))["errors"])
    for key, colour in (("before", GREY), ("after", BLUE)):
        errors = np.array([[block[key] for block in row["errors"]] for row in blocks.values()])
        mean_line(left, range(1, n + 1), errors, colour, marker=".", label=f"{key} training")
    left.set(xlabel="block", ylabel="distance from the teacher\n(measured)", ylim=(0, None), title="each block")
    for stage, label, colour in (
        ("direct", "direct", VERMILION),
        ("bitdistill", "BitDistill", ORANGE),
        ("blocks-ld", "blocks, then logits", GREEN),
        ("blocks-distill", "blocks, then both losses", BLUE),
    ):
        runs = select(rows, stage=stage)
        if not runs:
            continue
        before = [0.0] * len(runs)
        if stage.startswith("blocks-"):
            # One stage may serve all seeds, here and below.
            before = [blocks.get(row["seed"], next(iter(blocks.values())))["tokens"] / n for row in runs]
        elif stage == "bitdistill":
            pretrain = {row["seed"]: row["tokens"] for row in select(rows, stage="pretrain")}
            before = [pretrain.get(row["seed"], next(iter(pretrain.values()))) for row in runs]
        # A seed that was stopped early has fewer evaluations.
        shared = min(len(row["development"]) for row in runs)
        looks = [row["development"][:shared] for row in runs]
        work = np.array([[b + e["tokens"] for e in look] for b, look in zip(before, looks, strict=True)]) / 1e3
        scores = 100 * np.array([[e["score"] for e in look] for look in looks])
        mean_line(right, work.mean(0), scores, colour, marker=".", label=label)
    teachers = select(rows, stage="teacher")
    teachers = [row for row in teachers if row["seed"] in blocks] or teachers
    best = np.mean([max(e["score"] for e in row["development"]) for row in teachers])
    right.axhline(100 * best, color=GREY, ls="--", label=f"teacher: {percent(best, 1)}")
    right.set(xlabel="work (thousand tokens)", ylabel="accuracy, % (measured)", title="the task", xlim=(0, None))
    for axes in (left, right):
        axes.grid()
        axes.legend(fontsize=7)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    title(figure, f"Blocks one by one, {seeds_label(len(blocks))}")
    return figure


if __name__ == "__main__":
    main(draw)
