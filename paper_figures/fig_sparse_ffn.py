"""Time of a feed-forward network that skips rows and columns, by the share of zeros; see measure/sparse_ffn.py."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from bitnet_ref.paper_figures import main, styled, threads_label, title

SECTION = "sparse_ffn"
KINDS = ("measured",)
CAPTION = (
    "Median time of the products with listed rows (base3r), as a multiple of the dense product (base3) of the same "
    "matrix in the same run, for one token of the 2B4T shape; synthetic activations. Below 1, skipping pays. The "
    "network has the dense gate in it."
)


@styled
def draw(results: dict[str, Any]) -> Figure:
    """One panel for each number of threads: W_up, W_down and the network."""
    rows = results["sparse_ffn"]
    threads = sorted({row["threads"] for row in rows})
    times = {(r["threads"], r["part"], r["program"], r["sparsity"]): r["median_ns"] for r in rows}
    sparsities = sorted({row["sparsity"] for row in rows})
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    for axes, n in zip(figure.subplots(1, len(threads), sharey=True, squeeze=False)[0], threads, strict=True):
        dense = {part: times[n, part, "base3", 0.0] for part in ("gate", "up", "down")}
        lines = {part: [times[n, part, "base3r", s] for s in sparsities] for part in ("up", "down")}
        for part, label in (("up", "W_up"), ("down", "W_down")):
            axes.plot([100 * s for s in sparsities], [t / dense[part] for t in lines[part]], marker="o", label=label)
        whole = [(dense["gate"] + up + down) / sum(dense.values()) for up, down in zip(*lines.values(), strict=True)]
        axes.plot([100 * s for s in sparsities], whole, marker="s", color="black", label="network")
        axes.axhline(1, color="#444444", linewidth=0.8)
        axes.set_xlabel(f"zeros, % ({threads_label(n)})")
        axes.set_ylim(0, None)
    figure.axes[0].set_ylabel("time / dense time")
    figure.axes[0].legend()
    title(figure, "Skipping rows and columns of a feed-forward network")
    return figure


if __name__ == "__main__":
    main(draw)
