"""Other programs, each in a process of its own that works only when it is asked to.

llama.cpp and ik_llama.cpp both carry a library called ggml, and PyTorch brings threads of its own: in one process they
would clash. A :class:`Worker` is such a process. It makes the same product from its sizes, checks its own result
against the exact one, and then takes turns with everything else.

None of their code is here: they are optional packages (the extra ``[peers]``), called through their shared libraries.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

from bitnet_ref.errors import BitnetRefError
from bitnet_ref.measure.turns import Program

__all__ = ["ERROR_LIMIT", "PEERS", "PeerUnavailable", "Worker", "check_available"]

ERROR_LIMIT = 0.05
"""Largest error, over the root mean square of the exact result, of a peer that computes the same product at all.
Rounding activations to int8 in blocks gives 0.01 and less."""

PEERS = {
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
    "ik_llama.cpp": ("ik_llama_cpp", "ik-llama-cpp-python"),
    "torch": ("torch", "torch"),
    "numpy": ("numpy", "numpy"),
}
"""Name of a program: the module that brings it, and the package on PyPI."""


class PeerUnavailable(BitnetRefError, LookupError):
    """A peer was asked for that is unknown or not installed."""


def check_available(names: Sequence[str]) -> None:
    """Refuse peers that are unknown or not installed, before anything is timed.

    Raises
    ------
    PeerUnavailable
        The sentence names the package and the extra.
    """
    for name in names:
        if name not in PEERS:
            raise PeerUnavailable(f"peers must be among {', '.join(PEERS)}, got {name!r}")
        module, package = PEERS[name]
        if importlib.util.find_spec(module) is None:
            raise PeerUnavailable(f"{name} is not installed: pip install 'bitnet_ref[peers]', or {package} alone")


class Worker:
    """A peer in its own process.

    Parameters
    ----------
    serve : callable(name, connection)
        What the process does; :func:`bitnet_ref.measure.peers.worker.serve` for the peers, something else in tests.
    name : str
    environment : dict, optional
        Variables that must be set before the peer is loaded, such as a cap of its instruction set.
    """

    def __init__(self, serve: Callable[[str, Any], None], name: str, environment: dict[str, str] | None = None):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_begin, args=(serve, name, theirs, environment or {}), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str, *arguments: Any) -> Any:
        """Send a request and wait for its answer.

        Raises
        ------
        BitnetRefError
            If the peer fails, with its own words, or its process has ended.
        """
        try:
            self._connection.send((what, arguments))
            done, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(1)
            raise BitnetRefError(
                f"the process of {self.name} ended while it was asked to {what} (exit code {self._process.exitcode})"
            ) from None
        if not done:
            raise BitnetRefError(f"{self.name} failed to {what}: {answer}")
        return answer

    def programs(self, m: int, k: int, tokens: int, threads: int) -> tuple[list[Program], list[dict[str, Any]]]:
        """What the peer can multiply of this size: programs with a verified result, and rows of those without."""
        found, refused = [], []
        for handle, row in self.ask("prepare", m, k, tokens, threads):
            if row["verified"]:
                found.append(Program(row, lambda handle=handle: self.ask("turn", handle)))
            else:
                refused.append(row)
        return found, refused

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _begin(serve: Callable[[str, Any], None], name: str, connection: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    serve(name, connection)
