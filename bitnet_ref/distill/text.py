"""Text to token numbers for training: no truncation, no padding, and no special token that a stranger's text spells."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

__all__ = ["END_OF_TEXT", "TextEncoder", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
"""Token 0 of :func:`train_tokenizer`."""


def train_tokenizer(texts: Iterable[str], vocabulary: int, *, fewer: bool = False) -> tokenizers.Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer and :data:`END_OF_TEXT` as token 0.

    Parameters
    ----------
    texts : iterable of str
    vocabulary : int
        Tokens, with the 256 bytes and :data:`END_OF_TEXT`.
    fewer : bool
        Whether texts of few words may yield fewer.

    Raises
    ------
    ValueError
        If the texts do not yield so many tokens.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found > vocabulary or (found < vocabulary and not fewer):
        raise ValueError(f"the texts must yield {vocabulary} tokens, got {found}")
    return tokenizer


class TextEncoder:
    """A tokenizer, copied so that what its owner sets does not change what is encoded here.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer, a fast tokenizer of ``transformers``, or TextEncoder
        Make one TextEncoder for a run: the copy of a large vocabulary takes a tenth of a second.

    Attributes
    ----------
    sha256 : str
        Of the tokenizer's JSON, for names of caches.
    vocabulary_size : int
        One more than the largest token number.
    prefix : tuple of int
        What the tokenizer puts before a text: the begin-of-text token of some families, often nothing.
    end_of_text : int or None
        The end token that a tokenizer of ``transformers`` declares.

    Raises
    ------
    TypeError
        If the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: Any) -> None:
        inner = tokenizer._inner if isinstance(tokenizer, TextEncoder) else tokenizer
        inner = getattr(inner, "backend_tokenizer", inner)
        if not isinstance(inner, tokenizers.Tokenizer):
            raise TypeError(
                "a tokenizer must be a tokenizers.Tokenizer or a fast tokenizer of transformers, got "
                f"{type(tokenizer).__name__}"
            )
        self._inner = tokenizers.Tokenizer.from_str(inner.to_str())
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # a special token in a text is its characters
        self.sha256 = hashlib.sha256(self._inner.to_str().encode()).hexdigest()
        self.vocabulary_size = 1 + max(self._inner.get_vocab(True).values())
        added = self._inner.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        longest_first = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._specials = re.compile("|".join(longest_first) or r"(?!)")
        plain, whole = self.encode("a"), self._inner.encode("a", add_special_tokens=True).ids
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        self.prefix = tuple(whole[:at])
        name = getattr(tokenizer, "eos_token", None)
        self.end_of_text: int | None = tokenizer.end_of_text if isinstance(tokenizer, TextEncoder) else None
        if isinstance(name, str):
            self.end_of_text = self.token(name)

    @classmethod
    def of(cls, tokenizer: Any) -> TextEncoder:
        """The tokenizer itself if it is a TextEncoder already."""
        return tokenizer if isinstance(tokenizer, cls) else cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without :attr:`prefix`."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of many texts, on all threads that the library takes."""
        return [found.ids for found in self._inner.encode_batch(list(texts), add_special_tokens=False)]

    def ends(self, text: str) -> list[int]:
        """Where, in characters, each token of a text ends."""
        return [end for _, end in self._inner.encode(text, add_special_tokens=False).offsets]

    def special_parts(self, text: str) -> list[str | int]:
        """A text cut at the special tokens that it spells: plain parts and token numbers in turn; for templates."""
        parts: list[str | int] = []
        at = 0
        for found in self._specials.finditer(text):
            parts += [text[at : found.start()], self._special[found[0]]]
            at = found.end()
        return [part for part in [*parts, text[at:]] if part != ""]

    def token(self, name: str) -> int:
        """Number of a token by the name that the vocabulary has for it.

        Raises
        ------
        ValueError
            If there is no such token.
        """
        number = self._inner.token_to_id(name)
        if number is None:
            raise ValueError(f"{name!r} must be a token of the vocabulary, and it is not")
        return number

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return self._inner.decode([int(token) for token in tokens], skip_special_tokens=True)
