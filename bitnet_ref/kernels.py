"""The registry of compiled kernels: what exists, what may run here, what is chosen, and the call itself.

Four different questions, four calls::

    compiled()            names of the variants in this build
    supported()           those that this processor can run and BITNET_REF_ISA allows
    select(op, scheme)    the one that runs when nobody names a kernel: the highest instruction set of supported()
    get(name)             exactly that variant, or KernelUnavailable; never another one

``BITNET_REF_ISA=avx2`` caps the instruction set for the whole process, as if the processor had no more. ``python -m
bitnet_ref.kernels`` (or ``bitnet-ref kernels``) prints the table.
"""

from __future__ import annotations

import functools
import importlib
import operator
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitnet_ref._native import _build, _table, cpu, threads
from bitnet_ref._native import limits as _limits
from bitnet_ref._native import matmul as _matmul
from bitnet_ref._native import rows as _rows
from bitnet_ref.errors import KernelUnavailable
from bitnet_ref.reference.packing import PackedTernary, get_scheme

__all__ = [
    "COMMIT",
    "COMPILER",
    "HAS_OPENMP",
    "ISAS",
    "MAX_K",
    "Kernel",
    "KernelName",
    "compiled",
    "get",
    "isa_cap",
    "matmul",
    "processor_isas",
    "read_all",
    "resolve_threads",
    "select",
    "supported",
    "table",
]

ISAS = {"scalar": 0, "neon": 10, "avx2": 10, "avxvnni": 15, "neondot": 20, "avx512vnni": 20, "avx512vbmi": 25}
"""Instruction sets and their rank; of two that can run, the higher is chosen."""

MAX_K = 2**24 - 1
"""Largest number of inputs: K products of magnitude 128 must stay inside int32."""

SEGMENT_COLUMNS: int = _matmul.SEGMENT_COLUMNS
"""Columns of a row that a kernel is given at once; longer rows are cut and their sums added."""

PRODUCTS = ("gemv", "gemm")
ROW_PRODUCTS = ("dotrows", "addrows")
OPS = (*PRODUCTS, "lut", *ROW_PRODUCTS, "peak")
_NAME = re.compile(r"([a-z]+)_(i8)_([a-z0-9]+)_(\d+)x(\d+)__([a-z0-9]+)")


class KernelName(str):
    """The name of a kernel variant, ``<op>_<act>_<scheme>_<rows>x<block>__<isa>``: a string that knows its parts.

    Attributes
    ----------
    op : str
        ``gemv`` (one token), ``gemm`` (many), ``lut`` (builds the lookup tables of tl1 and tl2), ``dotrows`` and
        ``addrows`` (products with listed rows), or ``peak`` (the register-only probe of the int8 multiply-add rate).
    act : str
        Type of the activations: ``i8``.
    scheme : str
    rows, block : int
        Rows per tile and columns per block.
    isa : str

    Raises
    ------
    ValueError
        If the string has not that form.
    """

    op: str
    act: str
    scheme: str
    rows: int
    block: int
    isa: str

    def __new__(cls, name: str) -> KernelName:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"a kernel name has the form op_i8_scheme_RxB__isa, got {name!r}")
        self = super().__new__(cls, name)
        self.op, self.act, self.scheme, rows, block, self.isa = match.groups()
        self.rows, self.block = int(rows), int(block)
        return self

    @classmethod
    def build(cls, op: str, act: str, scheme: str, rows: int, block: int, isa: str) -> KernelName:
        """The name made of these parts."""
        return cls(f"{op}_{act}_{scheme}_{rows}x{block}__{isa}")


_COMPILED = tuple(KernelName(name) for name in _table.COMPILED)
COMPILER = _table.COMPILER
COMMIT: str | None = _build.COMMIT or None
"""Commit that this build was made from, with "+" if files had been changed; None outside a git checkout."""
HAS_OPENMP = threads.has_openmp()


def processor_isas() -> tuple[str, ...]:
    """Instruction sets of :data:`ISAS` that this processor and its operating system support, in rising rank."""
    return cpu.supported_isas()


def compiled(*ops: str) -> tuple[KernelName, ...]:
    """Names of the variants in this build.

    Parameters
    ----------
    *ops : str
        ``"gemv"``, ``"gemm"``, ``"lut"``, ``"dotrows"``, ``"addrows"``, ``"peak"``; with none, the dense products (gemv
        and gemm). The ``lut`` variants build the tables that the products of tl1 and tl2 read; ``peak`` variants
        multiply nothing, they are timed.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    return tuple(name for name in _COMPILED if name.op in (ops or PRODUCTS))


def isa_cap() -> str | None:
    """The instruction set that ``BITNET_REF_ISA`` names, or None if it is unset or empty.

    Raises
    ------
    KernelUnavailable
        If it names no instruction set, one that this build has no kernels for, or one that this processor lacks.
    """
    cap = os.environ.get("BITNET_REF_ISA", "")
    if cap:
        _check_cap(cap, processor_isas())
    return cap or None


@functools.cache
def _check_cap(cap: str, isas: tuple[str, ...]) -> None:
    """Refuse a cap that names nothing, or nothing that this build and these instruction sets have."""
    built = sorted({name.isa for name in _COMPILED}, key=ISAS.__getitem__)
    if cap not in ISAS:
        raise KernelUnavailable(f"BITNET_REF_ISA must be one of {', '.join(ISAS)}, got {cap!r}")
    if cap not in built:
        raise KernelUnavailable(f"BITNET_REF_ISA={cap}: this build has no such kernels, only {', '.join(built)}")
    if cap not in isas:
        raise KernelUnavailable(f"BITNET_REF_ISA={cap}: this processor supports only {', '.join(isas)}")


def supported(*ops: str) -> tuple[KernelName, ...]:
    """Those of :func:`compiled` that this processor can run and ``BITNET_REF_ISA`` allows."""
    cap = isa_cap()
    return tuple(
        name for name in compiled(*ops) if name.isa in processor_isas() and (cap is None or ISAS[name.isa] <= ISAS[cap])
    )


def select(op: str, scheme: str) -> Kernel:
    """The kernel that runs when none is named: the supported one with the highest instruction set.

    Raises
    ------
    ValueError
        If the op, or the scheme of a product, is unknown.
    KernelUnavailable
        If this build has no kernel for them, or ``BITNET_REF_ISA`` is impossible.
    """
    return _select(op, scheme, isa_cap(), processor_isas())


@functools.cache
def _select(op: str, scheme: str, cap: str | None, isas: tuple[str, ...]) -> Kernel:
    """The choice, made once for each processor and cap."""
    if op in PRODUCTS:
        get_scheme(scheme)
    found = [name for name in supported(op) if name.scheme == scheme]
    if not found:
        raise KernelUnavailable(f"this build has no {op} kernel for scheme {scheme}")
    return _load(max(found, key=lambda name: ISAS[name.isa]))


# Where turning indices into codes costs more than looking them up for one token after the other: see docs/kernels.md.
_LOOKED_UP_TOKENS = {"tl1": 2, "tl2": 3}


def op_for(scheme: str, n_tokens: int) -> str:
    """The op that is taken for this many tokens when none is named: gemv for one (tables: for a few), else gemm."""
    return "gemv" if 1 <= n_tokens <= _LOOKED_UP_TOKENS.get(scheme, 1) else "gemm"


def get(name: str) -> Kernel:
    """Exactly the named variant.

    Raises
    ------
    KernelUnavailable
        If the name is unknown, or the variant cannot run here; the message says which.
    """
    if name not in _COMPILED:
        raise KernelUnavailable(f"no kernel is called {name!r}; bitnet_ref.kernels.compiled() lists them")
    name = KernelName(name)
    if name.isa not in processor_isas():
        raise KernelUnavailable(f"{name} needs {name.isa}, this processor supports only {', '.join(processor_isas())}")
    if name not in supported(name.op):
        raise KernelUnavailable(f"{name} needs {name.isa}, BITNET_REF_ISA={isa_cap()} forbids it")
    return _load(name)


@dataclass(frozen=True, repr=False)
class Kernel:
    """A compiled variant that can run here. Calling it multiplies; it never hands over to another variant."""

    name: KernelName
    _capsule: Any = field(compare=False)

    def __call__(
        self, x_q: np.ndarray, packed: PackedTernary, *, n_threads: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Exact product of int8 activations with a packed ternary matrix; see :func:`bitnet_ref.matmul`."""
        if not isinstance(packed, PackedTernary):
            raise TypeError(f"packed must be a PackedTernary, made by bitnet_ref.pack, got {type(packed).__name__}")
        m, k = packed.shape
        name = self.name
        if name.op not in PRODUCTS:
            raise ValueError(f"{name} multiplies no matrix; name a gemv or gemm kernel")
        if name.scheme != packed.scheme:
            raise ValueError(f"{name} reads scheme {name.scheme}, got a matrix packed as {packed.scheme}")
        _check_int8(x_q)
        if x_q.ndim < 1 or x_q.shape[-1] != k:
            raise ValueError(f"x_q must have shape (..., {k}) for this matrix of K = {k}, got shape {x_q.shape}")
        if k > MAX_K:
            raise ValueError(f"K must be at most {MAX_K} so that no int32 sum overflows, got {k}")
        shape = (*x_q.shape[:-1], m)
        if out is None:
            out = np.empty(shape, np.int32)
        else:
            check_out(out, shape, np.int32)
        if not x_q.flags.c_contiguous:
            x_q = np.ascontiguousarray(x_q)
        call, tables, tile_block_bytes = self._native
        _matmul.matmul(
            call,
            tables,
            packed.data,
            m,
            k,
            x_q,
            out,
            name.rows,
            name.block,
            tile_block_bytes,
            resolve_threads(n_threads),
        )
        return out

    @functools.cached_property
    def _native(self) -> tuple[Any, Any, int]:
        """The capsules, and the bytes of a block of a tile."""
        return *self.capsules(), get_scheme(self.name.scheme).tile_block_bytes

    def capsules(self) -> tuple[Any, Any]:
        """The compiled functions of this variant and of its table builder (None if it multiplies and adds)."""
        return self._capsule, _table_builder(self.name)._capsule if _needs_tables(self.name) else None

    def dot_rows(
        self, x_q: np.ndarray, packed: PackedTernary, rows: np.ndarray, *, n_threads: int | None = None
    ) -> np.ndarray:
        """Inner products with the listed rows, as :func:`bitnet_ref.reference.sparse.dot_rows`; reads no other row.

        Parameters
        ----------
        x_q : ndarray of shape (K,), int8, K <= 65,536
        packed : PackedTernary of shape (M, K), ``base3r``
        rows : ndarray of shape (n,), int32, each in 0..M-1
        n_threads : int, optional

        Returns
        -------
        ndarray of shape (n,), int32

        Raises
        ------
        TypeError, ValueError
            If an argument is not as above, or this is not a ``dotrows`` kernel.
        """
        rows = self._check_rows("dotrows", x_q, packed, rows, packed.shape[1], packed.shape[1])
        out = np.empty(len(rows), np.int32)
        _rows.dot_rows(self._capsule, packed.data, rows, np.ascontiguousarray(x_q), out, resolve_threads(n_threads))
        return out

    def add_rows(
        self, x_q: np.ndarray, packed: PackedTernary, rows: np.ndarray, *, n_threads: int | None = None
    ) -> np.ndarray:
        """Sum of the listed rows times their activations, as :func:`bitnet_ref.reference.sparse.add_rows`.

        Parameters
        ----------
        x_q : ndarray of shape (M,), int8
        packed : PackedTernary of shape (M, K), ``base3r``
        rows : ndarray of shape (n,), int32, each in 0..M-1, n <= 65,536
        n_threads : int, optional

        Returns
        -------
        ndarray of shape (K,), int32

        Raises
        ------
        TypeError, ValueError
            If an argument is not as above, or this is not an ``addrows`` kernel.
        """
        rows = self._check_rows("addrows", x_q, packed, rows, packed.shape[0], np.size(rows))
        out = np.empty(packed.shape[1], np.int32)
        _rows.add_rows(self._capsule, packed.data, rows, np.ascontiguousarray(x_q), out, resolve_threads(n_threads))
        return out

    def _check_rows(
        self, op: str, x_q: np.ndarray, packed: PackedTernary, rows: np.ndarray, length: int, n_terms: int
    ) -> np.ndarray:
        """The list of rows, C-contiguous, after everything has been checked; a sum has n_terms products."""
        if self.name.op != op:
            raise ValueError(f"only {op} kernels do this, {self.name} is a {self.name.op} kernel")
        if self.name.scheme != packed.scheme:
            raise ValueError(f"{self.name} reads scheme {self.name.scheme}, got a matrix packed as {packed.scheme}")
        _check_int8(x_q)
        if x_q.shape != (length,):
            raise ValueError(f"x_q must have shape ({length},), got shape {x_q.shape}")
        if not isinstance(rows, np.ndarray) or rows.dtype != np.int32:
            raise TypeError(f"rows must be an int32 array, got {_type(rows)}")
        if rows.ndim != 1 or (rows.size and not 0 <= rows.min() <= rows.max() < packed.shape[0]):
            raise ValueError(f"rows must be a list of indices in 0..{packed.shape[0] - 1}, got shape {rows.shape}")
        if n_terms > SEGMENT_COLUMNS:
            raise ValueError(f"a sum must have at most {SEGMENT_COLUMNS} products to stay in int32, got {n_terms}")
        return np.ascontiguousarray(rows)

    def multiply_adds(self, n_steps: int, n_threads: int | None = None) -> int:
        """Run a ``peak`` probe for ``n_steps`` rounds on each thread; returns the multiply-adds done, to be timed.

        Raises
        ------
        ValueError
            If this is not a ``peak`` probe.
        """
        if self.name.op != "peak":
            raise ValueError(f"only peak probes count multiply-adds, {self.name} is a {self.name.op} kernel")
        if n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, got {n_steps}")
        return _limits.multiply_adds(self._capsule, n_steps, resolve_threads(n_threads))

    def build_tables(self, x_q: np.ndarray) -> np.ndarray:
        """The lookup tables of one token, as ``reference.packing.tables_tl1`` and ``tables_tl2`` define them.

        Parameters
        ----------
        x_q : ndarray of shape (K,), int8

        Returns
        -------
        ndarray of shape (n_groups, 2, 16), int8

        Raises
        ------
        ValueError
            If this is not a ``lut`` kernel, or x_q is not one token.
        TypeError
            If x_q is not int8.
        """
        if self.name.op != "lut":
            raise ValueError(f"only lut kernels build tables, {self.name} multiplies")
        _check_int8(x_q)
        if x_q.ndim != 1 or x_q.size == 0:
            raise ValueError(f"x_q must be one token of shape (K,) with K >= 1, got shape {x_q.shape}")
        n_blocks = -(-x_q.size // self.name.block)
        padded = np.zeros(n_blocks * self.name.block, np.int8)
        padded[: x_q.size] = x_q
        tables = np.empty((8 * n_blocks, 2, 16), np.int8)
        _matmul.build_tables(self._capsule, padded, tables.reshape(-1), self.name.block)
        return tables

    def __repr__(self) -> str:
        return f"Kernel({self.name})"


def matmul(
    x_q: np.ndarray,
    packed: PackedTernary,
    *,
    kernel: str | Kernel | None = None,
    n_threads: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Exact product of int8 activations with a packed ternary matrix.

        out[..., m] = sum over k of x_q[..., k] * w_q[m, k]

    Parameters
    ----------
    x_q : ndarray of shape (..., K), int8. Not modified.
    packed : PackedTernary of shape (M, K)
        Bytes that :func:`bitnet_ref.pack` made, or that its ``unpack()`` has accepted: kernels do not look for codes
        that stand for no weights. Such codes give wrong sums, never reads or writes outside the arrays.
    kernel : str, optional
        A name from :func:`bitnet_ref.kernels.supported`. Without it the best one for this many tokens is taken
        (:func:`bitnet_ref.kernels.op_for`).
    n_threads : int, optional
        See :func:`resolve_threads`. The result does not depend on it.
    out : ndarray of shape (..., M), int32, C-contiguous, optional
        Written to and returned; it must not overlap x_q.

    Returns
    -------
    ndarray of shape (..., M), int32

    Raises
    ------
    TypeError
        If x_q is not int8 or out not int32.
    ValueError
        If shapes do not fit, the kernel is of another scheme, or K is above 16,777,215.
    KernelUnavailable
        If the named kernel does not exist or cannot run here.
    """
    if kernel is None:
        if not isinstance(packed, PackedTernary):
            raise TypeError(f"packed must be a PackedTernary, made by bitnet_ref.pack, got {type(packed).__name__}")
        n_tokens = x_q.size // packed.shape[1] if isinstance(x_q, np.ndarray) else 0
        kernel = select(op_for(packed.scheme, n_tokens), packed.scheme)
    elif not isinstance(kernel, Kernel):
        kernel = get(kernel)
    return kernel(x_q, packed, n_threads=n_threads, out=out)


def read_all(words: np.ndarray, n_threads: int | None = None) -> int:
    """Read a uint64 array (a multiple of 8 words) once, front to back; to be timed. Returns the sum modulo 2^64."""
    return _limits.read_all(words, resolve_threads(n_threads))


def resolve_threads(n_threads: int | None) -> int:
    """The number of threads that a call uses: the one rule for the whole package.

    Parameters
    ----------
    n_threads : int, optional
        None: OpenMP's default (``OMP_NUM_THREADS``, else the processors that this process may use). Otherwise at
        least 1 and taken as it is. A build without OpenMP has one thread, whatever is asked for, and so has a process
        that was forked from this one: OpenMP's threads do not survive a fork, and waiting for them would never end.

    Raises
    ------
    ValueError
        If it is below 1 or above 1,024.
    TypeError
        If it is not an integer.
    """
    if n_threads is None:
        return 1 if _forked else threads.default_threads()
    if isinstance(n_threads, bool) or not hasattr(n_threads, "__index__"):
        raise TypeError(f"n_threads must be an integer or None, got {type(n_threads).__name__}")
    n = operator.index(n_threads)
    if not 1 <= n <= 1024:
        raise ValueError(f"n_threads must be between 1 and 1024, got {n}")
    return n if threads.has_openmp() and not _forked else 1


def table() -> Iterator[dict[str, object]]:
    """One row per compiled variant, for people and programs: name, op, scheme, isa, compiled, supported, active."""
    may_run = supported(*OPS)
    for name in compiled(*OPS):
        yield {
            "name": str(name),
            "op": name.op,
            "scheme": name.scheme,
            "isa": name.isa,
            "compiled": True,
            "supported": name in may_run,
            "active": name in may_run and select(name.op, name.scheme).name == name,
        }


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _load(name: KernelName) -> Kernel:
    """Import one variant; only ever called for an instruction set that the processor has."""
    return Kernel(name, importlib.import_module(f"bitnet_ref._native.kernels.{name}").KERNEL)


@functools.cache
def _needs_tables(name: KernelName) -> bool:
    """A table serves one token; for many, gemm turns indices back into codes."""
    return name.op == "gemv" and any(lut.scheme == name.scheme for lut in compiled("lut"))


@functools.cache
def _table_builder(name: KernelName) -> Kernel:
    """The table builder that goes with a product: the highest one that needs no more than its instruction set."""
    usable = [lut for lut in compiled("lut") if lut.scheme == name.scheme and ISAS[lut.isa] <= ISAS[name.isa]]
    return _load(max(usable, key=lambda lut: ISAS[lut.isa]))


def check_out(out: np.ndarray, shape: tuple[int, ...], dtype: type) -> None:
    """Refuse an out-parameter that is not a writable, aligned, C-contiguous array of that shape and dtype."""
    if not isinstance(out, np.ndarray) or out.dtype != dtype:
        article = "an" if dtype is np.int32 else "a"
        raise TypeError(f"out must be {article} {np.dtype(dtype)} array, got {_type(out)}")
    if out.shape != shape or not out.flags.carray:
        raise ValueError(f"out must be a writable, aligned, C-contiguous array of shape {shape}, got {_describe(out)}")


def _check_int8(x_q: np.ndarray) -> None:
    if not isinstance(x_q, np.ndarray) or x_q.dtype != np.int8:
        raise TypeError(f"x_q must be an int8 array, got {_type(x_q)}")


def _type(value: object) -> str:
    """What came, for a message: the dtype of an array, the type of anything else."""
    return str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__


def _describe(array: np.ndarray) -> str:
    flags = {"read-only": not array.flags.writeable, "unaligned": not array.flags.aligned}
    flags["non-contiguous"] = not array.flags.c_contiguous
    return " ".join([*(word for word, holds in flags.items() if holds), f"shape {array.shape}"])


if __name__ == "__main__":
    from bitnet_ref.cli import main

    main(["kernels"])
