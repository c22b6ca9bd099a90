"""What a model takes in memory, to the byte and by part.

    total = body + scales + norms + biases + embedding (and head) + key/value cache

Every figure here is *modelled*: shapes times the bytes of a layout. "0.4 GB" in [2B4T, Table 1] is the first of these
parts alone, at the smallest number of bits that a ternary weight can have; `paper_steps` walks from there to a whole
model.

MB is 10**6 bytes, GB 10**9, MiB 2**20. M outputs and K inputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from bitnet_ref.measure.architectures import BITNET_2B4T, PUBLISHED_SIX, RIVALS, Architecture
from bitnet_ref.measure.provenance import Kind, Row
from bitnet_ref.reference.packing import SCHEMES, Scheme

__all__ = [
    "BODY_FORMATS",
    "GGUF_FILE_BYTES",
    "IDEAL_BITS",
    "PUBLISHED_NON_EMBEDDING_GB",
    "TABLE_FORMATS",
    "AccountRow",
    "BodyFormat",
    "BodyRow",
    "EmbeddingRow",
    "KvRow",
    "MemoryAccount",
    "MemoryPart",
    "RivalRow",
    "StepRow",
    "TableFormat",
    "account",
    "account_rows",
    "body_rows",
    "embedding_rows",
    "kv_rows",
    "paper_steps",
    "rival_rows",
]

IDEAL_BITS = math.log2(3)
"""Bits of one ternary weight when the three values are equally likely; no layout of whole bytes reaches it."""

PUBLISHED_NON_EMBEDDING_GB = {
    "LLaMA 3.2 1B": 2.0,
    "Gemma-3 1B": 1.4,
    "Qwen2.5 1.5B": 2.6,
    "SmolLM2 1.7B": 3.2,
    "MiniCPM 2B": 4.8,
    "BitNet b1.58 2B4T": 0.4,
}
"""[2B4T, Table 1], row "Memory (Non-emb)", in GB."""

GGUF_FILE_BYTES = 1_187_801_280
"""Size of the official ggml-model-i2_s.gguf of BitNet b1.58 2B4T: the tensors, a header and the vocabulary."""


# ---------------------------------------------------------------------------------------------------- layouts
@dataclass(frozen=True)
class TableFormat:
    """A layout for embedding, head, norms and key/value cache: `block` values in `block_bytes` bytes along a row."""

    name: str
    block: int
    block_bytes: int
    source: str

    def row_bytes(self, width: int) -> int:
        """Bytes of one row of `width` values.

        Raises
        ------
        ValueError
            If `width` is not a multiple of the block: these layouts have no partial block.
        """
        if width % self.block:
            raise ValueError(f"{self.name} needs rows of a multiple of {self.block} values, got {width}")
        return width // self.block * self.block_bytes

    @property
    def bits_per_value(self) -> float:
        return 8 * self.block_bytes / self.block


_GGML = "ggml block definitions (ggml-common.h)"
TABLE_FORMATS = {
    f.name: f
    for f in (
        TableFormat("f32", 1, 4, "IEEE 754"),
        TableFormat("f16", 1, 2, "IEEE 754"),
        TableFormat("bf16", 1, 2, "the upper half of an f32"),
        TableFormat("q8_0", 32, 34, _GGML),
        TableFormat("q6_K", 256, 210, _GGML),
        TableFormat("q4_0", 32, 18, _GGML),
    )
}


@dataclass(frozen=True)
class BodyFormat:
    """A layout for the matrices inside the blocks.

    Parameters
    ----------
    name : str
    matrix_bytes : callable
        (M, K) -> bytes of the weights of one matrix, padding included, scale not.
    scale_bytes : int
        Bytes that one matrix adds for its scale; 0 where the layout has none or keeps scales inside its blocks.
    note, source : str
    """

    name: str
    matrix_bytes: Callable[[int, int], int]
    scale_bytes: int
    note: str
    source: str


def _scheme_bytes(scheme: Scheme) -> Callable[[int, int], int]:
    return lambda m, k: math.prod(scheme.data_shape((m, k)))


def _float_bytes(value_bytes: int) -> Callable[[int, int], int]:
    return lambda m, k: m * k * value_bytes


def _i2s_bytes(m: int, k: int) -> int:
    """Bytes of an I2_S tensor without its trailer: 128 weights in 32 bytes, the tensor flattened row after row."""
    if m * k % 128:
        raise ValueError(f"I2_S needs a multiple of 128 weights in a matrix, got {m} x {k}")
    return m * k // 4


def _tq_bytes(name: str, block_bytes: int) -> Callable[[int, int], int]:
    layout = TableFormat(name, 256, block_bytes, _GGML)
    return lambda m, k: m * layout.row_bytes(k)


def _tl2_bitnet_cpp_bytes(m: int, k: int) -> int:
    """Bytes that bitnet.cpp reserves for a TL2 tensor, its 32-byte trailer not counted.

    Five bits for three weights in all columns but 256, four bits for two weights in those; integer arithmetic from left
    to right, then up to a multiple of 32. The 256 are reserved whether or not the matrix has columns left over, so this
    is more than the layout fills.
    """
    if k < 256:
        raise ValueError(f"the TL2 size formula of bitnet.cpp needs K >= 256, got {k}")
    reserved = (k - 256) * m // 3 * 5 // 8 + 256 * m // 2 * 4 // 8
    return -(-reserved // 32) * 32


def _body_formats() -> dict[str, BodyFormat]:
    own = [
        BodyFormat(
            name,
            _scheme_bytes(scheme),
            4,
            f"tiles of {scheme.rows} rows by {scheme.block} columns, one f32 scale a matrix",
            f"bitnet_ref.reference.packing.{name}",
        )
        for name, scheme in SCHEMES.items()
    ]
    exchange = [
        BodyFormat(
            "I2_S",
            _i2s_bytes,
            32,
            "2 bits, one f32 scale in a 32-byte trailer",
            "bitnet.cpp, quantize_i2_s",
        ),
        BodyFormat(
            "TQ1_0", _tq_bytes("TQ1_0", 54), 0, "256 weights in 54 bytes, f16 scale in each", "llama.cpp, block_tq1_0"
        ),
        BodyFormat(
            "TQ2_0", _tq_bytes("TQ2_0", 66), 0, "256 weights in 66 bytes, f16 scale in each", "llama.cpp, block_tq2_0"
        ),
        BodyFormat(
            "TL2 (bitnet.cpp)",
            _tl2_bitnet_cpp_bytes,
            32,
            "as stored, with the reserve its size formula adds",
            "bitnet.cpp, ggml_nbytes for TL2",
        ),
    ]
    floats = [
        BodyFormat("f32", _float_bytes(4), 0, "4 bytes a weight", "IEEE 754"),
        BodyFormat("f16", _float_bytes(2), 0, "2 bytes a weight", "IEEE 754"),
        BodyFormat("bf16", _float_bytes(2), 0, "2 bytes a weight", "the upper half of an f32"),
    ]
    return {f.name: f for f in (*own, *exchange, *floats)}


BODY_FORMATS = _body_formats()
"""Layouts by name: the four packings of this package, those of other programs, and plain floats."""


# ---------------------------------------------------------------------------------------------------- account
@dataclass(frozen=True, kw_only=True)
class MemoryPart(Row):
    """One part of an account: `bytes` for `values` weights (or cached numbers), `bits` for each."""

    name: str
    bytes: int
    values: int
    bits: float
    note: str
    kind: Kind = "modelled"


@dataclass(frozen=True)
class MemoryAccount:
    """The parts of one model and their sums. Build it with `account`."""

    model: str
    body: str
    embedding: str
    parts: tuple[MemoryPart, ...]

    def part_bytes(self, *names: str) -> int:
        """Sum of the parts named; a part that this model does not have counts 0."""
        return sum(part.bytes for part in self.parts if part.name in names)

    @property
    def total_bytes(self) -> int:
        """All parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def total_mb(self) -> float:
        """All parts in 10**6 bytes."""
        return self.total_bytes / 1e6

    @property
    def total_mib(self) -> float:
        """All parts in 2**20 bytes."""
        return self.total_bytes / 2**20

    @property
    def matrix_bytes(self) -> int:
        """Body and tables: no scales, norms, biases or cache."""
        return self.part_bytes("body", "embedding and head", "embedding", "head")

    @property
    def head_bytes(self) -> int:
        """The output head; the embedding table itself when tied."""
        return self.part_bytes("embedding and head", "head")

    @property
    def read_per_token_bytes(self) -> int:
        """Bytes read to decode one token: all but the rows of an untied embedding table, of which a token reads one."""
        return self.total_bytes - self.part_bytes("embedding")

    @property
    def head_share(self) -> float:
        """Share of the head in the matrix bytes read for one token (body and head; not scales, norms or cache)."""
        return self.head_bytes / (self.part_bytes("body") + self.head_bytes)

    def __str__(self) -> str:
        lines = [f"{self.model}: body {self.body}, embedding {self.embedding}"]
        lines += [f"  {p.name:<20}{p.bytes:>16,} bytes  {p.bits:7.4f} bits  {p.note}" for p in self.parts]
        total = f"{self.total_mb:.1f} MB = {self.total_mib:.3f} MiB"
        lines.append(f"  {'total':<20}{self.total_bytes:>16,} bytes  = {total}")
        return "\n".join(lines)


def _table_format(name: str, argument: str) -> TableFormat:
    if name not in TABLE_FORMATS:
        raise ValueError(f"{argument} must be one of {', '.join(TABLE_FORMATS)}, got {name!r}")
    return TABLE_FORMATS[name]


def _body_parts(arch: Architecture, body: str | float) -> tuple[str, list[MemoryPart]]:
    weights = arch.body_weights
    if not isinstance(body, str):
        if not (math.isfinite(body) and body > 0):
            raise ValueError(f"bits per weight must be finite and positive, got {body}")
        # To the nearest byte: 5/3 and log2(3) have no exact binary form, and rounding up might add one for that.
        ideal = round(weights * body / 8)
        part = MemoryPart(
            name="body",
            bytes=ideal,
            values=weights,
            bits=body,
            note="ideal bits: no padding, no scales",
            source=f"{weights} weights x {body:.6g} bits",
        )
        return f"{body:.4g} bits", [part]
    if body not in BODY_FORMATS:
        raise ValueError(f"body must be a number of bits or one of {', '.join(BODY_FORMATS)}, got {body!r}")
    layout = BODY_FORMATS[body]
    size = arch.layers * sum(layout.matrix_bytes(m, k) for _, m, k in arch.block_matrices())
    parts = [
        MemoryPart(
            name="body", bytes=size, values=weights, bits=8 * size / weights, note=layout.note, source=layout.source
        )
    ]
    if layout.scale_bytes:
        parts.append(
            MemoryPart(
                name="scales",
                bytes=arch.body_matrices * layout.scale_bytes,
                values=arch.body_matrices,
                bits=8.0 * layout.scale_bytes,
                note="one f32 a matrix" if layout.scale_bytes == 4 else f"{layout.scale_bytes}-byte trailer a matrix",
                source=layout.source,
            )
        )
    return body, parts


def _plain_part(name: str, values: int, row_width: int, layout: TableFormat, note: str) -> MemoryPart:
    return MemoryPart(
        name=name,
        bytes=values // row_width * layout.row_bytes(row_width),
        values=values,
        bits=layout.bits_per_value,
        note=note,
        source=layout.source,
    )


def account(
    arch: Architecture,
    body: str | float = "i2",
    embedding: str = "f16",
    *,
    norms: str = "f32",
    kv_tokens: int = 0,
    kv_type: str = "f16",
) -> MemoryAccount:
    """Account for one model, part by part.

    Parameters
    ----------
    arch : Architecture
    body : str or float
        A name in `BODY_FORMATS`, or a number of bits per weight for an ideal layout without padding and scales.
    embedding : str
        Name in `TABLE_FORMATS` of the embedding table, and of the head (the same table where tied).
    norms : str
        "f32", "f16" or "bf16": norms and biases.
    kv_tokens : int
        Tokens in the key/value cache of one sequence; 0 leaves the cache out.
    kv_type : str
        Name in `TABLE_FORMATS` of the cache.

    Returns
    -------
    MemoryAccount

    Raises
    ------
    ValueError
        If a name is unknown, a block layout does not divide a row, or `kv_tokens` is negative or beyond the context.
    """
    if kv_tokens < 0 or (arch.context is not None and kv_tokens > arch.context):
        raise ValueError(f"kv_tokens must lie between 0 and the context of {arch.context} tokens, got {kv_tokens}")
    norm_layout = _table_format(norms, "norms")
    if norm_layout.block != 1:
        raise ValueError(f"norms must be f32, f16 or bf16, got {norms!r}")
    table = _table_format(embedding, "embedding")

    body_name, parts = _body_parts(arch, body)
    parts.append(_plain_part("norms", arch.norm_weights, 1, norm_layout, f"{norms}"))
    if arch.bias_weights:
        parts.append(_plain_part("biases", arch.bias_weights, 1, norm_layout, f"query, key and value, {norms}"))
    if arch.tied_head:
        parts.append(
            _plain_part("embedding and head", arch.embedding_weights, arch.hidden, table, f"one table, {embedding}")
        )
    else:
        parts += [_plain_part(n, arch.embedding_weights, arch.hidden, table, embedding) for n in ("embedding", "head")]
    if kv_tokens:
        cached = 2 * arch.attended_tokens(kv_tokens) * arch.kv_width
        layout = _table_format(kv_type, "kv_type")
        note = f"{kv_tokens} tokens, one sequence, {kv_type}"
        parts.append(_plain_part("KV cache", cached, arch.kv_width, layout, note))
    return MemoryAccount(arch.name, body_name, embedding, tuple(parts))


# ---------------------------------------------------------------------------------------------------- tables
@dataclass(frozen=True, kw_only=True)
class AccountRow(Row):
    """A whole model with its body in one layout, in bytes by part.

    `scales_bytes` is 0 where a layout keeps its scales inside its blocks (they are in `matrices_bytes` then) and for
    plain floats, which have none. `embedding_bytes` is the table and the head, the same table where tied.
    """

    model: str
    body: str
    matrices_bytes: int
    scales_bytes: int
    norms_bytes: int
    biases_bytes: int
    embedding: str
    embedding_bytes: int
    kv_tokens: int
    kv_bytes: int
    total_bytes: int
    total_mb: float
    kind: Kind = "modelled"


def account_rows(kv_tokens: int = 2048) -> list[AccountRow]:
    """BitNet b1.58 2B4T in every layout for ternary weights, and its five rivals in bf16; one sequence, f16 cache.

    BitNet has an f16 embedding and f32 norms, as released; the rivals are bf16 throughout.
    """
    ternary = [(BITNET_2B4T, body, "f16", "f32") for body in BODY_FORMATS if body not in TABLE_FORMATS]
    rows = []
    for arch, body, embedding, norms in (*ternary, *((arch, "bf16", "bf16", "bf16") for arch in RIVALS)):
        done = account(arch, body, embedding, norms=norms, kv_tokens=kv_tokens)
        rows.append(
            AccountRow(
                model=arch.name,
                body=body,
                matrices_bytes=done.part_bytes("body"),
                scales_bytes=done.part_bytes("scales"),
                norms_bytes=done.part_bytes("norms"),
                biases_bytes=done.part_bytes("biases"),
                embedding=embedding,
                embedding_bytes=done.part_bytes("embedding and head", "embedding", "head"),
                kv_tokens=kv_tokens,
                kv_bytes=done.part_bytes("KV cache"),
                total_bytes=done.total_bytes,
                total_mb=done.total_mb,
                source=arch.source,
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class StepRow(Row):
    """One step from the published figure to a whole model.

    `bytes`, `mb` and `mib` are modelled; `published` is the figure that somebody printed for the same thing, word for
    word, or empty, and `published_source` says who.
    """

    step: str
    bytes: int
    mb: float
    mib: float
    published: str = ""
    published_source: str = ""
    reason: str
    published_kind: Kind = "quoted"
    kind: Kind = "modelled"


def paper_steps() -> list[StepRow]:
    """The chain from "0.4 GB" to what BitNet b1.58 2B4T really takes, each step with its reason."""
    arch = BITNET_2B4T
    rows: list[StepRow] = []

    def step(name: str, size: int, reason: str, published: str = "", published_source: str = "") -> None:
        rows.append(
            StepRow(
                step=name,
                bytes=size,
                mb=size / 1e6,
                mib=size / 2**20,
                published=published,
                published_source=published_source,
                reason=reason,
                source="shapes of the released model",
            )
        )

    i2s = account(arch, "I2_S", "f16")
    body, scales, norms = (i2s.part_bytes(name) for name in ("body", "scales", "norms"))
    norm_tensors = arch.layers * (arch.block_norms + 2 * arch.sub_norms) + 1
    file_mb = (GGUF_FILE_BYTES - i2s.total_bytes) / 1e6
    step(
        "body at log2(3) bits",
        account(arch, IDEAL_BITS).part_bytes("body"),
        f"{arch.body_weights:,} ternary weights at the entropy of three equally likely values; no table, no norms",
        "0.4 GB",
        "[2B4T, Table 1]",
    )
    step(
        "body at 1.6 bits",
        account(arch, 1.6).part_bytes("body"),
        "five ternary digits to a byte (3^5 = 243 of 256 values): the densest layout of whole bytes here",
    )
    step(
        "body at 5/3 bits",
        account(arch, 5 / 3).part_bytes("body"),
        "a sign and a 4-bit index for three weights, as table look-up kernels want them",
    )
    step("body at 2 bits", body, "four weights to a byte, the usual choice")
    step("+ scales", body + scales, f"I2_S: one f32 in a 32-byte trailer of each of the {arch.body_matrices} matrices")
    step("+ norms", body + scales + norms, f"{norm_tensors} norms in f32")
    step(
        "+ embedding in f16",
        i2s.total_bytes,
        f"one table of {arch.vocabulary:,} x {arch.hidden} is embedding and head; a file adds {file_mb:.1f} MB of "
        "header and vocabulary",
        f"1124.81 MiB; {GGUF_FILE_BYTES:,} bytes as a file",
        "load log in microsoft/BitNet issue 229; released ggml-model-i2_s.gguf",
    )
    step(
        "+ KV cache, 2048 tokens",
        account(arch, "I2_S", "f16", kv_tokens=2048).total_bytes,
        "keys and values of one sequence in f16: 150.0 MiB, doubled at the full context of 4096",
        "150.00 MiB for the cache",
        "load log in microsoft/BitNet issue 229",
    )
    step(
        "whole model, Q6_K embedding",
        account(arch, "I2_S", "q6_K").total_bytes,
        "no cache; the smaller table costs a little quality",
        "perplexity 17.1487 against 17.1090 with f16",
        "wikitext, microsoft/BitNet src/README.md",
    )
    step(
        "whole model, bf16",
        account(arch, "bf16", "bf16").matrix_bytes,
        "matrices and table unpacked, norms not counted: what a packed whole model is to be compared with",
    )
    return rows


@dataclass(frozen=True, kw_only=True)
class BodyRow(Row):
    """The body of one model in one layout: weights with padding, and scales."""

    model: str
    body: str
    body_bytes: int
    scale_bytes: int
    body_mb: float
    bits_per_weight: float
    note: str
    kind: Kind = "modelled"


def body_rows(arch: Architecture = BITNET_2B4T) -> list[BodyRow]:
    """The body in every layout, ideal bits first, then this package's packings, then those of other programs."""
    rows = []
    for body in (IDEAL_BITS, 1.6, 5 / 3, 2.0, *BODY_FORMATS):
        done = account(arch, body)
        part = done.parts[0]
        rows.append(
            BodyRow(
                model=arch.name,
                body=done.body,
                body_bytes=part.bytes,
                scale_bytes=done.part_bytes("scales"),
                body_mb=part.bytes / 1e6,
                bits_per_weight=part.bits,
                note=part.note,
                source=part.source,
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class EmbeddingRow(Row):
    """A whole model with one embedding type: total, and the head's share of the matrix bytes read for a token."""

    model: str
    body: str
    embedding: str
    embedding_mb: float
    total_bytes: int
    total_mb: float
    total_mib: float
    head_share: float
    kind: Kind = "modelled"


def embedding_rows(arch: Architecture = BITNET_2B4T, body: str = "I2_S") -> list[EmbeddingRow]:
    """The whole model (norms in f32, no cache) with each type of embedding."""
    rows = []
    for embedding in ("f32", "f16", "q8_0", "q6_K", "q4_0"):
        done = account(arch, body, embedding)
        rows.append(
            EmbeddingRow(
                model=arch.name,
                body=body,
                embedding=embedding,
                embedding_mb=done.head_bytes / 1e6,
                total_bytes=done.total_bytes,
                total_mb=done.total_mb,
                total_mib=done.total_mib,
                head_share=done.head_share,
                source=f"body as {body}, {TABLE_FORMATS[embedding].source}",
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class RivalRow(Row):
    """One column of [2B4T, Table 1]: published non-embedding memory beside the modelled one, and the whole model.

    `difference_gb` is modelled less published; `within_rounding` says whether the modelled figure, rounded to the
    digits that were printed, is the published one. `kv_bytes_per_token` is for f16 and within the sliding window.
    """

    model: str
    body: str
    published_gb: float
    modelled_gb: float
    difference_gb: float
    within_rounding: bool
    whole_model_mb: float
    kv_bytes_per_token: int
    remark: str
    published_kind: Kind = "quoted"
    kind: Kind = "modelled"


_REMARKS = {
    "LLaMA 3.2 1B": "printed as a whole number",
    "MiniCPM 2B": "4.88 GB would round to 4.9; the table prints 4.8",
    "BitNet b1.58 2B4T": "ideal bits; stored at 2 bits it is 0.52 GB",
}
_PRINTED_DIGITS = {"LLaMA 3.2 1B": 0}


def rival_rows() -> list[RivalRow]:
    """Row "Memory (Non-emb)" of [2B4T, Table 1] beside the account: bf16 for the five rivals, log2(3) bits for BitNet.

    The modelled column holds the block matrices only; `whole_model_mb` adds norms, biases and table, in bf16 for the
    rivals and as I2_S with an f16 table for BitNet.
    """
    rows = []
    for arch in PUBLISHED_SIX:
        body: str | float = IDEAL_BITS if arch.ternary else "bf16"
        done = account(arch, body)
        whole = account(arch, "I2_S", "f16") if arch.ternary else account(arch, "bf16", "bf16", norms="bf16")
        published = PUBLISHED_NON_EMBEDDING_GB[arch.name]
        modelled = done.part_bytes("body") / 1e9
        cache = account(arch, body, kv_tokens=1).part_bytes("KV cache")
        rows.append(
            RivalRow(
                model=arch.name,
                body=done.body,
                published_gb=published,
                modelled_gb=modelled,
                difference_gb=modelled - published,
                within_rounding=round(modelled, _PRINTED_DIGITS.get(arch.name, 1)) == published,
                whole_model_mb=whole.total_mb,
                kv_bytes_per_token=cache,
                remark=_REMARKS.get(arch.name, ""),
                source=f"published: [2B4T, Table 1]; modelled: {arch.source}",
            )
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class KvRow(Row):
    """Key/value cache of one sequence."""

    model: str
    tokens: int
    kv_type: str
    bytes: int
    mib: float
    kind: Kind = "modelled"


def kv_rows(tokens: tuple[int, ...] = (512, 2048, 4096), kv_type: str = "f16") -> list[KvRow]:
    """The cache of BitNet b1.58 2B4T and its five rivals by context length."""
    rows = []
    for arch in (BITNET_2B4T, *RIVALS):
        for count in tokens:
            size = account(arch, 2.0, kv_tokens=count, kv_type=kv_type).part_bytes("KV cache")
            rows.append(
                KvRow(model=arch.name, tokens=count, kv_type=kv_type, bytes=size, mib=size / 2**20, source=arch.source)
            )
    return rows
