"""BitNet b1.58 and BitNet Distillation, implemented to be trusted.

    >>> import numpy as np, bitnet_ref as br
    >>> w = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    >>> w_q, w_scale = br.quantize_weights(w)
    >>> layer = br.BitLinear(br.pack(w_q, "base3"), w_scale)
    >>> layer(np.ones((2, 256), np.float32)).shape
    (2, 64)

Papers, by the keys that docstrings use:

=============  ====================================================================================================
[BitNet]       BitNet: Scaling 1-bit Transformers for Large Language Models. arXiv 2310.11453
[B158]         The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits. arXiv 2402.17764
[B158-FAQ]     The Era of 1-bit LLMs: Training Tips, Code and FAQ. microsoft/unilm, 2024
[2B4T]         BitNet b1.58 2B4T Technical Report. arXiv 2504.12285v2
[BitNet-a4.8]  BitNet a4.8: 4-bit Activations for 1-bit LLMs. arXiv 2411.04965
[BitDistill]   BitNet Distillation. arXiv 2510.13998v1
[TernaryBERT]  Distillation-aware Ultra-low Bit BERT. arXiv 2009.12812
[bitnet.cpp]   Bitnet.cpp: Efficient Edge Inference for Ternary LLMs. arXiv 2502.11880v1; first report 2410.16144v2
[T-MAC]        T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on Edge. arXiv 2407.00088v2
[Horowitz]     Computing's Energy Problem (and what we can do about it). ISSCC 2014
[PokeBNN]      PokeBNN: A Binary Pursuit of Lightweight Accuracy. arXiv 2112.00133
=============  ====================================================================================================
"""

from __future__ import annotations

from typing import Any

from bitnet_ref import kernels
from bitnet_ref.errors import BitnetRefError, FormatError, KernelUnavailable
from bitnet_ref.kernels import matmul
from bitnet_ref.linear import BitLinear
from bitnet_ref.reference.packing import PackedTernary, pack, schemes
from bitnet_ref.reference.quantize import quantize_activations, quantize_weights

__version__ = "0.1.0"

__all__ = [
    "BitLinear",
    "BitnetRefError",
    "FormatError",
    "KernelUnavailable",
    "PackedTernary",
    "__version__",
    "kernels",
    "load",
    "matmul",
    "pack",
    "quantize_activations",
    "quantize_weights",
    "schemes",
]


def __getattr__(name: str) -> Any:
    # Loading a model needs tokenizers and file formats; a layer and its kernels do not. Imported when first asked for.
    if name == "load":
        from bitnet_ref.runtime.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
