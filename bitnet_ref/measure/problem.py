"""The products that are timed: made from their sizes alone, so that every process has the same."""

from __future__ import annotations

import numpy as np

from bitnet_ref.measure.record import cache_bytes

__all__ = ["copies", "problem"]


def problem(m: int, k: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random (w_q (M, K) int8, x_q (T, K) int8, exact product (T, M) int32)."""
    rng = np.random.default_rng([m, k, tokens])
    w_q = rng.integers(-1, 2, (m, k), dtype=np.int8)
    x_q = rng.integers(-127, 128, (tokens, k), dtype=np.int8)
    if 127 * k < 2**24:  # every partial sum is a whole number that float32 holds
        return w_q, x_q, (x_q.astype(np.float32) @ w_q.T.astype(np.float32)).astype(np.int32)
    return w_q, x_q, x_q.astype(np.int32) @ w_q.T.astype(np.int32)


def copies(nbytes: int, tokens: int) -> int:
    """How many copies of one matrix are cycled over.

    Decoding reads every weight once: for one token the copies together exceed twice the last-level cache (32 MiB where
    that is unknown), and weights are cold, as they are in a model. For many tokens there is one.
    """
    return 1 if tokens > 1 else max(2, -(-2 * (cache_bytes() or 2**25) // nbytes))
