"""What the kernels and the whole model are meant to reach, and whether one run says that they do.

The one place where the targets are written down. Each is computed from the rows of one run, through
:func:`bitnet_ref.measure.ratio.ratio` wherever two programs are divided; what the run does not hold is ``not measured``
with its reason, never met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_ref.measure.ratio import ratio

__all__ = ["LAYER", "TARGETS", "Target", "Verdict", "judge", "layers"]

Rows = Sequence[Mapping[str, Any]]

LAYER = {(2560, 2560): 2, (640, 2560): 2, (6912, 2560): 2, (2560, 6912): 1}
"""How often a layer of 2B4T has each shape: q and o, k and v, gate and up, down. [2B4T]"""


class NotMeasured(Exception):
    """The run holds no such row; the sentence says what is missing."""


@dataclass(frozen=True)
class Target:
    """One line of the table: what, how much, and how it is read off a run."""

    work: str
    what: str
    goal: float
    compute: Callable[[Mapping[str, Rows]], float]
    unit: str = "x"
    at_most: bool = False


@dataclass(frozen=True)
class Verdict:
    """A target and what a run says of it: ``met``, ``short`` or ``not measured``."""

    target: Target
    value: float | None
    verdict: str
    reason: str = ""


def layers(rows: Rows) -> list[dict[str, Any]]:
    """One row for a whole layer of 2B4T from the rows of its four shapes, for each program that has all of them."""
    keys = ("run", "program", "type", "isa", "op", "tokens", "threads")
    groups: dict[tuple[Any, ...], dict[tuple[int, int], Mapping[str, Any]]] = {}
    for row in rows:
        if row["verified"]:
            groups.setdefault(tuple(row[key] for key in keys), {})[row["m"], row["k"]] = row
    found = []
    for key, shapes in groups.items():
        if set(shapes) < set(LAYER):
            continue
        parts = [(shapes[shape], count) for shape, count in LAYER.items()]
        ns = sum(row["median_ns"] * n for row, n in parts)
        # What the probe of the limit reached beside each shape, where that is a rate of bytes.
        limits = [row["weight_bytes"] / row["median_ns"] / row["fraction_of_limit"] * 1e9 for row, _ in parts]
        # Time at the limit: each shape's own time by its own fraction.
        at_limit = sum(row["median_ns"] * row["fraction_of_limit"] * n for row, n in parts)
        work = sum(row["tokens"] * row["m"] * row["k"] * n for row, n in parts)
        found.append(
            {
                **dict(zip(keys, key, strict=True)),
                "m": "layer",
                "k": "layer",
                "median_ns": ns,
                "low_ns": sum(row["low_ns"] * n for row, n in parts),
                "high_ns": sum(row["high_ns"] * n for row, n in parts),
                "weights_per_s": work / ns * 1e9,
                "fraction_of_limit": at_limit / ns,
                "limit": parts[0][0]["limit"],
                "slowest_limit": min(limits),
                "fastest_limit": max(limits),
                "busy": any(row["busy"] for row, _ in parts),
                "verified": True,
            }
        )
    return found


def pick(rows: Rows, column: str, **wanted: Any) -> Mapping[str, Any]:
    """The row of these values that has most of `column`; a tuple allows several values."""
    found = [
        row
        for row in rows
        if row.get(column) is not None
        and all(row.get(key) in (value if isinstance(value, tuple) else (value,)) for key, value in wanted.items())
    ]
    if not found:
        texts = (f"{key} {' or '.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in wanted.items())
        raise NotMeasured(f"not in this run: {', '.join(texts)}")
    return max(found, key=lambda row: row[column])


def _all_threads(rows: Rows) -> int:
    most = max((row["threads"] for row in rows), default=0)
    if most < 2:
        raise NotMeasured("the run had one thread only")
    return most


UNSTEADY = 1.3
"""A share of the read bandwidth says nothing where the probe moved by more than this between shapes."""
OVER = 1.05
"""Nor where it is above this: the probe ran in a slower minute."""

BEST = ("avx512vbmi", "avx512vnni")
GATE_ZEROS = 0.714
"""Share of gates that are not positive in the model that leaves rows out. In a published model 71.4 % of W_up and
84.2 % of W_down add nothing ([BitNet-a4.8]); here it is the same share of W_up, and a little less of W_down."""
RATE = "weights_per_s"


def _fraction(part: str, types: tuple[str, ...], isas: tuple[str, ...], tokens: int, every: bool = False) -> Any:
    def compute(parts: Mapping[str, Rows]) -> float:
        rows = layers(parts[part])
        threads = _all_threads(rows) if every else 1
        picked = [
            pick(rows, RATE, program="bitnet_ref", type=t, isa=isas, tokens=tokens, threads=threads) for t in types
        ]
        if tokens == 1:
            slow, fast = min(row["slowest_limit"] for row in picked), max(row["fastest_limit"] for row in picked)
            if fast > UNSTEADY * slow:
                raise NotMeasured(
                    f"the machine read {slow / 1e9:.0f} GB/s beside one shape and {fast / 1e9:.0f} beside another"
                )
        return min(row["fraction_of_limit"] for row in picked)

    return compute


def _over(
    part: str, type_name: str, isas: tuple[str, ...], tokens: int, peer: Mapping[str, Any], every: bool = False
) -> Any:
    def compute(parts: Mapping[str, Rows]) -> float:
        rows = layers(parts[part])
        threads = _all_threads(rows) if every else 1
        ours = pick(rows, RATE, program="bitnet_ref", type=type_name, isa=isas, tokens=tokens, threads=threads)
        return ratio(ours, pick(rows, RATE, tokens=tokens, threads=threads, **peer), RATE)

    return compute


def _scaling(type_name: str) -> Any:
    def compute(parts: Mapping[str, Rows]) -> float:
        rows = layers(parts["many_tokens"])
        both = [
            pick(rows, RATE, program="bitnet_ref", type=type_name, isa=BEST, tokens=128, threads=n)
            for n in (_all_threads(rows), 1)
        ]
        return ratio(*both, RATE, but=("threads",))

    return compute


def _batches(type_name: str, isas: tuple[str, ...]) -> Any:
    """Least of interpolated over measured time for 2 to 16 tokens, between the times of one token and of 128."""

    def compute(parts: Mapping[str, Rows]) -> float:
        ns = batch_times(parts["batches"], type_name, isas, 1)
        low, high = 1, max(ns)
        if low not in ns or high < 128:
            raise NotMeasured("no times of 1 and 128 tokens")
        return min((ns[low] + (t - low) / (high - low) * (ns[high] - ns[low])) / ns[t] for t in ns if low < t <= 16)

    return compute


def batch_times(rows: Rows, type_name: str, isas: tuple[str, ...], threads: int) -> dict[int, float]:
    """Median ns by number of tokens."""
    found = [
        row
        for row in rows
        if row["program"] == "bitnet_ref"
        and row["type"] == type_name
        and row["isa"] in isas
        and row["threads"] == threads
    ]
    if not found:
        raise NotMeasured(f"no batches of {type_name} {' '.join(isas)}")
    return {row["tokens"]: row["median_ns"] for row in found}


PEERS = ("llama.cpp", "ik_llama.cpp")
DENSE = (None, "dense")  # runs up to 2026-11-25 knew no other network


def _peer_heads(rows: Rows) -> list[str]:
    """Types of head that a ratio is about; models of ours with other heads stand by themselves."""
    heads = list(dict.fromkeys(row["head"] for row in rows if row["program"] in PEERS))
    if not heads:
        raise NotMeasured("no models of peers")
    return heads


def _model(column: str, every: bool, but: tuple[str, ...] = (), **ours_is: Any) -> Any:
    def compute(parts: Mapping[str, Rows]) -> float:
        rows = parts["models"]
        threads = _all_threads(rows) if every else 1
        found = []
        for head in _peer_heads(rows):
            theirs = pick(rows, column, program=PEERS, head=head, threads=threads)
            if theirs.get("cache") is None:
                raise NotMeasured("the run does not say how keys and values are kept")
            about = {"network": DENSE, "cache": theirs["cache"], **ours_is}
            ours = pick(rows, column, program="bitnet_ref", head=head, threads=threads, **about)
            found.append(ratio(ours, theirs, column, kind="model", but=but))
        return min(found)

    return compute


def _model_own(column: str) -> Any:
    def compute(parts: Mapping[str, Rows]) -> float:
        rows = parts["models"]
        about = {"program": "bitnet_ref", "network": DENSE, "threads": _all_threads(rows)}
        if any(row["program"] in PEERS for row in rows):
            about["head"] = tuple(_peer_heads(rows))
        row = pick(rows, "decode_tokens_per_s", **about)
        if row.get(column) is None:
            raise NotMeasured(f"no {column}")
        if column == "read_bandwidth_fraction" and row[column] > OVER:
            raise NotMeasured(f"{row[column]:.0%} of what the probe read: it ran in a slower minute than the model")
        return row[column]

    return compute


def _memory_over_peers(parts: Mapping[str, Rows]) -> float:
    rows, found = parts["models"], []
    for head in _peer_heads(rows):
        ours = [r["peak_resident_bytes"] for r in rows if r["program"] == "bitnet_ref" and r["head"] == head]
        theirs = [r["peak_resident_bytes"] for r in rows if r["program"] in PEERS and r["head"] == head]
        if not ours:
            raise NotMeasured(f"not in this run: program bitnet_ref, head {head}")
        found.append(min(ours) / min(theirs))
    return max(found)


def _memory(parts: Mapping[str, Rows]) -> float:
    ours = [
        row["peak_resident_bytes"]
        for row in parts["models"]
        if row["program"] == "bitnet_ref" and row["head"] in ("q4_0", "q6_k")
    ]
    if not ours:
        raise NotMeasured("no models with a head of 4 to 6 bits")
    return min(ours) / 1e9


def _no_tl2(parts: Mapping[str, Rows]) -> float:
    raise NotMeasured("bitnet.cpp is no package that can be installed; its TL2 is not in this run")


TQ2 = {"program": "llama.cpp", "type": "TQ2_0"}
IK = {"program": "ik_llama.cpp"}
ONE, MANY = "GEMV, 1 thread", "GEMM"
AVX2 = ("avx2",)

TARGETS: tuple[Target, ...] = (
    Target(ONE, "base3 and i2: of the read bandwidth", 0.85, _fraction("one_token", ("base3", "i2"), BEST, 1), "%"),
    Target(ONE, "base3 over ik_llama.cpp's best type", 1.8, _over("one_token", "base3", BEST, 1, IK)),
    Target(ONE, "base3 over llama.cpp's TQ2_0", 2.3, _over("one_token", "base3", BEST, 1, TQ2)),
    Target(ONE, "AVX2: base3 over llama.cpp's TQ2_0", 1.2, _over("one_token", "base3", AVX2, 1, TQ2)),
    Target(ONE, "AVX2: i2 over llama.cpp's TQ2_0", 1.2, _over("one_token", "i2", AVX2, 1, TQ2)),
    Target(
        "GEMV, all threads", "base3 and i2: of the read bandwidth", 0.9,
        _fraction("one_token", ("base3", "i2"), BEST, 1, True), "%",
    ),
    Target(
        "GEMV, all threads", "base3 over i2: the ratio of their bits", 1.25,
        _over("one_token", "base3", BEST, 1, {"program": "bitnet_ref", "type": "i2", "isa": BEST}, True),
    ),
    Target(
        "GEMV, all threads", "AVX2, base3 and i2: of the read bandwidth", 0.9,
        _fraction("one_token", ("base3", "i2"), AVX2, 1, True), "%",
    ),
    Target("tables, 1 thread", "tl2 over bitnet.cpp's TL2", 2.0, _no_tl2),
    *(
        Target(f"{MANY}, {tokens} tokens, {'all threads' if every else '1 thread'}", what, goal, compute, unit)
        for tokens in (128, 512)
        for every in (False, True)
        for what, goal, compute, unit in (
            (
                "i2 over oneDNN's int8", 1.1,
                _over("many_tokens", "i2", BEST, tokens, {"program": "torch", "isa": "native"}, every), "x",
            ),
            ("i2: of the int8 limit", 0.8, _fraction("many_tokens", ("i2",), BEST, tokens, every), "%"),
            (
                "base3 over ik_llama.cpp's IQ2_BN_R4", 1.4,
                _over("many_tokens", "base3", BEST, tokens, {**IK, "type": "IQ2_BN_R4"}, every), "x",
            ),
            (
                "AVX2: i2 over oneDNN's int8 with the same cap", 1.0,
                _over("many_tokens", "i2", AVX2, tokens, {"program": "torch", "isa": "avx2"}, every), "x",
            ),
        )
    ),
    *(
        Target("2-16 tokens, 1 thread", f"{name}{type_name}: interpolated over measured time, worst", 1.0,
               _batches(type_name, isas))
        for name, isas in (("", BEST), ("AVX2, ", AVX2))
        for type_name in ("base3", "i2")
    ),
    Target("thread scaling", "GEMM of i2, all threads over one (two processors)", 1.9, _scaling("i2")),
    Target("thread scaling", "GEMM of base3, all threads over one (two processors)", 1.9, _scaling("base3")),
    Target(
        "2B4T decode", "1 thread, over the fastest peer with the same head", 1.7,
        _model("decode_tokens_per_s", False),
    ),
    Target(
        "2B4T decode", "all threads, over the fastest peer with the same head", 1.25,
        _model("decode_tokens_per_s", True),
    ),
    Target(
        "2B4T decode", "all threads, rows that add nothing left out (71 % of W_up), over the fastest peer", 1.6,
        _model("decode_tokens_per_s", True, ("network",), network="sparse", gate_zeros=GATE_ZEROS),
    ),
    Target("2B4T decode", "of the read bandwidth", 0.8, _model_own("read_bandwidth_fraction"), "%"),
    Target(
        "2B4T decode", "time outside products and head", 0.1, _model_own("outside_fraction"), "%", at_most=True
    ),
    Target(
        "2B4T prefill, 512 tokens", "1 thread, over the fastest peer", 1.3, _model("prefill_tokens_per_s", False)
    ),
    Target(
        "2B4T prefill, 512 tokens", "all threads, over the fastest peer", 1.3, _model("prefill_tokens_per_s", True)
    ),
    Target("2B4T memory", "peak, over the smallest peer's", 1.0, _memory_over_peers, at_most=True),
    Target("2B4T memory", "peak, of any head of 4 to 6 bits and cache", 0.75, _memory, " GB", at_most=True),
)  # fmt: skip


def judge(parts: Mapping[str, Rows], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """What a run says of every target.

    Parameters
    ----------
    parts : mapping
        ``one_token``, ``many_tokens``, ``batches`` and ``models``: the rows of each part of the run; a missing part is
        an empty one.

    Raises
    ------
    UnlikeError
        If rows of different runs or conditions stand in one part.
    """
    whole = {name: parts.get(name, ()) for name in ("one_token", "many_tokens", "batches", "models")}
    found = []
    for target in targets:
        try:
            value = target.compute(whole)
        except NotMeasured as error:
            found.append(Verdict(target, None, "not measured", str(error)))
            continue
        if not np.isfinite(value):
            raise ValueError(f"{target.work}, {target.what}: the run gives {value}")
        met = value <= target.goal if target.at_most else value >= target.goal
        found.append(Verdict(target, value, "met" if met else "short"))
    return found
