"""Programs that take turns: the engine behind every comparison of speeds.

All programs of a stage run one after the other within a round, and so do the probes of the machine: a change in the
machine's speed hits all of them. Only one works at a time; a program in a process of its own waits at its pipe
meanwhile. What *other* processes take from the processors in a round is read from the system's own account, and rows of
busy rounds say so.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["BUSY", "Program", "busy_seconds", "frequency_hz", "rounds", "sized", "spread", "turn_order", "wake"]

SLICE_NS = 15_000_000
"""One program's turn in a round takes at least this long, or one call."""

SETTLE_S = 0.05
"""Idle workers of a thread pool keep spinning for a while and would take a processor from the program that is next:
OpenBLAS for 2**26 cycles, OpenMP for some milliseconds."""

WAKE_NS = 30_000_000
LONGEST_WAKE_NS = 1_000_000_000
"""Untimed work before each turn. Workers that slept may wake on the processor of the one that woke them, and the system
takes a while to part them; until then every barrier waits for a time slice: 3 ms a product, not 0.1. Where another
program's workers still spin on the other processor, that lasts until they sleep. So the work goes on until a call takes
less than AWAKE times what the fastest has taken, for a second at most. A second in vain may mean that the machine has
become slower: what counts as the fastest is AWAKE times longer from then on, or every later turn would wait as long."""

FIRST_WAKE_NS = 300_000_000
"""The same before anything is known: two threads on one processor for all of 30 ms would make half speed the norm."""

AWAKE = 1.3

BUSY = 0.05
"""Share of all processors' time that others may take in a round before it counts as busy."""


@dataclass
class Program:
    """Something that takes turns: ``turn()`` gives (ns for a unit of work, seconds of processor time it spent)."""

    row: dict[str, Any]
    turn: Callable[[], tuple[float, float]]
    times: list[float] = field(default_factory=list)


def wake(call: Callable[[], object], fastest_ns: float = math.inf, least_ns: int = WAKE_NS) -> float:
    """Call, untimed, until all threads run on processors of their own; see :data:`WAKE_NS`.

    Parameters
    ----------
    call : callable
    fastest_ns : float
        The shortest call so far.
    least_ns : int
        Call for so long in any case.

    Returns
    -------
    float
        The shortest call so far, with these; AWAKE times that where none came near it in the longest time.
    """
    start = now = time.perf_counter_ns()
    taken = math.inf
    while now - start < least_ns or (taken > AWAKE * fastest_ns and now - start < LONGEST_WAKE_NS):
        call()
        taken, now = time.perf_counter_ns() - now, time.perf_counter_ns()
        fastest_ns = min(fastest_ns, taken)
    return fastest_ns if taken <= AWAKE * fastest_ns else AWAKE * fastest_ns


def sized(row: dict[str, Any], call: Callable[[int], object]) -> Program:
    """A program of this process whose ``call(i)`` does the i-th unit, with turns that are long enough to time."""
    (per_turn, fastest_ns), cursor = _per_turn(call), 0

    def turn() -> tuple[float, float]:
        nonlocal cursor, fastest_ns
        spent = time.process_time()  # with the untimed work: it is this program's, too
        fastest_ns = wake(lambda: call(cursor), fastest_ns)
        start = time.perf_counter_ns()
        for i in range(cursor, cursor + per_turn):
            call(i)
        taken = time.perf_counter_ns() - start
        cursor += per_turn
        return taken / per_turn, time.process_time() - spent

    return Program(row, turn)


def _per_turn(call: Callable[[int], object]) -> tuple[int, float]:
    """How many units fill a slice, and the shortest call; these first calls also warm caches and threads."""
    fastest_ns = wake(lambda: call(0), least_ns=FIRST_WAKE_NS)
    start = time.perf_counter_ns()
    call(1)
    return max(1, -(-SLICE_NS // max(1, time.perf_counter_ns() - start))), fastest_ns


def rounds(programs: Sequence[Program], n_rounds: int, threads: int, slow_turns: int = 3) -> list[float]:
    """Let all programs take their turns, round by round.

    Parameters
    ----------
    programs : sequence of Program
        Each gets a time for every round; one whose turn takes over 20 slices gets `slow_turns` of them.
    n_rounds : int
    threads : int
        With more than one, each turn begins when the workers of the one before have gone to sleep.

    Returns
    -------
    list of float, one for each round
        Share of all processors' time that other processes took; empty where the system keeps no such account.
    """
    others = []
    for n in range(n_rounds):
        order = turn_order(len(programs), n)
        account, start, own = busy_seconds(), time.perf_counter(), time.process_time()
        for program in (programs[i] for i in order):
            if len(program.times) >= slow_turns and program.times[0] > 20 * SLICE_NS:
                continue
            before = time.process_time()
            ns, spent = program.turn()
            program.times.append(ns)
            own -= max(0.0, spent - (time.process_time() - before))  # what another process of ours spent
            if threads > 1:
                time.sleep(SETTLE_S)
        own = time.process_time() - own
        if account is not None:
            taken = (busy_seconds() or account) - account
            processors = (os.cpu_count() or 1) * (time.perf_counter() - start)
            others.append(max(0.0, taken - own) / processors)
    return others


def turn_order(n_programs: int, n: int) -> list[int]:
    """Who comes when in round n: rows of a Williams square, in which everyone is seldom behind the same one.

    What comes behind NumPy's workers in this process is slower with two threads; if that were the same program in each
    round, its median would be. Each is behind each other one once in as many rounds as there are programs, twice in
    twice as many where their number is odd.
    """
    zigzag = [(j + 1) // 2 if j % 2 else -(j // 2) for j in range(n_programs)]
    order = [(step + n) % n_programs for step in zigzag]
    return order[::-1] if n_programs % 2 and n % 2 else order


def spread(times: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of a program's turns, as the columns of a row."""
    low, median, high = np.percentile(times, (25, 50, 75))
    return {"median_ns": float(median), "low_ns": float(low), "high_ns": float(high), "repeats": len(times)}


def busy_seconds() -> float | None:
    """Seconds that all processors together have not been idle since boot, stolen ones included."""
    try:
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    idle, waiting = fields[3], fields[4]
    return (sum(fields) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def frequency_hz() -> float | None:
    """The processors' mean frequency as Linux reports it now, or None; a virtual machine often reports a constant."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    found = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return round(float(np.mean(found)) * 1e6) if found else None
