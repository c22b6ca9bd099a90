"""The report: from results to figures to one page, without measuring anything.

Memory and energy are the real tables. The rows of speed are MADE UP here, by a rule that gives easy numbers: they test
how the report shows measurements, not any measurement.
"""

import importlib
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from bitnet_ref import paper_figures, report
from bitnet_ref.errors import BitnetRefError
from bitnet_ref.measure import energy
from bitnet_ref.measure.provenance import KINDS
from bitnet_ref.report import html

# The package has a function of the same name.
collecting = importlib.import_module("bitnet_ref.report.collect")

# Kernel -> (op, scheme, isa, bits a weight, made-up 10^9 weights/s on one thread).
MADE_UP_KERNELS = {
    "gemv_i8_i2_4x64__scalar": ("gemv", "i2", "scalar", 2.0, 2.0),
    "gemv_i8_i2_4x64__avx2": ("gemv", "i2", "avx2", 2.0, 80.0),
    "gemv_i8_base3_5x64__scalar": ("gemv", "base3", "scalar", 1.6, 1.5),
    "gemv_i8_base3_5x64__avx512vbmi": ("gemv", "base3", "avx512vbmi", 1.6, 123.0),
    "gemm_i8_i2_4x64__scalar": ("gemm", "i2", "scalar", 2.0, 2.5),
    "gemm_i8_i2_4x64__avx2": ("gemm", "i2", "avx2", 2.0, 180.0),
    "gemm_i8_base3_5x64__avx512vbmi": ("gemm", "base3", "avx512vbmi", 1.6, 1234.0),
}
MADE_UP_BANDWIDTH = {1: 30e9, 2: 40e9}


def made_up_speed(threads=(1, 2), shapes=((2560, 2560), (6912, 2560))):
    rows = []
    for tokens, (m, k), count in itertools.product((1, 128), shapes, threads):
        programs = [(name, *about) for name, about in MADE_UP_KERNELS.items()]
        programs = [p for p in programs if p[1] == ("gemv" if tokens == 1 else "gemm")]
        programs.append(("numpy_float32", programs[0][1], None, None, 32.0, 6.0 if tokens == 1 else 60.0))
        for name, op, scheme, isa, bits, rate in programs:
            ns = tokens * m * k / (rate * (1.25 if count > 1 else 1.0))
            weight_bytes = int(m * k * bits / 8)
            rows.append(
                {
                    "kind": "measured",
                    "program": "numpy" if scheme is None else "bitnet_ref",
                    "kernel": name,
                    "op": op,
                    "scheme": scheme,
                    "isa": isa,
                    "weight_bytes": weight_bytes,
                    "m": m,
                    "k": k,
                    "tokens": tokens,
                    "threads": count,
                    "median_ns": ns,
                    "low_ns": 0.9 * ns,
                    "high_ns": 1.2 * ns,
                    "repeats": 7,
                    "weights_per_s": tokens * m * k / ns * 1e9,
                    "read_bandwidth_fraction": weight_bytes / ns * 1e9 / MADE_UP_BANDWIDTH[count],
                    "verified": True,
                }
            )
    return rows


def made_up_limits(threads=(1, 2)):
    def limit(what, isa, count, rate, unit):
        spread = {"median_per_s": rate, "low_per_s": 0.9 * rate, "high_per_s": 1.1 * rate}
        return {"kind": "measured", "what": what, "isa": isa, "threads": count, **spread, "unit": unit, "repeats": 7}

    rows = [limit("read_bandwidth", None, count, MADE_UP_BANDWIDTH[count], "B/s") for count in threads]
    for isa, rate in (("scalar", 3e9), ("avx2", 200e9), ("avx512vnni", 1500e9)):
        rows += [limit("int8_multiply_adds", isa, count, rate * count, "MAC/s") for count in threads]
    return rows


RECORD = {
    "date": "2026-01-01T00:00:00+00:00",
    "command": "a test",
    "version": "0",
    "commit": None,
    "cpu": "made-up <processor> & co",
    "cores": 2,
    "cache_bytes": 2**25,
    "memory_bytes": None,
    "isas": ["scalar", "avx2"],
    "isa_cap": None,
    "active": {"gemv i2": "gemv_i8_i2_4x64__avx2"},
    "openmp": True,
    "load_average": [0.1, 0.2, 0.3],
    "quick": False,
    "seconds": 12.0,
}


def made_up_model(scheme="i2", head="q8_0"):
    shares = dict.fromkeys(("product_fraction", "head_fraction", "python_fraction"), 0.25)
    speeds = {"decode_tokens_per_s": 20.0, "prefill_tokens_per_s": 40.0, "read_bandwidth_bytes_per_s": 30e9}
    about = {"model": "random", "scheme": scheme, "head": head, "threads": 2, "n_prompt": 8, "n_generate": 16}
    moved = {"bytes_per_token": 750_000_000, "read_bandwidth_fraction": 0.5}
    return {**about, **speeds, **moved, **shares, "kind": "measured", "source": "made up"}


def made_up_results(**changes):
    return {
        "record": RECORD,
        **collecting.modelled_results(),
        "speed": made_up_speed(),
        "limits": made_up_limits(),
        "model_speed": [made_up_model(), made_up_model("base3", "f16")],
        "energy_measured": {"kind": "measured", "available": False, "reason": "not available: made up"},
        **changes,
    }


@pytest.fixture
def weight_file(tmp_path):
    """Two Gaussian linear layers and a norm, as a safetensors file."""
    safetensors = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": rng.normal(size=(96, 128)).astype(np.float32) for i in range(2)}
    tensors["model.norm.weight"] = np.ones(128, np.float32)
    path = tmp_path / "made_up.safetensors"
    safetensors.save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(results, directory) of a written report without weights."""
    results = made_up_results()
    out = tmp_path_factory.mktemp("report") / "not" / "there" / "yet"
    assert report.write(results, out) == out / "report.html"
    return results, out


def tables_in(value, where="results"):
    """Every list of dictionaries in the results, with a name for it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from tables_in(item, f"{where}.{key}")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield where, value


class Page(HTMLParser):
    """What a page loads and refers to, its ids, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.links, self.ids, self.words = set(), [], [], set(), []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        self.loads += [attrs[name] for name in ("src", "srcset", "data", "action", "poster") if name in attrs]
        self.links += [attrs["href"]] if "href" in attrs else []
        self.ids |= {attrs["id"]} if "id" in attrs else set()

    def handle_data(self, data):
        self.words.append(data)


# ------------------------------------------------------------------------------------------------------- results
def test_every_row_names_its_kind(weight_file):
    results = made_up_results(weights=collecting.weight_results(weight_file))
    found = dict(tables_in(results))
    assert set(found) >= {
        "results.memory",
        "results.energy",
        "results.energy_parts",
        "results.energy_left_out",
        "results.energy_bitnet_table",
        "results.energy_b158",
        "results.energy_implied_watts",
        "results.speed",
        "results.limits",
        "results.weights.tensors",
    }
    for where, rows in found.items():
        for row in rows:
            kinds = [value for key, value in row.items() if key == "kind" or key.endswith("_kind")]
            assert kinds and set(kinds) <= set(KINDS), (where, row)


def test_six_energies_and_all_memory_tables():
    results = collecting.modelled_results()
    assert [row["model"] for row in results["energy"]] == list(energy.PUBLISHED_JOULES)
    assert {row["table"] for row in results["memory"]} == {"steps", "account", "body", "embedding", "rivals", "kv"}


def test_what_is_computed_from_quoted_figures_is_modelled():
    titles = {table.title: table for table in html.tables(made_up_results())["energy"]}
    implied = titles["What measurements of others imply: joules a token times tokens a second"]
    assert {column.heading: column.kind for column in implied.columns if column.numeric} == {
        "energy": "quoted",
        "speed": "quoted",
        "power implied": "modelled",
        "saving": "modelled",
        "saving that the speed-up alone would give": "modelled",
    }
    # Over the whole of the results: a kind of its own is given to no row but for what others printed.
    assert all(row["kind"] != "quoted" for _, rows in tables_in(collecting.modelled_results()) for row in rows)


def test_account_table_has_every_part_of_every_model():
    (table,) = (t for t in html.tables(made_up_results())["memory"] if t.title.startswith("Every part"))
    cells = {row[:2]: row[2:] for row in table.cells}
    expected = ("1,336,736,320", "521,011,200", "6,720", "1,761,280", "0", "656,670,720", "157,286,400")
    assert cells["BitNet b1.58 2B4T", "I2_S"] == expected
    assert len({model for model, _ in cells}) == 6 and "2,048 tokens" in table.note
    assert {column.kind for column in table.columns if column.numeric} == {"modelled"}


def test_whole_models_are_shown():
    made = {table.title: table for table in html.tables(made_up_results())["models"]}
    parity, files, speed = made.values()
    assert len(parity.cells) == 12 and "commit" in parity.sources[0] and "not on this machine" in parity.sources
    by_layer = [column.heading for column in parity.columns].index("worst of each layer")
    assert [len(row[by_layer].split(", ")) for row in parity.cells[:3]] == [3, 2, 2]
    assert {column.kind for column in files.columns if column.numeric} == {"modelled"}
    cells = {row[:2]: row[2:] for row in files.cells}
    # The account of I2_S, f16: body, scales and norms, embedding; 2.95 times the printed 0.4 GB.
    assert cells["GGUF I2_S", "f16"] == ("521,011,200", "1,768,000", "656,670,720", "1,179,449,920", "2.95")
    assert speed.cells[1][:4] == ("base3", "f16", "2", "20.0") and "30.0 GB/s" in speed.note


def test_real_files_add_up():
    rows = collecting.file_results()
    assert len(rows) == 21 and {row["kind"] for row in rows} == {"measured"}
    for row in rows:
        parts = ("matrices_bytes", "small_bytes", "embedding_bytes", "header_bytes")
        assert sum(row[part] for part in parts) == row["total_bytes"]
    # 2,359,296 weights of whole blocks: 54 bytes for 256 of them, and 2 bits each with a scale of their own.
    bytes_of = {row["form"]: row["matrices_bytes"] for row in rows}
    assert bytes_of["GGUF TQ1_0"] == 2_359_296 // 256 * 54 and bytes_of["GGUF I2_S"] == 2_359_296 // 4


def test_parts_add_up_to_the_last_case():
    parts = collecting.energy_parts_rows()
    whole = {(row.phase, row.model): row.joules for row in energy.left_out_rows() if row.case.endswith("memory")}
    assert len(parts) == 4 * len(whole)
    for (phase, model), joules in whole.items():
        # The same four terms in another order: equal but for rounding.
        assert sum(row["joules"] for row in paper_figures.select(parts, phase=phase, model=model)) == pytest.approx(
            joules, rel=1e-12
        )


def test_collect_asks_for_speed_once_and_reports_progress(monkeypatch, weight_file):
    asked, seen = [], []

    def measure(quick, progress):
        asked.append(quick)
        progress("half", 0.5)
        return made_up_speed(), made_up_limits()

    monkeypatch.setattr(collecting.speed, "measure", measure)
    monkeypatch.setattr(collecting.model_speed, "measure_model_speed", lambda quick, progress: [made_up_model()])
    monkeypatch.setattr(collecting, "record", lambda command: {"command": command})
    monkeypatch.setattr(collecting, "measure_energy", lambda seconds: {"kind": "measured", "available": False})
    results = report.collect(quick=True, weights=weight_file, command="x", progress=lambda *call: seen.append(call))
    assert asked == [True]
    assert set(results) == {
        *("record", "limits", "speed", "memory", "energy", "weights"),
        *("energy_parts", "energy_left_out", "energy_bitnet_table", "energy_b158", "energy_implied_watts"),
        *("energy_measured", "model_speed", "model_files", "parity", "training"),
    }
    assert results["record"]["quick"] is True and results["record"]["seconds"] >= 0
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions) and fractions[0] >= 0 and fractions[-1] <= 1


def test_a_bad_weight_file_fails_before_anything_is_timed(monkeypatch, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"not a model")
    monkeypatch.setattr(collecting.speed, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(BitnetRefError):
        report.build(tmp_path / "out", quick=True, weights=path, command="x")
    assert not list((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------------------------- energy counters
@pytest.fixture
def counter(tmp_path):
    """A powercap directory with one zone whose counter stands at 0."""
    zone = tmp_path / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("1000000000000\n")
    (zone / "energy_uj").write_text("0\n")
    return zone / "energy_uj"


def test_no_counter_is_said_so(tmp_path):
    found = collecting.measure_energy(0.01, root=tmp_path / "none")
    assert found["available"] is False and found["reason"].startswith("not available: ")


def test_joules_for_1e9_weights(counter):
    def work():  # 2 J for 4e9 weights
        counter.write_text(str(int(counter.read_text()) + 2_000_000))
        return 4_000_000_000

    found = collecting.measure_energy(0.02, work, counter.parents[1])
    idle, loaded = found["rows"]
    assert (idle["joules"], idle["joules_per_1e9_weights"]) == (0, None)
    assert loaded["joules"] >= 2 and loaded["joules_per_1e9_weights"] == pytest.approx(0.5, rel=1e-12)  # rounding only
    page = html.render(made_up_results(energy_measured=found), [])
    assert "intel-rapl:0 package-0" in page and "not available" not in Page(page).text


# --------------------------------------------------------------------------------------------------------- files
def test_results_file_holds_the_results(written):
    results, out = written
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results


def test_figures_are_png_and_pdf(written):
    _, out = written
    names = [name for name in paper_figures.FIGURES if name != "fig_weights"]
    assert sorted(path.name for path in (out / "figures").iterdir()) == sorted(
        name + suffix for name in names for suffix in (".png", ".pdf")
    )
    for name in names:
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(path.name for path in out.iterdir()) == ["figures", "report.html", "results.json"]


def test_page_is_self_contained(written):
    _, out = written
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    assert len(page.loads) == len(paper_figures.FIGURES) - 1
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    outside_images = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert "url(" not in outside_images and "@import" not in outside_images and "://" not in outside_images


def test_page_has_every_figure_with_kinds_and_every_section(written):
    _, out = written
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.ids >= {"summary", "memory", "energy", "speed", "machine", "references"}
    assert "weights" not in page.ids
    for name in paper_figures.FIGURES:
        module = paper_figures.load(name)
        assert set(module.KINDS) <= set(KINDS) and module.KINDS
        assert (name in page.ids) == (name != "fig_weights")
        if name in page.ids:
            assert module.CAPTION in page.text


def test_page_prints_no_missing_or_infinite_number(written):
    _, out = written
    text = Page((out / "report.html").read_text(encoding="utf-8")).text
    assert not re.search(r"\b(nan|NaN|inf|None|True|False)\b", text)


def test_text_from_outside_is_escaped(written):
    _, out = written
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "made-up &lt;processor&gt; &amp; co" in text and "<processor>" not in text


def test_summary_numbers(written):
    _, out = written
    summary = re.search(r'<section class="box".*?</section>', (out / "report.html").read_text(encoding="utf-8"), re.S)
    text = Page(summary[0]).text
    # Memory and energy: the figures that the 2B4T architecture must give. Speed: the made-up rates above, their share
    # of the made-up bandwidth (123e9 * 1.6 / 8 / 30e9 = 82 %) and their ratios.
    for expected in (
        *("412.9 MB", "416.8 MB", "521.0 MB", "1,179.4 MB", "4.09 times", "56 %"),
        *("within 0.7 %", "72 %", "85 to 96 %", "48 to 81 %", "41 to 78 %"),
        "Not available: made up",
        "On 1 thread gemv_i8_base3_5x64__avx512vbmi does 123 · 10⁹ weights a second, 82 % of the read bandwidth, "
        "20.5 times NumPy float32",
        "gemm_i8_base3_5x64__avx512vbmi does 1,234 · 10⁹ multiply-adds a second",
    ):
        assert expected in text, expected


def test_a_disturbed_run_says_so():
    quiet = made_up_results()
    assert html.cautions(quiet) == []
    assert "Caution" not in html.render(quiet, [])
    busy = made_up_results(record={**RECORD, "load_average": [1.5, 1.0, 1.0]})
    for row in busy["speed"]:
        if row["tokens"] == 1 and row["threads"] == 2:
            row["weights_per_s"] /= 100
    load, slow = html.cautions(busy)
    assert "1.5 on 2 processors" in load
    expected = "On 2 threads the fastest kernel with 1 token was below that on 1 thread (1.54 against 123 · 10⁹/s)."
    assert slow.startswith(expected)
    assert html.render(busy, []).count("Caution.") == 2


def slower_kernels(results, tokens):
    for row in results["speed"]:
        if row["tokens"] == tokens and row["threads"] == 2 and row["program"] != "numpy":
            row["weights_per_s"] /= 2


def slower_memory(results):
    (row,) = paper_figures.select(results["limits"], what="read_bandwidth", threads=2)
    row["median_per_s"] = 12e9


@pytest.mark.parametrize(
    ("disturb", "said"),
    [
        (slower_memory, "the read bandwidth was below that on 1 thread (12 against 30 GB/s)"),
        (lambda results: slower_kernels(results, 1), "the fastest kernel with 1 token was below that on 1 thread"),
        (lambda results: slower_kernels(results, 128), "the fastest kernel with 128 tokens was below that on 1 thread"),
    ],
    ids=["bandwidth", "one token", "many tokens"],
)
def test_the_summary_gives_no_ratios_for_disturbed_threads(disturb, said):
    results = made_up_results()
    quiet = [finding.text for finding in html.findings(results) if finding.subject.startswith("Speed")]
    assert all("On 2 threads" in text and text.count("times NumPy") == 2 for text in quiet)
    disturb(results)
    found = [finding.text for finding in html.findings(results) if finding.subject.startswith("Speed")]
    assert len(found) == 2
    for text, before in zip(found, quiet, strict=True):
        # One thread as before, then one sentence without a figure.
        kept, added = text.split(" The run on 2 threads ")
        assert before.startswith(kept) and kept.count("times NumPy") == 1
        assert added == "was disturbed and gives no ratios; see below."
    for row in html._best_gemv_table(results).cells:
        assert (row[-3:] == ("–", "–", "–")) == (row[1] == "2"), row
    (caution,) = html.cautions(results)
    assert said in caution
    page = Page(html.render(results, [])).text
    assert said in page and "where the run was disturbed" in page


def test_threads_are_compared_with_any_fewer():
    results = made_up_results(speed=made_up_speed((1,)), limits=[])
    for threads, rate in ((1, 30e9), (2, 12e9), (4, 20e9), (8, 31e9)):
        limit = {**made_up_limits((1,))[0], "threads": threads, "median_per_s": rate}
        results["limits"].append(limit)
    assert set(html.disturbances(results)) == {2, 4}


def test_best_table_divides_by_the_scalar_kernel_of_the_same_packing():
    table = html._best_gemv_table(made_up_results())
    cells = {(row[0], row[1]): row[2:] for row in table.cells}
    assert cells["i2", "1"] == ("gemv_i8_i2_4x64__avx2", "80.0", "67", "40.0", "13.3")
    assert cells["base3", "2"] == ("gemv_i8_base3_5x64__avx512vbmi", "153.8", "77", "82.0", "20.5")


def test_columns_with_numbers_name_unit_and_kind(weight_file):
    results = made_up_results(weights=collecting.weight_results(weight_file))
    without_unit = {"threads", "tokens", "rounds", "scale"}
    for table in itertools.chain.from_iterable(html.tables(results).values()):
        assert table.sources and table.cells
        for column in table.columns:
            if column.numeric:
                assert column.unit or column.heading in without_unit, (table.title, column)
                assert column.kind in KINDS or column.heading in {"threads", "tokens"}, (table.title, column)


def test_references_are_those_of_the_package_and_cover_the_page(written):
    _, out = written
    known = dict(html.references())
    assert known["[2B4T]"].startswith("BitNet b1.58 2B4T Technical Report")
    text = Page((out / "report.html").read_text(encoding="utf-8")).text
    cited = {f"[{key}]" for key in re.findall(r"\[([A-Za-z0-9.-]*[A-Za-z][A-Za-z0-9.-]*)[\],]", text)}
    assert "[2B4T]" in cited and cited <= set(known)


# ------------------------------------------------------------------------------------------------------- failures
def test_a_failing_figure_leaves_no_report(monkeypatch, tmp_path):
    monkeypatch.setattr(paper_figures.load("fig_roofline"), "draw", lambda results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(made_up_results(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failing_run_keeps_the_old_report(monkeypatch, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "figures" / "fig_roofline.png").write_text("old")
    monkeypatch.setattr(report, "render", lambda results, figures: 1 / 0)
    monkeypatch.setattr(report, "figures_of", lambda results, folder: [])
    with pytest.raises(ZeroDivisionError):
        report.write(made_up_results(), tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert (tmp_path / "figures" / "fig_roofline.png").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.html"]


def test_nan_is_refused(tmp_path):
    results = made_up_results()
    results["speed"][0]["median_ns"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        report.write(results, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_is_refused_before_measuring(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(report, "collect", lambda **_: pytest.fail("measured"))
    with pytest.raises(BitnetRefError, match="directory"):
        report.build(tmp_path / "file", quick=True, weights=None, command="x")


# -------------------------------------------------------------------------------------------------------- figures
def test_weights_section(weight_file, tmp_path):
    results = made_up_results(weights=collecting.weight_results(weight_file))
    assert str(weight_file.parent) not in json.dumps(results["weights"])
    folder = tmp_path / "figures"
    folder.mkdir()
    (drawn,) = html.figures_of({"weights": results["weights"]}, folder)
    assert (folder / "fig_weights.png").exists() and drawn.section == "weights"
    page = Page(html.render(results, [drawn]))
    assert {"weights", "fig_weights"} <= page.ids
    assert "made_up.safetensors" in page.text and "model.layers.1.mlp.up_proj.weight" in page.text


def test_caption_says_that_weights_were_dequantised(weight_file, tmp_path):
    weights = collecting.weight_results(weight_file)
    (plain,) = html.figures_of({"weights": weights}, tmp_path)
    assert plain.caption == paper_figures.load("fig_weights").CAPTION and "dequantised" not in plain.caption
    weights["histogram"]["dequantised_from"] = ["Q4_1", "Q8_0"]
    (drawn,) = html.figures_of({"weights": weights}, tmp_path)
    assert drawn.caption.startswith(plain.caption) and "stores as Q4_1 and Q8_0 were dequantised" in drawn.caption
    figure = paper_figures.load("fig_weights").draw({"weights": weights})
    assert "(dequantised from Q4_1, Q8_0)" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize("name", [name for name in paper_figures.FIGURES if re.match("fig_(gem|roof)", name)])
def test_one_thread_and_one_shape_can_be_drawn(name, tmp_path):
    results = {"speed": made_up_speed((1,), ((640, 2560),)), "limits": made_up_limits((1,))}
    paper_figures.save(paper_figures.load(name).draw(results), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_no_text_is_cut_off():
    rng = np.random.default_rng(0)
    layer = {"role": "linear", "fraction_zeros": 0.31, "relative_error": 0.52}
    counts = rng.integers(0, 9, 160).tolist()
    histogram = {"edges": np.linspace(-4, 4, 161).tolist(), "counts": counts, "n_outside": 3, "fraction_zeros": 0.31}
    histogram["dequantised_from"] = ["Q4_1", "Q8_0"]
    weights = {"file": "made_up.safetensors", "tensors": [layer] * 9, "histogram": histogram}
    results = made_up_results(weights=weights)
    for name in paper_figures.FIGURES:
        figure = paper_figures.load(name).draw(results)
        FigureCanvasAgg(figure).draw()
        texts = [*figure.texts, *itertools.chain.from_iterable(legend.get_texts() for legend in figure.legends)]
        for axes in figure.axes:
            # The title of an axes is one of three places.
            texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
            texts += axes.get_legend().get_texts() if axes.get_legend() else []
        assert any(text.get_text() == figure.get_suptitle() != "" for text in texts)
        for text in texts:
            box = text.get_window_extent()
            inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            inside &= figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
            assert inside or not text.get_text(), (name, text.get_text(), box)


def test_figures_are_the_same_bytes_each_time(tmp_path):
    draw = paper_figures.load("fig_memory_embedding").draw
    for suffix in ("png", "pdf"):
        first, second = tmp_path / f"1.{suffix}", tmp_path / f"2.{suffix}"
        for path in (first, second):
            paper_figures.save(draw(collecting.modelled_results()), path)
        assert first.read_bytes() == second.read_bytes()


def test_steps_of_memory_split_without_loss():
    steps = {
        row["step"]: row["mb"] for row in paper_figures.select(collecting.modelled_results()["memory"], table="steps")
    }
    parts = paper_figures.load("fig_memory_steps")._parts(steps)
    for step, total in steps.items():
        assert sum(parts[step]) == pytest.approx(total, rel=1e-12)  # sums and differences of the same numbers
    assert parts["+ embedding in f16"][1] == pytest.approx(656.67072)  # 128,256 x 2560 values of two bytes
    assert parts["+ KV cache, 2048 tokens"][2] == pytest.approx(157.2864)  # 150 MiB


def test_rate_of_an_instruction_set_without_a_probe_is_the_highest():
    limits = made_up_limits()
    assert paper_figures.probe_macs_per_s(limits, "avx2", 1) == 200e9
    assert paper_figures.probe_macs_per_s(limits, "avx512vbmi", 2) == 3000e9
    assert paper_figures.probe_macs_per_s(limits, None, 1) is None


def test_a_probe_is_not_called_a_bound(written):
    _, out = written
    for name in ("fig_gemm_speed", "fig_roofline", "fig_gemv_bandwidth"):
        caption = paper_figures.load(name).CAPTION
        assert "not a proven bound" in caption or "not proven bounds" in caption
        assert "slightly above" in caption
    text = Page((out / "report.html").read_text(encoding="utf-8")).text
    assert "not a proven bound: a kernel may come out slightly above it" in text and "peak" not in text


@pytest.mark.parametrize(("value", "text"), [(0.1234, "0.123"), (12.34, "12.3"), (999.6, "1,000"), (1620.4, "1,620")])
def test_three_digits(value, text):
    assert paper_figures.three_digits(value) == text


def test_a_figure_runs_as_a_script(monkeypatch, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(collecting.modelled_results()))
    monkeypatch.setattr("sys.argv", ["fig", str(tmp_path / "results.json"), str(tmp_path / "figure.pdf")])
    paper_figures.main(paper_figures.load("fig_memory_rivals").draw)
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_gaussian_reference_of_the_weight_figure():
    module = paper_figures.load("fig_weights")
    rng = np.random.default_rng(0)
    w = rng.normal(size=1_000_000)
    scale = np.abs(w).mean()
    q = np.clip(np.rint(w / scale), -1, 1)
    # Standard errors at a million samples are below 0.0005 for both.
    zeros, error = (q == 0).mean(), np.linalg.norm(w - scale * q) / np.linalg.norm(w)
    assert (zeros, error) == pytest.approx((paper_figures.GAUSSIAN_ZEROS, module._GAUSSIAN_ERROR), abs=0.002)


# ------------------------------------------------------------------------------------------------- training study
def test_the_study_has_every_model_of_every_seed_with_whole_curves():
    study = collecting.training_results()
    settings = study["settings"]
    kinds = ("full precision", "b1.58", "b1.58 without SubLN", "b1")
    runs = sorted((row["model"], row["seed"]) for row in study["scratch"])
    assert runs == sorted((kind, seed) for kind in kinds for seed in range(settings["seeds"]))
    assert len(study["continued"]) == 2 * settings["seeds"] and settings["seeds"] >= 3
    for row in study["scratch"] + study["continued"]:
        curve = row["curve"]
        assert curve["step"][-1] == settings["steps"]
        assert {len(column) for column in curve.values()} == {len(curve["step"])}
        ternary = row.get("model", "b1.58").startswith("b1.58")
        assert set(curve) == {"step", "loss"} | ({"zeros", "flips"} if ternary else set())
        if ternary:
            assert {len(point) for point in curve["zeros"] + curve["flips"]} == {len(settings["layers"])}
    n_weights = {sum(row[key]) for row in study["continued"] for key in ("histogram_before", "histogram_after")}
    assert len(n_weights) == 1
    assert "not on this machine" in study["source"]


def made_up_batches(isas=("avx2", "avx512vnni")):
    """One token takes 100 us, each further one 10: all on the line."""
    row = {"program": "bitnet_ref", "kind": "measured", "m": 2560, "k": 6912, "threads": 1, "verified": True}
    return [
        {
            **row,
            "scheme": scheme,
            "isa": isa,
            "kernel": f"{'gemv' if tokens == 1 else 'gemm'}_i8_{scheme}__{isa}",
            "tokens": tokens,
            "median_ns": (90 + 10 * tokens) * 1e3,
            "low_ns": (89 + 10 * tokens) * 1e3,
            "high_ns": (92 + 10 * tokens) * 1e3,
        }
        for isa, scheme, tokens in itertools.product(isas, ("i2", "tl1"), (*range(1, 17), 128))
    ]


@pytest.mark.parametrize("isas", [("avx2",), ("avx2", "avx512vnni")])
def test_small_batches_and_their_line(isas, tmp_path):
    figure_module = importlib.import_module("bitnet_ref.paper_figures.fig_small_batches")
    rows = made_up_batches(isas)
    for results in ({"rows": rows}, {"parts": {"batches": {"rows": rows}}}):
        figure = figure_module.draw(results)
        assert len(figure.axes) == len(isas)
        for axes in figure.axes:
            lines = [line for line in axes.lines if len(line.get_xdata()) == 128]
            dots = [line for line in axes.lines if line.get_marker() == "o"]  # not the caps of quartiles
            assert len(lines) == len(dots) == 2
            for line, dot in zip(lines, dots, strict=True):
                on_line = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
                for tokens, us in zip(dot.get_xdata(), dot.get_ydata(), strict=True):
                    assert us == pytest.approx(on_line[tokens], rel=1e-12)
                    assert us == pytest.approx((90 + 10 * tokens) / tokens, rel=1e-12)
    paper_figures.save(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_small_batches_want_one_token_and_many():
    figure_module = importlib.import_module("bitnet_ref.paper_figures.fig_small_batches")
    for missing in ({1}, {128}, set(range(2, 17))):
        rows = [row for row in made_up_batches() if row["tokens"] not in missing]
        with pytest.raises(
            ValueError, match=r"^this figure needs verified rows of one thread for 1, 128 and some of 2"
        ):
            figure_module.draw({"rows": rows})
