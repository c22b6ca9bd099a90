"""``tokenizer.*`` metadata of GGUF from the tokenizer files of a Hugging Face folder.

Byte-level BPE only, and only with a pre-tokenizer that llama.cpp has a name for: without the right name it splits text
in another way and the model reads other tokens, with no message. Whatever the kind, tokenizer.json itself goes into
``tokenizer.huggingface.json``, so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import TokenType

from bitnet_ref.errors import FormatError
from bitnet_ref.formats.checkpoint import load_json_object

__all__ = ["pre_tokenizer_name", "tokenizer_metadata"]

# The pattern of a Split step -> llama.cpp's name (llama-vocab.cpp has the same patterns under these names).
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}


def pre_tokenizer_name(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name of a ``pre_tokenizer`` of tokenizer.json, or None if it has none known here."""
    if not isinstance(pre_tokenizer, dict):
        return None
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if not (isinstance(steps, list) and steps and all(isinstance(step, dict) for step in steps)):
        return None
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", False) or len(before) > 1:
        return None
    own_pattern = last.get("use_regex", True)  # GPT-2's
    if not before:
        return "gpt-2" if own_pattern else None
    (step,) = before
    if step.get("type") == "Digits" and step.get("individual_digits") is True and own_pattern:
        return "smollm"
    if (
        step.get("type") == "Split"
        and step.get("behavior") == "Isolated"
        and not step.get("invert")
        and not own_pattern
    ):
        pattern = step.get("pattern")
        return _PATTERNS.get(pattern.get("Regex")) if isinstance(pattern, dict) else None
    return None


def tokenizer_metadata(
    assets: Mapping[str, bytes], config: Mapping[str, Any], vocab_size: int
) -> tuple[dict[str, Any], list[str]]:
    """GGUF metadata of a tokenizer, and notes on what is missing.

    Parameters
    ----------
    assets : files by name: tokenizer.json, tokenizer_config.json, chat_template.jinja
    config : the model's configuration, for the special tokens
    vocab_size : rows of the embedding; tokens beyond the tokenizer's become unused ones

    Raises
    ------
    FormatError
        If a file is not the JSON it should be, or has more tokens than the embedding has rows.
    """
    metadata: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    if "tokenizer_config.json" in assets:
        settings = load_json_object(Path("tokenizer_config.json"), assets["tokenizer_config.json"])
    template = settings.get("chat_template")
    if "chat_template.jinja" in assets:
        template = assets["chat_template.jinja"].decode(errors="surrogateescape")
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = config.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size:
            metadata[f"tokenizer.ggml.{name}_token_id"] = value
    if "tokenizer.json" not in assets:
        return metadata, ["The source has no tokenizer.json, so the GGUF file has no tokenizer."]
    text = assets["tokenizer.json"]
    metadata["tokenizer.huggingface.json"] = text.decode(errors="surrogateescape")
    tokenizer = load_json_object(Path("tokenizer.json"), text)
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    pre = pre_tokenizer_name(tokenizer.get("pre_tokenizer"))
    if not isinstance(vocab, dict) or model.get("type") != "BPE" or model.get("byte_fallback") or pre is None:
        return metadata, [
            "The tokenizer is not byte-level BPE with a pre-tokenizer that has a llama.cpp name here; the GGUF file "
            "holds it as tokenizer.huggingface.json only, which llama.cpp does not read."
        ]
    tokens: list[str | None] = [None] * vocab_size
    types = np.full(vocab_size, TokenType.UNUSED, np.int32)

    def put(token: Any, number: Any, kind: TokenType) -> None:
        if not (isinstance(token, str) and isinstance(number, int) and 0 <= number < vocab_size):
            raise FormatError(f"tokenizer.json: tokens must have numbers below {vocab_size}, got {token!r}: {number!r}")
        tokens[number], types[number] = token, kind

    for token, number in vocab.items():
        put(token, number, TokenType.NORMAL)
    for added in _list("added_tokens", tokenizer.get("added_tokens")):
        if not isinstance(added, dict):
            raise FormatError("tokenizer.json: added_tokens must be objects")
        put(
            added.get("content"), added.get("id"), TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        )
    merges = [_merge(merge) for merge in _list("model.merges", model.get("merges"))]
    metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": _adds_bos(tokenizer.get("post_processor"), settings, tokens, config),
    }
    return metadata, []


def _list(what: str, value: Any) -> list[Any]:
    """The list that a part of tokenizer.json is; empty if the part is not there."""
    if value is not None and not isinstance(value, list):
        raise FormatError(f"tokenizer.json: {what} must be a list, got {type(value).__name__}")
    return value or []


def _merge(merge: Any) -> str:
    parts = merge if isinstance(merge, list) else [merge]
    if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
        raise FormatError(f"tokenizer.json: merges must be two tokens each, got {str(merge)[:100]!r}")
    return " ".join(parts)


def _adds_bos(
    post_processor: Any, settings: Mapping[str, Any], tokens: list[str | None], config: Mapping[str, Any]
) -> bool:
    """Whether encoding puts the begin-of-text token in front: by the template of tokenizer.json, else its settings."""
    steps = [post_processor] if isinstance(post_processor, dict) else []
    if steps and steps[0].get("type") == "Sequence":
        steps = [step for step in _list("processors", steps[0].get("processors")) if isinstance(step, dict)]
    bos = config.get("bos_token_id")
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            first = (_list("single", step.get("single")) or [{}])[0]
            special = first.get("SpecialToken") if isinstance(first, dict) else None
            if not isinstance(special, dict) or type(bos) is not int or not 0 <= bos < len(tokens):
                return False
            return tokens[bos] is not None and special.get("id") == tokens[bos]
    return settings.get("add_bos_token") is True
