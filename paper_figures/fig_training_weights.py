"""Master weights before and after continued pre-training of a model that was made ternary."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bitnet_ref.paper_figures import (
    BLUE,
    GREY,
    main,
    percent,
    select,
    share_of_zeros,
    styled,
    title,
    weight_densities,
)

SECTION = "training"
KINDS = ("measured",)
CAPTION = (
    "Master weights of all ternary layers, each divided by its matrix's mean|w|, before and after stage 2 of "
    "[BitDistill] (with SubLN), all seeds together; weights beyond 3 count in the last bar. Rounding changes at the "
    "two vertical lines. [BitDistill] shows that continued pre-training moves weights of a full-precision model "
    "towards these edges, where a small step changes the ternary weight. The share beside each line is that of "
    "weights within 0.1 of it."
)


@styled
def draw(results: dict[str, Any]) -> Figure:
    """Two histograms on one axis."""
    study = results["training"]
    edges = study["settings"]["bins"]
    rows = select(study["continued"], subln=True)
    centres = np.array([(a + b) / 2 for a, b in pairwise(edges)])
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    near = np.minimum(np.abs(centres - 0.5), np.abs(centres + 0.5)) < 0.1
    series = []
    for key, label, colour in (("histogram_before", "before", GREY), ("histogram_after", "after", BLUE)):
        counts = np.sum([row[key] for row in rows], axis=0)
        zeros, edge = share_of_zeros(edges, counts), counts[near].sum() / counts.sum()
        series.append((counts, f"{label}: {percent(zeros, 1)} zeros, {percent(edge, 1)} near an edge", colour))
    weight_densities(axes, edges, series)
    axes.set_xlabel("master weight / mean|weight| of its matrix (measured)")
    title(figure, f"Weights before and after {study['settings']['steps']} steps of continued pre-training")
    return figure


if __name__ == "__main__":
    main(draw)
