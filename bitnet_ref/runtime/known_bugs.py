"""Known bugs of programs that run ternary models, each as a switch, to see what it does and to find it again.

All of these load, run and write text. None is a copy of the network: a bug changes the configuration, the weights, the
quantiser, or one of the steps that the network is made of.

    >>> from bitnet_ref.runtime.known_bugs import with_bug
    >>> network = with_bug("silu", config, weights)
    >>> logits = network.run([1, 2, 3])
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from bitnet_ref.formats.gguf_names import permute_rows
from bitnet_ref.formats.i2s import pack_i2s, unpack_i2s
from bitnet_ref.reference import model as reference
from bitnet_ref.reference.attention import attention
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.mlp import activate
from bitnet_ref.reference.model import Steps
from bitnet_ref.reference.norm import rms_norm
from bitnet_ref.reference.packing import PackedTernary
from bitnet_ref.reference.quantize import quantize_activations, quantize_weights
from bitnet_ref.reference.rope import rotate
from bitnet_ref.runtime.trace import MappedWeights, Network

__all__ = ["KNOWN_BUGS", "KnownBug", "apply_bug", "with_bug"]


@dataclass(frozen=True)
class KnownBug:
    """One bug.

    Attributes
    ----------
    name : str
    summary : str
        What the program does, and what is right.
    first : str
        The first tensor of a trace that it changes.
    cause : str
        The key of :data:`bitnet_ref.runtime.trace_diff.CAUSES` that a comparison must name.
    seen : str
        Where it was met, or how it comes about.
    """

    name: str
    summary: str
    first: str
    cause: str
    seen: str
    _apply: Callable[[Network], Network] = field(repr=False)


def with_bug(name: str, config: ModelConfig, weights: Mapping[str, Any]) -> Network:
    """A network that has the bug.

    Parameters
    ----------
    name : a key of :data:`KNOWN_BUGS`
    config : ModelConfig
    weights : mapping of str to weights
        As :func:`~bitnet_ref.reference.model.forward` takes them, or float master weights. Not modified.

    Returns
    -------
    Network
        ``network.run(tokens)`` gives logits, :func:`bitnet_ref.runtime.trace.record` a trace. Its ``config`` still says
        what is right, as that of a wrong program does.

    Raises
    ------
    ValueError
        If there is no such bug, or the network cannot have it: its activation is SiLU already, it has no SubLN.
    """
    return apply_bug(name, Network(config, weights))


def apply_bug(name: str, network: Network) -> Network:
    """The network with the bug; see :func:`with_bug`."""
    if name not in KNOWN_BUGS:
        raise ValueError(f"a known bug must be one of {', '.join(KNOWN_BUGS)}, got {name!r}")
    return KNOWN_BUGS[name]._apply(network)


# How to change a network ----------------------------------------------------------------------------------------------


def _computing(**changes: Any) -> Callable[[Network], Network]:
    """The network of another configuration, which still states the right one."""

    def forward(config: ModelConfig, *args: Any, **kwargs: Any) -> np.ndarray:
        return reference.forward(replace(config, **changes), *args, **kwargs)

    return lambda network: replace(network, forward=forward)


def _calling(network: Network, **parts: Callable[..., Any]) -> Network:
    """The network with these steps (:class:`bitnet_ref.reference.model.Steps`) in place of the right ones."""
    return replace(network, forward=functools.partial(reference.forward, steps=Steps(**parts)))


def _matrices(network: Network, change: Callable[[str, np.ndarray, np.float32], tuple]) -> Network:
    """The network with every ternary matrix changed by ``change(name, w_q, w_scale)``."""
    if not network.config.ternary:
        raise ValueError("this bug is one of ternary matrices, the network has none")
    names = network.config.linear_shapes().keys()

    def changed(name: str, weight: Any) -> Any:
        if name not in names:
            return weight
        w, w_scale = quantize_weights(weight) if isinstance(weight, np.ndarray) else weight
        return change(name, w.unpack() if isinstance(w, PackedTernary) else w, np.float32(w_scale))

    return replace(network, weights=MappedWeights(network.weights, changed))


def _need(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


# The bugs -------------------------------------------------------------------------------------------------------------


def _silu(network: Network) -> Network:
    _need(network.config.activation != "silu", "the activation of this network is SiLU; to compute it is no bug")
    return _computing(activation="silu")(network)


def _no_subln(network: Network) -> Network:
    _need(network.config.sub_norm, "this network has no SubLN that could be missing")
    return _computing(sub_norm=False)(network)


def _epsilon(network: Network) -> Network:
    return _computing(norm_eps=1e-6 if network.config.norm_eps > 3e-6 else 1e-5)(network)


def _rope_base(network: Network) -> Network:
    return _computing(rope_theta=10000.0 if network.config.rope_theta > 70000 else 500000.0, sliding_rope_theta=None)(
        network
    )


def _threshold(network: Network) -> Network:
    config = network.config
    _need(config.ternary, "this bug is one of ternary matrices, the network has none")
    names = config.linear_shapes().keys()

    def changed(name: str, weight: Any) -> Any:
        if name not in names:
            return weight
        _need(
            isinstance(weight, np.ndarray),
            f"threshold-mean needs the float master weights, {name} is ternary already; a weight that was rounded to 1 "
            "does not say how large it was",
        )
        w_scale = quantize_weights(weight)[1]
        return np.where(np.abs(weight) > w_scale, np.sign(weight), 0).astype(np.int8), w_scale

    return replace(network, weights=MappedWeights(network.weights, changed))


def _block_order(network: Network) -> Network:
    for name, (m, k) in network.config.linear_shapes().items():
        _need(m * k % 128 == 0, f"i2s-block-order needs matrices of whole blocks of 128, {name} is {m} x {k}")
    return _matrices(network, lambda name, w, s: (unpack_i2s(pack_i2s(w, s, "arm-64"), w.shape, "x86-128")[0], s))


def _head_rows(network: Network) -> Network:
    heads = {"q_proj": network.config.heads, "k_proj": network.config.kv_heads}

    def change(name: str, w: np.ndarray, s: np.float32) -> tuple:
        n_heads = heads.get(name.split(".")[-2])
        return (w if n_heads is None else permute_rows(w, n_heads)), s

    return _matrices(network, change)


def _gate_up(network: Network) -> Network:
    weights = network.weights

    def swapped(name: str, weight: Any) -> Any:
        if ".gate_proj." in name:
            return weights[name.replace(".gate_proj.", ".up_proj.")]
        return weights[name.replace(".up_proj.", ".gate_proj.")] if ".up_proj." in name else weight

    return replace(network, weights=MappedWeights(weights, swapped))


def _neighbours(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE on pairs (2i, 2i + 1)."""
    order = np.concatenate((np.arange(0, x.shape[-1], 2), np.arange(1, x.shape[-1], 2)))
    out = np.empty_like(x)
    out[..., order] = rotate(x[..., order], cos, sin)
    return out


def _kv_heads(network: Network) -> Network:
    heads, kv = network.config.heads, network.config.kv_heads
    _need(1 < kv < heads, f"kv-heads needs several key/value heads, each shared, got {heads} heads and {kv}")
    # Put query head h where the network lets it read key/value head h mod KV, and its output back.
    order = np.argsort(np.arange(heads) % kv, kind="stable")
    back = np.argsort(order)

    def wrong(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: Any, trace: Any) -> np.ndarray:
        note = None if trace is None else lambda name, array: trace(name, array[back])
        return attention(q[:, order], k, v, scale, window, note)[:, back]

    return _calling(network, attention=wrong)


def _in_bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to bf16, half to even, and widened again; finite values."""
    bits = x.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _bf16(network: Network) -> Network:
    def norm(x: np.ndarray, weight: np.ndarray, eps: float, offset: float = 0.0) -> np.ndarray:
        return _in_bf16(rms_norm(_in_bf16(x), weight, eps, offset))

    return _calling(network, rms_norm=norm)


def _relu2_f16(network: Network) -> Network:
    _need(network.config.activation == "relu2", "only squared ReLU leaves the range of float16 this way")

    def half(x: np.ndarray, activation: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            return activate(x, activation).astype(np.float16).astype(np.float32)

    def norm(x: np.ndarray, weight: np.ndarray, eps: float, offset: float = 0.0) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return rms_norm(x, weight, eps, offset)

    def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # The reference refuses what is not finite; programs go on, and the scale of such a token is NaN.
        finite = np.isfinite(x).all(axis=-1, keepdims=True)
        x_q, x_scale = quantize_activations(np.where(finite, x, np.float32(0)))
        return x_q, np.where(finite, x_scale, np.float32(np.nan))

    return replace(_calling(network, activate=half, rms_norm=norm), quantize=quantize)


def _token_scale(network: Network) -> Network:
    def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x_q, x_scale = quantize_activations(x.reshape(1, -1))
        return x_q.reshape(x.shape), np.broadcast_to(x_scale, (len(x), 1)).copy()

    return replace(network, quantize=quantize)


def _truncate(network: Network) -> Network:
    def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        limit = quantize_activations(x)[1] * np.float32(127)
        x_q = np.clip(np.trunc(x * (np.float32(127) / limit)), -128, 127).astype(np.int8)
        return x_q, limit / np.float32(127)

    return replace(network, quantize=quantize)


_BUGS = (
    KnownBug(
        "silu",
        "SiLU where the network has squared ReLU",
        "layers.0.activation",
        "activation",
        "bitnet.cpp in 2026, microsoft/BitNet issues 588 and 602; converters that do not write the activation",
        _silu,
    ),
    KnownBug(
        "no-subln",
        "the norms before o_proj and down_proj are dropped",
        "layers.0.attn_sub_norm",
        "no-subln",
        "1bitLLM's checkpoints read as a plain Llama, which their config calls them",
        _no_subln,
    ),
    KnownBug(
        "scale-inverted",
        "1 / w_scale in place of w_scale",
        "layers.0.q_proj",
        "scale-inverted",
        "two conventions of weight_scale under one name; microsoft/BitNet pull request 616",
        lambda network: _matrices(network, lambda name, w, s: (w, np.float32(1) / s)),
    ),
    KnownBug(
        "scale-dropped",
        "the integers are multiplied and the scale is forgotten",
        "layers.0.q_proj",
        "scale-dropped",
        "microsoft/BitNet issue 468: a cast loses the argument that holds the scale",
        lambda network: _matrices(network, lambda name, w, s: (w, np.float32(1))),
    ),
    KnownBug(
        "threshold-mean",
        "weights below mean|w| become 0, where the edge is half of it",
        "layers.0.q_proj",
        "threshold",
        "candle pull request 3554 and others that describe the rule so",
        _threshold,
    ),
    KnownBug(
        "i2s-block-order",
        "I2_S written in blocks of 64 (ARM) and read in blocks of 128 (x86)",
        "layers.0.q_proj",
        "order",
        "microsoft/BitNet issues 585, 598, 600 and 610",
        _block_order,
    ),
    KnownBug(
        "head-rows",
        "rows of q and k stay in the order of GGUF's llama architecture",
        "layers.0.q_proj",
        "rows",
        "readers of GGUF that do not undo the permutation",
        _head_rows,
    ),
    KnownBug(
        "gate-up",
        "gate_proj and up_proj are swapped",
        "layers.0.gate_proj",
        "swapped",
        "converters that join or split the two",
        _gate_up,
    ),
    KnownBug(
        "rope-pairs",
        "RoPE turns (2i, 2i + 1) where the weights are for (i, i + D/2)",
        "layers.0.q_rope",
        "rope-pairs",
        "the two conventions of RoPE",
        lambda network: _calling(network, rotate=_neighbours),
    ),
    KnownBug(
        "rope-base",
        "another base of RoPE",
        "layers.0.q_rope",
        "rope-angle",
        "a default of 10,000 where the config says 500,000",
        _rope_base,
    ),
    KnownBug(
        "kv-heads",
        "query head h reads key/value head h mod KV, not floor(h / group)",
        "layers.0.scores",
        "kv-heads",
        "grouped heads repeated by tile in place of repeat",
        _kv_heads,
    ),
    KnownBug(
        "epsilon",
        "another epsilon in the norms",
        "layers.0.attn_norm",
        "epsilon",
        "a default of 1e-6 where the config says 1e-5",
        _epsilon,
    ),
    KnownBug(
        "bf16-norms",
        "norms take and give bf16",
        "layers.0.attn_norm",
        "precision",
        "programs that run in bf16; no bug, but the integers after it differ",
        _bf16,
    ),
    KnownBug(
        "relu2-f16",
        "squared ReLU in float16: infinite from an input of 256 on, NaN after the norm",
        "layers.0.activation",
        "overflow",
        "mlxcel pull request 287",
        _relu2_f16,
    ),
    KnownBug(
        "token-scale",
        "one int8 scale for all tokens of a prompt, so decoding and prefill differ",
        "layers.0.q_proj.x_scale",
        "token-scale",
        "implementations that take the maximum of the whole tensor",
        _token_scale,
    ),
    KnownBug(
        "truncate",
        "activations are truncated to int8, not rounded",
        "layers.0.q_proj.x_q",
        "rounding",
        "a cast from float to int8 in C",
        _truncate,
    ),
)

KNOWN_BUGS: Mapping[str, KnownBug] = MappingProxyType({bug.name: bug for bug in _BUGS})
