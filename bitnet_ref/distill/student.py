"""A full-precision model of ``transformers`` made into a student of [BitDistill]: SubLN and ternary linear layers.

>>> student = AutoModelForCausalLM.from_pretrained(folder)
>>> insert_subln(student)
>>> ternarise(student)
>>> save_student(student, "student", ternary=True)

The folder opens in :mod:`bitnet_ref.formats` and runs on the kernels. Families: Llama (SmolLM2), Qwen2, Qwen3,
Gemma 3 (text).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bitnet_ref.distill.bitlinear import BitLinear

__all__ = [
    "PLACEMENTS",
    "NormedLinear",
    "Relations",
    "capture_hidden",
    "capture_qkv",
    "insert_subln",
    "save_student",
    "ternarise",
]

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM")

_LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)

PLACEMENTS = {"output-projections": ("self_attn.o_proj", "mlp.down_proj"), "every-linear": _LINEARS}
"""Where SubLN goes: as in [BitDistill, Eq. 4-5], or before each of the seven layers, as in the authors' code."""

_CHECKPOINT_NAMES = {
    "self_attn.o_proj.norm.": "self_attn.attn_sub_norm.",
    "mlp.down_proj.norm.": "mlp.ffn_sub_norm.",
    ".linear.": ".",
}


class NormedLinear(nn.Module):
    """A norm, then a linear layer: SubLN before one projection.

    Parameters
    ----------
    norm, linear : Module
    """

    def __init__(self, norm: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, x: Tensor) -> Tensor:
        """Output of shape (..., M) for x of shape (..., K)."""
        return self.linear(self.norm(x))


@torch.no_grad()
def input_sizes(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, where: str = "output-projections"
) -> dict[str, float]:
    """The median over tokens of the root mean square of what linear layers read: gains with which SubLN keeps it.

    Parameters
    ----------
    model : Module
        A causal language model of one of the families, without SubLN.
    input_ids, attention_mask : tensor of shape (B, T), int64
    where : str
        A key of :data:`PLACEMENTS`.

    Returns
    -------
    dict of str to float
        By the name of the layer.
    """
    _check_placement(model, where)
    found: dict[str, float] = {}
    with ExitStack() as hooks:
        for name, block, path in _linears(model, PLACEMENTS[where]):

            def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                sizes = inputs[0].float().square().mean(-1).sqrt()  # (B, T)
                # The median: in some layers the first token of a text is a thousand times as large as all others.
                found[name] = float(sizes[attention_mask.bool()].median())

            hooks.callback(block.get_submodule(path).register_forward_pre_hook(note).remove)
        training = model.training
        model.eval()
        model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        model.train(training)
    return found


def insert_subln(
    model: nn.Module, where: str = "output-projections", gains: Mapping[str, float] | None = None
) -> list[str]:
    """Put a norm before linear layers, in place; of unit gain unless `gains` says otherwise.

    Parameters
    ----------
    model : Module
        A causal language model of one of the families.
    where : str
        A key of :data:`PLACEMENTS`.
    gains : mapping of str to float, optional
        One number for all columns, by the name of the layer, as :func:`input_sizes` gives them.

    Returns
    -------
    list of str
        Names of the layers that have a norm now.

    Raises
    ------
    ValueError
        If the family or `where` is unknown, or a layer has its norm already.

    Notes
    -----
    The norm is of the model's own class with its epsilon. Inserted into a trained network it *changes* it, although its
    gain is 1: each token's input is divided by its root mean square, so the output of ``o_proj`` and ``down_proj`` has
    lost its size, and with it their share in the residual stream. On the input of a following :class:`BitLinear` the
    division alone does nothing but to the scale. [BitDistill] lets continued pre-training repair this. With the usual
    size of the input as its gain, most tokens keep theirs, and little is to be repaired.
    """
    _check_placement(model, where)
    found = []
    for name, block, path in _linears(model, PLACEMENTS[where]):
        linear = block.get_submodule(path)
        if isinstance(linear, NormedLinear):
            raise ValueError(f"{name} must not have a norm before it yet, but it has")
        like = block.input_layernorm
        eps = like.eps if hasattr(like, "eps") else like.variance_epsilon
        norm = type(like)(linear.in_features, eps=eps).to(like.weight.device, like.weight.dtype)
        if gains is not None:
            norm.weight.data += gains[name] - 1  # from 1, or in Gemma from 0, which stands for 1
        block.set_submodule(path, NormedLinear(norm, linear))
        found.append(name)
    return found


def ternarise(model: nn.Module, quantizer: str = "absmean", block: int = 256) -> list[str]:
    """Make every linear layer of the blocks a :class:`BitLinear` with the same master weight, in place.

    Embedding and head stay in full precision, as in [2B4T] and [BitDistill], and so do the biases of Qwen2.

    Parameters
    ----------
    model : Module
    quantizer, block
        Of :class:`BitLinear`.

    Returns
    -------
    list of str
        Names of the layers.

    Raises
    ------
    ValueError
        If the family is unknown, or a layer has a bias in a family without, or as :class:`BitLinear`.
    """
    _check_family(model)
    found = []
    for name, parent, path in _linears(model, _LINEARS):
        layer = parent.get_submodule(path)
        inner = f"{path}.linear" if isinstance(layer, NormedLinear) else path
        linear = parent.get_submodule(inner)
        has_bias = getattr(linear, "bias", None) is not None
        if has_bias and type(model).__name__ != "Qwen2ForCausalLM":
            raise ValueError(f"a ternary layer has no bias in this family, {name} has one")
        ternary = BitLinear(linear.in_features, linear.out_features, has_bias, quantizer, block)
        ternary.weight = nn.Parameter(linear.weight.detach().float())
        if has_bias:
            ternary.bias = nn.Parameter(linear.bias.detach().float())
        parent.set_submodule(inner, ternary)
        found.append(name)
    return found


def save_student(model: nn.Module, folder: str | Path, *, ternary: bool) -> None:
    """Write ``config.json`` and ``model.safetensors`` with float32 master weights; the folder is made if missing.

    Parameters
    ----------
    model : Module
    folder : path
    ternary : bool
        Whether the network runs with ternary layers. They are rounded when it is opened, not here.

    Raises
    ------
    ValueError
        If `ternary` is not what the layers are, or SubLN is before other layers than the two that checkpoints know, or
        the quantiser is not the one that files are opened with.
    """
    _check_family(model)
    kinds = {isinstance(module, BitLinear) for name, module in model.named_modules() if _is_linear(name, module)}
    if kinds != {ternary}:
        raise ValueError(f"ternary={ternary} must say what all linear layers of the blocks are, and it does not")
    others = {m.quantizer for m in model.modules() if isinstance(m, BitLinear)} - {"absmean"}
    if others:
        raise ValueError(f"opening a checkpoint makes it ternary by absmean, one scale a matrix, got {others}")
    tensors = {}
    for name, value in model.state_dict().items():
        for ours, theirs in _CHECKPOINT_NAMES.items():
            name = name.replace(ours, theirs)
        if name.endswith("_proj.norm.weight"):
            raise ValueError(f"checkpoints have names for SubLN before o_proj and down_proj only, got {name}")
        tensors[name] = value.detach().float().contiguous()
    config = model.config.to_dict()
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    if ternary:
        entry = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
        config["quantization_config"] = entry
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ".model.safetensors", metadata={"format": "pt"})
    (folder / ".config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("model.safetensors", "config.json"):
        os.replace(folder / f".{name}", folder / name)


class Relations:
    """Queries, keys and values of one layer in the last forward pass; see :func:`capture_qkv`.

    Attributes
    ----------
    q, k, v : tensor of shape (B, T, heads * head_dim)
        All heads side by side; k and v have the key/value heads.
    """

    q: Tensor
    k: Tensor
    v: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.q, self.k, self.v))


@contextmanager
def capture_qkv(model: nn.Module, layer: int, *, after_rope: bool = False) -> Iterator[Relations]:
    """Keep what [BitDistill, Eq. 10-12] relates: queries, keys and values of one layer.

    Parameters
    ----------
    model : Module
    layer : int
        From 0; a negative one counts from the end.
    after_rope : bool
        Take queries and keys after their rotation, as the authors' code does, instead of before it.

    Yields
    ------
    Relations
        Filled by each forward pass inside the block.

    Raises
    ------
    ValueError
        If the family is unknown, or there is no such layer.

    Notes
    -----
    Where a model has norms of queries and keys (Qwen3, Gemma 3) these come after them. Recomputation of a block, as
    gradient checkpointing does it, runs the hooks again and replaces the tensors by equal ones, after the loss was
    made from the first: the gradient is right, but those first tensors are kept.
    """
    _check_family(model)
    blocks = model.model.layers
    if not -len(blocks) <= layer < len(blocks):
        raise ValueError(f"the model has {len(blocks)} layers, got layer {layer}")
    attention = blocks[layer].self_attn
    kept = Relations()

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # A projection gives (B, T, H * D), a norm of heads (B, T, H, D), and in Gemma (B, H, T, D).
            heads_first = output.ndim == 4 and type(model).__name__ == "Gemma3ForCausalLM"
            setattr(kept, name, (output.transpose(1, 2) if heads_first else output).flatten(2))

        return hook

    def rotate(module: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
        cos, sin = named["position_embeddings"] if "position_embeddings" in named else arguments[1]  # (B or 1, T, D)
        for name in ("q", "k"):
            a = getattr(kept, name).unflatten(2, (-1, cos.shape[-1]))  # (B, T, H, D)
            first, second = a.chunk(2, -1)
            turned = a * cos.unsqueeze(2) + torch.cat((-second, first), -1) * sin.unsqueeze(2)
            setattr(kept, name, turned.flatten(2))

    hooks = []
    try:
        for name in "qkv":
            source = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")
            hooks.append(source.register_forward_hook(keep(name)))
        if after_rope:
            hooks.append(attention.register_forward_hook(rotate, with_kwargs=True))
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def capture_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """Keep the residual stream behind every block.

    Parameters
    ----------
    model : Module

    Yields
    ------
    list of tensors of shape (B, T, hidden)
        One for each block, replaced by each forward pass inside the block of ``with``.

    Raises
    ------
    ValueError
        If the family is unknown.
    """
    _check_family(model)
    blocks = model.model.layers
    kept: list[Tensor] = [torch.empty(0)] * len(blocks)
    with ExitStack() as hooks:
        for i, block in enumerate(blocks):

            def keep(module: nn.Module, inputs: Any, output: Tensor, i: int = i) -> None:
                kept[i] = output

            hooks.callback(block.register_forward_hook(keep).remove)
        yield kept


def _check_placement(model: nn.Module, where: str) -> None:
    _check_family(model)
    if where not in PLACEMENTS:
        raise ValueError(f"SubLN goes to one of {', '.join(PLACEMENTS)}, got {where!r}")


def _check_family(model: nn.Module) -> None:
    if type(model).__name__ not in FAMILIES:
        raise ValueError(f"a student can be made of {', '.join(FAMILIES)}, got {type(model).__name__}")


def _linears(model: nn.Module, paths: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, str]]:
    """Name of a layer, its block, and its path in the block."""
    for i, block in enumerate(model.model.layers):
        for path in paths:
            yield f"model.layers.{i}.{path}", block, path


def _is_linear(name: str, module: nn.Module) -> bool:
    return name.startswith("model.layers.") and isinstance(module, (nn.Linear, BitLinear))
