"""Tokenizers: every form of one vocabulary gives the same tokens, and bad files give one error.

The vocabularies are made here. BITNET_REF_LLAMA3=<folder> runs llama.cpp's golden vectors as well: each
``ggml-vocab-X.gguf.inp`` and ``.out`` in the folder with ``ggml-vocab-X.gguf``, and those of ``llama-bpe`` with a
``tokenizer.json`` of Llama-3 too. Neither is part of this project.
"""

from __future__ import annotations

import base64
import json
import os
import random
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from bitnet_ref.errors import FormatError
from bitnet_ref.formats.checkpoint import Checkpoint
from bitnet_ref.runtime.tokenizer import (
    PRE_TOKENIZERS,
    load_tokenizer,
    tokenizer_from_checkpoint,
    tokenizer_from_files,
    tokenizer_from_gguf,
)

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"
CORPUS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "must be in want of a wife. However little known the feelings or views of such a man may be",
    "on his first entering a neighbourhood, this truth is so well fixed in the minds of the families",
    "naïve café, Äpfel 🦙🦙 12345 = 678 I'll we're THEY'VE\n\n\tx   y\r\n",
] * 3


@pytest.fixture(scope="module")
def library():
    """A byte-level BPE of the tokenizers library with Llama-3's pattern: numbers in order of merging, then specials."""
    inner = Library(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZERS["llama-bpe"][0]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    inner.add_special_tokens([BOS, EOS, EOT])
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, inner.token_to_id(BOS))]
    )
    return inner


def byte_of_character():
    """GPT-2's spelling of bytes, read back through the library: one character at a time."""
    decoder = decoders.ByteLevel()
    table = {}
    for c in pre_tokenizers.ByteLevel.alphabet():
        # A byte above 0x7F is no text alone; after the same two-byte lead, the last byte of the text tells it.
        table[c] = decoder.decode([c]).encode() if ord(c) < 0x80 else None
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printing]
    spelled = {chr(b): bytes([b]) for b in printing} | {chr(0x100 + i): bytes([b]) for i, b in enumerate(others)}
    assert set(spelled) == set(table)
    assert all(table[c] in (None, spelled[c]) for c in table)
    return spelled


def rank_file(library):
    table = byte_of_character()
    vocabulary = {t: n for t, n in library.get_vocab(False).items()}
    lines = sorted((n, b"".join(table[c] for c in t)) for t, n in vocabulary.items())
    return b"".join(base64.b64encode(token) + b" %d\n" % n for n, token in lines)


def gguf_metadata(library):
    """What convert_hf_to_gguf of llama.cpp would write."""
    spec = json.loads(library.to_str())
    vocabulary = library.get_vocab(True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3 if t in (BOS, EOS, EOT) else 1 for t in tokens], np.int32),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocabulary[BOS],
        "tokenizer.ggml.eos_token_id": vocabulary[EOS],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_gguf(path, metadata):
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value if isinstance(value, list) else value.tolist())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def settings(library):
    numbers = {library.token_to_id(t): t for t in (BOS, EOS, EOT)}
    return {
        "bos_token": BOS,
        "eos_token": {"content": EOS},
        "add_bos_token": True,
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {str(n): {"content": t, "special": True} for n, t in numbers.items()},
    }


@pytest.fixture(scope="module")
def forms(library, tmp_path_factory):
    """The same vocabulary loaded from every form."""
    folder = tmp_path_factory.mktemp("forms")
    config = json.dumps(settings(library)).encode()
    (folder / "json").mkdir()
    (folder / "json/tokenizer.json").write_text(library.to_str())
    (folder / "json/tokenizer_config.json").write_bytes(config)
    (folder / "ranks").mkdir()
    (folder / "ranks/tokenizer.model").write_bytes(rank_file(library))
    (folder / "ranks/tokenizer_config.json").write_bytes(config)
    metadata = gguf_metadata(library)
    write_gguf(folder / "a.gguf", metadata)
    whole = {key: metadata[key] for key in metadata if key.endswith(("_id", "template"))}
    write_gguf(folder / "b.gguf", whole | {"tokenizer.huggingface.json": library.to_str()})
    assets = {"tokenizer.json": library.to_str().encode(), "tokenizer_config.json": config}
    return {
        "json": load_tokenizer(folder / "json"),
        "ranks": load_tokenizer(folder / "ranks", pre_tokenizer="llama-bpe"),
        "gguf": load_tokenizer(folder / "a.gguf"),
        "gguf with tokenizer.json": load_tokenizer(folder / "b.gguf"),
        "checkpoint": tokenizer_from_checkpoint(Checkpoint(folder, "", {}, {}, assets)),
        "checkpoint of a gguf": tokenizer_from_checkpoint(Checkpoint(folder, "", {}, {}, {}, metadata)),
    }


# One vocabulary, every form -------------------------------------------------------------------------------------------

FORMS = ["json", "ranks", "gguf", "gguf with tokenizer.json", "checkpoint", "checkpoint of a gguf"]


@pytest.mark.parametrize("form", FORMS)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from(" ".join(CORPUS).split(" ")), max_size=12).map(" ".join))
def test_forms_agree_with_the_library(forms, library, form, text):
    tokenizer = forms[form]
    tokens = tokenizer.encode(text, add_bos=False)
    assert tokens == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokens) == text == library.decode(tokens)
    assert "".join(tokenizer.stream(tokens)) == text


@pytest.mark.parametrize("form", FORMS)
def test_special_tokens(forms, library, form):
    tokenizer = forms[form]
    bos, eos, eot = (library.token_to_id(t) for t in (BOS, EOS, EOT))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (bos, (eos, eot), True)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == (BOS, EOS, TEMPLATE)
    assert tokenizer.vocabulary == library.get_vocab(True)
    a = tokenizer.encode("a", add_bos=False)
    assert tokenizer.encode("a") == [bos, *a]
    assert tokenizer.encode(f"{BOS}a", special=True) == [bos, *a]  # not twice
    assert tokenizer.encode(f"{BOS}a", special=True, add_bos=True) == [bos, bos, *a]
    assert tokenizer.encode(f"a{EOT}", add_bos=False, special=True) == [*a, eot]
    # Written by a stranger, it is text.
    as_text = tokenizer.encode(f"a{EOT}", add_bos=False)
    assert eot not in as_text and tokenizer.decode(as_text) == f"a{EOT}"
    assert tokenizer.decode([bos, *a, eot]) == "a"
    assert tokenizer.decode([bos, *a, eot], special=True) == f"{BOS}a{EOT}"


@given(text=st.text(max_size=30), data=st.binary(max_size=8))
def test_stream_is_decode_in_whole_characters(forms, text, data):
    """Also for bytes that are no UTF-8: the single-byte tokens spell any sequence."""
    tokenizer = forms["gguf"]
    of_byte = {tokenizer.token_bytes(n): n for n in range(256)}
    tokens = [of_byte[bytes([b])] for b in text.encode() + data]
    pieces = list(tokenizer.stream(tokens))
    assert "".join(pieces) == tokenizer.decode(tokens) == (text.encode() + data).decode(errors="replace")
    assert "" not in pieces
    if not data:
        assert pieces == list(text)


def test_stream_reads_no_further_than_it_must(forms):
    tokenizer = forms["json"]
    llama = [n for b in "🦙".encode() for n in range(256) if tokenizer.token_bytes(n) == bytes([b])]
    seen = []

    def source():
        for token in [*llama, *tokenizer.encode("x", add_bos=False)]:
            seen.append(token)
            yield token

    pieces = tokenizer.stream(source())
    assert next(pieces) == "🦙" and len(seen) == 4
    assert next(pieces) == "x" and len(seen) == 5


def test_numbers_without_a_token(forms):
    tokenizer = forms["json"]
    assert tokenizer.decode([10**6]) == "\ufffd"  # padding of the embedding
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        tokenizer.decode([-1])
    with pytest.raises(TypeError):
        tokenizer.decode([0.5])
    assert tokenizer.decode(np.array(tokenizer.encode("abc", add_bos=False), np.int32)) == "abc"


def test_text_that_cannot_be_encoded(forms, library):
    with pytest.raises(ValueError, match="character 1 is a lone surrogate"):
        forms["json"].encode("a\udc80")
    with pytest.raises(TypeError, match="must be a str, got bytes"):
        forms["json"].encode(b"a")
    metadata = gguf_metadata(library)
    metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.tokens"].index("ā")] = "[gone]"
    with pytest.raises(ValueError, match="has none for 0x01"):  # the library would drop it without a word
        tokenizer_from_gguf(metadata, "x.gguf").encode("a\x01b")
    del metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.add_bos_token"]
    metadata["tokenizer.ggml.pre"] = "gpt-2"
    with pytest.raises(ValueError, match="add_bos needs a begin-of-text token"):
        tokenizer_from_gguf(metadata, "x.gguf").encode("a", add_bos=True)


def test_tokens_that_no_text_gives(library):
    """Empty tokens and tokens that are not UTF-8 stay out of encoding and decode to their bytes."""
    metadata = gguf_metadata(library)
    n = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["", "\udcff"]
    metadata["tokenizer.ggml.token_type"] = np.append(metadata["tokenizer.ggml.token_type"], [1, 1])
    tokenizer = tokenizer_from_gguf(metadata, "x.gguf")
    assert tokenizer.token_bytes(n) == b"" and tokenizer.token_bytes(n + 1) == b"\xff"


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 12345", "  ", " x", "!!", "\n"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", "  ", " x", "!!\n"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", "  ", " x", "!!\n"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", "  ", " x", "!!", "\n"]),
        ("default", ["It", "'", "s", " ", "123", "45", "  ", " x", "!!", "\n"]),
    ],
)
def test_pre_tokenizers_split(name, pieces):
    text = "It's 12345   x!!\n"
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
    assert [piece for piece, _ in pre_tokenizers.Sequence(split).pre_tokenize_str(text)] == pieces


# SentencePiece --------------------------------------------------------------------------------------------------------


def field(number, value):
    """One field of a protobuf message."""

    def varint(n):
        out = bytearray()
        while n >= 0x80:
            out.append(n & 0x7F | 0x80)
            n >>= 7
        return bytes([*out, n])

    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value % (1 << 64))
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(pieces, *, trainer=b"", normalizer=b""):
    """A SentencePiece model of (text, score, type)."""
    message = b""
    for text, score, kind in pieces:
        message += field(1, field(1, text.encode()) + field(2, float(score)) + field(3, kind))
    defaults = field(3, 2) + field(35, 1)
    return message + field(2, defaults + trainer) + field(3, field(4, 0) + normalizer)


NORMAL_PIECES = ["▁a", "ab", "▁ab", "abc", "▁abc", "▁", "a", "b", "c"]
PIECES = [
    ("<unk>", 0, 2),
    ("<s>", 0, 3),
    ("</s>", 0, 3),
    *((f"<0x{b:02X}>", 0, 6) for b in range(256)),
    *((text, -i, 1) for i, text in enumerate(NORMAL_PIECES)),
    ("▁▁▁▁", 0, 4),
]
NUMBER = {text: i for i, (text, _, _) in enumerate(PIECES)}


def spm_metadata():
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text.replace("▁", " ") if kind == 4 else text for text, _, kind in PIECES],
        "tokenizer.ggml.scores": np.array([score for _, score, _ in PIECES], np.float32),
        "tokenizer.ggml.token_type": np.array([kind for _, _, kind in PIECES], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.fixture(scope="module", params=["model", "gguf"])
def spm(request, tmp_path_factory):
    if request.param == "gguf":
        return tokenizer_from_gguf(spm_metadata(), "x.gguf")
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(sentencepiece_model(PIECES))
    return load_tokenizer(path)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("abc", ["▁abc"]),  # by ▁a, then ▁ab, the best scores first
        ("cab", ["▁", "c", "ab"]),
        ("b abc", ["▁", "b", "▁abc"]),
        (" a", ["▁", "▁a"]),
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
        ("a    b", ["▁a", "▁▁▁▁", "▁", "b"]),  # a piece in front of each part of the text, as llama.cpp does
        ("<s>", ["▁", *(f"<0x{b:02X}>" for b in b"<s>")]),
    ],
)
def test_sentencepiece_by_hand(spm, text, pieces):
    tokens = spm.encode(text)
    assert tokens == [1, *(NUMBER[piece] for piece in pieces)]
    assert spm.decode(tokens).replace(" ", "") == text.replace(" ", "")


def test_sentencepiece_special_tokens_and_spaces(spm):
    assert (spm.bos_id, spm.eos_ids, spm.adds_bos) == (1, (2,), True)
    assert spm.encode("<s>abc</s>", special=True) == [1, NUMBER["▁abc"], 2]
    tokens = spm.encode("abc abc", add_bos=False)
    assert spm.decode(tokens) == "abc abc"
    assert list(spm.stream(tokens)) == [" abc", " abc"]  # as the continuation of a text
    assert spm.decode([NUMBER["<0xC3>"], NUMBER["<0xA9>"], NUMBER["<0xC3>"]]) == "é\ufffd"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its SWIG types, at import
def test_sentencepiece_agrees_with_the_original(tmp_path):
    original = pytest.importorskip("sentencepiece")
    prefix = tmp_path / "tokenizer"
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    original.SentencePieceTrainer.Train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(prefix),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    theirs = original.SentencePieceProcessor(model_file=f"{prefix}.model")
    ours = load_tokenizer(f"{prefix}.model")
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_id(), (theirs.eos_id(),))
    draw = random.Random(0)
    words = " ".join(CORPUS).split(" ")
    texts = ["  two  spaces ", "🦙 ünknown", "\t\n", *(" ".join(draw.choices(words, k=20)) for _ in range(100))]
    texts += ["".join(draw.choices(" abcdefghimnorstuvw", k=40)) for _ in range(100)]
    for text in texts:
        tokens = ours.encode(text, add_bos=False)
        assert tokens == theirs.encode(text)
        assert ours.decode(tokens) == text


# Bad files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre must be one of .*; it is missing. .*llama-bpe for Llama-3"),
        ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre must be one of .*; got 'viking'"),
        ({"tokenizer.ggml.pre": 7}, "tokenizer.ggml.pre must be one of .*; got 7"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model must be gpt2 or llama, got 't5'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model must be gpt2 or llama, got None"),
        ({"tokenizer.ggml.model": "llama"}, "needs tokenizer.ggml.scores"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges must be an array of strings, it is missing"),
        ({"tokenizer.ggml.merges": ["ab"]}, "merges must be pairs, got 'ab'"),
        ({"tokenizer.ggml.merges": ["a "]}, "merges must be pairs, got 'a '"),
        ({"tokenizer.ggml.merges": ["a nothing"]}, "the tokenizers library refuses it"),
        ({"tokenizer.ggml.tokens": []}, "must have 1 to 1,048,576 tokens, got 0"),
        ({"tokenizer.ggml.tokens": "abc"}, "tokenizer.ggml.tokens must be an array of strings, got str"),
        ({"tokenizer.ggml.token_type": np.array([1], np.int32)}, "must have a number for each of 403 tokens, got 1"),
        ({"tokenizer.ggml.token_type": "1"}, "must have a number for each of 403 tokens, got str"),
        ({"tokenizer.ggml.bos_token_id": 403}, "bos_token_id must be below 403, got 403"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id must be below 403, got 'x'"),
        ({"tokenizer.ggml.bos_token_id": None}, "bos_token_id must be there"),
        ({"tokenizer.ggml.add_eos_token": True}, "add_eos_token must not be true"),
    ],
)
def test_bad_gguf_metadata(library, change, message):
    metadata = {key: value for key, value in (gguf_metadata(library) | change).items() if value is not None}
    with pytest.raises(FormatError, match=rf"x\.gguf.*{message}"):
        tokenizer_from_gguf(metadata, "x.gguf")


def test_gguf_tokens_must_be_unique(library):
    metadata = gguf_metadata(library)
    metadata["tokenizer.ggml.tokens"][5] = metadata["tokenizer.ggml.tokens"][300]
    with pytest.raises(FormatError, match="tokens must be unique"):
        tokenizer_from_gguf(metadata, "x.gguf")


def test_gguf_labels_that_do_not_fit(library):
    """The model names changed over: byte-level BPE called SentencePiece, and the reverse."""
    bpe = gguf_metadata(library) | {"tokenizer.ggml.model": "llama"}
    bpe["tokenizer.ggml.scores"] = np.zeros(403, np.float32)
    with pytest.raises(FormatError, match=r"needs the 256 byte tokens .* found 0; byte-level BPE has the model gpt2"):
        tokenizer_from_gguf(bpe, "x.gguf")
    pieces = spm_metadata() | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    with pytest.raises(FormatError, match="needs tokens of byte-level BPE, there is none for the space"):
        tokenizer_from_gguf(pieces | {"tokenizer.ggml.merges": []}, "x.gguf")


def test_pre_tokenizer_by_the_caller(library):
    metadata = gguf_metadata(library)
    del metadata["tokenizer.ggml.pre"]
    named = tokenizer_from_gguf(metadata, "x.gguf", pre_tokenizer="llama-bpe")
    assert named.encode("12345", add_bos=False) == library.encode("12345", add_special_tokens=False).ids
    with pytest.raises(ValueError, match=r"pre_tokenizer must be one of .*, got 'llama'"):
        tokenizer_from_gguf(metadata, "x.gguf", pre_tokenizer="llama")
    with pytest.raises(ValueError, match="brings its own"):
        tokenizer_from_files({"tokenizer.json": library.to_str().encode()}, "x", pre_tokenizer="llama-bpe")
    with pytest.raises(ValueError, match="has a SentencePiece tokenizer"):
        tokenizer_from_gguf(spm_metadata(), "x.gguf", pre_tokenizer="llama-bpe")
    with pytest.raises(FormatError, match="the pre-tokenizer of a rank file must be one of"):
        tokenizer_from_files({"tokenizer.model": rank_file(library)}, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.scores": np.zeros(len(PIECES), np.float32)}, "scores must rank the tokens, they are all 0"),
        ({"tokenizer.ggml.scores": np.full(len(PIECES), np.nan, np.float32)}, "scores of tokens must be finite"),
        ({"tokenizer.ggml.scores": np.zeros(3, np.float32)}, "scores must have a number for each of"),
    ],
)
def test_bad_sentencepiece_metadata(change, message):
    with pytest.raises(FormatError, match=message):
        tokenizer_from_gguf(spm_metadata() | change, "x.gguf")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must be a tokenizer.json, a tiktoken rank file or a SentencePiece model"),
        (b"\x0a\xff", "must be protobuf"),
        (b"\x0a\x7fabc", "a field at byte 2 does not end"),
        (b"\x80" * 30, "a number at byte 10 does not end"),
        (b"\x0b", "a field at byte 1 does not end"),
        (field(1, 5), "field 1 of a SentencePiece model must be a message"),
        (field(1, field(1, 5)), "piece 0 must have a text, a score and a type"),
        (field(1, field(1, b"\xff")), "strings must be UTF-8"),
        (field(1, field(1, b"a")), "model_type must be BPE"),
        (sentencepiece_model(PIECES, trainer=field(3, 1)), r"model_type must be BPE \(2\), got 1"),
        (sentencepiece_model(PIECES, normalizer=field(2, b"map")), "normalizer_spec must change nothing but spaces"),
        (sentencepiece_model(PIECES, normalizer=field(4, 1)), "normalizer_spec must change nothing but spaces"),
        (sentencepiece_model(PIECES, trainer=field(41, 10**6)), "field 41 of trainer_spec"),
        (sentencepiece_model(PIECES[:9]), "byte_fallback needs the 256 byte pieces, found 6"),
        (sentencepiece_model(PIECES[1:3], trainer=field(35, 0)), "must have an unknown piece"),
        (sentencepiece_model([*PIECES, ("a", 0, 1)]), "tokens must be unique, 'a' comes twice"),
        (sentencepiece_model([*PIECES, ("x" * 600, -99, 1)]), "at most 256 characters each"),
        (b"YQ== 0\nYg== 0\n", "line 2 must have a rank of its own"),
        (b"YQ== 0\nYg=\n", "line 2 must be a token in base64"),
        (b"YQ== 0\n", "must have a token for every byte, none for 0x00"),
        (b"YQ== 9999999\n", "line 1 must have a rank of its own below"),
    ],
)
def test_bad_model_files(data, message, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=rf"tokenizer\.model.*{message}"):
        load_tokenizer(path, pre_tokenizer="llama-bpe" if data.startswith(b"YQ") else None)


def edited(library, **changes):
    """The library's tokenizer.json with some keys changed; ``model__x`` is key x of the model."""
    spec = json.loads(library.to_str())
    for key, value in changes.items():
        *outer, key = key.split("__")
        target = spec[outer[0]] if outer else spec
        target[key] = value
    return json.dumps(spec).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model.type must be BPE, got None"),
        ({"model__type": "WordPiece"}, "model.type must be BPE, got 'WordPiece'"),
        ({"model__dropout": 0.5}, "model.dropout must be null"),
        ({"model__vocab": []}, "model.vocab must be an object"),
        ({"model__vocab": {"a": 2**31}}, "token numbers must be below 1,048,576, got 2147483648"),
        ({"model__vocab": {"a": -1}}, "token numbers must be below 1,048,576, got -1"),
        ({"model__vocab": {"a": 0, "b": 0}}, "must give each token a number of its own"),
        ({"model__merges": [["a", "nothing"]]}, "the tokenizers library refuses it"),
        ({"model__merges": None}, "the tokenizers library refuses it"),
        ({"added_tokens": {}, "decoder": None}, "decoder must be ByteLevel"),
        ({"added_tokens": [5]}, "added_tokens must be a list of objects"),
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "decoder must be ByteLevel"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
            "refuses",
        ),
        ({"pre_tokenizer": 3}, "the tokenizers library refuses it"),
    ],
)
def test_bad_tokenizer_json(library, changes, message):
    with pytest.raises(FormatError, match=rf"tokenizer\.json.*{message}"):
        tokenizer_from_files({"tokenizer.json": edited(library, **changes)}, "x")


def test_tokens_behind_the_text_are_refused(library):
    eos = library.token_to_id(EOS)
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": EOS, "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {EOS: {"id": EOS, "ids": [eos], "tokens": [EOS]}},
    }
    with pytest.raises(FormatError, match="post_processor must add one token in front of a text or nothing"):
        tokenizer_from_files({"tokenizer.json": edited(library, post_processor=template)}, "x")


def test_padding_and_truncation_are_dropped(library):
    """A fixed length of padding would be an allocation of any size."""
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "x"}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    data = edited(library, padding=padding, truncation=truncation)
    expected = library.encode("truth is 1", add_special_tokens=False).ids
    assert tokenizer_from_files({"tokenizer.json": data}, "x").encode("truth is 1", add_bos=False) == expected


def test_a_pattern_that_backtracks(library, capfd):
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = tokenizer_from_files({"tokenizer.json": edited(library, pre_tokenizer=pattern)}, "x")
    start = time.perf_counter()
    with pytest.raises(FormatError, match="the tokenizers library gave up"):
        tokenizer.encode("a" * 40 + "b")
    assert time.perf_counter() - start < 20  # 2^40 steps would take hours; the library stops after 10^7
    capfd.readouterr()  # the panic's own message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "must have tokenizer.json or tokenizer.model"),
        ({"tokenizer_config.json": b"{}"}, "must have tokenizer.json or tokenizer.model"),
        ({"tokenizer.json": b"\xff"}, "tokenizer.json must be UTF-8, byte 0 is not"),
        ({"tokenizer.json": b'{"a": 1, "a": 2}'}, "keys must be unique"),
        ({"tokenizer.json": b"[" * 100_000}, "must hold valid JSON"),
        ({"tokenizer.json": b"[]"}, "must hold a JSON object"),
        ({"tokenizer_config.json": b'{"bos_token": "<nothing>"}'}, "bos_token must be a token of the vocabulary"),
        ({"tokenizer_config.json": b'{"bos_token": 3}'}, "bos_token must be a token of the vocabulary, got 3"),
        ({"tokenizer_config.json": b'{"bos_token": "<|eot_id|>"}'}, "texts begin with token 400, but the bos_token is"),
        ({"tokenizer_config.json": b'{"chat_template": 3}'}, "chat_template must be a string, got int"),
        ({"chat_template.jinja": b"\xff"}, "strings must be UTF-8"),
        ({"generation_config.json": b'{"eos_token_id": [1, "2"]}'}, "eos_token_id must be token numbers"),
        ({"generation_config.json": b'{"eos_token_id": 5000}'}, "must be numbers of tokens, 5000 is none"),
    ],
)
def test_bad_folders(library, files, message, tmp_path):
    if "tokenizer.json" not in files and not message.startswith("must have"):
        files = {"tokenizer.json": library.to_str().encode(), **files}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError, match=message):
        load_tokenizer(tmp_path)


def test_end_tokens_of_every_file(library):
    files = {
        "tokenizer.json": library.to_str().encode(),
        "generation_config.json": b'{"eos_token_id": [7, 9]}',
        "config.json": b'{"eos_token_id": 9, "bos_token_id": -1}',
    }
    tokenizer = tokenizer_from_files(files, "x")
    assert tokenizer.eos_ids == (7, 9, library.token_to_id(EOT))
    assert tokenizer.bos_id == library.token_to_id(BOS)  # of the post_processor


@pytest.mark.parametrize("name", ["missing", "folder/pipe"])
def test_no_such_file(name, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder/pipe")
    with pytest.raises(FormatError, match="must be a folder or a regular file"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("form", ["json", "ranks", "spm", "gguf"])
def test_damaged_files(library, form, tmp_path, capfd):
    """Flipped bits, cut ends, doubled parts: a tokenizer or one FormatError, in bounded time."""
    path = tmp_path / ("tokenizer.json" if form == "json" else "tokenizer.model")
    if form == "gguf":
        write_gguf(tmp_path / "a.gguf", gguf_metadata(library))
        whole = (tmp_path / "a.gguf").read_bytes()
    else:
        whole = {"json": library.to_str().encode(), "ranks": rank_file(library), "spm": sentencepiece_model(PIECES)}[
            form
        ]
    draw = random.Random(form)
    outcomes = set()
    for _ in range(60):
        data = bytearray(whole)
        kind = draw.randrange(3)
        if kind == 0:
            for _ in range(draw.randint(1, 4)):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[draw.randrange(len(data)) :]
        else:
            start = draw.randrange(len(data))
            data[start:start] = data[start : start + draw.randint(1, 2000)]
        path.write_bytes(data)
        try:
            pre = "llama-bpe" if form == "ranks" and data[4:5] == b" " else None
            load_tokenizer(path, pre_tokenizer=pre).encode("It is a truth, 12345 🦙")
            outcomes.add("loaded")
        except FormatError as error:
            assert len(str(error).splitlines()) == 1
            outcomes.add("refused")
        except ValueError as error:
            assert "has none for 0x" in str(error) or "brings its own" in str(error)
    assert outcomes == {"loaded", "refused"}
    capfd.readouterr()


# llama.cpp's golden vectors -------------------------------------------------------------------------------------------

GOLDEN = os.environ.get("BITNET_REF_LLAMA3")


def check_golden(tokenizer, base):
    texts = Path(f"{base}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{base}.out").read_text().split("\n")
    assert len(texts) >= 46
    for text, line in zip(texts, lines, strict=False):  # a last line may be empty
        expected = [int(number) for number in line.split()]
        assert tokenizer.encode(text, add_bos=False) == expected, (text, expected)
        assert tokenizer.decode(expected) == text
    return len(texts)


@pytest.mark.skipif(not GOLDEN, reason="needs BITNET_REF_LLAMA3: Llama-3's licence keeps its tokenizer out of here")
def test_golden_llama3():
    """From tokenizer.json, and from the rank file that its vocabulary makes."""
    base = Path(GOLDEN) / "ggml-vocab-llama-bpe.gguf"
    if not (Path(GOLDEN) / "tokenizer.json").exists():
        pytest.skip(f"needs the tokenizer.json of Llama-3 in {GOLDEN}; test_golden_gguf reads its vocabulary from GGUF")
    data = (Path(GOLDEN) / "tokenizer.json").read_bytes()
    check_golden(tokenizer_from_files({"tokenizer.json": data}, GOLDEN), base)
    vocabulary = json.loads(data)["model"]["vocab"]
    table = byte_of_character()
    lines = (
        base64.b64encode(b"".join(table[c] for c in t)) + b" %d\n" % n for t, n in vocabulary.items() if n < 128000
    )
    check_golden(tokenizer_from_files({"tokenizer.model": b"".join(lines)}, GOLDEN, pre_tokenizer="llama-bpe"), base)


@pytest.mark.skipif(not GOLDEN, reason="needs BITNET_REF_LLAMA3 with llama.cpp's vocabularies")
def test_golden_gguf():
    """Every vocabulary in the folder is read right or refused by the name of a key."""
    right, refused = [], []
    for path in sorted(Path(GOLDEN).glob("ggml-vocab-*.gguf")):
        if not path.with_suffix(".gguf.out").exists():
            continue
        try:
            tokenizer = load_tokenizer(path)
        except FormatError as error:
            assert "tokenizer.ggml.pre must" in str(error) or "tokenizer.ggml.model must" in str(error)
            refused.append(path.name)
            continue
        check_golden(tokenizer, path)
        right.append(path.name)
    print(f"right: {right}; refused: {refused}")
    assert "ggml-vocab-llama-bpe.gguf" in right
