"""The reference decoder: its parts against formulas written otherwise, the whole against itself, and configs.

The network as such is checked against transformers in test_parity_transformers.py.
"""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bitnet_ref as br
from bitnet_ref.reference import config as configs
from bitnet_ref.reference.attention import KVCache, attention
from bitnet_ref.reference.config import PRESETS, Llama3Scaling, ModelConfig, canonical_name
from bitnet_ref.reference.mlp import activate
from bitnet_ref.reference.model import (
    BLOCK_STEPS,
    forward,
    generate_greedy,
    linear,
    pack_weights,
    random_weights,
    ternary_weights,
)
from bitnet_ref.reference.norm import rms_norm
from bitnet_ref.reference.rope import frequencies, rotate, rotations

SMALL = ModelConfig(
    architecture="BitNetForCausalLM",
    hidden=44,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=10,
    ffn=70,
    vocabulary=101,
    context=64,
    norm_eps=1e-5,
    activation="relu2",
    rope_theta=5e5,
    tied_head=False,
    sub_norm=True,
)
EVERYTHING = dataclasses.replace(
    SMALL,
    activation="gelu_tanh",
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    embedding_scale=math.sqrt(44),
    attention_scale=0.3,
    rope_scaling=4.0,
    sliding_layers=(0,),
    sliding_window=3,
    sliding_rope_theta=1e4,
)
TOKENS = np.random.default_rng(5).integers(0, 101, 11)


def weights_of(config, seed=0):
    weights = random_weights(config, seed)
    return ternary_weights(config, weights) if config.ternary else weights


# Parts


def test_norm():
    x = np.array([[3.0, -4.0, 0.0, 0.0]], np.float32)  # mean square 6.25
    weight = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-12), [[3 / 2.5, -8 / 2.5, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(rms_norm(x, weight - 1, 1e-12, offset=1.0), rms_norm(x, weight, 1e-12), rtol=1e-6)
    # The epsilon stands under the root, with the mean square: sqrt(6.25 + 2.75) = 3.
    np.testing.assert_allclose(rms_norm(x, weight, 2.75), [[1, -8 / 3, 0, 0]], rtol=1e-6)
    assert rms_norm(np.zeros((1, 4), np.float32), weight, 1e-5).tolist() == [[0, 0, 0, 0]]
    with pytest.raises(ValueError, match="4 values needs a weight of that length, got shape"):
        rms_norm(x, weight[:3], 1e-5)


def test_rotation_turns_halves_and_depends_on_distance_only():
    speeds = frequencies(8, 100.0)
    np.testing.assert_allclose(speeds, [1, 100**-0.25, 0.1, 100**-0.75], rtol=2e-7)
    unit = np.zeros((1, 1, 8), np.float32)
    unit[..., 1] = 1  # pairs with 1 + 4
    angle = 3 * 100**-0.25
    turned = rotate(unit, *rotations(np.array([3]), speeds))[0, 0]
    np.testing.assert_allclose(turned, [0, math.cos(angle), 0, 0, 0, math.sin(angle), 0, 0], atol=1e-6)

    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 8), np.float32)
    at = [
        np.sum(rotate(q, *rotations(np.array([p]), speeds)) * rotate(k, *rotations(np.array([p - 7]), speeds)))
        for p in (7, 20, 50)
    ]
    np.testing.assert_allclose(at, at[0], rtol=1e-4)  # angles of 50 radians are rounded to 2e-6


def test_rope_scaling():
    plain = frequencies(128, 5e5)
    np.testing.assert_array_equal(frequencies(128, 5e5, 4.0), plain / np.float32(4))
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    scaled = frequencies(128, 5e5, scaling)
    wavelength = 2 * np.pi / plain.astype(np.float64)
    np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_array_equal(scaled[wavelength > 8192], plain[wavelength > 8192] / np.float32(8))
    between = (wavelength > 2048) & (wavelength < 8192)
    assert between.sum() > 3
    keep = (8192 / wavelength[between] - 1) / 3
    np.testing.assert_allclose(scaled[between], plain[between] * (keep + (1 - keep) / 8), rtol=1e-5)


@given(t=st.integers(1, 5), past=st.integers(0, 6), groups=st.integers(1, 3), window=st.none() | st.integers(1, 9))
def test_attention_against_loops(t, past, groups, window):
    kv, d = 2, 4
    s = past + t
    rng = np.random.default_rng([t, past, groups])
    q = rng.standard_normal((t, kv * groups, d), np.float32)
    k, v = rng.standard_normal((2, s, kv, d), np.float32)
    got = attention(q, k, v, 0.5, window)
    for i in range(t):
        first = 0 if window is None else max(0, past + i - window + 1)
        seen = slice(first, past + i + 1)
        for head in range(kv * groups):
            score = [0.5 * float(np.dot(q[i, head], row)) for row in k[seen, head // groups]]
            weight = np.exp(np.array(score) - max(score))
            expected = (weight / weight.sum()) @ v[seen, head // groups]
            np.testing.assert_allclose(got[i, head], expected, rtol=1e-5, atol=1e-6)


def test_activations():
    x = np.array([-1000, -2, -0.5, 0, 0.5, 3, 300], np.float32)
    np.testing.assert_array_equal(activate(x, "relu2"), [0, 0, 0, 0, 0.25, 9, 90000])
    silu = [float(a) / (1 + math.exp(-float(a))) if a > -700 else 0 for a in x]
    np.testing.assert_allclose(activate(x, "silu"), silu, rtol=1e-6)
    # The erf form of GELU, which the tanh form approximates within 5e-4
    gelu = [0.5 * float(a) * (1 + math.erf(float(a) / math.sqrt(2))) for a in x]
    np.testing.assert_allclose(activate(x, "gelu_tanh"), gelu, atol=1e-3)
    assert not np.allclose(activate(x, "gelu_tanh"), gelu, atol=1e-6)
    with pytest.raises(ValueError, match="activation must be relu2, silu or gelu_tanh, got 'gelu'"):
        activate(x, "gelu")


# The network


@pytest.mark.parametrize("config", (SMALL, EVERYTHING), ids=("bitnet", "everything"))
@given(data=st.data())
def test_cache_and_chunks_change_nothing(config, data):
    """Any way of cutting the tokens gives the same values as all at once."""
    cuts = sorted(data.draw(st.sets(st.integers(1, len(TOKENS) - 1))))
    weights = weights_of(config)
    whole = {}
    logits = forward(config, weights, TOKENS, trace=whole.__setitem__)
    cache = KVCache(config, len(TOKENS))
    parts, ends = [], []
    for chunk in np.split(TOKENS, cuts):
        trace = {}
        parts.append(forward(config, weights, chunk, cache, trace=trace.__setitem__))
        ends.append(trace["final_norm"])
    assert cache.length == len(TOKENS)
    np.testing.assert_array_equal(np.concatenate(ends), whole["final_norm"])
    # The head is a float32 product of BLAS, whose order of summation depends on the number of tokens.
    np.testing.assert_allclose(np.concatenate(parts), logits, atol=1e-6 * np.ptp(logits))


def test_earlier_tokens_do_not_see_later_ones():
    weights = weights_of(SMALL)
    changed = TOKENS.copy()
    changed[6:] = (changed[6:] + 1) % SMALL.vocabulary
    one, other = (forward(SMALL, weights, tokens) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(one[:6], other[:6])
    assert (one[6:] != other[6:]).any(axis=1).all()


@pytest.mark.parametrize("scheme", br.schemes())
def test_packings_give_the_same_logits_to_the_last_bit(scheme):
    weights = weights_of(EVERYTHING)
    packed = pack_weights(weights, scheme)
    assert isinstance(packed["model.layers.0.mlp.up_proj.weight"][0], br.PackedTernary)
    np.testing.assert_array_equal(forward(EVERYTHING, packed, TOKENS), forward(EVERYTHING, weights, TOKENS))


@pytest.mark.parametrize("name", br.kernels.compiled(), ids=str)
def test_kernels_give_the_same_logits_to_the_last_bit(name, runnable):
    """Every scheme on every instruction set, prefill by the gemm kernels and decoding by the gemv kernels."""
    runnable(name)
    weights = weights_of(SMALL)
    layers = {n: br.BitLinear(*w) if isinstance(w, tuple) else w for n, w in pack_weights(weights, name.scheme).items()}
    ran = []

    def run(x, layer):
        ran.append(layer)
        return layer(x, kernel=name)

    caches = KVCache(SMALL), KVCache(SMALL)
    for chunk in [TOKENS] if name.op == "gemm" else np.split(TOKENS[:4], 4):
        expected = forward(SMALL, weights, chunk, caches[0])
        np.testing.assert_array_equal(forward(SMALL, layers, chunk, caches[1], linear=run), expected)
    assert len(ran) == 7 * SMALL.layers * (1 if name.op == "gemm" else 4)


@pytest.mark.parametrize(
    "change",
    (
        {"activation": "silu"},
        {"sub_norm": False},
        {"qk_norm": True},
        {"norm_eps": 1e-2},
        {"norm_offset": 1.0},
        {"embedding_scale": 2.0},
        {"attention_scale": 0.1},
        {"rope_theta": 1e4},
        {"rope_scaling": 2.0},
        {"sliding_layers": (1,), "sliding_window": 2},
        {"sliding_layers": (0, 1), "sliding_window": 64, "sliding_rope_theta": 10.0},
        {"tied_head": True},
        {"post_norms": True},
    ),
    ids=lambda change: next(iter(change)),
)
def test_every_switch_changes_the_logits(change):
    """None of them is read and then forgotten."""
    # One set of tensors for both: those that a switch does not need are left unused.
    weights = weights_of(dataclasses.replace(SMALL, qk_norm=True, post_norms=True))
    base = forward(SMALL, weights, TOKENS)
    error = np.abs(forward(dataclasses.replace(SMALL, **change), weights, TOKENS) - base).max() / np.ptp(base)
    assert error > 1e-3


@pytest.mark.parametrize("config", (SMALL, EVERYTHING), ids=("bitnet", "everything"))
def test_against_a_decoder_written_token_by_token(config):
    """In float64, without a cache array, a mask or matrices of tokens; full precision, so that nothing is rounded."""
    config = dataclasses.replace(config, ternary=False)
    weights = random_weights(config, 1)
    wide = {name: w.astype(np.float64) for name, w in weights.items()}
    half = config.head_dim // 2

    def norm(x, name):
        return x / np.sqrt(np.mean(x * x) + config.norm_eps) * (wide[f"{name}.weight"] + config.norm_offset)

    def turn(head, position, layer):
        local = layer in config.sliding_layers and config.sliding_rope_theta
        base, slower = (config.sliding_rope_theta, 1) if local else (config.rope_theta, config.rope_scaling or 1)
        pairs = head[:half] + 1j * head[half:]
        pairs = pairs * np.exp(1j * position / slower / base ** (np.arange(half) / half))
        return np.concatenate((pairs.real, pairs.imag))

    seen = [[] for _ in range(config.layers)]  # of every layer: (keys, values) of every token
    logits = []
    for position, token in enumerate(TOKENS):
        x = wide["model.embed_tokens.weight"][token] * config.embedding_scale
        for i in range(config.layers):
            at = f"model.layers.{i}"
            a = norm(x, f"{at}.input_layernorm")
            q, k, v = (
                (wide[f"{at}.self_attn.{n}_proj.weight"] @ a).reshape(-1, config.head_dim) for n in ("q", "k", "v")
            )
            if config.qk_norm:
                q = [norm(head, f"{at}.self_attn.q_norm") for head in q]
                k = [norm(head, f"{at}.self_attn.k_norm") for head in k]
            seen[i].append(([turn(head, position, i) for head in k], v))
            window = config.sliding_window if i in config.sliding_layers else len(TOKENS)
            heads = []
            for h, head in enumerate(q):
                group = h // (config.heads // config.kv_heads)
                score = [turn(head, position, i) @ keys[group] for keys, _ in seen[i][-window:]]
                share = np.exp(np.array(score) * (config.attention_scale or config.head_dim**-0.5))
                heads.append(sum(s * values[group] for s, (_, values) in zip(share, seen[i][-window:], strict=True)))
                heads[-1] = heads[-1] / share.sum()
            a = norm(np.concatenate(heads), f"{at}.self_attn.attn_sub_norm")
            a = wide[f"{at}.self_attn.o_proj.weight"] @ a
            if config.post_norms:
                x = x + norm(a, f"{at}.post_attention_layernorm")
                a = norm(x, f"{at}.pre_feedforward_layernorm")
            else:
                x = x + a
                a = norm(x, f"{at}.post_attention_layernorm")
            gate, up = (wide[f"{at}.mlp.{n}_proj.weight"] @ a for n in ("gate", "up"))
            if config.activation == "relu2":
                gate = np.where(gate > 0, gate * gate, 0)
            else:
                gate = gate / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
            a = wide[f"{at}.mlp.down_proj.weight"] @ norm(gate * up, f"{at}.mlp.ffn_sub_norm")
            x = x + (norm(a, f"{at}.post_feedforward_layernorm") if config.post_norms else a)
        logits.append(wide["lm_head.weight"] @ norm(x, "model.norm"))
    got = forward(config, weights, TOKENS)
    np.testing.assert_allclose(got, logits, atol=2e-6 * np.ptp(logits))  # float32 steps through two blocks: 3e-7


def test_window_as_wide_as_the_context_is_no_window():
    weights = weights_of(SMALL)
    wide = dataclasses.replace(SMALL, sliding_layers=(0, 1), sliding_window=SMALL.context)
    np.testing.assert_array_equal(forward(wide, weights, TOKENS), forward(SMALL, weights, TOKENS))


def test_full_precision_network():
    """The twin: the same network on float matrices, close to its ternary version only as far as that goes."""
    twin = dataclasses.replace(SMALL, ternary=False)
    weights = random_weights(twin, 0)
    rounded = {n: w[1] * w[0].astype(np.float32) if isinstance(w, tuple) else w for n, w in weights_of(SMALL).items()}
    ternary = forward(SMALL, weights_of(SMALL), TOKENS)
    fake = forward(twin, rounded, TOKENS)  # ternary values, float activations: only the int8 rounding differs
    span = np.ptp(ternary)
    assert 1e-4 < np.abs(fake - ternary).max() / span < 0.1
    assert np.abs(forward(twin, weights, TOKENS) - ternary).max() / span > 0.1


def test_trace_names_every_step_in_order():
    names = []
    weights = weights_of(EVERYTHING)
    logits = forward(EVERYTHING, weights, TOKENS, trace=lambda name, array: names.append((name, array.shape)))
    expected = [f"layers.{i}.{name}" for i in range(2) for name in BLOCK_STEPS]
    assert [name for name, _ in names] == ["embedding", *expected, "final_norm", "logits"]
    names.clear()
    forward(SMALL, weights_of(SMALL), TOKENS, trace=lambda name, array: names.append((name, array.shape)))
    switched_off = {"q_norm", "k_norm", "attn_post_norm", "ffn_post_norm"}
    block = [name for name in BLOCK_STEPS if name not in switched_off]
    assert [name for name, _ in names[1:-2]] == [f"layers.{i}.{name}" for i in range(2) for name in block]
    t = len(TOKENS)
    shapes = dict(names)
    assert shapes["layers.1.scores"] == shapes["layers.1.probabilities"] == (4, t, t)
    assert shapes["layers.0.q_rope"] == (t, 4, 10) and shapes["layers.0.k_rope"] == (t, 2, 10)
    assert shapes["layers.0.attention"] == (t, 40) and shapes["layers.0.gated"] == (t, 70)
    np.testing.assert_array_equal(forward(EVERYTHING, weights, TOKENS), logits)  # tracing changes nothing


def test_greedy_is_the_argmax_of_the_whole():
    weights = weights_of(SMALL)
    written = generate_greedy(SMALL, weights, TOKENS, 20)
    logits = forward(SMALL, weights, np.concatenate((TOKENS, written)))
    assert logits[len(TOKENS) - 1 : -1].argmax(axis=1).tolist() == written
    assert len(set(written)) > 3


def test_inputs_are_not_changed():
    weights = random_weights(SMALL, 0)
    before = {name: w.copy() for name, w in weights.items()}
    tokens = TOKENS.copy()
    forward(SMALL, ternary_weights(SMALL, weights), tokens)
    np.testing.assert_array_equal(tokens, TOKENS)
    for name, w in weights.items():
        np.testing.assert_array_equal(w, before[name])


def test_wrong_tokens_and_weights_are_refused():
    weights = weights_of(SMALL)
    for tokens, error, words in (
        ([], ValueError, "T >= 1"),
        ([[1]], ValueError, "shape"),
        ([0.5], TypeError, "integers, got float64"),
        ([101], ValueError, r"0\.\.100, got 101"),
        ([-1], ValueError, r"0\.\.100, got -1"),
        ([0] * 65, ValueError, "context of this model is 64 tokens, got 65"),
    ):
        with pytest.raises(error, match=words):
            forward(SMALL, weights, tokens)
    with pytest.raises(ValueError, match="must be ternary in this network, see ternary_weights"):
        forward(SMALL, random_weights(SMALL, 0), TOKENS)
    with pytest.raises(ValueError, match="the cache holds at most 4 tokens, got 11"):
        forward(SMALL, weights, TOKENS, KVCache(SMALL, 4))
    with pytest.raises(ValueError, match="capacity must lie between 1 and the context of 64"):
        KVCache(SMALL, 65)
    with pytest.raises(KeyError, match="up_proj"):
        forward(SMALL, {n: w for n, w in weights.items() if "up_proj" not in n}, TOKENS)
    with pytest.raises(ValueError, match="n_tokens must be at least 1"):
        generate_greedy(SMALL, weights, TOKENS, 0)
    with pytest.raises(ValueError, match="context of this model is 64 tokens, got 11 \\+ 60"):
        generate_greedy(SMALL, weights, TOKENS, 60)
    with pytest.raises(ValueError, match="full-precision network"):
        ternary_weights(dataclasses.replace(SMALL, ternary=False), weights)
    with pytest.raises(ValueError, match=r"q_proj.weight must have shape \(40, 44\)"):
        ternary_weights(SMALL, {**weights, "model.layers.0.self_attn.q_proj.weight": np.ones((3, 3), np.float32)})


def test_reference_linear_takes_three_forms():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 50), np.float32)
    w_q, w_scale = br.quantize_weights(rng.standard_normal((7, 50), np.float32))
    y = linear(x, (w_q, w_scale))
    np.testing.assert_array_equal(linear(x, (br.pack(w_q, "i2"), w_scale)), y)
    floats = linear(x, w_scale * w_q.astype(np.float32))
    assert 0 < np.abs(floats - y).max() < 0.05 * np.ptp(y)


# Configs

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 100,
    "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]},
}
GEMMA = {
    **{k: v for k, v in LLAMA.items() if k not in ("hidden_act", "quantization_config")},
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 32,
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 16,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "sliding_window": 128,
    "sliding_window_pattern": 3,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "cache_implementation": "hybrid",
}
QWEN = {
    **{k: v for k, v in LLAMA.items() if k != "quantization_config"},
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 24,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 2,
}
QWEN2 = {**QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None}
BIT_LLM = {**LLAMA, "architectures": ["BitnetForCausalLM"], "input_bits": 8, "weight_bits": 1}
del BIT_LLM["quantization_config"]
SUB_NORM_NAMES = ("model.layers.0.self_attn.attn_sub_norm.weight",)


def test_2b4t():
    """[2B4T] gives no sizes; these are of its config.json, and the counts are those of the released checkpoint."""
    config = PRESETS["microsoft/bitnet-b1.58-2B-4T"]
    assert (config.hidden, config.ffn, config.layers, config.heads, config.kv_heads) == (2560, 6912, 30, 20, 5)
    assert (config.activation, config.norm_eps, config.rope_theta, config.context) == ("relu2", 1e-5, 5e5, 4096)
    assert config.tied_head and config.sub_norm and config.ternary and not config.qk_norm
    shapes = config.tensor_shapes()
    assert len(shapes) == 332
    assert len(config.linear_shapes()) == 210 and len(config.norm_shapes()) == 121
    assert sum(math.prod(shape) for shape in config.linear_shapes().values()) == 2_084_044_800
    assert math.prod(shapes["model.embed_tokens.weight"]) == 328_335_360


def test_presets_by_architecture():
    large, three = PRESETS["1bitLLM/bitnet_b1_58-large"], PRESETS["1bitLLM/bitnet_b1_58-3B"]
    assert large.activation == three.activation == "silu" and large.sub_norm and large.ternary
    assert (large.head_dim, three.head_dim) == (96, 100)
    xl = PRESETS["1bitLLM/bitnet_b1_58-xl"]
    assert (
        (xl.head_dim, xl.ffn, xl.kv_heads) == (64, 5460, 32) and xl.activation == "silu" and xl.sub_norm and xl.ternary
    )
    weights = sum(math.prod(shape) for shape in xl.linear_shapes().values())
    assert 1.2e9 < weights < 1.25e9  # with its embedding of 65.5 million the 1.3B of [B158]
    falcon = PRESETS["tiiuae/Falcon3-1B-Instruct-1.58bit"]
    assert (falcon.head_dim, falcon.sub_norm, falcon.ternary, falcon.tied_head) == (256, False, True, False)
    assert not PRESETS["HF1BitLLM/Llama3-8B-1.58-100B-tokens"].sub_norm

    qwen = ModelConfig.from_hf(QWEN, SUB_NORM_NAMES, ternary=True)
    assert qwen.qk_norm and qwen.sub_norm and qwen.ternary and not qwen.sliding_layers
    assert qwen.norm_shapes()["model.layers.1.self_attn.attn_sub_norm.weight"] == (4 * 24,)

    qwen2 = ModelConfig.from_hf(QWEN2)
    assert qwen2.qkv_bias and not qwen2.qk_norm and qwen2.head_dim == qwen2.hidden // qwen2.heads
    assert set(qwen2.bias_shapes()) <= set(qwen2.tensor_shapes()) and len(qwen2.bias_shapes()) == 3 * qwen2.layers

    gemma = ModelConfig.from_hf(GEMMA)
    assert gemma.sliding_layers == (0, 1, 3, 4, 6) and gemma.window(2) is None and gemma.window(3) == 128
    assert gemma.tied_head and gemma.post_norms and gemma.norm_offset == 1 and not gemma.sub_norm
    assert (gemma.embedding_scale, gemma.attention_scale) == (8, 0.25)
    assert (gemma.rope_theta, gemma.sliding_rope_theta) == (1e6, 1e4)
    assert len(gemma.norm_shapes()) == 7 * 6 + 1
    newer = {
        k: v for k, v in GEMMA.items() if k not in ("rope_theta", "rope_local_base_freq", "sliding_window_pattern")
    }
    newer["layer_types"] = ["full_attention" if i in (2, 5) else "sliding_attention" for i in range(7)]
    newer["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert ModelConfig.from_hf(newer) == gemma


def test_what_may_be_absent():
    config = ModelConfig.from_hf({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
    assert (config.kv_heads, config.head_dim, config.tied_head, config.rope_scaling) == (4, 16, False, None)
    for key in LLAMA.keys() - {"num_key_value_heads", "quantization_config"}:
        with pytest.raises(ValueError, match=f"{key}"):
            ModelConfig.from_hf({k: v for k, v in LLAMA.items() if k != key})
    for key in (
        "sliding_window",
        "query_pre_attn_scalar",
        "head_dim",
        "rope_local_base_freq",
        "sliding_window_pattern",
    ):
        with pytest.raises(ValueError, match=key):
            ModelConfig.from_hf({k: v for k, v in GEMMA.items() if k != key})


def test_ternary_is_said_never_guessed():
    plain = {k: v for k, v in LLAMA.items() if k != "quantization_config"}
    assert ModelConfig.from_hf(LLAMA).ternary and ModelConfig.from_hf(BIT_LLM).ternary
    assert not ModelConfig.from_hf(plain).ternary and ModelConfig.from_hf(plain, ternary=True).ternary
    with pytest.raises(ValueError, match=r"ternary must be given: the checkpoint has SubLN"):
        ModelConfig.from_hf(plain, SUB_NORM_NAMES)
    with pytest.raises(ValueError, match="must not be False"):
        ModelConfig.from_hf(LLAMA, ternary=False)
    # As Falcon-E's makers write it with transformers 5: modules that are never ternary are listed as well.
    entry = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head", "model.norm", "model.embed_tokens"]}
    assert ModelConfig.from_hf(LLAMA | {"quantization_config": entry}) == ModelConfig.from_hf(LLAMA)


def test_rope_in_both_spellings():
    factors = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    llama3 = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    without = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    for entry, expected in (
        ({"rope_type": "llama3", **factors}, llama3),
        ({"type": "linear", "factor": 2.0}, 2.0),
        ({"rope_type": "default"}, None),
    ):
        assert ModelConfig.from_hf({**LLAMA, "rope_scaling": entry}).rope_scaling == expected
        newer = {**without, "rope_parameters": {"rope_theta": 10000.0, **entry}}
        assert ModelConfig.from_hf(newer) == ModelConfig.from_hf({**LLAMA, "rope_scaling": entry})


def test_what_transformers_keeps_of_a_gguf_file_has_no_effect():
    kept = {"_model_name_or_path": "Smollm2 135M 8k", "unk_token_id": 0}
    assert ModelConfig.from_hf(LLAMA | kept) == ModelConfig.from_hf(LLAMA)


@pytest.mark.parametrize(
    "base, change, words",
    (
        (LLAMA, {"architectures": ["MistralForCausalLM"]}, "architectures must name one of .*got 'MistralForCausalLM'"),
        (LLAMA, {"architectures": []}, "architectures must be a list of one name"),
        (LLAMA, {"model_type": "mistral"}, "model_type of LlamaForCausalLM must be one of llama, got 'mistral'"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act must be one of relu2, silu, gelu_pytorch_tanh, got 'gelu'"),
        (LLAMA, {"hidden_size": 64.0}, r"hidden_size must be an integer from 1 to 2\*\*31 - 1, got 64.0"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps must be a positive finite number, got 0"),
        (LLAMA, {"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive finite number, got nan"),
        (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive finite number, got '1e-5'"),
        (LLAMA, {"tie_word_embeddings": "true"}, "tie_word_embeddings must be true or false, got 'true'"),
        (LLAMA, {"num_attention_heads": 5}, "num_attention_heads must divide hidden_size = 64, got 5"),
        (LLAMA, {"num_key_value_heads": 3}, "heads must be a multiple of kv_heads = 3, got 4"),
        (LLAMA, {"head_dim": 15}, "head_dim must be even"),
        (LLAMA, {"attention_bias": True}, "attention_bias must be False, the only case implemented, got True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias must be False"),
        (LLAMA, {"parallel_attn": True}, "parallel_attn must be False"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved must be False"),
        (LLAMA, {"activation": "relu"}, "activation must be 'swiglu'"),
        (LLAMA, {"hidden_act": "relu2", "activation": "swiglu"}, "activation = 'swiglu' contradicts hidden_act"),
        (LLAMA, {"residual_multiplier": 0.22}, "the key 'residual_multiplier' = 0.22, which is not known here"),
        (LLAMA, {"use_qk_norm": False}, "the key 'use_qk_norm' = False, which is not known here"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type must be one of .*got 'yarn'"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type must be one of .*got 'dynamic'"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, r"type linear must have the keys \('factor',\)"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "type linear must have the keys"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": -1.0}}, "rope_scaling.factor must be a positive"),
        (LLAMA, {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "must have one type"),
        (LLAMA, {"rope_scaling": 2.0}, "rope_scaling must be an object, got 2.0"),
        (LLAMA, {"rope_scaling": {}, "rope_parameters": {}}, "must not have both rope_parameters and rope_scaling"),
        (LLAMA, {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta must be one number, got 10000.0 and 5.0"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quant_method 'bitnet'"),
        (
            LLAMA,
            {"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}},
            "use_rms_norm must be one of",
        ),
        (
            LLAMA,
            {"quantization_config": {"quant_method": "bitnet", "linear_class": "x"}},
            "linear_class must be one of",
        ),
        (
            LLAMA,
            {"quantization_config": {"quant_method": "bitnet", "bits": 4}},
            "quantization_config.bits is not known",
        ),
        (
            LLAMA,
            {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["q_proj"]}},
            "modules_to_not_convert must name none but lm_head, model.embed_tokens, model.norm",
        ),
        (BIT_LLM, {"weight_bits": 2}, "weight_bits must be 1"),
        (BIT_LLM, {"input_bits": 4}, "input_bits must be 8"),
        (LLAMA, {"input_bits": 8}, "the key 'input_bits' = 8, which is not known here"),
        (QWEN, {"use_sliding_window": True}, "use_sliding_window must be False"),
        (QWEN, {"layer_types": ["sliding_attention"] * 2}, "layer_types must be full_attention throughout"),
        (QWEN, {"head_dim": None}, "the config must have the key 'head_dim'"),
        (GEMMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping must be null"),
        (GEMMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be null"),
        (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention must be False"),
        (GEMMA, {"layer_types": ["full_attention"]}, "layer_types must have 7 entries"),
        (GEMMA, {"rope_parameters": {"full_attention": {}}}, "keys sliding_attention and full_attention"),
        (GEMMA, {"hidden_act": "silu"}, "the key 'hidden_act' = 'silu', which is not known here"),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) < 3 else "",
)
def test_refused_by_name(base, change, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_hf({**base, **change})


def test_config_must_be_a_mapping():
    with pytest.raises(TypeError, match="config must be a mapping"):
        ModelConfig.from_hf([1])


def test_published_configs_are_read_whole():
    """No preset relies on a key being skipped: removing any key of a published config is an error or a change."""
    absent_is_the_same = {
        "rope_scaling",
        "tie_word_embeddings",
        "num_key_value_heads",
        "head_dim",
        "quantization_config",
    }
    absent_is_the_same |= {"activation", "parallel_attn", "input_bits", "weight_bits"}
    for name, published in configs.PUBLISHED.items():
        for key in published.keys() - absent_is_the_same:
            with pytest.raises(ValueError):
                ModelConfig.from_hf({k: v for k, v in published.items() if k != key})
        assert PRESETS[name] == ModelConfig.from_hf(published)


def test_names_of_a_checkpoint():
    config = ModelConfig.from_hf(LLAMA)
    names = set(config.tensor_shapes())
    config.check_names(names)
    with pytest.raises(ValueError, match=r"1 missing, first 'model.layers.1.mlp.up_proj.weight'; 0 that"):
        config.check_names(names - {"model.layers.1.mlp.up_proj.weight"})
    # 1bitLLM's config says model_type llama; reading it as one would drop its inner norms.
    with pytest.raises(ValueError, match=r"0 missing; 1 that it does not use, first .*attn_sub_norm"):
        config.check_names([*names, canonical_name("model.layers.0.self_attn.inner_attn_ln.weight")])
    tied = dataclasses.replace(config, tied_head=True)
    tied.check_names(names)  # a stored copy of a tied head
    tied.check_names(names - {"lm_head.weight"})


def test_canonical_names():
    theirs = {
        n.replace("attn_sub_norm", "inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm") for n in names_1bit()
    }
    assert {canonical_name(name) for name in theirs} == names_1bit()
    assert any("inner_attn_ln" in name for name in theirs)


def names_1bit():
    return set(ModelConfig.from_hf(BIT_LLM).tensor_shapes())


@pytest.mark.parametrize(
    "change, words",
    (
        ({"layers": 0}, r"layers must be an integer from 1 to 2\*\*31 - 1"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"rope_scaling": math.inf}, "rope_scaling must be positive and finite"),
        ({"sliding_window": 4}, "sliding_window must be positive if there are sliding_layers"),
        ({"sliding_window": 4, "sliding_layers": (2,)}, r"sliding_layers must lie in 0..1"),
    ),
    ids=str,
)
def test_impossible_networks(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match="low_freq_factor must be positive and below"):
        Llama3Scaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_context=10)
