"""Train one stage: AdamW, schedules, accumulation, checkpoints, exact resumption, one process or several.

Everything that a step needs is a function of (seed, step) or lies in the checkpoint, so a run that was killed goes on
to the losses that it would have had. Losses are divided by the counts of the *whole* batch: cutting it into parts, or
spreading it over processes, changes the order of float sums and nothing else.

Several processes are started by ``accelerate launch`` or ``torchrun``; each computes its rows of every batch, and one
writes files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpuinfo
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from bitnet_ref.distill.bitlinear import BitLinear
from bitnet_ref.distill.config import Training
from bitnet_ref.errors import BitnetRefError

__all__ = [
    "Batch",
    "Counts",
    "Devices",
    "Diverged",
    "Result",
    "learning_rate",
    "load_state",
    "load_weights",
    "make_optimizer",
    "save_state",
    "save_weights",
    "train",
]

SECONDS_BETWEEN_LINES = 60
"""Of progress where standard error is no terminal."""

Batch = Mapping[str, np.ndarray]
"""``input_ids``, ``attention_mask`` and ``labels``, each of shape (B, T), int64; -100 is no label."""


class Diverged(BitnetRefError, ArithmeticError):
    """A loss or gradient became NaN or infinite; the message says at which step of which stage."""


@dataclass(frozen=True)
class Counts:
    """What losses are divided by: positions of a whole batch, over all parts and processes."""

    labels: int
    """Labels that are scored; the first token of a sequence is never predicted."""
    answers: int
    """The same, and rows without any."""
    tokens: int
    """Tokens that are no padding."""

    @classmethod
    def of(cls, batch: Batch) -> Counts:
        """Of one batch."""
        scored = batch["labels"][:, 1:] != -100
        labels = int(scored.sum())
        return cls(labels, labels + int((~scored.any(1)).sum()), int(batch["attention_mask"].sum()))


@dataclass(frozen=True)
class Result:
    """What a stage came to."""

    step: int
    """Steps taken."""
    best_step: int
    """The step whose weights the model has now; the last one where nothing was evaluated."""
    score: float | None
    """The best ``score`` on the development set."""
    seconds: float
    """Of training, over all starts."""
    tokens: int
    stopped_early: bool


@functools.cache
def _processor_flags() -> frozenset[str]:
    return frozenset(cpuinfo.get_cpu_info().get("flags", ()))


@dataclass(frozen=True)
class Devices:
    """Where this process computes, and its place among the processes of the run."""

    device: torch.device
    rank: int = 0
    world: int = 1
    sharding: str = "none"

    @classmethod
    def start(cls, sharding: str = "none") -> Devices:
        """Join the processes that a launcher started, if one did, and set the process up.

        Returns
        -------
        Devices

        Notes
        -----
        Flush-denormal is turned on: gradients of freshly ternarised layers are full of denormal numbers, with which a
        step takes about six times as long on a processor.
        """
        torch.set_flush_denormal(True)
        cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("true", "1")
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if world > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if cuda else "gloo")
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            sharding = "full"
        return cls(device, rank, world, sharding)

    @property
    def main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def uses_bfloat16(self, training: Training) -> bool:
        """Whether autocast is on; what ``auto`` means here.

        A processor without instructions for bfloat16 multiplies it several times slower than float32.
        """
        if training.autocast != "auto":
            return training.autocast == "bfloat16"
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_processor_flags())

    def sum(self, value: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.world > 1:
            distributed.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            distributed.barrier()

    def parallel(self, objective: nn.Module) -> nn.Module:
        """The module to call instead of `objective`, which runs on all processes together."""
        if self.world == 1:
            return objective
        if self.sharding == "full":
            from torch.distributed.fsdp import fully_shard

            for block in objective.scored.model.model.layers:
                fully_shard(block)
            fully_shard(objective.scored)
            return objective
        return nn.parallel.DistributedDataParallel(objective)


def learning_rate(step: int, training: Training) -> float:
    """Of step 0..steps-1: a linear rise over the warm-up, then the schedule, which would be 0 at step `steps`."""
    rise = round(training.warm_up * training.steps)
    if step < rise:
        return training.learning_rate * (step + 1) / rise
    done = (step - rise) / max(1, training.steps - rise)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return training.learning_rate * factor[training.schedule]


def quantize_strength(step: int, training: Training) -> float:
    """How far step `step`, from 0, quantises: rises evenly over ``training.quantize_over`` of the steps, then 1."""
    rise = round(training.quantize_over * training.steps)
    return min(1.0, step / rise) if rise else 1.0


def set_strength(model: nn.Module, strength: float) -> None:
    """Give all ternary layers this :attr:`~bitnet_ref.distill.bitlinear.BitLinear.strength`."""
    for layer in model.modules():
        if isinstance(layer, BitLinear):
            layer.strength = strength


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; only matrices decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.epsilon,
        fused=True,
    )


def train(
    objective: nn.Module,
    training: Training,
    batches: Callable[[int], Batch],
    folder: str | Path,
    *,
    stage: str,
    identity: str,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    devices: Devices | None = None,
    watch: Callable[[int], None] | None = None,
    quiet: bool = False,
) -> Result:
    """Train one stage, or go on with it from the checkpoint in `folder`; the model has the best weights afterwards.

    Parameters
    ----------
    objective : Module
        ``objective(input_ids, attention_mask, labels, counts)`` gives a dict of losses, tensors of shape (), each
        divided by its number in `counts`; ``loss`` is what is minimised. What is trained is
        ``objective.scored.model``.
    training : Training
    batches : callable
        Step -> batch, a pure function.
    folder : path
        For ``metrics.jsonl``, ``last.safetensors`` (weights and moments) and ``best.safetensors`` (weights).
    stage : str
        Its name, for messages.
    identity : str
        What determines the stage, such as :func:`bitnet_ref.distill.config.digest` of it.
    evaluate : callable, optional
        Gives figures on the development set, of which the largest ``score`` is best. Every process calls it.
    devices : Devices, optional
    watch : callable, optional
        Called with the number of steps done after each of them, and with 0 at the beginning.
    quiet : bool
        No progress.

    Returns
    -------
    Result

    Raises
    ------
    ValueError
        If the checkpoint in `folder` is of another identity, or a batch cannot be shared out evenly.
    Diverged
        If a loss or the norm of the gradient is NaN or infinite. The last checkpoint stays as it was.
    OSError
        If a file cannot be written; what was there before is kept.
    """
    devices = devices or Devices.start()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = objective.scored.model
    run = _Run(model, training, folder, stage, identity, devices)
    if training.gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in all versions that are allowed
            model.gradient_checkpointing_enable({"use_reentrant": False})
    frozen: set[str] = set()
    if training.trained == "vectors":
        frozen = {name for name, p in model.named_parameters() if p.ndim >= 2 and p.requires_grad}
    _set_trainable(model, frozen, False)
    module = devices.parallel(objective)
    run.optimizer = make_optimizer(model, training)
    run.restore()
    model.train()
    with _progress(stage, training.steps, run.step, quiet or not devices.main) as show:
        if watch:
            watch(run.step)
        while run.step < training.steps and not run.stopped_early:
            run.advance(module, batches(run.step))
            show(run)
            if watch:
                watch(run.step)
            last = run.step == training.steps
            every = training.evaluate_every or training.steps
            if evaluate and (run.step % every == 0 or last):
                model.eval()
                set_strength(model, 1.0)  # what is kept is to work fully quantised
                run.judge(evaluate())
                model.train()
            if run.step % training.save_every == 0 or last or run.stopped_early:
                run.save()
    model.eval()
    set_strength(model, 1.0)
    _set_trainable(model, frozen, True)
    if run.best_step not in (0, run.step):
        load_weights(folder / "best.safetensors", model)
    return Result(run.step, run.best_step or run.step, run.score, round(run.seconds, 2), run.tokens, run.stopped_early)


def _set_trainable(model: nn.Module, names: set[str], wanted: bool) -> None:
    """By name, since FSDP puts other parameters in the place of a model's own."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(wanted)


class _Run:
    """A stage under way: what the checkpoint holds, and the metrics file."""

    def __init__(
        self, model: nn.Module, training: Training, folder: Path, stage: str, identity: str, devices: Devices
    ) -> None:
        self.model, self.training, self.folder, self.devices = model, training, folder, devices
        self.stage, self.identity = stage, identity
        self.optimizer: torch.optim.Optimizer
        self.step = self.best_step = self.bad = self.tokens = 0
        self.saved_step: int | None = None
        self.score: float | None = None
        self.stopped_early = False
        self.seconds = 0.0
        self.row: dict[str, float] = {}
        self._clock = time.perf_counter()

    def advance(self, module: nn.Module, batch: Batch) -> None:
        """One step of the optimizer."""
        training, devices = self.training, self.devices
        rows = len(batch["input_ids"])
        if rows % (devices.world * training.accumulation):
            raise ValueError(
                f"a batch must divide evenly among processes and accumulated parts, got {rows} rows for "
                f"{devices.world} x {training.accumulation}"
            )
        rate = learning_rate(self.step, training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        set_strength(self.model, quantize_strength(self.step, training))
        counts = Counts.of(batch)
        sums: dict[str, Tensor] = {}
        for i in range(training.accumulation):
            part = _part(batch, devices.rank * training.accumulation + i, devices.world * training.accumulation)
            part = {name: torch.from_numpy(value).to(devices.device) for name, value in part.items()}
            with self._no_sync(module, i + 1 < training.accumulation):
                with torch.autocast(
                    devices.device.type, torch.bfloat16, enabled=devices.uses_bfloat16(training), cache_enabled=True
                ):
                    losses = module(**part, counts=counts)
                # Gradients are averaged over processes, and the counts are of all of them already.
                (losses["loss"] * devices.world).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach()
        values = devices.sum(torch.stack([value.float() for value in sums.values()])).tolist()
        self.row = dict(zip(sums, values, strict=True))
        norm = nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.requires_grad], training.clip or math.inf
        )
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        for name, value in (*self.row.items(), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                raise Diverged(
                    f"training must stay finite, the {name} is {value} at step {self.step + 1} of stage {self.stage}; "
                    + self._kept()
                )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += counts.tokens
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now
        self.log(
            {
                "step": self.step,
                **self.row,
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens": self.tokens,
                "seconds": round(self.seconds, 3),
            }
        )

    def judge(self, figures: Mapping[str, float]) -> None:
        """Take note of an evaluation; keep the weights if they are the best."""
        self.log({"event": "development", "step": self.step, **figures})
        score = figures["score"]
        if self.score is None or score > self.score:
            self.score, self.best_step, self.bad = score, self.step, 0
            self._write("best.safetensors", lambda path: save_weights(path, self.model, self._about()))
        else:
            self.bad += 1
            self.stopped_early = bool(self.training.patience) and self.bad >= self.training.patience
        self._clock = time.perf_counter()  # the seconds are those of training

    def save(self) -> None:
        """Write the checkpoint."""
        about = self._about()
        self._write("last.safetensors", lambda path: save_state(path, self.model, self.optimizer, about))
        self.saved_step = self.step
        self._clock = time.perf_counter()

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one, and cut the metrics off behind it."""
        path = self.folder / "last.safetensors"
        if path.exists():
            about = load_state(path, self.model, self.optimizer, self.identity)
            for name in ("step", "best_step", "bad", "tokens", "score", "stopped_early", "seconds"):
                setattr(self, name, about[name])
            self.saved_step = self.step
        if self.devices.main:
            self._trim_metrics()
        self.devices.barrier()
        self.log(
            {
                "event": "start",
                "step": self.step,
                "steps": self.training.steps,
                "processes": self.devices.world,
                "sharding": self.devices.sharding,
                "device": self.devices.device.type,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
        self._clock = time.perf_counter()

    def log(self, row: Mapping[str, Any]) -> None:
        """One line of metrics."""
        if self.devices.main:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _trim_metrics(self) -> None:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the process was killed while it wrote
                continue
            if row["step"] <= self.step:
                kept.append(line + "\n")
        temporary = path.with_name("." + path.name)
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)

    def _about(self) -> dict[str, Any]:
        names = ("stage", "identity", "step", "best_step", "bad", "tokens", "score", "stopped_early", "seconds")
        return {name: getattr(self, name) for name in names}

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        """Under a temporary name, then renamed: a checkpoint is whole or not there."""
        path = self.folder / name
        temporary = path.with_name("." + name)
        try:
            write(temporary if self.devices.main else Path(os.devnull))
            if self.devices.main:
                os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise OSError(
                f"{path} of step {self.step} must be written to go on, and could not be ({error}); {self._kept()}"
            ) from error
        self.devices.barrier()

    def _kept(self) -> str:
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the checkpoint of step {self.saved_step} is kept in {self.folder}"

    def _no_sync(self, module: nn.Module, wanted: bool) -> Any:
        """Gradients of all parts but the last need not be shared yet."""
        if wanted and isinstance(module, nn.parallel.DistributedDataParallel):
            return module.no_sync()
        return contextlib.nullcontext()


def _part(batch: Batch, i: int, n: int) -> dict[str, np.ndarray]:
    """The i-th of n parts of a batch: every n-th row, without columns that are padding in all of them."""
    rows = {name: value[i::n] for name, value in batch.items()}
    used = np.flatnonzero(rows["attention_mask"].any(0))
    columns = slice(used[0], used[-1] + 1) if len(used) else slice(None)
    return {name: np.ascontiguousarray(value[:, columns]) for name, value in rows.items()}


def _full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over processes; every process must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, spread over processes as `other` is."""
    tensor = tensor.to(other.device)
    if hasattr(other, "full_tensor") and tensor.ndim:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, other.device_mesh, other.placements)
    return tensor


def _save(path: Path, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> None:
    if path != Path(os.devnull):
        # Tied weights are one parameter and come once.
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(tensors, path, metadata={"about": json.dumps(about)})


def save_weights(path: str | Path, model: nn.Module, about: Mapping[str, Any]) -> None:
    """Write the parameters of a model under their names in PyTorch; `about` is JSON in the metadata."""
    _save(Path(path), {f"weight:{name}": _full(p) for name, p in model.named_parameters()}, about)


def save_state(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, about: Mapping[str, Any]) -> None:
    """Write parameters and the moments of AdamW."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight:{name}"] = _full(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = _full(value)
    _save(Path(path), tensors, about)


def load_weights(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """Put the parameters of a file that :func:`save_weights` or :func:`save_state` wrote into a model.

    Returns
    -------
    dict
        What was saved as `about`.

    Raises
    ------
    ValueError
        If the file has other parameters than the model.
    """
    with safe_open(path, "pt") as stored, torch.no_grad():
        names = {name.removeprefix("weight:") for name in stored.keys() if name.startswith("weight:")}  # noqa: SIM118
        ours = dict(model.named_parameters())
        if names != set(ours):
            odd = sorted(names ^ set(ours))
            raise ValueError(f"{path} must have the parameters of this model, {odd[0]} is only in one of them")
        for name, parameter in ours.items():
            value = stored.get_tensor(f"weight:{name}")
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{path} must have the parameters of this model, {name} has shape {tuple(value.shape)} there and "
                    f"{tuple(parameter.shape)} here"
                )
            parameter.copy_(_like(value, parameter))
        return json.loads(stored.metadata()["about"])


def load_state(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: str | None = None
) -> dict[str, Any]:
    """Put a checkpoint's parameters and moments in place.

    Returns
    -------
    dict
        What was saved as `about`.

    Raises
    ------
    ValueError
        If it cannot be read, or is of another `identity`.
    """
    try:
        with safe_open(path, "pt") as stored:
            about = json.loads(stored.metadata()["about"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a checkpoint of this program: {error}") from error
    if identity is not None and about["identity"] != identity:
        raise ValueError(
            f"{path} must be of this configuration, data and model to go on from; it is of others: give another --out, "
            "or the configuration that it was made with"
        )
    load_weights(path, model)
    with safe_open(path, "pt") as stored:
        keys = set(stored.keys())
        for name, parameter in model.named_parameters():
            if f"step:{name}" in keys:
                optimizer.state[parameter] = {
                    "step": stored.get_tensor(f"step:{name}").to(parameter.device),
                    **{key: _like(stored.get_tensor(f"{key}:{name}"), parameter) for key in ("exp_avg", "exp_avg_sq")},
                }
    return about


@contextlib.contextmanager
def _progress(stage: str, steps: int, done: int, quiet: bool) -> Iterator[Callable[[_Run], None]]:
    """A bar on standard error with loss, tokens a second and the time that is left; in a file a line now and then."""
    console = Console(stderr=True)
    if quiet:
        yield lambda run: None
        return
    first: list[float] = []

    def speed(run: _Run) -> float:
        """Tokens a second of training since the first step that was seen."""
        if not first:
            first[:] = run.tokens, run.seconds
        return (run.tokens - first[0]) / (run.seconds - first[1] or math.inf)

    if not console.is_terminal:
        start = shown = time.monotonic()

        def tell(run: _Run) -> None:
            nonlocal shown
            tokens, now = speed(run), time.monotonic()
            if now - shown >= SECONDS_BETWEEN_LINES:
                shown = now
                left = (steps - run.step) * (now - start) / (run.step - done) / 60  # evaluations and all
                print(
                    f"{stage}: step {run.step:,} of {steps:,}, loss {run.row['loss']:.4g}, {tokens:,.0f} tokens/s, "
                    f"{left:,.0f} min left",
                    file=sys.stderr,
                    flush=True,
                )

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4g}, {task.fields[speed]:,.0f} tokens/s, left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(stage, total=steps, completed=done, loss=math.nan, speed=0.0)

        def show(run: _Run) -> None:
            progress.update(task, completed=run.step, loss=run.row["loss"], speed=speed(run))

        yield show
