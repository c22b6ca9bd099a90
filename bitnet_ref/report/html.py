"""The page: figures, summary and tables, made from the results."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import bitnet_ref
from bitnet_ref import paper_figures
from bitnet_ref.measure.energy import COUNTED, LEFT_OUT, arithmetic_ratio
from bitnet_ref.paper_figures import (
    main_shape,
    percent,
    select,
    shape_label,
    thread_counts,
    threads_label,
    three_digits,
)

__all__ = ["Column", "Figure", "Table", "figures_of", "references", "render", "tables"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A drawn figure: where it belongs, what it shows, and its PNG as text."""

    name: str
    section: str
    kinds: tuple[str, ...]
    caption: str
    alt: str
    png_base64: str


@dataclass(frozen=True)
class Column:
    """A column of a table: heading, unit and kind of its contents (empty where there is none), and how to write a cell.

    Numbers stand at the right, text at the left.
    """

    heading: str
    unit: str
    kind: str
    cell: Callable[[Row], str]
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page: all cells are text. `sources` are the distinct sources of its rows."""

    title: str
    columns: tuple[Column, ...]
    cells: tuple[tuple[str, ...], ...]
    sources: tuple[str, ...]
    note: str = ""
    folded: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column.kind for column in self.columns if column.kind))


def _table(
    title: str,
    columns: Sequence[Column],
    rows: Iterable[Row],
    *,
    note: str = "",
    folded: bool = False,
    source: str = "",
) -> Table:
    rows = list(rows)
    # A source may have several parts; each is named once.
    parts = dict.fromkeys(part for row in rows for part in row["source"].split("; ")) if not source else [source]
    return Table(
        title=title,
        columns=tuple(columns),
        cells=tuple(tuple(column.cell(row) for column in columns) for row in rows),
        sources=tuple(parts),
        note=note,
        folded=folded,
    )


def _text(heading: str, key: str) -> Column:
    return Column(heading, "", "", lambda row: str(row[key]))


def _number(heading: str, unit: str, kind: str, key: str, form: str, factor: float = 1) -> Column:
    def cell(row: Row) -> str:
        return "–" if row[key] is None else format(row[key] * factor, form)

    return Column(heading, unit, kind, cell, numeric=True)


# --------------------------------------------------------------------------------------------------------- figures
def figures_of(results: Row, folder: Path) -> list[Figure]:
    """Draw every figure that the results have data for, as PNG and PDF in `folder`."""
    drawn = []
    for name in paper_figures.FIGURES:
        module = paper_figures.load(name)
        if module.SECTION not in results:
            continue
        figure = module.draw(results)
        for suffix in (".pdf", ".png"):
            paper_figures.save(figure, folder / (name + suffix))
        drawn.append(
            Figure(
                name=name,
                section=module.SECTION,
                kinds=module.KINDS,
                caption=module.caption(results) if hasattr(module, "caption") else module.CAPTION,
                alt=figure.get_suptitle(),
                png_base64=base64.b64encode((folder / f"{name}.png").read_bytes()).decode("ascii"),
            )
        )
    return drawn


# ---------------------------------------------------------------------------------------------------------- tables
def tables(results: Row) -> dict[str, list[Table]]:
    """Section -> its tables."""
    made = {"memory": _memory_tables(results), "energy": _energy_tables(results), "speed": _speed_tables(results)}
    if "parity" in results:
        made["models"] = _model_tables(results)
    if "weights" in results:
        made["weights"] = _weight_tables(results["weights"])
    return made


def _memory_tables(results: Row) -> list[Table]:
    rows = results["memory"]
    accounts = select(rows, table="account")
    contexts = sorted({row["tokens"] for row in select(rows, table="kv")})
    caches = [
        {
            "model": model,
            "source": select(rows, table="kv", model=model)[0]["source"],
            **{str(row["tokens"]): row["mib"] for row in select(rows, table="kv", model=model)},
        }
        for model in dict.fromkeys(row["model"] for row in select(rows, table="kv"))
    ]
    return [
        _table(
            "From “0.4 GB” to a whole model (BitNet b1.58 2B4T)",
            [
                _text("step", "step"),
                _number("size", "bytes", "modelled", "bytes", ",d"),
                _number("size", "MB", "modelled", "mb", ",.1f"),
                _number("size", "MiB", "modelled", "mib", ",.3f"),
                Column(
                    "printed by others",
                    "as printed",
                    "quoted",
                    lambda row: f"{row['published']} ({row['published_source']})" if row["published"] else "",
                ),
                _text("reason", "reason"),
            ],
            select(rows, table="steps"),
        ),
        _table(
            "Every part of every model, to the byte",
            [
                _text("model", "model"),
                _text("blocks", "body"),
                _number("whole model", "bytes", "modelled", "total_bytes", ",d"),
                _number("matrices", "bytes", "modelled", "matrices_bytes", ",d"),
                _number("scales", "bytes", "modelled", "scales_bytes", ",d"),
                _number("norms", "bytes", "modelled", "norms_bytes", ",d"),
                _number("biases", "bytes", "modelled", "biases_bytes", ",d"),
                _number("embedding and head", "bytes", "modelled", "embedding_bytes", ",d"),
                _number("KV cache", "bytes", "modelled", "kv_bytes", ",d"),
            ],
            accounts,
            note=f"The cache is that of one sequence of {accounts[0]['kv_tokens']:,} tokens in f16, within the sliding "
            "window of Gemma-3. Embedding and head are one table in all six models. BitNet has an f16 embedding and "
            "f32 norms, the rivals are bf16 throughout. TQ1_0 and TQ2_0 keep an f16 scale in every 256 weights, "
            "counted with the matrices.",
        ),
        _table(
            "BitNet and its five rivals",
            [
                _text("model", "model"),
                _text("blocks stored as", "body"),
                _number("blocks, published", "GB", "quoted", "published_gb", "g"),
                _number("blocks", "GB", "modelled", "modelled_gb", ".2f"),
                _number("whole model", "MB", "modelled", "whole_model_mb", ",.1f"),
                _number("KV cache, f16", "bytes a token", "modelled", "kv_bytes_per_token", ",d"),
                _text("remark", "remark"),
            ],
            select(rows, table="rivals"),
            note="Whole model: blocks, norms, biases and embedding; bf16 for the rivals, I2_S with an f16 embedding "
            "for BitNet. The KV cache of Gemma-3 is that within its sliding window.",
        ),
        _table(
            "The embedding of BitNet b1.58 2B4T",
            [
                _text("type", "embedding"),
                _number("embedding", "MB", "modelled", "embedding_mb", ",.1f"),
                _number("whole model", "MB", "modelled", "total_mb", ",.1f"),
                _number("whole model", "MiB", "modelled", "total_mib", ",.1f"),
                _number("head, of the matrix bytes read for a token", "%", "modelled", "head_share", ".1f", 100),
            ],
            select(rows, table="embedding"),
            note="Blocks as I2_S, norms in f32, no cache.",
        ),
        _table(
            "The blocks of BitNet b1.58 2B4T in every layout",
            [
                _text("layout", "body"),
                _number("weights", "bytes", "modelled", "body_bytes", ",d"),
                _number("weights", "MB", "modelled", "body_mb", ",.1f"),
                _number("a weight", "bits", "modelled", "bits_per_weight", ".4f"),
                _number("scales", "bytes", "modelled", "scale_bytes", ",d"),
                _text("note", "note"),
            ],
            select(rows, table="body"),
            folded=True,
        ),
        _table(
            "Key/value cache of one sequence, f16",
            [_text("model", "model")]
            + [_number(f"{tokens:,} tokens", "MiB", "modelled", str(tokens), ",.1f") for tokens in contexts],
            caches,
            folded=True,
        ),
    ]


def _energy_tables(results: Row) -> list[Table]:
    left_out = []
    rows = results["energy_left_out"]
    for phase in dict.fromkeys(row["phase"] for row in rows):
        for case in dict.fromkeys(row["case"] for row in rows):
            group = select(rows, phase=phase, case=case)
            bitnet = next(row for row in group if row["bitnet_saving"] is None)
            savings = [row["bitnet_saving"] for row in group if row["bitnet_saving"] is not None]
            left_out.append({**bitnet, "low": min(savings), "high": max(savings)})
    made = [
        _table(
            "The six energies of the 2B4T report: one forward pass over 512 tokens",
            [
                _text("model", "model"),
                _number("published", "J", "quoted", "published_joules", ".3f"),
                _number("model", "J", "modelled", "modelled_joules", ".4f"),
                _number("difference", "%", "modelled", "relative_difference", "+.2f", 100),
                _number("weight matrices", "J", "modelled", "linear_joules", ".4f"),
                _number("attention", "J", "modelled", "attention_joules", ".4f"),
                _number("share of attention", "%", "modelled", "attention_share", ".1f", 100),
            ],
            results["energy"],
        ),
        _table(
            "What the published figure leaves out",
            [
                _text("phase", "phase"),
                _text("case", "case"),
                _number("BitNet, arithmetic", "mJ", "modelled", "compute_joules", ".4g", 1e3),
                _number("BitNet, weights read", "MB", "modelled", "moved_bytes", ",.1f", 1e-6),
                _number("BitNet, total", "mJ", "modelled", "joules", ".4g", 1e3),
                Column(
                    "saving over the five rivals",
                    "%",
                    "modelled",
                    lambda row: f"{100 * row['low']:.0f} to {100 * row['high']:.0f}",
                    numeric=True,
                ),
            ],
            left_out,
            note="“INT8 attention in BitNet” is an alternative and is not carried on to the next cases. The price of a "
            "byte read from memory is an assumption; memory that is newer than 2014 takes less.",
        ),
        _table(
            "Ratios at the sizes of the b1.58 paper: FP16 over ternary, 512 tokens, 7 nm",
            [
                _text("size", "size"),
                _number("FP16", "J", "modelled", "fp16_joules", ".3f"),
                _number("ternary", "J", "modelled", "ternary_joules", ".3f"),
                _number("ratio", "times", "modelled", "ratio", ".1f"),
                _number("ratio with an FP16 head on both", "times", "modelled", "ratio_with_head", ".1f"),
            ],
            results["energy_b158"],
            folded=True,
        ),
        _table(
            "Table 1 of the first BitNet paper, all 36 cells",
            [
                _text("size", "size"),
                _text("model", "model"),
                _text("operation", "operation"),
                _number("circuit", "nm", "quoted", "node_nm", "d"),
                _number("published", "J", "quoted", "published_joules", ".2f"),
                _number("model", "J", "modelled", "modelled_joules", ".4f"),
                Column("prints as published", "", "", lambda row: "yes" if row["within_rounding"] else "no"),
            ],
            results["energy_bitnet_table"],
            folded=True,
        ),
        _table(
            "What measurements of others imply: joules a token times tokens a second",
            [
                _text("machine", "machine"),
                _text("size", "size"),
                _text("program", "program"),
                _number("energy", "J a token", "quoted", "published_joules_per_token", "g"),
                _number("speed", "tokens/s", "quoted", "published_tokens_per_s", "g"),
                _number("power implied", "W", "modelled", "implied_watts", ".1f"),
                _number("saving", "%", "modelled", "saving", ".1f", 100),
                _number(
                    "saving that the speed-up alone would give", "%", "modelled", "saving_at_equal_power", ".1f", 100
                ),
            ],
            results["energy_implied_watts"],
            note="Power and savings are computed here from the quoted figures; that both tables describe the same runs "
            "is not stated there.",
            folded=True,
        ),
    ]
    if results["energy_measured"]["available"]:
        made.append(
            _table(
                "Energy counters of this machine",
                [
                    _text("counter", "domain"),
                    _text("window", "window"),
                    _number("time", "s", "measured", "seconds", ".1f"),
                    _number("energy", "J", "measured", "joules", ".2f"),
                    _number("power", "W", "measured", "watts", ".1f"),
                    _number("energy", "J for 10⁹ weights", "measured", "joules_per_1e9_weights", ".3g"),
                ],
                results["energy_measured"]["rows"],
                note="The counters see every program on the machine. Zones are nested, so they are not added; idle "
                "energy is not subtracted.",
            )
        )
    return made


_SPEED_SOURCE = "timed on this machine in this run; medians and quartiles over rounds in which all programs take turns"


def _speed_columns() -> list[Column]:
    return [
        Column("kernel", "", "", lambda row: paper_figures.kernel_label(row["kernel"])),
        _number("threads", "", "", "threads", "d"),
        _number("time, median", "µs", "measured", "median_ns", ",.1f", 1e-3),
        Column(
            "time, quartiles",
            "µs",
            "measured",
            lambda row: f"{row['low_ns'] / 1e3:,.1f} – {row['high_ns'] / 1e3:,.1f}",
            numeric=True,
        ),
        _number("speed", "10⁹ weights/s", "measured", "weights_per_s", ".2f", 1e-9),
        _number("of the read bandwidth", "%", "measured", "read_bandwidth_fraction", ".1f", 100),
        _number("rounds", "", "measured", "repeats", "d"),
    ]


def _speed_tables(results: Row) -> list[Table]:
    rows = results["speed"]
    shape = main_shape(rows)
    made = []
    for tokens in sorted({row["tokens"] for row in rows}):
        made.append(
            _table(
                f"{_tokens_label(tokens)}, layer of {shape_label(shape)}",
                # Weights that are read once for many tokens say little about the memory.
                [column for column in _speed_columns() if tokens == 1 or column.heading != "of the read bandwidth"],
                select(rows, tokens=tokens, m=shape[0], k=shape[1]),
                source=_SPEED_SOURCE,
                folded=True,
            )
        )
    made.append(
        _table(
            "Every shape, one token and many",
            [
                Column("layer", "M × K", "", lambda row: shape_label((row["m"], row["k"]))),
                _number("tokens", "", "", "tokens", "d"),
                *_speed_columns(),
            ],
            rows,
            source=_SPEED_SOURCE,
            folded=True,
        )
    )
    made.append(
        _table(
            "What this machine can do: probes of its memory and its multipliers",
            [
                Column("probe", "", "", lambda row: row["what"].replace("_", " ")),
                Column("instruction set", "", "", lambda row: row["isa"] or "any"),
                _number("threads", "", "", "threads", "d"),
                Column("median", "10⁹/s", "measured", lambda row: f"{row['median_per_s'] / 1e9:.1f}", numeric=True),
                Column(
                    "quartiles",
                    "10⁹/s",
                    "measured",
                    lambda row: f"{row['low_per_s'] / 1e9:.1f} – {row['high_per_s'] / 1e9:.1f}",
                    numeric=True,
                ),
                Column("of", "", "", lambda row: {"B/s": "bytes", "MAC/s": "multiply-adds"}[row["unit"]]),
                _number("rounds", "", "measured", "repeats", "d"),
            ],
            results["limits"],
            source="probes of this package, timed on this machine in this run",
            note="A probe is an ordinary program, not a proven bound: a kernel may come out slightly above it.",
        )
    )
    return made


def _layer_errors(row: Row) -> str:
    return ", ".join(f"{1e6 * error:.2f}" for error in row["layer_errors"])


def _model_tables(results: Row) -> list[Table]:
    made = [
        _table(
            "Parity with transformers: one random network of each published kind",
            [
                _text("network", "case"),
                _text("class there", "class"),
                _text("sizes", "network"),
                _number("compared", "tensors", "measured", "tensors", "d"),
                _number("logits, error over range", "10⁻⁶", "measured", "logits_error", ".2f", 1e6),
                _number("worst tensor", "10⁻⁶", "measured", "worst_error", ".2f", 1e6),
                Column("worst of each layer", "10⁻⁶", "measured", _layer_errors),
                _number("greedy, the same", "tokens", "measured", "same_tokens", "d"),
                _number("at a tie", "activations", "measured", "flips", "d"),
                _number("kernels and reference, logits", "10⁻⁶", "measured", "kernels_to_reference", ".2f", 1e6),
            ],
            results["parity"],
            note="float32 there and here, every tensor of every layer. An activation at a tie may round to the other "
            "int8; then theirs is taken and the last column is left out (–).",
        )
    ]
    files = results["model_files"]
    columns = [
        _text("form", "form"),
        _text("embedding", "embedding"),
        *(
            _number(heading, "bytes", "", key, ",d")
            for heading, key in (
                ("ternary matrices", "matrices_bytes"),
                ("scales and norms", "small_bytes"),
                ("embedding and head", "embedding_bytes"),
            )
        ),
    ]

    def of(kind: str) -> list[Column]:
        return [replace(column, kind=kind if column.numeric else "") for column in columns]

    modelled, measured = (select(files, kind=kind) for kind in ("modelled", "measured"))
    made.append(
        _table(
            "Files of a 2B4T-size model, beside “0.4 GB”",
            [
                *of("modelled"),
                _number("all", "bytes", "modelled", "total_bytes", ",d"),
                _number("all, over 0.4 GB", "times", "modelled", "over_published", ".2f"),
            ],
            [{**row, "over_published": row["total_bytes"] / 0.4e9} for row in modelled],
            note="From shapes, to the byte; the header and the vocabulary of a file (some MB) are not counted. 0.4 GB "
            "is the figure of [2B4T, Table 1], without the embedding.",
        )
    )
    if measured:
        made.append(
            _table(
                f"Files of the packaged model {measured[0]['model']}, written in every form",
                [
                    *of("measured"),
                    _number("headers, vocabulary", "bytes", "measured", "header_bytes", ",d"),
                    _number("all", "bytes", "measured", "total_bytes", ",d"),
                ],
                measured,
            )
        )
    if "model_speed" in results:
        rows = results["model_speed"]
        made.append(
            _table(
                "Tokens a second of a 2B4T-size model, by packing and head",
                [
                    _text("packing", "scheme"),
                    _text("head", "head"),
                    _number("threads", "", "", "threads", "d"),
                    _number("writing", "tokens/s", "measured", "decode_tokens_per_s", ".1f"),
                    _number("reading a prompt", "tokens/s", "measured", "prefill_tokens_per_s", ".1f"),
                    _number("read for a token", "MB", "modelled", "bytes_per_token", ",.1f", 1e-6),
                    _number("of the read bandwidth", "%", "measured", "read_bandwidth_fraction", ".0f", 100),
                    _number("products with ternary matrices", "%", "measured", "product_fraction", ".0f", 100),
                    _number("head", "%", "measured", "head_fraction", ".0f", 100),
                    _number("Python", "%", "measured", "python_fraction", ".1f", 100),
                ],
                rows,
                note=f"Random weights; a prompt of {rows[0]['n_prompt']} tokens (too short to show the speed of long "
                f"ones), then {rows[0]['n_generate']} steps. Read bandwidth in the same run: "
                f"{rows[0]['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s. The last three columns are shares of a step.",
            )
        )
    return made


def _weight_tables(weights: Row) -> list[Table]:
    linear = [row for row in weights["tensors"] if row["role"] == "linear" and row["relative_error"] is not None]
    columns = [
        _text("tensor", "name"),
        Column("shape", "", "", lambda row: " × ".join(map(str, row["shape"]))),
        _text("type", "type"),
        _number("scale", "", "measured", "scale", ".5g"),
        _number("zeros", "%", "measured", "fraction_zeros", ".2f", 100),
        _number("entropy", "bits a weight", "measured", "entropy_bits", ".3f"),
        _number("relative error", "%", "measured", "relative_error", ".2f", 100),
    ]
    return [_table("Every linear layer", columns, linear, note=" ".join(weights["notes"]), folded=True)]


# --------------------------------------------------------------------------------------------------------- summary
def disturbances(results: Row) -> dict[int, list[str]]:
    """Thread counts with which this run was slower than with fewer -> what was slower, in sentences; empty if none was.

    More threads read no less memory and multiply no fewer weights, unless something else takes a processor from them.
    Every ratio at such a thread count says more about that than about a kernel.
    """
    shape = main_shape(results["speed"])
    rows = [row for row in select(results["speed"], m=shape[0], k=shape[1]) if row["program"] != "numpy"]
    bandwidths = {row["threads"]: row["median_per_s"] for row in select(results["limits"], what="read_bandwidth")}
    series = {
        "the read bandwidth": (bandwidths, "GB/s"),
        **{
            f"the fastest kernel with {_tokens_label(tokens)}": (
                {
                    threads: max(row["weights_per_s"] for row in select(rows, tokens=tokens, threads=threads))
                    for threads in thread_counts(rows)
                },
                "· 10⁹/s",
            )
            for tokens in sorted({row["tokens"] for row in rows})
        },
    }
    found: dict[int, list[str]] = {}
    for what, (rates, unit) in series.items():
        for many in sorted(rates):
            few = max((threads for threads in rates if threads < many), key=rates.__getitem__, default=many)
            if rates[many] < rates[few]:
                found.setdefault(many, []).append(
                    f"On {threads_label(many)} {what} was below that on {threads_label(few)} "
                    f"({three_digits(rates[many] / 1e9)} against {three_digits(rates[few] / 1e9)} {unit})."
                )
    return found


def _tokens_label(tokens: int) -> str:
    return f"{tokens} token{'' if tokens == 1 else 's'}"


def _best_gemv_table(results: Row) -> Table:
    """The fastest kernel of each packing for one token, beside the scalar kernel and NumPy on as many threads.

    No ratios for a thread count with which the run was disturbed.
    """
    rows = select(results["speed"], tokens=1)
    shape = main_shape(rows)
    rows = select(rows, m=shape[0], k=shape[1])
    disturbed = disturbances(results)
    best = []
    for scheme in dict.fromkeys(row["scheme"] for row in rows if row["scheme"] is not None):
        for threads in thread_counts(rows):
            candidates = select(rows, scheme=scheme, threads=threads)
            row = max(candidates, key=lambda candidate: candidate["weights_per_s"])
            scalar = select(candidates, isa="scalar")
            numpy = select(rows, program="numpy", threads=threads)
            if threads in disturbed:
                best.append({**row, **dict.fromkeys(("read_bandwidth_fraction", "over_scalar", "over_numpy"))})
                continue
            best.append(
                {
                    **row,
                    "over_scalar": row["weights_per_s"] / scalar[0]["weights_per_s"] if scalar else None,
                    "over_numpy": row["weights_per_s"] / numpy[0]["weights_per_s"] if numpy else None,
                }
            )
    return _table(
        f"Fastest kernel of each packing: one token, layer of {shape_label(shape)}",
        [
            _text("packing", "scheme"),
            _number("threads", "", "", "threads", "d"),
            _text("kernel", "kernel"),
            _number("speed", "10⁹ weights/s", "measured", "weights_per_s", ".1f", 1e-9),
            _number("of the read bandwidth", "%", "measured", "read_bandwidth_fraction", ".0f", 100),
            _number("over the scalar kernel of the packing", "times", "measured", "over_scalar", ".1f"),
            _number("over NumPy float32", "times", "measured", "over_numpy", ".1f"),
        ],
        best,
        source=_SPEED_SOURCE,
        note="– where the scalar kernel of the packing was not timed"
        + (", and where the run was disturbed." if disturbed else "."),
    )


@dataclass(frozen=True)
class Finding:
    """One line of the summary box."""

    subject: str
    kinds: tuple[str, ...]
    text: str


def findings(results: Row) -> list[Finding]:
    """The main results in sentences, every number computed from the results."""
    steps = {row["step"]: row["mb"] for row in select(results["memory"], table="steps")}
    whole = steps["+ embedding in f16"]
    f16 = select(results["memory"], table="embedding", embedding="f16")[0]
    energies = results["energy"]
    bitnet = next(row for row in energies if row["model"].startswith("BitNet"))
    worst = max(abs(row["relative_difference"]) for row in energies)
    published = [1 - bitnet["published_joules"] / row["published_joules"] for row in energies if row is not bitnet]

    def saving(phase: str, case: str) -> str:
        values = [
            row["bitnet_saving"]
            for row in select(results["energy_left_out"], phase=phase, case=case)
            if row["bitnet_saving"] is not None
        ]
        return f"{100 * min(values):.0f} to {100 * max(values):.0f} %"

    lines = [
        Finding(
            "Memory",
            ("modelled", "quoted"),
            f"The published 0.4 GB is the ternary matrices alone at log2(3) bits: {steps['body at log2(3) bits']:.1f} "
            f"MB. Stored, they take {steps['body at 1.6 bits']:.1f} MB at 1.6 bits or {steps['body at 2 bits']:.1f} MB "
            f"at 2. The whole model as released, with its f16 embedding, takes {whole:,.1f} MB: "
            f"{steps['whole model, bf16'] / whole:.2f} times less than in bf16. The head is "
            f"{percent(f16['head_share'])} of the matrix bytes read for a token.",
        ),
        Finding(
            "Energy",
            ("modelled", "quoted"),
            f"The operation-count model gives all six published energies within {percent(worst, 1)}. They are for a "
            f"forward pass over 512 tokens, not for a token, and {percent(bitnet['attention_share'])} of BitNet's is "
            f"FP16 attention. The saving of {100 * min(published):.0f} to {100 * max(published):.0f} % that they give "
            f"becomes {saving('512-token forward', '+ weights read from memory')} with the output head and the weights "
            f"read from memory, and {saving('one decoded token', '+ weights read from memory')} for a decoded token, "
            "at an assumed price of a byte.",
        ),
    ]
    if results["energy_measured"]["available"]:
        lines.append(Finding("Energy counter", ("measured",), "This machine has one; see the section on energy."))
    else:
        reason = results["energy_measured"]["reason"]
        lines.append(Finding("Energy counter", (), f"{reason[0].upper()}{reason[1:]}."))
    return [*lines, *_speed_findings(results)]


def _speed_findings(results: Row) -> list[Finding]:
    """The fastest kernel for one token and for many, on one thread and on all, in the layer of the summary.

    A thread count with which the run was disturbed gets a sentence that says so, and no figure.
    """
    rows = results["speed"]
    shape = main_shape(rows)
    disturbed = disturbances(results)
    lines = []
    for tokens in sorted({row["tokens"] for row in rows}):
        sentences = []
        for threads in thread_counts(rows):
            if threads in disturbed:
                sentences.append(f"The run on {threads_label(threads)} was disturbed and gives no ratios; see below.")
                continue
            group = select(rows, m=shape[0], k=shape[1], tokens=tokens, threads=threads)
            own = max(
                (row for row in group if row["program"] != "numpy"), key=lambda candidate: candidate["weights_per_s"]
            )
            rate = own["weights_per_s"]
            of_bandwidth = f", {percent(own['read_bandwidth_fraction'])} of the read bandwidth" if tokens == 1 else ""
            times = "".join(
                f", {rate / row['weights_per_s']:.1f} times NumPy float32" for row in select(group, program="numpy")
            )
            sentences.append(
                f"On {threads_label(threads)} {own['kernel']} does {three_digits(rate / 1e9)} · 10⁹ "
                f"{'weights' if tokens == 1 else 'multiply-adds'} a second{of_bandwidth}{times}."
            )
        subject = f"Speed, {_tokens_label(tokens)}, layer of {shape_label(shape)}"
        lines.append(Finding(subject, ("measured",), " ".join(sentences)))
    return lines


def cautions(results: Row) -> list[str]:
    """What in this run speaks against its own measurements; empty if nothing does."""
    found = []
    load, cores = results["record"]["load_average"], results["record"]["cores"]
    # A quarter of the processors taken by others is enough to stall one thread of a parallel product.
    if load and load[0] > cores / 4:
        found.append(
            f"Other programs were using the machine when the run began: load average {load[0]} on {cores} processors."
        )
    found += [
        f"{' '.join(sentences)} Threads wait for the slowest, so this is what happens when other programs take a "
        "processor. Run again on a quiet machine before using these figures."
        for _, sentences in sorted(disturbances(results).items())
    ]
    return found


# ------------------------------------------------------------------------------------------------------------ page
_RECORD_LABELS = {
    "date": "date (UTC)",
    "cpu": "processor",
    "cores": "processors that the program may use",
    "cache_bytes": "last-level cache",
    "memory_bytes": "memory",
    "isas": "instruction sets",
    "isa_cap": "BITNET_REF_ISA",
    "active": "selected kernels",
    "openmp": "OpenMP",
    "threads": "threads by default",
    "python": "Python",
    "numpy": "NumPy",
    "load_average": "load average before the run (1, 5, 15 minutes)",
    "quick": "quick run (fewer shapes and kernels)",
    "seconds": "duration of the run",
}


def record_rows(record: Row) -> list[tuple[str, str]]:
    """Label and value of every entry of the record, for people."""
    return [(_RECORD_LABELS.get(key, key), _record_value(key, value)) for key, value in record.items()]


def _record_value(key: str, value: Any) -> str:
    if value is None:
        return "not set" if key == "isa_cap" else "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes"):
        return f"{value:,} bytes ({value / 2**20:,.0f} MiB)"
    if key == "seconds":
        return f"{value:,.0f} s"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def references() -> list[tuple[str, str]]:
    """Key and text of every paper, from the list in the docstring of the package."""
    return re.findall(r"^(\[[^\]]+\]) +(.+)$", bitnet_ref.__doc__ or "", flags=re.MULTILINE)


def _badges(kinds: Iterable[str]) -> Markup:
    return Markup(" ").join(Markup('<span class="badge {0}">{0}</span>').format(kind) for kind in kinds)


def render(results: Row, figures: list[Figure]) -> str:
    """The page as one string of HTML that refers to nothing outside itself."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["badges"] = _badges
    template = environment.from_string(
        resources.files("bitnet_ref.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    shapes = list(dict.fromkeys(shape_label((row["m"], row["k"])) for row in results["speed"]))
    return template.render(
        results=results,
        record=results["record"],
        record_rows=record_rows(results["record"]),
        findings=findings(results),
        cautions=cautions(results),
        best=_best_gemv_table(results),
        tables=tables(results),
        figures={
            section: [figure for figure in figures if figure.section == section]
            for section in ("memory", "energy", "speed", "training", "weights")
        },
        references=references(),
        arithmetic_ratio=arithmetic_ratio(),
        counted=COUNTED,
        left_out=LEFT_OUT,
        shapes=shapes,
        tokens=sorted({row["tokens"] for row in results["speed"]}),
    )
