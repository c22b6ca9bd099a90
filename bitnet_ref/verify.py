"""Check every kernel that can run here against the reference: exact, at awkward shapes, on three kinds of input.

Each kind finds what the others miss. Dense random weights show a wrong order of digits or rows. Near-constant ones
sit at few distinct values, where a forgotten correction shows. Worst cases (all weights +1 or -1, all activations 127
or -128) fill accumulators to their bound, which random data never does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from bitnet_ref import kernels
from bitnet_ref.errors import BitnetRefError
from bitnet_ref.kernels import KernelName
from bitnet_ref.reference import sparse
from bitnet_ref.reference.packing import pack, tables_tl1, tables_tl2

__all__ = ["OPS", "Case", "VerificationError", "VerifyReport", "cases", "check", "run"]

OPS = (*kernels.PRODUCTS, "lut", *kernels.ROW_PRODUCTS)
"""The ops that are verified."""

_PANEL_TILES = 16  # of panel_rows.pyx.j2, or a multiple of those
_TABLES = {"tl1": tables_tl1, "tl2": tables_tl2}


class VerificationError(BitnetRefError):
    """A kernel's result differs from the reference; the message names kernel, shape and first differing index."""


@dataclass(frozen=True)
class Case:
    """One product to compute: weights (M, K) and activations (T, K), both int8, and the number of threads.

    A product with listed rows has their indices, int32; ``addrows`` has activations (1, M).
    """

    label: str
    w_q: np.ndarray
    x_q: np.ndarray
    n_threads: int
    rows: np.ndarray | None = None

    def __str__(self) -> str:
        m, k = self.w_q.shape
        size = f"T = {len(self.x_q)}" if self.rows is None else f"{len(self.rows)} rows listed"
        return f"{self.label}, M = {m}, K = {k}, {size}, {self.n_threads} thread(s)"


@dataclass(frozen=True)
class VerifyReport:
    """What was checked: kernel names, number of cases, seed."""

    kernels: tuple[KernelName, ...]
    cases: int
    seed: int


def cases(name: KernelName, rng: np.random.Generator, examples: int) -> Iterator[Case]:
    """Cases for one kernel: ``examples`` of each random kind at shapes around its tile and block, then the worst cases.

    Parameters
    ----------
    name : KernelName
    rng : Generator
    examples : int, at least 1
    """
    if name.op in kernels.ROW_PRODUCTS:
        yield from _row_cases(name, rng, examples)
        return
    rows, block = name.rows, name.block
    heights = [1, rows - 1, rows, rows + 1, 2 * rows + 3]
    widths = [1, 2, block - 1, block, block + 1, 3 * block + 5, 11 * block]
    tokens = [1] if name.op == "lut" else [1, 2, 3, 4, 5, 9]
    for i in range(examples):
        m, k, t = max(1, int(rng.choice(heights))), int(rng.choice(widths)), int(rng.choice(tokens))
        threads = 1 + i % 3
        yield Case("dense random", _weights(rng, m, k), _activations(rng, t, k), threads)
        w, x = np.full((m, k), rng.integers(-1, 2), np.int8), np.full((t, k), rng.integers(-128, 128), np.int8)
        w[rng.integers(m), rng.integers(k)] = rng.integers(-1, 2)
        x[rng.integers(t), rng.integers(k)] = rng.integers(-128, 128)
        yield Case("near-constant", w, x, threads)
    for k in (4096, 6912 + 1):
        for weight in (1, -1):
            for activation in (127, -128):
                yield Case(
                    f"all weights {weight}, all activations {activation}",
                    np.full((rows + 1, k), weight, np.int8),
                    np.full((tokens[-1], k), activation, np.int8),
                    2,
                )
    if name.op == "gemm":  # what many tokens and many rows go through, see panel_rows.pyx.j2
        m = _PANEL_TILES * rows
        for t, extra, k in ((24, 0, block), (29, 1, 512 + block), (31, m + rows, 1024 + block + 3)):
            yield Case("panels", _weights(rng, m + extra, k), _activations(rng, t, k), 1 + t % 2)
        for t in (3, 4) if rows <= 16 else ():  # more tiles than strip_rows.pyx.j2 takes together for few tokens
            yield Case("few tokens, many tiles", _weights(rng, 40 * rows + 1, 6913), _activations(rng, t, 6913), 1)
        for weight, activation in ((1, 127), (1, -128), (-1, 127), (-1, -128)):
            weights, activations = np.full((m, 4096), weight, np.int8), np.full((29, 4096), activation, np.int8)
            yield Case(f"panels, all weights {weight}, all activations {activation}", weights, activations, 2)
    if name.op != "lut":
        k = kernels.SEGMENT_COLUMNS + block + 1  # more than one segment
        yield Case("long rows", _weights(rng, 2, k), _activations(rng, 2, k), 2)
        yield Case("long rows, worst case", np.ones((2, k), np.int8), np.full((1, k), -128, np.int8), 1)


def _row_cases(name: KernelName, rng: np.random.Generator, examples: int) -> Iterator[Case]:
    """Those of a product with listed rows: no row, some in order, all, some twice; one and several threads."""
    block = name.block
    for i in range(examples):
        m, k = int(rng.choice([1, 2, 3, 5, 40, 90])), int(rng.choice([1, block - 1, block, block + 1, 11 * block + 7]))
        x = _activations(rng, 1, k if name.op == "dotrows" else m)
        some = np.flatnonzero(rng.random(m) < 0.5).astype(np.int32)
        any_order = rng.integers(0, m, 2 * m, dtype=np.int32)
        for rows in (some, np.arange(m, dtype=np.int32), any_order):
            yield Case("dense random", _weights(rng, m, k), x, 1 + i % 3, rows)
        w = np.full((m, k), rng.integers(-1, 2), np.int8)
        w[rng.integers(m), rng.integers(k)] = rng.integers(-1, 2)
        yield Case("near-constant", w, np.full_like(x, rng.integers(-128, 128)), 1 + i % 3, some)
    for m, k in ((70, 6912 + 1), (6912 + 1, 70)):
        rows = np.arange(m, dtype=np.int32)
        for weight in (1, -1):
            for activation in (127, -128):
                x = np.full((1, k if name.op == "dotrows" else m), activation, np.int8)
                label = f"all weights {weight}, all activations {activation}"
                yield Case(label, np.full((m, k), weight, np.int8), x, 2, rows)


def check(name: KernelName, case: Case) -> None:
    """Compare one kernel with the reference on one case.

    The oracle is the int32 product of the unpacked integers (or the reference's tables), never another packed routine.

    Raises
    ------
    VerificationError
        If any element differs.
    """
    kernel = kernels.get(name)
    if name.op == "lut":
        expected, got = _TABLES[name.scheme](case.x_q[0]), kernel.build_tables(case.x_q[0])
    elif case.rows is not None:
        packed = pack(case.w_q, name.scheme)
        product, reference = (
            (kernel.dot_rows, sparse.dot_rows) if name.op == "dotrows" else (kernel.add_rows, sparse.add_rows)
        )
        expected = reference(case.x_q[0], packed, case.rows)
        got = product(case.x_q[0], packed, case.rows, n_threads=case.n_threads)
    else:
        expected = case.x_q.astype(np.int32) @ case.w_q.T.astype(np.int32)
        got = kernel(case.x_q, pack(case.w_q, name.scheme), n_threads=case.n_threads)
    if not np.array_equal(got, expected):
        index = tuple(int(i) for i in np.argwhere(got != expected)[0])
        raise VerificationError(
            f"{name} differs from the reference on {case}: "
            f"first at index {index}, expected {expected[index]}, got {got[index]}"
        )


def run(
    *, seed: int = 0, examples: int = 20, progress: Callable[[KernelName, int], object] | None = None
) -> VerifyReport:
    """Verify every supported kernel: dense products, table builders, products with listed rows.

    Parameters
    ----------
    seed : int, at least 0
    examples : int, at least 1
        Random examples of each kind per kernel.
    progress : callable(name, cases so far), optional
        Called after each kernel.

    Raises
    ------
    VerificationError
        At the first difference.
    ValueError
        If seed or examples is out of range.
    """
    if seed < 0 or examples < 1:
        raise ValueError(f"seed must be at least 0 and examples at least 1, got {seed} and {examples}")
    names = kernels.supported(*OPS)
    count = 0
    for i, name in enumerate(names):
        for case in cases(name, np.random.default_rng([seed, i]), examples):
            check(name, case)
            count += 1
        if progress is not None:
            progress(name, count)
    return VerifyReport(names, count, seed)


def _weights(rng: np.random.Generator, m: int, k: int) -> np.ndarray:
    return rng.integers(-1, 2, (m, k), dtype=np.int8)


def _activations(rng: np.random.Generator, t: int, k: int) -> np.ndarray:
    return rng.integers(-128, 128, (t, k), dtype=np.int8)
