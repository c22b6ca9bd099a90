"""The templates: one interface for all instruction sets, no intrinsic outside their files, bounds, and the renderer."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import numpy as np
import pytest

from bitnet_ref import kernels, verify
from bitnet_ref._native import _table
from bitnet_ref.kernels import KernelName
from bitnet_ref.reference.packing import SCHEMES, get_scheme
from bitnet_ref.reference.packing.tl1 import PAIRS
from bitnet_ref.reference.packing.tl2 import TRIPLES

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "templates"

_spec = importlib.util.spec_from_file_location("render", TEMPLATES / "render.py")
render = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(render)

ISA_FILES = sorted(path.name.removesuffix(".pyx.j2") for path in (TEMPLATES / "isa").glob("*.pyx.j2"))
GENERIC = sorted(path for path in TEMPLATES.rglob("*.pyx.j2") if path.parent.name != "isa")
INTRINSIC = re.compile(
    r"\b_mm\d*_|\b__m(?:mask)?\d|\b_k[a-z]+_mask|\bv(?:ld|st)1q?_|\bv[a-z0-9]+q_[usf]\d|__builtin_|__asm__"
)

every_isa = pytest.mark.parametrize("isa", ISA_FILES)


def without_comments(text):
    return re.sub(r"\{#.*?#\}", "", text, flags=re.DOTALL)


def manifest():
    """(op, scheme, tile, [isa, ...]) of each row of templates/meson.build, read as text."""
    text = (TEMPLATES / "meson.build").read_text(encoding="utf-8")
    table = text[text.index("variants = [") :]
    rows = re.findall(r"\['(\w+)',\s*'(\w+)',\s*'(\d+x\d+)',\s*\[([^]]*)\]\]", table)
    return [(op, scheme, tile, re.findall(r"'(\w+)'", isas)) for op, scheme, tile, isas in rows]


NAMES = [KernelName(f"{op}_i8_{scheme}_{tile}__{isa}") for op, scheme, tile, isas in manifest() for isa in isas]
PRODUCTS = [name for name in NAMES if name.op in kernels.PRODUCTS]
every_name = pytest.mark.parametrize("name", NAMES, ids=str)


def template_of(name):
    return f"schemes/{name.scheme}.pyx.j2"


def source(name, env=None):
    """The Cython text of a kernel."""
    return render.render(env or render.environment(), name, template_of(name))


def isa_module(isa):
    """The instruction set's file as Jinja sees it: constants and macros."""
    template = render.environment().get_template(f"isa/{isa}.pyx.j2")
    return vars(template.make_module({"isa_name": isa, "rows": 4, "block": 64, "op": "gemv", "name": "x"}))


def interface(isa):
    """({macro: arguments}, {constant}) that the file exports."""
    names = {name: value for name, value in isa_module(isa).items() if not name.startswith("_")}
    macros = {n: v.arguments for n, v in names.items() if isinstance(v, jinja2.runtime.Macro)}
    return macros, set(names) - set(macros)


def documented_interface():
    """The same, read from the comment at the head of isa/scalar.pyx.j2."""
    text = (TEMPLATES / "isa" / "scalar.pyx.j2").read_text(encoding="utf-8")
    comment = text[: text.index("-#}")]
    constants, rest = comment[comment.index("constants ") + len("constants ") :].split("expressions ")
    expressions, statements = rest.split("statements ")
    calls = re.findall(r"(\w+)\(([\w, ]*)\)", expressions)
    calls += re.findall(r"^ *(\w+)\(([\w, ]*)\)", statements, re.MULTILINE)
    macros = {name: tuple(arguments.split(", ")) if arguments else () for name, arguments in calls}
    lists = re.findall(r"(?:^ *|; +)(\w+(?:, \w+)*)  +", constants, re.MULTILINE)
    return macros, {name for names in lists for name in names.split(", ")}


# --- the interface --------------------------------------------------------------------------------------------------


def test_scalar_documents_what_it_exports():
    macros, constants = documented_interface()
    assert macros == interface("scalar")[0]
    assert constants == interface("scalar")[1]
    assert len(macros) > 12 and len(constants) > 6  # the comment was read at all


@every_isa
def test_every_instruction_set_exports_the_same_interface(isa):
    assert interface(isa) == interface("scalar")


@every_isa
def test_constants_have_the_same_kinds(isa):
    mine, scalar = isa_module(isa), isa_module("scalar")
    for name in interface("scalar")[1]:
        assert type(mine[name]) is type(scalar[name])
    assert mine["VB"] in (1, 16, 32, 64) and mine["TOKENS"] >= 1
    # Row r: what codes 0..r are multiplied by; the last, its own, is what the sum is divided by.
    for places, rows in ((mine["FIELD2_PLACES"], 4), (mine["TRIT_PLACES"], 5)):
        assert [len(row) for row in places] == list(range(1, rows + 1))
        assert all(row[-1] >= 1 and min(row) >= 0 for row in places)


def test_every_instruction_set_has_a_rank_and_a_column():
    assert set(ISA_FILES) <= set(kernels.ISAS)
    assert {name.isa for name in NAMES} == set(ISA_FILES)


# --- who may name what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GENERIC, ids=lambda path: path.name)
def test_generic_templates_name_no_intrinsic_and_no_instruction_set(path):
    text = without_comments(path.read_text(encoding="utf-8"))
    assert not INTRINSIC.search(text)
    for line in text.splitlines():
        # The only uses: to import the instruction set's file, and to say its name in the head of the output.
        rest = line.replace("'isa/' ~ isa_name ~ '.pyx.j2'", "").replace("for {{ isa_name }}.", "")
        assert "isa_name" not in rest, line
        assert not any(isa in rest for isa in kernels.ISAS), line


def test_the_intrinsic_pattern_finds_intrinsics():
    for isa in set(ISA_FILES) - {"scalar", "avxvnni", "avx512vbmi"}:
        text = without_comments((TEMPLATES / "isa" / f"{isa}.pyx.j2").read_text(encoding="utf-8"))
        assert len(INTRINSIC.findall(text)) > 20
    assert not INTRINSIC.search((TEMPLATES / "isa" / "scalar.pyx.j2").read_text(encoding="utf-8"))
    for text in (
        "vld1q_u8(p)",
        "vdotq_s32(a, b, c)",
        "__m256i x",
        "_mm_add_epi8",
        "_mm512_dpbusd_epi32",
        "__mmask64 k",
    ):
        assert INTRINSIC.search(text), text


def test_x86_intrinsics_are_declared_and_none_for_nothing():
    """simd_x86.pxd declares exactly the intrinsics of the macros; C in a prologue needs no declaration."""
    called = re.compile(r"\b(_(?:mm|k)\w+)\(")
    declared = set(called.findall((ROOT / "pyx" / "simd_x86.pxd").read_text(encoding="utf-8")))
    used = set()
    for path in (TEMPLATES / "isa").glob("avx*.pyx.j2"):
        text = re.sub(r'"""[\s\S]*?"""', "", without_comments(path.read_text(encoding="utf-8")))
        used |= set(called.findall(text))
    assert used == declared


# --- the manifest ---------------------------------------------------------------------------------------------------


def test_the_build_holds_what_the_manifest_says():
    built = {name.isa for name in map(KernelName, _table.COMPILED)}
    assert list(_table.COMPILED) == [name for name in NAMES if name.isa in built]


def test_the_manifest_lists_every_product_for_every_scheme_in_rising_rank():
    assert {(op, scheme) for op, scheme, _, _ in manifest()} >= {(op, s) for op in kernels.PRODUCTS for s in SCHEMES}
    for op, _, _, isas in manifest():
        ranks = [kernels.ISAS[isa] for isa in isas]
        assert ranks == sorted(ranks) and (isas[0] == "scalar" or op == "peak")  # a probe's tile may differ
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name.op != "peak"], ids=str)
def test_tiles_are_those_of_the_scheme(name):
    scheme = get_scheme(name.scheme)
    assert (name.rows, name.block) == (scheme.rows, scheme.block)


# --- rendering ------------------------------------------------------------------------------------------------------


@every_name
def test_renders_and_always_the_same(name):
    text = source(name)
    assert text == source(name)
    lines = text.splitlines()
    assert lines[0] == f"# Kernel {name}."
    assert (
        lines[1]
        == f"# Generated by templates/render.py from templates/{template_of(name)} for {name.isa}. Do not edit."
    )
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\{#|#\}", text)
    op = "matmul" if name.op in kernels.PRODUCTS else name.op
    assert text.count(f'KERNEL = PyCapsule_New(<void*>{op}, b"bitnet_ref.{op}/1", NULL)') == 1
    assert text.endswith("\n")


def test_capsule_names_are_those_of_the_contract():
    """The tags in generated modules, in kernel_abi.pxd and in the callers are one list."""
    abi = (ROOT / "pyx" / "kernel_abi.pxd").read_text(encoding="utf-8")
    callers = "".join(
        (ROOT / "pyx" / f"{stem}.pyx").read_text(encoding="utf-8") for stem in ("matmul", "rows", "limits")
    )
    tags = set(re.findall(r'# "(bitnet_ref\.\w+/\d+)"', abi))
    assert tags == set(re.findall(r'b"(bitnet_ref\.\w+/\d+)"', callers))
    assert tags == {tag for name in NAMES for tag in re.findall(r'b"(bitnet_ref\.\w+/\d+)"', source(name))}
    assert len(tags) == 5


def run_render(folder, out, *arguments):
    return subprocess.run(
        [sys.executable, folder / "render.py", *arguments, "--out", out, "--depfile", f"{out}.d"],
        capture_output=True,
        text=True,
    )


def test_depfile_lists_every_file_that_was_opened(tmp_path):
    """In a folder with a space, which a depfile must escape."""
    folder, out = tmp_path / "some templates", tmp_path / "k.pyx"
    shutil.copytree(TEMPLATES, folder)
    name = "gemm_i8_base3_5x64__avx512vbmi"
    run = run_render(folder, out, "--name", name, "--template", "schemes/base3.pyx.j2")
    assert run.returncode == 0, run.stderr
    assert out.read_text(encoding="utf-8") == source(KernelName(name))
    target, _, rest = Path(f"{out}.d").read_text(encoding="utf-8").partition(": ")
    assert target == str(out)
    files = {Path(word.replace("\\ ", " ")) for word in re.split(r"(?<!\\) ", rest.strip())}
    expected = {"render.py", "kernel_module.pyx.j2", "interleaved_rows.pyx.j2", "panel_rows.pyx.j2"}
    expected |= {"schemes/base3.pyx.j2"}
    expected |= {f"isa/{isa}.pyx.j2" for isa in ("avx512vbmi", "avx512vnni", "avx2")}
    assert {path.resolve() for path in files} == {(folder / path).resolve() for path in expected}


def test_depfile_of_a_table_kernel(tmp_path):
    out = tmp_path / "k.pyx"
    run_render(TEMPLATES, out, "--name", "gemv_i8_tl2_64x24__scalar", "--template", "schemes/tl2.pyx.j2")
    words = Path(f"{out}.d").read_text(encoding="utf-8").split()[1:]
    opened = {Path(word).relative_to(TEMPLATES).as_posix() for word in words}
    assert opened == {
        "render.py", "kernel_module.pyx.j2", "lookup_rows.pyx.j2", "schemes/tl2.pyx.j2", "isa/scalar.pyx.j2",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gemv_i2_4x64__avx2", "gemv_i8_i2_4x64_avx2", "gemv_f32_i2_4x64__avx2"])
def test_names_of_another_form_are_refused(name, tmp_path):
    out = tmp_path / "k.pyx"
    run = run_render(TEMPLATES, out, "--name", name, "--template", "schemes/i2.pyx.j2")
    assert run.returncode == 1 and not out.exists()
    assert run.stderr == f"a kernel name has the form op_i8_scheme_RxB__isa, got {name!r}\n"


def test_the_renderer_reads_names_as_the_registry_does():
    for name in NAMES:
        parts = render.NAME.fullmatch(name)
        mine = (parts["op"], parts["act"], parts["scheme"], int(parts["rows"]), int(parts["block"]), parts["isa"])
        assert mine == (name.op, name.act, name.scheme, name.rows, name.block, name.isa)


def test_an_undefined_name_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(jinja2.UndefinedError, match="'nothing' is undefined"):
        render.environment().from_string("{{ nothing }}").render()
    # A macro that an instruction set lacks is an error too, not empty text in the middle of an expression.
    folder = tmp_path / "templates"
    shutil.copytree(TEMPLATES, folder)
    path = folder / "isa" / "scalar.pyx.j2"
    text = path.read_text(encoding="utf-8")
    assert "macro field2(" in text
    path.write_text(text.replace("macro field2(", "macro field(", 1), encoding="utf-8")
    monkeypatch.setattr(render, "HERE", folder)
    with pytest.raises(jinja2.UndefinedError, match="field2"):
        render.render(render.environment(), "gemv_i8_i2_4x64__scalar", "schemes/i2.pyx.j2")


# --- constants and bounds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [3, 4])
def test_fields_of_81_hold_the_low_base_3_digits(digits):
    fields = render.fields_of_81(digits)
    assert len(fields) == 128 and not any(fields[81:])
    for d3, d2, d1, d0 in itertools.product(range(3), repeat=4):
        assert fields[27 * d3 + 9 * d2 + 3 * d1 + d0] == (d3 << 6 | d2 << 4 | d1 << 2 | d0) % 4**digits
    assert render.environment().globals["fields_of_81"] is render.fields_of_81


@pytest.mark.parametrize("divisor", [1, 2, 3, 4, 9, 12, 27, 64, 81, 162])
def test_exact_quotients(divisor):
    """The C expression, computed as C computes it: int32 that wraps, shifts that keep the sign."""
    text = render.divided("v", divisor)
    shift, inverse = (int((re.search(pattern, text) or ["", "0"])[1]) for pattern in (r">> (\d+)", r"\* (\d+)u"))
    rest = re.sub(r">> \d+|\* \d+u|<(unsigned )?int>|[()v ]", "", text)
    assert rest == ""
    for q in (0, 1, -1, 7, -1000, 2**31 // divisor - 1, -(2**31) // divisor):
        product = (q * divisor >> shift) * (inverse or 1) % 2**32
        assert product - 2**32 * (product >= 2**31) == q


@pytest.mark.parametrize(("scheme", "weights"), [("tl1", PAIRS), ("tl2", TRIPLES)])
@every_isa
def test_table_coefficients_are_the_weights_of_each_index(scheme, weights, isa):
    names = [name for name in NAMES if (name.op, name.scheme, name.isa) == ("lut", scheme, isa)]
    for name in names:
        rows = re.findall(r"^W(\d)\[:\] = (\[[-\d, ]*\])$", source(name), re.MULTILINE)
        assert [int(index) for index, _ in rows] == list(range(weights.shape[1]))
        assert [[int(v) for v in row.strip("[]").split(",")] for _, row in rows] == weights.T.tolist()
    assert names or isa == "avxvnni" or isa.startswith("avx512")  # these take avx2's builders


@pytest.mark.parametrize("name", PRODUCTS, ids=str)
def test_kernels_step_through_a_block_as_the_scheme_lays_it_out(name):
    scheme = get_scheme(name.scheme)
    text = source(name)
    if scheme.rows == 64 and name.op == "gemm":  # indices that become codes: block_bytes a block, one table a column
        assert set(re.findall(r"^ +w \+= (\d+)$", text, re.MULTILINE)) == {str(scheme.tile_block_bytes)}
    elif scheme.rows == 64:  # lookup: block_bytes a block, for each 64-byte run of rows
        assert set(re.findall(r"^ +p \+= (\d+)$", text, re.MULTILINE)) == {str(scheme.tile_block_bytes)}
        assert set(re.findall(r"^ +table \+= (\d+)$", text, re.MULTILINE)) == {"256"}
    else:  # interleaved rows: one byte a column
        assert scheme.tile_block_bytes == scheme.block
        assert set(re.findall(r"n_columns = n_blocks \* (\d+)", text)) == {str(scheme.block)}


@every_isa
def test_whole_vectors_fit_blocks_and_tiles(isa):
    bytes_per_vector = isa_module(isa)["VB"]
    for scheme in SCHEMES.values():
        assert (64 if scheme.rows == 64 else scheme.block) % bytes_per_vector == 0


@every_isa
@pytest.mark.parametrize("places", ["FIELD2_PLACES", "TRIT_PLACES"])
def test_sums_fit_their_lanes(isa, places):
    """The bounds of the comments, computed: codes up to 2 at their places, activations from -128 to 127."""
    module = isa_module(isa)
    solved = all(row[-1] % 2 for row in module[places])  # modulo 2^16: only the codes must fit, see interleaved_rows
    for largest in (2 * sum(row) for row in module[places]):
        assert largest <= 255  # codes at their places are still a byte
        assert largest * 128 * kernels.SEGMENT_COLUMNS < 2**31
        if module["PART_LIMIT"]:
            assert 2 * largest * 127 <= 2**15 - 1 and 2 * largest * 128 <= 2**15  # one instruction saturates
            largest = 2 if solved else largest
            steps = module["PART_LIMIT"] // largest
            assert steps * module["VB"] >= 128  # two blocks of 64 columns are taken at least before widening
            assert steps * 2 * largest * 127 <= 2**15 - 1 and steps * 2 * largest * 128 <= 2**15  # two products a lane


@pytest.mark.parametrize(("kernel", "vectors"), [("gemv_i8_base3_5x64", 64), ("gemv_i8_i2_4x64", 16)])
def test_parts_are_widened_in_time(kernel, vectors):
    """What the template makes of those bounds: the vectors between two widenings, by avx2."""
    text = source(KernelName(kernel + "__avx2"))
    assert re.search(r"stop = min\(j \+ (\d+), n_columns\)", text)[1] == str(vectors * 32)
    rows = "".join(map(str, range(KernelName(kernel + "__avx2").rows)))
    outer, inner = text.split("    while j < n_columns:", 1)[1].split("        while j < stop:", 1)
    inner, after = inner.split("            j += 64\n", 1)
    assert re.findall(r"part(\d)_0 = _mm256_setzero", outer) == list(rows)
    assert inner.count("codes = ") == 2 and "while" not in inner and "acc" not in inner
    assert re.findall(r"acc(\d)_0 = _mm256_add_epi32", after) == list(rows)


def test_strips_fit_their_parts():
    """strip_rows: 32 vectors of isolated codes, or of codes that are solved for."""
    for scheme in ("base3_5x64", "i2_4x64"):
        columns = {
            int(n) for n in re.findall(r"n_columns - column, (\d+)\)", source(KernelName(f"gemm_i8_{scheme}__avx2")))
        }
        assert columns == {512, 1024}  # a panel, a strip
        assert 1024 // 32 * 2 * 2 * 128 <= 2**15


def test_ninths_of_all_pairs_of_bytes():
    """trits() of avx2: one constant divides the low byte of a word alone, and the high one beside any other."""
    text = source(KernelName("gemv_i8_base3_5x64__avx2"))
    constants = {int(c) for c in re.findall(r"_mm256_set1_epi16\((\d{4})\)", text)}
    assert len(constants) == 1
    (constant,) = constants
    low, high = np.meshgrid(np.arange(243), np.arange(243))
    assert ((low * constant >> 16) == low // 9).all()
    assert ((high * 256 + low) * constant >> 24 == high // 9).all()


@every_isa
def test_sums_of_isolated_codes_fit_their_lanes(isa):
    """panel_indices: codes up to 2, and PART_LIMIT / 2 quads, of which a lane of int16 takes two products each."""
    limit = isa_module(isa)["PART_LIMIT"]
    names = [name for name in NAMES if (name.op, name.scheme, name.isa) == ("gemm", "tl2", isa)]
    for name in names:
        parts = re.findall(r"min\(n_quads, (\d+)\)", source(name))
        assert len(parts) == (isa_module(isa)["MICRO"][4] if limit else 0)
        assert all(int(quads) * 2 * 2 * 127 <= 2**15 - 1 and int(quads) * 2 * 2 * 128 <= 2**15 for quads in parts)
    assert 2 * 128 * kernels.SEGMENT_COLUMNS < 2**31
    assert names or isa in ("avx512vbmi", "avxvnni")  # they leave tl2 to the next lower set


@pytest.mark.parametrize(("scheme", "weights"), [("tl1", PAIRS), ("tl2", TRIPLES)])
def test_indices_become_the_codes_of_the_scheme(scheme, weights):
    for name in [name for name in NAMES if (name.op, name.scheme) == ("gemm", scheme)]:
        rows = re.findall(r"static const signed char (W|CODES)(\d)\[16\] = \{([-\d, ]*)\};", source(name))
        assert [int(column) for _, column, _ in rows] == list(range(weights.shape[1]))
        for (table, _, values), column in zip(rows, weights.T, strict=True):
            assert [int(v) for v in values.split(",")] == (column + (table == "CODES")).tolist()


def test_table_sums_fit_their_lanes():
    blocks = int(re.search(r"min\(b \+ (\d+), n_blocks\)", source(KernelName("gemv_i8_tl2_64x24__scalar")))[1])
    assert 8 * 14 <= 127  # int8: a digit of each of a block's eight lookups
    assert blocks * 8 * 3 * 128 <= 2**15 - 1  # int16: three activations an entry


@pytest.mark.parametrize("isa", ["avx2", "avx512vnni", "avx512vbmi"])
def test_panels_are_verified(isa):
    """As many tokens and tiles as panels begin at, also where that number has been raised."""
    loaded = render.environment().get_template(f"isa/{isa}.pyx.j2")
    module = loaded.make_module({"op": "gemm", "scheme_name": "i2", "isa_name": isa, "rows": 4, "block": 64})
    for rows, tokens in module.PANEL_TOKENS.items():
        scheme = {4: "i2_4x64", 5: "base3_5x64"}[rows]
        cases = list(verify.cases(KernelName(f"gemm_i8_{scheme}__{isa}"), np.random.default_rng(0), 1))
        panels = [case for case in cases if len(case.x_q) >= tokens and len(case.w_q) >= rows * module.LANES]
        assert len(panels) >= 5 and any("all weights" in str(case) for case in panels)
        assert tokens <= 24  # what test_kernels.py takes as the beginning
