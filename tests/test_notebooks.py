"""The notebooks run from top to bottom, what is committed is what they give, and the script that runs them is safe.

Each notebook is run once, in a fresh kernel of this Python and in an empty folder. Outputs that no machine decides must
equal the committed ones, so a notebook whose code or library changed has to be run again (``make notebook``). Cells
tagged ``machine`` print what depends on the processor and may differ; cells tagged ``no-output`` only define something.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import tempfile
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

_spec = importlib.util.spec_from_file_location("notebooks_run", ROOT / "notebooks" / "run.py")
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)

TRAINING = {path for path in NOTEBOOKS if "import torch" in path.read_text(encoding="utf-8")}
"""These need the extra [distill]; ``make test-distill`` runs them."""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)

# Two or more folders from the root, or a drive: /home/me, C:\Users. Not a web address, a ratio, or a closing tag.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<~])/[\w.-]+/[\w.-]+|\b[A-Za-z]:\\\w")


@functools.cache
def executed(path):
    with tempfile.TemporaryDirectory() as folder:
        return run.execute(path, Path(folder))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def texts(cell):
    """Every output of a code cell as text, under the name of its stream or type; pictures by their type alone."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            found.append((output.name, output.text))
        else:
            for kind, data in sorted(output.get("data", {}).items()):
                found.append((kind, "" if kind.startswith("image/") else data))
    return found


def make_notebook(folder, *sources):
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    path = folder / "made.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


# --- the notebooks --------------------------------------------------------------------------------------------------


def test_there_is_a_notebook():
    assert "01_quantise_pack_multiply.ipynb" in [path.name for path in NOTEBOOKS]
    assert "02_distil_by_hand.ipynb" in [path.name for path in TRAINING]


@every_notebook
def test_runs_and_gives_the_committed_outputs(path):
    if path in TRAINING:
        pytest.importorskip("torch", reason="training needs the extra [distill]: no torch here")
    committed = code_cells(nbformat.read(path, as_version=4))
    fresh = code_cells(executed(path))
    for old, new in zip(committed, fresh, strict=True):
        if "machine" not in tags(old):
            assert texts(old) == texts(new), f"cell {old.id} gives something else now: run make notebook"


@every_notebook
def test_committed_outputs_are_complete(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    # 1, 2, 3, ...: run once, in order, every cell.
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert bool(cell.outputs) == ("no-output" not in tags(cell)), cell.id
        assert tags(cell) <= {"machine", "no-output"}, cell.id
        assert all(output.output_type != "error" for output in cell.outputs), cell.id
        assert all(kind != "stderr" for kind, _ in texts(cell)), cell.id
    assert any(kind == "image/png" for cell in cells for kind, _ in texts(cell))


@every_notebook
def test_committed_file_is_valid_and_tidy(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == run.METADATA
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook).rstrip("\n") + "\n"


@every_notebook
def test_no_machine_paths(path):
    for cell in nbformat.read(path, as_version=4).cells:
        shown = [cell.source] + ([text for _, text in texts(cell)] if cell.cell_type == "code" else [])
        assert not [found for text in shown for found in ABSOLUTE_PATH.findall(text)], cell.id


@pytest.mark.parametrize("text", ["/home/me/x.py", "File /tmp/a/b", r"C:\Users\me", '"/opt/venv/bin"', "(/usr/lib)"])
def test_paths_are_found(text):
    assert ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://arxiv.org/abs/2402.17764",
        "<b>x</b></td></tr>",
        "../docs/packing-i2.md",
        "w_scale / 2",
        "10^9 weights/s",
    ],
)
def test_other_slashes_are_no_paths(text):
    assert not ABSOLUTE_PATH.search(text)


@every_notebook
def test_links_lead_somewhere(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
                assert target.startswith("https://") or (path.parent / target).is_file(), target


# --- notebooks/run.py -----------------------------------------------------------------------------------------------


def test_run_writes_outputs_and_a_second_run_changes_nothing(tmp_path):
    path = make_notebook(
        tmp_path, "import sys, pathlib; print(sys.executable)", "print('b')\nprint(pathlib.Path().absolute().name)"
    )
    assert run.main([], tmp_path) == 0
    first = path.read_bytes()
    cells = code_cells(nbformat.read(path, as_version=4))
    assert texts(cells[0]) == [("stdout", f"{run.sys.executable}\n")]  # the Python that runs the tests
    assert texts(cells[1]) == [("stdout", f"b\n{tmp_path.name}\n")]
    assert run.main([], tmp_path) == 0
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["made.ipynb"]


def test_check_writes_nothing(tmp_path):
    path = make_notebook(tmp_path, "print(1)")
    before = path.read_bytes()
    assert run.main(["--check"], tmp_path) == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize("source", ["1 / 0", "import os; os._exit(1)"], ids=["error", "dead kernel"])
@pytest.mark.parametrize("arguments", [[], ["--check"]], ids=["write", "check"])
def test_a_failing_cell_fails_the_run_and_leaves_the_file(source, arguments, tmp_path, capsys):
    path = make_notebook(tmp_path, "print(1)", source)
    before = path.read_bytes()
    assert run.main(arguments, tmp_path) == 1
    assert path.read_bytes() == before
    assert "made.ipynb failed" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["made.ipynb"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = make_notebook(tmp_path, "print(1)")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(run.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run.write(nbformat.read(path, as_version=4), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["made.ipynb"]
