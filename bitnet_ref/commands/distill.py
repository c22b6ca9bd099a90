"""Commands of ``distill``. PyTorch is imported when one of them trains, and only then."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from bitnet_ref.commands import command, emit, json_option, write_json
from bitnet_ref.commands.student import compare, prove
from bitnet_ref.errors import BitnetRefError

__all__ = ["distill"]


@click.group(short_help="Train a ternary student of a full-precision model (extra [distill]).")
def distill() -> None:
    """BitNet Distillation: from a full-precision model to a ternary student that runs on the kernels."""


@distill.command(short_help="Train teacher, baseline and student of a configuration.")
@click.argument("config")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Another value, such as teacher.steps=50.")
@click.option("--resume", is_flag=True, help="Go on with the run that is in the folder.")
@click.option("--stages", help="Names with commas between them; what they need runs as well.  [default: variants]")
@click.option("--seeds", help="Numbers with commas between them.  [default: seeds]")
@click.option("--dry-run", "dry_run", is_flag=True, help="Random weights, made-up data, two steps of each stage.")
@json_option
@command
def run(
    config: str,
    out: Path,
    overrides: tuple[str, ...],
    resume: bool,
    stages: str | None,
    seeds: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train the stages of CONFIG, a TOML file or the name of a packaged configuration; write tables and figures.

    Stages: teacher, direct, subln, pretrain, subln-ct, subln-distill, ct-ld, ct-ad, bitdistill, blocks, blocks-ce,
    blocks-ld, blocks-distill. Start it with `accelerate launch` or `torchrun` for more than one device.
    """
    stages_module = _needs_torch("stages")
    from bitnet_ref.distill.config import load_config
    from bitnet_ref.measure.record import record

    settings = load_config(config, overrides)
    chosen = _numbers(seeds)
    if dry_run:
        settings = stages_module.dry(settings)
    words = ["bitnet-ref", "distill", "run", config, *(f"--set={text}" for text in overrides)]
    words += [f"--stages={stages}"] if stages else []
    words += [f"--seeds={seeds}"] if seeds else []
    words += ["--dry-run"] if dry_run else []
    names = stages.split(",") if stages else None
    stages_module.with_parents(names or settings.variants)  # unknown names before anything is written
    made = stages_module.Run(
        settings,
        out,
        resume=resume,
        record=record(shlex.join(words)),
        say=lambda text: click.echo(text, err=as_json),
        quiet=as_json,
    )
    made.run(names, chosen)
    if made.devices.main:
        _print_tables(out, as_json)


@distill.command(short_help="What SubLN and ternary layers do to a model before training.")
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Another value, such as student.block=64.")
@json_option
@command
def start(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """The loss on training prompts of CONFIG's model, without SubLN and with it, from float to ternary.

    For choosing student.subln_gain and how long quantize_over should be.
    """
    module = _needs_torch("start")
    from bitnet_ref.distill.config import load_config

    rows = module.start_losses(load_config(config, overrides))
    if as_json:
        emit({"rows": rows})
        return
    click.echo("nats a token      " + "".join(f"{strength:>8.0%}" for strength in module.STRENGTHS) + "  quantised")
    for subln in dict.fromkeys(row["subln"] for row in rows):
        losses = "".join(f"{row['loss']:8.3f}" for row in rows if row["subln"] == subln)
        click.echo(f"{'no SubLN' if subln == 'none' else 'SubLN, gain ' + subln:<18}{losses}")


@distill.command(short_help="Tables of a run, like those of the paper, and figures.")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
@command
def table(folder: Path, as_json: bool) -> None:
    """Write and print the tables of the run in FOLDER, and draw its figures, from the seeds that have finished."""
    _print_tables(folder, as_json)


@distill.command(short_help="Train small models over seeds, for the figures on training.")
@click.option("--texts", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of the two novels.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
@click.option("--steps", type=int, default=200, show_default=True)
@click.option("--seeds", type=int, default=3, show_default=True)
@command
def study(texts: Path, out: Path, steps: int, seeds: int) -> None:
    """Full precision, b1.58 with and without SubLN, b1, and continued pre-training of the first: minutes of a core.

    The report shows bitnet_ref/report/training_study.json, which this wrote.
    """
    module = _needs_torch("study")
    from bitnet_ref.measure.record import record

    results = module.run(texts, steps, seeds, click.echo)
    header = record(f"bitnet-ref distill study --steps {steps} --seeds {seeds}") | {"torch": results.pop("torch")}
    write_json(out, {"record": header, **results})


distill.add_command(prove)
distill.add_command(compare)


def _print_tables(folder: Path, as_json: bool) -> None:
    from bitnet_ref.distill import results

    document = results.write_tables(folder)
    if as_json:
        emit(document)
    else:
        click.echo("\n" + results.markdown(document["tables"]), nl=False)
    drawn = _draw_figures(folder, document)
    if drawn and not as_json:
        click.echo(f"\nfigures: {', '.join(map(str, drawn))}")


def _draw_figures(folder: Path, document: dict[str, Any]) -> list[Path]:
    """Draw what a run has data for into its ``figures/``, PNG, PDF and captions; the paths of the first."""
    from bitnet_ref import paper_figures

    modules = {
        folder / "figures" / f"{name.removeprefix('fig_distill_')}.png": paper_figures.load(name)
        for name in paper_figures.DISTILL_FIGURES
    }
    modules = {path: module for path, module in modules.items() if module.drawable(document)}
    if not modules:
        return []
    (folder / "figures").mkdir(exist_ok=True)
    for path, module in modules.items():
        figure = module.draw(document)
        for target in (path, path.with_suffix(".pdf")):
            temporary = target.with_name(f".{target.name}")
            paper_figures.save(figure, temporary)
            temporary.replace(target)
    captions = "\n\n".join(f"![]({path.name})\n\n{module.CAPTION}" for path, module in modules.items())
    (folder / "figures" / "captions.md").write_text(captions + "\n", encoding="utf-8")
    return list(modules)


def _needs_torch(name: str) -> Any:
    """A module of bitnet_ref.distill, or one sentence about what is missing."""
    import importlib

    try:
        return importlib.import_module(f"bitnet_ref.distill.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("torch", "transformers", "accelerate"):
            raise
        raise BitnetRefError(
            f"training needs {error.name}, which is not installed: pip install 'bitnet_ref[distill]' "
            f"({Path(sys.executable).name} is {sys.executable})"
        ) from error


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not all(part.isdigit() for part in text.split(",")):
        raise ValueError(f"seeds must be numbers with commas between them, got {text!r}")
    return [int(part) for part in text.split(",")]
