"""Hypothesis profiles, and what every test report should say about the machine.

BITNET_REF_HYPOTHESIS=random   draws fresh examples, many of them (make test-random); the default repeats the same ones.
BITNET_REF_REQUIRE=scalar,avx2 turns "this processor has no avx2" from a skip into a failure.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

import bitnet_ref as br
from bitnet_ref._native import cpu, threads

# Python processes that tests start shall import the installed package, not the source folder that they happen to
# start in.
os.environ["PYTHONSAFEPATH"] = "1"

settings.register_profile(
    "deterministic", derandomize=True, database=None, deadline=None, print_blob=True, max_examples=40
)
settings.register_profile(
    "random", deadline=None, print_blob=True, max_examples=400, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("BITNET_REF_HYPOTHESIS", "deterministic"))


def pytest_report_header():
    """Which kernels these tests can run at all."""
    return (
        f"bitnet_ref {br.__version__}: instruction sets {', '.join(cpu.supported_isas())}; "
        f"compiler {br.kernels.COMPILER}; OpenMP {'yes' if threads.has_openmp() else 'no'}"
    )


@pytest.fixture
def runnable():
    """A function that skips (or, under BITNET_REF_REQUIRE, fails) where the processor cannot run a kernel."""
    required = os.environ.get("BITNET_REF_REQUIRE", "").split(",")

    def check(name):
        if name.isa not in cpu.supported_isas():
            reason = f"needs {name.isa}, this processor has only {', '.join(cpu.supported_isas())}"
            (pytest.fail if name.isa in required else pytest.skip)(reason)

    return check
