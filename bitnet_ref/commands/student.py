"""``distill prove | compare``: a student's files held to PyTorch's answers, and timed beside its teacher."""

from __future__ import annotations

import dataclasses
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bitnet_ref.commands import bar, command, emit, json_option, write_json
from bitnet_ref.errors import BitnetRefError

__all__ = ["compare", "prove"]

head_option = click.option("--head", default="f16", show_default=True, help="Type of the head in memory.")


@click.command(short_help="Ask the kernels what PyTorch was asked, and compare every answer.")
@click.argument("student", type=click.Path(exists=True, path_type=Path))
@click.argument("answers", type=click.Path(exists=True, path_type=Path))
@click.option("--scheme", default="base3", show_default=True, help="Packing of the ternary matrices.")
@head_option
@click.option("--threads", "n_threads", type=int, help="Threads of the kernels.  [default: all]")
@click.option("--bound", type=float, default=0.0, show_default=True, help="Largest difference of a logit, as below.")
@json_option
@command
def prove(
    student: Path, answers: Path, scheme: str, head: str, n_threads: int | None, bound: float, as_json: bool
) -> None:
    """Run STUDENT (a file or folder that export wrote) on the prompts of ANSWERS, which PyTorch has answered.

    Exit code 1 if a prediction is another one, or a logit of a label differs by more than the bound, a share of the
    range of these logits. answers.safetensors of a run was rounded as the reference does and is given again to the bit;
    answers-float32.safetensors, in PyTorch's own order of sums, and heads of another type than the files' float16
    differ: int8 activations at an edge fall the other way.
    """
    from bitnet_ref.formats.answers import read_answers
    from bitnet_ref.runtime import classify
    from bitnet_ref.runtime.load import load

    expected = read_answers(answers)
    model = load(student, scheme, head, n_threads, quantize=student.is_dir())
    with bar() as progress:
        task = progress.add_task("prompts")
        got = classify.answer(model, expected, lambda done, total: progress.update(task, completed=done, total=total))
    agreement = classify.compare_answers(expected, got)
    if as_json:
        emit(dataclasses.asdict(agreement) | {"scheme": scheme, "head": head})
    else:
        click.echo(
            f"{agreement.same_predictions} of {agreement.n_prompts} predictions are the same; logits differ by at most "
            f"{agreement.largest_difference:.2e} of their range, half of them by less than "
            f"{agreement.median_difference:.1e}\naccuracy {agreement.accuracy:.4f} in PyTorch, "
            f"{agreement.other_accuracy:.4f} on the kernels ({scheme}, head {head})"
        )
    if agreement.differing:
        raise BitnetRefError(
            f"{len(agreement.differing)} predictions differ, the first at prompt {agreement.differing[0]}"
        )
    if agreement.largest_difference > bound:
        raise BitnetRefError(f"logits must agree to {bound}, they differ by {agreement.largest_difference:.2e}")


@click.command(short_help="Time a student on the kernels beside its teacher in PyTorch.")
@click.argument("student", type=click.Path(exists=True, path_type=Path))
@click.argument("teacher", type=click.Path(exists=True, path_type=Path))
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--prompt", "n_prompt", type=int, default=128, show_default=True, help="Tokens of the prompt.")
@click.option("--generate", "n_generate", type=int, default=32, show_default=True, help="Tokens to write.")
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option("--head", default="q8_0", show_default=True, help="Type of the student's head in memory.")
@click.option("--llama-cpp", metavar="TYPES", help="Also the teacher's network in llama.cpp, such as f16,q4_0.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the figures into this JSON file.")
@json_option
@command
def compare(
    student: Path,
    teacher: Path,
    threads: int,
    n_prompt: int,
    n_generate: int,
    rounds: int,
    head: str,
    llama_cpp: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Tokens a second and memory of STUDENT and TEACHER, in turns, each in a process of its own.

    Both are a model or the config.json of one, which then gets random weights. Reading a prompt and writing are apart.
    Bytes of weights are those of [BitDistill]'s comparison, with the tables (embedding and head) and without. llama.cpp
    (extra [peers]) runs random weights in the teacher's shape, with embedding and head of the same type.
    """
    from bitnet_ref.formats import open_checkpoint
    from bitnet_ref.measure import gguf_speed, student_speed
    from bitnet_ref.measure.peers import check_available
    from bitnet_ref.measure.record import record
    from bitnet_ref.reference.config import ModelConfig
    from bitnet_ref.reference.head import TABLE_TYPES
    from bitnet_ref.reference.packing import get_scheme
    from bitnet_ref.runtime.model import head_type

    if student.suffix == ".json":
        raw, names = json.loads(student.read_text(encoding="utf-8")), ()
    else:
        checkpoint = open_checkpoint(student, quantize=student.is_dir())
        raw, names = checkpoint.config, tuple(checkpoint.entries)
    config = ModelConfig.from_hf(raw, names, ternary=True)
    types = llama_cpp.split(",") if llama_cpp else []
    if unknown := [name for name in types if name not in gguf_speed.TYPES]:
        raise ValueError(f"--llama-cpp must be of {', '.join(gguf_speed.TYPES)}, got {', '.join(unknown)}")
    check_available(["llama.cpp"] if types else [])
    numbers = (threads, n_prompt, n_generate)
    programs = [
        student_speed.student_program(student, head, *numbers),
        student_speed.teacher_program(teacher, *numbers),
    ]
    words = ["bitnet-ref", "distill", "compare", student.name, teacher.name, f"--threads={threads}"]
    words += [f"--prompt={n_prompt}", f"--generate={n_generate}", f"--rounds={rounds}", f"--head={head}"]
    about = record(shlex.join(words + ([f"--llama-cpp={llama_cpp}"] if types else [])))
    with tempfile.TemporaryDirectory() as folder, bar() as progress:
        task = progress.add_task("starting", total=1.0)
        for name in types:
            path = Path(folder) / f"{name}.gguf"
            config_file = teacher if teacher.suffix == ".json" else teacher / "config.json"
            gguf_speed.write_float_gguf(path, json.loads(config_file.read_text(encoding="utf-8")), name)
            programs.append(student_speed.llama_cpp_program(path, name, config.vocabulary, *numbers))
        rows = student_speed.measure_programs(
            programs, rounds, lambda label, done: progress.update(task, description=label, completed=done)
        )
    table_block, table_block_bytes = TABLE_TYPES[head_type(head)]
    table_bits = 8 * table_block_bytes / table_block
    ternary_bits = 8 * get_scheme("base3").tile_block_bytes / (get_scheme("base3").rows * get_scheme("base3").block)
    bits = [(ternary_bits, table_bits), (16, 16), *((gguf_speed.TYPES[name],) * 2 for name in types)]
    for row, (matrix, table) in zip(rows, bits, strict=True):
        size = student_speed.count_bytes(config, matrix, table)
        row |= {"threads": threads, "n_prompt": n_prompt, "n_generate": n_generate}
        row |= {"matrix_bytes": size["matrices"], "table_bytes": size["tables"]}
    about["load_average_after"] = record("")["load_average"]
    document = {"record": about, "network": raw, "rows": rows}
    if out is not None:
        write_json(out, document)
    if as_json:
        emit(document)
        return
    Console(width=120).print(_table(rows))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold")
    headings = ("program", "matrices", "reading, tok/s", "writing, tok/s", "peak MB", "weights MB", "without tables")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for row in rows:
        weights = row["matrix_bytes"] + row["table_bytes"]
        table.add_row(
            row["program"],
            row["stored"],
            f"{row['prefill_tokens_per_s']:.1f}",
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['peak_resident_bytes'] / 1e6:.0f}",
            f"{weights / 1e6:.1f}",
            f"{row['matrix_bytes'] / 1e6:.1f}",
        )
    ours = rows[0]
    for theirs in rows[1:]:
        total = [row["matrix_bytes"] + row["table_bytes"] for row in (theirs, ours)]
        table.add_row(
            f"ratio to {theirs['program']}",
            theirs["stored"],
            f"{ours['prefill_tokens_per_s'] / theirs['prefill_tokens_per_s']:.2f}",
            f"{ours['decode_tokens_per_s'] / theirs['decode_tokens_per_s']:.2f}",
            f"1/{theirs['peak_resident_bytes'] / ours['peak_resident_bytes']:.2f}",
            f"1/{total[0] / total[1]:.2f}",
            f"1/{theirs['matrix_bytes'] / ours['matrix_bytes']:.2f}",
            style="bold",
        )
    return table
