"""Exponents of known growth, and peaks of known memory; what the measures of the library say is asserted nowhere but that they run."""
import numpy as np
import pytest
import torch

from robustcv import scaling
from robustcv.scaling import exponent, grow, peak_memory


@pytest.mark.parametrize("k", [0, 1, 2.5])
def test_the_exponent_of_a_power_is_its_own(k): assert exponent([1, 3, 10], 7 * np.array([1., 3, 10])**k) == pytest.approx(k)


@pytest.mark.skipif(np.isnan(scaling._resident("VmHWM")), reason="the system does not tell a process's memory")
def test_memory_that_was_freed_again_is_seen():
    with peak_memory(torch.device("cpu")) as peak: x = torch.ones(50_000_000); del x
    assert 180 < peak[0] < 260


def test_memory_is_told_after_an_error_too():
    with pytest.raises(RuntimeError), peak_memory(torch.device("cpu")): raise RuntimeError


def test_growth_calls_each_size_once_after_a_warm_up(monkeypatch):
    seen, clock = [], [0.]
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: clock[0])
    def work(n): seen.append(n); clock[0] += n**2
    row = grow("x", lambda n: lambda: work(n), (2, 4, 8), 1)
    assert seen == [2, 2, 4, 8] and [p[:2] for p in row["points"]] == [(2, 4), (4, 16), (8, 64)]
    assert row["measure"] == "scaling/x" and (row["ours"], row["floor"]) == (2, 1)


def test_every_measure_runs_at_small_sizes():
    rows = list(scaling.scaling(None, most=512, side=64, rounds=2))
    assert [r["measure"].split("/")[1] for r in rows] == ["evaluated images", "training images", "side", "perturbations", "attack steps"]
    assert [[p[0] for p in r["points"]] for r in rows] == [[128, 512], [128, 512], [32, 64], [1, 2], [2, 4]]
