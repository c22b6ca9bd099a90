"""How fast a whole model runs: tokens per second reading a prompt and writing, beside what the machine can read.

Method
------
- Reading a prompt (products of many tokens) and writing (one token a step) are timed apart; different things limit
  them. One prompt, batch 1.
- The steps of writing and a streaming read of memory take turns, so that a change in the machine's speed hits both.
  Figures are medians, with quartiles.
- Bytes read per token are counted, not measured: all ternary matrices, the head, and the keys and values of the tokens
  so far. That over the time of a step, as a share of the probe, is ``read_bandwidth_fraction``.
- In further steps every compiled call is timed from outside, and products and attention inside of fused steps from
  within. What remains of a step beside compiled calls is Python: ``python_fraction``. The timers count as Python.
- Of a sparse model, dense and sparse steps take turns on the same tokens, and in being the first. Their logits must be
  the same. Bytes of sparse steps are those of the rows that were read.
- Depths of context are made, not read: keys and values are drawn at random, since time does not depend on their values.
- The peak of resident memory is taken before the array of the read probe exists.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ref import kernels
from bitnet_ref.runtime.model import Model

__all__ = ["measure_model", "peak_resident_bytes"]

_PROBE_BYTES = 2**28  # far beyond any last-level cache that this is likely to meet


def measure_model(
    model: Model,
    n_prompt: int = 64,
    n_generate: int = 32,
    threads: Sequence[int | None] = (None,),
    depths: Sequence[int] = (),
    progress: Callable[[str, float], None] | None = None,
) -> list[dict[str, object]]:
    """Time a model.

    Parameters
    ----------
    model : Model
    n_prompt, n_generate : int
        Tokens of the prompt and tokens that are then written; together at most the context.
    threads : sequence of int or None
        As in :func:`bitnet_ref.kernels.resolve_threads`.
    depths : sequence of int
        Tokens in the cache at which eight further steps each are timed.
    progress : callable(label, fraction done), optional

    Returns
    -------
    list of dict, one for each entry of `threads`; of a sparse model two, whose ``network`` is ``dense`` and ``sparse``
        kind, threads, n_prompt, n_generate, prefill_tokens_per_s, decode_tokens_per_s, decode_step_ns (median),
        low_ns, high_ns (quartiles), layer_bytes, head_bytes, cache_bytes (read by a step, mean), bytes_per_token,
        read_bandwidth_bytes_per_s, read_bandwidth_fraction, python_fraction, product_fraction, head_fraction,
        attention_fraction, other_fraction, peak_resident_bytes, depths: list of dict with depth, decode_step_ns and the
        five fractions. ``sparse`` rows have up_zeros, down_zeros (share of rows of W_up and columns of W_down that add
        nothing), up_listed and down_listed (share of these matrices that were read by lists).

    Raises
    ------
    ValueError
        If a number is below 1 or the tokens exceed the context.
    RuntimeError
        If sparse logits differ from dense ones.
    """
    if n_prompt < 1 or n_generate < 1 or n_prompt + n_generate > model.config.context:
        raise ValueError(
            f"prompt and generated tokens must each be at least 1 and together at most {model.config.context}, "
            f"got {n_prompt} and {n_generate}"
        )
    if not all(0 <= depth < model.config.context for depth in depths):
        raise ValueError(f"depths must lie between 0 and {model.config.context - 1} tokens, got {list(depths)}")
    report = progress or (lambda label, fraction: None)
    prompt = np.random.default_rng(0).integers(0, model.config.vocabulary, n_prompt)
    words, peak = None, 0
    rows = []
    for index, count in enumerate(threads):
        n_threads = kernels.resolve_threads(count)
        runner = model.with_threads(n_threads)
        report(f"{n_threads} thread(s), prompt", index / len(threads))
        cache = model.new_cache(n_prompt + n_generate)
        runner.prefill(prompt[: min(8, n_prompt)], cache)  # threads and caches are warm from here on
        cache.length = 0
        start = time.perf_counter_ns()
        logits = runner.prefill(prompt, cache)
        prefill_ns = time.perf_counter_ns() - start
        if words is None:
            runner.forward([0], cache)
            cache.length = n_prompt
            peak = peak_resident_bytes()
            words = np.ones(_PROBE_BYTES // 8, np.uint64)
        networks = {"dense": model.dense(), "sparse": model} if model.sparse else {"dense": model}
        runners = {name: network.with_threads(n_threads) for name, network in networks.items()}
        steps: dict[str, list[int]] = {name: [] for name in networks}
        probes = []
        model.take_sparse_counts()
        for i in range(n_generate):
            report(f"{n_threads} thread(s), token {i + 1}", (index + (i + 1) / n_generate) / len(threads))
            token, found = [int(np.argmax(logits[-1]))], {}
            for name in list(networks)[:: 1 if i % 2 else -1]:
                cache.length = n_prompt + i
                start = time.perf_counter_ns()
                found[name] = runners[name].forward(token, cache)
                steps[name].append(time.perf_counter_ns() - start)
            logits = found["dense"]
            if any(other.tobytes() != logits.tobytes() for other in found.values()):
                raise RuntimeError("the logits of a sparse step differ from those of the dense one")
            if i % 4 == 0:
                start = time.perf_counter_ns()
                kernels.read_all(words, n_threads)
                probes.append(time.perf_counter_ns() - start)
        counts = model.take_sparse_counts()
        cache_bytes = int(model.cache_bytes_per_token() * (n_prompt + (n_generate + 1) / 2))
        bandwidth = _PROBE_BYTES / float(np.median(probes)) * 1e9
        for name, network in networks.items():
            low, median, high = np.percentile(steps[name], (25, 50, 75))
            read_bytes = model.bytes_per_token()
            if name == "sparse":
                read_bytes["layers"] -= _saved_bytes(model, counts)
            total_bytes = sum(read_bytes.values()) + cache_bytes
            rows.append(
                {
                    "kind": "measured",
                    "threads": n_threads,
                    "n_prompt": n_prompt,
                    "n_generate": n_generate,
                    "prefill_tokens_per_s": n_prompt / prefill_ns * 1e9,
                    "decode_tokens_per_s": 1e9 / float(median),
                    "decode_step_ns": float(median),
                    "low_ns": float(low),
                    "high_ns": float(high),
                    "layer_bytes": read_bytes["layers"],
                    "head_bytes": read_bytes["head"],
                    "cache_bytes": cache_bytes,
                    "bytes_per_token": total_bytes,
                    "read_bandwidth_bytes_per_s": bandwidth,
                    "read_bandwidth_fraction": total_bytes / float(median) * 1e9 / bandwidth,
                    **_shares(network, n_threads, cache),
                    "peak_resident_bytes": peak,
                    "depths": [_at_depth(network, n_threads, depth) for depth in depths],
                    **({"network": name} if model.sparse else {}),
                    **(_zeros(model, counts) if name == "sparse" else {}),
                }
            )
    return rows


def _zeros(model: Model, counts: dict[str, int]) -> dict[str, float]:
    """Of all blocks and tokens, shares of rows that add nothing, and of matrices that were read by lists."""
    tokens = counts["tokens"]
    shares = {f"{part}_zeros": 1 - counts[f"{part}_rows"] / (tokens * model.config.ffn) for part in ("up", "down")}
    return shares | {f"{part}_listed": counts[f"{part}_listed"] / tokens for part in ("up", "down")}


def _saved_bytes(model: Model, counts: dict[str, int]) -> int:
    """Bytes that a step reads less than a dense one: whole matrices less the rows that are read in their place."""
    whole = sum(
        counts[f"{part}_listed"] * model.weights[f"model.layers.0.mlp.{part}_proj.weight"].w_packed.nbytes
        for part in ("up", "down")
    )
    return (whole - counts["read_bytes"]) * model.config.layers // counts["tokens"]


def _at_depth(model: Model, n_threads: int, depth: int) -> dict[str, object]:
    """Steps with `depth` tokens of random keys and values before them."""
    cache, c = model.new_cache(depth + 1), model.config
    rng = np.random.default_rng(0)
    if depth:
        for layer in range(c.layers):
            cache.store(layer, *rng.standard_normal((2, depth, c.kv_heads, c.head_dim), np.float32))
        cache.advance(depth)
    runner, steps = model.with_threads(n_threads), []
    for _ in range(9):
        cache.length = depth
        start = time.perf_counter_ns()
        runner.forward([0], cache)
        steps.append(time.perf_counter_ns() - start)
    return {"depth": depth, "decode_step_ns": float(np.median(steps[1:])), **_shares(model, n_threads, cache)}


def _shares(model: Model, n_threads: int, cache: Any) -> dict[str, float]:
    """Where the time of a step goes: medians over eight steps in which every compiled call is timed."""
    spent: Counter[str] = Counter()

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter_ns()
            result = function(*args)
            spent[name] += time.perf_counter_ns() - start
            return result

        return timed

    runner = model.with_threads(n_threads, wrap)
    shares = []
    for _ in range(8):
        cache.length -= 1  # the last token again
        spent.clear()
        runner.take_inner_ns()
        start = time.perf_counter_ns()
        runner.forward([0], cache)
        total = time.perf_counter_ns() - start
        python = total - sum(spent.values())
        spent.update(runner.take_inner_ns())  # adds to what calls of their own took
        head = spent["head"] + spent["grouped_head"]
        rest = total - python - spent["product"] - head - spent["attention"]
        shares.append([part / total for part in (python, spent["product"], head, spent["attention"], rest)])
    names = ("python_fraction", "product_fraction", "head_fraction", "attention_fraction", "other_fraction")
    return dict(zip(names, np.median(shares, axis=0).tolist(), strict=True))


def peak_resident_bytes() -> int:
    """The most memory that this program has had resident so far, mapped files included.

    Linux keeps ``ru_maxrss`` through ``exec``: a child begins with what its parent had when it was forked. The
    high-water mark of the address space in ``/proc`` begins anew.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        pass  # not Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
