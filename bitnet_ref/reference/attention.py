"""Causal attention with grouped key/value heads, and the cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from bitnet_ref.reference.config import ModelConfig

__all__ = ["KVCache", "attention"]

_FLOAT16_MAX = 65504.0
_LANES = 16
_LINE = 64  # bytes
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
        self._keys, self._values = (_zeros(shape, dtype).swapaxes(1, 2) for _ in range(2))  # (L, S, KV, D)
        self.capacity = capacity
        self.length = 0

    def reserve(self, n: int) -> None:
        """Make room for n tokens in all, as far as the capacity goes; a cache without room makes some by itself.

        Memory grows with the tokens, as a system may give out large pages, one for each head. Who knows how many come
        reserves them, since old and new memory exist together for a moment; otherwise it grows by a quarter.
        """
        held = self._keys.shape[1]
        if min(n, self.capacity) <= held:
            return
        n = max(n, held + held // 4)
        if n + n // 4 >= self.capacity:  # this time is the last
            n = self.capacity
        layers, _, kv, d = self._keys.shape
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = _zeros((layers, kv, n, d), old.dtype).swapaxes(1, 2)
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

    def room(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of all layers with room for T tokens behind the `length` that the cache holds.

        Parameters
        ----------
        t : int

        Returns
        -------
        k, v : ndarray of shape (layers, length + T, KV, D), of the cache's dtype
            Views; the last T rows of each layer are to be filled.

        Raises
        ------
        ValueError
            If they are more than the capacity.
        """
        end = self.length + t
        if end > self.capacity:
            raise ValueError(f"the cache holds at most {self.capacity} tokens, got {end}")
        self.reserve(end)
        return self._keys[:, :end], self._values[:, :end]

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
        if self._keys.dtype == np.float16 and not np.maximum(np.abs(k), np.abs(v)).max() <= _FLOAT16_MAX:
            raise ValueError(
                f"keys and values must be within {_FLOAT16_MAX:,.0f} to be kept as float16, got larger ones"
            )
        keys, values = (held[layer] for held in self.room(len(k)))
        keys[self.length :] = k
        values[self.length :] = v
        return keys, values


def _zeros(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """np.zeros from the beginning of a cache line on: of rows that begin inside one, every vector would lie in two."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(n_bytes + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


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
    Every rounding is defined, so that compiled code can give the same bits, however many tokens are processed at once.
    Scores are sixteen float32 sums, of which sum l takes dimensions l, l + 16, l + 32, ... in this order, each product
    and each addition rounded; then sums l and l + 8 are added, of these l and l + 4, l and l + 2, the last two, and
    the result is multiplied by float32(scale). Exponentials of the distance to the largest score are computed in
    float64 and rounded to float32. They multiply the values in the order of the positions, each product and each
    addition rounded to float32; at the end these sums are divided by that of the exponentials, which is accumulated in
    float64 and rounded.
    """
    (t, h, d), (s, kv, _) = q.shape, k.shape
    k, v = (a.astype(np.float32).transpose(1, 0, 2)[:, None] for a in (k, v))  # (KV, 1, S, D)
    q = q.transpose(1, 0, 2).reshape(kv, h // kv, t, d)
    step = max(1, (1 << 22) // (h * s * _LANES))  # tokens at a time: the sums take 16 MiB
    scores = np.concatenate([_scores(q[:, :, i : i + step], k) for i in range(0, t, step)], axis=2)
    scores *= np.float32(scale)  # (KV, G, T, S)
    position = np.arange(s - t, s)[:, None]  # (T, 1)
    hidden = np.arange(s) > position  # (T, S)
    if window is not None:
        hidden |= np.arange(s) <= position - window
    masked = np.where(hidden, -np.inf, scores).astype(np.float64)
    weights = np.exp(masked - masked.max(axis=-1, keepdims=True)).astype(np.float32)  # the diagonal is never hidden
    total = weights.sum(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)  # (KV, G, T, 1)
    if trace is not None:
        trace("scores", scores.reshape(h, t, s))
        trace("probabilities", (weights / total).reshape(h, t, s))
    out = np.zeros(q.shape, np.float32)  # (KV, G, T, D)
    for i in range(s):
        out += weights[..., i, None] * v[:, :, i, None]
    return (out / total).reshape(h, t, d).transpose(1, 0, 2)  # (T, H, D)


def _scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Products of queries (KV, G, T, D) with keys (KV, 1, S, D), shape (KV, G, T, S), in the order said above."""
    padding = [(0, 0), (0, 0), (0, 0), (0, -q.shape[-1] % _LANES)]
    q, k = (np.pad(a, padding).reshape(*a.shape[:-1], -1, _LANES) for a in (q, k))
    sums = np.zeros((*q.shape[:3], k.shape[2], _LANES), np.float32)
    for j in range(q.shape[3]):
        sums += q[:, :, :, None, j] * k[:, :, None, :, j]
    width = _LANES
    while width > 1:
        width //= 2
        sums = sums[..., :width] + sums[..., width : 2 * width]
    return sums[..., 0]
