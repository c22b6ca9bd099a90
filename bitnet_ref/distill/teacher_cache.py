"""What a teacher says, on the fly or from disk: logits at compared positions; queries, keys and values of one layer.

A cache holds every *row* (the tokens of one example, and at which of them logits are compared) once, so any batch of
these rows is answered, however it is put together, cut into parts or spread over processes. It is worth its bytes where
the teacher takes longer than reading them: several epochs, a teacher larger than the student, several students.

Full logits have two bytes for each entry of the vocabulary. With `top_k` only the k largest are kept and, as one more
entry, all others together; the student's logits are then lumped in the same way by :func:`coarsen`, and the divergence
of the lumped distributions, which is never above that of the whole ones, is the same :func:`.losses.logits_loss`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bitnet_ref.distill.student import capture_hidden, capture_qkv
from bitnet_ref.distill.tasks import collate

__all__ = ["LiveTeacher", "Outputs", "TeacherCache", "coarsen"]

_LAYOUT = 1  # of the shards; raise it when what lies in them changes
_SHARD_BYTES = 256 << 20
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Row = tuple[np.ndarray, np.ndarray]
"""``input_ids`` and ``labels`` of one example, each of shape (T,), int64."""

Positions = Callable[[Tensor, Tensor], Tensor]
"""From ``attention_mask`` and ``labels``, (B, T), to the mask of compared positions, (B, T), bool."""


class Outputs(NamedTuple):
    """What a teacher says about a batch.

    Attributes
    ----------
    logits : tensor of shape (N, V), or (N, k + 1) with `indices`
        At the compared positions, row by row.
    indices : tensor of shape (N, k), int64, or None
        For :func:`coarsen` of the student's logits.
    relations : three tensors of shape (B, T, W_j), or nothing
        Queries, keys and values; zero at padding if they come from a cache.
    hidden : a tensor of shape (B, T, hidden) for each block, or nothing
        The residual stream behind it.
    """

    logits: Tensor
    indices: Tensor | None
    relations: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...] = ()


def coarsen(logits: Tensor, indices: Tensor, tau: float) -> Tensor:
    """Logits of chosen tokens and of all others together, at a temperature.

    Parameters
    ----------
    logits : tensor of shape (N, V)
    indices : tensor of shape (N, k), int64
        Different ones in each row, k < V.
    tau : float

    Returns
    -------
    tensor of shape (N, k + 1), float32
        Whose softmax at `tau` gives the probabilities of these tokens, and of the rest, at `tau`.
    """
    logits = logits.float()
    rest = torch.logsumexp(logits.scatter(1, indices, -torch.inf) / tau, 1, keepdim=True)
    return torch.cat((logits.gather(1, indices), tau * rest), 1)


class LiveTeacher:
    """A teacher that is run.

    Parameters
    ----------
    scored : Module
        Called with ``input_ids``, ``attention_mask``, ``positions``; gives logits of shape (N, V). Its ``model`` is a
        causal language model of ``transformers``.
    layer : int or None
        Whose queries, keys and values are given; None for no layer.
    after_rope : bool
        See :func:`bitnet_ref.distill.student.capture_qkv`.
    hidden : bool
        Whether the residual stream behind every block is given.
    """

    def __init__(
        self, scored: nn.Module, layer: int | None = None, *, after_rope: bool = False, hidden: bool = False
    ) -> None:
        self._scored, self._what = scored, [layer, after_rope]
        self._hooks = ExitStack()
        self._relations = None
        if layer is not None:
            self._relations = self._hooks.enter_context(capture_qkv(scored.model, layer, after_rope=after_rope))
        self._hidden = self._hooks.enter_context(capture_hidden(scored.model)) if hidden else ()

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    @torch.no_grad()
    def outputs(self, input_ids: Tensor, attention_mask: Tensor, compared: Tensor) -> Outputs:
        """What it says.

        Parameters
        ----------
        input_ids, attention_mask : tensor of shape (B, T), int64
        compared : tensor of shape (B, T), bool
        """
        logits = self._scored(input_ids, attention_mask, compared)
        relations = () if self._relations is None else tuple(self._relations)
        return Outputs(logits, None, relations, tuple(self._hidden))

    def identity(self) -> list[Any]:
        """The layer, and SHA-256 of configuration and weights: two teachers with the same say the same."""
        digest = hashlib.sha256(json.dumps(self._scored.model.config.to_dict(), sort_keys=True, default=str).encode())
        for name, value in self._scored.model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return [*self._what, digest.hexdigest()]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self._scored.parameters()).device


class TeacherCache:
    """The outputs of a teacher for rows that are known beforehand, on disk.

    Parameters
    ----------
    folder : path
        Where caches are; this one makes or goes on with a folder named by teacher, rows and settings.
    teacher : LiveTeacher
        Run for rows that are not there yet, and not needed afterwards.
    rows : sequence of (input_ids, labels)
        All that will be asked for; :attr:`bitnet_ref.distill.tasks.Batches.rows` has those of a task. Equal ones are
        kept once.
    positions : callable
        Where logits are compared; no position anywhere leaves them out.
    top_k : int
        Keep the k largest logits and the rest together; 0 for all.
    tau : float
        Temperature of the rest; without `top_k` it does not matter.
    dtype : {"float16", "bfloat16", "float32"}
        Of everything but the rest, which is float32.
    limit_bytes : int, optional
        Refuse to write more; what the disk has free is a limit in any case.
    batch_size : int
        Rows that the teacher is given at once.
    say : callable, optional
        Is told the size before anything is written, and what is done.

    Attributes
    ----------
    path : Path
    n_rows, n_bytes : int
        Different rows; bytes of their tensors.

    Raises
    ------
    ValueError
        If an argument is out of range, a value does not fit `dtype`, or the cache would be larger than the limit; the
        message has the sum.
    OSError
        If there is no room on the disk. Finished shards stay, and the next attempt goes on behind them.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        teacher: LiveTeacher,
        rows: Sequence[Row],
        positions: Positions,
        *,
        top_k: int = 0,
        tau: float = 5.0,
        dtype: str = "float16",
        limit_bytes: int | None = None,
        batch_size: int = 32,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        if top_k < 0 or not tau > 0:
            raise ValueError(f"top_k must not be negative and tau must be positive, got {top_k} and {tau}")
        if not len(rows):
            raise ValueError("a cache needs at least one row, got none")
        self._dtype, self._top_k, self._tau = _DTYPES[dtype], top_k, tau
        self._numbers: dict[bytes, int] = {}
        found, tokens, logits = [], [], []
        for i in range(len(rows)):
            ids, compared = _compared(rows[i], positions)
            key = _key(ids, compared)
            if key not in self._numbers:
                self._numbers[key] = len(found)
                found.append(i)
                tokens.append(len(ids))
                logits.append(int(compared.sum()))
        self.n_rows = len(found)
        self._tokens, self._logits = np.array(tokens), np.array(logits)

        first = [rows[found[int(np.argmax(logits)) if any(logits) else 0]]]
        (probe,) = self._compute(teacher, first, positions)
        per_logit = sum(v[0].numel() * v.element_size() for n, v in probe.items() if n in _AT_LOGITS and len(v))
        per_token = sum(v[0].numel() * v.element_size() for n, v in probe.items() if n in _AT_TOKENS)
        sizes = per_token * self._tokens + per_logit * self._logits
        self.n_bytes = int(sizes.sum())
        identity = [_LAYOUT, teacher.identity(), dtype, top_k, tau if top_k else 0, _SHARD_BYTES]
        digest = hashlib.sha256(json.dumps(identity).encode())
        for key in self._numbers:
            digest.update(key)
        self.path = Path(folder) / f"teacher-{digest.hexdigest()[:32]}"
        # A shard ends with the row that fills it.
        shard = np.concatenate(([0], np.cumsum(sizes)[:-1])) // _SHARD_BYTES
        self._shard = np.unique(shard, return_inverse=True)[1]
        self._files: dict[int, Any] = {}
        self._fill(teacher, rows, found, positions, sizes, limit_bytes, batch_size, say or (lambda text: None))

    def outputs(self, input_ids: Tensor, attention_mask: Tensor, compared: Tensor) -> Outputs:
        """What the teacher said about these rows; as :meth:`LiveTeacher.outputs`, but for the rounding to `dtype`.

        Raises
        ------
        LookupError
            If a row is not in the cache.
        """
        device, (b, t) = input_ids.device, input_ids.shape
        ids, mask, where = (x.cpu().numpy() for x in (input_ids, attention_mask.bool(), compared))
        found: dict[str, list[Tensor]] = {}
        for i in range(b):
            number = self._numbers.get(_key(ids[i][mask[i]], where[i][mask[i]]))
            if number is None:
                raise LookupError(
                    f"a cache of teacher outputs must have every row of a batch, {self.path} has none with the tokens "
                    f"{ids[i][mask[i]][:8].tolist()}... and {int(where[i].sum())} compared positions"
                )
            for name, value in self._row(number).items():
                found.setdefault(name, []).append(value)
        relations = []
        for name in [name for name in _AT_TOKENS if name in found]:
            whole = torch.zeros(b, t, found[name][0].shape[1])
            for i, value in enumerate(found[name]):
                whole[i, torch.from_numpy(mask[i])] = value.float()
            relations.append(whole.to(device))
        logits = torch.cat(found["logits"]).float()
        indices = None
        if "indices" in found:
            indices = torch.cat(found["indices"]).long().to(device)
            logits = torch.cat((logits, torch.cat(found["rest"])), 1)
        return Outputs(logits.to(device), indices, tuple(relations))

    def _fill(
        self,
        teacher: LiveTeacher,
        rows: Sequence[Row],
        found: list[int],
        positions: Positions,
        sizes: np.ndarray,
        limit: int | None,
        batch_size: int,
        say: Callable[[str], None],
    ) -> None:
        n_shards = int(self._shard[-1]) + 1
        missing = [s for s in range(n_shards) if not self._shard_path(s).exists()]
        wanted = int(sizes[np.isin(self._shard, missing)].sum())
        say(
            f"outputs of the teacher: {self.n_rows:,} rows, {self.n_bytes:,} bytes in {self.path}, of which {wanted:,} "
            "are to be written"
        )
        if not missing:
            return
        if limit is not None and self.n_bytes > limit:
            raise ValueError(
                f"outputs of the teacher may take {limit:,} bytes, they would take {self.n_bytes:,} "
                f"({int(self._tokens.sum()):,} tokens, {int(self._logits.sum()):,} with logits): raise the limit, keep "
                "fewer logits (top_k), or run the teacher on the fly"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if wanted > free:
            raise OSError(f"outputs of the teacher take {wanted:,} bytes, the disk of {self.path} has {free:,} free")
        for s in missing:
            numbers = np.flatnonzero(self._shard == s)
            # Rows of like lengths at once: little of a batch is padding then.
            by_length = sorted(numbers.tolist(), key=lambda number: -self._tokens[number])
            outputs: dict[int, dict[str, Tensor]] = {}
            for i in range(0, len(by_length), batch_size):
                chosen = by_length[i : i + batch_size]
                made = self._compute(teacher, [rows[found[number]] for number in chosen], positions)
                outputs |= dict(zip(chosen, made, strict=True))
            names = outputs[int(numbers[0])]
            _write(self._shard_path(s), {n: torch.cat([outputs[int(k)][n] for k in numbers]) for n in names})
            say(f"outputs of the teacher: shard {s + 1} of {n_shards}")

    def _compute(self, teacher: LiveTeacher, rows: list[Row], positions: Positions) -> Iterator[dict[str, Tensor]]:
        """The tensors of each row, in the types in which they are kept."""
        batch = {name: torch.from_numpy(value).to(teacher.device) for name, value in collate(rows).items()}
        mask = batch["attention_mask"].bool()
        compared = positions(batch["attention_mask"], batch["labels"])
        found = teacher.outputs(batch["input_ids"], batch["attention_mask"], compared)
        kept = {}
        if self._top_k:
            v = found.logits.shape[1]
            if self._top_k >= v - 1:
                raise ValueError(f"top_k must leave at least two tokens of {v} to the rest, got {self._top_k}")
            indices = found.logits.topk(self._top_k, dim=1).indices
            coarse = coarsen(found.logits, indices, self._tau)
            kept |= {
                "logits": self._rounded(coarse[:, :-1]),
                "rest": coarse[:, -1:].cpu(),
                "indices": indices.int().cpu(),
            }
        else:
            kept["logits"] = self._rounded(found.logits)
        counts = compared.sum(1).tolist()
        split = {name: value.split(counts) for name, value in kept.items()}
        relations = {name: self._rounded(value) for name, value in zip(_AT_TOKENS, found.relations, strict=False)}
        for i in range(len(rows)):
            row = {name: value[i] for name, value in split.items()}
            yield row | {name: value[i, mask[i].cpu()] for name, value in relations.items()}

    def _rounded(self, value: Tensor) -> Tensor:
        rounded = value.to(self._dtype).cpu()
        if not rounded.isfinite().all():
            largest = float(value.float().abs().max())
            raise ValueError(
                f"outputs of a teacher must be finite in {self._dtype}, the largest is {largest:g}: choose bfloat16"
            )
        return rounded

    def _shard_path(self, shard: int) -> Path:
        return self.path / f"{shard:05d}.safetensors"

    def _row(self, number: int) -> dict[str, Tensor]:
        shard = int(self._shard[number])
        if shard not in self._files:
            path = self._shard_path(shard)
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise OSError(f"{path} must be a whole shard, delete it to have it made again: {error}") from error
            first = int(np.searchsorted(self._shard, shard))
            last = int(np.searchsorted(self._shard, shard, "right"))
            starts = [np.concatenate(([0], np.cumsum(x[first:last]))) for x in (self._tokens, self._logits)]
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            self._files[shard] = file, slices, first, starts
        _, slices, first, (tokens, logits) = self._files[shard]
        i = number - first
        row = {}
        for name, value in slices.items():
            at = tokens if name in _AT_TOKENS else logits
            row[name] = value[int(at[i]) : int(at[i + 1])]
        return row


_AT_LOGITS = ("logits", "indices", "rest")
_AT_TOKENS = ("q", "k", "v")


def _compared(row: Row, positions: Positions) -> tuple[np.ndarray, np.ndarray]:
    ids, labels = row
    return ids, positions(torch.ones(1, len(ids), dtype=torch.int64), torch.from_numpy(labels)[None])[0].numpy()


def _key(ids: np.ndarray, compared: np.ndarray) -> bytes:
    data = ids.astype("<i8").tobytes() + compared.astype(bool).tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(save({name: value.contiguous() for name, value in tensors.items()}))
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} of the teacher's outputs could not be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
