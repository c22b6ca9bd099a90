"""Compare two traces: the first tensor outside its bound, and what such a difference usually comes from.

Bounds. Two correct float32 programs differ by at most 1.1e-6 of a tensor's largest value as long as their int8
activations are equal (measured against transformers, docs/model.md): errors do not pile up, because every matrix reads
integers. ``BOUND`` is ten times that. A tensor stored in 16 bits adds its rounding, 2^-8 (bf16) or 2^-11 (f16). Scores
are an exponent of the probabilities, so a relative error of the largest score becomes ``max|score|`` times as large in
them and in what is made of them.

Integers must be equal, with one exception that no program can avoid: where x * 127 / max|x| lies within 127 * BOUND of
a half, rounding may go either way by one. Such a *tie flip* changes that token from there on, and the tokens after it
in later layers, by 1e-3 to 2e-2 of the logits' range. Tokens before it cannot be affected (attention is causal) and
keep the strict bounds; it and later ones are held to ``FLIP_BOUND`` only, and the report says so.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.mlp import activate
from bitnet_ref.reference.quantize import quantize_activations
from bitnet_ref.reference.rope import frequencies, rotate, rotations
from bitnet_ref.runtime.trace import STEPS, Trace

__all__ = ["BOUND", "CAUSES", "FLIP_BOUND", "Difference", "TensorError", "TraceDiff", "diff_traces"]

BOUND = 1e-5
"""Largest error of a float tensor, over its largest magnitude: ten times what two correct programs were seen to do."""

FLIP_BOUND = 0.1
"""The same for tokens that a tie flip may have changed. Flips were seen to move int8 values of a network of hidden size
128 by up to 0.055 of the range (inputs of down_proj, behind a square), and logits by 0.02; wide networks less."""

_UNITS = {"BF16": 2.0**-8, "F16": 2.0**-11, "F8_E4M3": 2.0**-4, "F8_E5M2": 2.0**-3}  # one rounding to that type
_MASKED = -1e30  # programs that add their mask to the scores write the lowest float, or -inf, above the diagonal
_SAME = 1e-4  # a recomputed step "is" the other trace's; wrong hypotheses are off by 1e-2 and more
_AFTER_SCORES = ("probabilities", "attention", "attn_sub_norm", "o_proj.x_scale", "o_proj.x_q")
_NORM_INPUTS = {
    "attn_sub_norm": "attention",
    "attn_post_norm": "o_proj",
    "ffn_norm": "attn_out",
    "ffn_sub_norm": "gated",
    "ffn_post_norm": "down_proj",
    "q_norm": "q_proj",
    "k_norm": "k_proj",
}

CAUSES: Mapping[str, str] = MappingProxyType(
    {
        "tokens": "other tokens: a beginning-of-sequence token added by one program only, or another tokenizer",
        "shape": "another shape: a batch axis, heads before tokens, or another model",
        "embedding": "another embedding: its scale (Gemma multiplies by sqrt(hidden)), its rows, or other token ids",
        "no-subln": "SubLN is missing: the norm before o_proj or down_proj, or another norm in its place",
        "norm-missing": "a norm is missing: its output is its input",
        "epsilon": "another epsilon of the norms (rms_norm_eps), or one that is not added under the root",
        "norm-offset": "norm weights stored as w - 1 and used as w, or the other way round (Gemma)",
        "norm": "another norm weight: of another layer, or of the norm beside it",
        "token-scale": "one int8 scale for all tokens where each token has its own",
        "rounding": "another rounding to int8: truncated or half away from zero, or another largest integer than 127",
        "scale-inverted": "the weight scale is used the wrong way round: divided where it multiplies",
        "scale-dropped": "the weight scale is dropped",
        "scale": "another weight scale",
        "threshold": "another threshold of the ternary rounding: mean|w| in place of mean|w| / 2",
        "order": "weights read in another order: I2_S blocks of 64 and 128, rows in fours, bits high or low first",
        "rows": "rows of a matrix in another order: q and k of GGUF llama files are permuted within each head",
        "swapped": "two matrices are swapped",
        "weights": "other weights",
        "rope-pairs": "RoPE turns neighbours (2i, 2i + 1) where the weights are for (i, i + D/2), or the other way",
        "rope-missing": "RoPE is not applied",
        "rope-angle": "other RoPE angles: base, scaling, first position, or direction",
        "kv-heads": "query heads read other key/value heads: h mod KV where it is floor(h / group)",
        "attention-scale": "another scale of q.k than head_dim^-1/2",
        "mask": "another mask: causal, or the width of the sliding window",
        "activation": "another activation function",
        "overflow": "overflow: a value beyond 65504 in float16; squared ReLU reaches it from an input of 256 on",
        "residual": "the residual is not added",
        "precision": "lower precision: values rounded to bf16 or f16 on the way",
        "unknown": "nothing in the table of causes reproduces it",
    }
)
"""What differences come from, by the keys that :class:`Difference` uses."""


@dataclass(frozen=True)
class TensorError:
    """One compared tensor: largest error over its largest magnitude, its bound, and the elements outside."""

    name: str
    error: float
    bound: float
    n_outside: int
    n_flips: int = 0


@dataclass(frozen=True)
class Difference:
    """The first difference.

    Attributes
    ----------
    name : str
        The tensor; ``tokens`` if those differ.
    kind : {"tokens", "missing", "shape", "value"}
    cause : str
        A key of :data:`CAUSES`.
    evidence : str
        What points to that cause.
    error, bound : float
        Over the largest magnitude of the tensor.
    index : tuple of int
        Where the error is largest.
    values : tuple of two floats
        There, in the first and the second trace.
    n_outside, n_values : int
        Elements outside the bound, and all.
    """

    name: str
    kind: str
    cause: str
    evidence: str
    error: float = 0.0
    bound: float = 0.0
    index: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    n_outside: int = 0
    n_values: int = 0

    def __str__(self) -> str:
        if self.kind == "value":
            first, second = (f"{value:.6g}" for value in self.values)
            found = (
                f"{self.name} is the first tensor outside its bound: {first} and {second} at "
                f"{list(self.index)}, {self.error:.2g} of the largest value where {self.bound:.2g} is allowed, "
                f"{self.n_outside:,} of {self.n_values:,} values outside"
            )
        elif self.kind == "missing":
            found = f"{self.name} is the first difference: only one of the two traces has it"
        else:
            found = f"{self.name} differ" + ("" if self.name == "tokens" else " in shape")
        return f"{found}. Usual cause: {CAUSES[self.cause]} ({self.evidence})."


@dataclass(frozen=True)
class TraceDiff:
    """What a comparison found.

    Attributes
    ----------
    first : Difference or None
    tensors : tuple of TensorError
        Every tensor compared, in the order of computation.
    only_in_first, only_in_second : tuple of str
        Steps that one trace lacks; a difference only if both traces are complete.
    flips : int
        Activations rounded to the other side at a tie.
    strict_tokens : int
        Tokens to which the strict bounds apply to the end: those before the first flip.
    logit_correlation : float or None
        Pearson correlation of all logits of both; None if one has none, or they are not finite.
    notes : tuple of str
    """

    first: Difference | None
    tensors: tuple[TensorError, ...] = ()
    only_in_first: tuple[str, ...] = ()
    only_in_second: tuple[str, ...] = ()
    flips: int = 0
    strict_tokens: int = 0
    logit_correlation: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return self.first is None

    def __str__(self) -> str:
        if self.first is not None:
            return str(self.first)
        worst = max(self.tensors, key=lambda row: row.error)
        text = f"equal within bounds: {len(self.tensors)} tensors, largest error {worst.error:.2g} in {worst.name}"
        if self.flips:
            text += (
                f"; {self.flips} activations are rounded to the other side at a tie, so from token "
                f"{self.strict_tokens} on the bound is {FLIP_BOUND:g}"
            )
        return text

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite as text."""
        return _plain({"equal": self.equal, "sentence": str(self), **dataclasses.asdict(self)})


def diff_traces(first: Trace, second: Trace) -> TraceDiff:
    """Compare two traces in the order of computation; `first` is the one taken as right.

    Raises
    ------
    ValueError
        If they have no tensor in common.
    """
    if first.tokens != second.tokens:
        n = min(len(first.tokens), len(second.tokens))
        where = next((i for i in range(n) if first.tokens[i] != second.tokens[i]), n)
        evidence = f"{len(first.tokens)} and {len(second.tokens)} tokens, different from position {where} on"
        return TraceDiff(Difference("tokens", "tokens", "tokens", evidence))
    first, second = _with_inputs(first), _with_inputs(second)
    a, b = first.tensors, second.tensors
    names = sorted((name for name in a.keys() | b.keys() if _order(name) is not None), key=_order)
    shared = [name for name in names if name in a and name in b]
    if not shared:
        raise ValueError(
            f"the traces must have tensors in common, the first has {_some(a)}, the second {_some(b)}; see "
            "docs/trace.md for the names"
        )
    complete = first.complete and second.complete
    config = first.config or second.config
    found: Difference | None = None
    rows: list[TensorError] = []
    flips, strict = 0, len(first.tokens)
    for name in names:
        if name not in a or name not in b:
            if complete and found is None:
                found = Difference(name, "missing", *_missing(name, name in a))
            continue
        if a[name].shape != b[name].shape:
            if found is None:
                evidence = f"{a[name].shape} and {b[name].shape}"
                found = Difference(name, "shape", "shape", evidence)
            continue
        row, strict_after, difference = _compare(name, first, second, strict)
        rows.append(row)
        flips += row.n_flips
        if difference is not None and found is None:
            cause, evidence = _diagnose(name, first, second, config)
            found = dataclasses.replace(difference, cause=cause, evidence=evidence)
        if found is None:
            strict = strict_after
    return TraceDiff(
        first=found,
        tensors=tuple(rows),
        only_in_first=tuple(name for name in names if name not in b),
        only_in_second=tuple(name for name in names if name not in a),
        flips=flips if found is None else sum(row.n_flips for row in _until(rows, found.name)),
        strict_tokens=strict,
        logit_correlation=_correlation(a.get("logits"), b.get("logits")),
        notes=_notes(first, second),
    )


# Comparison -----------------------------------------------------------------------------------------------------------


def _order(name: str) -> tuple[int, int] | None:
    """Place of a tensor in the computation, or None if it is no step of these networks."""
    if name == "embedding":
        return -1, 0
    if name in ("final_norm", "logits"):
        return 1 << 40, ("final_norm", "logits").index(name)
    match = re.fullmatch(r"layers\.(\d{1,6})\.(.+)", name)
    if match is None or match.group(2) not in STEPS:
        return None
    return int(match.group(1)), STEPS.index(match.group(2))


def _with_inputs(trace: Trace) -> Trace:
    """The trace with the int8 inputs that it does not state, made of the float tensors that it does.

    Without them a tie flip of another program could not be told from a wrong matrix.
    """
    if trace.complete:
        return trace
    tensors, types = dict(trace.tensors), dict(trace.types)
    for name in trace.tensors:
        if not name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj")) or f"{name}.x_q" in tensors:
            continue
        x = _input_of(f"{name}.x_q", trace)
        if x is None or x.ndim != 2 or not x.size or not np.isfinite(x).all():
            continue
        tensors[f"{name}.x_q"], tensors[f"{name}.x_scale"] = quantize_activations(x)
        source = next(other for other, tensor in trace.tensors.items() if tensor is x)
        types[f"{name}.x_q"] = types[f"{name}.x_scale"] = types.get(source, "F32")
    return dataclasses.replace(trace, tensors=tensors, types=types)


def _compare(name: str, first: Trace, second: Trace, strict: int) -> tuple[TensorError, int, Difference | None]:
    """The row of a tensor, the tokens that stay strict after it, and the difference if there is one."""
    a, b = first.tensors[name], second.tensors[name]
    step = name.rpartition(".")[2] if name.endswith(".x_q") else re.sub(r"^layers\.\d+\.", "", name)
    token_axis = 1 if step in ("scores", "probabilities") and a.ndim == 3 else 0
    bound = BOUND + sum(_UNITS.get(trace.types.get(name, ""), 0.0) for trace in (first, second))
    prefix = _prefix(name)
    if name.removeprefix(prefix) in _AFTER_SCORES:
        bound *= 1 + _largest(first.tensors.get(prefix + "scores"))
    token = np.arange(a.shape[token_axis]).reshape([-1 if i == token_axis else 1 for i in range(a.ndim)])
    token = np.broadcast_to(token, a.shape)
    flips = np.zeros(a.shape, bool)
    if step == "x_q":
        error = np.abs(a.astype(np.int16) - b.astype(np.int16)) / 127
        ties = _ties(name, first, second, bound)
        flips = (error > 0) & (token < strict) & (error < 1.5 / 127) & ties
        limits = np.where(flips, 1.5 / 127, np.where(token < strict, 0.0, FLIP_BOUND))
        bound = 0.0
    else:
        compared = np.ones(a.shape, bool)
        if step == "scores" and a.ndim == 3:
            compared = (np.arange(a.shape[2]) <= token) & (a > _MASKED) & (b > _MASKED)
        error = _relative_error(a, b, compared)
        limits = np.where(token < strict, bound, max(bound, FLIP_BOUND))
    outside = error > limits
    row = TensorError(name, float(error.max(initial=0)), bound, int(outside.sum()), int(flips.sum()))
    after = min(strict, int(token[flips].min())) if flips.any() else strict
    if not outside.any():
        return row, after, None
    index = np.unravel_index(np.argmax(np.where(outside, error, -1)), a.shape)
    difference = Difference(
        name=name,
        kind="value",
        cause="unknown",
        evidence="",
        error=float(error[index]),
        bound=float(limits[index]),
        index=tuple(int(i) for i in index),
        values=(float(a[index]), float(b[index])),
        n_outside=row.n_outside,
        n_values=a.size,
    )
    return row, after, difference


def _relative_error(a: np.ndarray, b: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """Over the largest finite magnitude of a; infinite where one of the two is not finite and they are not the same."""
    largest = _largest(a[compared]) or _largest(b[compared]) or 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(a.astype(np.float64) - b) / largest
    finite = np.isfinite(a) & np.isfinite(b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(~compared | same, 0.0, np.where(finite, error, np.inf))


def _ties(name: str, first: Trace, second: Trace, bound: float) -> np.ndarray | bool:
    """Where the value that was rounded lies so near to a half that it may be rounded either way."""
    x = _input_of(name, first)
    x = _input_of(name, second) if x is None else x
    if x is None or x.shape != first.tensors[name].shape or not np.isfinite(x).all():
        return False
    limit = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-5)).astype(np.float64)
    value = x * (127 / limit)
    return np.abs(value - np.floor(value) - 0.5) <= 127 * bound


def _input_of(name: str, trace: Trace) -> np.ndarray | None:
    """The float tensor that ``<matrix>.x_q`` or ``<matrix>.x_scale`` was made of."""
    prefix = _prefix(name)
    steps = {
        "q_proj": ("attn_norm",),
        "o_proj": ("attn_sub_norm", "attention"),
        "gate_proj": ("ffn_norm",),
        "down_proj": ("ffn_sub_norm", "gated"),
    }[name.removeprefix(prefix).partition(".")[0]]
    return next((trace.tensors[prefix + step] for step in steps if prefix + step in trace.tensors), None)


# Causes ---------------------------------------------------------------------------------------------------------------


def _missing(name: str, in_first: bool) -> tuple[str, str]:
    which = "second" if in_first else "first"
    if name.endswith("sub_norm"):
        return "no-subln", f"the {which} trace has no {name}"
    if name.endswith("_norm"):
        return "norm-missing", f"the {which} trace has no {name}"
    return "unknown", f"the {which} trace has no {name}"


def _diagnose(name: str, first: Trace, second: Trace, config: ModelConfig | None) -> tuple[str, str]:
    """The cause and what points to it. A cause that can be recomputed from the first trace is tried before guesses."""
    prefix = _prefix(name)
    step = name.removeprefix(prefix)
    a, b = first.tensors[name], second.tensors[name]

    def get(other: str) -> np.ndarray | None:
        return first.tensors.get(prefix + other)

    if a.dtype != np.int8 and np.isfinite(a).all() and not np.isfinite(b).all():
        bad = int(np.sum(~np.isfinite(b)))
        return "overflow", f"{bad:,} values are not finite, the largest of the first trace is {_largest(a):.4g}"
    with np.errstate(all="ignore"):
        if step.endswith((".x_q", ".x_scale")):
            result = _of_input(name, first, second)
        elif step.endswith("_norm"):
            result = _of_norm(name, step, first, b, config)
        elif step.endswith("_proj"):
            result = _of_matrix(name, first, second)
        elif step in ("q_rope", "k_rope"):
            result = _of_rope(step, name, first, b, config)
        elif step in ("scores", "probabilities", "attention"):
            result = _of_attention(step, a, b, get)
        elif step == "activation":
            result = _of_activation(get("gate_proj"), a, b)
        elif step in ("attn_out", "out"):
            half = get("o_proj" if step == "attn_out" else "down_proj")
            result = ("residual", "it is the output of the matrix alone") if _is(half, b) else None
        elif step == "embedding":
            factor = _factor(a, b)
            by = "other values" if factor is None else f"all values are {factor:.6g} times as large"
            result = None if _rounded(a, b) else ("embedding", by)
        else:
            result = None
    if result is not None:
        return result
    if (digits := _rounded(a, b)) is not None:
        return "precision", digits
    if step in ("gated", "activation") and _largest(b) <= 65504 < _largest(a):
        return "overflow", f"the largest value is {_largest(b):.6g} for {_largest(a):.6g}"
    error = float(np.max(_relative_error(a, b, np.ones(a.shape, bool)), initial=0))
    if error < 0.01:
        return "precision", f"no value is off by more than {error:.1g} of the largest"
    return "unknown", f"correlation {_correlation(a, b) or 0:.3f}"


def _of_input(name: str, first: Trace, second: Trace) -> tuple[str, str] | None:
    prefix, (a, b) = _prefix(name), (first.tensors[name], second.tensors[name])
    for matrix, skipped in (("o_proj", "attention"), ("down_proj", "gated")):
        x = first.tensors.get(prefix + skipped)
        if not name.startswith(prefix + matrix) or x is None or not np.isfinite(x).all():
            continue
        x_q, x_scale = quantize_activations(x)
        expected = x_q if name.endswith(".x_q") else x_scale
        if not np.array_equal(expected, a) and _is(expected, b):
            return "no-subln", f"it is {skipped} quantised, without the norm"
    if name.endswith(".x_scale"):
        if len(b) > 1 and np.ptp(b) == 0 and np.ptp(a) > 0:
            return "token-scale", f"all {len(b)} tokens have the scale {float(b.flat[0]):.6g}"
        factor = _factor(a, b)
        if factor is not None:
            return "rounding", f"all scales are {factor:.6g} times as large, so the largest integer is not 127"
        return None
    steps = np.abs(a.astype(np.int16) - b.astype(np.int16))
    if steps.max(initial=0) <= 1:
        return "rounding", f"{np.count_nonzero(steps):,} integers are off by one, not all of them at ties"
    return None


def _of_norm(name: str, step: str, first: Trace, b: np.ndarray, config: ModelConfig | None) -> tuple[str, str] | None:
    a, x = first.tensors[name], _norm_input(name, step, first)
    if x is None or x.size != a.size:
        return None
    x = x.reshape(a.shape).astype(np.float64)
    if _is(x, b):
        return ("no-subln" if "sub_norm" in step else "norm-missing"), "its output is its input"
    ratio = np.sum(a * b.astype(np.float64), axis=-1) / np.sum(np.square(a, dtype=np.float64), axis=-1)
    if _is(a * ratio[..., None], b, 1e-5):
        if config is None:
            return "epsilon", f"tokens differ by factors from {ratio.min():.6g} to {ratio.max():.6g}"
        mean_square = np.mean(np.square(x), axis=-1)
        eps = (mean_square + config.norm_eps) / np.square(ratio) - mean_square
        likely = float(np.median(eps))
        if np.allclose(eps, likely, rtol=0.1, atol=1e-5 * float(mean_square.max())):
            return "epsilon", f"{likely:.2g} would give these values, {config.norm_eps:g} is right"
        return "epsilon", f"every token has a factor of its own, from {ratio.min():.4g} to {ratio.max():.4g}"
    if config is not None:
        unit = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + config.norm_eps)
        for sign in (1, -1):
            if _is(a + sign * unit, b):
                return "norm-offset", f"the weight is off by {sign:+d}"
    if _rounded(a, b) is not None:
        return None
    factors = np.where(np.abs(a) > 1e-3 * _largest(a), b / np.where(a == 0, 1, a), np.nan)
    spread = np.nanmax(factors, axis=0) - np.nanmin(factors, axis=0)
    away = np.nanmax(np.abs(np.nanmean(factors, axis=0) - 1))
    if len(factors) > 1 and np.nanmax(spread) < 0.1 * away:
        return "norm", "every channel has a factor of its own, the same for all tokens"
    return None


def _of_matrix(name: str, first: Trace, second: Trace) -> tuple[str, str] | None:
    prefix, (a, b) = _prefix(name), (first.tensors[name], second.tensors[name])
    mine, theirs = first.matrices.get(name), second.matrices.get(name)
    factor = _factor(a, b)
    if factor is not None:
        times = f"all values are {factor:.6g} times as large"
        scale = mine["scale"] if mine else None
        if scale is not None and math.isclose(factor * scale**2, 1, rel_tol=1e-3):
            return "scale-inverted", f"{times}, which is 1 / w_scale^2 for w_scale = {scale:.6g}"
        if scale is not None and math.isclose(factor * scale, 1, rel_tol=1e-3):
            return "scale-dropped", f"{times}, which is 1 / w_scale for w_scale = {scale:.6g}"
        known = f"w_scale is {scale:.6g}" if scale else "inverted if it is 1 / w_scale^2, dropped if it is 1 / w_scale"
        return "scale", f"{times}; {known}"
    step = name.removeprefix(prefix)
    for other in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        if other != step and _is(first.tensors.get(prefix + other), b):
            return "swapped", f"it is {other} of the first trace"
    if _is(np.sort(a, axis=-1), np.sort(b, axis=-1)):
        return "rows", "every token has the same values in another order"
    if mine and theirs and mine["sha256"] != theirs["sha256"]:
        if mine["counts"] == theirs["counts"]:
            return "order", "the matrix has as many -1, 0 and +1, in another order"
        zeros = [matrix["counts"][1] / max(1, sum(matrix["counts"])) for matrix in (mine, theirs)]
        if math.isclose(mine["scale"], theirs["scale"], rel_tol=1e-3):
            return "threshold", f"{zeros[1]:.1%} of the weights are 0 for {zeros[0]:.1%}, and the scale is the same"
        return "weights", f"{zeros[1]:.1%} of the weights are 0 for {zeros[0]:.1%}, and the scale is another"
    if _rounded(a, b) is not None or (mine and theirs):
        return None
    correlation = _correlation(a, b) or 0.0
    if correlation > 0.95:
        return None
    if correlation > 0.6:  # zeroing all below the mean, not half of it, leaves 0.785 of a Gaussian matrix's product
        return "threshold", f"correlation {correlation:.3f}: part of the weights is right; compare the share of zeros"
    return "order", f"correlation {correlation:.3f}: the weights have nothing to do with the right ones"


def _of_rope(step: str, name: str, first: Trace, b: np.ndarray, config: ModelConfig | None) -> tuple[str, str] | None:
    prefix, a = _prefix(name), first.tensors[name]
    inputs = (prefix + f"{step[0]}_norm", prefix + f"{step[0]}_proj")
    x = next((first.tensors[other] for other in inputs if other in first.tensors), None)
    if x is None or x.size != a.size or a.ndim != 3:
        return None
    x = x.reshape(a.shape)
    if _is(x, b):
        return "rope-missing", "it is what RoPE gets"
    pairs = [_pair_lengths(t) for t in (x, b)]
    neighbours = [np.hypot(t[..., 0::2], t[..., 1::2]) for t in (x, b)]
    if config is not None:
        theta = config.rope_theta
        layer = int(re.sub(r"\D", "", prefix))
        scaling = config.rope_scaling
        if config.window(layer) is not None and config.sliding_rope_theta is not None:
            theta, scaling = config.sliding_rope_theta, None
        turns = rotations(np.arange(len(a)), frequencies(a.shape[2], theta, scaling))
        order = np.concatenate((np.arange(0, a.shape[2], 2), np.arange(1, a.shape[2], 2)))
        turned = np.empty_like(x)
        turned[..., order] = rotate(x[..., order], *turns)
        if _is(turned, b) or _is(turned[..., order], b):
            return "rope-pairs", "turning neighbours gives exactly these values"
        if _is(rotate(x, turns[0], -turns[1]), b):
            return "rope-angle", "the rotation goes the other way"
    if _is(*pairs):
        at_zero = "token 0 is the same" if _is(a[0], b[0]) else "token 0 is turned too"
        return "rope-angle", f"every pair (i, i + D/2) has its length, {at_zero}"
    if _is(*neighbours):
        return "rope-pairs", "the pairs (2i, 2i + 1) keep their length, not (i, i + D/2)"
    return None


def _of_attention(step: str, a: np.ndarray, b: np.ndarray, get: Any) -> tuple[str, str] | None:
    if step == "scores":
        factor = _factor(a, b)
        if factor is not None:
            return "attention-scale", f"all scores are {factor:.6g} times as large"
        q, k = get("q_rope"), get("k_rope")
        if q is not None and k is not None and q.ndim == 3 and k.ndim == 3 and k.shape[1] > 1:
            n, kv = q.shape[1], k.shape[1]
            read = k[:, np.arange(n) % kv]  # (S, H, D)
            scores = np.einsum("thd,shd->hts", q.astype(np.float64), read.astype(np.float64))
            factor = _factor(scores, b, causal=True)
            if factor is not None:
                return "kv-heads", "reading key/value head h mod KV gives exactly these scores"
        return None
    if step == "probabilities" and a.ndim == 3:
        above = (a == 0) & (b > 1e-6)
        if above.any():
            return "mask", f"{int(above.sum()):,} pairs of tokens attend that must not"
        if ((b == 0) & (a > 1e-6)).any():
            return "mask", "pairs of tokens do not attend that must"
        return None
    v, p = get("v_proj"), get("probabilities")
    if step == "attention" and v is not None and p is not None and p.ndim == 3 and v.ndim == 2:
        h, t = p.shape[:2]
        d = a.shape[-1] // h
        v = v.reshape(t, -1, d)
        out = np.einsum("hts,shd->thd", p.astype(np.float64), v[:, np.arange(h) % v.shape[1]].astype(np.float64))
        if _is(out.reshape(a.shape), b):
            return "kv-heads", "reading value head h mod KV gives exactly these values"
    return None


def _of_activation(gate: np.ndarray | None, a: np.ndarray, b: np.ndarray) -> tuple[str, str] | None:
    if gate is None or not np.isfinite(gate).all():
        return None
    candidates = {name: activate(gate, name) for name in ("relu2", "silu", "gelu_tanh")}
    candidates["relu"] = np.maximum(gate, np.float32(0))
    candidates["none"] = gate
    right = next((name for name, value in candidates.items() if _is(value, a)), None)
    used = next((name for name, value in candidates.items() if name != right and _is(value, b)), None)
    if used is None or _rounded(a, b) is not None:
        return None
    return "activation", f"{used} of gate_proj gives exactly these values, {right or 'another'} is right"


# Small things ---------------------------------------------------------------------------------------------------------


def _is(expected: np.ndarray | None, got: np.ndarray, tolerance: float = _SAME) -> bool:
    """Whether got is this array, to `tolerance` of its largest value."""
    if expected is None or expected.shape != got.shape or not expected.size:
        return False
    if expected.dtype == np.int8:
        return bool(np.mean(expected != got) < 1e-3)  # flips
    error = np.max(np.abs(expected.astype(np.float64) - got))
    return bool(error <= tolerance * _largest(expected))


def _factor(a: np.ndarray, b: np.ndarray, causal: bool = False) -> float | None:
    """The number c other than 1 with b = c a, or None. `causal`: 1 is allowed, and only scores of the past count."""
    if a.shape != b.shape:
        return None
    if a.ndim == 3 and a.shape[1] == a.shape[2]:  # scores: programs differ above the diagonal
        past = np.tril(np.ones(a.shape[1:], bool))
        a, b = a[:, past], b[:, past]
    x, y = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or not (norm := float(np.sum(x * x))):
        return None
    c = float(np.sum(x * y)) / norm
    if c == 0 or (not causal and abs(c - 1) < 10 * BOUND):
        return None
    return c if np.max(np.abs(y - c * x)) <= _SAME * abs(c) * _largest(x) else None


def _rounded(a: np.ndarray, b: np.ndarray) -> str | None:
    """Whether b is a in fewer digits: every value is one of a 16-bit type and near."""
    if a.dtype != np.float32 or b.dtype != np.float32 or not np.isfinite(b).all():
        return None
    near = np.max(np.abs(a - b), initial=0) <= 2.0**-6 * _largest(a)
    if near and not (b.view(np.uint32) & 0xFFFF).any() and (a.view(np.uint32) & 0xFFFF).any():
        return "every value is one of bf16"
    half = b.astype(np.float16).astype(np.float32)
    if near and np.array_equal(half, b) and not np.array_equal(a.astype(np.float16).astype(np.float32), a):
        return "every value is one of float16"
    return None


def _pair_lengths(x: np.ndarray) -> np.ndarray:
    left, right = np.split(x, 2, axis=-1)
    return np.hypot(left, right)


def _largest(x: np.ndarray | None) -> float:
    """Largest finite magnitude, masked scores left out; 0 if there is none."""
    if x is None or not x.size:
        return 0.0
    return float(np.max(np.abs(x), initial=0, where=np.isfinite(x) & (x > _MASKED)))


def _correlation(a: np.ndarray | None, b: np.ndarray | None) -> float | None:
    if a is None or b is None or a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    x, y = (v.astype(np.float64).ravel() - v.mean(dtype=np.float64) for v in (a, b))
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else None


def _norm_input(name: str, step: str, trace: Trace) -> np.ndarray | None:
    """What a norm got."""
    prefix = _prefix(name)
    if step in _NORM_INPUTS:
        return trace.tensors.get(prefix + _NORM_INPUTS[step])
    if step == "final_norm":
        layers = [int(m.group(1)) for n in trace.tensors if (m := re.fullmatch(r"layers\.(\d+)\.out", n))]
        return trace.tensors.get(f"layers.{max(layers, default=0)}.out")
    layer = int(re.sub(r"\D", "", prefix))
    return trace.tensors.get("embedding" if layer == 0 else f"layers.{layer - 1}.out")


def _prefix(name: str) -> str:
    match = re.match(r"layers\.\d+\.", name)
    return match.group() if match else ""


def _some(tensors: Mapping[str, Any]) -> str:
    return ", ".join(sorted(tensors)[:3]) or "none"


def _until(rows: list[TensorError], name: str) -> list[TensorError]:
    return [row for row in rows if _order(row.name) < _order(name)]


def _notes(first: Trace, second: Trace) -> tuple[str, ...]:
    notes = []
    if first.config is not None and second.config is not None and first.config != second.config:
        a, b = (dataclasses.asdict(trace.config) for trace in (first, second))
        changed = ", ".join(f"{key} {a[key]!r} and {b[key]!r}" for key in a if a[key] != b[key])
        notes.append(f"The configurations differ: {changed}.")
    other = [
        name for name in first.matrices if name in second.matrices and first.matrices[name] != second.matrices[name]
    ]
    if other:
        notes.append(f"{len(other)} of {len(first.matrices)} matrices differ, first {other[0]}.")
    for which, trace in (("first", first), ("second", second)):
        if unknown := sorted(name for name in trace.tensors if _order(name) is None):
            notes.append(f"{len(unknown)} tensors of the {which} trace are no step known here, first {unknown[0]}.")
    return tuple(notes)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
