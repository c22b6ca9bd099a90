"""Losses of small models trained from scratch, and of models made ternary and trained further, over seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bitnet_ref.paper_figures import BLUE, GREY, ORANGE, VERMILION, main, mean_line, select, styled, title

SECTION = "training"
KINDS = ("measured",)
CAPTION = (
    "Training loss in nats per token, mean over ten steps. Lines: mean of the seeds; bands: the least and the "
    "largest. Left: from scratch, all with the same texts, windows, learning rate and initial weights of a seed; "
    "only the layers differ. Right: stage 2 of [BitDistill]: the full-precision models of the left panel get "
    "ternary layers, with SubLN or without, and are trained for as many steps again on other windows. Dots at the "
    "end: loss on held-out text. No learning rate was searched for, and models this small and this young say "
    "nothing about large ones."
)

COLOURS = {"full precision": GREY, "b1.58": BLUE, "b1.58 without SubLN": ORANGE, "b1": VERMILION}
CONTINUED = {True: ("with SubLN", BLUE), False: ("without SubLN", ORANGE)}


def _curves(axes: Axes, rows: list[dict[str, Any]], label: str, colour: str) -> None:
    steps = rows[0]["curve"]["step"]
    losses = np.array([row["curve"]["loss"] for row in rows])
    held_out = [row["held_out_nats"] for row in rows]
    mean_line(axes, steps, losses, colour, label=f"{label}: {np.mean(held_out):.3f} held out")
    axes.plot([steps[-1] * 1.03] * len(held_out), held_out, ".", color=colour, markersize=5, clip_on=False)


@styled
def draw(results: dict[str, Any]) -> Figure:
    """One panel from scratch, one of continued pre-training, with a common loss axis."""
    study = results["training"]
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for kind, colour in COLOURS.items():
        _curves(left, select(study["scratch"], model=kind), kind, colour)
    for placed, (label, colour) in CONTINUED.items():
        _curves(right, select(study["continued"], subln=placed), label, colour)
    floor = np.mean([row["held_out_nats"] for row in select(study["scratch"], model="full precision")])
    right.axhline(floor, color=GREY, ls="--", label=f"full precision before: {floor:.3f} held out")
    runs = study["scratch"] + study["continued"]
    losses = [loss for row in runs for loss in row["curve"]["loss"]]
    low = min(*losses, *(row["held_out_nats"] for row in runs))
    left.set_ylim(0.98 * low, min(max(losses), 1.4 * low))
    left.set_ylabel("loss (nats per token, measured)")
    for axes, text in ((left, "from scratch"), (right, "made ternary, then trained on")):
        axes.set_title(text)
        axes.set_xlabel("step")
        axes.grid()
        axes.legend(fontsize=7)
    seeds = study["settings"]["seeds"]
    title(figure, f"A Llama of {study['settings']['sizes']['num_hidden_layers']} layers, {seeds} seeds")
    return figure


if __name__ == "__main__":
    main(draw)
