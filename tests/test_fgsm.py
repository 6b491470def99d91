"""Attacks: closed forms on linear models, no side effects, a peer library where it is installed."""
import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustcv.core import SCALES, generator, normalized
from robustcv.data import ImageSet
from robustcv.ensemble import Ensemble
from robustcv.single_run import scale_data
from robustcv.fgsm import (
    _slope,
    Transferred,
    apgd,
    attacking,
    cross_entropies,
    dlr_towards,
    fgsm,
    fold_batchnorm,
    gradient,
    pgd,
    projection,
    square,
    strong_attacks,
    transfer_table,
    worst_case,
)
from robustcv.models import build_model
from robustcv.symmetry import symmetrize
from robustcv.synthetic import make_synthetic
from robustcv.training import Training, fit


class Linear(nn.Module):
    "K logits, linear in the pixels."
    def __init__(self, k=5, seed=0):
        super().__init__()
        self.w = nn.Parameter(torch.randn(k, 3*8*8, generator=generator(seed)))
    def forward(self, x): return x.flatten(1) @ self.w.T

@pytest.fixture
def two(): return Linear(2)

@pytest.fixture
def x(): return torch.rand(12, 3, 8, 8, generator=generator(1))*.6 + .2

@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = build_model("resnet18", 5)
    net(torch.rand(32, 3, 32, 32, generator=generator(2))) # statistics that are not the defaults
    return net.eval()

@pytest.fixture(scope="module")
def images(): return torch.rand(8, 3, 32, 32, generator=generator(3))

ATTACKS = {"fgsm": lambda m, x, y, e: fgsm(m, x, y, e), "pgd": lambda m, x, y, e: pgd(m, x, y, e, 4, generator=generator(0)),
           "pgd l2": lambda m, x, y, e: pgd(m, x, y, e, 4, norm="l2", generator=generator(0)),
           "apgd": lambda m, x, y, e: apgd(m, x, y, e, 10, generator=generator(0)),
           "square": lambda m, x, y, e: square(m, x, y, e, 30, generator=generator(0))}

def margin(model, x, y):
    out = model(x)
    return (out.gather(1, y[:, None]) - out.gather(1, 1 - y[:, None]))[:, 0].detach()

@pytest.mark.parametrize("attack", [lambda *a: fgsm(*a), lambda *a: pgd(*a, 6), lambda *a: pgd(*a, 3, random_start=False), lambda *a: apgd(*a, 20)])
def test_the_margin_of_a_linear_model_drops_by_the_l1_norm(two, x, attack):
    y, w = two(x).argmax(1), (two.w[0] - two.w[1]).detach()
    torch.testing.assert_close(margin(two, x, y) - margin(two, attack(two, x, y, .05), y), (.05*w.abs().sum()).expand(12), rtol=1e-3, atol=1e-3)

def test_the_margin_drops_by_the_l2_norm_in_the_euclidean_ball(two, x):
    y, w = two(x).argmax(1), (two.w[0] - two.w[1]).detach()
    adv = pgd(two, x, y, .1, 3, norm="l2", random_start=False)
    torch.testing.assert_close(margin(two, x, y) - margin(two, adv, y), (.1*w.norm()).expand(12), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((adv - x).flatten(1).norm(dim=1), torch.full((12,), .1), rtol=1e-4, atol=0)

def test_targeted_steps_go_towards_the_target(two, x):
    y = two(x).argmax(1)
    assert fgsm(two, x, 1 - y, .05, targeted=True).equal(fgsm(two, x, y, .05)) # with two classes, away from one is towards the other
    assert pgd(two, x, 1 - y, .05, 4, targeted=True, random_start=False).allclose(pgd(two, x, y, .05, 4, random_start=False))

@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_leaves_no_trace(net, images, name):
    model, y = copy.deepcopy(net).train(), torch.arange(8) % 5
    model.stages[0].requires_grad_(False) if hasattr(model, "stages") and isinstance(model.stages, list) else None
    model(images).sum().backward()
    state, grads = copy.deepcopy(model.state_dict()), [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    wanted, before, modes = [p.requires_grad for p in model.parameters()], images.clone(), [m.training for m in model.modules()]
    adv = ATTACKS[name](model, images, y, 4/255)
    assert not adv.requires_grad and adv.grad_fn is None and images.equal(before) and not images.requires_grad
    assert all(v.equal(model.state_dict()[k]) for k, v in state.items()) and modes == [m.training for m in model.modules()]
    assert all((p.grad is None) == (g is None) and (g is None or p.grad.equal(g)) for p, g in zip(model.parameters(), grads, strict=True))
    assert wanted == [p.requires_grad for p in model.parameters()]

@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "square"])
@pytest.mark.parametrize("eps", [0., 3/255, normalized(.1)])
def test_examples_stay_in_the_box_and_in_range(net, images, name, eps):
    adv = ATTACKS[name](net, images, torch.arange(8) % 5, eps)
    assert ((adv - images).abs() <= torch.as_tensor(eps) + 1e-6).all() and 0 <= adv.min() and adv.max() <= 1

@settings(deadline=None, max_examples=20)
@given(st.floats(0, .5), st.integers(1, 4), st.integers(0, 99))
def test_l2_examples_stay_in_the_ball(eps, steps, seed):
    x = torch.rand(4, 3, 8, 8, generator=generator(seed))
    adv = pgd(Linear(3), x, torch.tensor([0, 1, 2, 0]), eps, steps, norm="l2", generator=generator(seed))
    assert ((adv - x).flatten(1).norm(dim=1) <= eps + 1e-5).all() and 0 <= adv.min() and adv.max() <= 1

def test_a_failing_model_is_put_back_all_the_same(net, images):
    class Broken(nn.Module):
        def __init__(self): super().__init__(); self.inner = copy.deepcopy(net)
        def forward(self, x): raise RuntimeError("broken")
    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken"): fgsm(model, images, torch.zeros(8, dtype=torch.long), .1)
    assert model.training and all(p.requires_grad for p in model.parameters())

@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attacks_work_where_gradients_are_off(net, images, mode):
    y = torch.arange(8) % 5
    with mode(): adv = fgsm(net, images, y, 4/255)
    assert adv.equal(fgsm(net, images, y, 4/255))

def test_restarts_keep_the_worst(net, images):
    y = net(images).argmax(1)
    loss = lambda adv: nn.functional.cross_entropy(net(adv), y, reduction="none").detach()
    one, many = (pgd(net, images, y, 2/255, 3, restarts=r, generator=generator(5)) for r in (1, 4))
    assert (loss(many) >= loss(one) - 1e-5).all()

def test_apgd_is_at_least_as_strong_as_one_step(net, images):
    y = net(images).argmax(1)
    loss = lambda adv: nn.functional.cross_entropy(net(adv), y, reduction="none").detach()
    adv = apgd(net, images, y, 1/255, 40, generator=generator(0)); step = fgsm(net, images, y, 1/255)
    assert ((loss(adv) >= loss(step) - 1e-2) | (net(adv).argmax(1) != y)).all()

def plain_apgd(value, x, eps, steps, start):
    "Algorithm 1 of Croce and Hein 2020, one image and without tensors of states; and how often the step was halved."
    def at(p): p = p.detach().requires_grad_(); v = value(p); return v.item(), torch.autograd.grad(v, p)[0]
    into = lambda p: p.clamp(x - eps, x + eps).clamp(0, 1)
    size, period, adv, old, (v, g) = 2*eps, int(.22*steps), start, start, at(start)
    best, rises, last, halved, halvings = (v, adv, g), [], v, True, 0
    for i in range(steps):
        z, momentum, before = into(adv + size*g.sign()), .75 if i else 1, v
        adv, old = into(adv + momentum*(z - adv) + (1 - momentum)*(adv - old)), adv
        v, g = at(adv); rises.append(v > before)
        if v > best[0]: best = v, adv, g
        if len(rises) < period: continue
        halved = sum(rises) <= .75*period or not halved and last >= best[0]
        if halved: size, halvings, (v, adv, g) = size/2, halvings + 1, best; old = adv
        rises, last, period = [], best[0], max(period - int(.03*steps), int(.06*steps))
    return best[1], halvings

def test_apgd_is_the_algorithm_image_by_image():
    class Waves(Linear):
        def forward(self, x): return torch.stack([torch.full((len(x),), 9.).double(), torch.sin(3*super().forward(x)).sum(1)], 1) # never wrong, never flat
    model, x, steps, counts = Waves().double(), torch.rand(6, 3, 8, 8, generator=generator(4)).double(), 70, set() # near ties decide
    adv = apgd(model, x, torch.zeros(6, dtype=torch.long), .02, steps, lambda out, y: out[:, 1], generator(5))
    start = torch.rand(x.shape, generator=generator(5)).double()*2 - 1 # a corner of the box lies on the ray through it
    for i in range(6):
        first = (x[i] + .02*start[i]/start[i].abs().max()).clamp(0, 1)
        want, halvings = plain_apgd(lambda p: model(p[None])[0, 1], x[i], .02, steps, first); counts.add(halvings)
        torch.testing.assert_close(adv[i], want, rtol=0, atol=1e-6)
    assert max(counts) >= 3 and len(counts) > 1, counts

def test_a_pixel_without_gradient_stays(two, x):
    with torch.no_grad(): two.w.view(2, 3, 8, 8)[:, :, :4] = 0
    adv = fgsm(two, x, two(x).argmax(1), .05)
    assert adv[:, :, :4].equal(x[:, :, :4]) and ((adv - x)[:, :, 4:].abs() - .05).abs().max() < 1e-6

def test_a_single_random_step_starts_anywhere_in_the_box(two, x):
    start = pgd(two, x, two(x).argmax(1), .1, 1, step_size=1e-9, generator=generator(0)) - x
    assert start.min() < -.09 and start.max() > .09 and start.mean().abs() < .01 and abs(start.abs().mean() - .05) < .005

def test_squares_turn_images_or_come_to_the_corner_that_is_best_for_a_linear_model(two, x):
    y, most = two(x).argmax(1), .02*(two.w[0] - two.w[1]).detach().abs().sum()
    before = margin(two, x, y)
    few, many = (margin(two, square(two, x, y, .02, n, generator=generator(0)), y) for n in (50, 2000))
    assert (many <= few).all() and (many >= before - most - 1e-3).all() and ((many < 0) | (before - many > .99*most)).all() and 0 < (many > 0).sum() < 12


def test_the_targeted_ratio_is_the_formula():
    out, y, t = torch.tensor([[3., 1., 0., -2., 5.]]), torch.tensor([0]), torch.tensor([1])
    assert dlr_towards(t)(out, y).item() == pytest.approx(-(3 - 1)/(5 - (1 + 0)/2))
    assert dlr_towards(t)(10*out, y).item() == pytest.approx(dlr_towards(t)(out, y).item())

def test_folding_changes_nothing_but_the_layers(net, images):
    folded = fold_batchnorm(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) and any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    torch.testing.assert_close(folded(images), net(images), rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for p in folded.parameters())
    class Branch(nn.Module): # cannot be traced
        def forward(self, x): return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))
    assert fold_batchnorm(Branch())(images).equal(Branch()(images))

def test_survivors_only_ever_shrink_and_see_only_what_is_left():
    model, x, y = Linear(5), torch.rand(20, 3, 8, 8, generator=generator(4)), torch.arange(20) % 5
    seen = []
    def attack(model, x, y, eps, generator): seen.append(len(x)); return x if len(seen) == 1 else 1 - x
    worst, alive = worst_case(model, x, y, .1, {"nothing": attack, "negative": attack})
    clean = model(x).argmax(1) == y
    assert alive["clean"].equal(clean) and alive["nothing"].equal(clean) and seen == [int(clean.sum())]*2
    assert alive["negative"].equal(clean & (model(1 - x).argmax(1) == y))
    turned = clean & ~alive["negative"]
    assert turned.any() and worst.equal(torch.where(turned.view(-1, 1, 1, 1), 1 - x, x)), "adversarial where it worked, else the image"
    assert list(strong_attacks(5, targets=9)) == ["APGD-CE", *[f"APGD-DLR, target {i}" for i in range(1, 5)], "Square"]
    assert list(strong_attacks(3)) == ["APGD-CE", "Square"]

def test_the_transfer_table_is_what_single_attacks_give(net):
    other, n = Linear(5), 10
    small = ImageSet(torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator(6)), torch.arange(n) % 5, tuple("abcde"))
    models = {"linear": other, "another": Linear(5, seed=1)}
    table = transfer_table(models, models, small, {"0": 0., "8/255": 8/255}, batch_size=4, device="cpu")
    assert len(table) == 8 and (table.n == n).all()
    for r in table.itertuples():
        adv = fgsm(models[r.source], small.images/255, small.labels, 0. if r.eps == "0" else 8/255)
        assert r.correct == int((models[r.target](adv).argmax(1) == small.labels).sum()) == r.hits.sum()
    again = transfer_table(models, models, small, {"8/255": 8/255}, attack=lambda m, x, y, e: fgsm(m, x, y, e), device="cpu")
    assert again.correct.tolist() == table[table.eps == "8/255"].correct.tolist()

def test_each_example_is_crafted_once_for_all_targets():
    small, crafted = ImageSet(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.zeros(6, dtype=torch.long), ("a", "b")), []
    def attack(model, x, y, eps): crafted.append(eps); return x
    transfer_table({"a": Linear(2), "b": Linear(2)}, {n: Linear(2) for n in "cdef"}, small, {"1": .1, "2": .2}, attack, device="cpu")
    assert crafted == [.1, .2, .1, .2]

@pytest.mark.parametrize("call, word", [
    (lambda m, x, y: fgsm(m, x, y, 8), "eps=8"), (lambda m, x, y: fgsm(m, x, y, -.1), "eps=-0.1"), (lambda m, x, y: fgsm(m, x, y, float("nan")), "eps"),
    (lambda m, x, y: fgsm(m, x, y, torch.ones(2)), "eps"), (lambda m, x, y: fgsm(m, x*255, y), "images"), (lambda m, x, y: fgsm(m, x - .5, y), "images"),
    (lambda m, x, y: fgsm(m, x, y[:3]), "labels"), (lambda m, x, y: fgsm(m, x, y.float()), "labels"), (lambda m, x, y: fgsm(m, x, y + 99), "labels"),
    (lambda m, x, y: fgsm(m, x[:0], y[:0]), "images"), (lambda m, x, y: pgd(m, x, y, norm="l1"), "norm"), (lambda m, x, y: pgd(m, x, y, steps=0), "steps"),
    (lambda m, x, y: pgd(m, x, y, restarts=0), "restarts"), (lambda m, x, y: pgd(m, x, y, restarts=2, random_start=False), "restarts"),
    (lambda m, x, y: pgd(m, x, y, normalized(.1), norm="l2"), "eps"), (lambda m, x, y: square(m, x, y, queries=0), "queries"),
    (lambda m, x, y: square(m, x, y, p=0), "p=0"), (lambda m, x, y: transfer_table({}, {"a": m}, None, {"1": 1}), "sources")])
def test_bad_input_names_the_argument(x, call, word):
    with pytest.raises(ValueError, match=word): call(Linear(5), x, torch.arange(12) % 5)

def test_a_model_without_a_gradient_is_refused(x):
    class Step(nn.Module):
        def forward(self, x): return x.flatten(1)[:, :5].detach().round()
    with pytest.raises(ValueError, match="gradient"): fgsm(Step(), x, torch.arange(12) % 5, .1)

def test_gradient_is_autograds(net, images):
    y = torch.arange(8) % 5
    with attacking(net): g, out = gradient(net, images, y)
    z = images.clone().requires_grad_(True); each = nn.functional.cross_entropy(net(z), y, reduction="none")
    unit = lambda v: v/v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(unit(g), unit(torch.autograd.grad(each.sum(), z)[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, net(images).detach()); torch.testing.assert_close(cross_entropies(out, y), each.detach())

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_closed_form_of_a_slope_is_autograds(dtype):
    out, y = (8*torch.randn(64, 7, generator=generator(0))).to(dtype), torch.arange(64) % 7
    ours, theirs = (_slope(out, y, loss) for loss in (cross_entropies, lambda out, y: cross_entropies(out, y)))
    assert ours.dtype == dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)

@given(st.integers(0, 2**32), st.sampled_from([.05, .4, (.1, .2, .6)]))
def test_the_nearest_point_of_the_box_is_that_of_two_bounds(seed, eps):
    x, adv = torch.rand(2, 3, 4, 4, generator=generator(seed)), 2*torch.randn(2, 3, 4, 4, generator=generator(seed, "adv"))
    eps = torch.tensor(eps).view(-1, 1, 1)
    assert projection(x, eps)(adv).equal(adv.minimum(x + eps).maximum(x - eps).clamp(0, 1))

def test_modes_within_an_attack_do_not_stay(net):
    net.eval()
    with attacking(net): net.train()
    assert not any(m.training for m in net.modules())
    net.train(); next(net.net.children()).eval(); before = [m.training for m in net.modules()]
    with attacking(net): assert not any(m.training for m in net.modules())
    assert [m.training for m in net.modules()] == before

def test_fgsm_and_pgd_are_a_peers(net, images):
    torchattacks = pytest.importorskip("torchattacks")
    y = torch.arange(8) % 5
    assert (fgsm(net, images, y, 8/255) - torchattacks.FGSM(net, 8/255)(images, y)).abs().max() < 1e-6
    theirs = torchattacks.PGD(net, 8/255, 2/255, 5, random_start=False)(images, y)
    assert (pgd(net, images, y, 8/255, 5, 2/255, random_start=False) - theirs).abs().max() < 1e-6

def test_the_strong_attacks_leave_what_a_peer_s_ensemble_leaves(tmp_path):
    torchattacks = pytest.importorskip("torchattacks")
    train, valid = scale_data(SCALES["smoke"], make_synthetic(tmp_path/"tiny-imagenet-200", 60, 20, 4), cache=tmp_path)
    torch.manual_seed(0); net = build_model("resnet18", 4)
    fit(net, train, valid, config=Training(4, 16, lr=.02), device="cpu")
    x, y, eps = valid.images[::2]/255, valid.labels[::2], 2/255
    _, alive = worst_case(net, x, y, eps, strong_attacks(4, steps=50, queries=100), generator(0))
    ours, theirs = alive["Square"], alive["clean"].clone()
    peers = torchattacks.APGD(net, eps=eps, steps=50, n_restarts=1), torchattacks.APGDT(net, eps=eps, steps=50, n_restarts=1, n_classes=4)
    for attack in peers: theirs &= net(attack(x, y)).argmax(1) == y
    assert 2 < ours.sum() < alive["clean"].sum() and abs(int(ours.sum()) - int(theirs.sum())) <= 1
    fab = torchattacks.FAB(net, eps=eps, steps=50, n_restarts=1, n_classes=4)(x[ours], y[ours])
    assert (net(fab).argmax(1) == y[ours]).all(), "FAB turns nothing more"

def test_lent_examples_are_the_source_s_own_and_cost_one_gradient(x, monkeypatch):
    source, y, asked = Linear(5), torch.arange(12) % 5, []
    expected = {e: fgsm(source, x, y, e) for e in (.01, .1)} | {"other labels": fgsm(source, x, 4 - y, .1)}
    monkeypatch.setattr("robustcv.fgsm.gradient", lambda *args: asked.append(len(args[1])) or gradient(*args))
    lend, before = Transferred(source), x.clone()
    for e in (.01, .1): torch.testing.assert_close(lend(x, y, e), expected[e], rtol=0, atol=1e-7)
    assert asked == [12] and x.equal(before)
    torch.testing.assert_close(lend(x, 4 - y, .1), expected["other labels"], rtol=0, atol=1e-7)
    lend(x[:6], y[:6], .1)
    assert asked == [12, 12, 6], "other labels and other images have gradients of their own"
    with pytest.raises(ValueError, match="must be divided by 255"): lend(x, y, 8)

def test_apgd_stops_when_every_image_is_turned(x):
    class Counting(Linear):
        calls = 0
        def forward(self, x): Counting.calls += 1; return super().forward(x)
    model = Counting(2); y = 1 - model(x).argmax(1) # all wrong from the start
    Counting.calls = 0
    adv = apgd(model, x, y, .01, 50, generator=generator(0))
    assert Counting.calls == 1 and (adv - x).abs().max() <= .01 + 1e-6 and (model(adv).argmax(1) != y).all()


def with_statistics(model):
    "Batch normalisation that has seen something."
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1); m.running_var.uniform_(.5, 2)
    return model.eval()

def test_a_layer_that_is_used_twice_is_not_folded_twice():
    torch.manual_seed(0); one = with_statistics(build_model("shufflenet_v2_x0_5", 4)); x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for model in (Ensemble([one, one]), symmetrize(one), nn.Sequential(one.net.conv1, nn.Conv2d(24, 24, 1), nn.Flatten(), nn.LazyLinear(4)).eval()):
            expected = model(x)
            torch.testing.assert_close(fold_batchnorm(model)(x), expected, rtol=1e-4, atol=1e-4)

def test_a_model_that_cannot_be_traced_is_attacked_as_it_is():
    class Picky(nn.Module):
        "Looks at its input, which a stand-in for a tensor does not have."
        def __init__(self, error): super().__init__(); self.lin, self.error = nn.Linear(3*8*8, 4), error
        def forward(self, x):
            if not isinstance(x, torch.Tensor): raise self.error("no tensor")
            return self.lin(x.flatten(1))
    x, y = torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2])
    for error in (ValueError, KeyError, AssertionError):
        model = Picky(error)
        assert torch.equal(fgsm(fold_batchnorm(model), x, y, .1), fgsm(model, x, y, .1))

@pytest.mark.parametrize("shape", [(24, 32), (16, 48), (8, 8)])
def test_squares_fit_into_images_that_are_none(shape):
    x, net = torch.rand(3, 3, *shape, generator=generator(0)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)).eval()
    assert (square(net, x, net(x).argmax(1), 1e-4, 50, generator=generator(1)) - x).abs().max() <= 1e-4 + 1e-6

@pytest.mark.parametrize("where", [lambda m: m, lambda m: m[0], lambda m: m[1]])
def test_a_network_with_hooks_is_attacked_with_them(where):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.rand(2, 3, 8, 8); net(x)
    where(net).register_forward_pre_hook(lambda m, args: ((args[0] - .5)/.2,))
    torch.testing.assert_close(fold_batchnorm(net)(x), net(x))

class NotFinite(nn.Module):
    def forward(self, x): return x.mean((2, 3))*float("nan")

def test_outputs_that_are_not_finite_are_no_robustness():
    x, y = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    data = ImageSet((x*255).to(torch.uint8), y, ("a", "b", "c"))
    with pytest.raises(ValueError, match="outputs are not finite"): worst_case(NotFinite(), x, y, .1)
    with pytest.raises(ValueError, match="outputs are not finite"): transfer_table({"n": NotFinite()}, {"n": NotFinite()}, data, {"e": .1})

@pytest.mark.parametrize("attack", [fgsm, pgd, partial(pgd, norm="l2"), apgd, square])
def test_outputs_that_are_no_numbers_are_named_by_every_attack(attack):
    class Lost(nn.Module):
        def forward(self, x): return torch.stack([x.mean((1, 2, 3)), (x.mean((1, 2, 3)) - 1).sqrt()], 1)
    class Two(nn.Module):
        def forward(self, x): return x.mean((2, 3)), x
    x, y = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"its outputs are no numbers \(NaN\) for 4 of 4 images"): attack(Lost(), x, y, .1)
    with pytest.raises(ValueError, match="model: returns a tuple and not logits"): attack(Two(), x, y, .1)

@pytest.mark.parametrize("eps", ["0.1", None, "much"])
def test_a_radius_that_is_no_number_is_named(eps):
    with pytest.raises(ValueError, match="eps="): fgsm(nn.Flatten(), torch.rand(1, 3, 8, 8), torch.zeros(1, dtype=torch.long), eps)

def test_steps_may_be_numpy_s_and_an_empty_set_is_named(images):
    torch.manual_seed(0); net, y = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 5)).eval(), torch.arange(len(images)) % 5
    assert torch.equal(*(pgd(net, images, y, .1, steps=s, random_start=False) for s in (3, np.int64(3))))
    with pytest.raises(ValueError, match="steps=2.0: a whole number"): pgd(net, images, y, .1, steps=2.)
    none = ImageSet(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.long), ("a",))
    with pytest.raises(ValueError, match="images: .* is empty"): transfer_table({"n": net}, {"n": net}, none, {"e": .1})

@pytest.mark.parametrize("attack", [fgsm, pgd, apgd, square, worst_case])
@pytest.mark.parametrize("labels", [torch.tensor([0, 4]), torch.tensor([0, -1]), torch.tensor([0, -100]), torch.ones(2).int(), torch.ones(2).byte()])
def test_labels_that_are_none_are_refused(attack, labels):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    with pytest.raises(ValueError, match="labels"): attack(net, torch.rand(2, 3, 8, 8), labels, .1)

def test_an_l2_radius_may_be_as_long_as_an_image():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), torch.rand(2, 3, 8, 8, generator=generator(0))
    adv = pgd(net, x, torch.tensor([0, 1]), 3., norm="l2", generator=generator(1))
    assert 1 < (adv - x).flatten(1).norm(dim=1).max() <= 3.0001
    with pytest.raises(ValueError, match="eps=20"): pgd(net, x, torch.tensor([0, 1]), 20., norm="l2")
    for size in (math.nan, -.1, 0.):
        with pytest.raises(ValueError, match="step_size"): pgd(net, x, torch.tensor([0, 1]), .1, step_size=size)

# what an attack must not take for robustness, and what it must not change

class Tempered(nn.Module):
    "Logits divided by a temperature."
    def __init__(self, net, temperature): super().__init__(); self.net, self.temperature = net, temperature
    def forward(self, x): return self.net(x)/self.temperature

@pytest.mark.parametrize("temperature", [1., .01, .002])
def test_a_certain_prediction_has_a_direction(images, temperature):
    torch.manual_seed(0); line = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 5)); y = line(images).argmax(1)
    own = nn.functional.one_hot(y, 5).bool()
    others = (line(images).double()/temperature).masked_fill(own, -math.inf).softmax(1) # which class comes next
    direction = (others.masked_fill(own, -1) @ line[1].weight.double()).view_as(images)
    assert (fgsm(Tempered(line, temperature), images, y, .1) - (images + .1*direction.sign()).clamp(0, 1)).abs().gt(1e-6).float().mean() < 1e-3

class Rooted(nn.Module):
    "Finite logits whose gradient is not."
    def __init__(self, n): super().__init__(); self.line = nn.Linear(n, 5)
    def forward(self, x): return self.line(x.flatten(1)) + 1e-3*(x.relu()*0).sqrt().sum((1, 2, 3))[:, None]

@pytest.mark.parametrize("attack", [fgsm, pgd, apgd])
def test_a_gradient_that_is_not_finite_is_no_robustness(images, attack):
    with pytest.raises(ValueError, match="gradient is not finite for 8 of 8 images"): attack(Rooted(images[0].numel()), images, torch.arange(8) % 5, .1)

def test_what_a_network_draws_is_not_folded_away(images):
    class Noisy(nn.Module):
        def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
        def forward(self, x): return self.net(x + .3*torch.randn(1, 3, 1, 1))
    model = Noisy().eval(); model(images)
    before = torch.get_rng_state(); folded = fold_batchnorm(model)
    assert torch.get_rng_state().equal(before) and not folded(images).equal(folded(images))

def test_outputs_that_are_not_finite_are_no_fault_of_the_gradient(images):
    class Masked(nn.Module):
        def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 5))
        def forward(self, x): return self.net(x).masked_fill(torch.arange(5) == 4, -math.inf)
    assert fgsm(Masked(), images, torch.full((8,), 4), .1).isfinite().all()

def test_a_network_that_keeps_an_activation_can_be_copied(images):
    class Keeps(nn.Module):
        def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
        def forward(self, x): self.last = self.net(x); return self.last
    model = Keeps().eval(); model(images)
    torch.testing.assert_close(fold_batchnorm(model)(images), model(images), rtol=1e-4, atol=1e-5)
    assert model.last.requires_grad and worst_case(model, images, torch.arange(8) % 5, .01, {"FGSM": lambda m, x, y, e, g: fgsm(m, x, y, e)})[1]

@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (1, 3), (2,), (3, 1)])
def test_a_radius_for_each_image_is_refused(net, images, shape):
    with pytest.raises(ValueError, match=r"eps: a number, or one a channel"): fgsm(net, images[:3], torch.arange(3), torch.full(shape, .1))

def test_inside_of_inference_mode(net, images):
    expected = fgsm(net, images, torch.arange(8) % 5, .1)
    with torch.inference_mode(): found = fgsm(net, images.clone(), torch.arange(8) % 5, .1)
    assert found.equal(expected)

@pytest.mark.parametrize("kwargs, said", [({"step_size": torch.full((3,), .01)}, "step_size="), ({"step_size": 0}, "step_size=0")])
def test_bad_steps(net, images, kwargs, said):
    with pytest.raises(ValueError, match=said): pgd(net, images, torch.arange(8) % 5, .1, **kwargs)

def test_labels_in_a_list_are_named(net, images):
    with pytest.raises(ValueError, match="labels: expected a tensor of 8 whole numbers .* got a list"): fgsm(net, images, [0]*8, .1)
