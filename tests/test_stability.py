"""Stability: the objective against its definition, corruptions against their formulas, certificates against scipy and a linear model."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from hypothesis import given, strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import binom, norm
from torch import nn
from torchvision.transforms.v2 import functional as tv

from robustcv.core import generator, normalized
from robustcv.data import Batch, ImageSet
from robustcv.perturbations import Perturbation
from robustcv.evaluation import evaluate, measure_certificates, spread_over
from robustcv.stability import (SEVERITIES, RandomNoise, add_noise, augmix_loss, certified_accuracy, certify, corrupt, defocus, divergence, jensen_shannon,
                                jpeg, lower_bound, pixelate, rescale, salt_and_pepper, shot_noise, stability_loss, uniform_noise)

X = torch.rand(8, 3, 8, 8, generator=generator(0))
BATCH = Batch(X, torch.arange(8) % 4, None, torch.arange(8))

@pytest.fixture
def net():
    torch.manual_seed(0); return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


# the objective

@pytest.mark.parametrize("direction", ["clean to noisy", "noisy to clean"])
def test_the_loss_is_cross_entropy_plus_the_weighed_divergence(net, direction):
    torch.manual_seed(1); loss = stability_loss(net, BATCH, alpha=.3, std=.05, direction=direction)
    torch.manual_seed(1); noisy = (X + .05*torch.randn_like(X)).clamp(0, 1)
    p, q = net(X).softmax(1), net(noisy).softmax(1)
    a, b = (p, q) if direction == "clean to noisy" else (q, p)
    kl = (a*(a.log() - b.log())).sum(1).mean()
    torch.testing.assert_close(loss, F.cross_entropy(net(X), BATCH.labels, label_smoothing=.1) + .3*kl)

def test_without_weight_or_noise_it_is_the_cross_entropy(net):
    plain = F.cross_entropy(net(X), BATCH.labels, label_smoothing=.1)
    torch.testing.assert_close(stability_loss(net, BATCH, alpha=0.), plain)
    torch.testing.assert_close(stability_loss(net, BATCH, alpha=5., std=0.), plain)

def test_the_divergence_of_several_is_scipys_for_two_and_lies_between_0_and_log_3():
    a, b, c = torch.randn(3, 8, 5, generator=generator(0)).double()
    expected = jensenshannon(a.softmax(1), b.softmax(1), axis=1)**2
    np.testing.assert_allclose(jensen_shannon(a, b), expected, rtol=1e-9)
    torch.testing.assert_close(jensen_shannon(a, b, c), jensen_shannon(c + 3, a, b))
    torch.testing.assert_close(jensen_shannon(a, a, a), torch.zeros(8, dtype=torch.double))
    torch.testing.assert_close(jensen_shannon(*100*torch.eye(3)[:, None]), torch.tensor([math.log(3)]))

def test_the_loss_of_augmix_is_its_definition(net):
    torch.manual_seed(1); loss = augmix_loss(net, BATCH, mix=lambda x: x + .1*torch.randn_like(x))
    torch.manual_seed(1); ps = [net(v).softmax(1) for v in (X, X + .1*torch.randn_like(X), X + .1*torch.randn_like(X))]
    mean = sum(ps)/3
    js = sum((p*(p.log() - mean.log())).sum(1).mean() for p in ps)/3
    torch.testing.assert_close(loss, F.cross_entropy(net(X), BATCH.labels, label_smoothing=.1) + 12*js)
    with pytest.raises(ValueError, match="alpha=-1: a weight that is not negative"): augmix_loss(net, BATCH, alpha=-1)

def test_mixtures_differ_and_are_drawn_from_torchs_own_chance(net):
    torch.manual_seed(1); one = augmix_loss(net, BATCH); torch.manual_seed(1); again = augmix_loss(net, BATCH)
    plain = F.cross_entropy(net(X), BATCH.labels, label_smoothing=.1)
    assert one.equal(again) and one > plain and not augmix_loss(net, BATCH).equal(one)
    one.backward(); assert net[1].weight.grad.abs().sum() > 0

def test_a_detached_reference_has_no_gradient_of_its_own(net):
    def gradient(**kwargs):
        torch.manual_seed(1); net.zero_grad(); stability_loss(net, BATCH, alpha=1., std=.2, **kwargs).backward(); return net[1].weight.grad.clone()
    torch.manual_seed(1); noisy = (X + .2*torch.randn_like(X)).clamp(0, 1); net.zero_grad()
    clean = net(X).detach()
    (F.cross_entropy(net(X), BATCH.labels, label_smoothing=.1) + divergence(clean, net(noisy)).mean()).backward()
    torch.testing.assert_close(gradient(detach=True), net[1].weight.grad)
    assert not torch.allclose(gradient(), gradient(detach=True))

@given(st.lists(st.floats(-20, 20), min_size=3, max_size=3), st.lists(st.floats(-20, 20), min_size=3, max_size=3))
def test_the_divergence_is_not_negative_and_zero_for_equals(a, b):
    p, q = torch.tensor([a]).double(), torch.tensor([b]).double()
    assert divergence(p, q) >= -1e-9 and divergence(p, p + 3).abs() < 1e-9

@pytest.mark.parametrize("kwargs, said", [({"alpha": -1}, "alpha=-1"), ({"alpha": math.nan}, "alpha=nan"), ({"std": -.1}, "std=.*not negative"),
                                          ({"std": torch.zeros(2)}, "std=.*one a channel"), ({"direction": "both"}, "direction='both'")])
def test_what_makes_no_sense_is_named(net, kwargs, said):
    with pytest.raises(ValueError, match=said): stability_loss(net, BATCH, **kwargs)


# noise

def test_random_noise_is_normal_with_the_given_deviation_a_channel():
    x = torch.full((64, 3, 32, 32), .5)
    change = RandomNoise()(x, generator(0)) - x
    torch.testing.assert_close(change.std((0, 2, 3)), normalized(.1).flatten(), rtol=.02, atol=0)
    assert change.mean().abs() < 1e-3
    t = RandomNoise(.1, p=.3)
    moved = (t(x, generator(0)) != x).flatten(1).any(1)
    assert 8 <= moved.sum() <= 32 and t(x, generator(1)).equal(t(x, generator(1)))
    far = RandomNoise(3.)(x, generator(0))
    assert far.min() == 0 and far.max() == 1
    with pytest.raises(ValueError, match="p=1.5"): RandomNoise(p=1.5)

def test_shot_salt_and_uniform_noise_have_their_moments():
    torch.manual_seed(0); x = torch.full((32, 3, 32, 32), .4)
    photons = shot_noise(x, 100)
    assert photons.mean() == pytest.approx(.4, abs=.002) and photons.var() == pytest.approx(.004, rel=.05)
    salted = salt_and_pepper(x, .2)
    assert [(salted == v).float().mean().item() for v in (0, 1)] == pytest.approx([.1, .1], abs=.005)
    assert (salted == .4).float().mean() == pytest.approx(.8, abs=.01)
    spread = uniform_noise(x, .3)
    assert .1 - 1e-6 <= spread.min() < .102 and .698 < spread.max() <= .7 + 1e-6 and spread.var() == pytest.approx(.03, rel=.05)


# corruptions

@pytest.mark.parametrize("kind", SEVERITIES)
def test_corruptions_keep_range_and_shape_and_grow(kind):
    x = F.interpolate(torch.rand(4, 3, 8, 8, generator=generator(1)), (32, 32), mode="bilinear")*.6 + .2
    before, off = x.clone(), []
    for severity in range(1, 6):
        torch.manual_seed(0); y = corrupt(x, kind, severity)
        assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1 and y.dtype == x.dtype
        off.append((y - x).abs().mean().item())
    assert x.equal(before) and off[0] > 0 and (off == sorted(off) or kind == "saturate"), off

@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_corruptions_against_their_definitions():
    torch.testing.assert_close(jpeg(X, 40)[3], tv.jpeg((X[3]*255).round().to(torch.uint8), 40)/255, rtol=0, atol=2.01/255)
    torch.testing.assert_close(pixelate(X, .5), F.avg_pool2d(X, 2).repeat_interleave(2, 2).repeat_interleave(2, 3))
    even = torch.full((1, 3, 16, 16), .3)
    for f in (lambda x: defocus(x, 2.5), lambda x: rescale(x, .5), lambda x: pixelate(x, .6)): torch.testing.assert_close(f(even), even)
    dot = torch.zeros(1, 3, 15, 15); dot[..., 7, 7] = 1
    spread = defocus(dot, 3.)
    assert spread.sum((2, 3)).flatten().tolist() == pytest.approx([1]*3, rel=1e-5)
    assert spread.equal(spread.mT) and spread[0, 0, 7, 11] < 1e-6 < spread[0, 0, 7, 10]
    assert rescale(X, .5).shape == X.shape and rescale(X, .5).var() < X.var()

@pytest.mark.parametrize("kind, severity", [("fog", 1), ("jpeg", 0), ("jpeg", 6), ("jpeg", 1.5)])
def test_an_unknown_kind_or_severity_is_named(kind, severity):
    with pytest.raises(ValueError, match="kind='fog'|severity="): corrupt(X, kind, severity)


# certificates

@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from([.001, .05]))
def test_the_bound_is_exact(n, share, alpha):
    k = round(n*share)
    p = float(lower_bound(k, n, alpha))
    if k == 0: assert p == 0
    else: assert binom.sf(k - 1, n, p) == pytest.approx(alpha, rel=1e-6) # so many hits or more: just as rare as alpha

class Half(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(192, generator=generator(0)))
    def forward(self, x): z = (x - .5).flatten(1) @ self.w; return torch.stack([-z, z], 1)

PIXELS = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator(1))

def test_the_certificate_of_a_linear_model_is_its_distance_from_the_boundary_at_most():
    model = Half()
    distance = ((PIXELS/255 - .5).flatten(1) @ model.w/model.w.norm()).detach()
    data = ImageSet(PIXELS, (distance > 0).long(), ("below", "above"))
    t = certify(model, data, .25, n=2000, alpha=1e-5)
    sure = t.predicted >= 0
    assert (t.predicted[sure] == t.label[sure]).all() and (t.radius <= distance.abs().numpy() + 1e-9).all() and sure.sum() > 10
    assert (t.radius[sure] == [.25*norm.ppf(p) for p in t.p[sure]]).all() or t.radius[sure].tolist() == pytest.approx([.25*norm.ppf(p) for p in t.p[sure]])
    assert (t.radius[~sure] == 0).all() and (t.p[~sure] <= .5).all()
    assert t.equals(certify(model, data, .25, n=2000, alpha=1e-5, batch_size=256)) and not t.equals(certify(model, data, .25, n=2000, alpha=1e-5, seed=1))
    near = t.assign(label=1 - t.label)
    shares = certified_accuracy(t, (0, .1, .3, 9)).accuracy
    assert shares.is_monotonic_decreasing and shares.iloc[0] == 100*sure.mean() and shares.iloc[-1] == 0 and certified_accuracy(near, (0,)).accuracy[0] == 0

def test_a_coin_abstains():
    class Coin(nn.Module):
        def forward(self, x): return torch.stack([x.flatten(1).sum(1).frac(), torch.full((len(x),), .5)], 1)
    t = certify(Coin(), ImageSet(PIXELS, torch.zeros(20).long(), ("a", "b")), 1., n0=10, n=100)
    assert (t.predicted == -1).mean() > .9 and (t.radius[t.predicted == -1] == 0).all()

def test_certified_images_are_rows_of_an_evaluation():
    model, data = Half().eval(), ImageSet(PIXELS, torch.zeros(20).long(), ("a", "b"))
    table = evaluate(model, data, [Perturbation("clean", lambda x, y, m: x)], device="cpu", precision="fp32")
    more = measure_certificates(model, data, table, most=7, device="cpu", n0=20, n=100)
    assert more.iloc[:1].equals(table) and len(more) == 8
    rows = more[more.perturbation == "certified"]
    found = certify(model, spread_over(data, 7), float(normalized(.4).mean()), 20, 100, device="cpu")
    assert (rows.n == 7).all() and rows.correct.is_monotonic_decreasing
    assert (rows.hits.iloc[3] == ((found.predicted == 0) & (found.radius >= .09)).to_numpy()).all()

def test_a_certificate_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 2)).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    certify(model, ImageSet(PIXELS[:2], torch.zeros(2).long(), ("a", "b")), .1, 5, 10)
    assert model.training and model[0].training and all(v.equal(state[k]) for k, v in model.state_dict().items())

@pytest.mark.parametrize("kwargs, said", [({"sigma": 0}, "sigma=0"), ({"sigma": math.inf}, "sigma=inf"), ({"alpha": 1}, "alpha=1"),
                                          ({"n": 0}, "n=0: a whole number, at least 1"), ({"n0": 2.5}, "n0=2.5")])
def test_a_certificate_needs_sensible_numbers(kwargs, said):
    with pytest.raises(ValueError, match=said): certify(Half(), ImageSet(PIXELS, torch.zeros(20).long(), ("a", "b")), **{"sigma": .1, **kwargs})

def test_noise_keeps_half_precision(): assert add_noise(torch.rand(2, 3, 4, 4).half(), normalized(.1)).dtype == torch.float16

def test_noises_of_small_deviations_have_descriptions_of_their_own():
    assert repr(RandomNoise(1e-5)) != repr(RandomNoise(2e-5)) and "0.0229, 0.0224, 0.0225" in repr(RandomNoise(normalized(.1)))

def test_a_deviation_a_channel_may_be_a_sequence():
    x, std = torch.full((64, 3, 16, 16), .5), (.01, .05, .1)
    assert add_noise(x, std).std((0, 2, 3)).tolist() == pytest.approx(std, rel=.05) and add_noise(x[..., :3], std).shape == (64, 3, 16, 3)

def test_outputs_that_are_not_finite_have_no_certificate():
    class NotFinite(nn.Module):
        def forward(self, x): return x.mean((2, 3))*float("nan")
    with pytest.raises(ValueError, match="outputs are not finite"): certify(NotFinite(), ImageSet(PIXELS, torch.zeros(20).long(), ("a", "b")), .1, 10, 100)

def test_a_severity_is_a_whole_number():
    with pytest.raises(ValueError, match="severity=2.0"): corrupt(X, "jpeg", 2.)

@pytest.mark.parametrize("factor", SEVERITIES["pixelate"][1])
@pytest.mark.parametrize("side", [(64, 64), (50, 32)])
def test_pixelate_is_pillow_s_box_filter(factor, side):
    pixels = tv.gaussian_blur(torch.rand(1, 3, *side, generator=generator(0)), [5, 5], [1.5, 1.5]).mul(255).round().to(torch.uint8)
    h, w = side
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    theirs = image.resize((int(w*factor), int(h*factor)), Image.Resampling.BOX).resize((w, h), Image.Resampling.BOX)
    off = (pixelate(pixels/255, factor)[0]*255 - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs()
    assert off.max() <= 1.01
