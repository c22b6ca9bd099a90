"""What the type of the embedding, which is also the output head, does to the memory of a ternary model."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from bitnet_ref.paper_figures import PART_COLOURS, main, percent, select, styled, title

SECTION = "memory"
KINDS = ("modelled",)
CAPTION = (
    "BitNet b1.58 2B4T with the blocks as I2_S (2 bits), norms in f32, no cache; all modelled from layouts. The "
    "percentage is the share of the head in the matrix bytes (blocks and head) that one decoded token reads: the part "
    "that no ternary kernel touches. Smaller tables cost accuracy, which is not shown here."
)


@styled
def draw(results: dict[str, Any]) -> Figure:
    """Stacked bars for each type of embedding, MB, labelled with the share of the head."""
    rows = select(results["memory"], table="embedding")
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    axes = figure.subplots()
    rest = [row["total_mb"] - row["embedding_mb"] for row in rows]
    table = [row["embedding_mb"] for row in rows]
    ys = range(len(rows))
    axes.barh(ys, rest, 0.62, color=PART_COLOURS["body"], label="blocks, scales, norms (modelled)")
    bars = axes.barh(ys, table, 0.62, left=rest, color=PART_COLOURS["embedding"], label="embedding and head (modelled)")
    axes.bar_label(bars, [percent(row["head_share"]) for row in rows], label_type="center", fontsize=8)
    for y, row in enumerate(rows):
        axes.annotate(
            f"{row['total_mb']:,.1f}", (row["total_mb"], y), (5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(ys, [row["embedding"] for row in rows])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlim(0, 1.1 * max(row["total_mb"] for row in rows))
    axes.set_xlabel("MB; percentage: share of the head in the bytes read for one token")
    axes.set_ylabel("embedding type")
    axes.legend(loc="lower right")
    share = next(row["head_share"] for row in rows if row["embedding"] == "f16")
    title(figure, f"{percent(share)} of the matrix bytes read for a token belong to the f16 output head")
    return figure


if __name__ == "__main__":
    main(draw)
