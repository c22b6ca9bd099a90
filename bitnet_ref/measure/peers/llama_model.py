"""Whole models of llama.cpp and of ik_llama.cpp: the C interface of both, as their packages declare it for ctypes.

The model is a GGUF file of random ternary weights in the shape of a preset, written here once for each type: speed does
not depend on the values of weights, only on their bytes. ik_llama.cpp's own quantiser makes the bytes of its types.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bitnet_ref.errors import BitnetRefError
from bitnet_ref.formats.gguf_names import hyperparameters, tensor_to_gguf
from bitnet_ref.formats.ternary_gguf import pack_tq
from bitnet_ref.measure.model_bench import peak_resident_bytes
from bitnet_ref.measure.peers.ggml import TYPES, Ggml
from bitnet_ref.measure.peers.worker import answer
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.runtime.model import EMBEDDING, encode_table, head_type

__all__ = ["ARCHITECTURES", "LlamaModel", "add_metadata", "serve", "write_random_gguf"]

ARCHITECTURES = {"llama.cpp": "bitnet", "ik_llama.cpp": "bitnet-b1.58"}
"""Under which name each reads this network. llama.cpp's computes SiLU where 2B4T has squared ReLU: the same work."""

_TABLE_ROWS = 1024  # rows of a table that are drawn; the others repeat them
_MODULES = {"llama.cpp": "llama_cpp.llama_cpp", "ik_llama.cpp": "ik_llama_cpp._ctypes_api"}


def write_random_gguf(path: Path, peer: str, config: ModelConfig, type_name: str, head: str) -> None:
    """Write a model of random ternary weights; one matrix of each shape is drawn and stands in every layer.

    Parameters
    ----------
    path : Path
        Written under a temporary name first.
    peer : {"llama.cpp", "ik_llama.cpp"}
    config : ModelConfig
    type_name : str
        Of :data:`bitnet_ref.measure.peers.ggml.TYPES`.
    head : str
        Type of the embedding, which is the head as well: ``f16``, ``q6_k``, ...
    """
    architecture = ARCHITECTURES[peer]
    rng = np.random.default_rng(0)
    number = TYPES[peer][type_name]
    library = None if peer == "llama.cpp" else Ggml(peer)
    packed = {}
    for shape in sorted(set(config.linear_shapes().values())):
        w_q = rng.integers(-1, 2, shape, dtype=np.int8)
        packed[shape] = pack_tq(w_q, np.float16(1), type_name) if library is None else library.quantize(w_q, number)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(temporary, architecture)
    try:
        _metadata(writer, config, architecture)
        tensors: list[tuple[str, np.ndarray]] = []
        for name, shape in config.tensor_shapes().items():
            gguf_name = _gguf_name(name)
            if name in config.linear_shapes():
                data, kind = packed[shape].reshape(-1), number
            elif name == EMBEDDING:
                values = rng.standard_normal((_TABLE_ROWS, shape[1]), np.float32) * np.float32(shape[1] ** -0.5)
                raw = encode_table(name, values, head_type(head)).raw
                data, kind = np.resize(raw, (shape[0], raw.shape[1])).reshape(-1), _number_of(head)
            else:
                data, kind = np.ones(shape, np.float32).view(np.uint8), 0
            writer.add_tensor_info(gguf_name, shape, np.dtype(np.float32), data.nbytes, kind)
            tensors.append((gguf_name, data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stream = writer.fout[0]
        writer.write_padding(stream, stream.tell())
        for _, data in tensors:
            stream.write(data.data)
            writer.write_padding(stream, stream.tell())
        writer.flush()
        writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def add_metadata(writer: gguf.GGUFWriter, raw: Mapping[str, Any], architecture: str) -> None:
    """What llama.cpp wants to know of a network without a tokenizer; `raw` is a ``config.json``."""
    for key, value in hyperparameters(dict(raw), architecture).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_string("tokenizer.ggml.model", "no_vocab")


def _metadata(writer: gguf.GGUFWriter, config: ModelConfig, architecture: str) -> None:
    add_metadata(
        writer,
        {
            "vocab_size": config.vocabulary,
            "hidden_size": config.hidden,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.context,
            "num_hidden_layers": config.layers,
            "intermediate_size": config.ffn,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "hidden_act": config.activation,
        },
        architecture,
    )


def _gguf_name(name: str) -> str:
    found = tensor_to_gguf(name)
    if found is None:
        raise BitnetRefError(f"GGUF has no name for {name}")
    return found


def _number_of(head: str) -> int:
    return gguf.GGMLQuantizationType[head_type(head)].value


class LlamaModel:
    """A loaded model of a peer, and the two things that are timed."""

    def __init__(self, peer: str, path: str, threads: int, context: int, repack: bool = False):
        self._peer = peer
        api = self._api = importlib.import_module(_MODULES[peer])
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        if repack:
            parameters.repack_tensors, parameters.use_mmap = True, False
        self._model = api.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise BitnetRefError(f"{peer} does not load {Path(path).name}")
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_threads = settings.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise BitnetRefError(f"{peer} makes no context of {context} tokens for {Path(path).name}")
        self._batch = api.llama_batch_init(context, 0, 1)
        self._position = 0

    def _run(self, tokens: list[int]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, self._position + i, 1, 0
            batch.logits[i] = i == len(tokens) - 1
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise BitnetRefError(f"{self._peer} could not run {len(tokens)} tokens: status {status}")
        logits = self._api.llama_get_logits_ith(self._context, len(tokens) - 1)
        if not logits or not np.isfinite(logits[0]):
            raise BitnetRefError(f"{self._peer} gave no finite logits for {len(tokens)} tokens")
        self._position += len(tokens)

    def prefill(self, tokens: list[int]) -> float:
        """Seconds that an empty cache takes to read these tokens."""
        if hasattr(self._api, "llama_memory_clear"):
            self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        else:
            self._api.llama_kv_cache_clear(self._context)
        self._position = 0
        start = time.perf_counter()
        self._run(tokens)
        return time.perf_counter() - start

    def decode(self, tokens: list[int]) -> list[float]:
        """Seconds of each step that takes one token."""
        taken = []
        for token in tokens:
            start = time.perf_counter()
            self._run([token])
            taken.append(time.perf_counter() - start)
        return taken


def serve(name: str, connection: Any) -> None:
    """What the process of a peer does for whole models."""
    loaded: list[LlamaModel] = []

    def load(path: str, threads: int, context: int, repack: bool) -> None:
        loaded[:] = [LlamaModel(name, path, threads, context, repack)]

    answer(
        connection,
        {
            "write": write_random_gguf,
            "load": load,
            "prefill": lambda tokens: loaded[0].prefill(tokens),
            "decode": lambda tokens: loaded[0].decode(tokens),
            "peak_resident_bytes": peak_resident_bytes,
        },
    )
