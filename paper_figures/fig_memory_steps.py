"""From "0.4 GB" to the memory of a whole model, step by step."""

from __future__ import annotations

import re
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bitnet_ref.paper_figures import PART_COLOURS, main, select, styled, title

SECTION = "memory"
KINDS = ("modelled", "quoted")
CAPTION = (
    "Bytes of BitNet b1.58 2B4T, step by step. Bars: modelled, shapes times the bytes of each layout. Diamonds: "
    "quoted, 0.4 GB from [2B4T, Table 1] and 1124.81 MiB from a load log in microsoft/BitNet issue 229. The first four "
    "bars are the matrices inside the blocks alone, as is the published 0.4 GB; scales and norms (1.8 MB) belong to "
    "the next bars but are too thin to see. MB is 10^6 bytes."
)

_UNITS = {"GB": 1e9, "MiB": 2.0**20}


def _parts(steps: dict[str, float]) -> dict[str, tuple[float, float, float]]:
    """Step -> MB of (matrices in the blocks with scales and norms, embedding, cache), from differences of steps."""
    without_table = steps["+ norms"]
    table = steps["+ embedding in f16"] - without_table  # bf16 has the same size
    parts = {name: (total, 0.0, 0.0) for name, total in steps.items()}
    parts["+ embedding in f16"] = (without_table, table, 0.0)
    cache = steps["+ KV cache, 2048 tokens"] - without_table - table
    parts["+ KV cache, 2048 tokens"] = (without_table, table, cache)
    parts["whole model, Q6_K embedding"] = (without_table, steps["whole model, Q6_K embedding"] - without_table, 0.0)
    parts["whole model, bf16"] = (steps["whole model, bf16"] - table, table, 0.0)
    return parts


@styled
def draw(results: dict[str, Any]) -> Figure:
    """Bars of the steps in MB, split into parts, with the published figures as diamonds."""
    rows = select(results["memory"], table="steps")
    parts = _parts({row["step"]: row["mb"] for row in rows})
    figure = Figure(figsize=(7.2, 4.1), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        left = 0.0
        for width, part in zip(parts[row["step"]], ("body", "embedding", "cache"), strict=True):
            axes.barh(y, width, left=left, height=0.62, color=PART_COLOURS[part])
            left += width
        axes.annotate(f"{row['mb']:,.1f}", (left, y), (8, 0), textcoords="offset points", va="center", fontsize=8)
        quoted = re.match(r"([\d.]+) (GB|MiB)(;|$)", row["published"])
        if quoted:
            value = float(quoted[1]) * _UNITS[quoted[2]] / 1e6
            axes.plot(value, y, "D", color="white", markeredgecolor="black", markersize=5.5, zorder=3)
    axes.set_yticks(range(len(rows)), [row["step"] for row in rows])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlim(0, 1.12 * max(row["mb"] for row in rows))
    axes.set_xlabel("MB")
    axes.legend(
        handles=[
            Patch(color=PART_COLOURS["body"], label="matrices in the blocks, scales, norms (modelled)"),
            Patch(color=PART_COLOURS["embedding"], label="embedding, also the output head (modelled)"),
            Patch(color=PART_COLOURS["cache"], label="key/value cache (modelled)"),
            Line2D([], [], ls="", marker="D", color="white", markeredgecolor="black", label="published (quoted)"),
        ],
        loc="center right",
        bbox_to_anchor=(1.0, 0.5),
    )
    by_step = {row["step"]: row["mb"] for row in rows}
    title(
        figure,
        f"“0.4 GB” is the ternary matrices alone; the whole model takes {by_step['+ embedding in f16'] / 1e3:.2f} GB",
    )
    return figure


if __name__ == "__main__":
    main(draw)
