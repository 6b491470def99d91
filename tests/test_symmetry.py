"""The symmetries of the square: a group, permutations of pixels, and a network that does not see them."""
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from torchvision import ops
from torchvision.transforms.v2 import functional as tv

from robustcv.core import SCALES, generator
from robustcv.data import Batches, load_tiny_imagenet
from robustcv.evaluation import evaluate, measure_orbit
from robustcv.perturbations import standard_perturbations, symmetry_perturbations
from robustcv.single_run import scale_data
from robustcv.models import build_model
from robustcv.symmetry import (ELEMENTS, RandomSymmetry, _by_element, _by_pixel, apply_symmetry, compose, inverse, orbit_features,
                               rotation_response, selectivity, split_at, symmetrize, turned)
from robustcv.synthetic import make_synthetic
from robustcv.features import _Cached, fit_from
from robustcv.training import Training, accuracy, fit

everything = pytest.mark.parametrize("element", range(8), ids=ELEMENTS)

def images(n=6, side=7): return torch.rand(n, 3, side, side, generator=generator(0))


# the group

def test_the_laws_of_a_group():
    for a, b, c in itertools.product(range(8), repeat=3): assert compose(compose(a, b), c) == compose(a, compose(b, c)) and compose(a, b) in range(8)
    for a in range(8):
        assert compose(0, a) == compose(a, 0) == a and compose(a, inverse(a)) == compose(inverse(a), a) == 0
        assert sorted(compose(a, b) for b in range(8)) == list(range(8)) == sorted(compose(b, a) for b in range(8))
    assert any(compose(a, b) != compose(b, a) for a in range(8) for b in range(8)), "not commutative"

def test_composition_is_what_one_after_the_other_does():
    x = images(1)
    for a, b in itertools.product(range(8), repeat=2): assert apply_symmetry(apply_symmetry(x, a), b).equal(apply_symmetry(x, compose(a, b)))

@everything
def test_an_element_permutes_the_pixels_and_its_inverse_brings_them_back(element):
    x = torch.arange(49.).view(1, 1, 7, 7)
    y = apply_symmetry(x, element)
    assert sorted(y.flatten().tolist()) == x.flatten().tolist() and apply_symmetry(y, inverse(element)).equal(x)

@pytest.mark.parametrize("element, op", [(0, lambda x: x), (1, lambda x: tv.rotate(x, 90)), (2, lambda x: tv.rotate(x, 180)), (3, lambda x: tv.rotate(x, 270)),
                                         (4, tv.horizontal_flip), (5, lambda x: x.mT.flip((-2, -1))), (6, tv.vertical_flip), (7, lambda x: x.mT)])
def test_the_names_say_what_is_done(element, op): assert apply_symmetry(images(), element).equal(op(images()))

@pytest.mark.parametrize("element", [-1, 8, 1.5])
def test_there_are_only_eight(element):
    with pytest.raises(ValueError, match="element=.*a number from 0 to 7"): apply_symmetry(images(), element)


# at random

@pytest.mark.parametrize("way", [_by_element, _by_pixel])
@pytest.mark.parametrize("n, side", [(1, 1), (1, 4), (23, 5), (64, 16)])
def test_each_image_is_turned_by_its_own_element(way, n, side):
    x, element = images(n, side), torch.randint(8, (n,), generator=generator(1))
    before = x.clone()
    assert way(x, element).equal(torch.stack([apply_symmetry(v, int(e)) for v, e in zip(x, element, strict=True)])) and x.equal(before)

def test_all_elements_are_equally_likely_and_neighbours_independent():
    e = RandomSymmetry().draw(torch.zeros(32_000, 3, 1, 1), generator(2))["element"]
    assert chisquare(e.bincount(minlength=8)).pvalue > 1e-3 and chisquare((8*e[::2] + e[1::2]).bincount(minlength=64)).pvalue > 1e-3

def test_draws_repeat_and_gradients_pass():
    x, t = images(20), RandomSymmetry()
    assert t(x, generator(3)).equal(t(x, generator(3))) and not t(x, generator(3)).equal(t(x, generator(4)))
    v = x.clone().requires_grad_(True)
    (t.transform(v, torch.arange(20) % 8)**2).sum().backward()
    torch.testing.assert_close(v.grad, 2*x)

@pytest.mark.parametrize("x", [torch.rand(2, 3, 4, 5), torch.rand(3, 4, 4), torch.rand(2, 1, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)])
def test_what_is_not_a_batch_of_square_images_is_refused(x):
    with pytest.raises(ValueError, match="images"): RandomSymmetry()(x, generator(0))


# averaged

@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(125, 4)).double().eval()

@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_the_average_over_the_orbit_does_not_see_the_orientation(net, average):
    x, model = images().double(), symmetrize(net, average)
    out = model(x)
    for e in range(8): torch.testing.assert_close(model(apply_symmetry(x, e)), out, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(net(apply_symmetry(x, 1)), net(x))

def test_the_average_is_of_what_it_says(net):
    x = images().double()
    each = torch.stack([net(apply_symmetry(x, e)) for e in range(8)])
    torch.testing.assert_close(symmetrize(net)(x), each.mean(0))
    torch.testing.assert_close(symmetrize(net, "probabilities")(x).softmax(1), each.softmax(2).mean(0))
    torch.testing.assert_close(symmetrize(net, "probabilities")(x).exp().sum(1), torch.ones(6).double())

def test_a_symmetrized_model_is_a_module_like_any_other(net):
    model = symmetrize(net)
    model(images().double().requires_grad_(True)).sum().backward()
    assert {n.removeprefix("model.") for n, _ in model.named_parameters()} == {n for n, _ in net.named_parameters()} and net[0].weight.grad is not None
    with pytest.raises(ValueError, match="average='votes'"): symmetrize(net, "votes")
    with pytest.raises(ValueError, match="as many rows as columns"): model(torch.rand(1, 3, 4, 5))


# from a stage on

@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("symmetry")
    train, valid = scale_data(SCALES["smoke"], make_synthetic(folder/"tiny-imagenet-200", 12, 5, 4), cache=folder)
    return train, valid

def fresh(name="resnet18"): torch.manual_seed(0); return build_model(name, 4)

@pytest.mark.parametrize("name, first", [("resnet18", "layer1"), ("resnet18", "layer3"), ("resnet18", "head"), ("densenet121", "layer3"),
                                         ("densenet121", "head"), ("mobilenet_v2", "head")])
def test_the_two_parts_make_up_the_network(name, first):
    model, x = fresh(name).eval(), images(2, 64)
    before, after = split_at(model, first)
    with torch.no_grad(): torch.testing.assert_close(after.eval()(before.eval()(x)), model(x), rtol=1e-5, atol=1e-5)
    own = {id(p) for m in model.stage(first) for p in m.parameters()}
    assert own <= {id(p) for p in after.parameters()} <= {id(p) for p in model.parameters()} and not own & {id(p) for p in before.parameters()}

@pytest.mark.parametrize("first", ["layer3", "head"])
def test_training_on_cached_features_is_training_with_frozen_layers(sets, first):
    config = Training(2, 12, lr=.005, precision="fp32") # slow enough that rounding stays small
    cached, plain = fresh(), fresh().freeze_below(first)
    mine = fit_from(cached, first, *sets, config, seed=3, device="cpu")
    theirs = fit(plain, sets[0], turned(sets[1]), transform=RandomSymmetry(), config=config, seed=3, device="cpu")
    assert set(mine) == set(theirs)
    for column in ("loss", "lr", "valid_accuracy"): torch.testing.assert_close(*(torch.tensor(h[column].values) for h in (mine, theirs)), rtol=5e-3, atol=1e-4)
    start = fresh().state_dict()
    for (k, a), b in zip(cached.state_dict().items(), plain.state_dict().values(), strict=True):
        assert (a - b).float().norm() <= .02*(a - start[k]).float().norm(), k # of what was learnt
    kept = [k for k, v in cached.state_dict().items() if v.equal(start[k])]
    assert all(k in kept for k in start if k.startswith(("net.conv1", "net.bn1", "net.layer1", "net.layer2"))) and "net.fc.weight" not in kept

def test_features_that_do_not_fit_are_computed_anew(sets, capsys):
    config = Training(1, 12, lr=.02, precision="fp32")
    small, large = (fit_from(fresh(), "layer4", *sets, config, device="cpu", most=m) for m in (1e-9, 4.))
    assert "would take" in capsys.readouterr().out
    torch.testing.assert_close(small.loss[0], large.loss[0], rtol=1e-3, atol=1e-4); assert small.valid_accuracy[0] == large.valid_accuracy[0]

def test_a_pooled_head_is_trained_on_the_average_over_the_orbit(sets):
    config, model = Training(2, 12, lr=.02, precision="fp32"), fresh()
    cached, plain = (fit_from(model, "head", *sets, config, device="cpu", pooled=True),
                     fit(symmetrize(fresh().freeze_below("head")), *sets, config=config, device="cpu"))
    for column in ("loss", "valid_accuracy"): torch.testing.assert_close(*(torch.tensor(h[column].values) for h in (cached, plain)), rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize("first", ["head", "layer4"]) # without and with batch normalisation
def test_what_is_pooled_learns_the_same_from_features_and_without(sets, first):
    a, b, how = fresh(), fresh(), dict(config=Training(2, 12, lr=.005, precision="fp32"), device="cpu", pooled=True)
    cached, anew = (fit_from(m, first, *sets, **how, most=most) for m, most in ((a, 4.), (b, 1e-9)))
    torch.testing.assert_close(torch.tensor(anew.loss.values), torch.tensor(cached.loss.values), rtol=1e-3, atol=1e-4)
    start = fresh().state_dict()
    for (k, v), w in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert (v - w).float().norm() <= .02*(v - start[k]).float().norm(), k # of what was learnt

def test_weights_that_explode_are_reported(sets):
    with pytest.raises(FloatingPointError, match="lr=1e\\+30"): fit_from(fresh(), "layer4", *sets, Training(2, 12, lr=1e30, precision="fp32"), device="cpu")

def test_what_is_said_of_the_whole_orbit(sets):
    model = fresh().eval()
    table = evaluate(model, sets[1], standard_perturbations() + symmetry_perturbations(), device="cpu", precision="fp32")
    more = measure_orbit(model, sets[1], table, device="cpu", precision="fp32").iloc[len(table):].set_index("perturbation")
    with torch.no_grad():
        out = torch.stack([model(apply_symmetry(sets[1].images/255, e)) for e in range(8)])
        assert (more.hits["same in all orientations"] == (out.argmax(2) == out.argmax(2)[0]).all(0).numpy()).all()
        assert (more.hits["symmetrized"] == (out.mean(0).argmax(1) == sets[1].labels).numpy()).all()

def test_the_best_weights_can_be_kept(sets):
    model = fresh()
    h = fit_from(model, "head", *sets, Training(4, 12, lr=.5, keep="best", precision="fp32"), device="cpu")
    best = float(accuracy(model, Batches(turned(sets[1]), 32), "fp32")[0])*100/len(sets[1])
    assert best == pytest.approx(h.valid_accuracy.max()) and not model.training

def test_interrupted_training_on_features_is_continued_from_the_last_checkpoint(sets, tmp_path, monkeypatch):
    clock, config = itertools.count(0, 31.), Training(4, 12, lr=.02, precision="fp32")
    train = lambda **kwargs: fit_from(model := fresh(), "layer4", *sets, config, device="cpu", **kwargs) is not None and model
    monkeypatch.setattr("robustcv.training.time.perf_counter", lambda: next(clock)) # every epoch takes longer than checkpoints are apart
    whole, epoch, seen = train(), _Cached.epoch, []
    def stopped(self, n):
        seen.append(n)
        if seen == [0, 1, 2]: raise KeyboardInterrupt
        return epoch(self, n)
    monkeypatch.setattr(_Cached, "epoch", stopped)
    with pytest.raises(KeyboardInterrupt): train(folder=tmp_path)
    again = train(folder=tmp_path)
    assert seen == [0, 1, 2, 2, 3]
    for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True): torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(ValueError, match="other settings or data"): fit_from(fresh(), "layer4", *sets, Training(4, 12, lr=.03), device="cpu", folder=tmp_path)
    clock, written = itertools.count(0, .01), [] # of epochs that take hardly any time, the last is written
    monkeypatch.setattr("robustcv.training.torch.save", lambda state, file: written.append(len(json.loads(state["history"]))))
    train(folder=tmp_path/"quick")
    assert written == [4]

def test_a_file_is_no_folder_and_gradients_from_before_do_not_count(sets, tmp_path):
    config = Training(1, 12, lr=.02, precision="fp32")
    (tmp_path/"file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"): fit_from(fresh(), "head", *sets, config, device="cpu", folder=tmp_path/"file")
    clean, spoilt = fresh(), fresh()
    for p in spoilt.parameters(): p.grad = torch.ones_like(p)
    for model in (clean, spoilt): fit_from(model, "head", *sets, config, device="cpu")
    for a, b in zip(clean.state_dict().values(), spoilt.state_dict().values(), strict=True): assert torch.equal(a, b)

def test_both_ways_measure_training_accuracy_on_the_same_turned_images(sets):
    config = Training(2, 12, lr=.02, precision="fp32")
    cached, plain = (fit_from(fresh(), "layer4", *sets, config, device="cpu", most=most) for most in (4., 0.))
    assert cached.train_accuracy.tolist() == plain.train_accuracy.tolist() and cached.valid_accuracy.tolist() == plain.valid_accuracy.tolist()

def test_dropout_on_features_does_not_depend_on_what_was_drawn_before(sets):
    losses = []
    for before in (1, 2):
        torch.manual_seed(0); model = build_model("mobilenet_v3_small", len(sets[0].classes))
        torch.manual_seed(before); state = torch.get_rng_state()
        losses.append(fit_from(model, "head", *sets, Training(2, 12, lr=.02, precision="fp32"), device="cpu").loss.tolist())
        assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]

def test_features_of_every_orientation_are_those_of_the_turned_images(sets):
    before, _ = split_at(fresh().eval(), "layer2")
    f = orbit_features(before, sets[1], device="cpu")
    assert f.shape[:2] == (8, len(sets[1]))
    with torch.no_grad(): torch.testing.assert_close(f[5], before(apply_symmetry(sets[1].images/255, 5)), rtol=1e-4, atol=1e-5)

def test_a_turned_set_is_the_same_set_in_random_orientations(sets):
    t = turned(sets[0])
    found = [next(e for e in range(8) if apply_symmetry(a, e).equal(b)) for a, b in zip(sets[0].images, t.images, strict=True)]
    assert set(found) == set(range(8)) and t.labels.equal(sets[0].labels)
    assert t.images.equal(turned(sets[0]).images) and not t.images.equal(turned(sets[0], 1).images)
    assert t.fingerprint != sets[0].fingerprint and t.classes == sets[0].classes

def test_an_unknown_stage_is_named(sets):
    with pytest.raises(ValueError, match="unknown stage of resnet18 'layer5'"): fit_from(fresh(), "layer5", *sets)


# filters

def grating(angle, k=9):
    at = torch.arange(k) - (k - 1)/2
    along = at[:, None]*math.sin(angle) + at*math.cos(angle)
    return torch.cos(1.6*along)*torch.exp(-(at[:, None]**2 + at**2)/(k/2))

@pytest.mark.parametrize("angle", [0, .4, math.pi/4, 1.2, math.pi/2])
def test_a_grating_is_selective_whatever_its_direction(angle):
    one = selectivity(grating(angle).expand(1, 3, -1, -1))
    assert one > .8
    torch.testing.assert_close(one, selectivity(grating(0)[None, None]), rtol=.05, atol=0)
    torch.testing.assert_close(one, selectivity(2*grating(angle)[None, None].rot90(1, (2, 3)) + 1), rtol=1e-3, atol=1e-3)

def test_what_looks_the_same_in_all_directions_is_not_selective():
    at = torch.arange(9.) - 4
    bell = torch.exp(-(at[:, None]**2 + at**2)/4)
    plaid = grating(0) + grating(math.pi/2)
    assert (selectivity(torch.stack([bell, plaid, torch.zeros(9, 9)])[:, None]) < 1e-3).all()

def test_the_response_of_a_stage_to_turning_images(sets):
    model, x = fresh().eval(), sets[1].images[:4]/255
    r = rotation_response(model, x, "layer1", (0, 90, 360))
    seen = []
    hook = model.stage("layer1")[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad(): model(x)
    hook.remove()
    torch.testing.assert_close(r[0], seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(r[0], r[2], rtol=1e-2, atol=1e-2)
    assert r.shape == (3, 64) and not torch.allclose(r[0], r[1], rtol=1e-3) and not any(m._forward_hooks for m in model.modules())

def test_parts_keep_what_depends_on_the_mode(sets):
    net = build_model("efficientnet_b0", 4).eval(); x = sets[0].images[:2]/255
    before, after = split_at(net, "head") # traced in evaluation mode, or in training mode: it is the same
    assert torch.allclose(after(before(x)), net(x), atol=1e-5)
    net.train(); before, after = split_at(net, "head")
    assert torch.allclose(after.eval()(before.eval()(x)), net.eval()(x), atol=1e-5)
    assert any(isinstance(m, ops.StochasticDepth) for m in split_at(net, "body")[1].modules())

def test_a_vision_transformer_can_be_split():
    net = build_model("vit_b_32", 5).eval(); x = torch.rand(1, 3, 224, 224)
    before, after = split_at(net, "head")
    assert torch.allclose(after(before(x)), net(x), atol=1e-5)

def test_the_normalisation_moves_along():
    before, _ = split_at(build_model("resnet18", 4), "layer3")
    assert before.double()[0].shift.dtype == torch.float64 and not [k for k in before.state_dict() if "shift" in k]

def test_oblong_images_are_refused(tiny):
    oblong = replace(load_tiny_imagenet(tiny, "val"), images=load_tiny_imagenet(tiny, "val").images[:, :, :, :24])
    for f in (lambda: turned(oblong), lambda: fit_from(build_model("resnet18", 4), "head", oblong, oblong, Training(1, 4), device="cpu")):
        with pytest.raises(ValueError, match="32 by 24 pixels"): f()

def test_repeats_are_for_fit_alone(sets):
    with pytest.raises(ValueError, match="replays=3"): fit_from(build_model("resnet18", 4), "head", *sets, Training(1, 4, replays=3), device="cpu")

def test_averaging_leaves_every_module_in_its_mode():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train(); net[1].eval()
    assert symmetrize(net).training and net[0].training and not net[1].training

def test_networks_that_want_their_pixels_in_a_row_can_be_averaged():
    class Rows(nn.Module):
        def __init__(self): super().__init__(); self.line = nn.Linear(48, 2)
        def forward(self, x): return self.line(x.view(len(x), -1))
    assert symmetrize(Rows())(torch.rand(2, 3, 4, 4)).shape == (2, 2)

def test_a_number_that_is_not_whole_is_no_element():
    with pytest.raises(ValueError, match="element=1.0"): apply_symmetry(images(), 1.)

def test_the_head_responds_too(sets):
    assert rotation_response(build_model("resnet18", 4).eval(), sets[0].images[:2]/255, "head", [0, 90]).shape == (2, 4)
