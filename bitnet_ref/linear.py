"""The linear layer of BitNet b1.58 on compiled kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from bitnet_ref.kernels import check_out, matmul
from bitnet_ref.reference.matmul import checked_scale
from bitnet_ref.reference.packing import PackedTernary
from bitnet_ref.reference.quantize import quantize_activations

__all__ = ["BitLinear"]


class BitLinear:
    """``y ~ x @ (w_scale * w_q).T`` with int8 activations and packed ternary weights, without bias.

        x_q, x_scale = quantize_activations(x)
        y            = float32(matmul(x_q, w_packed)) * (x_scale * w_scale)        [2B4T, Section 2]

    The result equals :func:`bitnet_ref.reference.matmul.linear` to the last bit, in every packing.

    Parameters
    ----------
    w_packed : PackedTernary of shape (M, K)
    w_scale : float32
        The scale that multiplies the weights.

    Raises
    ------
    TypeError
        If w_packed is not a PackedTernary, or w_scale not a number.
    ValueError
        If w_scale is not one finite float32 number.
    """

    def __init__(self, w_packed: PackedTernary, w_scale: np.float32 | float) -> None:
        if not isinstance(w_packed, PackedTernary):
            raise TypeError(f"w_packed must be a PackedTernary, made by bitnet_ref.pack, got {type(w_packed).__name__}")
        self.w_packed = w_packed
        self.w_scale = checked_scale(w_scale)

    def __call__(
        self, x: ArrayLike, *, out: np.ndarray | None = None, kernel: str | None = None, n_threads: int | None = None
    ) -> np.ndarray:
        """Apply the layer.

        Parameters
        ----------
        x : array of shape (..., K), floating point. Not modified.
        out : ndarray of shape (..., M), float32, C-contiguous, optional
            Written to and returned, for callers that reuse memory; the integer sums are kept in it on the way.
        kernel, n_threads
            As in :func:`bitnet_ref.matmul`.

        Returns
        -------
        ndarray of shape (..., M), float32

        Raises
        ------
        TypeError, ValueError
            If x is not floating point, has the wrong shape or is not finite, or out does not fit.
        """
        x_q, x_scale = quantize_activations(x)
        k = self.w_packed.shape[1]
        if x_q.shape[-1] != k:
            raise ValueError(f"x must have shape (..., {k}) for this layer of K = {k}, got shape {x_q.shape}")
        shape = (*x_q.shape[:-1], self.w_packed.shape[0])
        if out is None:
            out = np.empty(shape, np.float32)
        else:
            check_out(out, shape, np.float32)
        # int32 and float32 have one size, so the sums lie in out itself until they are scaled.
        sums = matmul(x_q, self.w_packed, kernel=kernel, n_threads=n_threads, out=out.view(np.int32))
        return np.multiply(sums, x_scale * self.w_scale, out=out, dtype=np.float32, casting="unsafe")

    def __repr__(self) -> str:
        return f"BitLinear({self.w_packed!r}, w_scale={self.w_scale:.6g})"

    def _repr_html_(self) -> str:
        return f"<p>BitLinear, w_scale = {self.w_scale:.6g}</p>{self.w_packed._repr_html_()}"
