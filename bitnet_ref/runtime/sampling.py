"""From logits to the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Sampler", "log_softmax"]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is chosen. The steps are applied in the order of the fields.

    Parameters
    ----------
    repetition_penalty : float
        Logits of tokens that occur so far, prompt included, are divided by it if positive and multiplied if negative
        (CTRL, arXiv 1909.05858; 1 changes nothing).
    temperature : float
        Logits are divided by it. 0 takes the token of the largest logit, the first of equals, and nothing below counts.
    top_k : int
        The k largest logits stay, and those equal to the last of them; 0 keeps all.
    top_p : float
        Of the tokens in falling order the fewest stay whose probabilities reach p; 1 keeps all.
    min_p : float
        Tokens of at least min_p times the largest probability stay; 0 keeps all.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be positive and finite, got {self.repetition_penalty}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie between 0 and 1, got {self.min_p}")

    def penalised(self, logits: np.ndarray, seen: Sequence[int]) -> np.ndarray:
        """Logits after the repetition penalty; `logits` itself is not modified."""
        if self.repetition_penalty == 1 or not len(seen):
            return logits
        tokens = np.unique(np.asarray(seen, np.int64))
        out = logits.copy()
        found = out[tokens]
        penalty = np.float32(self.repetition_penalty)
        out[tokens] = np.where(found > 0, found / penalty, found * penalty)
        return out

    def probabilities(self, logits: np.ndarray, seen: Sequence[int] = ()) -> np.ndarray:
        """What the next token is drawn from, float64 of shape (V,), sum 1; all on one token at temperature 0.

        Parameters
        ----------
        logits : ndarray of shape (V,), float32
        seen : tokens so far, for the penalty
        """
        logits = self.penalised(logits, seen)
        if self.temperature == 0:
            p = np.zeros(len(logits))
            p[np.argmax(logits)] = 1
            return p
        # Less the largest before the division, so that a tiny temperature gives -inf and not a NaN.
        scaled = (logits.astype(np.float64) - logits.max()) / self.temperature
        if 0 < self.top_k < len(scaled):
            scaled[scaled < np.partition(scaled, -self.top_k)[-self.top_k]] = -np.inf
        p = np.exp(scaled)
        p /= p.sum()
        if self.top_p < 1:
            p[_beyond(p, self.top_p)] = 0
        if self.min_p > 0:
            p[p < self.min_p * p.max()] = 0
        return p / p.sum()

    def choose(self, logits: np.ndarray, seen: Sequence[int], rng: np.random.Generator) -> int:
        """One token. At temperature 0 nothing is drawn from rng, else one number.

        Raises
        ------
        ValueError
            If a logit is NaN.
        """
        if np.isnan(logits.max()):
            raise ValueError("logits must not be NaN, the model gave one")
        if self.temperature == 0:
            return int(np.argmax(self.penalised(logits, seen)))
        total = np.cumsum(self.probabilities(logits, seen))
        return int(min(np.searchsorted(total, rng.random() * total[-1], side="right"), len(total) - 1))


_LIKELY = 1024
_ROUNDING = 1e-9  # far above what sums of probabilities are off by


def _beyond(p: np.ndarray, top_p: float) -> np.ndarray:
    """Mask of the tokens that have `top_p` or more ahead of them, the more probable first, then the first.

    Where the likeliest tokens decide, only they are sorted: a draw from 128,256 tokens takes 2.6 ms for 14.9 (measured,
    logits with a deviation of 6, one token within 0.9), but 18.3 for 15.9 where they do not (2; 13,520 tokens).
    """
    likely = np.arange(len(p))
    if len(p) > _LIKELY:
        likely = np.flatnonzero(p >= np.partition(p, -_LIKELY)[-_LIKELY])
        if p[likely].sum() < top_p + _ROUNDING:
            likely = np.arange(len(p))
    order = likely[np.argsort(-p[likely], kind="stable")]
    before = np.cumsum(p[order]) - p[order]
    out = np.ones(len(p), bool)
    out[order] = before >= top_p
    return out


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
