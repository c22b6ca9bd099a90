"""The energy model against the published tables, and the reading of energy counters against a made-up sysfs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ref.errors import BitnetRefError
from bitnet_ref.measure import energy, power
from bitnet_ref.measure.architectures import B158_SHAPES, BITNET_2B4T, BITNET_SHAPES, PUBLISHED_SIX, Architecture
from bitnet_ref.measure.energy import decode_energy, forward_energy
from bitnet_ref.measure.provenance import KINDS

PAGE = Path(__file__).parents[1] / "docs" / "energy.md"


# ------------------------------------------------------------------------------------------------------ [2B4T]
def test_the_six_published_energies() -> None:
    rows = energy.published_rows()
    assert [row.published_joules for row in rows] == [0.258, 0.186, 0.347, 0.425, 0.649, 0.028]
    for row in rows:
        assert abs(row.relative_difference) < 0.01, row.model  # the bar that the project sets itself
        # Stronger: each prints as published, with three decimals.
        assert round(row.modelled_joules, 3) == row.published_joules
        assert (row.kind, row.published_kind) == ("modelled", "quoted")


def test_what_bitnets_figure_consists_of() -> None:
    estimate = forward_energy(BITNET_2B4T)
    assert f"{estimate.linear_add_joules:.5f}" == "0.00747"
    assert f"{estimate.linear_mul_joules:.5f}" == "0.00024"
    assert f"{estimate.attention_joules:.4f}" == "0.0201"
    assert f"{estimate.attention_joules / estimate.joules:.0%}" == "72%"
    assert f"{forward_energy(BITNET_2B4T, attention='int8').joules:.4f}" == "0.0108"


def test_saving_range_and_arithmetic_ratio() -> None:
    for column in ("published", "modelled"):
        assert [f"{saving:.0%}" for saving in energy.saving_range(column)] == ["85%", "96%"]
    assert f"{energy.arithmetic_ratio():.1f}" == "71.4"
    with pytest.raises(ValueError, match="column must be"):
        energy.saving_range("measured")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- [BitNet, Table 1]
DEVIATING_CELLS = {
    # (size, model, operation, node): modelled joules, two decimals more than printed. Published: 0.04 and 0.14.
    ("6.7B", "BitNet", "ADD", 7): 0.0340,
    ("30B", "BitNet", "ADD", 7): 0.1348,
}


def test_34_of_36_cells_of_the_bitnet_table_print_as_published() -> None:
    rows = energy.bitnet_table_rows()
    assert len(rows) == 36
    deviating = {
        (r.size, r.model, r.operation, r.node_nm): round(r.modelled_joules, 4) for r in rows if not r.within_rounding
    }
    assert deviating == DEVIATING_CELLS


def test_the_two_deviating_cells_ask_for_a_dearer_addition() -> None:
    """All three BitNet additions at 7 nm round to the table for INT8 additions of 0.0073 to 0.0074 pJ, not 0.007."""
    lowest, highest = 0.0, 1.0
    for size, arch in BITNET_SHAPES.items():
        published = energy.BITNET_TABLE1_JOULES[size]["BitNet"][1]
        estimate = forward_energy(arch, weights="ternary")
        additions = estimate.linear_add_joules / energy.OPERATION_PJ[7]["int8"].add
        lowest = max(lowest, (published - 0.005 - estimate.attention_add_joules) / additions)
        highest = min(highest, (published + 0.005 - estimate.attention_add_joules) / additions)
    assert (round(lowest, 4), round(highest, 4)) == (0.0073, 0.0074)


def test_llamas_30b_shape_does_not_give_the_30b_column() -> None:
    """LLaMA's 30B (6656 wide, 60 layers, gated, 17 920 inside) is 9 % off where the table has three digits."""
    llama = replace(BITNET_SHAPES["30B"], layers=60, hidden=6656, ffn=17_920, heads=52, kv_heads=52, gated_ffn=True)
    published = energy.BITNET_TABLE1_JOULES["30B"]["FP16"][0]
    assert f"{forward_energy(llama).mul_joules / published - 1:.0%}" == "9%"
    assert round(forward_energy(BITNET_SHAPES["30B"]).mul_joules, 2) == published


# ------------------------------------------------------------------------------------------------------ [B158], rest
def test_b158_ratios() -> None:
    rows = {row.size: row for row in energy.b158_rows()}
    assert [f"{row.ratio:.1f}" for row in rows.values()] == ["15.1", "18.6", "25.2", "29.8", "29.2", "33.1", "42.2"]
    with_head = [f"{row.ratio_with_head:.1f}" for row in rows.values()]
    assert with_head == ["7.9", "9.9", "14.6", "17.9", "18.9", "23.6", "36.5"]
    assert set(rows) == set(B158_SHAPES)
    # No model reaches the ratio of the multiply-accumulate alone.
    assert all(row.ratio < energy.arithmetic_ratio() for row in rows.values())


def _left_out(phase: str, case: str, **arguments) -> dict[str, energy.LeftOutRow]:
    return {r.model: r for r in energy.left_out_rows(**arguments) if (r.phase, r.case) == (phase, case)}


def test_what_the_published_figure_leaves_out() -> None:
    published = _left_out("512-token forward", "as published")
    assert {m: r.joules for m, r in published.items()} == {r.model: r.modelled_joules for r in energy.published_rows()}

    head = _left_out("512-token forward", "+ output head")[BITNET_2B4T.name]
    # 328 335 360 weights x 512 tokens x 0.5 pJ = 0.0841 J, on top of 0.0278.
    assert f"{head.joules:.3f}" == "0.112"

    decode = _left_out("one decoded token", "+ weights read from memory")
    bitnet = decode[BITNET_2B4T.name]
    assert bitnet.moved_bytes == 1_179_449_920
    assert bitnet.moved_joules == pytest.approx(1_179_449_920 * 162.5e-12, rel=1e-12)  # one product in another order
    assert bitnet.moved_joules / bitnet.joules > 0.99
    assert f"{bitnet.compute_joules / bitnet.moved_bytes * 1e12:.2f}" == "0.19"  # pJ a byte at which both are equal
    savings = [row.bitnet_saving for row in decode.values() if row.bitnet_saving is not None]
    assert [f"{s:.0%}" for s in (min(savings), max(savings))] == ["41%", "78%"]


def test_the_price_of_a_byte_is_an_argument() -> None:
    free = _left_out("one decoded token", "+ weights read from memory", dram_pj_per_byte=0.0)
    head = _left_out("one decoded token", "+ output head")
    assert {m: r.joules for m, r in free.items()} == {m: r.joules for m, r in head.items()}
    smaller = _left_out("one decoded token", "+ weights read from memory", ternary_embedding="q6_K")
    assert smaller[BITNET_2B4T.name].moved_bytes == 792_116_800


def test_watts_implied_by_published_measurements() -> None:
    rows = {(r.machine.split()[0], r.size, r.program): r for r in energy.implied_watts_rows()}
    watts = {key: f"{row.implied_watts:.1f}" for key, row in rows.items()}
    assert watts[("Intel", "700M", "llama.cpp FP16")] == "42.0"
    assert watts[("Intel", "700M", "bitnet.cpp")] == "45.7"
    assert watts[("Intel", "70B", "bitnet.cpp")] == "42.3"
    assert watts[("Apple", "700M", "llama.cpp FP16")] == "35.9"
    assert watts[("Apple", "700M", "bitnet.cpp")] == "27.2"
    assert watts[("Apple", "70B", "llama.cpp FP16")] == "47.9"
    assert watts[("Apple", "70B", "bitnet.cpp")] == "73.0"
    # Computed here, and what [bitnet.cpp, arXiv 2410.16144, Table 6] prints.
    savings = [f"{100 * row.saving:.1f}" for row in rows.values() if row.saving is not None]
    assert savings == ["55.4", "64.6", "70.0", "71.9", "82.2"]
    assert all((row.kind, row.published_kind) == ("modelled", "quoted") for row in rows.values())
    for row in rows.values():
        assert row.implied_watts == row.published_joules_per_token * row.published_tokens_per_s
    assert rows[("Intel", "70B", "bitnet.cpp")].saving is None


# ------------------------------------------------------------------------------------------------------ properties
SIZES = st.integers(1, 64)


@given(m=SIZES, n=SIZES, p=SIZES, precision=st.sampled_from(["fp32", "fp16", "int8"]), node=st.sampled_from([7, 45]))
def test_matmul_counts_operations_one_by_one(m: int, n: int, p: int, precision: str, node: int) -> None:
    cost = energy.OPERATION_PJ[node][precision]
    outputs = m * p
    add, mul = energy.matmul_joules(m, n, p, precision, node_nm=node)
    # 1e-12: the same products, in another order
    assert add == pytest.approx(sum(cost.add for _ in range(n - 1)) * outputs * 1e-12, rel=1e-12)
    assert mul == pytest.approx(sum(cost.mul for _ in range(n)) * outputs * 1e-12, rel=1e-12)


@given(arch=st.sampled_from(PUBLISHED_SIX), sequence=st.integers(1, 511))
def test_energy_grows_with_the_sequence_and_falls_with_the_precision(arch: Architecture, sequence: int) -> None:
    assert forward_energy(arch, sequence=sequence).joules < forward_energy(arch, sequence=sequence + 1).joules
    joules = [forward_energy(arch, sequence=sequence, attention=a).joules for a in ("int8", "fp16", "fp32")]
    assert joules == sorted(joules)
    assert decode_energy(arch, context=sequence).linear_joules == pytest.approx(
        forward_energy(arch, sequence=sequence).linear_joules / sequence, rel=1e-9
    )  # 1e-9: sums of a few products in another order


@given(arch=st.sampled_from(PUBLISHED_SIX), node=st.sampled_from([7, 45]))
def test_parts_sum_to_the_total(arch: Architecture, node: int) -> None:
    e = forward_energy(arch, head="fp16", node_nm=node)
    parts = e.linear_joules + e.attention_joules + e.head_joules
    assert e.joules == pytest.approx(parts, rel=1e-12)  # the same six summands in another order
    assert forward_energy(arch, node_nm=node).head_joules == 0


def test_the_model_refuses() -> None:
    with pytest.raises(ValueError, match="node_nm must be one of 45, 7, got 5"):
        forward_energy(BITNET_2B4T, node_nm=5)
    with pytest.raises(ValueError, match="precision must be one of fp32, fp16, int8, got 'int4'"):
        forward_energy(BITNET_2B4T, attention="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights must be fp32, fp16 or ternary"):
        forward_energy(BITNET_2B4T, weights="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="m must be at least 1, got 0"):
        forward_energy(BITNET_2B4T, sequence=0)
    with pytest.raises(ValueError, match="states none"):
        forward_energy(BITNET_SHAPES["13B"], head="fp16")
    with pytest.raises(ValueError, match="must not be negative"):
        energy.moved_joules(-1)


@pytest.mark.parametrize(
    "rows",
    [
        energy.published_rows,
        energy.bitnet_table_rows,
        energy.b158_rows,
        energy.left_out_rows,
        energy.implied_watts_rows,
    ],
    ids=lambda f: f.__name__,
)
def test_every_row_names_its_kind_and_source(rows) -> None:
    for row in rows():
        flat = row.as_row()
        assert flat["kind"] in KINDS
        assert flat["source"]


# ------------------------------------------------------------------------------------------------------ counters
RANGE_UJ = 262_143_328_850


def _zone(root: Path, zone: str, name: str, energy_uj: int | str) -> Path:
    folder = root / zone
    folder.mkdir()
    (folder / "name").write_text(name + "\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    return folder / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    (tmp_path / "intel-rapl").mkdir()  # the control type: no counter of its own
    _zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    _zone(tmp_path, "intel-rapl:0:0", "core", 500_000)
    _zone(tmp_path, "intel-rapl:1", "package-1", RANGE_UJ - 250_000)
    return tmp_path


def test_available_lists_the_readable_zones(powercap: Path) -> None:
    domains = power.available(powercap)
    assert [d.label for d in domains] == ["intel-rapl:0 package-0", "intel-rapl:0:0 core", "intel-rapl:1 package-1"]


def test_not_available_says_why(tmp_path: Path, powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist" in power.available(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert power.available(empty).startswith("not available: ")
    with pytest.raises(BitnetRefError, match="an energy counter is not available"):
        power.EnergyMeter(empty)

    real = Path.read_text

    def only_root(self: Path, *args, **kwargs) -> str:
        if self.name == "energy_uj":  # a test that runs as root would be let through by the file mode
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", only_root)
    assert power.available(powercap).endswith("intel-rapl:0/energy_uj may be read by root only")


@pytest.mark.parametrize("content", ["", "-5", "12 uJ", str(RANGE_UJ + 1)])
def test_a_counter_that_holds_no_number_in_range_is_left_out(powercap: Path, content: str) -> None:
    (powercap / "intel-rapl:0" / "energy_uj").write_text(content)
    assert [d.zone for d in power.available(powercap)] == ["intel-rapl:0:0", "intel-rapl:1"]


def test_meter_reads_each_domain_and_counts_over_the_restart(powercap: Path) -> None:
    with power.EnergyMeter(powercap) as meter:
        (powercap / "intel-rapl:0" / "energy_uj").write_text("4500000")
        (powercap / "intel-rapl:1" / "energy_uj").write_text("750000")
    assert meter.joules == {
        "intel-rapl:0 package-0": 3.5,
        "intel-rapl:0:0 core": 0.0,
        "intel-rapl:1 package-1": 1.0,
    }
    row = meter.rows("test")[0]
    assert (row.kind, row.joules, row.window) == ("measured", 3.5, "test")
    assert row.watts == row.joules / row.seconds


def test_poll_counts_two_restarts(powercap: Path) -> None:
    counter = powercap / "intel-rapl:1" / "energy_uj"
    with power.EnergyMeter(powercap) as meter:
        counter.write_text("0")
        meter.poll()
        counter.write_text(str(RANGE_UJ))
        meter.poll()
        counter.write_text("5")
    assert meter.joules["intel-rapl:1 package-1"] == (250_000 + RANGE_UJ + 5) / 1e6


def test_rows_need_a_reading(powercap: Path) -> None:
    with pytest.raises(ValueError, match="rows needs a reading"):
        power.EnergyMeter(powercap).rows("x")


def test_idle_reads_while_sleeping(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        (powercap / "intel-rapl:0" / "energy_uj").write_text("3000000")

    monkeypatch.setattr(power.time, "sleep", sleep)
    rows = power.idle(2.0, powercap)
    assert slept == [2.0]
    assert [row.joules for row in rows] == [2.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="seconds must be positive"):
        power.idle(0.0, powercap)


@given(readings=st.tuples(st.integers(0, RANGE_UJ), st.integers(0, RANGE_UJ)))
def test_a_counter_difference_is_never_negative_nor_beyond_the_range(readings: tuple[int, int]) -> None:
    before, after = readings
    difference = power.counter_difference_uj(before, after, RANGE_UJ)
    assert 0 <= difference <= RANGE_UJ
    assert (before + difference - after) % RANGE_UJ == 0


def test_this_machine_answers() -> None:
    found = power.available()
    assert found.startswith("not available: ") if isinstance(found, str) else len(found) > 0


# ------------------------------------------------------------------------------------------------------ the page
def test_the_page_prints_what_the_model_gives() -> None:
    page = PAGE.read_text(encoding="utf-8")
    expected = [
        f"| {r.model} | {r.published_joules:.3f} | {r.modelled_joules:.4f} | {r.relative_difference:+.1%} | "
        f"{r.attention_share:.0%} |"
        for r in energy.published_rows()
    ]
    table: dict[tuple[str, str], list[str]] = {}
    for r in energy.bitnet_table_rows():
        table.setdefault((r.size, r.model), []).append(f"{r.published_joules:.2f} | {r.modelled_joules:.4f}")
    expected += [f"| {size} | {model} | {' | '.join(cells)} |" for (size, model), cells in table.items()]
    expected += [
        f"| {r.size} | {r.fp16_joules:.3f} | {r.ternary_joules:.3f} | {r.ratio:.1f} | {r.ratio_with_head:.1f} |"
        for r in energy.b158_rows()
    ]
    left_out = energy.left_out_rows()
    for r in left_out:
        if r.model == BITNET_2B4T.name:
            same = [s.bitnet_saving for s in left_out if (s.phase, s.case) == (r.phase, r.case) and s.model != r.model]
            expected.append(f"| {r.phase} | {r.case} | {r.joules * 1e3:.3g} | {min(same):.0%} to {max(same):.0%} |")
    for name, cost in energy.OPERATION_PJ[45].items():
        at_7 = energy.OPERATION_PJ[7][name]
        expected.append(f"| {name.upper()} | {cost.add:g} | {at_7.add:g} | {cost.mul:g} | {at_7.mul:g} |")
    expected += [
        f"| {r.machine} | {r.size} | {r.program} | {r.published_joules_per_token:g} | {r.published_tokens_per_s:g} | "
        f"{r.implied_watts:.1f} |"
        for r in energy.implied_watts_rows()
    ]
    expected += list(energy.COUNTED) + list(energy.LEFT_OUT)
    missing = [line for line in expected if line not in page]
    assert not missing, "docs/energy.md lacks:\n" + "\n".join(missing)
