"""Claims: effects and intervals, verdicts, and a ledger that names what is missing."""
import itertools
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, strategies as st
import torch
from scipy.stats import norm, t as student

from records import N, hits, made
from robustcv import claims
from robustcv.claims import (AFFINE, CLAIMS, LESS, MORE, NEEDS, NOTEBOOKS, Claim, Difference, deciding, differences, ledger, missing, plot_claims, summary,
                             summary_table, verdict)
from robustcv.comparisons import CLEAN, conditions, paired, seed_spread, spread
from robustcv.core import generator
from robustcv.perturbations import attack_perturbations, standard_perturbations
from robustcv.evaluation import wilson
from robustcv.single_run import ATTACKED, EXTRA
from robustcv.tables import by_name
from robustcv.grids import SECTIONS

def difference(low, high, region): return Difference("d", (low + high)/2, low, high, region)


# verdicts

@pytest.mark.parametrize("low, high, region, expected", [
    (1, 2, MORE, "reproduced"), (0, 2, MORE, "reproduced"), (-1, 2, MORE, "undecided"), (-2, 0, MORE, "contradicted"), (-2, -1, MORE, "contradicted"),
    (-2, -1, LESS, "reproduced"), (-2, 0, LESS, "reproduced"), (-2, 1, LESS, "undecided"), (0, 1, LESS, "contradicted"), (1, 2, LESS, "contradicted"),
    (-1, 1, (-2, 2), "reproduced"), (-2, 2, (-2, 2), "reproduced"), (-3, 1, (-2, 2), "undecided"), (1, 3, (-2, 2), "undecided"),
    (-3, 3, (-2, 2), "undecided"), (2, 3, (-2, 2), "contradicted"), (-3, -2, (-2, 2), "contradicted"), (3, 4, (-2, 2), "contradicted"),
    (-4, 9, (-5, math.inf), "reproduced"), (-6, 9, (-5, math.inf), "undecided"), (-9, -5, (-5, math.inf), "contradicted"),
    (-9, 9, (-math.inf, math.inf), "reproduced")])
def test_the_verdict_is_where_the_interval_falls(low, high, region, expected): assert difference(low, high, region).verdict == expected

def test_a_claim_needs_all_of_its_comparisons():
    each = {"reproduced": difference(1, 2, MORE), "undecided": difference(-1, 2, MORE), "contradicted": difference(-2, -1, MORE)}
    for k in (1, 2, 3):
        for names in itertools.product(each, repeat=k):
            expected = next((v for v in ("contradicted", "undecided") if v in names), "reproduced")
            assert verdict([each[n] for n in names]) == expected


# claims on records

def claim(*comparisons, id="X"): return Claim(id, "s", "b is better", "a graph", comparisons)

RECORDS = [made("a", hits(.4, 1), training=99.), made("b", hits(.8, 2), training=90.), made("c", hits(.41, 3))]

@pytest.mark.parametrize("k", [1, 2, 5])
def test_more_comparisons_need_more_confidence(k):
    found = differences(claim(*[("a", "b", MORE)]*k), RECORDS)
    assert len(found) == k and len(set(found)) == 1
    assert (found[0].value, found[0].low, found[0].high) == paired(RECORDS[:1], RECORDS[1:2], confidence=1 - .05/k)
    if k > 1:
        one, = differences(claim(("a", "b", MORE)), RECORDS)
        assert found[0].low < one.low and one.high < found[0].high

def test_the_seeds_of_other_runs_and_sections_count_for_the_spread():
    others = [made("z", hits(p, 50 + s), s, section="t") for s, p in enumerate((.2, .5, .8))]
    (alone,), (more,) = (differences(claim(("a", "b", MORE)), r) for r in (RECORDS, RECORDS + others))
    assert (more.low, more.high) == pytest.approx(paired(RECORDS[:1], RECORDS[1:2], seeds=seed_spread(others))[1:])
    assert more.value == alone.value and more.low < alone.low and alone.high < more.high

def test_the_spread_is_that_under_the_perturbation_compared():
    noise = ("noise", .1)
    records = [made(n, hits(.5, s), s, under={noise: hits(p, s)}) for n in "ab" for s, p in enumerate((.2, .8, .2, .8))]
    clean, noisy = (differences(claim(("a", "b", MORE, p, p)), records)[0] for p in (CLEAN, noise))
    assert noisy.high > 3*clean.high and (clean.value, noisy.value) == (0, 0)

def test_training_accuracies_are_two_independent_proportions():
    d, = differences(claim(("a", "b", LESS, "training", "training")), RECORDS)
    shrunk = [(v*N + 1)/(N + 2) for v in (.99, .9)]
    half = norm.ppf(.975)*100*math.sqrt(sum(v*(1 - v) for v in shrunk)/(N + 2))
    assert (d.value, d.low, d.high) == pytest.approx((-9, -9 - half, -9 + half)) and "training images" in d.label and d.verdict == "reproduced"

def test_training_accuracies_of_100_percent_leave_room_for_doubt():
    full = [made(n, hits(.5), training=100.) for n in "ab"]
    d, = differences(claim(("a", "b", MORE, "training", "training")), full)
    assert d.value == 0 and d.low < 0 < d.high and d.verdict == "undecided"

def test_where_two_perturbations_meet_both_spreads_count():
    noise = ("noise", .1)
    records = [made(n, hits(p, s), s, under={noise: hits(.5, s)}) for n in "ab" for s, p in enumerate((.2, .8, .2, .8))]
    falls, rises = (differences(claim(("a", "b", MORE, *pair)), records)[0] for pair in ((CLEAN, noise), (noise, CLEAN)))
    one, = differences(claim(("a", "b", MORE, noise, noise)), records)
    assert falls.high - falls.low == pytest.approx(rises.high - rises.low) and falls.high - falls.low > 3*(one.high - one.low)

def test_labels_say_what_is_compared():
    noise, records = ("noise", .1), [made(n, hits(.5), under={("noise", .1): hits(.4)}) for n in "ab"]
    said = [d.label for d in differences(claim(("a", "b", MORE), ("a", "b", MORE, noise, noise), ("a", "a", LESS, CLEAN, noise)), records)]
    assert len(set(said)) == 3 and said[0] == "b − a" and "noise σ = 0.1" in said[1] and "clean" in said[2] and "noise σ = 0.1" in said[2]

def test_all_runs_that_are_missing_are_named_with_the_command_that_makes_them():
    needy = claim(("nobody", "b", MORE), ("a", "E, zero", MORE), ("E, zero", "nobody", MORE, CLEAN, ("fog", .5)))
    assert missing(needy, RECORDS) == "not on record: nobody; E, zero: `robustcv run s --only 'nobody' --only 'E, zero' --scale lite`"
    with pytest.raises(KeyError, match="nobody; E, zero"): differences(needy, RECORDS)

def test_all_that_was_not_measured_is_named_with_its_run():
    fog, blur = ("fog", .5), ("blur", 30.)
    some = [made("a", hits(.5), s, under={fog: hits(.4)} if s else {fog: hits(.4), blur: hits(.4)}) for s in range(2)] + [made("b", hits(.5))]
    needy = claim(("a", "b", MORE, (CLEAN, fog, blur), (CLEAN, fog, blur)), ("b", "nobody", MORE, "boxes", "boxes"))
    assert missing(needy, some) == ("not on record: nobody; blur σ = 30 px of a; fog 0.5, blur σ = 30 px, boxes of b: "
                                     "`robustcv run s --only 'nobody' --only 'a' --only 'b' --scale lite`, "
                                    "once the records of a; b are removed")

@pytest.mark.parametrize("measure, lacking", [("training", "train_accuracy"), ("gap", "train_accuracy"), ("selectivity", "filters"), ("boxes", "boxes")])
def test_a_measure_that_is_not_on_record_is_missing(measure, lacking):
    whole = made("a", hits(.5), boxes={"n": 1, "empty": 0, "tiny": 0, "whole": 0, "unsalient": 0})
    partial = {**whole, "metrics": {k: v for k, v in whole["metrics"].items() if k != lacking}}
    test = claim(("a", "a", MORE, measure, measure))
    assert missing(test, [whole]) == "" and missing(test, [partial]).startswith(f"not on record: {lacking} of a: `robustcv run s --only 'a'")

def test_nothing_is_missing_of_what_is_on_record():
    assert missing(claim(("a", "b", MORE), ("a", "c", LESS, "training", "training"), ("a", "b", MORE, "all", "all")), RECORDS) == ""
    assert missing(CLAIMS["C12"], RECORDS) == ("not on record: baseline; data; objective: `robustcv run adversarial_training "
                                               "--only 'baseline' --only 'data' --only 'objective' --scale lite`")

@pytest.mark.parametrize("other, said", [
    ({**made("c", hits(.5)), "data": dict(name="other", fingerprint="g", valid=N, train=N)}, "records of 2 settings cannot share a statistic"),
    ({**made("a", hits(.5)), "id": "again"}, "is on record with several settings")])
def test_records_that_do_not_belong_together_are_refused(other, said, monkeypatch):
    monkeypatch.setattr(claims, "CLAIMS", {"X": claim(("a", "b", MORE))})
    for f in (lambda r: differences(CLAIMS["C1"], r), lambda r: missing(CLAIMS["C1"], r), ledger, lambda r: summary(r, ["X"]), summary_table, plot_claims):
        with pytest.raises(ValueError, match=said): f([*RECORDS, other])


def test_two_scales_share_no_statistic_and_stand_side_by_side(monkeypatch):
    monkeypatch.setattr(claims, "CLAIMS", {"X": claim(("a", "b", MORE)), "Y": claim(("a", "c", MORE), id="Y")})
    whole = [made(n, hits(p), scale="full") for n, p in (("a", .8), ("b", .4))]
    for f in (ledger, lambda r: summary(r, ["X"]), plot_claims):
        with pytest.raises(ValueError, match="records of 2 settings cannot share a statistic"): f([*RECORDS, *whole])
    both, (one, other) = summary_table([*whole, *RECORDS]), (summary_table(rs) for rs in (RECORDS, whole))
    assert list(both) == ["claim", "the article", "we found, lite", "verdict, lite", "we found, full", "verdict, full"]
    assert both["we found, lite"].tolist() == one["we found"].tolist() and both["verdict, full"].tolist() == ["contradicted", ""]
    assert both["we found, full"].tolist() == [other["we found"][0], "not on record"]
    assert other["we found"][1].startswith("not on record: c: `robustcv run")

# ledger, summary, picture

@pytest.fixture
def three(monkeypatch):
    "A claim that is true, one that is false, one that the records cannot decide, and one without records."
    some = [claim(("a", "b", MORE), ("c", "b", MORE), id="true"), claim(("b", "a", MORE), ("a", "b", MORE), id="false"),
            claim(("a", "c", MORE), id="open"), claim(("a", "nobody", MORE), ("a", "b", MORE), id="missing")]
    monkeypatch.setattr(claims, "CLAIMS", {c.id: c for c in some})
    return RECORDS + [made("z", hits(.5, s), s, section="other") for s in range(3)]

def test_the_ledger_has_a_row_a_comparison(three):
    rows = ledger(three)
    assert rows.claim.tolist() == ["true"]*2 + ["false"]*2 + ["open", "missing"]
    assert rows.verdict.tolist() == ["reproduced"]*2 + ["contradicted"]*2 + ["undecided"]*2
    assert rows["comparison verdict"].tolist()[:5] == ["reproduced"]*2 + ["contradicted", "reproduced", "undecided"]
    assert rows.comparison.tolist()[:5] == ["b − a", "b − c", "a − b", "b − a", "c − a"]
    assert rows.comparison[5].startswith("not on record: nobody: `robustcv run s --only 'nobody'")
    value, low, high = paired(three[:1], three[1:2], seeds=seed_spread(three), confidence=.975)
    assert rows.points[0] == round(value, 1) and rows.interval[0] == f"{low:+.1f} to {high:+.1f}"
    assert rows.loc[0, ["seeds", "n", "data", "article"]].tolist() == [1, N, "simulated, lite", "a graph"]
    assert rows.loc[5, ["points", "interval", "seeds", "n", "data", "comparison verdict", "records"]].isna().all()
    assert set(rows.section) == {"s"} and list(rows.columns[:3]) == ["claim", "section", "notebook"]
    assert ledger(three, ["open", "true"]).claim.tolist() == ["open", "true", "true"]

def test_the_ledger_counts_the_fewer_seeds_of_each_comparison(three):
    more = [made("a", hits(.4, 20 + s), s) for s in (1, 2)] + [made("b", hits(.8, 30 + s), s) for s in (1,)]
    assert ledger(three + more).seeds.tolist()[:5] == [2, 1, 2, 2, 1]

def test_without_any_run_every_claim_has_a_row_that_says_so():
    rows = ledger(RECORDS)
    assert rows.claim.tolist() == list(CLAIMS) and (rows.verdict == "undecided").all()
    assert all(f"robustcv run {s} --only" in c for s, c in zip(rows.section, rows.comparison, strict=True))

def test_the_ledger_names_notebooks_and_records(three):
    other = [made("a", hits(.5), section="random_erase"), made("a", hits(.5), 1, section="random_erase"), made("b", hits(.5), section="random_erase")]
    for r, id in zip(other, ("0123456789abcdef", "fedcba9876543210", "0000000011111111"), strict=True): r["id"] = id
    claims.CLAIMS["pair"] = Claim("pair", "random_erase", "", "", (("a", "b", MORE), ("b", "b", LESS, CLEAN, CLEAN), ("a", "b", MORE, "all", "all")))
    rows = ledger(three + other, ["pair"])
    assert rows.records.tolist() == ["01234567 fedcba98 00000000", "00000000", "01234567 fedcba98 00000000"]
    assert set(rows.notebook) == {"11_random_erase.ipynb"} and list(rows.seeds) == [1]*3

def test_every_section_has_its_notebook():
    assert set(NOTEBOOKS) == set(SECTIONS)
    assert not [n for n in NOTEBOOKS.values() if not (Path(__file__).parent.parent/"nbs"/n).is_file()]

def test_a_perturbation_that_is_missing_is_named_in_the_ledger(three, monkeypatch):
    monkeypatch.setitem(claims.CLAIMS, "open", claim(("a", "b", MORE, ("fog", .5), ("fog", .5)), id="open"))
    rows = ledger(three, ["open"])
    assert rows.verdict.tolist() == ["undecided"] and rows.comparison[0].startswith("not on record: fog 0.5 of a; fog 0.5 of b:")

def test_the_summary_tells_effects_and_verdicts(three):
    lines = summary(three, ["true", "false", "open", "missing"]).split("\n")
    assert len(lines) == 4 and all(line.startswith(f"- **{i}**") for i, line in zip(("true", "false", "open", "missing"), lines, strict=True))
    expected = "**Reproduced**", "**Contradicted**", "**Undecided**", "**Undecided**, not on record: nobody: `robustcv run s --only 'nobody' --scale lite`"
    assert all(e in line for e, line in zip(expected, lines, strict=True))
    d = differences(claims.CLAIMS["open"], three)[0]
    assert f"c − a: {d.value:+.1f} ({d.low:+.1f} to {d.high:+.1f})" in lines[2] and "b is better" in lines[0]

def test_the_short_ledger_has_a_row_a_claim(three, monkeypatch):
    monkeypatch.setitem(claims.CLAIMS, "many", claim(*[("a", "b", MORE)]*4, *[("b", "a", LESS)]*4, id="many"))
    rows = claims.summary_table(three).set_index("claim")
    found, effects = {i: differences(claims.CLAIMS[i], three) for i in rows.index if i != "missing"}, rows["we found"]
    assert list(rows.index) == ["true", "false", "open", "missing", "many"] and [rows.verdict[i] for i in found] == [verdict(ds) for ds in found.values()]
    assert rows.verdict["missing"] == "undecided" and effects["missing"].startswith("not on record: nobody: `robustcv run s")
    for i, ds in found.items():
        d, right = deciding(ds), sum(d.verdict == "reproduced" for d in ds)
        assert effects[i].startswith(f"{d.label}: {d.value:+.1f} ({d.low:+.1f} to {d.high:+.1f})"), effects[i]
        assert effects[i].endswith(f"; {right} of {len(ds)} comparisons reproduced") == (len(ds) > 1)

def test_names_of_several_parts_are_not_taken_for_differences():
    names = "E, mean", "flip + crop"
    d, = differences(claim((*names, MORE)), [made(n, hits(.5)) for n in names])
    assert d.label == "(flip + crop) − (E, mean)"

def test_the_ledger_counts_what_a_comparison_rests_on():
    records = [made(n, hits(.5, s), s, "symmetry", filters=torch.randn(64, 3, 7, 7)) for n in ("baseline", "layer 2+") for s in range(2)]
    assert ledger(records, ["C18"]).n.tolist() == [128]

def test_the_picture_shows_every_comparison_on_record(three):
    ax, found = plot_claims(three), [d for i in ("true", "false", "open") for d in differences(claims.CLAIMS[i], three)]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["true  b − a", "true  b − c", "false  a − b", "false  b − a", "open  c − a"]
    lines = [c.lines for c in ax.containers if hasattr(c, "has_xerr") and c.has_xerr]
    assert [float(point.get_xdata()[0]) for point, _, _ in lines] == pytest.approx([d.value for d in found])
    assert [tuple(bar.get_segments()[0][:, 0]) for _, _, (bar,) in lines] == [pytest.approx((d.low, d.high)) for d in found]
    assert [point.get_color() for point, _, _ in lines] == ["C2", "C2", "C3", "C2", ".5"]
    low, high = ax.get_xlim()
    regions = [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches]
    assert low < min(d.low for d in found) < 0 < max(d.high for d in found) < high and regions == [pytest.approx((0, high))]*5
    axes = plt.figure().gca()
    assert plot_claims(three, ["open", "missing"], ax=axes) is axes and len(axes.get_yticklabels()) == 1
    plt.close("all")

def test_a_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no claim has its records"): plot_claims(RECORDS)
    ax = plot_claims(RECORDS, decisive=True)
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"{i}  not on record" for i in CLAIMS] and not ax.patches
    plt.close("all")

def test_in_short_the_picture_has_a_row_a_claim(three, monkeypatch):
    monkeypatch.setitem(claims.CLAIMS, "given", Claim("given", "s", "", "", (("a", "b", MORE), ("a", "c", MORE)), {1: (4., 5.)}))
    ax = plot_claims(three, decisive=True)
    short = {i: deciding(differences(claims.CLAIMS[i], three)) for i in ("true", "false", "open", "given")}
    labels = ["true  " + short["true"].label, "false  a − b", "open  c − a", "missing  not on record", "given  c − a"]
    assert [t.get_text() for t in ax.get_yticklabels()] == labels
    assert [t.get_color() for t in ax.get_yticklabels()] == [".15"]*3 + [".65", ".15"]
    drawn = {c.lines[0].get_ydata()[0]: c.lines[0].get_xdata()[0] for c in ax.containers if getattr(c, "has_xerr", False)}
    assert drawn == {y: pytest.approx(short[i].value) for y, i in enumerate(["true", "false", "open", "missing", "given"]) if i in short}
    plt.close("all")

def test_the_article_s_value_is_drawn_beside_its_comparison(monkeypatch):
    monkeypatch.setattr(claims, "CLAIMS", {"X": Claim("X", "s", "", "", (("a", "b", MORE), ("a", "c", MORE)), {1: (70., 80.)})})
    assert [d.given for d in differences(claims.CLAIMS["X"], RECORDS)] == [None, (70., 80.)]
    ax = plot_claims(RECORDS)
    marks = [line for line in ax.lines if line.get_color() == ".15"]
    assert [np.atleast_1d(line.get_xdata()).tolist() for line in marks] == [[70., 80.], [75.]] and {round(float(line.get_ydata()[0])) for line in marks} == {1}
    assert marks[1].get_marker() == "D" and marks[1].get_markerfacecolor() == "white" and ax.get_xlim()[1] > 80, "an open diamond, inside of the picture"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["reproduced", "contradicted", "undecided", "the article's value"]
    plt.close("all")

regions = st.sampled_from([MORE, LESS, (-2., 2.), (-5., math.inf), (10., math.inf)])

@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(.1, 9), regions), min_size=1, max_size=5))
def test_the_deciding_comparison_has_the_verdict_and_is_the_extreme_one(drawn):
    found = [difference(low, low + width, region) for low, width, region in drawn]
    d, said = deciding(found), verdict(found)
    def stays_out(d): return max(d.region[0] - d.high, d.low - d.region[1])
    def sticks_out(d): return max(d.region[0] - d.low, d.high - d.region[1])
    measure = stays_out if said == "contradicted" else sticks_out
    assert d.verdict == said and measure(d) == max(measure(o) for o in found if o.verdict == said)

def test_an_interval_without_width_at_the_edge_of_its_region_does_not_decide_against_it():
    edge, out = difference(0, 0, MORE), difference(-2, 0, MORE)
    assert (edge.verdict, out.verdict) == ("reproduced", "contradicted") and deciding([edge, out]) is out

def test_a_wide_interval_does_not_decide_a_claim_that_is_contradicted():
    wide, out, far, inside = difference(-90, 90, MORE), difference(-2, -1, MORE), difference(-7, -5, MORE), difference(1, 2, MORE)
    assert deciding([inside, wide, out, far]) is far and deciding([inside, wide]) is wide and deciding([difference(3, 4, MORE), inside]) is inside


# the article's claims

@pytest.mark.parametrize("c", CLAIMS.values(), ids=lambda c: c.id)
def test_claims_are_about_runs_and_perturbations_that_their_section_has(c):
    runs = SECTIONS[c.section]()
    names, lent = {r.name for r in runs}, dict.fromkeys({n for r in runs for _, n in r.sources})
    attacks = attack_perturbations(lent) if c.section in ATTACKED else []
    measured = {(p.name, None if math.isnan(p.strength) else p.strength) for p in standard_perturbations() + EXTRA.get(c.section, list)() + attacks}
    assert CLAIMS[c.id] is c and c.statement and c.article and c.comparisons
    for before, after, region, *where in c.comparisons:
        assert {before, after} <= names and len(region) == 2 and region[0] < region[1]
        assert where in [[m]*2 for m in NEEDS] or (len(where) in (0, 2) and all(measured.issuperset(conditions(w)) for w in where)), where
        assert before != after or where[0] != where[1] or where[0] in ("selectivity", "boxes"), "nothing is compared with itself"
        assert where != ["boxes"]*2 or next(r for r in runs if r.name == after).boxes, "a run with boxes"
    assert len(set(c.comparisons)) == len(c.comparisons) and hash(c)
    assert set(c.given) <= set(range(len(c.comparisons))) and all(a <= b for a, b in c.given.values())

# the gap, boxes, and all perturbations

def gap_records(seeds=1):
    runs = (("baseline", .5, 95.), ("multi-task", .52, 85.))
    return [made(n, hits(p, 10*k + s), s, "multi_task", training=t + s*(2*k + 1)) for k, (n, p, t) in enumerate(runs) for s in range(seeds)]

@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_gap_combines_training_and_validation_and_its_own_spread(seeds):
    a, b = by_name(gap_records(seeds)).values()
    found, = differences(Claim("X", "multi_task", "", "", (("baseline", "multi-task", LESS, "gap", "gap"),)), a + b)
    ta, tb = (np.mean([r["metrics"]["train_accuracy"] for r in rs])/100 for rs in (a, b))
    v, low, high = paired(a, b)
    half = norm.ppf(.975)*100*math.sqrt(sum(v*(1 - v) for v in ((t*N + 1)/(N + 2) for t in (ta, tb)))/(N + 2))
    value, down, up = 100*(tb - ta) - v, math.hypot(half, high - v), math.hypot(half, v - low)
    sd, df = spread(a + b, lambda r: r["metrics"]["train_accuracy"] - 100*r["metrics"]["evaluation"][0]["correct"]/N)
    assert df == 2*(seeds - 1) and (sd > 0) == (seeds > 1)
    more = student.ppf(.975, df)*sd*math.sqrt(2/seeds) if df else 0.
    assert (found.value, found.low, found.high) == pytest.approx((value, value - math.hypot(down, more), value + math.hypot(up, more)))
    assert found.label == "multi-task − baseline | gap of training and validation"

def test_the_gap_is_the_difference_of_the_gaps():
    a, b = made("a", np.arange(N) < 100, training=90.), made("b", np.arange(N) < 120, training=80.)
    assert differences(claim(("a", "b", LESS, "gap", "gap")), [a, b])[0].value == pytest.approx((80 - 60) - (90 - 50))

def test_the_interval_of_the_gap_covers(seeds=2, trials=150): # the true change of the gap: −10 − 2
    rng, covered = np.random.default_rng(0), []
    for _ in range(trials):
        records = []
        for name, t, p in (("a", .9, .5), ("b", .8, .52)):
            for s in range(seeds):
                training = 100*rng.binomial(N, t + rng.normal(0, .01))/N
                records.append(made(name, rng.random(N) < p + rng.normal(0, .01), s, training=training, filters=torch.zeros(1, 3, 2, 2)))
        d, = differences(claim(("a", "b", LESS, "gap", "gap")), records)
        covered.append(d.low <= -12 <= d.high)
    assert np.mean(covered) >= .93

def test_an_ensemble_without_filters_or_a_training_accuracy_does_not_disturb_the_spread():
    pool = made("ensemble", hits(.5), section="ensemble"); del pool["metrics"]["train_accuracy"], pool["metrics"]["filters"]
    test, records = Claim("X", "multi_task", "", "", tuple(("baseline", "multi-task", LESS, m, m) for m in ("gap", "training"))), gap_records(2)
    assert differences(test, [*records, pool]) == differences(test, records)

def with_boxes(records, **counts):
    for r in records: r["metrics"]["boxes"] = {"n": 1000, "empty": 10, "tiny": 40, "whole": 80, "unsalient": 300} | counts
    return records

@pytest.mark.parametrize("whole, expected", [(80, "reproduced"), (50, "undecided"), (10, "contradicted")])
def test_the_share_of_poor_boxes_has_wilson_s_interval(whole, expected):
    d, = differences(CLAIMS["C20"], with_boxes(gap_records(3), whole=whole))
    assert (d.value, d.low, d.high) == pytest.approx((5 + whole/10, *(100*v for v in wilson(50 + whole, 1000)))), "seeds share the boxes"
    assert d.verdict == expected
    assert d.label == "poor boxes, in %" and ledger(with_boxes(gap_records()), ["C20"]).n.tolist() == [1000]

def test_the_confidence_of_the_boxes_is_that_of_the_claim():
    two = Claim("X", "multi_task", "", "", tuple(("multi-task", "multi-task", region, "boxes", "boxes") for region in ((10., math.inf), LESS)))
    assert [(d.low, d.high) for d in differences(two, with_boxes(gap_records()))] == [pytest.approx(tuple(100*v for v in wilson(130, 1000, .975)))]*2

def test_all_is_what_both_were_measured_under_on_all_images():
    fog, blur, few = ("fog", 1.), ("blur", 2.), ("PGD-20", .2)
    same, probe = ("same in all orientations", None), ("linear probe: drawn", None)
    a = made("a", hits(.5, 1), under={fog: hits(.3, 2), blur: hits(.9, 3), few: hits(.9, 4, 50), same: hits(.9, 5), probe: hits(.9, 6)})
    b = made("b", hits(.6, 7), under={fog: hits(.5, 8), few: hits(.1, 9, 50), same: hits(.1, 10), probe: hits(.1, 11), ("hue", .5): hits(.1, 12)})
    d, = differences(claim(("a", "b", MORE, "all", "all")), [a, b])
    change = 50*((hits(.6, 7)*1. + hits(.5, 8)) - (hits(.5, 1)*1. + hits(.3, 2)))
    half = norm.ppf(.975)*change.std(ddof=1)/math.sqrt(N)
    assert (d.value, d.low, d.high) == pytest.approx((change.mean(), change.mean() - half, change.mean() + half))
    assert d.label == "b − a | mean of all perturbations"

def test_all_leaves_out_what_a_seed_was_not_measured_under():
    fog = ("fog", 1.)
    a, b = made("a", hits(.5, 1), under={fog: hits(.1, 2)}), [made("b", hits(.5, s), s, under={fog: hits(.9, 5 + s)} if s else {}) for s in range(2)]
    assert differences(claim(("a", "b", MORE, "all", "all")), [a, *b])[0].value == pytest.approx(paired([a], b)[0])

def test_an_ensemble_that_is_better_than_each_member_is_found_so():
    fog, members = ("fog", 1.), [c[0] for c in CLAIMS["C21"].comparisons]
    records = [made(m, hits(.4, i), section="ensemble", under={fog: hits(.3, i)}) for i, m in enumerate(members)]
    records.append(made("ensemble", hits(.8, 20), section="ensemble", under={fog: hits(.7, 21)}))
    assert len(members) == 6 and verdict(differences(CLAIMS["C21"], records)) == "reproduced"
    records[2] = made(members[2], hits(.99, 2), section="ensemble", under={fog: hits(.99, 2)})
    found = differences(CLAIMS["C21"], records)
    assert verdict(found) == "contradicted" and deciding(found).label.startswith(f"ensemble − {members[2]}")

@pytest.mark.parametrize("gap, clean, affine, expected", [
    (70, 101, 60, "reproduced"), (95, 101, 60, "contradicted"), (70, 130, 60, "contradicted"), (70, 101, 90, "contradicted")])
def test_multi_task_learning_has_three_ways_to_fail(gap, clean, affine, expected):
    "Training accuracy, and of 2,000 images, in 200ths, those right without and with affine transforms; the baseline has 90 %, 100 and 60."
    def run(name, training, right, turned):
        return made(name, np.arange(2000) < 10*right, section="multi_task", training=training, under={p: np.arange(2000) < 10*turned for p in AFFINE})
    found = differences(CLAIMS["C19"], [run("baseline", 90., 100, 60), run("multi-task", gap, clean, affine)])
    assert verdict(found) == expected and found[2].label == "multi-task − baseline | affine transforms" and len(AFFINE) == 8

@pytest.mark.parametrize("kernels, expected", [("gratings", "reproduced"), ("random", "undecided"), ("round", "contradicted")])
def test_selective_filters_are_told_from_random_ones(kernels, expected):
    angle, at = torch.arange(32.)*torch.pi/32, torch.arange(7.) - 3
    wave = torch.cos(1.2*(angle.cos().view(-1, 1, 1)*at + angle.sin().view(-1, 1, 1)*at[:, None]))[:, None].expand(-1, 3, -1, -1)
    bell = torch.exp(-(at**2 + at[:, None]**2)/3).expand(32, 3, 7, 7) + .01*torch.randn(32, 3, 7, 7, generator=generator(1))
    w = dict(gratings=wave, random=torch.randn(32, 3, 7, 7, generator=generator(2)), round=bell)[kernels]
    found = differences(CLAIMS["C18"], [made("baseline", hits(.5), section="symmetry", filters=w)])
    assert [d.verdict for d in found] == [expected] and found[0].low < found[0].value < found[0].high

def everything(seeds):
    "Records of every run that a claim needs, under every perturbation that it needs."
    out, n = [], 50
    for section in {c.section for c in CLAIMS.values()}:
        own = [c for c in CLAIMS.values() if c.section == section]
        names = dict.fromkeys(name for c in own for comparison in c.comparisons for name in comparison[:2])
        under = {p for c in own for comparison in c.comparisons for w in comparison[3:] if not isinstance(w, str) for p in conditions(w) if p != CLEAN}
        boxes = {"n": n, "empty": 1, "tiny": 2, "whole": 3, "unsalient": 9}
        out += [made(name, hits(.5, s, n), s, section, under={p: hits(.4, s, n) for p in under}, boxes=boxes) for name in names for s in range(seeds)]
    return out

@pytest.mark.parametrize("seeds", [1, 2])
def test_every_claim_has_a_verdict_once_its_runs_are_on_record(seeds):
    rows = ledger(everything(seeds=seeds))
    assert rows.claim.value_counts().to_dict() == {c.id: len(c.comparisons) for c in CLAIMS.values()}
    assert set(rows.verdict) <= {"reproduced", "contradicted", "undecided"} and (rows.seeds == seeds).all()
