"""Perturbations, intervals, comparisons, and evaluations that say when not to trust them."""
import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import binom, norm
from torch import nn
from torchvision.transforms.v2 import functional as tv

from robustcv.core import IMAGENET_STD, normalized
from robustcv.data import ImageSet, load_tiny_imagenet
from robustcv.fgsm import Transferred, fgsm
from robustcv.evaluation import (COLUMNS, TrustWarning, check_results, check_trust, compare, evaluate, pack, plot_bars, plot_confusions,
                                 plot_strength, unpack, wilson)
from robustcv.perturbations import (UNITS, Perturbation, affine_perturbations, attack_perturbations, color_perturbations, erase_perturbations, labelled,
                                    occlude, show_perturbations, stability_perturbations, standard_perturbations)
from robustcv.stability import add_noise

STANDARD, COLOR, ERASE = standard_perturbations(), color_perturbations(), erase_perturbations(2)
CLEAN = STANDARD[:1]

def images(n=20, k=4, side=16):
    gen = torch.Generator().manual_seed(0)
    return ImageSet(torch.randint(0, 256, (n, 3, side, side), generator=gen, dtype=torch.uint8),
                    torch.arange(n)**2 % k, tuple("abcdefgh"[:k]))

def linear(k=4, side=16):
    torch.manual_seed(0); return nn.Sequential(nn.Flatten(), nn.Linear(3*side*side, k)).eval()

class Constant(nn.Module):
    "Predicts class 0 of whatever it sees, with a gradient that is not zero."
    def forward(self, x): return x.flatten(1).mean(1, keepdim=True) - torch.arange(4.)

def table(model=None, data=None, perturbations=CLEAN, **kwargs):
    return evaluate(model or linear(), data or images(), perturbations, device="cpu", precision="fp32", **kwargs)


# labels

def test_every_strength_has_a_unit_in_short():
    everything = STANDARD + COLOR + ERASE + affine_perturbations() + attack_perturbations() + stability_perturbations()
    assert all(p.unit in UNITS for p in everything if not math.isnan(p.strength))
    said = {labelled(p.name, p.strength, p.unit) for p in STANDARD}
    assert {"clean", "rotation 90°", "noise σ = 0.15", "blur σ = 2 px", "occlusion 0.4 of the side", "contrast × 1.5", "hue -0.25 turns"} <= said
    assert labelled("mine", None) == "mine" and labelled("mine", 3., "of another kind") == "mine 3 of another kind" and labelled("mine", 3.) == "mine 3"


# evaluations

def test_a_known_model_gets_its_exact_counts():
    data, row = images(), table(Constant().eval()).iloc[0]
    right = data.labels == 0
    assert (row.correct, row.n, row.accuracy) == (int(right.sum()), 20, 100*right.double().mean().item())
    assert row.hits.tolist() == right.tolist() and row.predicted.tolist() == [0]*20
    assert (row.low/100, row.high/100) == pytest.approx(wilson(row.correct, 20)) and list(table()) == COLUMNS

def test_a_linear_model_gets_the_predictions_of_its_formula():
    model, data = linear(), images()
    with torch.no_grad(): expected = (data.images.flatten(1).double()/255@model[1].weight.double().T + model[1].bias.double()).argmax(1)
    assert table(model).predicted[0].tolist() == expected.tolist() and len(set(expected.tolist())) > 1

@pytest.mark.parametrize("batch_size", [1, 7, 20, 256])
def test_the_batch_size_does_not_matter(batch_size):
    one, other = (table(perturbations=STANDARD, batch_size=b) for b in (5, batch_size))
    drop = ["seconds"]
    for a, b in zip(one.drop(columns=drop).itertuples(), other.drop(columns=drop).itertuples(), strict=True):
        assert a.perturbation == b.perturbation and np.array_equal(a.predicted, b.predicted), (a.perturbation, a.strength)

def test_the_noise_is_the_same_for_every_model_and_follows_the_seed():
    seen = []
    watch = Perturbation("watch", lambda x, y, m: seen.append(add_noise(x, 0.2)) or seen[-1])
    for model, seed in ((linear(), 0), (Constant().eval(), 0), (linear(), 1)): table(model, perturbations=[watch], seed=seed)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])

def test_every_strength_has_noise_of_its_own():
    seen = []
    watch = [Perturbation("watch", lambda x, y, m: seen.append(torch.rand(9)) or x, s) for s in (0.1, 0.2)]
    table(perturbations=watch)
    assert not torch.equal(*seen)

def test_a_perturbation_does_not_change_the_noise_of_the_next():
    noise = [p for p in STANDARD if p.name == "noise"]
    alone, after = table(perturbations=noise[2:3]), table(perturbations=[*noise[:2], noise[2]])
    assert np.array_equal(alone.predicted[0], after.predicted[2])

def test_a_perturbation_gets_images_labels_and_the_model():
    model, data, seen = linear(), images(), []
    def apply(x, y, m):
        assert m is model and not m.training and x.dtype == torch.float32 and torch.equal(data.labels[len(seen):len(seen) + len(y)], y)
        x.requires_grad_(True); torch.autograd.grad(m(x).sum(), x) # attacks need gradients
        seen.extend(y.tolist()); return x.detach()
    table(model, data, [Perturbation("watch", apply)], batch_size=8)
    assert seen == data.labels.tolist()

@pytest.mark.parametrize("mode", [False, pytest.param(True, marks=pytest.mark.filterwarnings("ignore::robustcv.evaluation.TrustWarning"))])
def test_mode_random_state_and_images_are_left_alone(mode):
    model, data = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.BatchNorm1d(768), nn.Linear(768, 4)).train(mode), images()
    model[2].eval()
    before, modes, pixels, state = torch.get_rng_state(), [m.training for m in model.modules()], data.images.clone(), {**model.state_dict()}
    rude = Perturbation("rude", lambda x, y, m: x.zero_())
    table(model, data, [*STANDARD, rude])
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(data.images, pixels)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes

@pytest.mark.filterwarnings("ignore::robustcv.evaluation.TrustWarning")
def test_a_model_in_training_mode_is_measured_in_evaluation_mode():
    model = nn.Sequential(nn.Dropout(.9), linear())
    assert np.array_equal(table(model.train()).predicted[0], table(model.eval()).predicted[0])

def test_the_mode_comes_back_after_an_error():
    def fail(x, y, m): raise KeyError
    with warnings.catch_warnings(), pytest.raises(KeyError):
        warnings.simplefilter("ignore"); table(model := linear().train(), perturbations=[Perturbation("fail", fail)])
    assert model.training

class Broken(nn.Module):
    def forward(self, x): return x.flatten(1)[:, :4]/0

def test_outputs_that_are_not_finite_are_refused_and_the_mode_comes_back():
    model = Broken().train()
    with pytest.warns(TrustWarning), pytest.raises(ValueError, match="model: its outputs are not finite"): table(model)
    assert model.training


def test_outputs_that_are_not_finite_later_on_are_refused_too():
    with pytest.raises(ValueError, match="outputs of the model are not finite"):
        table(perturbations=[*CLEAN, Perturbation("0/0", lambda x, y, m: x*math.nan)])

@pytest.mark.parametrize("apply", [lambda x, y, m: x[:3], lambda x, y, m: x[:, :1], lambda x, y, m: x.repeat(2, 1, 1, 1)])
def test_a_perturbation_that_loses_images_or_channels_is_refused(apply):
    with pytest.raises(ValueError, match="perturbation 'odd' returned shape"): table(perturbations=[Perturbation("odd", apply)])

def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="images is empty"):
        evaluate(linear(), ImageSet(images().images[:0], images().labels[:0], tuple("abcd")))


# trust

class Random(nn.Module):
    def forward(self, x): return x.flatten(1)[:, :4] + torch.randn(len(x), 4)

class Steps(nn.Module):
    def forward(self, x): return (x.flatten(1)[:, :4]*4).round()

class Detached(nn.Module):
    def forward(self, x): return x.detach().flatten(1)[:, :4]

@pytest.mark.parametrize("model, said", [(linear().train(), "training mode"), (Random().eval(), "two forward passes .* differ"),
    (Steps().eval(), "gradient .* zero"), (Detached().eval(), "gradient .* zero"),
    (nn.Sequential(linear(), nn.Softmax(1)).eval(), "outputs are probabilities")])
def test_a_reason_for_distrust_is_told(model, said):
    with pytest.warns(TrustWarning) as told: table(model)
    assert len(told) == 1 and told[0].category is TrustWarning
    with pytest.warns(TrustWarning, match=said): check_trust(model, torch.rand(4, 3, 16, 16), torch.arange(4))

def test_a_sound_model_is_trusted():
    with warnings.catch_warnings(): warnings.simplefilter("error"); table(); table(Constant().eval())

def test_a_random_model_does_not_move_the_global_random_state():
    before = torch.get_rng_state()
    with pytest.warns(TrustWarning): table(Random().eval())
    assert torch.equal(before, torch.get_rng_state())

def test_trust_leaves_no_gradients_and_takes_models_under_no_grad():
    model = linear()
    with torch.no_grad(): check_trust(model, torch.rand(4, 3, 16, 16), torch.arange(4))
    assert all(p.grad is None for p in model.parameters())


# perturbations

@pytest.mark.parametrize("p", STANDARD, ids=lambda p: f"{p.name} {p.strength:g}")
@settings(max_examples=5)
@given(n=st.integers(1, 4), side=st.integers(12, 20), seed=st.integers(0, 99))
def test_standard_perturbations_keep_range_shape_and_input(p, n, side, seed):
    x = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)); before = x.clone()
    y = p.apply(x, torch.zeros(n, dtype=torch.int64), None)
    assert y.shape == x.shape and y.min() >= -1e-6 and y.max() <= 1 + 1e-6 and torch.equal(x, before)
    assert torch.equal(x, y) == (p.name == "clean")

@pytest.mark.parametrize("p", [*COLOR, *ERASE], ids=lambda p: f"{p.name} {p.strength:g}")
@settings(max_examples=5)
@given(n=st.integers(1, 4), h=st.integers(12, 20), w=st.integers(12, 20), seed=st.integers(0, 99))
def test_the_sections_perturbations_keep_range_shape_and_input(p, n, h, w, seed):
    x = torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed)); before = x.clone()
    y = p.apply(x, torch.zeros(n, dtype=torch.int64), None)
    assert y.shape == x.shape and y.min() >= -1e-6 and y.max() <= 1 + 1e-6 and torch.equal(x, before)
    many = torch.rand(8, 3, h, w)
    assert not torch.equal(p.apply(many, None, None), many)

@pytest.mark.parametrize("more", [color_perturbations(), erase_perturbations(), color_perturbations() + erase_perturbations()])
def test_the_sections_perturbations_have_names_of_their_own(more):
    assert len({(p.name, str(p.strength)) for p in STANDARD + more}) == len(STANDARD) + len(more)
    assert all(p.unit or math.isnan(p.strength) for p in more)

def seen_by_a_model(perturbations, seed):
    "The images that perturbations show to a model under `evaluate`."
    seen, data = [], images(16)
    def watch(p): return Perturbation(p.name, lambda x, y, m: seen.append(p.apply(x, y, m)) or seen[-1], p.strength)
    table(data=data, perturbations=[watch(p) for p in perturbations], seed=seed, batch_size=9)
    return [torch.cat(pair) for pair in zip(seen[::2], seen[1::2], strict=True)]

def test_the_sections_perturbations_are_the_same_for_every_model_and_follow_the_seed():
    one, again, other = (seen_by_a_model(COLOR + ERASE, seed) for seed in (0, 0, 1))
    for p, a, b, c in zip(COLOR + ERASE, one, again, other, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) != (p.name == "crop" or p.name.startswith("augmented")), p.name

def test_color_perturbations_are_torchvision_s():
    x = torch.rand(2, 3, 8, 8)
    for p in COLOR:
        if p.name != "crop": torch.testing.assert_close(p.apply(x, None, None), getattr(tv, f"adjust_{p.name}")(x, p.strength))
    assert {p.name for p in COLOR} == {"brightness", "contrast", "saturation", "hue", "crop"}

def test_crops_are_padded_with_black():
    for p in COLOR:
        if p.name != "crop": continue
        x, border = torch.rand(30, 3, 64, 64), round(64*(1 - p.strength)/2)
        y = p.apply(x, None, None); inner = y[:, :, border:-border, border:-border]
        n = round(64*p.strength)
        assert torch.equal(y, tv.pad(inner, [border]*4)) and inner.shape == (30, 3, n, n)
        assert any(torch.equal(inner[0], x[0, :, t:t+n, l:l+n]) for t in range(2*border + 1) for l in range(2*border + 1))

def test_erase_perturbations_are_the_article_s_augmentations_and_a_grid_of_squares():
    all_, x = erase_perturbations(), torch.ones(1, 3, 40, 40)
    assert [p.name for p in all_ if math.isnan(p.strength)] == [f"augmented: {a}" for a in ("erase", "flip + erase", "flip + crop + erase")]
    for side in (.25, .5):
        hidden = [p.apply(x, None, None)[0, 0] == .5 for p in all_ if p.strength == side]
        assert len(hidden) == 25 and len({tuple(h.flatten().tolist()) for h in hidden}) == 25 and torch.stack(hidden).any(0).all()
        assert hidden[12].sum() == (40*side)**2 and torch.equal(hidden[0], hidden[24].flip(0, 1)) and torch.equal(hidden[4], hidden[0].flip(1))
        assert [len(h.any(0).nonzero()) for h in hidden[:5]] == [min(40*side, 40*side/2 + c) for c in (4, 12, 20, 12, 4)]
    x = torch.rand(400, 3, 8, 8)
    erased, flipped = (next(p for p in all_ if p.name == f"augmented: {n}").apply(x, None, None) for n in ("erase", "flip + erase"))
    same = lambda y, x: (y == x).all(1).float().mean((1, 2)) > .5 # but for the box
    assert same(erased, x).all() and .4 < same(flipped, x).float().mean() < .6 and (same(flipped, x) | same(flipped, x.flip(3))).all()

def test_standard_perturbations_have_names_of_their_own():
    assert len({(p.name, p.strength) for p in STANDARD}) == len(STANDARD) > 20 and all(p.unit or math.isnan(p.strength) for p in STANDARD)

def test_rotations_turn_counter_clockwise():
    x = torch.rand(2, 3, 8, 8)
    for p in STANDARD:
        if p.name == "rotation": torch.testing.assert_close(p.apply(x, None, None), tv.rotate(x, p.strength))

def test_the_article_s_noise_is_a_tenth_of_a_normalised_unit():
    p, = (p for p in STANDARD if p.name == "noise, article")
    torch.manual_seed(0); noise = p.apply(torch.full((64, 3, 32, 32), .5), None, None) - .5
    assert noise.std((0, 2, 3)).tolist() == pytest.approx([0.1*s for s in IMAGENET_STD], rel=0.02)

@given(st.integers(4, 21), st.integers(4, 21), st.floats(0, 1))
def test_occlusion_covers_a_centred_square(h, w, side):
    y = occlude(torch.ones(1, 3, h, w), side)
    hidden = y[0, 0] == 0.5
    assert (hidden | (y[0, 0] == 1)).all() and abs(hidden.float().mean().item() - side**2) <= 2*side/min(h, w) + 4/(h*w)
    if h % 2 == w % 2 == 0: assert torch.equal(hidden, hidden.flip(0)) and torch.equal(hidden, hidden.flip(1))

def hidden(side, at, h=20, w=30): return occlude(torch.ones(1, 3, h, w), side, at)[0, 0] == .5

@pytest.mark.parametrize("at, rows, columns", [
    ((0, 0), slice(4), slice(6)), ((1, 1), slice(-4, None), slice(-6, None)), ((0, 1), slice(4), slice(-6, None)), ((.5, 0), slice(6, 14), slice(6)),
    ((.1, .5), slice(6), slice(9, 21)), ((.5, .5), slice(6, 14), slice(9, 21)), ((.9, .1), slice(14, None), slice(9))])
def test_a_square_is_cut_off_at_the_border(at, rows, columns):
    expected = torch.zeros(20, 30, dtype=torch.bool); expected[rows, columns] = True
    assert torch.equal(hidden(.4, at), expected)

@given(st.integers(4, 21), st.integers(4, 21), st.floats(0, .6))
def test_in_the_middle_the_square_is_where_it_was_before_it_had_a_place(h, w, side):
    expected, dh, dw = torch.zeros(h, w, dtype=torch.bool), round(h*side/2), round(w*side/2)
    expected[h//2-dh:h//2+dh, w//2-dw:w//2+dw] = True
    assert torch.equal(hidden(side, (.5, .5), h, w), expected) and torch.equal(occlude(torch.ones(1, 3, h, w), side)[0, 0] == .5, expected)

@given(st.integers(1, 9), st.integers(1, 9), st.floats(.01, .19))
def test_a_square_moves_with_its_place(down, right, side):
    moved, middle = hidden(side, (down/10, right/10)), hidden(side, (.5, .5))
    assert torch.equal(moved, middle.roll((2*(down - 5), 3*(right - 5)), (0, 1)))

@pytest.mark.parametrize("std", [0., 0.1, torch.full((3, 1, 1), 0.1)])
def test_noise_is_gaussian_and_clipped(std):
    x = torch.full((50, 3, 16, 16), 0.5); noise = add_noise(x, std) - x
    assert noise.std().item() == pytest.approx(0 if isinstance(std, float) and std == 0 else 0.1, rel=0.02, abs=1e-9)
    assert add_noise(torch.ones(9, 3, 9, 9), 0.5).max() == 1


# statistics

@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([.8, .95, .99]))
def test_wilson_s_interval_is_its_closed_form(n, share, confidence):
    k, z = round(share*n), norm.ppf(.5 + confidence/2)
    centre, half = (k + z*z/2)/(n + z*z), z/(n + z*z)*math.sqrt(k*(n - k)/n + z*z/4)
    low, high = wilson(k, n, confidence)
    assert (low, high) == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-9) and low <= k/n <= high

outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)

@given(outcomes)
def test_a_comparison_is_exact_and_symmetric(pairs):
    before, after = (list(c) for c in zip(*pairs, strict=True))
    c, back = compare(before, after), compare(after, before)
    gained, lost, n = sum(b < a for b, a in pairs), sum(b > a for b, a in pairs), len(pairs)
    assert (c["gained"], c["lost"], c["n"]) == (gained, lost, n) and c["difference"] == pytest.approx(100*(sum(after) - sum(before))/n)
    chance = [binom.pmf(k, gained + lost, .5) for k in range(gained + lost + 1)]
    assert c["p"] == pytest.approx(min(1, sum(q for q in chance if q <= chance[gained]*(1 + 1e-9))))
    assert (back["difference"], back["low"], back["high"], back["p"]) == pytest.approx((-c["difference"], -c["high"], -c["low"], c["p"]))
    assert -100 <= c["low"] <= c["high"] <= 100

def test_the_interval_of_a_comparison_covers_as_often_as_it_says():
    rng, covered, (right, wrong) = np.random.default_rng(0), 0, (.15, .08) # a true difference of 7 points
    for _ in range(400):
        u = rng.random(200)
        c = compare((u >= right), (u < right) | (u >= right + wrong))
        covered += c["low"] <= 100*(right - wrong) <= c["high"]
    assert 0.92 < covered/400 < 0.99

@pytest.mark.parametrize("a, b", [([True], [True, False]), ([], []), ([[True]], [[True]])])
def test_a_comparison_needs_the_same_images(a, b):
    with pytest.raises(ValueError, match="need the same images"): compare(a, b)


# records and pictures

def test_a_packed_evaluation_comes_back():
    import json
    for n in (1, 8, 20):
        full = table(data=images(n), perturbations=STANDARD)
        again = unpack(json.loads(json.dumps(pack(full), allow_nan=False)))
        assert all(a.tolist() == b.tolist() and a.dtype == b.dtype for a, b in zip(full.hits, again.hits, strict=True))
        pd.testing.assert_frame_equal(full.drop(columns=["predicted", "hits", "seconds"]), again.drop(columns=["hits", "seconds"]))

def test_plots_show_what_is_in_the_table_and_name_what_is_not():
    import matplotlib.pyplot as plt
    t, data = table(perturbations=STANDARD), images()
    assert len(plot_bars({"a": t, "b": t}).patches) == 2*len(STANDARD)
    ax = plot_bars({"a": t.iloc[[0, 1, 2]], "b": t.iloc[[5, 0]].assign(n=7)}) # other rows, in another order
    label = {round(x): l.get_text() for x, l in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)}
    shown = [label[round(p.get_x() + p.get_width()/2)] for p in ax.patches]
    assert shown == [labelled(STANDARD[i].name, STANDARD[i].strength, STANDARD[i].unit) for i in (0, 1, 2, 5, 0)]
    assert "n = 7 to 20 a bar" in ax.get_title()
    with pytest.raises(ValueError, match="tables: none"): plot_bars({})
    with pytest.raises(ValueError, match="images: expected an ImageSet, got a tuple"): evaluate(linear(), (data, data))
    assert plot_strength({"a": t}, "noise").lines[0].get_ydata().tolist() == t[t.perturbation == "noise"].accuracy.tolist()
    assert plot_confusions(t, data, "rotation", 90).get_ylabel() == "true"
    assert len(show_perturbations(data.images[:2], STANDARD[:3]).axes) == 6
    with pytest.raises(ValueError, match="'fog' is not in the table of a"): plot_strength({"a": t}, "fog")
    with pytest.raises(ValueError, match="needs rows 'clean' and 'fog'"): plot_confusions(t, data, "fog")
    plt.close("all")


def test_a_model_with_too_few_outputs_is_refused():
    images = ImageSet(torch.zeros(12, 3, 8, 8, dtype=torch.uint8), torch.arange(12) % 6, tuple("abcdef"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    with pytest.raises(ValueError, match="no logit for label 5"): evaluate(model, images, [])
    sorted_set = ImageSet(images.images, images.labels.sort().values, images.classes)  # the first images alone would not show it
    with pytest.raises(ValueError, match="has 4 outputs, images has 6 classes"): evaluate(model, sorted_set, [])


# attacks as perturbations

def test_attacks_are_measured_on_the_network_itself_and_on_others_examples():
    data, model, other = images(40), linear(), nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    few = attack_perturbations({"other": Transferred(other)}, (.05, .2), (10, 6), steps=5, targets=2, queries=10)
    t = table(model, data, CLEAN + few).set_index(["perturbation", "strength"])
    assert list(t.index[1:]) == [(n, e) for n in ("random signs", "FGSM", "FGSM from other") for e in (.05, .2)] + [("PGD-20", .2), ("strong attacks", .2)]
    x, y = data.images/255, data.labels
    for name, source in (("FGSM", model), ("FGSM from other", other)):
        for e in (.05, .2): assert t.loc[name, e].predicted.tolist() == model(fgsm(source, x, y, normalized(e))).argmax(1).tolist()
    few = torch.linspace(0, 39, 10).long()
    assert t.loc["PGD-20", .2].n == 10 and t.loc["strong attacks", .2].n == 6
    assert not t.loc["PGD-20", .2].hits.any() and not t.loc["strong attacks", .2].hits.any(), "a linear model has nothing to resist with"
    rows = table(Constant().eval(), data, attack_perturbations(None, (), (10, 6), steps=5, targets=2, queries=10))
    assert [r.hits.tolist() for r in rows.itertuples()] == [(y[torch.linspace(0, 39, k).long()] == 0).tolist()
                                                            for k in (10, 6)], "one that cannot be moved does"


def test_a_network_that_has_changed_is_attacked_anew():
    data, model = images(40), linear()
    attacks = [p for p in attack_perturbations() if p.name == "FGSM"][:1]
    before = table(model, data, attacks)
    with torch.no_grad(): model[1].weight.copy_(linear()[1].weight.flip(0)*3)
    x, y = data.images/255, data.labels
    assert table(model, data, attacks).predicted[0].tolist() == model(fgsm(model, x, y, normalized(.05))).argmax(1).tolist() != before.predicted[0].tolist()

def test_random_signs_have_the_size_of_an_attack_and_both_directions():
    x = torch.full((4, 3, 16, 16), .5)
    p = next(p for p in attack_perturbations() if (p.name, p.strength) == ("random signs", .2))
    change = (p.apply(x, None, None) - x)/normalized(.2)
    torch.testing.assert_close(change.abs(), torch.ones_like(x)) and abs(change.mean()) < .1

def test_few_images_are_spread_evenly_and_all_are_taken_where_there_are_fewer():
    data, seen = images(20), []
    def keep(x, y, model): seen.append(y); return x
    rows = table(None, data, [Perturbation("few", keep, most=5), Perturbation("all", keep, most=50)])
    assert rows.n.tolist() == [5, 20] and seen[0].tolist() == data.labels[[0, 4, 9, 14, 19]].tolist() and seen[1].tolist() == data.labels.tolist()
    assert rows.hits[0].tolist() == rows.hits[1][[0, 4, 9, 14, 19]].tolist()

def test_narrow_successes_are_predicted_in_float32():
    kinds = []
    class Asked(nn.Flatten):
        def forward(self, x): kinds.append(torch.is_autocast_enabled("cpu")); return super().forward(x)
    model = nn.Sequential(Asked(), nn.Linear(768, 4)).eval()
    def run(fp32):
        kinds.clear(); evaluate(model, images(), [Perturbation("p", lambda x, y, m: x, fp32=fp32)], device="cpu", precision="bf16")
        return kinds[-1]
    assert run(False) and not run(True)


# signs that a result is not to be believed

def results(*found):
    "A table of perturbation, strength, correct and n."
    return pd.DataFrame([[p, e, "", k, n, 100*k/n, *(100*w for w in wilson(k, n)), 0., None, None] for p, e, k, n in found], columns=COLUMNS)

@pytest.mark.parametrize("found, said", [
    ([("clean", math.nan, 24, 400)], "clean accuracy is at chance"), ([("FGSM", .2, 10, 400), ("PGD-20", .2, 60, 400)], "FGSM 0.2 leaves 2.5 %, PGD-20 15.0 %"),
    ([("PGD-20", .2, 10, 400), ("strong attacks", .2, 30, 200)], "PGD-20 0.2 leaves 2.5 %, strong attacks 15.0 %"),
    ([("FGSM from DenseNet-121", .1, 10, 400), ("FGSM", .1, 60, 400)], "FGSM from DenseNet-121 0.1 leaves"),
    ([("random signs", .1, 10, 400), ("FGSM", .1, 60, 400)], "random signs 0.1 leaves")])
def test_results_that_cannot_be_are_warned_of(found, said):
    with pytest.warns(TrustWarning, match=said) as told: check_results(results(*found), 20)
    assert len(told) == 1 and "05_evaluation" in str(told[0].message)

@pytest.mark.parametrize("found", [[("clean", math.nan, 60, 400)], [("clean", math.nan, 2, 40)], [("FGSM", .2, 60, 400), ("PGD-20", .2, 10, 400)],
    [("FGSM", .2, 12, 400), ("PGD-20", .2, 14, 400)], [("FGSM", .3, 10, 400), ("PGD-20", .2, 60, 400)], [("noise", .3, 0, 400), ("FGSM", .3, 60, 400)]])
def test_results_that_can_be_are_not_warned_of(found):
    with warnings.catch_warnings(): warnings.simplefilter("error"); check_results(results(*found), 20)

def test_a_model_knows_the_images_it_was_trained_on():
    model, data = linear(), images()
    model.trained_on = data.fingerprint
    with pytest.warns(TrustWarning, match="trained on"): table(model, data)
    model.trained_on = images(21).fingerprint
    with warnings.catch_warnings(): warnings.simplefilter("error"); table(model, data)

def test_classes_in_another_order_are_refused():
    model = linear(); model.classes = ("b", "a", "c", "d")
    with pytest.raises(ValueError, match="another order, so that labels are permuted"): table(model)
    for fine in (("a", "b", "c", "d"), ("w", "x", "y", "z"), None): model.classes = fine; table(model)

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_evaluation_goes_on_with_smaller_batches(error):
    seen, model = [], linear()
    def greedy(x, y, m):
        seen.append(len(x))
        if len(x) > 6: raise error
        return x
    with pytest.warns(UserWarning, match="going on with") as told:
        rows = table(model, perturbations=[*CLEAN, Perturbation("greedy", greedy), *CLEAN], batch_size=20)
    assert [str(w.message).split(" images")[0].split()[-1] for w in told] == ["10", "5"] and seen == [20, 10, 5, 5, 5, 5]
    assert rows.correct.nunique() == 1 and (rows.n == 20).all()

def test_a_model_may_have_more_outputs_than_there_are_classes():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 9)).eval(); model[1].bias.data[7] = 100
    import matplotlib.pyplot as plt
    ax = plot_confusions(table(model, perturbations=CLEAN), images(), "clean")
    assert ax.get_xlabel() == "predicted"; plt.close("all")

def test_an_image_that_does_not_fit_is_an_error():
    def greedy(x, y, m): raise torch.OutOfMemoryError("too large")
    with pytest.warns(UserWarning, match="going on with 1 images"), pytest.raises(torch.OutOfMemoryError):
        table(perturbations=[Perturbation("greedy", greedy)], batch_size=2)

def test_a_model_that_returns_no_tensor_is_refused():
    class Wrapped(nn.Module):
        def forward(self, x): return {"logits": x.mean((2, 3))}
    with pytest.raises(ValueError, match="returns a dict and not logits"): evaluate(Wrapped().eval(), images(), [])

def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision 'fp16'"): evaluate(linear(), images(), CLEAN, precision="fp16")

def test_shares_are_not_taken_for_right_and_wrong():
    with pytest.raises(ValueError, match="right or wrong, image by image"): compare(np.array([1/3, 1, 0]), np.array([1., 1, 0]))
    assert compare(np.array([0, 1, 0]), np.array([1., 1, 0])) == compare(np.array([False, True, False]), np.array([True, True, False]))

def test_inside_of_inference_mode(tiny):
    images, model = load_tiny_imagenet(tiny, "val"), nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 4)).eval()
    rows = [standard_perturbations()[0], Perturbation("FGSM", lambda x, y, m: fgsm(m, x, y, .1), .1, fp32=True)]
    expected = evaluate(model, images, rows)
    with torch.inference_mode(): found = evaluate(model, images, rows)
    assert found.correct.tolist() == expected.correct.tolist()

def test_a_warning_points_at_the_caller(tiny):
    images, model = load_tiny_imagenet(tiny, "val"), nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 4)).train()
    with pytest.warns(TrustWarning) as caught: evaluate(model, images, standard_perturbations()[:1])
    assert {w.filename for w in caught} == {__file__}

def test_a_picture_of_perturbations_leaves_chance_alone():
    torch.manual_seed(123); expected = torch.rand(1); torch.manual_seed(123)
    plt.close(show_perturbations(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [p for p in standard_perturbations() if p.name == "noise"]))
    assert torch.rand(1).equal(expected)
