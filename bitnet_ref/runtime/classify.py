"""Classification by the next token on the compiled kernels, and how its answers compare with another program's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bitnet_ref.formats.answers import Answers
from bitnet_ref.runtime.model import Model

__all__ = ["Agreement", "answer", "compare_answers"]


def answer(model: Model, asked: Answers, progress: Callable[[int, int], None] | None = None) -> Answers:
    """Answer the same prompts with another model.

    Parameters
    ----------
    model : Model
    asked : Answers
        Whose prompts and labels; its logits are not looked at.
    progress : callable(done, total), optional

    Returns
    -------
    Answers

    Raises
    ------
    ValueError
        If a token is not in the model's vocabulary or a prompt is longer than its context.
    """
    labels = np.asarray(asked.label_tokens)
    if labels.min() < 0 or labels.max() >= model.config.vocabulary:
        raise ValueError(f"label tokens must lie in 0..{model.config.vocabulary - 1}, got {labels.tolist()}")
    longest = max(map(len, asked.prompts))
    if longest > model.config.context:
        raise ValueError(f"the context of this model is {model.config.context} tokens, a prompt has {longest}")
    logits = np.empty((len(asked.prompts), len(labels)), np.float32)
    cache = model.new_cache(longest)
    for i, prompt in enumerate(asked.prompts):
        cache.length = 0
        logits[i] = model.prefill(prompt, cache)[-1][labels]
        if progress is not None:
            progress(i + 1, len(asked.prompts))
    return dataclasses.replace(asked, logits=logits, source=f"bitnet_ref kernels, {model!r}")


@dataclass(frozen=True)
class Agreement:
    """How two sets of answers to the same prompts differ.

    Attributes
    ----------
    n_prompts : int
    same_predictions : int
    largest_difference, median_difference : float
        Of a logit, as a share of the range of all logits of the first set.
    least_margin : float
        Smallest distance between the two largest logits of a prompt in the first set, as the same share: a
        prediction can only change where the margin is below twice the largest difference.
    accuracy, other_accuracy : float
        Of the first and of the second set; NaN if no right label is known.
    differing : tuple of int
        Prompts whose prediction is another one.
    """

    n_prompts: int
    same_predictions: int
    largest_difference: float
    median_difference: float
    least_margin: float
    accuracy: float
    other_accuracy: float
    differing: tuple[int, ...]


def compare_answers(expected: Answers, got: Answers) -> Agreement:
    """Compare two sets of answers.

    Raises
    ------
    ValueError
        If they are not to the same prompts with the same label tokens.
    """
    same = [list(p) for p in expected.prompts] == [list(p) for p in got.prompts]
    if not same or list(expected.label_tokens) != list(got.label_tokens):
        raise ValueError("answers can be compared only if they are to the same prompts with the same label tokens")
    span = float(np.ptp(expected.logits)) or 1.0
    difference = np.abs(expected.logits.astype(np.float64) - got.logits) / span
    ordered = np.sort(expected.logits.astype(np.float64), axis=1)
    differing = np.flatnonzero(expected.predicted != got.predicted)
    return Agreement(
        n_prompts=len(expected.prompts),
        same_predictions=len(expected.prompts) - len(differing),
        largest_difference=float(difference.max()),
        median_difference=float(np.median(difference)),
        least_margin=float((ordered[:, -1] - ordered[:, -2]).min() / span),
        accuracy=expected.accuracy,
        other_accuracy=got.accuracy,
        differing=tuple(differing.tolist()),
    )
