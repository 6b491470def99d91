"""Two processes on a CPU (gloo): what one process with the same whole batch learns, and files written once."""
import multiprocessing
import os
import socket
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from robustcv import adversarial_training as at, single_run
from robustcv.core import load_records
from robustcv.data import ImageSet
from robustcv.evaluation import Perturbation
from robustcv.experiments import run_section
from robustcv.grids import SECTIONS, Run
from robustcv.recipe import mixed_loss
from robustcv.stability import stability_loss
from robustcv.processes import main_process
from robustcv.training import Training, cross_entropy, fit

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks of POSIX systems")
CONFIG = Training(epochs=3, batch_size=8, lr=0.05, precision="fp32")

def images(n=32, seed=0):
    labels, noise = torch.arange(n) % 3, torch.randint(0, 200, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    noise[torch.arange(n), labels] += 50
    return ImageSet(noise.to(torch.uint8), labels, ("a", "b", "c"))

def net():
    "Statistics of each image alone: with those of a batch, a share of it is another batch."
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))

def launched(work, n=2):
    "What `work()` returns in each of n processes that were launched together."
    with socket.socket() as s: s.bind(("localhost", 0)); port = s.getsockname()[1]
    context = multiprocessing.get_context("fork"); out = context.Queue()
    def go(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=str(port))
        warnings.simplefilter("ignore"); torch.manual_seed(0)
        out.put((rank, work()))
    crowd = [context.Process(target=go, args=(r,)) for r in range(n)]
    for p in crowd: p.start()
    found = dict(out.get(timeout=120) for _ in crowd)
    for p in crowd: p.join(60)
    assert [p.exitcode for p in crowd] == [0]*n
    return [found[r] for r in range(n)]

def learnt(objective, config=CONFIG, folder=None):
    model = net()
    history = fit(model, images(), images(13, 1), objective, config=config, device="cpu", folder=folder)
    return history[["loss", "lr", "train_accuracy", "valid_accuracy"]].to_numpy(), [v.detach().double().numpy() for v in model.state_dict().values()]


@pytest.mark.parametrize("batch_size", [8, 9]) # equal shares, and one of 5 images beside one of 4
@pytest.mark.parametrize("objective", [cross_entropy, at.adversarial_loss, partial(at.adversarial_loss, alpha=.3, eps=.1)])
def test_two_processes_learn_what_one_does(objective, batch_size):
    "Up to rounding: sums of 4 and 4 terms in float32 in place of 8, over 12 steps."
    config = replace(CONFIG, batch_size=batch_size)
    (history, weights), (other, same) = launched(lambda: learnt(objective, config))
    one, alone = learnt(objective, config)
    assert history[:, 0] == pytest.approx(one[:, 0], rel=1e-4) and (history[:, 1:] == one[:, 1:]).all() and (history == other).all()
    assert all(abs(a - b).max() < 1e-4 for a, b in zip(weights, alone, strict=True)) and all((a == b).all() for a, b in zip(weights, same, strict=True))

@pytest.mark.parametrize("objective", [at.adversarial_data_loss, at.fgsm_rs_loss, partial(at.pgd_loss, steps=2), partial(at.trades_loss, steps=2),
                                       stability_loss, mixed_loss],
                         ids=["data", "FGSM-RS", "PGD", "TRADES", "stability", "mixed"])
def test_processes_agree_whatever_the_objective(objective):
    "Noise is drawn for a share of the batch, so it is other noise than one process draws; but all have the same weights in the end."
    (history, weights), (other, same) = launched(lambda: learnt(objective))
    assert (history == other).all() and (history[:, 0] > 0).all() and all((a == b).all() for a, b in zip(weights, same, strict=True))

def test_a_checkpoint_of_two_is_continued_by_two(tmp_path):
    def stopped():
        def stop(model, batch, backward):
            stop.calls += 1
            if stop.calls > 6: raise KeyboardInterrupt # in the second epoch
            return cross_entropy(model, batch)
        stop.calls = 0; stop.__name__ = "cross_entropy"
        try: learnt(stop, folder=tmp_path)
        except KeyboardInterrupt: return True
    assert launched(stopped) == [True, True] and (tmp_path/"state.pt").exists()
    (history, weights), _ = launched(lambda: learnt(cross_entropy, folder=tmp_path))
    (expected, fresh), _ = launched(lambda: learnt(cross_entropy))
    assert (history == expected).all() and all((a == b).all() for a, b in zip(weights, fresh, strict=True))

def test_a_grid_of_two_processes_is_recorded_once_and_told_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(SECTIONS, "baseline", lambda: [Run("baseline", "plain", "shufflenet_v2_x0_5", training={"epochs": 1})])
    monkeypatch.setattr(single_run, "standard_perturbations", lambda: [Perturbation("clean", lambda x, y, m: x)])
    def work():
        said = []
        found = run_section("baseline", "smoke", data=tiny, seeds=(0,), results=tmp_path/"results", folder=tmp_path/"runs", device="cpu", say=said.append)
        return main_process(), len(said), [r["id"] for r in found]
    (first, told, ids), (second, silent, same) = launched(work)
    assert (first, second) == (True, False) and told and not silent and ids == same
    assert [r["id"] for r in load_records(tmp_path/"results")] == ids and (tmp_path/"results"/"baseline-smoke.jsonl").read_text().count("\n") == 1

def test_statistics_over_the_whole_batch_are_for_gpus():
    def work():
        try: learnt(cross_entropy, Training(epochs=1, batch_size=8, sync_batchnorm=True))
        except ValueError as e: return str(e)
    assert launched(work) == ["sync_batchnorm=True: PyTorch has it for GPUs only"]*2

def test_what_is_watched_is_watched_on_all_images():
    def work():
        watch = at.WatchPGD(eps=.02, steps=2, images=7)
        return fit(net(), images(), images(20, 1), config=CONFIG, device="cpu", watch=watch).pgd_accuracy.tolist()
    one, (first, second) = launched(work, 1)[0], launched(work)
    assert first == second == pytest.approx(one, abs=100/7 + 1e-9) and all(round(v*7/100, 6) == round(v*7/100) for v in first)

def test_the_caller_s_own_accelerator_is_left_alone():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    try:
        mine = Accelerator(cpu=True, gradient_accumulation_steps=4)
        before = dict(mine.state.__dict__)
        fit(net(), images(), images(12, 1), config=replace(CONFIG, epochs=1), device="cpu")
        assert mine.state.__dict__ == before and mine.gradient_accumulation_steps == 4 and AcceleratorState().mixed_precision == mine.mixed_precision
    finally: AcceleratorState._reset_state(reset_partial_state=True)
    fit(net(), images(), images(12, 1), config=replace(CONFIG, epochs=1), device="cpu")
    assert not PartialState._shared_state # nor is there one of ours that would be in the way
