"""The blocks of a student trained one after the other, each to give what the teacher's block gives.

A student that is made ternary all at once is a stranger to its own weights: an error of the first block goes through
all others, and the gradient of a distant loss has to find it. Here each block has a loss of its own. What it reads is
what the student's blocks before it, which are done, really give; what it should give is the residual stream of the
full-precision teacher behind the same block. So a block repairs what those before it left, and a step costs a small
part of a step of the whole network.

The idea of training blocks one by one is that of BRECQ (arXiv 2102.05426) and, with all weights of a block trainable,
of EfficientQAT (arXiv 2407.11062). It is this project's addition to [BitDistill], in place of continued pre-training.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitnet_ref.distill.config import Blocks, digest
from bitnet_ref.distill.losses import hidden_state_loss
from bitnet_ref.distill.trainer import Batch, Counts, Devices, Result, load_weights, save_weights, set_strength, train

__all__ = ["BlockAlone", "BlockReconstruction", "train_blocks"]

_HELD_OUT = 16
"""One batch in so many measures the error and is not trained on."""


class _Through(nn.Module):
    """Stands where a block was, and does nothing."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """Its input."""
        return hidden_states


class BlockAlone(nn.Module):
    """One block of a causal language model, with the positions and masks that it has in its model.

    Parameters
    ----------
    model : Module
        Of one of the families of :mod:`bitnet_ref.distill.student`. It is not changed; the block is shared.
    index : int
        From 0.
    """

    def __init__(self, model: nn.Module, index: int) -> None:
        super().__init__()
        self.model = model.model.layers[index]
        # The model's own code makes masks and rotations, which differ between families and layers: it runs with all
        # other blocks, and the last norm, taken out.
        around = copy.copy(model.model)
        around._modules = dict(model.model._modules)
        around.layers = nn.ModuleList(self.model if i == index else _Through() for i in range(len(model.model.layers)))
        around.norm = nn.Identity()
        self._around = (around,)  # in a tuple, so that its parameters are not this module's

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """The residual stream behind the block, (B, T, K), for that before it; mask of shape (B, T), int64."""
        mask = None if attention_mask.all() else attention_mask
        return self._around[0](inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state


class BlockReconstruction(nn.Module):
    """The distance of a block's output from its target, see :func:`bitnet_ref.reference.losses.hidden_state_loss`.

    Parameters
    ----------
    alone : BlockAlone
    """

    def __init__(self, alone: BlockAlone) -> None:
        super().__init__()
        self.scored = alone

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        stream: Tensor,
        target: Tensor,
        counts: Counts,
    ) -> dict[str, Tensor]:
        """``loss``: the mean over tokens, in units of the target's squared length.

        Parameters
        ----------
        input_ids, attention_mask, labels : tensor of shape (B, T), int64
            Of these only the mask counts.
        stream, target : tensor of shape (B, T, K), float32
            Before the block, of the student; behind it, of the teacher.
        counts : Counts
        """
        found = self.scored(stream, attention_mask)
        return {"loss": hidden_state_loss([found], [target], attention_mask.bool(), normaliser=counts.tokens)}


class _Streams:
    """The residual streams of student and teacher before one block, for all batches."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, batches: Sequence[Batch], devices: Devices, autocast: bool
    ) -> None:
        self.batches, self._devices, self._autocast = batches, devices, autocast
        with torch.no_grad():
            self.student, self.teacher = (
                [model.model.embed_tokens(self._put(b["input_ids"])).float().cpu() for b in batches]
                for model in (student, teacher)
            )
        self.target: list[Tensor] = []

    def look(self, teacher: BlockAlone) -> None:
        """Make the targets: the teacher's streams behind its block."""
        self.target = self._through(teacher, self.teacher)

    def go_on(self, student: BlockAlone) -> None:
        """Pass the student's streams through its block, which is done, and step over to the next."""
        self.student = self._through(student, self.student)
        self.teacher = self.target

    def batch(self, i: int) -> Batch:
        """What :class:`BlockReconstruction` is trained with."""
        return {**self.batches[i], "stream": self.student[i].numpy(), "target": self.target[i].numpy()}

    @torch.no_grad()
    def error(self, student: BlockAlone, chosen: Sequence[int]) -> float:
        """Mean over the tokens of some batches of the loss."""
        total, n = 0.0, 0
        for i in chosen:
            mask = torch.from_numpy(self.batches[i]["attention_mask"]).bool()
            found = self._pass(student, self.student[i], i)
            total += float(hidden_state_loss([found], [self.target[i]], mask, normaliser=1))
            n += int(mask.sum())
        return total / n

    def _through(self, alone: BlockAlone, streams: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [self._pass(alone, x, i) for i, x in enumerate(streams)]

    def _pass(self, alone: BlockAlone, x: Tensor, i: int) -> Tensor:
        device = self._devices.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            return alone(self._put(x), self._put(self.batches[i]["attention_mask"])).float().cpu()

    def _put(self, value: Any) -> Tensor:
        return torch.as_tensor(value).to(self._devices.device)


def train_blocks(
    student: nn.Module,
    teacher: nn.Module,
    settings: Blocks,
    batches: Sequence[Batch],
    folder: str | Path,
    *,
    stage: str,
    identity: str,
    seed: int = 0,
    devices: Devices | None = None,
    say: Callable[[str], None] | None = None,
    quiet: bool = False,
) -> tuple[Result, list[dict[str, float]]]:
    """Train the blocks of a student, or go on with them; other parameters stay as they are.

    Parameters
    ----------
    student, teacher : Module
        Causal language models of one family with as many blocks of one width, on the device.
    settings : Blocks
        ``steps`` is of each block.
    batches : sequence of Batch
        At least two. One in sixteen measures the error and is not trained on.
    folder : path
        For ``block-00`` and so on, each with ``metrics.jsonl`` and, when it is done, ``weights.safetensors``.
    stage, identity, devices, quiet
        As of :func:`bitnet_ref.distill.trainer.train`.
    seed : int
        Of the order of the batches.
    say : callable, optional
        Is told in a sentence what happens.

    Returns
    -------
    result : Result
        Steps, seconds and tokens of all blocks together; ``score`` is minus the error behind the last block.
    errors : list of dict
        For each block ``before`` and ``after`` its training: the mean over held-out tokens of the squared distance from
        the teacher's stream, in units of its squared length.

    Raises
    ------
    ValueError
        If the models do not fit, there are too few batches, or blocks would be sharded (FSDP).
    Diverged
        See :func:`bitnet_ref.distill.trainer.train`.

    Notes
    -----
    The streams before a block and behind it, 3 x tokens x hidden float32, are kept in memory.
    """
    devices = devices or Devices.start()
    say = say or (lambda text: None)
    folder = Path(folder)
    n = len(student.model.layers)
    widths = [(len(m.model.layers), m.config.hidden_size) for m in (student, teacher)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"student and teacher must have as many blocks of one width, got {widths[0][0]} blocks of {widths[0][1]} "
            f"and {widths[1][0]} of {widths[1][1]}"
        )
    if len(batches) < 2:
        raise ValueError(f"blocks must have at least 2 batches, one of them to measure the error, got {len(batches)}")
    if devices.sharding == "full":
        raise ValueError("blocks are trained one by one, each whole on its device: start them without FSDP")
    held_out = list(range(0, len(batches), _HELD_OUT))
    trained = [i for i in range(len(batches)) if i % _HELD_OUT]
    order = _order(trained, settings.steps, seed)
    streams = _Streams(student, teacher, batches, devices, devices.uses_bfloat16(settings))
    cells = sum(b["input_ids"].size for b in batches)
    say(f"{cells:,} tokens with padding; their streams take {3 * 4 * cells * widths[0][1] / 1e6:,.0f} MB of memory")
    total = Result(0, 0, None, 0.0, 0, False)
    errors: list[dict[str, float]] = []
    student.eval()
    for index in range(n):
        alone = BlockAlone(student, index)
        part = folder / f"block-{index:02d}"
        streams.look(BlockAlone(teacher, index))
        own = digest(identity, index)
        done = _restore(part / "weights.safetensors", alone.model, own)
        if done is None:
            before = streams.error(alone, held_out)
            found = train(
                BlockReconstruction(alone),
                replace(settings, evaluate_every=0, patience=0),
                lambda step: streams.batch(order[step]),
                part,
                stage=f"{stage}, block {index + 1} of {n}",
                identity=own,
                devices=devices,
                quiet=quiet,
            )
            set_strength(alone.model, 1.0)
            after = streams.error(alone, held_out)
            done = {
                "identity": own,
                "steps": found.step,
                "seconds": found.seconds,
                "tokens": found.tokens,
                "errors": {"before": before, "after": after},
            }
            _keep(part, alone.model, done, devices)
            say(f"block {index + 1} of {n}: error {before:.4f} before, {after:.4f} after")
        errors.append(done["errors"])
        total = replace(
            total,
            step=total.step + done["steps"],
            best_step=total.step + done["steps"],
            score=-errors[-1]["after"],
            seconds=round(total.seconds + done["seconds"], 2),
            tokens=total.tokens + done["tokens"],
        )
        streams.go_on(alone)
    return total, errors


def _order(trained: Sequence[int], steps: int, seed: int) -> list[int]:
    """Which batch each step has: all of them in a new order, again and again."""

    def endless() -> Iterator[int]:
        random = np.random.default_rng(seed)
        while True:
            yield from (trained[i] for i in random.permutation(len(trained)))

    return [i for i, _ in zip(endless(), range(steps), strict=False)]


def _restore(path: Path, block: nn.Module, identity: str) -> dict[str, Any] | None:
    """Put the weights of a block that is done in place; what is known about it, or None if it is not done."""
    if not path.exists():
        return None
    about = load_weights(path, block)
    if about["identity"] != identity:
        raise ValueError(f"{path} must be of this configuration, data and model to go on from; it is of others")
    return about


def _keep(part: Path, block: nn.Module, about: dict[str, Any], devices: Devices) -> None:
    """Write the weights of a block, whole or not there, and remove its checkpoint."""
    if devices.main:
        temporary = part / ".weights.safetensors"
        save_weights(temporary, block, about)
        os.replace(temporary, part / "weights.safetensors")
        for name in ("last.safetensors", "best.safetensors"):
            (part / name).unlink(missing_ok=True)
    devices.barrier()
