"""A full-precision teacher beside its ternary student, like for like: same prompt, threads and batch, other programs.

[BitDistill]'s "2.65x faster, 10x less memory" sets tokens a second of an unnamed kind beside bytes that leave out the
embedding of the student only. Here every program runs in a process of its own, one after the other in each round, and
says tokens a second of reading and of writing apart, and the most memory it had resident. Bytes of weights are counted
with and without the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ref.errors import BitnetRefError
from bitnet_ref.measure.model_bench import peak_resident_bytes
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.runtime.load import load
from bitnet_ref.runtime.model import Model

__all__ = ["Program", "count_bytes", "llama_cpp_program", "measure_programs", "student_program", "teacher_program"]

_FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_resident_bytes")


@dataclass(frozen=True)
class Program:
    """One line of the comparison.

    Parameters
    ----------
    name, stored : str
        The program, and how it keeps the matrices.
    command : tuple of str
        Prints one JSON object with prefill_tokens_per_s, decode_tokens_per_s and peak_resident_bytes on its last line.
    environment : tuple of (str, str)
        Added to that of this process.
    """

    name: str
    stored: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


def student_program(model: str | os.PathLike[str], head: str, threads: int, n_prompt: int, n_generate: int) -> Program:
    """The student on the kernels of this package.

    Parameters
    ----------
    model : path
        What :func:`bitnet_ref.runtime.load.load` takes, or a ``config.json`` of a ternary network (random weights).
    """
    numbers = ("--threads", str(threads), "--prompt", str(n_prompt), "--generate", str(n_generate), "--head", head)
    command = (sys.executable, "-P", "-m", __name__, os.fspath(model), *numbers)
    return Program("bitnet_ref", f"base3, head {head}", command)


def teacher_program(model: str | os.PathLike[str], threads: int, n_prompt: int, n_generate: int) -> Program:
    """The teacher in PyTorch, bfloat16; `model` as in :mod:`bitnet_ref.distill.teacher_speed`."""
    numbers = ("--threads", str(threads), "--prompt", str(n_prompt), "--generate", str(n_generate))
    command = (sys.executable, "-P", "-m", "bitnet_ref.distill.teacher_speed", os.fspath(model), *numbers)
    return Program("PyTorch", "bfloat16", command, (("OMP_NUM_THREADS", str(threads)),))


def llama_cpp_program(
    path: str | os.PathLike[str], type_name: str, vocabulary: int, threads: int, n_prompt: int, n_generate: int
) -> Program:
    """The teacher's network in llama.cpp; `path` is a file of :mod:`bitnet_ref.measure.gguf_speed`."""
    numbers = ("--threads", str(threads), "--prompt", str(n_prompt), "--generate", str(n_generate))
    command = (sys.executable, "-P", "-m", "bitnet_ref.measure.gguf_speed", os.fspath(path), *numbers)
    return Program("llama.cpp", type_name, (*command, "--vocabulary", str(vocabulary)))


def measure_programs(
    programs: Sequence[Program], rounds: int = 3, progress: Callable[[str, float], None] | None = None
) -> list[dict[str, Any]]:
    """Run the programs in turns.

    Parameters
    ----------
    programs : sequence of Program
    rounds : int
    progress : callable(label, fraction done), optional

    Returns
    -------
    list of dict
        program, stored, rounds, and for each figure its median with ``_low`` and ``_high`` (least and largest).

    Raises
    ------
    BitnetRefError
        If a program fails; the message ends with what it said last.
    """
    seen: list[list[dict[str, float]]] = [[] for _ in programs]
    for i in range(rounds):
        for j, program in enumerate(programs):
            if progress is not None:
                progress(f"round {i + 1}, {program.name}", (i * len(programs) + j) / (rounds * len(programs)))
            seen[j].append(_run(program))
    rows = []
    for program, results in zip(programs, seen, strict=True):
        row: dict[str, Any] = {"kind": "measured", "program": program.name, "stored": program.stored, "rounds": rounds}
        for figure in _FIGURES:
            values = [result[figure] for result in results]
            row |= {figure: float(np.median(values)), f"{figure}_low": min(values), f"{figure}_high": max(values)}
        rows.append(row)
    return rows


def _run(program: Program) -> dict[str, float]:
    done = subprocess.run(
        program.command, capture_output=True, text=True, env={**os.environ, **dict(program.environment)}, check=False
    )
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    except ValueError:
        result = None
    if not isinstance(result, dict) or not set(_FIGURES) <= result.keys():
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise BitnetRefError(f"{program.name} ended with exit code {done.returncode} and no figures; it said: {said}")
    return result


def count_bytes(config: ModelConfig, matrix_bits: float, table_bits: float) -> dict[str, int]:
    """Bytes of weights, ``matrices`` (of the blocks) and ``tables`` (embedding and untied head); norms are left out.

    Parameters
    ----------
    config : ModelConfig
    matrix_bits, table_bits : float
        Bits per weight.
    """
    matrices = sum(m * k for m, k in config.linear_shapes().values())
    tables = config.vocabulary * config.hidden * (1 if config.tied_head else 2)
    return {"matrices": round(matrices * matrix_bits / 8), "tables": round(tables * table_bits / 8)}


def _worker(options: argparse.Namespace) -> dict[str, Any]:
    """The student's turn: as bitnet_ref.distill.teacher_speed does it for the teacher."""
    start = time.perf_counter()
    path: Path = options.model
    if path.suffix == ".json":
        raw = json.loads(path.read_text())
        config = ModelConfig.from_hf(raw, ("model.layers.0.self_attn.attn_sub_norm.weight",), ternary=True)
        model = Model.random(config, 0, "base3", options.head, n_threads=options.threads)
    else:
        model = load(path, "base3", options.head, options.threads)
    loaded = time.perf_counter() - start
    prompt = np.random.default_rng(0).integers(0, model.config.vocabulary, options.prompt)
    prefill = []
    for _ in range(3):
        cache = model.new_cache(options.prompt + options.generate)
        start = time.perf_counter()
        logits = model.prefill(prompt, cache)
        prefill.append(time.perf_counter() - start)
    steps = []
    for _ in range(options.generate):
        token = [int(np.argmax(logits[-1]))]
        start = time.perf_counter()
        logits = model.forward(token, cache)
        steps.append(time.perf_counter() - start)
    return {
        "prefill_tokens_per_s": options.prompt / min(prefill[1:]),
        "decode_tokens_per_s": 1 / float(np.median(steps)),
        "peak_resident_bytes": peak_resident_bytes(),
        "load_s": loaded,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    for number in ("--threads", "--prompt", "--generate"):
        parser.add_argument(number, type=int, required=True)
    parser.add_argument("--head", required=True)
    print(json.dumps(_worker(parser.parse_args())))
