"""Training in PyTorch (extra ``[distill]``): BitNet Distillation, its pieces, and the small model of the package.

    >>> from bitnet_ref import distill
    >>> settings = distill.load_config("smollm2-reviews")
    >>> student = distill.load_base(settings.model, seed=0, vocabulary=0)
    >>> distill.insert_subln(student)
    >>> distill.ternarise(student)
    >>> distill.start_losses(settings)

Modules and the names of :data:`PIECES` are imported when they are first asked for. Nothing here is imported by the rest
of the package, and nothing here is needed to run a model.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

PIECES = {
    "bitlinear": ("BitLinear",),
    "blocks": ("train_blocks",),
    "config": ("Config", "load_config"),
    "corpus": ("PackedCorpus",),
    "data": ("Example", "Splits", "load_examples", "split_examples"),
    "exact": ("reference_arithmetic",),
    "export": ("answer", "export_student", "round_tables"),
    "losses": ("attention_relation_loss", "causal_lm_loss", "hidden_state_loss", "logits_loss"),
    "models": ("load_base", "load_tokenizer"),
    "objective": ("Distillation", "LanguageModelling"),
    "results": ("write_tables",),
    "stages": ("Run",),
    "start": ("start_losses",),
    "student": ("capture_hidden", "capture_qkv", "insert_subln", "save_student", "ternarise"),
    "tasks": ("ClassificationTask", "SummarisationTask"),
    "teacher_cache": ("LiveTeacher", "TeacherCache"),
    "text": ("TextEncoder",),
    "trainer": ("Devices", "train"),
}
"""Module -> what it gives to this one."""

_HOME = {name: module for module, names in PIECES.items() for name in names}
_MODULES = {module.name for module in pkgutil.iter_modules(__path__)}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOME.get(name, name)}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("bitnet_ref"):
            raise
        message = f"{name} needs {error.name}, which is not installed: pip install 'bitnet_ref[distill]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    return getattr(module, name) if name in _HOME else module


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
