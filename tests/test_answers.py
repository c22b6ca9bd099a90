"""Answers of classifiers as a file, and the kernels' answers held to another program's."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import bitnet_ref
from bitnet_ref.cli import main
from bitnet_ref.errors import FormatError
from bitnet_ref.formats.answers import Answers, read_answers, write_answers
from bitnet_ref.reference.config import PRESETS
from bitnet_ref.runtime.classify import answer, compare_answers
from bitnet_ref.runtime.model import Model

CONFIG = dataclasses.replace(
    PRESETS["microsoft/bitnet-b1.58-2B-4T"],
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=96,
    vocabulary=120,
    context=32,
)


def answers(n=7, seed=0, **fields):
    rng = np.random.default_rng(seed)
    made = {
        "prompts": [rng.integers(0, 120, rng.integers(1, 20)).tolist() for _ in range(n)],
        "label_tokens": [5, 99, 17],
        "labels": ["a", "b", "c"],
        "logits": rng.standard_normal((n, 3)).astype(np.float32),
        "correct": rng.integers(-1, 3, n),
        "source": "drawn",
    }
    return Answers(**(made | fields))


def test_a_file_gives_back_what_was_written(tmp_path):
    written = answers()
    write_answers(written, tmp_path / "a.safetensors")
    read = read_answers(tmp_path / "a.safetensors")
    assert (read.prompts, read.label_tokens, read.labels) == (written.prompts, written.label_tokens, written.labels)
    np.testing.assert_array_equal(read.logits, written.logits)
    np.testing.assert_array_equal(read.correct, written.correct)
    assert read.source == "drawn" and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_accuracy_is_over_known_labels():
    made = answers(4, logits=np.eye(4, 3, dtype=np.float32), correct=np.array([0, 2, -1, 0]))
    np.testing.assert_array_equal(made.predicted, [0, 1, 2, 0])  # of the equal logits of the last prompt the first
    assert made.accuracy == pytest.approx(2 / 3)
    assert np.isnan(answers(correct=np.full(7, -1)).accuracy)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"labels": ["a", "b"]}, r"3 labels and 7 right ones, got \(7, 3\), 2"),
        ({"prompts": [[1]] * 6 + [[]]}, "at least one token"),
        ({"label_tokens": [5, 5, 17]}, "two different ones"),
        ({"correct": np.full(7, 3)}, r"right labels must be -1 or 0\.\.2"),
        ({"logits": np.full((7, 3), np.nan, np.float32)}, "finite"),
    ],
)
def test_answers_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        answers(**fields)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_answers(answers(), path)
    raw = path.read_bytes()
    for broken in (
        raw[:50],
        raw[:-4],
        raw.replace(b"answers/1", b"answers/9"),
        raw.replace(b'"lengths"', b'"lengthx"'),
    ):
        path.write_bytes(broken)
        with pytest.raises(FormatError, match=r"a\.safetensors"):
            read_answers(path)
    with pytest.raises(FileNotFoundError):
        read_answers(tmp_path / "none")


def test_kernels_answer_as_the_reference_and_the_comparison_counts():
    model = Model.random(CONFIG, 1, "base3", "f32", n_threads=1)
    asked = answers()
    reference = np.stack([model.reference_logits(p)[-1][asked.label_tokens] for p in asked.prompts])
    expected = dataclasses.replace(asked, logits=reference)
    got = answer(model, asked)
    np.testing.assert_array_equal(got.predicted, expected.predicted)
    agreement = compare_answers(expected, got)
    assert agreement.same_predictions == agreement.n_prompts == 7 and agreement.largest_difference < 1e-2
    assert agreement.accuracy == agreement.other_accuracy == expected.accuracy

    other = dataclasses.replace(expected, logits=-expected.logits)
    agreement = compare_answers(expected, other)
    assert agreement.same_predictions == 0 and agreement.differing == tuple(range(7))
    assert agreement.largest_difference > 0.5
    with pytest.raises(ValueError, match="same prompts"):
        compare_answers(expected, answers(seed=1))


def test_questions_that_the_model_cannot_take_are_refused():
    model = Model.random(CONFIG, 1, "base3", "f32", n_threads=1)
    with pytest.raises(ValueError, match=r"label tokens must lie in 0\.\.119, got \[5, 120, 17\]"):
        answer(model, answers(label_tokens=[5, 120, 17]))
    with pytest.raises(ValueError, match="context of this model is 32 tokens, a prompt has 33"):
        answer(model, answers(prompts=[[1]] * 6 + [[1] * 33]))


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    """The small model that the package has, and what its kernels answer."""
    path = Path(bitnet_ref.__file__).parent / "models" / "small" / "small-base3.safetensors"
    model = bitnet_ref.load(path, head="f16", n_threads=1)
    given = answer(model, answers())
    write_answers(given, tmp_path_factory.mktemp("answers") / "a")
    return path, given


def prove(model, asked, folder, *options):
    write_answers(asked, folder / "asked")
    return CliRunner().invoke(main, ["distill", "prove", str(model), str(folder / "asked"), *options])


def test_prove_says_how_well_the_kernels_agree(proven, tmp_path):
    path, given = proven
    result = prove(path, given, tmp_path, "--scheme", "i2", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) | {"accuracy": 0, "other_accuracy": 0} == {
        "n_prompts": 7,
        "same_predictions": 7,
        "largest_difference": 0.0,
        "median_difference": 0.0,
        "least_margin": json.loads(result.stdout)["least_margin"],
        "accuracy": 0,
        "other_accuracy": 0,
        "differing": [],
        "scheme": "i2",
        "head": "f16",
    }
    assert "7 of 7 predictions are the same" in prove(path, given, tmp_path).stdout


def test_prove_fails_where_an_answer_differs(proven, tmp_path):
    path, given = proven
    other = given.logits.copy()
    other[3] = -other[3]
    result = prove(path, dataclasses.replace(given, logits=other), tmp_path)
    assert result.exit_code == 1 and "predictions differ, the first at prompt 3" in result.stderr
    near = given.logits + np.float32(0.03) * np.ptp(given.logits) * np.eye(7, 3, dtype=np.float32)
    same = (near.argmax(1) == given.predicted).all()
    result = prove(path, dataclasses.replace(given, logits=near), tmp_path)
    assert result.exit_code == 1 and (not same or "logits must agree to 0.0, they differ by" in result.stderr)
    result = prove(path, dataclasses.replace(given, logits=near), tmp_path, "--bound", "0.05")
    assert result.exit_code == (0 if same else 1)
