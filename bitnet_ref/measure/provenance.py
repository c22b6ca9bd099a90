"""Where a number comes from: every row of every table names its kind and its source.

``measured``
    Read from a clock or a counter on the machine that ran this program.
``modelled``
    Computed here, from stated constants or from figures of others: nothing was observed.
``quoted``
    Printed by somebody else in the place named, and nothing else: a product or a ratio of quoted figures is modelled.

A column holds one kind only. A row that sets a modelled figure beside a published one has two columns and names the
kind of each: ``kind`` is the kind of the row's own figures and ``published_kind`` that of the columns ``published_*``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

__all__ = ["KINDS", "Kind", "Row"]

Kind = Literal["measured", "modelled", "quoted"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Base of every table row: subclasses add the columns, this adds the provenance.

    Parameters
    ----------
    kind : {"measured", "modelled", "quoted"}
        What the row's own figures are.
    source : str
        The paper and table, the constants, or the instrument. Never empty.

    Raises
    ------
    ValueError
        If `kind`, or any other field whose name ends in ``_kind``, is not one of `KINDS`, or `source` is empty.
    """

    kind: Kind
    source: str

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name == "kind" or field.name.endswith("_kind"):
                value = getattr(self, field.name)
                if value not in KINDS:
                    raise ValueError(f"{field.name} must be one of {', '.join(KINDS)}, got {value!r}")
        if not self.source.strip():
            raise ValueError("source must name where the figures come from, got an empty string")

    def as_row(self) -> dict[str, Any]:
        """Return the row as a flat dictionary, provenance last."""
        names = [f.name for f in fields(self) if f.name not in ("kind", "source")]
        return {name: getattr(self, name) for name in [*names, "kind", "source"]}
