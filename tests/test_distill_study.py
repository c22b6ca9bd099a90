"""The study of small models, cut down to seconds: every model is trained, and what the figures read is there."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from bitnet_ref.cli import main

torch = pytest.importorskip("torch", reason="training needs the extra [distill]: no torch here")
pytest.importorskip("transformers", reason="training needs the extra [distill]: no transformers here")

from bitnet_ref.distill import study  # noqa: E402
from bitnet_ref.distill.config import Training  # noqa: E402
from bitnet_ref.distill.trainer import Devices  # noqa: E402


def test_every_model_learns_and_is_recorded(tmp_path, monkeypatch):
    words = [f"{a}{b}{c}" for a in "bcdfghjklmnprst" for b in "aeiou" for c in "nmrstlkdg"]
    draw = np.random.default_rng(0)
    for name in study.TEXTS:
        text = "\n\n".join(" ".join(draw.choice(words[:300], 60)) + "." for _ in range(400))
        (tmp_path / name).write_text(text)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    monkeypatch.setattr(study, "SIZES", study.SIZES | sizes | {"vocab_size": 400})
    out = tmp_path / "study.json"
    arguments = ["distill", "study", "--texts", str(tmp_path), "--out", str(out), "--steps", "20", "--seeds", "1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    made = json.loads(out.read_text())
    assert [row["model"] for row in made["scratch"]] == list(study.KINDS)
    assert [row["subln"] for row in made["continued"]] == [True, False]
    for row in made["scratch"] + made["continued"]:
        assert row["curve"]["loss"][-1] < row["curve"]["loss"][0]
    flips = np.array(made["scratch"][1]["curve"]["flips"])
    assert flips.shape == (2, 7) and 0 < flips.max() < 1
    counts = [sum(row[key]) for row in made["continued"] for key in ("histogram_before", "histogram_after")]
    assert counts == [4 * 32 * 32 + 3 * 32 * 48] * 4  # q, k, v and o are square with two heads and two key/value heads
    assert made["record"]["command"].startswith("bitnet-ref distill study")
    able = Devices(torch.device("cpu")).uses_bfloat16(Training())
    assert made["settings"]["autocast"] == ("bfloat16" if able else "float32")
