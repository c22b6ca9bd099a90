"""Run every notebook of this folder from top to bottom and keep the outputs.

    python notebooks/run.py            run, and write each notebook back with its new outputs
    python notebooks/run.py --check    run only; no file is touched

Each notebook runs in a fresh kernel of the Python that runs this script, whatever kernels Jupyter has registered. If a
cell raises, the notebook's file stays as it was and the exit code is 1. What a notebook keeps besides sources, tags and
outputs is fixed here (no times, no versions, no state of an editor), so that running it again changes little in git.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from traitlets import default

__all__ = ["execute", "main", "write"]

HERE = Path(__file__).resolve().parent
CELL_SECONDS = 120  # far above what a cell of these notebooks needs on a slow machine
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class RunningPython(AsyncKernelManager):
    """Starts "python3" as ipykernel under ``sys.executable``: there is no folder to look other kernels up in."""

    @default("kernel_spec_manager")
    def _ipykernel_only(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def execute(path: Path, folder: Path) -> NotebookNode:
    """Run a notebook and return it with its outputs; the file is only read.

    Parameters
    ----------
    path : Path
    folder : Path
        Working directory of the kernel.

    Raises
    ------
    CellExecutionError, CellTimeoutError, DeadKernelError
        If a cell raises, takes longer than ``CELL_SECONDS``, or ends the kernel.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        kernel_name="python3",
        kernel_manager_class=RunningPython,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns that the local connection is not encrypted
        timeout=CELL_SECONDS,
        record_timing=False,
        coalesce_streams=True,  # else the kernel's buffer decides how printed lines are grouped
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if "tags" in cell.metadata else {})
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Replace the file in one step: a reader sees the old notebook or the new one, never a part."""
    text = nbformat.writes(notebook)  # sorted keys, one line per line of output
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", newline="\n", dir=path.parent, prefix=f".{path.stem}.", delete=False
    ) as temporary:
        try:
            temporary.write(text.rstrip("\n") + "\n")
            temporary.close()
            os.chmod(temporary.name, path.stat().st_mode)
            os.replace(temporary.name, path)
        except BaseException:
            temporary.close()
            Path(temporary.name).unlink()
            raise


def main(arguments: Sequence[str] | None = None, folder: Path = HERE) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run only; write nothing")
    check = parser.parse_args(arguments).check
    failed = 0
    for path in sorted(folder.glob("*.ipynb")):
        print(f"running {path.name} ...", flush=True)
        try:
            notebook = execute(path, folder)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(f"{path.name} failed and was left as it is:\n{error}", file=sys.stderr)
            failed += 1
            continue
        if not check:
            write(notebook, path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
