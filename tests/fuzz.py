"""Mutations of valid small files: each gives a valid result or a clear error, quickly and in little memory.

    python tests/fuzz.py --seconds 600 --seed 7     as long as you like; exit code 1 at the first failure
    python tests/fuzz.py --seed 7 --case 1234       one case again

A case is decided by (seed, number). It takes a valid file, damages it (bytes, or values of its JSON), opens it, reads
every tensor, reads the configuration, computes a token, converts it to another form. What must hold:

- an error is a ``FormatError``, ``ValueError`` or ``TypeError`` that bitnet_ref raised on purpose: the last line of the
  traceback is a ``raise`` in this package, so an error that merely escaped counts as a failure;
- its message is one line;
- after an error the output folder is empty; after a conversion its output reads back with the same integers and scales;
- no case takes longer than ten seconds or more than 512 MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import linecache
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import bitnet_ref
from bitnet_ref.errors import BitnetRefError
from bitnet_ref.formats import TARGETS, TernaryTensor, convert, detect, inspect_file, inspect_model, open_checkpoint
from bitnet_ref.reference.config import ModelConfig
from bitnet_ref.reference.model import random_weights, ternary_weights
from bitnet_ref.reference.packing import schemes
from bitnet_ref.runtime.trace import Network, load_trace, open_network, record, save_trace
from bitnet_ref.runtime.trace_diff import diff_traces

PACKAGE = str(Path(bitnet_ref.__file__).parent)
SECONDS_PER_CASE = 10
MEMORY_BYTES = 512 << 20

CONFIG = {
    "architectures": ["BitNetForCausalLM"],
    "model_type": "bitnet",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 24,
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
LLAMA = CONFIG | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]},
}
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "vocab_size": 24,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    },
}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "added_tokens": [{"id": 3, "content": "<|begin|>", "special": True}],
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|begin|>"}}]},
}
HOSTILE: list[Any] = [
    None,
    True,
    0,
    1,
    -1,
    3,
    7,
    2**31,
    2**53,
    2**63,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    "",
    "x",
]
HOSTILE += ["../../x", "\x1b[2J", "\ud800", "a" * 3000, [], [[]], [1, 2, 3], ["x", 1], {}, {"x": {}}, {"": None}]


# Valid files ----------------------------------------------------------------------------------------------------------


def build(folder: Path) -> list[Path]:
    """The valid files and folders that are damaged, each of another kind."""
    folder.mkdir()
    made = []

    def hugging_face(name: str, config: dict[str, Any], shards: int) -> Path:
        path = folder / name
        path.mkdir()
        network = ModelConfig.from_hf(config)
        weights = random_weights(network, seed=1)
        tensors = {
            key: (w[0] * w[1]).astype(np.float32) if isinstance(w, tuple) else w.astype(np.float16)
            for key, w in ternary_weights(network, weights).items()
        }
        (path / "config.json").write_text(json.dumps(config))
        (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        (path / "chat_template.jinja").write_text("{{ messages }}")
        names = sorted(tensors)
        if shards == 1:
            save_file(tensors, path / "model.safetensors")
        else:
            files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
            weight_map = {key: files[i % shards] for i, key in enumerate(names)}
            for file in files:
                save_file({key: tensors[key] for key in names if weight_map[key] == file}, path / file)
            (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        made.append(path)
        return path

    bitnet, llama = hugging_face("bitnet", CONFIG, 2), hugging_face("llama", LLAMA, 1)
    for source in (bitnet, llama):
        for to in TARGETS:
            kinds = [{"scheme": scheme} for scheme in schemes()] if to == "packed" else [{}]
            for number, options in enumerate(kinds):
                suffix = "" if to == "hf-packed" else ".gguf" if to.startswith("gguf") else ".safetensors"
                path = folder / f"{source.name}-{to}-{number}{suffix}"
                convert(source, path, to, embedding=None if number % 2 or to == "hf-packed" else "q8_0", **options)
                made.append(path)
    network = ModelConfig.from_hf(CONFIG)
    trace = folder / "trace.safetensors"
    save_trace(record(Network(network, random_weights(network, 1)), [1, 2, 3]), trace)
    made.append(trace)
    return made


# Damage ---------------------------------------------------------------------------------------------------------------


def mutate_value(rng: np.random.Generator, value: Any) -> Any:
    """The same JSON with one place changed: replaced, removed, renamed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = list(value)[rng.integers(len(value))]
        kind = rng.integers(10)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {("x" + k if k == key else k): v for k, v in value.items()}
        if kind == 2:
            return value | {key: value[list(value)[rng.integers(len(value))]]}
        return value | {key: mutate_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = int(rng.integers(len(value)))
        kind = rng.integers(6)
        if kind == 0:
            return value[:i] + value[i + 1 :]
        if kind == 1:
            return [*value, value[i]]
        return [*value[:i], mutate_value(rng, value[i]), *value[i + 1 :]]
    if isinstance(value, str) and value[:1] in "{[" and rng.random() < 0.9:  # JSON inside JSON: our metadata
        with contextlib.suppress(ValueError):
            return json.dumps(mutate_value(rng, json.loads(value)))
    if type(value) is int and rng.random() < 0.5:
        return value + int(rng.integers(-4, 5))
    return HOSTILE[rng.integers(len(HOSTILE))]


def mutate_json(rng: np.random.Generator, text: bytes) -> bytes:
    value = json.loads(text)
    for _ in range(rng.integers(1, 3)):
        value = mutate_value(rng, value)
    text = json.dumps(value).encode(errors="surrogatepass")
    if rng.random() < 0.05:  # what Python's own writer would not produce
        text = text.replace(b": ", [b": NaN, ", b": 1e999 ,", b': "\\u0000", ', b":[[[["][rng.integers(4)], 1)
    return text


def mutate_bytes(rng: np.random.Generator, data: bytes, header_bytes: int) -> bytes:
    """Flips, numbers, cuts and copies, most of them in the header."""
    out = bytearray(data)
    for _ in range(1 << rng.integers(0, 4)):
        end = max(1, min(len(out), header_bytes if rng.random() < 0.8 else len(out)))
        i = int(rng.integers(end))
        kind = rng.integers(8)
        if kind <= 2:
            out[i] ^= 1 << int(rng.integers(8))
        elif kind == 3:
            out[i] = int(rng.integers(256))
        elif kind == 4:
            number = [0, 1, 2, 36, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1][rng.integers(11)]
            raw = struct.pack("<Q", number)[: [1, 4, 8][rng.integers(3)]]
            out[i : i + len(raw)] = raw
        elif kind == 5:
            raw = struct.pack("<f", [np.nan, np.inf, -1.0, 0.0, 1e-45, 3e38][rng.integers(6)])
            out[i : i + 4] = raw
        elif kind == 6:
            n = int(rng.integers(1, 64))
            out[i : i + n] = b"" if rng.random() < 0.5 else out[i : i + n] * 2
        elif rng.random() < 0.3:
            del out[i:]
        if not out:
            break
    return bytes(out)


def header_length(data: bytes) -> int:
    """Bytes before the values of the tensors, about."""
    if data[:4] == b"GGUF":
        return min(len(data), 4096)
    return 8 + int.from_bytes(data[:8], "little") if data[8:9] == b"{" else len(data)


def damage(rng: np.random.Generator, path: Path) -> str:
    """Damage a file, or one of the files of a folder; returns what was done."""
    if path.is_dir():
        files = sorted(path.iterdir())
        path = files[rng.integers(len(files))]
        if rng.random() < 0.03:
            path.unlink()
            return f"removed {path.name}"
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        path.write_bytes(mutate_json(rng, data))
        return f"values of {path.name}"
    if data[8:9] == b"{" and data[:4] != b"GGUF" and rng.random() < 0.6:
        n = header_length(data)
        header = mutate_json(rng, data[8:n])
        header += b" " * (-len(header) % 8)
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[n:])
        return f"header values of {path.name}"
    path.write_bytes(mutate_bytes(rng, data, header_length(data)))
    return f"bytes of {path.name}"


# What must hold -------------------------------------------------------------------------------------------------------


class Failure(Exception):
    """A case that broke a promise."""


def attempt(what: str, action: Callable[[], Any]) -> Any:
    """The result, or None after an error of the project; anything else is a failure."""
    try:
        return action()
    except (BitnetRefError, ValueError, TypeError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = linecache.getline(frame.filename, frame.lineno or 0).strip()
        if not (frame.filename.startswith(PACKAGE) and line.startswith("raise")):
            raise Failure(f"{what}: an error that nobody raised: {type(error).__name__}: {error}") from error
        message = str(error)
        if not message or "\n" in message or len(message) > 4000:
            raise Failure(f"{what}: the message must be one line, got {message[:200]!r}") from error
        return None
    except Failure:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Failure(f"{what}: {type(error).__name__}: {error}") from error


def read_all(path: Path, **options: Any) -> dict[str, Any]:
    """Every integer, scale and float of a checkpoint."""
    checkpoint = open_checkpoint(path, **options)
    values: dict[str, Any] = {}
    for name in checkpoint.entries:
        tensor = checkpoint[name]
        if isinstance(tensor, TernaryTensor):
            values[name] = tensor.w_q, tensor.w_scale
        else:
            values[name] = np.concatenate([v.reshape(-1) for _, _, v in tensor.chunks()] or [np.empty(0)])
    return values


def examine(rng: np.random.Generator, path: Path, out: Path) -> None:
    """Everything that a user may do with the file."""
    if "trace" in path.name:
        trace = attempt("load_trace", lambda: load_trace(path))
        if trace is not None:
            attempt("diff_traces", lambda: str(diff_traces(trace, trace)))
        return
    quantize = bool(rng.random() < 0.5)
    attempt("detect", lambda: detect(path))
    if path.is_file():
        attempt("inspect_file", lambda: inspect_file(path))
    attempt("inspect_model", lambda: inspect_model(path))
    values = attempt("read", lambda: read_all(path, quantize=quantize))
    if rng.random() < 0.3:
        network = attempt("open_network", lambda: open_network(path, quantize=quantize))
        if network is not None and network.config.vocabulary <= 1000 and network.config.layers <= 4:
            attempt("record", lambda: record(network, [0, 1]))
    to = TARGETS[rng.integers(len(TARGETS))]
    scheme = schemes()[rng.integers(len(schemes()))]
    dst = out / "converted"
    done = attempt(f"convert to {to}", lambda: convert(path, dst, to, scheme=scheme, quantize=quantize))
    if done is None:
        if left := sorted(f.name for f in out.rglob("*")):
            raise Failure(f"convert to {to} failed and left {left}")
        return
    if values is None:
        raise Failure(f"converted to {to}, yet it cannot be read")
    again = attempt("read the output", lambda: read_all(dst))
    if again is None:
        attempt_again = _why(lambda: read_all(dst))
        raise Failure(f"converted to {to}, and the output cannot be read: {attempt_again}")
    if again.keys() != values.keys():
        raise Failure(f"converted to {to} with other tensors: {sorted(again.keys() ^ values.keys())[:3]}")
    for name, value in values.items():
        pairs = zip(value, again[name], strict=True) if isinstance(value, tuple) else [(value, again[name])]
        if isinstance(value, tuple) != isinstance(again[name], tuple) or not all(
            np.array_equal(a, b, equal_nan=True) for a, b in pairs
        ):
            raise Failure(f"converted to {to} with other values of {name}")


def _why(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return str(error)
    return "it can the second time"


def configurations(rng: np.random.Generator) -> None:
    """Damaged config.json objects, without files."""
    for _ in range(20):
        config = [CONFIG, LLAMA, GEMMA][rng.integers(3)]
        for _ in range(rng.integers(1, 4)):
            config = mutate_value(rng, config)
        attempt("ModelConfig.from_hf", lambda config=config: ModelConfig.from_hf(config))


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Ten seconds and 512 MiB beyond what is mapped now, where the system can limit them."""
    try:
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return

    def too_slow(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS_PER_CASE} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, hard))
    signal.alarm(SECONDS_PER_CASE)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, previous)


def run_case(seed: int, number: int, valid: list[Path], folder: Path) -> str:
    """One case; returns its description, raises Failure."""
    rng = np.random.default_rng([seed, number])
    source = valid[number % len(valid)]
    path, out = folder / source.name, folder / "out"
    for old in (path, out):
        if old.is_dir():
            shutil.rmtree(old)
    out.mkdir()
    if source.is_dir():
        shutil.copytree(source, path)
    else:
        shutil.copyfile(source, path)
    what = f"case {number}: {source.name}, {damage(rng, path)}"
    print(what, file=sys.stderr)  # the last line before a crash
    with limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged values overflow
        try:
            examine(rng, path, out)
            configurations(rng)
        except Failure as failure:
            raise Failure(f"{what}: {failure}") from failure.__cause__
    return what


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="stop after this time")
    parser.add_argument("--cases", type=int, help="stop after so many cases")
    parser.add_argument("--case", type=int, help="run this one only, and say what failed")
    parser.add_argument("--keep-going", action="store_true", help="go on after a failure, count at the end")
    asked = parser.parse_args(words)
    start, failures, number = time.monotonic(), 0, asked.case or 0
    with tempfile.TemporaryDirectory() as name:
        valid = build(Path(name) / "valid")
        work = Path(name) / "work"
        work.mkdir()
        while time.monotonic() - start < asked.seconds and (asked.cases is None or number < asked.cases):
            try:
                run_case(asked.seed, number, valid, work)
            except Failure as failure:
                failures += 1
                print(f"seed {asked.seed}, {failure}")
                if failure.__cause__ is not None and not asked.keep_going:
                    traceback.print_exception(failure.__cause__, file=sys.stdout)
                if not asked.keep_going:
                    break
            number += 1
            if asked.case is not None:
                break
    print(f"{number - (asked.case or 0)} cases, {failures} failures, {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
