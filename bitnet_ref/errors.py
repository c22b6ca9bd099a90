"""The exceptions that bitnet_ref raises beyond the built-in ones.

Wrong shapes and values raise ``ValueError``, wrong dtypes ``TypeError``; the classes here are for what has no
built-in name.
"""

from __future__ import annotations

__all__ = ["BitnetRefError", "FormatError", "KernelUnavailable"]


class BitnetRefError(Exception):
    """Base class of the errors below; the command line turns any of them into one sentence and exit code 1."""


class KernelUnavailable(BitnetRefError, LookupError):
    """A kernel was asked for that is unknown, not compiled into this build, or not supported by this processor."""


class FormatError(BitnetRefError, ValueError):
    """A file is truncated, malformed, or of a kind that cannot be read; the message names the file and the rule."""
