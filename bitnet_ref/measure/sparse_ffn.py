"""Speed of a feed-forward network that skips what adds nothing, by sparsity, and the sparsity of a real model.

    python -m bitnet_ref.measure.sparse_ffn OUT.json [--isa ...] [--threads ...] [--rounds N] [--model FILE --text FILE]

It times the three products of one token with random weights and *synthetic* activations: a random share of the gates
is positive, another list for every call, and exactly those activations are not zero. In a real network the activations
have more zeros than the gates, never fewer. Dense and sparse take turns in one run, on weights that come from memory,
and their results are compared before anything is timed. Of a model, both kinds of zeros are counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ref import kernels
from bitnet_ref.kernels import ISAS
from bitnet_ref.measure import record as machine
from bitnet_ref.measure.turns import rounds, sized, spread
from bitnet_ref.reference.model import forward
from bitnet_ref.reference.packing import PackedTernary, pack
from bitnet_ref.reference.packing.base import freeze
from bitnet_ref.reference.quantize import quantize_activations
from bitnet_ref.runtime.load import load
from bitnet_ref.runtime.pages import huge_array

__all__ = ["SPARSITIES", "measure_model", "measure_speed"]

SPARSITIES = (0.0, 0.25, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95)
_LISTS = 29  # of rows for each sparsity: with 12 copies of the weights, 348 calls until rows come again


def measure_speed(
    isas: Sequence[str],
    threads: Sequence[int],
    n_rounds: int = 9,
    ffn: int = 6912,
    hidden: int = 2560,
    copies: int = 12,
) -> list[dict[str, Any]]:
    """Rows with part (``gate``, ``up``, ``down``), program (``base3`` or ``base3r``), isa, threads, sparsity, times.

    Parameters
    ----------
    isas : sequence of str
        Caps: each takes the best kernel that needs no more.
    threads : sequence of int
    n_rounds : int
    ffn, hidden : int
        Sizes of the network.
    copies : int
        Sets of weights that calls go through, so that none of them is found in a cache.

    Returns
    -------
    list of dict
        times as :func:`bitnet_ref.measure.turns.spread`, and `busy`: the largest share of the processors that others
        took in a round.

    Raises
    ------
    RuntimeError
        If a sparse product differs from the dense one.
    """
    rng = np.random.default_rng(0)
    w = rng.integers(-1, 2, (ffn, hidden), np.int8)
    # The matrix serves as W_up and as the transpose of W_down, which has its shape; further copies are random bytes.
    dense_up, dense_down, sparse_up = (
        _copies(rng, pack(matrix, scheme), copies)
        for matrix, scheme in ((w, "base3"), (np.ascontiguousarray(w.T), "base3"), (w, "base3r"))
    )
    z = rng.integers(-128, 128, hidden, np.int8)
    found = []
    for isa in isas:
        gemv, dotrows = _best("gemv", "base3", isa), _best("dotrows", "base3r", isa)
        addrows = _best("addrows", "base3r", isa)
        for n_threads in threads:
            gate = _dense(gemv, dense_up, [z], n_threads)
            programs = [sized({"part": "gate", "program": "base3", "sparsity": 0.0}, gate)]
            for sparsity in SPARSITIES:
                acts = [_activations(rng, ffn, sparsity) for _ in range(_LISTS)]
                gates = [np.where(x != 0, np.float32(1), np.float32(-1)) for x in acts]
                calls = {
                    ("up", "base3"): _dense(gemv, dense_up, [z], n_threads),
                    ("up", "base3r"): _dots(dotrows, sparse_up, z, gates, n_threads),
                    ("down", "base3"): _dense(gemv, dense_down, acts, n_threads),
                    ("down", "base3r"): _sums(addrows, sparse_up, acts, n_threads),
                }
                for i in range(0, copies * _LISTS, copies):  # the real matrix with every list
                    whole = np.where(gates[i % _LISTS] > 0, calls["up", "base3"](i), 0)
                    if not np.array_equal(whole, calls["up", "base3r"](i)):
                        raise RuntimeError(f"{dotrows} differs from {gemv} at a sparsity of {sparsity:.0%}")
                    if not np.array_equal(calls["down", "base3"](i), calls["down", "base3r"](i)):
                        raise RuntimeError(f"{addrows} differs from {gemv} at a sparsity of {sparsity:.0%}")
                for (part, program), call in calls.items():
                    if program == "base3r" or sparsity == 0:  # dense products do not depend on it
                        programs.append(sized({"part": part, "program": program, "sparsity": sparsity}, call))
            busy = max(rounds(programs, n_rounds, n_threads), default=None)
            found += [{"isa": isa, "threads": n_threads, **p.row, **spread(p.times), "busy": busy} for p in programs]
    return found


def _best(op: str, scheme: str, cap: str) -> kernels.Kernel:
    names = [n for n in kernels.supported(op) if n.scheme == scheme and ISAS[n.isa] <= ISAS[cap]]
    return kernels.get(max(names, key=lambda name: ISAS[name.isa]))


def _copies(rng: np.random.Generator, packed: PackedTernary, copies: int) -> list[PackedTernary]:
    """The bytes, and others that are as many weights, in one array on huge pages."""
    data = huge_array((copies, *packed.data.shape))
    data[0] = packed.data
    for other in data[1:]:
        other[...] = rng.integers(0, 243, other.shape, np.uint8)
    freeze(data)
    return [PackedTernary(one, packed.shape, packed.scheme) for one in data]


def _activations(rng: np.random.Generator, n: int, sparsity: float) -> np.ndarray:
    """Int8 activations of which a share, rounded, is zero at random places."""
    x = np.zeros(n, np.int8)
    rows = rng.permutation(n)[: round(n * (1 - sparsity))]
    x[rows] = rng.integers(1, 128, len(rows)) * rng.choice([-1, 1], len(rows))
    return x


def _dense(
    kernel: kernels.Kernel, matrices: list[PackedTernary], xs: list[np.ndarray], n_threads: int
) -> Callable[[int], np.ndarray]:
    """The i-th call goes on to the next weights and the next activations."""
    out = np.empty(matrices[0].shape[0], np.int32)
    return lambda i: kernel(xs[i % len(xs)], matrices[i % len(matrices)], n_threads=n_threads, out=out)


def _dots(
    kernel: kernels.Kernel, matrices: list[PackedTernary], z: np.ndarray, gates: list[np.ndarray], n_threads: int
) -> Callable[[int], np.ndarray]:
    """W_up of the rows with a positive gate, finding them included; zeros elsewhere, as SubLN needs them."""

    def call(i: int) -> np.ndarray:
        gate = gates[i % len(gates)]
        rows = np.flatnonzero(gate > 0).astype(np.int32)
        up = np.zeros(len(gate), np.int32)
        up[rows] = kernel.dot_rows(z, matrices[i % len(matrices)], rows, n_threads=n_threads)
        return up

    return call


def _sums(
    kernel: kernels.Kernel, matrices: list[PackedTernary], acts: list[np.ndarray], n_threads: int
) -> Callable[[int], np.ndarray]:
    """W_down of the activations that are not zero, finding them included."""

    def call(i: int) -> np.ndarray:
        x = acts[i % len(acts)]
        rows = np.flatnonzero(x).astype(np.int32)
        return kernel.add_rows(x, matrices[i % len(matrices)], rows, n_threads=n_threads)

    return call


def measure_model(path: Path, text: bytes, n_tokens: int = 2048) -> list[dict[str, Any]]:
    """For each layer, the mean share of W_up rows and of W_down columns that add nothing, and its range over tokens.

    Parameters
    ----------
    path : Path
        A model with a gated squared-ReLU network.
    text : bytes
    n_tokens : int
        Tokens of the text that are taken, in pieces of the model's context.

    Raises
    ------
    ValueError
        If the network has another activation, or the text is too short.
    """
    model = load(path, head="f32")
    config = model.config
    if config.activation != "relu2":
        raise ValueError(f"the activation must be relu2 for rows to be skipped, this network has {config.activation}")
    tokens = np.asarray(model.tokenizer.encode(text.decode(errors="ignore")))[:n_tokens]
    if len(tokens) < n_tokens:
        raise ValueError(f"the text must have at least {n_tokens} tokens, got {len(tokens)}")
    zeros: dict[str, list[np.ndarray]] = {}

    def note(name: str, array: np.ndarray) -> None:
        if name.endswith(".gate_proj"):
            zeros.setdefault(name, []).append((array <= 0).mean(axis=1))
        elif name.endswith(".ffn_sub_norm"):
            zeros.setdefault(name, []).append((quantize_activations(array)[0] == 0).mean(axis=1))

    for start in range(0, n_tokens, config.context):
        piece = tokens[start : start + config.context]
        forward(config, model.weights, piece, linear=model.linear, trace=note, steps=model.steps)
    rows = []
    for i in range(config.layers):
        row: dict[str, Any] = {"layer": i, "tokens": n_tokens}
        for part, name in (("up_rows", "gate_proj"), ("down_columns", "ffn_sub_norm")):
            share = np.concatenate(zeros[f"layers.{i}.{name}"])
            row[part] = {"mean": float(share.mean()), "least": float(share.min()), "most": float(share.max())}
        rows.append(row)
    return rows


def main() -> None:
    """Measure and write a result file."""
    parser = argparse.ArgumentParser(prog="python -m bitnet_ref.measure.sparse_ffn", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--isa", nargs="+", default=["avx512vbmi", "avx2"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", type=Path, help="count the zeros of this model, too")
    parser.add_argument("--text", type=Path, help="the text that it reads")
    parser.add_argument("--skip-bytes", type=int, default=0, help="bytes of the text to leave out at its beginning")
    options = parser.parse_args()
    results = {
        "record": machine.record("python -m bitnet_ref.measure.sparse_ffn"),
        "sparse_ffn": measure_speed(options.isa, options.threads, options.rounds),
    }
    if options.model is not None:
        results["sparsity"] = measure_model(options.model, options.text.read_bytes()[options.skip_bytes :])
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
