"""The compiled steps of decoding, and the ternary layer between them: what the fast model puts into the network.

The network itself is :func:`bitnet_ref.reference.model.forward`. It gets :class:`TernaryLayer` objects as weights,
:func:`apply_layer` as `linear`, and :func:`compiled_steps` as `steps`. Values do not depend on the instruction set or
on the number of threads; how they compare with the reference's is said in docs/runtime.md.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_ref import kernels
from bitnet_ref._native import _table
from bitnet_ref._native import matmul as _matmul
from bitnet_ref._native.decoder_ops import Blocks, ListedRows, Matrix
from bitnet_ref._native.decoder_ops import Steps as CompiledSteps
from bitnet_ref.errors import KernelUnavailable
from bitnet_ref.kernels import ISAS
from bitnet_ref.reference import model as network
from bitnet_ref.reference.attention import KVCache
from bitnet_ref.reference.attention import attention as reference_attention
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.head import GROUP_ROWS, TABLE_TYPES, FloatTable, GroupedTable, head_logits
from bitnet_ref.reference.matmul import checked_scale
from bitnet_ref.reference.model import Block, Steps
from bitnet_ref.reference.model import linear as reference_linear
from bitnet_ref.reference.packing import PackedTernary, get_scheme

__all__ = [
    "Blocks",
    "DecodeStep",
    "ListedRows",
    "TernaryLayer",
    "TiedTable",
    "apply_layer",
    "compiled_steps",
    "grouped",
    "load_steps",
    "make_table",
    "plain_head",
    "step_isas",
]


def step_isas() -> tuple[str, ...]:
    """Instruction sets that this build has the steps for and this processor and ``BITNET_REF_ISA`` allow; rising."""
    cap = kernels.isa_cap()
    built = [name.removeprefix("steps__") for name in _table.STEPS]
    may_run = [isa for isa in kernels.processor_isas() if cap is None or ISAS[isa] <= ISAS[cap]]
    return tuple(sorted((isa for isa in built if isa in may_run), key=ISAS.__getitem__))


@functools.cache
def _capsule(isa: str) -> Any:
    return importlib.import_module(f"bitnet_ref._native.kernels.steps__{isa}").STEPS


def load_steps(n_threads: int | None = None, isa: str | None = None) -> CompiledSteps:
    """The compiled steps of one instruction set; of the highest that may run if none is named.

    Raises
    ------
    KernelUnavailable
        If the named one is not in this build or cannot run here.
    """
    allowed = step_isas()
    isa = allowed[-1] if isa is None else isa
    if isa not in allowed:
        raise KernelUnavailable(f"the steps of decoding can run here as {', '.join(allowed)}, got {isa!r}")
    return CompiledSteps(_capsule(isa), kernels.resolve_threads(n_threads))


class DecodeStep:
    """What one token of one sequence passes in a single call: the blocks of one network.

    Parameters
    ----------
    config : ModelConfig
    weights : mapping of str to TernaryLayer and others, by the names of ``config.tensor_shapes()``
        They must not be changed afterwards.
    listed : mapping of int to ListedRows, optional
        For a block by its index, the rows of its feed-forward network that may be read singly
        (:mod:`bitnet_ref.runtime.sparse`).

    Attributes
    ----------
    blocks : Blocks or None
        None if the steps must be taken one by one: norms behind the layers, layers that are not ternary, rows that are
        cut, matrices that read the same token in different packings.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Any], listed: Mapping[int, ListedRows] | None = None
    ) -> None:
        self.config = config
        self.weights = weights
        blocks = [self._block(i, None if listed is None else listed[i]) for i in range(config.layers)]
        self.blocks: Blocks | None = None
        if not config.post_norms and all(block is not None for block in blocks):
            self.blocks = Blocks(
                blocks,
                config.kv_heads,
                config.head_dim,
                config.norm_eps,
                config.norm_offset,
                config.score_scale,
                config.activation,
            )

    def _block(self, index: int, listed: ListedRows | None) -> tuple[Any, ...] | None:
        """One block as :class:`Blocks` takes it; None if it cannot be."""
        config = self.config
        block = Block(config, self.weights, index, apply_layer, Steps(), None)
        layers = [block.weight(name) for name in _MATRICES]
        if not all(isinstance(layer, TernaryLayer) and layer.matrix is not None for layer in layers):
            return None
        packings = [layer.w_packed.scheme for layer in layers]
        if len(set(packings[:3])) > 1 or packings[4] != packings[5]:  # q, k and v; gate and up
            return None
        return (
            [layer.matrix for layer in layers],
            (
                block.weight("input_layernorm"),
                block.weight("self_attn.attn_sub_norm") if config.sub_norm else None,
                block.weight("post_attention_layernorm"),
                block.weight("mlp.ffn_sub_norm") if config.sub_norm else None,
            ),
            tuple(block.bias(f"self_attn.{name}_proj") for name in "qkv") if config.qkv_bias else None,
            tuple(block.weight(f"self_attn.{name}_norm") for name in "qk") if config.qk_norm else None,
            config.window(index),
            listed,
        )


_MATRICES = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))


def compiled_steps(ops: CompiledSteps, step: DecodeStep | None = None) -> Steps:
    """The compiled steps as :class:`bitnet_ref.reference.model.Steps`.

    Parameters
    ----------
    ops : CompiledSteps
    step : DecodeStep, optional
        Blocks that one token passes in a single call, if it is of this network; all others go step by step.
    """

    def embedding(table: Any, tokens: np.ndarray) -> np.ndarray:
        table = table.embedding if isinstance(table, TiedTable) else table
        if isinstance(table, GroupedTable):
            return ops.grouped_rows(table.data, table.type, table.rows, tokens)
        return network.embedding(table, tokens)

    def attention(
        q: np.ndarray, k: Any, v: Any, scale: float, window: int | None = None, trace: Any = None
    ) -> np.ndarray:
        if isinstance(k, list):  # one sequence a row, see BatchCache
            rows = [ops.attention(q[b : b + 1], k[b], v[b], scale, window) for b in range(len(k))]
            return np.concatenate(rows)
        if trace is not None:
            reference_attention(q, k, v, scale, window, trace)  # for the scores and probabilities
        return ops.attention(q, k, v, scale, window)

    def head(x: np.ndarray, table: np.ndarray | FloatTable | GroupedTable | TiedTable) -> np.ndarray:
        table = table.head if isinstance(table, TiedTable) else table
        if isinstance(table, GroupedTable):
            return ops.grouped_head(x, table.data, table.type, table.rows)
        return ops.head(x, table.raw, table.type) if isinstance(table, FloatTable) else plain_head(x, table)

    def feed_forward(block: Block, x: np.ndarray) -> np.ndarray:
        config = block.config
        layers = [block.weight(name) for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
        if config.post_norms or block.trace is not None or not all(isinstance(w, TernaryLayer) for w in layers):
            return network.feed_forward(block, x)
        gate, up, down = layers
        weight = block.weight("post_attention_layernorm")
        inner = block.weight("mlp.ffn_sub_norm") if config.sub_norm else None
        x_q, x_scale = ops.quantize(ops.rms_norm(x, weight, config.norm_eps, config.norm_offset))
        x_q, x_scale = ops.gate_quantize(
            gate.sums(x_q), up.sums(x_q), x_scale, gate.w_scale, up.w_scale, config.activation, inner,
            config.norm_eps, config.norm_offset,
        )  # fmt: skip
        return x + ops.rescale(down.sums(x_q), x_scale, down.w_scale)

    def blocks(
        config: ModelConfig,
        weights: Mapping[str, Any],
        x: np.ndarray,
        turns: Mapping[bool, tuple[np.ndarray, np.ndarray]],
        cache: KVCache,
        linear: Callable[[np.ndarray, Any], np.ndarray],
        steps: Steps,
        trace: Any,
    ) -> np.ndarray:
        # A batch of one has a cache of another kind.
        alone = len(x) == 1 and isinstance(cache, KVCache) and trace is None
        if not alone or step is None or step.blocks is None or config is not step.config or weights is not step.weights:
            return network.all_blocks(config, weights, x, turns, cache, linear, steps, trace)
        return ops.blocks(step.blocks, x, turns[False], turns[True], *cache.room(1))

    return Steps(
        embedding=embedding,
        rms_norm=ops.rms_norm,
        rotate=ops.rotate,
        attention=attention,
        activate=ops.activate,
        head=head,
        feed_forward=feed_forward,
        blocks=blocks,
    )


@dataclass(frozen=True, eq=False)
class TiedTable:
    """An embedding that is also the head, which is stored in another type: rows come from one, logits from the other.

    Parameters
    ----------
    embedding : FloatTable or GroupedTable of shape (V, K)
    head : FloatTable or GroupedTable of the same shape
    """

    embedding: FloatTable | GroupedTable
    head: FloatTable | GroupedTable

    @property
    def shape(self) -> tuple[int, int]:
        """(V, K)."""
        return self.head.shape

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """These rows of the embedding as float32, shape (n, K)."""
        return self.embedding[rows]


def make_table(parts: Iterable[np.ndarray], shape: Sequence[int], stored: str) -> FloatTable | GroupedTable:
    """The head of encoded rows as :func:`compiled_steps` reads it: of integers in groups. Beside it there is one part.

    Parameters
    ----------
    parts : iterable of ndarray (n, bytes of a row), uint8
        In order; all but the last have whole groups of rows.
    shape : (V, K)
    stored : str
        One of ``TABLE_TYPES``.

    Raises
    ------
    ValueError
        If the parts are not so, or not V rows together.
    """
    rows, columns = shape
    block, block_bytes = TABLE_TYPES[stored]
    together = GROUP_ROWS if block > 1 else 1
    group = load_steps(1).group_rows  # a copy keeps up with the memory on one thread
    data, start = np.empty((-(-rows // together), columns // block * block_bytes * together), np.uint8), 0
    given = 0
    for part in parts:
        if given % together or given + len(part) > rows:
            raise ValueError(
                f"parts of a table of {rows} rows must have whole groups of {together} but for the last, got "
                f"{len(part)} rows behind {given}"
            )
        piece = group(part, stored) if block > 1 else part
        data[start : start + len(piece)] = piece
        start, given = start + len(piece), given + len(part)
    if given != rows:
        raise ValueError(f"parts of a table of {rows} rows must have them all, got {given}")
    return GroupedTable(data, stored, rows, columns) if block > 1 else FloatTable(data, stored, columns)


def grouped(table: Any) -> Any:
    """A head as :func:`make_table` gives it, of one that may be of stored rows."""
    if isinstance(table, TiedTable):
        return TiedTable(table.embedding, grouped(table.head))
    if not isinstance(table, FloatTable) or TABLE_TYPES[table.type][0] == 1:
        return table  # floats are read as they are stored, from a mapped file too
    return make_table([table.raw], table.shape, table.type)


def plain_head(x: np.ndarray, table: np.ndarray | FloatTable | GroupedTable | TiedTable) -> np.ndarray:
    """The reference's head, for every kind of table that a model holds."""
    return head_logits(x, table.head if isinstance(table, TiedTable) else table)


class TernaryLayer:
    """:class:`bitnet_ref.BitLinear` for the inner loop: the same bits; arguments are checked once and not at each call.

    Parameters
    ----------
    w_packed : PackedTernary of shape (M, K)
    w_scale : float32
    ops : CompiledSteps
    n_threads : int
    wrap : callable(name, function) -> function, optional
        Put around the compiled product, to time it.
    """

    def __init__(
        self,
        w_packed: PackedTernary,
        w_scale: np.float32,
        ops: CompiledSteps,
        n_threads: int,
        wrap: Callable[..., Any] | None = None,
    ) -> None:
        m, k = w_packed.shape
        if k > kernels.MAX_K:
            raise ValueError(f"K must be at most {kernels.MAX_K} so that no int32 sum overflows, got {k}")
        scheme = get_scheme(w_packed.scheme)
        self.w_packed = w_packed
        self.w_scale = checked_scale(w_scale)
        self._ops = ops
        # What a decode step multiplies by; longer rows are cut, which only the general product does.
        self.matrix: Matrix | None = None
        if k <= kernels.SEGMENT_COLUMNS:
            capsules = kernels.select("gemv", w_packed.scheme).capsules()
            self.matrix = Matrix(*capsules, w_packed.data, m, k, scheme.rows, scheme.block, float(self.w_scale))
        self._products = {
            op: functools.partial(
                _product,
                _matmul.matmul if wrap is None else wrap("product", _matmul.matmul),
                *kernels.select(op, w_packed.scheme).capsules(),
                w_packed.data,
                m,
                k,
                (scheme.rows, scheme.block, scheme.tile_block_bytes, n_threads),
            )
            for op in kernels.PRODUCTS
        }

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Apply the layer to x of shape (T, K), float32; returns (T, M), float32.

        Raises
        ------
        ValueError
            If x has another shape or is not finite.
        """
        x_q, x_scale = self._ops.quantize(x)
        return self._ops.rescale(self.sums(x_q), x_scale, self.w_scale)

    def sums(self, x_q: np.ndarray) -> np.ndarray:
        """The exact product of x_q of shape (T, K), int8, with the ternary matrix: (T, M), int32."""
        return self._products[kernels.op_for(self.w_packed.scheme, len(x_q))](x_q)


def _product(
    multiply: Callable[..., None],
    kernel: Any,
    tables: Any,
    data: np.ndarray,
    m: int,
    k: int,
    layout: tuple[int, ...],
    x_q: np.ndarray,
) -> np.ndarray:
    if x_q.shape[1] != k:
        raise ValueError(f"x must have shape (T, {k}), got {x_q.shape}")
    sums = np.empty((len(x_q), m), np.int32)
    multiply(kernel, tables, data, m, k, x_q, sums, *layout)
    return sums


def apply_layer(x: np.ndarray, layer: Any) -> np.ndarray:
    """`linear` of the fast model: a ternary layer, or a float matrix of a full-precision network."""
    return layer(x) if isinstance(layer, TernaryLayer) else reference_linear(x, layer)
