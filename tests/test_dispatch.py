"""Dispatch: what is compiled, what may run, what is chosen, and three different sentences for what is impossible."""

from __future__ import annotations

import os
import pickle
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bitnet_ref as br
from bitnet_ref import kernels
from bitnet_ref._native import cpu, threads
from bitnet_ref._native import limits as native_limits
from bitnet_ref._native import matmul as native_matmul
from bitnet_ref.errors import BitnetRefError, KernelUnavailable
from bitnet_ref.kernels import ISAS, Kernel, KernelName

BUILT = sorted({name.isa for name in kernels.compiled(*kernels.OPS)}, key=ISAS.__getitem__)
RUNNABLE = [isa for isa in BUILT if isa in cpu.supported_isas()]

# What must run for a scheme under each cap, written down rather than computed: the point of the manifest's columns.
BEST = {
    "scalar": {"i2": "scalar", "base3": "scalar", "tl1": "scalar", "tl2": "scalar"},
    "avx2": {"i2": "avx2", "base3": "avx2", "tl1": "avx2", "tl2": "avx2"},
    "avxvnni": {"i2": "avxvnni", "base3": "avxvnni", "tl1": "avx2", "tl2": "avx2"},
    "avx512vnni": {"i2": "avx512vnni", "base3": "avx512vnni", "tl1": "avx512vnni", "tl2": "avx512vnni"},
    "avx512vbmi": {"i2": "avx512vnni", "base3": "avx512vbmi", "tl1": "avx512vnni", "tl2": "avx512vnni"},
}


@pytest.fixture(autouse=True)
def no_cap(monkeypatch):
    """A cap in the caller's environment must not decide these tests."""
    monkeypatch.delenv("BITNET_REF_ISA", raising=False)


def python(code, **environment):
    """Run code in a new interpreter, with these variables beside the present ones (less those of OpenMP and ours)."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "BITNET_REF_"))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept | environment)


def only_scalar_here(monkeypatch):
    """Pretend to be a processor with no vectors at all."""
    if BUILT == ["scalar"]:
        pytest.skip("this build has only scalar kernels")
    monkeypatch.setattr(kernels.cpu, "supported_isas", lambda: ("scalar",))


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kernels.compiled(*kernels.OPS), ids=str)
def test_names_say_their_parts(name):
    assert isinstance(name, KernelName) and isinstance(name, str)
    parts = dict(op=name.op, act=name.act, scheme=name.scheme, rows=name.rows, block=name.block, isa=name.isa)
    assert KernelName.build(**parts) == name == KernelName(str(name)) == pickle.loads(pickle.dumps(name))
    assert name == f"{name.op}_{name.act}_{name.scheme}_{name.rows}x{name.block}__{name.isa}"
    assert name.op in kernels.OPS and name.act == "i8" and name.isa in ISAS
    assert type(name.rows) is int and type(name.block) is int


def test_one_name_by_hand():
    name = KernelName("gemm_i8_base3_5x64__avx512vbmi")
    assert (name.op, name.act, name.scheme, name.rows, name.block, name.isa) == (
        "gemm", "i8", "base3", 5, 64, "avx512vbmi",
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "", "gemv", "gemv_i8_i2_4x64", "gemv_i8_i2_4x64_avx2", "gemv_i8_i2_4x64__", "gemv_i4_i2_4x64__avx2",
        "gemv_i8_i2_4x__avx2", "gemv_i8_i2_x64__avx2", "GEMV_i8_i2_4x64__avx2", "gemv_i8_i2_4x64__avx2 ",
        "gemv_i8_i2_4x64__avx2\n", " gemv_i8_i2_4x64__avx2", "gemv_i8_i2_s_4x64__avx2",
    ],
)  # fmt: skip
def test_other_strings_are_no_names(text):
    with pytest.raises(ValueError) as error:
        KernelName(text)
    assert str(error.value) == f"a kernel name has the form op_i8_scheme_RxB__isa, got {text!r}"


# --- what exists and what may run -----------------------------------------------------------------------------------


def test_compiled_lists_each_variant_once_by_op():
    everything = kernels.compiled(*kernels.OPS)
    assert len(set(everything)) == len(everything)
    assert kernels.compiled() == kernels.compiled("gemv", "gemm")
    assert {name.op for name in kernels.compiled()} == {"gemv", "gemm"}
    for op in kernels.OPS:
        assert kernels.compiled(op) == tuple(name for name in everything if name.op == op) != ()
    with pytest.raises(ValueError, match=r"^op must be one of gemv, gemm, lut, dotrows, addrows, peak, got 'dot'$"):
        kernels.compiled("dot")


def test_every_scheme_has_a_scalar_kernel_for_each_product():
    assert BUILT[0] == "scalar"
    for op in ("gemv", "gemm"):
        for scheme in br.schemes():
            assert [n.isa for n in kernels.compiled(op) if n.scheme == scheme and n.isa == "scalar"] == ["scalar"]
    assert {name.scheme for name in kernels.compiled("lut")} == {"tl1", "tl2"}
    assert {name.scheme for name in kernels.compiled("dotrows", "addrows")} == {"base3r"}


def test_every_table_scheme_has_a_builder_for_each_instruction_set_or_a_lower_one():
    for name in kernels.compiled():
        if name.scheme in ("tl1", "tl2"):
            builder = kernels._table_builder(name).name if name.isa in RUNNABLE else None
            if builder is not None:
                assert builder.scheme == name.scheme and ISAS[builder.isa] <= ISAS[name.isa]


def test_supported_are_those_that_the_processor_can_run():
    assert kernels.supported() == tuple(name for name in kernels.compiled() if name.isa in RUNNABLE)
    assert kernels.supported("lut", "peak") == tuple(n for n in kernels.compiled("lut", "peak") if n.isa in RUNNABLE)


def test_supported_shrinks_with_the_processor(monkeypatch):
    only_scalar_here(monkeypatch)
    assert kernels.supported(*kernels.OPS) == tuple(n for n in kernels.compiled(*kernels.OPS) if n.isa == "scalar")


@pytest.mark.parametrize("cap", RUNNABLE)
def test_the_cap_leaves_what_is_not_above_it(cap, monkeypatch):
    monkeypatch.setenv("BITNET_REF_ISA", cap)
    assert kernels.isa_cap() == cap
    expected = [name for name in kernels.compiled() if name.isa in RUNNABLE and ISAS[name.isa] <= ISAS[cap]]
    assert list(kernels.supported()) == expected
    assert len(expected) > 0


def test_an_empty_cap_is_no_cap(monkeypatch):
    monkeypatch.setenv("BITNET_REF_ISA", "")
    assert kernels.isa_cap() is None
    assert kernels.supported() == tuple(name for name in kernels.compiled() if name.isa in RUNNABLE)


# --- select ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["gemv", "gemm"])
@pytest.mark.parametrize("scheme", br.schemes())
def test_select_takes_the_highest(op, scheme):
    chosen = kernels.select(op, scheme)
    assert isinstance(chosen, Kernel) and (chosen.name.op, chosen.name.scheme) == (op, scheme)
    same = [name for name in kernels.compiled(op) if name.scheme == scheme and name.isa in RUNNABLE]
    assert all(ISAS[chosen.name.isa] > ISAS[name.isa] for name in same if name != chosen.name)
    assert chosen is kernels.select(op, scheme) is kernels.get(chosen.name)  # loaded once


@pytest.mark.parametrize("cap", [isa for isa in RUNNABLE if isa in BEST])
@pytest.mark.parametrize("op", ["gemv", "gemm"])
@pytest.mark.parametrize("scheme", br.schemes())
def test_select_under_a_cap(cap, op, scheme, monkeypatch):
    if any(isa not in BUILT for isa in BEST if ISAS[isa] < ISAS[cap]):
        pytest.skip(f"this build lacks instruction sets below {cap}: it has {', '.join(BUILT)}")
    monkeypatch.setenv("BITNET_REF_ISA", cap)
    below = "avx2" if (op, cap) == ("gemm", "avxvnni") else cap  # which has kernels for one token only
    assert kernels.select(op, scheme).name.isa == BEST[below][scheme]


@pytest.mark.parametrize("cap", [isa for isa in RUNNABLE if isa in BEST])
@pytest.mark.parametrize("op", ["dotrows", "addrows"])
def test_products_with_listed_rows_have_a_kernel_for_every_cap(cap, op, monkeypatch):
    monkeypatch.setenv("BITNET_REF_ISA", cap)
    assert kernels.select(op, "base3r").name.isa == cap


@pytest.mark.parametrize("cap", RUNNABLE)
def test_the_cap_holds_for_a_whole_process(cap):
    code = """if True:
        import numpy as np, bitnet_ref as br
        for scheme in br.schemes():
            br.matmul(np.ones((3, 5), np.int8), br.pack(np.ones((2, 5), np.int8), scheme))
            br.matmul(np.ones(5, np.int8), br.pack(np.ones((2, 5), np.int8), scheme))
        import sys
        print(*(m.rsplit("__")[-1] for m in sys.modules if m.startswith("bitnet_ref._native.kernels.")))
    """
    run = python(code, BITNET_REF_ISA=cap)
    assert run.returncode == 0, run.stderr
    ran = set(run.stdout.split())
    assert max(ran, key=ISAS.__getitem__) == cap
    assert all(ISAS[isa] <= ISAS[cap] for isa in ran)


def test_select_refuses_unknown_ops_and_schemes(monkeypatch):
    with pytest.raises(ValueError, match=r"^op must be one of gemv, gemm, lut, dotrows, addrows, peak, got 'gemx'$"):
        kernels.select("gemx", "i2")
    with pytest.raises(ValueError, match=r"^scheme must be one of i2, base3, tl1, tl2, got 'i3'$"):
        kernels.select("gemv", "i3")
    with pytest.raises(KernelUnavailable, match=r"^this build has no lut kernel for scheme i2$"):
        kernels.select("lut", "i2")
    monkeypatch.setattr(kernels, "_COMPILED", tuple(n for n in kernels._COMPILED if n.scheme != "tl2"))
    kernels._select.cache_clear()
    with pytest.raises(KernelUnavailable, match=r"^this build has no gemm kernel for scheme tl2$"):
        kernels.select("gemm", "tl2")


@pytest.mark.parametrize(
    ("batch", "op"), [((), "gemv"), ((1,), "gemv"), ((1, 1), "gemv"), ((2,), "gemm"), ((2, 3), "gemm"), ((0,), "gemm")]
)
def test_matmul_takes_gemv_for_one_token_and_gemm_for_several(batch, op, monkeypatch):
    asked = []
    select = kernels.select
    monkeypatch.setattr(kernels, "select", lambda *arguments: asked.append(arguments) or select(*arguments))
    br.matmul(np.ones((*batch, 5), np.int8), br.pack(np.ones((2, 5), np.int8), "base3"))
    assert asked == [(op, "base3")]


@pytest.mark.parametrize(("scheme", "last"), [("i2", 1), ("base3", 1), ("tl1", 2), ("tl2", 3)])
def test_tables_serve_a_few_tokens_too(scheme, last, monkeypatch):
    asked = []
    select = kernels.select
    monkeypatch.setattr(kernels, "select", lambda *arguments: asked.append(arguments[0]) or select(*arguments))
    w_q, x_q = np.ones((2, 5), np.int8), np.arange(25, dtype=np.int8).reshape(5, 5)
    for tokens in range(1, 6):
        out = br.matmul(x_q[:tokens], br.pack(w_q, scheme))
        np.testing.assert_array_equal(out, np.repeat(x_q[:tokens].sum(1, dtype=np.int32)[:, None], 2, axis=1))
    assert asked == ["gemv"] * last + ["gemm"] * (5 - last)


def test_matmul_runs_the_named_kernel(monkeypatch):
    ran = []
    call = Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda self, *a, **k: ran.append(self.name) or call(self, *a, **k))
    packed, x_q = br.pack(np.ones((2, 5), np.int8), "i2"), np.ones((3, 5), np.int8)
    names = [name for name in kernels.supported() if name.scheme == "i2"]
    for name in names:
        br.matmul(x_q, packed, kernel=name)  # also gemv, though there are three tokens
        br.matmul(x_q, packed, kernel=str(name))
        br.matmul(x_q, packed, kernel=kernels.get(name))
    assert ran == [name for name in names for _ in range(3)]
    with pytest.raises(KernelUnavailable, match=r"^no kernel is called 'fast'"):
        br.matmul(x_q, packed, kernel="fast")


# --- the impossible: unknown, not compiled, not supported -----------------------------------------------------------


def sentence(call, *arguments):
    with pytest.raises(KernelUnavailable) as error:
        call(*arguments)
    assert isinstance(error.value, BitnetRefError) and isinstance(error.value, LookupError)
    return str(error.value)


def test_get_gives_exactly_the_variant():
    for name in kernels.supported(*kernels.OPS):
        assert kernels.get(name).name == name
        assert kernels.get(str(name)) is kernels.get(name)


@pytest.mark.parametrize("name", ["", "gemv", "gemv_i8_i2_4x64__sse9", "gemv_i8_i2_8x64__scalar", "scalar"])
def test_get_of_an_unknown_name(name):
    assert sentence(kernels.get, name) == f"no kernel is called {name!r}; bitnet_ref.kernels.compiled() lists them"


def test_get_of_what_is_not_compiled():
    missing = next(isa for isa in ISAS if isa not in BUILT)  # no build has the sets of two processor families
    name = KernelName.build("gemv", "i8", "i2", 4, 64, missing)
    assert sentence(kernels.get, name) == f"no kernel is called '{name}'; bitnet_ref.kernels.compiled() lists them"


def test_get_of_what_the_processor_lacks(monkeypatch):
    only_scalar_here(monkeypatch)
    name = next(name for name in kernels.compiled() if name.isa != "scalar")
    assert sentence(kernels.get, name) == f"{name} needs {name.isa}, this processor supports only scalar"


def test_get_of_what_the_cap_forbids(monkeypatch):
    if RUNNABLE == ["scalar"]:
        pytest.skip("only scalar kernels run here")
    name = next(name for name in kernels.supported() if name.isa != "scalar")
    monkeypatch.setenv("BITNET_REF_ISA", "scalar")
    assert sentence(kernels.get, name) == f"{name} needs {name.isa}, BITNET_REF_ISA=scalar forbids it"
    assert kernels.get(next(n for n in kernels.compiled() if n.isa == "scalar"))


def test_three_sentences_of_an_impossible_cap(monkeypatch):
    built, missing = ", ".join(BUILT), next(isa for isa in ISAS if isa not in BUILT)
    monkeypatch.setenv("BITNET_REF_ISA", "sse9")
    unknown = sentence(kernels.supported)
    assert unknown == f"BITNET_REF_ISA must be one of {', '.join(ISAS)}, got 'sse9'"
    monkeypatch.setenv("BITNET_REF_ISA", missing)
    not_compiled = sentence(kernels.supported)
    assert not_compiled == f"BITNET_REF_ISA={missing}: this build has no such kernels, only {built}"
    only_scalar_here(monkeypatch)
    monkeypatch.setenv("BITNET_REF_ISA", BUILT[-1])
    not_supported = sentence(kernels.supported)
    assert not_supported == f"BITNET_REF_ISA={BUILT[-1]}: this processor supports only scalar"


@pytest.mark.parametrize("call", ["kernels.supported()", "kernels.select('gemv', 'i2')", "list(kernels.table())"])
@pytest.mark.parametrize("cap", ["AVX2", "avx2,scalar", "sse9", " scalar"])
def test_an_impossible_cap_stops_every_question(call, cap, monkeypatch):
    monkeypatch.setenv("BITNET_REF_ISA", cap)
    with pytest.raises(KernelUnavailable, match=r"^BITNET_REF_ISA must be one of scalar, neon"):
        eval(call, {"kernels": kernels})


def test_an_impossible_cap_stops_a_process_but_not_the_import():
    run = python("import bitnet_ref as br; print('imported'); br.kernels.select('gemv', 'i2')", BITNET_REF_ISA="sse9")
    assert run.returncode == 1 and run.stdout == "imported\n"
    assert run.stderr.splitlines()[-1].startswith("bitnet_ref.errors.KernelUnavailable: BITNET_REF_ISA must be one of")


def test_a_capsule_of_another_signature_is_refused_by_name():
    """A stale or foreign module fails in PyCapsule_GetPointer with a sentence, not in the call with a crash."""
    product, builder = kernels.select("gemv", "tl1")._capsule, kernels.select("lut", "tl1")._capsule
    probe = kernels.select("peak", "dot")._capsule
    w, x, out = np.zeros((1, 256), np.uint8), np.zeros((1, 16), np.int8), np.zeros((1, 64), np.int32)
    wrong_name = "called with incorrect name"
    for kernel, lut in ((builder, builder), (probe, builder), (product, product), (product, probe)):
        with pytest.raises(ValueError, match=wrong_name):
            native_matmul.matmul(kernel, lut, w, 64, 16, x, out, 64, 16, 256, 1)
    for lut in (product, probe):
        with pytest.raises(ValueError, match=wrong_name):
            native_matmul.build_tables(lut, x[0], np.zeros(256, np.int8), 16)
    for other in (product, builder):
        with pytest.raises(ValueError, match=wrong_name):
            native_limits.multiply_adds(other, 1, 1)
    for nothing in (None, 7, object()):
        with pytest.raises(ValueError, match="called with invalid PyCapsule object"):
            native_matmul.matmul(nothing, None, w, 64, 16, x, out, 64, 16, 256, 1)


# --- loading --------------------------------------------------------------------------------------------------------


def test_a_variant_is_imported_only_where_it_can_run():
    """Module initialisation may already hold instructions that the processor lacks."""
    code = """if True:
        import sys
        from bitnet_ref._native import cpu
        cpu.supported_isas = lambda: ("scalar",)
        import numpy as np, bitnet_ref as br
        from bitnet_ref import kernels
        loaded = lambda: [m for m in sys.modules if m.startswith("bitnet_ref._native.kernels.")]
        assert loaded() == [], loaded()
        for name in kernels.compiled(*kernels.OPS):
            try:
                kernels.get(name)
            except br.KernelUnavailable:
                assert name.isa != "scalar"
        for scheme in br.schemes():
            br.matmul(np.ones((2, 5), np.int8), br.pack(np.ones((2, 5), np.int8), scheme))
        list(kernels.table())
        assert loaded() and all(m.endswith("__scalar") for m in loaded()), loaded()
    """
    run = python(code)
    assert run.returncode == 0, run.stderr


def test_table_has_a_row_per_variant_and_one_active_per_op_and_scheme(monkeypatch):
    rows = list(kernels.table())
    assert [row["name"] for row in rows] == list(kernels.compiled(*kernels.OPS))
    assert all(set(row) == {"name", "op", "scheme", "isa", "compiled", "supported", "active"} for row in rows)
    assert all(type(row["name"]) is str and row["compiled"] is True for row in rows)
    for op, scheme in {(row["op"], row["scheme"]) for row in rows}:
        active = [row["name"] for row in rows if (row["op"], row["scheme"]) == (op, scheme) and row["active"]]
        assert active == [kernels.select(op, scheme).name]
    monkeypatch.setenv("BITNET_REF_ISA", "scalar")
    assert all(row["active"] == row["supported"] == (row["isa"] == "scalar") for row in kernels.table())


# --- the processor --------------------------------------------------------------------------------------------------

AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
FLAGS = {
    "x86_64": {
        "scalar": set(),
        "avx2": {"avx2", "f16c"},
        "avxvnni": {"avx2", "f16c", "avx_vnni"},
        "avx512vnni": AVX512,
        "avx512vbmi": AVX512 | {"avx512vbmi"},
    },
    "aarch64": {"scalar": set(), "neon": {"asimd"}, "neondot": {"asimd", "asimddp"}},
}


def test_detection_names_known_sets_in_rising_rank():
    found = cpu.supported_isas()
    assert found[0] == "scalar" and len(set(found)) == len(found)
    ranks = [ISAS[isa] for isa in found]
    assert ranks == sorted(ranks)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_detection_agrees_with_the_kernel_of_linux():
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set(line[1].split())
    expected = {isa for isa, needed in FLAGS[platform.machine()].items() if needed <= flags}
    assert set(cpu.supported_isas()) == expected


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="an x86 check")
def test_detection_agrees_with_numpy():
    from numpy._core._multiarray_umath import __cpu_features__ as features

    avx512 = all(features[name] for name in ("AVX512F", "AVX512BW", "AVX512VL", "AVX512DQ", "AVX512VNNI"))
    expected = {
        "scalar": True,
        "avx2": features["AVX2"] and features["F16C"],
        "avx512vnni": avx512,
        "avx512vbmi": avx512 and features["AVX512VBMI"],
    }
    # NumPy has no name for AVX-VNNI.
    assert set(cpu.supported_isas()) - {"avxvnni"} == {isa for isa, present in expected.items() if present}


# --- threads --------------------------------------------------------------------------------------------------------


def test_thread_counts_are_taken_as_they_are():
    for n_threads in (1, 2, 3, 1024, np.int64(5)):
        resolved = kernels.resolve_threads(n_threads)
        assert type(resolved) is int
        assert resolved == (n_threads if threads.has_openmp() else 1)
    assert kernels.resolve_threads(None) == threads.default_threads() >= 1


@pytest.mark.parametrize("n_threads", [0, -1, 1025, 2**40])
def test_thread_counts_out_of_range(n_threads):
    with pytest.raises(ValueError, match=f"^n_threads must be between 1 and 1024, got {n_threads}$"):
        kernels.resolve_threads(n_threads)


@pytest.mark.parametrize("n_threads", [True, False, 1.0, "2", np.float32(2), np.bool_(True), [1]])
def test_thread_counts_that_are_no_integers(n_threads):
    with pytest.raises(TypeError):
        kernels.resolve_threads(n_threads)


def test_without_openmp_there_is_one_thread(monkeypatch):
    monkeypatch.setattr(kernels.threads, "has_openmp", lambda: False)
    assert [kernels.resolve_threads(n) for n in (1, 2, 1024)] == [1, 1, 1]
    with pytest.raises(ValueError, match="n_threads must be between 1 and 1024"):
        kernels.resolve_threads(0)  # the rule is the same, whatever the build


RESOLVED = "from bitnet_ref import kernels; print(kernels.resolve_threads(None), kernels.resolve_threads(2))"


@pytest.mark.skipif(not threads.has_openmp(), reason="this build has no OpenMP")
def test_the_default_is_openmps():
    assert python(RESOLVED, OMP_NUM_THREADS="3").stdout == "3 2\n"
    assert python(RESOLVED, OMP_NUM_THREADS="1").stdout == "1 2\n"
    if hasattr(os, "sched_getaffinity"):
        assert python(RESOLVED).stdout == f"{len(os.sched_getaffinity(0))} 2\n"


FORKED = """
import os, signal, sys
import numpy as np
import bitnet_ref as br
packed = br.pack(np.ones((64, 128), np.int8), "i2")
x_q = np.ones(128, np.int8)
br.matmul(x_q, packed, n_threads=2)
child = os.fork()
signal.alarm(20)
if child == 0:
    fine = (br.matmul(x_q, packed, n_threads=2) == 128).all() and br.kernels.resolve_threads(2) == 1
    os._exit(0 if fine else 1)
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_processes_use_one_thread_and_do_not_hang():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
