"""What a classifier answered to each of its prompts: one safetensors file, so that another program can be held to it.

Tensors: ``tokens`` int32, all prompts end to end; ``lengths`` int64 (N,); ``label_tokens`` int64 (L,); ``logits``
float32 (N, L), of the label tokens behind each prompt; ``correct`` int64 (N,), the index of the right label or -1 where
it is not known. Metadata: ``format``, ``labels`` (JSON list of L names) and ``source`` (what computed the logits).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bitnet_ref.errors import FormatError

__all__ = ["ANSWERS_FORMAT", "Answers", "read_answers", "write_answers"]

ANSWERS_FORMAT = "bitnet_ref.answers/1"


@dataclass(frozen=True, eq=False)
class Answers:
    """Prompts, and the logits of each label behind them.

    Parameters
    ----------
    prompts : sequence of N sequences of int
        Token numbers; none is empty.
    label_tokens : sequence of L different ints
        The one token that stands for each label.
    labels : sequence of L str
    logits : ndarray of shape (N, L), float32
    correct : ndarray of shape (N,), int64
        Index of the right label; -1 where it is not known.
    source : str
        What computed the logits.

    Raises
    ------
    ValueError
        If the numbers of prompts and labels do not agree, a prompt is empty, a label token comes twice, or a logit is
        not finite.
    """

    prompts: Sequence[Sequence[int]]
    label_tokens: Sequence[int]
    labels: Sequence[str]
    logits: np.ndarray
    correct: np.ndarray
    source: str

    def __post_init__(self) -> None:
        n, n_labels = len(self.prompts), len(self.label_tokens)
        if self.logits.shape != (n, n_labels) or len(self.labels) != n_labels or self.correct.shape != (n,):
            raise ValueError(
                f"answers to {n} prompts with {n_labels} label tokens must have logits of shape ({n}, {n_labels}), "
                f"{n_labels} labels and {n} right ones, got {self.logits.shape}, {len(self.labels)} and "
                f"{self.correct.shape}"
            )
        if not n or min(map(len, self.prompts)) < 1:
            raise ValueError("answers must be to at least one prompt, each of at least one token")
        if n_labels < 2 or len(set(self.label_tokens)) != n_labels:
            raise ValueError(f"label tokens must be at least two different ones, got {list(self.label_tokens)}")
        if not np.isfinite(self.logits).all():
            raise ValueError("the logits of answers must be finite")
        if self.correct.min() < -1 or self.correct.max() >= n_labels:
            raise ValueError(f"the right labels must be -1 or 0..{n_labels - 1}, got {self.correct.min()}..")

    @property
    def predicted(self) -> np.ndarray:
        """Index of the label with the largest logit, the first of equals; shape (N,), int64."""
        return self.logits.argmax(axis=1)

    @property
    def accuracy(self) -> float:
        """Share of right answers among the prompts whose right label is known; NaN if there is none."""
        known = self.correct >= 0
        return float(np.mean(self.predicted[known] == self.correct[known])) if known.any() else float("nan")


def write_answers(answers: Answers, path: str | os.PathLike[str]) -> None:
    """Write the file; it gets its name when it is complete."""
    path = Path(path)
    tensors = {
        "tokens": np.concatenate([np.asarray(p, np.int32) for p in answers.prompts]),
        "lengths": np.array([len(p) for p in answers.prompts], np.int64),
        "label_tokens": np.asarray(answers.label_tokens, np.int64),
        "logits": np.ascontiguousarray(answers.logits, np.float32),
        "correct": np.asarray(answers.correct, np.int64),
    }
    metadata = {"format": ANSWERS_FORMAT, "labels": json.dumps(list(answers.labels)), "source": answers.source}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_answers(path: str | os.PathLike[str]) -> Answers:
    """Read a file that :func:`write_answers` wrote.

    Raises
    ------
    FormatError
        If it is not one, or its parts do not agree.
    """
    try:
        with safe_open(path, "numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != ANSWERS_FORMAT:
                raise FormatError(f"{path}: answers have the format {ANSWERS_FORMAT}, got {metadata.get('format')!r}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        labels = json.loads(metadata.get("labels", "null"))
        kinds = {"tokens": "i4", "lengths": "i8", "label_tokens": "i8", "logits": "f4", "correct": "i8"}
        if {name: a.dtype.str[1:] for name, a in tensors.items()} != kinds or not isinstance(labels, list):
            raise FormatError(f"{path}: answers must hold {', '.join(kinds)} and a list of labels")
        lengths = tensors["lengths"]
        if lengths.ndim != 1 or (lengths < 1).any() or lengths.sum() != tensors["tokens"].size:
            raise FormatError(f"{path}: the lengths of prompts must be positive and add up to the tokens")
        prompts = [p.tolist() for p in np.split(tensors["tokens"], np.cumsum(lengths)[:-1])]
        return Answers(
            prompts,
            tensors["label_tokens"].tolist(),
            [str(label) for label in labels],
            tensors["logits"],
            tensors["correct"],
            metadata.get("source", ""),
        )
    except (SafetensorError, ValueError, OSError) as error:
        if isinstance(error, FormatError | FileNotFoundError):
            raise
        raise FormatError(f"{path}: {error}") from error
