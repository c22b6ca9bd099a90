"""The full-precision model and its tokenizer, from a folder or with random weights."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn

from bitnet_ref.distill import synthetic
from bitnet_ref.distill.config import Model
from bitnet_ref.distill.student import FAMILIES
from bitnet_ref.errors import FormatError

transformers.utils.logging.disable_progress_bar()  # of its own

__all__ = ["fingerprint", "load_base", "load_tokenizer", "save_tokenizer"]

_CONFIGS = {"Llama": "LlamaConfig", "Qwen2": "Qwen2Config", "Qwen3": "Qwen3Config", "Gemma3": "Gemma3TextConfig"}


def load_tokenizer(model: Model) -> Any:
    """The tokenizer that a configuration names.

    Raises
    ------
    FormatError
        If it cannot be read.
    """
    if model.tokenizer == "synthetic":
        return synthetic.tokenizer()
    folder = model.tokenizer or model.folder
    try:
        if model.gguf_file and not model.tokenizer:
            return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=model.gguf_file, local_files_only=True)
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise FormatError(f"{folder} must have a tokenizer that transformers can read: {_short(error)}") from error


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write ``tokenizer.json``, and what else the tokenizer has, beside a model."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    else:
        tokenizer.save(str(Path(folder) / "tokenizer.json"))


def load_base(model: Model, seed: int, vocabulary: int) -> nn.Module:
    """The full-precision model, float32.

    Parameters
    ----------
    model : Model
    seed : int
        Of random weights.
    vocabulary : int
        Tokens of the tokenizer: the size of random models, and what a model of a folder must have at least.

    Returns
    -------
    Module
        A causal language model of one of the families that students can be made of.

    Raises
    ------
    FormatError
        If the folder has no model of such a family, or lacks weights, or has a head of its own although its
        configuration says that embedding and head are one.
    ValueError
        If the vocabulary does not fit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 calls what it has deprecated itself
        found = _from_folder(model) if model.folder else _random(model, seed, vocabulary)
    found.set_attn_implementation(model.attention)
    if found.config.vocab_size < vocabulary:
        raise ValueError(
            f"a model must have a row for each token, it has {found.config.vocab_size} and the tokenizer {vocabulary}"
        )
    return found


def fingerprint(model: Model) -> str:
    """SHA-256, in hex, of the weight files of a folder; of nothing for random weights."""
    digest = hashlib.sha256()
    if model.folder:
        folder = Path(model.folder)
        names = [model.gguf_file] if model.gguf_file else sorted(p.name for p in folder.glob("*.safetensors"))
        for name in names:
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _random(model: Model, seed: int, vocabulary: int) -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config_class = getattr(transformers, _CONFIGS[model.family])
    known = set(config_class().to_dict())
    for key in model.sizes:
        if key not in known:
            raise ValueError(f"model.sizes.{key} is no key of {config_class.__name__}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = getattr(transformers, f"{model.family}ForCausalLM")(config_class(**(sizes | dict(model.sizes))))
    return made.float()


def _from_folder(model: Model) -> nn.Module:
    folder = Path(model.folder)
    if not folder.is_dir():
        raise FormatError(f"model.folder must be a folder with a model, {folder} is none")
    gguf = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **gguf)
    except Exception as error:
        raise FormatError(f"{folder} must have a model that transformers knows: {_short(error)}") from error
    names = list(config.architectures or [])
    if not gguf and not set(names) & set(FAMILIES):
        raise FormatError(
            f"a student can be made of {', '.join(FAMILIES)}, {folder} has {', '.join(names) or config.model_type}"
        )
    try:
        found, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, **gguf
        )
    except Exception as error:
        raise FormatError(f"{folder} must have the weights of its model: {_short(error)}") from error
    if type(found).__name__ not in FAMILIES:
        raise FormatError(f"a student can be made of {', '.join(FAMILIES)}, {folder} has {type(found).__name__}")
    if gguf and hasattr(found.config, "quantization_config"):
        del found.config.quantization_config  # its weights are floats now, and are saved as such
    missing = sorted(info["missing_keys"])
    if missing:
        raise FormatError(
            f"{folder} must have all weights of its model, {missing[0]} is missing"
            + (": a model whose head is its embedding says tie_word_embeddings" if "lm_head.weight" in missing else "")
        )
    if found.config.tie_word_embeddings and not gguf:
        _check_tied(folder)
    return found


def _check_tied(folder: Path) -> None:
    heads = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in ("lm_head.weight", "model.embed_tokens.weight"):
                    heads[name] = file.get_tensor(name)
    if len(heads) == 2 and not torch.equal(*heads.values()):
        raise FormatError(
            f"{folder} says tie_word_embeddings, but its lm_head.weight is not its model.embed_tokens.weight: one of "
            "them would be lost"
        )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
