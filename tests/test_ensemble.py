"""Several classifiers as one: the averages, the network that they make, and how far its confidence can be believed."""
import math
import weakref
from fractions import Fraction

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from scipy.stats import mode
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily

from robustcv.core import generator, model_colors
from robustcv.data import load_tiny_imagenet, take
from robustcv.ensemble import (AVERAGES, Ensemble, Tempered, combine, disagreement, expected_calibration_error, fit_temperature, plot_reliability, predict,
                               reliability, without)
from robustcv.evaluation import evaluate
from robustcv.perturbations import standard_perturbations
from robustcv.fgsm import fgsm, fold_batchnorm, pgd
from robustcv.models import Classifier
from robustcv.stability import certify
from robustcv.symmetry import symmetrize

each_average = pytest.mark.parametrize("average", AVERAGES)

def draw(*shape, seed=0): return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)

def small(seed=0, k=4, classes=None):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, 2, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(80, k))
    net(torch.rand(64, 3, 32, 32)*5) # statistics that are not those of the start
    model = Classifier(net, {"body": ["0", "1"], "head": ["5"]}, dict(name="small", num_classes=k))
    model.classes = classes
    return model

@pytest.fixture(scope="module")
def valid(tiny, tmp_path_factory): return load_tiny_imagenet(tiny, "val", cache=tmp_path_factory.mktemp("cache"), workers=1)

@pytest.fixture
def nets(): return {"a": small(0), "b": small(1), "c": small(2)}


# averages

@pytest.mark.parametrize("weights", [None, [1, 1, 1, 1, 1], [.5, .1, .2, 0, .2], [3, 0, 0, 4, 5], torch.tensor([1., 2, 3, 4, 5]), (w for w in (1, 2, 1, 2, 1))])
def test_probabilities_and_logits_are_weighted_means(weights):
    z, w = draw(5, 7, 4), np.ones(5) if weights is None else np.array([*(weights := list(weights))], float)
    w = torch.from_numpy(w/w.sum()).view(5, 1, 1)
    mixture = MixtureSameFamily(Categorical(w.flatten().expand(7, 5)), Categorical(logits=z.transpose(0, 1)))
    log_p = torch.stack([mixture.log_prob(torch.full((7,), k)) for k in range(4)], 1)
    torch.testing.assert_close(combine(z, weights), log_p, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(combine(z, weights, "logits"), (w*z).sum(0), rtol=1e-10, atol=1e-10)
    scale = (combine(z, weights, "votes") - (w*F.one_hot(z.argmax(2), 4)).sum(0))/log_p.exp() # of the mean probability, the same for all classes of an image
    torch.testing.assert_close(scale, scale[:, :1].expand(7, 4)); assert (scale > 0).all() and (scale <= .5).all()

@st.composite
def elections(draw):
    members, images, k = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    few = st.lists(st.integers(0, 3), min_size=members, max_size=members).filter(any)
    return draw(few), torch.randn(members, images, k, generator=generator(draw(st.integers(0, 10_000))), dtype=torch.float64)

@given(elections())
def test_more_votes_always_win_and_ties_go_by_the_mean_probability(election):
    weights, z = election
    out, p = combine(z, weights, "votes"), combine(z, weights).exp()
    for i in range(z.shape[1]):
        votes = [Fraction(sum(w for w, m in zip(weights, z) if m[i].argmax() == k), sum(weights)) for k in range(z.shape[2])]
        for a in range(len(votes)):
            for b in range(len(votes)):
                if votes[a] > votes[b]: assert out[i, a] > out[i, b]
                elif votes[a] == votes[b] and p[i, a] - p[i, b] > 1e-6: assert out[i, a] > out[i, b]

def test_the_majority_is_that_of_scipy():
    z = draw(5, 400, 3)
    most, count = mode(z.argmax(2).numpy(), axis=0)
    clear = count >= 3
    assert clear.sum() > 100 and (combine(z, average="votes").argmax(1).numpy() == most)[clear].all()

def test_a_tied_vote_goes_to_the_likelier_class_however_it_is_ordered():
    z = torch.tensor([[[3., 0, 0]], [[0, 2., 0]]])
    for order in ([0, 1], [1, 0]): assert combine(z[order], average="votes").argmax() == 0
    assert combine(z, [2, 3], "votes").argmax() == 1, "more votes beat a higher probability"
    z = torch.tensor([[[0., 9, 0]], [[.1, 0, 0]], [[.1, 0, 0]]])
    assert combine(z, average="votes").argmax() == 0 != combine(z).argmax()

@each_average
def test_one_member_alone_and_the_order_of_many(average):
    z, alone = draw(3, 6, 4), {"probabilities": lambda z: z.log_softmax(1), "logits": lambda z: z,
                               "votes": lambda z: F.one_hot(z.argmax(1), 4) + z.softmax(1)/2}[average]
    torch.testing.assert_close(combine(z[:1], average=average), alone(z[0]), rtol=0, atol=0)
    torch.testing.assert_close(combine(z, [1, 0, 0], average), alone(z[0]), rtol=0, atol=0)
    torch.testing.assert_close(combine(z, [0, 0, 2], average), alone(z[2]), rtol=0, atol=0)
    torch.testing.assert_close(combine(z, [.2, .3, .5], average), combine(z.flip(0), [5, 3, 2], average), rtol=1e-12, atol=1e-12)

def test_the_loss_of_the_mixture_is_below_the_mean_loss():
    z, y = 3*draw(4, 200, 5), torch.arange(200) % 5
    loss = lambda out: F.cross_entropy(out, y, reduction="none")
    assert (loss(combine(z)) < torch.stack([loss(m) for m in z]).mean(0)).all()

@each_average
def test_what_a_member_without_weight_says_does_not_matter(average):
    z = draw(4, 5, 3)
    broken = torch.stack([torch.full((5, 3), v) for v in (math.nan, math.inf)]).double()
    all_of_them = torch.cat([broken, z]).requires_grad_(True)
    out = combine(all_of_them, [0, 0, 1, 2, 3, 4], average)
    torch.testing.assert_close(out, combine(z, [1, 2, 3, 4], average))
    assert torch.autograd.grad(out.square().sum(), all_of_them)[0].isfinite().all()

@pytest.mark.parametrize("dtype, expected", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                                             (torch.float32, torch.float32), (torch.float64, torch.float64)])
@each_average
def test_sums_are_in_float32_at_least(average, dtype, expected):
    z = draw(3, 5, 4).to(dtype)
    out = combine(z, average=average)
    assert out.dtype == expected
    torch.testing.assert_close(out, combine(z.double(), average=average).to(expected), rtol=1e-5, atol=1e-5)

@each_average
def test_extreme_logits_stay_finite(average):
    z = torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]], requires_grad=True)
    out = combine(z, average=average)
    grad, = torch.autograd.grad(out.sum(), z)
    assert out.isfinite().all() and grad.isfinite().all()

@each_average
def test_members_are_asked_one_at_a_time_and_none_is_kept(average):
    asked, held = 0, []
    def members():
        nonlocal asked
        last = lambda: None
        for i in range(6):
            held.append(last() is not None); asked += 1
            z = torch.randn(5, 3); last = weakref.ref(z)
            if i == 4: z = z[:, :2]
            yield z
            del z
    with pytest.raises(ValueError, match=r"logits\[4\]"): combine(members(), average=average)
    assert asked == 5 and not any(held)

@each_average
def test_an_ensemble_holds_no_logits_of_earlier_members(nets, average):
    seen, held = [], []
    for m in nets.values():
        m.register_forward_pre_hook(lambda m, x: held.extend(r() is not None for r in seen))
        m.register_forward_hook(lambda m, x, out: seen.append(weakref.ref(out)))
    with torch.no_grad(): Ensemble(nets, average=average)(torch.rand(2, 3, 32, 32))
    assert len(seen) == 3 and len(held) == 3 and not any(held)

def test_gradients_are_those_of_the_formulas():
    z, w = draw(3, 4, 5).requires_grad_(True), [.2, .5, .3]
    for average in ("probabilities", "logits"): assert torch.autograd.gradcheck(lambda z: combine(z, w, average), z) # noqa: B023
    share = (torch.tensor(w).double().view(3, 1, 1)*F.one_hot(z.argmax(2), 5)).sum(0)
    gap = torch.stack([min(b - a for a, b in zip(s, s[1:]) if b - a > 1e-6) for s in share.sort(1).values])[:, None]
    g = draw(4, 5, seed=1)
    mine, = torch.autograd.grad((combine(z, w, "votes")*g).sum(), z)
    theirs, = torch.autograd.grad((gap/2*combine(z, w).exp()*g).sum(), z)
    torch.testing.assert_close(mine, theirs); assert (mine.abs().sum(2) > 0).all()

@pytest.mark.parametrize("logits, weights, average, message", [
    ([], None, "logits", "logits: none were given"), ([draw(2, 3)], [1, 1], "logits", r"weights: 2 of them for 1 member\(s\); give one a member"),
    ([draw(2, 3)]*3, [1, 1], "votes", "weights: 2 of them for more members than that"),
    ([draw(2, 3)], [0], "votes", "not all zero"), ([draw(2, 3)], [], "votes", "not all zero"), ([draw(2, 3)]*2, [1, -1], "logits", "none negative"),
    ([draw(2, 3)]*2, [1, math.nan], "logits", "must be finite"), ([draw(2, 3)]*2, [1, math.inf], "logits", "must be finite"),
    ([draw(2, 3)]*2, ["a", 1], "logits", "weights=.*a list of numbers"), ([draw(2, 3)]*2, 2, "logits", "weights=2: give a list"),
    ([draw(2, 3)], None, "vote", "unknown average 'vote': did you mean 'votes'"),
    ([draw(2, 3), draw(2, 4)], None, "votes", r"logits\[1\]: logits of shape \(2, 4\), those before have \(2, 3\)"),
    ([draw(2, 3), draw(1, 3)], None, "logits", r"logits\[1\]: logits of shape \(1, 3\)"),
    ([draw(3)], None, "logits", r"logits\[0\]: expected logits \(B,K\).*\(3,\)"), ([draw(2, 1)], None, "logits", "at least 2 classes"),
    ([torch.ones(2, 3).long()], None, "logits", "got torch.int64"), ([np.ones((2, 3))], None, "logits", "got ndarray")])
def test_what_cannot_be_combined_is_refused(logits, weights, average, message):
    with pytest.raises(ValueError, match=message): combine(iter(logits), weights, average)


# one network

@each_average
def test_an_ensemble_combines_its_members(nets, average):
    x = torch.rand(5, 3, 32, 32)
    model = Ensemble(nets, [1, 2, 5], average)
    assert not model.training and not any(m.training for m in model.modules()) and model.names == ("a", "b", "c") and model.weights == (.125, .25, .625)
    with torch.no_grad():
        out = model(x)
        torch.testing.assert_close(out, combine([m(x) for m in nets.values()], [1, 2, 5], average))
        torch.testing.assert_close(Ensemble(list(nets.values())[::-1], [5, 2, 1], average)(x), out)
        torch.testing.assert_close(Ensemble(nn.ModuleDict(nets), [0, 1, 0], average)(x), combine([nets["b"](x)], average=average), rtol=0, atol=0)
    assert list(map(id, model.models)) == list(map(id, nets.values())) and "a: 0.125, b: 0.25, c: 0.625" in repr(model)
    model.train(); assert nets["a"].training

def test_names_may_hold_what_a_module_dict_forbids(nets):
    model = Ensemble({"layer 2+": nets["a"], "σ = 0.1": nets["b"], "keys": nets["c"]})
    other = Ensemble(list(nets.values())); other.load_state_dict(model.state_dict())
    assert model.names == ("layer 2+", "σ = 0.1", "keys") and other.names == ("0", "1", "2")

@each_average
def test_batch_normalisation_of_all_members_is_folded(nets, average):
    model, x = Ensemble(nets, [1, 2, 3], average), torch.rand(6, 3, 32, 32)
    folded = fold_batchnorm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) and sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 3
    with torch.no_grad(): torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    y = torch.arange(6) % 4
    assert (fgsm(folded, x, y, .01) == fgsm(model, x, y, .01)).float().mean() > .99

def line(w, b=0.): # logits ±(w·x + b)/2
    linear = nn.Linear(w.numel(), 2).double()
    with torch.no_grad(): linear.weight.copy_(torch.stack([w, -w]).flatten(1)/2); linear.bias.copy_(torch.tensor([b, -b])/2)
    return nn.Sequential(nn.Flatten(), linear)

def test_an_attack_on_the_mean_of_linear_networks_is_that_on_their_sum():
    a, b = draw(3, 4, 4, seed=1), draw(3, 4, 4, seed=2)
    model, x, y = Ensemble([line(a), line(b)], [.3, .7], "logits"), torch.rand(8, 3, 4, 4).double()*.6 + .2, torch.arange(8) % 2
    margin = lambda x: (x*(.3*a + .7*b)).sum((1, 2, 3))*(1 - 2*y)
    torch.testing.assert_close(margin(x) - margin(fgsm(model, x, y, .1)), .1*(.3*a + .7*b).abs().sum().expand(8), rtol=1e-6, atol=1e-6)

@each_average
def test_attacks_leave_no_trace(nets, average):
    model, x, y = Ensemble(nets, average=average), torch.rand(6, 3, 32, 32), torch.arange(6) % 4
    before, kept = {k: v.clone() for k, v in model.state_dict().items()}, x.clone()
    with torch.no_grad(): p = combine([m(x) for m in nets.values()]).gather(1, y[:, None])
    for attack in (fgsm, lambda *a: pgd(*a, steps=3)):
        adv = attack(model, x, y, .03)
        assert (adv - x).abs().max() <= .03 + 1e-6 and (adv != x).flatten(1).any(1).all()
        with torch.no_grad(): assert (combine([m(adv) for m in nets.values()]).gather(1, y[:, None]) < p).all(), "less likely to the members together"
    assert x.equal(kept) and not model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())

def test_it_is_measured_and_certified_as_its_member_is(nets, valid):
    one, few = nets["a"].eval(), [p for p in standard_perturbations() if p.name in ("clean", "noise, article", "vertical flip")]
    tables = [evaluate(m, valid, few, device="cpu", precision="fp32") for m in (one, Ensemble([one]), Ensemble([one, one], [1, 3], "votes"))]
    for t in tables[1:]: assert all((a == b).all() for a, b in zip(t.predicted, tables[0].predicted, strict=True))
    some = take(valid, torch.tensor([0, 4, 9]))
    certified = [certify(m, some, .1, n0=10, n=40, alpha=.05, device="cpu") for m in (one, Ensemble([one]), Ensemble([one, one], average="logits"))]
    for t in certified[1:]: pd.testing.assert_frame_equal(t, certified[0])
    assert (certified[0].radius > 0).any()

def test_classes_must_agree():
    a, b, c = ("cat", "dog", "owl", "elk"), ("cat", "owl", "dog", "elk"), ("cat", "dog")
    assert Ensemble([small(classes=None), small(classes=a), small(classes=list(a))]).classes == a and Ensemble([small()]).classes is None
    with pytest.raises(ValueError, match="member 'y' knows class 1 as 'owl', member 'x' as 'dog'; train all members on the same classes, in the same order"):
        Ensemble({"w": small(), "x": small(classes=a), "y": small(classes=b)})
    with pytest.raises(ValueError, match="member '1' knows 2 classes, member '0' 4"): Ensemble([small(classes=a), small(classes=c)])
    for wrapped in (Tempered(small(classes=b), 2.), Ensemble([small(classes=b)])):
        with pytest.raises(ValueError, match="member 'y' knows class 1"): Ensemble({"x": small(classes=a), "y": wrapped})

def test_outputs_must_agree():
    with pytest.raises(ValueError, match="member 'y' has 5 outputs, member 'x' has 4"): Ensemble({"x": small(), "z": nn.Linear(3, 2), "y": small(k=5)})
    model = Ensemble({"x": small(), "y": symmetrize(small(k=5))})
    with pytest.raises(ValueError, match=r"member 'y': logits of shape \(2, 5\), those before have \(2, 4\)"): model(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match="member 'x': expected logits"): Ensemble({"x": nn.Identity()})(torch.rand(2, 3, 32, 32))

@pytest.mark.parametrize("args, message", [
    (([],), "at least one member"), (({},), "at least one member"),
    ((nn.Sequential(nn.Flatten()),), "models: expected a dict .* got Sequential"), ((None,), "got NoneType"),
    (({"x": nn.Flatten(), "y": torch.relu},), "member 'y' is no nn.Module"), (({"1": nn.Flatten(), 1: nn.Flatten()},), "a name of its own for each"),
    (([nn.Flatten()], [1, 2]), r"weights: 2 of them for 1 member"), (([nn.Flatten()]*2, [0, 0]), "not all zero"),
    (([nn.Flatten()]*2, [2, -1]), "none negative"), (([nn.Flatten()]*2, [2, math.nan]), "must be finite"),
    (([nn.Flatten()], None, "mean"), "unknown average 'mean'")])
def test_what_makes_no_ensemble_is_refused(args, message):
    with pytest.raises(ValueError, match=message): Ensemble(*args)

def test_one_member_is_left_out(nets):
    x, model = torch.rand(3, 3, 32, 32), Ensemble(nets, [1, 2, 6], "logits")
    rest = without(model, "b")
    assert rest.names == ("a", "c") and rest.average == "logits" and rest.weights == pytest.approx((1/7, 6/7)) and model.names == ("a", "b", "c")
    with torch.no_grad(): torch.testing.assert_close(rest(x), (nets["a"](x) + 6*nets["c"](x))/7)
    with pytest.raises(ValueError, match="unknown member 'd': valid: a, b, c"): without(model, "d")
    with pytest.raises(ValueError, match="name='a': the only member cannot be left out"): without(Ensemble({"a": nets["a"]}), "a")
    with pytest.raises(ValueError, match="not all zero"): without(Ensemble(nets, [1, 0, 0]), "a")


# predictions

def test_predictions_are_those_of_evaluation_mode_whatever_the_batches(valid):
    model = small().train(); model.net[0].eval()
    modes = [m.training for m in model.modules()]
    out = [predict(model, valid, n, "cpu") for n in (1, 5, 256)]
    assert [m.training for m in model.modules()] == modes and out[0].shape == (len(valid), 4) and out[0].dtype == torch.float32
    with torch.no_grad(): truth = model.eval()(valid.images/255)
    for o in out: torch.testing.assert_close(o, truth, rtol=1e-5, atol=1e-5)
    out[0].requires_grad_(True).square().sum().backward() # not an inference tensor

def test_predictions_combine_to_those_of_the_ensemble(nets, valid):
    for average in AVERAGES:
        torch.testing.assert_close(combine([predict(m, valid, device="cpu") for m in nets.values()], [1, 2, 3], average),
                                   predict(Ensemble(nets, [1, 2, 3], average), valid, device="cpu"))
    assert predict(Half(), valid, device="cpu").dtype == torch.float32

class Half(nn.Module):
    def forward(self, x):
        assert torch.is_inference_mode_enabled() and x.is_contiguous(memory_format=torch.channels_last)
        return x.mean((2, 3)).bfloat16()

class Broken(nn.Module):
    def forward(self, x): raise RuntimeError("broken")

def test_modes_are_restored_after_an_error_and_empty_sets_are_refused(valid):
    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken"): predict(model, valid, device="cpu")
    assert model.training
    with pytest.raises(ValueError, match="images: .* is empty"): predict(small(), take(valid, torch.tensor([], dtype=torch.long)), device="cpu")

def test_disagreement_is_counted_pair_by_pair():
    t = disagreement({"a": torch.tensor([0, 1, 2, 3]), "b": np.array([0, 1, 2, 0]), "c": [1, 1, 1, 1]})
    expected = pd.DataFrame([[0, 25, 75], [25, 0, 75], [75, 75, 0]], list("abc"), list("abc"), dtype=float)
    pd.testing.assert_frame_equal(t, expected)

@pytest.mark.parametrize("predictions, message", [
    ({}, "at least one member"), ({"a": [0, 1], "b": [0, 1, 2]}, "'b' names 3 classes, the first member 2"),
    ({"a": draw(2, 3)}, r"'a' should be classes \(N,\), got float64 \(2, 3\); of logits take argmax"),
    ({"a": [.5, 1.]}, "got float32"), ({"a": torch.zeros(0).long()}, r"got int64 \(0,\)")])
def test_disagreement_of_what_are_no_classes_is_refused(predictions, message):
    with pytest.raises(ValueError, match=message): disagreement(predictions)


# confidence

def confident(*pairs): # (probability, right): logits of two classes, and labels
    p, hit = zip(*pairs, strict=True)
    return torch.tensor([[math.log(v), math.log(1 - v)] for v in p], dtype=torch.float64), torch.tensor([0 if h else 1 for h in hit])

def test_calibration_errors_that_are_known():
    quarters = [(.75, i < 3) for i in range(4)]
    assert expected_calibration_error(*confident(*quarters)) == pytest.approx(0, abs=1e-9)
    assert expected_calibration_error(*confident(*quarters, *[(.9, i < 9) for i in range(10)])) == pytest.approx(0, abs=1e-9)
    assert expected_calibration_error(*confident((1 - 1e-12, True), (1 - 1e-12, False))) == pytest.approx(50)
    assert expected_calibration_error(*confident((.9, False), (.6, True))) == pytest.approx((90 + 40)/2)
    assert expected_calibration_error(*confident((.9, False), (.6, True)), bins=1) == pytest.approx(25), "in one bin they make up for each other"
    assert expected_calibration_error(torch.zeros(8, 4), torch.arange(8) % 4) == pytest.approx(0, abs=1e-5)

@pytest.mark.parametrize("bins", [1, 2, 7, 15, 100])
def test_the_table_is_that_of_a_loop_over_bins(bins):
    z, y = 2*draw(500, 4), torch.arange(500) % 4
    p, hit = z.softmax(1).max(1).values.numpy(), (z.argmax(1) == y).numpy()
    rows, error = [], 0
    for i in range(bins):
        inside = (p > i/bins) & (p <= (i + 1)/bins)
        if inside.any(): rows.append((100*p[inside].mean(), 100*hit[inside].mean(), inside.sum())); error += inside.mean()*abs(rows[-1][0] - rows[-1][1])
    t = reliability(z, y, bins)
    assert list(t.columns) == ["confidence", "accuracy", "n"] and t.n.sum() == 500 and t.n.dtype.kind == "i"
    np.testing.assert_allclose(t, rows); assert expected_calibration_error(z, y, bins) == pytest.approx(error)

def test_a_bin_includes_its_upper_end():
    t = reliability(torch.tensor([[0., 0.], [9., 0.]]), torch.tensor([0, 0]), bins=2)
    assert t.n.tolist() == [1, 1] and t.confidence[0] == pytest.approx(50)

def sampled(n=20_000, k=5):
    z = 2*torch.randn(n, k, generator=generator(3))
    return z, torch.multinomial(z.softmax(1), 1, generator=generator(4)).flatten()

def test_the_temperature_of_overconfident_logits_is_found():
    z, y = sampled()
    assert expected_calibration_error(z, y) < 1 < 15 < expected_calibration_error(3*z, y)
    t = fit_temperature(3*z, y)
    assert t == pytest.approx(3, rel=.03) and expected_calibration_error(3*z/t, y) < 1
    assert fit_temperature(z/4, y) == pytest.approx(t/12, rel=1e-4)
    nll = lambda t: float(F.cross_entropy(3*z.double()/t, y))
    assert nll(t) < min(nll(.99*t), nll(1.01*t)) and abs(nll(1.0001*t) - nll(t/1.0001)) < 1e-8

@pytest.mark.parametrize("sign", [1, -1], ids=["all right", "all wrong"])
def test_where_no_temperature_is_best_there_is_a_warning(sign):
    with pytest.warns(UserWarning, match="no temperature is best"): t = fit_temperature(sign*torch.eye(3), torch.arange(3))
    assert .01 <= t <= 100 and (t < 1 if sign > 0 else t > 50)

def test_a_temperature_leaves_the_modes_of_parts_alone():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()).train(); net[0].eval()
    assert Tempered(net, 2.).training and net.training and not net[0].training and net[1].training

def test_a_temperature_changes_confidence_only():
    net, x = small(classes=("a", "b", "c", "d")).eval(), torch.rand(5, 3, 32, 32)
    model = Tempered(net, 2)
    assert not model.training and Tempered(small().train(), 2).training and model.classes == net.classes and "temperature=2" in repr(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), net(x)/2); assert model(x).softmax(1).max() < net(x).softmax(1).max()
        torch.testing.assert_close(fold_batchnorm(Ensemble([model]))(x), (net(x)/2).log_softmax(1), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("temperature", [0, -1, math.nan, math.inf])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}: a finite number above 0"): Tempered(nn.Flatten(), temperature)

@pytest.mark.parametrize("measure", [reliability, expected_calibration_error, fit_temperature])
@pytest.mark.parametrize("logits, labels, message", [
    (torch.zeros(0, 3), torch.zeros(0).long(), "at least one image"),
    (torch.zeros(4), torch.zeros(4).long(), r"logits: expected shape \(N,K\).*\(4,\)"), (torch.zeros(4, 1), torch.zeros(4).long(), "2 classes"),
    (torch.zeros(4, 3), torch.zeros(3).long(), r"labels: expected 4 whole numbers, got torch.int64 of shape \(3,\)"),
    (torch.zeros(4, 3), torch.zeros(4), "labels: expected 4 whole numbers, got torch.float32"),
    (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "labels: values 0 to 3 do not index 3 classes"),
    (torch.zeros(4, 3), torch.tensor([0, 1, 2, -1]), "labels: values -1 to 2"),
    (torch.tensor([[0., math.nan]]), torch.tensor([0]), "logits: some are not finite")])
def test_what_cannot_be_graded_is_refused(measure, logits, labels, message):
    with pytest.raises(ValueError, match=message): measure(logits, labels)

@pytest.mark.parametrize("bins", [0, -3, 2.5])
def test_there_is_at_least_one_bin(bins):
    for measure in (reliability, expected_calibration_error):
        with pytest.raises(ValueError, match=f"bins={bins}: a whole number, at least 1"): measure(draw(4, 3), torch.zeros(4).long(), bins)

def test_the_diagram_shows_the_tables():
    z, y = sampled(500)
    tables, ax = {"E": reliability(z, y, 8), "other": reliability(3*z, y, 8)}, plt.subplots()[1]
    assert plot_reliability(tables, ax) is ax
    diagonal, *lines = ax.get_lines()
    assert diagonal.get_xydata().tolist() == [[0, 0], [100, 100]] and len(lines) == 2
    for line, dots, text, (name, t) in zip(lines, ax.collections, ax.get_legend().get_texts(), tables.items(), strict=True):
        np.testing.assert_allclose(line.get_xydata(), t[["confidence", "accuracy"]]); np.testing.assert_allclose(dots.get_offsets(), line.get_xydata())
        assert to_rgba(line.get_color()) == to_rgba(model_colors(tables)[name]) and np.argmax(dots.get_sizes()) == t.n.argmax()
        assert text.get_text() == f"{name} ({expected_calibration_error(z if name == 'E' else 3*z, y, 8):.1f} %)"
    assert plot_reliability(tables) is not ax
    plt.close("all")
    with pytest.raises(ValueError, match="tables: give at least one"): plot_reliability({})
