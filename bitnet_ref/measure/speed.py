"""How fast the kernels are, beside NumPy, the scalar kernel and the machine's own limits, in one interleaved run.

Method
------
- Nothing is timed that has not just given the exact result on the very data that is timed.
- Decoding reads every weight once, so one-token products cycle over copies that together hold twice the last-level
  cache: weights are cold, as they are in a model. Products of 128 tokens work on one matrix.
- All programs take turns within a round, and so do the probes of the machine (streaming reads; int8 multiply-adds,
  where many tokens share the weights): a change in the machine's speed hits all of them. With several threads, each
  turn begins when the workers of the one before have gone to sleep. Figures are medians over rounds, with quartiles.
- A probe of the same rounds and thread count gives ``read_bandwidth_fraction``: packed bytes per second over bytes that
  the machine can read at all. It may exceed 1 a little, since the probe is an ordinary C loop and not a bound by proof.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from bitnet_ref import kernels
from bitnet_ref.errors import BitnetRefError
from bitnet_ref.kernels import KernelName
from bitnet_ref.measure.record import cache_bytes
from bitnet_ref.reference.packing import PackedTernary, pack

__all__ = ["SHAPES_2B4T", "measure"]

SHAPES_2B4T = ((2560, 2560), (640, 2560), (6912, 2560), (2560, 6912))
"""(M, K) of the linear layers of BitNet b1.58 2B4T: q and o, k and v, gate and up, down. [2B4T]"""

_PROBE_BYTES = 2**28  # far beyond any last-level cache that this is likely to meet
_SLICE_NS = 15_000_000  # one program's turn in a round takes at least this long, or one call
# Idle workers of a thread pool keep spinning for a while and would take a processor from the program that is next:
# OpenBLAS for 2**26 cycles, OpenMP for some milliseconds.
_SETTLE_S = 0.05


@dataclass
class _Program:
    """Something that takes turns: ``call(i)`` does the i-th unit of work, ``times`` collects ns per unit."""

    row: dict[str, object]
    call: Callable[[int], object]
    per_turn: int
    times: list[float]
    cursor: int = 0

    def turn(self) -> None:
        start = time.perf_counter_ns()
        for i in range(self.cursor, self.cursor + self.per_turn):
            self.call(i)
        self.times.append((time.perf_counter_ns() - start) / self.per_turn)
        self.cursor += self.per_turn


def measure(
    quick: bool, progress: Callable[[str, float], None] | None = None
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Time every supported kernel on the 2B4T layer shapes.

    Parameters
    ----------
    quick : bool
        Two shapes, the selected and the scalar kernels only, three rounds; otherwise four shapes, all kernels, seven.
    progress : callable(label, fraction done), optional

    Returns
    -------
    speed : list of dict
        kind, program, kernel, op, scheme, isa, m, k, tokens, threads, median_ns, low_ns, high_ns (quartiles), repeats,
        weights_per_s (tokens * m * k per second), weight_bytes, read_bandwidth_fraction, verified.
    limits : list of dict
        kind, what (read_bandwidth or int8_multiply_adds), isa, threads, median_per_s, low_per_s, high_per_s, unit,
        repeats.

    Raises
    ------
    BitnetRefError
        If a kernel gives a wrong result; nothing is timed then.
    """
    report = progress or (lambda label, fraction: None)
    shapes = SHAPES_2B4T[:2] if quick else SHAPES_2B4T
    everything = kernels.resolve_threads(None)
    thread_counts = sorted({1, everything})
    rounds = 3 if quick else 7
    speed: list[dict[str, object]] = []
    bandwidth: dict[int, list[float]] = {threads: [] for threads in thread_counts}
    peaks: dict[tuple[str, int], list[float]] = {}
    words = np.ones(_PROBE_BYTES // 8, np.uint64)
    stages = [(tokens, shape, threads) for tokens in (1, 128) for shape in shapes for threads in thread_counts]
    for done, (tokens, (m, k), threads) in enumerate(stages):
        report(f"{m} x {k}, {tokens} token(s), {threads} thread(s)", done / len(stages))
        rng = np.random.default_rng([m, k, tokens])
        w_q = rng.integers(-1, 2, (m, k), dtype=np.int8)
        x_q = rng.integers(-127, 128, (tokens, k), dtype=np.int8)
        programs = [_numpy_program(w_q, x_q, threads)]
        names = _names("gemv" if tokens == 1 else "gemm", quick)
        expected = (x_q.astype(np.float32) @ w_q.T.astype(np.float32)).astype(np.int32)  # exact: below 2**24
        programs += [_kernel_program(name, w_q, x_q, expected, threads) for name in names]
        probe = _Program({}, lambda _, t=threads: kernels.read_all(words, t), 1, [])
        # The arithmetic rate matters, and is probed, where many tokens share the weights.
        rates = [_peak_program(name, threads) for name in kernels.supported("peak") if tokens > 1]
        with threadpool_limits(threads, "blas"):
            for _ in range(rounds):
                for program in (*programs, *rates, probe):
                    # A slow program has little spread to show; three turns of it are enough.
                    if len(program.times) < 3 or program.times[0] < 20 * _SLICE_NS:
                        program.turn()
                        if threads > 1:
                            time.sleep(_SETTLE_S)
        bandwidth[threads] += [_PROBE_BYTES / ns * 1e9 for ns in probe.times]
        for rate in rates:
            key = (str(rate.row["isa"]), threads)
            peaks.setdefault(key, []).extend(rate.row["multiply_adds"] / ns * 1e9 for ns in rate.times)
        read_per_ns = _PROBE_BYTES / float(np.median(probe.times))
        for program in programs:
            low, median, high = np.percentile(program.times, (25, 50, 75))
            speed.append(
                {
                    "kind": "measured",
                    **program.row,
                    "m": m,
                    "k": k,
                    "tokens": tokens,
                    "threads": threads,
                    "median_ns": float(median),
                    "low_ns": float(low),
                    "high_ns": float(high),
                    "repeats": len(program.times),
                    "weights_per_s": tokens * m * k / float(median) * 1e9,
                    "read_bandwidth_fraction": program.row["weight_bytes"] / float(median) / read_per_ns,
                    "verified": True,
                }
            )
    limits = [_limit("read_bandwidth", None, threads, rates, "B/s") for threads, rates in bandwidth.items()]
    limits += [_limit("int8_multiply_adds", isa, threads, found, "MAC/s") for (isa, threads), found in peaks.items()]
    report("speed measured", 1.0)
    return speed, limits


def _names(op: str, quick: bool) -> list[KernelName]:
    names = kernels.supported(op)
    if quick:
        chosen = {kernels.select(op, name.scheme).name for name in names}
        names = tuple(name for name in names if name in chosen or (name.isa == "scalar" and name.scheme == "i2"))
    return list(names)


def _copies(nbytes: int) -> int:
    """Copies of one matrix that together exceed twice the last-level cache (32 MiB where that is unknown)."""
    return max(2, -(-2 * (cache_bytes() or 2**25) // nbytes))


def _kernel_program(name: KernelName, w_q: np.ndarray, x_q: np.ndarray, expected: np.ndarray, threads: int) -> _Program:
    kernel, packed = kernels.get(name), pack(w_q, name.scheme)
    out = np.empty((len(x_q), len(w_q)), np.int32)
    kernel(x_q, packed, n_threads=threads, out=out)
    if not np.array_equal(out, expected):
        raise BitnetRefError(f"{name} gives a wrong result for M = {len(w_q)}, K = {w_q.shape[1]}; it is not timed")
    copies = [packed]
    if len(x_q) == 1:
        # Views of one array, one copy after the other in memory, as the layers of a model are.
        many = np.empty((_copies(packed.nbytes), *packed.data.shape), np.uint8)
        many[:] = packed.data
        many.setflags(write=False)
        copies = [PackedTernary(data, packed.shape, name.scheme) for data in many]
    row = {
        "program": "bitnet_ref",
        "kernel": str(name),
        "op": name.op,
        "scheme": name.scheme,
        "isa": name.isa,
        "weight_bytes": packed.nbytes,
    }
    return _sized(row, lambda i: kernel(x_q, copies[i % len(copies)], n_threads=threads, out=out))


def _numpy_program(w_q: np.ndarray, x_q: np.ndarray, threads: int) -> _Program:
    """float32 matrix product of NumPy's BLAS: what one has without any of this."""
    w = w_q.astype(np.float32)
    x = x_q.astype(np.float32)
    copies = [w] if len(x) > 1 else [w.copy() for _ in range(_copies(w.nbytes))]
    out = np.empty((len(x), len(w)), np.float32)
    row = {
        "program": "numpy",
        "kernel": "numpy_float32",
        "op": "gemv" if len(x) == 1 else "gemm",
        "scheme": None,
        "isa": None,
        "weight_bytes": w.nbytes,
    }
    with threadpool_limits(threads, "blas"):
        return _sized(row, lambda i: np.matmul(x, copies[i % len(copies)].T, out=out))


def _sized(row: dict[str, object], call: Callable[[int], object]) -> _Program:
    """A program whose turns are long enough to time; the first calls also warm caches and threads."""
    call(0)
    start = time.perf_counter_ns()
    call(1)
    ns = max(1, time.perf_counter_ns() - start)
    return _Program(row, call, max(1, -(-_SLICE_NS // ns)), [])


def _peak_program(name: KernelName, threads: int) -> _Program:
    """The register tile of dot products: what a kernel would reach if its weights needed no decoding."""
    kernel, steps = kernels.get(name), 20_000
    count = kernel.multiply_adds(steps, threads)
    return _sized({"isa": name.isa, "multiply_adds": count}, lambda _: kernel.multiply_adds(steps, threads))


def _limit(what: str, isa: str | None, threads: int, rates: list[float], unit: str) -> dict[str, object]:
    low, median, high = np.percentile(rates, (25, 50, 75))
    return {
        "kind": "measured",
        "what": what,
        "isa": isa,
        "threads": threads,
        "median_per_s": float(median),
        "low_per_s": float(low),
        "high_per_s": float(high),
        "unit": unit,
        "repeats": len(rates),
    }
