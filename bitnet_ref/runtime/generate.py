"""Text or tokens that follow a prompt, as they come, for one prompt or several at once."""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitnet_ref.runtime.model import BatchCache, Model
from bitnet_ref.runtime.sampling import Sampler
from bitnet_ref.runtime.tokenizer import Tokenizer

__all__ = ["Completion", "Piece", "generate"]


@dataclass(frozen=True)
class Piece:
    """What one step adds to one sequence.

    Attributes
    ----------
    sequence : int
        Number of the prompt, 0 if there is one only.
    token : int
    text : str
        What can be shown now: whole characters, and nothing that may yet turn out to belong to a stop string. Empty
        without a tokenizer.
    finish : str or None
        None while the sequence goes on, else why it ended: ``end`` (an end token of the model), ``stop`` (a stop
        string or token), ``length`` (max_tokens), ``context`` (no room in the model).
    """

    sequence: int
    token: int
    text: str
    finish: str | None


@dataclass(frozen=True)
class Completion:
    """A finished sequence.

    Attributes
    ----------
    prompt_tokens, tokens : tuple of int
        A token that ended the sequence is the last of `tokens`.
    text : str
        Without end tokens and without the stop string.
    finish : str
        As in :class:`Piece`.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish: str


def generate(
    model: Model,
    prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
    max_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: str | int | Sequence[str | int] = (),
    stream: bool = True,
    special: bool = False,
) -> Iterator[Piece] | Completion | list[Completion]:
    """Continue a prompt, or several.

    Prompts are read in pieces of some hundred tokens; then every sequence that is not finished gets one token a step,
    all of them in one product with each matrix. What a sequence gets does not depend on the others, to the last bit.

    Parameters
    ----------
    model : Model
    prompt : str, sequence of int, or a sequence of either
        Text needs a tokenizer, which puts its begin-of-text token in front as its file says.
    max_tokens : int
        Most tokens for each sequence.
    temperature, top_k, top_p, min_p, repetition_penalty
        See :class:`bitnet_ref.runtime.sampling.Sampler`. The default is greedy.
    seed : int
        Sequence i draws from its own generator, seeded with seed + i.
    stop : str, int, or a sequence of them
        Texts and tokens that end a sequence. A stop string is left out of the text; what follows it in its token too.
    stream : bool
        True: an iterator of :class:`Piece`. False: a :class:`Completion`, or a list of them for several prompts.
    special : bool
        Whether special tokens written in a prompt count as these tokens, as in a chat.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range, before anything is computed; if text is given or asked for without a tokenizer.
    """
    sampler = Sampler(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    if operator.index(max_tokens) < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if operator.index(seed) < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    stops = [stop] if isinstance(stop, (str, int)) else list(stop)
    stop_texts = [s for s in stops if isinstance(s, str)]
    if "" in stop_texts:
        raise ValueError("a stop string must not be empty")
    if stop_texts and model.tokenizer is None:
        raise ValueError("stop strings need a tokenizer, this model came without one; give tokens")
    stop_tokens = frozenset(operator.index(s) for s in stops if not isinstance(s, str))

    single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], (int, np.integer)))
    prompts = [_tokens(model, p, special) for p in ([prompt] if single else prompt)]
    if not prompts:
        raise ValueError("there must be at least one prompt, got none")
    sequences = [
        _Sequence(i, tokens, np.random.default_rng(seed + i), _Text(model.tokenizer, stop_texts))
        for i, tokens in enumerate(prompts)
    ]
    pieces = _run(model, sequences, max_tokens, sampler, stop_tokens)
    if stream:
        return pieces
    texts: list[list[str]] = [[] for _ in prompts]
    ends: list[str] = [""] * len(prompts)
    for piece in pieces:
        texts[piece.sequence].append(piece.text)
        ends[piece.sequence] = piece.finish or ""
    done = [
        Completion(tuple(s.tokens[: s.n_prompt]), tuple(s.tokens[s.n_prompt :]), "".join(text), end)
        for s, text, end in zip(sequences, texts, ends, strict=True)
    ]
    return done[0] if single else done


@dataclass
class _Sequence:
    number: int
    tokens: list[int]
    rng: np.random.Generator
    text: _Text
    n_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)


def _tokens(model: Model, prompt: Any, special: bool) -> list[int]:
    """A prompt as tokens, checked."""
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError("a prompt in text needs a tokenizer, this model came without one; give tokens")
        prompt = model.tokenizer.encode(prompt, special=special)
    tokens = [operator.index(token) for token in prompt]
    if not tokens:
        raise ValueError("a prompt must have at least one token, got none")
    if bad := [token for token in tokens if not 0 <= token < model.config.vocabulary]:
        raise ValueError(f"tokens must lie in 0..{model.config.vocabulary - 1}, got {bad[0]}")
    if len(tokens) >= model.config.context:
        raise ValueError(
            f"a prompt must leave room in the context of {model.config.context} tokens, got {len(tokens)} tokens"
        )
    return tokens


def _run(
    model: Model, sequences: list[_Sequence], max_tokens: int, sampler: Sampler, stop_tokens: frozenset[int]
) -> Iterator[Piece]:
    end_tokens = frozenset(model.tokenizer.eos_ids if model.tokenizer is not None else ())
    context = model.config.context

    def step(sequence: _Sequence, logits: np.ndarray) -> Piece:
        """Choose the next token of a sequence and say what it adds."""
        token = sampler.choose(logits, sequence.tokens, sequence.rng)
        sequence.tokens.append(token)
        n = len(sequence.tokens)
        text, finish = "", None
        if token in end_tokens or token in stop_tokens:
            finish = "end" if token in end_tokens else "stop"
        else:
            text, found = sequence.text.add(token)
            if found:
                finish = "stop"
            elif n - sequence.n_prompt == max_tokens:
                finish = "length"
            elif n == context:
                finish = "context"
        if finish is not None and not sequence.text.stopped:
            text += sequence.text.rest()
        return Piece(sequence.number, token, text, finish)

    running: list[tuple[_Sequence, Any]] = []
    for sequence in sequences:
        cache = model.new_cache(min(context, sequence.n_prompt + max_tokens))
        piece = step(sequence, model.prefill(sequence.tokens, cache)[-1])
        if piece.finish is None:
            running.append((sequence, cache))
        yield piece
    while running:
        caches = [cache for _, cache in running]
        last = [sequence.tokens[-1] for sequence, _ in running]
        logits = model.forward(last, caches[0] if len(caches) == 1 else BatchCache(caches))  # (B, V)
        still = []
        for (sequence, cache), row in zip(running, logits, strict=True):
            piece = step(sequence, row)
            if piece.finish is None:
                still.append((sequence, cache))
            yield piece
        running = still


class _Text:
    """Tokens to text that may be shown: whole characters, with what could begin a stop string held back."""

    def __init__(self, tokenizer: Tokenizer | None, stops: list[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> tuple[str, bool]:
        """The text that is safe now, and whether a stop string has been found."""
        if self._tokenizer is None:
            return "", False
        # A special token has no text: streaming it alone gives nothing.
        if any(self._tokenizer.stream([token])):
            self._held += self._decoder.decode(self._tokenizer.token_bytes(token))
        found = [i for i in (self._held.find(stop) for stop in self._stops) if i >= 0]
        if found:
            text, self._held, self.stopped = self._held[: min(found)], "", True
            return text, True
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, False

    def rest(self) -> str:
        """What was held back, at the end; half a character becomes U+FFFD."""
        text, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return text
