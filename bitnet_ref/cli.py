"""The command line: ``bitnet-ref kernels | verify | paper | inspect``, and the commands of ``bitnet_ref.commands``.

Each command is a thin layer over the library. A failure is one sentence on standard error and exit code 1; a usage
error is click's exit code 2. With ``--json`` standard output holds one JSON document and nothing else.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import bitnet_ref
from bitnet_ref import kernels
from bitnet_ref.commands import bar, command, emit, json_option
from bitnet_ref.commands.bench import bench
from bitnet_ref.commands.distill import distill
from bitnet_ref.commands.model import COMMANDS as MODEL_COMMANDS
from bitnet_ref.commands.model import convention_option, layout_option
from bitnet_ref.commands.trace import diff, trace
from bitnet_ref.errors import FormatError

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(bitnet_ref.__version__, prog_name="bitnet-ref")
def main() -> None:
    """BitNet b1.58: exact ternary kernels, and the published memory, speed and energy figures regenerated.

    BITNET_REF_ISA=avx2 (or scalar, avx512vnni, ...) caps the instruction set of every command.
    """


@main.command("kernels", short_help="List the kernels of this build.")
@json_option
@command
def kernels_command(as_json: bool) -> None:
    """List the kernels of this build: which exist, which this processor can run, which are chosen."""
    rows = list(kernels.table())
    if as_json:
        emit(rows)
        return
    table = Table(box=None, header_style="bold")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*("yes" if value is True else "-" if value is False else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@main.command(short_help="Check every kernel against the NumPy reference.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random inputs.")
@click.option(
    "--examples",
    type=int,
    default=20,
    show_default=True,
    help="Random examples of each kind per kernel.",
)
@json_option
@command
def verify(seed: int, examples: int, as_json: bool) -> None:
    """Check every kernel that can run here against the NumPy reference; exact, at awkward shapes.

    Dense random, near-constant and worst-case inputs. Exit code 1 at the first difference, naming kernel, shape and
    index.
    """
    from bitnet_ref import verify as checks

    names = kernels.supported(*checks.OPS)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("verifying", total=len(names))

        def advance(name: str, cases: int) -> None:
            progress.update(task, advance=1, description=f"verified {name}")

        report = checks.run(seed=seed, examples=examples, progress=advance)
    if as_json:
        emit(
            {
                "kernels": [str(name) for name in report.kernels],
                "cases": report.cases,
                "seed": report.seed,
                "equal": True,
            }
        )
    else:
        click.echo(
            f"{len(report.kernels)} kernels equal the reference exactly on {report.cases} cases "
            f"(seed {report.seed}, instruction sets {', '.join(sorted({n.isa for n in names}, key=kernels.ISAS.get))})"
        )


@main.command(short_help="Measure this machine and write the report.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("report"),
    show_default=True,
    help="Folder for report.html, results.json and figures/.",
)
@click.option("--quick", is_flag=True, help="Fewer shapes and repeats: under a minute.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Also show the weight distribution of this model file.",
)
@json_option
@command
def paper(out: Path, quick: bool, weights: Path | None, as_json: bool) -> None:
    """Measure this machine and write the report: memory, energy and speed beside the published figures."""
    from bitnet_ref import report

    words = ["bitnet-ref", "paper", "--out", str(out), *(["--quick"] if quick else [])]
    words += ["--weights", weights.name] if weights else []
    with bar() as progress:
        task = progress.add_task("starting", total=1.0)
        page = report.build(
            out,
            quick=quick,
            weights=weights,
            command=shlex.join(words),
            progress=lambda label, fraction: progress.update(task, description=escape(label), completed=fraction),
        )
    if as_json:
        emit({"report": str(page), "results": str(page.parent / "results.json")})
    else:
        click.echo(f"report written to {page}")


@main.command(short_help="Show network, tensors, zeros and memory of a model or weight file.")
@click.argument("model", type=click.Path(path_type=Path))
@layout_option
@convention_option
@json_option
@command
def inspect(model: Path, layout: str | None, scale_convention: str | None, as_json: bool) -> None:
    """Show what MODEL (a Hugging Face folder, a GGUF file, a packed file) holds, and where its bytes go.

    For a model: its network, the zeros of each layer, and a memory account of these very files beside the paper's
    figure. For float matrices: what ternarisation would do to them (absmean scale, fraction of zeros, entropy in bits
    per weight, relative error in the Frobenius norm). A file that is no whole model is shown tensor by tensor.
    """
    from bitnet_ref.formats import inspect_file, inspect_model
    from bitnet_ref.measure.file_account import account_beside_paper

    with bar() as progress:
        task = progress.add_task("reading", total=1.0)

        def advance(done: int, total: int, name: str) -> None:
            progress.update(task, total=total, completed=done, description=escape(name[:40]))

        found: Any = None
        try:
            found, why = inspect_model(model, layout=layout, convention=scale_convention, progress=advance), ""
        except FormatError as error:
            if model.is_dir() or layout or scale_convention:
                raise
            why = str(error)
        if found is None:
            found = inspect_file(model, progress=advance)
    account = [] if why else account_beside_paper(found)
    if as_json:
        emit(found.as_dict() | {"not_a_model": why or None, "memory": account})
        return
    console = Console(width=None if sys.stdout.isatty() else 140)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    say(f"{found.path}: {found.format}, {found.file_bytes:,} bytes, {len(found.tensors)} tensors")
    for key, value in (found.metadata if why else found.config).items():
        say(f"  {key} = {value}")
    if why:
        say(f"note: shown as a file, not as a model: {why}")
    _print_tensors(console, found.tensors)
    if not why:
        _print_account(console, found, account)
    for note in found.notes:
        say(f"note: {note}")


def _print_tensors(console: Console, tensors: Any) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("tensor", "shape", "type"):
        table.add_column(column)
    for column in ("bytes", "scale", "zeros", "entropy", "rel. error"):
        table.add_column(column, justify="right")
    table.add_column("note")
    for tensor in tensors:
        table.add_row(
            Text(tensor.name),
            " x ".join(map(str, tensor.shape)),
            tensor.type,
            f"{tensor.stored_bytes:,}",
            _number(tensor.scale, ".4g"),
            _number(tensor.fraction_zeros, ".1%"),
            _number(tensor.entropy_bits, ".3f"),
            _number(tensor.relative_error, ".3f"),
            Text("already ternary" if tensor.already_ternary else tensor.note or ""),
        )
    console.print(table)


def _print_account(console: Console, found: Any, account: list[dict[str, Any]]) -> None:
    """Zeros of each layer, and the bytes of the files by part."""
    if found.layers:
        console.print("\nzeros of the ternary matrices", style="bold")
        table = Table(box=None, header_style="bold")
        for column in ("layer", "weights", "zeros"):
            table.add_column(column, justify="right")
        for layer in found.layers:
            table.add_row(str(layer.layer), f"{layer.n_weights:,}", f"{layer.fraction_zeros:.2%}")
        console.print(table)
    console.print("\nmemory account", style="bold")
    table = Table(box=None, header_style="bold")
    table.add_column("part")
    for column in ("bytes", "MB", "weights", "bits a weight"):
        table.add_column(column, justify="right")
    table.add_column("kind")
    for row in account:
        bits = f"{8 * row['bytes'] / row['weights']:.4f}" if row["weights"] else ""
        weights = f"{row['weights']:,}" if row["weights"] else ""
        table.add_row(row["part"], f"{row['bytes']:,}", f"{row['bytes'] / 1e6:,.3f}", weights, bits, row["kind"])
    console.print(table)


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


for model_command in (*MODEL_COMMANDS, bench, trace, diff, distill):
    main.add_command(model_command)


if __name__ == "__main__":
    main()
