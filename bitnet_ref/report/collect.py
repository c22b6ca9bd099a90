"""Everything that the report shows, as one dictionary of plain values; each row names its kind and source."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ref import kernels
from bitnet_ref.errors import BitnetRefError
from bitnet_ref.formats import inspect_file, weight_distribution
from bitnet_ref.measure import energy, file_account, memory, model_speed, power, speed
from bitnet_ref.measure.architectures import PUBLISHED_SIX
from bitnet_ref.measure.record import record
from bitnet_ref.reference.packing import PackedTernary, pack

__all__ = [
    "Progress",
    "collect",
    "energy_parts_rows",
    "measure_energy",
    "modelled_results",
    "weight_results",
]

Progress = Callable[[str, float], None]
"""Called as ``progress(label, fraction done)``."""

_SPEED_BEGINS = 0.08
_SPEED_ENDS = 0.75
_MODELS_END = 0.9


def collect(*, quick: bool, weights: Path | None, command: str, progress: Progress | None = None) -> dict[str, Any]:
    """Compute the models, measure the machine, and return all of it.

    Parameters
    ----------
    quick : bool
        Fewer shapes and kernels; see :func:`bitnet_ref.measure.speed.measure`.
    weights : Path, optional
        A safetensors or GGUF file for the section on weights.
    command : str
        What was run, for the record.
    progress : callable, optional
        Called with a label and the fraction done.

    Returns
    -------
    dict
        Keys record, limits, speed, model_speed, model_files, parity, training, memory, energy, energy_parts,
        energy_left_out, energy_bitnet_table, energy_b158, energy_implied_watts, energy_measured; weights if a
        file was given. Values are JSON-ready.

    Raises
    ------
    FormatError, ValueError
        If the weight file cannot be read or has no linear layer.
    BitnetRefError
        If a kernel gives a wrong result.
    """
    report = progress or (lambda label, fraction: None)
    begin = time.perf_counter()
    # The record comes first: its load average is that of the machine before this program loads it.
    header = record(command=command)
    results: dict[str, Any] = {"record": header, **modelled_results()}
    if weights is not None:  # before the long measurement, so that a bad file fails at once
        report(f"reading {weights.name}", 0.0)
        results["weights"] = weight_results(
            weights, lambda done, total, name: report(f"{weights.name}: {name}", _SPEED_BEGINS * done / total)
        )
    speed_rows, limit_rows = speed.measure(
        quick,
        lambda label, fraction: report(label, _SPEED_BEGINS + (_SPEED_ENDS - _SPEED_BEGINS) * fraction),
    )
    results["speed"], results["limits"] = speed_rows, limit_rows
    results["model_speed"] = model_speed.measure_model_speed(
        quick, lambda label, fraction: report(label, _SPEED_ENDS + (_MODELS_END - _SPEED_ENDS) * fraction)
    )
    report("model files", _MODELS_END)
    results["model_files"] += file_results()
    report("energy counters", _MODELS_END)
    results["energy_measured"] = measure_energy(1.0 if quick else 5.0)
    header["quick"] = quick
    header["seconds"] = round(time.perf_counter() - begin, 1)
    return results


def modelled_results() -> dict[str, Any]:
    """The tables that need no measurement: memory and energy, modelled and quoted."""
    tables = {
        "steps": memory.paper_steps(),
        "account": memory.account_rows(),
        "body": memory.body_rows(),
        "embedding": memory.embedding_rows(),
        "rivals": memory.rival_rows(),
        "kv": memory.kv_rows(),
    }
    return {
        "memory": [{"table": table, **row.as_row()} for table, rows in tables.items() for row in rows],
        "model_files": file_account.model_form_rows(),
        "parity": parity_results(),
        "training": training_results(),
        "energy": [row.as_row() for row in energy.published_rows()],
        "energy_parts": energy_parts_rows(),
        "energy_left_out": [row.as_row() for row in energy.left_out_rows()],
        "energy_bitnet_table": [row.as_row() for row in energy.bitnet_table_rows()],
        "energy_b158": [row.as_row() for row in energy.b158_rows()],
        "energy_implied_watts": [row.as_row() for row in energy.implied_watts_rows()],
    }


def _kept(name: str, *versions: str) -> tuple[dict[str, Any], str]:
    """A file of results of programs that the base install lacks, and where they come from."""
    kept = json.loads(resources.files("bitnet_ref.report").joinpath(name).read_text(encoding="utf-8"))
    about = kept["record"]
    return kept, (
        f"{about['command']}, measured on {about['date'][:10]}, {about['cpu']}, commit {about['commit']}, "
        f"{', '.join(f'{version} {about[version]}' for version in versions)}; not on this machine"
    )


def parity_results() -> list[dict[str, Any]]:
    """Errors against transformers: from the file that ``make parity`` wrote."""
    kept, source = _kept("parity_transformers.json", "transformers", "torch")
    return [{**row, "kind": "measured", "source": source} for row in kept["rows"]]


def training_results() -> dict[str, Any]:
    """Small models trained over seeds, which takes PyTorch and time: from the file that ``distill study`` wrote."""
    kept, source = _kept("training_study.json", "torch")
    about = {"kind": "measured", "source": source}
    runs = {key: [{**row, **about} for row in kept[key]] for key in ("scratch", "continued")}
    return {**about, "settings": kept["settings"], **runs}


def file_results() -> list[dict[str, Any]]:
    """Bytes of the packaged model written in every form; no rows if this installation has no model."""
    model = Path(__file__).parents[1] / "models" / "small" / "small-base3.safetensors"
    if not model.exists():
        return []
    with tempfile.TemporaryDirectory() as folder:
        return file_account.form_rows(model, Path(folder))


def energy_parts_rows() -> list[dict[str, Any]]:
    """The last case of `energy.left_out_rows`, split into linear, attention, head and moved bytes."""
    moved = {(row.phase, row.model): row for row in energy.left_out_rows() if row.case == energy.LEFT_OUT_CASES[-1]}
    computes = {"512-token forward": energy.forward_energy, "one decoded token": energy.decode_energy}
    rows = []
    for phase, compute in computes.items():
        for arch in PUBLISHED_SIX:
            estimate = compute(arch, attention="fp16", head="fp16")
            whole = moved[phase, arch.name]
            for part, joules, source in (
                ("linear", estimate.linear_joules, estimate.source),
                ("attention", estimate.attention_joules, estimate.source),
                ("head", estimate.head_joules, estimate.source),
                ("moved", whole.moved_joules, whole.source),
            ):
                rows.append(
                    {
                        "model": arch.name,
                        "phase": phase,
                        "part": part,
                        "joules": joules,
                        "kind": "modelled",
                        "source": source,
                    }
                )
    return rows


def weight_results(path: Path, progress: Callable[[int, int, str], None] | None = None) -> dict[str, Any]:
    """What absmean ternarisation would make of a weight file: a row for each tensor and a pooled histogram.

    Parameters
    ----------
    path : Path
        A safetensors or GGUF file. Only its name goes into the results, not where it lies.
    progress : callable(done, total, name), optional
    """
    found = inspect_file(path, progress)
    pooled = weight_distribution(path)
    source = f"counted in {path.name}"
    about = {"kind": "measured", "source": source}
    report = found.as_dict()
    return {
        **about,
        "file": path.name,
        "format": report["format"],
        "file_bytes": report["file_bytes"],
        "notes": list(report["notes"]),
        "tensors": [{**row, **about} for row in report["tensors"]],
        "histogram": {
            **about,
            "edges": pooled.edges.tolist(),
            "counts": pooled.counts.tolist(),
            "n_outside": int(pooled.n_outside),
            "n_layers": len(pooled.layers),
            "fraction_zeros": float(pooled.fraction_zeros),
            "dequantised_from": list(pooled.dequantised_from),
            "skipped": list(pooled.skipped),
        },
    }


def measure_energy(
    seconds: float,
    work: Callable[[], int] | None = None,
    root: Path | str = power.POWERCAP_ROOT,
) -> dict[str, Any]:
    """Read the energy counters while the machine idles and while a kernel multiplies, if there are any.

    Parameters
    ----------
    seconds : float
        Least length of each of the two windows.
    work : callable, optional
        Does one unit of work and returns how many weights it multiplied. By default a one-token product of the
        selected `i2` kernel on all threads, over copies of a layer that no cache holds.
    root : path
        The powercap directory.

    Returns
    -------
    dict
        {"kind", "available": False, "reason"} or {"kind", "available": True, "rows"}, rows as
        :class:`bitnet_ref.measure.power.EnergyReading` with `joules_per_1e9_weights`, None for the idle window.
    """
    found = power.available(root)
    if isinstance(found, str):
        return {"kind": "measured", "available": False, "reason": found}
    try:
        rows = [{**row.as_row(), "joules_per_1e9_weights": None} for row in power.idle(seconds, root)]
        unit = work or _stream_i2()
        weights = 0
        with power.EnergyMeter(root) as meter:
            end = time.perf_counter() + seconds
            while True:
                weights += unit()
                if time.perf_counter() >= end:
                    break
        window = "one-token i2 products, all threads"
        for row in meter.rows(window):
            rows.append({**row.as_row(), "joules_per_1e9_weights": row.joules / (weights / 1e9)})
    except (OSError, BitnetRefError) as error:  # a counter that was there a moment ago
        return {"kind": "measured", "available": False, "reason": f"not available: {error}"}
    return {"kind": "measured", "available": True, "rows": rows}


def _stream_i2() -> Callable[[], int]:
    """Pass over enough copies of a 6912 x 2560 layer that no cache holds them, one token each."""
    m, k = 6912, 2560
    rng = np.random.default_rng(0)
    packed = pack(rng.integers(-1, 2, (m, k), dtype=np.int8), "i2")
    x_q = rng.integers(-127, 128, k, dtype=np.int8)
    kernel = kernels.select("gemv", "i2")
    copies = [
        PackedTernary(packed.data.copy(), packed.shape, packed.scheme)
        for _ in range(max(2, -(-2 * (speed.cache_bytes() or 2**25) // packed.nbytes)))
    ]
    out = np.empty(m, np.int32)

    def unit() -> int:
        for copy in copies:
            kernel(x_q, copy, out=out)
        return m * k * len(copies)

    return unit


def check_directory(out: Path) -> None:
    """Make the directory of the report, or say why it cannot be, before minutes are spent on measuring.

    Raises
    ------
    BitnetRefError
        If it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BitnetRefError(f"the report needs a directory that can be written, got {out}: {error.strerror}") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise BitnetRefError(f"the report needs a directory that can be written, got {out}: no permission")
