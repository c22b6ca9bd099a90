"""The command line as a user meets it: texts, JSON, exit codes, one sentence on failure."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import bitnet_ref as br
from bitnet_ref import kernels
from bitnet_ref.cli import main
from bitnet_ref.commands.model import packaged_model
from bitnet_ref.formats import open_checkpoint


def run(*arguments, expect=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == expect, result.output
    return result


def sentence(result):
    """The one line that a failure prints, without its prefix."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and result.stdout == "", result.output
    return lines[0].removeprefix("Error: ")


def test_kernels_lists_every_variant():
    rows = json.loads(run("kernels", "--json").stdout)
    assert [row["name"] for row in rows] == [str(name) for name in kernels.compiled(*kernels.OPS)]
    assert set(rows[0]) == {"name", "op", "scheme", "isa", "compiled", "supported", "active"}
    active = {(row["op"], row["scheme"]): row["name"] for row in rows if row["active"]}
    for scheme in br.schemes():
        for op in ("gemv", "gemm"):
            assert active[op, scheme] == kernels.select(op, scheme).name
    text = run("kernels").stdout
    assert all(row["name"] in text for row in rows)


def test_module_prints_the_same_table():
    module = subprocess.run([sys.executable, "-m", "bitnet_ref.kernels"], capture_output=True, text=True, check=True)
    assert module.stdout == run("kernels").stdout


@pytest.mark.parametrize("cap", [None, "scalar"])
def test_verify_counts_kernels_and_cases(monkeypatch, cap):
    if cap:
        monkeypatch.setenv("BITNET_REF_ISA", cap)
    names = kernels.supported("gemv", "gemm", "lut", "dotrows", "addrows")
    found = json.loads(run("verify", "--examples", 1, "--seed", 3, "--json").stdout)
    assert found["kernels"] == [str(name) for name in names] and found["seed"] == 3 and found["equal"] is True
    text = run("verify", "--examples", 1, "--seed", 3).stdout
    assert text.startswith(f"{len(names)} kernels equal the reference exactly on {found['cases']} cases (seed 3")


def test_verify_fails_and_names_the_difference(monkeypatch):
    name = kernels.select("gemm", "base3").name
    honest = kernels.Kernel.__call__

    def broken(self, x_q, packed, **options):
        out = honest(self, x_q, packed, **options)
        if self.name == name and packed.shape[0] > 2:
            out[..., 2] += 1
        return out

    monkeypatch.setattr(kernels.Kernel, "__call__", broken)
    message = sentence(run("verify", expect=1))
    assert message.startswith(f"{name} differs from the reference on ")
    assert "M = " in message and "K = " in message and "first at index (0, 2)" in message


def test_impossible_instruction_set_is_one_sentence(monkeypatch):
    monkeypatch.setenv("BITNET_REF_ISA", "pentium")
    assert sentence(run("kernels", expect=1)).startswith("BITNET_REF_ISA must be one of scalar, ")
    assert sentence(run("verify", expect=1)).startswith("BITNET_REF_ISA must be one of scalar, ")


def test_usage_errors_exit_with_2():
    for arguments in (["verify", "--examples", "many"], ["verify", "--what"], ["inspect"], ["nothing"]):
        run(*arguments, expect=2)


def test_impossible_values_are_one_sentence(tmp_path):
    for arguments in (["--examples", 0], ["--seed", -1]):
        message = sentence(run("verify", *arguments, expect=1))
        assert message.startswith("seed must be at least 0 and examples at least 1, got ")
    (tmp_path / "file").write_text("")
    assert "file" in sentence(run("paper", "--quick", "--out", tmp_path / "file", expect=1))


def test_inspect(tmp_path):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(256, 512)).astype(np.float32)
    save_file(
        {"model.layers.0.mlp.up_proj.weight": w, "model.norm.weight": np.ones(512, np.float32)},
        tmp_path / "a.safetensors",
    )
    rows = {
        row["name"]: row for row in json.loads(run("inspect", tmp_path / "a.safetensors", "--json").stdout)["tensors"]
    }
    row = rows["model.layers.0.mlp.up_proj.weight"]
    assert row["shape"] == [256, 512] and row["stored_bytes"] == w.nbytes
    assert row["fraction_zeros"] == pytest.approx((br.quantize_weights(w)[0] == 0).mean())
    text = run("inspect", tmp_path / "a.safetensors").stdout
    assert "up_proj" in text and "256 x 512" in text and f"{row['fraction_zeros']:.1%}" in text


@pytest.mark.parametrize("form", ["hf-packed", "packed", "gguf-tq1_0", "gguf-i2_s"])
def test_inspect_of_a_model_accounts_for_every_byte(tmp_path, form):
    run("convert", packaged_model(), tmp_path / "m", "--to", form)
    found = json.loads(run("inspect", tmp_path / "m", "--json").stdout)
    files = sorted((tmp_path / "m").iterdir()) if form == "hf-packed" else [tmp_path / "m"]
    memory = {row["part"]: row for row in found["memory"]}
    assert memory["all files"]["bytes"] == found["file_bytes"] == sum(file.stat().st_size for file in files)
    assert sum(part["stored_bytes"] for part in found["account"]) == found["file_bytes"]
    # The integers are the same in every form, so are the zeros.
    checkpoint = open_checkpoint(packaged_model())
    for layer in found["layers"]:
        names = [name for name in checkpoint.entries if f"layers.{layer['layer']}." in name and "proj" in name]
        w_q = np.concatenate([checkpoint[name].w_q.ravel() for name in names])
        assert (layer["n_weights"], layer["n_zeros"]) == (w_q.size, int((w_q == 0).sum()))
    assert memory["printed for BitNet b1.58 2B4T (2.08e9 ternary weights), without embedding"]["bytes"] == 400_000_000
    text = run("inspect", tmp_path / "m").stdout
    assert "memory account" in text and f"{found['file_bytes']:,}" in text and "hidden_size = 256" in text


def test_inspect_says_why_a_file_is_no_model(tmp_path):
    save_file({"a": np.ones((2, 3), np.float32)}, tmp_path / "a.safetensors")
    assert (
        "has no configuration" in json.loads(run("inspect", tmp_path / "a.safetensors", "--json").stdout)["not_a_model"]
    )


def test_inspect_prints_names_as_they_are(tmp_path):
    names = ["w[/foo].weight", "[red]x[/red].weight"]
    save_file({name: np.ones((2, 3), np.float32) for name in names}, tmp_path / "[a].safetensors")
    text = run("inspect", tmp_path / "[a].safetensors").stdout
    assert all(name in text for name in [*names, "[a].safetensors"])


def test_inspect_refuses_in_one_sentence(tmp_path):
    assert "missing.gguf" in sentence(run("inspect", tmp_path / "missing.gguf", expect=1))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    assert "broken.gguf" in sentence(run("inspect", tmp_path / "broken.gguf", expect=1))
    assert sentence(run("inspect", tmp_path, expect=1))


@pytest.fixture(scope="module")
def quick_report(tmp_path_factory):
    """One quick report from this very machine, with a weight file."""
    folder = tmp_path_factory.mktemp("paper")
    w = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    save_file({"model.layers.0.mlp.up_proj.weight": w}, folder / "w.safetensors")
    printed = run("paper", "--quick", "--out", folder / "out", "--weights", folder / "w.safetensors", "--json").stdout
    assert json.loads(printed)["report"] == str(folder / "out" / "report.html")
    return folder / "out"


def test_paper_writes_results_of_stated_kinds(quick_report):
    results = json.loads((quick_report / "results.json").read_text())
    assert {"record", "memory", "energy", "speed"} <= set(results)
    for table in ("memory", "energy", "speed", "limits"):
        assert results[table] and {row["kind"] for row in results[table]} <= {"measured", "modelled", "quoted"}
    assert {row["kind"] for row in results["speed"]} == {"measured"}
    published = {0.258, 0.186, 0.347, 0.425, 0.649, 0.028}
    assert {row["published_joules"] for row in results["energy"]} == published
    for row in results["energy"]:
        assert row["modelled_joules"] == pytest.approx(row["published_joules"], rel=0.01), row["model"]
    columns = {"kernel", "m", "k", "tokens", "threads", "median_ns", "weights_per_s", "read_bandwidth_fraction"}
    for row in results["speed"]:
        assert columns <= set(row) and row["verified"] is True
        expected = row["tokens"] * row["m"] * row["k"] / row["median_ns"] * 1e9
        assert row["weights_per_s"] == pytest.approx(expected) and row["low_ns"] <= row["median_ns"] <= row["high_ns"]
    timed = {row["kernel"] for row in results["speed"]}
    assert "numpy_float32" in timed and str(kernels.select("gemv", "base3").name) in timed
    assert "gemv_i8_i2_4x64__scalar" in timed


def test_paper_writes_figures_and_page(quick_report):
    names = {path.name for path in (quick_report / "figures").iterdir()}
    assert {name.rsplit(".")[0] for name in names if name.endswith(".png")} == {
        name.rsplit(".")[0] for name in names if name.endswith(".pdf")
    }
    assert len(names) >= 20
    page = (quick_report / "report.html").read_text()
    assert "412.9" in page and "416.8" in page and "521.0" in page and "71.4" in page
    assert "w.safetensors" in page


def test_paper_refuses_a_bad_weight_file_before_measuring(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    assert "bad.gguf" in sentence(run("paper", "--out", tmp_path / "out", "--weights", tmp_path / "bad.gguf", expect=1))
    assert not (tmp_path / "out" / "report.html").exists()
