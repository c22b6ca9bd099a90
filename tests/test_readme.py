"""What the README promises: its commands exist, its example runs, its links lead somewhere."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitnet_ref.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"`make ([a-z-]+)`", README)) | set(re.findall(r"^\$ make ([a-z]+)", README, re.M))


def make(*arguments):
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_make_targets_exist(target):
    dry = make("--dry-run", "--always-make", target)
    assert dry.returncode == 0, dry.stderr


def test_the_two_commands_do_what_is_said():
    assert {"paper", "test"} <= TARGETS
    paper = make("--dry-run", "--always-make", "paper").stdout
    assert "bitnet-ref verify" in paper and "bitnet-ref paper --out report" in paper and "--quick" not in paper
    assert re.search(r"/pytest$", make("--dry-run", "--always-make", "test").stdout, re.M)


def test_ci_runs_the_test_command():
    assert re.search(r"^make -C .* test$", (ROOT / ".ci" / "run").read_text(), re.M)


def test_commands_of_the_table_exist():
    for command in set(re.findall(r"`bitnet-ref ([a-z]+)", README)):
        result = CliRunner().invoke(main, [command, "--help"])
        assert result.exit_code == 0, command
        for option in re.findall(r"--[a-z]+", re.search(rf"`bitnet-ref {command}[^`]*`", README)[0]):
            assert option in result.output, f"{command} {option}"


def test_nothing_waits_to_be_filled_in():
    assert not re.search(r"@[A-Z]+@|\b(TODO|TBD|FIXME|COMMIT)\b", README)


def test_python_example_runs():
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    assert examples
    for example in examples:
        names = {}
        exec(example, names)
        assert names["y"].shape == (4, 2560) and repr(names["packed"]) in example


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_missing_tools_are_named(tmp_path):
    """Each requirement that is absent gives a sentence that says what to install."""
    if not (ROOT / "Makefile").exists():
        pytest.fail("the tests must run in a checkout")
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)

    def failure(*arguments):
        run = subprocess.run(["make", "setup", *arguments], cwd=copy, capture_output=True, text=True)
        assert run.returncode != 0
        return run.stdout + run.stderr

    assert "Python 3.11 or newer is needed" in failure("PYTHON=no-such-python")
    assert "A C compiler is needed: install gcc or clang" in failure("CC=no-such-compiler")
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    assert "Python 3.11 or newer is needed" in failure(f"PYTHON={old}")
