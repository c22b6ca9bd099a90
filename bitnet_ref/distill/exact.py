"""Let a model of ``transformers`` round where the NumPy reference rounds, so that its answers can be held to the bit.

Products of ternary layers are exact integers in PyTorch as on the kernels. What lies between them is float32, and there
every program has its own order of sums and its own exponentials. That is harmless in a network of floats; here an
activation that is near the edge of two int8 values falls on the other side, and thirty layers make more of it. The
reference says how each step rounds (norms: sums in float64; attention: sums in a stated order). In this arithmetic
PyTorch and the kernels give the same residual streams to the bit, and what still differs is an error of somebody's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.rope import frequencies, rotations

__all__ = ["reference_arithmetic"]

_NAME = "bitnet_ref"
_LANES = 16  # partial sums of a score, as in bitnet_ref.reference.attention
_CELLS = 1 << 24  # float32 of the partial sums of scores that are held at a time


@contextmanager
def reference_arithmetic(model: nn.Module) -> Iterator[None]:
    """Inside, a causal language model computes norms, rotations, attention and activations as the reference does.

    Parameters
    ----------
    model : Module
        Of one of the families of :mod:`bitnet_ref.distill.student`, in float32, without autocast, in evaluation;
        padding, if any, must be on the right, where causal attention does not look.

    Raises
    ------
    ValueError
        If the activation of its feed-forward network is none of the reference's.

    Notes
    -----
    For evaluation: values are what :mod:`bitnet_ref.reference` computes, and it is slow. A head has the order of sums
    of a table of floats there. Where float32 products are made in another type (TF32 on a GPU) sums are no longer
    exact; that is switched off inside.
    """
    config = ModelConfig.from_hf(model.config.to_dict() | {"architectures": [type(model).__name__]})
    kind = model.config.hidden_activation if hasattr(model.config, "hidden_activation") else model.config.hidden_act
    if kind not in _ACTIVATIONS:
        raise ValueError(f"the activation must be one of {', '.join(_ACTIVATIONS)}, got {kind!r}")
    changed = [(model.model.rotary_emb, _Turns(config))]
    for block in model.model.layers:
        changed.append((block.mlp.act_fn, _ACTIVATIONS[kind]))
    changed.append((model.lm_head, lambda x: _head(x, model.lm_head.weight)))
    changed += [(m, _Norm(m)) for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    before = model.config._attn_implementation
    precision = torch.get_float32_matmul_precision()
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    try:
        torch.set_float32_matmul_precision("highest")
        model.set_attn_implementation(_NAME)
        for module, forward in changed:
            module.forward = forward
        yield
    finally:
        for module, _ in changed:
            module.__dict__.pop("forward", None)  # that of the class is behind it
        model.set_attn_implementation(before)
        torch.set_float32_matmul_precision(precision)


class _Norm:
    """:func:`bitnet_ref.reference.norm.rms_norm` with the weight of a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        self._offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0

    def __call__(self, x: Tensor) -> Tensor:
        mean_square = x.double().square().mean(-1, keepdim=True).float()
        root = (mean_square + torch.tensor(self._eps, dtype=torch.float32, device=x.device)).double().sqrt()
        inverse = 1 / root.float()  # the root of float32 of PyTorch is off by a last bit in one of five numbers
        return (x * inverse) * (self._module.weight.float() + self._offset)


class _Turns:
    """Cosines and sines of :func:`bitnet_ref.reference.rope.rotations`, in the place of a rotary embedding."""

    def __init__(self, config: ModelConfig) -> None:
        self._speeds = {False: frequencies(config.head_dim, config.rope_theta, config.rope_scaling)}
        if config.sliding_rope_theta is not None:
            self._speeds[True] = frequencies(config.head_dim, config.sliding_rope_theta)

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        sliding = layer_type == "sliding_attention" and True in self._speeds
        positions = position_ids.cpu().numpy()  # (B or 1, T)
        cos, sin = (
            np.stack([rotations(row, self._speeds[sliding])[part][:, 0] for row in positions]) for part in (0, 1)
        )
        return tuple(torch.from_numpy(np.concatenate((a, a), -1)).to(x.device) for a in (cos, sin))  # (B, T, D)


def _silu(x: Tensor) -> Tensor:
    wide = x.double()
    return (wide / (1 + torch.exp(-wide))).float()


def _gelu_tanh(x: Tensor) -> Tensor:
    wide = x.double()
    return (0.5 * wide * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))).float()


_ACTIVATIONS = {"silu": _silu, "gelu_pytorch_tanh": _gelu_tanh}


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """:func:`bitnet_ref.reference.attention.attention`; query (B, H, T, D), key and value (B, KV, T, D)."""
    batch, heads, t, _ = query.shape
    kv = key.shape[1]
    q = query.unflatten(1, (kv, heads // kv))  # (B, KV, G, T, D)
    step = max(1, _CELLS // (batch * heads * t * _LANES))
    k = key[:, :, None]  # (B, KV, 1, S, D)
    scores = torch.cat([_scores(q[:, :, :, i : i + step], k) for i in range(0, t, step)], 3)  # (B, KV, G, T, S)
    scores = scores * torch.tensor(scaling, dtype=torch.float32, device=scores.device)
    position = torch.arange(t, device=scores.device)
    hidden = position > position[:, None]  # (T, S)
    if sliding_window is not None:
        hidden |= position <= position[:, None] - sliding_window
    masked = scores.double().masked_fill(hidden, -torch.inf)
    weights = (masked - masked.amax(-1, keepdim=True)).exp().float()
    total = weights.sum(-1, keepdim=True, dtype=torch.float64).float()
    out = torch.zeros_like(q)
    for s in range(t):
        out = out + weights[..., s, None] * value[:, :, None, s : s + 1]  # two roundings: no operator does both
    return (out / total).flatten(1, 2).transpose(1, 2).contiguous(), None  # (B, T, H, D)


def _head(x: Tensor, weight: Tensor) -> Tensor:
    """Logits (..., V) of x (..., K) and a float matrix (V, K), as :func:`bitnet_ref.reference.head.head_logits`."""
    rows = _lanes(x.float().flatten(0, -2))  # (N, K / 16, 16)
    table = _lanes(weight.float())  # (V, K / 16, 16)
    return torch.stack([_in_pairs(row, table) for row in rows]).unflatten(0, x.shape[:-1])


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """(B, KV, G, T, D) and (B, KV, 1, S, D) -> (B, KV, G, T, S), by sixteen sums that are then added in pairs."""
    return _in_pairs(_lanes(q)[..., :, None, :, :], _lanes(k)[..., None, :, :, :])


def _lanes(a: Tensor) -> Tensor:
    """(..., K) -> (..., ceil(K / 16), 16), with zeros at the end."""
    return nn.functional.pad(a, (0, -a.shape[-1] % _LANES)).unflatten(-1, (-1, _LANES))


def _in_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b over the last two axes: sixteen sums over the first of these, each rounded at each step."""
    sums = torch.zeros((), device=a.device)
    for j in range(a.shape[-2]):
        sums = sums + a[..., j, :] * b[..., j, :]
    width = _LANES
    while width > 1:
        width //= 2
        sums = sums[..., :width] + sums[..., width : 2 * width]
    return sums[..., 0]
