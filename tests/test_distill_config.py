"""Configurations and tables of distillation, and the command without PyTorch; nothing here trains."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from bitnet_ref.cli import main
from bitnet_ref.distill import config as configs
from bitnet_ref.distill import results
from bitnet_ref.errors import FormatError

BASE = '[model]\nfamily = "Llama"\ntokenizer = "synthetic"\n[data]\nfiles = ["a.tsv"]\n'


def load(tmp_path, text="", *overrides):
    path = tmp_path / "c.toml"
    path.write_text(BASE + text, encoding="utf-8")
    return configs.load_config(path, overrides)


@pytest.mark.parametrize("name", configs.packaged())
def test_packaged_configurations_are_read(name):
    config = configs.load_config(name)
    assert config.name == name and config.data.files and config.corpus.files
    for stage in (config.teacher, config.direct, config.pretrain, config.distill):
        assert stage.batch % stage.accumulation == 0
    # Baseline and students must be given the same budget, or their comparison says nothing.
    assert config.direct.steps * config.direct.batch >= config.distill.steps * config.distill.batch


def test_values_and_overrides(tmp_path):
    config = load(tmp_path, "[losses]\nlambda = 3\n", "teacher.steps=7", "seeds=[4, 5]", "data.template=a {0}")
    assert (config.losses.lambda_, config.teacher.steps, config.seeds) == (3.0, 7, (4, 5))
    assert config.data.template == "a {0}" and config.name == "c"
    assert config.losses.gamma == 1e5 and config.losses.tau == 5  # [BitDistill], section 4.1


@pytest.mark.parametrize(
    "override, message",
    [
        ("teacher.step=3", r"teacher\.step is no key of a configuration; teacher has steps, batch"),
        ("speed=1", "speed is no key of a configuration; the file has name, model"),
        ("losses.lambda_=1", r"losses\.lambda_ is no key"),
        ("teacher.steps=1.5", r"teacher\.steps must be a whole number, got 1\.5"),
        ("teacher.steps=true", r"teacher\.steps must be a whole number, got True"),
        ("teacher.steps=0", r"teacher\.steps must be positive, got 0"),
        ("teacher.learning_rate=nan", r"teacher\.learning_rate must be positive, got nan"),
        ("teacher.clip=-1", r"teacher\.clip must not be negative, got -1"),
        ("teacher.warm_up=1", r"teacher\.warm_up must be a share from 0 to below 1, got 1"),
        ('blocks.trained="vectors"', r"blocks\.trained must be all: blocks learn their matrices, got 'vectors'"),
        ("finish.trained=some", r"finish\.trained must be one of all, vectors, got 'some'"),
        ("teacher.quantize_over=0.5", r"teacher\.quantize_over must be 0, a teacher is not quantised, got 0\.5"),
        ("teacher.schedule=step", r"teacher\.schedule must be one of cosine, linear, constant, got 'step'"),
        ("losses.positions=all", r"losses\.positions must be one of labels, tokens"),
        ("losses={hidden = 1.0, teacher_cache = true}", r"losses\.teacher_cache must be false with losses\.hidden"),
        ("losses.alphas=[1, 2]", r"losses\.alphas must be a list of 3, got \[1, 2\]"),
        ("teacher=3", "teacher must be a table, got 3"),
        ("model.sizes=3", r"model\.sizes must be a table"),
        ("variants=['all']", "variants must be of teacher, direct, subln, .* got all"),
        ("seeds=[1, 1]", r"seeds must be different numbers, at least one, got \[1, 1\]"),
        ("teacher.steps.x=3", "teacher.steps.x must be a key inside tables, but steps is a value"),
        ("teacher.steps", "an override must be key=value, got 'teacher.steps'"),
        ("model.family=", r"model\.family|\[model\] must have a folder"),
        ("model.tokenizer=", r"model\.tokenizer must be given"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "[teacher]\nsteps = 5\n", override)


def test_what_is_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a TOML file or one of .*tiny.*, got huge"):
        configs.load_config("huge")
    (tmp_path / "x.toml").write_text("a = ", encoding="utf-8")
    with pytest.raises(ValueError, match="must be TOML"):
        configs.load_config(tmp_path / "x.toml")
    (tmp_path / "y.toml").write_text("seeds = [0]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="a configuration must have model, data"):
        configs.load_config(tmp_path / "y.toml")


def test_the_digest_is_of_every_value(tmp_path):
    one = load(tmp_path)
    assert configs.digest(one) == configs.digest(load(tmp_path))
    assert configs.digest(one) != configs.digest(load(tmp_path, "", "distill.epsilon=2e-8"))


def write(folder, stage, seed, accuracy):
    path = folder / f"seed-{seed}" / stage / "result.json"
    path.parent.mkdir(parents=True)
    row = {"stage": stage, "seed": seed, "step": 3, "seconds": 1.5, "tokens": 9}
    row["test"] = None if accuracy is None else {"score": accuracy, "accuracy": accuracy}
    path.write_text(json.dumps(row), encoding="utf-8")


def test_tables_by_hand(tmp_path):
    """Means over two seeds; one teacher for both; the share won back is (70 + 74 - 2 * 60) / (2 * (80 - 60))."""
    (tmp_path / "record.json").write_text('{"commit": "abc"}', encoding="utf-8")
    write(tmp_path, "teacher", 0, 0.8)
    write(tmp_path, "pretrain", 0, None)
    for seed, value in ((0, 0.70), (1, 0.74)):
        write(tmp_path, "direct", seed, 0.6)
        write(tmp_path, "bitdistill", seed, value)
    # Of the baseline there is one seed less than of this student: (78 - 60) / (80 - 60).
    for seed, value in ((0, 0.78), (2, 0.77)):
        write(tmp_path, "blocks-distill", seed, value)
    write(tmp_path, "blocks-ld", 1, 0.79)
    document = results.write_tables(tmp_path)
    assert document["tables"]["gap"]["recovered"] == pytest.approx(0.6)
    other = document["tables"]["gap_blocks"]
    assert other["recovered"] == pytest.approx(0.9) and other["seeds_of_direct"] == [0]
    assert other["to_teacher"]["values"] == pytest.approx([0.02, 0.03]) and other["over_direct"]["n"] == 1
    assert document["tables"]["gap_blocks_ld"]["recovered"] == pytest.approx(0.95)
    rows = {row["stage"]: row["accuracy"] for row in document["tables"]["models"]["rows"]}
    assert rows["teacher"] == {"mean": 0.8, "sd": None, "n": 1, "values": [0.8]}
    assert rows["bitdistill"]["mean"] == pytest.approx(0.72)
    assert rows["bitdistill"]["sd"] == pytest.approx(0.04 / 2**0.5)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "| BitDistill | 72.00 ± 2.83 | 2 |" in text and "| full precision, fine-tuned | 80.00 | 1 |" in text
    assert "is 8.00 ± 2.83 below its teacher and wins back 60%" in text
    assert "student of blocks is 2.50 ± 0.71 below its teacher and wins back 90% of" in text
    assert "loses (seeds 0) (accuracy; mean, ± standard deviation over 2 seeds)" in text
    assert "blocks and logits is 1.00 below its teacher and wins back 95% of" in text and "(accuracy; one seed)" in text
    assert "losses" not in document["tables"]  # one of four rows is no table
    assert json.loads((tmp_path / "tables.json").read_text(encoding="utf-8")) == document
    shown = CliRunner().invoke(main, ["distill", "table", str(tmp_path)])
    assert shown.exit_code == 0 and shown.output.strip() == text.strip()


def test_tables_of_no_run_are_refused(tmp_path):
    with pytest.raises(FormatError, match="must be the folder of a run with finished stages"):
        results.write_tables(tmp_path)
    write(tmp_path, "teacher", 0, 0.5)
    path = tmp_path / "seed-0" / "teacher" / "result.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(FormatError, match="must be the result of a stage"):
        results.collect(tmp_path)


def test_without_torch_the_command_names_the_extra():
    """In a process in which torch cannot be imported, wherever this test runs."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from bitnet_ref.cli import main\n"
        "main(['distill', 'run', 'tiny', '--out', '/nowhere/x'])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert "Error: training needs torch, which is not installed: pip install 'bitnet_ref[distill]'" in done.stderr
