"""Loading, text, and the commands, on a tiny model written as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file
from test_runtime import BITNET
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bitnet_ref.commands.bench import bench
from bitnet_ref.commands.model import COMMANDS, packaged_model
from bitnet_ref.errors import FormatError
from bitnet_ref.formats import convert, open_checkpoint
from bitnet_ref.kernels import ISAS
from bitnet_ref.measure import model_peers
from bitnet_ref.measure.model_peers import PRESET, Variant, serve_ours
from bitnet_ref.measure.peers import Worker
from bitnet_ref.measure.random_file import write_random_model
from bitnet_ref.reference.config import PUBLISHED, ModelConfig
from bitnet_ref.reference.head import FloatTable, GroupedTable
from bitnet_ref.reference.model import forward, random_weights, ternary_weights
from bitnet_ref.runtime import sparse
from bitnet_ref.runtime.generate import generate
from bitnet_ref.runtime.load import load
from bitnet_ref.runtime.model import Model
from bitnet_ref.runtime.perplexity import perplexity
from bitnet_ref.runtime.steps import TiedTable

COMMAND = {command.name: command for command in (*COMMANDS, bench)}
CONFIG = {
    "architectures": ["BitNetForCausalLM"],
    "model_type": "bitnet",
    "hidden_act": "relu2",
    "hidden_size": 256,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 262,
}


def tokenizer():
    """Bytes, and four more tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<a>", "<b>", "<c>", "<d>")])
    return inner


@pytest.fixture(scope="module")
def reference():
    config = ModelConfig.from_hf(CONFIG)
    return config, ternary_weights(config, random_weights(config, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, reference):
    _, weights = reference
    path = tmp_path_factory.mktemp("model")
    tensors = {
        name: w[0].astype(np.float32) * w[1] if isinstance(w, tuple) else w.astype(np.float32)
        for name, w in weights.items()
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "chat_template": "{% for m in messages %}<a>{{ m.content }}<b>{% endfor %}",
            }
        )
    )
    return path


@pytest.mark.parametrize("form", ["folder", "packed", "gguf-tq2_0"])
def test_load_gives_the_reference_logits(folder, reference, tmp_path, form):
    config, weights = reference
    path = folder
    if form != "folder":
        path = tmp_path / "model"
        convert(folder, path, form, embedding="f32")
    model = load(path, "base3", "f32")
    tokens = np.arange(20) * 11 % 262
    table = {"model.embed_tokens.weight": model.table}
    np.testing.assert_array_equal(model.logits(tokens), forward(config, weights | table, tokens))
    assert model.tokenizer is not None and model.config == config
    # Together in memory, in whatever form they came, in the order of the file.
    layers = [w.w_packed.data for w in model.weights.values() if hasattr(w, "w_packed")]
    at = sorted((data.ctypes.data, data.nbytes) for data in layers)
    assert all(b == a + -(-size // 64) * 64 for (a, size), (b, _) in itertools.pairwise(at))
    assert not any(mapped(data) for data in layers)


def mapped(array):
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


@pytest.mark.parametrize("head", ["f16", "bf16", "f32", "q8_0"])
def test_a_head_of_floats_is_mapped(folder, tmp_path, head):
    """If the file has it so; one of integers is made anew, in groups of rows."""
    path = tmp_path / "model.safetensors"
    convert(folder, path, "packed", embedding=head)
    model = load(path, head=head)
    found = model.table.raw if isinstance(model.table, FloatTable) else model.table.data
    assert mapped(found) == (head != "q8_0")


@pytest.mark.parametrize("stored", ["bf16", "q8_0", "q6_k"])
def test_an_embedding_of_the_type_of_the_head_is_the_head(folder, tmp_path, stored):
    """One table in memory, not the file's pages beside it; and the rows that the file has."""
    path = tmp_path / "model.safetensors"
    convert(folder, path, "packed", embedding=stored)
    model = load(path, head=stored)
    table = model.weights["model.embed_tokens.weight"]
    assert table is model.table and isinstance(table, FloatTable if stored == "bf16" else GroupedTable)
    kept = open_checkpoint(path)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(table[np.arange(262)], kept.to_float32())


@pytest.mark.parametrize("scheme", ["base3", "i2"])
@pytest.mark.parametrize("head", ["f16", "q6_k"])
def test_a_random_file_is_the_network_of_its_config(tmp_path, scheme, head):
    published = dict(PUBLISHED["microsoft/bitnet-b1.58-2B-4T"]) | {"num_hidden_layers": 2, "vocab_size": 1500}
    published |= {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path / "model.safetensors"
    write_random_model(path, published, scheme, head)
    assert os.listdir(tmp_path) == [path.name]
    model = load(path, scheme, head)
    assert model.config == ModelConfig.from_hf(published)
    packed = {layer.w_packed.shape: layer.w_packed for layer in model.weights.values() if hasattr(layer, "w_packed")}
    assert all(w.scheme == scheme and set(np.unique(w.unpack())) == {-1, 0, 1} for w in packed.values())
    rows = model.table[np.arange(1500)]
    np.testing.assert_array_equal(rows[1024:], rows[: 1500 - 1024])  # what is drawn is repeated
    assert rows.std() == pytest.approx(256**-0.5, rel=0.05)
    tokens = [1, 1499, 3]
    np.testing.assert_array_equal(model.logits(tokens), model.reference_logits(tokens))


@pytest.mark.parametrize("gate_zeros", [None, 0.75])
def test_a_process_that_is_timed_opens_the_variant(tmp_path, gate_zeros):
    published = dict(PUBLISHED["microsoft/bitnet-b1.58-2B-4T"]) | {"num_hidden_layers": 2, "vocab_size": 1500}
    published |= {"hidden_size": 256, "intermediate_size": 1280, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path / "model.safetensors"
    variant = Variant("base3", "q6_k", "f16", gate_zeros)
    worker = Worker(serve_ours, "bitnet_ref")
    try:
        worker.ask("write", path, published, variant.scheme, variant.head, variant.gate_zeros)
        worker.ask("load", path, variant, 1, 40)
        assert worker.ask("prefill", list(range(30))) > 0
        assert len(worker.ask("decode", [1, 2, 3])) == 3
        row = worker.ask("account", 1)  # compares sparse logits with dense ones
    finally:
        worker.close()
    assert row.get("network", "dense") == variant.network
    per_token = 2 * 2 * 2 * 64 * 2  # keys and values of two layers, two heads of 64, float16
    assert row["cache_bytes"] == int(per_token * (8 + 5 / 2))
    assert row["head_bytes"] == 1504 * 210  # groups of 16 rows, a block of q6_k each
    if gate_zeros is None:
        assert "up_zeros" not in row
    else:
        assert row["up_zeros"] == pytest.approx(0.75, abs=0.05) and row["down_zeros"] >= row["up_zeros"]
    with pytest.raises(ValueError, match="gate_zeros must lie between"):
        write_random_model(path, published, "base3", "q6_k", 0.3)


def test_further_models_take_turns_with_the_first_head(tmp_path, monkeypatch):
    published = dict(PUBLISHED[PRESET]) | {"num_hidden_layers": 2, "vocab_size": 1500, "hidden_size": 256}
    published |= {"intermediate_size": 1280, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(model_peers, "PUBLISHED", {PRESET: published})
    monkeypatch.setattr(model_peers, "PRESETS", {PRESET: ModelConfig.from_hf(published)})
    more = (Variant("base3", "q6_k", gate_zeros=0.75), Variant("base3", "q4_0", cache="f16"))
    # Those that are compared keep keys and values as peers do.
    found = model_peers.measure_models_beside_peers(
        "test", tmp_path, (), ("q6_k", "q8_0"), ("base3",), (1,), 30, 3, 1, more=more
    )
    keys = ("head", "cache", "network", "gate_zeros")
    assert [tuple(row[key] for key in keys) for row in found["rows"]] == [
        ("q6_k", "f16", "dense", None), ("q6_k", "f32", "sparse", 0.75), ("q4_0", "f16", "dense", None),
        ("q8_0", "f16", "dense", None),
    ]  # fmt: skip
    assert [("up_zeros" in row, row["bytes_per_token"] > 0) for row in found["rows"]] == [
        (False, True), (True, True), (False, True), (False, True),
    ]  # fmt: skip
    assert len({row["bytes_per_token"] for row in found["rows"]}) == 4
    assert len(list(tmp_path.iterdir())) == 4


def test_the_embedding_stays_what_the_file_holds(folder, reference):
    _, weights = reference
    model = load(folder, head="q6_k")
    table = model.weights["model.embed_tokens.weight"]
    assert isinstance(table, TiedTable) and model.table.type == "Q6_K"
    np.testing.assert_array_equal(table[np.arange(262)], weights["model.embed_tokens.weight"])
    tokens = [1, 2, 3]
    np.testing.assert_array_equal(model.logits(tokens), model.reference_logits(tokens))


def test_load_refuses(folder, tmp_path):
    with pytest.raises(ValueError, match="head must be"):
        load(folder, head="q5_0")
    with pytest.raises(ValueError, match="scheme must be"):
        load(folder, "i3")
    with pytest.raises(FormatError):
        load(tmp_path)
    config = ModelConfig.from_hf(CONFIG)
    save_file(random_weights(config, 0), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FormatError, match=r"must be ternary.*quantize"):
        load(tmp_path)
    assert load(tmp_path, quantize=True).tokenizer is None


def test_text_comes_in_whole_characters_and_is_the_decoded_tokens(folder):
    model = load(folder, head="f32")
    pieces = list(model.generate("été", 40, temperature=1.5, seed=3))
    done = model.generate("été", 40, temperature=1.5, seed=3, stream=False)
    assert "".join(p.text for p in pieces) == done.text
    assert done.prompt_tokens == tuple(model.tokenizer.encode("été"))
    tokens = [t for t in done.tokens if t not in model.tokenizer.eos_ids]
    assert done.text == model.tokenizer.decode(tokens)


def test_stop_strings(folder):
    model = load(folder, head="f32")
    options = {"temperature": 1.5, "seed": 3, "stream": False}
    free = model.generate("a", 40, **options)
    stop = free.text[5:8]
    cut = model.generate("a", 40, stop=["never to be found", stop], **options)
    assert cut.finish == "stop" and cut.text == free.text[: free.text.index(stop)]
    assert cut.tokens == free.tokens[: len(cut.tokens)]
    # What might have begun a stop string and did not is shown in the end.
    held = model.generate("a", len(cut.tokens), stop=free.text[:8] + "!", **options)
    assert held.text == model.tokenizer.decode(held.tokens) and held.finish == "length"


def test_the_end_token_ends(folder):
    model = load(folder, head="f32")
    model.tokenizer.eos_ids = model.generate("a", 1, stream=False).tokens
    done = model.generate("a", 9, stream=False)
    assert done.finish == "end" and len(done.tokens) == 1 and done.text == ""


def test_perplexity_of_text_begins_chunks_as_the_tokenizer_does(folder):
    model = load(folder, head="f32")
    text = "one two three four five six seven"
    found = perplexity(model, text, 16)
    tokens = np.array(model.tokenizer.encode(text))
    if model.tokenizer.adds_bos:
        tokens[::16] = model.tokenizer.bos_id
    assert found == perplexity(model, tokens, 16)


# --- commands -------------------------------------------------------------------------------------------------------


def run(name, *arguments, code=0, **options):
    done = CliRunner().invoke(COMMAND[name], [str(a) for a in arguments], **options)
    assert done.exit_code == code, done.output
    return done


def test_generate_command(folder):
    expected = load(folder).generate("ab", 12, stream=False)
    assert run("generate", folder, "--prompt", "ab", "--max-tokens", 12).stdout == "ab" + expected.text + "\n"
    document = json.loads(run("generate", folder, "--prompt", "ab", "--max-tokens", 12, "--json").stdout)
    assert document["tokens"] == list(expected.tokens) and document["finish"] == expected.finish
    assert json.loads(run("generate", folder, "--max-tokens", 3, "--json").stdout)["prompt"] == ""


def test_generate_without_a_model():
    """The packaged model, from its begin-of-text token; drawn, unless the caller says how."""
    model = load(packaged_model())
    drawn = model.generate([0], 12, temperature=0.7, top_k=40, stream=False)
    assert run("generate", "--max-tokens", 12).stdout == drawn.text + "\n"
    greedy = model.generate([0], 12, stream=False)
    assert greedy.tokens != drawn.tokens
    assert run("generate", "--max-tokens", 12, "--temperature", 0, "--top-k", 0).stdout == greedy.text + "\n"


def test_chat_command(folder):
    model = load(folder)
    prompt = "<a>hello<b>"
    expected = model.generate(prompt, 8, special=True, stream=False)
    assert expected.prompt_tokens[-1] == 259 or expected.prompt_tokens[-1] == model.tokenizer.vocabulary["<b>"]
    assert run("chat", folder, "--max-tokens", 8, input="hello\n\n").stdout == expected.text + "\n"


def test_chat_with_a_template_of_the_caller(tmp_path):
    assert "--template" in run("chat", code=1).stderr  # the packaged model has none
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    expected = load(packaged_model()).generate("Hello.\n", 8, special=True, stream=False)
    said = run("chat", "--template", tmp_path / "t.jinja", "--max-tokens", 8, input="Hello.\n\n").stdout
    assert said == expected.text + "\n"


def test_perplexity_command(folder, tmp_path):
    (tmp_path / "text").write_text("one two three four five six seven eight")
    found = perplexity(load(folder), "one two three four five six seven eight", 16)
    document = json.loads(run("perplexity", folder, tmp_path / "text", "--context", 16, "--json").stdout)
    assert document["perplexity"] == found.value and document["n_scored"] == found.n_scored
    assert document["convention"] == "llama.cpp"
    text = run("perplexity", folder, tmp_path / "text", "--context", 16, "--convention", "transformers").stdout
    assert "convention of transformers" in text and "stride 8" in text


def test_logits_command(folder, tmp_path):
    for backend in ("kernels", "reference"):
        out = tmp_path / f"{backend}.npy"
        document = json.loads(
            run("logits", folder, "--tokens", "1,2,3", "--backend", backend, "--out", out, "--json").stdout
        )
        assert document["shape"] == [3, 262] and document["top"][0]["token"] == int(np.load(out)[-1].argmax())
    np.testing.assert_array_equal(np.load(tmp_path / "kernels.npy"), np.load(tmp_path / "reference.npy"))
    assert "numbers with commas" in run("logits", folder, "--tokens", "1;2", code=1).stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kernels.npy", "reference.npy"]


def test_convert_command(folder, tmp_path):
    target = tmp_path / "model.safetensors"
    document = json.loads(run("convert", folder, target, "--to", "packed", "--scheme", "tl1", "--json").stdout)
    assert document["n_ternary"] == 14 and document["written_bytes"] == target.stat().st_size
    np.testing.assert_array_equal(load(target).logits([1, 2]), load(folder).logits([1, 2]))
    assert "--overwrite" in run("convert", folder, target, "--to", "packed", code=1).stderr


def test_bench_command(folder):
    arguments = ("model", folder, "--threads", 1, "--threads", 2, "--prompt", 5, "--generate", 4, "--json")
    arguments += ("--depth", 0, "--depth", 9)
    rows = json.loads(run("bench", *arguments).stdout)["rows"]
    assert [row["threads"] for row in rows] == [1, 2]
    for row in rows:
        assert row["bytes_per_token"] == row["layer_bytes"] + row["head_bytes"] + row["cache_bytes"]
        assert row["cache_bytes"] == 2 * 2 * 2 * 64 * 4 * 7.5
        assert row["low_ns"] <= row["decode_step_ns"] <= row["high_ns"]
        assert [at["depth"] for at in row["depths"]] == [0, 9]
        for part in (row, *row["depths"]):
            fractions = [value for name, value in part.items() if name.endswith("_fraction") and "read" not in name]
            # Medians of five shares, each of the same steps.
            assert len(fractions) == 5 and min(fractions) > 0 and sum(fractions) == pytest.approx(1, abs=0.2)
    assert "decode tok/s" in run("bench", "model", folder, "--threads", 1, "--prompt", 2, "--generate", 2).stdout


def test_sparse_commands(monkeypatch):
    """The text is that of the dense model; times of both kinds of steps apart, bytes as they were read."""
    monkeypatch.setattr(sparse, "SPARSE_FROM", dict.fromkeys(ISAS, (2.0, 0.0)))
    taken = []
    monkeypatch.setattr(
        Model, "generate", lambda self, *rest, **options: taken.append(self) or generate(self, *rest, **options)
    )
    dense = run("generate", "--max-tokens", 12).stdout
    assert run("generate", "--max-tokens", 12, "--sparse").stdout == dense and len(dense) > 20
    assert [model.sparse for model in taken] == [False, True]
    arguments = ("model", packaged_model(), "--threads", 1, "--prompt", 5, "--generate", 4, "--depth", 2, "--sparse")
    first, second = json.loads(run("bench", *arguments, "--json").stdout)["rows"]
    assert first["network"] == "dense" and second["network"] == "sparse" and "up_zeros" not in first
    assert second["up_listed"] == 0 and second["down_listed"] == 1 and 0 < second["up_zeros"] < second["down_zeros"] < 1
    config = taken[0].config
    whole = taken[0].weights["model.layers.0.mlp.down_proj.weight"].w_packed.nbytes
    row_bytes = -(-config.hidden // 320) * 64
    saved = first["layer_bytes"] - second["layer_bytes"]
    read = config.ffn * (1 - second["down_zeros"]) * row_bytes
    assert saved == pytest.approx(config.layers * (whole - read), abs=1)
    assert first["decode_step_ns"] != second["decode_step_ns"]
    assert "of the columns of W_down add nothing; 0% and 100%" in run("bench", *arguments).stdout


def test_gates_of_a_random_model():
    """About as many as were asked for are not positive, and a model without the option stays what it was."""
    model = Model.random(dataclasses.replace(BITNET, ffn=1000), gate_zeros=0.9, sparse=True)
    model.forward([1])
    assert model.take_sparse_counts()["up_rows"] == pytest.approx(2 * 100, rel=0.3)
    with pytest.raises(ValueError, match=r"gate_zeros must lie between 0\.5 and 1, got 0\.4"):
        Model.random(BITNET, gate_zeros=0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "model"), "exactly one of MODEL and --preset"),
        (("bench", "model", "--preset", "2b4t"), "say --random"),
        (("bench", "model", "--preset", "9b", "--random"), "--preset must be one of"),
        (("bench", "model", "--preset", "2b4t", "--random", "--sparse", "--peers", "llama.cpp"), "leave out --peers"),
        (("bench", "model", "--preset", "1bitLLM/bitnet_b1_58-large", "--random", "--sparse"), "sparse needs"),
        (("bench", "model", packaged_model(), "--gate-zeros", 0.8), "give --preset and --random"),
    ],
)
def test_bench_refuses(arguments, message):
    assert message in run(*arguments, code=1).stderr
