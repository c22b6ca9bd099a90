"""How fast the kernels are, beside other programs, the scalar kernel and the machine's own limits, in one run.

Method
------
- Nothing is timed that has not just given the right result on the very data that is timed: the exact one for ours; for
  peers that round activations in another way, the error is reported.
- Decoding reads every weight once, so one-token products cycle over copies that together hold twice the last-level
  cache: weights are cold, as they are in a model. Products of several tokens work on one matrix.
- All programs take turns within a round, and so do the probes of the machine (streaming reads; int8 multiply-adds,
  where several tokens share the weights); see :mod:`bitnet_ref.measure.turns`. Figures are medians over rounds, with
  quartiles.
- A probe of the same rounds and thread count gives ``read_bandwidth_fraction``: packed bytes per second over bytes that
  the machine can read at all. It may exceed 1 a little, since the probe is an ordinary C loop and not a bound by proof.
- ``fraction_of_limit`` holds a row against what limits it: the read bandwidth for one token, the highest rate of int8
  multiply-adds that any program of the run reached with as many threads for 128 tokens and more, and for batches
  between these whichever of the two asks for more time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from bitnet_ref import kernels
from bitnet_ref.errors import BitnetRefError
from bitnet_ref.kernels import KernelName
from bitnet_ref.measure.peers import ERROR_LIMIT, Worker, check_available
from bitnet_ref.measure.peers.worker import serve
from bitnet_ref.measure.problem import copies, problem
from bitnet_ref.measure.record import cache_bytes, record
from bitnet_ref.measure.shapes import load_shapes
from bitnet_ref.measure.turns import BUSY, Program, frequency_hz, rounds, sized, spread
from bitnet_ref.reference.packing import PackedTernary, pack

__all__ = ["SHAPES_2B4T", "cache_bytes", "measure", "measure_kernels"]

SHAPES_2B4T = tuple(load_shapes("2b4t"))
"""(M, K) of the linear layers of BitNet b1.58 2B4T: q and o, k and v, gate and up, down. [2B4T]"""

_PROBE_BYTES = 2**28  # far beyond any last-level cache that this is likely to meet

Progress = Callable[[str, float], None]


def measure(quick: bool, progress: Progress | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Time every supported kernel and NumPy on the 2B4T layer shapes, for the report.

    Parameters
    ----------
    quick : bool
        Two shapes, the selected and the scalar kernels only, three rounds; otherwise four shapes, all kernels, seven.
    progress : callable(label, fraction done), optional

    Returns
    -------
    speed, limits : list of dict
        ``rows`` and ``limits`` of :func:`measure_kernels`.

    Raises
    ------
    BitnetRefError
        If a kernel gives a wrong result; nothing is timed then.
    """
    everything = kernels.resolve_threads(None)
    stages = [
        (tokens, shape, threads)
        for tokens in (1, 128)
        for shape in (SHAPES_2B4T[:2] if quick else SHAPES_2B4T)
        for threads in sorted({1, everything})
    ]
    names = {op: _report_names(op, quick) for op in kernels.PRODUCTS}
    rows, limits = _run(stages, names.__getitem__, ("numpy",), (None,), 3 if quick else 7, progress, serve)
    return rows, limits


def measure_kernels(
    command: str,
    shapes: Sequence[tuple[int, int]] = SHAPES_2B4T,
    tokens: Sequence[int] = (1, 128),
    threads: Sequence[int | None] = (1, None),
    isas: Sequence[str | None] = (None,),
    types: Sequence[str] | None = None,
    peers: Sequence[str] = (),
    n_rounds: int = 7,
    progress: Progress | None = None,
    serve_peer: Callable[[str, Any], None] = serve,
) -> dict[str, Any]:
    """Time the kernels that would be chosen under each cap of the instruction set, and peers, on every combination.

    Parameters
    ----------
    command : str
        What was run, for the record.
    shapes : sequence of (M, K)
    tokens : sequence of int
    threads : sequence of int or None
        As in :func:`bitnet_ref.kernels.resolve_threads`.
    isas : sequence of str or None
        Caps: for each, the best kernel of every type that needs no higher instruction set. None: no cap.
    types : sequence of str, optional
        Packing schemes of ours; all by default.
    peers : sequence of str
        Of :data:`bitnet_ref.measure.peers.PEERS`. Under a cap of avx2, PyTorch runs once more with the same cap, and
        only so on a processor that has no more.
    n_rounds : int
    progress : callable(label, fraction done), optional
    serve_peer : callable
        What the process of a peer does; tests put a made-up peer here.

    Returns
    -------
    dict
        record (with frequency_hz and load_average before and after), limits and rows; a row has run, kind, program,
        kernel, type, op, scheme, isa, m, k, tokens, threads, weight_bytes, median_ns, low_ns, high_ns (quartiles),
        repeats, weights_per_s (tokens * m * k per second), read_bandwidth_fraction, limit, fraction_of_limit, error
        (largest, over the root mean square of the exact result), verified, others (median share of all processors
        that other processes took), busy_rounds, busy and, from peers, version and note.

    Raises
    ------
    ValueError
        If a list is empty or a number is below 1.
    PeerUnavailable
        If a peer is unknown or not installed.
    KernelUnavailable
        If a cap names no instruction set that can run here.
    BitnetRefError
        If a kernel gives a wrong result, or a peer fails.
    """
    for name, values in (("shapes", shapes), ("tokens", tokens), ("threads", threads), ("isas", isas)):
        if not values:
            raise ValueError(f"{name} must hold at least one value, got none")
    if min(tokens) < 1 or n_rounds < 1:
        raise ValueError(f"tokens and rounds must be at least 1, got {min(tokens)} and {n_rounds}")
    check_available(peers)
    header = record(command)
    header["frequency_hz"] = frequency_hz()
    counts = sorted({kernels.resolve_threads(count) for count in threads})
    stages = [(count, shape, n) for count in tokens for shape in shapes for n in counts]
    names = {op: capped_names(op, isas, types) for op in kernels.PRODUCTS}
    rows, limits = _run(stages, names.__getitem__, peers, isas, n_rounds, progress, serve_peer)
    after = record(command)
    header["load_average_after"], header["frequency_hz_after"] = after["load_average"], frequency_hz()
    header["rounds"] = n_rounds
    for row in rows:
        row["run"] = header["date"]
    return {"record": header, "limits": limits, "rows": rows}


def capped_names(op: str, isas: Sequence[str | None], types: Sequence[str] | None = None) -> list[KernelName]:
    """The kernels that would be chosen for an op under each of these caps, every one once."""
    rank = kernels.ISAS
    names = [name for name in kernels.supported(op) if types is None or name.scheme in types]
    for scheme in types or ():
        if scheme not in {name.scheme for name in names}:
            raise ValueError(f"types must be among the packings of this build, got {scheme!r}")
    chosen: list[KernelName] = []
    for cap in isas:
        if cap is not None and cap not in kernels.processor_isas():
            here = ", ".join(kernels.processor_isas())
            raise kernels.KernelUnavailable(f"this processor has the instruction sets {here}, got {cap!r}")
        for scheme in dict.fromkeys(name.scheme for name in names):
            able = [n for n in names if n.scheme == scheme and (cap is None or rank[n.isa] <= rank[cap])]
            if able:
                chosen.append(max(able, key=lambda name: rank[name.isa]))
    return list(dict.fromkeys(chosen))


def _report_names(op: str, quick: bool) -> list[KernelName]:
    names = kernels.supported(op)
    if quick:
        chosen = {kernels.select(op, name.scheme).name for name in names}
        names = tuple(name for name in names if name in chosen or (name.isa == "scalar" and name.scheme == "i2"))
    return list(names)


def _run(
    stages: Sequence[tuple[int, tuple[int, int], int]],
    names: Callable[[str], list[KernelName]],
    peers: Sequence[str],
    isas: Sequence[str | None],
    n_rounds: int,
    progress: Progress | None,
    serve_peer: Callable[[str, Any], None],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All stages: a number of tokens, a shape and a number of threads each."""
    report = progress or (lambda label, fraction: None)
    rows: list[dict[str, Any]] = []
    bandwidth: dict[int, list[float]] = {}
    peaks: dict[tuple[str, int], list[float]] = {}
    words = np.ones(_PROBE_BYTES // 8, np.uint64)
    torch_capped = "torch" in peers and "avx2" in isas
    # A cap that is all the processor has caps nothing: then PyTorch runs once, by that name.
    same = torch_capped and kernels.processor_isas()[-1] == "avx2"
    workers = [Worker(serve_peer, name) for name in peers if name != "numpy" and not (name == "torch" and same)]
    if torch_capped:
        workers.append(Worker(serve_peer, "torch", {"ONEDNN_MAX_CPU_ISA": "AVX2"}))
    try:
        for done, (tokens, (m, k), threads) in enumerate(stages):
            report(f"{m} x {k}, {tokens} token(s), {threads} thread(s)", done / len(stages))
            w_q, x_q, expected = problem(m, k, tokens)
            programs = [_numpy_program(w_q, x_q, expected, threads)] if "numpy" in peers else []
            op = "gemv" if tokens == 1 else "gemm"
            mine = [name for o in kernels.PRODUCTS for name in names(o) if kernels.op_for(name.scheme, tokens) == o]
            programs += [_kernel_program(name, w_q, x_q, expected, threads) for name in mine]
            refused = []
            for worker in workers:
                found, without = worker.programs(m, k, tokens, threads)
                programs += found
                refused += without
            probe = sized({}, lambda _, t=threads: kernels.read_all(words, t))
            # The arithmetic rate matters, and is probed, where several tokens share the weights.
            rates = [_peak_program(name, threads) for name in kernels.supported("peak") if tokens > 1]
            with threadpool_limits(threads, "blas"):
                others = rounds([*programs, *rates, probe], n_rounds, threads)
            bandwidth.setdefault(threads, []).extend(_PROBE_BYTES / ns * 1e9 for ns in probe.times)
            for rate in rates:
                key = (str(rate.row["isa"]), threads)
                peaks.setdefault(key, []).extend(rate.row["multiply_adds"] / ns * 1e9 for ns in rate.times)
            about = {"op": op, "m": m, "k": k, "tokens": tokens, "threads": threads, **_busy(others)}
            read_per_ns = _PROBE_BYTES / float(np.median(probe.times))
            for program in programs:
                timed = spread(program.times)
                rows.append(
                    {
                        "kind": "measured",
                        **about,
                        **program.row,
                        **timed,
                        "weights_per_s": tokens * m * k / timed["median_ns"] * 1e9,
                        "read_bandwidth_fraction": program.row["weight_bytes"] / timed["median_ns"] / read_per_ns,
                    }
                )
            unknown = ("median_ns", "low_ns", "high_ns", "weights_per_s", "read_bandwidth_fraction")
            rows += [{"kind": "measured", **row, **about, **dict.fromkeys(unknown), "repeats": 0} for row in refused]
            del programs, w_q
            gc.collect()  # copies of this stage go before those of the next come
    finally:
        for worker in workers:
            worker.close()
    limits = [_limit("read_bandwidth", None, threads, rates, "B/s") for threads, rates in bandwidth.items()]
    limits += [_limit("int8_multiply_adds", isa, threads, found, "MAC/s") for (isa, threads), found in peaks.items()]
    _hold_against_limits(rows, limits)
    report("speed measured", 1.0)
    return rows, limits


def _busy(others: Sequence[float]) -> dict[str, Any]:
    """What other processes took in these rounds, as columns."""
    if not others:
        return {"others": None, "busy_rounds": None, "busy": None}
    share = float(np.median(others))
    return {"others": share, "busy_rounds": sum(value > BUSY for value in others), "busy": share > BUSY}


def _hold_against_limits(rows: list[dict[str, Any]], limits: Sequence[dict[str, Any]]) -> None:
    """Add ``limit`` and ``fraction_of_limit`` to every row that was timed."""
    for row in rows:
        row["limit"], row["fraction_of_limit"] = None, None
        if row["median_ns"] is None:
            continue
        alike = [other for other in rows if other["threads"] == row["threads"] and other["median_ns"] is not None]
        reached = [o["weights_per_s"] for o in alike if o["tokens"] >= 128 and o["program"] != "numpy"]
        reached += [
            limit["median_per_s"]
            for limit in limits
            if limit["what"] == "int8_multiply_adds" and limit["threads"] == row["threads"]
        ]
        reading = row["read_bandwidth_fraction"]
        if row["tokens"] == 1:
            row["limit"], row["fraction_of_limit"] = "read_bandwidth", reading
            continue
        adding = row["weights_per_s"] / max(reached)
        if row["tokens"] >= 128 or adding >= reading:
            row["limit"], row["fraction_of_limit"] = "int8_multiply_adds", adding
        else:
            row["limit"], row["fraction_of_limit"] = "read_bandwidth", reading


def _kernel_program(name: KernelName, w_q: np.ndarray, x_q: np.ndarray, expected: np.ndarray, threads: int) -> Program:
    kernel, packed = kernels.get(name), pack(w_q, name.scheme)
    out = np.empty((len(x_q), len(w_q)), np.int32)
    kernel(x_q, packed, n_threads=threads, out=out)
    if not np.array_equal(out, expected):
        raise BitnetRefError(f"{name} gives a wrong result for M = {len(w_q)}, K = {w_q.shape[1]}; it is not timed")
    many = [packed]
    if len(x_q) == 1:
        # Views of one array, one copy after the other in memory, as the layers of a model are.
        data = np.empty((copies(packed.nbytes, 1), *packed.data.shape), np.uint8)
        data[:] = packed.data
        data.setflags(write=False)
        many = [PackedTernary(one, packed.shape, name.scheme) for one in data]
    row = {
        "program": "bitnet_ref",
        "kernel": str(name),
        "type": name.scheme,
        "op": name.op,
        "scheme": name.scheme,
        "isa": name.isa,
        "weight_bytes": packed.nbytes,
        "error": 0.0,
        "verified": True,
    }
    return sized(row, lambda i: kernel(x_q, many[i % len(many)], n_threads=threads, out=out))


def _numpy_program(w_q: np.ndarray, x_q: np.ndarray, expected: np.ndarray, threads: int) -> Program:
    """float32 matrix product of NumPy's BLAS: what one has without any of this."""
    w = w_q.astype(np.float32)
    x = x_q.astype(np.float32)
    many = [w, *(w.copy() for _ in range(copies(w.nbytes, len(x)) - 1))]
    out = np.matmul(x, w.T)
    error = float(np.abs(out - expected).max() / np.sqrt(np.mean(expected.astype(np.float64) ** 2)))
    row = {
        "program": "numpy",
        "kernel": "numpy_float32",
        "type": "float32",
        "scheme": None,
        "isa": None,
        "weight_bytes": w.nbytes,
        "error": error,
        "verified": error <= ERROR_LIMIT,
    }
    with threadpool_limits(threads, "blas"):
        return sized(row, lambda i: np.matmul(x, many[i % len(many)].T, out=out))


def _peak_program(name: KernelName, threads: int) -> Program:
    """The register tile of dot products: what a kernel would reach if its weights needed no decoding."""
    kernel, steps = kernels.get(name), 20_000
    count = kernel.multiply_adds(steps, threads)
    return sized({"isa": name.isa, "multiply_adds": count}, lambda _: kernel.multiply_adds(steps, threads))


def _limit(what: str, isa: str | None, threads: int, rates: list[float], unit: str) -> dict[str, Any]:
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
