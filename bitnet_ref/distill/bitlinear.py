"""The BitNet linear layer for training: ternary weights, int8 activations, straight-through gradients.

The quantisers are those of :mod:`bitnet_ref.reference.quantize`, step by step: float32, one rounding each, half to
even, a clamp at 1e-5 on mean|w| and on max|x|. The layer multiplies the *integers* and scales afterwards, so in float32
its output is the same as the reference's to the last bit, as long as 127 * K < 2**24.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "MAX_EXACT_INPUTS",
    "QUANTIZERS",
    "BitLinear",
    "quantize_activations",
    "quantize_weights",
    "quantize_weights_b1",
    "quantize_weights_blocks",
]

SCALE_CLAMP = 1e-5  # released code of [2B4T], as bitnet_ref.reference.quantize.SCALE_CLAMP

MAX_EXACT_INPUTS = 2**24 // 127
"""Largest K for which every partial sum of ternary products is an integer that float32 holds."""


def quantize_weights(w: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary weights and their scale, per tensor, by absmean rounding.

    Parameters
    ----------
    w : tensor of shape (M, K), float32

    Returns
    -------
    w_q : tensor of shape (M, K), float32, values -1, 0 and 1
    w_scale : tensor of shape (), float32, so that ``w ~ w_scale * w_q``

    Notes
    -----
    |w| is summed in float64, as in the reference; the order of that sum differs, which moves w_scale by one unit in the
    last place in about one matrix of a million.
    """
    w_scale = w.abs().mean(dtype=torch.float64).to(torch.float32).clamp(min=SCALE_CLAMP)
    return (w * (1 / w_scale)).round_().clamp_(-1, 1), w_scale


def quantize_weights_b1(w: Tensor) -> tuple[Tensor, Tensor]:
    """One-bit weights and their scale; see :func:`bitnet_ref.reference.quantize.quantize_weights_b1`.

    Parameters
    ----------
    w : tensor of shape (M, K), float32

    Returns
    -------
    w_q : tensor of shape (M, K), float32, values -1 and 1
    w_scale : tensor of shape (), float32
    """
    centre = w.mean(dtype=torch.float64).to(torch.float32)
    return torch.where(w > centre, 1.0, -1.0), w.abs().mean(dtype=torch.float64).to(torch.float32)


def quantize_weights_blocks(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Ternary weights with a scale for each run of `block` columns of a row; see the reference's function of this name.

    Parameters
    ----------
    w : tensor of shape (M, K), float32
    block : int
        It divides K.

    Returns
    -------
    w_q : tensor of shape (M, K), float32, values -1, 0 and 1
    w_scale : tensor of shape (M, K / block), float32
    """
    blocks = w.unflatten(1, (-1, block))  # (M, K / block, block)
    w_scale = blocks.abs().mean(-1, keepdim=True, dtype=torch.float64).to(torch.float32).clamp(min=SCALE_CLAMP)
    return (blocks * (1 / w_scale)).round_().clamp_(-1, 1).flatten(1), w_scale[..., 0]


QUANTIZERS = ("absmean", "b1", "absmean-block")
"""Of weights: ternary, one scale (b1.58); signs, one scale (b1); ternary, a scale for each block of columns."""


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 activations, as floats, and their scales, per token (last axis), by absmax rounding.

    Parameters
    ----------
    x : tensor of shape (..., K), float32

    Returns
    -------
    x_q : tensor of shape (..., K), float32, integers in -127..127
    x_scale : tensor of shape (..., 1), float32, so that ``x ~ x_scale * x_q``

    Notes
    -----
    ``127 / limit`` is made with :func:`torch.div` of two tensors: PyTorch turns a number over a tensor into a product
    with the reciprocal, which rounds twice.
    """
    limit = x.abs().amax(dim=-1, keepdim=True).clamp_(min=SCALE_CLAMP)
    levels = torch.full_like(limit, 127.0)
    # No clamp: |x| <= limit, so the product is at most 127 * (1 + 2**-22), which rounds to 127.
    return (x * torch.div(levels, limit)).round_(), torch.div(limit, levels)


class _QuantizedMatmul(torch.autograd.Function):
    """``x @ w.T`` of the quantised operands, with the gradients of the straight-through estimator.

    With X = x_scale * x_q and W = w_scale * w_q the gradients are those of ``X @ W.T`` by X and W, passed on to x and w
    unchanged (identity, also where a weight was clipped).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, quantizer: str, block: int) -> Tensor:
        # Integers up to 127 are exact in bfloat16, so autocast changes the precision of sums and gradients only.
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            x_q, x_scale = quantize_activations(x.float())
            if quantizer == "absmean-block":
                w_q, w_scales = quantize_weights_blocks(w, block)
                # The scales go into the operand: with several of them there is no integer sum to keep exact.
                w_q, w_scale = w_q * w_scales.repeat_interleave(block, 1), torch.ones((), device=w.device)
            else:
                w_q, w_scale = (quantize_weights if quantizer == "absmean" else quantize_weights_b1)(w)
            x_q, w_q = x_q.to(dtype), w_q.to(dtype)
            ctx.save_for_backward(x_q, x_scale, w_q, w_scale)
            return (x_q @ w_q.T).float() * (x_scale * w_scale)  # (..., K) @ (K, M) -> (..., M)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_q, x_scale, w_q, w_scale = ctx.saved_tensors
        dtype = x_q.dtype
        grad_x = grad_w = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = (grad.to(dtype) @ w_q).float() * w_scale  # (..., M) @ (M, K) -> (..., K)
            if ctx.needs_input_grad[1]:
                scaled = (grad * x_scale).to(dtype).flatten(0, -2)  # (T, M)
                grad_w = (scaled.T @ x_q.flatten(0, -2)).float()  # (M, T) @ (T, K) -> (M, K)
        return grad_x, grad_w, None, None


class BitLinear(nn.Module):
    """Linear layer whose weight is made ternary, and whose input int8, each time it runs.

    Parameters
    ----------
    in_features, out_features : int
        K and M.
    bias : bool
        Add a float32 vector of length M to the output, which is not quantised, as Qwen2 does in queries, keys, values.
    quantizer : str
        One of :data:`QUANTIZERS`.
    block : int
        Columns that share a scale with ``absmean-block``.

    Attributes
    ----------
    weight : parameter of shape (M, K), float32
        The master weight that training moves; initialised by the owner of the layer.
    bias : parameter of shape (M,), float32, or None
    strength : float
        1: as described. Below, weights and activations lie that share of the way from their values to their quantised
        ones, and gradients pass unchanged: 0 is a layer of full precision. Training may begin below 1 and rise. Below
        1 autocast rounds the operands as well, not only their sums.

    Raises
    ------
    ValueError
        If K is not in 1..MAX_EXACT_INPUTS, M is not positive, the quantiser is unknown, or block does not divide K.

    Notes
    -----
    Under ``torch.autocast`` the products are made in its type, with their sum rounded to it: for training. Outside it
    the sums are exact, but for ``absmean-block``.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, quantizer: str = "absmean", block: int = 256
    ) -> None:
        super().__init__()
        if not 1 <= in_features <= MAX_EXACT_INPUTS or out_features < 1:
            raise ValueError(
                f"a layer needs 1 to {MAX_EXACT_INPUTS} inputs and at least 1 output, got {in_features} and "
                f"{out_features}"
            )
        if quantizer not in QUANTIZERS:
            raise ValueError(f"the quantiser must be one of {', '.join(QUANTIZERS)}, got {quantizer!r}")
        if quantizer == "absmean-block" and (block < 1 or in_features % block):
            raise ValueError(f"block must be a positive divisor of K, got block {block} and K = {in_features}")
        self.quantizer, self.block, self.strength = quantizer, block, 1.0
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Output of shape (..., M), float32, for x of shape (..., K)."""
        if self.strength < 1:
            y = self._partly_quantized(x).float()
        else:
            y = _QuantizedMatmul.apply(x, self.weight, self.quantizer, self.block)
        return y if self.bias is None else y + self.bias

    def _partly_quantized(self, x: Tensor) -> Tensor:
        """The product of x + strength (Q(x) - x) and W + strength (Q(W) - W), without the bias."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x_q, x_scale = quantize_activations(x.float())
            x_step = self.strength * (x_q * x_scale - x)
            if self.quantizer == "absmean-block":
                w_q, w_scale = quantize_weights_blocks(self.weight, self.block)
                w_scale = w_scale.repeat_interleave(self.block, 1)
            else:
                w_q, w_scale = (quantize_weights if self.quantizer == "absmean" else quantize_weights_b1)(self.weight)
            w_step = self.strength * (w_q * w_scale - self.weight)
        return nn.functional.linear(x + x_step, self.weight + w_step)
