"""The stages of [BitDistill] and the variants that its tables compare, each trained once for every seed.

=============  =====================================================================================================
teacher        the full-precision model, fine-tuned: FP16-SFT in the paper's Table 1
direct         the model made ternary as it is and fine-tuned: BitNet-SFT
subln          with SubLN, fine-tuned
pretrain       with SubLN, continued pre-training on plain text: stage 2 of the paper, where the next ones begin
subln-ct       pretrain, fine-tuned
subln-distill  with SubLN, distilled from the teacher
ct-ld, ct-ad   pretrain, distilled by logits only, by attention relations only
bitdistill     pretrain, distilled by both: stage 3
blocks         the teacher with SubLN, each block trained alone to do what the teacher's does: where the next ones begin
blocks-ce      blocks, fine-tuned
blocks-ld      blocks, distilled by logits only
blocks-distill blocks, distilled by both
=============  =====================================================================================================

A run is a folder: ``config.json``, ``record.json``, ``splits.txt``, and for every seed and stage ``metrics.jsonl``,
``result.json``; of those in :data:`KEPT` also ``model/``; of students among them also ``export/`` and, of classifiers,
what PyTorch answers to every prompt of the test split, for the kernels to repeat: ``answers.safetensors`` with the
roundings of the reference, ``answers-float32.safetensors`` with PyTorch's own.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional

from bitnet_ref.distill import data, models, synthetic, tasks
from bitnet_ref.distill.blocks import train_blocks
from bitnet_ref.distill.config import STAGES, Blocks, Config, Training, digest
from bitnet_ref.distill.export import answer, export_student, round_tables
from bitnet_ref.distill.objective import Distillation, LanguageModelling, Scored, compared_positions
from bitnet_ref.distill.student import input_sizes, insert_subln, save_student, ternarise
from bitnet_ref.distill.teacher_cache import LiveTeacher, TeacherCache
from bitnet_ref.distill.text import END_OF_TEXT, TextEncoder, train_tokenizer
from bitnet_ref.distill.trainer import Batch, Devices, load_weights, save_weights, train
from bitnet_ref.distill.weights import WeightsBefore
from bitnet_ref.formats.answers import write_answers

__all__ = ["KEPT", "VARIANTS", "Run", "Variant", "dry", "first_prompts", "splits_of", "task_of", "with_parents"]

KEPT = ("teacher", "direct", "bitdistill", "blocks-ld", "blocks-distill")
"""Stages whose model is left as a folder."""


@dataclass(frozen=True)
class Variant:
    """What makes a student."""

    subln: bool
    after: str
    """The stage that it begins behind, ``pretrain`` or ``blocks``, or nothing."""
    logits: bool
    attention: bool


VARIANTS = {
    "direct": Variant(False, "", False, False),
    "subln": Variant(True, "", False, False),
    "subln-ct": Variant(True, "pretrain", False, False),
    "subln-distill": Variant(True, "", True, True),
    "ct-ld": Variant(True, "pretrain", True, False),
    "ct-ad": Variant(True, "pretrain", False, True),
    "bitdistill": Variant(True, "pretrain", True, True),
    "blocks-ce": Variant(True, "blocks", False, False),
    "blocks-ld": Variant(True, "blocks", True, False),
    "blocks-distill": Variant(True, "blocks", True, True),
}
"""The students; see the table above."""


def with_parents(stages: Sequence[str]) -> list[str]:
    """Stages and all that they need, in the order in which they run.

    Raises
    ------
    ValueError
        If one is unknown.
    """
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        raise ValueError(f"stages must be of {', '.join(STAGES)}, got {', '.join(unknown)}")
    wanted = set(stages)
    for name in stages:
        variant = VARIANTS.get(name)
        if variant and variant.after:
            wanted.add(variant.after)
        if "blocks" in (name, variant and variant.after) or (variant and (variant.logits or variant.attention)):
            wanted.add("teacher")
    return [name for name in STAGES if name in wanted]


def dry(config: Config) -> Config:
    """The same run with random weights, made-up data and two steps of each stage: whether everything fits together."""

    def short(training: Training) -> Training:
        rows = 2 * training.accumulation
        return replace(training, steps=2, batch=rows, evaluate_every=0, save_every=2, warm_up=0.0)

    if not config.model.family:
        raise ValueError("a dry run needs model.family and model.sizes for random weights, the configuration has none")
    return replace(
        config,
        model=replace(config.model, folder="", gguf_file="", tokenizer="dry"),
        data=replace(
            config.data,
            files=("dry",),
            dev_files=(),
            test_files=(),
            max_length=48,
            max_target=8,
            end_of_text=END_OF_TEXT,
        ),
        corpus=replace(
            config.corpus,
            files=("synthetic",),
            synthetic=400,
            context=48,
            end_of_text=END_OF_TEXT,
            held_out=0.01,
            held_out_limit=2,
        ),
        teacher=short(config.teacher),
        direct=short(config.direct),
        pretrain=short(config.pretrain),
        distill=short(config.distill),
        blocks=short(config.blocks),
        finish=short(config.finish),
        seeds=config.seeds[:1],
    )


def _settled(config: Config, devices: Devices, before: Mapping[str, Any]) -> Config:
    """With the precision of each stage in place of ``auto``: what is written down and compared says which it was.

    A run that goes on keeps that of its ``config.json``, `before`, whatever this machine would choose. Otherwise it is
    bfloat16 if every process has it.
    """
    able = devices.sum(torch.tensor(float(devices.uses_bfloat16(Training())), device=devices.device)).item()
    here = "bfloat16" if able == devices.world else "float32"
    stages = {
        field.name: replace(stage, autocast=before.get(field.name, {}).get("autocast", here))
        for field in fields(config)
        if isinstance(stage := getattr(config, field.name), Training) and stage.autocast == "auto"
    }
    return replace(config, **stages)


class Run:
    """One run of a configuration in its folder.

    Parameters
    ----------
    config : Config
    out : path
        Made if missing.
    resume : bool
        Go on with what is there; without it the folder must not hold a run.
    record : mapping, optional
        What to write into ``record.json`` beside the versions: machine, commit, command.
    say : callable, optional
        Is told in a sentence what happens.
    quiet : bool
        No progress bars.

    Raises
    ------
    ValueError
        If the folder holds a run already, or data, labels or model do not fit.
    """

    def __init__(
        self,
        config: Config,
        out: str | Path,
        *,
        resume: bool = False,
        record: Mapping[str, Any] | None = None,
        say: Callable[[str], None] | None = None,
        quiet: bool = False,
        devices: Devices | None = None,
    ) -> None:
        self.devices = devices or Devices.start(config.sharding)
        self.out, self.quiet = Path(out), quiet
        self.say = say if say and self.devices.main else lambda text: None
        there = self.out / "config.json"
        if there.exists() and not resume:
            raise ValueError(f"{self.out} holds a run already: say --resume to go on with it, or give another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        before = json.loads(there.read_text(encoding="utf-8")) if there.exists() else {}
        self.config = config = _settled(config, self.devices, before)
        if self.devices.device.type == "cuda":
            # A resumed run has the losses of an uninterrupted one only if each operation is repeatable. Those of
            # processors are; CUDA has to be asked.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        self.tokenizer = (
            _dry_tokenizer(config) if config.model.tokenizer == "dry" else models.load_tokenizer(config.model)
        )
        self.encoder = TextEncoder.of(self.tokenizer)
        self.splits = splits_of(config)
        self.task = task_of(config)
        if isinstance(self.task, tasks.ClassificationTask):
            self.task.label_ids(self.encoder)  # what is wrong with labels should be known before hours of training
        self._corpora: dict[int, data.PackedCorpus] = {}
        self._model_digest = digest(config.model, models.fingerprint(config.model), self.encoder.sha256)
        self._data_digest = digest(self.splits.sha256, dataclasses.asdict(self.task))
        if self.devices.main:
            _write_json(there, dataclasses.asdict(config))
            (self.out / "splits.txt").write_text(self.splits.table() + "\n", encoding="utf-8")
            about = {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
                "processes": self.devices.world,
                "device": torch.cuda.get_device_name() if self.devices.device.type == "cuda" else "cpu",
                "splits_sha256": self.splits.sha256,
            }
            earlier = self.out / "record.json"
            seeds = json.loads(earlier.read_text(encoding="utf-8")).get("seeds", []) if earlier.exists() else []
            self._record = dict(record or {}) | about | {"seeds": seeds}
            _write_json(self.out / "record.json", self._record)
        self.say(self.splits.table())

    def run(self, stages: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> None:
        """Train stages for seeds, those of the configuration by default, and what they need before them."""
        seeds = seeds or self.config.seeds
        if self.devices.main:
            self._record["seeds"] = sorted({*self._record["seeds"], *seeds})  # a folder may be given more of them later
            _write_json(self.out / "record.json", self._record)
        for seed in seeds:
            for name in with_parents(stages or self.config.variants):
                self.stage(name, seed)

    def stage(self, name: str, seed: int) -> dict[str, Any]:
        """Train one stage, or go on with it, or read what it came to.

        Returns
        -------
        dict
            ``result.json``: ``score`` on the development set, ``test``, ``step``, ``seconds``, ``settings``; of
            students ``weights``, see :meth:`bitnet_ref.distill.weights.WeightsBefore.compare`; ``made``, when and on
            what.

        Raises
        ------
        ValueError
            If what is in its folder is of another configuration.
        Diverged
            See :func:`bitnet_ref.distill.trainer.train`.
        """
        training = self._training(name)
        seed = self.config.seeds[0] if training.once else seed
        folder = self.folder(name, seed)
        settings = self._settings(name, seed)
        identity = digest(settings)
        done = folder / "result.json"
        if done.exists():
            result = json.loads(done.read_text(encoding="utf-8"))
            if result["identity"] != identity:
                raise ValueError(
                    f"{folder} must be of this configuration to go on from, {_difference(result, settings)}"
                )
            return result
        self.say(f"{name}, seed {seed}: {training.steps:,} steps of {training.batch}")
        if name == "blocks":
            return self._blocks(training, seed, folder, settings)
        rows: list[Any] = []
        if name == "pretrain":
            corpus = self.corpus(seed)
            batches: Callable[[int], Batch] = lambda step: corpus.batch(step, training.batch)  # noqa: E731
            evaluate: Callable[[], dict[str, float]] = lambda: self._held_out(objective.scored, corpus)  # noqa: E731
        else:
            examples = self._limited(self.splits.train, self.config.data.train_limit)
            prepared = tasks.batches(self.task, self.encoder, examples, training.batch, seed)
            batches, rows = prepared.batch, prepared.rows
            dev = self._limited(self.splits.dev, self.config.data.dev_limit)
            evaluate = lambda: self.evaluate(objective.scored, dev, self.devices.uses_bfloat16(training))  # noqa: E731
        model, objective, close = self._build(name, seed, rows)
        before = WeightsBefore(model) if name != "teacher" and self.devices.main else None
        found = train(
            objective,
            training,
            batches,
            folder,
            stage=f"{name} of seed {seed}",
            identity=identity,
            evaluate=evaluate,
            devices=self.devices,
            quiet=self.quiet,
        )
        close()
        if name == "pretrain" or self.devices.sharding == "full":
            self._keep_weights(folder / "weights.safetensors", model)
        if self.devices.world > 1 and self.devices.sharding == "full":
            model = self._plain(name, seed)
            load_weights(folder / "weights.safetensors", model)
            model.to(self.devices.device)
        result: dict[str, Any] = {"stage": name, "seed": seed, "identity": identity, **dataclasses.asdict(found)}
        if name in KEPT and name != "teacher":
            round_tables(model)  # so that what is tested is what the files hold
        if name != "pretrain":
            test = self._limited(self.splits.test, self.config.data.test_limit)
            result["test"] = self.evaluate(Scored(model), test, False)
            result["test_examples"] = len(test)
        if before:
            result["weights"] = before.compare(model)
        result["settings"] = settings
        if self.devices.main:
            result["made"] = self._made()
            if name in KEPT:
                self._save(model, folder, ternary=name != "teacher")
            _write_json(done, result)
            if not self.config.keep_checkpoints:
                for leftover in ("last.safetensors", "best.safetensors"):
                    (folder / leftover).unlink(missing_ok=True)
        self.devices.barrier()
        figures = result.get("test") or {"held-out loss": -(found.score or 0)}
        self.say(
            f"{name}, seed {seed}: "
            + ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
            + f" in {found.seconds:,.0f} s"
        )
        return result

    def _blocks(self, settings: Blocks, seed: int, folder: Path, about: dict[str, Any]) -> dict[str, Any]:
        """Train the stage of that name, and write its result."""
        examples = self._limited(self.splits.train, self.config.data.train_limit)
        examples = self._limited(examples, settings.examples)
        prepared = tasks.batches(self.task, self.encoder, examples, settings.batch, seed)
        student = self._plain("blocks", seed).to(self.devices.device)
        teacher = self._teacher(seed).to(self.devices.device).eval().requires_grad_(False)
        before = WeightsBefore(student) if self.devices.main else None
        found, errors = train_blocks(
            student,
            teacher,
            settings,
            [prepared.batch(i) for i in range(prepared.per_epoch)],
            folder,
            stage=f"blocks of seed {seed}",
            identity=digest(about),
            seed=seed,
            devices=self.devices,
            say=self.say,
            quiet=self.quiet,
        )
        self._keep_weights(folder / "weights.safetensors", student)
        result = {"stage": "blocks", "seed": seed, "identity": digest(about), **dataclasses.asdict(found)}
        test = self._limited(self.splits.test, self.config.data.test_limit)
        result |= {"test": self.evaluate(Scored(student), test, False), "test_examples": len(test)}
        result |= {"errors": errors, "settings": about}
        if before:
            result["weights"] = before.compare(student)
        if self.devices.main:
            result["made"] = self._made()
            _write_json(folder / "result.json", result)
            for part in folder.glob("block-*/weights.safetensors"):
                part.unlink()
        self.devices.barrier()
        figures = ", ".join(f"{key} {value:.4f}" for key, value in result["test"].items())
        self.say(f"blocks, seed {seed}: {figures}, error {errors[-1]['after']:.4f} in {found.seconds:,.0f} s")
        return result

    def _made(self) -> dict[str, Any]:
        """When a stage was finished, and by what: a folder may hold stages of several starts and machines."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        keys = ("commit", "cpu", "device", "threads", "processes", "torch")
        return {"finished": now} | {key: self._record[key] for key in keys if key in self._record}

    def folder(self, name: str, seed: int) -> Path:
        """Where a stage of a seed is; one that serves all seeds is with the first."""
        seed = self.config.seeds[0] if self._training(name).once else seed
        return self.out / f"seed-{seed}" / name

    def corpus(self, seed: int) -> data.PackedCorpus:
        """The texts of continued pre-training, tokenised once into ``corpus/``."""
        config = self.config.corpus
        if not config.files:
            raise ValueError("corpus.files must name the texts of continued pre-training, it is empty")
        if seed not in self._corpora:
            files, separator = [], config.separator or None
            for name in config.files:
                path = Path(name)
                if name == "synthetic":
                    path, separator = self.out / "corpus" / "synthetic.txt", "\n"
                    if self.devices.main and not path.exists():
                        path.parent.mkdir(exist_ok=True)
                        text = "\n".join(synthetic.texts(config.synthetic, 1))
                        path.with_name(".synthetic.txt").write_text(text, encoding="utf-8")
                        os.replace(path.with_name(".synthetic.txt"), path)
                    self.devices.barrier()
                files.append(path)
            self._corpora[seed] = data.PackedCorpus(
                files,
                self.encoder,
                config.context,
                seed,
                cache=self.out / "corpus",
                end_of_text=config.end_of_text or None,
                separator=separator,
                held_out=config.held_out,
                field=config.field,
            )
        return self._corpora[seed]

    @torch.no_grad()
    def evaluate(self, scored: Scored, examples: Sequence[data.Example], autocast: bool) -> dict[str, float]:
        """Figures of a model on examples of the task; ``score`` is the one to choose by, larger is better."""
        scored.eval()
        if isinstance(self.task, tasks.SummarisationTask):
            return self._summaries(scored, examples, autocast)
        predictions = [""] * len(examples)
        nats = 0.0
        ids = list(self.task.label_ids(self.encoder).values())
        for batch, chosen in tasks.eval_batches(self.task, self.encoder, examples, 32):
            ends = tasks.prompt_ends(batch)
            positions = np.zeros(batch["input_ids"].shape, bool)
            positions[np.arange(len(ends)), ends] = True
            logits = self._logits(scored, batch, positions, autocast)
            for i, label in zip(chosen, self.task.predict(logits, self.encoder), strict=True):
                predictions[i] = label
            names = list(self.task.labels)
            targets = torch.tensor([names.index(examples[i].label) for i in chosen], device=logits.device)
            nats += float(functional.cross_entropy(logits[:, ids].float(), targets, reduction="sum"))
        accuracy = tasks.accuracy(predictions, [example.label for example in examples])
        return {"score": accuracy, "accuracy": accuracy, "loss": nats / len(examples)}

    def _logits(self, scored: Scored, batch: Batch, positions: np.ndarray, autocast: bool) -> torch.Tensor:
        device = self.devices.device
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return scored(
                torch.from_numpy(batch["input_ids"]).to(device),
                torch.from_numpy(batch["attention_mask"]).to(device),
                torch.from_numpy(positions).to(device),
            )

    @torch.no_grad()
    def _held_out(self, scored: Scored, corpus: data.PackedCorpus) -> dict[str, float]:
        nats, n = 0.0, 0
        for batch in corpus.held_out_batches(8, self.config.corpus.held_out_limit):
            positions = np.ones(batch["input_ids"].shape, bool)
            positions[:, -1] = False
            logits = self._logits(scored, batch, positions, self.devices.uses_bfloat16(self.config.pretrain))
            targets = torch.from_numpy(batch["labels"][:, 1:].reshape(-1)).to(logits.device)
            nats += float(functional.cross_entropy(logits.float(), targets, reduction="sum"))
            n += len(targets)
        return {"score": -nats / n, "loss": nats / n}

    def _summaries(self, scored: Scored, examples: Sequence[data.Example], autocast: bool) -> dict[str, float]:
        """Greedy summaries, as the paper's temperature 0; while a model is sharded, the loss alone."""
        if (
            self.devices.world > 1
            and self.devices.sharding == "full"
            and hasattr(next(scored.parameters()), "full_tensor")
        ):
            nats, n = 0.0, 0
            for batch, _ in tasks.eval_batches(self.task, self.encoder, examples, 8):
                positions = np.zeros(batch["labels"].shape, bool)
                positions[:, :-1] = batch["labels"][:, 1:] != -100
                targets = torch.from_numpy(batch["labels"][:, 1:][positions[:, :-1]]).to(self.devices.device)
                logits = self._logits(scored, batch, positions, autocast)
                nats += float(functional.cross_entropy(logits.float(), targets, reduction="sum"))
                n += len(targets)
            return {"score": -nats / n, "loss": nats / n}
        end = self.task.end(self.encoder)
        prompts = [replace(example, target=None) for example in examples]
        written = [""] * len(examples)
        for batch, chosen in tasks.eval_batches(self.task, self.encoder, prompts, 8):
            ids, mask = batch["input_ids"], batch["attention_mask"]
            shifts = ids.shape[1] - mask.sum(1)  # generation wants the padding on the left
            ids, mask = (np.stack([np.roll(row, s) for row, s in zip(a, shifts, strict=True)]) for a in (ids, mask))
            with torch.autocast(self.devices.device.type, torch.bfloat16, enabled=autocast):
                found = scored.model.generate(
                    torch.from_numpy(ids).to(self.devices.device),
                    attention_mask=torch.from_numpy(mask).to(self.devices.device),
                    do_sample=False,
                    max_new_tokens=self.task.max_target,
                    eos_token_id=end,
                    pad_token_id=end,
                )
            for i, row in zip(chosen, found[:, ids.shape[1] :].tolist(), strict=True):
                written[i] = self.encoder.decode(row[: row.index(end)] if end in row else row)
        scores = self.task.scores(written, [example.target for example in examples])
        return {"score": scores["average"], **scores}

    def _training(self, name: str) -> Training:
        """Settings of a stage; a student that is distilled in any way has those of distillation, or of finishing."""
        if name in ("teacher", "pretrain", "blocks"):
            return getattr(self.config, name)
        variant = VARIANTS[name]
        if variant.after == "blocks":
            return self.config.finish
        return self.config.distill if variant.logits or variant.attention else self.config.direct

    def _settings(self, name: str, seed: int) -> dict[str, Any]:
        """Everything that a stage depends on, down to its parents."""
        training = dataclasses.asdict(self._training(name))
        del training["save_every"]  # changes no result
        if training["trained"] == "all":
            del training["trained"]  # as in results of versions that had no such key
        examples = self.config.data
        limits = [examples.train_limit, examples.dev_limit, examples.test_limit]
        found: dict[str, Any] = {
            "stage": name,
            "seed": seed,
            "training": training,
            "model": self._model_digest,
            "data": digest(self._data_digest, limits),
        }
        if name == "pretrain":
            if self.config.student.subln_gain == "one":  # else gains are measured on these data
                del found["data"]
            found["corpus"] = dataclasses.asdict(self.config.corpus)
        if name != "teacher":
            found["student"] = dataclasses.asdict(self.config.student)
            if self.config.student.start == "teacher" or name == "blocks":
                found["teacher"] = self._parent("teacher", seed)
        variant = VARIANTS.get(name)
        if variant and (variant.logits or variant.attention):
            found["losses"] = dataclasses.asdict(self._losses(variant))
            found["teacher"] = self._parent("teacher", seed)
        if variant and variant.after:
            found[variant.after] = self._parent(variant.after, seed)
        return json.loads(json.dumps(found))

    def _parent(self, name: str, seed: int) -> str:
        return digest(self._settings(name, self.config.seeds[0] if self._training(name).once else seed))

    def _losses(self, variant: Variant) -> Any:
        losses = self.config.losses
        return replace(
            losses,
            lambda_=losses.lambda_ if variant.logits else 0.0,
            gamma=losses.gamma if variant.attention else 0.0,
            hidden=losses.hidden if variant.logits and variant.attention else 0.0,  # the others show one loss alone
        )

    def _build(
        self, name: str, seed: int, rows: list[Any]
    ) -> tuple[nn.Module, LanguageModelling | Distillation, Callable[[], None]]:
        """What is trained, its objective, and what to call at the end."""
        model = self._plain(name, seed)
        variant = VARIANTS.get(name)
        if variant and variant.after:
            self.stage(variant.after, seed)
            load_weights(self.folder(variant.after, seed) / "weights.safetensors", model)
        model.to(self.devices.device)
        if not (variant and (variant.logits or variant.attention)):
            return model, LanguageModelling(model), lambda: None
        losses = self._losses(variant)
        teacher = self._teacher(seed).to(self.devices.device).eval().requires_grad_(False)
        if self.devices.uses_bfloat16(self.config.distill):
            teacher.to(torch.bfloat16)
        layer = losses.layer if losses.teacher_layer is None else losses.teacher_layer
        source: Any = LiveTeacher(
            Scored(teacher),
            layer if losses.gamma else None,
            after_rope=losses.after_rope,
            hidden=losses.hidden > 0,
        )
        close = source.close
        if losses.teacher_cache:
            if not self.devices.main:
                self.devices.barrier()  # the first process writes, and the others find it written
            source = TeacherCache(
                self.out / "teacher-cache",
                source,
                rows,
                lambda mask, labels: compared_positions(losses, mask, labels),
                top_k=losses.teacher_top_k if losses.lambda_ else 0,
                tau=losses.tau,
                say=self.say,
            )
            if self.devices.main:
                self.devices.barrier()
            close()
        objective = Distillation(model, source, losses)

        def finish() -> None:
            objective.close()
            close()

        return model, objective, finish

    def _plain(self, name: str, seed: int) -> nn.Module:
        """The network of a stage, before it is trained or given the weights of an earlier one."""
        blocks = name == "blocks" or (name in VARIANTS and VARIANTS[name].after == "blocks")
        if name == "teacher" or (self.config.student.start == "base" and not blocks):
            model = models.load_base(self.config.model, seed, self.encoder.vocabulary_size)
        else:
            model = self._teacher(seed)
        if name != "teacher":
            if name == "pretrain" or blocks or VARIANTS[name].subln:
                insert_subln(model, self.config.student.subln, self._gains(model, seed))
            ternarise(model, self.config.student.quantizer, self.config.student.block)
        return model

    def _gains(self, model: nn.Module, seed: int) -> dict[str, float] | None:
        """What SubLN begins with."""
        if self.config.student.subln_gain == "one":
            return None
        ids, mask = first_prompts(self.config, self.splits, self.encoder, seed)
        return input_sizes(model, ids, mask, self.config.student.subln)

    def _teacher(self, seed: int) -> nn.Module:
        self.stage("teacher", seed)
        folder = self.folder("teacher", seed) / "model"
        return models.load_base(replace(self.config.model, folder=str(folder), gguf_file=""), seed, 0)

    def _save(self, model: nn.Module, folder: Path, *, ternary: bool) -> None:
        """``model/``, whole or not there; of a student also ``export/`` and, of a classifier, what it answered."""
        student = self.config.student
        if ternary and (student.subln == "every-linear" or student.quantizer != "absmean"):
            self.say(f"no {folder}/model: checkpoints have no form for norms before every layer, or other quantisers")
            return
        temporary = folder / ".model"
        shutil.rmtree(temporary, ignore_errors=True)
        save_student(model, temporary, ternary=ternary)
        models.save_tokenizer(self.tokenizer, temporary)
        shutil.rmtree(folder / "model", ignore_errors=True)
        os.replace(temporary, folder / "model")
        if not ternary:
            return
        for form, report in export_student(folder / "model", folder / "export").items():
            if isinstance(report, str):
                self.say(f"no {form} of this student: {report}")
        if isinstance(self.task, tasks.ClassificationTask):
            examples = self._limited(self.splits.test, self.config.data.test_limit)
            ids = self.task.label_ids(self.encoder)
            encode = self.task.encoder(self.encoder)
            prompts = [encode(replace(example, label=None))[0].tolist() for example in examples]
            correct = [list(ids).index(example.label) for example in examples]
            asked = (model, prompts, list(ids.values()), list(ids), correct)
            write_answers(answer(*asked), folder / "answers.safetensors")
            write_answers(answer(*asked, exact=False), folder / "answers-float32.safetensors")

    def _keep_weights(self, path: Path, model: nn.Module) -> None:
        temporary = path.with_name("." + path.name)
        save_weights(temporary if self.devices.main else os.devnull, model, {})
        if self.devices.main:
            os.replace(temporary, path)
        self.devices.barrier()

    @staticmethod
    def _limited(examples: list[data.Example], limit: int) -> list[data.Example]:
        return examples[:limit] if limit else examples  # splits are in the order of hashes, so the first are a sample


def splits_of(config: Config) -> data.Splits:
    """The examples of a configuration, read and split."""
    settings = config.data
    if settings.files == ("dry",):
        return data.split_examples(_dry_examples(config), (0.6, 0.2, 0.2), 0)

    def load(names: Sequence[str]) -> list[data.Example]:
        found: list[data.Example] = []
        for name in names:
            if name == "synthetic":
                found += synthetic.sentences(settings.synthetic, 0)
            else:
                found += data.load_examples(name, settings.format or None, **settings.options)
        return found

    if not settings.files:
        raise ValueError("data.files must name the examples of the task, it is empty")
    if settings.dev_files or settings.test_files:
        return data.given_splits(
            load(settings.files),
            load(settings.dev_files),
            load(settings.test_files),
            drop_overlaps=settings.drop_overlaps,
        )
    return data.split_examples(load(settings.files), settings.fractions, settings.split_seed)


def first_prompts(
    config: Config, splits: data.Splits, encoder: TextEncoder, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, int64 (B, T), of up to 32 examples to train on: what gains of norms are measured on."""
    examples = splits.train[: config.data.train_limit or None]
    batch = tasks.batches(task_of(config), encoder, examples, min(32, len(examples)), seed).batch(0)
    return torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["attention_mask"])


def task_of(config: Config) -> Any:
    """The task of a configuration."""
    settings = config.data
    if settings.task == "classification":
        return tasks.ClassificationTask(settings.template, dict(settings.labels), settings.max_length)
    return tasks.SummarisationTask(
        settings.template, settings.max_length, settings.max_target, settings.end_of_text or None
    )


def _dry_examples(config: Config) -> list[data.Example]:
    fields = max(1, sum(f"{{{i}}}" in config.data.template for i in range(10)))
    texts = synthetic.texts(60 * fields, 2)
    labels = list(config.data.labels) or [None]
    target = config.data.task == "summarisation"
    return [
        data.Example(
            tuple(texts[i * fields : (i + 1) * fields]),
            labels[i % len(labels)],
            texts[i].split(" , ")[0] if target else None,
            f"dry:{i + 1}",
        )
        for i in range(60)
    ]


def _dry_tokenizer(config: Config) -> Any:
    """One in which the labels are tokens."""
    template = config.data.template.replace("{{", "{").replace("}}", "}")
    texts = synthetic.texts(500, 0)
    texts += [template + label for label in config.data.labels.values() for _ in range(50)]
    return train_tokenizer(texts, 2048, fewer=True)


def _difference(result: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The first setting that is another one."""
    for key, value in settings.items():
        before = result["settings"].get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            for inner in sorted(value.keys() | before.keys()):
                # The one key that stands there only where it is not its default.
                there, now = (found.get(inner, "all" if inner == "trained" else None) for found in (before, value))
                if there != now:
                    return f"{key}.{inner} was {there!r} there and is {now!r} now"
        elif before != value:
            hashed = key in ("model", "data", "teacher", "pretrain", "blocks")
            return f"its {key} was another one" if hashed else f"{key} was {before!r} there and is {value!r} now"
    return "it was made with other settings"


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name("." + path.name)
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
