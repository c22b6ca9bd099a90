"""Speed of every kernel for 128 tokens, beside the multiply-add rate of a probe in its instruction set."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bitnet_ref.paper_figures import (
    kernel_colours,
    kernels_in,
    main,
    main_shape,
    name_rows,
    percent,
    probe_macs_per_s,
    select,
    shape_label,
    styled,
    thread_counts,
    threads_label,
    three_digits,
    title,
)

SECTION = "speed"
KINDS = ("measured",)
CAPTION = (
    "Multiply-adds a second with 128 tokens. Bars: measured medians. Black ticks: the int8 multiply-add rate of a "
    "probe in the same instruction set, measured in this run in registers alone, with the bar's share of it as a "
    "percentage. The probe is an ordinary program, not a proven bound: a kernel may come out slightly above 100 %. "
    "avx512vbmi has the multiply-adds of avx512vnni. tl1 and tl2 look sums up instead of multiplying; for them the "
    "tick is only a comparison. NumPy multiplies float32 and has no int8 rate."
)


@styled
def draw(results: dict[str, Any]) -> Figure:
    """One panel for each number of threads; bars in GMAC/s and a tick at the int8 rate of the probe."""
    rows = [row for row in results["speed"] if row["tokens"] > 1]
    shape = main_shape(rows)
    rows = select(rows, m=shape[0], k=shape[1])
    tokens = max(row["tokens"] for row in rows)
    rows = select(rows, tokens=tokens)
    names, threads, colours = kernels_in(rows), thread_counts(rows), kernel_colours(rows)
    figure = Figure(figsize=(7.2, 1.4 + 0.24 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(threads), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, threads, strict=True):
        group = select(rows, threads=count)
        probes = [probe_macs_per_s(results["limits"], row["isa"], count) for row in group]
        right = max([row["weights_per_s"] for row in group] + [probe or 0.0 for probe in probes]) / 1e9
        for row, probe in zip(group, probes, strict=True):
            y, rate = names.index(row["kernel"]), row["weights_per_s"] / 1e9
            axes.barh(y, rate, 0.66, color=colours[row["kernel"]])
            label = three_digits(rate)
            if probe is not None:
                probe /= 1e9
                axes.plot([probe, probe], [y - 0.4, y + 0.4], color="black", linewidth=2)
                label += f" ({percent(rate / probe)})"
            # A label that would lie across the tick goes behind it.
            anchor = rate if probe is None or rate + 0.42 * right < probe else max(rate, probe)
            axes.annotate(label, (anchor, y), (4, 0), textcoords="offset points", va="center", fontsize=7)
        axes.set_xlim(0, 1.42 * right)
        axes.set_title(threads_label(count))
        axes.set_xlabel("10⁹ multiply-adds/s (measured)")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    name_rows(panels[0], names)
    tick = Line2D([], [], ls="", marker="|", markersize=10, markeredgewidth=2, color="black")
    figure.legend(
        [tick], ["int8 multiply-add rate of a probe in the same instruction set (measured)"], loc="outside lower center"
    )
    title(figure, f"{tokens} tokens through a {shape_label(shape)} layer")
    return figure


if __name__ == "__main__":
    main(draw)
