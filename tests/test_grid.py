"""Grids over several sections: planned, each training once, ensembles of what is there."""
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from robustcv import experiments, single_run
from robustcv.core import SCALES, append_record, load_records
from robustcv.cache import cache_folder
from robustcv.data import load_data, load_tiny_imagenet
from robustcv.ensemble import Ensemble, combine
from robustcv.perturbations import Perturbation, affine_perturbations
from robustcv.stability import add_noise
from robustcv.evaluation import evaluate, evaluate_together, unpack
from robustcv.experiments import plan, run_sections, show_plan
from robustcv.single_run import describe_data, identity, scale_data, trained_model
from robustcv.tables import box_table
from robustcv.grids import DEMO, KEPT, SECTIONS, Run, in_order, strongest, together
from robustcv.models import build_model
from robustcv.multi_task import multi_task_loss
from robustcv.synthetic import make_synthetic
from robustcv.training import cross_entropy

MODEL, calls = "shufflenet_v2_x0_5", []

def counted(model, batch, backward):
    calls.append(1)
    return cross_entropy(model, batch)

def net(name, **kwargs): return Run("one", name, MODEL, objective=counted, training={"epochs": 1}, **kwargs)

@pytest.fixture
def go(tiny, tmp_path, monkeypatch):
    "Run sections `one` and `two` at a minute scale; returns their records."
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], classes=2, train_per_class=6, val_per_class=3, batch_size=4, epochs=1))
    for section in single_run.EXTRA: monkeypatch.setitem(single_run.EXTRA, section, list)
    few = [Perturbation("clean", lambda x, y, m: x), Perturbation("noise", lambda x, y, m: add_noise(x, .1), .1, "sd")]
    monkeypatch.setattr(single_run, "standard_perturbations", lambda: few)
    calls.clear()
    def start(one=(), two=(), **kwargs):
        monkeypatch.setitem(SECTIONS, "one", lambda: list(one)); monkeypatch.setitem(SECTIONS, "two", lambda: list(two))
        where = dict(data=tiny, results=tmp_path/"results", folder=tmp_path/"runs", device="cpu", say=lambda line: None)
        return run_sections(["one", "two"], "smoke", **{**where, **kwargs})
    return start

def planned(tmp_path, tiny, **kwargs):
    scale = SCALES["smoke"]
    return plan(["one", "two"], scale, describe_data(*scale_data(scale, tiny)), results=tmp_path/"results", folder=tmp_path/"runs", **kwargs)

def measured(record): return [{k: v for k, v in e.items() if k != "seconds"} for e in record["metrics"]["evaluation"]]


# each training once

def test_two_sections_share_a_training(go, tmp_path, tiny):
    a, b = net("a"), replace(net("b"), section="two")
    first, second = go([a], [b])
    assert len(calls) == 3 and (first["section"], second["section"]) == ("one", "two") and first["id"] != second["id"]
    assert measured(first) == measured(second) and first["metrics"]["history"] == second["metrics"]["history"]
    assert first["metrics"]["filters"] == second["metrics"]["filters"]

@pytest.mark.parametrize("change", [dict(training={"epochs": 2}), dict(stem="small"), dict(objective=partial(cross_entropy, label_smoothing=0.)),
                                    dict(boxes=True, objective=multi_task_loss)])
def test_another_training_is_not_shared(go, tmp_path, tiny, change):
    a = replace(net("a"), model="resnet18") if "stem" in change else net("a")
    go([a]); before = len(calls)
    records = go([a], [replace(a, section="two", name="b", **change)])
    assert len(records) == 2 and records[0]["metrics"]["filters"] != records[1]["metrics"]["filters"]
    assert len(calls) > before or "objective" in change

def test_another_seed_is_another_training(go):
    go([net("a")], [replace(net("b"), section="two")], seeds=[0, 1])
    assert len(calls) == 6

def test_a_training_whose_measurement_was_interrupted_is_not_repeated(go, tmp_path, monkeypatch):
    measure = single_run.evaluate
    monkeypatch.setattr(single_run, "evaluate", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): go([net("a")])
    assert load_records(tmp_path/"results") == [] and len(calls) == 3
    monkeypatch.setattr(single_run, "evaluate", measure)
    assert len(go([net("a")])) == 1 and len(calls) == 3

def test_a_network_is_found_under_the_name_of_another_section(go, tmp_path, tiny):
    go([net("a")])
    SECTIONS["two"] = lambda: [replace(net("b"), section="two")]
    about = describe_data(*scale_data(SCALES["smoke"], tiny))
    a, b = (trained_model(s, n, SCALES["smoke"], about, tmp_path/"runs") for s, n in (("one", "a"), ("two", "b")))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# the plan

def test_a_plan_says_what_is_left_and_trains_nothing(go, tmp_path, tiny, monkeypatch):
    for name, runs in dict(one=[net("a"), net("c", stem="imagenet", transform=None, length=2.)], two=[replace(net("b"), section="two")]).items():
        monkeypatch.setitem(SECTIONS, name, lambda runs=runs: runs)
    jobs = planned(tmp_path, tiny)
    assert [(j.run.name, j.status) for j in jobs] == [("a", "to train"), ("c", "to train"), ("b", "to measure")] and not calls
    assert all(math.isnan(j.seconds) for j in jobs) and not (tmp_path/"runs").exists()
    go([net("a")])
    monkeypatch.setitem(SECTIONS, "one", lambda: [net("a"), net("c", length=2.)])
    monkeypatch.setitem(SECTIONS, "two", lambda: [replace(net("b"), section="two")])
    jobs, record = planned(tmp_path, tiny), load_records(tmp_path/"results")[0]
    assert [j.status for j in jobs] == ["on record", "to train", "to measure"] and jobs[0].id == record["id"] # the network of a is there
    shutil.rmtree(tmp_path/"runs")
    assert [j.status for j in planned(tmp_path, tiny)] == ["on record", "to train", "to train"] # a record alone is no network
    assert [j.seconds for j in jobs] == [0, record["seconds"], pytest.approx(sum(e["seconds"] for e in record["metrics"]["evaluation"]))]
    assert show_plan(jobs).columns.tolist() == ["section", "run", "seed", "status", "minutes"] and len(show_plan(jobs)) == 3

def test_a_network_to_be_measured_waits_for_the_one_that_attacks_it(go, tmp_path, tiny, monkeypatch):
    source, target = replace(net("source"), training={"epochs": 2}), replace(net("target"), section="fgsm", sources=(("one", "source"),))
    monkeypatch.setitem(SECTIONS, "one", lambda: [source]); monkeypatch.setitem(SECTIONS, "fgsm", lambda: [target])
    status = lambda: [j.status for j in plan(["fgsm"], SCALES["smoke"], describe_data(*scale_data(SCALES["smoke"], tiny)),
                                             results=tmp_path/"results", folder=tmp_path/"runs")]
    go([source, replace(target, section="one", sources=())], names=["target"])
    assert status() == ["to train"], "the network of target is there, that of source is not"
    go([source], names=["source"])
    assert status() == ["to measure"]

def test_seeds_may_be_any_iterable(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(SECTIONS, "one", lambda: [net("a"), net("b")]); monkeypatch.setitem(SECTIONS, "two", list)
    assert [j.seed for j in planned(tmp_path, tiny, seeds=iter([0, 1]))] == [0, 1, 0, 1]

def test_a_plan_counts_the_trainings_that_others_need(go, tmp_path, tiny, monkeypatch):
    first, pooled = net("first"), Run("two", "pooled", members=(("one", "first"), ("one", "on")))
    on = replace(net("on"), start=("one", "first"), first="head", objective=cross_entropy)
    statuses = lambda *sections: [(j.run.name, j.status) for j in plan(list(sections), SCALES["smoke"], describe_data(*scale_data(SCALES["smoke"], tiny)),
                                                                       results=tmp_path/"results", folder=tmp_path/"runs")]
    monkeypatch.setitem(SECTIONS, "one", lambda: [first, on]); monkeypatch.setitem(SECTIONS, "two", lambda: [pooled])
    assert statuses("two") == [("pooled", "to train")] and statuses("one", "two") == [("first", "to train"), ("on", "to train"), ("pooled", "to measure")]
    go([first, on], [pooled], names=["first"])
    assert statuses("two") == [("pooled", "to train")] and statuses("one") == [("first", "on record"), ("on", "to train")]
    go([first, on], [pooled], names=["on"])
    assert statuses("two") == [("pooled", "to measure")]

def test_runs_with_boxes_are_left_out_of_images_without_any(go, tmp_path):
    from test_command_line import photos
    said, both = [], replace(net("both"), objective=multi_task_loss, boxes=True)
    assert [r["name"] for r in go([net("a"), both], data=photos(tmp_path/"photos"), say=said.append)] == ["a"]
    assert said[0] == "photos has no boxes: runs that learn them are left out" and said[1].startswith("[1/1]")

def test_members_that_cannot_be_measured_say_so(tiny):
    images, few, broken = load_tiny_imagenet(tiny, "val"), build_model(MODEL, 3).eval(), build_model(MODEL, 4).eval()
    clean = [Perturbation("clean", lambda x, y, m: x)]
    with pytest.raises(ValueError, match="members: few has 3 outputs, .* has 4 classes"): evaluate_together({"few": few}, {"all": ["few"]}, images, clean)
    with torch.no_grad(): broken.stage("head")[0].bias.fill_(math.nan)
    with pytest.raises(ValueError, match="perturbation 'clean': the outputs of all are not finite"):
        evaluate_together({"broken": broken}, {"all": ["broken"]}, images, clean)
    model = build_model(MODEL, 4).train()
    evaluate_together({"m": model}, {"all": ["m"]}, images, clean)
    assert model.training

def test_expectations_come_from_the_same_run_and_the_same_scale(go, tmp_path, tiny, monkeypatch):
    record, = go([net("a")])
    for i, (name, scale, seconds) in enumerate((("c", "smoke", 100.), ("c", "full", 9999.), ("d", "smoke", 300.))):
        append_record(tmp_path/"results"/"one.jsonl", {**record, "id": f"{i:016}", "name": name, "scale": scale, "seconds": seconds})
    monkeypatch.setitem(SECTIONS, "one", lambda: [net("c", length=2.), net("new", length=3.)])
    assert [j.seconds for j in planned(tmp_path, tiny)] == [100., np.median([record["seconds"], 100., 300.])]

def test_progress_tells_what_is_left(go):
    said = []
    go([net("a"), net("b", length=2.)], [replace(net("c"), section="two")], say=said.append)
    assert [s.split(",")[0] for s in said] == ["[1/3] one / a", "[2/3] one / b", "[3/3] two / c"]
    assert "; about 0 min left" in said[0] and said[2].endswith(" s")

def test_runs_are_chosen_by_name_or_by_section(go):
    a, b, c = net("a"), net("b", length=2.), replace(net("a"), section="two")
    assert [(r["section"], r["name"]) for r in go([a, b], [c], names=["a"])] == [("one", "a"), ("two", "a")]
    assert [(r["section"], r["name"]) for r in go([a, b], [c], names={"one": ("b",)})] == [("one", "b")]
    for names in (["d"], {"two": ("b",)}):
        with pytest.raises(ValueError, match="unknown run"): go([a, b], [c], names=names)

def test_the_demo_touches_every_section_by_names_that_exist():
    assert set(DEMO) == set(SECTIONS) - {"one", "two"}
    for section, names in DEMO.items(): assert set(names) <= {r.name for r in SECTIONS[section]()}

def test_what_a_demo_run_needs_comes_before_it():
    ready = set()
    for section in SECTIONS: # in this order
        for r in SECTIONS[section]():
            if r.name not in DEMO.get(section, ()): continue
            assert {*r.sources, *r.members, *([r.start] if r.start else [])} <= ready, r.name
            ready.add((section, r.name))


def test_records_stand_in_the_order_of_the_grids_and_what_is_in_none_comes_last():
    known = [dict(section=r.section, name=r.name, seed=s) for section in SECTIONS.values() for r in section() for s in (0, 1)]
    late, early = (dict(section="recipe", name="mine", seed=s) for s in (1, 0)) # no run of that section, which is the last
    other = [dict(section="mine", name=n, seed=s) for n, s in (("b", 1), ("a", 0))]
    assert in_order([other[0], late, *known[::-1], early, other[1]]) == [*known, late, early, *other] and in_order([]) == []

def test_the_order_asks_only_for_the_grids_of_these_records(monkeypatch):
    monkeypatch.setitem(SECTIONS, "baseline", lambda: [Run("baseline", "other"), Run("baseline", "plain")]) # which other grids build on
    monkeypatch.setitem(SECTIONS, "added", lambda: [Run("added", "b"), Run("added", "a")])
    records = [dict(section=s, name=n, seed=k) for s, n, k in (("added", "a", 0), ("added", "b", 1), ("added", "b", 0), ("baseline", "plain", 0))]
    assert in_order(records) == [records[k] for k in (3, 2, 1, 0)]

# what a record's id and a network's folder depend on

def test_another_network_to_build_on_makes_another_run(monkeypatch):
    scale, about = SCALES["smoke"], {"fingerprint": "f", "boxes": "b"}
    def of(base, **more):
        run = replace(net("on"), **{"start": (), **more})
        monkeypatch.setitem(SECTIONS, "one", lambda: [base, run])
        return identity(run, 0, scale, about)[1], single_run._home(run, 0, scale, about, ".")
    plain, longer, watched = net("base"), net("base", length=2.), replace(net("base"), watch=dict)
    m = (("one", "base"),)
    for more in ({"start": m[0], "first": "head"}, {"members": m}):
        (id, home), (other, elsewhere) = of(plain, **more), of(longer, **more)
        assert id != other and home != elsewhere and of(watched, **more) == (id, home), "a watch changes no network"
    (id, home), (other, same) = of(plain, sources=m), of(longer, sources=m)
    assert id != other and home == same, "who attacks it changes what is measured, not what is trained"
    assert of(plain) == of(longer)

def test_other_boxes_make_another_run_where_they_are_learnt():
    of = lambda run, boxes: (identity(run, 0, SCALES["smoke"], {"fingerprint": "f", "boxes": boxes})[1],
                             single_run._home(run, 0, SCALES["smoke"], {"fingerprint": "f", "boxes": boxes}, "."))
    assert of(net("a"), "x") == of(net("a"), "y")
    assert all(a != b for a, b in zip(of(net("a", boxes=True), "x"), of(net("a", boxes=True), "y"), strict=True))

def test_boxes_that_a_network_below_has_learnt_count_too(monkeypatch):
    below, above = net("below", boxes=True), [net("on", start=("one", "below"), first="head"), net("all", members=(("one", "below"),))]
    monkeypatch.setitem(SECTIONS, "one", lambda: [below, *above])
    for run in above: assert len({identity(run, 0, SCALES["smoke"], {"fingerprint": "f", "boxes": b})[1] for b in "xyx"}) == 2

def test_the_attackers_of_an_attacker_are_not_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(single_run, "ATTACKED", ("one",))
    first, second = net("first"), net("second", length=2., sources=(("one", "first"),))
    third = net("third", length=3., sources=(("one", "second"),))
    monkeypatch.setitem(SECTIONS, "one", lambda: [first, second, third])
    home = lambda run: single_run._home(run, 0, SCALES["smoke"], {"fingerprint": "f"}, tmp_path)
    needed = lambda run: single_run.lacking(run, 0, SCALES["smoke"], {"fingerprint": "f"}, tmp_path)
    assert needed(third) == {home(third), home(second)} and needed(second) == {home(second), home(first)} and needed(first) == {home(first)}

# ensembles

def test_ensembles_measured_together_are_left_to_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "lacking", lambda *args: set())
    runs = [Run("two", n, members=(("one", "a"),)) for n in "xyz"] + [net("alone")]
    jobs = {n: experiments.Job(r, 0, {}, n, "to measure", 1.) for n, r in zip([*"xyz", "alone"], runs, strict=True)}
    said = []; at = SimpleNamespace(scale=SCALES["smoke"], about={}, folder=tmp_path, say=said.append)
    left, lock = dict(jobs), FileLock(tmp_path/".locks"/"smoke-two-0.lock", timeout=0)
    free = experiments._alone(left, at, tmp_path)
    assert next(free) == {n: jobs[n] for n in "xyz"} and list(left) == ["alone"]
    with pytest.raises(Timeout): lock.acquire()
    assert list(next(free)) == ["alone"] and not left
    with lock: pass # nobody holds it any more
    assert list(free) == [] and said == []

def test_groups_measured_together_are_what_each_ensemble_says_alone(tiny):
    images = load_tiny_imagenet(tiny, "val")
    torch.manual_seed(0); members = {n: build_model(MODEL, 4).eval() for n in "abc"}
    groups = {"all": "abc", "two": "ab", "a": "a"}
    perturbations = [Perturbation("clean", lambda x, y, m: x), Perturbation("noise", lambda x, y, m: add_noise(x, .1), .1)]
    tables = evaluate_together(members, groups, images, perturbations, batch_size=5, precision="fp32", seed=3)
    for g, names in groups.items():
        alone = evaluate(Ensemble({n: members[n] for n in names}), images, perturbations, batch_size=5, precision="fp32", seed=3)
        assert [p.tolist() for p in tables[g].predicted] == [p.tolist() for p in alone.predicted]
        assert tables[g].drop(columns=["seconds", "hits", "predicted"]).equals(alone.drop(columns=["seconds", "hits", "predicted"]))

def test_an_ensemble_of_what_runs_left_is_measured_and_recorded(go, monkeypatch, tmp_path, tiny):
    a, b = net("a"), net("b", length=2.)
    groups = {"ensemble": ("a", "b"), "A": ("a",), "B": ("b",)}
    pooled = [Run("two", g, members=tuple(("one", n) for n in ns)) for g, ns in groups.items()]
    records = {r["name"]: r for r in go([a, b], pooled)}
    assert list(records) == ["a", "b", "ensemble", "A", "B"] and len(calls) == 3 + 6
    rows = {n: unpack(r["metrics"]["evaluation"]) for n, r in records.items()}
    for alone, n in (("A", "a"), ("B", "b")): # a member alone is what its own section measured
        for i in range(2): assert rows[alone].hits[i].tolist() == rows[n].hits[i].tolist()
        assert records[alone]["metrics"]["valid_accuracy"] == records[n]["metrics"]["valid_accuracy"]
    m = records["ensemble"]["metrics"]
    assert {"random signs", "FGSM"} <= set(rows["ensemble"].perturbation) and m["history"] == [] and 0 <= m["train_accuracy"] <= 100
    assert m["disagreement"]["one / a"]["one / b"] == m["disagreement"]["one / b"]["one / a"]
    assert records["A"]["metrics"]["disagreement"] == {"one / a": {"one / a": 0}}
    assert m["calibration"].keys() == {"temperature", "before", "after"}
    about = describe_data(*scale_data(SCALES["smoke"], tiny))
    members = [trained_model("one", n, SCALES["smoke"], about, tmp_path/"runs") for n in "ab"]
    valid = scale_data(SCALES["smoke"], tiny)[1]
    with torch.no_grad(): said = combine([f(valid.images/255) for f in members]).argmax(1)
    assert rows["ensemble"].correct[0] == int((said == valid.labels).sum())
    assert all(json.loads(json.dumps(r, allow_nan=False)) for r in records.values())
    assert records["ensemble"]["seconds"] == records["A"]["seconds"] == records["B"]["seconds"] > 0 # measured together
    before = len(calls); again = go([a, b], pooled)
    assert len(calls) == before and [r["id"] for r in again] == [r["id"] for r in records.values()]

def test_members_that_are_not_there_are_trained_without_a_record(go, tmp_path):
    said, pooled = [], Run("two", "ensemble", members=(("one", "a"), ("one", "b")))
    one, = go([net("a"), net("b", length=2.)], [pooled], names={"two": ("ensemble",)}, say=said.append)
    assert sum("its network is needed, and trained first" in s for s in said) == 2 and len(calls) == 3 + 6
    assert [r["name"] for r in load_records(tmp_path/"results")] == ["ensemble"]
    assert one["metrics"]["disagreement"]["one / a"]["one / a"] == 0 and set(one["metrics"]["disagreement"]) == {"one / a", "one / b"}

def test_where_attacks_are_measured_an_ensemble_is_attacked_and_certified_itself(go, monkeypatch):
    monkeypatch.setattr(single_run, "ATTACKED", ("two",)); monkeypatch.setitem(single_run.MEASURED, "two", single_run.MEASURED["robustness"])
    a, b = net("a"), net("b", length=2.)
    alone, pooled = replace(a, section="two"), Run("two", "ensemble", members=(("one", "a"), ("one", "b")))
    records = go([a, b], [alone, pooled])
    assert [r["name"] for r in records] == ["a", "b", "a", "ensemble"] and len(calls) == 3 + 6
    rows = [unpack(r["metrics"]["evaluation"]) for r in records]
    assert {"FGSM", "PGD-20", "strong attacks", "certified"} <= set(rows[2].perturbation) == set(rows[3].perturbation)
    assert rows[2].hits[0].tolist() == rows[0].hits[0].tolist() and records[2]["metrics"]["filters"] == records[0]["metrics"]["filters"]
    m = records[3]["metrics"]
    assert m["history"] == [] and "filters" not in m and m["valid_accuracy"] == rows[3].accuracy[0] and 0 <= m["train_accuracy"] <= 100

def test_all_that_claim_to_be_robust_are_held_against_the_same():
    runs = strongest()
    assert {r.section for r in runs} == {"robustness"} and "robustness" in single_run.ATTACKED and "robustness" in single_run.MEASURED
    assert {*KEPT, "baseline", "ensemble"} < {r.name for r in runs} and len({r.sources for r in runs}) == 1

def test_a_network_is_measured_once_however_many_sections_ask(go, monkeypatch):
    asked, real = [], single_run.evaluate
    monkeypatch.setattr(single_run, "evaluate", lambda model, images, perturbations, **how:
                        asked.append([p.name for p in perturbations]) or real(model, images, perturbations, **how))
    monkeypatch.setitem(single_run.EXTRA, "two", lambda: [Perturbation("black", lambda x, y, m: 0*x)])
    a, b = net("a"), replace(net("b"), section="two")
    first, second = go([a], [b])
    assert asked == [["clean", "noise"], ["black"]]
    assert measured(second)[:2] == measured(first) and [e["perturbation"] for e in second["metrics"]["evaluation"]] == ["clean", "noise", "black"]
    asked.clear(); go([replace(a, name="c")], seeds=[0, 1])
    assert asked == [["clean", "noise"]]*2, "another seed is another network"

def test_a_network_to_start_from_is_trained_first_and_not_twice(go):
    first = net("first")
    on = replace(net("on"), start=("one", "first"), first="head", objective=cross_entropy)
    records = go([first, on], names=["on"])
    assert [r["name"] for r in records] == ["on"] and len(calls) == 3
    assert [r["name"] for r in go([first, on])] == ["first", "on"] and len(calls) == 3
    assert records[0]["metrics"]["filters"] == go([first, on])[1]["metrics"]["filters"], "all but the head is that of the first"

def test_the_articles_ensemble_is_measured_with_each_member_and_without_it():
    runs = {r.name: r.members for r in together()}
    assert set(runs["ensemble"]) == set(KEPT.values()) and all(runs[n] == (m,) for n, m in KEPT.items())
    assert all(set(runs[f"without {n}"]) == set(KEPT.values()) - {m} for n, m in KEPT.items()) and len(runs) == 1 + 2*len(KEPT)
    for section, name in KEPT.values(): assert name in {r.name for r in SECTIONS[section]()}


# boxes

def test_boxes_are_learnt_and_measured(go, monkeypatch):
    monkeypatch.setitem(single_run.EXTRA, "one", affine_perturbations)
    monkeypatch.setitem(single_run.MEASURED, "one", single_run.MEASURED["multi_task"])
    drawn = make_synthetic(cache_folder()/"drawn", 6, 3, classes=2, size=32)
    monkeypatch.setattr(single_run, "drawn_images", lambda scale, seed: load_data(drawn))
    plain, both = net("baseline"), replace(net("multi-task"), objective=multi_task_loss, boxes=True)
    spoiled = replace(both, name="boxes shuffled 1", degraded=("shuffled", 1.))
    records = {r["name"]: r for r in go([plain, both, spoiled])}
    rows = {n: unpack(r["metrics"]["evaluation"]).perturbation.tolist() for n, r in records.items()}
    assert "box" in rows["multi-task"] and "box" not in rows["baseline"] and all(any(p.startswith("linear probe") for p in r) for r in rows.values())
    assert "boxes" not in records["baseline"]["metrics"] and records["multi-task"]["metrics"]["boxes"] == records["boxes shuffled 1"]["metrics"]["boxes"]
    assert records["multi-task"]["metrics"]["boxes"]["n"] == 12 and 0 <= records["multi-task"]["metrics"]["mean_iou"] <= 100
    assert records["multi-task"]["metrics"]["filters"] != records["boxes shuffled 1"]["metrics"]["filters"]
    t = box_table(list(records.values())).set_index("model")
    assert t.loc["baseline", "mean IoU"] == "" and float(t.loc["multi-task", "gap"]) == pytest.approx(
        records["multi-task"]["metrics"]["train_accuracy"] - records["multi-task"]["metrics"]["valid_accuracy"], abs=.06)

@pytest.mark.parametrize("content", ["garbage", "[]"])
def test_a_damaged_history_names_the_folder_to_remove(go, tmp_path, content):
    go([net("a")])
    (file := next((tmp_path/"runs").rglob("history.json"))).write_text(content)
    with pytest.raises(ValueError, match="history.json: .*remove the folder .* to train that network again"): go([net("a")], seeds=[0], results=tmp_path/"new")
    assert file.read_text() == content

def test_what_is_on_record_takes_no_lock(go, tmp_path, monkeypatch):
    records = go([net("a")])
    for module in (experiments, single_run): monkeypatch.setattr(module, "alone_with", None) # as where nothing can be written
    assert go([net("a")]) == records
