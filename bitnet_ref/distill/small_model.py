"""The 2B4T network in PyTorch, small enough to train on a processor, ternary or in full precision.

Tensor names and config keys are those of ``BitNetForCausalLM`` in ``transformers``, so a saved model is a folder that
``transformers`` and :mod:`bitnet_ref.formats` open. What the network computes is stated in
:mod:`bitnet_ref.reference.model`; here it is written for training: batches, no cache, autocast.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from bitnet_ref.distill.bitlinear import BitLinear
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.rope import frequencies

__all__ = ["SmallModel", "hf_config", "load_model", "save_model"]

_ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


def hf_config(
    *,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocabulary: int,
    context: int,
    rope_theta: float,
    norm_eps: float,
    bos: int,
    ternary: bool,
) -> dict[str, Any]:
    """``config.json`` of a BitNet with master weights.

    With ``ternary`` it has a ``quantization_config`` of mode "online" (round each time the model runs); without, none,
    and the same architecture runs in full precision.
    """
    config = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rope_theta": rope_theta,
        "rms_norm_eps": norm_eps,
        "hidden_act": "relu2",
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": bos,
        "torch_dtype": "float32",
    }
    return config | ({"quantization_config": _ONLINE} if ternary else {})


class SmallModel(nn.Module):
    """A decoder of :class:`bitnet_ref.reference.config.ModelConfig`, as far as a BitNet b1.58 2B4T goes.

    Parameters
    ----------
    config : ModelConfig
        With squared ReLU, SubLN, a tied head and no other switch; ``ternary`` chooses the linear layers.

    Raises
    ------
    ValueError
        If the config is of another network.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not (config.architecture == "BitNetForCausalLM" and config.activation == "relu2" and config.tied_head):
            raise ValueError(
                "this network is BitNetForCausalLM with relu2 and a tied head, got "
                f"{config.architecture}, {config.activation}, tied_head={config.tied_head}"
            )
        if config.rope_scaling is not None:
            raise ValueError(f"this network has no rope_scaling, got {config.rope_scaling}")
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.model.layers = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.model.norm = _RMSNorm(config.hidden, config.norm_eps)
        # The reference's speeds, so that only the cosine of the same float32 angle is left to differ.
        speeds = torch.from_numpy(frequencies(config.head_dim, config.rope_theta))
        angles = (torch.arange(config.context, dtype=torch.float32)[:, None] * speeds).double()  # (context, D/2)
        self.register_buffer("_cos", angles.cos().float(), persistent=False)
        self.register_buffer("_sin", angles.sin().float(), persistent=False)

    def init_weights(self, seed: int) -> None:
        """Draw all weights: normal with standard deviation 0.02, norms 1."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1)
                else:
                    parameter.normal_(0, 0.02, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (B, T, V), float32 (the autocast type under autocast), for tokens of shape (B, T), int64.

        Raises
        ------
        ValueError
            If T exceeds the context.
        """
        t = tokens.shape[1]
        if t > self.config.context:
            raise ValueError(f"the context of this model is {self.config.context} tokens, got {t}")
        x = self.model.embed_tokens(tokens)  # (B, T, hidden)
        cos, sin = self._cos[:t], self._sin[:t]
        for block in self.model.layers:
            x = block(x, cos, sin)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight)


class _RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps) * self.weight


def _linear(config: ModelConfig, n_inputs: int, n_outputs: int) -> nn.Module:
    return BitLinear(n_inputs, n_outputs) if config.ternary else nn.Linear(n_inputs, n_outputs, bias=False)


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = _linear(config, config.hidden, q)
        self.k_proj = _linear(config, config.hidden, kv)
        self.v_proj = _linear(config, config.hidden, kv)
        self.o_proj = _linear(config, q, config.hidden)
        self.attn_sub_norm = _RMSNorm(q, config.norm_eps)
        mask = torch.full((config.context, config.context), -torch.inf).triu(1)
        self.register_buffer("_mask", mask, persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        heads = (b, t, -1, self._config.head_dim)
        q = _rotate(self.q_proj(x).view(heads).transpose(1, 2), cos, sin)  # (B, H, T, D)
        k = _rotate(self.k_proj(x).view(heads).transpose(1, 2), cos, sin)  # (B, KV, T, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        groups = self._config.kv_groups
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # query head h reads head h // groups
        # Written out: on a processor, in bfloat16, forwards and back take little more than half the time of
        # scaled_dot_product_attention at these sizes.
        scores = (q @ k.mT).float() * self._config.head_dim**-0.5 + self._mask[:t, :t]  # (B, H, T, T)
        a = scores.softmax(-1) @ v
        return self.o_proj(self.attn_sub_norm(a.transpose(1, 2).reshape(b, t, -1)))


class _FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config, config.hidden, config.ffn)
        self.up_proj = _linear(config, config.hidden, config.ffn)
        self.down_proj = _linear(config, config.ffn, config.hidden)
        self.ffn_sub_norm = _RMSNorm(config.ffn, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ffn_sub_norm(self.gate_proj(x).relu().square() * self.up_proj(x)))


class _Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = _RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = _RMSNorm(config.hidden, config.norm_eps)
        self.mlp = _FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x of shape (B, H, T, D) turned by angles of shape (T, D/2): its first half with its second."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def save_model(model: SmallModel, config: Mapping[str, Any], folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` with float32 master weights; the folder must exist."""
    folder = Path(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_model(folder: str | Path) -> SmallModel:
    """Read a folder that :func:`save_model` wrote.

    Raises
    ------
    ValueError
        If the config is of another network or the tensors are not those it needs.
    """
    folder = Path(folder)
    raw = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    config = ModelConfig.from_hf(raw, tensors, ternary="quantization_config" in raw or False)
    config.check_names(tensors)
    model = SmallModel(config)
    model.load_state_dict(tensors)
    return model.eval()
