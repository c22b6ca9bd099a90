"""The fast model: the reference's network with compiled layers and steps in it, caches, and batches of sequences."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np

from bitnet_ref import kernels
from bitnet_ref.formats.float_types import FLOAT_TYPES, check_float_type, encode_floats
from bitnet_ref.reference.attention import KVCache
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.head import GROUP_ROWS, TABLE_TYPES, FloatTable, GroupedTable
from bitnet_ref.reference.model import Steps, forward
from bitnet_ref.reference.packing import PackedTernary, pack
from bitnet_ref.runtime.pages import HugePages
from bitnet_ref.runtime.sparse import check_sparse, listed_rows
from bitnet_ref.runtime.steps import (
    DecodeStep,
    TernaryLayer,
    TiedTable,
    apply_layer,
    compiled_steps,
    grouped,
    load_steps,
    make_table,
    plain_head,
)
from bitnet_ref.runtime.tokenizer import Tokenizer

__all__ = ["HEADS", "BatchCache", "Model", "head_type"]

HEADS = {name: stored for name, stored in FLOAT_TYPES.items() if stored in TABLE_TYPES}
"""Types of the head, by their names as arguments: f32, f16, bf16, q8_0, q6_k, q4_0."""

PREFILL_TOKENS = 128
"""Tokens that are processed together in a long prompt: enough that the weights are read seldom, and little memory."""

Wrap = Callable[[str, Callable[..., Any]], Callable[..., Any]]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
GATE = ".mlp.gate_proj.weight"
"""End of the names of all gates."""


def head_type(head: str) -> str:
    """The stored type of a head, by its name as an argument; ValueError if there is none."""
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    return HEADS[head]


class BatchCache:
    """The caches of several sequences as one, for a step in which each of them gets one token.

    A row of the batch is a sequence: :func:`bitnet_ref.reference.model.forward` sees rows where otherwise tokens are.

    Parameters
    ----------
    caches : sequence of KVCache
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self.caches = list(caches)

    def positions(self, t: int) -> np.ndarray:
        """The next position of each sequence, shape (t,), t = number of sequences."""
        if t != len(self.caches):
            raise ValueError(f"a batch of {len(self.caches)} sequences takes one token each, got {t}")
        return np.concatenate([cache.positions(1) for cache in self.caches])

    def store(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Put one token behind each sequence; keys and values of each, as :meth:`KVCache.store` gives them."""
        pairs = [cache.store(layer, k[b : b + 1], v[b : b + 1]) for b, cache in enumerate(self.caches)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def advance(self, t: int) -> None:
        """Count the token that every sequence has stored."""
        for cache in self.caches:
            cache.advance(1)


class Model:
    """A decoder that runs on the compiled kernels. Made by
    :func:`bitnet_ref.runtime.load.load`, :meth:`random` or weights.

    Parameters
    ----------
    config : ModelConfig
    weights : mapping of str to array, FloatTable or (PackedTernary, w_scale)
        By the names of ``config.tensor_shapes()``. A network that is not ternary has float arrays for matrices.
    n_threads : int, optional
        As in :func:`bitnet_ref.kernels.resolve_threads`.
    tokenizer : Tokenizer, optional
        Needed for prompts and answers in text.
    cache : {"f32", "f16"}
        How keys and values are kept; see docs/runtime.md for what f16 costs.
    sparse : bool
        Decode single tokens without the rows of W_up and columns of W_down that add nothing: the same values, for
        W_up and W_down a second time in memory. See docs/sparse.md.
    isa : str, optional
        Instruction set of the steps, for tests.

    Raises
    ------
    ValueError
        If names or shapes are not those of the network, or an argument has no such value; if sparse, also if the
        network is none of squared ReLU with SubLN.
    KernelUnavailable
        If this build has no kernel for a packing.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        *,
        n_threads: int | None = None,
        tokenizer: Tokenizer | None = None,
        cache: str = "f32",
        sparse: bool = False,
        isa: str | None = None,
    ) -> None:
        if cache not in _CACHES:
            raise ValueError(f"cache must be f32 or f16, got {cache!r}")
        if sparse:
            check_sparse(config)
        config.check_names(weights)
        self.config = config
        self.tokenizer = tokenizer
        self.n_threads = kernels.resolve_threads(n_threads)
        self._cache_dtype = _CACHES[cache]
        self._isa = isa
        self._ops: Any = load_steps(n_threads, isa)
        self.linear: Callable[[np.ndarray, Any], np.ndarray] = apply_layer
        # Read-only, since a decode step keeps what it found in it.
        self.weights: Mapping[str, Any] = MappingProxyType(
            {name: self._prepared(name, weights[name], shape) for name, shape in config.tensor_shapes().items()}
        )
        self._listed = listed_rows(config, self.weights) if sparse else None
        self.steps = self._compiled_steps()

    def _compiled_steps(self) -> Steps:
        step = DecodeStep(self.config, self.weights, self._listed)
        if self.sparse and step.blocks is None:  # a network that goes step by step leaves nothing out
            raise ValueError("sparse needs q, k and v of a block in one packing, and gate and up, they have several")
        return compiled_steps(self._ops, step)

    def _prepared(self, name: str, weight: Any, shape: tuple[int, ...]) -> Any:
        """A weight as the network takes it."""
        if isinstance(weight, tuple):
            weight = TernaryLayer(*weight, self._ops, self.n_threads)
        found = weight.w_packed.shape if isinstance(weight, TernaryLayer) else weight.shape
        if tuple(found) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(found)}")
        if name in self.config.linear_shapes() and self.config.ternary != isinstance(weight, TernaryLayer):
            kind = "ternary" if self.config.ternary else "a float array"
            raise ValueError(f"{name} must be {kind} in this network, got {type(weight).__name__}")
        if isinstance(weight, np.ndarray):
            return np.ascontiguousarray(weight, np.float32)
        if name == (EMBEDDING if self.config.tied_head else HEAD):
            return grouped(weight)
        return weight

    @classmethod
    def from_weights(
        cls, config: ModelConfig, weights: Mapping[str, Any], scheme: str = "base3", head: str = "q8_0", **options: Any
    ) -> Model:
        """A model of arrays, as :func:`bitnet_ref.reference.model.ternary_weights` gives them.

        Parameters
        ----------
        weights : mapping of str to array, (w_q, w_scale) or (PackedTernary, w_scale)
        scheme, head : as in :func:`bitnet_ref.runtime.load.load`; a tied embedding is stored as the head is
        **options
            Of :class:`Model`.
        """
        prepared: dict[str, Any] = {}
        pages = HugePages(scheme, config.linear_shapes().values())
        for name, weight in weights.items():
            if isinstance(weight, tuple) and not isinstance(weight[0], PackedTernary):
                weight = (pages.place(pack(weight[0], scheme)), weight[1])
            elif name in (EMBEDDING, HEAD):
                tied_or_head = name == HEAD or config.tied_head
                weight = make_table(*_encoded(name, weight, head_type(head) if tied_or_head else "F32"))
            prepared[name] = weight
        return cls(config, prepared, **options)

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        seed: int = 0,
        scheme: str = "base3",
        head: str = "q8_0",
        gate_zeros: float | None = None,
        **options: Any,
    ) -> Model:
        """A model of random weights, made tensor by tensor: beside itself it needs the memory of one matrix.

        Ternary weights are -1, 0, 1 alike often, scaled so that a layer keeps the size of its input; the tables are
        normal, drawn in pieces of some MiB; norms are 1, biases 0.

        Parameters
        ----------
        config : ModelConfig
        seed : int
        scheme, head : as in :func:`bitnet_ref.runtime.load.load`
        gate_zeros : float, optional
            About this share of the gates is not positive, at least 0.5: enough rows of W_gate are zeros. By themselves
            random gates are positive half of the time, trained ones of squared ReLU more seldom.
        **options
            Of :class:`Model`.
        """
        if not config.ternary:
            raise ValueError("a random model must be ternary, this config is of a full-precision network")
        if options.get("sparse"):
            check_sparse(config)
        check_gate_zeros(gate_zeros)  # before anything is drawn
        stored, rng = head_type(head), np.random.default_rng(seed)
        weights: dict[str, Any] = {}
        pages = HugePages(scheme, config.linear_shapes().values())
        for name, shape in config.tensor_shapes().items():
            if len(shape) == 1:
                weights[name] = np.full(shape, 0 if name.endswith(".bias") else 1 - config.norm_offset, np.float32)
            elif name in (EMBEDDING, HEAD):
                scale = np.float32(shape[1] ** -0.5)
                drawn = (rng.standard_normal((rows, shape[1]), np.float32) * scale for rows in _pieces(shape))
                weights[name] = make_table(_encode(name, drawn, stored), shape, stored)
            else:
                w_q = random_ternary(rng, shape, gate_zeros if name.endswith(GATE) else None)
                weights[name] = (pages.place(pack(w_q, scheme)), np.float32((1.5 / shape[1]) ** 0.5))
        return cls(config, weights, **options)

    @property
    def table(self) -> FloatTable | GroupedTable | np.ndarray:
        """The head."""
        table = self.weights[EMBEDDING if self.config.tied_head else HEAD]
        return table.head if isinstance(table, TiedTable) else table

    def with_threads(self, n_threads: int | None, wrap: Wrap | None = None) -> Model:
        """The same weights, not copied, on another number of threads.

        Parameters
        ----------
        n_threads : int, optional
        wrap : callable(name, function) -> function, optional
            Put around every compiled function, to time it: ``product`` for products with ternary matrices that are
            calls of their own, and the names of the steps, ``head`` and ``grouped_head`` among them.
            ``take_inner_ns`` of the new model gives the time of products and of attention inside of steps since it was
            called last.
        """
        other = copy.copy(self)
        other.n_threads = kernels.resolve_threads(n_threads)
        other._ops = load_steps(n_threads, self._isa)
        if wrap is not None:
            ops = other._ops
            names = [name for name in dir(ops) if not name.startswith(("_", "take_"))]
            other._ops = SimpleNamespace(**{name: wrap(name, getattr(ops, name)) for name in names})
            other.take_inner_ns = ops.take_inner_ns
        other.weights = MappingProxyType(
            {
                name: TernaryLayer(w.w_packed, w.w_scale, other._ops, other.n_threads, wrap)
                if isinstance(w, TernaryLayer)
                else w
                for name, w in self.weights.items()
            }
        )
        other.steps = other._compiled_steps()
        return other

    @property
    def sparse(self) -> bool:
        """Whether rows that add nothing are left out."""
        return self._listed is not None

    def dense(self) -> Model:
        """The same weights, not copied; reads all rows."""
        other = copy.copy(self)
        other._listed = None
        other.steps = other._compiled_steps()
        return other

    def take_sparse_counts(self) -> dict[str, int]:
        """Of a sparse model, what its networks counted since this was asked last, summed over blocks.

        tokens (times blocks); up_rows, down_rows: rows and columns that counted; up_listed, down_listed: how often they
        were read singly; read_bytes: the bytes of those rows.
        """
        counts = [rows.take_counts() for rows in (self._listed or {}).values()]
        return {name: sum(count[name] for count in counts) for name in counts[0]} if counts else {}

    def with_steps(self, steps: Steps) -> Model:
        """The same weights, not copied, with other steps between the matrices."""
        other = copy.copy(self)
        other.steps = steps
        return other

    def bytes_per_token(self) -> dict[str, int]:
        """Bytes that a decoding step reads whatever its length: ``layers`` (ternary or float matrices) and ``head``."""
        matrices = (self.weights[name] for name in self.config.linear_shapes())
        layers = sum(w.w_packed.nbytes if isinstance(w, TernaryLayer) else w.nbytes for w in matrices)
        return {"layers": layers, "head": self.table.nbytes}

    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values that a token leaves in the cache, and that each later one reads."""
        c = self.config
        return 2 * c.layers * c.kv_heads * c.head_dim * np.dtype(self._cache_dtype).itemsize

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for one sequence of at most `capacity` tokens."""
        return KVCache(self.config, capacity, self._cache_dtype)

    def forward(
        self, tokens: Sequence[int] | np.ndarray, cache: KVCache | BatchCache | None = None, n_logits: int | None = None
    ) -> np.ndarray:
        """As :func:`bitnet_ref.reference.model.forward`, in one piece."""
        return forward(self.config, self.weights, tokens, cache, self.linear, steps=self.steps, n_logits=n_logits)

    def prefill(self, tokens: Sequence[int] | np.ndarray, cache: KVCache, n_logits: int = 1) -> np.ndarray:
        """Put a prompt into the cache, some hundred tokens at a time, and give the logits of its last tokens.

        Returns
        -------
        ndarray of shape (n_logits, V), float32
            The same to the last bit in whatever pieces the prompt comes, for a ternary network.
        """
        tokens = np.asarray(tokens)
        if not 1 <= n_logits <= max(1, len(tokens)):
            raise ValueError(f"n_logits must lie between 1 and the number of tokens, {len(tokens)}, got {n_logits}")
        cache.reserve(cache.length + len(tokens))
        wanted = []
        first_wanted = len(tokens) - n_logits
        for start in range(0, max(1, len(tokens)), PREFILL_TOKENS):
            piece = tokens[start : start + PREFILL_TOKENS]
            n = min(len(piece), max(1, start + len(piece) - first_wanted))
            logits = self.forward(piece, cache, n)
            if start + len(piece) > first_wanted:
                wanted.append(logits)
        return wanted[0] if len(wanted) == 1 else np.concatenate(wanted)

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits of every token.

        Parameters
        ----------
        tokens : sequence of T integers

        Returns
        -------
        ndarray of shape (T, V), float32

        Raises
        ------
        ValueError, TypeError
            As :func:`bitnet_ref.reference.model.forward`.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or not 1 <= len(tokens) <= self.config.context:
            raise ValueError(
                f"tokens must be 1 to {self.config.context} integers (the context of this model), got {tokens.shape}"
            )
        return self.prefill(tokens, self.new_cache(len(tokens)), len(tokens))

    def reference_logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """The same with the NumPy reference on the same weights, head and precision of the cache; slow."""
        weights = {
            name: (w.w_packed, w.w_scale) if isinstance(w, TernaryLayer) else w for name, w in self.weights.items()
        }
        return forward(self.config, weights, tokens, self.new_cache(max(1, len(tokens))), steps=Steps(head=plain_head))

    def generate(self, prompt: Any, max_tokens: int = 128, **options: Any) -> Any:
        """Continue a prompt, or several; see :func:`bitnet_ref.runtime.generate.generate`."""
        from bitnet_ref.runtime.generate import generate

        return generate(self, prompt, max_tokens, **options)

    def __repr__(self) -> str:
        c = self.config
        parts = self.bytes_per_token()
        return (
            f"Model({c.architecture}, {c.layers} layers of {c.hidden}, vocabulary {c.vocabulary:,}, "
            f"{parts['layers']:,} bytes of layers, {parts['head']:,} of head)"
        )


_CACHES = {"f32": np.float32, "f16": np.float16}


def check_gate_zeros(gate_zeros: float | None) -> None:
    """ValueError if random gates cannot be like that."""
    if gate_zeros is not None and not 0.5 <= gate_zeros <= 1:
        raise ValueError(f"gate_zeros must lie between 0.5 and 1, got {gate_zeros}")


def random_ternary(rng: np.random.Generator, shape: tuple[int, ...], gate_zeros: float | None = None) -> np.ndarray:
    """int8 weights, -1, 0, 1 alike often; with `gate_zeros`, rows of 0 until this share of gates is not positive."""
    w_q = rng.integers(-1, 2, shape, np.int8)
    if gate_zeros is not None:
        w_q[rng.permutation(shape[0])[: round(shape[0] * (2 * gate_zeros - 1))]] = 0
    return w_q


def encode_table(name: str, values: np.ndarray, stored: str) -> FloatTable:
    """A float matrix as a table of that type, encoded in pieces."""
    return FloatTable(np.concatenate(list(_encoded(name, values, stored)[0])), stored, values.shape[1])


def _encoded(name: str, values: np.ndarray, stored: str) -> tuple[Iterator[np.ndarray], tuple[int, ...], str]:
    """Arguments of :func:`make_table` for a float matrix."""
    starts = np.cumsum([0, *_pieces(values.shape)])
    parts = (np.ascontiguousarray(values[i:j], np.float32) for i, j in itertools.pairwise(starts))
    return _encode(name, parts, stored), values.shape, stored


def _encode(name: str, parts: Iterable[np.ndarray], stored: str) -> Iterator[np.ndarray]:
    for part in parts:
        check_float_type(name, part.shape[1], stored)
        yield encode_floats(name, part, stored).reshape(len(part), -1)


def _pieces(shape: tuple[int, ...]) -> list[int]:
    """Numbers of rows that together are all, each about four million values and, but for the last, whole groups."""
    step = max(GROUP_ROWS, (1 << 22) // shape[1] // GROUP_ROWS * GROUP_ROWS)
    return [min(step, shape[0] - i) for i in range(0, shape[0], step)]
