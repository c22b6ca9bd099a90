"""Products of llama.cpp and of ik_llama.cpp: a graph of ``ggml_mul_mat`` on their own shared libraries, by ctypes.

A graph holds one product for each copy of the matrix, as the graph of a decoding step holds one for each layer, so that
starting its threads is shared by all of them. Activations go in as float32 and are rounded to int8 by the peer, in
blocks (q8_K, one scale for 256 values) or groups of a row (ik_llama.cpp); float32 comes out. Its results therefore
differ from the exact product by that rounding, and its time includes it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ref.errors import BitnetRefError
from bitnet_ref.measure.peers import PEERS
from bitnet_ref.measure.peers.worker import Candidate
from bitnet_ref.measure.problem import copies

__all__ = ["TYPES", "Ggml"]

F32 = 0
TYPES = {
    "llama.cpp": {"TQ1_0": 34, "TQ2_0": 35},
    "ik_llama.cpp": {"IQ1_BN": 134, "IQ2_BN": 135, "IQ2_BN_R4": 335},
}
"""Their ternary types and the numbers of these."""

_NOTES = {
    "llama.cpp": "float32 in and out; activations rounded to int8 in blocks of 256 (q8_K)",
    "ik_llama.cpp": "float32 in and out; activations rounded to int8 in four interleaved groups of a row",
}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    """ggml_cplan: both programs begin alike; the rest is filled by them and only handed back."""

    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("rest", ctypes.c_void_p * 6),
    )


class Ggml:
    """The library of one of the two programs.

    Raises
    ------
    BitnetRefError
        If the package has no such library.
    """

    def __init__(self, name: str):
        self.name = name
        module, package = PEERS[name]
        folder = Path(str(importlib.util.find_spec(module).origin)).parent / "lib"
        self.version = importlib.metadata.version(package)
        # Each needs the ones before it.
        files = [folder / file for file in ("libggml-base.so", "libggml-cpu.so", "libggml.so")]
        self._libraries = [ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL) for file in files if file.exists()]
        if not self._libraries:
            raise BitnetRefError(f"{package} {self.version} holds no libggml.so where it was expected, {folder}")
        pointer, size, integer, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
        self.init = self._function("ggml_init", pointer, _InitParams)
        self.free = self._function("ggml_free", None, pointer)
        self.row_size = self._function("ggml_row_size", size, integer, number)
        self.new_tensor = self._function("ggml_new_tensor_2d", pointer, pointer, integer, number, number)
        self.mul_mat = self._function("ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.data = self._function("ggml_get_data", pointer, pointer)
        self.new_graph = self._function("ggml_new_graph_custom", pointer, pointer, size, ctypes.c_bool)
        self.expand = self._function("ggml_build_forward_expand", None, pointer, pointer)
        self.compute = self._function("ggml_graph_compute", integer, pointer, ctypes.POINTER(_Plan))
        self._quantize = self._function(
            "ggml_quantize_chunk", size, integer, pointer, pointer, number, number, number, pointer
        )
        threadpool = (pointer,) if name == "llama.cpp" else ()
        self._plan = self._function("ggml_graph_plan", _Plan, pointer, integer, *threadpool)
        self._no_threadpool = (None,) * len(threadpool)
        self.isa = self._isa()

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        for library in self._libraries:
            try:
                function = getattr(library, name)
            except AttributeError:
                continue
            function.restype, function.argtypes = result, arguments
            return function
        raise BitnetRefError(f"the library of {self.name} {self.version} has no function {name}")

    def _isa(self) -> str:
        """What it was compiled for, in our names: its ternary kernels may use less."""
        for isa, test in (("avx512vbmi", "avx512_vbmi"), ("avx512vnni", "avx512_vnni"), ("avx2", "avx2")):
            if self._function(f"ggml_cpu_has_{test}", ctypes.c_int)():
                return isa
        return "baseline"

    def plan(self, graph: int, threads: int) -> _Plan:
        """How to compute a graph with so many threads."""
        return self._plan(graph, threads, *self._no_threadpool)

    def quantize(self, values: np.ndarray, number: int) -> np.ndarray:
        """Rows of float32 in one of its types, as bytes (M, bytes of a row)."""
        m, k = values.shape
        values = np.ascontiguousarray(values, np.float32)
        out = np.zeros((m, self.row_size(number, k)), np.uint8)
        written = self._quantize(number, values.ctypes.data, out.ctypes.data, 0, m, k, None)
        if written != out.nbytes:
            raise BitnetRefError(f"{self.name} wrote {written} bytes for type {number}, {out.nbytes} were expected")
        return out

    def candidates(self, w_q: np.ndarray, x_q: np.ndarray, threads: int) -> Iterator[Candidate]:
        """One for each ternary type that the shape allows: K of whole blocks of 256, and 512 at least for IQ*_BN."""
        m, k = w_q.shape
        if k % 256 or (self.name == "ik_llama.cpp" and k < 512):
            return
        for type_name, number in TYPES[self.name].items():
            if type_name.endswith("_R4") and m % 4:
                continue
            packed = self.quantize(w_q, number)
            row = {
                "program": self.name,
                "kernel": f"{self.name} {type_name}",
                "type": type_name,
                # The kernels of TQ1_0 and TQ2_0 are written for AVX2, whatever the library is compiled for.
                "isa": "avx2" if self.name == "llama.cpp" and self.isa.startswith("avx512") else self.isa,
                "version": self.version,
                "weight_bytes": packed.nbytes,
                "note": _NOTES[self.name],
            }
            product = _Product(self, number, packed, x_q, threads)
            yield row, product, product.units


class _Product:
    """A graph that multiplies with each copy of a matrix; its memory is freed with it."""

    def __init__(self, peer: Ggml, number: int, packed: np.ndarray, x_q: np.ndarray, threads: int):
        (m, row_bytes), (tokens, k) = packed.shape, x_q.shape
        self._peer, self.units = peer, copies(packed.nbytes, tokens)
        memory = self.units * (m * row_bytes + 4 * m * tokens + 8192) + 4 * tokens * k + 2**21
        self._context = peer.init(_InitParams(memory, None, False))
        x = peer.new_tensor(self._context, F32, k, tokens)
        values = np.ascontiguousarray(x_q, np.float32)
        ctypes.memmove(peer.data(x), values.ctypes.data, values.nbytes)
        self._graph = peer.new_graph(self._context, 2 * self.units + 64, False)
        for _ in range(self.units):
            w = peer.new_tensor(self._context, number, k, m)
            ctypes.memmove(peer.data(w), packed.ctypes.data, packed.nbytes)
            y = peer.mul_mat(self._context, w, x)
            peer.expand(self._graph, y)
        self._plan = peer.plan(self._graph, threads)
        self._work = np.zeros(max(64, self._plan.work_size), np.uint8)
        self._plan.work_data = self._work.ctypes.data
        floats = ctypes.cast(peer.data(y), ctypes.POINTER(ctypes.c_float))
        self._result = np.ctypeslib.as_array(floats, (tokens, m))

    def __call__(self) -> np.ndarray:
        status = self._peer.compute(self._graph, ctypes.byref(self._plan))
        if status != 0:
            raise BitnetRefError(f"{self._peer.name} could not compute a product: status {status}")
        return self._result

    def __del__(self) -> None:
        self._peer.free(self._context)
