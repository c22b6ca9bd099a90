"""Energy of the six models with what the published figures leave out: the output head and the bytes moved."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from bitnet_ref.paper_figures import PART_COLOURS, main, percent, select, styled, title

SECTION = "energy"
KINDS = ("modelled",)
CAPTION = (
    "All modelled. Weight matrices and attention are what the published figures count, at the 7 nm prices of [BitNet, "
    "Table 2]; the FP16 output head and the weights read from memory are what they leave out. The price of a byte is "
    "an assumption, 162.5 pJ: 1.3 nJ for a 64-bit DRAM access, the lower end of the range in [Horowitz], for the "
    "memory of 2014. A forward pass over 512 tokens reads each weight once, a decoded token reads each again, at a "
    "context of 512. BitNet is stored as I2_S with an f16 embedding, the rivals as bf16. Activations and the "
    "key/value cache are not in the bytes. Figures behind the bars: total, and how many times BitNet's total."
)

_PARTS = {
    "linear": "weight matrices",
    "attention": "attention (QKᵀ and AV)",
    "head": "output head",
    "moved": "weights read from memory (assumed price)",
}


@styled
def draw(results: dict[str, Any]) -> Figure:
    """Stacked bars in mJ, a panel for each phase. Linear: parts of a stack mean nothing on a logarithmic scale."""
    rows = results["energy_parts"]
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    ratios: list[float] = []
    for axes, phase in zip(panels, phases, strict=True):
        totals = [sum(row["joules"] for row in select(rows, phase=phase, model=model)) for model in models]
        bitnet = next(total for total, model in zip(totals, models, strict=True) if model.startswith("BitNet"))
        left = [0.0] * len(models)
        for part, label in _PARTS.items():
            widths = [1e3 * select(rows, phase=phase, model=model, part=part)[0]["joules"] for model in models]
            axes.barh(range(len(models)), widths, 0.62, left=left, color=PART_COLOURS[part], label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for y, total in enumerate(totals):
            ratio = "" if total == bitnet else f"  {total / bitnet:.1f}×"
            axes.annotate(
                f"{1e3 * total:,.0f}{ratio}",
                (1e3 * total, y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        axes.set_xlim(0, 1.36e3 * max(totals))
        moved = [select(rows, phase=phase, model=model, part="moved")[0]["joules"] for model in models]
        arithmetic = max(1 - part / total for part, total in zip(moved, totals, strict=True))
        thin = f" (arithmetic ≤ {percent(arithmetic, 1)})" if arithmetic < 0.01 else ""
        axes.set_title(phase + thin, fontsize=8.5)
        ratios += [total / bitnet for total in totals if total != bitnet]
        axes.set_xlabel("millijoules (modelled)")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(models)), models)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    title(
        figure,
        f"With output head and memory reads, rivals take {min(ratios):.1f} to {max(ratios):.1f} times BitNet's energy",
    )
    return figure


if __name__ == "__main__":
    main(draw)
