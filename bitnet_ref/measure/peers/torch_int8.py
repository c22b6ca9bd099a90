"""oneDNN's int8 product, through PyTorch: a byte for each weight, exact int32 sums."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bitnet_ref.measure.peers.worker import Candidate

__all__ = ["candidates"]


def candidates(w_q: np.ndarray, x_q: np.ndarray, threads: int) -> Iterator[Candidate]:
    """``torch._int_mm`` with the order of the matrix that it is faster with; only for several tokens."""
    torch = importlib.import_module("torch")  # a peer to measure; nothing here may need it
    if len(x_q) == 1:
        return
    torch.set_num_threads(threads)
    x, w = torch.from_numpy(x_q), torch.from_numpy(w_q)
    orders = {"rows": w.t(), "columns": w.t().contiguous()}

    def seconds(right: Any) -> float:
        torch._int_mm(x, right)
        start = time.perf_counter()
        torch._int_mm(x, right)
        return time.perf_counter() - start

    right = orders[min(orders, key=lambda order: seconds(orders[order]))]
    row = {
        "program": "torch",
        "kernel": "torch._int_mm",
        "type": "int8",
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "native").lower(),
        "version": torch.__version__,
        "weight_bytes": w_q.nbytes,
        "note": "int8 activations in, int32 out, as ours",
    }
    yield row, lambda: torch._int_mm(x, right).numpy(), 1
