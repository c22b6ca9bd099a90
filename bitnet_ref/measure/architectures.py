"""Shapes of the models that the memory account and the energy model are computed from.

Everything in those two modules follows from the numbers on this page, so they are checked twice: the five rivals must
give the parameter counts of their published checkpoints exactly, and the six energies of [2B4T, Table 1] within 1 %.

Letters: M outputs and K inputs of a weight matrix, which has M * K weights.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "B158_SHAPES",
    "BITNET_2B4T",
    "BITNET_SHAPES",
    "GEMMA3_1B",
    "LLAMA32_1B",
    "MINICPM_2B",
    "PUBLISHED_SIX",
    "QWEN25_1_5B",
    "RIVALS",
    "SMOLLM2_1_7B",
    "Architecture",
]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer, as far as counting its weights and operations needs it.

    Parameters
    ----------
    name : str
        As printed in the tables.
    layers, hidden, ffn : int
        Blocks, width of the residual stream, inner width of the feed-forward network.
    heads, kv_heads, head_dim : int
        Query heads, key/value heads (grouped-query attention when fewer), width of one head.
    vocabulary : int or None
        Rows of the embedding table; None where the source does not say, and then nothing that needs it can be computed.
    source : str
        Where the numbers come from.
    tied_head : bool
        The output head is the embedding table, stored once.
    gated_ffn : bool
        Three matrices (gate, up, down) rather than two (up, down).
    ternary : bool
        The matrices inside the blocks are ternary; embedding, head and norms never are.
    block_norms : int
        Norms of width `hidden` in a block.
    sub_norms : bool
        SubLN: a norm of width heads * head_dim before the attention output, one of width `ffn` before the down matrix.
    qk_norm : bool
        Two norms of width `head_dim` in a block, shared by the heads.
    qkv_bias : bool
        Biases on the query, key and value matrices.
    sliding_window, sliding_layers : int
        Tokens that a sliding-window layer attends to and caches, and how many of the layers are such; 0 for none.

    Raises
    ------
    ValueError
        If a size is not positive, `heads` is not a multiple of `kv_heads`, or the sliding-window fields disagree.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int | None
    source: str
    context: int | None = None
    tied_head: bool = True
    gated_ffn: bool = True
    ternary: bool = False
    block_norms: int = 2
    sub_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    sliding_window: int = 0
    sliding_layers: int = 0

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads = {self.kv_heads}, got {self.heads}")
        if not 0 <= self.sliding_layers <= self.layers or (self.sliding_window > 0) != (self.sliding_layers > 0):
            raise ValueError(
                "sliding_window and sliding_layers must both be 0, or both positive and sliding_layers at most "
                f"layers = {self.layers}, got {self.sliding_window} and {self.sliding_layers}"
            )

    @property
    def kv_width(self) -> int:
        """Width of one layer's keys (and of its values) for one token."""
        return self.kv_heads * self.head_dim

    def block_matrices(self) -> tuple[tuple[str, int, int], ...]:
        """Name, M and K of each weight matrix in one block."""
        q = self.heads * self.head_dim
        attention = (
            ("q", q, self.hidden),
            ("k", self.kv_width, self.hidden),
            ("v", self.kv_width, self.hidden),
            ("o", self.hidden, q),
        )
        gate = (("gate", self.ffn, self.hidden),) if self.gated_ffn else ()
        return (*attention, *gate, ("up", self.ffn, self.hidden), ("down", self.hidden, self.ffn))

    @property
    def body_matrices(self) -> int:
        """Number of weight matrices in all blocks."""
        return self.layers * len(self.block_matrices())

    @property
    def body_weights(self) -> int:
        """Weights in the matrices of all blocks: what [2B4T, Table 1] calls non-embedding, less norms and biases."""
        return self.layers * sum(m * k for _, m, k in self.block_matrices())

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding table.

        Raises
        ------
        ValueError
            If the source of this architecture does not state a vocabulary.
        """
        if self.vocabulary is None:
            raise ValueError(f"the embedding needs a vocabulary, and the source of {self.name} states none")
        return self.vocabulary * self.hidden

    @property
    def norm_weights(self) -> int:
        """Weights of all norms, the final one included."""
        block = self.block_norms * self.hidden
        if self.sub_norms:
            block += self.heads * self.head_dim + self.ffn
        if self.qk_norm:
            block += 2 * self.head_dim
        return self.layers * block + self.hidden

    @property
    def bias_weights(self) -> int:
        """Biases of all layers."""
        return self.layers * (self.heads * self.head_dim + 2 * self.kv_width) if self.qkv_bias else 0

    @property
    def parameters(self) -> int:
        """All parameters, a tied table counted once."""
        tables = 1 if self.tied_head else 2
        return self.body_weights + self.norm_weights + self.bias_weights + tables * self.embedding_weights

    def attended_tokens(self, tokens: int) -> int:
        """Sum over the layers of the tokens that each attends to (and keeps in its cache) at a context of `tokens`."""
        local = min(tokens, self.sliding_window)
        return self.sliding_layers * local + (self.layers - self.sliding_layers) * tokens


BITNET_2B4T = Architecture(
    name="BitNet b1.58 2B4T",
    layers=30,
    hidden=2560,
    ffn=6912,
    heads=20,
    kv_heads=5,
    head_dim=128,
    vocabulary=128_256,
    context=4096,
    ternary=True,
    sub_norms=True,
    source="gpu/model.py of microsoft/BitNet and the header of the released GGUF file; [2B4T] prints no dimensions",
)

LLAMA32_1B = Architecture(
    name="LLaMA 3.2 1B",
    layers=16,
    hidden=2048,
    ffn=8192,
    heads=32,
    kv_heads=8,
    head_dim=64,
    vocabulary=128_256,
    context=131_072,
    source="config.json of meta-llama/Llama-3.2-1B-Instruct",
)

GEMMA3_1B = Architecture(
    name="Gemma-3 1B",
    layers=26,
    hidden=1152,
    ffn=6912,
    heads=4,
    kv_heads=1,
    head_dim=256,
    vocabulary=262_144,
    context=32_768,
    block_norms=4,
    qk_norm=True,
    sliding_window=512,
    # Five sliding layers, then one that sees everything; 26 layers hold four of the latter.
    sliding_layers=22,
    source="config.json of google/gemma-3-1b-it",
)

QWEN25_1_5B = Architecture(
    name="Qwen2.5 1.5B",
    layers=28,
    hidden=1536,
    ffn=8960,
    heads=12,
    kv_heads=2,
    head_dim=128,
    vocabulary=151_936,
    context=32_768,
    qkv_bias=True,
    source="config.json of Qwen/Qwen2.5-1.5B-Instruct",
)

SMOLLM2_1_7B = Architecture(
    name="SmolLM2 1.7B",
    layers=24,
    hidden=2048,
    ffn=8192,
    heads=32,
    kv_heads=32,
    head_dim=64,
    vocabulary=49_152,
    context=8192,
    source="config.json of HuggingFaceTB/SmolLM2-1.7B-Instruct",
)

MINICPM_2B = Architecture(
    name="MiniCPM 2B",
    layers=40,
    hidden=2304,
    ffn=5760,
    heads=36,
    kv_heads=36,
    head_dim=64,
    vocabulary=122_753,
    context=4096,
    source="config.json of openbmb/MiniCPM-2B-sft-bf16",
)

RIVALS = (LLAMA32_1B, GEMMA3_1B, QWEN25_1_5B, SMOLLM2_1_7B, MINICPM_2B)
"""The five open models of [2B4T, Table 1], in its order."""

PUBLISHED_SIX = (*RIVALS, BITNET_2B4T)
"""The columns of [2B4T, Table 1], in its order."""


def _bitnet_shape(name: str, layers: int, hidden: int, heads: int) -> Architecture:
    return Architecture(
        name=name,
        layers=layers,
        hidden=hidden,
        ffn=4 * hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=None,
        gated_ffn=False,
        source="the GPT-3 / OPT shape of this size (arXiv 2205.01068, Table 1): the one that gives [BitNet, Table 1]",
    )


BITNET_SHAPES = {
    "6.7B": _bitnet_shape("6.7B", 32, 4096, 32),
    "13B": _bitnet_shape("13B", 40, 5120, 40),
    "30B": _bitnet_shape("30B", 48, 7168, 56),
}
"""Sizes of [BitNet, Table 1]: a feed-forward network of two matrices and width 4 * hidden, no grouped queries."""


def _b158_shape(
    name: str, hidden: int, ffn: int, heads: int, layers: int, source: str, kv_heads: int | None = None
) -> Architecture:
    return Architecture(
        name=name,
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=hidden // heads,
        vocabulary=32_000,
        tied_head=False,
        source=source,
    )


_TIPS = "microsoft/unilm, 'The Era of 1-bit LLMs: Training Tips, Code and FAQ', table of configurations"
_LLAMA = "LLaMA (arXiv 2302.13971, Table 2)"
_LLAMA2 = "LLaMA 2 (arXiv 2307.09288), which has 8 key/value heads at this size"

B158_SHAPES = {
    "700M": _b158_shape("700M", 1536, 4096, 24, 24, _TIPS),
    "1.3B": _b158_shape("1.3B", 2048, 5460, 32, 24, _TIPS),
    "3B": _b158_shape("3B", 3200, 8640, 32, 26, _TIPS),
    "3.9B": _b158_shape("3.9B", 3200, 12_800, 32, 26, _TIPS),
    "7B": _b158_shape("7B", 4096, 11_008, 32, 32, _LLAMA),
    "13B": _b158_shape("13B", 5120, 13_824, 40, 40, _LLAMA),
    "70B": _b158_shape("70B", 8192, 28_672, 64, 80, _LLAMA2, kv_heads=8),
}
"""Sizes compared in [B158]; each is read once with 16-bit and once with ternary weights."""
