"""The reference decoder against transformers, float32, on random weights: logits, layers and greedy tokens.

Both compute the same formulas, but sum in another order, so their float32 values differ in the last bits. That alone
stays near 2e-7 of the logits' range. What does not stay small is a *flip*: an activation within that error of a tie
becomes another int8 in one of them, and one unit in one of some hundred activations moves later logits by 1e-3 to 1e-2.
So the comparison follows the integers of transformers: where ours differ, both must lie at a tie (TIE below), and then
theirs are taken, through the `linear` argument of the network. After that everything must agree without exception.

`pytest -s tests/test_parity_transformers.py` prints the error of every tensor of every layer.
"""

import functools
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from bitnet_ref.measure.record import record
from bitnet_ref.reference.config import Llama3Scaling, ModelConfig
from bitnet_ref.reference.model import forward, generate_greedy, linear, random_weights, ternary_weights
from bitnet_ref.reference.quantize import quantize_activations
from bitnet_ref.reference.rope import frequencies
from bitnet_ref.runtime.model import Model

torch = pytest.importorskip("torch", reason="parity with transformers needs the extra [distill]: no torch here")
transformers = pytest.importorskip("transformers", reason="parity needs the extra [distill]: no transformers here")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 calls a function that it has deprecated itself
    from transformers.integrations import bitnet

BOUND = 1e-5
"""Largest error of any compared tensor, over its range. The demand on logits is 1e-4; rounding alone reaches 1e-6."""

TIE = 1e-3
"""A flip may only happen this near to a half. The values rounded are up to 127, so it is 8e-6 of the largest."""

PROMPT, WRITTEN = 12, 64

SMALL = {
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}


def _sizes(hidden, ffn, layers, heads, kv_heads, vocabulary):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (hidden, ffn, layers, heads, kv_heads), strict=True), vocab_size=vocabulary, **SMALL)


def _rope(theta, **scaling):
    return {"rope_theta": theta, "rope_type": "default", **scaling}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
GEMMA_ROPE = {"sliding_attention": _rope(1e4), "full_attention": _rope(1e6, rope_type="linear", factor=8.0)}

# name -> (class of transformers, its config, what replaces its linear layers, seed of the weights)
# With these seeds no activation flips under torch 2.13.0 on AVX-512, and the greedy tokens are not one token repeated;
# so there the free run is compared to its end. Elsewhere a flip may shorten that comparison, and that one only.
CASES = {
    "2b4t, one key/value head, tied": (
        "BitNet",
        _sizes(96, 200, 3, 6, 1, 1003) | {"tie_word_embeddings": True, "rope_parameters": _rope(5e5)},
        "offline",
        4,
    ),
    "2b4t, odd sizes, untied": (
        "BitNet",
        _sizes(60, 149, 2, 6, 3, 257) | {"tie_word_embeddings": False, "rope_parameters": _rope(5e5)},
        "offline",
        1,
    ),
    "2b4t, heads of 128": (
        "BitNet",
        _sizes(512, 640, 2, 4, 1, 509) | {"tie_word_embeddings": True, "rope_parameters": _rope(5e5)},
        "offline",
        28,
    ),
    "2b4t, master weights": (
        "BitNet",
        _sizes(84, 220, 2, 6, 2, 131) | {"tie_word_embeddings": True, "rope_parameters": _rope(5e5)},
        "online",
        7,
    ),
    "1bitLLM": (
        "BitNet",  # transformers has no BitnetForCausalLM; with SiLU its BitNet is the same network
        _sizes(100, 172, 3, 10, 10, 323) | {"hidden_act": "silu", "tie_word_embeddings": True},
        "offline",
        6,
    ),
    "Llama3-8B-1.58, packed, stored reciprocal": (
        "Llama",
        _sizes(72, 200, 2, 6, 2, 301) | {"head_dim": 24, "rope_parameters": _rope(5e5, **LLAMA3)},
        "packed",
        1,
    ),
    "Falcon, linear RoPE scaling": (
        "Llama",
        _sizes(88, 160, 2, 4, 2, 401) | {"rope_parameters": _rope(1000042.0, rope_type="linear", factor=2.0)},
        "offline",
        1,
    ),
    "SmolLM2 student": (
        "Llama",
        _sizes(90, 240, 3, 9, 3, 211) | {"tie_word_embeddings": True, "rope_parameters": _rope(1e5)},
        "offline + SubLN",
        7,
    ),
    "Qwen2 student": (
        "Qwen2",
        _sizes(64, 150, 2, 4, 2, 199) | {"tie_word_embeddings": True, "rope_parameters": _rope(1e6)},
        "online + SubLN",
        1,
    ),
    "Qwen3 student": (
        "Qwen3",
        _sizes(56, 150, 2, 4, 2, 199) | {"head_dim": 34, "tie_word_embeddings": True, "rope_parameters": _rope(1e6)},
        "offline + SubLN",
        2,
    ),
    "Gemma3 student": (
        "Gemma3",
        _sizes(64, 170, 3, 4, 1, 263)
        | {"head_dim": 20, "query_pre_attn_scalar": 24, "sliding_window": 9, "rope_parameters": GEMMA_ROPE}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "offline + SubLN",
        1,
    ),
    "full-precision twin": (
        "Llama",
        _sizes(90, 240, 2, 9, 3, 211) | {"tie_word_embeddings": True, "rope_parameters": _rope(1e5)},
        "float",
        2,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def eager_torch():
    """No torch.compile (the quantisers of transformers ask for it) and one thread, for speed on small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_same_network(case):
    kind, keys, layers, seed = CASES[case]
    config, weights, theirs = _build(case, kind, keys, layers, seed)
    prompt = np.random.default_rng(2).integers(0, config.vocabulary, PROMPT)
    asked = {"max_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}
    tokens = theirs.generate(torch.from_numpy(prompt)[None], **asked)[0].numpy()
    assert len(tokens) == PROMPT + WRITTEN

    expected, inputs = _trace_of(theirs, tokens)
    follow = _FollowTies(inputs)
    named = {name: _Named(name, w) if name in config.linear_shapes() else w for name, w in weights.items()}
    ours: dict[str, np.ndarray] = {}
    logits = forward(config, named, tokens, linear=follow, trace=ours.__setitem__)

    errors = {name: _error(ours[name], value) for name, value in expected.items()}
    table = "\n".join(f"{name:32} {error:.2e}" for name, error in errors.items())
    print(f"{case}: logits {errors['logits']:.1e}, worst {max(errors.values()):.1e}, flips {follow.flips}\n{table}")
    worst = [name for name in ours if errors.get(name, 0) > BOUND]  # in the order of computation
    assert not worst, f"first different: {worst[0]}; flips {follow.flips}\n{table}"

    # Every tensor that can be seen from outside was compared, in every layer.
    assert {name.rpartition(".")[2] for name in ours} - {name.rpartition(".")[2] for name in errors} <= {
        "q_rope",
        "scores",
        "attention",
        "attn_out",
        "gated",
    }
    np.testing.assert_array_equal(logits[PROMPT - 1 : -1].argmax(axis=1), tokens[PROMPT:])

    _note_parity(case, kind, config, errors, len(follow.flips), logits, _kernel_logits(config, weights, tokens, follow))

    # Running freely, ours may leave theirs at the first flip and not before: attention only looks back.
    free = min((position for _, position in follow.flips), default=len(tokens)) - PROMPT + 1
    written = generate_greedy(config, weights, prompt, WRITTEN)
    assert written[: max(0, free)] == tokens[PROMPT:].tolist()[: max(0, free)], f"flips {follow.flips}\n{table}"


@pytest.mark.parametrize("head_dim", (64, 96, 100, 128, 256))
@pytest.mark.parametrize("theta", (1e4, 1e5, 5e5, 1e6, 1000042.0))
def test_rope_speeds_are_those_of_transformers(theta, head_dim):
    llama3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    llama3_keys = LLAMA3 | {"original_max_position_embeddings": 8192}
    for scaling, parameters in ((None, {}), (4.0, {"rope_type": "linear", "factor": 4.0}), (llama3, llama3_keys)):
        keys = _sizes(2 * head_dim, 8, 1, 2, 1, 8) | {"rope_parameters": _rope(theta, **parameters)}
        config = transformers.LlamaConfig(**(keys | {"max_position_embeddings": 131072}))
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        # One unit in the last place, because torch's float32 power is not always the nearest float32; ours is.
        np.testing.assert_array_max_ulp(frequencies(head_dim, theta, scaling), rotary.inv_freq.numpy(), 1)


PARITY: list[dict] = []


@pytest.fixture(scope="module", autouse=True)
def parity_file():
    """BITNET_REF_PARITY=<file> keeps what was compared, for the report (``make parity``)."""
    yield
    if path := os.environ.get("BITNET_REF_PARITY"):
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        header = record("make parity") | versions
        Path(path).write_text(json.dumps({"record": header, "rows": PARITY}, indent=1) + "\n")


def _kernel_logits(config, weights, tokens, follow):
    """Logits of the compiled model; None if an activation flipped, which it cannot be told to follow."""
    if follow.flips:
        return None
    return Model.from_weights(config, weights, "i2", "f32", n_threads=1).logits(tokens)


def _note_parity(case, kind, config, errors, flips, logits, compiled):
    """One row for the report; the compiled model must be as near to transformers as the reference is."""
    difference = None if compiled is None else float(np.abs(compiled - logits).max() / np.ptp(logits))
    assert difference is None or difference < BOUND
    network = f"{config.layers} layers of {config.hidden}, {config.heads}/{config.kv_heads} heads, {config.activation}"
    PARITY.append(
        {
            "case": case,
            "class": f"{kind}ForCausalLM",
            "network": network,
            "tensors": len(errors),
            "logits_error": errors["logits"],
            "worst_error": max(errors.values()),
            # The largest of each layer, in order.
            "layer_errors": [
                max(error for name, error in errors.items() if name.startswith(f"layers.{i}."))
                for i in range(config.layers)
            ],
            "flips": flips,
            "same_tokens": WRITTEN,
            "kernels_to_reference": difference,
        }
    )


class _Named(tuple):
    """A weight that knows its name, so that `_FollowTies` can look up the integers of transformers."""

    def __new__(cls, name, weight):
        self = super().__new__(cls, weight if isinstance(weight, tuple) else (weight,))
        self.name = name
        return self


class _FollowTies:
    """The reference's linear layer on the integers of transformers, after checking that ours differ only at ties."""

    def __init__(self, inputs):
        self._inputs = inputs
        self.flips = []  # (name of the matrix, position of the token)

    def __call__(self, x, weight):
        if len(weight) == 1:
            return linear(x, weight[0])
        w_q, w_scale = weight
        x_q, x_scale = quantize_activations(x)
        theirs = self._inputs[weight.name]
        for token, k in np.argwhere(x_q != theirs):
            value = np.float64(x[token, k]) / np.float64(x_scale[token, 0])
            between = (int(x_q[token, k]) + int(theirs[token, k])) / 2
            assert abs(int(x_q[token, k]) - int(theirs[token, k])) == 1 and abs(value - between) < TIE, (
                f"{weight.name}, token {token}, input {k}: {value} is {x_q[token, k]} here, {theirs[token, k]} there"
            )
            self.flips.append((weight.name, int(token)))
        sums = theirs.astype(np.int32) @ w_q.T.astype(np.int32)
        return sums.astype(np.float32) * (x_scale * w_scale)


def _error(ours, theirs):
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.ptp(theirs))


def _build(case, kind, keys, layers, seed):
    """The config read from transformers' own, random weights for the reference, and a model of theirs with the same."""
    hf_config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")(**keys)
    model = getattr(transformers, f"{kind}ForCausalLM")(hf_config).eval()
    description = hf_config.to_dict() | {"architectures": [f"{kind}ForCausalLM"]}
    if case == "1bitLLM":
        description |= {
            "architectures": ["BitnetForCausalLM"],
            "model_type": "llama",
            "input_bits": 8,
            "weight_bits": 1,
        }
    if layers != "float":
        online = {"linear_class": "autobitlinear", "quantization_mode": "online"} if layers.startswith("online") else {}
        description["quantization_config"] = {"quant_method": "bitnet", **online}
    if "SubLN" in layers:
        _insert_sub_norms(model, hf_config)
    names = ["model.layers.0.self_attn.attn_sub_norm.weight"] if "SubLN" in layers else []
    config = ModelConfig.from_hf(description, names)
    weights = masters = random_weights(config, seed)
    if config.ternary:
        weights = ternary_weights(config, masters)
        _replace_linears(model, weights, masters, layers)
    state = {_their_name(name, model): w for name, w in masters.items() if name not in config.linear_shapes()}
    if layers == "float":
        state = masters
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(w) for k, w in state.items()}, strict=False)
    assert not unexpected
    assert all(re.search(r"proj.*weight", name) or (config.tied_head and name == "lm_head.weight") for name in missing)
    return config, weights, model


def _insert_sub_norms(model, hf_config):
    """SubLN where [BitDistill] has it: a norm of the model's own class before o_proj and before down_proj."""
    norm_class = type(model.model.norm)
    for layer in model.model.layers:
        for parent, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            projection = getattr(parent, name)
            norm = norm_class(projection.in_features, eps=hf_config.rms_norm_eps)
            setattr(parent, name, torch.nn.Sequential(norm, projection))


def _their_name(name, model):
    if isinstance(model.model.layers[0].self_attn.o_proj, torch.nn.Sequential):
        name = name.replace("attn_sub_norm", "o_proj.0").replace("ffn_sub_norm", "down_proj.0")
    return name


def _replace_linears(model, weights, masters, layers):
    """transformers' own ternary layers in place of every linear layer of the blocks."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or path == "lm_head":
            continue
        name = f"{path.removesuffix('.1')}.weight"
        w_q, w_scale = weights[name]
        sizes = {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias is not None,
        }
        if layers == "packed":  # uint8, and weight_scale holds 1 / w_scale
            new = bitnet.BitLinear(**sizes, dtype=torch.float32)
            new.weight.copy_(bitnet.pack_weights(torch.from_numpy(w_q.astype(np.float32))))
            new.weight_scale.fill_(1 / float(w_scale))
        else:
            online = layers.startswith("online")
            new = bitnet.AutoBitLinear(**sizes, dtype=torch.float32, online_quant=online)
            new.weight.copy_(torch.from_numpy(masters[name] if online else w_q.astype(np.float32)))
            if not online:  # ternary values, and weight_scale multiplies
                new.weight_scale.fill_(float(w_scale))
        model.set_submodule(path, new)


def _trace_of(model, tokens):
    """Outputs of transformers' modules by the names of the reference's trace, and the int8 inputs of its matrices."""
    outputs, inputs = {}, {}
    gemma = hasattr(model.model.layers[0], "pre_feedforward_layernorm")
    names = {
        "model.embed_tokens": "embedding",
        "model.norm": "final_norm",
        "lm_head": "logits",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "attn_post_norm" if gemma else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "ffn_post_norm",
        "self_attn": "probabilities",
        "mlp.act_fn": "activation",
        "self_attn.o_proj.0": "attn_sub_norm",
        "mlp.down_proj.0": "ffn_sub_norm",
        "": "out",
    }

    def watch(path, module, args, output):
        layer, within = re.fullmatch(r"(?:model\.(layers\.\d+)\.?)?(.*)", path).groups()
        name = names.get(within) or within.removesuffix(".1").partition(".")[2]
        value = output[1][0] if within == "self_attn" else output[0]  # without the batch axis
        if gemma and name in ("q_norm", "k_norm"):
            value = value.transpose(0, 1)  # (H, T, D) there, (T, H, D) here
        outputs[f"{layer}.{name}" if layer else name] = value
        if isinstance(module, (bitnet.BitLinear, bitnet.AutoBitLinear)):
            x = args[0][0]
            scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
            inputs[f"{path.removesuffix('.1')}.weight"] = (x * scale).round().to(torch.int8).numpy()

    containers = ("", "model", "model.layers", "model.rotary_emb")
    handles = [
        module.register_forward_hook(functools.partial(watch, path))
        for path, module in model.named_modules()
        if path not in containers and not path.endswith(".mlp") and not isinstance(module, torch.nn.Sequential)
    ]
    result = model(torch.from_numpy(tokens)[None], use_cache=True)
    for handle in handles:
        handle.remove()
    for i, layer in enumerate(result.past_key_values.layers):
        if layer.keys.shape[2] == len(tokens):  # a layer with a window keeps fewer
            outputs[f"layers.{i}.k_rope"] = layer.keys[0].transpose(0, 1)
    return {name: value.numpy() for name, value in outputs.items()}, inputs
