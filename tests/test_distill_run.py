"""Whole runs of distillation through the command line: stages, resumption, tables, dry runs, and bad input."""

import json
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from bitnet_ref.cli import main

torch = pytest.importorskip("torch", reason="training needs the extra [distill]: no torch here")
transformers = pytest.importorskip("transformers")

from bitnet_ref import load, paper_figures  # noqa: E402
from bitnet_ref.distill import config as configs  # noqa: E402  (what follows imports torch)
from bitnet_ref.distill import models, stages, start, student  # noqa: E402
from bitnet_ref.distill import results as results_module  # noqa: E402
from bitnet_ref.errors import FormatError  # noqa: E402
from bitnet_ref.formats import open_checkpoint  # noqa: E402
from bitnet_ref.formats.answers import read_answers  # noqa: E402
from bitnet_ref.runtime import classify  # noqa: E402

TRAINED = ("teacher", "direct", "pretrain", "distill", "blocks", "finish")
SHORT = ["data.synthetic=400", "corpus.synthetic=400", "model.sizes.hidden_size=32", "model.sizes.intermediate_size=64"]
SHORT += [f"{stage}.{key}" for stage in TRAINED for key in ("steps=4", "batch=8")]
SHORT += [
    f"{stage}.{key}"
    for stage in ("teacher", "direct", "distill", "finish")
    for key in ("evaluate_every=2", "save_every=2")
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For all tests and fixtures here: the sums of another number of threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


STUDENTS = ("direct", "bitdistill", "blocks-ld", "blocks-distill")


def command(*arguments, settings=SHORT):
    words = ["distill", "run", *map(str, arguments), *(f"--set={text}" for text in settings)]
    return CliRunner().invoke(main, words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_thread):
    """Every stage for two seeds, four steps each."""
    out = tmp_path_factory.mktemp("run") / "out"
    done = command("tiny", "--out", out, "--stages", ",".join(configs.STAGES), "--seeds", "0,1")
    assert done.exit_code == 0, done.output
    return out, done


def test_every_stage_leaves_what_it_should(finished):
    out, done = finished
    for seed in (0, 1):
        assert sorted(p.name for p in (out / f"seed-{seed}").iterdir()) == sorted(configs.STAGES)
        for stage in configs.STAGES:
            files = {"result.json"} | ({"block-00", "block-01"} if stage == "blocks" else {"metrics.jsonl"})
            files |= {"weights.safetensors"} if stage in ("pretrain", "blocks") else set()
            files |= {"model"} if stage in stages.KEPT else set()
            files |= {"export", "answers.safetensors", "answers-float32.safetensors"} if stage in STUDENTS else set()
            assert {p.name for p in (out / f"seed-{seed}" / stage).iterdir()} == files, stage
    result = json.loads((out / "seed-1" / "bitdistill" / "result.json").read_text(encoding="utf-8"))
    assert result["step"] == 4 and result["seed"] == 1 and 0 <= result["test"]["accuracy"] <= 1
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert all(config[name]["autocast"] in ("bfloat16", "float32") for name in ("teacher", "blocks", "finish"))
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert record["commit"] and record["cpu"] and record["torch"] and record["splits_sha256"]
    assert "train" in (out / "splits.txt").read_text(encoding="utf-8")
    tables = json.loads((out / "tables.json").read_text(encoding="utf-8"))["tables"]
    assert [len(tables[key]["rows"]) for key in ("models", "stages", "starts", "losses")] == [3, 5, 6, 4]
    assert all(row["accuracy"]["n"] == 2 for row in tables["stages"]["rows"])
    assert "| attention relations |" in done.output


def test_results_have_curves_and_make_figures(finished):
    out, _ = finished
    results = json.loads((out / "tables.json").read_text(encoding="utf-8"))
    rows = {(row["stage"], row["seed"]): row for row in results["results"]}
    direct = rows["direct", 1]
    assert [row["step"] for row in direct["development"]] == [2, 4]
    assert direct["development"][-1]["tokens"] == direct["tokens"]
    assert [set(row) for row in rows["blocks", 0]["errors"]] == [{"before", "after"}] * 2
    assert "errors" not in direct and rows["blocks", 0]["development"] == []
    figure = paper_figures.load("fig_distill_blocks").draw(results)
    left, right = figure.axes
    _, after = left.get_lines()
    errors = [row["errors"] for (stage, _), row in rows.items() if stage == "blocks"]
    np.testing.assert_allclose(after.get_ydata(), np.mean([[b["after"] for b in e] for e in errors], 0))
    # Two blocks: a token in one of them counts half.
    for stage, label in (("blocks-ld", "blocks, then logits"), ("blocks-distill", "blocks, then both losses")):
        student = next(line for line in right.get_lines() if line.get_label() == label)
        work = [rows["blocks", s]["tokens"] / 2 + rows[stage, s]["development"][0]["tokens"] for s in (0, 1)]
        assert student.get_xdata()[0] == pytest.approx(np.mean(work) / 1e3)
        scores = [rows[stage, s]["development"][0]["score"] for s in (0, 1)]
        assert student.get_ydata()[0] == pytest.approx(100 * np.mean(scores))
    names = ("curves", "weights", "blocks")
    drawn = {path.name for path in (out / "figures").iterdir()}
    assert drawn == {"captions.md", *(f"{name}.{suffix}" for name in names for suffix in ("png", "pdf"))}
    captions = (out / "figures" / "captions.md").read_text(encoding="utf-8")
    assert all(f"({name}.png)\n\n{paper_figures.load(f'fig_distill_{name}').CAPTION}" in captions for name in names)


def test_losses_of_a_run_are_drawn(finished):
    out, _ = finished
    results = json.loads((out / "tables.json").read_text(encoding="utf-8"))
    rows = {(row["stage"], row["seed"]): row for row in results["results"]}
    for stage, columns in {
        "direct": {"step", "loss"},
        "pretrain": {"step", "loss"},
        "ct-ad": {"step", "loss", "ce", "ad"},
        "bitdistill": {"step", "loss", "ce", "ld", "ad"},
    }.items():
        assert set(rows[stage, 0]["training"]) == columns
        lines = (out / "seed-0" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [row for row in map(json.loads, lines) if "event" not in row]
        for column in columns:  # four steps are a point each
            np.testing.assert_allclose(rows[stage, 0]["training"][column], [row[column] for row in steps], rtol=1e-5)
    assert rows["blocks", 0]["training"] == {"step": []}
    text, labels, outputs, relations, scores = paper_figures.load("fig_distill_curves").draw(results).axes
    shown = [{line.get_label() for line in axes.get_lines()} for axes in (text, labels, outputs, relations, scores)]
    tasks = set(configs.STAGES) - {"pretrain", "blocks"}
    distilled = {"subln-distill", "bitdistill", "blocks-distill"}
    assert shown == [{"pretrain"}, tasks, distilled | {"ct-ld", "blocks-ld"}, distilled | {"ct-ad"}, tasks]
    drawn = next(line for line in labels.get_lines() if line.get_label() == "bitdistill").get_ydata()
    np.testing.assert_allclose(drawn, np.mean([rows["bitdistill", s]["training"]["ce"] for s in (0, 1)], 0))
    drawn = next(line for line in labels.get_lines() if line.get_label() == "direct").get_ydata()
    np.testing.assert_allclose(drawn, np.mean([rows["direct", s]["training"]["loss"] for s in (0, 1)], 0))


def test_long_curves_are_means(tmp_path):
    folder = tmp_path / "seed-0" / "direct"
    folder.mkdir(parents=True)
    result = {"stage": "direct", "seed": 0, "step": 120, "seconds": 1.0, "tokens": 120}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    lines = [{"event": "start", "step": 0, "steps": 150}]
    lines += [{"step": i + 1, "loss": float(i), "tokens": i + 1} for i in range(121)]  # it was stopped early
    lines.append({"event": "development", "step": 121, "score": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (row,) = results_module.collect(tmp_path)
    assert row["training"] == {"step": [*range(3, 121, 3), 121], "loss": [*(3 * i + 1.0 for i in range(40)), 120.0]}
    assert row["development"] == [{"step": 121, "tokens": 121, "score": 0.5}]


def result(stage, seed, steps, **keys):
    """Of a stage whose loss is its step, with a point and an evaluation every ten steps."""
    looks = [{"step": i, "tokens": 100 * i, "score": i / 1000} for i in range(10, steps + 1, 10)]
    points = list(range(10, steps + 1, 10))
    row = {"stage": stage, "seed": seed, "tokens": 100 * steps, "test": {"accuracy": 0.5}, "development": looks}
    return row | {"training": {"step": points, "loss": [float(i) for i in points]}} | keys


def test_figures_of_seeds_that_stopped_early_and_of_stages_that_serve_all():
    errors = [{"before": 0.5, "after": 0.1}] * 2
    rows = [result("direct", 0, 50), result("direct", 1, 30), result("teacher", 0, 40)]
    rows += [result("blocks", 0, 0, errors=errors, tokens=800), result("blocks-ld", 0, 20), result("blocks-ld", 1, 10)]
    curves = paper_figures.load("fig_distill_curves").draw({"results": rows})
    assert curves.get_suptitle() == "Training, 2 seeds"
    labels, _ = curves.axes
    (line,) = (line for line in labels.get_lines() if line.get_label() == "direct")
    assert line.get_xydata().tolist() == [[10, 10], [20, 20], [30, 30]]
    blocks = paper_figures.load("fig_distill_blocks")
    assert blocks.drawable({"results": rows})
    _, right = blocks.draw({"results": rows}).axes
    (line,) = (line for line in right.get_lines() if line.get_label() == "blocks, then logits")
    np.testing.assert_allclose(line.get_xydata(), [[(400 + 1000) / 1e3, 1]])
    # Summaries have no accuracy, and one seed is one.
    summaries = [row | {"test": {"average": 27.0}} for row in rows]
    assert not blocks.drawable({"results": summaries})
    assert paper_figures.load("fig_distill_curves").draw({"results": rows[2:3]}).get_suptitle() == "Training, 1 seed"


def test_tables_of_older_versions_have_no_figures():
    rows = [
        {"stage": stage, "seed": 0, "test": {"accuracy": 0.5}, "development": []} for stage in ("teacher", "direct")
    ]
    assert not any(paper_figures.load(name).drawable({"results": rows}) for name in paper_figures.DISTILL_FIGURES)


def test_weights_of_students_are_compared(finished):
    out, _ = finished
    results = json.loads((out / "tables.json").read_text(encoding="utf-8"))
    rows = {(row["stage"], row["seed"]): row for row in results["results"]}
    assert "weights" not in rows["teacher", 0]
    for stage in set(configs.STAGES) - {"teacher"}:
        weights = rows[stage, 1]["weights"]
        n = sum(weights["before"])
        assert sum(weights["after"]) == n and len(weights["layers"]) == 14, stage
        assert 0 < max(weights["changed"]) < 1, stage
    # The files of the student hold what its figures say.
    weights = rows["bitdistill", 1]["weights"]
    checkpoint = open_checkpoint(out / "seed-1" / "bitdistill" / "export" / "student.safetensors")
    for name, zeros in zip(weights["layers"], weights["zeros"], strict=True):
        assert zeros == pytest.approx(float((checkpoint[f"{name}.weight"].w_q == 0).mean()), abs=1e-6), name
    assert rows["bitdistill", 1]["weights"]["before"] == rows["pretrain", 1]["weights"]["after"]
    above, zeros, changed = paper_figures.load("fig_distill_weights").draw(results).axes
    # All seeds together.
    start = np.sum([rows["direct", s]["weights"]["before"] for s in (0, 1)], 0)
    np.testing.assert_allclose(above.patches[0].get_data().values, start / start.sum() / 0.1)
    share = start[25:35].sum() / start.sum()
    assert above.get_legend().get_texts()[0].get_text() == f"before direct: {100 * share:.1f} % zeros"
    assert [text.get_text().split(":")[0] for text in above.get_legend().get_texts()] == [
        "before direct",
        "direct",
        "continued pre-training",
        "BitDistill",
        "blocks one by one",
    ]
    assert changed.get_lines()[2].get_xdata().tolist() == [1, 2]
    line = changed.get_lines()[2].get_ydata()  # of bitdistill
    per_block = np.array([rows["bitdistill", s]["weights"]["changed"] for s in (0, 1)]).reshape(2, 2, 7).mean(2)
    np.testing.assert_allclose(line, per_block.mean(0))


def test_a_result_says_what_made_it(finished):
    out, _ = finished
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert record["seeds"] == [0, 1]
    for stage in ("blocks", "direct"):
        made = json.loads((out / "seed-1" / stage / "result.json").read_text(encoding="utf-8"))["made"]
        assert set(made) == {"finished", "commit", "cpu", "device", "threads", "processes", "torch"}
        assert made == {"finished": made["finished"]} | {key: record[key] for key in made if key != "finished"}
    finished_at = [
        json.loads((out / "seed-0" / stage / "result.json").read_text(encoding="utf-8"))["made"]["finished"]
        for stage in ("teacher", "direct", "pretrain", "bitdistill")
    ]
    assert finished_at == sorted(finished_at) and len(set(finished_at)) > 1


def test_students_differ_in_what_their_names_say(finished):
    out, _ = finished
    for stage, terms in {
        "subln-ct": set(),
        "ct-ld": {"ce", "ld"},
        "ct-ad": {"ce", "ad"},
        "bitdistill": {"ce", "ld", "ad"},
        "blocks-ce": set(),
        "blocks-ld": {"ce", "ld"},
        "blocks-distill": {"ce", "ld", "ad"},
    }.items():
        lines = (out / "seed-0" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert {"ce", "ld", "ad"} & set(json.loads(lines[1])) == terms, stage
    tensors = models.safe_open(out / "seed-0" / "direct" / "model" / "model.safetensors", "pt").keys()
    assert not any("sub_norm" in name for name in tensors)
    tensors = models.safe_open(out / "seed-0" / "bitdistill" / "model" / "model.safetensors", "pt").keys()
    assert sum("sub_norm" in name for name in tensors) == 4


def test_the_folders_run_on_the_kernels(finished):
    out, _ = finished
    teacher = load(out / "seed-0" / "teacher" / "model", head="f32", n_threads=1)
    assert teacher.logits(teacher.tokenizer.encode("the film was not dull , but i felt")).shape[1] > 256
    for stage in STUDENTS:
        folder = out / "seed-0" / stage
        expected = read_answers(folder / "answers.safetensors")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert len(expected.prompts) == result["test_examples"]
        # Batches of other lengths may sum in another order, and four steps leave predictions at the edge.
        assert expected.accuracy == pytest.approx(result["test"]["accuracy"], abs=0.05)
        for path in (folder / "export" / "student.safetensors", folder / "export" / "student-hf"):
            model = load(path, head="f32", n_threads=1)
            np.testing.assert_array_equal(classify.answer(model, expected).logits, expected.logits)
        # In PyTorch's own order of sums: float32 rounding, and seldom an activation at a tie (docs/model.md).
        own = read_answers(folder / "answers-float32.safetensors")
        assert classify.compare_answers(expected, own).median_difference < 1e-3


def test_a_finished_run_is_read_and_not_trained_again(finished):
    out, _ = finished
    before = {path: path.read_bytes() for path in out.glob("seed-*/*/*.json*")}
    assert len(before) == 2 * (2 * len(configs.STAGES) - 1)  # the metrics of blocks are one folder further down
    done = command("tiny", "--out", out, "--resume", "--seeds", "0,1")
    assert done.exit_code == 0 and "steps of" not in done.output
    assert before == {path: path.read_bytes() for path in out.glob("seed-*/*/*.json*")}


def test_a_run_is_not_overwritten_and_another_configuration_is_refused(finished, tmp_path):
    out, _ = finished
    done = command("tiny", "--out", out)
    assert done.exit_code == 1 and "holds a run already: say --resume" in done.output
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    done = command("tiny", "--out", copy, "--resume", settings=[*SHORT, "teacher.learning_rate=1e-3"])
    assert done.exit_code == 1 and len(done.output.splitlines()) < 12
    assert "training.learning_rate was 0.002 there and is 0.001 now" in done.output
    done = command("tiny", "--out", copy, "--resume", settings=[*SHORT, "data.split_seed=1"])
    assert done.exit_code == 1 and "its data was another one" in done.output
    # A setting that changes no result is no other configuration, and a loss touches distilled students only.
    done = command("tiny", "--out", copy, "--resume", settings=[*SHORT, "distill.save_every=3"])
    assert done.exit_code == 0
    done = command("tiny", "--out", copy, "--resume", "--stages", "direct,subln-ct", settings=[*SHORT, "losses.tau=2"])
    assert done.exit_code == 0
    done = command("tiny", "--out", copy, "--resume", "--stages", "ct-ld", settings=[*SHORT, "losses.tau=2"])
    assert done.exit_code == 1 and "losses.tau was 5.0 there and is 2.0 now" in done.output


def test_auto_is_settled_once_for_a_run(monkeypatch):
    """By the hardware, and not again where the run goes on; what was asked for by name stays."""
    config = configs.load_config("tiny", ["teacher.autocast=auto", "blocks.autocast=bfloat16"])
    devices = stages.Devices(torch.device("cpu"))
    for able, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(stages.Devices, "uses_bfloat16", lambda self, training, able=able: able)
        fresh = stages._settled(config, devices, {})
        assert (fresh.teacher.autocast, fresh.blocks.autocast, fresh.direct.autocast) == (name, "bfloat16", "float32")
        other = {"bfloat16": "float32", "float32": "bfloat16"}[name]
        before = {"teacher": {"autocast": other}, "blocks": {"autocast": "float32"}}
        gone_on = stages._settled(config, devices, before)
        assert (gone_on.teacher.autocast, gone_on.blocks.autocast) == (other, "bfloat16")


def test_a_run_that_stopped_goes_on(finished, tmp_path):
    """Its first stages are read, the others trained, to the same bytes as in one go."""
    out, _ = finished
    part = tmp_path / "part"
    first = command("tiny", "--out", part, "--stages", "teacher,direct")
    assert first.exit_code == 0
    done = command("tiny", "--out", part, "--resume", "--seeds", "0")
    assert done.exit_code == 0 and "teacher, seed 0: 4 steps" not in done.output
    for stage in ("teacher", "direct", "bitdistill"):
        name = f"seed-0/{stage}/model/model.safetensors"
        assert (part / name).read_bytes() == (out / name).read_bytes(), stage


def test_one_stage_may_serve_all_seeds(tmp_path):
    settings = [*SHORT, "teacher.once=true", "pretrain.once=true", "seeds=[3, 4]"]
    done = command("tiny", "--out", tmp_path / "o", settings=settings)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "o" / "seed-4").iterdir()) == ["bitdistill", "direct"]
    more = command("tiny", "--out", tmp_path / "o", "--resume", "--stages", "direct", "--seeds", "5", settings=settings)
    assert more.exit_code == 0, more.output
    record = json.loads((tmp_path / "o" / "record.json").read_text(encoding="utf-8"))
    assert record["seeds"] == [3, 4, 5]
    assert "| full precision, fine-tuned |" in done.output


@pytest.mark.parametrize(
    "setting",
    [
        "losses.teacher_cache=true",
        "losses.hidden=1.0",
        "student.start=teacher",
        "student.subln=every-linear",
        "student.quantizer=b1",
    ],
)
def test_other_students(tmp_path, setting):
    done = command("tiny", "--out", tmp_path / "o", "--stages", "bitdistill", settings=[*SHORT, setting])
    assert done.exit_code == 0, done.output
    kept = (tmp_path / "o" / "seed-0" / "bitdistill" / "model").exists()
    assert (
        kept
        == ("student.subln" not in setting and "quantizer" not in setting)
        == ("checkpoints have no form" not in done.output)
    )


@pytest.mark.parametrize("name", [name for name in configs.packaged() if name != "tiny"])
def test_a_dry_run_of_every_configuration(tmp_path, name):
    """Random weights of the architecture, with fewer and thinner layers here; the whole one takes minutes."""
    config = configs.load_config(name)
    smaller = {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 2048}
    settings = [f"model.sizes.{key}={value}" for key, value in smaller.items()] + ["losses.layer=1"]
    settings += ["model.sizes.head_dim=32"] if "head_dim" in config.model.sizes else []
    settings += ["losses.heads=3"] if "head_dim" not in config.model.sizes else []
    if "head_dim" not in config.model.sizes:
        settings += ["model.sizes.num_attention_heads=6", "model.sizes.num_key_value_heads=3"]
    if config.data.task == "summarisation":
        pytest.importorskip("rouge_score", reason="summaries need the extra [summaries]")
        pytest.importorskip("sacrebleu", reason="summaries need the extra [summaries]")
    done = command(name, "--out", tmp_path / "o", "--dry-run", settings=settings)
    assert done.exit_code == 0, done.output
    assert "wins back" in done.output or "below its teacher" in done.output


# Bad input.


def test_stages_and_seeds_are_checked_before_anything_is_written(tmp_path):
    for arguments, message in (
        (["--stages", "teacher,final"], "stages must be of teacher, direct, .* got final"),
        (["--seeds", "0,x"], "seeds must be numbers"),
        (["--set", "losses.beta=1"], "losses.beta is no key"),
    ):
        done = command("tiny", "--out", tmp_path / "o", *arguments)
        assert done.exit_code == 1 and not (tmp_path / "o").exists()
        assert re.search(message, done.output), done.output


@pytest.mark.parametrize(
    "setting, message",
    [
        ("data.labels={positive = ' happy', negative = ' unhappy'}", "must be one token of its own"),
        ("data.fractions=[1, 0, 0]", "fractions must be three shares"),
        ("data.files=[]", "data.files must name the examples"),
        ("data.files=['missing.tsv']", "missing.tsv"),
        ("corpus.files=[]", "corpus.files must name the texts"),
        ("model.sizes.layers=3", "model.sizes.layers is no key of LlamaConfig"),
        ("model.sizes.vocab_size=100", "must have a row for each token, it has 100"),
        ("losses.heads=5", "must divide the width, got 5 heads"),
        ("losses.layer=7", "the model has 2 layers, got layer 7"),
        ("distill.accumulation=3", "must divide evenly"),
        ("teacher.batch=100000", "there must be at least 100000 examples"),
        ("model.folder=missing", "must be a folder with a model, missing is none|must have a tokenizer"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, setting, message):
    done = command("tiny", "--out", tmp_path / "o", settings=[*SHORT, setting])
    assert done.exit_code == 1
    errors = [line for line in done.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1 and re.search(message, errors[0]), done.output
    assert "Traceback" not in done.output


def test_overlapping_splits_are_refused(tmp_path):
    rows = {"a": ["x good\tp", "y bad\tn"], "b": ["x  GOOD!\tp", "z\tn"], "c": ["w\tp", "v\tn"]}
    for name, lines in rows.items():
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    names = {
        key: f"['{tmp_path / name}.tsv']" for key, name in zip(("files", "dev_files", "test_files"), rows, strict=True)
    }
    settings = [*SHORT, *(f"data.{key}={value}" for key, value in names.items()), "data.options={label = 'label'}"]
    done = command("tiny", "--out", tmp_path / "o", settings=settings)
    assert done.exit_code == 1 and "splits must not overlap" in done.output


def folder(tmp_path, **keys):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": True} | keys
    model = models.load_base(configs.Model(family="Llama", sizes=sizes, tokenizer="synthetic"), 0, 0)
    student.save_student(model, tmp_path, ternary=False)
    return json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))


def base(path):
    return models.load_base(configs.Model(folder=str(path), tokenizer="synthetic"), 0, 0)


def change(path, **keys):
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) | keys
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_a_folder_comes_back_as_it_was(tmp_path):
    folder(tmp_path)
    again = base(tmp_path)
    assert type(again).__name__ == "LlamaForCausalLM" and again.lm_head.weight is again.model.embed_tokens.weight
    stored = models.safe_open(tmp_path / "model.safetensors", "pt")
    assert all(torch.equal(stored.get_tensor(name), p) for name, p in again.named_parameters())


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "can be made of .* has GPT2LMHeadModel"),
        ({"model_type": "sky", "architectures": ["SkyForCausalLM"]}, "must have a model that transformers knows"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing: a model whose head is its embedding says"),
        ({"num_hidden_layers": 3}, r"must have all weights of its model, model\.layers\.2\.\S+ is missing"),
    ],
)
def test_a_model_that_cannot_be_a_teacher_is_refused(tmp_path, keys, message):
    folder(tmp_path)
    change(tmp_path, **keys)
    with pytest.raises(FormatError, match=message):
        base(tmp_path)


def test_a_head_that_would_be_lost_is_refused(tmp_path):
    folder(tmp_path, tie_word_embeddings=False)
    assert not base(tmp_path).config.tie_word_embeddings
    change(tmp_path, tie_word_embeddings=True)
    with pytest.raises(FormatError, match=r"says tie_word_embeddings, but its lm_head\.weight is not"):
        base(tmp_path)


def test_a_student_with_gains_and_rising_quantisation(tmp_path):
    """Eager attention, norms that begin with the size of their inputs: the files hold these norms."""
    settings = [*SHORT, "model.attention=eager", "student.subln_gain=input", "distill.quantize_over=0.5"]
    done = command("tiny", "--out", tmp_path / "out", "--stages", "bitdistill", settings=settings)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out" / "seed-0" / "bitdistill"
    exported = load(folder / "export" / "student.safetensors", head="f32")
    gains = [w for name, w in exported.weights.items() if name.endswith("_sub_norm.weight")]
    assert gains and all(abs(float(np.median(gain)) - 1) > 0.05 for gain in gains)
    expected = read_answers(folder / "answers.safetensors")
    np.testing.assert_array_equal(classify.answer(exported, expected).logits, expected.logits)


def test_pretraining_depends_on_the_data_that_gains_are_measured_on(tmp_path):
    digests = {}
    for gain in ("one", "input"):
        for limit in (40, 50):
            words = [*SHORT, f"student.subln_gain={gain}", f"data.train_limit={limit}"]
            run = stages.Run(configs.load_config("tiny", words), tmp_path / f"{gain}-{limit}", quiet=True)
            digests[gain, limit] = configs.digest(run._settings("pretrain", 0))
    assert digests["one", 40] == digests["one", 50] and digests["input", 40] != digests["input", 50]


def test_where_a_student_begins():
    """At strength 0 and without SubLN it is the model itself; norms and rounding change it, each in its own way."""
    settings = configs.load_config("tiny", SHORT)
    rows = start.start_losses(settings)
    assert [(row["subln"], row["strength"]) for row in rows] == [
        (subln, strength) for subln in ("none", "one", "input") for strength in start.STRENGTHS
    ]
    tokenizer = models.load_tokenizer(settings.model)
    encoder = stages.TextEncoder.of(tokenizer)
    ids, mask = stages.first_prompts(settings, stages.splits_of(settings), encoder, settings.seeds[0])
    base = models.load_base(settings.model, settings.seeds[0], encoder.vocabulary_size).eval()
    with torch.no_grad():
        expected = base(input_ids=ids, attention_mask=mask, labels=ids.where(mask.bool(), -100)).loss
    assert rows[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert len({row["loss"] for row in rows}) == 15
    done = CliRunner().invoke(main, ["distill", "start", "tiny", *(f"--set={text}" for text in SHORT)])
    assert done.exit_code == 0 and len(done.output.splitlines()) == 4
    assert f"{rows[14]['loss']:.3f}" in done.output.splitlines()[3]
    done = CliRunner().invoke(main, ["distill", "start", "tiny", *(f"--set={text}" for text in SHORT), "--json"])
    assert json.loads(done.output)["rows"] == rows
