"""Text files as windows of tokens: tokenised once into a file, then read in an order that (seed, step) gives."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ref.distill.text import TextEncoder
from bitnet_ref.errors import FormatError

__all__ = ["PackedCorpus", "permutation"]

_PIECE = 1 << 20  # characters that are read and tokenised at once
_LAYOUT = 1  # of the cache; raise it when the tokens that are written for a text change


def permutation(n: int, *key: int) -> np.ndarray:
    """The numbers 0..n-1 in an order that depends on the key alone.

    It comes from Philox's raw words, which NumPy keeps the same in every version, as it does not for ``shuffle``.

    Parameters
    ----------
    n : int
    *key : int
        Such as seed and epoch.

    Returns
    -------
    ndarray of shape (n,), int64
    """
    digest = hashlib.sha256(repr(tuple(map(int, key))).encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(words, kind="stable")


class PackedCorpus:
    """Texts one after the other, with an end-of-text token after each, cut into windows of equal length.

    Parameters
    ----------
    files : sequence of path
        UTF-8 texts, or ``.jsonl`` files with one document in each line under `field`.
    tokenizer : as of :class:`bitnet_ref.distill.text.TextEncoder`
    length : int
        Tokens of a window, at least 2: the first is never predicted.
    seed : int
        Of the order of windows.
    cache : path
        Folder for the tokens; made if missing. A file there is used again for the same texts, tokenizer, separator and
        end-of-text token, whatever the length.
    end_of_text : str, optional
        The token after each document; that of the tokenizer if not given. Chat models declare the end of a *turn*
        there: give the token of their pre-training, such as ``<|endoftext|>``.
    separator : str, optional
        What stands between the documents of a file, such as ``"\\n"``; without it a file is one document.
    held_out : float
        Share of the windows, at the end of each file, that :meth:`batch` never gives.
    field : str
        Key of the text in ``.jsonl`` files.

    Attributes
    ----------
    n_documents, n_bytes, n_tokens : int
        All that was read: UTF-8 bytes without separators, tokens with the end-of-text tokens. At the end fewer than
        `length` tokens are in no window.
    windows, held_out_windows : int
    path : Path
        The file of tokens: uint16, or uint32 if the vocabulary needs it, little-endian.

    Raises
    ------
    ValueError
        If an argument is out of range, the texts are too short for one window to train on, or no window is held out
        though a share is asked for.
    FormatError
        If a text is missing, not UTF-8 or not JSON; the message names file and line.
    OSError
        If the tokens cannot be written; nothing is left of them then.

    Notes
    -----
    A document of more than a million characters is tokenised in pieces, cut behind a line's end where there is one, so
    that no file must fit into memory. Held-out windows are next to trained ones: they measure progress, not the loss on
    unseen books.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        tokenizer: Any,
        length: int,
        seed: int,
        *,
        cache: str | os.PathLike[str],
        end_of_text: str | None = None,
        separator: str | None = None,
        held_out: float = 0.0,
        field: str = "text",
    ) -> None:
        paths = [Path(file) for file in files]
        if not paths:
            raise ValueError("a corpus needs at least one file, got none")
        if length < 2:
            raise ValueError(f"a window must have at least 2 tokens, got {length}")
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must be a share from 0 to below 1, got {held_out}")
        if separator == "":
            raise ValueError("separator must not be empty; leave it out if a file is one document")
        encoder = TextEncoder.of(tokenizer)
        end = encoder.end_of_text if end_of_text is None else encoder.token(end_of_text)
        if end is None:
            raise ValueError("this tokenizer declares no end-of-text token: give end_of_text")
        self.length, self.seed = length, seed
        self._read(paths, encoder, end, separator, field, Path(cache))
        n = self.n_tokens // length
        # Windows of a file by where they begin; the held-out count grows evenly, so that small files hold out some too.
        limits = [min(-(-tokens // length), n) for tokens in np.cumsum([0, *self._file_tokens]).tolist()]
        held = np.zeros(n, bool)
        for first, last in pairwise(limits):
            held[last - (int(held_out * last) - int(held_out * first)) : last] = True
        self._train, self._held = np.flatnonzero(~held), np.flatnonzero(held)
        self.windows, self.held_out_windows = len(self._train), len(self._held)
        if not self.windows or (held_out and not self.held_out_windows):
            raise ValueError(
                f"the texts must fill at least one window of {length} tokens to train on, and one to hold out if "
                f"held_out is above 0, got {self.n_tokens} tokens and held_out={held_out}"
            )
        self._order = (-1, np.empty(0, np.int64))

    def window(self, i: int) -> np.ndarray:
        """The i-th window to train on, in the order of the texts: shape (length,), int64."""
        return self._window(self._train[i])

    def held_out_window(self, i: int) -> np.ndarray:
        """The i-th window that is held out: shape (length,), int64."""
        return self._window(self._held[i])

    def batch(self, step: int, size: int) -> dict[str, np.ndarray]:
        """The windows of one step.

        Every window comes once before any comes again, each time in another order; a batch may reach over the seam.

        Parameters
        ----------
        step : int
            From 0.
        size : int
            The same at every step.

        Returns
        -------
        dict
            ``input_ids``, ``attention_mask`` (all 1) and ``labels`` (the tokens), shape (size, length), int64
        """
        rows = []
        for k in range(step * size, (step + 1) * size):
            epoch, i = divmod(k, self.windows)
            if self._order[0] != epoch:
                self._order = (epoch, permutation(self.windows, self.seed, epoch))
            rows.append(self.window(self._order[1][i]))
        return _language_batch(np.stack(rows))

    def held_out_batches(self, size: int, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Batches of held-out windows, the last one maybe smaller.

        Parameters
        ----------
        size : int
        limit : int, optional
            At most so many windows, spread evenly over them all.

        Yields
        ------
        dict
            As of :meth:`batch`.
        """
        chosen = np.arange(self.held_out_windows)
        if limit is not None and limit < len(chosen):
            chosen = chosen[np.arange(limit) * len(chosen) // limit]
        for i in range(0, len(chosen), size):
            yield _language_batch(np.stack([self.held_out_window(j) for j in chosen[i : i + size]]))

    def _window(self, i: int) -> np.ndarray:
        return self._tokens[i * self.length : (i + 1) * self.length].astype(np.int64)

    def _read(
        self, paths: list[Path], encoder: TextEncoder, end: int, separator: str | None, field: str, cache: Path
    ) -> None:
        identity = [_LAYOUT, _PIECE, encoder.sha256, end, separator, field]
        identity += [[path.suffix == ".jsonl", _sha256(path)] for path in paths]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        self.path = cache / f"corpus-{name}.tokens"
        about_path = cache / f"corpus-{name}.json"
        dtype = np.dtype("<u2" if encoder.vocabulary_size <= 1 << 16 else "<u4")
        about = _load_about(about_path, self.path, dtype)
        if about is None:
            about = _tokenise(paths, encoder, end, separator, field, self.path, dtype)
            _replace(about_path, json.dumps(about).encode())
        self._file_tokens: list[int] = about["file_tokens"]
        self.n_tokens = sum(self._file_tokens)
        self.n_documents, self.n_bytes = about["documents"], about["bytes"]
        if not self.n_tokens:
            raise ValueError(f"the texts must not be empty, got {', '.join(map(str, paths))}")
        self._tokens = np.memmap(self.path, dtype, "r")


def _language_batch(ids: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids.copy()}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FormatError(f"{path} must be a readable file: {error.strerror}") from error


def _load_about(about_path: Path, path: Path, dtype: np.dtype) -> dict[str, Any] | None:
    """What was written beside the tokens, which is written last; None if there is no whole cache."""
    try:
        about = json.loads(about_path.read_bytes())
        whole = path.stat().st_size == sum(about["file_tokens"]) * dtype.itemsize
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return about if whole else None


def _tokenise(
    paths: list[Path],
    encoder: TextEncoder,
    end: int,
    separator: str | None,
    field: str,
    path: Path,
    dtype: np.dtype,
) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    about: dict[str, Any] = {"documents": 0, "bytes": 0, "file_tokens": []}
    try:
        with temporary.open("wb") as out:
            for source in paths:
                tokens = 0
                for pieces in _groups(_pieces(source, separator, field)):
                    for ids, (text, ends) in zip(encoder.encode_batch([t for t, _ in pieces]), pieces, strict=True):
                        ids = np.array([*ids, end] if ends else ids, dtype)
                        out.write(ids.tobytes())
                        tokens += len(ids)
                        about["documents"] += ends
                        about["bytes"] += len(text.encode())
                about["file_tokens"].append(tokens)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"the tokens of the corpus must be written to {path}, and could not be: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return about


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _groups(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of about _PIECE characters together, for the library to share out to threads."""
    group: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[0])
        if size >= _PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _pieces(path: Path, separator: str | None, field: str) -> Iterator[tuple[str, bool]]:
    """(text, whether its document ends with it); documents of white space alone are none."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            documents = _json_lines(path, file, field) if path.suffix == ".jsonl" else _cut(file, separator)
            pending = False  # has the document that is being read a piece that was yielded?
            for text, ends in documents:
                if text.strip() or pending:
                    yield text, ends
                    pending = not ends
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} must be UTF-8 text: {error}") from error


def _json_lines(path: Path, file: Any, field: str) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise FormatError(f"{path}, line {number} must be JSON: {error}") from error
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise FormatError(f"{path}, line {number} must be an object with text under {field!r}, got {line[:80]!r}")
        while len(text) > _PIECE:
            at = _end_of_line(text)
            yield text[:at], False
            text = text[at:]
        yield text, True


def _cut(file: Any, separator: str | None) -> Iterator[tuple[str, bool]]:
    rest = ""
    while data := file.read(_PIECE):
        rest += data
        if separator is not None:
            *whole, rest = rest.split(separator)
            yield from ((text, True) for text in whole)
        # What is kept back may hold the beginning of a separator.
        while len(rest) > _PIECE + len(separator or ""):
            at = _end_of_line(rest)
            yield rest[:at], False
            rest = rest[at:]
    yield rest, True


def _end_of_line(text: str) -> int:
    """Where to cut a text of more than _PIECE characters: behind the last line that ends before, or anywhere."""
    return text.rfind("\n", 0, _PIECE) + 1 or _PIECE
