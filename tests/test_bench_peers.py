"""The real peers (extra [peers], ``make test-peers``): each multiplies rightly and runs a model."""

from dataclasses import replace

import pytest

from bitnet_ref.measure import speed
from bitnet_ref.measure.peers import PEERS, Worker
from bitnet_ref.measure.peers.ggml import TYPES
from bitnet_ref.measure.peers.llama_model import serve, write_random_gguf
from bitnet_ref.reference.config import PRESETS

for peer in ("llama.cpp", "ik_llama.cpp", "torch"):
    pytest.importorskip(PEERS[peer][0], reason=f"needs {peer}: the extra [peers]")

# Largest error over the root mean square that rounding activations gives: 1.2e-2 and 8e-3 were seen.
ROUNDING = {"llama.cpp": 2e-2, "ik_llama.cpp": 2e-2, "torch": 0.0, "numpy": 0.0, "bitnet_ref": 0.0}


@pytest.mark.parametrize("tokens", [1, 5, 128])
def test_every_type_of_every_peer_multiplies_rightly(tokens):
    found = speed.measure_kernels(
        "test", [(64, 2560), (40, 512)], (tokens,), (1, 2), (None, "avx2"), ("i2",), tuple(PEERS), 2
    )
    seen = {(row["program"], row["type"], row["isa"]) for row in found["rows"]}
    types = {(peer, name) for peer, names in TYPES.items() for name in names}
    assert types <= {(program, name) for program, name, _ in seen}
    if tokens > 1:
        assert {("torch", "int8", "native"), ("torch", "int8", "avx2")} <= seen
    for row in found["rows"]:
        assert row["verified"] and 0 <= row["error"] <= ROUNDING[row["program"]], row
        assert row["median_ns"] > 0


def test_shapes_that_a_peer_cannot_have_are_left_out():
    found = speed.measure_kernels("test", [(64, 300)], (1,), (1,), (None,), ("i2",), ("llama.cpp", "ik_llama.cpp"), 1)
    assert {row["program"] for row in found["rows"]} == {"bitnet_ref"}


SMALL = replace(PRESETS["microsoft/bitnet-b1.58-2B-4T"], layers=2, vocabulary=1024)


def test_models_of_peers_run(tmp_path):
    for peer, names in TYPES.items():
        for name in names:
            if name.endswith("_R4"):
                continue
            path = tmp_path / f"{peer}-{name}.gguf"
            write_random_gguf(path, peer, SMALL, name, "q6_k")
            worker = Worker(serve, peer)
            try:
                worker.ask("load", str(path), 2, 64, False)
                assert worker.ask("prefill", list(range(40))) > 0
                assert len(worker.ask("decode", [1, 2, 3])) == 3
                assert worker.ask("peak_resident_bytes") > path.stat().st_size / 2
            finally:
                worker.close()
