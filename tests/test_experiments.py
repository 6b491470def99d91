"""Grids of runs: statistics from records, and runs that are resumed, recorded once and skipped."""
import base64
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

from robustcv import experiments
from robustcv.core import SCALES, append_record, load_records
from robustcv.data import load_tiny_imagenet
from robustcv.evaluation import COLUMNS, standard_perturbations, unpack
from robustcv.experiments import (Run, baseline, by_name, caption, describe_data, draw_figures, filters, one_setting, pool,
                                  run_section, scale_data, table)
from robustcv.models import load_model
from robustcv.training import Training, cross_entropy
from robustcv.transforms import RandomHorizontalFlip

MODEL = "shufflenet_v2_x0_5"

def evaluation(hits, perturbation="clean", strength=None):
    packed = base64.b64encode(np.packbits(np.array(hits, bool)).tobytes()).decode()
    return dict(perturbation=perturbation, strength=strength, unit="", correct=sum(hits), n=len(hits), seconds=1., hits=packed)

def record(name="plain", seed=0, hits=(1, 0, 1, 1, 0, 0, 0, 0, 1, 1), training=80., scale="smoke", fingerprint="f", noise=(1, 0)):
    rows = [evaluation(hits), evaluation(noise, "noise", 0.15)]
    data = dict(name="synthetic", synthetic=True, fingerprint=fingerprint, classes=2, train=1000, valid=10, pixels=64)
    return dict(id=f"{name}{seed}", section="baseline", name=name, seed=seed, scale=scale, data=data, device="a CPU", commit="abc",
                metrics=dict(train_accuracy=training, valid_accuracy=50., evaluation=rows, history=[{"epoch": 1}, {"epoch": 2}]))


# from records

def test_records_of_one_setting_pass():
    records = [record(), record(seed=1), record("flip")]
    assert one_setting(records) == records and by_name(records) == {"plain": records[:2], "flip": records[2:]}

@pytest.mark.parametrize("other", [record(scale="full"), record(fingerprint="g")])
def test_records_of_several_settings_are_refused(other):
    for statistic in (one_setting, table, pool, caption):
        with pytest.raises(ValueError, match="records of 2 settings cannot share a statistic"): statistic([record(), other])

def test_no_records_are_refused():
    with pytest.raises(ValueError, match="no records: run the section first"): one_setting([])

def test_the_table_gives_mean_and_deviation_over_seeds():
    records = [record(training=80.), record(seed=1, hits=(1, 1, 1, 1, 1, 1, 1, 0, 0, 0), training=90., noise=(0, 0)),
        record("flip", noise=(1, 1))]
    rows = table(records, (("clean", None), ("noise", 0.15))).set_index("model")
    assert rows.loc["plain"].to_dict() == {"seeds": 2, "training": "85.0 ± 7.1", "clean": "60.0 ± 14.1", # 5 and 7 of 10
                                           "noise 0.15": "25.0 ± 35.4"}
    assert rows.loc["flip"].to_dict() == {"seeds": 1, "training": "80.0", "clean": "50.0", "noise 0.15": "100.0"}

def test_pooling_averages_seeds_and_takes_the_images_as_the_sample():
    one, two = unpack(record()["metrics"]["evaluation"]), [record(), record(seed=1)]
    rows = pool(two)  # a second seed that agrees on every image adds no information
    assert list(rows) == COLUMNS[:-1] and rows.n.equals(one.n) and np.allclose(rows.correct, one.correct)
    m, n = one.hits[0].mean(), one.n[0]
    half = norm.ppf(.975)*math.sqrt(m*(1 - m)/(n - 1))
    assert (rows.low[0]/100, rows.high[0]/100) == pytest.approx((max(0, m - half), min(1, m + half)))
    pd.testing.assert_frame_equal(pool([record()]), one)

def test_pooled_hits_are_the_share_of_seeds():
    flipped = [1 - int(h) for h in unpack(record()["metrics"]["evaluation"]).hits[0]]
    rows = pool([record(), record(seed=1, hits=flipped)])
    assert rows.hits[0].tolist() == [.5]*len(flipped) and rows.accuracy[0] == 50 and rows.low[0] == rows.high[0] == 50

def test_the_caption_says_what_a_figure_rests_on():
    said = caption([record(), record(seed=1)])
    for part in ("scale smoke", "no evidence about natural", "2 classes", "1,000 training images", "2 epochs", "n = 10", "2 seed(s)",
        "a CPU", "commit abc"):
        assert part in said


# data

@pytest.mark.parametrize("scale", ["lite", "full"])
def test_scales_that_need_real_images_ask_for_them(scale):
    with pytest.raises(ValueError, match=f"scale '{scale}' needs real images: give their folder"): scale_data(SCALES[scale])

def test_a_scale_takes_so_many_images_of_so_many_classes(tiny):
    scale = replace(SCALES["smoke"], classes=2, train_per_class=5, val_per_class=2)
    train, valid = scale_data(scale, tiny)
    assert (len(train), len(valid)) == (10, 4) and train.classes == valid.classes == ("apple", "striped balloon")
    whole = scale_data(SCALES["full"], tiny)
    assert [len(s) for s in whole] == [24, 12] and whole[0].fingerprint == load_tiny_imagenet(tiny, size=64).fingerprint

def test_without_a_folder_the_synthetic_set_is_drawn_once(tmp_path):
    scale = replace(SCALES["smoke"], classes=2, train_per_class=2, val_per_class=1)
    one, again = (scale_data(scale, cache=tmp_path) for _ in range(2))
    assert len(one[0]) == 4 and len(one[1]) == 2 and one[0].images.shape[2:] == (64, 64) and one[0].fingerprint == again[0].fingerprint
    about = describe_data(*one)
    assert about["synthetic"] and (about["name"], about["classes"], about["train"], about["valid"]) == ("synthetic-2x2+1/train", 2, 4, 2)
    assert about["fingerprint"] == f"{one[0].fingerprint}-{one[1].fingerprint}"

def test_real_images_are_not_called_synthetic(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path/"synthetic", ignore=shutil.ignore_patterns("synthetic.json"))
    about = describe_data(*scale_data(SCALES["full"], tmp_path/"synthetic"/"train"))
    assert not about["synthetic"] and about["name"] == "synthetic/train"


# runs

def test_a_run_s_settings_are_the_scale_s_unless_it_says_otherwise():
    run = Run("s", "n", training=dict(lr=0.5, keep="best"))
    assert run.settings(SCALES["lite"]) == Training(epochs=15, batch_size=64, lr=0.5, keep="best")

def test_the_baseline_is_plain_training_and_augmentation():
    assert {r.name for r in baseline()} == {"plain", "flip + crop"} and all(r.section == "baseline" for r in baseline())

calls, fail_at = [], []

def counted(model, batch, backward):
    "Cross-entropy that fails at the calls listed in `fail_at`."
    calls.append(1)
    if len(calls) in fail_at: raise KeyboardInterrupt
    return cross_entropy(model, batch)

@pytest.fixture
def go(tiny, tmp_path, monkeypatch):
    "Run the section `tiny` with given runs at a minute smoke scale; returns its records."
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], classes=2, train_per_class=6, val_per_class=3, batch_size=4, epochs=2))
    calls.clear(); fail_at.clear()
    def start(*runs, say=lambda line: None, **kwargs):
        monkeypatch.setitem(experiments.SECTIONS, "tiny", lambda: list(runs or [Run("tiny", "one run", MODEL, objective=counted)]))
        where = {"data": tiny, "results": tmp_path/"results", "folder": tmp_path/"runs", "device": "cpu"}
        return run_section("tiny", "smoke", say=say, **{**where, **kwargs})
    return start

def model_files(tmp_path): return sorted(f.name for f in (tmp_path/"runs").rglob("*") if f.is_file())

def test_a_run_is_recorded_once_and_then_skipped(go, tmp_path, tiny):
    said = []
    record, = go(say=said.append)
    assert len(calls) == 6 and go(say=said.append) == [record] and len(calls) == 6
    assert load_records(tmp_path/"results"/"tiny.jsonl") == [record] and (tmp_path/"results"/"tiny.jsonl").read_text().count("\n") == 1
    assert said[0].startswith("[1/1] tiny / one run, seed 0, scale smoke: validation") and said[1].endswith("on record") and len(said) == 2
    assert model_files(tmp_path) == ["best.safetensors", "model.safetensors"] # nothing to resume is left
    metrics = record["metrics"]
    assert record["config"]["run"]["objective"] == "counted" and record["data"]["classes"] == 2 and len(metrics["history"]) == 2
    assert metrics["valid_accuracy"] == metrics["history"][-1]["valid_accuracy"] and table([record]).shape == (1, 9)
    model = load_model(next((tmp_path/"runs").rglob("model.safetensors")))
    assert model.classes == ("apple", "striped balloon")
    torch.testing.assert_close(filters(record), model.net.conv1[0].weight.detach(), atol=1e-3, rtol=1e-3)
    names = [p.name for p in draw_figures([record], tmp_path/"figures", scale_data(SCALES["smoke"], tiny)[1])]
    assert names == [f"tiny-smoke-{n}.png" for n in ("curves", "perturbations", "filters", "examples")]
    assert all((tmp_path/"figures"/n).stat().st_size > 1000 for n in names)

def test_an_interrupted_run_is_continued(go, tmp_path):
    fail_at.append(5) # in the second of two epochs
    with pytest.raises(KeyboardInterrupt): go()
    assert load_records(tmp_path/"results") == [] and "state.pt" in model_files(tmp_path)
    record, = go()
    assert len(calls) == 5 + 3 and [h["epoch"] for h in record["metrics"]["history"]] == [1, 2]
    calls.clear(); fail_at.clear()
    whole, = go(results=tmp_path/"other results", folder=tmp_path/"other runs")
    assert record["metrics"]["filters"] == whole["metrics"]["filters"] and record["id"] == whole["id"]
    strip = lambda r: [{k: v for k, v in e.items() if k != "seconds"} for e in r["metrics"]["evaluation"]]
    assert strip(record) == strip(whole)

def test_a_failed_run_leaves_no_record_and_earlier_ones_stay(go, tmp_path):
    runs = [Run("tiny", "good", MODEL, training={"epochs": 1}), Run("tiny", "bad", MODEL, objective=counted)]
    fail_at.append(1)
    with pytest.raises(KeyboardInterrupt): go(*runs)
    assert [r["name"] for r in load_records(tmp_path/"results")] == ["good"]
    assert [r["name"] for r in go(*runs)] == ["good", "bad"]

def test_what_changes_a_run_makes_another_record(go):
    plain, flip = (Run("tiny", "a", MODEL, transform=t, training={"epochs": 1}) for t in (None, RandomHorizontalFlip()))
    ids = [r["id"] for runs, kwargs in (((plain,), {}), ((flip,), {}), ((plain,), {"seeds": [0, 1]})) for r in go(*runs, **kwargs)]
    assert len(ids) == 4 and len(set(ids)) == 3 and ids[0] == ids[2]

def test_only_records_of_this_scale_data_and_settings_are_returned(go, tmp_path):
    mine, = go(Run("tiny", "a", MODEL, training={"epochs": 1}))
    append_record(tmp_path/"results"/"tiny.jsonl", {**mine, "id": "f"*16, "scale": "full"})
    assert go(Run("tiny", "a", MODEL, training={"epochs": 1})) == [mine]

def test_a_record_is_strict_json(go, tmp_path):
    go(Run("tiny", "a", MODEL, training={"epochs": 1}))
    line = (tmp_path/"results"/"tiny.jsonl").read_text()
    json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} in a record"))
    assert pd.DataFrame(json.loads(line)["metrics"]["evaluation"]).n.tolist() == [6]*len(standard_perturbations())

@pytest.mark.parametrize("section, scale, said", [("baselin", "smoke", "unknown section 'baselin': did you mean 'baseline'"),
                                                  ("baseline", "smok", "unknown scale 'smok': did you mean 'smoke'")])
def test_a_misspelt_name_is_answered_with_the_right_one(section, scale, said, tmp_path):
    with pytest.raises(ValueError, match=said): run_section(section, scale, results=tmp_path)
    assert not list(tmp_path.iterdir())


def test_drawn_images_are_labelled_wherever_they_lie(tmp_path):
    from robustcv.synthetic import make_synthetic
    root = make_synthetic(tmp_path / "photos", 4, 2, classes=2, size=64)
    about = describe_data(*scale_data(SCALES["lite"], root))
    assert about["synthetic"] and about["name"] == "photos/train"


def test_two_settings_of_one_run_do_not_count_as_seeds():
    again = {**record(), "id": "other"}
    for statistic in (table, pool, caption):
        with pytest.raises(ValueError, match="run 'plain', seed 0, is on record with several settings"): statistic([record(), again])


def test_a_run_that_keeps_its_best_weights_records_their_accuracy(tmp_path, tiny):
    scale = replace(SCALES["smoke"], classes=None, train_per_class=None, val_per_class=None, epochs=4, batch_size=8, lr=0.05)
    run = Run("s", "n", model=MODEL, training=dict(keep="best", precision="fp32"))
    train, valid = scale_data(scale, tiny)
    metrics = experiments.train_run(run, scale, train, valid, 0, torch.device("cpu"), tmp_path)
    assert metrics["valid_accuracy"] == max(h["valid_accuracy"] for h in metrics["history"])
