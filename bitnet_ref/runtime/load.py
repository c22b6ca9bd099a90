"""Open a checkpoint of any form and make it ready to run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from bitnet_ref.errors import FormatError
from bitnet_ref.formats import FloatTensor, TernaryTensor, open_checkpoint
from bitnet_ref.formats.float_types import check_float_type, encode_floats
from bitnet_ref.reference.config import ModelConfig, canonical_name
from bitnet_ref.reference.head import TABLE_TYPES, FloatTable, GroupedTable
from bitnet_ref.reference.packing import get_scheme
from bitnet_ref.runtime.model import EMBEDDING, HEAD, Model, head_type
from bitnet_ref.runtime.pages import HugePages
from bitnet_ref.runtime.sparse import check_sparse
from bitnet_ref.runtime.steps import TiedTable, make_table
from bitnet_ref.runtime.tokenizer import tokenizer_from_checkpoint

__all__ = ["load"]

Progress = Callable[[int, int, str], None]


def load(
    path: str | os.PathLike[str],
    scheme: str = "base3",
    head: str = "q8_0",
    n_threads: int | None = None,
    *,
    cache: str = "f32",
    sparse: bool = False,
    quantize: bool = False,
    layout: str | None = None,
    convention: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a model: a Hugging Face folder, a GGUF file, or a file of our packed form.

    Parameters
    ----------
    path : str or path
    scheme : str
        Packing of the ternary matrices. A packed file of that scheme is copied as it is.
    head : {"f32", "f16", "bf16", "q8_0", "q6_k", "q4_0"}
        How the output head is stored in memory. A float type is mapped if the file has it so. A tied embedding is the
        same table if the file has it in that type; otherwise rows of the embedding are read from the file.
    n_threads : int, optional
        None: all processors that the process may use.
    cache : {"f32", "f16"}
        How keys and values are kept.
    sparse : bool
        As in :class:`bitnet_ref.runtime.model.Model`; for networks of squared ReLU with SubLN.
    quantize, layout, convention
        As in :func:`bitnet_ref.formats.open_checkpoint`.
    progress : callable(done, total, name), optional
        Called after each tensor.

    Returns
    -------
    Model
        With the checkpoint's tokenizer, or None as its ``tokenizer`` if it came without one.

    Raises
    ------
    FormatError
        If the files cannot be read, or the tensors are not those of the network that the configuration describes.
    ValueError
        If an option has no such value, or the configuration is of a network that is not known here.
    """
    get_scheme(scheme)
    stored = head_type(head)
    checkpoint = open_checkpoint(path, quantize=quantize, layout=layout, convention=convention)
    names = [canonical_name(name) for name in checkpoint.entries]
    # Master weights of a network that no configuration calls ternary are ternary if the caller has them rounded.
    asked = True if quantize and "quantization_config" not in checkpoint.config else None
    config = ModelConfig.from_hf(checkpoint.config, names, ternary=asked)
    config.check_names(names)
    if sparse:
        check_sparse(config)
    weights: dict[str, Any] = {}
    pages = HugePages(scheme, config.linear_shapes().values())
    for done, entry in enumerate(checkpoint.entries.values(), 1):
        name, tensor = canonical_name(entry.name), entry.load()
        if isinstance(tensor, TernaryTensor):
            weights[name] = (pages.place(tensor.packed(scheme)), tensor.w_scale)
        elif name == HEAD:
            if not config.tied_head:  # else a copy of the embedding that some files carry along
                weights[name] = _table(tensor, stored)
        elif name == EMBEDDING:
            weights[name] = _embedding(tensor, stored, config.tied_head)
        else:
            weights[name] = _floats(path, tensor, config.ternary and name in config.linear_shapes())
        if progress is not None:
            progress(done, len(checkpoint.entries), name)
    assets = set(checkpoint.assets)
    kind = checkpoint.gguf_metadata.get("tokenizer.ggml.model", "no_vocab")  # that is GGUF's word for none
    has_tokenizer = kind != "no_vocab" or assets & {"tokenizer.json", "tokenizer.model"}
    tokenizer = tokenizer_from_checkpoint(checkpoint) if has_tokenizer else None
    return Model(config, weights, n_threads=n_threads, tokenizer=tokenizer, cache=cache, sparse=sparse)


def _floats(path: Any, tensor: FloatTensor, must_be_ternary: bool) -> np.ndarray:
    if must_be_ternary:
        raise FormatError(
            f"{path}: {tensor.name} must be ternary in this network, it holds other weights; rounding them changes the "
            "model, allow it with quantize"
        )
    return tensor.to_float32()


def _embedding(tensor: FloatTensor, stored: str, tied: bool) -> FloatTable | GroupedTable | TiedTable:
    """The embedding as the file has it, and the head beside it if they are one tensor.

    One table if the head has the type of the file. Else the embedding is mapped: a page of the file becomes resident
    with its neighbours when a row in it is read, which for some hundred tokens may be all of them.
    """
    head = _table(tensor, stored) if tied else None
    if head is not None and tensor.type == stored:
        return head
    if tensor.type in TABLE_TYPES:
        embedding = FloatTable(tensor.raw(), tensor.type, tensor.shape[-1])
    else:
        embedding = head or _table(tensor, "F32")  # rows of other types are not read one at a time
    return embedding if head is None else TiedTable(embedding, head)


def _table(tensor: FloatTensor, stored: str) -> FloatTable | GroupedTable:
    """The head in the type asked for: of floats mapped if the file has it so, else made some MiB at a time."""
    check_float_type(tensor.name, tensor.shape[1], stored)
    if tensor.type == stored and TABLE_TYPES[stored][0] == 1:
        return FloatTable(tensor.raw(), stored, tensor.shape[1])
    if tensor.type == stored:
        return make_table(tensor.raw_chunks(), tensor.shape, stored)
    encoded = (encode_floats(tensor.name, values, stored).reshape(len(values), -1) for _, _, values in tensor.chunks())
    return make_table(encoded, tensor.shape, stored)
