"""The verification itself: it covers what it says, and a kernel that is wrong in one element does not pass."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_ref import kernels, verify
from bitnet_ref.errors import BitnetRefError
from bitnet_ref.kernels import Kernel, KernelName
from bitnet_ref.verify import Case, VerificationError

GEMV = next(name for name in kernels.compiled("gemv") if name.scheme == "base3" and name.isa == "scalar")
GEMM = next(name for name in kernels.compiled("gemm") if name.scheme == "tl2" and name.isa == "scalar")
LUT = next(name for name in kernels.compiled("lut") if name.scheme == "tl1" and name.isa == "scalar")


@pytest.fixture(autouse=True)
def no_cap(monkeypatch):
    """A cap in the caller's environment must not decide these tests."""
    monkeypatch.delenv("BITNET_REF_ISA", raising=False)


def cases(name, examples=20, seed=0):
    return list(verify.cases(name, np.random.default_rng(seed), examples))


# --- passing --------------------------------------------------------------------------------------------------------


def test_every_supported_kernel_passes():
    seen = []
    report = verify.run(seed=3, examples=1, progress=lambda name, count: seen.append((name, count)))
    assert report.kernels == kernels.supported("gemv", "gemm", "lut", "dotrows", "addrows") != ()
    assert report.seed == 3
    assert [name for name, _ in seen] == list(report.kernels)
    counts = [count for _, count in seen]
    assert counts == sorted(set(counts)) and counts[-1] == report.cases
    assert report.cases == sum(len(cases(name, 1)) for name in report.kernels)


def test_the_cap_limits_what_is_verified(monkeypatch):
    monkeypatch.setenv("BITNET_REF_ISA", "scalar")
    monkeypatch.setattr(verify, "cases", lambda name, rng, examples: iter(()))
    assert {name.isa for name in verify.run().kernels} == {"scalar"}


@pytest.mark.parametrize(("seed", "examples"), [(-1, 20), (0, 0), (0, -5)])
def test_refuses(seed, examples):
    rule = f"^seed must be at least 0 and examples at least 1, got {seed} and {examples}$"
    with pytest.raises(ValueError, match=rule):
        verify.run(seed=seed, examples=examples)


# --- what is covered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [GEMV, GEMM, LUT], ids=str)
def test_all_kinds_of_cases(name):
    drawn = cases(name)
    labels = [case.label for case in drawn]
    assert labels.count("dense random") == labels.count("near-constant") == 20
    extremes = {f"all weights {w}, all activations {x}" for w in (1, -1) for x in (127, -128)}
    assert extremes <= set(labels)
    longest = max(case.w_q.shape[1] for case in drawn)
    if name.op == "lut":
        assert {len(case.x_q) for case in drawn} == {1}
        assert longest < 65536
    else:
        assert {"long rows", "long rows, worst case"} <= set(labels)
        assert longest > 65536  # beyond one segment
        assert {len(case.x_q) for case in drawn} >= {1, 2, 3, 4, 5, 9}
        heights = {case.w_q.shape[0] for case in drawn}
        assert heights >= {1, name.rows - 1, name.rows, name.rows + 1}
    assert {case.n_threads for case in drawn} == {1, 2, 3}
    assert any(case.w_q.shape[1] % name.block for case in drawn)
    for case in drawn:
        assert case.w_q.dtype == case.x_q.dtype == np.int8
        assert case.w_q.ndim == case.x_q.ndim == 2 and case.w_q.shape[1] == case.x_q.shape[1]
        assert case.w_q.min() >= -1 and case.w_q.max() <= 1


def test_kinds_are_what_they_are_called():
    by_label = {}
    for case in cases(GEMV):
        by_label.setdefault(case.label, []).append(case)
    dense = max(by_label["dense random"], key=lambda case: case.w_q.size)
    assert min(np.mean(dense.w_q == value) for value in (-1, 0, 1)) > 0.25
    assert len(np.unique(dense.x_q)) > 200
    for case in by_label["near-constant"]:
        for array in (case.w_q, case.x_q):
            values, counts = np.unique(array, return_counts=True)
            assert len(values) <= 2 and array.size - counts.max() <= 1
    for weight in (1, -1):
        for activation in (127, -128):
            for case in by_label[f"all weights {weight}, all activations {activation}"]:
                assert (case.w_q == weight).all() and (case.x_q == activation).all()


def test_cases_depend_on_the_seed_only():
    first, again, other = cases(GEMM), cases(GEMM), cases(GEMM, seed=1)
    assert len(first) == len(again) == len(other)
    for a, b in zip(first, again, strict=True):
        assert str(a) == str(b) and np.array_equal(a.w_q, b.w_q) and np.array_equal(a.x_q, b.x_q)
    assert [str(case) for case in first] != [str(case) for case in other]


# --- failing --------------------------------------------------------------------------------------------------------


def break_one_element(monkeypatch, broken, index):
    """Make one kernel's products off by one at ``index``, where the result has such an element."""
    call, build = Kernel.__call__, Kernel.build_tables

    def wrong(result):
        if all(i < n for i, n in zip(index, result.shape, strict=True)):
            result[index] += 1
        return result

    def product(self, *arguments, **keywords):
        result = call(self, *arguments, **keywords)
        return wrong(result) if self.name == broken else result

    def tables(self, x_q):
        result = build(self, x_q)
        return wrong(result) if self.name == broken else result

    monkeypatch.setattr(Kernel, "__call__", product)
    monkeypatch.setattr(Kernel, "build_tables", tables)


def test_one_wrong_element_is_named(monkeypatch):
    break_one_element(monkeypatch, GEMV, (2, 1))
    case = Case("by hand", np.full((4, 7), -1, np.int8), np.full((3, 7), 10, np.int8), 2)
    with pytest.raises(VerificationError) as error:
        verify.check(GEMV, case)
    assert str(error.value) == (
        f"{GEMV} differs from the reference on by hand, M = 4, K = 7, T = 3, 2 thread(s): "
        "first at index (2, 1), expected -70, got -69"
    )
    assert isinstance(error.value, BitnetRefError)
    verify.check(KernelName(GEMV.replace("gemv", "gemm")), case)  # the others are still right


def test_one_wrong_table_entry_is_named(monkeypatch):
    break_one_element(monkeypatch, LUT, (3, 1, 8))
    case = Case("by hand", np.zeros((1, 16), np.int8), np.full((1, 16), 28, np.int8), 1)
    with pytest.raises(VerificationError) as error:
        verify.check(LUT, case)
    assert str(error.value) == (
        f"{LUT} differs from the reference on by hand, M = 1, K = 16, T = 1, 1 thread(s): "
        "first at index (3, 1, 8), expected 2, got 3"  # 28 + 28 = 2 * 28 + 0
    )


@pytest.mark.parametrize(("broken", "index"), [(GEMV, (0, 0)), (GEMV, (4, 5)), (GEMM, (8, 64)), (LUT, (7, 1, 15))])
def test_a_kernel_with_one_wrong_element_does_not_pass(broken, index, monkeypatch):
    break_one_element(monkeypatch, broken, index)
    monkeypatch.setattr(verify.kernels, "supported", lambda *ops: (broken,))
    with pytest.raises(VerificationError, match=f"^{broken} differs from the reference on .* first at index "):
        verify.run()


def test_only_the_first_of_several_differences_is_named(monkeypatch):
    """In row-major order, so that two people who see it talk about the same element."""
    call = Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda self, *a, **k: call(self, *a, **k) * np.array([[1, 2], [3, 1]]))
    case = Case("by hand", np.ones((2, 3), np.int8), np.ones((2, 3), np.int8), 1)
    with pytest.raises(VerificationError, match=r"first at index \(0, 1\), expected 3, got 6$"):
        verify.check(GEMV, case)


def test_exchanged_outputs_are_found(monkeypatch):
    """The same numbers in other places: what a comparison of sums would let through."""
    call = Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda self, *a, **k: call(self, *a, **k)[:, ::-1])
    case = Case("by hand", np.array([[1, 1], [1, -1]], np.int8), np.array([[3, 4]], np.int8), 1)
    with pytest.raises(VerificationError, match=r"first at index \(0, 0\), expected 7, got -1$"):
        verify.check(GEMV, case)
