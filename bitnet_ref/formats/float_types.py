"""Encoders of embeddings: F32, F16, BF16 and the block types Q8_0, Q4_0 and Q6_K of llama.cpp.

The ``gguf`` library encodes all but Q6_K, for which it has only the decoder; that encoder is here. A Q6_K block holds
256 weights in 210 bytes: low four bits (128 bytes), high two bits (64), sixteen int8 scales, one float16 super-scale::

    w ~ d * scale[i // 16] * (q[i] - 32),      q in 0..63
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

__all__ = ["FLOAT_TYPES", "check_float_type", "encode_floats", "quantize_q6_k", "row_bytes"]

FLOAT_TYPES: Mapping[str, str] = MappingProxyType(
    {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q6_k": "Q6_K", "q4_0": "Q4_0"}
)
"""What an embedding may be written as: name on the command line -> name of the type."""

_F16_MAX = 65504.0


def check_float_type(name: str, n_columns: int, type_name: str) -> None:
    """ValueError unless rows of n_columns are whole blocks of the type."""
    block = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][0]
    if n_columns % block:
        raise ValueError(f"{type_name} needs a multiple of {block} columns, {name} has {n_columns}")


def row_bytes(n_columns: int, type_name: str) -> int:
    """Bytes of a row of n_columns values."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return n_columns // block * block_bytes


def encode_floats(name: str, x: np.ndarray, type_name: str) -> np.ndarray:
    """Rows of float32 as stored bytes.

    Parameters
    ----------
    name : of the tensor, for messages
    x : ndarray of shape (n, K), float32. Not modified.
    type_name : one of the values of FLOAT_TYPES

    Returns
    -------
    ndarray of shape (n, bytes of a row), uint8

    Raises
    ------
    ValueError
        If a finite value leaves the range of float16, or the type is a block type and a value is not finite.

    Notes
    -----
    F16 and BF16 round half to even. The types of fewer bits lose by design.
    """
    check_float_type(name, x.shape[-1], type_name)
    if type_name == "F32":
        return np.ascontiguousarray(x, "<f4").view(np.uint8)
    if type_name == "BF16":
        return quants.quantize(np.ascontiguousarray(x), GGMLQuantizationType.BF16).reshape(len(x), -1)
    if type_name != "F16" and not np.isfinite(x).all():
        raise ValueError(f"{type_name} needs finite values, {name} holds NaN or infinity")
    finite_max = np.abs(x, where=np.isfinite(x), out=np.zeros_like(x)).max(initial=0)
    if finite_max > _F16_MAX and type_name == "F16":
        raise ValueError(f"F16 needs values of at most {_F16_MAX:,.0f} in magnitude, {name} holds {finite_max:.6g}")
    if type_name == "F16":
        return np.ascontiguousarray(x.astype("<f2")).view(np.uint8)
    # The float16 scale of a block is at least the largest value / 128.
    if finite_max > _F16_MAX:
        raise ValueError(
            f"{type_name} needs values of at most {_F16_MAX:,.0f} in magnitude here, {name} holds {finite_max:.6g}"
        )
    if type_name == "Q6_K":
        return quantize_q6_k(x)
    return quants.quantize(np.ascontiguousarray(x), GGMLQuantizationType[type_name])


def quantize_q6_k(x: np.ndarray) -> np.ndarray:
    """Rows of float32 as Q6_K blocks.

    For each 16 weights the scale is the best, by squared error, of eleven near max / -32, refitted by least squares;
    the sixteen scales of a block are then rounded to int8 multiples of one float16, and the weights to those.

    Parameters
    ----------
    x : ndarray of shape (n, K), float32, finite; K a multiple of 256

    Returns
    -------
    ndarray of shape (n, K / 256 * 210), uint8
    """
    groups = np.ascontiguousarray(x, np.float32).reshape(-1, 16)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1, keepdims=True), axis=1)  # signed
    best_scale = np.zeros_like(largest)
    best_gain = np.zeros_like(largest)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for step in range(-5, 6):
            q = np.clip(np.rint(groups * ((-32 - 0.1 * step) / largest)), -32, 31)
            xq, qq = (groups * q).sum(axis=1, keepdims=True), (q * q).sum(axis=1, keepdims=True)
            gain = xq * xq / qq  # the squared error of the fit x ~ (xq / qq) q is |x|^2 - gain
            better = gain > best_gain  # False for the NaN of an all-zero group
            best_gain = np.where(better, gain, best_gain)
            best_scale = np.where(better, xq / qq, best_scale)

        scales = best_scale.reshape(-1, 16)  # (blocks, 16)
        top = np.take_along_axis(scales, np.abs(scales).argmax(axis=1, keepdims=True), axis=1)
        d = (top / -128).astype("<f2")  # (blocks, 1)
        scales_q = np.nan_to_num(
            np.clip(np.rint(scales / d.astype(np.float32)), -128, 127), nan=0.0, posinf=0, neginf=0
        )
        step_size = (d.astype(np.float32) * scales_q)[:, :, None]  # (blocks, 16, 1)
        q = np.rint(groups.reshape(-1, 16, 16) / step_size)
    q = np.clip(np.nan_to_num(q, nan=0.0), -32, 31)
    q = (q + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # (blocks, halves, quarters, 32)

    blocks = np.empty((len(q), 210), np.uint8)
    low, high = q & 15, q >> 4
    blocks[:, :128] = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    blocks[:, 128:192] = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    blocks[:, 192:208] = scales_q.astype(np.int8).view(np.uint8)
    blocks[:, 208:] = d.view(np.uint8)
    return blocks.reshape(len(x), -1)
