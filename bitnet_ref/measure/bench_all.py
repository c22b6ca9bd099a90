"""The run behind the tables of the README: everything in one go, one result file, and the tables written from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet_ref import kernels
from bitnet_ref.measure import model_peers, speed
from bitnet_ref.measure.targets import BEST, GATE_ZEROS, NotMeasured, batch_times, judge, layers

__all__ = ["markdown", "measure_all", "model_table"]

_ISAS = (None, "avx2")
_MORE_MODELS = (
    model_peers.Variant("base3", "q6_k", "f16", GATE_ZEROS),  # rows that add nothing left out
    model_peers.Variant("base3", "q4_0", "f16"),  # how little memory will do
    model_peers.Variant("base3", "q6_k", "f32"),  # what is the default
)
_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 128)


def measure_all(
    command: str,
    folder: Path,
    peers: Sequence[str],
    quick: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """All parts, under one record and one run.

    Parameters
    ----------
    command : str
    folder : Path
        For the files of random models that all programs open.
    peers : sequence of str
        Of :data:`bitnet_ref.measure.peers.PEERS`; those of them that run models take part in that, too.
    quick : bool
        Fewer rounds, 128 tokens only, no whole models: a look at whether all is well, for no claim.
    progress : callable(label, fraction done), optional

    Returns
    -------
    dict
        record, quick, seconds, and parts: one_token, many_tokens, batches and models, each with rows (and limits).
    """
    report = progress or (lambda label, fraction: None)
    start = time.perf_counter()
    isas = _ISAS if "avx2" in kernels.processor_isas() else (None,)
    shapes = speed.SHAPES_2B4T
    n = 3 if quick else 7

    def within(low: float, high: float) -> Callable[[str, float], None]:
        return lambda label, fraction: report(label, low + (high - low) * fraction)

    parts = {
        "one_token": speed.measure_kernels(
            command, shapes, (1,), (1, None), isas, None, peers, n, within(0, 0.2)
        ),
        "many_tokens": speed.measure_kernels(
            command, shapes, (128,) if quick else (128, 512), (1, None), isas, ("base3", "i2"), peers, n,
            within(0.2, 0.45),
        ),
        "batches": speed.measure_kernels(
            command, shapes[-1:], _TOKENS, (1,) if quick else (1, None), isas, ("base3", "i2"), (), n,
            within(0.45, 0.55),
        ),
    }  # fmt: skip
    if not quick:
        models = [peer for peer in peers if peer in model_peers.TYPES]
        # With byte shuffles but no byte dot product tl2 may be the fastest packing for one token.
        isas = set(kernels.processor_isas())
        tables = ("tl2",) if "avx2" in isas and isas.isdisjoint({"avxvnni", "avx512vnni"}) else ()
        parts["models"] = model_peers.measure_models_beside_peers(
            command, folder, models, schemes=("base3", "i2", *tables), progress=within(0.55, 1.0), more=_MORE_MODELS
        )
    header = parts["one_token"]["record"]
    for part in parts.values():
        for row in part["rows"]:
            row["run"] = header["date"]
        header["load_average_after"] = part["record"]["load_average_after"]
        header["frequency_hz_after"] = part["record"]["frequency_hz_after"]
    return {
        "record": header,
        "quick": quick,
        "seconds": round(time.perf_counter() - start, 1),
        "parts": {name: {key: part[key] for key in part if key != "record"} for name, part in parts.items()},
    }


def markdown(document: Mapping[str, Any]) -> str:
    """The tables of a run, ready to paste."""
    about = document["record"]
    parts = {name: part["rows"] for name, part in document["parts"].items()}
    commit = about["commit"] or "outside a checkout"
    lines = [
        f"*{about['cpu']}, {about['cores']} processor(s), {about['compiler']}, commit {commit}, {about['date'][:10]}; "
        f"medians of {about['rounds']} interleaved rounds, every result verified in the same run; load before "
        f"{about['load_average'][0] if about['load_average'] else '?'}. Made by `{about['command']}` in "
        f"{document['seconds']:.0f} s.*",
        "",
    ]
    busy = sum(bool(row["busy"]) for rows in parts.values() for row in rows)
    total = sum(map(len, parts.values()))
    if busy:
        lines += [
            f"**Other processes used this machine in {busy} of {total} rows: these figures are not its own.**",
            "",
        ]
    if document["quick"]:
        lines += ["**A quick run: for no claim.**", ""]
    lines += _targets(parts)
    lines += _layer_table("One token through a layer of 2B4T, weights cold", parts.get("one_token", ()), 1)
    for tokens in (128, 512):
        lines += _layer_table(f"{tokens} tokens through a layer of 2B4T", parts.get("many_tokens", ()), tokens)
    lines += _batch_table(parts.get("batches", ()))
    lines += model_table(parts.get("models", ()))
    return "\n".join(lines).rstrip() + "\n"


def _targets(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = ["| work | what | target | result | |", "| --- | --- | --- | --- | --- |"]
    for verdict in judge(parts):
        target = verdict.target
        sign = "<=" if target.at_most else ">="
        goal = _value(target.goal, target.unit, 2)
        result = verdict.reason if verdict.value is None else _value(verdict.value, target.unit, 2)
        shown = f"**{verdict.verdict}**" if verdict.verdict == "short" else verdict.verdict
        lines.append(f"| {target.work} | {target.what} | {sign} {goal} | {result} | {shown} |")
    return [*lines, ""]


def _value(value: float, unit: str, digits: int) -> str:
    return f"{value:.0%}" if unit == "%" else f"{value:.{digits}f}{unit}"


def _layer_table(title: str, rows: Sequence[Mapping[str, Any]], tokens: int) -> list[str]:
    """Programs by threads: G weights a second, quartiles, share of the limit."""
    found = [row for row in layers(rows) if row["tokens"] == tokens]
    if not found:
        return []
    counts = sorted({row["threads"] for row in found})
    heads = [text for n in counts for text in (f"{n} thread{'s' if n > 1 else ''}, G/s", "of the limit")]
    lines = [f"### {title}", "", f"| program | type | instructions | {' | '.join(heads)} |"]
    lines.append("| --- " * (3 + len(heads)) + "|")
    names = dict.fromkeys((row["program"], row["type"], row["isa"]) for row in found)

    def rate(name: tuple[Any, ...]) -> float:
        return max(r["weights_per_s"] for r in found if (r["program"], r["type"], r["isa"]) == name)

    for program, type_name, isa in sorted(names, key=rate, reverse=True):
        cells = []
        for n in counts:
            row = next(
                (r for r in found if (r["program"], r["type"], r["isa"], r["threads"]) == (program, type_name, isa, n)),
                None,
            )
            if row is None:
                cells += ["", ""]
                continue
            low, high = (row["weights_per_s"] * row["median_ns"] / row[key] / 1e9 for key in ("high_ns", "low_ns"))
            cells += [f"{row['weights_per_s'] / 1e9:.1f} ({low:.1f}-{high:.1f})", f"{row['fraction_of_limit']:.0%}"]
        lines.append(f"| {program} | {type_name} | {isa or ''} | {' | '.join(cells)} |")
    return [*lines, ""]


def _batch_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    m, k = rows[0]["m"], rows[0]["k"]
    tokens = sorted({row["tokens"] for row in rows})
    lines = [f"### Small batches, {m} x {k}, microseconds", ""]
    lines.append(f"| type | instructions | threads | {' | '.join(map(str, tokens))} |")
    lines.append("| --- " * (3 + len(tokens)) + "|")
    for threads in sorted({row["threads"] for row in rows}):
        for isas in (BEST, ("avx2",)):
            for type_name in ("base3", "i2"):
                try:
                    ns = batch_times(rows, type_name, isas, threads)
                except NotMeasured:
                    continue
                cells = " | ".join(f"{ns[t] / 1e3:.0f}" for t in tokens)
                lines.append(f"| {type_name} | {'AVX2' if isas == ('avx2',) else 'AVX-512'} | {threads} | {cells} |")
    return [*lines, ""]


def model_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table of whole models: decode with quartiles, prefill, memory."""
    if not rows:
        return []
    counts = sorted({row["threads"] for row in rows})
    heads = [text for n in counts for text in (f"decode, {n} thr.", f"prefill {rows[0]['n_prompt']}, {n} thr.")]
    lines = ["### Whole model, tokens a second", ""]
    lines.append(f"| program | type | head | cache | {' | '.join(heads)} | peak RSS |")
    lines.append("| --- " * (5 + len(heads)) + "|")
    # Runs up to 2026-11-25 say nothing of caches and networks.
    keys = ("program", "type", "network", "gate_zeros", "head", "cache")
    for name in dict.fromkeys(tuple(row.get(key) for key in keys) for row in rows):
        of_name = {row["threads"]: row for row in rows if tuple(row.get(key) for key in keys) == name}
        cells = []
        for n in counts:
            row = of_name[n]
            low, high = 1e9 / row["high_ns"], 1e9 / row["low_ns"]
            cells += [
                f"{row['decode_tokens_per_s']:.1f} ({low:.1f}-{high:.1f})", f"{row['prefill_tokens_per_s']:.0f}"
            ]  # fmt: skip
        cells.append(f"{max(row['peak_resident_bytes'] for row in of_name.values()) / 1e6:.0f} MB")
        program, type_name, network, _, head, cache = name
        if network == "sparse":
            row = of_name[counts[-1]]
            type_name += (
                f"; of W_up {row['up_zeros']:.0%} add nothing, {row['up_listed']:.0%} of them read by lists, of W_down "
                f"{row['down_zeros']:.0%} and {row['down_listed']:.0%}"
            )
        lines.append(f"| {program} | {type_name} | {head} | {cache or ''} | {' | '.join(cells)} |")
    return [*lines, ""]
