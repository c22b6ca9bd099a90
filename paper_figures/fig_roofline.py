"""Roofline: multiply-adds a second over multiply-adds for each byte of weights read."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bitnet_ref.paper_figures import (
    kernel_colours,
    main,
    main_shape,
    plain_log_ticks,
    read_bandwidth,
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
    "Each point is a kernel, all measured in this run. Across: multiply-adds for each byte of weights, which follows "
    "from the packing and the number of tokens; up: multiply-adds a second. The slope is the measured read bandwidth, "
    "each level line is the measured int8 multiply-add rate of a probe in one instruction set, in registers alone. A "
    "point on the slope waits for memory, a point on a level line for the multiplier, and one below both for "
    "something else: decoding, or, for tl1 and tl2, table look-ups. The probes are ordinary programs, not proven "
    "bounds: a kernel may come out slightly above a line."
)

_MARKERS = "XosD^v"


@styled
def draw(results: dict[str, Any]) -> Figure:
    """One panel for each number of threads, log-log."""
    limits = results["limits"]
    shape = main_shape(results["speed"])
    rows = select(results["speed"], m=shape[0], k=shape[1])
    threads, colours = thread_counts(rows), kernel_colours(rows)
    isas = list(dict.fromkeys(row["isa"] for row in rows if row["isa"] is not None))
    markers: dict[str | None, str] = {isa: _MARKERS[i % len(_MARKERS)] for i, isa in enumerate(isas)}
    markers[None] = "*"

    xs = [row["tokens"] * row["m"] * row["k"] / row["weight_bytes"] for row in rows]
    ys = [row["weights_per_s"] / 1e9 for row in rows]
    probes = [row["median_per_s"] / 1e9 for row in select(limits, what="int8_multiply_adds")]
    one_token = [x for x, row in zip(xs, rows, strict=True) if row["tokens"] == min(r["tokens"] for r in rows)]
    # Free places for labels: along the slope between NumPy and the kernels, and right of the one-token points.
    beside_slope, between = math.sqrt(min(one_token) * max(one_token)), 2 * max(one_token)
    x_low, x_high = min(xs) / 2, max(xs) * 3
    y_low, y_high = min(ys) / 2, max([*ys, *probes]) * 2.5

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    panels = figure.subplots(1, len(threads), sharex=True, sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, threads, strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_log_ticks(axes.xaxis)
        plain_log_ticks(axes.yaxis)
        bandwidth = read_bandwidth(limits, count)
        rates = select(limits, what="int8_multiply_adds", threads=count)
        top = max((row["median_per_s"] / 1e9 for row in rates), default=y_high)
        if bandwidth is not None:
            bandwidth /= 1e9
            knee = min(x_high, top / bandwidth)
            axes.plot([x_low, knee], [x_low * bandwidth, knee * bandwidth], color="black")
            axes.annotate(
                f"read\nbandwidth\n{bandwidth:.1f} GB/s",
                (beside_slope, beside_slope * bandwidth),
                (-8, 2),
                textcoords="offset points",
                ha="right",
                fontsize=7.5,
            )
        for row in rates:
            rate = row["median_per_s"] / 1e9
            start = x_low if bandwidth is None else rate / bandwidth
            axes.plot([start, x_high], [rate, rate], color="black", linewidth=1)
            axes.annotate(
                f"{row['isa']} {three_digits(rate)}",
                (max(start, between), rate),
                (12, 2),
                textcoords="offset points",
                va="bottom",
                fontsize=7.5,
            )
        for row in select(rows, threads=count):
            axes.plot(
                row["tokens"] * row["m"] * row["k"] / row["weight_bytes"],
                row["weights_per_s"] / 1e9,
                markers[row["isa"]],
                markersize=6 if row["isa"] else 9,
                color=colours[row["kernel"]],
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=3,
            )
        axes.set_xlim(x_low, x_high)
        axes.set_ylim(y_low, y_high)
        axes.grid(which="major")
        axes.minorticks_off()
        axes.set_title(threads_label(count))
        axes.set_xlabel("multiply-adds for each byte of weights")
    panels[0].set_ylabel("10⁹ multiply-adds/s (measured)")

    schemes = {row["scheme"]: colours[row["kernel"]] for row in rows if row["scheme"] is not None}
    handles = [Line2D([], [], ls="", marker="s", color=colour, label=scheme) for scheme, colour in schemes.items()]
    handles += [
        Line2D([], [], ls="", marker=markers[isa], color="#444444", markeredgecolor="none", label=isa) for isa in isas
    ]
    handles.append(
        Line2D(
            [], [], ls="", marker="*", markersize=9, color=colours["numpy_float32"], markeredgecolor="none",
            label="NumPy float32",
        )
    )  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    tokens = sorted({row["tokens"] for row in rows})
    title(
        figure,
        f"Roofline of a {shape_label(shape)} layer: {' (left) and '.join(map(str, tokens))} (right) tokens at a time",
    )
    return figure


if __name__ == "__main__":
    main(draw)
