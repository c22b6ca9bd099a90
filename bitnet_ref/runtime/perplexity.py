"""Perplexity of a text, by the two conventions in use. They differ by several per cent: always say which one.

``llama.cpp``
    The text is cut into chunks of N tokens, the last incomplete one dropped; each chunk begins with an empty cache, its
    first token replaced by the begin-of-text token if the tokenizer adds one. Only predictions from a context of more
    than N/2 tokens count: token j of a chunk is scored for j = N/2 + 1 .. N - 1. The error is that of a mean of
    independent values, as ``llama-perplexity`` prints it.

``transformers``
    A window of N tokens moves by `stride`; every token but the first of the text is scored once, in the first window
    that holds it, so with N - stride tokens of context or more after the first window (with stride N the first token of
    each window has none and is left out). Nothing is put in front of the text but what the tokenizer puts there. The
    page "Perplexity of fixed-length models" of transformers weights a window's mean by the number of its scored tokens
    less one; here each token counts once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitnet_ref.runtime.model import Model
from bitnet_ref.runtime.sampling import log_softmax

__all__ = ["CONVENTIONS", "Perplexity", "perplexity"]

CONVENTIONS = ("llama.cpp", "transformers")


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it was taken.

    Attributes
    ----------
    value : float
        exp(mean of -log p).
    error : float
        value times the standard error of the mean, taking tokens as independent, which they are not.
    n_scored, n_tokens : int
        Tokens whose probability counted; tokens of the text.
    convention : str
    context, stride : int
    """

    value: float
    error: float
    n_scored: int
    n_tokens: int
    convention: str
    context: int
    stride: int


def perplexity(
    model: Model,
    text: str | Sequence[int],
    context: int | None = None,
    *,
    convention: str = "llama.cpp",
    stride: int | None = None,
    max_chunks: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Perplexity of a text under a model.

    Parameters
    ----------
    model : Model
    text : str or sequence of int
    context : int, optional
        N; 512, or the context of the model if that is less.
    convention : {"llama.cpp", "transformers"}
        See the head of this module.
    stride : int, optional
        Of ``transformers``; N/2 if not given.
    max_chunks : int, optional
        Stop after so many chunks or windows.
    progress : callable(done, total, running value), optional
        After each chunk.

    Raises
    ------
    ValueError
        If an argument is out of range, the text is too short, or text is given without a tokenizer.
    """
    limit = model.config.context
    n = min(512, limit) if context is None else operator.index(context)
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if not 4 <= n <= limit:
        raise ValueError(f"context must lie between 4 and the context of the model, {limit}, got {n}")
    if stride is not None and convention == "llama.cpp":
        raise ValueError("stride belongs to the convention of transformers")
    step = n if convention == "llama.cpp" else n // 2 if stride is None else operator.index(stride)
    if not 1 <= step <= n:
        raise ValueError(f"stride must lie between 1 and the context, {n}, got {step}")
    if max_chunks is not None and operator.index(max_chunks) < 1:
        raise ValueError(f"max_chunks must be at least 1, got {max_chunks}")
    first: int | None = None
    if isinstance(text, str):
        if model.tokenizer is None:
            raise ValueError("text needs a tokenizer, this model came without one; give tokens")
        tokens = np.asarray(model.tokenizer.encode(text), np.int64)
        first = model.tokenizer.bos_id if model.tokenizer.adds_bos else None
    else:
        tokens = np.asarray(text)
    needed = n if convention == "llama.cpp" else 2
    if tokens.ndim != 1 or len(tokens) < needed:
        raise ValueError(f"the text must have at least {needed} tokens, got {tokens.size}")

    chunks = _chunks(tokens, n, step, convention, first)
    if max_chunks is not None:
        chunks = chunks[:max_chunks]
    total = squares = 0.0
    count = 0
    for done, (inputs, n_scored) in enumerate(chunks, 1):
        # Position j predicts token j + 1; the last position predicts nothing that is known.
        cache = model.new_cache(len(inputs))
        logits = model.prefill(inputs, cache, min(n_scored + 1, len(inputs)))[:-1]  # (n_scored, V)
        for i in range(0, len(logits), 64):  # float64 of 64 rows is 64 MiB at most
            rows = log_softmax(logits[i : i + 64])
            targets = inputs[len(inputs) - len(logits) :][i : i + 64]
            losses = -rows[np.arange(len(rows)), targets]
            total += float(losses.sum())
            squares += float(np.square(losses).sum())
            count += len(losses)
        if progress is not None:
            progress(done, len(chunks), math.exp(total / count))
    mean = total / count
    variance = max(0.0, squares / count - mean * mean)
    value = math.exp(mean)
    error = value * math.sqrt(variance / (count - 1)) if count > 1 else math.inf
    return Perplexity(value, error, count, len(tokens), convention, n, step)


def _chunks(tokens: np.ndarray, n: int, step: int, convention: str, first: int | None) -> list[tuple[np.ndarray, int]]:
    """(tokens of a window, how many of its last tokens are scored) for every window."""
    if convention == "llama.cpp":
        chunks = []
        for i in range(len(tokens) // n):
            chunk = tokens[i * n : (i + 1) * n].copy()
            if first is not None:
                chunk[0] = first
            chunks.append((chunk, n - 1 - n // 2))
        return chunks
    chunks = []
    scored = 1  # tokens before this one have been scored; the first token of the text cannot be
    for begin in range(0, len(tokens), step):
        end = min(begin + n, len(tokens))
        if end > scored:
            chunks.append((tokens[begin:end], end - max(scored, begin + 1)))
        scored = end
        if end == len(tokens):
            break
    return chunks
