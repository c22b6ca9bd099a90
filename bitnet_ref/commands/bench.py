"""``bench kernels``, ``bench all`` and ``bench table``, in one group with ``bench model``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bitnet_ref.commands import bar, command, emit, write_json
from bitnet_ref.commands.model import bench

__all__ = ["bench"]


class Numbers(click.ParamType):
    """Whole numbers of at least 1 with commas between; ``all`` is the default number of threads."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | None, ...]:
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",")]
        found = tuple(None if word == "all" else int(word) for word in words if word == "all" or word.isdigit())
        if len(found) != len(words) or 0 in found or (None in found and param is not None and param.name != "threads"):
            self.fail(f"expected whole numbers of at least 1 with commas between, got {value!r}", param, ctx)
        return found


class Words(click.ParamType):
    """Words with commas between."""

    name = "words"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(word for word in value.split(",") if word)


@bench.command("kernels")
@click.option("--shapes", default="2b4t", show_default=True, help="2b4t, qwen3-0.6b, or a JSON file of shapes.")
@click.option("--tokens", type=Numbers(), default="1,128", show_default=True, help="Batches, with commas between.")
@click.option("--threads", type=Numbers(), default="1,all", show_default=True, help="Numbers with commas between.")
@click.option("--isa", "isas", type=Words(), default="", help="Caps of the instruction set, as avx512vbmi,avx2.")
@click.option("--types", type=Words(), default="", help="Packings, as base3,i2. All by default.")
@click.option("--peers", type=Words(), default="", help="Among llama.cpp,ik_llama.cpp,torch,numpy.")
@click.option("--rounds", "n_rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Turns of each.")
@click.option("--json", "out", type=click.Path(path_type=Path, allow_dash=True), help="Write all rows here (-: print).")
@command
def bench_kernels(
    shapes: str,
    tokens: tuple[int, ...],
    threads: tuple[int | None, ...],
    isas: tuple[str, ...],
    types: tuple[str, ...],
    peers: tuple[str, ...],
    n_rounds: int,
    out: Path | None,
) -> None:
    """Time products with ternary matrices: ours and other programs', turn by turn, every result verified first."""
    from bitnet_ref.measure.shapes import load_shapes
    from bitnet_ref.measure.speed import measure_kernels

    words = ["bitnet-ref", "bench", "kernels", f"--shapes={shapes if '/' not in shapes else Path(shapes).name}"]
    words += [f"--tokens={','.join(map(str, tokens))}", f"--threads={','.join(str(n or 'all') for n in threads)}"]
    for option, values in (("isa", isas), ("types", types), ("peers", peers)):
        words += [f"--{option}={','.join(values)}"] if values else []
    with bar() as progress:
        task = progress.add_task("starting", total=1.0)
        found = measure_kernels(
            shlex.join([*words, f"--rounds={n_rounds}"]),
            load_shapes(shapes),
            tokens,
            threads,
            isas or (None,),
            types or None,
            peers,
            n_rounds,
            progress=lambda label, fraction: progress.update(task, description=label, completed=fraction),
        )
    if out is not None and str(out) == "-":
        emit(found)
        return
    if out is not None:
        write_json(out, found)
    _print(found)


@bench.command("all")
@click.option("--peers", type=Words(), default="llama.cpp,ik_llama.cpp,torch,numpy", show_default=True)
@click.option("--quick", is_flag=True, help="Two minutes: fewer rounds and tokens, no whole models. For no claim.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The result file to write.")
@command
def bench_all(peers: tuple[str, ...], quick: bool, out: Path) -> None:
    """Everything that the README shows, in one run: products of one and many tokens, small batches, whole models."""
    from bitnet_ref.measure.bench_all import markdown, measure_all

    out.parent.mkdir(parents=True, exist_ok=True)
    words = ["bitnet-ref", "bench", "all", f"--peers={','.join(peers)}", *(["--quick"] if quick else [])]
    with bar() as progress:
        task = progress.add_task("starting", total=1.0)
        found = measure_all(
            shlex.join(words),
            out.parent,
            peers,
            quick,
            lambda label, fraction: progress.update(task, description=label, completed=fraction),
        )
    write_json(out, found)
    tables = out.with_suffix(".md")
    tables.write_text(markdown(found), encoding="utf-8")
    click.echo(f"results written to {out}, tables to {tables}")


@bench.command("table")
@click.argument("results", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@command
def bench_table(results: Path) -> None:
    """The tables of a result file of ``bench all`` as Markdown: targets, layers, batches, models."""
    from bitnet_ref.measure.bench_all import markdown

    try:
        document = json.loads(results.read_text(encoding="utf-8"))
        text = markdown(document)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{results.name} is no result of bench all: {type(error).__name__} {error}") from None
    click.echo(text, nl=False)


def _print(found: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(box=None, header_style="bold")
    table.add_column("program")
    table.add_column("type")
    table.add_column("instructions")
    columns = {
        "M x K": lambda r: f"{r['m']} x {r['k']}",
        "tokens": lambda r: str(r["tokens"]),
        "threads": lambda r: str(r["threads"]),
        "us": lambda r: f"{r['median_ns'] / 1e3:.1f}",
        "quartiles": lambda r: f"{r['low_ns'] / 1e3:.1f}-{r['high_ns'] / 1e3:.1f}",
        "Gweights/s": lambda r: f"{r['weights_per_s'] / 1e9:.1f}",
        "of the limit": lambda r: f"{r['fraction_of_limit']:.0%} {_LIMITS[r['limit']]}",
        "error": lambda r: f"{r['error']:.1g}" if r["error"] else "exact",
    }
    for column in columns:
        table.add_column(column, justify="right")
    for row in found["rows"]:
        shown = [show(row) for show in columns.values()] if row["verified"] else ["not verified"]
        table.add_row(row["program"], row["type"], row["isa"] or "", *shown)
    console.print(table)
    for limit in found["limits"]:
        console.print(
            f"{limit['what'].replace('_', ' ')} {limit['isa'] or ''} {limit['threads']} thread(s): "
            f"{limit['median_per_s'] / 1e9:.1f} G{limit['unit']}",
            highlight=False,
        )
    busy = [row for row in found["rows"] if row["busy"]]
    if busy:
        worst = max(row["others"] for row in busy)
        console.print(
            f"busy: in {len(busy)} of {len(found['rows'])} rows other processes took up to {worst:.0%} of all "
            "processors; these figures are not the machine's",
            style="bold",
        )


_LIMITS = {"read_bandwidth": "of reading", "int8_multiply_adds": "of int8"}
