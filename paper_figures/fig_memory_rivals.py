"""Memory of BitNet b1.58 2B4T and its five rivals: published, modelled, and with the embedding."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from bitnet_ref.paper_figures import PART_COLOURS, QUOTED, main, select, styled, title

SECTION = "memory"
KINDS = ("modelled", "quoted")
CAPTION = (
    "Hatched: quoted, row “Memory (Non-emb)” of [2B4T, Table 1]. Filled: modelled from the published shapes. Weights "
    "in the blocks are bf16 for the five rivals and log2(3) bits for BitNet; the whole model adds norms, biases and "
    "the embedding, bf16 for the rivals, and for BitNet takes 2 bits a weight (I2_S) and an f16 embedding."
)


@styled
def draw(results: dict[str, Any]) -> Figure:
    """Three bars for each model, GB."""
    rows = select(results["memory"], table="rivals")
    figure = Figure(figsize=(7.2, 4.3), layout="constrained")
    axes = figure.subplots()
    height = 0.26
    series = (
        ("weights in the blocks, published (quoted)", [row["published_gb"] for row in rows], QUOTED, "{:g}"),
        (
            "weights in the blocks (modelled)",
            [row["modelled_gb"] for row in rows],
            {"color": PART_COLOURS["body"]},
            "{:.2f}",
        ),
        (
            "whole model with embedding (modelled)",
            [row["whole_model_mb"] / 1e3 for row in rows],
            {"color": PART_COLOURS["embedding"]},
            "{:.2f}",
        ),
    )
    for i, (label, values, look, form) in enumerate(series):
        bars = axes.barh([y + (i - 1) * height for y in range(len(rows))], values, 0.9 * height, label=label, **look)
        axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=7.5)
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlim(0, 1.1 * max(row["whole_model_mb"] for row in rows) / 1e3)
    axes.set_xlabel("GB (10⁹ bytes)")
    axes.legend(loc="upper right")
    bitnet = next(row for row in rows if row["model"].startswith("BitNet"))
    others = [row for row in rows if row is not bitnet]
    body = [row["modelled_gb"] / bitnet["modelled_gb"] for row in others]
    whole = [row["whole_model_mb"] / bitnet["whole_model_mb"] for row in others]
    title(
        figure,
        f"BitNet's blocks are {min(body):.1f} to {max(body):.1f} times smaller, "
        f"the whole model {min(whole):.1f} to {max(whole):.1f} times",
    )
    return figure


if __name__ == "__main__":
    main(draw)
