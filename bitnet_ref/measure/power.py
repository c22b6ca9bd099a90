"""Read the energy counters of the machine, where it has them and allows it.

Linux offers the processor's own counters (RAPL: Intel, and AMD under the same names) as files in
``/sys/class/powercap``: each zone has ``name``, ``energy_uj`` (microjoules since some start, wrapping) and
``max_energy_range_uj``. Most systems let only root read ``energy_uj``, and virtual machines and containers have none.
Then the answer is "not available" and why; nothing here estimates energy from processor use.

A counter sees every process on the machine, and the memory only where a ``dram`` zone exists. Zones are nested (a
package contains its cores), so they are reported side by side and never added up, and nothing is subtracted: measure an
idle machine with `idle` and set it beside the reading.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bitnet_ref.errors import BitnetRefError
from bitnet_ref.measure.provenance import Kind, Row

__all__ = [
    "POWERCAP_ROOT",
    "EnergyDomain",
    "EnergyMeter",
    "EnergyReading",
    "available",
    "counter_difference_uj",
    "idle",
]

POWERCAP_ROOT = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyDomain:
    """One zone with a readable counter.

    Parameters
    ----------
    zone : str
        Directory name, for example "intel-rapl:0:1"; the part before the last colon is the enclosing zone.
    name : str
        What the kernel calls it: "package-0", "core", "uncore", "dram", "psys".
    counter : Path
        The energy_uj file.
    max_range_uj : int
        Value after which the counter starts again at 0.
    """

    zone: str
    name: str
    counter: Path
    max_range_uj: int

    @property
    def label(self) -> str:
        """Zone and name: names repeat on machines with several processors, zones do not."""
        return f"{self.zone} {self.name}"

    def read_uj(self) -> int:
        """Present value of the counter in microjoules.

        Raises
        ------
        OSError
            If the file cannot be read.
        BitnetRefError
            If it does not hold a number between 0 and `max_range_uj`.
        """
        text = self.counter.read_text().strip()
        if not text.isdecimal() or int(text) > self.max_range_uj:
            raise BitnetRefError(f"{self.counter} must hold a number from 0 to {self.max_range_uj}, got {text!r}")
        return int(text)


def available(root: Path | str = POWERCAP_ROOT) -> list[EnergyDomain] | str:
    """Energy counters that can be read now, in order of zone, or one line "not available: ..." with the reason.

    Parameters
    ----------
    root : path
        The powercap directory; tests give another.
    """
    root = Path(root)
    if not root.is_dir():
        return f"not available: {root} does not exist (not Linux, or a machine without powercap)"
    zones = sorted(path for path in root.glob("*rapl*:*") if (path / "energy_uj").exists())
    if not zones:
        return f"not available: {root} holds no RAPL zone with an energy counter (a virtual machine, or no driver)"
    domains: list[EnergyDomain] = []
    reason = ""
    for path in zones:
        try:
            domain = EnergyDomain(
                zone=path.name,
                name=(path / "name").read_text().strip(),
                counter=path / "energy_uj",
                max_range_uj=int((path / "max_energy_range_uj").read_text()),
            )
            domain.read_uj()
        except PermissionError:
            reason = reason or f"{path / 'energy_uj'} may be read by root only"
        except (OSError, ValueError, BitnetRefError) as error:
            reason = reason or str(error)
        else:
            domains.append(domain)
    return domains or f"not available: {reason}"


def counter_difference_uj(before: int, after: int, max_range_uj: int) -> int:
    """Microjoules between two readings of a counter that started again at 0 at most once in between.

    The kernel does not say whether `max_range_uj` itself is a value or the first one not reached; the difference is one
    step of the counter, far below its resolution.
    """
    if not (0 <= before <= max_range_uj and 0 <= after <= max_range_uj):
        raise ValueError(f"readings must lie between 0 and {max_range_uj}, got {before} and {after}")
    return after - before if after >= before else max_range_uj - before + after


@dataclass(frozen=True, kw_only=True)
class EnergyReading(Row):
    """Energy that one counter recorded over a stretch of time, idle power included."""

    domain: str
    window: str
    seconds: float
    joules: float
    watts: float
    kind: Kind = "measured"


class EnergyMeter:
    """Context manager that reads every available counter at entry and exit.

    Call `poll` inside stretches of more than some minutes: a counter may start again at 0 (a package at 200 W does so
    about every 20 minutes with a range of 262 kJ), and only one restart between two readings can be told.

    Parameters
    ----------
    root : path
        The powercap directory.

    Attributes
    ----------
    joules : dict of str to float
        Label of the domain -> joules so far. Nothing is subtracted.
    seconds : float
        Duration so far.

    Raises
    ------
    BitnetRefError
        On construction, if no counter is available; the message says why.

    Examples
    --------
    >>> with EnergyMeter() as meter:  # doctest: +SKIP
    ...     work()
    >>> meter.joules  # doctest: +SKIP
    {'intel-rapl:0 package-0': 12.3, 'intel-rapl:0:0 core': 9.8}
    """

    def __init__(self, root: Path | str = POWERCAP_ROOT) -> None:
        found = available(root)
        if isinstance(found, str):
            raise BitnetRefError(f"an energy counter is {found}")
        self.domains = found
        self._start()

    def _start(self) -> None:
        self._total_uj = dict.fromkeys((d.label for d in self.domains), 0)
        self._last_uj = {d.label: d.read_uj() for d in self.domains}
        self._begin = time.perf_counter()
        self.seconds = 0.0

    @property
    def joules(self) -> dict[str, float]:
        return {label: total / 1e6 for label, total in self._total_uj.items()}

    def poll(self) -> None:
        """Add what the counters recorded since the last reading."""
        self.seconds = time.perf_counter() - self._begin
        for domain in self.domains:
            now = domain.read_uj()
            self._total_uj[domain.label] += counter_difference_uj(self._last_uj[domain.label], now, domain.max_range_uj)
            self._last_uj[domain.label] = now

    def __enter__(self) -> EnergyMeter:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.poll()

    def rows(self, window: str) -> list[EnergyReading]:
        """One row for each counter; `window` says what was running. ValueError before the first reading."""
        if not self.seconds:
            raise ValueError("rows needs a reading: leave the with block or call poll first")
        return [
            EnergyReading(
                domain=label,
                window=window,
                seconds=self.seconds,
                joules=joules,
                watts=joules / self.seconds,
                source="Linux powercap (RAPL) counter, whole machine, nothing subtracted",
            )
            for label, joules in self.joules.items()
        ]


def idle(seconds: float, root: Path | str = POWERCAP_ROOT) -> list[EnergyReading]:
    """Energy of the machine while this program sleeps for `seconds`: what stands beside a reading under load.

    Other programs go on running, so this is an upper bound of idle power.

    Raises
    ------
    ValueError
        If `seconds` is not positive.
    BitnetRefError
        If no counter is available.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    with EnergyMeter(root) as meter:
        time.sleep(seconds)
    return meter.rows("idle")
