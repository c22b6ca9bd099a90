"""The packing pages under docs/: their golden bytes, size tables and lookup tables are what the code gives."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from bitnet_ref.reference import packing
from bitnet_ref.reference.packing import PackedTernary, get_scheme, pack, schemes

DOCS = Path(__file__).resolve().parent.parent / "docs"

# Ternary matrices of one of the 30 layers of BitNet b1.58 2B4T as (M, K, how many): hidden 2560, FFN 6912, 20 query and
# 5 key/value heads of 128 (released configuration of [2B4T]).
LAYER = {"q, o": (2560, 2560, 2), "k, v": (640, 2560, 2), "gate, up": (6912, 2560, 2), "down": (2560, 6912, 1)}

every_scheme = pytest.mark.parametrize("scheme", schemes())


def page(scheme):
    return (DOCS / f"packing-{scheme}.md").read_text(encoding="utf-8")


def expand(words):
    """["44", "00*3"] -> ["44", "00", "00", "00"]"""
    out = []
    for word in words:
        item, _, times = word.partition("*")
        out += [item] * int(times or 1)
    return out


def golden_blocks(scheme):
    """(weights, data) of every golden block of the page."""
    for block in re.findall(r"^```golden\n(.*?)^```$", page(scheme), re.MULTILINE | re.DOTALL):
        golden = tomllib.loads(block)
        weights = [["-0+".index(sign) - 1 for sign in row] for row in expand(golden["weights"])]
        data = [[int(byte, 16) for byte in expand(tile.split())] for tile in golden["bytes"]]
        yield np.array(weights, np.int8), np.array(data, np.uint8)


def table_rows(scheme, first_cells):
    """Cells of the table rows of the page whose first cell is one of those given."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in page(scheme).splitlines()]
    return [cells for cells in rows if cells[0] in first_cells]


@every_scheme
def test_golden_bytes(scheme):
    blocks = list(golden_blocks(scheme))
    assert len(blocks) == 2
    for w, data in blocks:
        packed = pack(w, scheme)
        np.testing.assert_array_equal(packed.data, data)
        np.testing.assert_array_equal(PackedTernary(data, w.shape, scheme).unpack(), w)
    (m, k), s = blocks[1][0].shape, get_scheme(scheme)
    assert m > s.rows and k > s.block  # more than one tile and block, so their order is pinned too


@every_scheme
def test_size_table(scheme):
    s = get_scheme(scheme)
    rows = {cells[0]: cells[1:] for cells in table_rows(scheme, LAYER)}
    assert rows.keys() == LAYER.keys()
    total_bytes = total_weights = 0
    for name, (m, k, count) in LAYER.items():
        nbytes = int(np.prod(s.data_shape((m, k))))
        m_padded, k_padded = s.padded_shape((m, k))
        assert rows[name] == [f"{m} x {k}", f"{m_padded} x {k_padded}", f"{nbytes:,}", f"{nbytes * 8 / (m * k):.4f}"]
        total_bytes += 30 * count * nbytes
        total_weights += 30 * count * m * k
    assert total_weights == 2_084_044_800
    [total] = table_rows(scheme, ["all 210 matrices"])
    assert total[1:] == ["30 layers", "", f"{total_bytes:,}", f"{total_bytes * 8 / total_weights:.4f}"]


@pytest.mark.parametrize("scheme", ["tl1", "tl2"])
def test_lookup_table_example(scheme):
    [head] = [line for line in page(scheme).splitlines() if line.startswith("| index, for (a, b")]
    x_q = np.array([int(value) for value in re.search(r"= \(([-\d, ]+)\)", head)[1].split(",")], np.int8)
    entry, high, low = (
        [int(cell) for cell in cells[1:]] for cells in table_rows(scheme, ["entry", "high digit", "low digit"])
    )
    assert getattr(packing, f"entries_{scheme}")(x_q)[0, : len(entry)].tolist() == entry
    tables = getattr(packing, f"tables_{scheme}")(x_q)[0, :, : len(entry)]
    assert tables.tolist() == [low, high]
    assert len(entry) == {"tl1": 9, "tl2": 14}[scheme]


@every_scheme
def test_page_names_its_tile_and_block(scheme):
    s = get_scheme(scheme)
    assert f"M is padded to a multiple of {s.rows} and K to a multiple of {s.block}" in page(scheme)
