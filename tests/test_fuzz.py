"""The fuzzer of fuzz.py with a fixed seed, what it found, and that it would notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fuzz
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bitnet_ref.errors import FormatError
from bitnet_ref.formats import convert, open_checkpoint
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.runtime.trace import open_network

CASES = 350


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The undamaged files by name."""
    return {path.name: path for path in fuzz.build(tmp_path_factory.mktemp("fuzz") / "valid")}


def test_mutations_of_valid_files(tmp_path):
    """In a process of its own: a crash, or the memory that a case leaves behind, is then this test's only."""
    pytest.importorskip("resource", reason="needs POSIX resource limits")
    words = [sys.executable, fuzz.__file__, "--seed", "0", "--cases", str(CASES), "--seconds", "300"]
    # The package is the one that these tests see, wherever it is.
    paths = [str(Path(fuzz.PACKAGE).parent)]
    done = subprocess.run(
        [
            words[0],
            "-c",
            f"import sys; sys.path[:0] = {paths!r}; import runpy; sys.argv = {words[1:]!r}; "
            f"runpy.run_path({fuzz.__file__!r}, run_name='__main__')",
        ],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\nlast: {done.stderr[-500:]}"
    assert f"{CASES} cases, 0 failures" in done.stdout


def test_undamaged_files_are_valid(valid, tmp_path, monkeypatch):
    """Else the fuzzer would mutate files that are refused anyway."""
    assert len(valid) == 19
    monkeypatch.setattr(fuzz, "damage", lambda rng, path: "nothing")
    for number in range(len(valid)):
        fuzz.run_case(0, number, list(valid.values()), tmp_path)
    for name, path in valid.items():
        if "trace" not in name:
            assert fuzz.read_all(path, quantize=True)


def test_damage_is_decided_by_seed_and_number(valid, tmp_path):
    path = tmp_path / "a"
    results = []
    for number in (5, 5, 6):
        path.write_bytes(valid["bitnet-gguf-tq2_0-0.gguf"].read_bytes())
        fuzz.damage(np.random.default_rng([0, number]), path)
        results.append(path.read_bytes())
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (IndexError("list index out of range"), "IndexError"),
        (MemoryError(), "MemoryError"),
        (TypeError("unhashable type: 'list'"), "an error that nobody raised: TypeError"),  # from this test's frame
    ],
)
def test_the_fuzzer_notices_errors_that_are_not_the_projects(error, sentence):
    def fail():
        raise error

    with pytest.raises(fuzz.Failure, match=sentence):
        fuzz.attempt("reading", fail)


def test_the_fuzzer_notices_what_a_failed_conversion_leaves(valid, tmp_path, monkeypatch):
    def convert_badly(path, dst, to, **options):
        dst.write_bytes(b"half")
        ModelConfig.from_hf({})  # raises ValueError

    monkeypatch.setattr(fuzz, "convert", convert_badly)
    with pytest.raises(fuzz.Failure, match=r"failed and left \['converted'\]"):
        fuzz.examine(np.random.default_rng(0), valid["bitnet-packed-0.safetensors"], tmp_path)


def test_the_fuzzer_notices_another_value(valid, tmp_path, monkeypatch):
    source = valid["bitnet-packed-1.safetensors"]
    monkeypatch.setattr(fuzz, "convert", lambda path, dst, to, **options: convert(other(source, tmp_path), dst, to))
    with pytest.raises(fuzz.Failure, match="with other values of"):
        for seed in range(20):  # until a target that can be written
            out = tmp_path / str(seed)
            out.mkdir()
            fuzz.examine(np.random.default_rng(seed), source, out)


def other(source, folder):
    """The same model with one sign changed."""
    convert(source, folder / "other", "hf-packed")
    tensors = load_file(folder / "other" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = tensors[name][0, 0] & ~np.uint8(3) | (1 if tensors[name][0, 0] & 3 != 1 else 2)
    save_file(tensors, folder / "other" / "model.safetensors")
    return folder / "other"


# What it found --------------------------------------------------------------------------------------------------------


EVIL = ("../../evil", "/tmp/evil", "a/b", ".hidden", "", "config.json", "model.SafeTensors", "a\0")


@pytest.mark.parametrize("name", EVIL)
def test_an_asset_cannot_leave_the_folder(valid, tmp_path, name):
    """A packed file names its assets, and a conversion to a folder writes files of these names."""
    source = valid["bitnet-packed-1.safetensors"]
    data = source.read_bytes()
    n = fuzz.header_length(data)
    header = json.loads(data[8:n])
    header["asset:" + name] = header.pop("asset:tokenizer.json")
    text = json.dumps(header).encode()
    (tmp_path / "in").mkdir()
    bad = tmp_path / "in" / "bad.safetensors"
    bad.write_bytes(len(text).to_bytes(8, "little") + text + data[n:])
    with pytest.raises(FormatError, match=r"an asset must be a plain file name|names must be printable"):
        convert(bad, tmp_path / "in" / "out", "hf-packed")
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "bad.safetensors"]


def changed_config(valid, tmp_path, **keys):
    """The Llama with other keys in its config."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in valid["llama"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(fuzz.LLAMA | keys))
    return folder


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"hidden_size": "x"}, "hidden_size must be an integer from 1"),
        ({"num_hidden_layers": -2}, "num_hidden_layers must be an integer from 1"),
        ({"max_position_embeddings": 2**63}, "max_position_embeddings must be an integer from 1"),
        ({"num_key_value_heads": []}, "num_key_value_heads must be an integer from 1"),
        ({"head_dim": 0}, "head_dim must be an integer from 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a number above 0"),
        ({"rope_theta": "../x"}, "rope_theta must be a number above 0"),
        ({"rope_scaling": 7}, "rope_parameters and rope_scaling must be objects"),
        ({"rope_scaling": fuzz.LLAMA["rope_scaling"] | {"factor": 7.000000001}}, "must be a float32 above 1"),
        ({"rope_scaling": fuzz.LLAMA["rope_scaling"] | {"low_freq_factor": 2}}, "GGUF takes Llama 3's rotary scaling"),
        ({"vocab_size": 2**31 - 1}, "the embedding must have vocab_size = 2147483647 rows, got 24"),
    ],
)
def test_gguf_is_not_written_with_values_that_no_reader_takes(valid, tmp_path, keys, rule):
    with pytest.raises(ValueError, match=rule):
        convert(changed_config(valid, tmp_path, **keys), tmp_path / "a.gguf", "gguf-tq2_0")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("part", "rule"),
    [
        ({"added_tokens": 3}, "added_tokens must be a list"),
        ({"model": fuzz.TOKENIZER["model"] | {"merges": [3]}}, "merges must be two tokens each"),
        ({"model": fuzz.TOKENIZER["model"] | {"vocab": {"\ud800": 0}}}, "GGUF cannot hold the value of tokenizer"),
        ({"post_processor": {"type": "TemplateProcessing", "single": {"x": 1}}}, "single must be a list"),
        ({"post_processor": {"type": "Sequence", "processors": 1}}, "processors must be a list"),
    ],
)
def test_hostile_tokenizers(valid, tmp_path, part, rule):
    folder = changed_config(valid, tmp_path)
    (folder / "tokenizer.json").write_text(json.dumps(fuzz.TOKENIZER | part))
    with pytest.raises(ValueError, match=rule):
        convert(folder, tmp_path / "a.gguf", "gguf-tq2_0")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_numbers_that_json_makes_infinite(valid, tmp_path):
    folder = changed_config(valid, tmp_path)
    (folder / "config.json").write_text(json.dumps(fuzz.LLAMA).replace("1e-05", "1e999"))
    with pytest.raises(FormatError, match="numbers must be finite, got 1e999"):
        open_checkpoint(folder)


def test_damaged_integers_are_not_passed_on(valid, tmp_path):
    """Bytes of the same packing are copied, but not if they stand for no weights."""
    data = bytearray(valid["bitnet-packed-0.safetensors"].read_bytes())
    data[fuzz.header_length(data)] = 0xFF
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(FormatError, match=r"tensor model\.layers"):
        convert(tmp_path / "bad", tmp_path / "out", "packed", scheme=fuzz.schemes()[0])
    assert not (tmp_path / "out").exists()


def test_a_packed_file_whose_quantization_config_is_text(valid, tmp_path):
    data = valid["bitnet-packed-0.safetensors"].read_bytes()
    n = fuzz.header_length(data)
    header = json.loads(data[8:n])
    config = json.loads(header["__metadata__"]["config"]) | {"quantization_config": "x"}
    header["__metadata__"]["config"] = json.dumps(config)
    text = json.dumps(header).encode()
    (tmp_path / "bad").write_bytes(len(text).to_bytes(8, "little") + text + data[n:])
    with pytest.raises(FormatError, match="quantization_config of the config must be an object"):
        open_checkpoint(tmp_path / "bad")


def test_more_layers_than_tensors(valid, tmp_path):
    """Before the names of 10,000 layers are made."""
    with pytest.raises(FormatError, match="a network of 9999 layers must have more tensors"):
        open_network(changed_config(valid, tmp_path, num_hidden_layers=9999))


@pytest.mark.parametrize(
    "keys",
    [
        {"architectures": [[]]},
        {"architectures": [{}]},
        {"hidden_act": []},
        {"rope_scaling": {"rope_type": ["linear"]}},
        {"hidden_size": 10**400},
        {"rope_theta": 10**400},
        {"num_hidden_layers": 2**31 - 1},
    ],
)
def test_configurations_of_wrong_kinds(keys):
    with pytest.raises(ValueError):
        ModelConfig.from_hf(fuzz.LLAMA | keys)


@pytest.mark.parametrize("kinds", [3, [[], [], []], {"a": 1, "b": 2, "c": 3}])
def test_layer_types_of_wrong_kinds(kinds):
    with pytest.raises(ValueError, match="layer_types must have 3 entries"):
        ModelConfig.from_hf(fuzz.GEMMA | {"layer_types": kinds})
