"""Chat templates: the Jinja source that turns a list of messages into the text a model was trained on.

A template comes with a checkpoint, so it is code from a stranger. It is rendered in Jinja's immutable sandbox, which
keeps it from attributes that lead out of the template, and in a process of its own, because the sandbox bounds neither
time nor memory: two nested loops over its longest range take hours, and a string doubled forty times fills any machine.
The kernel ends that process; nothing here has to foresee how a template may be slow.

Filters, functions and settings are those that Hugging Face's templates expect: ``tojson``, ``raise_exception``,
``strftime_now``, ``break`` and ``continue``, the ``generation`` block, ``trim_blocks`` and ``lstrip_blocks``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bitnet_ref.errors import FormatError
from bitnet_ref.runtime.tokenizer import Tokenizer

__all__ = ["BITNET_2B4T_TEMPLATE", "ChatTemplate"]

BITNET_2B4T_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}<|eot_id|>{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""The format that [2B4T], section 3, prints: ``Role: text<|eot_id|>``, one turn to a line."""

_MAX_TEMPLATE_CHARACTERS = 1 << 17  # the longest in use have about 30,000
_MAX_OUTPUT_CHARACTERS = 1 << 22
_CPU_SECONDS = 2  # starting takes 0.1
_WALL_SECONDS = 30  # for a machine that is busy with other things
_MEMORY_BYTES = 1 << 29

_WORKER = Path(__file__).with_name("_chat_worker.py")


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the tokens that it may name.

    Parameters
    ----------
    source : Jinja source
    bos_token, eos_token : what the template sees under these names

    Raises
    ------
    FormatError
        If the source is longer than 131,072 characters or no valid Unicode.
    """

    source: str
    bos_token: str = ""
    eos_token: str = ""

    def __post_init__(self) -> None:
        if len(self.source) > _MAX_TEMPLATE_CHARACTERS:
            raise FormatError(
                f"a chat template must have at most {_MAX_TEMPLATE_CHARACTERS:,} characters, got {len(self.source):,}"
            )
        try:
            self.source.encode()
        except UnicodeEncodeError as error:
            raise FormatError(f"a chat template must be valid Unicode, character {error.start} is not") from None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template that came with a tokenizer.

        Raises
        ------
        FormatError
            If none came.
        """
        if tokenizer.chat_template is None:
            raise FormatError("a chat needs a chat template, this tokenizer came without one; give one (--template)")
        return cls(tokenizer.chat_template, tokenizer.bos_token or "", tokenizer.eos_token or "")

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        now: datetime | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, to be encoded with ``special=True``.

        Parameters
        ----------
        messages : mappings with "role" and "content", in order; whatever else the template knows may be in them
        add_generation_prompt : whether the text ends where the assistant begins to write
        now : what ``strftime_now`` tells; the present time by default
        variables : further names that the template may use, such as ``tools``; values that JSON can hold

        Raises
        ------
        TypeError
            If messages are not mappings, or hold something that JSON cannot.
        FormatError
            If the template is wrong, refuses these messages, reaches out of the sandbox, or exceeds 2 seconds of
            processor time, 512 MiB of memory, or 4,194,304 characters.
        """
        messages = list(messages)
        if not all(isinstance(message, Mapping) for message in messages):
            raise TypeError("messages must be mappings with a role and a content")
        job = {
            "path": [entry for entry in sys.path if isinstance(entry, str)],
            "template": self.source,
            "variables": {
                "bos_token": self.bos_token,
                "eos_token": self.eos_token,
                **variables,
                "messages": [dict(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
            },
            "now": (datetime.now() if now is None else now).isoformat(),
            "cpu_seconds": _CPU_SECONDS,
            "memory_bytes": _MEMORY_BYTES,
            "max_characters": _MAX_OUTPUT_CHARACTERS,
        }
        try:
            text = json.dumps(job)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"messages and variables must be values that JSON can hold: {error}") from None
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(_WORKER)], input=text.encode(), capture_output=True, timeout=_WALL_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise FormatError(f"the chat template must render within {_WALL_SECONDS} seconds, it did not") from None
        if done.returncode != 0:
            raise FormatError(
                f"the chat template must render within {_CPU_SECONDS} seconds of processor time and "
                f"{_MEMORY_BYTES >> 20} MiB, it ended with status {done.returncode}"
            )
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise FormatError(f"the chat template failed: {_sentence(answer['error'])}")
        return answer["text"]


def _sentence(text: str) -> str:
    """At most 200 printable characters of what a template or Jinja has to say."""
    text = "".join(c if c.isprintable() else " " for c in text[:201])
    return text if len(text) <= 200 else text[:199] + "…"
