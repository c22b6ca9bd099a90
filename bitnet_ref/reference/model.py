"""The decoder, written once. What multiplies by a weight matrix is an argument; everything else is here.

A block (names of tensors as on Hugging Face, without ``.weight``)::

    x ─┬─ input_layernorm ─┬─ q_proj ─ [q_norm] ─ RoPE ─┐
       │                   ├─ k_proj ─ [k_norm] ─ RoPE ─┼─ attention ─ [attn_sub_norm] ─ o_proj ─ [post norm] ─┐
       │                   └─ v_proj ───────────────────┘                                                      │
       └───────────────────────────────────────────────────────────────────────────────────────────────────────+ ─ h

    h ─┬─ ffn_norm ─┬─ gate_proj ─ activation ─┐
       │            └─ up_proj ────────────────×─ [ffn_sub_norm] ─ down_proj ─ [post norm] ─┐
       └────────────────────────────────────────────────────────────────────────────────────+ ─ out

Parts in brackets are switches of :class:`ModelConfig`. Values are float32. Sums of ternary products are exact integers,
so every packing and every instruction set gives the same logits to the last bit. The sums in norms are accumulated in
float64 and rounded once, those of attention have a stated order, so the values do not depend on how many tokens are
processed at once either; only a head that is an array is a float32 product of the BLAS library, which may order its sum
differently for one token and for many. :class:`Steps` are the parts that a compiled version may take the place of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_ref.reference import matmul
from bitnet_ref.reference.attention import KVCache, attention
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.head import head_logits
from bitnet_ref.reference.mlp import activate
from bitnet_ref.reference.norm import rms_norm
from bitnet_ref.reference.packing import PackedTernary, pack
from bitnet_ref.reference.quantize import quantize_activations, quantize_weights
from bitnet_ref.reference.rope import frequencies, rotate, rotations

__all__ = [
    "BLOCK_STEPS",
    "Block",
    "Steps",
    "all_blocks",
    "embedding",
    "feed_forward",
    "forward",
    "generate_greedy",
    "linear",
    "pack_weights",
    "random_weights",
    "self_attention",
    "ternary_weights",
]

BLOCK_STEPS = (
    *("attn_norm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope"),
    *("scores", "probabilities", "attention", "attn_sub_norm", "o_proj", "attn_post_norm", "attn_out"),
    *("ffn_norm", "gate_proj", "up_proj", "activation", "gated", "ffn_sub_norm", "down_proj", "ffn_post_norm", "out"),
)
"""What `trace` of :func:`forward` is told of a block, in the order of computation; switches leave some out.

``scores`` are before the mask. ``attention`` and ``gated`` are what SubLN gets. ``attn_out`` and ``out`` are the
residual stream after each half of the block.
"""

Linear = Callable[[np.ndarray, Any], np.ndarray]
Trace = Callable[[str, np.ndarray], None]
Weights = Mapping[str, Any]


def linear(x: np.ndarray, weight: np.ndarray | tuple[np.ndarray | PackedTernary, np.float32]) -> np.ndarray:
    """The linear layer of the reference, for each form that a weight can have.

    ====================================  ==========================================================================
    ``(PackedTernary, w_scale)``          :func:`bitnet_ref.reference.matmul.linear`
    ``(w_q, w_scale)``, w_q int8          the same, without packing
    floating-point array                  ``x @ w.T`` in float32, for full-precision networks
    ====================================  ==========================================================================

    Parameters
    ----------
    x : ndarray of shape (T, K), float32
    weight : see above, of shape (M, K)

    Returns
    -------
    ndarray of shape (T, M), float32
    """
    if not isinstance(weight, tuple):
        return x @ weight.astype(np.float32, copy=False).T  # (T, K) @ (K, M) -> (T, M)
    w, w_scale = weight
    if isinstance(w, PackedTernary):
        return matmul.linear(x, w, w_scale)
    x_q, x_scale = quantize_activations(x)
    sums = x_q.astype(np.int32) @ w.T.astype(np.int32)  # (T, K) @ (K, M) -> (T, M) int32, exact
    return sums.astype(np.float32) * (x_scale * np.float32(w_scale))


@dataclass(frozen=True, eq=False)
class Block:
    """One block as its steps see it: the tensors by name, and what computes with them."""

    config: ModelConfig
    weights: Weights
    index: int
    linear: Linear
    steps: Steps
    trace: Trace | None

    def weight(self, tensor: str) -> Any:
        """The tensor of this block, such as "mlp.up_proj"."""
        return self.weights[f"model.layers.{self.index}.{tensor}.weight"]

    def bias(self, tensor: str) -> np.ndarray:
        """The bias of this layer, such as "self_attn.q_proj"."""
        return self.weights[f"model.layers.{self.index}.{tensor}.bias"]

    def note(self, name: str, array: np.ndarray) -> np.ndarray:
        """Tell the trace."""
        if self.trace is not None:
            self.trace(f"layers.{self.index}.{name}", array)
        return array

    def norm(self, a: np.ndarray, tensor: str, name: str) -> np.ndarray:
        """The norm with this weight; the trace knows it as `name`."""
        weight = self.weight(tensor)
        return self.note(name, self.steps.rms_norm(a, weight, self.config.norm_eps, self.config.norm_offset))

    def project(self, a: np.ndarray, tensor: str) -> np.ndarray:
        """The linear layer with this matrix: (T, K) -> (T, M)."""
        weight = self.weight(tensor)
        if self.config.ternary and isinstance(weight, np.ndarray):
            raise ValueError(
                f"model.layers.{self.index}.{tensor}.weight must be ternary in this network, see ternary_weights(), "
                f"got an array of {weight.dtype}"
            )
        y = self.linear(a, weight)
        if self.config.qkv_bias and tensor.endswith(("q_proj", "k_proj", "v_proj")):
            y = y + self.bias(tensor)
        return self.note(tensor.partition(".")[2], y)


def self_attention(block: Block, x: np.ndarray, turns: tuple[np.ndarray, np.ndarray], cache: KVCache) -> np.ndarray:
    """The residual stream (T, hidden) after attention; `cache` gets the keys and values of its tokens.

    Parameters
    ----------
    block : Block
    x : ndarray of shape (T, hidden), float32
    turns : cos, sin
        As :func:`bitnet_ref.reference.rope.rotations` gives them for the positions of the tokens.
    cache : KVCache
    """
    config, steps, i, t = block.config, block.steps, block.index, len(x)
    a = block.norm(x, "input_layernorm", "attn_norm")  # (T, hidden)
    q, k, v = (block.project(a, f"self_attn.{name}_proj") for name in "qkv")
    q = q.reshape(t, config.heads, config.head_dim)  # (T, H, D)
    k = k.reshape(t, config.kv_heads, config.head_dim)  # (T, KV, D)
    v = v.reshape(t, config.kv_heads, config.head_dim)  # (T, KV, D)
    if config.qk_norm:
        q = block.norm(q, "self_attn.q_norm", "q_norm")
        k = block.norm(k, "self_attn.k_norm", "k_norm")
    q, k = block.note("q_rope", steps.rotate(q, *turns)), block.note("k_rope", steps.rotate(k, *turns))
    k, v = cache.store(i, k, v)  # (S, KV, D) each
    trace = None if block.trace is None else block.note
    a = steps.attention(q, k, v, config.score_scale, config.window(i), trace).reshape(t, -1)  # (T, H * D)
    a = block.note("attention", a)
    if config.sub_norm:
        a = block.norm(a, "self_attn.attn_sub_norm", "attn_sub_norm")
    a = block.project(a, "self_attn.o_proj")  # (T, hidden)
    if config.post_norms:
        a = block.norm(a, "post_attention_layernorm", "attn_post_norm")
    return block.note("attn_out", x + a)


def feed_forward(block: Block, x: np.ndarray) -> np.ndarray:
    """The residual stream (T, hidden) after the feed-forward network."""
    config = block.config
    a = block.norm(x, "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm", "ffn_norm")
    gate, up = block.project(a, "mlp.gate_proj"), block.project(a, "mlp.up_proj")  # (T, ffn) each
    a = block.note("activation", block.steps.activate(gate, config.activation))
    del gate  # these are the largest arrays of a prompt
    a = block.note("gated", a * up)  # (T, ffn)
    del up
    if config.sub_norm:
        a = block.norm(a, "mlp.ffn_sub_norm", "ffn_sub_norm")
    a = block.project(a, "mlp.down_proj")  # (T, hidden)
    if config.post_norms:
        a = block.norm(a, "post_feedforward_layernorm", "ffn_post_norm")
    return block.note("out", x + a)


def all_blocks(
    config: ModelConfig,
    weights: Weights,
    x: np.ndarray,
    turns: Mapping[bool, tuple[np.ndarray, np.ndarray]],
    cache: KVCache,
    linear: Linear,
    steps: Steps,
    trace: Trace | None,
) -> np.ndarray:
    """The residual stream (T, hidden) after all blocks; `cache` gets keys and values of its tokens, not yet counted.

    Parameters
    ----------
    config, weights, cache, linear, steps, trace
        As in :func:`forward`.
    x : ndarray of shape (T, hidden), float32
    turns : mapping of bool to (cos, sin)
        For blocks without (False) and with a sliding window, as in :func:`self_attention`.
    """
    for i in range(config.layers):
        block = Block(config, weights, i, linear, steps, trace)
        x = self_attention(block, x, turns[config.window(i) is not None], cache)
        x = steps.feed_forward(block, x)
    return x


def embedding(table: Any, tokens: np.ndarray) -> np.ndarray:
    """The rows of these tokens, shape (T, hidden), float32; `table` is an array or holds stored rows."""
    return table[tokens].astype(np.float32)


@dataclass(frozen=True)
class Steps:
    """What :func:`forward` computes with beside the linear layers; the fields are the reference's own functions.

    A compiled step takes the same arguments and returns the same values. The last two are made of the others and of
    the linear layers; one that takes their place must tell the trace what they tell it, or hand over to them.
    """

    embedding: Callable[[Any, np.ndarray], np.ndarray] = embedding
    rms_norm: Callable[..., np.ndarray] = rms_norm
    rotate: Callable[..., np.ndarray] = rotate
    attention: Callable[..., np.ndarray] = attention
    activate: Callable[..., np.ndarray] = activate
    head: Callable[..., np.ndarray] = head_logits
    feed_forward: Callable[[Block, np.ndarray], np.ndarray] = feed_forward
    blocks: Callable[..., np.ndarray] = all_blocks


_REFERENCE = Steps()


def forward(
    config: ModelConfig,
    weights: Weights,
    tokens: Sequence[int] | np.ndarray,
    cache: KVCache | None = None,
    linear: Linear = linear,
    trace: Trace | None = None,
    steps: Steps = _REFERENCE,
    n_logits: int | None = None,
) -> np.ndarray:
    """Logits of every token given, or of the last of them.

    Parameters
    ----------
    config : ModelConfig
    weights : mapping of str to weights
        By the names of ``config.tensor_shapes()``. Embedding, head and norms are floating-point arrays. The matrices of
        the blocks are whatever `linear` takes; for the default, see :func:`linear` and :func:`ternary_weights`.
        Embedding and head may also be :class:`bitnet_ref.reference.head.FloatTable`.
    tokens : sequence of T integers
        They follow those that the cache holds.
    cache : KVCache, optional
        Extended by the T tokens. Without it nothing is kept.
    linear : callable(x, weight), optional
        Multiplies x of shape (T, K), float32, with the matrix and returns (T, M), float32. For the compiled kernels,
        hold :class:`bitnet_ref.BitLinear` objects in `weights` and pass ``lambda x, layer: layer(x)``.
    trace : callable(name, array), optional
        Called with every intermediate value in the order of computation; the array must not be changed. The names are
        ``embedding``, then ``layers.N.`` and each of :data:`BLOCK_STEPS`, then ``final_norm`` and ``logits``.
    steps : Steps, optional
        Other functions for the steps between the linear layers.
    n_logits : int, optional
        Logits of the last n_logits tokens only; the head is most of the work of a long prompt in a large vocabulary.

    Returns
    -------
    ndarray of shape (T, V) or (n_logits, V), float32

    Raises
    ------
    ValueError
        If there is no token, one is not in 0..V-1, they exceed the cache or the context, n_logits is not in 1..T, or a
        matrix of a ternary network is a float array (see :func:`ternary_weights`).
    TypeError
        If tokens are not integers.
    KeyError
        If a weight is missing.
    """
    tokens = _checked_tokens(config, tokens)
    note = trace or (lambda name, array: None)
    t = len(tokens)
    if cache is None:
        if t > config.context:
            raise ValueError(f"the context of this model is {config.context} tokens, got {t}")
        cache = KVCache(config, t)
    if n_logits is not None and not 1 <= n_logits <= t:
        raise ValueError(f"n_logits must lie between 1 and the number of tokens, {t}, got {n_logits}")
    positions = cache.positions(t)

    table = weights["model.embed_tokens.weight"]  # (V, hidden)
    x = steps.embedding(table, tokens)  # (T, hidden)
    if config.embedding_scale != 1:
        x = x * np.float32(config.embedding_scale)
    note("embedding", x)
    x = steps.blocks(config, weights, x, _turns(config, positions), cache, linear, steps, trace)
    cache.advance(t)
    x = steps.rms_norm(x, weights["model.norm.weight"], config.norm_eps, config.norm_offset)
    note("final_norm", x)
    head = table if config.tied_head else weights["lm_head.weight"]  # (V, hidden)
    logits = steps.head(x if n_logits is None else x[-n_logits:], head)  # (T, V)
    note("logits", logits)
    return logits


def generate_greedy(
    config: ModelConfig,
    weights: Weights,
    tokens: Sequence[int] | np.ndarray,
    n_tokens: int,
    linear: Linear = linear,
) -> list[int]:
    """The `n_tokens` tokens that follow, each the one of the largest logit (the first of equals).

    Parameters
    ----------
    config, weights, tokens, linear
        As in :func:`forward`.
    n_tokens : int

    Returns
    -------
    list of int

    Raises
    ------
    ValueError, TypeError
        As :func:`forward`; also if n_tokens is not positive.
    """
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
    tokens = _checked_tokens(config, tokens)
    if len(tokens) + n_tokens > config.context:
        raise ValueError(f"the context of this model is {config.context} tokens, got {len(tokens)} + {n_tokens}")
    cache = KVCache(config, len(tokens) + n_tokens)
    written: list[int] = []
    while len(written) < n_tokens:
        logits = forward(config, weights, tokens, cache, linear)  # (T, V)
        written.append(int(np.argmax(logits[-1])))
        tokens = written[-1:]
    return written


def random_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """float32 tensors of every name in ``config.tensor_shapes()``, drawn so that activations stay of order 1.

    Matrices and an untied head are normal with variance 1/K, norm weights normal around 1 (less the offset) and biases
    around 0 with standard deviation 0.1. The embedding has standard deviation 0.1 after its scale, so that the blocks
    outweigh it in the residual stream; otherwise a tied head would mostly repeat the last token.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in config.tensor_shapes().items():
        w = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            w *= np.float32(0.1)
            if not name.endswith(".bias"):
                w += np.float32(1 - config.norm_offset)
        elif name == "model.embed_tokens.weight":
            w *= np.float32(0.1 / config.embedding_scale)
        else:
            w *= np.float32(shape[1] ** -0.5)
        weights[name] = w
    return weights


def ternary_weights(config: ModelConfig, weights: Weights) -> dict[str, Any]:
    """The same weights with every float matrix of the blocks as ``(w_q, w_scale)`` by :func:`quantize_weights`.

    Matrices that are not float arrays are kept, and so is everything outside the blocks.

    Raises
    ------
    KeyError
        If a matrix is missing.
    ValueError
        If the network is not ternary, or a matrix does not have its shape.
    """
    if not config.ternary:
        raise ValueError("the config must say ternary, this one is of a full-precision network")
    out = dict(weights)
    for name, shape in config.linear_shapes().items():
        w = weights[name]
        if isinstance(w, np.ndarray):
            if w.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {w.shape}")
            out[name] = quantize_weights(w)
    return out


def pack_weights(weights: Weights, scheme: str) -> dict[str, Any]:
    """The same weights with every ``(w_q, w_scale)`` as ``(PackedTernary, w_scale)`` in the named scheme."""
    return {
        name: (pack(w[0], scheme), w[1]) if isinstance(w, tuple) and isinstance(w[0], np.ndarray) else w
        for name, w in weights.items()
    }


def _turns(config: ModelConfig, positions: np.ndarray) -> dict[bool, tuple[np.ndarray, np.ndarray]]:
    """Cosines and sines of these positions, for layers without and with a sliding window."""
    full = rotations(positions, _speeds(config.head_dim, config.rope_theta, config.rope_scaling))
    if config.sliding_rope_theta is None:
        return {False: full, True: full}
    return {False: full, True: rotations(positions, _speeds(config.head_dim, config.sliding_rope_theta))}


_speeds = functools.cache(frequencies)  # a step of decoding would notice


def _checked_tokens(config: ModelConfig, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """The tokens as an int64 array of shape (T,), T >= 1, all in 0..V-1."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"tokens must have shape (T,) with T >= 1, got shape {tokens.shape}")
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() >= config.vocabulary:
        raise ValueError(f"tokens must lie in 0..{config.vocabulary - 1}, got {tokens.min()}..{tokens.max()}")
    return tokens.astype(np.int64)
