"""What a step computes: the student, where asked for the teacher, and the losses between them.

Only positions that a loss counts go through the vocabulary: of a classified text of 60 tokens one, so that the output
head, a quarter of the parameters of a 135 M model, costs next to nothing.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitnet_ref.distill.config import Losses
from bitnet_ref.distill.losses import attention_relation_loss, logits_loss
from bitnet_ref.distill.student import capture_qkv
from bitnet_ref.distill.trainer import Counts

__all__ = ["Distillation", "LanguageModelling", "Scored", "answer_positions", "label_positions"]


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
    """L = L_CE + lambda L_LD + gamma L_AD, [BitDistill, Eq. 13].

    Parameters
    ----------
    student, teacher : Module
        No parameter of the teacher is trained, and it is not part of the state of this module.
    losses : Losses

    Raises
    ------
    ValueError
        If the vocabularies differ, or the layer is not there.

    Notes
    -----
    Terms with weight 0 are not computed. Queries, keys and values are caught by hooks, which :meth:`close` removes.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, losses: Losses) -> None:
        super().__init__()
        sizes = student.lm_head.out_features, teacher.lm_head.out_features
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"student and teacher must have one vocabulary, they have {sizes[0]} and {sizes[1]} tokens"
            )
        self.scored, self._losses = Scored(student), losses
        self._teacher = (Scored(teacher).eval().requires_grad_(False),)  # in a tuple, or it would be trained
        self._hooks = ExitStack()
        if losses.gamma:
            layer = losses.layer if losses.teacher_layer is None else losses.teacher_layer
            self._q = self._hooks.enter_context(capture_qkv(student, losses.layer, after_rope=losses.after_rope))
            self._p = self._hooks.enter_context(capture_qkv(teacher, layer, after_rope=losses.after_rope))

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, counts: Counts) -> dict[str, Tensor]:
        """``loss`` and its terms before their weights: ``ce``, ``ld``, ``ad``, each in nats a position."""
        losses = self._losses
        scored = label_positions(labels)
        if not losses.lambda_:
            compared = torch.zeros_like(scored)
        elif losses.positions == "tokens":
            compared = attention_mask.bool()
        else:
            compared = answer_positions(attention_mask, labels)
        wanted = scored | compared
        student = self.scored(input_ids, attention_mask, wanted)  # (N, V)
        terms = {"ce": _cross_entropy(student[scored[wanted]], labels) / max(counts.labels, 1)}
        total = terms["ce"]
        if losses.lambda_ or losses.gamma:
            with torch.no_grad():
                teacher = self._teacher[0](input_ids, attention_mask, compared)
        if losses.lambda_:
            rows = student[compared[wanted]]
            terms["ld"] = logits_loss(
                rows[None],
                teacher[None],
                torch.ones(1, len(rows), dtype=torch.bool, device=rows.device),
                tau=losses.tau,
                tau_squared=losses.tau_squared,
                normaliser=counts.tokens if losses.positions == "tokens" else counts.answers,
            )
            total = total + losses.lambda_ * terms["ld"]
        if losses.gamma:
            terms["ad"] = attention_relation_loss(
                tuple(self._q),
                tuple(self._p),
                attention_mask.bool(),
                heads=losses.heads,
                alphas=losses.alphas,
                causal=losses.causal,
                cosine=losses.cosine,
                normaliser=counts.tokens,
            )
            total = total + losses.gamma * terms["ad"]
        return {"loss": total, **terms}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the scored labels, in nats; `logits` are of the positions before them, in their order."""
    targets = labels[:, 1:]
    return functional.cross_entropy(logits.float(), targets[targets != -100], reduction="sum")
