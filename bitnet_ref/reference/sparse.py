"""Products with some rows of a packed matrix: what a gated feed-forward network needs of its weights for one token.

With ``y = W_down SubLN(relu(W_gate z)^2 * (W_up z))`` a row of W_up counts only where its gate is positive, and a
column of W_down only where its int8 activation is not zero. Both are rows of a matrix in the layout ``base3r``: W_up by
:func:`dot_rows`, and W_down transposed by :func:`add_rows`.

Nothing is approximated. A gate that is not positive makes ``relu(.)^2 * up`` a zero of either sign, whatever `up` is.
The squares of both zeros are +0, so the mean square of SubLN is the same; a zero times a finite number is a zero, which
is not the largest magnitude of the token unless all are zero, and rounds to the integer 0. Activations and their scale
are therefore the same bits, and int32 sums are exact in any order. (`up` must be finite: float32 overflow in a row that
does not count makes NaN in the dense network, which refuses it, and goes unseen here.)
"""

from __future__ import annotations

import numpy as np

from bitnet_ref.reference.packing import PackedTernary

__all__ = ["add_rows", "dot_rows"]


def dot_rows(x_q: np.ndarray, packed: PackedTernary, rows: np.ndarray) -> np.ndarray:
    """Inner products of one token with the listed rows.

        out[i] = sum over k of w_q[rows[i], k] * x_q[k]

    Parameters
    ----------
    x_q : ndarray of shape (K,), int8
    packed : PackedTernary of shape (M, K)
    rows : ndarray of shape (n,), integers in 0..M-1

    Returns
    -------
    ndarray of shape (n,), int32
    """
    return packed.unpack()[rows].astype(np.int32) @ x_q.astype(np.int32)


def add_rows(x_q: np.ndarray, packed: PackedTernary, rows: np.ndarray) -> np.ndarray:
    """Sum of the listed rows, each times its activation: the product with the transpose, where the others are zero.

        out[k] = sum over i of x_q[rows[i]] * w_q[rows[i], k]

    Parameters
    ----------
    x_q : ndarray of shape (M,), int8
    packed : PackedTernary of shape (M, K)
    rows : ndarray of shape (n,), integers in 0..M-1; one that is listed twice counts twice

    Returns
    -------
    ndarray of shape (K,), int32
    """
    return x_q[rows].astype(np.int32) @ packed.unpack()[rows].astype(np.int32)
