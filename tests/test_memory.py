"""The memory account: every figure that the papers, the released file or a user's log states, to its last digit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ref.measure import memory
from bitnet_ref.measure.architectures import (
    B158_SHAPES,
    BITNET_2B4T,
    BITNET_SHAPES,
    GEMMA3_1B,
    LLAMA32_1B,
    MINICPM_2B,
    PUBLISHED_SIX,
    QWEN25_1_5B,
    RIVALS,
    SMOLLM2_1_7B,
    Architecture,
)
from bitnet_ref.measure.memory import BODY_FORMATS, TABLE_FORMATS, account
from bitnet_ref.measure.provenance import KINDS, Row

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"


# ------------------------------------------------------------------------------------------------------ architectures
@pytest.mark.parametrize(
    ("arch", "parameters"),
    [
        # Parameter counts stated by the model hub for each checkpoint (safetensors metadata).
        (LLAMA32_1B, 1_235_814_400),
        (GEMMA3_1B, 999_885_952),
        (QWEN25_1_5B, 1_543_714_304),
        (SMOLLM2_1_7B, 1_711_376_384),
        (MINICPM_2B, 2_724_880_896),
    ],
    ids=lambda value: value.name if isinstance(value, Architecture) else "",
)
def test_rivals_have_the_parameters_of_their_checkpoints(arch: Architecture, parameters: int) -> None:
    assert arch.parameters == parameters


def test_2b4t_counts() -> None:
    assert BITNET_2B4T.body_weights == 2_084_044_800
    assert BITNET_2B4T.embedding_weights == 328_335_360
    assert BITNET_2B4T.body_matrices == 210  # i2_s tensors in the header of the released file
    assert BITNET_2B4T.norm_weights == 30 * (2560 + 2560 + 2560 + 6912) + 2560


def test_an_architecture_refuses_what_no_model_is() -> None:
    good = {"name": "x", "layers": 2, "hidden": 8, "ffn": 16, "heads": 4, "kv_heads": 2, "head_dim": 2}
    good |= {"vocabulary": 10, "source": "test"}
    Architecture(**good)
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads = 3"):
        Architecture(**good | {"kv_heads": 3})
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        Architecture(**good | {"layers": 0})
    with pytest.raises(ValueError, match="sliding_window"):
        Architecture(**good | {"sliding_window": 512})
    with pytest.raises(ValueError, match="states none"):
        _ = BITNET_SHAPES["6.7B"].embedding_weights


# -------------------------------------------------------------------------------------------------- published figures
@pytest.mark.parametrize(
    ("body", "megabytes"),
    [
        (math.log2(3), 412.9),
        (1.6, 416.8),
        (5 / 3, 434.2),
        ("TQ1_0", 439.6),
        (2.0, 521.0),
        ("I2_S", 521.0),
        ("i2", 521.0),
        ("TQ2_0", 537.3),
    ],
)
def test_body_to_the_last_printed_digit(body: str | float, megabytes: float) -> None:
    assert round(account(BITNET_2B4T, body).part_bytes("body") / 1e6, 1) == megabytes


def test_body_bytes_of_each_packing() -> None:
    """With padding: 6912 rows are 1383 groups of five (3 rows more), 2560 columns 107 blocks of 24 (8 columns more)."""
    attention = 2 * (2560 * 2560) + 2 * (640 * 2560)
    ffn = 3 * (6912 * 2560)
    assert account(BITNET_2B4T, "i2").part_bytes("body") == 30 * (attention + ffn) // 4
    assert account(BITNET_2B4T, "tl1").part_bytes("body") == 30 * (attention + ffn) // 4
    base3 = 2 * (512 * 2560) + 2 * (128 * 2560) + 2 * (1383 * 2560) + 512 * 6912
    assert account(BITNET_2B4T, "base3").part_bytes("body") == 30 * base3
    tl2 = (2 * 40 * 107 + 2 * 10 * 107 + 2 * 108 * 107 + 40 * 288) * 320
    assert account(BITNET_2B4T, "tl2").part_bytes("body") == 30 * tl2
    for scheme in ("i2", "tl1", "base3", "tl2"):
        assert account(BITNET_2B4T, scheme).part_bytes("scales") == 210 * 4


def test_tensors_as_bitnet_cpp_stores_them() -> None:
    """Sizes of single tensors read from files that bitnet.cpp wrote, trailer of 32 bytes included."""
    for shape, i2s_bytes, tl2_bytes in (
        ((2560, 2560), 1_638_432, 1_392_672),
        ((640, 2560), 409_632, 348_192),
        ((6912, 2560), 4_423_712, 3_760_160),
        ((2560, 6912), 4_423_712, 3_713_760),
    ):
        assert BODY_FORMATS["I2_S"].matrix_bytes(*shape) + 32 == i2s_bytes
        assert BODY_FORMATS["TL2 (bitnet.cpp)"].matrix_bytes(*shape) + 32 == tl2_bytes
    for body, total in (("I2_S", 521_017_920), ("TL2 (bitnet.cpp)", 441_474_240)):
        assert account(BITNET_2B4T, body).part_bytes("body", "scales") == total


@pytest.mark.parametrize(
    ("embedding", "megabytes", "head_percent"),
    [("f32", 1836.1, 71.6), ("f16", 1179.4, 55.8), ("q8_0", 871.6, 40.1), ("q6_K", 792.1, 34.1), ("q4_0", 707.5, 26.2)],
)
def test_whole_model_by_embedding_type(embedding: str, megabytes: float, head_percent: float) -> None:
    done = account(BITNET_2B4T, "I2_S", embedding)
    assert round(done.total_mb, 1) == megabytes
    assert round(100 * done.head_share, 1) == head_percent


def test_whole_model_of_a_users_log() -> None:
    """1124.81 MiB of tensors and 150.00 MiB of cache: microsoft/BitNet issue 229."""
    done = account(BITNET_2B4T, "I2_S", "f16", kv_tokens=2048)
    cache = done.part_bytes("KV cache")
    assert f"{(done.total_bytes - cache) / 2**20:.3f}" == "1124.811"
    assert cache == 150 * 2**20
    assert account(BITNET_2B4T, kv_tokens=4096).part_bytes("KV cache") == 300 * 2**20


def test_unpacked_model() -> None:
    done = account(BITNET_2B4T, "bf16", "bf16", norms="bf16")
    assert round(done.matrix_bytes / 1e6, 1) == 4824.8
    assert f"{done.matrix_bytes / 2**20:.2f}" == "4601.25"
    assert f"{done.total_mib:.2f}" == "4602.09"


def test_non_embedding_memory_of_the_technical_report() -> None:
    """[2B4T, Table 1]: five of six cells round to the printed figure; MiniCPM is 4.88 GB where 4.8 is printed."""
    rows = memory.rival_rows()
    assert [row.published_gb for row in rows] == [2.0, 1.4, 2.6, 3.2, 4.8, 0.4]
    assert [round(row.modelled_gb, 2) for row in rows] == [1.95, 1.40, 2.62, 3.22, 4.88, 0.41]
    assert [row.model for row in rows if not row.within_rounding] == ["MiniCPM 2B"]
    assert all(row.kind == "modelled" and row.published_kind == "quoted" for row in rows)


def test_sliding_window_bounds_the_cache() -> None:
    """Gemma-3 1B: 22 layers keep at most 512 tokens, 4 keep all; one key/value head of 256, keys and values, f16."""
    per_layer_token = 2 * 256 * 2
    assert account(GEMMA3_1B, "bf16", kv_tokens=512).part_bytes("KV cache") == 26 * 512 * per_layer_token
    assert account(GEMMA3_1B, "bf16", kv_tokens=2048).part_bytes("KV cache") == (22 * 512 + 4 * 2048) * per_layer_token


def test_steps_go_from_the_published_figure_to_the_whole_model() -> None:
    steps = {row.step: row for row in memory.paper_steps()}
    printed = [f"{row.mb:.1f}" for row in steps.values()]
    assert printed == ["412.9", "416.8", "434.2", "521.0", "521.0", "522.8", "1179.4", "1336.7", "792.1", "4824.8"]
    assert steps["body at log2(3) bits"].published == "0.4 GB"
    assert steps["+ scales"].bytes - steps["body at 2 bits"].bytes == 210 * 32
    assert "121 norms" in steps["+ norms"].reason
    assert f"{memory.GGUF_FILE_BYTES:,}" in steps["+ embedding in f16"].published
    # Header and vocabulary can only add to the tensors.
    assert steps["+ embedding in f16"].bytes < memory.GGUF_FILE_BYTES
    ratio = steps["whole model, bf16"].bytes / steps["+ embedding in f16"].bytes
    assert f"{ratio:.2f}" == "4.09"


def test_account_rows_are_2b4t_in_every_layout_and_the_rivals() -> None:
    rows = memory.account_rows()
    layouts = ["i2", "base3", "tl1", "tl2", "I2_S", "TQ1_0", "TQ2_0", "TL2 (bitnet.cpp)"]
    assert [row.body for row in rows if row.model == BITNET_2B4T.name] == layouts
    assert [row.model for row in rows if row.body == "bf16"] == [arch.name for arch in RIVALS]
    assert len(rows) == len(layouts) + len(RIVALS)
    for row in rows:
        parts = ("matrices", "scales", "norms", "biases", "embedding", "kv")
        assert row.total_bytes == sum(getattr(row, f"{part}_bytes") for part in parts)
        assert row.total_mb == row.total_bytes / 1e6
        assert row.kv_tokens == 2048


def test_account_rows_have_the_known_bytes() -> None:
    rows = {(row.model, row.body): row for row in memory.account_rows()}
    i2s = rows[BITNET_2B4T.name, "I2_S"]
    # The load log of microsoft/BitNet issue 229: 1124.81 MiB of tensors, 150.00 MiB of cache.
    assert (i2s.total_bytes, i2s.kv_bytes) == (1_336_736_320, 150 * 2**20)
    assert f"{(i2s.total_bytes - i2s.kv_bytes) / 2**20:.2f}" == "1124.81"
    parts = (i2s.matrices_bytes, i2s.scales_bytes, i2s.norms_bytes, i2s.biases_bytes, i2s.embedding_bytes)
    # 2 bits a weight; 210 trailers of 32 bytes; 440,320 norm weights in f32; 128,256 x 2560 values in f16.
    assert parts == (2_084_044_800 // 4, 210 * 32, 440_320 * 4, 0, 128_256 * 2560 * 2)
    assert rows[BITNET_2B4T.name, "base3"].scales_bytes == 210 * 4
    assert rows[BITNET_2B4T.name, "TQ1_0"].scales_bytes == 0
    # Two bytes for each parameter of the published checkpoint, biases and norms included.
    for arch in RIVALS:
        row = rows[arch.name, "bf16"]
        assert row.total_bytes - row.kv_bytes == 2 * arch.parameters
    assert rows[QWEN25_1_5B.name, "bf16"].biases_bytes == 2 * 28 * (1536 + 2 * 256)


def test_account_rows_take_another_context() -> None:
    for short, long in zip(memory.account_rows(1024), memory.account_rows(4096), strict=True):
        # Gemma-3 caches at most 512 tokens in 22 of 26 layers; all others cache all tokens.
        factor = (22 * 512 + 4 * 4096) / (22 * 512 + 4 * 1024) if short.model == GEMMA3_1B.name else 4
        assert long.kv_bytes == short.kv_bytes * factor
        assert long.total_bytes - long.kv_bytes == short.total_bytes - short.kv_bytes


# ------------------------------------------------------------------------------------------------------ properties
ARCHITECTURES = st.sampled_from([*PUBLISHED_SIX, *B158_SHAPES.values()])


@given(arch=ARCHITECTURES, low=st.floats(0.5, 16), high=st.floats(0.5, 16))
def test_more_bits_never_take_fewer_bytes(arch: Architecture, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert account(arch, low).total_bytes <= account(arch, high).total_bytes


@given(
    arch=ARCHITECTURES,
    body=st.sampled_from(["i2", "base3", "tl1", "tl2", "bf16", "f32"]),
    embedding=st.sampled_from(["f32", "f16", "bf16", "q8_0", "q4_0"]),
    tokens=st.integers(0, 2048),
)
def test_parts_sum_to_the_total(arch: Architecture, body: str, embedding: str, tokens: int) -> None:
    done = account(arch, body, embedding, kv_tokens=tokens)
    assert done.total_bytes == sum(part.bytes for part in done.parts)
    assert len({part.name for part in done.parts}) == len(done.parts)
    assert all(type(part.bytes) is int and part.bytes > 0 for part in done.parts)
    assert sum(part.values for part in done.parts if part.name not in ("scales", "KV cache")) == arch.parameters
    assert done.read_per_token_bytes <= done.total_bytes
    assert f"{done.total_bytes:,}" in str(done)


@given(arch=ARCHITECTURES, scheme=st.sampled_from(["i2", "base3", "tl1", "tl2"]))
def test_no_packing_is_below_the_entropy_or_below_its_own_bits(arch: Architecture, scheme: str) -> None:
    nominal = {"i2": 2, "base3": 1.6, "tl1": 2, "tl2": 5 / 3}[scheme]
    # 1e-12: bits are a float quotient
    assert account(arch, scheme).parts[0].bits >= nominal - 1e-12 > memory.IDEAL_BITS


@given(
    arch=ARCHITECTURES,
    tokens=st.tuples(st.integers(0, 2048), st.integers(0, 2048)),
    kv=st.sampled_from(["f16", "q8_0"]),
)
def test_a_longer_context_never_takes_a_smaller_cache(arch: Architecture, tokens: tuple[int, int], kv: str) -> None:
    short, long = (account(arch, 2.0, kv_tokens=t, kv_type=kv).part_bytes("KV cache") for t in sorted(tokens))
    assert short <= long


# ------------------------------------------------------------------------------------------------------ refusals, rows
@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"body": "i3"}, "body must be a number of bits or one of i2"),
        ({"body": 0.0}, "bits per weight must be finite and positive"),
        ({"body": math.nan}, "bits per weight must be finite and positive"),
        ({"embedding": "q5_0"}, "embedding must be one of f32"),
        ({"norms": "q8_0"}, "norms must be f32, f16 or bf16"),
        ({"kv_tokens": -1}, "between 0 and the context of 4096"),
        ({"kv_tokens": 4097}, "between 0 and the context of 4096"),
        ({"kv_tokens": 1, "kv_type": "q6_K"}, "q6_K needs rows of a multiple of 256 values, got 640"),
    ],
)
def test_account_refuses(arguments: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        account(BITNET_2B4T, **arguments)


def test_layouts_of_other_programs_refuse_shapes_they_cannot_hold() -> None:
    for body, shape in (("TQ1_0", (4, 100)), ("TQ2_0", (4, 100)), ("I2_S", (3, 5)), ("TL2 (bitnet.cpp)", (32, 96))):
        with pytest.raises(ValueError, match=r"got|multiple"):
            BODY_FORMATS[body].matrix_bytes(*shape)


def test_table_formats_have_the_bits_of_their_blocks() -> None:
    bits = {name: layout.bits_per_value for name, layout in TABLE_FORMATS.items()}
    assert bits == {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_K": 6.5625, "q4_0": 4.5}


@pytest.mark.parametrize(
    "rows",
    [
        memory.account_rows,
        memory.paper_steps,
        memory.body_rows,
        memory.embedding_rows,
        memory.rival_rows,
        memory.kv_rows,
    ],
    ids=lambda f: f.__name__,
)
def test_every_row_names_its_kind_and_source(rows) -> None:
    for row in rows():
        flat = row.as_row()
        assert flat["kind"] in KINDS
        assert flat["source"]


def test_a_row_without_provenance_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of measured, modelled, quoted, got 'guessed'"):
        Row(kind="guessed", source="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="source must name"):
        Row(kind="quoted", source=" ")


# ------------------------------------------------------------------------------------------------------ the page
def test_the_page_prints_what_the_account_gives() -> None:
    page = PAGE.read_text(encoding="utf-8")
    steps = memory.paper_steps()
    expected = [f"| {row.step} | {row.bytes:,} | {row.mb:.1f} | {row.mib:.3f} |" for row in steps]
    expected += [
        f"| {row.model} | {row.body} | {row.matrices_bytes:,} | {row.scales_bytes:,} | {row.norms_bytes:,} | "
        f"{row.biases_bytes:,} | {row.embedding_bytes:,} | {row.kv_bytes:,} | {row.total_bytes:,} | "
        f"{row.total_mb:.1f} |"
        for row in memory.account_rows()
    ]
    expected += [text for row in steps for text in (row.published, row.published_source, row.reason)]
    expected += [
        f"| {row.body} | {row.body_bytes:,} | {row.body_mb:.1f} | {row.bits_per_weight:.4f} | {row.scale_bytes:,} |"
        for row in memory.body_rows()
        if row.body not in ("f32", "f16", "bf16")
    ]
    expected += [
        f"| {row.embedding} | {row.embedding_mb:.1f} | {row.total_mb:.1f} | {row.total_mib:.1f} | "
        f"{row.head_share:.1%} |"
        for row in memory.embedding_rows()
    ]
    expected += [
        f"| {row.model} | {row.published_gb:g} | {row.modelled_gb:.2f} | {row.whole_model_mb:.1f} | {row.remark} |"
        for row in memory.rival_rows()
    ]
    caches = {arch.name: [] for arch in (BITNET_2B4T, *RIVALS)}
    for row in memory.kv_rows():
        caches[row.model].append(f"{row.mib:.1f}")
    expected += [f"| {model} | {' | '.join(sizes)} |" for model, sizes in caches.items()]
    missing = [line for line in expected if line not in page]
    assert not missing, "docs/memory.md lacks:\n" + "\n".join(missing)
