"""The commands ``trace`` and ``diff``: find the first tensor in which two programs differ."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bitnet_ref.commands import command, emit, json_option

__all__ = ["diff", "trace"]


def _tokens(_context: click.Context, _parameter: click.Parameter, text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"must be integers separated by commas, got {text!r}") from None


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--tokens", required=True, callback=_tokens, help="Token numbers, separated by commas.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The trace to write.")
@click.option("--bug", help="Compute with a known bug, to see what it does; a name that is none lists them.")
@click.option("--quantize", is_flag=True, help="Round matrices that are not ternary, by absmean.")
@click.option("--layout", help="Layout of an I2_S file that does not say: x86-128, arm-64 or interleaved-4.")
@click.option("--convention", help="Whether weight_scale of packed weights shall multiply or divide.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it is there.")
@json_option
@command
def trace(
    model: Path,
    tokens: list[int],
    out: Path,
    bug: str | None,
    quantize: bool,
    layout: str | None,
    convention: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Record every tensor that the reference computes for these tokens, in one safetensors file.

    Float32 values and the int8 input of every linear layer, by the names that `diff` compares.
    """
    from bitnet_ref.runtime.known_bugs import apply_bug
    from bitnet_ref.runtime.trace import open_network, record, save_trace

    network = open_network(model, layout=layout, convention=convention, quantize=quantize)
    if bug is not None:
        network = apply_bug(bug, network)
    recorded = record(network, tokens)
    save_trace(recorded, out, overwrite=overwrite)
    best = int(recorded.tensors["logits"][-1].argmax())
    if as_json:
        emit(
            {
                "trace": str(out),
                "model": recorded.model,
                "bug": bug,
                "tokens": tokens,
                "tensors": len(recorded.tensors),
                "next_token": best,
            }
        )
    else:
        size = out.stat().st_size
        click.echo(f"{len(recorded.tensors)} tensors written to {out}, {size:,} bytes; most likely next token {best}")


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--all", "show_all", is_flag=True, help="Also list the error of every tensor.")
@json_option
@click.pass_context
@command
def diff(context: click.Context, first: Path, second: Path, show_all: bool, as_json: bool) -> None:
    """Name the first tensor in which two traces differ, by how much, and what usually causes it.

    FIRST is taken as right. Exit code 0 if all tensors are equal within their bounds, 1 if one is not.
    """
    from bitnet_ref.runtime.trace import load_trace
    from bitnet_ref.runtime.trace_diff import diff_traces

    found = diff_traces(load_trace(first), load_trace(second))
    if as_json:
        emit(found.as_dict())
    else:
        if show_all:
            table = Table(box=None, header_style="bold")
            table.add_column("tensor")
            for column in ("error", "bound", "outside", "tie flips"):
                table.add_column(column, justify="right")
            for row in found.tensors:
                table.add_row(
                    row.name, f"{row.error:.2g}", f"{row.bound:.2g}", f"{row.n_outside:,}", f"{row.n_flips:,}"
                )
            Console(width=None if sys.stdout.isatty() else 120).print(table)
        click.echo(str(found))
        for side, names in (("first", found.only_in_first), ("second", found.only_in_second)):
            if names:
                click.echo(f"Only in the {side} trace: {len(names)} tensors, first {names[0]}.")
        for note in found.notes:
            click.echo(note)
    context.exit(0 if found.equal else 1)
