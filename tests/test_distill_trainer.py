"""The trainer: losses where they are counted, resumption after a kill, several processes, and what goes wrong."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra [distill]: no torch here")
transformers = pytest.importorskip("transformers")

from bitnet_ref.distill import bitlinear, objective, student, trainer  # noqa: E402
from bitnet_ref.distill import losses as losses_module  # noqa: E402  (they import torch)
from bitnet_ref.distill.config import Losses, Training  # noqa: E402
from bitnet_ref.distill.teacher_cache import LiveTeacher, TeacherCache  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KINDS = {"Llama": "LlamaConfig", "Qwen2": "Qwen2Config", "Qwen3": "Qwen3Config", "Gemma3": "Gemma3TextConfig"}
TRAINING = Training(steps=8, batch=4, learning_rate=3e-3, autocast="float32", save_every=3, warm_up=0.25)


def build(kind="Llama", seed=1, ternary=False, **keys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 calls a function that it has deprecated itself
        sizes = {key: value for key, value in (SIZES | keys).items() if kind != "Qwen2" or key != "head_dim"}
        config = getattr(transformers, KINDS[kind])(**sizes)
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    if ternary:
        student.insert_subln(model)
        student.ternarise(model)
    return model.eval()


def batch(step, rows=4, scored=3):
    """Rows of different lengths, padded on the right; the last `scored` tokens of each are labels."""
    rng = np.random.default_rng([5, step])
    lengths = rng.integers(6, 12, rows)
    ids = rng.integers(1, 61, (rows, 12))
    mask = (np.arange(12) < lengths[:, None]).astype(np.int64)
    behind = np.arange(12) >= lengths[:, None] - scored
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": np.where(behind & (mask > 0), ids, -100)}


def tensors(part):
    return {name: torch.from_numpy(value) for name, value in part.items()}


def distillation(losses=None, seed=1):
    losses = losses or Losses(gamma=100.0, heads=2)
    return objective.Distillation(build(seed=seed, ternary=True), live(losses), losses)


def live(losses, model=None):
    layer = losses.layer if losses.teacher_layer is None else losses.teacher_layer
    scored = objective.Scored(model or build(seed=7)).requires_grad_(False)
    layer = layer if losses.gamma else None
    return LiveTeacher(scored, layer, after_rope=losses.after_rope, hidden=losses.hidden > 0)


def run(folder, training=TRAINING, made=None, **options):
    options = {"stage": "test", "identity": "one", "quiet": True} | options
    return trainer.train(made or distillation(), training, options.pop("batches", batch), folder, **options)


def rows(folder):
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in found if "event" not in row]


def curve(folder):
    return [(row["step"], row["loss"], row["ce"], row["ld"], row["ad"], row["gradient_norm"]) for row in rows(folder)]


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over threads could be split in another way from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)  # training turns it on for the process


# What is computed.


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_positions_are_those_of_the_whole_model(kind):
    model, part = build(kind), tensors(batch(0))
    positions = objective.label_positions(part["labels"])
    with torch.no_grad():
        got = objective.Scored(model)(part["input_ids"], part["attention_mask"], positions)
        whole = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
    assert got.shape == (12, 61)
    torch.testing.assert_close(got, whole[positions])


def test_the_cap_of_logits_is_kept():
    model, part = build("Gemma3", final_logit_softcapping=0.5), tensors(batch(0))
    positions = objective.label_positions(part["labels"])
    with torch.no_grad():
        got = objective.Scored(model)(part["input_ids"], part["attention_mask"], positions)
        whole = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
    assert got.abs().max() < 0.5
    torch.testing.assert_close(got, whole[positions])


def test_language_modelling_is_the_loss_of_all_logits():
    model, part = build(), batch(1)
    got = objective.LanguageModelling(model)(**tensors(part), counts=trainer.Counts.of(part))["loss"]
    whole = model(
        input_ids=torch.from_numpy(part["input_ids"]), attention_mask=torch.from_numpy(part["attention_mask"])
    )
    torch.testing.assert_close(got, losses_module.causal_lm_loss(whole.logits, torch.from_numpy(part["labels"])))


@pytest.mark.parametrize("positions", ["labels", "tokens"])
def test_distillation_is_the_sum_of_its_losses_over_all_logits(positions):
    losses = Losses(lambda_=3.0, gamma=7.0, hidden=5.0, tau=2.0, heads=2, positions=positions, layer=0, teacher_layer=1)
    made, part = distillation(losses), batch(2)
    got = made(**tensors(part), counts=trainer.Counts.of(part))
    ids, mask, labels = tensors(part).values()
    pupil, teacher = made.scored.model, made._teacher._scored.model
    with (
        student.capture_qkv(pupil, 0) as q,
        student.capture_qkv(teacher, 1) as p,
        student.capture_hidden(pupil) as s,
        student.capture_hidden(teacher) as h,
        torch.no_grad(),
    ):
        ours, theirs = (m(input_ids=ids, attention_mask=mask).logits for m in (pupil, teacher))
        where = mask.bool() if positions == "tokens" else objective.label_positions(labels)
        expected = {
            "ce": losses_module.causal_lm_loss(ours, labels),
            "ld": losses_module.logits_loss(ours, theirs, where, tau=2.0),
            "ad": losses_module.attention_relation_loss(tuple(q), tuple(p), mask.bool(), heads=2),
            "hd": losses_module.hidden_state_loss(s, h, mask.bool()),
        }
    expected["loss"] = expected["ce"] + 3 * expected["ld"] + 7 * expected["ad"] + 5 * expected["hd"]
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
    made.close()
    assert not pupil.model.layers[0].self_attn.v_proj._forward_hooks and not pupil.model.layers[0]._forward_hooks


def test_a_student_that_is_the_teacher_has_no_distillation_loss():
    losses = Losses(heads=2, hidden=1.0)
    made, part = objective.Distillation(build(), live(losses, build()), losses), batch(3)
    got = made(**tensors(part), counts=trainer.Counts.of(part))
    assert abs(got["ld"]) < 1e-6 and abs(got["ad"]) < 1e-6 and got["hd"] == 0 and got["ce"] > 1


def test_a_loss_without_weight_is_not_computed():
    part = batch(3)
    for losses, names in (
        (Losses(lambda_=0.0, heads=2), {"loss", "ce", "ad"}),
        (Losses(gamma=0.0), {"loss", "ce", "ld"}),
        (Losses(lambda_=0.0, gamma=0.0), {"loss", "ce"}),
        (Losses(lambda_=0.0, gamma=0.0, hidden=1.0), {"loss", "ce", "hd"}),
    ):
        assert set(distillation(losses)(**tensors(part), counts=trainer.Counts.of(part))) == names


def test_rows_without_a_label_are_compared_at_their_last_token():
    part = batch(4)
    part["labels"][1:] = -100
    found = objective.answer_positions(torch.from_numpy(part["attention_mask"]), torch.from_numpy(part["labels"]))
    ends = part["attention_mask"].sum(1) - 1
    assert found.sum() == trainer.Counts.of(part).answers == 3 + 3
    assert [found[i].nonzero().item() for i in (1, 2, 3)] == ends[1:].tolist()
    made = distillation(Losses(gamma=0.0))
    part["labels"][:] = -100
    got = made(**tensors(part), counts=trainer.Counts.of(part))
    assert got["ce"] == 0 and got["ld"] > 0 and torch.isfinite(got["loss"])


@pytest.mark.parametrize("positions, top_k", [("labels", 0), ("tokens", 0), ("labels", 60 - 2)])
def test_a_cached_teacher_says_the_same(tmp_path, positions, top_k):
    """Up to its float16; with 3 of 61 logits lumped, the divergence is a little less, never more."""
    losses = Losses(lambda_=3.0, gamma=7.0, heads=2, positions=positions)
    part = batch(2)
    teacher = live(losses)
    cut = [(ids[mask > 0], labels[mask > 0]) for ids, mask, labels in zip(*part.values(), strict=True)]

    def where(mask, labels):
        return objective.compared_positions(losses, mask, labels)

    cached = TeacherCache(tmp_path, teacher, cut, where, top_k=top_k)
    pupil = build(ternary=True)
    counts = trainer.Counts.of(part)
    expected = objective.Distillation(pupil, teacher, losses)(**tensors(part), counts=counts)
    got = objective.Distillation(pupil, cached, losses)(**tensors(part), counts=counts)
    torch.testing.assert_close(got["ad"], expected["ad"], rtol=2e-3, atol=1e-6)
    assert got["ce"] == expected["ce"] and got["ad"] != expected["ad"]
    if top_k:
        assert 0.95 * expected["ld"] < got["ld"] < expected["ld"]
    else:
        torch.testing.assert_close(got["ld"], expected["ld"], rtol=2e-3, atol=1e-6)


def test_learning_rates_by_hand():
    training = Training(steps=10, learning_rate=1.0, warm_up=0.2)
    rates = [trainer.learning_rate(step, training) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5) and rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    linear = replace(training, schedule="linear")
    assert [trainer.learning_rate(s, linear) for s in (2, 6, 9)] == pytest.approx([1.0, 0.5, 0.125])
    assert trainer.learning_rate(9, replace(training, schedule="constant")) == 1.0
    assert trainer.learning_rate(0, replace(training, warm_up=0.0)) == 1.0


def test_quantisation_rises_and_is_whole_where_it_counts(tmp_path):
    """Over half of eight steps; evaluations, and the model afterwards, are fully quantised."""
    training = replace(TRAINING, quantize_over=0.5, evaluate_every=2)
    assert [trainer.quantize_strength(step, training) for step in range(8)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert trainer.quantize_strength(0, TRAINING) == 1
    made, seen = distillation(), []
    layers = [m for m in made.scored.model.modules() if isinstance(m, bitlinear.BitLinear)]

    def evaluate():
        seen.append({layer.strength for layer in layers})
        return {"score": 0.0}

    plain = run(tmp_path / "plain", made=distillation())
    run(tmp_path / "rising", training, made=made, evaluate=evaluate)
    assert seen == [{1.0}] * 4 and {layer.strength for layer in layers} == {1.0}
    first = [next(r["loss"] for r in rows(tmp_path / name)) for name in ("plain", "rising")]
    assert plain.step == 8 and first[0] != first[1]


def test_only_matrices_decay():
    made = trainer.make_optimizer(build(ternary=True), replace(TRAINING, weight_decay=0.5))
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in made.param_groups] == [
        (0.5, {2}),
        (0.0, {1}),
    ]


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_vectors_alone_can_be_trained(tmp_path, kind):
    """Gains (of Qwen2 also biases) move; matrices stay to the bit, and can be trained afterwards."""
    model = build(kind, ternary=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = objective.Distillation(model, live(Losses(gamma=0.0)), Losses(gamma=0.0))
    run(tmp_path, replace(TRAINING, trained="vectors", learning_rate=2e-2), made, batches=lambda step: batch(0))
    after = dict(model.named_parameters())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in before.items() if p.ndim == 1} and any("norm" in name for name in moved)
    assert any(name.endswith("bias") for name in moved) == (kind == "Qwen2")
    assert all(p.requires_grad for p in after.values())
    assert rows(tmp_path)[-1]["loss"] < rows(tmp_path)[0]["loss"]


def test_vectors_alone_go_on_after_a_stop(tmp_path):
    """Matrices come from the checkpoint, though no optimizer has moved them."""
    training = replace(TRAINING, trained="vectors")
    run(tmp_path / "whole", training)

    def stop(step):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", training, watch=stop)
    run(tmp_path / "stopped", training, made=distillation(seed=3))
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


def test_training_lowers_every_loss(tmp_path):
    result = run(tmp_path, replace(TRAINING, steps=40), batches=lambda step: batch(0))
    first, last = rows(tmp_path)[0], rows(tmp_path)[-1]
    # A teacher of random weights knows nothing of the labels, so cross-entropy and logits pull apart.
    assert all(last[name] < 0.8 * first[name] for name in ("loss", "ce", "ad")), (first, last)
    assert result.step == 40 and result.best_step == 40 and result.tokens == 40 * batch(0)["attention_mask"].sum()


def test_parts_of_a_batch_add_up(tmp_path):
    """The same losses and weights up to the order of float32 sums; parts have labels and padding of unlike number."""
    whole, parts = distillation(), distillation()
    run(tmp_path / "a", made=whole)
    run(tmp_path / "b", replace(TRAINING, accumulation=2), made=parts)
    np.testing.assert_allclose(curve(tmp_path / "a"), curve(tmp_path / "b"), rtol=1e-4)
    assert curve(tmp_path / "a") != curve(tmp_path / "b")  # or nothing was cut
    with pytest.raises(ValueError, match="divide evenly among processes and accumulated parts, got 4 rows for 1 x 3"):
        run(tmp_path / "c", replace(TRAINING, accumulation=3))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """Nor while quantisation rises: what is computed again is computed at the same strength."""
    training = replace(TRAINING, quantize_over=0.75)
    run(tmp_path / "a", training)
    run(tmp_path / "b", replace(training, gradient_checkpointing=True))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_autocast_is_near_float32(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", replace(TRAINING, autocast="bfloat16"))
    a, b = curve(tmp_path / "a")[0], curve(tmp_path / "b")[0]
    assert a != b
    np.testing.assert_allclose(a[1:4], b[1:4], rtol=0.03)  # bfloat16 has 8 bits


@pytest.mark.parametrize(
    ("flags", "expected"), [((), False), (("avx2", "f16c"), False), (("avx512_bf16",), True), (("bf16",), True)]
)
def test_bfloat16_is_for_processors_that_have_it(monkeypatch, flags, expected):
    monkeypatch.setattr(trainer, "_processor_flags", lambda: frozenset(flags))
    devices = trainer.Devices(torch.device("cpu"))
    assert devices.uses_bfloat16(replace(TRAINING, autocast="auto")) == expected
    assert devices.uses_bfloat16(replace(TRAINING, autocast="bfloat16"))
    assert not devices.uses_bfloat16(replace(TRAINING, autocast="float32"))


def test_progress_in_a_file_is_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    run(tmp_path / "a", TRAINING, quiet=False)
    assert capsys.readouterr().err == ""  # less than a minute
    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_LINES", 0)
    run(tmp_path / "b", TRAINING, quiet=False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == TRAINING.steps
    for i, line in enumerate(lines):
        assert re.fullmatch(rf"test: step {i + 1} of 8, loss [\d.]+, [\d,]+ tokens/s, \d+ min left", line)
    run(tmp_path / "c", TRAINING)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("able", [True, False])
def test_bfloat16_is_for_gpus_that_have_it(monkeypatch, able):
    def supported(including_emulation=True):
        return able or including_emulation  # as PyTorch answers for a GPU that would emulate it

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(trainer, "_processor_flags", lambda: pytest.fail("the processor does not count"))
    devices = trainer.Devices(torch.device("cuda"))
    assert devices.uses_bfloat16(replace(TRAINING, autocast="auto")) == able


# Resumption.


def kill_at(folder, step):
    """Train in another process that is killed once `step` steps are done."""
    program = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[3])\n"
        "import torch; torch.set_num_threads(1)\n"
        "import test_distill_trainer as t\n"
        "def watch(step):\n"
        "    if step == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "made = t.distillation()\n"
        "t.run(sys.argv[1], t.EVALUATED, made=made, evaluate=t.evaluation(made), watch=watch)"
    )
    arguments = [str(folder), str(step), str(Path(__file__).parent)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


EVALUATED = replace(TRAINING, evaluate_every=2, quantize_over=0.5)


def evaluation(made):
    """Minus the loss on a batch, which falls and rises; best is not last."""
    part = batch(99)

    def evaluate():
        with torch.no_grad():
            return {"score": -float(made(**tensors(part), counts=trainer.Counts.of(part))["ce"])}

    return evaluate


def test_a_killed_run_goes_on_to_the_same_losses(tmp_path):
    """Killed before the first checkpoint and between two; steps 3 and 6 are saved."""
    whole = distillation()
    expected = run(tmp_path / "whole", EVALUATED, made=whole, evaluate=evaluation(whole))
    for step in (2, 5):
        kill_at(tmp_path / "killed", step)
    again = distillation(seed=3)  # what is not in the checkpoint must not matter
    result = run(tmp_path / "killed", EVALUATED, made=again, evaluate=evaluation(again))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, 9))
    assert (result.step, result.best_step, result.score) == (expected.step, expected.best_step, expected.score)
    for name, value in whole.scored.model.named_parameters():
        assert torch.equal(value, again.scored.model.get_parameter(name)), name
    assert not list((tmp_path / "killed").glob(".*"))


def test_best_weights_are_kept_and_patience_ends_a_run(tmp_path):
    """Step 4 is the best of 2, 4, 6 and 8; with patience 2 nothing follows 8."""
    made, seen = distillation(), {}

    def evaluate():
        step = 2 * len(seen) + 2
        seen[step] = {name: p.detach().clone() for name, p in made.scored.model.named_parameters()}
        return {"score": {2: 0.5, 4: 0.9, 6: 0.9, 8: 0.1}[step]}

    result = run(tmp_path, replace(TRAINING, steps=20, evaluate_every=2, patience=2), made=made, evaluate=evaluate)
    assert (result.step, result.best_step, result.score, result.stopped_early) == (8, 4, 0.9, True)
    assert all(torch.equal(p, seen[4][name]) for name, p in made.scored.model.named_parameters())
    # Asked again, it stays as it is.
    again = run(tmp_path, replace(TRAINING, steps=20, evaluate_every=2, patience=2), evaluate=evaluate)
    assert (again.step, again.best_step, again.stopped_early) == (8, 4, True) and len(seen) == 4


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    run(tmp_path, replace(TRAINING, steps=3))
    before = (tmp_path / "last.safetensors").read_bytes()
    with pytest.raises(ValueError, match="must be of this configuration, data and model to go on from") as caught:
        run(tmp_path, identity="two")
    assert str(caught.value).count(".safetensors") == 1
    assert (tmp_path / "last.safetensors").read_bytes() == before
    (tmp_path / "last.safetensors").write_bytes(before[:100])
    with pytest.raises(ValueError, match="must be a checkpoint of this program"):
        run(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    trainer.save_weights(tmp_path / "w", build(), {})
    with pytest.raises(ValueError, match="must have the parameters of this model"):
        trainer.load_weights(tmp_path / "w", build(ternary=True))
    with pytest.raises(ValueError, match=r"has shape \(61, 32\) there and \(62, 32\) here"):
        trainer.load_weights(tmp_path / "w", build(vocab_size=62))


# What goes wrong.


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    made = distillation()

    def batches(step):
        if step == 4:
            with torch.no_grad():
                made.scored.model.model.norm.weight.fill_(math.nan)
        return batch(step)

    message = r"the \w+ is nan at step 5 of stage test; the checkpoint of step 3 is kept in"
    with pytest.raises(trainer.Diverged, match=message):
        run(tmp_path, made=made, batches=batches)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    run(tmp_path)  # the checkpoint is good
    run(tmp_path / "whole")
    assert curve(tmp_path) == curve(tmp_path / "whole")


def test_a_gradient_that_overflows_stops_before_the_weights_change(tmp_path):
    made = distillation()
    before = {name: p.detach().clone() for name, p in made.scored.model.named_parameters()}
    made.scored.model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(
        trainer.Diverged, match=r"norm of the gradient is (inf|nan) at step 1 .* there is no checkpoint"
    ):
        run(tmp_path, made=made)
    assert all(torch.equal(p, before[name]) for name, p in made.scored.model.named_parameters())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    save = trainer.save_file

    def full(tensors, path, metadata):
        if metadata and json.loads(metadata["about"])["step"] == 6:
            save(tensors, path, metadata=metadata)
            Path("/dev/full").write_bytes(b"x")  # OSError: No space left on device
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(OSError, match=r"of step 6 must be written .*No space left.*; the checkpoint of step 3 is kept"):
        run(tmp_path)
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    run(tmp_path)
    run(tmp_path / "whole")
    assert curve(tmp_path) == curve(tmp_path / "whole")


# Several processes.

PROGRAM = """
import sys; sys.path.insert(0, sys.argv[2])
import torch; torch.set_num_threads(1)
import test_distill_trainer as t
from dataclasses import replace
from bitnet_ref.distill.trainer import Devices, save_weights
devices = Devices.start()
for steps in (5, 8):  # the second goes on from the checkpoint of the first
    made = t.distillation(seed=1 if steps == 5 else 4)
    rising = 2 / steps  # two steps of rising quantisation in both
    training = replace(t.TRAINING, schedule="constant", warm_up=0.0, steps=steps, accumulation=2, quantize_over=rising)
    training = replace(training, trained=sys.argv[3])
    t.run(sys.argv[1], training, made=made, devices=devices)
"""


@pytest.mark.parametrize("trained", ["all", "vectors"])
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_have_the_losses_of_one(tmp_path, sharding, trained):
    """The same global batches: DDP and FSDP, two rows each, one at a time, up to the order of float32 sums."""
    script = tmp_path / "script.py"
    script.write_text(PROGRAM, encoding="utf-8")
    # --multi_gpu is how accelerate's launcher names several local processes; without a GPU they talk by gloo.
    how = ["--use_fsdp", "--fsdp_version", "2"] if sharding == "full" else ["--multi_gpu"]
    how += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *how, "--main_process_port", "0"]
    arguments = [str(script), str(tmp_path / "two"), str(Path(__file__).parent), trained]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    run(tmp_path / "one", replace(TRAINING, schedule="constant", warm_up=0.0, quantize_over=0.25, trained=trained))
    # Adam divides by the root of the second moment, so where a gradient is near nothing its rounding counts.
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    starts = [(row["step"], row["processes"], row["sharding"]) for row in lines if row.get("event") == "start"]
    assert starts == [(0, 2, sharding), (5, 2, sharding)]
