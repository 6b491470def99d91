"""The difference of two accuracies and its interval, against closed forms; the spread over seeds."""
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import norm, t as student

from records import N, hits, made
from robustcv.claims import TRADE_OFF
from robustcv.comparisons import CLEAN, accuracy_under, common_conditions, gain, paired, seed_spread, shares_right, spread, widened
from robustcv.evaluation import compare, right


# the difference and its interval

shares, confidences = st.floats(0, 1), st.sampled_from([.8, .95, .99, .999])

@given(shares, shares, st.integers(1, 80), confidences)
def test_one_seed_is_compared_image_by_image(p, q, n, confidence):
    a, b = hits(p, 1, n), hits(q, 2, n)
    c = compare(a, b, confidence)
    assert paired([made("a", a)], [made("b", b)], confidence=confidence) == pytest.approx((c["difference"], c["low"], c["high"]), abs=1e-9)

@given(st.lists(shares, min_size=1, max_size=3), st.lists(shares, min_size=2, max_size=3), confidences)
def test_several_seeds_are_averaged_image_by_image(before, after, confidence):
    a, b = ([hits(p, 7*k + j) for j, p in enumerate(ps)] for k, ps in enumerate((before, after)))
    change = 100*(np.mean(b, 0) - np.mean(a, 0))
    more = np.append(change, [-100, 100]) # one image gained and one lost
    half = norm.ppf(.5 + confidence/2)*more.std()/math.sqrt(N + 2)
    found = paired([made("a", h, s) for s, h in enumerate(a)], [made("b", h, s) for s, h in enumerate(b)], confidence=confidence)
    assert found == pytest.approx((change.mean(), max(-100, more.mean() - half), min(100, more.mean() + half)))

def test_agreement_of_all_seeds_on_all_images_is_no_certainty():
    nothing = [[made(n, np.zeros(N, bool), s) for s in range(2)] for n in "ab"]
    value, low, high = paired(*nothing)
    assert value == 0 and low < -.5 and high > .5

@pytest.mark.parametrize("before, after", [(1, 1), (3, 3), (1, 3), (2, 3)])
@pytest.mark.parametrize("sd, df", [(1.5, 4), (.2, 40), (3., 1)])
def test_the_spread_over_seeds_widens_the_interval_by_its_closed_form(before, after, sd, df):
    a, b = ([made(n, hits(p, 10*k + s), s) for s in range(k)] for n, p, k in (("a", .5, before), ("b", .6, after)))
    value, low, high = paired(a, b)
    more = student.ppf(.975, df)*sd*math.sqrt(1/before + 1/after)
    expected = value, value - math.sqrt((value - low)**2 + more**2), value + math.sqrt((high - value)**2 + more**2)
    assert paired(a, b, seeds=(sd, df)) == pytest.approx(expected)
    assert expected[1] < low and high < expected[2] and paired(a, b, seeds=(sd, 0)) == (value, low, high), "an unknown spread is left out"

@given(st.floats(-50, 50), st.floats(0, 9), st.floats(0, 9), st.floats(0, 5), st.integers(1, 50), confidences)
def test_widening_contains_the_interval(value, down, up, sd, df, confidence):
    v, low, high = widened(value, value - down, value + up, (sd, df), 2/3, confidence)
    assert v == value and low <= value - down + 1e-9 and high >= value + up - 1e-9

def test_differences_are_taken_under_the_perturbations_named():
    under = {("noise", .1): hits(.3, 3), ("noise", .2): hits(.1, 4), ("flip", None): hits(.2, 5)}
    a, b = [made("a", hits(.8, 1), under=under)], [made("b", hits(.5, 2), under=under | {("noise", .1): hits(.6, 6)})]
    def change(now, was): return pytest.approx(100*(now.mean() - was.mean()))
    assert paired(a, b)[0] == change(hits(.5, 2), hits(.8, 1))
    assert paired(a, b, ("noise", .1), ("noise", .1))[0] == change(hits(.6, 6), hits(.3, 3))
    assert paired(a, a, CLEAN, ("noise", .2))[0] == change(hits(.1, 4), hits(.8, 1))
    assert paired(a, b, ("flip", None), CLEAN)[0] == change(hits(.5, 2), hits(.2, 5))

def test_a_gain_in_words_allows_for_the_seeds():
    a, b = ([made(n, hits(p, k, 400), k) for k in range(4)] for n, p in (("a", .4), ("b", .6)))
    value, low, high = paired(a, b, seeds=seed_spread(a + b))
    assert gain(a, b, CLEAN, a + b) == f"{value:+.1f} ({low:+.1f} to {high:+.1f})" and 10 < value < 30

@pytest.mark.parametrize("perturbation", [("fog", None), ("noise", .3), ("noise", None), ("clean", .1)])
def test_what_was_not_measured_is_named(perturbation):
    a = [made("a", hits(.5), under={("noise", .1): hits(.4)})]
    with pytest.raises(KeyError, match=f"a: not measured under '{perturbation[0]}'"): paired(a, a, CLEAN, perturbation)

def test_several_perturbations_count_with_their_mean():
    noise = ("noise, article", .1)
    a, b = (made(n, hits(p, 1), under={noise: hits(q, 2)}) for n, p, q in (("a", .5, .2), ("b", .7, .4)))
    change = 50*((hits(.7, 1)*1. + hits(.4, 2)) - (hits(.5, 1)*1. + hits(.2, 2)))
    half = norm.ppf(.975)*change.std(ddof=1)/math.sqrt(N)
    assert paired([a], [b], TRADE_OFF, TRADE_OFF) == pytest.approx((change.mean(), change.mean() - half, change.mean() + half))
    again = [made("a", hits(.6, 3), 1, under={noise: hits(.3, 4)}), a]
    sd, df = spread(again, lambda r: np.mean([100*e["correct"]/N for e in r["metrics"]["evaluation"]]))
    assert df == 1 and seed_spread(again, TRADE_OFF) == (0., 0), "a pair of seeds tells nothing"


# spread over seeds

@given(st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_spread_is_the_pooled_standard_deviation(runs): # of 10 images, so many are right
    records = [made(f"run {i}", np.arange(10) < k, s, section="st"[i % 2]) for i, ks in enumerate(runs) for s, k in enumerate(ks)]
    df = sum(len(ks) - 1 for ks in runs)
    squares = sum(np.var(ks)*len(ks) for ks in runs)
    assert spread(records) == (pytest.approx(10*math.sqrt(squares/df) if df else 0.), df)

def test_without_repeats_the_spread_is_unknown(): assert spread([made("a", hits(.5)), made("b", hits(.6))]) == (0., 0)

def test_runs_of_one_name_in_two_sections_are_not_repeats():
    assert spread([made("baseline", hits(.1), section="s"), made("baseline", hits(.9), 1, section="t")]) == (0., 0)

def test_the_spread_is_that_of_the_measure_and_of_the_runs_that_have_it():
    records = [made("a", hits(.5), s, training=t) for s, t in enumerate((70., 80., 90.))] + [made("b", hits(.5), s) for s in range(2)]
    assert spread(records, lambda r: r["metrics"]["train_accuracy"]) == (pytest.approx(math.sqrt(200/3)), 3)
    assert spread(records, lambda r: r["metrics"]["train_accuracy"] if r["name"] == "a" else None) == (pytest.approx(10.), 2)
    assert spread(records, lambda r: None) == (0., 0)

def luck(table): # (seeds, images), 0 or 1
    "Variance of the seeds' effect in points, by the expected mean squares of an analysis of variance in two ways."
    seeds, n = table.shape
    of_seeds = n*sum((table[s].mean() - table.mean())**2 for s in range(seeds))/(seeds - 1)
    rest = sum((table[s, i] - table[s].mean() - table[:, i].mean() + table.mean())**2 for s in range(seeds) for i in range(n))/((seeds - 1)*(n - 1))
    return 100**2*(of_seeds - rest)/n

@given(st.lists(st.tuples(st.integers(2, 4), st.floats(0, .5)), min_size=3, max_size=4), st.integers(0, 99))
def test_a_seed_s_luck_is_what_an_analysis_of_variance_leaves(networks, seed):
    rng = np.random.default_rng(seed)
    tables = [rng.random((seeds, 12)) < .5 + rng.uniform(-width, width, (seeds, 1)) for seeds, width in networks]
    records = [made(f"run {i}", right, s) for i, table in enumerate(tables) for s, right in enumerate(table)]
    df = sum(len(t) - 1 for t in tables)
    assert seed_spread(records, enough=3) == (pytest.approx(math.sqrt(max(0., sum(luck(t)*(len(t) - 1) for t in tables)/df)), abs=1e-5), df)

@given(st.lists(st.tuples(st.integers(2, 4), st.floats(0, .5)), min_size=3, max_size=4), st.integers(0, 99))
def test_a_seed_s_luck_with_a_change_is_that_of_the_table_of_changes(networks, seed):
    rng, fog = np.random.default_rng(seed), ("fog", 1.)
    tables = [[rng.random((seeds, 12)) < .5 + rng.uniform(-width, width, (seeds, 1)) for _ in range(2)] for seeds, width in networks]
    records = [made(f"run {i}", clean, s, under={fog: foggy}) for i, both in enumerate(tables) for s, (clean, foggy) in enumerate(zip(*both, strict=True))]
    df = sum(len(clean) - 1 for clean, _ in tables)
    pooled = sum(luck(foggy*1. - clean)*(len(clean) - 1) for clean, foggy in tables)/df
    assert seed_spread(records, fog, CLEAN, enough=3) == (pytest.approx(math.sqrt(max(0., pooled)), abs=1e-5), df)
    assert seed_spread(records, fog, fog, enough=3) == (0., df)

@pytest.mark.parametrize("seeds", [1, 3])
def test_what_seeds_share_under_two_conditions_does_not_widen_the_change(seeds):
    foggy = [made("a", hits(.6, s), s, under={("fog", 1.): hits(.4, s + 9)}) for s in range(seeds)]
    value, low, high = paired(foggy, foggy, CLEAN, ("fog", 1.))
    more = student.ppf(.975, 6)*2/math.sqrt(seeds)
    wider = value, value - math.hypot(value - low, more), value + math.hypot(high - value, more)
    assert paired(foggy, foggy, CLEAN, ("fog", 1.), seeds=(2., 6)) == pytest.approx(wider)
    better = [made(f"run {i}", np.arange(N) < 100 + k, s, under={("fog", 1.): np.arange(N) < 60 + k}) for i in range(3) for s, k in enumerate((0, 10, 20))]
    assert seed_spread(better)[0] > 3 and seed_spread(better, ("fog", 1.), CLEAN)[0] < 1

@pytest.mark.parametrize("sigma", [0., 2., 5.])
def test_disagreement_about_single_images_is_no_luck_of_the_seed(sigma):
    rng = np.random.default_rng(1)
    share = np.clip(.5 + rng.normal(0, sigma/100, 200), 0, 1)
    records = [made(f"run {i}", rng.random(500) < share[2*i + s], s) for i in range(100) for s in range(2)]
    found, total = seed_spread(records)[0], spread(records)[0]
    assert found == pytest.approx(sigma, abs=1.) and total == pytest.approx(math.hypot(sigma, 100*.5/math.sqrt(500)), rel=.15)

def test_seeds_that_were_measured_on_other_numbers_of_images_do_not_count():
    attacked = ("PGD-20", .2)
    records = [made(n, hits(.5, s), s, under={attacked: hits(.3, s, 50 if s < 3 else 40)}) for n in "ab" for s in range(4)]
    few = [r for r in records if r["seed"] < 3]
    assert seed_spread(records, attacked, enough=4) == seed_spread(few, attacked, enough=4) and seed_spread(records)[1] == 6

def test_two_seeds_of_one_run_are_not_enough_to_tell_the_spread_of_a_perturbation():
    records = [made(n, np.arange(10) < k, s) for n in "abc" for s, k in enumerate((4, 6, 8))]
    records += [made("d", np.arange(10) < 5, s, under={("noise", .1): np.arange(10) < 5 + s}) for s in range(2)]
    table = np.stack([np.arange(10) < k for k in (4, 6, 8)])
    sd, noisy = 3*2*luck(table)/7, luck(np.stack([np.arange(10) < 5 + s for s in range(2)]))
    assert spread(records)[1] == 7 and seed_spread(records) == (pytest.approx(math.sqrt(sd)), 7)
    assert seed_spread(records, ("noise", .1)) == (pytest.approx(math.sqrt((7*sd + noisy)/8)), 7), "pooled with what is known better"
    assert spread(records[-2:])[1] == 1 and seed_spread(records[-2:]) == seed_spread(records[-1:]) == (0., 0), "a pair of seeds is none"

def test_a_mean_spreads_like_the_mean_of_what_the_repeated_runs_were_measured_under():
    opposite = lambda s: {("noise", .1): np.arange(10) < 4 + s, ("blur", 1.): np.arange(10) < 6 - s}
    records = [made(n, np.arange(10) < 5, s, under=opposite(s)) for n in "abc" for s in range(3)]
    single = made("once", np.arange(10) < 5, under={**opposite(0), ("noise", .2): np.arange(10) < 3})
    means = (("noise", .1), ("blur", 1.), ("noise", .2))
    assert spread([*records, single], lambda r: None if r is single else 0.) == (0., 6)
    assert seed_spread([*records, single], means) == (pytest.approx(0.), 6), "what varies in opposite directions leaves the mean alone"
    one = luck(np.stack([np.arange(10) < 4 + s for s in range(3)]))
    assert seed_spread([*records, single], ("noise", .2)) == (pytest.approx(math.sqrt(2*one/3)), 6), "one perturbation is as uncertain as any"

def test_one_network_in_several_sections_counts_once_for_the_spread():
    config = lambda section, name, **more: dict(run=dict(section=section, name=name, model="resnet18", transform=None, **more), training=dict(epochs=15))
    at = lambda section, name, seed, p, **more: {**made(name, hits(p, seed), seed, section), "config": config(section, name, **more)}
    plain = [at(s, n, seed, p) for s, n in (("baseline", "plain"), ("color_jitter", "baseline")) for seed, p in enumerate((.4, .5, .6))]
    assert spread(plain) == spread(plain[:3]) and spread(plain)[1] == 2
    flipped = [{**at("color_jitter", "flip", seed, .5 + seed/10), "config": dict(run=dict(transform="flip"), training={})} for seed in range(2)]
    one = dict(run=dict(members=[["random_erase", "E"]]), training={})
    alone = [{**made("E", hits(p, seed), seed, "ensemble"), "config": one} for seed, p in enumerate((.1, .9))]
    assert spread(plain + flipped)[1] == 3 and spread(plain + alone) == spread(plain)

def test_attacks_on_the_network_itself_are_no_part_of_all_perturbations():
    under = {("noise", .1): hits(.4), ("FGSM", .2): hits(.1), ("PGD-20", .2): hits(.1), ("FGSM from DenseNet-121", .2): hits(.3)}
    a = made("a", hits(.5), under=under)
    assert common_conditions([a]) == (CLEAN, ("noise", .1), ("FGSM from DenseNet-121", .2))


# what a record has right

@given(st.lists(st.booleans(), min_size=1, max_size=40), st.lists(st.booleans(), min_size=40, max_size=40))
def test_a_record_tells_image_by_image_what_it_has_right(first, second):
    a, b = np.array(first), np.array(second[:len(first)])
    record = made("a", a, under={("noise", .1): b})
    assert right(record["metrics"]["evaluation"][1]).tolist() == b.tolist() and shares_right(record).tolist() == a.tolist()
    assert shares_right(record, (CLEAN, ("noise", .1))).tolist() == ((a*1. + b)/2).tolist()
    assert accuracy_under(record, (CLEAN, ("noise", .1))) == pytest.approx(50*(a.mean() + b.mean()))
    assert accuracy_under(record, ("noise", .2)) is None
