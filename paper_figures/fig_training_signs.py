"""Zeros and changes of the ternary weights of each layer while a model trains."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bitnet_ref.paper_figures import (
    BLUE,
    GAUSSIAN_ZEROS,
    GREEN,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    main,
    mean_line,
    select,
    styled,
    title,
)

SECTION = "training"
KINDS = ("measured",)
CAPTION = (
    "Ternary weights of b1.58 with SubLN, from scratch. Left: share of zeros in the matrices of each kind, against "
    "the 31.0 % of Gaussian weights (dashed). Right: share of the weights that are another one of -1, 0, 1 than "
    "ten steps before, per step; logarithmic. Lines: mean over the blocks and seeds; bands: the least and the "
    "largest."
)

PARTS = {"q_proj": BLUE, "k_proj": SKY, "v_proj": GREEN, "o_proj": PINK, "gate_proj": ORANGE, "down_proj": VERMILION}


@styled
def draw(results: dict[str, Any]) -> Figure:
    """Zeros at the left, flips at the right; a line for each kind of matrix."""
    study = results["training"]
    rows = select(study["scratch"], model="b1.58")
    steps = rows[0]["curve"]["step"]
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for part, colour in PARTS.items():
        chosen = [i for i, name in enumerate(study["settings"]["layers"]) if part in name]
        for axes, key in ((left, "zeros"), (right, "flips")):
            values = np.array([row["curve"][key] for row in rows])[:, :, chosen]  # (seeds, steps, blocks)
            runs = values.swapaxes(1, 2).reshape(-1, len(steps))
            mean_line(axes, steps, runs, colour, label=part.removesuffix("_proj"))
    left.axhline(GAUSSIAN_ZEROS, color="black", ls="--", linewidth=1)
    left.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
    left.set_title("zeros (measured)")
    right.set_title("weights that change, per step (measured)")
    right.set_yscale("log")
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    left.legend(ncols=2)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid()
    title(figure, "Ternary weights settle: zeros, and changes per step")
    return figure


if __name__ == "__main__":
    main(draw)
