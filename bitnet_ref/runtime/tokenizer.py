"""Text to token numbers and back, from tokenizer.json, a SentencePiece or tiktoken model, or GGUF metadata.

Encoding is done by the ``tokenizers`` library. SentencePiece and tiktoken choose the pair whose *union* has the best
score; ``tokenizers`` wants a ranked list of pairs, so every way to split a piece into two pieces becomes a pair of the
rank of the whole. Decoding is done here: each token stands for fixed bytes, so that text is the UTF-8 of their
concatenation, whole or as a stream.

Nothing is guessed. A file that does not say which pre-tokenizer it needs, or names one that is not known here, is
refused: with the wrong one a model reads other tokens than it was trained on and no message says so.

Hostile input. Files are compared with fixed limits before they are parsed, and the work of building merges is bounded
by the longest piece. Regular expressions of a tokenizer.json are run by Oniguruma, which ends a match after ten million
steps; that, and any other panic of the library, becomes an error.
"""

from __future__ import annotations

import binascii
import codecs
import math
import operator
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from bitnet_ref.errors import FormatError
from bitnet_ref.formats import open_checkpoint, read_gguf_metadata
from bitnet_ref.formats.checkpoint import Checkpoint, load_json_object

__all__ = [
    "PRE_TOKENIZERS",
    "Tokenizer",
    "load_tokenizer",
    "tokenizer_from_checkpoint",
    "tokenizer_from_files",
    "tokenizer_from_gguf",
]

_MAX_FILE_BYTES = 256 << 20
_MAX_TOKENS = 1 << 20  # the largest vocabularies in use have 262,144
_MAX_PIECE_CHARACTERS = 256  # of a piece that is split into pairs; Llama-3's longest is 128 spaces
_MAX_VOCABULARY_CHARACTERS = 4 << 20  # Llama-3's has 0.9 million

# Patterns of pre-tokenizers by llama.cpp's names; each splits what the one before it left. Those of llama-bpe and qwen2
# are as in the tokenizer.json of these models, the others as in llama-vocab.cpp.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (_WORDS + r"\p{N}{1,3}" + _REST,)
_QWEN2 = (_WORDS + r"\p{N}" + _REST,)
_DIGITS = (r"\p{N}", _GPT2)

PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "mpt": (_GPT2,),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "falcon-h1": _LLAMA3,
    "falcon_e": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
}
"""Patterns of each pre-tokenizer that can be named here, in the order in which they are applied."""

# Control tokens that end a turn. Files often declare only the end of text, and then a reply would not end.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")

_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)

_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]{1,7}\r?(?:\n|$)")
_BYTE_TOKEN = re.compile(r"<0x([\da-fA-F]{2})>", re.ASCII)
_REPLACEMENT = "\ufffd".encode()

# Token types, the same numbers in SentencePiece and in GGUF.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def _byte_characters() -> dict[int, str]:
    """GPT-2's character for each byte: the byte itself where it prints in Latin-1, else the next one from U+0100."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printing)
    return {byte: chr(byte) for byte in printing} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


_CHARACTER_OF_BYTE = _byte_characters()
_BYTE_OF_CHARACTER = {character: byte for byte, character in _CHARACTER_OF_BYTE.items()}


class Tokenizer:
    """A tokenizer of a decoder-only model, made by the functions of this module.

    Attributes
    ----------
    bos_id : int or None
        Token that begins a text.
    eos_ids : tuple of int
        Tokens that end generation: the declared ones first, then control tokens that are known to end a turn.
    adds_bos : bool
        Whether a text begins with ``bos_id`` if the caller does not say.
    chat_template : str or None
        The Jinja source that came with the tokenizer.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        byte_level: bool,
        strips_space: bool,
        bos_id: int | None,
        eos_ids: Iterable[int],
        adds_bos: bool,
        chat_template: str | None,
        raw: Mapping[int, bytes] | None = None,
    ) -> None:
        self._inner = inner
        self._lock = threading.Lock()  # whether special tokens are recognised is a state of the inner tokenizer
        self._strips_space = strips_space
        self._vocabulary: dict[str, int] = inner.get_vocab(True)
        self._special = frozenset(n for n, token in inner.get_added_tokens_decoder().items() if token.special)
        bytes_of = _byte_level_bytes if byte_level else _piece_bytes
        self._bytes = {number: bytes_of(token) for token, number in self._vocabulary.items()} | dict(raw or {})
        self._missing_bytes: frozenset[int] = frozenset()
        if byte_level and inner.model.unk_token is None:
            known = inner.get_vocab(False)
            self._missing_bytes = frozenset(b for b, c in _CHARACTER_OF_BYTE.items() if c not in known)
        ends = (self._vocabulary.get(token) for token in _END_OF_TURN)
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys([*eos_ids, *(end for end in ends if end in self._special)]))
        self.adds_bos = adds_bos
        self.chat_template = chat_template

    @property
    def vocabulary(self) -> dict[str, int]:
        """Number of each token, by the token as it is written in the file; a copy."""
        return dict(self._vocabulary)

    @property
    def bos_token(self) -> str | None:
        """The begin-of-text token as text, as chat templates want it."""
        return None if self.bos_id is None else self._inner.id_to_token(self.bos_id)

    @property
    def eos_token(self) -> str | None:
        """The first end token as text, as chat templates want it."""
        return self._inner.id_to_token(self.eos_ids[0]) if self.eos_ids else None

    def encode(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Token numbers of a text.

        Parameters
        ----------
        text : str
        add_bos : bool, optional
            Whether ``bos_id`` comes first. By default as the file says, and not twice if the text begins with it.
        special : bool
            Whether special tokens written in the text, such as ``<|eot_id|>``, count as these tokens. True for text
            that a chat template made; False, the default, for text that a stranger wrote.

        Raises
        ------
        TypeError
            If text is not a string.
        ValueError
            If text holds a lone surrogate or a byte that the vocabulary has no token for (it would be lost), or
            add_bos is True and there is no such token.
        FormatError
            If the tokenizer's own pattern gives up on this text.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be valid Unicode, character {error.start} is a lone surrogate") from None
        if self._missing_bytes and (lost := self._missing_bytes.intersection(data)):
            raise ValueError(
                f"every byte of the text must have a token, this vocabulary has none for 0x{min(lost):02x}"
            )
        if add_bos and self.bos_id is None:
            raise ValueError("add_bos needs a begin-of-text token, this tokenizer has none")
        with self._lock, _library_errors("tokenizer"):
            self._inner.encode_special_tokens = not special
            numbers = self._inner.encode(text, add_special_tokens=False).ids
        if add_bos is None:
            add_bos = self.adds_bos and numbers[:1] != [self.bos_id]
        return [self.bos_id, *numbers] if add_bos else numbers

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; those of U+FFFD for a number without a token (padding of the embedding).

        Raises
        ------
        ValueError
            If the number is negative.
        """
        number = operator.index(token)
        if number < 0:
            raise ValueError(f"token numbers must not be negative, got {number}")
        return self._bytes.get(number, _REPLACEMENT)

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Text of a whole sequence; bytes that are not UTF-8 become U+FFFD.

        Parameters
        ----------
        tokens : iterable of int
        special : bool
            Whether special tokens are written out; by default they are left out.

        Notes
        -----
        The space that SentencePiece puts in front of a text is taken off again.
        """
        text = b"".join(self._chunks(tokens, special)).decode(errors="replace")
        return text.removeprefix(" ") if self._strips_space else text

    def stream(self, tokens: Iterable[int], *, special: bool = False) -> Iterator[str]:
        """Text of tokens as they come, for a text that goes on: yields at whole characters only, never empty strings.

        The pieces together are ``decode`` of all tokens, but for the space in front that SentencePiece adds to a text's
        beginning: a continuation keeps it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for chunk in self._chunks(tokens, special):
            if text := decoder.decode(chunk):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def _chunks(self, tokens: Iterable[int], special: bool) -> Iterator[bytes]:
        for token in tokens:
            if special or token not in self._special:
                yield self.token_bytes(token)


def load_tokenizer(path: str | os.PathLike[str], *, pre_tokenizer: str | None = None) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder, a checkpoint file, or a tokenizer file.

    Parameters
    ----------
    path : a folder with tokenizer.json or tokenizer.model, a GGUF file, a file of our packed form, or one of these two
        tokenizer files alone (it then knows no special tokens that only tokenizer_config.json names)
    pre_tokenizer : one of ``PRE_TOKENIZERS``, for files that do not name theirs: a GGUF file without
        ``tokenizer.ggml.pre``, a tiktoken rank file

    Raises
    ------
    FormatError
        If the file is missing, malformed, or needs something that is not known here; the message names the key.
    ValueError
        If pre_tokenizer is not a known name, or is given for a tokenizer that brings its own.
    """
    path = Path(path)
    if path.is_dir():
        files = {name: _read(path / name) for name in _COMPANIONS if (path / name).is_file()}
        return tokenizer_from_files(files, path, pre_tokenizer=pre_tokenizer)
    try:
        if not path.is_file():
            raise FormatError(f"{path} must be a folder or a regular file")
        with path.open("rb") as stream:
            head = stream.read(9)
            file_bytes = os.fstat(stream.fileno()).st_size
    except (OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} must be readable: {getattr(error, 'strerror', None) or error}") from error
    if head[:4] == b"GGUF":
        return tokenizer_from_gguf(read_gguf_metadata(path), path, pre_tokenizer=pre_tokenizer)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < file_bytes:  # eight ASCII bytes would be far more
        return tokenizer_from_checkpoint(open_checkpoint(path), pre_tokenizer=pre_tokenizer)
    name = "tokenizer.json" if head.lstrip()[:1] == b"{" else "tokenizer.model"
    return tokenizer_from_files({name: _read(path)}, path, pre_tokenizer=pre_tokenizer)


def tokenizer_from_checkpoint(checkpoint: Checkpoint, *, pre_tokenizer: str | None = None) -> Tokenizer:
    """The tokenizer among the files of an opened checkpoint, else in its GGUF metadata.

    Raises
    ------
    FormatError, ValueError
        As :func:`load_tokenizer`.
    """
    if any(name in checkpoint.assets for name in ("tokenizer.json", "tokenizer.model")):
        return tokenizer_from_files(
            checkpoint.assets, checkpoint.path, config=checkpoint.config, pre_tokenizer=pre_tokenizer
        )
    return tokenizer_from_gguf(checkpoint.gguf_metadata, checkpoint.path, pre_tokenizer=pre_tokenizer)


def tokenizer_from_files(
    files: Mapping[str, bytes],
    where: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    pre_tokenizer: str | None = None,
) -> Tokenizer:
    """The tokenizer in the files of a Hugging Face folder.

    Parameters
    ----------
    files : contents by name. tokenizer.json is used if there is one, else tokenizer.model; the others give special
        tokens and the chat template
    where : what error messages call the files
    config : the model's configuration, if it is not among the files as config.json
    pre_tokenizer : for a tiktoken rank file

    Raises
    ------
    FormatError, ValueError
        As :func:`load_tokenizer`.
    """
    where = Path(where)
    settings = _json(files, where, "tokenizer_config.json")
    config = _json(files, where, "config.json") if config is None else config
    declared = {**_json(files, where, "special_tokens_map.json"), **settings}
    rank_file = "tokenizer.json" not in files and _RANK_LINE.match(files.get("tokenizer.model", b"")) is not None
    if pre_tokenizer is not None and not rank_file:
        raise ValueError(f"pre_tokenizer is for files that do not name theirs, {where} brings its own")
    default_bos = default_eos = None
    if "tokenizer.json" in files:
        inner, byte_level, strips_space, prefix = _read_json(files["tokenizer.json"], where)
        adds_bos = bool(prefix) or settings.get("add_bos_token") is True
        default_bos = prefix[0] if prefix else None
    elif rank_file:
        inner = _read_ranks(files["tokenizer.model"], where, _extra_tokens(files, where, settings), pre_tokenizer)
        byte_level, strips_space = True, False
        adds_bos = settings.get("add_bos_token") is True
    elif "tokenizer.model" in files:
        inner, strips_space, default_bos, default_eos = _read_sentencepiece(
            files["tokenizer.model"], where, _extra_tokens(files, where, settings)
        )
        byte_level = False
        # The file itself does not say; programs that read it, llama.cpp among them, begin with the token.
        adds_bos = settings.get("add_bos_token", default_bos is not None) is True
    else:
        raise FormatError(f"{where} must have tokenizer.json or tokenizer.model")

    vocabulary = inner.get_vocab(True)

    def of_text(key: str) -> list[int]:
        value = declared.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            return []
        if not isinstance(text, str) or text not in vocabulary:
            raise FormatError(f"{where}: {key} must be a token of the vocabulary, got {_shown(repr(text))}")
        return [vocabulary[text]]

    bos = [*of_text("bos_token"), *_numbers(config, "bos_token_id", where)]
    bos_id = bos[0] if bos else default_bos
    if "tokenizer.json" in files and default_bos is not None and bos_id != default_bos:
        raise FormatError(f"{where}: texts begin with token {default_bos}, but the bos_token is token {bos_id}")
    if adds_bos and bos_id is None:
        raise FormatError(f"{where}: add_bos_token needs a bos_token, there is none")
    eos_ids = [
        *of_text("eos_token"),
        *_numbers(_json(files, where, "generation_config.json"), "eos_token_id", where),
        *_numbers(config, "eos_token_id", where),
    ]
    if not eos_ids and default_eos is not None:
        eos_ids = [default_eos]
    numbers = set(vocabulary.values())
    for number in (*eos_ids, *([] if bos_id is None else [bos_id])):
        if number not in numbers:
            raise FormatError(f"{where}: bos_token_id and eos_token_id must be numbers of tokens, {number} is none")
    return Tokenizer(
        inner,
        byte_level=byte_level,
        strips_space=strips_space,
        bos_id=bos_id,
        eos_ids=eos_ids,
        adds_bos=adds_bos,
        chat_template=_chat_template(files, where, settings),
    )


def tokenizer_from_gguf(
    metadata: Mapping[str, Any], where: str | os.PathLike[str], *, pre_tokenizer: str | None = None
) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF file.

    Parameters
    ----------
    metadata : complete values, as ``formats.read_gguf_metadata`` gives them
    where : what error messages call the file
    pre_tokenizer : used instead of ``tokenizer.ggml.pre``

    Raises
    ------
    FormatError, ValueError
        As :func:`load_tokenizer`.

    Notes
    -----
    A tokenizer.json under ``tokenizer.huggingface.json`` is used before the lists, which say less than it.
    """
    where = Path(where)
    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    ids = {}
    for key in ("bos", "eos", "eot", "eom"):
        if (value := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            ids[key] = value
    if isinstance(text := metadata.get("tokenizer.huggingface.json"), str):
        files = {"tokenizer.json": text.encode(errors="surrogateescape")}
        if template is not None:
            files["chat_template.jinja"] = template.encode(errors="surrogateescape")
        config: dict[str, Any] = {"eos_token_id": [ids[key] for key in ("eos", "eot", "eom") if key in ids]}
        if "bos" in ids:
            config["bos_token_id"] = ids["bos"]
        return tokenizer_from_files(files, where, config=config, pre_tokenizer=pre_tokenizer)

    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise FormatError(f"{where}: tokenizer.ggml.model must be gpt2 or llama, got {_shown(repr(kind))}")
    tokens = _list_of_strings(metadata, "tokenizer.ggml.tokens", where)
    if not 0 < len(tokens) <= _MAX_TOKENS:
        raise FormatError(f"{where}: tokenizer.ggml.tokens must have 1 to {_MAX_TOKENS:,} tokens, got {len(tokens):,}")
    n = len(tokens)
    for key, value in ids.items():
        if not isinstance(value, int) or not 0 <= value < n:
            raise FormatError(f"{where}: tokenizer.ggml.{key}_token_id must be below {n:,}, got {_shown(repr(value))}")
    types = _numbers_per_token(metadata, "tokenizer.ggml.token_type", n, where)
    types = [_NORMAL] * n if types is None else types
    if metadata.get("tokenizer.ggml.add_eos_token") is True:
        raise FormatError(f"{where}: tokenizer.ggml.add_eos_token must not be true, this is no decoder's prompt")

    # Empty tokens and those with bytes that are not UTF-8 cannot come from text, but a model may still produce them.
    raw = {i: token.encode(errors="surrogateescape") for i, token in enumerate(tokens) if not _is_text(token)}
    kept = {i: token for i, token in enumerate(tokens) if i not in raw}
    if kind == "gpt2":
        pre = metadata.get("tokenizer.ggml.pre") if pre_tokenizer is None else pre_tokenizer
        patterns = _patterns(pre, f"{where}: tokenizer.ggml.pre", given=pre_tokenizer is not None)
        merges = []
        for merge in _list_of_strings(metadata, "tokenizer.ggml.merges", where):
            cut = merge.find(" ", 1)
            if cut < 0 or cut == len(merge) - 1:
                raise FormatError(f"{where}: tokenizer.ggml.merges must be pairs, got {_shown(repr(merge))}")
            merges.append((merge[:cut], merge[cut + 1 :]))
        if _CHARACTER_OF_BYTE[0x20] not in kept.values():
            raise FormatError(
                f"{where}: tokenizer.ggml.model gpt2 needs tokens of byte-level BPE, there is none for the space"
            )
        inner = _byte_level(where, kept, types, merges, patterns)
        adds_bos = patterns is _LLAMA3  # llama.cpp's default for these names
        strips_space = False
    else:
        if pre_tokenizer is not None:
            raise ValueError(f"pre_tokenizer is for byte-level BPE, {where} has a SentencePiece tokenizer")
        scores = _numbers_per_token(metadata, "tokenizer.ggml.scores", n, where)
        if scores is None:
            raise FormatError(f"{where}: tokenizer.ggml.model llama needs tokenizer.ggml.scores, there are none")
        n_bytes = sum(_BYTE_TOKEN.fullmatch(token) is not None for token in tokens)
        if n_bytes != 256:
            raise FormatError(
                f"{where}: tokenizer.ggml.model llama (SentencePiece) needs the 256 byte tokens <0x00> to <0xFF>, "
                f"found {n_bytes}; byte-level BPE has the model gpt2"
            )
        strips_space = metadata.get("tokenizer.ggml.add_space_prefix", True) is True
        inner = _sentencepiece(where, kept, scores, types, prefix=strips_space, byte_fallback=True)
        adds_bos = True  # llama.cpp's default
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos) is True
    if adds_bos and "bos" not in ids:
        raise FormatError(f"{where}: tokenizer.ggml.bos_token_id must be there, texts begin with that token")
    return Tokenizer(
        inner,
        byte_level=kind == "gpt2",
        strips_space=strips_space,
        bos_id=ids.get("bos"),
        eos_ids=[ids[key] for key in ("eos", "eot", "eom") if key in ids],
        adds_bos=adds_bos,
        chat_template=template,
        raw=raw,
    )


# Building the library's tokenizer -------------------------------------------------------------------------------------


def _byte_level(
    where: Path,
    tokens: Mapping[int, str],
    types: Sequence[int],
    merges: list[tuple[str, str]],
    patterns: tuple[str, ...],
) -> tokenizers.Tokenizer:
    """Byte-level BPE from GPT-2's spelling of the tokens."""
    # Llama-3's vocabulary has tokens that its own merges do not reach: a whole word that is a token stays one.
    model = _bpe(where, tokens, merges, ignore_merges=patterns is _LLAMA3)
    inner = tokenizers.Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    _mark_tokens(where, inner, tokens, types)
    return inner


def _sentencepiece(
    where: Path,
    tokens: Mapping[int, str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    prefix: bool,
    byte_fallback: bool,
) -> tokenizers.Tokenizer:
    """SentencePiece BPE, whose better score is the larger one."""
    if not all(math.isfinite(score) for score in scores):
        raise FormatError(f"{where}: scores of tokens must be finite")
    # Unused pieces never come out; control and byte pieces are never made from characters.
    numbers = {token: i for i, token in tokens.items() if types[i] in (_NORMAL, _USER_DEFINED)}
    merged = sorted((token for token in numbers if len(token) > 1), key=lambda token: -scores[numbers[token]])
    if len(merged) > 1 and scores[numbers[merged[0]]] == scores[numbers[merged[-1]]]:
        raise FormatError(f"{where}: scores must rank the tokens, they are all {scores[numbers[merged[0]]]}")
    unknown = next((token for i, token in tokens.items() if types[i] == _UNKNOWN), None)
    model = _bpe(
        where,
        tokens,
        _pairs(where, merged, numbers),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )
    inner = tokenizers.Tokenizer(model)
    space = normalizers.Replace(" ", "▁")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    _mark_tokens(where, inner, tokens, types)
    return inner


def _bpe(where: Path, tokens: Mapping[int, str], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    vocabulary = {token: i for i, token in tokens.items()}
    if len(vocabulary) != len(tokens):
        twice = next(token for i, token in tokens.items() if vocabulary[token] != i)
        raise FormatError(f"{where}: tokens must be unique, {_shown(repr(twice))} comes twice")
    with _library_errors(where):
        return models.BPE(vocab=vocabulary, merges=merges, **options)


def _mark_tokens(where: Path, inner: tokenizers.Tokenizer, tokens: Mapping[int, str], types: Sequence[int]) -> None:
    """Say which tokens are special, and which ones are found in text before anything else."""

    def added(*kinds: int) -> list[AddedToken]:
        special = _CONTROL in kinds
        return [AddedToken(t, special=special, normalized=False) for i, t in tokens.items() if types[i] in kinds]

    with _library_errors(where):
        inner.add_special_tokens(added(_CONTROL, _UNKNOWN))
        inner.add_tokens(added(_USER_DEFINED))


def _pairs(where: Path, merged: Iterable[str], numbers: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make each piece from two pieces, in the given order of pieces."""
    pairs = []
    total = 0
    for piece in merged:
        total += len(piece)
        if len(piece) > _MAX_PIECE_CHARACTERS or total > _MAX_VOCABULARY_CHARACTERS:
            raise FormatError(
                f"{where}: pieces must have at most {_MAX_PIECE_CHARACTERS:,} characters each and "
                f"{_MAX_VOCABULARY_CHARACTERS:,} together"
            )
        ways = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        ways = [(left, right) for left, right in ways if left in numbers and right in numbers]
        pairs += sorted(ways, key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
    return pairs


def _patterns(name: Any, key: str, *, given: bool) -> tuple[str, ...]:
    """The patterns of a pre-tokenizer by name."""
    if isinstance(name, str) and name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    known = ", ".join(PRE_TOKENIZERS)
    if given:
        raise ValueError(f"pre_tokenizer must be one of {known}, got {name!r}")
    got = "it is missing" if name is None else f"got {_shown(repr(name))}"
    raise FormatError(
        f"{key} must be one of {known}; {got}. If you know which one the model was trained with (llama-bpe for "
        "Llama-3 and BitNet b1.58 2B4T), give it as pre_tokenizer"
    )


# Files ----------------------------------------------------------------------------------------------------------------


def _read_json(data: bytes, where: Path) -> tuple[tokenizers.Tokenizer, bool, bool, list[int]]:
    """A tokenizer.json: the tokenizer, whether it is byte-level, whether decoding strips a space, tokens in front."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: tokenizer.json must be UTF-8, byte {error.start:,} is not") from None
    where = where if where.name == "tokenizer.json" else where / "tokenizer.json"
    spec = load_json_object(where, text)
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise FormatError(f"{where}: model.type must be BPE, got {_shown(repr(kind))}")
    if model.get("dropout") is not None:
        raise FormatError(f"{where}: model.dropout must be null, else encoding would be random")
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict):
        raise FormatError(f"{where}: model.vocab must be an object")
    added = spec.get("added_tokens") or []
    if not (isinstance(added, list) and all(isinstance(token, dict) for token in added)):
        raise FormatError(f"{where}: added_tokens must be a list of objects")
    for number in [*vocabulary.values(), *(token.get("id") for token in added)]:
        if not (isinstance(number, int) and 0 <= number < _MAX_TOKENS):
            raise FormatError(f"{where}: token numbers must be below {_MAX_TOKENS:,}, got {_shown(repr(number))}")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise FormatError(f"{where}: model.vocab must give each token a number of its own")
    byte_level, strips_space = _decoding(spec.get("decoder"), where)
    with _library_errors(where):
        inner = tokenizers.Tokenizer.from_str(text)
        inner.no_truncation()
        inner.no_padding()  # to a fixed length, it could ask for any amount of memory
        plain = inner.encode("a", add_special_tokens=False).ids
        complete = inner.encode("a").ids
    prefix = complete[: len(complete) - len(plain)]
    if len(prefix) > 1 or complete[len(prefix) :] != plain:
        raise FormatError(
            f"{where}: post_processor must add one token in front of a text or nothing, got {complete[:8]}"
        )
    return inner, byte_level, strips_space, prefix


def _decoding(decoder: Any, where: Path) -> tuple[bool, bool]:
    """Whether a decoder of tokenizer.json is byte-level, and whether it strips the space in front."""
    steps = decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
    if isinstance(steps, list) and all(isinstance(step, dict) for step in steps):
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            return True, False
        if kinds == ["Metaspace"] and steps[0].get("replacement") == "▁":
            return False, steps[0].get("prepend_scheme", "always") != "never"
        replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        rest = [step for step in steps if step not in (replace, strip)]
        if replace in steps and all(step.get("type") in ("ByteFallback", "Fuse") for step in rest):
            return False, strip in steps
    raise FormatError(
        f"{where}: decoder must be ByteLevel, Metaspace, or a Sequence of Replace, ByteFallback, Fuse and Strip as "
        f"SentencePiece needs it, got {_shown(repr(decoder))}"
    )


def _read_ranks(
    data: bytes, where: Path, extra: Mapping[int, tuple[str, bool]], pre_tokenizer: str | None
) -> tokenizers.Tokenizer:
    """A tiktoken rank file: lines of a token in base64 and its rank, which is its number."""
    patterns = _patterns(pre_tokenizer, f"{where}: the pre-tokenizer of a rank file", given=pre_tokenizer is not None)
    lines = data.splitlines()
    if len(lines) > _MAX_TOKENS:
        raise FormatError(f"{where}: a rank file must have at most {_MAX_TOKENS:,} lines, got {len(lines):,}")
    tokens = {}
    for i, line in enumerate(lines):
        if not line:
            continue
        try:
            if _RANK_LINE.fullmatch(line) is None:
                raise ValueError("not of this form")
            text, number = line.split(b" ")
            token = binascii.a2b_base64(text, strict_mode=True)
        except ValueError as error:  # binascii.Error is one
            raise FormatError(
                f"{where}: line {i + 1} must be a token in base64, a space and its rank: {error}"
            ) from None
        if int(number) in tokens or int(number) >= _MAX_TOKENS:
            raise FormatError(f"{where}: line {i + 1} must have a rank of its own below {_MAX_TOKENS:,}")
        tokens[int(number)] = "".join(_CHARACTER_OF_BYTE[byte] for byte in token)
    numbers = {token: number for number, token in tokens.items()}
    if missing := [byte for byte, character in _CHARACTER_OF_BYTE.items() if character not in numbers]:
        raise FormatError(f"{where}: a rank file must have a token for every byte, none for 0x{min(missing):02x}")
    merged = sorted((token for token in tokens.values() if len(token) > 1), key=numbers.__getitem__)
    merges = _pairs(where, merged, numbers)
    tokens, types = _with_extra(where, tokens, dict.fromkeys(tokens, _NORMAL), extra)
    return _byte_level(where, tokens, types, merges, patterns)


def _read_sentencepiece(
    data: bytes, where: Path, extra: Mapping[int, tuple[str, bool]]
) -> tuple[tokenizers.Tokenizer, bool, int | None, int | None]:
    """A SentencePiece model: the tokenizer, whether it puts a space in front, and its bos and eos tokens.

    Field numbers and defaults are those of sentencepiece_model.proto.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _protobuf(data, where):
        if number in (1, 2, 3) and not isinstance(value, bytes):
            raise FormatError(f"{where}: field {number} of a SentencePiece model must be a message")
        if number == 1:
            piece = dict(_protobuf(value, where))
            text, score, kind = piece.get(1, b""), piece.get(2, 0.0), piece.get(3, _NORMAL)
            if not (isinstance(text, bytes) and isinstance(score, float) and isinstance(kind, int)):
                raise FormatError(f"{where}: piece {len(pieces):,} must have a text, a score and a type")
            pieces.append((_utf8(text, where), score, kind))
            if len(pieces) > _MAX_TOKENS:
                raise FormatError(f"{where}: a SentencePiece model must have at most {_MAX_TOKENS:,} pieces")
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_protobuf(value, where))
    if not pieces:
        raise FormatError(f"{where} must be a tokenizer.json, a tiktoken rank file or a SentencePiece model")
    model_type = trainer.get(3, 1)
    if model_type != 2:
        raise FormatError(f"{where}: trainer_spec.model_type must be BPE (2), got {_shown(repr(model_type))}")
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24, 0):
        raise FormatError(
            f"{where}: normalizer_spec must change nothing but spaces (no precompiled_charsmap, no "
            "remove_extra_whitespaces, escape_whitespaces in front of words)"
        )
    byte_fallback = bool(trainer.get(35, 0))
    tokens: dict[int, str] = {}
    for i, (text, _, kind) in enumerate(pieces):
        # User-defined pieces are looked for in the text as it is written.
        tokens[i] = text.replace("▁", " ") if kind == _USER_DEFINED else text
    n_bytes = sum(_BYTE_TOKEN.fullmatch(text) is not None for text in tokens.values())
    if byte_fallback and n_bytes != 256:
        raise FormatError(f"{where}: trainer_spec.byte_fallback needs the 256 byte pieces, found {n_bytes}")
    if not byte_fallback and _UNKNOWN not in (kind for _, _, kind in pieces):
        raise FormatError(f"{where}: a SentencePiece model without byte_fallback must have an unknown piece")
    tokens, types = _with_extra(where, tokens, {i: kind for i, (_, _, kind) in enumerate(pieces)}, extra)
    scores = [score for _, score, _ in pieces] + [0.0] * (len(types) - len(pieces))
    prefix = bool(normalizer.get(3, 1))
    inner = _sentencepiece(where, tokens, scores, types, prefix=prefix, byte_fallback=byte_fallback)

    def control(field: int, default: int) -> int | None:
        value = trainer.get(field, default)
        value = value - (1 << 64) if isinstance(value, int) and value >= 1 << 63 else value
        if not isinstance(value, int) or value >= len(pieces):
            raise FormatError(f"{where}: field {field} of trainer_spec must be the number of a piece")
        return value if value >= 0 and pieces[value][2] == _CONTROL else None

    return inner, prefix, control(41, 1), control(42, 2)


def _with_extra(
    where: Path, tokens: Mapping[int, str], types: Mapping[int, int], extra: Mapping[int, tuple[str, bool]]
) -> tuple[dict[int, str], list[int]]:
    """Tokens with those that other files add, and a type for every number up to the last one."""
    all_tokens, all_types = dict(tokens), dict(types)
    for number, (text, special) in extra.items():
        if tokens.get(number, text) != text:
            raise FormatError(
                f"{where}: token {number} is {_shown(repr(tokens[number]))} here, {_shown(repr(text))} there"
            )
        all_tokens[number] = text
        if number not in tokens:
            all_types[number] = _CONTROL if special else _USER_DEFINED
    return all_tokens, [all_types.get(i, _UNUSED) for i in range(max(all_tokens) + 1)]


def _extra_tokens(files: Mapping[str, bytes], where: Path, settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Tokens that tokenizer_config.json or added_tokens.json add to a tokenizer.model: text and whether special."""
    result: dict[int, tuple[str, bool]] = {}
    described = settings.get("added_tokens_decoder") or {}
    if not isinstance(described, dict):
        raise FormatError(f"{where}: added_tokens_decoder must be an object")
    entries = list(described.items())
    for text, number in _json(files, where, "added_tokens.json").items():
        entries.append((str(number), {"content": text, "special": True}))
    for number, token in entries:
        text = token.get("content") if isinstance(token, dict) else None
        if not (number.isdecimal() and len(number) < 8 and int(number) < _MAX_TOKENS):
            raise FormatError(
                f"{where}: added tokens must have numbers below {_MAX_TOKENS:,}, got {_shown(repr(number))}"
            )
        if not isinstance(text, str) or not _is_text(text):
            raise FormatError(f"{where}: added token {number} must have a content")
        result.setdefault(int(number), (text, token.get("special") is True))
    return result


def _protobuf(data: bytes, where: Path) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields of a protobuf message in order: number and value; nothing is allocated beyond the data itself."""
    position, end = 0, len(data)

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while position < end and shift < 70:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise FormatError(
            f"{where}: a SentencePiece model must be protobuf, a number at byte {position:,} does not end"
        )

    while position < end:
        tag = varint()
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            yield number, varint()
            continue
        n_bytes = {1: 8, 5: 4}.get(wire_type) or (varint() if wire_type == 2 else end + 1)
        if n_bytes > end - position:
            raise FormatError(
                f"{where}: a SentencePiece model must be protobuf, a field at byte {position:,} does not end"
            )
        value = data[position : position + n_bytes]
        position += n_bytes
        yield number, struct.unpack("<f", value)[0] if wire_type == 5 else value


def _chat_template(files: Mapping[str, bytes], where: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template of a folder: a file of its own before an entry of tokenizer_config.json."""
    if "chat_template.jinja" in files:
        return _utf8(files["chat_template.jinja"], where)
    template = _json(files, where, "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = (entry for entry in template if isinstance(entry, dict))
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise FormatError(f"{where}: chat_template must be a string, got {type(template).__name__}")
    return template


# Small checks ---------------------------------------------------------------------------------------------------------


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:  # an added token, which is written as it is
        return token.encode()


def _piece_bytes(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    return token.replace("▁", " ").encode()


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise FormatError(f"{path} must be at most {_MAX_FILE_BYTES:,} bytes, got {path.stat().st_size:,}")
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path} must be readable: {error.strerror}") from error


def _json(files: Mapping[str, bytes], where: Path, name: str) -> dict[str, Any]:
    return load_json_object(where / name, files[name]) if name in files else {}


def _utf8(data: bytes, where: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise FormatError(f"{where}: strings must be UTF-8, got {_shown(repr(data))}") from None


def _is_text(token: str) -> bool:
    """Whether a token can be part of a text: not empty, no lone surrogate."""
    return bool(token) and not any("\ud800" <= character <= "\udfff" for character in token)


def _numbers(config: Mapping[str, Any], key: str, where: Path) -> list[int]:
    """Token numbers of a configuration: one, a list, or none; some use -1 for none."""
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    for number in values:
        if not isinstance(number, int) or isinstance(number, bool) or number >= _MAX_TOKENS:
            raise FormatError(f"{where}: {key} must be token numbers below {_MAX_TOKENS:,}, got {_shown(repr(value))}")
    return [number for number in values if number >= 0]


def _list_of_strings(metadata: Mapping[str, Any], key: str, where: Path) -> list[str]:
    value = metadata.get(key)
    if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        got = "it is missing" if value is None else f"got {type(value).__name__}"
        raise FormatError(f"{where}: {key} must be an array of strings, {got}")
    return value


def _numbers_per_token(metadata: Mapping[str, Any], key: str, n: int, where: Path) -> list[Any] | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or len(value) != n:
        got = f"{len(value):,}" if isinstance(value, np.ndarray) else type(value).__name__
        raise FormatError(f"{where}: {key} must have a number for each of {n:,} tokens, got {got}")
    return value.tolist()


def _shown(text: str) -> str:
    """At most 80 printable characters for a message."""
    text = "".join(c if c.isprintable() else " " for c in text[:81])
    return text if len(text) <= 80 else text[:79] + "…"


@contextmanager
def _library_errors(where: Path | str) -> Iterator[None]:
    """Errors and panics of the tokenizers library as FormatError."""
    try:
        yield
    except FormatError:
        raise
    except Exception as error:
        raise FormatError(f"{where}: the tokenizers library refuses it: {_shown(str(error))}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3's, which is no Exception and has no importable name
            raise
        raise FormatError(f"{where}: the tokenizers library gave up: {_shown(str(error))}") from error
