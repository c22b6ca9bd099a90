"""Feed-forward networks of which only the rows that count are read, when one token is decoded: docs/sparse.md.

The dense matrices stay, for prompts and for tokens with few zeros; W_up and W_down lie beside them once more, by rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitnet_ref import kernels
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.packing import ROW_SCHEMES, get_scheme, pack
from bitnet_ref.reference.packing.base import freeze
from bitnet_ref.runtime.pages import huge_array
from bitnet_ref.runtime.steps import ListedRows

__all__ = ["SPARSE_FROM", "check_sparse", "listed_rows"]

SPARSE_FROM = {"scalar": (0.3, 0.1), "avx2": (0.45, 0.45), "avx512vnni": (0.55, 0.6), "avx512vbmi": (0.7, 0.75)}
"""Share of zeros from which rows of W_up, and columns of W_down, are read singly, by the instruction set of the dense
product that they replace: where that broke even with one thread and dense ``base3`` (docs/sparse.md). Two threads break
even sooner. Instruction sets without figures take the highest."""


def check_sparse(config: ModelConfig) -> None:
    """Refuse a network whose rows cannot be left out; ValueError."""
    if not (config.ternary and config.activation == "relu2" and config.sub_norm and not config.post_norms):
        ternary = "a ternary" if config.ternary else "a full-precision"
        norm = "with SubLN" if config.sub_norm else "without SubLN"
        raise ValueError(
            "sparse needs a ternary feed-forward network of squared ReLU with SubLN and no norm behind it, this is "
            f"{ternary} one of {config.activation} {norm}{' and a norm behind it' if config.post_norms else ''}"
        )
    if max(config.ffn, config.hidden) > kernels.SEGMENT_COLUMNS:
        raise ValueError(
            f"sparse needs at most {kernels.SEGMENT_COLUMNS} columns, this network has {config.hidden} and {config.ffn}"
        )


def listed_rows(config: ModelConfig, weights: Mapping[str, Any]) -> dict[int, ListedRows]:
    """W_up and W_down of every block once more, in rows of ``base3r``, in one array on huge pages.

    Parameters
    ----------
    config : ModelConfig
    weights : mapping of str to TernaryLayer and others, by the names of ``config.tensor_shapes()``

    Returns
    -------
    dict of int to ListedRows

    Raises
    ------
    ValueError
        As :func:`check_sparse`.
    KernelUnavailable
        If this build has no kernel for rows.
    """
    check_sparse(config)
    (scheme,) = ROW_SCHEMES
    dot, add = (kernels.select(op, scheme).capsules()[0] for op in kernels.ROW_PRODUCTS)
    row_bytes = -(-config.hidden // get_scheme(scheme).block) * get_scheme(scheme).tile_block_bytes
    data = huge_array((config.layers, 2, config.ffn, row_bytes))
    for i, (up, down) in enumerate(data):
        up[...] = pack(weights[f"model.layers.{i}.mlp.up_proj.weight"].w_packed.unpack(), scheme).data
        columns = weights[f"model.layers.{i}.mlp.down_proj.weight"].w_packed.unpack().T
        down[...] = pack(np.ascontiguousarray(columns), scheme).data
    freeze(data)
    isa = kernels.select("gemv", weights["model.layers.0.mlp.up_proj.weight"].w_packed.scheme).name.isa
    most = [int(config.ffn * (1 - share)) for share in SPARSE_FROM.get(isa, SPARSE_FROM["avx512vbmi"])]
    return {i: ListedRows(dot, add, *pair, config.hidden, *most) for i, pair in enumerate(data)}
