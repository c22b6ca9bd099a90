"""Targets and tables of a run, from a run that is made up: what is met, short and not measured, and what is printed."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from bitnet_ref.cli import main
from bitnet_ref.measure.bench_all import markdown
from bitnet_ref.measure.ratio import UnlikeError
from bitnet_ref.measure.targets import LAYER, TARGETS, judge, layers

# G weights a second by program, type and instruction set; one token, then many.
ONE = {
    ("bitnet_ref", "base3", "avx512vbmi"): 150,
    ("bitnet_ref", "i2", "avx512vnni"): 120,
    ("bitnet_ref", "base3", "avx2"): 70,
    ("bitnet_ref", "i2", "avx2"): 90,
    ("llama.cpp", "TQ2_0", "avx2"): 60,
    ("ik_llama.cpp", "IQ2_BN", "avx512vnni"): 80,
}
MANY = {
    ("bitnet_ref", "base3", "avx512vbmi"): 420,
    ("bitnet_ref", "i2", "avx512vnni"): 450,
    ("bitnet_ref", "i2", "avx2"): 110,
    ("torch", "int8", "native"): 400,
    ("torch", "int8", "avx2"): 100,
    ("ik_llama.cpp", "IQ2_BN_R4", "avx512vnni"): 290,
}


def product(name, m, k, tokens, threads, rate):
    program, type_name, isa = name
    ns = tokens * m * k / rate
    return {
        "run": "now", "program": program, "type": type_name, "isa": isa, "op": "gemv" if tokens == 1 else "gemm",
        "m": m, "k": k, "tokens": tokens, "threads": threads, "weight_bytes": m * k,
        "median_ns": ns, "low_ns": 0.9 * ns, "high_ns": 1.1 * ns,
        "weights_per_s": rate * 1e9, "fraction_of_limit": rate / 500, "limit": "read_bandwidth", "verified": True,
        "busy": False,
    }  # fmt: skip


def model(program, type_name, threads, decode, prefill, rss, **about):
    ours = program == "bitnet_ref"
    return {
        "run": "now", "program": program, "type": type_name, "model": "2B4T", "head": "q6_k", "batch": 1,
        "threads": threads, "n_prompt": 512, "n_generate": 16, "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode, "low_ns": 0.9e9 / decode, "high_ns": 1.1e9 / decode, "verified": True,
        "peak_resident_bytes": rss, "busy": False, "read_bandwidth_fraction": 0.85 if ours else None,
        "outside_fraction": 0.2 if ours else None, "network": "dense", "cache": "f16", **about,
    }  # fmt: skip


@pytest.fixture
def document():
    batches = [
        # As fast a token as the straight line from 1 to 128 asks for, but at 4.
        product(("bitnet_ref", "i2", "avx512vnni"), 8, 8, t, 1, t * 64 / ((100 + t) * (1.5 if t == 4 else 1)))
        for t in (1, 2, 4, 16, 128)
    ]  # fmt: skip
    rows = {
        "one_token": [
            product(name, *shape, 1, t, rate * (0.8 + 0.2 * t))
            for name, rate in ONE.items() for shape in LAYER for t in (1, 2)
        ],
        "many_tokens": [
            product(name, *shape, tokens, t, rate * t)
            for name, rate in MANY.items() for shape in LAYER for tokens in (128, 512) for t in (1, 2)
        ],
        "batches": batches,
        "models": [
            row
            for t in (1, 2)
            for row in (
                model("bitnet_ref", "base3", t, 45 * t, 150 * t, 750_000_000),
                model("bitnet_ref", "base3", t, 55 * t, 150 * t, 950_000_000, network="sparse", gate_zeros=0.714,
                      up_zeros=0.714, down_zeros=0.8, up_listed=1.0, down_listed=0.5, outside_fraction=0.3),
                model("bitnet_ref", "base3", t, 95 * t, 150 * t, 950_000_000, network="sparse", gate_zeros=0.9,
                      up_zeros=0.9, down_zeros=0.95, up_listed=1.0, down_listed=1.0),  # not what the target is about
                model("bitnet_ref", "base3", t, 70 * t, 150 * t, 500_000_000, head="f3"),
                model("bitnet_ref", "base3", t, 80 * t, 400 * t, 800_000_000, cache="f32"),  # unlike the peers'
                model("bitnet_ref", "base3", t, 60 * t, 200 * t, 700_000_000, head="q4_0", cache="f16",
                      read_bandwidth_fraction=0.9),
                model("ik_llama.cpp", "IQ2_BN", t, 25 * t, 130 * t, 800_000_000),
                model("llama.cpp", "TQ2_0", t, 20 * t, 33 * t, 900_000_000),
            )
        ],
    }  # fmt: skip
    record = {
        "cpu": "A processor", "cores": 2, "compiler": "gcc 12", "commit": "abc", "date": "2026-11-24T00:00:00",
        "rounds": 7, "load_average": [0.1, 0, 0], "command": "bitnet-ref bench all",
    }  # fmt: skip
    return {"record": record, "quick": False, "seconds": 1.0, "parts": {name: {"rows": r} for name, r in rows.items()}}


def verdicts(document):
    parts = {name: part["rows"] for name, part in document["parts"].items()}
    return {(v.target.work, v.target.what): v for v in judge(parts)}


def test_a_layer_is_the_sum_of_its_matrices(document):
    rows = document["parts"]["one_token"]["rows"]
    found = [row for row in layers(rows) if (row["type"], row["isa"], row["threads"]) == ("i2", "avx512vnni", 1)]
    weights = 2 * 2560 * 2560 + 2 * 640 * 2560 + 2 * 6912 * 2560 + 2560 * 6912
    assert len(found) == 1 and found[0]["median_ns"] == pytest.approx(weights / 120)
    assert found[0]["weights_per_s"] == pytest.approx(120e9) and found[0]["fraction_of_limit"] == pytest.approx(0.24)
    assert layers([row for row in rows if (row["m"], row["k"]) != (640, 2560)]) == []


def test_verdicts(document):
    found = verdicts(document)
    assert len(found) == len(TARGETS)
    one = "GEMV, 1 thread"
    expected = {
        (one, "base3 and i2: of the read bandwidth"): (0.24, "short"),  # the worse of the two
        (one, "base3 over ik_llama.cpp's best type"): (150 / 80, "met"),
        (one, "base3 over llama.cpp's TQ2_0"): (2.5, "met"),
        (one, "AVX2: base3 over llama.cpp's TQ2_0"): (70 / 60, "short"),
        (one, "AVX2: i2 over llama.cpp's TQ2_0"): (1.5, "met"),
        ("GEMV, all threads", "base3 over i2: the ratio of their bits"): (1.25, "met"),
        ("GEMM, 128 tokens, 1 thread", "i2 over oneDNN's int8"): (1.125, "met"),
        ("GEMM, 512 tokens, all threads", "base3 over ik_llama.cpp's IQ2_BN_R4"): (420 / 290, "met"),
        ("GEMM, 128 tokens, 1 thread", "AVX2: i2 over oneDNN's int8 with the same cap"): (1.1, "met"),
        ("2-16 tokens, 1 thread", "i2: interpolated over measured time, worst"): (1 / 1.5, "short"),
        ("thread scaling", "GEMM of i2, all threads over one (two processors)"): (2.0, "met"),
        ("2B4T decode", "1 thread, over the fastest peer with the same head"): (1.8, "met"),
        ("2B4T decode", "all threads, rows that add nothing left out (71 % of W_up), over the fastest peer"): (
            2.2,
            "met",
        ),
        ("2B4T decode", "of the read bandwidth"): (0.85, "met"),  # dense, with the head that peers have
        ("2B4T decode", "time outside products and head"): (0.2, "short"),
        ("2B4T memory", "peak, over the smallest peer's"): (7.5 / 8, "met"),  # of the same head
        ("2B4T memory", "peak, of any head of 4 to 6 bits and cache"): (0.7, "met"),
        ("2B4T prefill, 512 tokens", "1 thread, over the fastest peer"): (150 / 130, "short"),
    }
    for key, (value, verdict) in expected.items():
        assert found[key].value == pytest.approx(value), key
        assert found[key].verdict == verdict, key


def test_what_a_run_does_not_hold_is_not_met(document):
    assert verdicts(document)["tables, 1 thread", "tl2 over bitnet.cpp's TL2"].verdict == "not measured"
    for part in document["parts"].values():
        part["rows"] = []
    for verdict in verdicts(document).values():
        assert verdict.verdict == "not measured" and verdict.value is None and verdict.reason


def test_rows_of_two_runs_are_refused(document):
    for row in document["parts"]["one_token"]["rows"]:
        if row["program"] == "ik_llama.cpp":
            row["run"] = "yesterday"
    with pytest.raises(UnlikeError, match="the same run on both sides, got now and yesterday"):
        verdicts(document)


def test_heads_are_not_mixed(document):
    """A peer with another head has no part in the ratio; with none of the same head there is no ratio."""
    for row in document["parts"]["models"]["rows"]:
        if row["program"] != "bitnet_ref":
            row["head"] = "f16"
    found = verdicts(document)
    for work, what in (
        ("2B4T decode", "1 thread, over the fastest peer with the same head"),
        ("2B4T decode", "of the read bandwidth"),
        ("2B4T memory", "peak, over the smallest peer's"),
    ):
        assert found[work, what].value is None and "head f16" in found[work, what].reason


def test_ours_alone_is_judged_without_peers(document):
    part = document["parts"]["models"]
    part["rows"] = [row for row in part["rows"] if row["program"] == "bitnet_ref" and row["head"] == "q6_k"]
    found = verdicts(document)
    assert found["2B4T decode", "of the read bandwidth"].value == pytest.approx(0.85)
    assert found["2B4T decode", "1 thread, over the fastest peer with the same head"].verdict == "not measured"


def test_shares_of_an_unsteady_read_rate_are_none(document):
    for row in document["parts"]["one_token"]["rows"]:
        if row["threads"] == 2 and row["m"] == 6912:  # the same speed, and a probe that read half as much
            row["fraction_of_limit"] *= 2
    for row in document["parts"]["models"]["rows"]:
        if row["program"] == "bitnet_ref" and row["head"] == "q6_k":
            row["read_bandwidth_fraction"] = 1.06
    found = verdicts(document)
    shares = found["GEMV, all threads", "base3 and i2: of the read bandwidth"]
    assert shares.verdict == "not measured" and re.search("read .* beside one shape and .* another", shares.reason)
    assert found["GEMV, 1 thread", "base3 and i2: of the read bandwidth"].verdict == "short"
    share = found["2B4T decode", "of the read bandwidth"]
    assert share.verdict == "not measured" and share.reason.startswith("106% of what the probe read")


def test_runs_that_say_nothing_of_networks_are_of_dense_ones(document):
    rows = document["parts"]["models"]["rows"]
    rows[:] = [row for row in rows if row["network"] == "dense"]
    for row in rows:
        del row["network"], row["cache"]
    found = verdicts(document)
    assert found["2B4T decode", "of the read bandwidth"].value == pytest.approx(0.85)
    over_peers = [v for (work, what), v in found.items() if "fastest peer" in what]
    assert len(over_peers) == 5 and {v.reason for v in over_peers} == {
        "the run does not say how keys and values are kept"
    }
    assert "| ik_llama.cpp | IQ2_BN | q6_k |  | 25.0" in markdown(document)


def test_tables(document, tmp_path):
    text = markdown(document)
    assert "| 2B4T decode | 1 thread, over the fastest peer with the same head | >= 1.70x | 1.80x | met |" in text
    assert "| GEMV, 1 thread | base3 and i2: of the read bandwidth | >= 85% | 24% | **short** |" in text
    assert "| bitnet_ref | base3 | avx512vbmi | 150.0 (136.4-166.7) | 30% | 180.0 (163.6-200.0) | 36% |" in text
    shares = "of W_up 71% add nothing, 100% of them read by lists, of W_down 80% and 50%"
    assert f"| bitnet_ref | base3; {shares} | q6_k | f16 | 55.0" in text
    assert "| ik_llama.cpp | IQ2_BN | q6_k | f16 | 25.0 (22.7-27.8) | 130 | 50.0 (45.5-55.6) | 260 | 800 MB |" in text
    assert "Other processes" not in text and "quick run" not in text
    for table in text.split("\n\n"):
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, table
    path = tmp_path / "r.json"
    path.write_text(json.dumps(document))
    assert CliRunner().invoke(main, ["bench", "table", str(path)]).output == text


def test_busy_and_quick_runs_say_so_first(document):
    document["parts"]["one_token"]["rows"][0]["busy"] = True
    document["quick"] = True
    text = markdown(document)
    n = sum(len(part["rows"]) for part in document["parts"].values())
    assert f"**Other processes used this machine in 1 of {n} rows" in text and "**A quick run: for no claim.**" in text


def test_no_result_file(tmp_path):
    path = tmp_path / "r.json"
    for text in ("{", "[]", '{"record": {}}'):
        path.write_text(text)
        result = CliRunner().invoke(main, ["bench", "table", str(path)])
        assert result.exit_code == 1 and "r.json is no result of bench all" in result.output
    assert np.isfinite([target.goal for target in TARGETS]).all()
