"""A student's files, and the kernels' answers beside PyTorch's."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from bitnet_ref.cli import main
from bitnet_ref.formats.answers import read_answers, write_answers
from bitnet_ref.runtime import classify
from bitnet_ref.runtime.load import load

torch = pytest.importorskip("torch", reason="training needs the extra [distill]: no torch here")
transformers = pytest.importorskip("transformers", reason="training needs the extra [distill]: no transformers here")

from test_distill_student import build  # noqa: E402

from bitnet_ref.distill import config as configs  # noqa: E402
from bitnet_ref.distill import export, models, student  # noqa: E402  (they import torch)

PROMPTS = [np.random.default_rng(i).integers(0, 101, 1 + 3 * i).tolist() for i in range(20)]
LABELS = ([3, 50, 7], ["a", "b", "c"], [i % 3 for i in range(20)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    model = build("Llama", hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=2)
    student.insert_subln(model)
    student.ternarise(model)
    export.round_tables(model)
    student.save_student(model, folder / "student", ternary=True)
    write_answers(export.answer(model, PROMPTS, *LABELS), folder / "answers")
    return folder, model, export.export_student(folder / "student", folder / "out")


@pytest.mark.parametrize("form", export.FORMS)
@pytest.mark.parametrize("scheme", ["i2", "base3", "tl2"])
def test_kernels_answer_as_pytorch_does(made, form, scheme):
    folder, _, reports = made
    expected = read_answers(folder / "answers")
    if isinstance(reports[form], str):  # llama.cpp has no such network, and the sentence says so
        assert form.startswith("gguf") and not (folder / "out" / export.FORMS[form]).exists()
        return
    model = load(folder / "out" / export.FORMS[form], scheme=scheme, head="f32", n_threads=1)
    np.testing.assert_array_equal(classify.answer(model, expected).logits, expected.logits)


def test_tables_beyond_float16_are_refused():
    model = build("Llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 4] = 1e5
    with pytest.raises(ValueError, match="the embedding must fit float16, its largest magnitude is 100000"):
        export.round_tables(model)


def test_answers_do_not_depend_on_the_batch(made):
    _, model, _ = made
    model.train()
    one = export.answer(model, PROMPTS, *LABELS, batch_size=1)
    many = export.answer(model, PROMPTS, *LABELS, batch_size=16)
    assert model.training
    np.testing.assert_allclose(one.logits, many.logits, rtol=0, atol=1e-3 * np.ptp(one.logits))
    np.testing.assert_array_equal(one.predicted, many.predicted)


def test_what_gguf_cannot_hold_is_said(tmp_path):
    model = build("Qwen3")
    student.insert_subln(model)
    student.ternarise(model)
    student.save_student(model, tmp_path / "student", ternary=True)
    reports = export.export_student(tmp_path / "student", tmp_path / "out", ["packed", "gguf-tq2_0"])
    assert reports["packed"].n_ternary == 21 and isinstance(reports["gguf-tq2_0"], str)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["student.safetensors"]
    with pytest.raises(ValueError, match="exported to packed, hf-packed, gguf-tq2_0, got 'onnx'"):
        export.export_student(tmp_path / "student", tmp_path / "out", ["onnx"])


def test_compare_times_both_and_counts_their_bytes(made, tmp_path):
    folder, model, _ = made
    model.config.save_pretrained(tmp_path)
    arguments = ["distill", "compare", str(folder / "out" / export.FORMS["packed"]), str(tmp_path / "config.json")]
    arguments += ["--prompt", "8", "--generate", "4", "--rounds", "1", "--head", "f16"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    ours, theirs = json.loads(result.stdout)["rows"]
    matrices = 2 * (256 * 64 * (4 + 2 + 2 + 4) + 3 * 256 * 512)
    assert (ours["program"], theirs["program"]) == ("bitnet_ref", "PyTorch")
    assert (ours["matrix_bytes"], theirs["matrix_bytes"]) == (round(matrices / 5), 2 * matrices)
    assert ours["table_bytes"] == theirs["table_bytes"] == 2 * 101 * 256
    for row in (ours, theirs):
        assert min(row["prefill_tokens_per_s"], row["decode_tokens_per_s"]) > 0
        assert row["peak_resident_bytes"] > row["matrix_bytes"]
    result = CliRunner().invoke(main, [*arguments, "--llama-cpp", "f16,q9"])
    assert result.exit_code == 1 and "--llama-cpp must be of f16, q8_0, q4_0, got q9" in result.stderr
    result = CliRunner().invoke(main, [*arguments[:3], str(tmp_path / "nothing.json"), *arguments[4:]])
    assert result.exit_code == 2
    (tmp_path / "config.json").write_text("{}")
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "PyTorch ended with exit code 1 and no figures; it said" in result.stderr


def test_a_model_from_gguf_is_saved_as_the_floats_that_it_is(tmp_path):
    """transformers keeps how a GGUF file was quantised; a folder of float weights that says so could not be read."""
    gguf = pytest.importorskip("gguf")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 32, "vocab_size": 64}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (64, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    shapes |= {"blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64)}
    shapes |= {
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
    }
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.abs(values))
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = models.load_base(configs.Model(folder=str(tmp_path), gguf_file="m.gguf"), 0, 64)
    student.save_student(base, tmp_path / "saved", ternary=False)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    tokens = rng.integers(0, 64, 9)
    with torch.no_grad():
        expected = base(torch.from_numpy(tokens)[None]).logits[0].numpy()
    got = load(tmp_path / "saved", head="f32").logits(tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.ptp(expected))
