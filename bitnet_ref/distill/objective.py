"""What a step computes: the student, where asked for the teacher, and the losses between them.

Only positions that a loss counts go through the vocabulary: of a classified text of 60 tokens one, so that the output
head, a quarter of the parameters of a 135 M model, costs next to nothing.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitnet_ref.distill.config import Losses
from bitnet_ref.distill.losses import attention_relation_loss, hidden_state_loss, logits_loss
from bitnet_ref.distill.student import capture_hidden, capture_qkv
from bitnet_ref.distill.teacher_cache import coarsen
from bitnet_ref.distill.trainer import Counts

__all__ = ["Distillation", "LanguageModelling", "Scored", "answer_positions", "compared_positions", "label_positions"]


def label_positions(labels: Tensor) -> Tensor:
    """Mask of shape (B, T), bool: the positions whose *next* token is a scored label; never the last."""
    return functional.pad(labels[:, 1:] != -100, (0, 1))


class Scored(nn.Module):
    """A causal language model of ``transformers`` that gives logits at some positions only.

    Parameters
    ----------
    model : Module
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Logits of shape (N, V).

        Parameters
        ----------
        input_ids, attention_mask : tensor of shape (B, T), int64
        positions : tensor of shape (B, T), bool
            N of them.
        """
        model = self.model
        hidden = model.model(
            input_ids=input_ids, attention_mask=None if attention_mask.all() else attention_mask, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden[positions].to(model.lm_head.weight.dtype))  # (N, hidden) -> (N, V)
        cap = getattr(model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


def answer_positions(attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Mask of shape (B, T), bool: :func:`label_positions`; where a row has no label, its last real token."""
    found = label_positions(labels)
    real = attention_mask.bool()
    last = real & ~functional.pad(real[:, 1:], (0, 1))  # padding is on one side, so each row has one
    return found | (last & ~found.any(1, keepdim=True))


def compared_positions(losses: Losses, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Mask of shape (B, T), bool: where the logits of student and teacher are compared."""
    if not losses.lambda_:
        return torch.zeros_like(attention_mask, dtype=torch.bool)
    return attention_mask.bool() if losses.positions == "tokens" else answer_positions(attention_mask, labels)


class LanguageModelling(nn.Module):
    """Cross-entropy of the scored labels: fine-tuning and continued pre-training, [BitDistill, Eq. 7].

    Parameters
    ----------
    model : Module
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scored = Scored(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, counts: Counts) -> dict[str, Tensor]:
        """``loss``: the sum in nats, divided by ``counts.labels``."""
        logits = self.scored(input_ids, attention_mask, label_positions(labels))
        return {"loss": _cross_entropy(logits, labels) / counts.labels}


class Distillation(nn.Module):
    """L = L_CE + lambda L_LD + gamma L_AD, [BitDistill, Eq. 13], and if asked for the distance of hidden states.

    Parameters
    ----------
    student : Module
    teacher : LiveTeacher or TeacherCache
        See :mod:`bitnet_ref.distill.teacher_cache`; it gives the relations if gamma is above 0, and the hidden states
        if their weight is.
    losses : Losses

    Raises
    ------
    ValueError
        If the layer is not there.

    Notes
    -----
    Terms with weight 0 are not computed. Queries, keys and values of the student are caught by hooks, which
    :meth:`close` removes.
    """

    def __init__(self, student: nn.Module, teacher: Any, losses: Losses) -> None:
        super().__init__()
        self.scored, self._teacher, self._losses = Scored(student), teacher, losses
        self._hooks = ExitStack()
        if losses.gamma:
            self._qkv = self._hooks.enter_context(capture_qkv(student, losses.layer, after_rope=losses.after_rope))
        if losses.hidden:
            self._hidden = self._hooks.enter_context(capture_hidden(student))

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, counts: Counts) -> dict[str, Tensor]:
        """``loss`` and its terms before their weights: ``ce``, ``ld``, ``ad`` in nats a position, ``hd``."""
        losses = self._losses
        scored = label_positions(labels)
        compared = compared_positions(losses, attention_mask, labels)
        wanted = scored | compared
        student = self.scored(input_ids, attention_mask, wanted)  # (N, V)
        terms = {"ce": _cross_entropy(student[scored[wanted]], labels) / max(counts.labels, 1)}
        total = terms["ce"]
        if losses.lambda_ or losses.gamma or losses.hidden:
            teacher = self._teacher.outputs(input_ids, attention_mask, compared)
        if losses.lambda_:
            rows = student[compared[wanted]]
            if teacher.indices is not None:
                rows = coarsen(rows, teacher.indices, losses.tau)
            terms["ld"] = logits_loss(
                rows[None],
                teacher.logits[None],
                torch.ones(1, len(rows), dtype=torch.bool, device=rows.device),
                tau=losses.tau,
                tau_squared=losses.tau_squared,
                normaliser=counts.tokens if losses.positions == "tokens" else counts.answers,
            )
            total = total + losses.lambda_ * terms["ld"]
        if losses.gamma:
            terms["ad"] = attention_relation_loss(
                tuple(self._qkv),
                teacher.relations,
                attention_mask.bool(),
                heads=losses.heads,
                alphas=losses.alphas,
                causal=losses.causal,
                cosine=losses.cosine,
                normaliser=counts.tokens,
            )
            total = total + losses.gamma * terms["ad"]
        if losses.hidden:
            terms["hd"] = hidden_state_loss(
                self._hidden, teacher.hidden, attention_mask.bool(), normaliser=counts.tokens
            )
            total = total + losses.hidden * terms["hd"]
        return {"loss": total, **terms}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the scored labels, in nats; `logits` are of the positions before them, in their order."""
    targets = labels[:, 1:]
    return functional.cross_entropy(logits.float(), targets[targets != -100], reduction="sum")
