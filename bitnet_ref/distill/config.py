"""Configurations of a distillation run: TOML read into frozen dataclasses; an unknown key is an error that names it.

:func:`load_config` takes the name of a packaged configuration (``tiny``) or a path; ``docs/distillation.md`` lists the
keys by example.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "STAGES",
    "Blocks",
    "Config",
    "Corpus",
    "Data",
    "Losses",
    "Model",
    "Student",
    "Training",
    "digest",
    "load_config",
    "packaged",
    "parse_config",
]

STAGES = (
    *("teacher", "direct", "subln", "pretrain", "subln-ct", "subln-distill", "ct-ld", "ct-ad", "bitdistill"),
    *("blocks", "blocks-ce", "blocks-ld", "blocks-distill"),
)
"""Everything that can be trained, in the order in which it is."""

_PACKAGED = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Model:
    """Where the full-precision model comes from: `folder`, or random weights of `family` and `sizes`."""

    folder: str = ""
    gguf_file: str = ""
    """A GGUF file in `folder` with weights and tokenizer; its quantised tensors are dequantised."""
    family: str = ""
    """``Llama``, ``Qwen2``, ``Qwen3`` or ``Gemma3``: random weights. With a folder these are of a dry run only."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the family's configuration in ``transformers``; the vocabulary is that of the tokenizer by default."""
    tokenizer: str = ""
    """Another tokenizer than that of `folder`: a folder, or ``synthetic``."""
    attention: str = "sdpa"
    """``sdpa`` or ``eager``, as in ``transformers``. On a processor, with texts of some 30 tokens, eager is faster."""


@dataclass(frozen=True)
class Data:
    """The examples of the task."""

    files: tuple[str, ...] = ()
    """To train on; ``synthetic`` stands for made-up sentences, see :mod:`bitnet_ref.distill.synthetic`."""
    dev_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    """Where a data set has its own splits. Without them `files` is split by the hash of each text."""
    drop_overlaps: bool = False
    """With own splits: keep a text that is in two of them in the later one, instead of refusing the data."""
    format: str = ""
    """One of :data:`bitnet_ref.distill.data.FORMATS`; by the name of the file if empty."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of :func:`bitnet_ref.distill.data.load_examples`."""
    task: str = "classification"
    template: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of a classification: label in the data -> the text of one token that stands for it."""
    max_length: int = 512
    """Tokens of a prompt and, in a classification, its answer."""
    max_target: int = 128
    """Of a summarisation: tokens of a summary and its end."""
    end_of_text: str = ""
    """Of a summarisation: the token that ends a summary; that of the tokenizer if empty."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, dev and test."""
    split_seed: int = 0
    train_limit: int = 0
    """Use so many of the training examples; 0 for all."""
    dev_limit: int = 0
    test_limit: int = 0
    synthetic: int = 0
    """How many made-up sentences."""


@dataclass(frozen=True)
class Corpus:
    """The texts of continued pre-training."""

    files: tuple[str, ...] = ()
    """UTF-8 texts, or ``.jsonl`` with one document in each line; ``synthetic`` stands for made-up ones."""
    context: int = 512
    """Tokens of a window."""
    end_of_text: str = ""
    """The token between documents; that of the tokenizer if empty, which is another one in models for chat."""
    separator: str = ""
    """What stands between documents of a file; if empty a file is one document."""
    field: str = "text"
    """Key of the text in ``.jsonl`` files."""
    held_out: float = 0.01
    """Share of the windows that measures the loss and is never trained on."""
    held_out_limit: int = 64
    """At most so many windows of it."""
    synthetic: int = 0
    """How many made-up texts."""


@dataclass(frozen=True)
class Student:
    """What is done to the model before it is trained as a student."""

    subln: str = "output-projections"
    """Where SubLN goes: a key of :data:`bitnet_ref.distill.student.PLACEMENTS`."""
    subln_gain: str = "one"
    """What SubLN begins with: ``one``, as in [BitDistill], or ``input``, the usual size of what comes in without it,
    measured on one batch, so that the network stays nearly what it was."""
    quantizer: str = "absmean"
    """Of weights: one of :data:`bitnet_ref.distill.bitlinear.QUANTIZERS`."""
    block: int = 256
    """Columns that share a scale with ``absmean-block``."""
    start: str = "base"
    """``base``: the model before fine-tuning, as in [BitDistill]; ``teacher``: the fine-tuned one. Students whose
    blocks are trained one by one always begin with the teacher's blocks."""


@dataclass(frozen=True)
class Losses:
    """L = L_CE + lambda L_LD + gamma L_AD, [BitDistill, Eq. 13]."""

    lambda_: float = 10.0
    gamma: float = 1e5
    hidden: float = 0.0
    """Weight of one more term, L_HD, which is not in [BitDistill]: how far the residual streams of student and teacher
    are apart behind every block, see :func:`bitnet_ref.reference.losses.hidden_state_loss`."""
    tau: float = 5.0
    tau_squared: bool = False
    positions: str = "labels"
    """Where logits are compared: ``labels`` (those that predict a scored label) or ``tokens`` (all real ones)."""
    layer: int = -1
    """The layer whose relations are compared; a negative one counts from the end."""
    teacher_layer: int | None = None
    """That of the teacher, if it is another one."""
    heads: int = 8
    """A_r, the number of heads that queries, keys and values are split into."""
    alphas: tuple[float, float, float] = (1.0, 1.0, 1.0)
    causal: bool = True
    cosine: bool = False
    after_rope: bool = False
    teacher_cache: bool = False
    """Run the teacher once over all examples and keep its outputs on disk, instead of running it in each step."""
    teacher_top_k: int = 0
    """In the cache: keep so many of the largest logits and the rest as one; 0 for all."""


@dataclass(frozen=True)
class Training:
    """How one stage is trained."""

    steps: int = 100
    batch: int = 32
    """Sequences of one step, over all devices and accumulated parts."""
    accumulation: int = 1
    """Parts that each device cuts its share of a batch into."""
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    """``cosine``, ``linear`` (both to nothing) or ``constant``."""
    warm_up: float = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.01
    """Of matrices; gains of norms do not decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    clip: float = 1.0
    """Largest norm of the gradient; 0 for any."""
    autocast: str = "auto"
    """``bfloat16``, ``float32``, or ``auto``: bfloat16 where the device has instructions for it. ``config.json`` says
    which it was."""
    gradient_checkpointing: bool = False
    trained: str = "all"
    """``all`` parameters, or ``vectors``: gains of norms and biases, while ternary weights and embedding stay."""
    quantize_over: float = 0.0
    """Share of the steps in which layers go from full precision to fully quantised; see ``BitLinear.strength``."""
    evaluate_every: int = 0
    """Steps between evaluations on the development set; 0 for one at the end. The best weights are kept."""
    patience: int = 0
    """Stop after so many evaluations without a better one; 0 for never."""
    save_every: int = 100
    once: bool = False
    """One run, with the first seed, serves all seeds."""


@dataclass(frozen=True)
class Blocks(Training):
    """How the blocks of a student are trained one by one, see :mod:`bitnet_ref.distill.blocks`."""

    steps: int = 150
    """Of each block."""
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    examples: int = 4096
    """Train on so many of the examples of the task, in the same batches again and again; 0 for all."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str
    model: Model
    data: Data
    corpus: Corpus = Corpus()
    student: Student = Student()
    losses: Losses = Losses()
    teacher: Training = Training()
    direct: Training = Training()
    """Direct ternarisation, the baseline, and every other variant that is not distilled."""
    pretrain: Training = Training()
    distill: Training = Training()
    blocks: Blocks = Blocks()
    finish: Training = Training(learning_rate=1e-5)
    """Students whose blocks were trained, as a whole. They are near the teacher already: larger steps undo that."""
    seeds: tuple[int, ...] = (0,)
    variants: tuple[str, ...] = ("teacher", "direct", "pretrain", "bitdistill")
    """Which stages run; a selection of :data:`STAGES`."""
    sharding: str = "none"
    """With several processes: ``none`` (a whole model on each, DDP) or ``full`` (FSDP)."""
    keep_checkpoints: bool = False
    """Keep the optimizer's state of finished stages."""


_CHOICES = {
    ("model", "family"): ("", "Llama", "Qwen2", "Qwen3", "Gemma3"),
    ("model", "attention"): ("sdpa", "eager"),
    ("data", "task"): ("classification", "summarisation"),
    ("student", "subln"): ("output-projections", "every-linear"),
    ("student", "subln_gain"): ("one", "input"),
    ("student", "quantizer"): ("absmean", "b1", "absmean-block"),
    ("student", "start"): ("base", "teacher"),
    ("losses", "positions"): ("labels", "tokens"),
    ("", "sharding"): ("none", "full"),
}
_TRAINING_CHOICES = {
    "schedule": ("cosine", "linear", "constant"),
    "trained": ("all", "vectors"),
    "autocast": ("auto", "bfloat16", "float32"),
}
_POSITIVE = ("steps", "batch", "accumulation", "learning_rate", "save_every", "context", "heads", "tau", "max_length")
_SHARES = ("warm_up", "held_out", "quantize_over")


def packaged() -> list[str]:
    """Names of the configurations that come with the package."""
    # small.toml is that of bitnet_ref.distill.pretrain, another program.
    return sorted(path.stem for path in _PACKAGED.glob("*.toml") if path.stem != "small")


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Parameters
    ----------
    source : str or Path
        A TOML file, or the name of a packaged configuration.
    overrides : sequence of str
        ``key=value`` with a dotted key and a value as TOML writes it; what is not TOML counts as a string.

    Returns
    -------
    Config

    Raises
    ------
    ValueError
        If a key is unknown, a value has the wrong type or is out of range; the message names the key.
    FileNotFoundError
        If there is no such file.
    """
    path = Path(source)
    if str(source) in packaged() and not path.exists():
        path = _PACKAGED / f"{source}.toml"
    elif not path.exists():
        raise FileNotFoundError(f"a configuration must be a TOML file or one of {', '.join(packaged())}, got {source}")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be TOML: {error}") from error
    raw.setdefault("name", path.stem)
    for override in overrides:
        _override(raw, override)
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> Config:
    """A configuration from nested mappings; see :func:`load_config` for what is refused."""
    config = _parse(Config, raw, "")
    if not (config.model.folder or config.model.family):
        raise ValueError("[model] must have a folder, or a family for random weights")
    if not (config.model.folder or config.model.tokenizer):
        raise ValueError("model.tokenizer must be given where there is no model.folder")
    unknown = [name for name in config.variants if name not in STAGES]
    if unknown or not config.variants:
        raise ValueError(f"variants must be of {', '.join(STAGES)}, got {', '.join(unknown) or 'none'}")
    if config.teacher.quantize_over:
        raise ValueError(
            f"teacher.quantize_over must be 0, a teacher is not quantised, got {config.teacher.quantize_over}"
        )
    if config.finish.quantize_over:
        raise ValueError(
            "finish.quantize_over must be 0, what blocks have learnt is the quantised network, got "
            f"{config.finish.quantize_over}"
        )
    if config.blocks.trained != "all":
        raise ValueError(f"blocks.trained must be all: blocks learn their matrices, got {config.blocks.trained!r}")
    if config.blocks.gradient_checkpointing:
        raise ValueError("blocks.gradient_checkpointing must be false: a block alone has nothing to recompute")
    if config.losses.hidden and config.losses.teacher_cache:
        raise ValueError("losses.teacher_cache must be false with losses.hidden: it does not keep hidden states")
    if len(set(config.seeds)) != len(config.seeds) or not config.seeds:
        raise ValueError(f"seeds must be different numbers, at least one, got {list(config.seeds)}")
    return config


def digest(*parts: object) -> str:
    """SHA-256, in hex, of dataclasses and JSON values: what a checkpoint is compared by."""
    return hashlib.sha256(json.dumps([_plain(part) for part in parts], sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"an override must be key=value, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.split(".")
    table: Any = raw
    for name in path:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"{key} must be a key inside tables, but {name} is a value")
    table[last] = value


def _parse(kind: type, raw: Mapping[str, Any], where: str) -> Any:
    # lambda is a word of Python, so the field has an underscore that the file has not.
    names = {f.name.rstrip("_"): f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in raw.items():
        full = f"{where}.{key}".lstrip(".")
        if key not in names:
            raise ValueError(f"{full} is no key of a configuration; {where or 'the file'} has {', '.join(names)}")
        found = names[key]
        values[found.name] = _value(hints[found.name], value, full, where, key)
    missing = [
        name
        for name, f in names.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise ValueError(f"a configuration must have {', '.join(missing)}")
    return kind(**values)


def _value(hint: Any, value: Any, full: str, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{full} must be a table, got {value!r}")
        return _parse(hint, value, full)
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if origin is tuple:
        inner = typing.get_args(hint)
        if not isinstance(value, (list, tuple)) or (Ellipsis not in inner and len(value) != len(inner)):
            raise ValueError(f"{full} must be a list{'' if Ellipsis in inner else f' of {len(inner)}'}, got {value!r}")
        return tuple(_value(inner[0], item, full, where, key) for item in value)
    if typing.get_origin(hint) is not None or hint is Mapping:
        if not isinstance(value, Mapping):
            raise ValueError(f"{full} must be a table, got {value!r}")
        return dict(value)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ValueError(f"{full} must be {names[hint]}, got {value!r}")
    choices = _CHOICES.get((where, key)) or (_TRAINING_CHOICES.get(key) if where != "data" else None)
    if choices and value not in choices:
        raise ValueError(f"{full} must be one of {', '.join(filter(None, choices))}, got {value!r}")
    if key in _POSITIVE and not value > 0:
        raise ValueError(f"{full} must be positive, got {value!r}")
    if key in _SHARES and not 0 <= value < 1:
        raise ValueError(f"{full} must be a share from 0 to below 1, got {value!r}")
    if hint in (int, float) and key not in ("layer", "teacher_layer") and not value >= 0:  # NaN fails as well
        raise ValueError(f"{full} must not be negative, got {value!r}")
    return value
