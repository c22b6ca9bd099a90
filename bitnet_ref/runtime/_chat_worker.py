"""Renders one chat template in a process of its own, with limits; run by ``chat.py`` as a script, never imported.

Reads a JSON object from standard input and writes one to standard output: ``{"text": ...}`` or ``{"error": ...}``.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """Limit this process, render, answer."""
    job = json.load(sys.stdin)
    sys.path[:] = job["path"]  # isolated mode leaves out PYTHONPATH, where jinja2 may be
    try:
        answer = {"text": _render(job)}
    except MemoryError:
        answer = {"error": "it needs too much memory"}
    except RecursionError:
        answer = {"error": "it is nested too deeply"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(answer))


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Let the kernel end what runs or grows beyond; macOS knows the first limit only."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    except (OSError, ValueError):
        if sys.platform != "darwin":
            raise


def _render(job: dict[str, Any]) -> str:
    from datetime import datetime

    from jinja2.exceptions import SecurityError, TemplateRuntimeError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's part for training; what is in it is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            # Jinja would print nothing for a forbidden attribute, and complain only at the next step.
            raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__} must not be used")

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateRuntimeError(message)

    now = datetime.fromisoformat(job["now"])
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    _limit(job["cpu_seconds"], job["memory_bytes"])
    pieces: list[str] = []
    n_characters = 0
    for piece in environment.from_string(job["template"]).generate(job["variables"]):
        n_characters += len(piece)
        if n_characters > job["max_characters"]:
            raise TemplateRuntimeError(f"its output is longer than {job['max_characters']:,} characters")
        pieces.append(piece)
    return "".join(pieces)


if __name__ == "__main__":
    main()
