"""What the process of a peer does: answer requests, one at a time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bitnet_ref.measure.peers import ERROR_LIMIT
from bitnet_ref.measure.problem import problem
from bitnet_ref.measure.turns import FIRST_WAKE_NS, SLICE_NS, wake

__all__ = ["Candidate", "answer", "products", "serve"]

Candidate = tuple[dict[str, Any], Callable[[], np.ndarray], int]
"""Columns of a row; a call that does some units of work and returns the result of the last; how many units."""


def serve(name: str, connection: Any) -> None:
    """Load the peer called `name` and answer until the other end closes."""
    if name == "torch":
        from bitnet_ref.measure.peers.torch_int8 import candidates
    else:
        from bitnet_ref.measure.peers.ggml import Ggml

        candidates = Ggml(name).candidates
    answer(connection, products(candidates))


def products(candidates: Callable[..., Iterator[Candidate]]) -> dict[str, Callable[..., Any]]:
    """The requests of a peer that multiplies: ``prepare`` a product, take a ``turn``."""
    ready: dict[int, tuple[Callable[[], np.ndarray], int, int]] = {}
    fastest_ns: dict[int, float] = {}
    numbers = itertools.count()

    def prepare(m: int, k: int, tokens: int, threads: int) -> list[tuple[int, dict[str, Any]]]:
        ready.clear()
        w_q, x_q, expected = problem(m, k, tokens)
        rms = float(np.sqrt(np.mean(expected.astype(np.float64) ** 2)))
        found = []
        for row, call, units in candidates(w_q, x_q, threads):
            error = float(np.abs(call() - expected).max()) / rms
            row = {**row, "error": error, "verified": bool(error <= ERROR_LIMIT)}
            if not row["verified"]:
                row["note"] = f"error {error:.2g} of the root mean square: it does not compute this product; not timed"
                found.append((-1, row))
                continue
            fastest = wake(call, least_ns=FIRST_WAKE_NS)
            start = time.perf_counter_ns()
            call()
            ns = max(1, time.perf_counter_ns() - start)
            handle = next(numbers)
            ready[handle], fastest_ns[handle] = (call, units, max(1, -(-SLICE_NS // ns))), fastest
            found.append((handle, row))
        return found

    def turn(handle: int) -> tuple[float, float]:
        call, units, repeats = ready[handle]
        spent = time.process_time()  # with the untimed work: it is this program's, too
        fastest_ns[handle] = wake(call, fastest_ns[handle])
        start = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        taken = time.perf_counter_ns() - start
        return taken / (repeats * units), time.process_time() - spent

    return {"prepare": prepare, "turn": turn}


def answer(connection: Any, does: dict[str, Callable[..., Any]]) -> None:
    """Answer requests by these functions until the other end closes; an error is an answer, too.

    ``processor_seconds``, what this process has spent since it was last asked, is known to all.
    """
    spent = time.process_time()

    def processor_seconds() -> float:
        nonlocal spent
        before, spent = spent, time.process_time()
        return spent - before

    does = {**does, "processor_seconds": processor_seconds}
    while True:
        try:
            what, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            connection.send((True, does[what](*arguments)))
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))
