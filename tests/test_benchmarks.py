"The arithmetic of the benchmark report; no speed is asserted here."
import json
import sys
import types

import pytest
import torch

from robustcv import benchmarks, scaling
from robustcv.synthetic import make_synthetic
from robustcv.training import Training


def test_interleave_calls_in_turn_after_a_warm_up():
    calls = []
    seconds = benchmarks.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "ab" * 4 and {n: len(s) for n, s in seconds.items()} == {"a": 3, "b": 3} and min(min(s) for s in seconds.values()) >= 0


def test_line_compares_with_the_best_peer_and_the_floor():
    row = benchmarks.line("x", {"ours": [1.9, 2.0, 1.8, 2.2, 2.1], "slow": [8.0, 8.0, 80.0], "fast": [4.0], "floor": [1.0]}, images=100)
    assert row["ours"] == 50 and row["spread"] == 0.05 and row["peers"] == {"slow": 12.5, "fast": 25.0}
    assert row["best_peer_ratio"] == 2 and row["floor"] == 100 and row["floor_ratio"] == 0.5 and row["n"] == 5
    json.dumps(row)


def test_a_missing_peer_leaves_no_ratio():
    row = benchmarks.line("x", {"ours": [2.0]}, images=100)
    assert row["peers"] == {} and row["best_peer_ratio"] is None and row["floor_ratio"] is None


def test_candidates_may_handle_different_numbers_of_images():
    row = benchmarks.line("x", {"ours": [2.0], "peer": [2.0]}, images={"ours": 100, "peer": 50})
    assert row["ours"] == 50 and row["peers"] == {"peer": 25} and row["best_peer_ratio"] == 2


def test_every_measure_of_the_data_runs_on_a_small_set(tiny):
    rows = list(benchmarks.batches(tiny, rounds=1)) + list(benchmarks.decode(tiny, rounds=1))
    assert [r["measure"] for r in rows] == ["batches", "decode", "open"]
    assert all(r["ours"] > 0 for r in rows) and rows[0]["floor"] > 0


def test_training_steps_run(monkeypatch):
    row, = benchmarks.train_step(None, rounds=1, steps=1, batch=4)
    assert row["measure"] == "train_step/imagenet stem" and set(row["peers"]) == {"bare loop, bf16 channels_last", "bare loop, float32"} and row["floor"] > 0


@pytest.mark.parametrize("stem, least", [("imagenet", 1), ("small", 14)])  # 16 times the positions, but for the stem itself and the head
def test_the_floor_counts_the_operations_of_a_step(stem, least):
    count = lambda n, s: benchmarks._operations(torch.rand(n, 3, 64, 64), torch.zeros(n, dtype=torch.long), s)
    one = count(1, "imagenet")
    # 1.8e9 multiplications forward at 224×224, 12.25 times the positions, 6 operations each
    assert count(2, "imagenet") == 2 * one and 0.7e9 < one < 1.2e9 and count(1, stem) >= least * one


@pytest.mark.parametrize("measure, kwargs, on", [("fgsm", {}, ["fgsm", "fgsm/DenseNet-121"]), ("pgd", dict(steps=2), ["pgd"])])
def test_attacks_are_measured_beside_their_floor_and_peers(measure, kwargs, on, monkeypatch, capsys):
    run = lambda: list(getattr(benchmarks, measure)(None, rounds=1, batch=2, **kwargs))
    for peer in ("torchattacks", "foolbox", "art"): monkeypatch.setitem(sys.modules, peer, None)
    rows = run()
    assert [r["measure"] for r in rows] == [m + way for m in on for way in ("", "/folded", "/folded, contiguous")]
    assert all(r["floor_ratio"] > 0 and r["peers"] == {} for r in rows)
    said = capsys.readouterr().err
    assert all(f"{peer} is not installed" in said for peer in ("torchattacks", "foolbox", "art"))
    monkeypatch.setitem(sys.modules, "torchattacks", types.SimpleNamespace(**{n: lambda *args: lambda x, y: None for n in ("FGSM", "PGD")}))
    assert all(set(r["peers"]) == {"torchattacks"} for r in run())


@pytest.mark.parametrize("measure", ["fgsm", "pgd"])
def test_attacks_are_measured_beside_the_peers_that_are_installed(measure):
    for peer in ("torchattacks", "foolbox", "art"): pytest.importorskip(peer)
    assert all(set(r["peers"]) == {"torchattacks", "foolbox", "ART"} for r in getattr(benchmarks, measure)(None, rounds=1, batch=2))


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
        assert set(r) == {"measure", "ours", "unit", "peers", "best_peer_ratio", "floor", "floor_ratio", "spread", "n", "device"} and r["n"] == 1
        assert set(r["peers"]) == {"torchvision v2, each image"} and min(r["ours"], r["floor"], r["best_peer_ratio"]) > 0
        json.dumps(r)


def test_the_other_steps_and_evaluation_run():
    for rows in (benchmarks.stability_step(None, 1, 1, 4), benchmarks.classifier_only(None, 1, 16, 8),
                 benchmarks.symmetry(None, 1), benchmarks.evaluation(None, 1, 4, 4)):
        row, = rows
        assert row["ours"] > 0 and row["n"] == 1

def test_the_time_to_an_accuracy_is_that_of_the_first_epoch_that_reaches_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTCV_CACHE", str(tmp_path/"cache"))
    data, once = make_synthetic(tmp_path/"tiny", 8, 4, classes=3, size=64), Training(1, 8, lr=.01)
    row, = benchmarks.time_to_accuracy(data, 1, once, target=0.)
    assert row["ours"] > 0 and row["peers"].keys() == {"plain loop, ImageFolder, float32"} and row["n"] == 1
    json.dumps(row)
    with pytest.raises(RuntimeError, match="101 % was not reached in 1 epochs"): list(benchmarks.time_to_accuracy(data, 1, once, target=101.))
    monkeypatch.setattr(benchmarks, "_fitted_marks", lambda *args: [(1., 10.), (2., 30.), (3., 50.)])
    monkeypatch.setattr(benchmarks, "_plain_marks", lambda *args: [(4., 10.), (5., 29.), (6., 50.)])
    row, = benchmarks.time_to_accuracy(data, 1, once, target=30.)
    assert (row["ours"], row["best_peer_ratio"], row["unit"]) == (2, 3, "seconds to 30 % on validation images")


def test_the_profile_divides_the_whole_step():
    rows = {r["measure"].split("/")[1]: r["ours"] for r in scaling.profile(None, steps=1, batch=2)}
    assert sum(rows.values()) == pytest.approx(100, abs=.3) and rows["convolution"] > rows["batch normalisation"] > 0 and rows["update of the weights"] > 0

@pytest.mark.parametrize("name, parents, kind", [
    ("aten::add_", ["Optimizer.step#SGD.step"], "update of the weights"), ("aten::copy_", ["Optimizer.step#SGD.step"], "update of the weights"),
    ("aten::add_", [], "everything else"), ("aten::clone", ["autograd::engine::evaluate_function: CloneBackward0"], "copies and layouts"),
    ("aten::mm", ["aten::linear"], "everything else"), ("sm90_xmma_fprop_implicit_gemm_bf16_nhwckrsc_nhwc", [], "convolution"),
    ("void cudnn::bn_fw_tr_1C11_kernel_NHWC", [], "batch normalisation"), ("max_pool_forward_nhwc", [], "everything else"),
    ("void cudnn::ops::nchwToNhwcKernel", [], "copies and layouts"), ("multi_tensor_apply_kernel", [], "update of the weights")])
def test_what_an_operation_does_is_told_by_its_name_or_what_it_is_part_of(name, parents, kind):
    event = None
    for n in [*reversed(parents), name]: event = types.SimpleNamespace(name=n, cpu_parent=event)
    assert scaling._does(event) == kind
