"""The six published energies beside the operation-count model that they come from."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from bitnet_ref.paper_figures import PART_COLOURS, QUOTED, main, percent, styled, title

SECTION = "energy"
KINDS = ("modelled", "quoted")
CAPTION = (
    "Arithmetic of one forward pass over 512 tokens. Hatched: quoted, row “Energy (Estimated)” of [2B4T, Table 1]. "
    "Filled: modelled, additions and multiplications of [BitNet, Eq. 16-18] times the 7 nm prices of [BitNet, Table "
    "2], from the shapes alone. Attention is FP16 in all six models. The published figures are a model as well, not a "
    "measurement, and they are not joules a token."
)


@styled
def draw(results: dict[str, Any]) -> Figure:
    """A hatched bar (quoted) and a bar split into linear layers and attention (modelled) for each model, joules."""
    rows = results["energy"]
    figure = Figure(figsize=(7.2, 3.7), layout="constrained")
    axes = figure.subplots()
    height = 0.36
    ys = [float(y) for y in range(len(rows))]
    quoted = axes.barh(
        [y - height / 2 for y in ys],
        [row["published_joules"] for row in rows],
        0.9 * height,
        label="published (quoted)",
        **QUOTED,
    )
    axes.bar_label(quoted, [f"{row['published_joules']:.3f}" for row in rows], padding=3, fontsize=7.5)
    below = [y + height / 2 for y in ys]
    linear = [row["linear_joules"] for row in rows]
    axes.barh(below, linear, 0.9 * height, color=PART_COLOURS["linear"], label="weight matrices (modelled)")
    attention = axes.barh(
        below,
        [row["attention_joules"] for row in rows],
        0.9 * height,
        left=linear,
        color=PART_COLOURS["attention"],
        label="attention (QKᵀ and AV), FP16 (modelled)",
    )
    labels = [f"{row['modelled_joules']:.4f}  ({100 * row['relative_difference']:+.1f} %)" for row in rows]
    axes.bar_label(attention, labels, padding=3, fontsize=7.5)
    axes.set_yticks(ys, [row["model"] for row in rows])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlim(0, 1.22 * max(row["published_joules"] for row in rows))
    axes.set_xlabel("joules for a forward pass over 512 tokens")
    axes.legend(loc="upper right")
    worst = max(abs(row["relative_difference"]) for row in rows)
    bitnet = next(row for row in rows if row["model"].startswith("BitNet"))
    title(
        figure,
        f"The model gives all six published energies within {percent(worst, 1)}; "
        f"{percent(bitnet['attention_share'])} of BitNet's is attention",
    )
    return figure


if __name__ == "__main__":
    main(draw)
