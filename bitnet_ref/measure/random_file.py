"""Files of random ternary models in our packed form, to measure a process that opens one as users do."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ref.formats.float_types import row_bytes
from bitnet_ref.formats.hf import SafetensorsStream
from bitnet_ref.formats.packed import PACKED_FORMAT, PACKED_VERSION
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.packing import get_scheme, pack
from bitnet_ref.runtime.model import (
    EMBEDDING,
    GATE,
    HEAD,
    check_gate_zeros,
    encode_table,
    head_type,
    random_ternary,
)

__all__ = ["write_random_model"]

_TABLE_ROWS = 1024  # rows of a table that are drawn; the others repeat them


def write_random_model(
    path: Path, published: Mapping[str, Any], scheme: str, head: str, gate_zeros: float | None = None
) -> None:
    """Write a model of random ternary weights; one gate and one matrix of each shape stand in every layer.

    Speed and memory depend on the bytes of weights, not on their values.

    Parameters
    ----------
    path : Path
        Written under a temporary name first.
    published : mapping
        The ``config.json`` of a ternary network.
    scheme : str
        Packing of the ternary matrices.
    head : str
        Type of the embedding and head: ``f16``, ``q6_k``, ...
    gate_zeros : float, optional
        As in :meth:`bitnet_ref.runtime.model.Model.random`.
    """
    config, stored, rng = ModelConfig.from_hf(published), head_type(head), np.random.default_rng(0)
    check_gate_zeros(gate_zeros)
    packed = {
        shape: pack(random_ternary(rng, shape), scheme).data for shape in sorted(set(config.linear_shapes().values()))
    }
    gate = packed[config.ffn, config.hidden]
    if gate_zeros is not None:
        gate = pack(random_ternary(rng, (config.ffn, config.hidden), gate_zeros), scheme).data
    scales = {shape: np.float32((1.5 / shape[1]) ** 0.5) for shape in packed}  # layers keep the size of their input
    plans: list[tuple[str, str, tuple[int, ...], int]] = []
    contents: list[np.ndarray] = []
    described: dict[str, Any] = {}

    def add(name: str, dtype: str, shape: tuple[int, ...], data: np.ndarray) -> None:
        plans.append((name, dtype, shape, data.nbytes))
        contents.append(data)

    linear = config.linear_shapes()
    for name, shape in linear.items():  # first, so that each begins on a cache line
        add(name, "U8", get_scheme(scheme).data_shape(shape), gate if name.endswith(GATE) else packed[shape])
        described[name] = {"shape": list(shape)}
    for name, shape in config.tensor_shapes().items():
        if name in linear:
            continue
        kind = "F32"
        if name in (EMBEDDING, HEAD):
            kind = stored
            drawn = rng.standard_normal((min(_TABLE_ROWS, shape[0]), shape[1]), np.float32) * np.float32(
                shape[1] ** -0.5
            )
            raw = encode_table(name, drawn, stored).raw
            data = np.resize(raw, (shape[0], row_bytes(shape[1], stored)))
        else:
            data = np.full(shape, 0 if name.endswith(".bias") else 1 - config.norm_offset, np.float32)
        native = kind in ("F32", "F16", "BF16")
        add(name, kind if native else "U8", shape if native else data.shape, data)
        described[name] = {"shape": list(shape), "type": kind}
    for name, shape in linear.items():
        add(f"{name}_scale", "F32", (1,), np.full(1, scales[shape]))
    metadata = {
        "format": PACKED_FORMAT,
        "version": PACKED_VERSION,
        "scheme": scheme,
        "config": json.dumps(dict(published)),
        "tensors": json.dumps(described),
        "assets": "[]",
        "provenance": json.dumps({"source": "none", "source_format": "random weights", "writer": __name__}),
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        stream = SafetensorsStream(temporary, plans, metadata)
        try:
            for data in contents:
                stream.write(data)
        finally:
            stream.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
