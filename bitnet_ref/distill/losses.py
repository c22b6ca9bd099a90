"""The losses of [BitDistill] for training, tested against :mod:`bitnet_ref.reference.losses`.

All is computed in float32, whatever autocast is on. `normaliser` is the number of positions to divide by; give that of
the whole batch where a batch is cut into parts, and the parts' losses add up to the batch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["attention_relation_loss", "causal_lm_loss", "hidden_state_loss", "logits_loss"]


def causal_lm_loss(logits: Tensor, labels: Tensor, *, normaliser: float | None = None) -> Tensor:
    """Cross-entropy of the next token, [BitDistill, Eq. 7].

    Parameters
    ----------
    logits : tensor of shape (B, T, V), floating point
    labels : tensor of shape (B, T), int64
        The token *at* each position, or -100 where it is not scored; position t is predicted from t - 1.
    normaliser : float, optional
        Instead of the number of scored labels here.

    Returns
    -------
    tensor of shape (), float32, in nats

    Raises
    ------
    ValueError
        If no label is scored.
    """
    scored = labels[:, 1:] != -100
    targets = labels[:, 1:][scored]
    n = _count(scored)
    # Only scored positions leave the vocabulary's width: a prompt of 500 tokens with one label costs one row.
    sums = functional.cross_entropy(logits[:, :-1][scored].float(), targets, reduction="sum")
    return sums / (n if normaliser is None else normaliser)


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    tau: float = 5.0,
    tau_squared: bool = False,
    normaliser: float | None = None,
) -> Tensor:
    """Logits distillation, [BitDistill, Eq. 8-9]; see :func:`bitnet_ref.reference.losses.logits_loss`.

    Parameters
    ----------
    student, teacher : tensor of shape (B, T, V), floating point
        No gradient flows into the teacher's.
    mask : tensor of shape (B, T), bool
    tau, tau_squared
        Temperature, and whether to multiply by its square.
    normaliser : float, optional
        Instead of the number of positions in the mask.

    Returns
    -------
    tensor of shape (), float32, in nats

    Raises
    ------
    ValueError
        If no position counts.
    """
    n = _count(mask)
    with torch.autocast(student.device.type, enabled=False):
        log_p = functional.log_softmax(teacher.detach()[mask].float() / tau, -1)  # (N, V)
        log_q = functional.log_softmax(student[mask].float() / tau, -1)
        kl = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return kl * (tau**2 if tau_squared else 1.0) / (n if normaliser is None else normaliser)


def attention_relation_loss(
    student: tuple[Tensor, Tensor, Tensor],
    teacher: tuple[Tensor, Tensor, Tensor],
    mask: Tensor,
    *,
    heads: int,
    alphas: tuple[float, float, float] = (1.0, 1.0, 1.0),
    causal: bool = True,
    cosine: bool = False,
    normaliser: float | None = None,
) -> Tensor:
    """Attention-relation distillation, [BitDistill, Eq. 10-12].

    Parameters
    ----------
    student, teacher : three tensors of shape (B, T, W_j), floating point
        Queries, keys and values of one layer, all heads side by side; the widths may differ. No gradient flows into the
        teacher's.
    mask : tensor of shape (B, T), bool
        True for real tokens, False for padding.
    heads, alphas, causal, cosine
        As in :func:`bitnet_ref.reference.losses.attention_relation_loss`.
    normaliser : float, optional
        Instead of the number of real tokens.

    Returns
    -------
    tensor of shape (), float32, in nats

    Raises
    ------
    ValueError
        If every token is padding, or `heads` does not divide a width.

    Notes
    -----
    One relation at a time has B * heads * T * T float32 for student and teacher each.
    """
    n = _count(mask)
    t = mask.shape[1]
    visible = mask[:, None, :].expand(-1, t, -1)  # (B, T, T): may the row's token see the column's?
    if causal:
        visible = visible & torch.ones(t, t, dtype=torch.bool, device=mask.device).tril()
    # Rows of padding do not count, but must stay finite: their gradients would be NaN times 0.
    hidden = ~(visible | torch.eye(t, dtype=torch.bool, device=mask.device))[:, None]  # (B, 1, T, T)
    total = torch.zeros((), device=mask.device)
    with torch.autocast(mask.device.type, enabled=False):
        for alpha, s, a in zip(alphas, student, teacher, strict=True):
            log_p = _log_relations(a.detach(), hidden, heads, cosine)
            log_q = _log_relations(s, hidden, heads, cosine)
            kl = log_p.exp() * (log_p - log_q).masked_fill(hidden, 0)  # (B, A_r, T, T)
            total = total + alpha * (kl.sum((1, 3)) * mask).sum()
    return total / (heads * (n if normaliser is None else normaliser))


def hidden_state_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, *, normaliser: float | None = None
) -> Tensor:
    """Distance of hidden states; see :func:`bitnet_ref.reference.losses.hidden_state_loss`.

    Parameters
    ----------
    student, teacher : L tensors of shape (B, T, K), floating point
        No gradient flows into the teacher's.
    mask : tensor of shape (B, T), bool
        True for real tokens, False for padding.
    normaliser : float, optional
        Instead of the number of real tokens.

    Returns
    -------
    tensor of shape (), float32

    Raises
    ------
    ValueError
        If every token is padding.
    """
    n = _count(mask)
    total = torch.zeros((), device=mask.device)
    with torch.autocast(mask.device.type, enabled=False):
        for s, h in zip(student, teacher, strict=True):
            h = h.detach()[mask].float()  # (N, K)
            total = total + ((s[mask].float() - h).square().sum(-1) / h.square().sum(-1)).sum()
    return total / (len(student) * (n if normaliser is None else normaliser))


def _log_relations(a: Tensor, hidden: Tensor, heads: int, cosine: bool) -> Tensor:
    """Logarithms of the relations, (B, A_r, T, T); where `hidden`, the least finite number, whose exponential is 0."""
    b, t, width = a.shape
    if width % heads:
        raise ValueError(f"the number of relation heads must divide the width, got {heads} heads and width {width}")
    split = a.float().view(b, t, heads, -1).transpose(1, 2)  # (B, A_r, T, d_r)
    split = functional.normalize(split, dim=-1, eps=1e-8) if cosine else split / (width // heads) ** 0.25
    scores = split @ split.transpose(2, 3)
    return functional.log_softmax(scores.masked_fill(hidden, torch.finfo(torch.float32).min), -1)


def _count(mask: Tensor) -> int:
    n = int(mask.sum())
    if not n:
        raise ValueError("at least one position must count in the loss, got a mask without any")
    return n
