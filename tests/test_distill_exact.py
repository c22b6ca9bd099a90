"""PyTorch with the roundings of the reference: the same residual streams to the bit, and nothing left behind."""

import numpy as np
import pytest

from bitnet_ref.reference.model import forward
from bitnet_ref.runtime.load import load

torch = pytest.importorskip("torch", reason="training needs the extra [distill]: no torch here")
pytest.importorskip("transformers", reason="training needs the extra [distill]: no transformers here")

import test_distill_student as students  # noqa: E402

from bitnet_ref.distill import student  # noqa: E402
from bitnet_ref.distill.exact import reference_arithmetic  # noqa: E402

KEYS = {"Gemma3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}}


def build(kind, **keys):
    """A student whose norms are not all ones, with large activations, so that roundings show."""
    model = students.build(kind, **KEYS.get(kind, {}) | keys)
    student.insert_subln(model)
    student.ternarise(model)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.ndim < 2:
                torch.manual_seed(i)
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def streams(model, rows, mask):
    """Behind every block, (L, B, T, K)."""
    with torch.no_grad(), student.capture_hidden(model) as kept:
        model.model(rows, attention_mask=None if mask.all() else mask, use_cache=False)
    return torch.stack(kept).numpy()


def answers(model, rows, mask):
    """Logits, (B, T, V)."""
    with torch.no_grad():
        hidden = model.model(rows, attention_mask=mask, use_cache=False).last_hidden_state
        return model.lm_head(hidden).numpy()


@pytest.mark.parametrize("kind", students.KINDS)
def test_residual_streams_are_those_of_the_kernels_to_the_bit(kind, tmp_path):
    """Of the reference and of the compiled steps, for texts of different lengths in one batch."""
    model = build(kind)
    student.save_student(model, tmp_path, ternary=True)
    compiled = load(tmp_path, head="f32", n_threads=1, quantize=True)
    random = np.random.default_rng(5)
    texts = [random.integers(0, 101, n) for n in (23, 9, 16)]
    mask = torch.from_numpy(np.array([np.arange(23) < len(text) for text in texts]).astype(np.int64))
    rows = torch.from_numpy(np.array([np.pad(text, (0, 23 - len(text))) for text in texts]))
    with reference_arithmetic(model):
        found = streams(model, rows, mask)
        logits_found = answers(model, rows, mask)
    for i, text in enumerate(texts):
        expected = {}
        logits = forward(
            compiled.config,
            compiled.weights,
            text,
            linear=compiled.linear,
            trace=expected.__setitem__,
            steps=compiled.steps,
        )
        np.testing.assert_array_equal(compiled.logits(text), logits)
        for layer in range(3):
            np.testing.assert_array_equal(found[layer, i, : len(text)], expected[f"layers.{layer}.out"])
        # A head of floats is summed as a table of floats is: all is the same.
        np.testing.assert_array_equal(logits_found[i, : len(text)], logits)
    # The program's own roundings are others: else this test would show nothing.
    different = np.count_nonzero(found != streams(model, rows, mask))
    assert different > 0.01 * found.size


def test_long_texts_are_computed_in_pieces(tmp_path, monkeypatch):
    model = build("Llama", max_position_embeddings=128)
    rows = torch.from_numpy(np.random.default_rng(1).integers(0, 101, (1, 70)))
    with reference_arithmetic(model):
        whole = streams(model, rows, torch.ones_like(rows))
        monkeypatch.setattr("bitnet_ref.distill.exact._CELLS", 20_000)
        np.testing.assert_array_equal(streams(model, rows, torch.ones_like(rows)), whole)


@pytest.mark.parametrize("kind", students.KINDS)
def test_the_model_is_afterwards_what_it_was(kind):
    model = build(kind)
    before = students.logits(model)
    with pytest.raises(RuntimeError, match="inside"), reference_arithmetic(model):
        assert not np.array_equal(students.logits(model), before)
        raise RuntimeError("inside")
    np.testing.assert_array_equal(students.logits(model), before)
    assert all("forward" not in vars(module) for module in model.modules())


def test_an_activation_without_a_reference_is_refused():
    model = students.build("Llama", hidden_act="gelu")
    with pytest.raises(ValueError, match="must be"), reference_arithmetic(model):
        pass
