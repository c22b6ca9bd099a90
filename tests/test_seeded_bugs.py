"""Seeded bugs: each of the mistakes that these tests exist for is made on purpose, and must be found.

First in NumPy: a wrong function is put in the place of the right one, and tests of the other files are run on it. Then
in compiled code: a template (or pyx/matmul.pyx) is changed in one place, rendered, compiled and loaded, and the cases
of ``bitnet-ref verify`` are run on it. Each check passes without the bug; that is tested in the same place.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import test_kernels
import test_linear
import test_packing
import test_packing_pages
import test_quantize
import test_reference_matmul
import test_templates

import bitnet_ref.linear
from bitnet_ref import kernels, verify
from bitnet_ref._native import cpu
from bitnet_ref.kernels import Kernel, KernelName
from bitnet_ref.reference import packing
from bitnet_ref.reference.packing import PackedTernary, Scheme, get_scheme
from bitnet_ref.reference.quantize import quantize_activations, quantize_weights
from bitnet_ref.verify import Case, VerificationError

ROOT = Path(__file__).resolve().parent.parent
F32 = np.float32


@pytest.fixture(autouse=True)
def no_cap(monkeypatch):
    """A cap in the caller's environment must not hide kernels from these tests."""
    monkeypatch.delenv("BITNET_REF_ISA", raising=False)


def is_caught(check):
    """Whether a check of the suite fails."""
    try:
        check()
    except (AssertionError, ValueError, VerificationError):
        return True
    return False


# --- in NumPy -------------------------------------------------------------------------------------------------------


def replace_scheme(monkeypatch, name, **changes):
    scheme = dataclasses.replace(get_scheme(name), **changes)
    monkeypatch.setattr(packing, "SCHEMES", MappingProxyType({**packing.SCHEMES, name: scheme}))


def reverse_rows(name):
    """Exchange the rows of a byte: the first becomes the highest digit or field instead of the lowest."""
    scheme = get_scheme(name)

    def swap(w):
        return np.ascontiguousarray(w.reshape(-1, scheme.rows, w.shape[1])[:, ::-1]).reshape(w.shape)

    return (lambda w: scheme.encode(swap(w))), (lambda data: swap(scheme.decode(data)))


def wrong_digit_order_in_pack(monkeypatch):
    replace_scheme(monkeypatch, "base3", encode=reverse_rows("base3")[0])


def wrong_digit_order_in_pack_and_unpack(monkeypatch):
    encode, decode = reverse_rows("base3")
    replace_scheme(monkeypatch, "base3", encode=encode, decode=decode)


def padding_with_zero_bytes(monkeypatch):
    """Padding with code 0, which is weight -1, instead of weight 0."""

    def pack(self, w_q):
        padded = np.full(self.padded_shape(w_q.shape), -1, np.int8)
        padded[: w_q.shape[0], : w_q.shape[1]] = w_q
        return PackedTernary(self.encode(padded), w_q.shape, self.name)

    monkeypatch.setattr(Scheme, "pack", pack)


def last_partial_block_forgotten(monkeypatch):
    def matmul(x_q, packed):
        whole = packed.shape[1] // get_scheme(packed.scheme).block * get_scheme(packed.scheme).block
        return x_q[..., :whole].astype(np.int32) @ packed.unpack()[:, :whole].astype(np.int32).T

    monkeypatch.setattr(test_reference_matmul, "matmul", matmul)


def int16_sums(monkeypatch):
    def matmul(x_q, packed):
        return (x_q.astype(np.int16) @ packed.unpack().astype(np.int16).T).astype(np.int32)

    monkeypatch.setattr(test_reference_matmul, "matmul", matmul)


def x_sum_forgotten(monkeypatch):
    def matmul(x_q, packed):
        return x_q.astype(np.int32) @ (packed.unpack().astype(np.int32) + 1).T

    monkeypatch.setattr(test_reference_matmul, "matmul", matmul)


def weight_scale_inverted(monkeypatch):
    def wrong(w):
        w_q, w_scale = quantize_weights(w)
        return w_q, 1 / w_scale

    monkeypatch.setattr(test_quantize, "quantize_weights", wrong)


def inverse_activation_scale(x):
    x_q, x_scale = quantize_activations(x)
    return x_q, 1 / x_scale


def activation_scale_inverted(monkeypatch):
    monkeypatch.setattr(test_quantize, "quantize_activations", inverse_activation_scale)


def scale_inverted_in_the_layer(monkeypatch):
    monkeypatch.setattr(bitnet_ref.linear, "quantize_activations", inverse_activation_scale)


def threshold_at_the_mean(monkeypatch):
    """Zero wherever |w| < mean|w|, instead of half of it."""

    def wrong(w):
        _, w_scale = quantize_weights(w)
        return np.where(np.abs(w) < w_scale, 0, np.sign(w)).astype(np.int8), w_scale

    monkeypatch.setattr(test_quantize, "quantize_weights", wrong)


def halves_rounded_away_from_zero(monkeypatch):
    def wrong(w):
        _, w_scale = quantize_weights(w)
        w_q = np.sign(w) * np.floor(np.abs(w) / w_scale + F32(0.5))
        return np.clip(w_q, -1, 1).astype(np.int8), w_scale

    monkeypatch.setattr(test_quantize, "quantize_weights", wrong)


BASE3 = KernelName("gemv_i8_base3_5x64__scalar")
DENSE = Case("dense", np.random.default_rng(0).integers(-1, 2, (7, 70), dtype=np.int8), np.ones((1, 70), np.int8), 1)
bytes_of_base3 = partial(test_packing.test_dense_round_trip_and_bytes, "base3", (5, 65))
golden_bytes_of_base3 = partial(test_packing_pages.test_golden_bytes, "base3")
round_trip_of_base3 = partial(test_packing.test_large_dense_round_trip, "base3")
worst_case_product = partial(test_reference_matmul.test_worst_cases, "i2", 1, 127)
random_products = test_reference_matmul.test_matmul_is_the_integer_product

# bug, checks that find it, checks that do not: why there is more than one kind.
IN_NUMPY = [
    (
        wrong_digit_order_in_pack,
        [bytes_of_base3, golden_bytes_of_base3, round_trip_of_base3, partial(verify.check, BASE3, DENSE)],
        [],
    ),
    (
        wrong_digit_order_in_pack_and_unpack,
        [bytes_of_base3, golden_bytes_of_base3, partial(verify.check, BASE3, DENSE)],
        [round_trip_of_base3],
    ),
    (padding_with_zero_bytes, [bytes_of_base3, golden_bytes_of_base3], []),
    (last_partial_block_forgotten, [worst_case_product], []),
    (int16_sums, [worst_case_product], [random_products]),
    (x_sum_forgotten, [worst_case_product], []),
    (weight_scale_inverted, [test_quantize.test_scale_multiplies], []),
    (activation_scale_inverted, [test_quantize.test_activation_scale_is_per_token_and_multiplies], []),
    (scale_inverted_in_the_layer, [partial(test_linear.test_batch_shapes, "i2", (4,))], []),
    (
        threshold_at_the_mean,
        [
            test_quantize.test_gaussian_weights_have_31_percent_zeros,
            test_quantize.test_uniform_weights_have_25_percent_zeros,
        ],
        [test_quantize.test_scale_multiplies],
    ),
    (
        halves_rounded_away_from_zero,
        [test_quantize.test_weight_ties_round_to_even],
        [test_quantize.test_gaussian_weights_have_31_percent_zeros],
    ),
]


@pytest.mark.parametrize(("bug", "finds", "misses"), IN_NUMPY, ids=[bug.__name__ for bug, _, _ in IN_NUMPY])
def test_bug_in_numpy_is_found(bug, finds, misses, monkeypatch):
    for check in finds + misses:
        check()  # right without the bug
    bug(monkeypatch)
    assert [is_caught(check) for check in finds] == [True] * len(finds)
    for check in misses:
        check()


# --- in compiled code -----------------------------------------------------------------------------------------------

# The options of meson.build that decide what the code means.
CYTHON = [
    sys.executable,
    "-m",
    "cython",
    "-3",
    "-X",
    "boundscheck=False",
    "-X",
    "wraparound=False",
    "-X",
    "cdivision=True",
]
# avxvnni in the encoding of AVX-512, which a processor may have without AVX-VNNI: the same instruction.
FLAGS = {"scalar": [], "avx2": ["-mavx2"], "avxvnni": ["-mavx2", "-mavx512vl", "-mavx512vnni"]}


def change(folder, changes):
    """Replace a text in a file; it must be there exactly once, so that no bug is lost when a template is rewritten."""
    for file, old, new in changes:
        path = folder / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times: seed this bug in another way"
        path.write_text(text.replace(old, new), encoding="utf-8")


def run(*command):
    """Run a tool of the build; that it is missing is a failure, for the package cannot have been built without it."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


def build(pyx, flags=()):
    """Compile one Cython file and import it."""
    c, extension = pyx.with_suffix(".c"), pyx.with_suffix(sysconfig.get_config_var("EXT_SUFFIX"))
    run(*CYTHON, "-I", ROOT / "pyx", pyx, "-o", c)
    shared = ["-shared", "-fPIC", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
    include = [f"-I{sysconfig.get_path('include')}", f"-I{np.get_include()}"]
    run(*os.environ.get("CC", "cc").split(), "-O1", "-w", *shared, *flags, *include, c, "-o", extension)
    spec = importlib.util.spec_from_file_location(pyx.stem, extension)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_kernel(name, changes, tmp_path, monkeypatch):
    """The kernel of that name, made from changed templates."""
    templates = tmp_path / "templates"
    shutil.copytree(ROOT / "templates", templates)
    change(templates, changes)
    monkeypatch.setattr(test_templates.render, "HERE", templates)
    pyx = tmp_path / f"seeded_{name}.pyx"
    pyx.write_text(test_templates.source(name), encoding="utf-8")
    return Kernel(name, build(pyx, FLAGS[name.isa]).KERNEL)


def labels_found_wrong(kernel, monkeypatch):
    """Kinds of cases of the verification on which this kernel differs from the reference, and all kinds."""
    monkeypatch.setattr(kernels, "get", lambda name: kernel)
    wrong, every = set(), set()
    for case in verify.cases(kernel.name, np.random.default_rng(0), 20):
        every.add(case.label)
        if case.label not in wrong and is_caught(partial(verify.check, kernel.name, case)):
            wrong.add(case.label)
    return wrong, every


CONTROLS = ["gemv_i8_base3_5x64__scalar", "gemm_i8_i2_4x64__avx2", "gemv_i8_tl2_64x24__avx2"]


@pytest.mark.parametrize("name", [KernelName(name) for name in CONTROLS], ids=str)
def test_an_unchanged_kernel_passes(name, tmp_path, monkeypatch, runnable):
    """The control: what is found below is the seeded bug, and not this way of building."""
    runnable(name)
    kernel = build_kernel(name, [], tmp_path, monkeypatch)
    assert labels_found_wrong(kernel, monkeypatch)[0] == set()


@pytest.mark.parametrize("name", [n for n in kernels.compiled() if n.isa == "avxvnni"], ids=str)
def test_avxvnni_in_the_encoding_of_avx512(name, tmp_path, monkeypatch):
    """These kernels must be right although hardly any machine that tests them can run them as they are compiled."""
    if "avx512vnni" not in cpu.supported_isas():
        pytest.skip(f"needs avx512vnni, this processor has only {', '.join(cpu.supported_isas())}")
    kernel = build_kernel(name, [], tmp_path, monkeypatch)
    assert labels_found_wrong(kernel, monkeypatch)[0] == set()
    monkeypatch.setattr(kernels, "get", lambda name: kernel)
    for weight, activation in itertools.product((1, -1), (127, -128)):
        test_kernels.test_worst_cases_fill_no_accumulator(name, kernel, weight, activation)
    test_kernels.test_dense_weights_around_tiles_and_blocks(name, kernel)


# kernel, changes as (file, old text, new text), kinds of cases that find the bug, kinds that do not.
IN_KERNELS = {
    "digits in the wrong order": (
        "gemv_i8_base3_5x64__scalar",
        [("isa/scalar.pyx.j2", "d0 = {{ v }} % 3\nd1 = {{ v }} // 3 % 3", "d1 = {{ v }} % 3\nd0 = {{ v }} // 3 % 3")],
        {"dense random"},
        {"long rows, worst case"},  # where all weights are the same, their order is nothing
    ),
    "fields in the wrong order": (
        "gemm_i8_i2_4x64__avx2",
        [("isa/avx2.pyx.j2", "12 if i % 2 else 3", "3 if i % 2 else 12")],
        {"dense random", "all weights 1, all activations 127"},
        set(),
    ),
    "sum of the activations not subtracted": (
        "gemv_i8_i2_4x64__scalar",
        [("interleaved_rows.pyx.j2", " - x_sums[{{ t }}]", "")],
        {"dense random", "near-constant", "all weights 1, all activations 127"},
        set(),
    ),
    "scale applied the wrong way round": (
        "gemv_i8_i2_4x64__avx2",
        [("interleaved_rows.pyx.j2", "divided(rest.sum, places[r][r])", "divided(rest.sum, 1)")],
        {"dense random", "all weights 1, all activations 127"},
        set(),
    ),
    "int16 overflow": (
        "gemv_i8_i2_4x64__avx2",
        [("isa/avx2.pyx.j2", "set PART_LIMIT = 128 ", "set PART_LIMIT = 1280 ")],
        {"all weights 1, all activations 127", "all weights 1, all activations -128"},
        {"dense random"},
    ),
    "int16 overflow of rows that are solved for": (
        "gemv_i8_base3_5x64__avx2",
        [("interleaved_rows.pyx.j2", "namespace(largest=2)", "namespace(largest=1)")],
        {"long rows, worst case"},
        {"dense random"},
    ),
    "later tiles of few tokens where the first belong": (
        "gemm_i8_i2_4x64__avx2",
        [("strip_rows.pyx.j2", "out += {{ rows }} * tiles", "out += 0 * tiles")],
        {"few tokens, many tiles"},
        {"panels"},
    ),
    "strips wider than their parts": (
        "gemm_i8_base3_5x64__avx2",
        [("strip_rows.pyx.j2", "isa.PART_LIMIT // 4 * isa.VB", "isa.PART_LIMIT * isa.VB")],
        {"all weights 1, all activations 127"},
        {"dense random"},
    ),
    "int16 overflow of table sums": (
        "gemv_i8_tl2_64x24__avx2",
        [("lookup_rows.pyx.j2", "min(b + 10, n_blocks)", "min(b + 100, n_blocks)")],
        {"all weights 1, all activations 127", "all weights -1, all activations -128"},
        {"dense random"},
    ),
    "int16 overflow of decoded codes": (
        "gemm_i8_tl1_64x16__avx2",
        [("panel_indices.pyx.j2", "min(n_quads, {{ isa.PART_LIMIT // 2 }})", "min(n_quads, {{ isa.PART_LIMIT * 2 }})")],
        {"all weights 1, all activations 127", "all weights 1, all activations -128"},
        {"dense random"},
    ),
    "sign of a triple ignored": (
        "gemv_i8_tl2_64x24__scalar",
        [("isa/scalar.pyx.j2", "{{ a }} - {{ b }} if {{ negative }}", "{{ a }} + {{ b }} if {{ negative }}")],
        {"dense random", "all weights -1, all activations 127"},
        {"all weights 1, all activations 127"},
    ),
}


@pytest.mark.parametrize(("name", "changes", "finds", "misses"), IN_KERNELS.values(), ids=list(IN_KERNELS))
def test_bug_in_a_kernel_is_found(name, changes, finds, misses, tmp_path, monkeypatch, runnable):
    name = KernelName(name)
    runnable(name)
    wrong, every = labels_found_wrong(build_kernel(name, changes, tmp_path, monkeypatch), monkeypatch)
    assert finds <= wrong
    assert misses <= every - wrong  # why there is more than one kind of case
    monkeypatch.setattr(verify.kernels, "supported", lambda *ops: (name,))
    with pytest.raises(VerificationError, match=f"^{name} differs from the reference on .* first at index "):
        verify.run()


IN_MATMUL = {
    "nothing changed": [],
    "activations not padded": [("matmul.pyx", "if padded != k:", "if False:")],
    "rows of the last tile not cut": [
        ("matmul.pyx", "cdef Py_ssize_t whole = min(last, m // rows)", "cdef Py_ssize_t whole = last"),
        ("matmul.pyx", "if last * rows > m:", "if False:"),
    ],
}


@pytest.mark.parametrize("changes", IN_MATMUL.values(), ids=list(IN_MATMUL))
def test_forgotten_padding_in_the_caller_is_found(changes, tmp_path, monkeypatch):
    """In the zones around the arrays, which are wide enough that these bugs do no harm outside them."""
    shutil.copy(ROOT / "pyx" / "matmul.pyx", tmp_path)
    change(tmp_path, changes)
    pyx = (tmp_path / "matmul.pyx").rename(tmp_path / f"matmul_{len(changes)}.pyx")
    monkeypatch.setattr(kernels, "_matmul", build(pyx))
    for name in kernels.compiled():
        if name.isa == "scalar":
            kernel = kernels.get(name)
            check = partial(test_kernels.check_guard_zones, lambda x, w, out, f=kernel: f(x, w, out=out), name)
            assert is_caught(check) == bool(changes), name
