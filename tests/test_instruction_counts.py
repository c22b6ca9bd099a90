"""No kernel executes more instructions for a byte of weights than it did: see instruction_counts.py."""

import json
import os
import platform
import shutil
import subprocess
import sys

import instruction_counts as counts
import pytest

from bitnet_ref import kernels

TABLE = json.loads(counts.FIGURES.read_text())
COMPILER = counts.compiler_key(kernels.COMPILER)
HERE = sys.platform.startswith("linux") and platform.machine() == "x86_64"
UPDATE = "if the growth is meant, `make counts` writes new figures: commit them and say why"


def unavailable(reason):
    """A skip, or a failure where BITNET_REF_REQUIRE says that this must run."""
    (pytest.fail if os.environ.get("BITNET_REF_REQUIRE") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def counted():
    """Instructions for a byte of weights of every kernel that can run here, all counted in one process."""
    if not HERE:
        pytest.skip("steps are counted on Linux on x86-64 only")
    try:
        return counts.count(counts.counted_names(kernels.supported))
    except PermissionError as error:
        unavailable(str(error))


@pytest.mark.parametrize("name", counts.counted_names(kernels.compiled), ids=str)
def test_a_kernel_does_not_grow(name, counted, runnable):
    runnable(name)
    if COMPILER not in TABLE:
        pytest.skip(f"there are no figures for {COMPILER}, only for {', '.join(TABLE)}; `make counts` adds them")
    assert name in TABLE[COMPILER], f"{name} has no figure: `make counts` adds it"
    before, now = TABLE[COMPILER][name], counted[name]
    assert now <= counts.LIMIT * before, f"{name}: {now:.3f} instructions a byte instead of {before:.3f}; {UPDATE}"


def test_figures_name_kernels_of_this_build():
    names = counts.counted_names(kernels.compiled)
    built = set(map(str, names))
    for compiler, table in TABLE.items():
        gone = sorted(set(table) - built)
        # A build for fewer instruction sets lacks some; a kernel that no build has is a stale line.
        assert not [n for n in gone if kernels.KernelName(n).isa in {name.isa for name in names}], (
            f"{compiler}: {gone} are in no build; `make counts` drops them"
        )


def test_instructions_are_counted(tmp_path):
    """A loop of known length: the difference of two counts is exact."""
    if not HERE:
        pytest.skip("steps are counted on Linux on x86-64 only")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        unavailable("needs a C compiler, CC or cc")
    source = tmp_path / "loop.c"
    source.write_text(
        "#include <signal.h>\n#include <stdlib.h>\n#include <sys/ptrace.h>\n#include <unistd.h>\n"
        "int main(int argc, char **argv) {\n"
        "  if (ptrace(PTRACE_TRACEME, 0, 0, 0)) return 1;\n"
        "  for (int i = 1; i < argc; i++) {\n"
        "    volatile long n = atol(argv[i]);\n    long k = n;\n"
        "    kill(getpid(), SIGSTOP);\n"
        '    for (; k > 0; k--) __asm__ volatile("nop\\n\\tnop\\n\\tnop");\n'
        "    kill(getpid(), SIGSTOP);\n  }\n}\n"
    )
    subprocess.run([compiler, "-O2", "-o", tmp_path / "loop", source], check=True)
    try:
        a, b, c = counts.trace([tmp_path / "loop", "100", "200", "300"], ["loop"] * 3)
    except PermissionError as error:
        unavailable(str(error))
    # Three nops, and what the compiler counts down with: two or three instructions more.
    assert (b - a) == (c - b)
    assert (b - a) / 100 in (5, 6)
