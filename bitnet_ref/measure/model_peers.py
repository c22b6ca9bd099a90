"""Whole models side by side: ours and those of other programs, each in a process of its own, turn by turn.

Reading a prompt and writing tokens are timed apart. Every process opens one file, which another wrote, so its peak of
resident memory is that model's and its program's. All have the same network, the same type of embedding and head, one
sequence and random ternary weights; :func:`bitnet_ref.measure.ratio.ratio` refuses anything else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ref import kernels
from bitnet_ref.measure.model_bench import measure_model, peak_resident_bytes
from bitnet_ref.measure.peers import Worker, check_available
from bitnet_ref.measure.peers.ggml import TYPES
from bitnet_ref.measure.peers.llama_model import serve as serve_peer
from bitnet_ref.measure.peers.worker import answer
from bitnet_ref.measure.random_file import write_random_model
from bitnet_ref.measure.record import record
from bitnet_ref.measure.turns import BUSY, busy_seconds, frequency_hz
from bitnet_ref.reference.config import PRESETS, PUBLISHED
from bitnet_ref.runtime.load import load as load_file

__all__ = ["PEERS_CACHE", "PRESET", "Variant", "measure_models_beside_peers", "serve_ours"]

PRESET = "microsoft/bitnet-b1.58-2B-4T"
PEERS_CACHE = "f16"
"""How peers keep keys and values, and so ours where the two are compared."""

_ZEROS = ("up_zeros", "down_zeros", "up_listed", "down_listed")
_SLOW_S = 12.0
"""A program that needs longer than this for the prompt reads it once only."""


@dataclass(frozen=True)
class Variant:
    """A model of ours as one process opens it.

    With `gate_zeros` (as in :meth:`bitnet_ref.runtime.model.Model.random`) rows that add nothing are left out.
    """

    scheme: str
    head: str
    cache: str = "f32"
    gate_zeros: float | None = None

    @property
    def network(self) -> str:
        return "dense" if self.gate_zeros is None else "sparse"


def serve_ours(name: str, connection: Any) -> None:
    """What the process of our own model does."""
    held: dict[str, Any] = {}

    def load(path: Path, variant: Variant, threads: int, context: int) -> None:
        if "model" not in held:
            sparse = variant.network == "sparse"
            held["model"] = load_file(path, variant.scheme, variant.head, cache=variant.cache, sparse=sparse)
        held["runner"], held["context"] = held["model"].with_threads(threads), context

    def prefill(tokens: list[int]) -> float:
        held["cache"] = held["model"].new_cache(held["context"])
        start = time.perf_counter()
        held["runner"].prefill(tokens, held["cache"])
        return time.perf_counter() - start

    def decode(tokens: list[int]) -> list[float]:
        taken = []
        for token in tokens:
            start = time.perf_counter()
            held["runner"].forward([token], held["cache"])
            taken.append(time.perf_counter() - start)
        return taken

    def account(threads: int) -> dict[str, Any]:
        """Bytes that a token needs, where the time of a step goes; that sparse logits are those of the dense model."""
        return measure_model(held["model"], 8, 4, (threads,))[-1]

    answer(
        connection,
        {
            "write": write_random_model,
            "load": load,
            "prefill": prefill,
            "decode": decode,
            "account": account,
            "peak_resident_bytes": peak_resident_bytes,
        },
    )


def measure_models_beside_peers(
    command: str,
    folder: Path,
    peers: Sequence[str],
    heads: Sequence[str] = ("q6_k",),
    schemes: Sequence[str] = ("base3", "i2"),
    threads: Sequence[int | None] = (1, None),
    n_prompt: int = 512,
    n_generate: int = 16,
    n_rounds: int = 2,
    preset: str = PRESET,
    cache: str = PEERS_CACHE,
    progress: Callable[[str, float], None] | None = None,
    more: Sequence[Variant] = (),
) -> dict[str, Any]:
    """Time random models of one network in every program.

    Parameters
    ----------
    command : str
        What was run, for the record.
    folder : Path
        Where the files of random models are written, once.
    peers : sequence of str
        Of ``llama.cpp`` and ``ik_llama.cpp``.
    heads, schemes : sequence of str
        Types of embedding and head, for every program; packings of ours.
    threads : sequence of int or None
    n_prompt, n_generate, n_rounds : int
        Tokens that are read and then written in each round.
    preset : str
    cache : str
        How ours keep keys and values, ``f32`` or ``f16``.
    progress : callable(label, fraction done), optional
    more : sequence of Variant
        Further models of ours, which take their turns with the first head.

    Returns
    -------
    dict
        record and rows: run, kind, program, type, network (dense or sparse), gate_zeros, model, head, cache, batch,
        threads, n_prompt, n_generate, prefill_tokens_per_s, decode_tokens_per_s, decode_step_ns, low_ns, high_ns,
        bytes_per_token (ours), read_bandwidth_fraction (ours), outside_fraction (of a step, outside products and head;
        ours), up_zeros, down_zeros, up_listed, down_listed (sparse; as of
        :func:`bitnet_ref.measure.model_bench.measure_model`), peak_resident_bytes, repeats, others, busy, verified
        (logits were finite) and note.

    Raises
    ------
    PeerUnavailable
        If a peer is not installed, or runs no models.
    BitnetRefError
        If a program fails.
    """
    check_available(peers)
    for peer in peers:
        if peer not in TYPES:
            raise ValueError(f"models are compared with {' and '.join(TYPES)} only, got {peer!r}")
    report = progress or (lambda label, fraction: None)
    folder.mkdir(parents=True, exist_ok=True)
    header = record(command) | {"frequency_hz": frequency_hz(), "rounds": n_rounds}
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, PRESETS[preset].vocabulary, n_prompt).tolist()
    written = rng.integers(0, PRESETS[preset].vocabulary, n_generate).tolist()
    counts = sorted({kernels.resolve_threads(count) for count in threads})
    rows: list[dict[str, Any]] = []
    for h, head in enumerate(heads):
        workers: list[tuple[dict[str, Any], Worker, tuple[Any, ...]]] = []
        try:
            for ours in (*(Variant(scheme, head, cache) for scheme in schemes), *(more if h == 0 else ())):
                zeros = "" if ours.gate_zeros is None else f"-zeros-{ours.gate_zeros:g}"
                path = folder / f"{preset.rsplit('/')[-1]}-bitnet_ref-{ours.scheme}-{ours.head}{zeros}.safetensors"
                if not path.exists():
                    report(f"writing {path.name}", h / len(heads))
                    _write(serve_ours, "bitnet_ref", path, PUBLISHED[preset], ours.scheme, ours.head, ours.gate_zeros)
                about = {"program": "bitnet_ref", "type": ours.scheme, "head": ours.head, "cache": ours.cache}
                about |= {"network": ours.network, "gate_zeros": ours.gate_zeros}
                workers.append((about, Worker(serve_ours, "bitnet_ref"), (path, ours)))
            for peer in peers:
                for type_name in TYPES[peer]:
                    # The types that interleave rows are made at load from the plain ones.
                    repack = type_name.endswith("_R4")
                    stored = type_name.removesuffix("_R4")
                    path = folder / f"{preset.rsplit('/')[-1]}-{peer}-{stored}-{head}.gguf"
                    if not path.exists():
                        report(f"writing {path.name}", h / len(heads))
                        _write(serve_peer, peer, path, peer, PRESETS[preset], stored, head)
                    about = {"program": peer, "type": type_name, "head": head, "cache": PEERS_CACHE}
                    about |= {"network": "dense", "gate_zeros": None}
                    workers.append((about, Worker(serve_peer, peer), (str(path), repack)))
            for j, count in enumerate(counts):
                report(f"head {head}, {count} thread(s)", (h + j / len(counts)) / len(heads))
                rows += _stage(workers, count, prompt, written, n_rounds, preset)
            # Last, since the probe of the read bandwidth needs memory of its own.
            for about, worker, _ in workers:
                for row in rows:
                    if about["program"] == "bitnet_ref" and about.items() <= row.items():
                        account = worker.ask("account", row["threads"])
                        row["bytes_per_token"] = account["bytes_per_token"]
                        row["read_bandwidth_fraction"] = account["read_bandwidth_fraction"]
                        row["outside_fraction"] = 1 - account["product_fraction"] - account["head_fraction"]
                        row |= {key: account[key] for key in _ZEROS if key in account}
        finally:
            for _, worker, _ in workers:
                worker.close()
    for row in rows:
        row["run"] = header["date"]
    header["load_average_after"], header["frequency_hz_after"] = record(command)["load_average"], frequency_hz()
    return {"record": header, "rows": rows}


def _write(serve: Callable[..., None], name: str, *what: Any) -> None:
    """Write a file in a process of its own, so that no peak of memory is of writing."""
    writer = Worker(serve, name)
    try:
        writer.ask("write", *what)
    finally:
        writer.close()


def _stage(
    workers: Sequence[tuple[dict[str, Any], Worker, tuple[Any, ...]]],
    threads: int,
    prompt: list[int],
    written: list[int],
    n_rounds: int,
    preset: str,
) -> list[dict[str, Any]]:
    """One number of threads: everything loaded, then rounds."""
    context = len(prompt) + len(written)
    read: list[list[float]] = [[] for _ in workers]
    steps: list[list[float]] = [[] for _ in workers]
    others = []
    for about, worker, what in workers:
        if about["program"] == "bitnet_ref":
            worker.ask("load", *what, threads, context)
        else:
            worker.ask("load", what[0], threads, context, what[1])
        worker.ask("prefill", prompt[:8])
    for _ in range(n_rounds):
        start, before, own = time.perf_counter(), busy_seconds(), 0.0
        for i, (_, worker, _) in enumerate(workers):
            if not read[i] or read[i][0] < _SLOW_S:
                read[i].append(worker.ask("prefill", prompt))
            else:
                worker.ask("prefill", prompt[:1])
            steps[i] += worker.ask("decode", written)
            own += worker.ask("processor_seconds")
            time.sleep(0.1)
        after = busy_seconds()
        if before is not None and after is not None:
            wall = time.perf_counter() - start
            others.append(max(0.0, after - before - own) / wall / kernels.resolve_threads(None))
    share = float(np.median(others)) if others else None
    rows = []
    for (about, worker, _), seconds, step in zip(workers, read, steps, strict=True):
        low, median, high = np.percentile(step, (25, 50, 75)) * 1e9
        row = {
            "kind": "measured",
            **about,
            "model": f"random, {preset}",
            "batch": 1,
            "threads": threads,
            "n_prompt": len(prompt),
            "n_generate": len(written),
            "prefill_tokens_per_s": len(prompt) / float(np.median(seconds)),
            "decode_tokens_per_s": 1e9 / float(median),
            "decode_step_ns": float(median),
            "low_ns": float(low),
            "high_ns": float(high),
            "repeats": len(seconds),
            "peak_resident_bytes": worker.ask("peak_resident_bytes"),
            "others": share,
            "busy": None if share is None else share > BUSY,
            "verified": True,
            "bytes_per_token": None,
            "read_bandwidth_fraction": None,
            "outside_fraction": None,
        }
        rows.append(row)
    return rows
