"""Checkpoints: every form into every other with the same integers and scales, files of other programs, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from safetensors.numpy import load_file, save_file

from bitnet_ref.errors import FormatError
from bitnet_ref.formats import convert, detect, open_checkpoint, open_tensor_file, read_gguf_metadata
from bitnet_ref.formats.checkpoint import TernaryTensor, ternary_of_floats
from bitnet_ref.formats.gguf_names import permute_rows, rope_factors
from bitnet_ref.formats.gguf_tokenizer import pre_tokenizer_name
from bitnet_ref.formats.hf import pack_hf
from bitnet_ref.formats.i2s import I2S_LAYOUTS, pack_i2s

TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "added_tokens": [{"id": 3, "content": "<|begin|>", "special": True}],
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|begin|>"}}]},
}
ROUTES = ("hf-packed", "packed", "gguf-tq1_0", "gguf-tq2_0", "gguf-i2_s")


def config_of(hidden=256, inter=512, heads=4, kv=2, layers=2, vocab=40, sub_norms=True, act="relu2", **more):
    return {
        "architectures": ["BitNetForCausalLM" if sub_norms else "LlamaForCausalLM"],
        "model_type": "bitnet" if sub_norms else "llama",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "hidden_act": act,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 128,
        "bos_token_id": 3,
        "eos_token_id": [2, 1],
        "tie_word_embeddings": True,
        **more,
    }


def linear_shapes(config):
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    parts = {"self_attn.q": (q, hidden), "self_attn.k": (kv, hidden), "self_attn.v": (kv, hidden)}
    parts |= {"self_attn.o": (hidden, q), "mlp.gate": (inter, hidden), "mlp.up": (inter, hidden)}
    parts |= {"mlp.down": (hidden, inter)}
    return {
        f"model.layers.{i}.{part}_proj.weight": shape
        for i in range(config["num_hidden_layers"])
        for part, shape in parts.items()
    }


def model_of(config, seed=0):
    """Random integers with scales that float16 cannot hold, and float tensors."""
    rng = np.random.default_rng(seed)
    ternary = {
        name: (rng.integers(-1, 2, shape, dtype=np.int8), np.float32(rng.uniform(0.01, 3)))
        for name, shape in linear_shapes(config).items()
    }
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    floats = {"model.embed_tokens.weight": rng.standard_normal((vocab, hidden)).astype(np.float16)}
    floats["model.norm.weight"] = rng.standard_normal(hidden, np.float32)
    if not config["tie_word_embeddings"]:
        floats["lm_head.weight"] = rng.standard_normal((vocab, hidden)).astype(np.float16)
    for i in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            floats[f"model.layers.{i}.{norm}.weight"] = rng.standard_normal(hidden, np.float32)
        if config["model_type"] == "bitnet":
            q = ternary[f"model.layers.{i}.self_attn.q_proj.weight"][0].shape[0]
            floats[f"model.layers.{i}.self_attn.attn_sub_norm.weight"] = rng.standard_normal(q, np.float32)
            inter = config["intermediate_size"]
            floats[f"model.layers.{i}.mlp.ffn_sub_norm.weight"] = rng.standard_normal(inter, np.float32)
    return ternary, floats


def write_hf(folder, config, ternary, floats, dequantised=True, files=1):
    """A folder as other programs write it: float weights, or packed ones with a multiplying scale."""
    folder.mkdir()
    tensors = dict(floats)
    for name, (w_q, scale) in ternary.items():
        if dequantised:
            tensors[name] = w_q * scale
        else:
            tensors[name] = pack_hf(w_q)
            tensors[name + "_scale"] = np.array([scale])
    if not dequantised:
        config = config | {"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::files]}, folder / file)
        weight_map |= dict.fromkeys(names[i::files], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def assert_same(checkpoint, ternary, floats):
    """Every integer, scale and float of the model, and nothing else."""
    assert set(checkpoint.entries) == {*ternary, *floats}
    for name, (w_q, scale) in ternary.items():
        tensor = checkpoint[name]
        assert isinstance(tensor, TernaryTensor) and checkpoint.entries[name].ternary
        assert tensor.shape == w_q.shape == checkpoint.entries[name].shape
        np.testing.assert_array_equal(tensor.w_q, w_q, err_msg=name)
        assert tensor.w_scale == scale and tensor.w_scale.dtype == np.float32, name
    for name, values in floats.items():
        np.testing.assert_array_equal(checkpoint[name].to_float32(), values.astype(np.float32), err_msg=name)


@pytest.fixture
def bitnet(tmp_path):
    config = config_of()
    ternary, floats = model_of(config)
    return write_hf(tmp_path / "hf", config, ternary, floats), config, ternary, floats


def target_path(folder, name, to):
    return folder / (name if to == "hf-packed" else name + (".gguf" if to.startswith("gguf") else ".safetensors"))


# Round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), list(product(ROUTES, ROUTES)))
def test_every_form_into_every_other_and_back(tmp_path, bitnet, first, second):
    source, config, ternary, floats = bitnet
    a, b = target_path(tmp_path, "a", first), target_path(tmp_path, "b", second)
    report = convert(source, a, first)
    assert (report.n_ternary, report.n_float) == (len(ternary), len(floats))
    assert_same(open_checkpoint(a), ternary, floats)
    convert(a, b, second, scheme="i2")
    checkpoint = open_checkpoint(b)
    assert_same(checkpoint, ternary, floats)
    for key in config.keys() - {"architectures", "eos_token_id"}:
        assert checkpoint.config[key] == config[key], key
    assert json.loads(checkpoint.assets["tokenizer.json"]) == TOKENIZER
    assert checkpoint.assets["chat_template.jinja"] == b"{{ messages }}"


@pytest.mark.parametrize("scheme", ["i2", "base3", "tl1", "tl2"])
@pytest.mark.parametrize("hidden, inter, heads, kv", [(20, 28, 2, 1), (36, 100, 3, 3), (132, 64, 4, 2)])
def test_odd_shapes_in_the_forms_that_take_any(tmp_path, scheme, hidden, inter, heads, kv):
    config = config_of(hidden, inter, heads, kv, layers=1, vocab=7, act="silu", tie_word_embeddings=False, head_dim=6)
    ternary, floats = model_of(config, seed=hidden)
    source = write_hf(tmp_path / "hf", config, ternary, floats)
    convert(source, tmp_path / "a.safetensors", "packed", scheme=scheme)
    assert_same(open_checkpoint(tmp_path / "a.safetensors"), ternary, floats)
    assert open_checkpoint(tmp_path / "a.safetensors").config.items() >= config.items()


@pytest.mark.parametrize("layout", I2S_LAYOUTS)
def test_every_i2s_layout(tmp_path, bitnet, layout):
    source, _, ternary, floats = bitnet
    convert(source, tmp_path / "a.gguf", "gguf-i2_s", i2s_layout=layout)
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert_same(checkpoint, ternary, floats)
    assert f"layout {layout}, certain: the file says so" in checkpoint.notes[0]
    name, (w_q, scale) = next(iter(ternary.items()))
    tensor = next(t for t in open_tensor_file(tmp_path / "a.gguf").tensors if t.name == "blk.0.attn_q.weight")
    raw = (tmp_path / "a.gguf").read_bytes()[tensor.offset :][: tensor.stored_bytes]
    assert name.endswith("0.self_attn.q_proj.weight") and raw == pack_i2s(w_q, scale, layout).tobytes()


@pytest.mark.parametrize("to", ["gguf-tq1_0", "gguf-tq2_0", "gguf-i2_s"])
def test_llama_architecture_permutes_and_keeps_exact_scales(tmp_path, to):
    config = config_of(sub_norms=False, act="silu", tie_word_embeddings=False)
    ternary, floats = model_of(config)
    floats["model.layers.0.self_attn.k_proj.bias"] = np.arange(128, dtype=np.float32)
    convert(write_hf(tmp_path / "hf", config, ternary, floats), tmp_path / "a.gguf", to)
    assert_same(open_checkpoint(tmp_path / "a.gguf"), ternary, floats)
    reader = gguf.GGUFReader(tmp_path / "a.gguf") if to != "gguf-i2_s" else None
    if reader is not None:  # what another program sees
        stored = {tensor.name: tensor for tensor in reader.tensors}
        w_q, scale = ternary["model.layers.1.self_attn.k_proj.weight"]
        seen = gguf.quants.dequantize(stored["blk.1.attn_k.weight"].data, stored["blk.1.attn_k.weight"].tensor_type)
        np.testing.assert_array_equal(seen, permute_rows(w_q, 2) * np.float32(np.float16(scale)))
        np.testing.assert_array_equal(stored["blk.0.attn_k.bias"].data, permute_rows(np.arange(128.0), 2))
        assert not any(name.endswith(".scale") for name in stored)


def test_bitnet_architecture_gives_llama_cpp_the_exact_scale(tmp_path, bitnet):
    source, _, ternary, _ = bitnet
    convert(source, tmp_path / "a.gguf", "gguf-tq2_0")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    for name, part in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
        w_q, scale = ternary[f"model.layers.1.{name}.weight"]
        tensor = stored[f"blk.1.{part}.weight"]
        np.testing.assert_array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), w_q)
        np.testing.assert_array_equal(stored[f"blk.1.{part}.scale"].data, [scale])


def test_metadata_that_others_forget(tmp_path, bitnet):
    convert(bitnet[0], tmp_path / "a.gguf", "gguf-i2_s")
    metadata = read_gguf_metadata(tmp_path / "a.gguf")
    arch = "bitnet-b1.58"
    assert metadata["general.architecture"] == arch
    assert metadata[f"{arch}.hidden_activation"] == "relu2"
    assert np.float32(metadata[f"{arch}.attention.layer_norm_rms_epsilon"]) == np.float32(1e-5)
    assert metadata[f"{arch}.rope.freq_base"] == 500000.0 and metadata[f"{arch}.rope.dimension_count"] == 64
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.tokens"][:5] == ["a", "b", "ab", "<|begin|>", "[PAD4]"]
    assert len(metadata["tokenizer.ggml.tokens"]) == 40
    assert metadata["tokenizer.ggml.token_type"][:5].tolist() == [1, 1, 1, 3, 5]
    assert metadata["tokenizer.ggml.merges"] == ["a b"] and metadata["tokenizer.ggml.add_bos_token"] is True
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (3, 2)
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert metadata["general.file_type"] == 40
    convert(bitnet[0], tmp_path / "b.gguf", "gguf-tq1_0")
    assert read_gguf_metadata(tmp_path / "b.gguf")["bitnet.hidden_activation"] == "relu2"


def test_pre_tokenizers_are_known_or_refused():
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    pattern = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    assert pre_tokenizer_name(steps) == "llama-bpe"
    assert pre_tokenizer_name(steps | {"pretokenizers": [split | {"pattern": {"Regex": "x"}}, byte_level]}) is None
    digits = {"type": "Digits", "individual_digits": True}
    assert (
        pre_tokenizer_name({"type": "Sequence", "pretokenizers": [digits, byte_level | {"use_regex": True}]})
        == "smollm"
    )
    assert pre_tokenizer_name({"type": "Metaspace"}) is None and pre_tokenizer_name(None) is None


@pytest.mark.parametrize("embedding", ["f32", "f16", "bf16", "q8_0", "q6_k", "q4_0"])
@pytest.mark.parametrize("to", ["gguf-tq2_0", "packed"])
def test_embedding_is_encoded_anew_only_when_asked(tmp_path, bitnet, to, embedding):
    source, _, _, floats = bitnet
    a, b = target_path(tmp_path, "a", to), target_path(tmp_path, "b", "packed" if to != "packed" else "gguf-i2_s")
    convert(source, a, to, embedding=embedding)
    tensor = open_checkpoint(a)["model.embed_tokens.weight"]
    assert tensor.type == embedding.upper()
    values, original = tensor.to_float32(), floats["model.embed_tokens.weight"].astype(np.float32)
    error = np.abs(values - original).max()
    # Half a step, times the largest of 10,240 normal values (about 4.2); Q4_0 has a step of an eighth of it.
    assert error <= {"f32": 0, "f16": 0, "bf16": 0.02, "q8_0": 0.02, "q6_k": 0.15, "q4_0": 0.6}[embedding]
    convert(a, b, "packed" if to != "packed" else "gguf-i2_s")  # no type named: the bytes pass unchanged
    again = open_checkpoint(b)["model.embed_tokens.weight"]
    assert again.type == tensor.type and again.raw().tobytes() == tensor.raw().tobytes()


def test_rotary_scaling_of_llama_3(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = config_of(sub_norms=False, act="silu", rope_scaling=scaling)
    ternary, floats = model_of(config)
    convert(write_hf(tmp_path / "hf", config, ternary, floats), tmp_path / "a.gguf", "gguf-tq1_0")
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert_same(checkpoint, ternary, floats)
    assert checkpoint.config["rope_scaling"] == scaling
    factors = rope_factors(scaling, 500000.0, 64)
    assert factors[0] == 1 and factors[-1] == 8 and (np.diff(factors) >= 0).all()
    with pytest.raises(ValueError, match="cannot be written to GGUF under architecture bitnet"):
        config = config_of(rope_scaling=scaling)
        convert(write_hf(tmp_path / "hf2", config, *model_of(config)), tmp_path / "b.gguf", "gguf-tq1_0")


def test_names_of_the_first_reproductions(tmp_path):
    config = config_of(act="silu")
    ternary, floats = model_of(config)
    old = {"self_attn.attn_sub_norm": "self_attn.inner_attn_ln", "mlp.ffn_sub_norm": "mlp.ffn_layernorm"}
    renamed = {}
    for name, values in floats.items():
        for new, before in old.items():
            name = name.replace(new, before)
        renamed[name] = values
    convert(write_hf(tmp_path / "hf", config, ternary, renamed), tmp_path / "a.gguf", "gguf-tq1_0")
    assert_same(open_checkpoint(tmp_path / "a.gguf"), ternary, floats)


# Reading -------------------------------------------------------------------------------------------------------------


def test_shards_and_packed_weights(tmp_path):
    config = config_of()
    ternary, floats = model_of(config)
    assert_same(open_checkpoint(write_hf(tmp_path / "a", config, ternary, floats, files=3)), ternary, floats)
    assert_same(open_checkpoint(write_hf(tmp_path / "b", config, ternary, floats, False, files=2)), ternary, floats)


@pytest.mark.parametrize(
    ("quantization", "divides"),
    [
        ({"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}, False),
        ({"quant_method": "bitnet", "linear_class": "bitlinear"}, True),
        ({"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}, True),
    ],
)
def test_both_scale_conventions(tmp_path, quantization, divides):
    config = config_of()
    ternary, floats = model_of(config)
    source = write_hf(tmp_path / "hf", config, ternary, floats, dequantised=False)
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    checkpoint = open_checkpoint(source)
    for name, (_, stored) in ternary.items():
        assert checkpoint[name].w_scale == (np.float32(1) / stored if divides else stored)
    assert ("divides" if divides else "multiplies") in checkpoint.notes[0]
    assert ("divides" if divides else "multiplies") in detect(source).details[0]
    with pytest.raises(ValueError, match="says that scales"):
        open_checkpoint(source, convention="multiply" if divides else "divide")
    # What is written multiplies, whatever was read.
    convert(source, tmp_path / "out", "hf-packed")
    out = open_checkpoint(tmp_path / "out")
    assert out.config["quantization_config"]["linear_class"] == "autobitlinear"
    assert all(out[name].w_scale == checkpoint[name].w_scale for name in ternary)


def test_transformers_agrees_on_the_conventions():
    torch = pytest.importorskip("torch", reason="transformers' layers need torch")
    bitnet = pytest.importorskip("transformers.integrations.bitnet", reason="needs transformers' layers")
    w_q = np.random.default_rng(0).integers(-1, 2, (8, 16), dtype=np.int8)
    x = torch.full((1, 16), 127.0)  # quantised without error
    expected = 127.0 * w_q.sum(axis=1)
    auto = bitnet.AutoBitLinear(16, 8, bias=False)
    auto.weight.data = torch.from_numpy(w_q.astype(np.float32))
    auto.weight_scale.fill_(4.0)
    plain = bitnet.BitLinear(16, 8, bias=False, dtype=torch.float32)
    plain.weight.copy_(torch.from_numpy(pack_hf(w_q)))
    plain.weight_scale.fill_(4.0)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        np.testing.assert_array_equal(auto(x).numpy()[0], expected * 4)
        np.testing.assert_array_equal(plain(x).numpy()[0], expected / 4)


def test_packed_weights_without_a_convention_are_refused(tmp_path):
    config = config_of()
    ternary, floats = model_of(config)
    source = write_hf(tmp_path / "hf", config, ternary, floats, dequantised=False)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="whether weight_scale multiplies or divides"):
        open_checkpoint(source)
    assert_same(open_checkpoint(source, convention="multiply"), ternary, floats)


def test_rows_that_transformers_rounds_up(tmp_path):
    config = config_of(hidden=12, inter=10, heads=3, kv=1, layers=1)  # k and v have 4 rows, gate and up 10
    ternary, floats = model_of(config)
    source = write_hf(tmp_path / "hf", config, {}, floats)
    tensors = dict(floats)
    for name, (w_q, scale) in ternary.items():
        padded = np.full((-len(w_q) % 4 + len(w_q), w_q.shape[1]), -1, np.int8)
        padded[: len(w_q)] = w_q
        tensors[name], tensors[name + "_scale"] = pack_hf(padded), np.array([scale])
    save_file(tensors, source / "model.safetensors")
    assert_same(open_checkpoint(source, convention="multiply"), ternary, floats)


def test_float_weights_that_are_ternary_keep_their_magnitude():
    w = np.float32(0.3) * np.array([[1, 0, -1, 0], [0, 0, 0, 1]], np.float32)
    tensor = ternary_of_floats("w", w, quantize=False)
    assert tensor.w_scale == np.float32(0.3)  # absmean would say 0.1125
    np.testing.assert_array_equal(tensor.w_q, np.sign(w))
    assert ternary_of_floats("w", np.float32([[0.3, -0.2]]), quantize=False) is None
    zeros = ternary_of_floats("w", np.zeros((2, 2), np.float32), quantize=False)
    assert not zeros.w_q.any() and zeros.w_scale == np.float32(1e-5)
    with pytest.raises(FormatError, match="NaN or infinity"):
        ternary_of_floats("w", np.float32([[0.3, np.nan]]), quantize=True)


@pytest.mark.parametrize("to", ROUTES)
def test_weights_that_are_not_ternary_need_a_word(tmp_path, bitnet, to):
    source, config, ternary, floats = bitnet
    name, rng = "model.layers.1.mlp.down_proj.weight", np.random.default_rng(1)
    master = rng.standard_normal(ternary[name][0].shape, np.float32)
    tensors = {n: w_q * scale for n, (w_q, scale) in ternary.items()} | floats
    save_file(tensors | {name: master}, source / "model.safetensors")
    out = target_path(tmp_path, "out", to)
    with pytest.raises(ValueError, match=r"must be ternary, model.layers.1.mlp.down_proj.weight is not.*--quantize"):
        convert(source, out, to)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    convert(source, out, to, quantize=True)
    scale = np.float32(np.abs(master).mean(dtype=np.float64))
    expected = np.clip(np.rint(master * (np.float32(1) / scale)), -1, 1).astype(np.int8)
    assert_same(open_checkpoint(out), ternary | {name: (expected, scale)}, floats)
    # A configuration that quantises online allows it too.
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    assert_same(open_checkpoint(source), ternary | {name: (expected, scale)}, floats)


def test_gguf_written_by_the_library(tmp_path):
    """As llama.cpp's converter does: scale in the blocks, float16; norms float32; no keys of ours."""
    config = config_of(hidden=256, inter=256, layers=1, act="silu")
    ternary, floats = model_of(config)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "bitnet")
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_context_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_add_bos_token(True)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down"}
    for hf, part in names.items():
        w_q, scale = ternary[f"model.layers.0.{hf}.weight"]
        kind = GgmlType.TQ1_0 if part.startswith("attn") else GgmlType.TQ2_0
        data = gguf.quants.quantize(w_q * scale, kind)
        writer.add_tensor(f"blk.0.{part}.weight", data, raw_dtype=kind)
    for hf, part in (
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.attn_sub_norm", "attn_sub_norm"),
        ("mlp.ffn_sub_norm", "ffn_sub_norm"),
    ):
        writer.add_tensor(f"blk.0.{part}.weight", floats[f"model.layers.0.{hf}.weight"])
    writer.add_tensor("output_norm.weight", floats["model.norm.weight"])
    writer.add_tensor("token_embd.weight", floats["model.embed_tokens.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert_same(checkpoint, {n: (w, np.float32(np.float16(s))) for n, (w, s) in ternary.items()}, floats)
    assert checkpoint.config["hidden_act"] == "silu" and "names no activation" in checkpoint.notes[0]
    assert checkpoint.config["vocab_size"] == 40 and checkpoint.config["tie_word_embeddings"] is True


def test_packed_bytes_are_mapped_not_copied(tmp_path, bitnet):
    source, _, _, _ = bitnet
    convert(source, tmp_path / "a.safetensors", "packed", scheme="base3")
    for entry in open_checkpoint(tmp_path / "a.safetensors").entries.values():
        if entry.ternary:
            packed = entry.load().packed("base3")
            base = packed.data
            while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
                base = base.base
            assert isinstance(base, np.memmap) and not packed.data.flags.writeable
            assert packed.data.ctypes.data % 64 == 0


# Which I2_S layout ---------------------------------------------------------------------------------------------------


def without_layout_key(path):
    """The file as bitnet.cpp would have written it: our key renamed to something else of the same length."""
    data = path.read_bytes()
    assert data.count(b"bitnet_ref.i2_s_layout") == 1
    path.write_bytes(data.replace(b"bitnet_ref.i2_s_layout", b"somebody.elses.setting"))


def structured_model(config, seed=0):
    """Channels that differ, as in trained models: columns of a matrix are the sparser the larger their norm weight."""
    rng = np.random.default_rng(seed)
    ternary, floats = model_of(config, seed)
    norms = {"q": "input_layernorm", "k": "input_layernorm", "v": "input_layernorm", "o": "self_attn.attn_sub_norm"}
    norms |= {"gate": "post_attention_layernorm", "up": "post_attention_layernorm", "down": "mlp.ffn_sub_norm"}
    for name, (w_q, scale) in ternary.items():
        layer, kind = name.rsplit(".", 3)[0], name.rsplit(".", 2)[1].removesuffix("_proj")
        norm = np.abs(floats[f"{layer}.{norms[kind]}.weight"])
        keep = rng.random(w_q.shape) > 0.2 + 0.1 * norm
        ternary[name] = (w_q * keep.astype(np.int8), scale)
    return ternary, floats


@pytest.mark.parametrize("layout", I2S_LAYOUTS)
def test_layout_is_found_from_trained_structure(tmp_path, layout):
    config = config_of(hidden=512, inter=512)
    ternary, floats = structured_model(config)
    path = tmp_path / "a.gguf"
    convert(write_hf(tmp_path / "hf", config, ternary, floats), path, "gguf-i2_s", i2s_layout=layout)
    without_layout_key(path)
    checkpoint = open_checkpoint(path)
    assert f"layout {layout}, likely: agreement of columns" in checkpoint.notes[0]
    assert_same(checkpoint, ternary, floats)
    assert any(f"I2_S layout: {layout} (likely)" in detail for detail in detect(path).details)


def test_layout_of_a_random_model_cannot_be_told(tmp_path, bitnet):
    source, _, ternary, floats = bitnet
    path = tmp_path / "a.gguf"
    convert(source, path, "gguf-i2_s", i2s_layout="arm-64")
    without_layout_key(path)
    with pytest.raises(FormatError, match=r"say which of x86-128, arm-64, interleaved-4 it is \(--layout\)"):
        open_checkpoint(path)
    assert any("cannot tell" in detail for detail in detect(path).details)
    assert_same(open_checkpoint(path, layout="arm-64"), ternary, floats)
    wrong = open_checkpoint(path, layout="x86-128")["model.layers.0.mlp.up_proj.weight"]
    assert not np.array_equal(wrong.w_q, ternary["model.layers.0.mlp.up_proj.weight"][0])


def test_layout_that_alone_fits_is_certain(tmp_path):
    config = config_of(hidden=64, inter=65, heads=1, kv=1, layers=1)
    ternary, floats = model_of(config)  # 65 x 64 weights are whole blocks of 64 and no others
    path = tmp_path / "a.gguf"
    source = write_hf(tmp_path / "hf", config, ternary, floats)
    with pytest.raises(ValueError, match="multiple of 64 columns"):  # of ffn_down, which bitnet.cpp would get wrong
        convert(source, path, "gguf-i2_s", i2s_layout="arm-64")
    for name in [name for name in ternary if "down" in name]:
        del ternary[name]
    save_file({n: w * s for n, (w, s) in ternary.items()} | floats, source / "model.safetensors")
    convert(source, path, "gguf-i2_s", i2s_layout="arm-64")
    without_layout_key(path)
    checkpoint = open_checkpoint(path)
    assert "arm-64, certain: the matrices fit no other layout" in checkpoint.notes[0]
    assert_same(checkpoint, ternary, floats)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "to", "sentence"),
    [
        ({"hidden": 128}, "gguf-tq1_0", "TQ1_0 needs a multiple of 256 columns"),
        ({"hidden": 128}, "gguf-tq2_0", "TQ2_0 needs a multiple of 256 columns"),
        ({"hidden": 192, "heads": 3, "kv": 3}, "gguf-i2_s", "I2_S x86-128 needs a multiple of 128 columns"),
        ({"inter": 130}, "hf-packed", "rows in fours"),
        ({"act": "gelu"}, "gguf-i2_s", "hidden_act relu2 or silu, the configuration has 'gelu'"),
        ({"sub_norms": False}, "gguf-i2_s", "hidden_act silu, the configuration has 'relu2'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "gguf-i2_s", "rotary scaling of type 'yarn'"),
        ({"rope_theta": None}, "gguf-i2_s", "one rope_theta"),
        ({"rms_norm_eps": None}, "gguf-i2_s", "rms_norm_eps"),
        ({"quantization_config": {"use_rms_norm": True}}, "gguf-i2_s", "use_rms_norm"),
    ],
)
def test_forms_that_cannot_hold_a_model(tmp_path, changes, to, sentence):
    config = config_of(**{"layers": 1, **changes})
    source = write_hf(tmp_path / "hf", config, *model_of(config))
    with pytest.raises(ValueError, match=sentence):
        convert(source, target_path(tmp_path, "out", to), to)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_options_are_checked(tmp_path, bitnet):
    source = bitnet[0]
    out = tmp_path / "out"
    for options, sentence in (
        ({"to": "gguf-q4_0"}, "to must be one of"),
        ({"to": "packed", "scheme": "i3"}, "scheme must be one of"),
        ({"to": "packed", "embedding": "q5"}, "embedding must be one of"),
        ({"to": "gguf-i2_s", "i2s_layout": "x86"}, "layout must be one of"),
        ({"to": "packed", "layout": "x86-128"}, "layout is for I2_S"),
        ({"to": "hf-packed", "embedding": "q6_k"}, "F32, F16 or BF16"),
        ({"to": "packed", "convention": "times"}, "multiply or divide"),
    ):
        with pytest.raises(ValueError, match=sentence):
            convert(source, out, **options)
    with pytest.raises(ValueError, match="place of the source"):
        convert(source, source / "a.safetensors", "packed")
    with pytest.raises(FileNotFoundError, match="must exist"):
        convert(source, tmp_path / "no" / "a", "packed")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("to", ["hf-packed", "packed", "gguf-i2_s"])
def test_nothing_is_overwritten_unasked(tmp_path, bitnet, to):
    source, _, ternary, floats = bitnet
    out = target_path(tmp_path, "out", to)
    convert(source, out, to)
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(source, out, to)
    convert(source, out, to, overwrite=True, embedding="f32")
    checkpoint = open_checkpoint(out)
    assert_same(checkpoint, ternary, floats)
    assert checkpoint["model.embed_tokens.weight"].type == "F32"


@pytest.mark.parametrize("to", ["hf-packed", "packed", "gguf-tq2_0"])
def test_interrupted_conversion_leaves_nothing(tmp_path, bitnet, to):
    def interrupt(done, total, name):
        assert total == 24 and name  # two layers of seven matrices and four norms, embedding, last norm
        if done == 9:
            assert len(list(tmp_path.iterdir())) == 2  # the source and the unfinished output
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(bitnet[0], target_path(tmp_path, "out", to), to, progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_interrupted_overwrite_keeps_the_old_file(tmp_path, bitnet):
    source = bitnet[0]
    out = tmp_path / "a.safetensors"
    convert(source, out, "packed")
    before = out.read_bytes()

    def interrupt(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, "packed", overwrite=True, progress=interrupt)
    assert out.read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="needs signals of POSIX")
def test_ctrl_c_on_the_command_line(tmp_path):
    """SIGINT in the middle of a write: one word, an exit code, nothing left behind, the old file untouched."""
    config = config_of(hidden=512, inter=1024, vocab=24_000)
    ternary, floats = model_of(config)
    source = write_hf(tmp_path / "hf", config, ternary, floats)
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"old")
    command = [
        sys.executable,
        "-m",
        "bitnet_ref.cli",
        "convert",
        str(source),
        str(out),
        "--to",
        "packed",
        "--overwrite",
    ]
    command += ["--embedding", "q6_k"]  # takes a second to encode

    def heed_interrupts():
        """What a shell without job control starts in the background ignores SIGINT, and so does all that it starts."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ, preexec_fn=heed_interrupts, **pipes) as program:
        while not any(p.name.endswith(".partial") and p.stat().st_size > 1 << 20 for p in tmp_path.iterdir()):
            assert program.poll() is None, program.communicate()
            time.sleep(0.01)
        program.send_signal(signal.SIGINT)
        said = "".join(program.communicate(timeout=60))
    assert program.returncode == 1 and said.strip() == "Aborted!"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "hf"] and out.read_bytes() == b"old"


def test_source_is_not_changed(tmp_path, bitnet):
    source = bitnet[0]
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    for to in ROUTES:
        convert(source, target_path(tmp_path, to, to), to)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", "[1]", "JSON object"),
        ("config.json", '{"a": 1, "a": 2}', "unique"),
        ("config.json", '{"a": NaN}', "finite"),
        ("config.json", "[" * 100_000, "valid JSON"),
        ("config.json", '{"quantization_config": 3}', "must be an object"),
        ("config.json", '{"quantization_config": {"quant_method": "gptq"}}', "quant_method must be bitnet"),
        ("config.json", '{"quantization_config": {"quant_method": "bitnet", "linear_class": "x"}}', "linear_class"),
        ("config.json", '{"quantization_config": {"quant_method": "bitnet", "quantization_mode": 1}}', "offline or"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../secret.safetensors"}}', "of this folder"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/x.safetensors"}}', "of this folder"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}', "must exist"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "model.safetensors"}}', "weight_map must name"),
        ("model.safetensors.index.json", '{"weight_map": []}', "object of file names"),
        ("model.safetensors", "not one", "neither"),
    ],
)
def test_bad_folders(tmp_path, bitnet, file, content, sentence):
    (bitnet[0] / file).write_text(content)
    with pytest.raises(FormatError, match=sentence):
        open_checkpoint(bitnet[0])


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"got none \(pickled"):
        open_checkpoint(tmp_path)
    with pytest.raises(FormatError, match=r"config\.json must be a regular file"):
        open_checkpoint(tmp_path / "..")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale"), "needs a tensor model.layers.0.mlp.up_proj"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": np.zeros(1, np.float32)}), "above 0"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": np.ones(2, np.float32)}), "one float"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight"].fill(255), "code 3"),
        (lambda t: t.update({"model.norm.weight": np.ones(256, np.int8)}), "float type, got I8"),
    ],
)
def test_bad_packed_weights(tmp_path, damage, sentence):
    config = config_of(layers=1)
    source = write_hf(tmp_path / "hf", config, *model_of(config), dequantised=False)
    tensors = load_file(source / "model.safetensors")
    damage(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(FormatError, match=sentence):
        list(open_checkpoint(source).tensors())


@pytest.mark.parametrize("to", ["packed", "gguf-tq1_0", "gguf-tq2_0", "gguf-i2_s"])
def test_damaged_files_give_one_error_or_none(tmp_path, to):
    """Truncation at every part of the header and random byte changes: a FormatError, or a file that still reads."""
    config = config_of(hidden=256, inter=256, layers=1, vocab=8)
    path = target_path(tmp_path, "a", to)
    convert(write_hf(tmp_path / "hf", config, *model_of(config)), path, to)
    whole = path.read_bytes()
    header = min(tensor.offset for tensor in open_tensor_file(path).tensors)
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(150):
        data = bytearray(whole)
        if i < 30:
            data = data[: int(len(data) * i / 30)]
        else:
            for at in rng.integers(0, header if i < 130 else len(data), rng.integers(1, 4)):
                data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            for tensor in open_checkpoint(path, layout="x86-128" if to == "gguf-i2_s" else None).tensors():
                if isinstance(tensor, TernaryTensor):
                    assert tensor.w_q.max() <= 1
                else:
                    tensor.to_float32()
        except FormatError:
            refused += 1
    assert refused >= 60


def test_exact_scale_that_disagrees_is_refused(tmp_path):
    config = config_of(sub_norms=False, act="silu", layers=1)
    path = tmp_path / "a.gguf"
    convert(write_hf(tmp_path / "hf", config, *model_of(config)), path, "gguf-tq2_0")
    scales = read_gguf_metadata(path)["bitnet_ref.scales"]
    data = path.read_bytes()
    assert data.count(scales.tobytes()) == 1
    path.write_bytes(data.replace(scales.tobytes(), (2 * scales).tobytes()))
    with pytest.raises(FormatError, match="must round to the scale of its blocks"):
        list(open_checkpoint(path).tensors())


def test_gguf_that_means_something_else(tmp_path, bitnet):
    path = tmp_path / "a.gguf"
    convert(bitnet[0], path, "gguf-tq2_0")
    whole = path.read_bytes()
    for old, new, sentence in (
        (b"\x06\x00\x00\x00\x00\x00\x00\x00bitnet", b"\x06\x00\x00\x00\x00\x00\x00\x00gemma3", "architecture must be"),
        (b"relu2", b"gelu2", "hidden_activation must be relu2 or silu, got 'gelu2'"),
        (b"bitnet.block_count", b"bitnet.blurk_count", "must give bitnet.block_count"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_z.weight", "of no layer known"),
        (b"token_embd.weight", b"token_embx.weight", "must have a tensor token_embd.weight"),
    ):
        assert whole.count(old) >= 1
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(FormatError, match=sentence):
            open_checkpoint(path)


# Memory --------------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from bitnet_ref.formats import convert
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
convert(sys.argv[1], sys.argv[2], sys.argv[3], embedding=sys.argv[4] or None)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(("to", "embedding"), [("packed", "q6_k"), ("gguf-tq2_0", "f32"), ("hf-packed", "")])
def test_conversion_streams(tmp_path, to, embedding):
    """A file of 330 MB of float32 weights in the memory of a few matrices."""
    config = config_of(hidden=512, inter=1024, heads=8, kv=8, layers=12, vocab=60_000)
    rng = np.random.default_rng(0)
    w_q = rng.integers(-1, 2, (1024, 1024), dtype=np.int8)
    ternary = {n: (w_q[: s[0], : s[1]].copy(), np.float32(0.5)) for n, s in linear_shapes(config).items()}
    _, floats = model_of(config | {"vocab_size": 1, "intermediate_size": 1024})
    floats["model.embed_tokens.weight"] = np.broadcast_to(rng.standard_normal(512, np.float32), (60_000, 512)).copy()
    source = write_hf(tmp_path / "hf", config, ternary, floats)
    size_kib = (source / "model.safetensors").stat().st_size >> 10
    assert size_kib > 220 * 1024
    command = [sys.executable, "-c", PEAK, str(source), str(target_path(tmp_path, "out", to)), to, embedding]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    # 16 MiB of float32 at a time, a dozen temporaries of that size in the Q6_K encoder, and mapped pages of a piece.
    assert int(done.stdout) < (150 << 10), f"{int(done.stdout)} KiB for a file of {size_kib} KiB"
