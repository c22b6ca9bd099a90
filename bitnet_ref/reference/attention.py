"""Causal attention with grouped key/value heads, and the cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from bitnet_ref.reference.config import ModelConfig

__all__ = ["KVCache", "attention"]

_FLOAT16_MAX = 65504.0
_FIRST_TOKENS = 128  # that a new cache has memory for

Trace = Callable[[str, np.ndarray], None]


class KVCache:
    """Keys (already rotated) and values of the tokens so far, for every layer.

    Parameters
    ----------
    config : ModelConfig
    capacity : int, optional
        Most tokens; the context of the model if not given. All layers keep all tokens, those with a sliding window too:
        the window is a mask.
    dtype : float32 or float16, optional
        How keys and values are kept. float16 rounds them, so that a token's logits depend on it a little.

    Raises
    ------
    ValueError
        If capacity is not between 1 and the context of the model.
    TypeError
        If dtype is another.

    Attributes
    ----------
    length : int
        Tokens that every layer holds. Set it to a smaller number to forget the last tokens.
    """

    def __init__(self, config: ModelConfig, capacity: int | None = None, dtype: DTypeLike = np.float32) -> None:
        capacity = config.context if capacity is None else capacity
        if not 1 <= capacity <= config.context:
            raise ValueError(f"capacity must lie between 1 and the context of {config.context} tokens, got {capacity}")
        if np.dtype(dtype) not in (np.float32, np.float16):
            raise TypeError(f"a cache must be float32 or float16, got {np.dtype(dtype)}")
        # In memory the tokens of one head follow each other, which is the order that attention reads.
        shape = (config.layers, config.kv_heads, min(capacity, _FIRST_TOKENS), config.head_dim)
        self._keys, self._values = (np.zeros(shape, dtype).swapaxes(1, 2) for _ in range(2))  # (L, S, KV, D)
        self.capacity = capacity
        self.length = 0

    def _reserve(self, n: int) -> None:
        """Make room for n tokens. Memory grows with them, as a system may give out large pages, one for each head."""
        held = self._keys.shape[1]
        if n <= held:
            return
        n = min(self.capacity, max(n, 2 * held))
        layers, _, kv, d = self._keys.shape
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = np.zeros((layers, kv, n, d), old.dtype).swapaxes(1, 2)
            new[:, :held] = old
            setattr(self, name, new)

    def positions(self, t: int) -> np.ndarray:
        """Positions of the next `t` tokens, shape (t,); ValueError if the cache has no room for them."""
        if self.length + t > self.capacity:
            raise ValueError(f"the cache holds at most {self.capacity} tokens, got {self.length + t}")
        return np.arange(self.length, self.length + t)

    def advance(self, t: int) -> None:
        """Count the `t` tokens that every layer has stored."""
        self.length += t

    def store(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put T tokens behind the `length` that the cache holds; :meth:`advance` then counts them.

        Parameters
        ----------
        layer : int
        k, v : ndarray of shape (T, KV, D), float32

        Returns
        -------
        k, v : ndarray of shape (length + T, KV, D), of the cache's dtype
            Views of all tokens of that layer.
        """
        end = self.length + len(k)
        if end > self.capacity:
            raise ValueError(f"the cache holds at most {self.capacity} tokens, got {end}")
        if self._keys.dtype == np.float16 and not np.maximum(np.abs(k), np.abs(v)).max() <= _FLOAT16_MAX:
            raise ValueError(
                f"keys and values must be within {_FLOAT16_MAX:,.0f} to be kept as float16, got larger ones"
            )
        self._reserve(end)
        self._keys[layer, self.length : end] = k
        self._values[layer, self.length : end] = v
        return self._keys[layer, :end], self._values[layer, :end]


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int | None = None, trace: Trace | None = None
) -> np.ndarray:
    """Softmax attention of the last T of S tokens.

        out[t, h] = sum over s of softmax over s(scale * q[t, h] . k[s, h // G]) v[s, h // G]

    Token t of the T stands at position p = S - T + t. It sees the positions s <= p and, with a window, of these only
    s > p - window. Query head h reads key/value head h // G, where G = H / KV.

    Parameters
    ----------
    q : ndarray of shape (T, H, D), float32
    k, v : ndarray of shape (S, KV, D), float32 or float16
    scale : float
    window : int, optional
    trace : callable(name, array), optional
        Called with ``scores`` (before the mask) and ``probabilities``, each of shape (H, T, S), float32.

    Returns
    -------
    ndarray of shape (T, H, D), float32

    Notes
    -----
    Computed in float64 and rounded once at the end, so that the result depends neither on the order of summation nor on
    how many tokens are processed at once.
    """
    (t, h, d), (s, kv, _) = q.shape, k.shape
    q64 = q.astype(np.float64).transpose(1, 0, 2).reshape(kv, h // kv, t, d)
    k64, v64 = (a.astype(np.float64).transpose(1, 0, 2)[:, None] for a in (k, v))  # (KV, 1, S, D)
    scores = (q64 @ k64.swapaxes(-1, -2)) * scale  # (KV, G, T, D) @ (KV, 1, D, S) -> (KV, G, T, S)
    position = np.arange(s - t, s)[:, None]  # (T, 1)
    hidden = np.arange(s) > position  # (T, S)
    if window is not None:
        hidden |= np.arange(s) <= position - window
    masked = np.where(hidden, -np.inf, scores)
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True))  # the diagonal is never hidden, so max is finite
    weights /= weights.sum(axis=-1, keepdims=True)
    if trace is not None:
        trace("scores", scores.reshape(h, t, s).astype(np.float32))
        trace("probabilities", weights.reshape(h, t, s).astype(np.float32))
    out = weights @ v64  # (KV, G, T, S) @ (KV, 1, S, D) -> (KV, G, T, D)
    return out.reshape(h, t, d).transpose(1, 0, 2).astype(np.float32)  # (T, H, D)
