"""A trained student as the files that kernels and other programs run, with PyTorch's answers beside them as proof.

>>> round_tables(student)
>>> save_student(student, "student", ternary=True)
>>> write_answers(answer(student, prompts, label_tokens, labels, correct), "student-answers.safetensors")
>>> export_student("student", "out")

``bitnet-ref distill prove out/student.safetensors student-answers.safetensors`` then asks the kernels the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bitnet_ref.distill.exact import reference_arithmetic
from bitnet_ref.errors import FormatError
from bitnet_ref.formats import ConversionReport, convert
from bitnet_ref.formats.answers import Answers

__all__ = ["FORMS", "answer", "export_student", "round_tables"]

FORMS = {"packed": "student.safetensors", "hf-packed": "student-hf", "gguf-tq2_0": "student-tq2_0.gguf"}
"""What a student is converted to, and the name that each form gets."""


@torch.no_grad()
def round_tables(model: nn.Module) -> None:
    """Round embedding and head to float16, in place, so that files with float16 tables are the same network.

    Without it the files are another network in every activation: 2^-11 of an input is little, but near a half it makes
    another int8 of it. Measured on a random network of two layers, that moved logits by 0.4 % of their range.

    Parameters
    ----------
    model : Module
        A causal language model of ``transformers``.

    Raises
    ------
    ValueError
        If a value is beyond float16.
    """
    tables = {"embedding": model.get_input_embeddings().weight, "head": model.get_output_embeddings().weight}
    for name, table in tables.items():
        rounded = table.to(torch.float16)
        if not torch.isfinite(rounded).all():
            raise ValueError(f"the {name} must fit float16, its largest magnitude is {table.abs().max().item():g}")
        table.copy_(rounded)


def export_student(
    student: str | os.PathLike[str],
    out: str | os.PathLike[str],
    forms: Sequence[str] = tuple(FORMS),
    *,
    scheme: str = "base3",
    embedding: str = "f16",
) -> dict[str, ConversionReport | str]:
    """Round the master weights of a student once and write it in other forms.

    Parameters
    ----------
    student : path
        A folder that :func:`bitnet_ref.distill.student.save_student` wrote.
    out : path
        Folder for the results, made if missing; what is there under the same names is replaced.
    forms : sequence of str
        Keys of :data:`FORMS`.
    scheme : str
        Packing of the packed form.
    embedding : str
        Type of embedding and head in the packed form and in GGUF; the Hugging Face folder keeps float32.

    Returns
    -------
    dict
        For each form its report, or the sentence that says why that form cannot hold this network (GGUF has no
        architecture for it, or a row is no multiple of its block). Such a form leaves no file.

    Raises
    ------
    ValueError
        If a form is unknown, or the packed form, which holds every student, cannot be written.
    FormatError
        If the folder is not a student's.
    """
    unknown = [form for form in forms if form not in FORMS]
    if unknown:
        raise ValueError(f"a student is exported to {', '.join(FORMS)}, got {unknown[0]!r}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, ConversionReport | str] = {}
    for form in forms:
        options = {"scheme": scheme, "overwrite": True, "quantize": True}
        if form != "hf-packed":
            options["embedding"] = embedding
        try:
            results[form] = convert(student, out / FORMS[form], form, **options)
        except FormatError:
            raise
        except ValueError as error:
            if form == "packed":
                raise
            results[form] = str(error)
    return results


@torch.no_grad()
def answer(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    label_tokens: Sequence[int],
    labels: Sequence[str],
    correct: Sequence[int],
    *,
    exact: bool = True,
    batch_size: int = 16,
) -> Answers:
    """What a model answers to prompts: the logits of the label tokens behind each, in float32 without autocast.

    Parameters
    ----------
    model : Module
        A causal language model of ``transformers``; left in the mode, training or not, that it is in now.
    prompts : sequence of sequences of int
    label_tokens, labels, correct
        As in :class:`bitnet_ref.formats.answers.Answers`.
    exact : bool
        Round where the reference rounds, see :func:`bitnet_ref.distill.exact.reference_arithmetic`: the kernels then
        give the same logits to the bit. Otherwise in PyTorch's own order, which is faster and as good a float32.
    batch_size : int
        Prompts of one pass, padded on the right, where causal attention does not look.

    Returns
    -------
    Answers
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    logits = np.empty((len(prompts), len(label_tokens)), np.float32)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    columns = torch.tensor(list(label_tokens), device=device)
    try:
        with reference_arithmetic(model) if exact else contextlib.nullcontext():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                width = max(len(prompts[i]) for i in chosen)
                tokens = torch.zeros(len(chosen), width, dtype=torch.int64)
                for row, i in enumerate(chosen):
                    tokens[row, : len(prompts[i])] = torch.as_tensor(list(prompts[i]))
                last = torch.tensor([len(prompts[i]) - 1 for i in chosen], device=device)
                with torch.autocast(device.type, enabled=False):
                    hidden = model.model(tokens.to(device)).last_hidden_state  # (B, T, hidden)
                    chosen_hidden = hidden[torch.arange(len(chosen), device=device), last]
                    logits[chosen] = model.lm_head(chosen_hidden)[:, columns].float().cpu().numpy()
    finally:
        model.train(training)
    return Answers(
        [list(map(int, p)) for p in prompts],
        list(map(int, label_tokens)),
        list(labels),
        logits,
        np.asarray(correct, np.int64),
        "PyTorch, rounding as the reference does" if exact else "PyTorch, float32",
    )
