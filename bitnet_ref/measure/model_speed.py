"""Tokens a second of a 2B4T-size model of random weights, by packing and type of head.

Speed does not depend on the values of weights, only on their bytes, so one random matrix of each shape is packed and
copied for every layer: each layer is memory of its own, as in a model, and a model is there within seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bitnet_ref.measure.model_bench import measure_model
from bitnet_ref.reference.config import PRESETS, ModelConfig
from bitnet_ref.reference.head import GROUP_ROWS, FloatTable, GroupedTable
from bitnet_ref.reference.packing import pack, schemes
from bitnet_ref.runtime.model import EMBEDDING, HEAD, Model, encode_table, head_type
from bitnet_ref.runtime.pages import HugePages
from bitnet_ref.runtime.steps import grouped

__all__ = ["HEADS", "measure_model_speed"]

HEADS = ("f16", "q8_0", "q6_k")
PRESET = "microsoft/bitnet-b1.58-2B-4T"
_TABLE_ROWS = 1024  # rows of a table that are drawn; the others repeat them


def measure_model_speed(quick: bool, progress: Callable[[str, float], None] | None = None) -> list[dict[str, Any]]:
    """Time a random 2B4T-size model in every packing and with every type of head.

    Parameters
    ----------
    quick : bool
        Two packings with one type of head, and fewer tokens.
    progress : callable(label, fraction done), optional

    Returns
    -------
    list of dict
        model, scheme, head, and the entries of :func:`bitnet_ref.measure.model_bench.measure_model`.
    """
    packings = ("base3", "i2") if quick else schemes()
    heads = ("q8_0",) if quick else HEADS
    return measure_models(PRESETS[PRESET], packings, heads, 8, 4 if quick else 16, progress)


def measure_models(
    config: ModelConfig,
    packings: Sequence[str],
    heads: Sequence[str],
    n_prompt: int,
    n_generate: int,
    progress: Callable[[str, float], None] | None = None,
) -> list[dict[str, Any]]:
    """The same for any ternary network, packings and heads."""
    report = progress or (lambda label, fraction: None)
    rng = np.random.default_rng(0)
    drawn = {shape: rng.integers(-1, 2, shape, np.int8) for shape in sorted(set(config.linear_shapes().values()))}
    rows = []
    for i, scheme in enumerate(packings):
        packed = {shape: pack(w_q, scheme) for shape, w_q in drawn.items()}
        pages = HugePages(scheme, config.linear_shapes().values())
        layers = {
            name: (pages.place(packed[shape]), np.float32((1.5 / shape[1]) ** 0.5))
            for name, shape in config.linear_shapes().items()
        }
        for j, head in enumerate(heads):
            report(f"2B4T-size model, {scheme}, head {head}", (i + j / len(heads)) / len(packings))
            weights: dict[str, Any] = dict(layers)
            for name, shape in config.tensor_shapes().items():
                if len(shape) == 1:
                    weights[name] = np.full(shape, 1 - config.norm_offset, np.float32)
                elif name in (EMBEDDING, HEAD):
                    weights[name] = _table(name, shape, head, rng)
            model = Model(config, weights)
            for row in measure_model(model, n_prompt, n_generate):
                about = {"model": "random, size of BitNet b1.58 2B4T", "scheme": scheme, "head": head}
                rows.append({**about, **row, "source": "timed on this machine in this run; medians of steps"})
            del model, weights
    # One bandwidth for all rows: that of a single model rests on a few readings.
    bandwidth = float(np.median([row["read_bandwidth_bytes_per_s"] for row in rows]))
    for row in rows:
        row["read_bandwidth_bytes_per_s"] = bandwidth
        row["read_bandwidth_fraction"] = row["bytes_per_token"] * row["decode_tokens_per_s"] / bandwidth
    return rows


def _table(name: str, shape: tuple[int, ...], head: str, rng: np.random.Generator) -> FloatTable | GroupedTable:
    """A table of repeated random rows, in memory of its own."""
    values = rng.standard_normal((min(_TABLE_ROWS, shape[0]), shape[1]), np.float32) * np.float32(shape[1] ** -0.5)
    drawn = grouped(encode_table(name, values, head_type(head)))
    if isinstance(drawn, FloatTable):
        return FloatTable(np.resize(drawn.raw, (shape[0], drawn.raw.shape[1])), drawn.type, shape[1])
    groups = -(-shape[0] // GROUP_ROWS)
    return GroupedTable(np.resize(drawn.data, (groups, drawn.data.shape[1])), drawn.type, *shape)
