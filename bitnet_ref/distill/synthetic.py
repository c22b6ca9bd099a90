"""A made-up task that a tiny network can learn and a badly ternarised one forgets, and texts of the same language.

A sentence has two clauses, each with an opinion that a negation may turn. One clause decides: the one behind ``but``,
and the one without ``although``, wherever it stands. The words of both labels are the same, so nothing short of reading
their order tells them apart:

    the film was not dull , but the music was never good .   negative
    although the film was dull , the music was not bad .     positive
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bitnet_ref.distill.data import Example
from bitnet_ref.distill.text import train_tokenizer

__all__ = ["LABELS", "TEMPLATE", "sentences", "texts", "tokenizer"]

TEMPLATE = "{text} i felt"
LABELS = {"positive": " happy", "negative": " sad"}

_SUBJECTS = (
    "film",
    "music",
    "story",
    "cast",
    "script",
    "ending",
    "humour",
    "pace",
    "plot",
    "scenery",
    "sound",
    "dialogue",
)
_VERBS = ("was", "seemed", "felt", "looked")
_NEGATIONS = ("not", "never", "hardly")
_DEGREES = ("", "", "very", "quite", "really", "rather")
_GOOD = ("good", "great", "fresh", "warm", "clever", "moving", "funny", "bright", "lively", "fine")
_BAD = ("bad", "dull", "stale", "cold", "clumsy", "flat", "tired", "grim", "slow", "poor")
_FORMS = ("{0} , but {1} .", "{1} , although {0} .", "although {0} , {1} .")
"""{1} decides."""


def sentences(n: int, seed: int) -> list[Example]:
    """Labelled sentences, as many of one label as of the other, or one more.

    Parameters
    ----------
    n : int
    seed : int

    Returns
    -------
    list of Example
        The same on every machine; all different.
    """
    draw = _Draw("sentences", seed)
    found: dict[str, Example] = {}
    while len(found) < n:
        good = len(found) % 2 == 0
        text = _sentence(draw, good)
        if text not in found:
            found[text] = Example((text,), "positive" if good else "negative", id=f"synthetic:{len(found) + 1}")
    return list(found.values())


def texts(n: int, seed: int) -> list[str]:
    """Texts to pre-train on: one or two sentences of one opinion, most followed by how the writer felt.

    Parameters
    ----------
    n : int
    seed : int

    Returns
    -------
    list of str
        The same on every machine.
    """
    draw = _Draw("texts", seed)
    found = []
    for _ in range(n):
        good = draw.below(2) == 0
        parts = [_sentence(draw, good) for _ in range(1 + draw.below(2))]
        if draw.below(4):
            parts.append(f"i felt{LABELS['positive' if good else 'negative']} .")
        found.append(" ".join(parts))
    return found


def tokenizer() -> Tokenizer:
    """Byte-level BPE in which every word of the language is one token, the end of text is token 0: 430 tokens or so."""
    return train_tokenizer(texts(2000, 0), 1024, fewer=True)


class _Draw:
    """Numbers from a seed by SHA-256 and Philox's raw words, which no version of NumPy changes."""

    def __init__(self, *key: Any) -> None:
        digest = hashlib.sha256(repr(key).encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def below(self, n: int) -> int:
        return int(self._bits.random_raw()) * n >> 64

    def one(self, choices: Sequence[str]) -> str:
        return choices[self.below(len(choices))]


def _sentence(draw: _Draw, good: bool) -> str:
    other, deciding = _clause(draw, draw.below(2) == 0), _clause(draw, good)
    return draw.one(_FORMS).format(other, deciding)


def _clause(draw: _Draw, good: bool) -> str:
    # Seldom enough that its words alone tell more than chance about a clause: half and half, training would stand still
    # until it found the rule of both together.
    negation = "" if draw.below(4) else draw.one(_NEGATIONS)
    word = draw.one(_GOOD if good != bool(negation) else _BAD)
    return " ".join(filter(None, ("the", draw.one(_SUBJECTS), draw.one(_VERBS), negation, draw.one(_DEGREES), word)))
