"""Time per token of small batches, beside the line between one token and many.

Reads what ``bitnet-ref bench kernels --tokens 1,2,...,16,128 --json FILE`` or ``bitnet-ref bench all`` wrote. The
report has no such rows, so this figure is no part of it.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bitnet_ref.paper_figures import kernel_colours, main, main_shape, select, shape_label, styled, title

SECTION = "batches"
KINDS = ("measured",)
CAPTION = (
    "Microseconds a token against tokens a product, one thread, both axes logarithmic. Dots: measured medians, bars "
    "their quartiles. Lines: a batch whose time lies on the straight line between one token (gemv, weights cold in "
    "cache) and 128 tokens (gemm). Dots under the line are batches that cost less than that."
)


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of our kernels in a result file, one thread and one shape.

    Raises
    ------
    ValueError
        If the file lacks one token, 128 tokens or small batches.
    """
    found = results["parts"]["batches"]["rows"] if "parts" in results else results["rows"]
    found = [row for row in select(found, program="bitnet_ref", threads=1) if row["verified"]]
    m, k = main_shape(found) if found else (None, None)
    found = select(found, m=m, k=k)
    tokens = {row["tokens"] for row in found}
    if not {1, 128} <= tokens or not any(2 <= count <= 16 for count in tokens):
        raise ValueError(
            f"this figure needs verified rows of one thread for 1, 128 and some of 2 to 16 tokens, got {sorted(tokens)}"
        )
    return found


def on_the_line(tokens: float, one_ns: float, many_ns: float, many: int = 128) -> float:
    """Time of a product of `tokens` tokens on the straight line between those of one and of `many`."""
    return one_ns + (many_ns - one_ns) * (tokens - 1) / (many - 1)


@styled
def draw(results: dict[str, Any]) -> Figure:
    """One panel for each choice of instruction sets: the best that was measured, and the caps below it."""
    rows = rows_of(results)
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    colours = {row["scheme"]: kernel_colours(rows)[row["kernel"]] for row in rows}
    panels = {"best": [], "avx2": []}
    for scheme in schemes:
        isas = {row["isa"] for row in select(rows, scheme=scheme)}
        for isa in sorted(isas):
            panels["avx2" if isa == "avx2" and len(isas) > 1 else "best"].append((scheme, isa))
    shown = {name: members for name, members in panels.items() if members}
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    for axes, (name, members) in zip(
        figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown.items(), strict=True
    ):
        for scheme in schemes:
            mine = [row for row in select(rows, scheme=scheme) if (scheme, row["isa"]) in members]
            if not mine:
                continue
            ns = {row["tokens"]: row for row in sorted(mine, key=lambda row: row["tokens"])}
            colour = colours[scheme]
            line = [on_the_line(t, ns[1]["median_ns"], ns[128]["median_ns"]) / t / 1e3 for t in range(1, 129)]
            axes.plot(range(1, 129), line, color=colour, linewidth=1)
            middle = [row["median_ns"] / t / 1e3 for t, row in ns.items()]
            low = [(row["median_ns"] - row["low_ns"]) / t / 1e3 for t, row in ns.items()]
            high = [(row["high_ns"] - row["median_ns"]) / t / 1e3 for t, row in ns.items()]
            axes.errorbar(list(ns), middle, (low, high), color=colour, ls="", marker="o", markersize=3.5, elinewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], ["1", "2", "4", "8", "16", "32", "64", "128"])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,g}" if str(value).lstrip("0.")[0] in "25" else "")
        axes.set_title("avx2" if name == "avx2" else ", ".join(sorted({isa for _, isa in members})))
        axes.set_xlabel("tokens a product")
        axes.grid(axis="both")
    figure.axes[0].set_ylabel("µs a token (measured)")
    keys = [Line2D([], [], color=colours[scheme], marker="o", markersize=3.5, linewidth=1) for scheme in schemes]
    figure.legend(keys, schemes, loc="outside lower center", ncols=len(schemes))
    row = rows[0]
    title(figure, f"Small batches through a {shape_label((row['m'], row['k']))} layer, one thread")
    return figure


if __name__ == "__main__":
    main(draw)
