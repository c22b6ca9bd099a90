"""Traces and their comparison: right programs are equal, every known bug is found, named and explained."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import bitnet_ref.cli  # noqa: F401  first: the commands below import from it
from bitnet_ref.commands.trace import diff as diff_command
from bitnet_ref.commands.trace import trace as trace_command
from bitnet_ref.errors import FormatError
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.model import Steps, forward, pack_weights, random_weights, ternary_weights
from bitnet_ref.reference.norm import rms_norm
from bitnet_ref.runtime.known_bugs import KNOWN_BUGS, with_bug
from bitnet_ref.runtime.trace import Network, load_trace, open_network, record, save_trace
from bitnet_ref.runtime.trace_diff import CAUSES, FLIP_BOUND, diff_traces

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "trace.md").read_text(encoding="utf-8")
TOKENS = list(range(5, 17))
CONFIG = ModelConfig(
    architecture="BitNetForCausalLM",
    hidden=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=256,
    vocabulary=97,
    context=64,
    norm_eps=1e-5,
    activation="relu2",
    rope_theta=500000.0,
    tied_head=True,
    sub_norm=True,
)
MASTERS = random_weights(CONFIG, seed=0)
HF = {
    "architectures": ["BitNetForCausalLM"],
    "model_type": "bitnet",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def right():
    return record(Network(CONFIG, MASTERS), TOKENS)


@pytest.fixture
def folder(tmp_path):
    """The model as float master weights of a Hugging Face folder."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(HF))
    save_file(MASTERS, path / "model.safetensors")
    return path


def large_gates():
    """Weights under which squared ReLU leaves the range of float16; SubLN takes the factor out again."""
    weights = ternary_weights(CONFIG, MASTERS)
    for i in range(CONFIG.layers):
        name = f"model.layers.{i}.mlp.gate_proj.weight"
        weights[name] = weights[name][0], weights[name][1] * np.float32(1000)
    return weights


def zeros(trace):
    counts = np.sum([matrix["counts"] for matrix in trace.matrices.values()], axis=0)
    return counts[1] / counts.sum()


def bare(trace):
    """What a program that knows nothing of this package would write."""
    return dataclasses.replace(trace, config=None, model={}, matrices={}, complete=False)


# Recording ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [None, "i2", "tl2"])
def test_a_trace_is_the_reference(right, scheme):
    weights = ternary_weights(CONFIG, MASTERS)
    weights = weights if scheme is None else pack_weights(weights, scheme)
    expected: dict[str, np.ndarray] = {}
    logits = forward(CONFIG, weights, TOKENS, trace=lambda name, array: expected.update({name: array.copy()}))
    trace = record(Network(CONFIG, weights), TOKENS)
    assert {name for name in trace.tensors if ".x_" not in name} == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(trace.tensors[name], array, err_msg=name)
    np.testing.assert_array_equal(trace.tensors["logits"], logits)
    assert trace.model == right.model and trace.matrices == right.matrices
    x = trace.tensors["layers.1.ffn_sub_norm"]
    x_q, x_scale = (trace.tensors[f"layers.1.down_proj.{part}"] for part in ("x_q", "x_scale"))
    assert x_q.dtype == np.int8 and x_scale.shape == (12, 1)
    assert np.abs(x_q * x_scale - x).max() <= x_scale.max() / 2 * (1 + 1e-5)


def test_save_and_load(tmp_path, right):
    save_trace(right, tmp_path / "t")
    again = load_trace(tmp_path / "t")
    assert [f.name for f in tmp_path.iterdir()] == ["t"]
    assert again.tensors.keys() == right.tensors.keys()
    for name, array in right.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], array, err_msg=name)
        assert again.tensors[name].dtype == array.dtype
    for field in ("tokens", "config", "model", "matrices", "complete", "program", "types"):
        assert getattr(again, field) == getattr(right, field), field
    with pytest.raises(FileExistsError, match="is there"):
        save_trace(right, tmp_path / "t")
    save_trace(right, tmp_path / "t", overwrite=True)
    with pytest.raises(FileNotFoundError, match="must exist"):
        save_trace(right, tmp_path / "no" / "t")


def test_a_failed_write_leaves_nothing(tmp_path, right, monkeypatch):
    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("bitnet_ref.runtime.trace.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_trace(right, tmp_path / "t")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "rule"),
    [
        ({"format": "x"}, "a trace must be a safetensors file with metadata format"),
        ({"version": "2"}, "version 1, got safetensors with 'bitnet_ref.trace' and '2'"),
        ({"tokens": "{}"}, "tokens must be a JSON list of integers"),
        ({"tokens": "[1.5]"}, "tokens must be a JSON list of integers"),
        ({"tokens": "[1"}, "must hold valid JSON"),
        ({"matrices": '{"a": {"scale": 1}}'}, "must give scale, counts and sha256"),
        ({"config": '{"hidden": 1}'}, "must hold the fields of a ModelConfig"),
        ({"model": "[]"}, "must hold a JSON object"),
    ],
)
def test_bad_traces(tmp_path, metadata, rule):
    base = {"format": "bitnet_ref.trace", "version": "1", "tokens": "[1]"}
    save_file({"logits": np.zeros((1, 3), np.float32)}, tmp_path / "t", base | metadata)
    with pytest.raises(FormatError, match=re.escape(rule)):
        load_trace(tmp_path / "t")


@pytest.mark.parametrize(("name", "dtype"), [("layers.0.q_proj.x_q", np.float32), ("logits", np.int32)])
def test_tensors_of_a_wrong_type(tmp_path, name, dtype):
    base = {"format": "bitnet_ref.trace", "version": "1", "tokens": "[1]"}
    save_file({name: np.zeros((1, 3), dtype)}, tmp_path / "t", base)
    with pytest.raises(FormatError, match=f"tensor {name} must be"):
        load_trace(tmp_path / "t")


# Right programs -------------------------------------------------------------------------------------------------------


def test_equal(right):
    found = diff_traces(right, right)
    assert found.equal and found.flips == 0 and found.strict_tokens == 12 and found.notes == ()
    assert found.logit_correlation == pytest.approx(1)
    assert len(found.tensors) == len(right.tensors)
    assert str(found).startswith("equal within bounds: ")


def noisy(relative, seed=1):
    """The network with norms that are off by a little, as those of a program that sums in another order."""
    rng = np.random.default_rng(seed)

    def norm(*arguments):
        y = rms_norm(*arguments)
        return (y * (1 + relative * rng.uniform(-1, 1, y.shape))).astype(np.float32)

    return Network(
        CONFIG, MASTERS, forward=lambda *args, **kwargs: forward(*args, **kwargs, steps=Steps(rms_norm=norm))
    )


def test_other_rounding_is_no_difference(right):
    """1e-6 is what transformers differs by; 3e-6 flips a few activations, each at a tie."""
    assert diff_traces(right, record(noisy(1e-7), TOKENS)).equal
    tokens = list(range(48))
    long = record(Network(CONFIG, MASTERS), tokens)
    for seed in range(4):
        found = diff_traces(long, record(noisy(3e-6, seed), tokens))
        assert found.equal and found.flips > 0 and 0 < found.strict_tokens < 48, str(found)
        assert f"the bound is {FLIP_BOUND:g}" in str(found)
        assert found.logit_correlation > 0.999
    # Before the first flip nothing may move beyond the strict bound, and the comparison would see it.
    flipped = record(noisy(3e-6), tokens)
    flipped.tensors["logits"][0, 5] += 1e-3 * np.abs(flipped.tensors["logits"]).max()
    assert diff_traces(long, flipped).first.index == (0, 5)


def test_noise_beyond_the_bound_is_found(right):
    found = diff_traces(right, record(noisy(1e-4), TOKENS))
    assert (found.first.name, found.first.cause) == ("layers.0.attn_norm", "precision")


def test_a_value_stored_in_16_bits_is_given_its_rounding(tmp_path, right):
    torch = pytest.importorskip("torch", reason="NumPy has no bf16")
    from safetensors.torch import save_file as save_torch

    save_trace(right, tmp_path / "a")
    tensors = {
        name: torch.from_numpy(array).to(torch.bfloat16 if array.dtype == np.float32 else torch.int8)
        for name, array in right.tensors.items()
    }
    save_torch(tensors, tmp_path / "b", {"format": "bitnet_ref.trace", "version": "1", "tokens": json.dumps(TOKENS)})
    found = diff_traces(load_trace(tmp_path / "a"), load_trace(tmp_path / "b"))
    assert found.equal and max(row.error for row in found.tensors) > 1e-4


# Bugs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN_BUGS)
def test_every_known_bug_is_found_named_and_explained(right, name):
    bug = KNOWN_BUGS[name]
    weights, expected = (MASTERS, right)
    if name == "relu2-f16":
        weights = large_gates()
        expected = record(Network(CONFIG, weights), TOKENS)
    network = with_bug(name, CONFIG, weights)
    wrong = record(network, TOKENS)
    np.testing.assert_array_equal(network.run(TOKENS), wrong.tensors["logits"])
    found = diff_traces(expected, wrong)
    assert not found.equal
    assert (found.first.name, found.first.cause) == (bug.first, bug.cause), str(found)
    assert bug.cause in CAUSES and CAUSES[bug.cause] in str(found) and "\n" not in str(found)
    json.dumps(found.as_dict(), allow_nan=False)
    assert wrong.config == CONFIG  # it claims to be right, as a wrong program does


# Without counts and scales a matrix can only be compared by what comes out of it.
LESS_CERTAIN = {"scale-inverted": "scale", "scale-dropped": "scale"}


@pytest.mark.parametrize("name", KNOWN_BUGS)
def test_every_known_bug_is_explained_from_a_bare_trace(right, name):
    weights, expected = (MASTERS, right)
    if name == "relu2-f16":
        weights = large_gates()
        expected = record(Network(CONFIG, weights), TOKENS)
    found = diff_traces(bare(expected), bare(record(with_bug(name, CONFIG, weights), TOKENS)))
    first = "layers.0.o_proj.x_scale" if name == "no-subln" else KNOWN_BUGS[name].first
    cause = LESS_CERTAIN.get(name, KNOWN_BUGS[name].cause)
    assert (found.first.name, found.first.cause) == (first, cause), str(found)


@pytest.mark.parametrize("name", sorted(KNOWN_BUGS.keys() - {"no-subln", "relu2-f16"}))
def test_a_bug_in_the_last_layer_is_found_there(right, name):
    """The first tensors are those of the right trace, as if the bug were in layer 1 only."""
    wrong = record(with_bug(name, CONFIG, MASTERS), TOKENS)
    for tensor, array in right.tensors.items():
        if tensor == "embedding" or tensor.startswith("layers.0."):
            wrong.tensors[tensor] = array
    found = diff_traces(right, wrong)
    assert found.first.name.startswith("layers.1.")


def test_the_page_lists_every_bug_with_its_effect(right):
    rows = re.findall(r"^\| `([\w-]+)` \| `(\S+)` \| (\S+) \| ([\d.]+) % \| (\S+) \|$", PAGE, re.MULTILINE)
    assert [row[0] for row in rows] == list(KNOWN_BUGS)
    for name, first, cause, share, correlation in rows:
        assert (first, cause) == (KNOWN_BUGS[name].first, KNOWN_BUGS[name].cause)
        wrong = record(with_bug(name, CONFIG, large_gates() if name == "relu2-f16" else MASTERS), TOKENS)
        assert zeros(wrong) == pytest.approx(float(share) / 100, abs=6e-4)
        found = diff_traces(right, wrong)
        if correlation == "NaN":
            assert found.logit_correlation is None and np.isnan(wrong.tensors["logits"]).all()
        else:  # tie flips on other machines move the last digits
            assert found.logit_correlation == pytest.approx(float(correlation), abs=0.01)


def test_overflow_is_hidden_by_nothing_but_the_type():
    """With gates 1000 times as large the right logits hardly change: SubLN divides the factor out."""
    a = forward(CONFIG, ternary_weights(CONFIG, MASTERS), TOKENS)
    b = forward(CONFIG, large_gates(), TOKENS)
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.999


@pytest.mark.parametrize(
    ("name", "change", "rule"),
    [
        ("silu", {"activation": "silu"}, "is SiLU; to compute it is no bug"),
        ("relu2-f16", {"activation": "silu"}, "only squared ReLU"),
        ("no-subln", {"sub_norm": False}, "has no SubLN"),
        ("kv-heads", {"kv_heads": 4}, "needs several key/value heads, each shared"),
        ("kv-heads", {"kv_heads": 1}, "needs several key/value heads, each shared"),
        ("i2s-block-order", {"hidden": 24, "ffn": 30}, "whole blocks of 128"),
        ("scale-dropped", {"ternary": False}, "one of ternary matrices"),
        ("nonsense", {}, "a known bug must be one of silu, no-subln"),
    ],
)
def test_a_network_that_cannot_have_the_bug(name, change, rule):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ValueError, match=re.escape(rule)):
        with_bug(name, config, random_weights(config, 0))


def test_the_threshold_needs_master_weights():
    with pytest.raises(ValueError, match="needs the float master weights"):
        with_bug("threshold-mean", CONFIG, ternary_weights(CONFIG, MASTERS)).run(TOKENS)


# Other differences ----------------------------------------------------------------------------------------------------


def changed(trace, name, array):
    return dataclasses.replace(trace, tensors=trace.tensors | {name: array})


def test_tokens_and_shapes(right):
    found = diff_traces(right, dataclasses.replace(right, tokens=(1, *right.tokens)))
    assert (found.first.kind, found.first.cause) == ("tokens", "tokens")
    assert "12 and 13 tokens, different from position 0 on" in str(found)
    found = diff_traces(right, changed(right, "layers.0.scores", right.tensors["layers.0.scores"][None]))
    assert (found.first.kind, found.first.name) == ("shape", "layers.0.scores") and "(1, 4, 12, 12)" in str(found)


def test_steps_of_one_trace_only(right):
    less = {name: array for name, array in right.tensors.items() if ".scores" not in name}
    partial = dataclasses.replace(right, tensors=less, complete=False)
    found = diff_traces(right, partial)
    assert found.equal and found.only_in_first == ("layers.0.scores", "layers.1.scores")
    found = diff_traces(right, dataclasses.replace(partial, complete=True))
    assert (found.first.kind, found.first.name) == ("missing", "layers.0.scores")
    odd = diff_traces(right, changed(bare(right), "layers.0.mystery", np.zeros(3, np.float32)))
    assert odd.equal and "no step known here, first layers.0.mystery" in odd.notes[0]
    with pytest.raises(ValueError, match="must have tensors in common, the first has embedding"):
        diff_traces(right, dataclasses.replace(partial, tensors={"x": np.zeros(3, np.float32)}))


T = len(TOKENS)


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [
        ("embedding", lambda a: a * np.float32(11.3), "embedding"),
        ("embedding", lambda a: a[::-1], "embedding"),
        ("layers.1.ffn_sub_norm", None, "no-subln"),
        ("layers.0.attn_norm", lambda a: a * np.linspace(0.5, 2, 128, dtype=np.float32), "norm"),
        ("layers.1.k_proj", lambda a: a[:, ::-1], "rows"),
        ("layers.0.k_rope", None, "rope-missing"),
        ("layers.0.scores", lambda a: a * np.float32(32**0.5), "attention-scale"),
        ("layers.0.probabilities", lambda a: np.full_like(a, 1 / T), "mask"),
        ("layers.1.attention", lambda a: a[::-1], "unknown"),
        ("layers.1.attn_out", None, "residual"),
        ("layers.0.activation", None, "activation"),
        ("layers.0.down_proj.x_scale", lambda a: a * np.float32(127 / 128), "rounding"),
        ("layers.0.gated", lambda a: np.where(np.abs(a) > 1, np.inf, a), "overflow"),
        ("logits", lambda a: a.astype(np.float16).astype(np.float32), "precision"),
    ],
)
def test_more_causes(right, name, change, cause):
    sources = {  # what stands in its place
        "layers.1.ffn_sub_norm": right.tensors["layers.1.gated"],
        "layers.0.k_rope": right.tensors["layers.0.k_proj"].reshape(T, 2, 32),
        "layers.1.attn_out": right.tensors["layers.1.o_proj"],
        "layers.0.activation": np.maximum(right.tensors["layers.0.gate_proj"], 0),
    }
    array = sources[name] if change is None else np.ascontiguousarray(change(right.tensors[name]))
    found = diff_traces(right, changed(right, name, array.astype(np.float32)))
    assert (found.first.name, found.first.cause) == (name, cause), str(found)


def test_masked_scores_of_other_programs_are_no_difference(right):
    """transformers adds its mask to the scores: above the diagonal they are the lowest float32."""
    masked = right.tensors["layers.0.scores"].copy()
    masked[:, np.triu(np.ones((T, T), bool), 1)] = np.finfo(np.float32).min
    assert diff_traces(right, changed(right, "layers.0.scores", masked)).equal
    assert diff_traces(changed(right, "layers.0.scores", masked), right).equal


def test_a_flip_that_is_no_tie_is_found(right):
    """One integer off by one where the value is nowhere near a half."""
    name = "layers.1.o_proj"
    x, x_scale = right.tensors["layers.1.attn_sub_norm"], right.tensors[f"{name}.x_scale"]
    value = x / x_scale
    token, k = np.argwhere(np.abs(value - np.rint(value)) < 0.1)[7]
    x_q = right.tensors[f"{name}.x_q"].copy()
    x_q[token, k] += 1 if x_q[token, k] < 127 else -1
    found = diff_traces(right, changed(right, f"{name}.x_q", x_q))
    assert (found.first.name, found.first.index) == (f"{name}.x_q", (token, k))
    assert (found.first.n_outside, found.first.bound) == (1, 0)


def test_notes_name_other_configurations_and_weights(right):
    other = dataclasses.replace(right, config=dataclasses.replace(CONFIG, activation="silu"))
    assert diff_traces(right, other).notes == ("The configurations differ: activation 'relu2' and 'silu'.",)
    found = diff_traces(right, record(with_bug("head-rows", CONFIG, MASTERS), TOKENS))
    assert found.notes == ("4 of 14 matrices differ, first layers.0.q_proj.",)


# Another program ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "first"), [("relu2", None), ("silu", "layers.0.activation")])
def test_the_code_of_the_page_on_transformers(tmp_path, right, activation, first):
    torch = pytest.importorskip("torch", reason="needs the extra [distill]: no torch here")
    transformers = pytest.importorskip("transformers", reason="needs the extra [distill]: no transformers here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from transformers.integrations import bitnet
    config = transformers.BitNetConfig(
        **{key: value for key, value in HF.items() if key not in ("architectures", "model_type", "rope_theta")}
        | {"hidden_act": activation, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.BitNetForCausalLM(config).eval()
    weights = ternary_weights(CONFIG, MASTERS)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            new = bitnet.AutoBitLinear(module.in_features, module.out_features, bias=False, dtype=torch.float32)
            w_q, w_scale = weights[f"{path}.weight"]
            new.weight.data.copy_(torch.from_numpy(w_q.astype(np.float32)))
            new.weight_scale.fill_(float(w_scale))
            model.set_submodule(path, new)
    floats = {name: torch.from_numpy(w) for name, w in weights.items() if isinstance(w, np.ndarray)}
    assert not model.load_state_dict(floats, strict=False).unexpected_keys
    namespace: dict[str, object] = {}
    (code,) = re.findall(r"^```python\n(import json, re\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(code, namespace)
    with torch.compiler.set_stance("force_eager"):
        namespace["write_trace"](model, TOKENS, tmp_path / "theirs")
    theirs = load_trace(tmp_path / "theirs")
    assert len(theirs.tensors) == 3 + 2 * 15 and theirs.program == "transformers"
    found = diff_traces(right, theirs)
    if first is None:
        assert found.equal, str(found)
        assert not found.only_in_second and len(found.tensors) == 3 + 2 * (15 + 8)
    else:
        assert (found.first.name, found.first.cause) == (first, "activation"), str(found)


# Checkpoints and the command line -------------------------------------------------------------------------------------


def test_a_checkpoint_is_traced_as_its_weights_are(folder, right):
    network = open_network(folder, quantize=True)
    assert network.config == CONFIG
    assert diff_traces(right, record(network, TOKENS)).equal
    with pytest.raises(ValueError, match=r"linear layers must be ternary, .*q_proj.weight is not"):
        record(open_network(folder), TOKENS)


def test_a_tensor_of_the_wrong_shape_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"model.norm.weight must have shape \(128,\), got \(3,\)"):
        open_network(folder)


def run(*words):
    words = [str(word) for word in words]
    return CliRunner().invoke(trace_command if words[0] == "trace" else diff_command, words[1:])


def test_commands(tmp_path, folder):
    base = ("trace", folder, "--tokens", "5,6,7", "--quantize", "--out")
    result = run(*base, tmp_path / "a")
    assert result.exit_code == 0 and "59 tensors written to" in result.output, result.output
    result = run(*base, tmp_path / "b", "--bug", "threshold-mean", "--json")
    assert result.exit_code == 0 and json.loads(result.output)["bug"] == "threshold-mean"
    same, wrong = run("diff", tmp_path / "a", tmp_path / "a"), run("diff", tmp_path / "a", tmp_path / "b", "--all")
    assert same.exit_code == 0 and same.output.startswith("equal within bounds: 59 tensors")
    assert wrong.exit_code == 1 and "layers.0.q_proj is the first tensor outside its bound" in wrong.output
    assert "another threshold of the ternary rounding" in wrong.output and "layers.1.out" in wrong.output
    document = json.loads(run("diff", tmp_path / "a", tmp_path / "b", "--json").output)
    assert document["equal"] is False and document["first"]["cause"] == "threshold"
    again = run(*base, tmp_path / "a")
    assert again.exit_code == 1 and "replacing it must be asked for" in again.output
    assert run(*base, tmp_path / "a", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "rule"),
    [
        (("--tokens", "1,x"), 2, "must be integers separated by commas"),
        (("--tokens", "1,97", "--quantize"), 1, "tokens must lie in 0..96"),
        (("--tokens", "1", "--quantize", "--bug", "x"), 1, "a known bug must be one of"),
        (("--tokens", "1"), 1, "allow it with quantize"),
    ],
)
def test_commands_that_fail_write_nothing(tmp_path, folder, words, code, rule):
    result = run("trace", folder, "--out", tmp_path / "t", *words)
    assert result.exit_code == code and rule in result.output, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_diff_of_something_else(tmp_path, folder):
    result = run("diff", folder / "config.json", folder / "config.json")
    assert result.exit_code == 1 and "Error: " in result.output
