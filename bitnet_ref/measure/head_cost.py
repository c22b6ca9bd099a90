"""What each type of head costs on a text: perplexity, errors of logits and bytes, all from the same hidden states.

::

    python -m bitnet_ref.measure.head_cost MODEL TEXT [--chunks N] [--context N] [--skip-bytes N]

The network runs once with a float32 head; each type then multiplies the same outputs of the final norm. So the
difference of two perplexities is that of paired losses, with a small standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitnet_ref.reference.head import TABLE_TYPES, FloatTable
from bitnet_ref.runtime.load import load
from bitnet_ref.runtime.model import HEADS, Model, encode_table
from bitnet_ref.runtime.sampling import log_softmax
from bitnet_ref.runtime.steps import grouped

__all__ = ["measure_heads"]


def measure_heads(
    model: Model, tokens: Sequence[int] | np.ndarray, context: int = 256, heads: Sequence[str] = tuple(HEADS)
) -> list[dict[str, object]]:
    """Compare types of head on a text.

    Parameters
    ----------
    model : Model
        With a head of float32.
    tokens : sequence of int
        Cut into chunks of `context` tokens, the rest dropped; the second half of each chunk is scored.
    context : int
    heads : sequence of str
        Names of :data:`bitnet_ref.runtime.model.HEADS`.

    Returns
    -------
    list of dict, one for each head
        head, bits_per_weight, bytes, perplexity, change (of the perplexity, relative), change_error (its standard
        error), rms_error (of logits, over their standard deviation), largest_error (over the range of a position's
        logits), same_best (share of positions), kl_divergence (nats, mean), n_scored, padded (columns of zeros added
        because the type needs whole blocks; they change no group of weights that shares a scale).

    Raises
    ------
    ValueError
        If the head of the model is not float32, or there is not one chunk.
    """
    table = model.table
    if not isinstance(table, FloatTable) or table.type != "F32":
        raise ValueError("the head of the model must be float32, load it with head='f32'")
    if context < 4 or len(tokens) < context:
        raise ValueError(f"there must be at least one chunk of {context} tokens (4 or more), got {len(tokens)}")
    values = table[np.arange(len(table.raw))]
    stored, losses, sums = {}, {head: [] for head in heads}, {head: np.zeros(4) for head in heads}
    for head in heads:
        padding = -table.columns % TABLE_TYPES[HEADS[head]][0]
        stored[head] = grouped(encode_table("head", np.pad(values, ((0, 0), (0, padding))), HEADS[head]))
    first, n_scored, exact = context // 2, 0, []
    steps = dataclasses.replace(model.steps, head=lambda x, table: x)
    runner = model.with_steps(steps)
    for start in range(0, len(tokens) - context + 1, context):
        chunk = np.asarray(tokens[start : start + context])
        # Position i predicts token i + 1; the chunk's last position predicts nothing.
        x = runner.forward(chunk[:-1], runner.new_cache(context))[first:]
        expected = model.steps.head(x, table)
        targets = np.arange(len(x)), chunk[first + 1 :]
        log_p = log_softmax(expected)
        exact.append(-log_p[targets])
        deviation, width = expected.std(), np.ptp(expected, axis=1)
        for head in heads:
            wide = np.pad(x, ((0, 0), (0, stored[head].columns - x.shape[1])))
            logits = model.steps.head(wide, stored[head])
            log_q = log_softmax(logits)
            losses[head].append(-log_q[targets])
            error = logits - expected
            sums[head] += (
                (error / deviation).astype(np.float64).ravel() @ (error / deviation).ravel() / error.shape[1],
                (logits.argmax(axis=1) == expected.argmax(axis=1)).sum(),
                (np.exp(log_p) * (log_p - log_q)).sum(),
                0,
            )
            sums[head][3] = max(sums[head][3], (np.abs(error).max(axis=1) / width).max())
        n_scored += len(x)
    base = np.concatenate(exact)
    rows = []
    for head in heads:
        found = np.concatenate(losses[head])
        change, square, same, divergence, largest = found - base, *sums[head]
        block, block_bytes = TABLE_TYPES[HEADS[head]]
        rows.append(
            {
                "head": head,
                "bits_per_weight": 8 * block_bytes / block,
                "bytes": stored[head].nbytes,
                "perplexity": math.exp(found.mean()),
                "change": math.expm1(change.mean()),
                "change_error": float(change.std(ddof=1) / math.sqrt(n_scored)),
                "rms_error": math.sqrt(square / n_scored),
                "largest_error": float(largest),
                "same_best": same / n_scored,
                "kl_divergence": divergence / n_scored,
                "n_scored": n_scored,
                "padded": stored[head].columns - table.columns,
            }
        )
    return rows


def main() -> None:
    """Print the table for a model and a text."""
    parser = argparse.ArgumentParser(prog="python -m bitnet_ref.measure.head_cost", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--skip-bytes", type=int, default=0, help="bytes of the text to leave out at its beginning")
    options = parser.parse_args()
    model = load(options.model, head="f32")
    text = options.text.read_bytes()[options.skip_bytes :].decode(errors="ignore")
    tokens = model.tokenizer.encode(text[: 12 * options.chunks * options.context])[: options.chunks * options.context]
    print("| head | bits per weight | perplexity | change | rms error | largest | same best | KL divergence |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in measure_heads(model, tokens, options.context):
        print(
            "| `{head}` | {bits_per_weight:g} | {perplexity:.4f} | {change:+.3%} +- {change_error:.3%} | "
            "{rms_error:.1e} | {largest_error:.1e} | {same_best:.2%} | {kl_divergence:.1e} |".format(**row)
        )


if __name__ == "__main__":
    main()
