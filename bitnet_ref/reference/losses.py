"""The losses of [BitDistill] and one of hidden states, in float64 and without tricks: what training is tested by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["attention_relation_loss", "hidden_state_loss", "logits_loss", "relations"]


def logits_loss(
    student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, *, tau: float = 5.0, tau_squared: bool = False
) -> float:
    """Logits distillation, [BitDistill, Eq. 8-9].

        L_LD = 1/N sum_t KL( softmax(teacher_t / tau) || softmax(student_t / tau) )

    Parameters
    ----------
    student, teacher : ndarray of shape (B, T, V), floating point
    mask : ndarray of shape (B, T), bool
        The N positions that count.
    tau : float, positive
        Temperature.
    tau_squared : bool
        Multiply by tau^2, which keeps the size of the gradient independent of tau.

    Returns
    -------
    float, in nats

    Raises
    ------
    ValueError
        If no position counts.

    Notes
    -----
    Differs: the equation has no tau^2; the authors' code multiplies by it (``tau_squared``).
    """
    if not mask.any():
        raise ValueError("at least one position must count in the loss, got a mask without any")
    log_p = _log_softmax(teacher[mask].astype(np.float64) / tau)  # (N, V)
    log_q = _log_softmax(student[mask].astype(np.float64) / tau)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)  # (N,)
    return float(np.mean(kl) * (tau**2 if tau_squared else 1.0))


def relations(a: np.ndarray, real: np.ndarray, *, heads: int, causal: bool = True, cosine: bool = False) -> np.ndarray:
    """How much each token of one sequence relates to each other one, [BitDistill, Eq. 12].

        R = softmax( A A^T / sqrt(d_r) ),   d_r = W / A_r

    Parameters
    ----------
    a : ndarray of shape (T, W), floating point
        Queries, keys or values of all heads of the network side by side.
    real : ndarray of shape (T,), bool
        False for padding, which no token relates to.
    heads : int
        A_r, the number of heads that W is split into anew; it divides W.
    causal : bool
        A token relates to itself and to earlier ones only.
    cosine : bool
        Divide each head's vectors by their length instead of the products by sqrt(d_r).

    Returns
    -------
    ndarray of shape (A_r, T, T), float64
        Rows of real tokens sum to 1; rows of padding are 0.

    Raises
    ------
    ValueError
        If A_r does not divide W.

    Notes
    -----
    Differs: Eq. 12 shows no mask. Here padding never counts, and by default no token sees a later one, as in the
    attention that the loss is named after; ``causal=False`` is the equation to the letter.
    """
    t, width = a.shape
    if width % heads:
        raise ValueError(f"the number of relation heads must divide the width, got {heads} heads and width {width}")
    split = a.astype(np.float64).reshape(t, heads, -1).transpose(1, 0, 2)  # (A_r, T, d_r)
    if cosine:
        split = split / np.maximum(np.linalg.norm(split, axis=-1, keepdims=True), 1e-8)
    else:
        split = split / (width // heads) ** 0.25  # in both factors: d_r^(1/4) twice is sqrt(d_r)
    scores = split @ split.transpose(0, 2, 1)  # (A_r, T, T)
    visible = real & (np.tri(t, dtype=bool) if causal else np.ones((t, t), bool))  # (T, T)
    out = np.zeros_like(scores)
    for row in np.flatnonzero(real):
        seen = visible[row]
        out[:, row, seen] = np.exp(_log_softmax(scores[:, row, seen]))
    return out


def attention_relation_loss(
    student: tuple[np.ndarray, np.ndarray, np.ndarray],
    teacher: tuple[np.ndarray, np.ndarray, np.ndarray],
    mask: np.ndarray,
    *,
    heads: int,
    alphas: tuple[float, float, float] = (1.0, 1.0, 1.0),
    causal: bool = True,
    cosine: bool = False,
) -> float:
    """Attention-relation distillation of one layer, [BitDistill, Eq. 10-12].

        L_AD = sum_j alpha_j / (A_r N) sum_a sum_t KL( R_teacher[j, a, t] || R_student[j, a, t] ),   j in Q, K, V

    Parameters
    ----------
    student, teacher : three ndarrays of shape (B, T, W_j), floating point
        Queries, keys and values of the layer; the widths of student and teacher may differ.
    mask : ndarray of shape (B, T), bool
        The N real tokens; False for padding.
    heads, causal, cosine
        As in :func:`relations`.
    alphas : three floats
        Weights of the Q, K and V relations.

    Returns
    -------
    float, in nats

    Raises
    ------
    ValueError
        If every token is padding, or A_r does not divide a width.
    """
    if not mask.any():
        raise ValueError("at least one position must count in the loss, got a mask without any")
    options = {"heads": heads, "causal": causal, "cosine": cosine}
    total = 0.0
    for alpha, s, t in zip(alphas, student, teacher, strict=True):
        for row, real in enumerate(mask):
            p, q = relations(t[row], real, **options), relations(s[row], real, **options)
            counts = p > 0
            total += alpha * float(np.sum(p[counts] * (np.log(p[counts]) - np.log(q[counts]))))
    return total / (heads * int(mask.sum()))


def hidden_state_loss(student: Sequence[np.ndarray], teacher: Sequence[np.ndarray], mask: np.ndarray) -> float:
    """Distance of the hidden states behind every block, after [TernaryBERT], which compares all layers.

        L_HD = 1 / (L N) sum_l sum_t |s_lt - h_lt|^2 / |h_lt|^2

    Parameters
    ----------
    student, teacher : L ndarrays of shape (B, T, K), floating point
        s and h: the residual stream behind each block.
    mask : ndarray of shape (B, T), bool
        The N real tokens; False for padding.

    Returns
    -------
    float
        0 for equal states; 1 for a student of zeros.

    Raises
    ------
    ValueError
        If every token is padding.

    Notes
    -----
    Differs: there it is a mean of squares. Here each token is measured by its own length, since a residual stream
    grows from block to block and is a thousand times as long on the first token of a text as on others.
    """
    if not mask.any():
        raise ValueError("at least one position must count in the loss, got a mask without any")
    total = 0.0
    for s, h in zip(student, teacher, strict=True):
        s, h = s[mask].astype(np.float64), h[mask].astype(np.float64)  # (N, K)
        total += float(np.mean(np.sum((s - h) ** 2, -1) / np.sum(h**2, -1)))
    return total / len(student)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
