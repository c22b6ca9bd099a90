"""GGUF's names for what Hugging Face calls otherwise: tensors, architectures, hyperparameters, rotary embeddings.

Architectures that hold ternary models:

=================  ==========================================  ================  ================
name               who reads it                                activation        rows of q and k
=================  ==========================================  ================  ================
``bitnet``         llama.cpp, [bitnet.cpp]                     silu, unless a    as they are
                                                               key says else
``bitnet-25``,     [bitnet.cpp] and forks, for [2B4T]          relu2             as they are
``bitnet-b1.58``
``llama``          everything; no SubLN                        silu              permuted
=================  ==========================================  ================  ================

llama.cpp rotates neighbouring pairs of a head for ``llama``, so its converter permutes the rows of q and k (the
``permute`` of its conversion/llama.py); for the ``bitnet`` family it rotates halves, as Hugging Face does, and no
converter permutes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitnet_ref.errors import FormatError

__all__ = [
    "ARCHITECTURES",
    "architecture_for",
    "checked_rope_factors",
    "config_from_metadata",
    "hyperparameters",
    "permute_rows",
    "permutes",
    "rope_factors",
    "rope_of",
    "tensor_from_gguf",
    "tensor_to_gguf",
    "unpermute_rows",
]

ARCHITECTURES = ("bitnet", "bitnet-25", "bitnet-b1.58", "llama")

_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
# The first BitNet reproductions (1bitLLM) call the same two norms so.
_ALIASES = {"self_attn.inner_attn_ln": "attn_sub_norm", "mlp.ffn_layernorm": "ffn_sub_norm"}
_GLOBAL_BACK = {gguf: hf for hf, gguf in _GLOBAL.items()}
_LAYER_BACK = {gguf: hf for hf, gguf in _LAYER.items()}

# (low_freq_factor, high_freq_factor, original_max_position_embeddings) of the published Llama 3.1 and 3.2 models.
_LLAMA3_ROPE = (1.0, 4.0, 8192)


def tensor_to_gguf(name: str) -> str | None:
    """GGUF's name of a Hugging Face tensor, or None if it has none in these architectures."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, part, suffix = match.groups()
    gguf = _LAYER.get(part) or _ALIASES.get(part)
    return f"blk.{int(layer)}.{gguf}.{suffix}" if gguf else None


def tensor_from_gguf(name: str) -> str | None:
    """Hugging Face's name of a GGUF tensor, or None if it is of no layer known here."""
    if name in _GLOBAL_BACK:
        return _GLOBAL_BACK[name]
    match = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER_BACK:
        return None
    return f"model.layers.{int(match[1])}.{_LAYER_BACK[match[2]]}.{match[3]}"


def permutes(architecture: str) -> bool:
    """Whether files of this architecture hold the rows of q and k permuted."""
    return architecture == "llama"


def permute_rows(w: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of q or k from Hugging Face's order (two halves of a head) to llama.cpp's (neighbouring pairs)."""
    return w.reshape(n_heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute_rows(w: np.ndarray, n_heads: int) -> np.ndarray:
    """The inverse of :func:`permute_rows`."""
    return w.reshape(n_heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def architecture_for(config: Mapping[str, Any], sub_norms: bool, target: str) -> str:
    """The architecture under which a model can be written so that its reader computes the same network.

    Parameters
    ----------
    config : Hugging Face configuration
    sub_norms : whether the checkpoint has SubLN tensors
    target : "i2_s" (for bitnet.cpp) or "tq1_0", "tq2_0" (for llama.cpp)

    Raises
    ------
    ValueError
        If no architecture of GGUF has this network.
    """
    activation = config.get("hidden_act")
    if not sub_norms:
        if activation != "silu":
            raise ValueError(f"GGUF's llama architecture needs hidden_act silu, the configuration has {activation!r}")
        return "llama"
    if activation == "relu2":
        return "bitnet-b1.58" if target == "i2_s" else "bitnet"
    if activation == "silu":
        return "bitnet"
    raise ValueError(f"GGUF's bitnet architectures need hidden_act relu2 or silu, the configuration has {activation!r}")


def rope_of(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary embedding, from ``rope_theta``/``rope_scaling`` or the newer ``rope_parameters``.

    Returns
    -------
    theta : float
    scaling : dict with "rope_type" and its parameters, or None for no scaling

    Raises
    ------
    ValueError
        If the base is missing or the two forms disagree.
    """
    newer = config.get("rope_parameters") or {}
    older = config.get("rope_scaling") or {}
    if not (isinstance(newer, Mapping) and isinstance(older, Mapping)):
        raise ValueError(f"rope_parameters and rope_scaling must be objects, got {newer!r} and {older!r}"[:300])
    thetas = {
        _number("rope_theta", value)
        for value in (config.get("rope_theta"), newer.get("rope_theta"))
        if value is not None
    }
    if len(thetas) != 1:
        raise ValueError(f"the configuration must give one rope_theta, got {sorted(thetas) or 'none'}")
    forms = []
    for form in (newer, older):
        kind = form.get("rope_type", form.get("type", "default"))
        rest = {k: v for k, v in form.items() if k not in ("rope_type", "type", "rope_theta")}
        if form and kind != "default":
            forms.append({"rope_type": kind, **rest})
    if len(forms) == 2 and forms[0] != forms[1]:
        raise ValueError("rope_parameters and rope_scaling of the configuration must agree")
    return thetas.pop(), forms[0] if forms else None


def rope_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Divisors of the rotary frequencies for Llama 3's scaling, float32 of shape (head_dim / 2,).

    Frequencies whose wavelength is short against the original context stay, long ones are divided by ``factor``,
    those between are blended (``rope_type`` "llama3" of Hugging Face; llama.cpp stores the result as ``rope_freqs``).
    """
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def hyperparameters(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The ``{arch}.*`` values of a configuration: int for 32-bit unsigned, float for float32, str.

    Raises
    ------
    ValueError
        If the configuration lacks a value that readers need, or has a rotary scaling that GGUF cannot say.
    """

    def need(key: str) -> Any:
        if config.get(key) is None:
            raise ValueError(f"the configuration must give {key} for GGUF")
        return config[key]

    def count(key: str) -> int:
        return _count(key, need(key))

    hidden, heads = count("hidden_size"), count("num_attention_heads")
    head_dim = _count("head_dim", hidden // heads if config.get("head_dim") is None else config["head_dim"])
    kv_heads = heads if config.get("num_key_value_heads") is None else count("num_key_value_heads")
    theta, scaling = rope_of(config)
    values: dict[str, Any] = {
        "vocab_size": count("vocab_size"),
        "context_length": count("max_position_embeddings"),
        "embedding_length": hidden,
        "block_count": count("num_hidden_layers"),
        "feed_forward_length": count("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": _number("rms_norm_eps", need("rms_norm_eps")),
        "rope.freq_base": theta,
        "rope.dimension_count": head_dim,
        "hidden_activation": str(need("hidden_act")),
    }
    if head_dim * heads != hidden:
        values["attention.key_length"] = values["attention.value_length"] = head_dim
    if scaling is not None and scaling["rope_type"] == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = _number("the factor of the rotary scaling", scaling.get("factor"))
    elif scaling is not None and not (scaling["rope_type"] == "llama3" and architecture == "llama"):
        raise ValueError(
            f"rotary scaling of type {scaling['rope_type']!r} cannot be written to GGUF under architecture "
            f"{architecture}; linear can, and llama3 under llama"
        )
    return values


def config_from_metadata(
    metadata: Mapping[str, Any], vocab_rows: int, tied: bool, factors: np.ndarray | None
) -> tuple[dict[str, Any], list[str]]:
    """A Hugging Face configuration from GGUF metadata, and notes on what the file left unsaid.

    Parameters
    ----------
    metadata : GGUF keys and values
    vocab_rows : rows of the embedding
    tied : whether the file has no head of its own
    factors : ``rope_freqs.weight``, if the file has it

    Raises
    ------
    FormatError
        If a value is missing, of the wrong kind, or of a meaning that is not known here; the message names the key.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise FormatError(f"general.architecture must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if value is None:
            raise FormatError(f"the metadata must give {arch}.{key}")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FormatError(f"{arch}.{key} must be {kind.__name__}, got {value!r}")
        if kind is not str and not (math.isfinite(value) and 0 < value < 2**31):
            raise FormatError(f"{arch}.{key} must be above 0 and below 2**31, got {value}")
        return value

    notes = []
    hidden, heads = get("embedding_length", int), get("attention.head_count", int)
    if hidden % heads and f"{arch}.attention.key_length" not in metadata:
        raise FormatError(f"{arch}.embedding_length must be a multiple of the {heads} heads, got {hidden}")
    head_dim = get("attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, int, head_dim) != head_dim:
            raise FormatError(f"{arch}.{key} must equal the head size {head_dim}, got {get(key, int)}")
    stated = metadata.get(f"{arch}.hidden_activation")
    implied = "relu2" if arch in ("bitnet-25", "bitnet-b1.58") else "silu"
    if stated is None:
        notes.append(f"The file names no activation; {implied} is what readers of architecture {arch} compute.")
    elif stated not in ("relu2", "silu"):
        raise FormatError(f"{arch}.hidden_activation must be relu2 or silu, got {stated!r}")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if arch == "llama" else "BitNetForCausalLM"],
        "model_type": "llama" if arch == "llama" else "bitnet",
        "vocab_size": get("vocab_size", int, vocab_rows),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": stated or implied,
        "max_position_embeddings": get("context_length", int),
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(get("rope.freq_base", float, 10000.0)),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
    }
    if f"{arch}.rope.freq_base" not in metadata:
        notes.append("The file gives no base of the rotary embedding; 10000 is what GGUF readers take.")
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    factor = get("rope.scaling.factor", float, 1.0)
    if kind not in ("none", "linear"):
        raise FormatError(f"{arch}.rope.scaling.type must be none or linear, got {kind!r}")
    if kind == "linear" and factor != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "factor": _shortest(factor)}
    if factors is not None and (factors != 1).any():
        config["rope_scaling"] = _scaling_of(factors, config["rope_theta"], head_dim)
    for key, hf in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        if isinstance(value := metadata.get(f"tokenizer.ggml.{key}_token_id"), int):
            config[hf] = value
    return config, notes


def _scaling_of(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling that has these factors; FormatError if it is not that of a published model."""
    low, high, original = _LLAMA3_ROPE
    scaling = {
        "rope_type": "llama3",
        "factor": _shortest(factors.max()),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    # llama.cpp's converter computes in float32, so its factors are good to about 1e-5.
    if factors.shape != (head_dim // 2,) or not np.allclose(
        factors, rope_factors(scaling, theta, head_dim), rtol=1e-4, atol=0
    ):
        raise FormatError("rope_freqs.weight must be that of Llama 3.1 or 3.2; this scaling is not known here")
    return scaling


def checked_rope_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """:func:`rope_factors`, if :func:`config_from_metadata` reads the same scaling from them; ValueError if not."""
    low, high, original = _LLAMA3_ROPE
    known = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    if {key: scaling.get(key) for key in known} != known or head_dim % 2:
        raise ValueError(
            f"GGUF takes Llama 3's rotary scaling with {known} and an even head size here, got {scaling}"[:500]
        )
    factor = _number("the factor of the rotary scaling", scaling.get("factor"))
    factors = rope_factors(scaling, theta, head_dim)
    if not 1 < factor == _shortest(factors.max()):  # float32 holds it, and some frequency is divided by all of it
        raise ValueError(
            f"the factor of the rotary scaling must be a float32 above 1 that some frequency gets, got {factor}"
        )
    return factors


def _count(key: str, value: Any) -> int:
    """What a reader takes for a size."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(f"{key} must be an integer from 1 to 2**31 - 1, got {str(value)[:100]!r}")
    return value


def _number(key: str, value: Any) -> float:
    """What a reader takes for a number: of float32, above 0 and below 2**31."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 2.0**-126 <= value < 2**31:
        raise ValueError(f"{key} must be a number above 0 and below 2**31, got {str(value)[:100]!r}")
    return float(value)


def _shortest(value: float) -> float:
    """The decimal of fewest digits that is this float32: 1e-5 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))
