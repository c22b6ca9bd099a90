"""Commands that run or convert a model: ``generate | chat | perplexity | logits | convert | bench model``."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from bitnet_ref.commands import bar, command, emit, json_option
from bitnet_ref.reference.packing import schemes

__all__ = ["COMMANDS"]

MODEL = click.Path(path_type=Path, exists=True)
SMALL_SAMPLING = {"temperature": 0.7, "top_k": 40}
HEAD_NAMES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q4_0")

scheme_option = click.option(
    "--scheme",
    type=click.Choice(schemes()),
    default="base3",
    show_default=True,
    help="Packing of the ternary matrices.",
)
head_option = click.option(
    "--head", type=click.Choice(HEAD_NAMES), default="q8_0", show_default=True, help="How the output head is kept."
)
cache_option = click.option(
    "--cache", type=click.Choice(("f32", "f16")), default="f32", show_default=True, help="How keys and values are kept."
)
sparse_option = click.option(
    "--sparse", is_flag=True, help="Leave out rows that add nothing: squared ReLU with SubLN only; the same values."
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="Threads; all processors by default.")
quantize_option = click.option("--quantize", is_flag=True, help="Round linear layers that are not ternary, by absmean.")
layout_option = click.option(
    "--layout", help="Layout of I2_S, for files that do not tell: x86-128, arm-64, interleaved-4."
)
convention_option = click.option(
    "--scale-convention",
    "scale_convention",
    type=click.Choice(("multiply", "divide")),
    help="What weight_scale does, for packed folders that do not tell.",
)


def model_options(function: Any) -> Any:
    """The options of every command that loads a model."""
    for option in (convention_option, layout_option, quantize_option, threads_option, cache_option, head_option):
        function = option(function)
    return scheme_option(function)


def sampling_options(function: Any) -> Any:
    """The options of every command that chooses tokens."""
    options = (
        click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
        click.option("--top-k", type=int, default=0, show_default=True, help="0 keeps all tokens."),
        click.option("--top-p", type=float, default=1.0, show_default=True),
        click.option("--min-p", type=float, default=0.0, show_default=True),
        click.option("--repetition-penalty", type=float, default=1.0, show_default=True),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
        click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def open_model(path: Path | None, options: dict[str, Any]) -> Any:
    """Load with a progress bar; takes the options of :func:`model_options` out of `options`."""
    from bitnet_ref.runtime.load import load

    arguments = {key: options.pop(key) for key in ("scheme", "head", "cache", "quantize", "layout")}
    arguments["sparse"] = options.pop("sparse", False)
    arguments |= {"n_threads": options.pop("threads"), "convention": options.pop("scale_convention")}
    path = packaged_model() if path is None else path
    with bar() as progress:
        task = progress.add_task("loading", total=1.0)
        return load(
            path,
            **arguments,
            progress=lambda done, total, name: progress.update(
                task, total=total, completed=done, description=name[-40:]
            ),
        )


def packaged_model() -> Path:
    """The model that ships with the package; ValueError if this installation has none."""
    found = sorted((Path(__file__).parents[1] / "models").glob("*/*.safetensors"))
    if not found:
        raise ValueError("a MODEL must be named, this installation ships none")
    return found[0]


@click.command()
@click.argument("model", type=MODEL, required=False)
@click.option("--prompt", default="", help="Text to continue; without it the begin-of-text token alone.")
@sparse_option
@model_options
@sampling_options
@json_option
@command
def generate(model: Path | None, prompt: str, as_json: bool, **options: Any) -> None:
    """Continue a text. MODEL is a Hugging Face folder, a GGUF file or a packed file.

    Without MODEL the small model of this project writes, with --temperature 0.7 --top-k 40 if they are not given: the
    likeliest text of so small a model soon repeats itself.
    """
    if model is None:
        source = click.get_current_context().get_parameter_source
        options |= {name: value for name, value in SMALL_SAMPLING.items() if source(name) is ParameterSource.DEFAULT}
    loaded = open_model(model, options)
    start: Any = prompt or _first_token(loaded)
    if as_json:
        done = loaded.generate(start, options.pop("max_tokens"), stream=False, **options)
        emit({"prompt": prompt, "text": done.text, "tokens": list(done.tokens), "finish": done.finish})
        return
    click.echo(prompt, nl=False)
    for piece in loaded.generate(start, options.pop("max_tokens"), **options):
        click.echo(piece.text if loaded.tokenizer else f"{piece.token} ", nl=False)
        sys.stdout.flush()
    click.echo()


def _first_token(model: Any) -> list[int]:
    if model.tokenizer is None or model.tokenizer.bos_id is None:
        raise ValueError("a --prompt must be given, this model has no begin-of-text token to start from")
    return [model.tokenizer.bos_id]


@click.command()
@click.argument("model", type=MODEL, required=False)
@click.option("--system", help="A first message that says how to answer.")
@click.option(
    "--template",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File with a chat template (Jinja), instead of the one that came with the model.",
)
@model_options
@sampling_options
@command
def chat(model: Path | None, system: str | None, template: Path | None, **options: Any) -> None:
    """Talk to a model with a chat template, line by line; an empty line or end of input ends it."""
    from bitnet_ref.runtime.chat import ChatTemplate

    loaded = open_model(model, options)
    if loaded.tokenizer is None:
        raise ValueError("a chat needs a tokenizer, this model came without one")
    if template is not None:
        loaded.tokenizer.chat_template = template.read_text(encoding="utf-8")
    form = ChatTemplate.of(loaded.tokenizer)
    messages = [{"role": "system", "content": system}] if system else []
    max_tokens = options.pop("max_tokens")
    while True:
        click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        messages.append({"role": "user", "content": line})
        answer = []
        for piece in loaded.generate(form.render(messages), max_tokens, special=True, **options):
            answer.append(piece.text)
            click.echo(piece.text, nl=False)
            sys.stdout.flush()
        click.echo()
        messages.append({"role": "assistant", "content": "".join(answer)})


@click.command()
@click.argument("model", type=MODEL)
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--context", type=int, help="Tokens of a chunk or window.  [default: 512]")
@click.option(
    "--convention",
    type=click.Choice(("llama.cpp", "transformers")),
    default="llama.cpp",
    show_default=True,
    help="Second half of separate chunks, or a sliding window over all tokens.",
)
@click.option("--stride", type=int, help="Step of the sliding window.  [default: half of the context]")
@click.option("--chunks", type=click.IntRange(min=1), help="Stop after so many.")
@model_options
@json_option
@command
def perplexity(
    model: Path,
    file: Path,
    context: int | None,
    convention: str,
    stride: int | None,
    chunks: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Perplexity of the text in FILE (UTF-8). The two conventions differ by several per cent."""
    from bitnet_ref.runtime.perplexity import perplexity as measure

    loaded = open_model(model, options)
    with bar() as progress:
        task = progress.add_task("perplexity", total=1.0)
        found = measure(
            loaded,
            file.read_text(encoding="utf-8"),
            context,
            convention=convention,
            stride=stride,
            max_chunks=chunks,
            progress=lambda done, total, value: progress.update(
                task, total=total, completed=done, description=f"chunk {done} of {total}, perplexity {value:.4f}"
            ),
        )
    if as_json:
        emit(
            {
                "perplexity": found.value,
                "error": found.error if np.isfinite(found.error) else None,
                "n_scored": found.n_scored,
                "n_tokens": found.n_tokens,
                "convention": found.convention,
                "context": found.context,
                "stride": found.stride,
            }
        )
    else:
        click.echo(
            f"perplexity {found.value:.4f} +- {found.error:.4f}, convention of {found.convention}, context "
            f"{found.context}, stride {found.stride}, {found.n_scored} of {found.n_tokens} tokens scored"
        )


@click.command()
@click.argument("model", type=MODEL)
@click.option("--tokens", required=True, help="Numbers with commas between them: 1,2,3.")
@click.option(
    "--backend",
    type=click.Choice(("kernels", "reference")),
    default="kernels",
    show_default=True,
    help="Compiled code, or the NumPy reference on the same weights.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the logits (T, V), float32, as .npy."
)
@model_options
@json_option
@command
def logits(model: Path, tokens: str, backend: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Logits of every token of a sequence; the five largest of the last are printed."""
    try:
        numbers = [int(word) for word in tokens.split(",")]
    except ValueError:
        raise ValueError(f"--tokens must be numbers with commas between them, got {tokens!r}") from None
    loaded = open_model(model, options)
    found = loaded.logits(numbers) if backend == "kernels" else loaded.reference_logits(numbers)
    if out is not None:
        write_array(out, found)
    best = np.argsort(-found[-1], kind="stable")[:5]
    top = [{"token": int(i), "logit": float(found[-1, i])} for i in best]
    if as_json:
        emit({"tokens": numbers, "backend": backend, "shape": list(found.shape), "top": top})
        return
    for row in top:
        click.echo(f"{row['token']:8d}  {row['logit']:.6f}")


def write_array(path: Path, array: np.ndarray) -> None:
    """An .npy file under this very name, which it gets when it is complete."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".partial", delete=False) as file:
        try:
            np.save(file, array)
            file.close()
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)


@click.command()
@click.argument("src", type=MODEL)
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Choice(("hf-packed", "gguf-tq1_0", "gguf-tq2_0", "gguf-i2_s", "packed")),
    help="The form to write.",
)
@scheme_option
@click.option(
    "--embedding",
    type=click.Choice(("f32", "f16", "bf16", "q8_0", "q6_k", "q4_0")),
    help="Type of embedding and head; their own by default.",
)
@click.option("--i2s-layout", default="x86-128", show_default=True, help="Layout that I2_S is written in.")
@layout_option
@convention_option
@quantize_option
@click.option("--overwrite", is_flag=True, help="Replace DST if it is there.")
@json_option
@command
def convert(src: Path, dst: Path, to: str, scale_convention: str | None, as_json: bool, **options: Any) -> None:
    """Write the checkpoint SRC as DST in another form; integers and scales stay what they are."""
    from bitnet_ref.formats import convert as write

    with bar() as progress:
        task = progress.add_task("converting", total=1.0)
        done = write(
            src,
            dst,
            to,
            convention=scale_convention,
            progress=lambda n, total, name: progress.update(task, total=total, completed=n, description=name[-40:]),
            **options,
        )
    if as_json:
        emit(
            {
                "path": str(done.path),
                "source_format": done.source_format,
                "target": done.target,
                "n_ternary": done.n_ternary,
                "n_float": done.n_float,
                "written_bytes": done.written_bytes,
                "notes": list(done.notes),
            }
        )
        return
    click.echo(
        f"{done.path}: {done.target} from {done.source_format}, {done.n_ternary} ternary and {done.n_float} other "
        f"tensors, {done.written_bytes:,} bytes"
    )
    for note in done.notes:
        click.echo(f"note: {note}")


@click.group()
def bench() -> None:
    """Time whole models."""


@bench.command("model")
@click.argument("model", type=MODEL, required=False)
@click.option("--preset", help="A known network instead of a file, with --random: 2b4t, or any name of PRESETS.")
@click.option("--random", "random_weights", is_flag=True, help="Random weights for the preset.")
@click.option("--threads", multiple=True, type=click.IntRange(min=1), help="May be given several times.")
@click.option("--prompt", "n_prompt", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens to read.")
@click.option("--generate", "n_generate", type=click.IntRange(min=1), default=32, show_default=True, help="To write.")
@click.option(
    "--depth",
    "depths",
    multiple=True,
    type=click.IntRange(min=0),
    help="Also time steps with so many tokens before them.",
)
@click.option("--peers", help="With a preset: also llama.cpp,ik_llama.cpp, each in a process of its own.")
@sparse_option
@click.option(
    "--gate-zeros",
    type=click.FloatRange(0.5, 1),
    help="With --random: about this share of the gates is not positive.  [default: half]",
)
@scheme_option
@head_option
@cache_option
@quantize_option
@json_option
@command
def bench_model(
    model: Path | None,
    preset: str | None,
    random_weights: bool,
    threads: tuple[int, ...],
    n_prompt: int,
    n_generate: int,
    depths: tuple[int, ...],
    peers: str | None,
    gate_zeros: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Tokens per second of a model, reading and writing apart, and its share of the machine's read bandwidth.

    With --sparse dense steps and sparse ones take turns, and each has a row.
    """
    from bitnet_ref.measure.model_bench import measure_model
    from bitnet_ref.measure.model_peers import PEERS_CACHE
    from bitnet_ref.measure.record import record
    from bitnet_ref.reference.config import PRESETS
    from bitnet_ref.runtime.model import Model

    if (model is None) == (preset is None):
        raise ValueError("exactly one of MODEL and --preset must be given")
    if peers and preset is None:
        raise ValueError("--peers compares models of random weights: give --preset and --random")
    if peers and (options["sparse"] or gate_zeros is not None):
        raise ValueError("--sparse and --gate-zeros are for this program alone, leave out --peers")
    if gate_zeros is not None and preset is None:
        raise ValueError("--gate-zeros makes up weights: give --preset and --random")
    if preset is not None:
        if not random_weights:
            raise ValueError("a preset has no weights; say --random to have them made up")
        matches = [name for name in PRESETS if name.lower() == preset.lower() or _short(name) == _short(preset)]
        if len(matches) != 1:
            raise ValueError(f"--preset must be one of 2b4t, {', '.join(PRESETS)}, got {preset!r}")
        if peers:
            source = click.get_current_context().get_parameter_source("cache")
            if source is click.core.ParameterSource.DEFAULT:
                options["cache"] = PEERS_CACHE  # like things are compared, unless others are asked for
            _bench_beside_peers(matches[0], peers, threads, n_prompt, n_generate, as_json, options)
            return
        options.pop("quantize")
        loaded = Model.random(PRESETS[matches[0]], 0, gate_zeros=gate_zeros, **options)
        what = f"{matches[0]}, random weights"
    else:
        loaded = open_model(model, {**options, "threads": None, "layout": None, "scale_convention": None})
        what = model.name
    with bar() as progress:
        task = progress.add_task("starting", total=1.0)
        rows = measure_model(
            loaded,
            n_prompt,
            n_generate,
            threads or (None,),
            depths,
            progress=lambda label, fraction: progress.update(task, description=label, completed=fraction),
        )
    if as_json:
        words = ["bitnet-ref", "bench", "model", *([str(model.name)] if model else ["--preset", preset, "--random"])]
        words += [f"--threads={n}" for n in threads] + [f"--prompt={n_prompt}", f"--generate={n_generate}"]
        words += [f"--depth={depth}" for depth in depths] + ["--sparse"] * options["sparse"]
        words += [] if gate_zeros is None else [f"--gate-zeros={gate_zeros}"]
        words += [f"--scheme={options['scheme']}", f"--head={options['head']}", f"--cache={options['cache']}"]
        emit({"record": record(shlex.join(words)), "model": what, **options, "rows": rows})
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{what}: {options['scheme']}, head {options['head']}, cache {options['cache']}", highlight=False)
    table = Table(box=None, header_style="bold")
    columns = {
        "threads": lambda r: str(r["threads"]),
        **({"network": lambda r: r["network"]} if options["sparse"] else {}),
        "prompt tok/s": lambda r: f"{r['prefill_tokens_per_s']:.1f}",
        "decode tok/s": lambda r: f"{r['decode_tokens_per_s']:.1f}",
        "MB/token": lambda r: f"{r['bytes_per_token'] / 1e6:.1f}",
        "of bandwidth": lambda r: (
            f"{r['read_bandwidth_fraction']:.0%} of {r['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
        ),
        "products": lambda r: f"{r['product_fraction']:.0%}",
        "head": lambda r: f"{r['head_fraction']:.0%}",
        "attention": lambda r: f"{r['attention_fraction']:.1%}",
        "other": lambda r: f"{r['other_fraction']:.1%}",
        "Python": lambda r: f"{r['python_fraction']:.1%}",
        "peak RSS": lambda r: f"{r['peak_resident_bytes'] / 1e6:.0f} MB",
    }
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    console.print(table)
    for row in rows:
        if row.get("network") == "sparse":
            console.print(
                f"{row['threads']} thread(s), sparse: {row['up_zeros']:.0%} of the rows of W_up and "
                f"{row['down_zeros']:.0%} of the columns of W_down add nothing; {row['up_listed']:.0%} and "
                f"{row['down_listed']:.0%} of these matrices were read by lists",
                highlight=False,
            )
        for at in row["depths"]:
            console.print(
                f"{row['threads']} thread(s), {at['depth']:,} tokens before: {at['decode_step_ns'] / 1e6:.1f} ms, "
                f"products {at['product_fraction']:.0%}, head {at['head_fraction']:.0%}, attention "
                f"{at['attention_fraction']:.0%}, other {at['other_fraction']:.1%}, Python {at['python_fraction']:.1%}",
                highlight=False,
            )


def _bench_beside_peers(
    preset: str,
    peers: str,
    threads: tuple[int, ...],
    n_prompt: int,
    n_generate: int,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """The same network in every program, turn by turn."""
    from bitnet_ref.measure.bench_all import model_table
    from bitnet_ref.measure.model_peers import measure_models_beside_peers

    words = ["bitnet-ref", "bench", "model", "--preset", preset, "--random", f"--peers={peers}"]
    words += [f"--threads={n}" for n in threads] + [f"--prompt={n_prompt}", f"--generate={n_generate}"]
    words += [f"--scheme={options['scheme']}", f"--head={options['head']}", f"--cache={options['cache']}"]
    with bar() as progress:
        task = progress.add_task("starting", total=1.0)
        found = measure_models_beside_peers(
            shlex.join(words),
            Path("build") / "bench",
            tuple(name for name in peers.split(",") if name),
            (options["head"],),
            (options["scheme"],),
            threads or (None,),
            n_prompt,
            n_generate,
            preset=preset,
            cache=options["cache"],
            progress=lambda label, fraction: progress.update(task, description=label, completed=fraction),
        )
    if as_json:
        emit(found)
    else:
        click.echo("\n".join(model_table(found["rows"])))


def _short(name: str) -> str:
    """2b4t for microsoft/bitnet-b1.58-2B-4T, and so on: letters and digits behind the last "b1.58" or slash."""
    tail = name.lower().rsplit("/", 1)[-1].rsplit("1.58-", 1)[-1]
    return "".join(c for c in tail if c.isalnum())


COMMANDS = (generate, chat, perplexity, logits, convert)
"""For the group of ``cli.py``."""
