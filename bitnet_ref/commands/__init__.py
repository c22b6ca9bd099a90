"""What the commands of ``bitnet-ref`` share: failures as one sentence, JSON on request, progress on standard error."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from bitnet_ref.errors import BitnetRefError

__all__ = ["FAILURES", "bar", "command", "emit", "json_option", "write_json"]

FAILURES = (BitnetRefError, ValueError, TypeError, OSError, MemoryError)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn the library's errors into one sentence and exit code 1."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except FAILURES as error:
            raise click.ClickException(" ".join(str(error).split()) or type(error).__name__) from error

    return run


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")


def emit(document: object) -> None:
    """One JSON document on standard output; NaN and infinity would not be JSON and are refused."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def write_json(path: Path, document: object) -> None:
    """A JSON file, complete or not there: written under a temporary name first."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def bar() -> Progress:
    """A progress bar on standard error that disappears when it is done, or says nothing where no terminal is."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
