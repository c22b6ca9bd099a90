"""Students of [BitDistill] made from models of transformers: SubLN, ternary layers, and the folder that they leave."""

import copy
import json
import warnings

import numpy as np
import pytest

from bitnet_ref.runtime.load import load

torch = pytest.importorskip("torch", reason="training needs the extra [distill]: no torch here")
transformers = pytest.importorskip("transformers", reason="training needs the extra [distill]: no transformers here")

from bitnet_ref import distill  # noqa: E402
from bitnet_ref.distill import student, weights  # noqa: E402  (they import torch)
from bitnet_ref.distill.bitlinear import BitLinear, quantize_weights  # noqa: E402

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KINDS = {"Llama": "LlamaConfig", "Qwen2": "Qwen2Config", "Qwen3": "Qwen3Config", "Gemma3": "Gemma3TextConfig"}
TOKENS = np.random.default_rng(0).integers(0, 101, 20)


def build(kind, **keys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 calls a function that it has deprecated itself
        config = getattr(transformers, KINDS[kind])(**(SIZES | keys))
        torch.manual_seed(1)
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()


def difference(a, b):
    return np.abs(a - b).max() / np.ptp(b)


@pytest.mark.parametrize("kind", KINDS)
def test_subln_can_begin_with_the_size_of_its_input(kind):
    """What leaves the norm is then, at the median token, as large as what came in; padding is not looked at."""
    model = build(kind)
    for block in model.model.layers:  # sizes far from 1, each its own
        block.mlp.up_proj.weight.data *= 37.0
    ids, mask = torch.from_numpy(TOKENS)[None], torch.ones(1, 20, dtype=torch.int64)
    sizes = student.input_sizes(model, ids, mask)
    names = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.o_proj", "mlp.down_proj")]
    assert sorted(sizes) == sorted(names) and len(set(sizes.values())) == 6
    padded = torch.cat([ids, ids.new_full((1, 30), 7)], 1), torch.cat([mask, mask.new_zeros(1, 30)], 1)
    assert student.input_sizes(model, *padded) == pytest.approx(sizes, rel=1e-5)
    student.insert_subln(model, gains=sizes)
    seen = {}
    for name in names:
        norm = model.get_submodule(name).norm
        norm.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.square().mean(-1).sqrt().median()}))
    logits(model)
    first = {n: v for n, v in seen.items() if n == names[0]}  # what comes later gets other inputs than in the base
    assert float(first[names[0]]) == pytest.approx(sizes[names[0]], rel=1e-3)
    gains = {n: model.get_submodule(n).norm for n in names}
    offset = float(kind == "Gemma3")
    assert {n: norm.weight[0].item() + offset for n, norm in gains.items()} == pytest.approx(sizes, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_runs_as_the_model_does(kind, tmp_path):
    """SubLN gains and biases are drawn, so a norm in the wrong place, an offset too many or a lost bias shows."""
    model = build(kind)
    assert len(student.insert_subln(model)) == 6 and len(student.ternarise(model)) == 21
    assert sum(isinstance(m, BitLinear) for m in model.modules()) == 21
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm." in name or name.endswith("bias"):
                parameter.add_(torch.rand_like(parameter))
    student.save_student(model, tmp_path / "s", ternary=True)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["config.json", "model.safetensors"]
    for scheme in ("i2", "base3"):
        ours = load(tmp_path / "s", scheme=scheme, head="f32", n_threads=1, quantize=True)
        got, expected = ours.logits(TOKENS), logits(model)
        # Float rounding is 1e-6; one int8 activation at a tie may move a small network by some 1e-3 (docs/model.md).
        assert difference(got, expected) < 1e-2
        assert np.median(np.abs(got - expected)) / np.ptp(expected) < 1e-3
        np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))


def test_a_full_precision_folder_says_so(tmp_path):
    model = build("Llama")
    student.save_student(model, tmp_path, ternary=False)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    got = load(tmp_path, head="f32", n_threads=1).logits(TOKENS)
    assert difference(got, logits(model)) < 1e-5
    with pytest.raises(ValueError, match="must say what all linear layers"):
        student.save_student(model, tmp_path, ternary=True)


def test_a_norm_of_unit_gain_changes_the_network_by_the_size_of_each_input():
    """Multiplying the gain by the root mean square of one token's input gives the network back for that token."""
    model = build("Llama")
    before = logits(model)
    student.insert_subln(model)
    assert difference(logits(model), before) > 1e-2
    layer = model.model.layers[1].mlp.down_proj
    x = torch.randn(1, 80, generator=torch.Generator().manual_seed(2)) * 7
    with torch.no_grad():
        rms = x.square().mean().sqrt()
        torch.testing.assert_close(layer(x) * rms, layer.linear(x), rtol=1e-4, atol=1e-5)


def test_before_a_ternary_layer_unit_gain_changes_the_scale_only():
    """int8 activations are relative to the token's largest, so the integers behind the norm are the same."""
    from bitnet_ref.distill.bitlinear import quantize_activations

    model = build("Qwen3")
    student.insert_subln(model)
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        normed = model.model.layers[0].self_attn.o_proj.norm(x)
    q, q_normed = quantize_activations(x)[0], quantize_activations(normed)[0]
    assert (q != q_normed).float().mean() < 0.01 and (q - q_normed).abs().max() <= 1


def test_every_linear_is_a_named_option_without_a_checkpoint_form(tmp_path):
    model = build("Qwen3")
    assert len(student.insert_subln(model, "every-linear")) == 21
    student.ternarise(model)
    with pytest.raises(ValueError, match=r"SubLN before o_proj and down_proj only, got .*q_proj\.norm"):
        student.save_student(model, tmp_path, ternary=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantizer", ["b1", "absmean-block"])
def test_other_quantisers_train_but_have_no_checkpoint_form(quantizer, tmp_path):
    model = build("Llama")
    with pytest.raises(ValueError, match="block must be a positive divisor of K, got block 7 and K = 48"):
        student.ternarise(copy.deepcopy(model), "absmean-block", 7)
    before = logits(model)
    student.ternarise(model, quantizer, 16)
    assert difference(logits(model), before) > 1e-2
    with pytest.raises(ValueError, match=f"ternary by absmean, one scale a matrix, got .*{quantizer}"):
        student.save_student(model, tmp_path, ternary=True)
    assert not list(tmp_path.iterdir())


def test_a_copy_is_another_student():
    model = build("Llama")
    student.insert_subln(model)
    student.ternarise(model)
    expected, other = logits(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5)
    np.testing.assert_array_equal(logits(model), expected)
    other.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(logits(other), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_queries_keys_and_values_make_the_attention(kind):
    """Attention computed from what was captured after RoPE is what o_proj was given."""
    model, seen = build(kind), []
    attention = model.model.layers[-1].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with student.capture_qkv(model, -1, after_rope=True) as kept:
        logits(model)
    q, k, v = (a.unflatten(2, (-1, 12)).transpose(1, 2) for a in kept)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    got = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling)
    torch.testing.assert_close(got.transpose(1, 2).flatten(2), seen[0], rtol=1e-5, atol=1e-6)
    turned = kept.q
    with student.capture_qkv(model, -1) as kept:
        logits(model)
    # Position 0 is not turned; every later one is, and keeps its length.
    torch.testing.assert_close(kept.q[:, 0], turned[:, 0])
    assert not torch.allclose(kept.q[:, 1:], turned[:, 1:])
    torch.testing.assert_close(kept.q.norm(dim=-1), turned.norm(dim=-1))
    assert not attention.v_proj._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_captured_hidden_states_are_the_residual_stream_behind_each_block(kind):
    """Those of ``transformers``, which starts with the embedding and has the last one behind the final norm."""
    model = build(kind)
    tokens = torch.from_numpy(TOKENS)[None]
    model.model(input_ids=tokens, output_hidden_states=True)  # adds hooks that stay
    before = [len(block._forward_hooks) for block in model.model.layers]
    with student.capture_hidden(model) as kept, torch.no_grad():
        expected = model.model(input_ids=tokens, output_hidden_states=True).hidden_states
        assert len(kept) == len(expected) - 1
        for mine, theirs in zip(kept[:-1], expected[1:-1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        torch.testing.assert_close(model.model.norm(kept[-1]), expected[-1], rtol=0, atol=0)
    assert [len(block._forward_hooks) for block in model.model.layers] == before


def test_what_cannot_be_a_student_is_refused():
    with pytest.raises(ValueError, match=r"made of LlamaForCausalLM, Qwen2ForCausalLM, .*, got Linear"):
        student.ternarise(torch.nn.Linear(2, 2))
    model = build("Llama", attention_bias=True)
    with pytest.raises(ValueError, match=r"no bias in this family, model\.layers\.0\.self_attn\.q_proj has one"):
        student.ternarise(model)
    with pytest.raises(ValueError, match="one of output-projections, every-linear, got 'all'"):
        student.insert_subln(model, "all")
    student.insert_subln(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj must not have a norm"):
        student.insert_subln(model)
    with pytest.raises(ValueError, match="3 layers, got layer 3"), student.capture_qkv(model, 3):
        pass


# What training does to weights.


def test_weights_are_counted_in_units_of_what_they_are_rounded_with():
    model = build("Llama")
    student.ternarise(model)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, BitLinear)):
            layer.weight.copy_(torch.linspace(-1, 1, layer.weight.numel()).reshape(layer.weight.shape))
            layer.weight[0, 0] = -50.0
    counts = weights.histogram(model)
    assert sum(counts) == sum(m.weight.numel() for m in model.modules() if isinstance(m, BitLinear))
    assert counts[0] == 21 and counts[-1] == 0  # what lies outside is in the first bin: one of each layer
    before = weights.WeightsBefore(model)
    layer = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.weight[1:].neg_()
    found = before.compare(model)
    assert found["before"] == counts and found["layers"][13] == "model.layers.1.mlp.down_proj"
    kept = (quantize_weights(layer.weight)[0][1:] == 0).sum() + layer.weight.shape[1]
    assert found["changed"][13] == pytest.approx(1 - float(kept) / layer.weight.numel(), abs=1e-6)
    assert found["changed"][:13] + found["changed"][14:] == [0.0] * 20
    assert found["zeros"] == found["zeros_before"]


def test_weights_of_blocks_of_columns_and_of_one_bit():
    model = build("Llama", hidden_size=32, intermediate_size=32, head_dim=8)
    student.ternarise(model, "absmean-block", 16)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, BitLinear)):
            layer.weight[:, :16] *= 100  # of the matrix's mean all others would be zeros
    counts, found = np.array(weights.histogram(model)), weights.ternary_weights(model)
    zeros = sum(int((w_q == 0).sum()) for w_q in found.values()) / counts.sum()
    assert counts[25:35].sum() / counts.sum() == pytest.approx(zeros, abs=1e-3) and 0.2 < zeros < 0.4
    model = build("Llama")
    student.ternarise(model, "b1")
    assert weights.ternary_weights(model) == {} and weights.WeightsBefore(model).compare(model)["layers"] == []


def test_pieces_come_from_their_modules():
    assert distill.BitLinear is BitLinear and distill.insert_subln is student.insert_subln
    assert distill.weights is weights
    for name in distill.__all__:
        assert getattr(distill, name).__module__.startswith("bitnet_ref.distill"), name
