"""SIGKILL at random moments: what comes out in the end is what an undisturbed run gives, bit for bit."""
import json
import os
import random
import signal
import time
import traceback
from dataclasses import replace

import pytest
import torch

from robustcv import single_run
from robustcv.core import SCALES
from robustcv.data import load_data
from robustcv.evaluation import Perturbation
from robustcv.experiments import run_sections
from robustcv.grids import SECTIONS, Run
from robustcv.synthetic import make_synthetic
from robustcv.transforms import RandomHorizontalFlip

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and forks of POSIX systems")
KILLS = 25
RUNS = [Run("tiny", "plain", "shufflenet_v2_x0_5"), Run("tiny", "flip", "shufflenet_v2_x0_5", transform=RandomHorizontalFlip(), training={"keep": "best"})]
TIMES = ("seconds", "time", "images_per_second")


def timeless(value):
    "Without what differs from one machine and moment to the next."
    if isinstance(value, dict): return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value

def start(work):
    "A process of its own that does the work; its exit code is 0 if that went well."
    if pid := os.fork(): return pid
    try: work(); os._exit(0)
    except BaseException: traceback.print_exc()
    os._exit(1)

def undisturbed(work):
    _, status = os.waitpid(start(work), 0)
    assert status == 0

def disturbed(work, rng, longest):
    "Start the work over and over, and kill it after a random time, until it comes to its end; returns how often it was killed."
    for kills in range(1000):
        pid = start(work)
        deadline = time.monotonic() + rng.uniform(0, longest)
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline: time.sleep(.002)
        if ended[0]:
            assert ended[1] == 0, "a run after a kill failed by itself"
            return kills
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    raise AssertionError("it never came to its end")

def files(folder): return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def grid(tiny, monkeypatch):
    "A grid of two short runs, and the cache that they read, in a folder."
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], classes=4, train_per_class=6, val_per_class=3, batch_size=4, epochs=12, seeds=(0, 1)))
    monkeypatch.setitem(SECTIONS, "tiny", lambda: RUNS)
    monkeypatch.setattr(single_run, "standard_perturbations", lambda: [Perturbation("clean", lambda x, y, m: x)])
    return lambda folder: lambda: run_sections(["tiny"], "smoke", data=tiny, results=folder/"results", folder=folder/"runs", device="cpu",
                                               say=lambda line: None, cache=folder/"cache")

def outcome(folder):
    "Everything that a grid leaves, without times: weights as bytes, records and learning curves."
    found = files(folder)
    assert not [n for n in found if n.endswith(".part")], "half-written files were left"
    lines = [timeless(json.loads(l)) for l in found.pop("results/tiny-smoke.jsonl").decode().splitlines()]
    return lines, {n: timeless(json.loads(b)) if n.endswith(".json") else b for n, b in found.items()}

def test_a_grid_that_is_killed_ends_as_one_that_is_not(grid, tmp_path):
    undisturbed(grid(tmp_path/"reference"))
    expected, rng, kills = outcome(tmp_path/"reference"), random.Random(0), 0
    for i in range(100):
        if kills >= KILLS: break
        kills += disturbed(grid(tmp_path/f"{i}"), rng, longest=3)
        assert outcome(tmp_path/f"{i}") == expected
    assert kills >= KILLS and len(expected[0]) == 4


def test_a_cache_that_is_killed_while_it_is_written_is_whole_or_not_there(tmp_path):
    source = make_synthetic(tmp_path/"images", 300, 10, classes=4, size=32)
    work = lambda folder: lambda: load_data(source, cache=tmp_path/folder, workers=1)
    undisturbed(work("reference"))
    rng, kills = random.Random(1), 0
    for i in range(100):
        if kills >= KILLS: break
        kills += disturbed(work(f"{i}"), rng, longest=.5)
        assert files(tmp_path/f"{i}") == files(tmp_path/"reference")
    assert kills >= KILLS


def test_a_checkpoint_in_memory_of_a_killed_run_is_one_of_the_undisturbed_run_s(grid, tmp_path):
    "At any moment, what lies in the folder of checkpoints can be read."
    rng, seen = random.Random(2), 0
    for _ in range(KILLS):
        pid = start(grid(tmp_path/"some"))
        time.sleep(rng.uniform(.2, 2)); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        for f in (tmp_path/"some").rglob("state.pt"): torch.load(f, weights_only=True); seen += 1
    assert seen
