"""The benchmark: who takes turns, what is verified, what is refused. With made-up peers."""

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bitnet_ref import kernels
from bitnet_ref.cli import main
from bitnet_ref.errors import BitnetRefError
from bitnet_ref.measure import model_peers, peers, speed, turns
from bitnet_ref.measure.peers import PeerUnavailable, Worker, check_available
from bitnet_ref.measure.peers.worker import answer, products
from bitnet_ref.measure.problem import copies, problem
from bitnet_ref.measure.ratio import LIKE, UnlikeError, ratio
from bitnet_ref.measure.shapes import load_shapes, shape_lists

SHAPE = (40, 512)


# --- made-up peers; at the top level, since processes of their own import them ----------------------------------------


def made_up(name, connection):
    """A peer with one type that rounds activations and one that is wrong."""

    def candidates(w_q, x_q, threads):
        about = {"program": name, "isa": "avx2", "weight_bytes": w_q.nbytes, "version": "1"}
        exact = (x_q.astype(np.int64) @ w_q.T.astype(np.int64)).astype(np.float32)
        yield about | {"type": "rounded", "kernel": "rounded"}, lambda: exact * np.float32(1.001), 2
        yield about | {"type": "wrong", "kernel": "wrong"}, lambda: np.zeros_like(exact), 1

    answer(connection, products(candidates))


def broken(name, connection):
    """A peer that raises."""

    def candidates(w_q, x_q, threads):
        raise RuntimeError("no such function")

    answer(connection, products(candidates))


def dying(name, connection):
    """A peer whose process ends."""
    connection.recv()
    raise SystemExit(3)


@pytest.fixture(scope="module")
def found():
    """One small run with a made-up peer in place of llama.cpp."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peers.PEERS, "llama.cpp", ("numpy", "numpy"))
        return speed.measure_kernels(
            "test", [SHAPE], (1, 3, 128), (1, 2), (None, "scalar"), ("i2",), ("llama.cpp", "numpy"), 2,
            serve_peer=made_up,
        )  # fmt: skip


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_say_what_was_timed(found):
    columns = (
        "run program type op isa m k tokens threads median_ns low_ns high_ns weights_per_s fraction_of_limit limit "
        "verified error others busy busy_rounds weight_bytes"
    )
    for row in found["rows"]:
        assert set(columns.split()) <= set(row)
    timed = [row for row in found["rows"] if row["verified"]]
    for row in timed:
        assert row["low_ns"] <= row["median_ns"] <= row["high_ns"]
        assert row["weights_per_s"] == pytest.approx(row["tokens"] * row["m"] * row["k"] / row["median_ns"] * 1e9)
    threads = sorted({1, kernels.resolve_threads(2)})
    best = kernels.select("gemm", "i2").name.isa
    wanted = {("bitnet_ref", "i2", best), ("bitnet_ref", "i2", "scalar"), ("llama.cpp", "rounded", "avx2")}
    for tokens in (1, 3, 128):
        for n in threads:
            have = {(r["program"], r["type"], r["isa"]) for r in timed if (r["tokens"], r["threads"]) == (tokens, n)}
            assert have == wanted | {("numpy", "float32", None)}
    assert {row["op"] for row in timed if row["tokens"] == 1} == {"gemv"}


def test_a_peer_that_is_wrong_is_reported_and_not_timed(found):
    wrong = [row for row in found["rows"] if row["type"] == "wrong"]
    assert len(wrong) == 3 * len({row["threads"] for row in found["rows"]})
    for row in wrong:
        assert row["verified"] is False and row["median_ns"] is None and row["fraction_of_limit"] is None
        assert "does not compute this product" in row["note"]
    rounded = [row for row in found["rows"] if row["type"] == "rounded"]
    assert all(0 < row["error"] < peers.ERROR_LIMIT for row in rounded)
    assert all(row["error"] == 0 for row in found["rows"] if row["program"] == "bitnet_ref")


def test_limits(found):
    """One token against reading; 128 against the best rate that anything reached with as many threads."""
    assert {row["limit"] for row in found["rows"] if row["tokens"] == 1 and row["verified"]} == {"read_bandwidth"}
    many = [row for row in found["rows"] if row["tokens"] == 128 and row["verified"] and row["program"] != "numpy"]
    assert {row["limit"] for row in many} == {"int8_multiply_adds"}
    assert all(0 < row["fraction_of_limit"] <= 1 for row in many)
    for row in found["rows"]:
        if row["tokens"] == 3 and row["verified"]:
            reach = max(
                [r["weights_per_s"] for r in many if r["threads"] == row["threads"]]
                + [x["median_per_s"] for x in found["limits"] if x["isa"] and x["threads"] == row["threads"]]
            )
            expected = max(row["read_bandwidth_fraction"], row["weights_per_s"] / reach)
            assert row["fraction_of_limit"] == pytest.approx(expected)


def test_the_record(found):
    header = found["record"]
    keys = "date command commit compiler cpu load_average load_average_after frequency_hz frequency_hz_after rounds"
    assert set(keys.split()) <= set(header)
    assert {row["run"] for row in found["rows"]} == {header["date"]}


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    w_q, x_q, expected = problem(*SHAPE, 1)
    name = kernels.select("gemv", "i2").name
    with pytest.raises(BitnetRefError, match="gives a wrong result for M = 40, K = 512; it is not timed"):
        speed._kernel_program(name, w_q, x_q, expected + 1, 1)


def test_weights_of_one_token_are_cold():
    cache = speed.cache_bytes() or 2**25
    for nbytes in (1000, cache // 3, 4 * cache):
        assert copies(nbytes, 1) * nbytes >= 2 * cache and copies(nbytes, 1) >= 2
    assert copies(1000, 128) == 1


def test_the_problem_is_the_same_in_every_process_and_exact():
    w_q, x_q, expected = problem(7, 300, 3)
    again = problem(7, 300, 3)
    assert all((a == b).all() for a, b in zip((w_q, x_q, expected), again, strict=True))
    assert (expected == x_q.astype(np.int64) @ w_q.T.astype(np.int64)).all()


# --- turns ------------------------------------------------------------------------------------------------------------


def test_all_take_turns_in_every_round():
    order = []

    def program(label, ns):
        return turns.Program({"label": label}, lambda: (order.append(label), (ns, 0.0))[1])

    slow = 21 * turns.SLICE_NS
    programs = [program("a", 1.0), program("b", 2.0), program("slow", slow)]
    turns.rounds(programs, 4, 1)
    rounds = [order[0:3], order[3:6], order[6:9], order[9:]]
    assert [sorted(labels) for labels in rounds] == [["a", "b", "slow"]] * 3 + [["a", "b"]]
    assert [len(p.times) for p in programs] == [4, 4, 3]


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 14])
def test_nobody_always_comes_behind_the_same(n):
    cycle = n if n % 2 == 0 else 2 * n
    orders = [turns.turn_order(n, i) for i in range(cycle)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(pairs) == n * (n - 1) and set(pairs.values()) <= {cycle // n}
    some = Counter(pair for order in orders[:7] for pair in itertools.pairwise(order))
    assert n < 8 or max(some.values()) <= 2


def test_busy_rounds_are_seen(monkeypatch):
    """What the system counts beyond this process and its workers, as a share of all processors."""
    clock = iter(range(100))
    account = iter([0.0, 1.0, 1.0, 3.0])  # seconds: 1 in the first round, 2 in the second
    monkeypatch.setattr(turns, "busy_seconds", lambda: next(account))
    monkeypatch.setattr(turns.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(turns.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(turns.os, "cpu_count", lambda: 4)
    own = turns.Program({}, lambda: (1.0, 0.5))  # a worker that spent half a second
    assert turns.rounds([own], 2, 1) == pytest.approx([(1 - 0.5) / 4, (2 - 0.5) / 4])
    assert speed._busy([0.0, 0.01, 0.5]) == {"others": 0.01, "busy_rounds": 1, "busy": False}
    assert speed._busy([0.2, 0.01, 0.5])["busy"] is True
    assert speed._busy([]) == {"others": None, "busy_rounds": None, "busy": None}


def test_the_account_of_the_system_grows():
    before = turns.busy_seconds()
    if before is None:
        pytest.skip("needs /proc/stat")
    assert turns.busy_seconds() >= before > 0


# --- peers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        (broken, "llama.cpp failed to prepare: RuntimeError: no such function"),
        (dying, r"the process of llama.cpp ended while it was asked to prepare \(exit code 3\)"),
    ],
)
def test_a_failing_peer_is_one_sentence(serve, message):
    worker = Worker(serve, "llama.cpp")
    try:
        with pytest.raises(BitnetRefError, match=message):
            worker.programs(*SHAPE, 1, 1)
    finally:
        worker.close()


def test_missing_and_unknown_peers(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "ik_llama.cpp", ("no_such_module", "ik-llama-cpp-python"))
    message = r"ik_llama.cpp is not installed: pip install 'bitnet_ref\[peers\]', or ik-llama-cpp-python alone"
    with pytest.raises(PeerUnavailable, match=message):
        check_available(["numpy", "ik_llama.cpp"])
    with pytest.raises(PeerUnavailable, match=r"peers must be among llama.cpp, .*, got 'bitnet.c'"):
        check_available(["bitnet.c"])


# --- shapes, arguments ------------------------------------------------------------------------------------------------


def test_shapes(tmp_path):
    assert shape_lists() == ("2b4t", "qwen3-0.6b")
    assert load_shapes("2b4t") == [(2560, 2560), (640, 2560), (6912, 2560), (2560, 6912)]
    assert (3072, 1024) in load_shapes("qwen3-0.6b")
    path = tmp_path / "mine.json"
    path.write_text('[{"name": "a", "m": 3, "k": 5}]')
    assert load_shapes(str(path)) == [(3, 5)]
    for text in ("[]", '[{"m": 0, "k": 5}]', '[{"m": 2.5, "k": 5}]', "{", '[{"m": 1}]', "7"):
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_shapes(str(path))
    with pytest.raises(ValueError, match=r"shapes must be 2b4t, qwen3-0.6b or the path of a JSON file, got 'x'"):
        load_shapes("x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens=0"], "whole numbers of at least 1"),
        (["--tokens=all"], "whole numbers of at least 1"),
        (["--threads=1,x"], "whole numbers of at least 1"),
        (["--isa=mmx"], "this processor has the instruction sets"),
        (["--types=i3"], "types must be among the packings of this build, got 'i3'"),
        (["--peers=nobody"], "peers must be among"),
        (["--shapes=nowhere"], "shapes must be"),
    ],
)
def test_refused_arguments(arguments, message):
    result = CliRunner().invoke(main, ["bench", "kernels", *arguments])
    assert result.exit_code in (1, 2) and message in result.output


def test_the_command(tmp_path):
    (tmp_path / "s.json").write_text('[{"name": "a", "m": 40, "k": 512}]')
    arguments = ["bench", "kernels", "--shapes", str(tmp_path / "s.json"), "--tokens=1", "--threads=1", "--types=i2"]
    arguments += ["--rounds=2", "--peers=numpy", "--isa=scalar"]
    result = CliRunner().invoke(main, [*arguments, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert "exact" in result.output and "of reading" in result.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert [(row["program"], row["isa"]) for row in written["rows"]] == [("numpy", None), ("bitnet_ref", "scalar")]
    assert str(tmp_path) not in written["record"]["command"] and "--shapes=s.json" in written["record"]["command"]
    assert [path.name for path in Path(tmp_path).iterdir() if "part" in path.name] == []


@pytest.mark.parametrize(
    ("here", "isas", "expected"),
    [
        (("scalar", "avx2", "avx512vnni"), (None, "avx2"), [None, {"ONEDNN_MAX_CPU_ISA": "AVX2"}]),
        (("scalar", "avx2", "avx512vnni"), (None,), [None]),
        (("scalar", "avx2"), (None, "avx2"), [{"ONEDNN_MAX_CPU_ISA": "AVX2"}]),
        (("scalar", "avx2"), (None,), [None]),
    ],
)
def test_pytorch_runs_once_where_the_cap_caps_nothing(monkeypatch, here, isas, expected):
    started = []

    class Started(Exception):
        pass

    class Recorder:
        def __init__(self, serve, name, environment=None):
            started.append(environment)

        def close(self):
            pass

    def stop(label, fraction):  # before any kernel that this processor may not have is run
        raise Started

    monkeypatch.setattr(speed, "Worker", Recorder)
    monkeypatch.setattr(speed, "check_available", lambda names: None)
    monkeypatch.setattr(kernels, "processor_isas", lambda: here)
    with pytest.raises(Started):
        speed.measure_kernels("test", [SHAPE], (2,), (1,), isas, ("i2",), ("torch",), 1, stop)
    assert started == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--sparse"], "--sparse and --gate-zeros are for this program alone"),
        (["--gate-zeros=0.8"], "--sparse and --gate-zeros are for this program alone"),
    ],
)
def test_what_peers_do_not_have_is_refused_beside_them(option, message):
    words = ["bench", "model", "--preset=2b4t", "--random", "--peers=llama.cpp", *option]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1 and message in result.output


@pytest.mark.parametrize(("option", "cache"), [([], "f16"), (["--cache=f32"], "f32"), (["--cache=f16"], "f16")])
def test_caches_are_like_those_of_peers_unless_others_are_asked_for(option, cache, monkeypatch):
    asked = {}

    def measure(*about, **options):
        asked.update(options)
        raise BitnetRefError("no further")

    monkeypatch.setattr(model_peers, "measure_models_beside_peers", measure)
    words = ["bench", "model", "--preset=2b4t", "--random", "--peers=llama.cpp", *option]
    assert "no further" in CliRunner().invoke(main, words).output and asked["cache"] == cache


# --- ratios -----------------------------------------------------------------------------------------------------------

KERNEL = {"run": "r", "program": "bitnet_ref", "type": "i2", "op": "gemv", "m": 4, "k": 8, "tokens": 1, "threads": 1}
KERNEL |= {"verified": True, "weights_per_s": 6.0}
MODEL = {"run": "r", "program": "bitnet_ref", "type": "i2", "model": "2B4T", "head": "q6_k", "n_prompt": 512}
MODEL |= {"cache": "f16", "n_generate": 32, "batch": 1, "threads": 1, "verified": True, "decode_tokens_per_s": 6.0}
CASES = {"kernels": (KERNEL, "weights_per_s"), "model": (MODEL, "decode_tokens_per_s")}


@pytest.mark.parametrize("kind", LIKE)
def test_a_ratio_of_like_things(kind):
    row, column = CASES[kind]
    assert ratio(row, row | {"program": "peer", "type": "TQ2_0", column: 4.0}, column, kind=kind) == 1.5


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in LIKE.items() for key in keys])
def test_no_ratio_of_unlike_things(kind, key):
    row, column = CASES[kind]
    with pytest.raises(UnlikeError, match=r"a ratio needs the same .* on both sides, got .* bitnet_ref i2 and peer"):
        ratio(row, row | {"program": "peer", key: "another"}, column, kind=kind)
    with pytest.raises(UnlikeError, match="which is unknown here"):
        ratio(row, row | {key: None}, column, kind=kind)
    if key == "threads":  # scaling is about threads, and says so
        assert ratio(row, row | {key: 2, column: 4.0}, column, kind=kind, but=("threads",)) == 1.5


def test_no_ratio_without_verified_figures():
    with pytest.raises(UnlikeError, match="an unverified row: peer i2"):
        ratio(KERNEL, KERNEL | {"program": "peer", "verified": False}, "weights_per_s")
    with pytest.raises(UnlikeError, match="needs both figures, peer i2 has none"):
        ratio(KERNEL, KERNEL | {"program": "peer", "weights_per_s": None}, "weights_per_s")


def test_a_turn_is_timed_when_all_threads_are_awake(monkeypatch):
    """The first calls after a pause may be thirty times slower, for longer than any fixed time, and are not counted."""
    now, awake_at = [0], [200_000_000]
    monkeypatch.setattr(turns.time, "perf_counter_ns", lambda: now[0])

    def call(i):
        now[0] += 3_000_000 if now[0] < awake_at[0] else 100_000

    program = turns.sized({}, call)
    for pause in (20_000_000, 200_000_000):
        begun = now[0]
        awake_at[0] = begun + pause
        ns, _ = program.turn()
        assert ns == 100_000
        assert now[0] - begun >= max(pause, turns.WAKE_NS) + turns.SLICE_NS
    awake_at[0] = now[0] + 2 * turns.LONGEST_WAKE_NS  # slower for good: it is timed as it is
    assert program.turn()[0] == 3_000_000
    awake_at[0] = now[0] + 200_000_000  # and is no measure for later turns
    assert program.turn()[0] == 100_000


def test_a_machine_that_became_slower_is_waited_for_once(monkeypatch):
    """Half as slow again for good: otherwise each turn of each program would take a second more."""
    now, call_ns = [0], [100_000]
    monkeypatch.setattr(turns.time, "perf_counter_ns", lambda: now[0])

    def call(i):
        now[0] += call_ns[0]

    program = turns.sized({}, call)
    call_ns[0] = 150_000
    waits = []
    for _ in range(3):
        begun = now[0]
        assert program.turn()[0] == 150_000
        waits.append(now[0] - begun)
    assert waits[0] > turns.LONGEST_WAKE_NS
    assert max(waits[1:]) < 2 * (turns.WAKE_NS + turns.SLICE_NS)
    call_ns[0] = 100_000  # and fast again: what was the mark is the mark
    assert program.turn()[0] == 100_000
    call_ns[0] = 150_000
    begun = now[0]
    program.turn()
    assert now[0] - begun > turns.LONGEST_WAKE_NS


def test_work_before_a_turn_is_the_programs_own(monkeypatch):
    """Otherwise rounds with a program in another process look as if something else had used the machine."""
    now = [0]
    monkeypatch.setattr(turns.time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(turns.time, "process_time", lambda: now[0] / 1e9)

    def call(i):
        now[0] += 100_000

    program = turns.sized({}, call)
    begun = now[0]
    assert program.turn()[1] == pytest.approx((now[0] - begun) / 1e9) and now[0] - begun > turns.WAKE_NS


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child's peak is its own")
def test_a_child_does_not_begin_with_the_peak_of_its_parent():
    """The interpreter between has 480 MB when it starts the one that is asked."""
    child = "from bitnet_ref.measure.model_bench import peak_resident_bytes; print(peak_resident_bytes())"
    between = (
        f"import subprocess, sys; x = b'1' * 480_000_000; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    run = subprocess.run([sys.executable, "-c", between], capture_output=True, text=True, check=True)
    assert 10e6 < int(run.stdout) < 400e6
