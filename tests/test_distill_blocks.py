"""Blocks of a student trained one by one: what a block sees alone, what changes, and runs that stop and go on."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitnet_ref.reference import losses as reference

torch = pytest.importorskip("torch", reason="training needs the extra [distill]: no torch here")
pytest.importorskip("transformers", reason="training needs the extra [distill]: no transformers here")

import test_distill_student as students  # noqa: E402
from test_distill_trainer import one_thread  # noqa: E402, F401  (used by every test)

from bitnet_ref.distill import blocks, student, trainer  # noqa: E402
from bitnet_ref.distill.config import Blocks, parse_config  # noqa: E402

SETTINGS = Blocks(steps=12, batch=4, learning_rate=5e-3, autocast="float32", save_every=5, warm_up=0.1)


def batch(i, rows=4, length=9):
    """Rows of different lengths, padded on the right; made of little more than ten tokens, so that much repeats."""
    random = np.random.default_rng(i)
    mask = np.ones((rows, length), np.int64)
    mask[1, 6:] = 0
    ids = random.integers(0, 12, (rows, length)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": np.full_like(ids, -100)}


BATCHES = [batch(i) for i in range(20)]


def pair(kind="Llama"):
    """A teacher, and a student made of it."""
    teacher = students.build(kind)
    made = students.build(kind)
    student.insert_subln(made)
    student.ternarise(made)
    return made, teacher.requires_grad_(False)


def run(folder, made=None, settings=SETTINGS, identity="x", **options):
    one, teacher = made or pair()
    options = {"stage": "blocks", "quiet": True, "devices": trainer.Devices(torch.device("cpu"))} | options
    return blocks.train_blocks(one, teacher, settings, BATCHES, folder, identity=identity, **options)


def curves(folder):
    """The losses of every block."""
    found = []
    for path in sorted(Path(folder).glob("block-*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found.append([row["loss"] for row in lines if "loss" in row])
    return found


@pytest.mark.parametrize("kind", students.KINDS)
def test_blocks_alone_one_after_the_other_are_the_model(kind):
    """To the bit, with padding; in Gemma 3 with layers of both kinds of attention, each with its own rotation."""
    keys = {}
    if kind == "Gemma3":
        keys = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}
    model = students.build(kind, **keys)
    ids, mask = (torch.from_numpy(BATCHES[0][name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad(), student.capture_hidden(model) as hidden:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        x = model.model.embed_tokens(ids)
        for i, expected in enumerate(hidden):
            x = blocks.BlockAlone(model, i)(x, mask)
            assert torch.equal(x, expected), i
    assert [name for name, _ in blocks.BlockAlone(model, 1).named_parameters()] == [
        f"model.{name}" for name, _ in model.model.layers[1].named_parameters()
    ]
    assert len(model.model.layers) == 3 and not isinstance(model.model.norm, torch.nn.Identity)


def test_the_loss_is_that_of_the_reference_over_tokens_that_are_no_padding():
    one, _ = pair()
    alone, random = blocks.BlockAlone(one, 1), np.random.default_rng(1)
    stream, target = (random.standard_normal((4, 9, 48)).astype(np.float32) for _ in range(2))
    part = {**BATCHES[3], "stream": stream, "target": target}
    counts = trainer.Counts.of(part)
    found = blocks.BlockReconstruction(alone)(
        **{name: torch.from_numpy(value) for name, value in part.items()}, counts=counts
    )
    output = alone(torch.from_numpy(stream), torch.from_numpy(part["attention_mask"])).detach().numpy()
    expected = reference.hidden_state_loss([output], [target], part["attention_mask"].astype(bool))
    assert found["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_only_blocks_change_and_they_come_nearer_to_the_teacher(tmp_path):
    one, teacher = pair()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    same = {name: value.clone() for name, value in teacher.state_dict().items()}
    said = []
    result, errors = run(tmp_path, (one, teacher), say=said.append)
    changed = {name for name, value in one.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("model.layers.")}
    assert all(torch.equal(value, same[name]) for name, value in teacher.state_dict().items())
    assert all(row["after"] < row["before"] for row in errors) and len(errors) == 3
    assert result.step == 3 * 12 and result.score == -errors[-1]["after"]
    assert result.tokens == 3 * 12 * int(BATCHES[0]["attention_mask"].sum())
    assert "error" in said[-1] and len(said) == 4
    # What was measured last is what the whole student is behind its last block, on the held-out batches.
    total, n = 0.0, 0
    for i in (0, 16):
        ids, mask = (torch.from_numpy(BATCHES[i][name]) for name in ("input_ids", "attention_mask"))
        with torch.no_grad(), student.capture_hidden(one) as ours, student.capture_hidden(teacher) as theirs:
            for model in (one, teacher):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            total += reference.hidden_state_loss(
                [ours[-1].numpy()], [theirs[-1].numpy()], mask.numpy().astype(bool)
            ) * int(mask.sum())
        n += int(mask.sum())
    assert errors[-1]["after"] == pytest.approx(total / n, rel=1e-5)


def test_what_measures_the_error_is_not_trained_on(tmp_path, monkeypatch):
    """Held-out batches of other tokens change errors, and no weight."""
    one, _ = first = pair()
    run(tmp_path / "a", first)
    changed = list(BATCHES)
    changed[0] = batch(77)
    monkeypatch.setattr(sys.modules[__name__], "BATCHES", changed)
    other, _ = second = pair()
    run(tmp_path / "b", second)
    assert curves(tmp_path / "a") == curves(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


KILLED = """
import os, signal, sys; sys.path.insert(0, sys.argv[2])
import torch; torch.set_num_threads(1)
import test_distill_blocks as t
from bitnet_ref.distill import trainer
block, step = map(int, sys.argv[3:])
advance = trainer._Run.advance
def dying(self, *arguments):
    advance(self, *arguments)
    if f"block {block} of" in self.stage and self.step == step:
        os.kill(os.getpid(), signal.SIGKILL)
trainer._Run.advance = dying
t.run(sys.argv[1])
"""


def test_a_killed_run_goes_on_to_the_same_losses(tmp_path):
    """Killed in the second block behind a checkpoint, and in the third before one."""
    whole, _ = first = pair()
    expected, errors = run(tmp_path / "whole", first)
    for block, step in ((2, 7), (3, 2)):
        words = [str(tmp_path / "killed"), str(Path(__file__).parent), str(block), str(step)]
        done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True, timeout=300)
        assert done.returncode == -9, done.stderr
    again, _ = second = pair()
    result, found = run(tmp_path / "killed", second)
    assert curves(tmp_path / "killed") == curves(tmp_path / "whole")
    assert found == errors and replace(result, seconds=0.0) == replace(expected, seconds=0.0)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    names = {path.name for path in (tmp_path / "killed" / "block-00").iterdir()}
    assert names == {"metrics.jsonl", "weights.safetensors"}


TWO = """
import sys; sys.path.insert(0, sys.argv[2])
import torch; torch.set_num_threads(1)
import test_distill_blocks as t
from bitnet_ref.distill.trainer import Devices
t.run(sys.argv[1], devices=Devices.start())
"""


def test_two_processes_have_the_losses_of_one(tmp_path):
    """DDP, two rows of each batch each, up to the order of float32 sums."""
    (tmp_path / "script.py").write_text(TWO, encoding="utf-8")
    how = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    how += ["--dynamo_backend", "no", "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *how]
    words = [str(tmp_path / "script.py"), str(tmp_path / "two"), str(Path(__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    run(tmp_path / "one")
    # Adam divides by the root of the second moment, so where a gradient is near nothing its rounding counts.
    np.testing.assert_allclose(curves(tmp_path / "two"), curves(tmp_path / "one"), rtol=1e-2)


def test_blocks_of_another_configuration_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"block-00/weights.safetensors must be of this configuration"):
        run(tmp_path, identity="y")


def test_what_does_not_fit_is_refused(tmp_path):
    one, teacher = pair()
    with pytest.raises(ValueError, match="as many blocks of one width, got 3 blocks of 48 and 2 of 48"):
        run(tmp_path, (one, students.build("Llama", num_hidden_layers=2)))
    with pytest.raises(ValueError, match="without FSDP"):
        run(tmp_path, devices=trainer.Devices(torch.device("cpu"), sharding="full"))
    with pytest.raises(ValueError, match="at least 2 batches, one of them to measure the error, got 1"):
        blocks.train_blocks(one, teacher, SETTINGS, BATCHES[:1], tmp_path, stage="blocks", identity="x")
    raw = {"name": "x", "data": {}, "model": {"family": "Llama", "tokenizer": "synthetic"}}
    with pytest.raises(ValueError, match=r"blocks\.gradient_checkpointing must be false"):
        parse_config(raw | {"blocks": {"gradient_checkpointing": True}})
    with pytest.raises(ValueError, match=r"finish\.quantize_over must be 0.* got 0\.2"):
        parse_config(raw | {"finish": {"quantize_over": 0.2}})
    with pytest.raises(ValueError, match=r"blocks\.width is no key of a configuration; blocks has .* examples"):
        parse_config(raw | {"blocks": {"width": 3}})
