"""Tables of a run like those of [BitDistill]: Table 1 (the three models), 5 (stages) and 6 (losses), over seeds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet_ref.errors import FormatError

__all__ = ["collect", "markdown", "summary", "write_tables"]

TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "models": (
        "as Table 1 of [BitDistill]",
        {"teacher": "full precision, fine-tuned", "direct": "ternary, fine-tuned", "bitdistill": "BitDistill"},
    ),
    "stages": (
        "as Table 5: SubLN, continued pre-training, distillation",
        {
            "direct": "none",
            "subln": "SubLN",
            "subln-ct": "SubLN, continued pre-training",
            "subln-distill": "SubLN, distillation",
            "bitdistill": "all",
        },
    ),
    "starts": (
        "where students of both losses begin",
        {
            "subln-distill": "SubLN",
            "bitdistill": "SubLN, continued pre-training",
            "blocks": "SubLN, blocks one by one, and nothing more",
            "blocks-ce": "SubLN, blocks one by one, and cross-entropy alone",
            "blocks-ld": "SubLN, blocks one by one, and logits alone",
            "blocks-distill": "SubLN, blocks one by one",
        },
    ),
    "losses": (
        "as Table 6: losses beside cross-entropy, after continued pre-training",
        {"subln-ct": "none", "ct-ld": "logits", "ct-ad": "attention relations", "bitdistill": "both"},
    ),
}
"""Key -> caption, and stage -> its name in the table."""

LOSSES = ("loss", "ce", "ld", "ad", "hd")
"""What is minimised, and its terms before their weights."""

POINTS = 50
"""Points of a curve at most, each the mean of as many steps; the last may be of fewer."""

_GAPS = {
    "gap": ("bitdistill", "BitDistill"),
    "gap_blocks": ("blocks-distill", "The student of blocks"),
    "gap_blocks_ld": ("blocks-ld", "The student of blocks and logits"),
}
"""Key -> the student that is set between teacher and baseline, and its name in a sentence."""


def collect(out: str | Path) -> list[dict[str, Any]]:
    """All finished stages of a run.

    Returns
    -------
    list of dict
        ``stage``, ``seed``, ``step``, ``seconds``, ``tokens`` and ``test``; ``development``, the ``score`` after some
        steps, with ``tokens`` so far; ``training``, columns ``step`` and each loss, means over up to ``step``;
        of students ``weights``, before and after; of blocks ``errors``, a row for each; ``made``, when and on what. One
        stage that serves all seeds comes once.

    Raises
    ------
    FormatError
        If there is none, or a file is no result.
    """
    rows = []
    for path in sorted(Path(out).glob("seed-*/*/result.json")):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            found = {key: row[key] for key in ("stage", "seed", "step", "seconds", "tokens")} | {
                "test": row.get("test")
            }
            found |= _curves(path.with_name("metrics.jsonl"))
            rows.append(found | {key: row[key] for key in ("errors", "weights", "made") if key in row})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise FormatError(f"{path} must be the result of a stage: {error!r}") from error
    if not rows:
        raise FormatError(f"{out} must be the folder of a run with finished stages, it has none")
    return rows


def _curves(path: Path) -> dict[str, Any]:
    """Evaluations and losses in a file of metrics, if there is one."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
    development, steps, planned = [], [], 0
    for row in map(json.loads, lines):
        if row.get("event") == "development":
            tokens = steps[-1]["tokens"] if steps else 0
            development.append({"step": row["step"], "tokens": tokens, "score": row["score"]})
        elif row.get("event") == "start":
            planned = row["steps"]
        elif "event" not in row:
            steps.append(row)
    # By the steps that were planned, so that a seed which was stopped early has its points where the others have them.
    size = max(1, math.ceil(planned / POINTS))
    parts = [steps[i : i + size] for i in range(0, len(steps), size)]
    training: dict[str, list[float]] = {"step": [part[-1]["step"] for part in parts]}
    for key in LOSSES if steps else ():
        if key in steps[0]:
            training[key] = [float(f"{math.fsum(row[key] for row in part) / len(part):.6g}") for part in parts]
    return {"development": development, "training": training}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value) and number."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    return {"mean": mean, "sd": spread, "n": n, "values": list(values)}


def tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tables as JSON-ready values; a stage that did not run has no row.

    Returns
    -------
    dict
        Key of :data:`TABLES` -> ``caption`` and ``rows``, each with ``stage``, ``name`` and a summary for every figure.
        ``gap`` has, where all three models are there, ``to_teacher`` (teacher minus BitDistill, by seed) and
        ``recovered`` (the share of teacher minus direct that BitDistill wins back; of the means over
        ``seeds_of_direct``, which both have); ``gap_blocks`` the same of blocks-distill,
        ``gap_blocks_ld`` of blocks-ld.
    """
    figures: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for key, value in (row["test"] or {}).items():
            if key != "score":
                figures.setdefault(row["stage"], {}).setdefault(key, {})[row["seed"]] = value
    made: dict[str, Any] = {}
    for key, (caption, names) in TABLES.items():
        lines = [
            {"stage": stage, "name": name}
            | {figure: summary([by[s] for s in sorted(by)]) for figure, by in figures[stage].items()}
            for stage, name in names.items()
            if stage in figures
        ]
        if len(lines) > 1:
            made[key] = {"caption": caption, "rows": lines}
    for key, (student, _) in _GAPS.items():
        if not all(stage in figures for stage in ("teacher", "direct", student)):
            continue
        figure = "accuracy" if "accuracy" in figures["teacher"] else "average"
        teacher, direct, ours = (figures[stage][figure] for stage in ("teacher", "direct", student))
        seeds = sorted(set(direct) & set(ours))
        if not seeds:
            continue
        # One teacher may serve all seeds.
        of = {s: teacher.get(s, next(iter(teacher.values()))) for s in sorted(ours)}
        gap = math.fsum(of[s] - direct[s] for s in seeds)
        won = math.fsum(ours[s] - direct[s] for s in seeds)
        made[key] = {
            "figure": figure,
            "to_teacher": summary([of[s] - ours[s] for s in of]),
            "over_direct": summary([ours[s] - direct[s] for s in seeds]),
            "recovered": won / gap if gap > 0 else None,
            "seeds_of_direct": seeds,
        }
    return made


def markdown(made: Mapping[str, Any]) -> str:
    """The tables as Markdown; accuracies in per cent."""
    parts = []
    for key in TABLES:
        if key not in made:
            continue
        rows = made[key]["rows"]
        figures = [figure for figure in rows[0] if figure not in ("stage", "name")]
        lines = [f"{made[key]['caption']}:", "", "| " + " | ".join(["", *figures, "seeds"]) + " |"]
        lines.append("| --- |" + " ---: |" * (len(figures) + 1))
        for row in rows:
            cells = [_cell(figure, row[figure]) for figure in figures]
            lines.append("| " + " | ".join([row["name"], *cells, str(row[figures[0]]["n"])]) + " |")
        parts.append("\n".join(lines))
    for key, (_, name) in _GAPS.items():
        if key not in made:
            continue
        gap = made[key]
        text = f"{name} is {_cell(gap['figure'], gap['to_teacher'])} below its teacher"
        if gap["recovered"] is not None:
            text += f" and wins back {gap['recovered']:.0%} of what direct ternarisation loses"
            if len(gap["seeds_of_direct"]) < gap["to_teacher"]["n"]:
                text += f" (seeds {', '.join(map(str, gap['seeds_of_direct']))})"
        n = gap["to_teacher"]["n"]
        over = "one seed" if n == 1 else f"mean, ± standard deviation over {n} seeds"
        parts.append(f"{text} ({gap['figure']}; {over}).")
    return "\n\n".join(parts) + "\n"


def write_tables(out: str | Path) -> dict[str, Any]:
    """Write ``tables.json`` and ``tables.md`` of a run into its folder.

    Returns
    -------
    dict
        ``record`` of the run, all ``results`` and ``tables``.
    """
    out = Path(out)
    rows = collect(out)
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    document = {"record": record, "results": rows, "tables": tables(rows)}
    for name, text in (
        ("tables.json", json.dumps(document, indent=2, allow_nan=False) + "\n"),
        ("tables.md", markdown(document["tables"])),
    ):
        (out / f".{name}").write_text(text, encoding="utf-8")
        os.replace(out / f".{name}", out / name)
    return document


def _cell(figure: str, value: Mapping[str, Any]) -> str:
    factor, digits = (100, 2) if figure == "accuracy" else (1, 4 if figure == "loss" else 2)
    text = f"{factor * value['mean']:.{digits}f}"
    return text if value["sd"] is None else f"{text} ± {factor * value['sd']:.{digits}f}"
