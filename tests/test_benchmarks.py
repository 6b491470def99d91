"The arithmetic of the benchmark report; no speed is asserted here."
import json
import sys
import types

import pytest

from robustcv import benchmarks


def test_interleave_calls_in_turn_after_a_warm_up():
    calls = []
    seconds = benchmarks.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "ab" * 4 and set(seconds) == {"a", "b"} and min(seconds.values()) >= 0


def test_line_compares_with_the_best_peer_and_the_floor():
    row = benchmarks.line("x", {"ours": 2.0, "slow": 8.0, "fast": 4.0, "floor": 1.0}, images=100, rounds=5)
    assert row["ours"] == 50 and row["peers"] == {"slow": 12.5, "fast": 25.0}
    assert row["best_peer_ratio"] == 2 and row["floor"] == 100 and row["floor_ratio"] == 0.5 and row["n"] == 5
    json.dumps(row)


def test_a_missing_peer_leaves_no_ratio():
    row = benchmarks.line("x", {"ours": 2.0}, images=100, rounds=5)
    assert row["peers"] == {} and row["best_peer_ratio"] is None and row["floor_ratio"] is None


def test_every_measure_of_the_data_runs_on_a_small_set(tiny):
    rows = list(benchmarks.batches(tiny, rounds=1)) + list(benchmarks.decode(tiny, rounds=1))
    assert [r["measure"] for r in rows] == ["batches", "decode", "open"]
    assert all(r["ours"] > 0 for r in rows)


def test_training_steps_run(monkeypatch):
    row, = benchmarks.train_step(None, rounds=1, steps=1, batch=4)
    assert set(row["peers"]) == {"bare loop, bf16 channels_last", "bare loop, float32"}


def test_attacks_are_measured_beside_their_floor_and_peers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    rows = list(benchmarks.attacks(None, rounds=1, batch=2, steps=2))
    assert [r["measure"] for r in rows] == ["attacks/FGSM", "attacks/FGSM, folded", "attacks/PGD-2", "attacks/PGD-2, folded"]
    assert all(r["floor_ratio"] > 0 and r["peers"] == {} for r in rows) and "torchattacks is not installed" in capsys.readouterr().err
    peer = types.SimpleNamespace(**{n: lambda *args: lambda x, y: None for n in ("FGSM", "PGD")})
    monkeypatch.setitem(sys.modules, "torchattacks", peer)
    assert all(set(r["peers"]) == {"torchattacks"} for r in benchmarks.attacks(None, rounds=1, batch=2, steps=2))


def test_the_adversarial_step_is_measured_beside_the_clean_and_the_naive_one():
    row, = benchmarks.adversarial_step(None, rounds=1, steps=1, batch=4)
    assert set(row["peers"]) == {"naive, bf16 channels_last", "naive, float32"} and row["floor"] > 0


def test_an_unknown_measure_is_named():
    with pytest.raises(ValueError, match="unknown measure 'batchs': did you mean 'batches'"):
        next(benchmarks.bench(["batchs"]))


def test_the_pipeline_is_measured_with_either_order(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    rows = list(benchmarks.pipeline(None, rounds=1, n=4, served=8))
    assert [r["measure"] for r in rows] == ["pipeline/order per sample", "pipeline/order per chunk"]
    assert "albumentations is not installed" in capsys.readouterr().err
    for r in rows:
        assert set(r) == {"measure", "ours", "unit", "peers", "best_peer_ratio", "floor", "floor_ratio", "n", "device"} and r["n"] == 1
        assert set(r["peers"]) == {"torchvision v2, each image"} and min(r["ours"], r["floor"], r["best_peer_ratio"]) > 0
        json.dumps(r)
