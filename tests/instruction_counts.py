"""How many instructions each kernel executes for a byte of packed weights, counted one by one.

A child process is single-stepped by ptrace while it multiplies; steps whose instruction lies in the module of the
kernel are counted. Such a count is exact and the same on a loaded machine, needs no counter of the processor, and
follows the code that runs, however its loops are shaped.

    make counts        count again and rewrite tests/instruction_counts.json

Figures belong to a compiler (its name and major version): another one makes other code.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

FIGURES = Path(__file__).with_name("instruction_counts.json")
LIMIT = 1.10
"""A count may grow by this factor before the test fails."""

# Tokens, columns (whole blocks of every scheme) and tiles. A tile of a table scheme holds 64 rows.
SIZES = {"gemv": (1, 960, 8), "gemm": (30, 576, 16)}
SIZES_TABLES = {"gemv": (1, 576, 2), "gemm": (4, 576, 1)}
SIZES_ROWS = (1, 960, 48)
"""Of products with listed rows; every other row is listed. Four rows at a time are added by ``addrows``."""

PTRACE_PEEKUSER, PTRACE_CONT, PTRACE_SINGLESTEP = 3, 7, 9
OFFSET_OF_RIP = 128  # in the kernel's struct user of x86-64

CHILD = """
import ctypes, os, signal, sys, types
import numpy as np
from bitnet_ref import kernels
from bitnet_ref.reference.packing import pack

# The compiled call alone is stepped through, with whatever arguments the registry gives it: Python would be most of it.
calls = []
def kept(call):
    return lambda *arguments: calls.append((call, arguments))
rows = kernels._rows
kernels._matmul = types.SimpleNamespace(matmul=kept(kernels._matmul.matmul))
kernels._rows = types.SimpleNamespace(dot_rows=kept(rows.dot_rows), add_rows=kept(rows.add_rows))
rng = np.random.default_rng(0)
if ctypes.CDLL(None, use_errno=True).ptrace(0, 0, None, None) != 0:
    sys.exit("ptrace is refused here: " + os.strerror(ctypes.get_errno()))
for job in sys.argv[1:]:
    name, tokens, k, m = job.split(",")
    kernel, shape = kernels.get(name), (int(m), int(k))
    packed = pack(rng.integers(-1, 2, shape, dtype=np.int8), kernel.name.scheme)
    if kernel.name.op in kernels.ROW_PRODUCTS:
        dots = kernel.name.op == "dotrows"
        x_q = rng.integers(-127, 128, int(k) if dots else int(m), dtype=np.int8)
        listed = np.arange(0, int(m), 2, dtype=np.int32)
        (kernel.dot_rows if dots else kernel.add_rows)(x_q, packed, listed, n_threads=1)
    else:
        kernel(rng.integers(-127, 128, (int(tokens), int(k)), dtype=np.int8), packed, n_threads=1)
    call, arguments = calls.pop()
    os.kill(os.getpid(), signal.SIGSTOP)
    call(*arguments)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def compiler_key(compiler):
    """``gcc 12.2.0`` -> ``gcc 12``."""
    return compiler.split(".")[0]


def counted_names(find):
    """Which of ``kernels.compiled`` or ``kernels.supported`` are counted: all that read weights, but scalar ones."""
    from bitnet_ref.kernels import PRODUCTS, ROW_PRODUCTS

    return [name for name in find(*PRODUCTS, *ROW_PRODUCTS) if name.isa != "scalar"]


def count(names):
    """Instructions for a byte of packed weights (and token) of each of these kernels, as {name: float}.

    Bytes are those that are read: of rows that are not listed, none.

    Raises
    ------
    PermissionError
        If this system lets no process trace its own child.
    """
    from bitnet_ref.kernels import ROW_PRODUCTS
    from bitnet_ref.reference.packing import get_scheme

    jobs, sizes = [], []
    for name in names:
        scheme, listed = get_scheme(name.scheme), name.op in ROW_PRODUCTS
        sizes_of = SIZES if scheme.rows <= 16 else SIZES_TABLES
        tokens, columns, tiles = SIZES_ROWS if listed else sizes_of[name.op]
        jobs.append(f"{name},{tokens},{columns},{tiles * scheme.rows}")
        n_bytes = tiles * -(-columns // scheme.block) * scheme.tile_block_bytes * tokens
        sizes.append(n_bytes / 2 if listed else n_bytes)
    counts = trace([sys.executable, "-P", "-c", CHILD, *jobs], names)
    return {name: n / size for name, n, size in zip(names, counts, sizes, strict=True)}


def trace(command, modules):
    """Instructions that a process executes between each two of its stops, of those in one file mapped into it.

    Parameters
    ----------
    command : list
        Stops itself by SIGSTOP before and after each piece of work, once for each of `modules`.
    modules : sequence of str
        How the name of the file begins whose instructions count, one for each piece.

    Raises
    ------
    PermissionError
        If the process ends before: it does where it may not be traced.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    libc.ptrace.restype = ctypes.c_long
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    pid = child.pid

    def wait():
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            child.returncode = os.waitstatus_to_exitcode(status)
            raise PermissionError(child.stderr.read().strip() or f"the counted process ended with {child.returncode}")
        return os.WSTOPSIG(status)

    def run(request, begin=0, end=0):
        """Let the child go on until it stops itself; returns how many steps began between these addresses."""
        n, came = 0, signal.SIGTRAP
        while came != signal.SIGSTOP:
            if end and begin <= libc.ptrace(PTRACE_PEEKUSER, pid, OFFSET_OF_RIP, None) < end:
                n += 1
            libc.ptrace(request, pid, None, None if came == signal.SIGTRAP else came)
            came = wait()
        return n

    before = os.sched_getaffinity(0)
    counts = []
    try:
        if wait() != signal.SIGSTOP:
            raise PermissionError("the counted process stopped before it should")
        # One processor for both: a step would wake another one otherwise, which takes longer.
        for which in (0, pid):
            os.sched_setaffinity(which, {min(before)})
        for i, module in enumerate(modules):
            if i:
                run(PTRACE_CONT)
            counts.append(run(PTRACE_SINGLESTEP, *_code_of(pid, module)))
        return counts
    finally:
        os.sched_setaffinity(0, before)
        child.kill()
        child.wait()
        child.stderr.close()


def _code_of(pid, module):
    """Addresses at which the code of a mapped file begins and ends."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, mode, _, _, _, *path = line.split(maxsplit=5)
        if "x" in mode and path and Path(path[0]).name.startswith(module):
            begin, end = addresses.split("-")
            return int(begin, 16), int(end, 16)
    raise LookupError(f"no code of {module} is mapped")


def main():
    from bitnet_ref import kernels

    names = counted_names(kernels.supported)
    table = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    key = compiler_key(kernels.COMPILER)
    kept = {name: value for name, value in table.get(key, {}).items() if name in counted_names(kernels.compiled)}
    table[key] = dict(sorted((kept | {name: round(value, 4) for name, value in count(names).items()}).items()))
    FIGURES.write_text(json.dumps(table, indent=2) + "\n")
    print(f"{FIGURES}: {len(names)} kernels counted for {key}")


if __name__ == "__main__":
    main()
