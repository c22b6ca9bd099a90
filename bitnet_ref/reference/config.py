"""What a decoder computes, read from a Hugging Face ``config.json`` and from nothing else.

A wrong activation, norm or rotation gives fluent text and wrong logits, so nothing is guessed here: every key of a
config is either read, or known not to change the result, or refused by name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "PUBLISHED",
    "Llama3Scaling",
    "ModelConfig",
    "canonical_name",
]

ACTIVATIONS = MappingProxyType({"relu2": "relu2", "silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"})
"""Names in a config -> names here. Plain "gelu" (with erf) is another function and is refused."""


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Rotation speeds of Llama 3.1 and later; see :func:`bitnet_ref.reference.rope.frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        if not self.factor > 0 or not self.original_context > 0:
            raise ValueError(
                f"factor and original_context must be positive, got {self.factor} and {self.original_context}"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "low_freq_factor must be positive and below high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only network. Everything that changes a logit is a field.

    Parameters
    ----------
    architecture : str
        The class name in the config that this came from; for messages only.
    hidden, layers, heads, kv_heads, head_dim, ffn, vocabulary, context : int
        Width of the residual stream; blocks; query heads; key/value heads, which divide the query heads; width of one
        head, even; inner width of the feed-forward network; rows of the embedding; most positions.
    norm_eps : float
        Added to the mean square in every norm.
    activation : {"relu2", "silu", "gelu_tanh"}
        Applied to the gate.
    tied_head : bool
        The output head is the embedding table.
    ternary : bool
        The seven matrices of each block are ternary and their inputs int8. Embedding, head and norms never are.
    sub_norm : bool
        SubLN: a norm before ``o_proj`` and one before ``down_proj``.
    qk_norm : bool
        A norm over each head of q and of k, before the rotation.
    qkv_bias : bool
        Qwen2: a float vector is added to queries, keys and values, also where the matrices are ternary.
    post_norms : bool
        Gemma 3: a norm also *after* attention and after the feed-forward network, before the residual is added.
    norm_offset : float
        Added to every norm's weight; Gemma stores w - 1, so 1.0 there and 0.0 elsewhere.
    embedding_scale : float
        Multiplies the embedding (not the head); sqrt(hidden) in Gemma.
    attention_scale : float or None
        Multiplies q.k; None means 1 / sqrt(head_dim).
    rope_theta : float
        Base of the rotation.
    rope_scaling : float, Llama3Scaling or None
        A float divides every rotation speed ("linear").
    sliding_layers : tuple of int
        Layers that see only the last `sliding_window` tokens, themselves included.
    sliding_window : int
        0 if there are no such layers.
    sliding_rope_theta : float or None
        Their own base, without scaling; None means `rope_theta` and `rope_scaling`.

    Raises
    ------
    ValueError
        If a size is not positive, sizes do not divide, or a switch has no such value.
    """

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    context: int
    norm_eps: float
    activation: str
    rope_theta: float
    tied_head: bool
    ternary: bool = True
    sub_norm: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    rope_scaling: float | Llama3Scaling | None = None
    sliding_layers: tuple[int, ...] = ()
    sliding_window: int = 0
    sliding_rope_theta: float | None = None

    def __post_init__(self) -> None:
        for field in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocabulary", "context"):
            _positive_int(getattr(self, field), field)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads = {self.kv_heads}, got {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, because the rotation pairs its halves, got {self.head_dim}")
        if self.activation not in ACTIVATIONS.values():
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS.values())}, got {_shown(self.activation)}"
            )
        scales = {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta, "embedding_scale": self.embedding_scale}
        scales |= {"attention_scale": self.attention_scale, "sliding_rope_theta": self.sliding_rope_theta}
        if isinstance(self.rope_scaling, (int, float)):
            scales["rope_scaling"] = self.rope_scaling
        for field, value in scales.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field} must be positive and finite, got {value}")
        if (self.sliding_window > 0) != bool(self.sliding_layers):
            raise ValueError(
                "sliding_window must be positive if there are sliding_layers and 0 if there are none, "
                f"got {self.sliding_window} and {self.sliding_layers}"
            )
        if any(not 0 <= layer < self.layers for layer in self.sliding_layers):
            raise ValueError(f"sliding_layers must lie in 0..{self.layers - 1}, got {self.sliding_layers}")

    @property
    def kv_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by: `attention_scale`, or 1 / sqrt(D)."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int | None:
        """Tokens that the layer sees, the current one included; None for all."""
        return self.sliding_window if layer in self.sliding_layers else None

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (M, K) of the seven matrices of every block, in the order of use. Ternary if `ternary` is."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block = {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }
        return {f"model.layers.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in block.items()}

    def norm_shapes(self) -> dict[str, tuple[int]]:
        """Name -> (width,) of every norm weight."""
        block = {"input_layernorm": self.hidden, "post_attention_layernorm": self.hidden}
        if self.post_norms:
            block |= {"pre_feedforward_layernorm": self.hidden, "post_feedforward_layernorm": self.hidden}
        if self.qk_norm:
            block |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        if self.sub_norm:
            block |= {"self_attn.attn_sub_norm": self.heads * self.head_dim, "mlp.ffn_sub_norm": self.ffn}
        shapes = {f"model.layers.{i}.{n}.weight": (width,) for i in range(self.layers) for n, width in block.items()}
        return {**shapes, "model.norm.weight": (self.hidden,)}

    def bias_shapes(self) -> dict[str, tuple[int]]:
        """Name -> (M,) of every bias; none but with `qkv_bias`."""
        suffixes = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
        return {
            name.removesuffix("weight") + "bias": (m,)
            for name, (m, _) in self.linear_shapes().items()
            if self.qkv_bias and name.endswith(suffixes)
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that the network needs: embedding, matrices, biases, norms, an untied head."""
        head = {} if self.tied_head else {"lm_head.weight": (self.vocabulary, self.hidden)}
        embedding = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        return {**embedding, **self.linear_shapes(), **self.bias_shapes(), **self.norm_shapes(), **head}

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse a checkpoint that lacks a tensor of this network or has one that it would not use.

        An unused tensor is the mark of a network read as another: 1bitLLM's checkpoints load as a plain Llama if their
        two inner norms are dropped, and then write nonsense. Only a stored copy of a tied head is allowed.

        Parameters
        ----------
        names : iterable of str
            Canonical names, see :func:`canonical_name`; scales that belong to a matrix are to be left out.

        Raises
        ------
        ValueError
            Naming the first missing and the first unused tensor.
        """
        names, needed = set(names), self.tensor_shapes()
        missing = [name for name in needed if name not in names]
        unused = sorted(names - needed.keys() - ({"lm_head.weight"} if self.tied_head else set()))
        if missing or unused:
            raise ValueError(
                f"the tensors must be those of this {self.architecture} network; "
                f"{len(missing)} missing{f', first {missing[0]!r}' if missing else ''}; "
                f"{len(unused)} that it does not use{f', first {unused[0]!r}' if unused else ''}"
            )

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], tensor_names: Iterable[str] = (), *, ternary: bool | None = None
    ) -> ModelConfig:
        """Network of a Hugging Face ``config.json``.

        Parameters
        ----------
        config : mapping
            The parsed JSON. Not modified.
        tensor_names : iterable of str, optional
            Names in the checkpoint. No published config says whether a Llama, Qwen or Gemma 3 has SubLN; its tensors
            do. The BitNet architectures have it always.
        ternary : bool, optional
            For checkpoints without ``quantization_config`` (master weights). Without it such a checkpoint is ternary if
            its architecture is a BitNet and full precision if it is another without SubLN; with SubLN it must be said.

        Returns
        -------
        ModelConfig

        Raises
        ------
        ValueError
            Naming the key, if one is missing, is not known here, or has a value that this network cannot compute.
        TypeError
            If config is not a mapping.

        Notes
        -----
        Two keys may be absent because the file format leaves defaults out: ``num_key_value_heads`` (as many as query
        heads), and ``tie_word_embeddings`` (the class's own default). ``head_dim``, where absent, is
        ``hidden_size / num_attention_heads`` in BitNet and Llama and required elsewhere. Nothing else has a default.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a mapping, the parsed config.json, got {type(config).__name__}")
        keys = _Keys(config)
        architecture = keys.architecture()
        read = ARCHITECTURES[architecture]
        hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        layers = keys.integer("num_hidden_layers")
        if layers > _MAX_LAYERS:
            raise ValueError(f"num_hidden_layers must be at most {_MAX_LAYERS}, got {layers}")
        if read.derives_head_dim and keys.get("head_dim") is None:
            if hidden % heads:
                raise ValueError(f"num_attention_heads must divide hidden_size = {hidden}, got {heads}")
            head_dim = hidden // heads
        else:
            head_dim = keys.integer("head_dim")
        sub_norm = read.bitnet or any(canonical_name(name).endswith(_SUB_NORMS) for name in tensor_names)
        fields: dict[str, Any] = {
            "architecture": architecture,
            "hidden": hidden,
            "layers": layers,
            "heads": heads,
            "kv_heads": heads if keys.get("num_key_value_heads") is None else keys.integer("num_key_value_heads"),
            "head_dim": head_dim,
            "ffn": keys.integer("intermediate_size"),
            "vocabulary": keys.integer("vocab_size"),
            "context": keys.integer("max_position_embeddings"),
            "norm_eps": keys.number("rms_norm_eps"),
            "activation": keys.activation(read.activation_key),
            "tied_head": keys.boolean("tie_word_embeddings", read.tied_by_default),
            "ternary": _ternary(keys, read, ternary, sub_norm),
            "sub_norm": sub_norm,
            "qk_norm": read.qk_norm,
            "qkv_bias": read.qkv_bias,
        }
        fields |= keys.gemma3(layers) if read.gemma else keys.rope()
        if architecture == "BitnetForCausalLM":
            # 1bitLLM's two bit widths; "weight_bits": 1 means ternary in its code.
            keys.must_be("input_bits", 8)
            keys.must_be("weight_bits", 1)
        if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
            keys.must_be("use_sliding_window", False)
            keys.skip("sliding_window", "max_window_layers")  # have no effect without use_sliding_window
            if any(kind != "full_attention" for kind in keys.get("layer_types") or ()):
                raise ValueError(f"layer_types must be full_attention throughout, got {_shown(config['layer_types'])}")
        for switch in ("attention_bias", "mlp_bias", "parallel_attn", "rope_interleaved"):
            keys.must_be(switch, False)
        keys.must_be("activation", "swiglu")  # Falcon3 writes it beside hidden_act = silu
        if fields["activation"] != "silu" and config.get("activation") is not None:
            raise ValueError(f"activation = 'swiglu' contradicts {read.activation_key} = {fields['activation']!r}")
        keys.refuse_unread()
        return cls(**fields)


@dataclass(frozen=True)
class _Architecture:
    """What a class name says that its config does not."""

    model_types: tuple[str, ...]
    bitnet: bool = False  # ternary and with SubLN by definition
    qk_norm: bool = False
    qkv_bias: bool = False
    gemma: bool = False
    derives_head_dim: bool = True
    tied_by_default: bool = False

    @property
    def activation_key(self) -> str:
        return "hidden_activation" if self.gemma else "hidden_act"


ARCHITECTURES: Mapping[str, _Architecture] = MappingProxyType(
    {
        "BitNetForCausalLM": _Architecture(("bitnet",), bitnet=True),  # BitNet b1.58 2B4T
        # 1bitLLM's reproductions of [B158]; they call themselves "llama" although a Llama has no inner norms.
        "BitnetForCausalLM": _Architecture(("llama", "bitnet"), bitnet=True),
        "LlamaForCausalLM": _Architecture(("llama",)),  # Llama3-8B-1.58, Falcon3-1.58bit, Falcon-E, SmolLM2
        "Qwen2ForCausalLM": _Architecture(("qwen2",), qkv_bias=True),  # Qwen2 and Qwen2.5
        "Qwen3ForCausalLM": _Architecture(("qwen3",), qk_norm=True, derives_head_dim=False),
        "Gemma3ForCausalLM": _Architecture(
            ("gemma3_text",), qk_norm=True, gemma=True, derives_head_dim=False, tied_by_default=True
        ),
    }
)
"""Class names that can be read, and what each implies."""

_MAX_LAYERS = 10_000  # names of every tensor are made before a checkpoint is looked at

_SUB_NORMS = ("self_attn.attn_sub_norm.weight", "mlp.ffn_sub_norm.weight")

_OTHER_NAMES = {"self_attn.inner_attn_ln.weight": _SUB_NORMS[0], "mlp.ffn_layernorm.weight": _SUB_NORMS[1]}

# Keys that cannot change a logit of a single unpadded sequence: names of files and programs, tokens, training, storage.
_WITHOUT_EFFECT = frozenset(
    {
        "_model_name_or_path",  # what transformers keeps of a GGUF file's name
        *("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version", "unsloth_version"),
        *("is_bitnet_config", "is_llama_config", "is_decoder", "is_encoder_decoder", "transformers.js_config"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "id2label", "label2id", "problem_type"),
        *("attention_dropout", "initializer_range", "pretraining_tp", "_attn_implementation_autoset"),
        *("dtype", "torch_dtype", "use_cache", "cache_implementation", "chunk_size_feed_forward"),
        *("output_attentions", "output_hidden_states", "return_dict"),
    }
)


_NEVER_TERNARY = ("lm_head", "model.embed_tokens", "model.norm")


def canonical_name(name: str) -> str:
    """The tensor name that this package uses; 1bitLLM's two inner norms are renamed, every other name is kept.

    model.layers.0.self_attn.inner_attn_ln.weight -> model.layers.0.self_attn.attn_sub_norm.weight
    model.layers.0.mlp.ffn_layernorm.weight       -> model.layers.0.mlp.ffn_sub_norm.weight
    """
    for other, ours in _OTHER_NAMES.items():
        if name.endswith(other):
            return name.removesuffix(other) + ours
    return name


def _ternary(keys: _Keys, read: _Architecture, asked: bool | None, sub_norm: bool) -> bool:
    """Whether the matrices of the blocks are ternary: by the quantisation entry, by the architecture, or as asked."""
    entry = keys.get("quantization_config")
    if entry is None:
        if asked is None and sub_norm and not read.bitnet:
            raise ValueError(
                "ternary must be given: the checkpoint has SubLN tensors, as a student of [BitDistill] has, but no "
                "quantization_config that says whether its matrices are to be made ternary"
            )
        return read.bitnet if asked is None else asked
    if not isinstance(entry, Mapping) or entry.get("quant_method") != "bitnet":
        raise ValueError(f"quantization_config must have quant_method 'bitnet', got {_shown(entry)}")
    if asked is False:
        raise ValueError("ternary must not be False for a checkpoint whose quantization_config says bitnet")
    allowed = {  # the first of each is what an absent key means
        "linear_class": ("bitlinear", "autobitlinear"),
        "quantization_mode": ("offline", "online"),
        "use_rms_norm": (False,),  # a further norm inside every linear layer: another network
    }
    for key, value in entry.items():
        if key in ("quant_method", "rms_norm_eps"):  # the latter belongs to use_rms_norm
            continue
        if key == "modules_to_not_convert":
            # Newer versions of transformers list what has no linear layer of a block as well.
            if value is not None and not (isinstance(value, list) and all(name in _NEVER_TERNARY for name in value)):
                raise ValueError(
                    f"quantization_config.{key} must name none but {', '.join(_NEVER_TERNARY)}, got {_shown(value)}"
                )
            continue
        if key not in allowed:
            raise ValueError(f"quantization_config.{key} is not known here, got {_shown(value)}")
        if value not in allowed[key]:
            raise ValueError(f"quantization_config.{key} must be one of {allowed[key]}, got {_shown(value)}")
    return True


class _Keys:
    """A config that remembers which of its keys were read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._read = set(_WITHOUT_EFFECT)

    def get(self, key: str) -> Any:
        self._read.add(key)
        return self._config.get(key)

    def skip(self, *keys: str) -> None:
        self._read.update(keys)

    def required(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"the config must have the key {key!r}")
        return value

    def integer(self, key: str) -> int:
        return _positive_int(self.required(key), key)

    def number(self, key: str) -> float:
        return _positive_float(self.required(key), key)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {_shown(value)}")
        return value

    def must_be(self, key: str, value: Any) -> None:
        """Refuse any other value; an absent key or null is the same as `value`."""
        got = self.get(key)
        if got is not None and (got != value or type(got) is not type(value)):
            raise ValueError(f"{key} must be {value!r}, the only case implemented, got {_shown(got)}")

    def architecture(self) -> str:
        names = self._config.get("architectures")
        if not isinstance(names, (list, tuple)) or len(names) != 1:
            raise ValueError(f"architectures must be a list of one name, got {_shown(names)}")
        if not isinstance(names[0], str) or names[0] not in ARCHITECTURES:
            raise ValueError(f"architectures must name one of {', '.join(ARCHITECTURES)}, got {_shown(names[0])}")
        model_type = self._config.get("model_type")
        allowed = ARCHITECTURES[names[0]].model_types
        if model_type not in allowed:
            raise ValueError(f"model_type of {names[0]} must be one of {', '.join(allowed)}, got {_shown(model_type)}")
        return names[0]

    def activation(self, key: str) -> str:
        value = self.required(key)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ValueError(f"{key} must be one of {', '.join(ACTIVATIONS)}, got {_shown(value)}")
        return ACTIVATIONS[value]

    def rope(self) -> dict[str, Any]:
        """Base and scaling, from ``rope_theta`` and ``rope_scaling`` or from the newer ``rope_parameters``."""
        new, old = self.get("rope_parameters"), self.get("rope_scaling")
        if new is not None and old is not None:
            raise ValueError("the config must not have both rope_parameters and rope_scaling")
        theta = self.get("rope_theta")
        if new is not None:
            if not isinstance(new, Mapping):
                raise ValueError(f"rope_parameters must be an object, got {_shown(new)}")
            if theta is not None and "rope_theta" in new and new["rope_theta"] != theta:
                raise ValueError(f"rope_theta must be one number, got {theta} and {new['rope_theta']}")
            theta = new.get("rope_theta", theta)
        if theta is None:
            raise ValueError("the config must have the key 'rope_theta'")
        return {"rope_theta": _positive_float(theta, "rope_theta"), "rope_scaling": _rope_scaling(old or new)}

    def gemma3(self, layers: int) -> dict[str, Any]:
        """What Gemma 3 does differently: two rotations, windows, norms of 1 + w and after each part, scales."""
        for switch in ("attn_logit_softcapping", "final_logit_softcapping"):
            if self.get(switch) is not None:
                raise ValueError(f"{switch} must be null, the only case implemented, got {_shown(self.get(switch))}")
        self.must_be("use_bidirectional_attention", False)
        kinds = self.get("layer_types")
        pattern = self.get("sliding_window_pattern") or self.get("_sliding_window_pattern")
        self.skip("_sliding_window_pattern")
        if kinds is None:
            if pattern is None:
                raise ValueError("the config must have the key 'layer_types' or 'sliding_window_pattern'")
            pattern = _positive_int(pattern, "sliding_window_pattern")
            kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
        known = ("sliding_attention", "full_attention")
        if not isinstance(kinds, (list, tuple)) or len(kinds) != layers or not all(kind in known for kind in kinds):
            raise ValueError(
                f"layer_types must have {layers} entries, each sliding_attention or full_attention, got {_shown(kinds)}"
            )
        sliding = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
        fields: dict[str, Any] = {
            "post_norms": True,
            "norm_offset": 1.0,
            "embedding_scale": math.sqrt(self._config["hidden_size"]),
            "attention_scale": self.number("query_pre_attn_scalar") ** -0.5,
            "sliding_layers": sliding,
            "sliding_window": self.integer("sliding_window") if sliding else 0,
        }
        self.skip("sliding_window")
        new = self.get("rope_parameters")
        if new is None:
            fields |= self.rope()
            fields["sliding_rope_theta"] = self.number("rope_local_base_freq")
            return fields
        self.must_be("rope_scaling", None)
        self.skip("rope_theta", "rope_local_base_freq")
        if not isinstance(new, Mapping) or set(new) != {"sliding_attention", "full_attention"}:
            raise ValueError(
                f"rope_parameters must have the keys sliding_attention and full_attention, got {_shown(new)}"
            )
        both = [_Keys({"rope_parameters": new[kind]}).rope() for kind in ("full_attention", "sliding_attention")]
        if both[1]["rope_scaling"] is not None:
            raise ValueError("rope_parameters.sliding_attention must have rope_type 'default'")
        return fields | both[0] | {"sliding_rope_theta": both[1]["rope_theta"]}

    def refuse_unread(self) -> None:
        for key, value in self._config.items():
            if key not in self._read and value is not None:
                raise ValueError(
                    f"the config has the key {_shown(key)} = {_shown(value)}, "
                    "which is not known here, so whether it changes the "
                    "computation cannot be told; remove it if it does not"
                )


def _rope_scaling(entry: Any) -> float | Llama3Scaling | None:
    """The scaling that an object with ``rope_type`` (formerly ``type``) describes."""
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        raise ValueError(f"rope_scaling must be an object, got {_shown(entry)}")
    entry = dict(entry)
    kind = entry.pop("rope_type", None)
    older = entry.pop("type", None)
    if kind is not None and older is not None and kind != older:
        raise ValueError(f"rope_scaling must have one type, got rope_type {_shown(kind)} and type {_shown(older)}")
    kind = kind or older or "default"
    entry.pop("rope_theta", None)
    keys = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if not isinstance(kind, str) or kind not in keys:
        raise ValueError(f"rope_type must be one of {', '.join(keys)}, got {_shown(kind)}")
    if set(entry) != set(keys[kind]):
        raise ValueError(f"rope scaling of type {kind} must have the keys {keys[kind]}, got {tuple(entry)}")
    values = {key: _positive_float(value, f"rope_scaling.{key}") for key, value in entry.items()}
    if kind == "llama3":
        original = _positive_int(
            entry["original_max_position_embeddings"], "rope_scaling.original_max_position_embeddings"
        )
        del values["original_max_position_embeddings"]
        return Llama3Scaling(**values, original_context=original)
    return values.get("factor")


def _shown(value: Any) -> str:
    """A value of a config in a message: short, and of an integer too long for decimal digits only that."""
    if isinstance(value, int) and abs(value) >= 10**100:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)[:200]


def _positive_int(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"{name} must be an integer from 1 to 2**31 - 1, got {_shown(value)}")
    return value


def _positive_float(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be a positive finite number, got {_shown(value)}")
    return float(value)


_BITNET_QUANTISED = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}


def _llama(**keys: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **keys}


def _one_bit_llm(hidden: int, ffn: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        "architectures": ["BitnetForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "input_bits": 8,
        "intermediate_size": ffn,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": 32002,
        "weight_bits": 1,
    }


PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "microsoft/bitnet-b1.58-2B-4T": {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": "relu2",
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "max_position_embeddings": 4096,
        "num_attention_heads": 20,
        "num_hidden_layers": 30,
        "num_key_value_heads": 5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    },
    "1bitLLM/bitnet_b1_58-large": _one_bit_llm(1536, 4096, 16, 24),
    "1bitLLM/bitnet_b1_58-xl": _one_bit_llm(2048, 5460, 32, 24),
    "1bitLLM/bitnet_b1_58-3B": _one_bit_llm(3200, 8640, 32, 26),
    "HF1BitLLM/Llama3-8B-1.58-100B-tokens": _llama(
        hidden_size=4096,
        intermediate_size=14336,
        max_position_embeddings=8192,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_scaling=None,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        vocab_size=128256,
        quantization_config={"quant_method": "bitnet", "modules_to_not_convert": None},
    ),
    "tiiuae/Falcon3-1B-Instruct-1.58bit": _llama(
        head_dim=256,
        hidden_size=2048,
        intermediate_size=8192,
        max_position_embeddings=8192,
        num_attention_heads=8,
        num_hidden_layers=18,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_scaling=None,
        rope_theta=1000042,
        tie_word_embeddings=False,
        vocab_size=131072,
        quantization_config=_BITNET_QUANTISED,
    ),
    "tiiuae/Falcon3-3B-Base-1.58bit": _llama(
        activation="swiglu",
        head_dim=256,
        hidden_size=3072,
        intermediate_size=9216,
        max_position_embeddings=4096,
        num_attention_heads=12,
        num_hidden_layers=22,
        num_key_value_heads=4,
        parallel_attn=False,
        rms_norm_eps=1e-6,
        rope_scaling=None,
        rope_theta=1000042,
        tie_word_embeddings=False,
        vocab_size=131072,
        quantization_config=_BITNET_QUANTISED,
    ),
}
"""The computing keys of the ``config.json`` of published models, by their names on Hugging Face."""

PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {name: ModelConfig.from_hf(config) for name, config in PUBLISHED.items()}
)
"""The networks of :data:`PUBLISHED`.

The Llama3-8B-1.58 entry is from a copy of that file in another repository (Rushi2901/bitnet_b1_58-xl). The entry of
1bitLLM's xl has the sizes that other programs give for it, those of the 1.3B model in [B158]'s training notes; what is
not a size is as in its two siblings."""


def _shown(value: object) -> str:
    """A value of the config for a message: a hostile one may be megabytes long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
