"""Adversarial objectives: equal to their naive formulations, and wired into `fit` as any other objective."""
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustcv.adversarial_training import (CollapseWarning, FreeAdversarial, WarmUp, WatchPGD, adversarial_data_loss, adversarial_loss,
                                           fgsm_rs_loss, pgd_loss, trades_loss)
from robustcv.core import describe, generator, normalized
from robustcv.data import Batch, Batches, ImageSet
from robustcv.training import Training, fit


class Small(nn.Module):
    "Convolution, batch normalisation, linear."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)
    def forward(self, x): return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))

@pytest.fixture
def batch(): return Batch(torch.rand(16, 3, 8, 8, generator=generator(0)), torch.arange(16) % 4, None, torch.arange(16))

def loss(model, x, y, **kwargs): return F.cross_entropy(model(x), y, label_smoothing=.1, **kwargs)

def gradients(objective, batch):
    model = Small().train()
    value = objective(model, batch, torch.Tensor.backward); value.backward()
    return [p.grad for p in model.parameters()], value.item(), model

def test_the_objective_is_the_naive_one(batch):
    def naive(model, b, backward, alpha=.3):
        x = b.images.clone().requires_grad_(True); g, = torch.autograd.grad(loss(model, x, b.labels), x)
        adv = (b.images + normalized(.2)*g.sign()).clamp(0, 1)
        return alpha*loss(model, b.images, b.labels) + (1 - alpha)*loss(model, adv, b.labels)
    (ours, value, _), (theirs, naive_value, _) = gradients(partial(adversarial_loss, alpha=.3), batch), gradients(naive, batch)
    assert value == pytest.approx(naive_value, rel=1e-5)
    for a, b in zip(ours, theirs, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

def test_the_objective_takes_two_forward_passes_and_two_backward(batch):
    model, calls = Small().train(), {"forward": 0, "backward": 0}
    model.register_forward_hook(lambda *_: calls.update(forward=calls["forward"] + 1))
    def backward(value): calls["backward"] += 1; value.backward()
    backward(adversarial_loss(model, batch, backward))
    assert calls == {"forward": 2, "backward": 2}

def test_adversarial_data_is_kurakins_loss(batch):
    def naive(model, b, backward):
        model.eval(); x = b.images[:4].clone().requires_grad_(True)
        g, = torch.autograd.grad(F.cross_entropy(model(x), b.labels[:4], reduction="sum"), x); model.train()
        mixed = torch.cat([(b.images[:4] + .05*g.sign()).clamp(0, 1), b.images[4:]])
        each = loss(model, mixed, b.labels, reduction="none")
        return (.3*each[:4].sum() + each[4:].sum())/(12 + .3*4)
    (ours, value, _), (theirs, naive_value, _) = gradients(partial(adversarial_data_loss, share=.25, weight=.3, eps=.05), batch), gradients(naive, batch)
    assert value == pytest.approx(naive_value, rel=1e-5)
    for a, b in zip(ours, theirs, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

OBJECTIVES = {"objective": adversarial_loss, "data": adversarial_data_loss, "least likely": partial(adversarial_data_loss, label="least likely", draw_eps=True),
              "pgd": partial(pgd_loss, steps=2), "fgsm-rs": fgsm_rs_loss, "trades": partial(trades_loss, steps=2), "free": FreeAdversarial()}

@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_trains_and_writes_to_nothing_else(batch, name):
    before = batch.images.clone()
    grads, value, model = gradients(OBJECTIVES[name], batch)
    assert batch.images.equal(before) and not batch.images.requires_grad and value > 0
    assert all(g.isfinite().all() for g in grads) and any(g.abs().sum() > 0 for g in grads) and model.training
    assert describe(OBJECTIVES[name]) is not None

def test_statistics_are_updated_by_training_passes_only(batch):
    steps = {n: int(gradients(o, batch)[2].bn.num_batches_tracked) for n, o in OBJECTIVES.items()}
    assert steps == {"objective": 2, "data": 1, "least likely": 1, "pgd": 1, "fgsm-rs": 1, "trades": 1, "free": 1}

def test_free_training_carries_its_perturbation_on(batch):
    free, model, radius = FreeAdversarial(.1), Small().train(), .1
    free(model, batch, torch.Tensor.backward); first = free._delta.clone()
    torch.testing.assert_close(first.abs(), torch.full_like(first, radius))
    free(model, batch, torch.Tensor.backward)
    assert not free._delta.equal(first) and free._delta.abs().max() <= radius + 1e-6

def test_zero_radius_is_clean_training(batch):
    clean, value, _ = gradients(lambda m, b, _: loss(m, b.images, b.labels), batch)
    for objective in (partial(pgd_loss, eps=0.), partial(fgsm_rs_loss, eps=0.), partial(adversarial_data_loss, eps=0., weight=1.)):
        for a, b in zip(gradients(objective, batch)[0], clean, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

def images(n=32): return ImageSet(torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator(1)), torch.arange(n) % 4, tuple("abcd"))

def test_warm_up_is_clean_at_first():
    seen = []
    def objective(model, batch, backward): seen.append(batch.epoch); return loss(model, batch.images, batch.labels)
    fit(Small(), images(), images(), WarmUp(objective, 2), config=Training(4, 16, lr=.01, precision="fp32"), device="cpu")
    assert seen == [2, 2, 3, 3]

def test_replays_step_on_the_same_batch():
    seen = []
    def objective(model, batch, backward): seen.append(batch.index.tolist()); return loss(model, batch.images, batch.labels)
    fit(Small(), images(), images(), objective, config=Training(1, 16, lr=.01, precision="fp32", replays=3), device="cpu")
    assert len(seen) == 6 and seen[0] == seen[1] == seen[2] != seen[3]

def test_the_watch_adds_a_column_and_warns_of_collapse():
    history = fit(Small(), images(), images(), config=Training(2, 16, lr=.01, precision="fp32"), device="cpu", watch=WatchPGD(.05, 2, images=20))
    assert history.pgd_accuracy.between(0, 100).all() and len(history) == 2
    class Constant(nn.Module):
        def __init__(self): super().__init__(); self.to = 0; self.w = nn.Parameter(torch.zeros(4))
        def forward(self, x): return F.one_hot(torch.full((len(x),), self.to), 4) + self.w + 0*x.mean((1, 2, 3))[:, None]
    model, watch = Constant(), WatchPGD(.05, 1)
    zeros = ImageSet(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.long), tuple("abcd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error"); assert watch(model, Batches(zeros, 4), []) == {"pgd_accuracy": 100.}
    model.to = 1
    with pytest.warns(CollapseWarning, match="fell to 0.0 %, after 100.0 %"): watch(model, Batches(zeros, 4), [{"pgd_accuracy": a} for a in (100., 60.)])
    with warnings.catch_warnings():
        warnings.simplefilter("error"); assert watch(model, Batches(zeros, 4), [{"epoch": 1}]) == {"pgd_accuracy": 0.}, "of an epoch without a watch"
    some, watch = replace(zeros, labels=torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])), WatchPGD(.05, 1) # a quarter is chance
    for model.to, left, before in ((0, 25., []), (3, 0., [{"pgd_accuracy": 25.}])):
        with warnings.catch_warnings(): warnings.simplefilter("error"); assert watch(model, Batches(some, 4), before) == {"pgd_accuracy": left}

@pytest.mark.parametrize("objective, word", [(partial(adversarial_loss, alpha=0), "alpha"), (partial(adversarial_loss, eps=8), "eps"),
    (partial(adversarial_data_loss, share=0), "share"), (partial(adversarial_data_loss, weight=0), "weight"),
    (partial(adversarial_data_loss, label="best"), "label")])
def test_bad_settings_name_the_argument(batch, objective, word):
    with pytest.raises(ValueError, match=word): gradients(objective, batch)

@pytest.mark.parametrize("objective", [partial(pgd_loss, steps=0), partial(trades_loss, steps=0)])
def test_an_attack_without_steps_is_refused(batch, objective):
    with pytest.raises(ValueError, match="steps=0: a whole number, at least 1"): gradients(objective, batch)

def test_free_training_begins_anew_with_every_epoch_and_training():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 2, 0])
    objective, batch = FreeAdversarial(.1), Batch(x, y, None, None, 0)
    losses = [float(objective.for_epoch(0)(model, batch, torch.Tensor.backward).detach()) for _ in range(2)] # the network stands still
    on = float(objective(model, batch, torch.Tensor.backward).detach())
    assert losses[0] == losses[1] < on

def test_a_warm_up_tells_its_objective_of_epochs():
    objective = FreeAdversarial(.1); objective._from = "before"
    assert WarmUp(objective, 2).for_epoch(2) is objective and objective._from is None
    assert WarmUp(pgd_loss, 2).for_epoch(3) is pgd_loss and WarmUp(objective, 2).for_epoch(1) is not objective

def test_a_watch_knows_of_the_epochs_before_an_interruption(tmp_path):
    class Forgets(nn.Module): # what it does is decided by its mode, its epoch and nothing else
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(4)); self.register_buffer("epochs", torch.zeros(()))
        def forward(self, x): return F.one_hot(torch.full((len(x),), int(self.epochs > 1)), 4) + self.w + 0*x.mean((1, 2, 3))[:, None]
    zeros = ImageSet(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.long), tuple("abcd"))
    stop = [True]
    def objective(model, batch, backward):
        if model.epochs == 1 and stop: stop.clear(); raise KeyboardInterrupt
        model.epochs += 1; return model(batch.images).sum()*0
    go = lambda: fit(Forgets(), zeros, zeros, objective, config=Training(2, 8, lr=.01, precision="fp32"), device="cpu", folder=tmp_path, watch=WatchPGD(.05, 1))
    with pytest.raises(KeyboardInterrupt): go()
    with pytest.warns(CollapseWarning, match="fell to 0.0 %, after 100.0 %"): assert go().pgd_accuracy.tolist() == [100, 0]

def test_a_watch_of_no_images_is_refused():
    with pytest.raises(ValueError, match="images=0"): WatchPGD(images=0)
