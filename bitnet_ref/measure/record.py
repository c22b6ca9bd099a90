"""The header of every result file: what machine, what build, what commit, when."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import cpuinfo
import numpy as np

from bitnet_ref import __version__, kernels

__all__ = ["cache_bytes", "record"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def record(command: str) -> dict[str, object]:
    """Everything that a reader needs to judge a measurement, as JSON-ready values.

    Parameters
    ----------
    command : str
        What was run.

    Returns
    -------
    dict
        date (UTC), command, version, commit (of the build; None outside a git checkout), cpu, cores (that this process
        may use), cache_bytes (last level; None if unknown), memory_bytes, isas, isa_cap, active (kernel per op and
        scheme), compiler, openmp, threads, python, numpy, platform, load_average (1, 5, 15 minutes; None if unknown).
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "version": __version__,
        "commit": kernels.COMMIT,
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.processor() or "unknown"),
        "cores": _cores(),
        "cache_bytes": cache_bytes(),
        "memory_bytes": _memory_bytes(),
        "isas": list(kernels.processor_isas()),
        "isa_cap": kernels.isa_cap(),
        "active": {f"{row['op']} {row['scheme']}": row["name"] for row in kernels.table() if row["active"]},
        "compiler": kernels.COMPILER,
        "openmp": kernels.HAS_OPENMP,
        "threads": kernels.resolve_threads(None),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def cache_bytes() -> int | None:
    """Bytes of the last-level cache as Linux reports it, or None."""
    sizes = []
    for entry in _CACHES.glob("index*"):
        try:
            text = (entry / "size").read_text().strip()
        except OSError:
            continue
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
