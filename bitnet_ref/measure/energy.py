"""The energy model of the BitNet papers: count additions and multiplications, multiply by a price for each.

Nothing here is measured. [BitNet], [B158] and [2B4T] price the arithmetic of the matrix multiplications of one whole
forward pass over 512 tokens, with the energies of single operations in 45 nm and 7 nm circuits. For (m x n)(n x p):

    float     E_add = m (n - 1) p e_add            E_mul = m n p e_mul              [BitNet, Eq. 16 and 17]
    ternary   E_add = m (n - 1) p e_add (INT8)     E_mul = (m p + m n) e_mul        [BitNet, Eq. 16 and 18]

The two products inside attention, Q K^T and A V, are FP16 in BitNet as well: they are 72 % of what the model gives for
BitNet b1.58 2B4T. `COUNTED` and `LEFT_OUT` list what is in the sum and what is not.

The published joules are joules for a 512-token forward pass, not for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitnet_ref.measure.architectures import (
    B158_SHAPES,
    BITNET_2B4T,
    BITNET_SHAPES,
    PUBLISHED_SIX,
    Architecture,
)
from bitnet_ref.measure.memory import account
from bitnet_ref.measure.provenance import Kind, Row

__all__ = [
    "BITNET_TABLE1_JOULES",
    "COUNTED",
    "DRAM_PJ_PER_BYTE",
    "LEFT_OUT",
    "MEASURED_JOULES_PER_TOKEN",
    "OPERATION_PJ",
    "PUBLISHED_JOULES",
    "SEQUENCE",
    "B158Row",
    "BitnetTableRow",
    "EnergyEstimate",
    "ImpliedWattsRow",
    "LeftOutRow",
    "OperationCost",
    "PublishedRow",
    "arithmetic_ratio",
    "b158_rows",
    "bitnet_table_rows",
    "decode_energy",
    "forward_energy",
    "implied_watts_rows",
    "left_out_rows",
    "matmul_joules",
    "moved_joules",
    "published_rows",
    "saving_range",
    "ternary_matmul_joules",
]

Precision = Literal["fp32", "fp16", "int8"]
Weights = Literal["fp32", "fp16", "ternary"]

SEQUENCE = 512
"""Tokens of the forward pass behind every published figure [BitNet, Table 1; 2B4T, appendix]."""


@dataclass(frozen=True)
class OperationCost:
    """Energy of one addition and one multiplication, in picojoules."""

    add: float
    mul: float


OPERATION_PJ: dict[int, dict[str, OperationCost]] = {
    45: {"fp32": OperationCost(0.9, 3.7), "fp16": OperationCost(0.4, 1.1), "int8": OperationCost(0.03, 0.2)},
    7: {"fp32": OperationCost(0.38, 1.31), "fp16": OperationCost(0.16, 0.34), "int8": OperationCost(0.007, 0.07)},
}
"""Node in nm -> precision -> pJ [BitNet, Table 2]; the 7 nm FP16 and INT8 rows are also [2B4T, Table 4]."""

DRAM_PJ_PER_BYTE = 1300 / 8
"""Default price of reading one byte from memory, an assumption: 1.3 nJ for a 64-bit DRAM access, the lower end of the
1.3 to 2.6 nJ in M. Horowitz, "Computing's energy problem", ISSCC 2014. That is 20.3 pJ a bit, for the memory of that
time; [BitNet, Table 2] takes its 45 nm operations from the same survey. Newer memory takes less: put in your figure.
"""

PUBLISHED_JOULES = {
    "LLaMA 3.2 1B": 0.258,
    "Gemma-3 1B": 0.186,
    "Qwen2.5 1.5B": 0.347,
    "SmolLM2 1.7B": 0.425,
    "MiniCPM 2B": 0.649,
    "BitNet b1.58 2B4T": 0.028,
}
"""[2B4T, Table 1], row "Energy (Estimated)", in joules."""

COUNTED = (
    "the weight matrices of all blocks, for every token of the sequence",
    "Q K^T and A V, over the full square of the sequence: the causal mask saves nothing",
    "in a ternary matrix, one multiplication by a scale for each input and each output value of each token",
)
"""What the published figures count."""

LEFT_OUT = (
    "the output head, although it stays in 16 bits",
    "moving bytes: weights, activations and the key/value cache, from any memory",
    "norms, softmax, rotary embedding, activation functions, residual additions and the quantisation of activations",
    "the width of an accumulator: sums of INT8 values are priced as INT8 additions",
    "instructions, addresses, control, leakage and idle power: all of a processor that is not an adder or multiplier",
)
"""What the published figures do not count."""


def _cost(node_nm: int, precision: str) -> OperationCost:
    if node_nm not in OPERATION_PJ:
        raise ValueError(f"node_nm must be one of {', '.join(map(str, OPERATION_PJ))}, got {node_nm}")
    if precision not in OPERATION_PJ[node_nm]:
        raise ValueError(f"precision must be one of {', '.join(OPERATION_PJ[node_nm])}, got {precision!r}")
    return OPERATION_PJ[node_nm][precision]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def matmul_joules(m: int, n: int, p: int, precision: str = "fp16", *, node_nm: int = 7) -> tuple[float, float]:
    """Energy of (m x n)(n x p) in float or integer arithmetic [BitNet, Eq. 16 and 17].

    Returns
    -------
    (float, float)
        Joules of the additions, joules of the multiplications.

    Raises
    ------
    ValueError
        If a size is below 1, or node or precision is not in `OPERATION_PJ`.
    """
    _check_sizes(m=m, n=n, p=p)
    cost = _cost(node_nm, precision)
    return m * (n - 1) * p * cost.add * 1e-12, m * n * p * cost.mul * 1e-12


def ternary_matmul_joules(m: int, n: int, p: int, *, node_nm: int = 7) -> tuple[float, float]:
    """Energy of (m x n)(n x p) with INT8 activations and a ternary (n x p) matrix [BitNet, Eq. 16 and 18].

    A ternary weight needs no multiplication; those of eq. 18 apply the two scales, and are priced as FP16.

    Returns
    -------
    (float, float)
        Joules of the additions, joules of the multiplications.
    """
    _check_sizes(m=m, n=n, p=p)
    additions = m * (n - 1) * p * _cost(node_nm, "int8").add
    multiplications = (m * p + m * n) * _cost(node_nm, "fp16").mul
    return additions * 1e-12, multiplications * 1e-12


def moved_joules(moved_bytes: int, *, dram_pj_per_byte: float = DRAM_PJ_PER_BYTE) -> float:
    """Energy of reading bytes from memory at a stated price; see `DRAM_PJ_PER_BYTE` for the default and its limits."""
    if moved_bytes < 0 or dram_pj_per_byte < 0:
        raise ValueError(f"bytes and price must not be negative, got {moved_bytes} and {dram_pj_per_byte}")
    return moved_bytes * dram_pj_per_byte * 1e-12


# ---------------------------------------------------------------------------------------------------- one model
@dataclass(frozen=True, kw_only=True)
class EnergyEstimate(Row):
    """Modelled energy of one pass through one model, in joules, by part and by operation."""

    model: str
    queries: int
    keys: int
    weights: str
    attention: str
    node_nm: int
    linear_add_joules: float
    linear_mul_joules: float
    attention_add_joules: float
    attention_mul_joules: float
    head_add_joules: float
    head_mul_joules: float
    kind: Kind = "modelled"

    @property
    def linear_joules(self) -> float:
        return self.linear_add_joules + self.linear_mul_joules

    @property
    def attention_joules(self) -> float:
        return self.attention_add_joules + self.attention_mul_joules

    @property
    def head_joules(self) -> float:
        return self.head_add_joules + self.head_mul_joules

    @property
    def add_joules(self) -> float:
        return self.linear_add_joules + self.attention_add_joules + self.head_add_joules

    @property
    def mul_joules(self) -> float:
        return self.linear_mul_joules + self.attention_mul_joules + self.head_mul_joules

    @property
    def joules(self) -> float:
        return self.add_joules + self.mul_joules


def _estimate(
    arch: Architecture,
    queries: int,
    keys: int,
    weights: str | None,
    attention: str | None,
    head: str | None,
    node_nm: int,
) -> EnergyEstimate:
    weights = weights or ("ternary" if arch.ternary else "fp16")
    if weights not in ("fp32", "fp16", "ternary"):
        raise ValueError(f"weights must be fp32, fp16 or ternary, got {weights!r}")
    attention = attention or ("fp16" if weights == "ternary" else weights)

    linear_add = linear_mul = 0.0
    for _, m_out, k_in in arch.block_matrices():
        if weights == "ternary":
            add, mul = ternary_matmul_joules(queries, k_in, m_out, node_nm=node_nm)
        else:
            add, mul = matmul_joules(queries, k_in, m_out, weights, node_nm=node_nm)
        linear_add += arch.layers * add
        linear_mul += arch.layers * mul

    attention_add = attention_mul = 0.0
    local_keys = min(keys, arch.sliding_window)
    for layers, seen in ((arch.sliding_layers, local_keys), (arch.layers - arch.sliding_layers, keys)):
        if layers:
            scores = matmul_joules(queries, arch.head_dim, seen, attention, node_nm=node_nm)
            values = matmul_joules(queries, seen, arch.head_dim, attention, node_nm=node_nm)
            attention_add += layers * arch.heads * (scores[0] + values[0])
            attention_mul += layers * arch.heads * (scores[1] + values[1])

    head_add = head_mul = 0.0
    if head is not None:
        rows = arch.embedding_weights // arch.hidden
        head_add, head_mul = matmul_joules(queries, arch.hidden, rows, head, node_nm=node_nm)

    return EnergyEstimate(
        model=arch.name,
        queries=queries,
        keys=keys,
        weights=weights,
        attention=attention,
        node_nm=node_nm,
        linear_add_joules=linear_add,
        linear_mul_joules=linear_mul,
        attention_add_joules=attention_add,
        attention_mul_joules=attention_mul,
        head_add_joules=head_add,
        head_mul_joules=head_mul,
        source=f"[BitNet, Eq. 16-18] at the {node_nm} nm prices of [BitNet, Table 2]",
    )


def forward_energy(
    arch: Architecture,
    *,
    sequence: int = SEQUENCE,
    weights: Weights | None = None,
    attention: Precision | None = None,
    head: Precision | None = None,
    node_nm: int = 7,
) -> EnergyEstimate:
    """Arithmetic of one forward pass over a whole sequence. The defaults are those of the published figures.

    Parameters
    ----------
    arch : Architecture
    sequence : int
        Tokens T; attention is counted over T x T.
    weights : {"fp32", "fp16", "ternary"}, optional
        Arithmetic of the block matrices; by default ternary for a ternary architecture, else FP16.
    attention : {"fp32", "fp16", "int8"}, optional
        Arithmetic of Q K^T and A V; by default that of the weights, and FP16 for ternary ones.
    head : {"fp32", "fp16", "int8"}, optional
        Arithmetic of the output head, computed for every token; by default the head is left out, as in the papers.
    node_nm : {7, 45}
        Column of [BitNet, Table 2].

    Returns
    -------
    EnergyEstimate

    Raises
    ------
    ValueError
        If an argument is not one of the above, or the head is asked for and the vocabulary is not known.
    """
    return _estimate(arch, sequence, sequence, weights, attention, head, node_nm)


def decode_energy(
    arch: Architecture,
    *,
    context: int = SEQUENCE,
    weights: Weights | None = None,
    attention: Precision | None = None,
    head: Precision | None = None,
    node_nm: int = 7,
) -> EnergyEstimate:
    """Arithmetic of generating one token that attends to `context` tokens; other arguments as in `forward_energy`."""
    return _estimate(arch, 1, context, weights, attention, head, node_nm)


# --------------------------------------------------------------------------------------------------- [2B4T, Table 1]
@dataclass(frozen=True, kw_only=True)
class PublishedRow(Row):
    """One column of [2B4T, Table 1]: the published energy beside the modelled one, both for 512 tokens.

    `relative_difference` is modelled / published - 1, `attention_share` the share of attention in the modelled figure.
    """

    model: str
    published_joules: float
    modelled_joules: float
    relative_difference: float
    linear_joules: float
    attention_joules: float
    attention_share: float
    published_kind: Kind = "quoted"
    kind: Kind = "modelled"


def published_rows() -> list[PublishedRow]:
    """The six energies of [2B4T, Table 1] beside the model's, from the architectures alone."""
    rows = []
    for arch in PUBLISHED_SIX:
        estimate = forward_energy(arch)
        published = PUBLISHED_JOULES[arch.name]
        rows.append(
            PublishedRow(
                model=arch.name,
                published_joules=published,
                modelled_joules=estimate.joules,
                relative_difference=estimate.joules / published - 1,
                linear_joules=estimate.linear_joules,
                attention_joules=estimate.attention_joules,
                attention_share=estimate.attention_joules / estimate.joules,
                source=f"published: [2B4T, Table 1]; modelled: {estimate.source}",
            )
        )
    return rows


def saving_range(column: Literal["published", "modelled"] = "modelled") -> tuple[float, float]:
    """Least and greatest saving of BitNet b1.58 2B4T over its five rivals, 1 - E_BitNet / E_rival.

    Reported in the press as "85 to 96 percent less energy"; either column of `published_rows` gives it.
    """
    if column not in ("published", "modelled"):
        raise ValueError(f"column must be published or modelled, got {column!r}")
    joules = {row.model: getattr(row, f"{column}_joules") for row in published_rows()}
    own = joules.pop(BITNET_2B4T.name)
    savings = [1 - own / other for other in joules.values()]
    return min(savings), max(savings)


def arithmetic_ratio(node_nm: int = 7) -> float:
    """FP16 addition and multiplication over one INT8 addition: the "71.4 times" of [B158], at 7 nm.

    It is a ratio of two prices, for the multiply-accumulate alone; no model attains it, for attention stays FP16.
    """
    half = _cost(node_nm, "fp16")
    return (half.add + half.mul) / _cost(node_nm, "int8").add


# ------------------------------------------------------------------------------------------------- [BitNet, Table 1]
# size -> model -> (MUL 7 nm, ADD 7 nm, MUL 45 nm, ADD 45 nm), joules, 512 tokens
BITNET_TABLE1_JOULES: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "6.7B": {"FP32": (4.41, 1.28, 12.46, 3.03), "FP16": (1.14, 0.54, 3.70, 1.35), "BitNet": (0.02, 0.04, 0.08, 0.13)},
    "13B": {"FP32": (8.58, 2.49, 24.23, 5.89), "FP16": (2.23, 1.05, 7.20, 2.62), "BitNet": (0.04, 0.06, 0.12, 0.24)},
    "30B": {"FP32": (20.09, 5.83, 56.73, 13.80), "FP16": (5.21, 2.45, 16.87, 6.13), "BitNet": (0.06, 0.14, 0.20, 0.53)},
}
"""[BitNet, Table 1], quoted."""


@dataclass(frozen=True, kw_only=True)
class BitnetTableRow(Row):
    """One cell of [BitNet, Table 1].

    `difference_joules` is modelled less published, and `within_rounding` says whether the modelled figure prints as the
    published one, with two decimals.
    """

    size: str
    model: str
    operation: str
    node_nm: int
    published_joules: float
    modelled_joules: float
    difference_joules: float
    within_rounding: bool
    published_kind: Kind = "quoted"
    kind: Kind = "modelled"


def bitnet_table_rows() -> list[BitnetTableRow]:
    """All 36 cells of [BitNet, Table 1] beside the model's."""
    weights: dict[str, Weights] = {"FP32": "fp32", "FP16": "fp16", "BitNet": "ternary"}
    rows = []
    for size, models in BITNET_TABLE1_JOULES.items():
        for model, cells in models.items():
            for (operation, node), published in zip(
                (("MUL", 7), ("ADD", 7), ("MUL", 45), ("ADD", 45)), cells, strict=True
            ):
                estimate = forward_energy(BITNET_SHAPES[size], weights=weights[model], node_nm=node)
                modelled = estimate.mul_joules if operation == "MUL" else estimate.add_joules
                rows.append(
                    BitnetTableRow(
                        size=size,
                        model=model,
                        operation=operation,
                        node_nm=node,
                        published_joules=published,
                        modelled_joules=modelled,
                        difference_joules=modelled - published,
                        within_rounding=round(modelled, 2) == published,
                        source=f"published: [BitNet, Table 1]; modelled: {estimate.source}",
                    )
                )
    return rows


# ------------------------------------------------------------------------------------------------------------- [B158]
@dataclass(frozen=True, kw_only=True)
class B158Row(Row):
    """FP16 over ternary energy at one size of [B158], for 512 tokens; `_with_head` adds an FP16 head to both."""

    size: str
    fp16_joules: float
    ternary_joules: float
    ratio: float
    ratio_with_head: float
    kind: Kind = "modelled"


def b158_rows() -> list[B158Row]:
    """Energy ratios at the sizes of [B158]. Modelled only: the values printed in its Figure 3 are not repeated."""
    rows = []
    for size, arch in B158_SHAPES.items():
        half, ternary = (forward_energy(arch, weights=w, head="fp16") for w in ("fp16", "ternary"))
        half_body, ternary_body = half.joules - half.head_joules, ternary.joules - ternary.head_joules
        rows.append(
            B158Row(
                size=size,
                fp16_joules=half_body,
                ternary_joules=ternary_body,
                ratio=half_body / ternary_body,
                ratio_with_head=half.joules / ternary.joules,
                source=f"{half.source}; shape: {arch.source}",
            )
        )
    return rows


# ---------------------------------------------------------------------------------------------- what is left out
@dataclass(frozen=True, kw_only=True)
class LeftOutRow(Row):
    """Energy of one model in one case, compute and moved bytes apart.

    `bitnet_saving` is 1 - E_BitNet / E_model in the same phase and case, None for BitNet itself.
    """

    model: str
    phase: str
    case: str
    compute_joules: float
    moved_bytes: int
    moved_joules: float
    joules: float
    bitnet_saving: float | None
    kind: Kind = "modelled"


LEFT_OUT_CASES = ("as published", "INT8 attention in BitNet", "+ output head", "+ weights read from memory")


def left_out_rows(
    *,
    dram_pj_per_byte: float = DRAM_PJ_PER_BYTE,
    ternary_body: str | float = "I2_S",
    ternary_embedding: str = "f16",
) -> list[LeftOutRow]:
    """The six models of [2B4T, Table 1] with what the published figure leaves out, in two phases and four cases.

    Phases: a forward pass over 512 tokens, which reads each weight once; and one decoded token at a context of 512,
    which reads each weight again. Cases:

    - "as published";
    - "INT8 attention in BitNet": its Q K^T and A V in INT8, the rivals' still in FP16; an alternative, not carried on;
    - "+ output head": as published, and the head in FP16 for every token of the phase;
    - "+ weights read from memory": that, and the bytes of body, scales, norms, biases and head at a price.

    Activations and the key/value cache are not in the moved bytes, which favours the models with many key/value heads.

    Parameters
    ----------
    dram_pj_per_byte : float
        Price of a byte; an assumption, see `DRAM_PJ_PER_BYTE`.
    ternary_body, ternary_embedding : str
        How BitNet is stored (`bitnet_ref.measure.memory.account`); the rivals are bf16 throughout.
    """
    rows = []
    for phase, compute in (("512-token forward", forward_energy), ("one decoded token", decode_energy)):
        for case in LEFT_OUT_CASES:
            results: dict[str, tuple[float, int, float]] = {}
            for arch in PUBLISHED_SIX:
                attention = "int8" if arch.ternary and case == "INT8 attention in BitNet" else "fp16"
                head = "fp16" if case.startswith("+") else None
                estimate = compute(arch, attention=attention, head=head)
                moved = 0
                if case == "+ weights read from memory":
                    stored = (
                        account(arch, ternary_body, ternary_embedding)
                        if arch.ternary
                        else account(arch, "bf16", "bf16", norms="bf16")
                    )
                    moved = stored.read_per_token_bytes
                results[arch.name] = (
                    estimate.joules,
                    moved,
                    moved_joules(moved, dram_pj_per_byte=dram_pj_per_byte),
                )
            bitnet = results[BITNET_2B4T.name][0] + results[BITNET_2B4T.name][2]
            for model, (joules, moved, moving) in results.items():
                source = "[BitNet, Eq. 16-18] at the 7 nm prices of [BitNet, Table 2]"
                if moved:
                    source += f"; assumed {dram_pj_per_byte:g} pJ a byte read (default: Horowitz, ISSCC 2014)"
                rows.append(
                    LeftOutRow(
                        model=model,
                        phase=phase,
                        case=case,
                        compute_joules=joules,
                        moved_bytes=moved,
                        moved_joules=moving,
                        joules=joules + moving,
                        bitnet_saving=None if model == BITNET_2B4T.name else 1 - bitnet / (joules + moving),
                        source=source,
                    )
                )
    return rows


# -------------------------------------------------------------------- measured elsewhere: quoted, and what it implies
# machine -> size -> (J/token FP16, J/token bitnet.cpp, token/s FP16, token/s bitnet.cpp); None where not published
MEASURED_JOULES_PER_TOKEN: dict[str, dict[str, tuple[float | None, float, float | None, float]]] = {
    "Apple M2 Ultra": {
        "700M": (0.314, 0.140, 114.47, 194.38),
        "7B": (3.013, 1.068, 15.61, 52.36),
        "70B": (28.02, 8.42, 1.71, 8.67),
    },
    "Intel i7-13700H": {
        "700M": (1.367, 0.384, 30.73, 119.08),
        "7B": (11.305, 2.017, 3.30, 18.75),
        "70B": (None, 17.33, None, 2.44),
    },
}
"""[bitnet.cpp, arXiv 2410.16144, Tables 6 (joules a token) and 4 (tokens a second, unlimited threads)], quoted."""


@dataclass(frozen=True, kw_only=True)
class ImpliedWattsRow(Row):
    """Published joules a token times published tokens a second: the power that the two figures imply together.

    The two published columns are quoted; all else is computed here from them. `saving` is 1 less the ratio of the
    published joules, `saving_at_equal_power` what the speed-up alone would give, 1 - 1/speed-up; None in rows of FP16
    and where the FP16 run was not published.
    """

    machine: str
    size: str
    program: str
    published_joules_per_token: float
    published_tokens_per_s: float
    implied_watts: float
    saving: float | None
    saving_at_equal_power: float | None
    published_kind: Kind = "quoted"
    kind: Kind = "modelled"


def implied_watts_rows() -> list[ImpliedWattsRow]:
    """Power implied by [bitnet.cpp, arXiv 2410.16144, Tables 4 and 6].

    The product assumes that both tables describe the same runs, which is not stated, so the watts are as good as that.
    Nor was any instrument of this program read.
    """
    source = "published: [bitnet.cpp], arXiv 2410.16144, Tables 6 and 4; modelled: their products and ratios"
    rows = []
    for machine, sizes in MEASURED_JOULES_PER_TOKEN.items():
        for size, (half_j, ternary_j, half_rate, ternary_rate) in sizes.items():
            saving = at_equal_power = None
            if half_j is not None and half_rate is not None:
                rows.append(
                    ImpliedWattsRow(
                        machine=machine,
                        size=size,
                        program="llama.cpp FP16",
                        published_joules_per_token=half_j,
                        published_tokens_per_s=half_rate,
                        implied_watts=half_j * half_rate,
                        saving=None,
                        saving_at_equal_power=None,
                        source=source,
                    )
                )
                saving = 1 - ternary_j / half_j
                at_equal_power = 1 - half_rate / ternary_rate
            rows.append(
                ImpliedWattsRow(
                    machine=machine,
                    size=size,
                    program="bitnet.cpp",
                    published_joules_per_token=ternary_j,
                    published_tokens_per_s=ternary_rate,
                    implied_watts=ternary_j * ternary_rate,
                    saving=saving,
                    saving_at_equal_power=at_equal_power,
                    source=source,
                )
            )
    return rows
