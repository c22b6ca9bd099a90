"""The BitNet linear layer for training: ternary weights, int8 activations, straight-through gradients.

The quantisers are those of :mod:`bitnet_ref.reference.quantize`, step by step: float32, one rounding each, half to
even, a clamp at 1e-5 on mean|w| and on max|x|. The layer multiplies the *integers* and scales afterwards, so in float32
its output is the same as the reference's to the last bit, as long as 127 * K < 2**24.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MAX_EXACT_INPUTS", "BitLinear", "quantize_activations", "quantize_weights"]

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


class _TernaryMatmul(torch.autograd.Function):
    """``x @ w.T`` of the quantised operands, with the gradients of the straight-through estimator.

    With X = x_scale * x_q and W = w_scale * w_q the gradients are those of ``X @ W.T`` by X and W, passed on to x and w
    unchanged (identity, also where a weight was clipped).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        # Integers up to 127 are exact in bfloat16, so autocast changes the precision of sums and gradients only.
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            x_q, x_scale = quantize_activations(x.float())
            w_q, w_scale = quantize_weights(w)
            x_q, w_q = x_q.to(dtype), w_q.to(dtype)
            ctx.save_for_backward(x_q, x_scale, w_q, w_scale)
            return (x_q @ w_q.T).float() * (x_scale * w_scale)  # (..., K) @ (K, M) -> (..., M)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x_q, x_scale, w_q, w_scale = ctx.saved_tensors
        dtype = x_q.dtype
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = (grad.to(dtype) @ w_q).float() * w_scale  # (..., M) @ (M, K) -> (..., K)
            scaled = (grad * x_scale).to(dtype).flatten(0, -2)  # (T, M)
            grad_w = (scaled.T @ x_q.flatten(0, -2)).float()  # (M, T) @ (T, K) -> (M, K)
        return grad_x, grad_w


class BitLinear(nn.Module):
    """Linear layer without bias whose weight is made ternary, and whose input int8, each time it runs.

    Parameters
    ----------
    in_features, out_features : int
        K and M.

    Attributes
    ----------
    weight : parameter of shape (M, K), float32
        The master weight that training moves; initialised by the owner of the layer.

    Raises
    ------
    ValueError
        If K is not in 1..MAX_EXACT_INPUTS, or M is not positive.

    Notes
    -----
    Under ``torch.autocast`` the products are made in its type, with their sum rounded to it: for training. Outside it
    the sums are exact.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        if not 1 <= in_features <= MAX_EXACT_INPUTS or out_features < 1:
            raise ValueError(
                f"a layer needs 1 to {MAX_EXACT_INPUTS} inputs and at least 1 output, got {in_features} and "
                f"{out_features}"
            )
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Output of shape (..., M), float32, for x of shape (..., K)."""
        return _TernaryMatmul.apply(x, self.weight)
