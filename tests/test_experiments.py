"""Grids of runs: statistics from records, and runs that are resumed, recorded once and skipped."""
import base64
import json
import math
import multiprocessing
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from scipy.stats import norm

from robustcv import experiments, single_run
from robustcv.core import SCALES, append_record, describe, load_records, model_colors
from robustcv.data import load_tiny_imagenet
from robustcv.perturbations import ORBIT, Perturbation, standard_perturbations
from robustcv.evaluation import COLUMNS, unpack, wilson
from robustcv.experiments import run_section
from robustcv.grids import Run
from robustcv.single_run import describe_data, scale_data
from robustcv.tables import by_name, caption, corruption_table, member_table, filters, markdown, one_setting, orientation_table, pool, table
from robustcv.figures import (draw_figures, plot_attacks, plot_corruptions, plot_cost, plot_degraded, plot_fields, plot_occlusion, plot_orientations,
                              plot_runs, plot_selectivity, plot_trade_off, plot_watched)
from robustcv.model_figures import draw_models, plot_example, plot_response
from robustcv.grids import baseline
from robustcv.models import build_model, load_model
from robustcv.multi_task import multi_task_loss
from robustcv.training import Training, cross_entropy
from robustcv.transforms import RandomHorizontalFlip

MODEL = "shufflenet_v2_x0_5"

def evaluation(hits, perturbation="clean", strength=None):
    packed = base64.b64encode(np.packbits(np.array(hits, bool)).tobytes()).decode()
    return dict(perturbation=perturbation, strength=strength, unit="", correct=sum(hits), n=len(hits), seconds=1., hits=packed)

FILTERS = dict(shape=[4, 3, 3, 3], float16=base64.b64encode(np.linspace(-1, 1, 108).astype("<f2").tobytes()).decode())

def record(name="plain", seed=0, hits=(1, 0, 1, 1, 0, 0, 0, 0, 1, 1), training=80., scale="smoke", fingerprint="f", noise=(1, 0),
           section="baseline", under=()):
    rows = [evaluation(hits), evaluation(noise, "noise", 0.15), *[evaluation(h, *p) for p, h in dict(under).items()]]
    history = [dict(epoch=e, train_loss=1., train_accuracy=training, valid_loss=1., valid_accuracy=50., images_per_second=9.) for e in (1, 2)]
    data = dict(name="synthetic", synthetic=True, fingerprint=fingerprint, classes=2, train=1000, valid=10, pixels=64)
    return dict(id=f"{name}{seed}", section=section, name=name, seed=seed, scale=scale, data=data, device="a CPU", commit="abc",
                metrics=dict(train_accuracy=training, valid_accuracy=50., evaluation=rows, history=history, filters=FILTERS))

def few(k): return [1]*k + [0]*(10 - k)


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
    m, n = (one.hits[0].sum() + 1)/(one.n[0] + 2), one.n[0] + 2 # one more at either end
    half = norm.ppf(.975)*math.sqrt(m*(1 - m)/n)
    assert (rows.low[0]/100, rows.high[0]/100) == pytest.approx((max(0, m - half), min(1, m + half)))
    pd.testing.assert_frame_equal(pool([record()]), one)

def test_pooled_hits_are_the_share_of_seeds():
    flipped = [1 - int(h) for h in unpack(record()["metrics"]["evaluation"]).hits[0]]
    rows = pool([record(), record(seed=1, hits=flipped)])
    assert rows.hits[0].tolist() == [.5]*len(flipped) and rows.accuracy[0] == 50 and 30 < rows.low[0] < 45 and 55 < rows.high[0] < 70

def test_intervals_have_a_width_even_where_all_seeds_agree_on_all_images():
    for hits in ([0]*10, [1]*10):
        rows = pool([record(hits=hits), record(seed=1, hits=hits)])
        assert rows.low[0] <= rows.accuracy[0] <= rows.high[0] and rows.high[0] - rows.low[0] > 5

def test_rows_are_pooled_by_their_perturbation_wherever_they_stand():
    one, two = record(), record(seed=1)
    two["metrics"]["evaluation"] = two["metrics"]["evaluation"][::-1]
    pd.testing.assert_frame_equal(pool([one, two]), pool([one, record(seed=1)]))
    two["metrics"]["evaluation"] = two["metrics"]["evaluation"][1:]
    assert len(pool([one, two])) == len(pool([one])) - 1

def test_a_bar_in_a_cell_is_no_end_of_the_cell():
    lines = markdown(pd.DataFrame([{"a": "x | y", "b": 1}])).split("\n")
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {3}

def test_the_caption_says_what_a_figure_rests_on():
    said = caption([record(), record(seed=1)])
    for part in ("scale smoke", "no evidence about natural", "2 classes", "1,000 training images", "2 epochs", "n = 10", "2 seeds",
        "a CPU", "commit abc"):
        assert part in said

def test_the_caption_says_how_wide_intervals_are_and_what_was_measured_on_fewer_images():
    some = record(noise=few(3), under={("PGD-20", .2): few(2)[:5], ("certified", .09): few(1)[:5], ("strong attacks", .2): few(1)[:2]})
    (low, high), (few_low, few_high) = wilson(5, 10), wilson(2, 5)
    said = caption([some])
    assert f"n = 10 validation images (95 % interval of an accuracy: ± {50*(high - low):.1f} points at most; " in said
    assert f"; PGD-20, certified: n = 5, ± {50*(few_high - few_low):.1f}; strong attacks: n = 2, ± " in said

def test_the_caption_counts_the_seeds_of_a_section_s_run_and_orders_epochs_as_numbers():
    records = [{**record(seed=s), "section": section, "commit": f"{s}{section}"} for section in ("one", "two") for s in range(2)]
    for r, n in zip(records, (15, 4, 30, 4), strict=True): r["metrics"] = {**r["metrics"], "history": [{}]*n}
    assert all(part in caption(records) for part in (", 4, 15 or 30 epochs;", "; 2 seeds;", "; 4 commits"))
    assert "; 1 seed;" in caption(records[:1]) and "; 1 to 2 seeds;" in caption(records[:3])


# figures

def points(ax): return [c.lines for c in ax.containers if hasattr(c, "has_xerr")]

def test_runs_are_drawn_with_their_intervals_and_their_training_accuracy():
    runs = [("plain", 0, 4, 90.), ("jitter", 0, 6, 70.), ("E", 0, 3, 80.), ("E", 1, 5, 60.)]
    records = [record(n, seed, few(k), training, under={("noise", .3): few(k - 1)}) for n, seed, k, training in runs]
    ax, pooled = plot_runs(records), {n: pool(rs) for n, rs in by_name(records).items()}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["plain", "jitter", "E"]
    for row, (perturbation, accuracy) in enumerate(((("clean", None), [40, 60, 40]), (("noise", .15), [50]*3), (("noise", .3), [30, 50, 30]))):
        drawn, rows = points(plot_runs(records, perturbation)), [t.iloc[row] for t in pooled.values()]
        assert [float(p.get_xdata()[0]) for p, _, _ in drawn] == [r.accuracy for r in rows] == pytest.approx(accuracy)
        assert [tuple(bar.get_segments()[0][:, 0]) for _, _, (bar,) in drawn] == [pytest.approx((r.low, r.high)) for r in rows]
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert [line.get_xdata()[0] for line in hollow] == [90, 70, 70] and [p.get_color() for p, _, _ in points(ax)] == [".5", "C0", "C1"]
    assert "dotted: plain" in ax.get_title() and "clean" in ax.get_title() and ax.yaxis_inverted()

def jittered():
    names = {"baseline": 5, "contrast 5": 2, "contrast 0.1": 6, "contrast 0.8": 7, "brightness 2": 3, "saturation 0.4": 8, "hue 0.05": 4,
             "hue 0.5": 1, "rotation": 9}
    return [record(n, hits=few(k), training=10.*k + 5, section="color_jitter") for n, k in names.items()]

def test_fields_are_drawn_from_the_baseline_to_the_greatest_strength():
    axes = plot_fields(jittered())
    drawn = {below.get_xlabel(): [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in (below.containers[0].lines[0], above.lines[0])]
             for above, below in axes.T}
    strengths = {"contrast jitter": [0, .1, .8, 5], "brightness jitter": [0, 2], "saturation jitter": [0, .4], "hue jitter": [0, .05, .5]}
    accuracy = dict(zip(strengths, ([50, 60, 70, 20], [50, 30], [50, 80], [50, 40, 10]), strict=True))
    assert drawn == {f: [(v, accuracy[f]), (v, [a + 5 for a in accuracy[f]])] for f, v in strengths.items()}

def places(start, sides=(.25, .5)): # accuracy in tens of points by place
    grid = (.25, .25), (.25, .75), (.75, .25), (.75, .75)
    return {(f"occlusion at {r}, {c}", s): few(start + k) for s in sides for k, (r, c) in enumerate(grid)}

def erased(): return [record(n, hits=few(5), under=places(k), section="random_erase") for n, k in (("baseline", 1), ("E", 4), ("FE", 2), ("FCE", 3))]

def test_occlusion_is_drawn_where_it_was_and_beside_its_gain():
    fig = plot_occlusion(erased(), ("baseline", "FE", "E"))
    maps = [ax.collections[0].get_array().reshape(2, 2).tolist() for ax in fig.axes]
    assert [ax.get_title() for ax in fig.axes] == [f"{n}, side {s}" for s in (.25, .5) for n in ("baseline", "FE", "E", "E − baseline (points)")]
    baseline, fe, e, gain = [[10, 20], [30, 40]], [[20, 30], [40, 50]], [[40, 50], [60, 70]], [[30, 30], [30, 30]] # down, right
    assert maps == [baseline, fe, e, gain]*2

def attacked():
    under = {(n, e): few(round(9 - k - 10*e)) for k, n in enumerate(("random signs", "FGSM from a", "FGSM")) for e in (.05, .2, .4)}
    records = [record(n, hits=few(9), under=under | {("PGD-20", .2): few(2)[:5]}, section="fgsm") for n in ("DenseNet-121", "ResNet-18")]
    for r in records:
        for e in r["metrics"]["evaluation"][2:]: e["unit"] = "ε, normalised"
        for h in r["metrics"]["history"]: h["pgd_accuracy"] = 10.*h["epoch"]
    return records

def mixed():
    "An ensemble, which has no history, a network that was not watched, and one that was."
    records = attacked() + [{**attacked()[0], "name": "ensemble"}]
    records[2]["metrics"]["history"] = []
    for h in records[0]["metrics"]["history"]: del h["pgd_accuracy"]
    return records[::-1]

def test_attacks_are_drawn_from_clean_accuracy_to_the_greatest_radius():
    fig = plot_attacks(attacked())
    for ax, name in zip(fig.axes, ("DenseNet-121", "ResNet-18"), strict=True):
        lines = {c.get_label(): c.lines[0].get_xydata() for c in ax.containers}
        assert ax.get_title() == name and list(lines) == ["random signs", "FGSM from a", "FGSM", "PGD-20, ε = 0.2"]
        assert lines["FGSM"].tolist() == [[0, 90], [.05, 60], [.2, 50], [.4, 30]] and lines["PGD-20, ε = 0.2"].tolist() == [[.2, 40]]
    assert len(plot_attacks(attacked(), ["ResNet-18"]).axes) == 1

def test_pictures_do_not_depend_on_the_order_in_which_records_were_written(tmp_path):
    records = [{**r, "name": n, "section": "baseline"} for r, n in zip(attacked(), ("flip + crop", "plain"), strict=True)]
    one, other = draw_figures(records, tmp_path/"one"), draw_figures(records[::-1], tmp_path/"other")
    assert [f.name for f in one] == [f.name for f in other] and [f.read_bytes() for f in one] == [f.read_bytes() for f in other]

def test_attacks_of_one_radius_stand_side_by_side():
    records = attacked()
    for r in records: r["metrics"]["evaluation"].append({**r["metrics"]["evaluation"][-1], "perturbation": "strong attacks"})
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in plot_attacks(records).axes[0].containers}
    assert [lines[f"{kind}, ε = 0.2"] for kind in ("PGD-20", "strong attacks")] == [[pytest.approx((e, 40))] for e in (.192, .208)]
    assert lines["FGSM"][1] == [.05, 60]

def test_what_was_watched_is_drawn_over_the_training():
    ax = plot_watched(attacked())
    assert [line.get_xydata().tolist() for line in ax.lines[:2]] == [[[.5, 10], [1, 20]], [[.5, 50], [1, 50]]] and len(ax.lines) == 4

def test_the_illustration_shows_image_sign_and_sum():
    torch.manual_seed(0); model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    x = torch.rand(2, 3, 8, 8)*.5 + .25
    fig = plot_example(model, x, torch.tensor([0, 1]), ("apple, red", "kite"))
    shown = [ax.images[0].get_array() for ax in fig.axes if ax.images]
    titles = [ax.get_title() for ax in fig.axes if ax.images]
    assert len(shown) == 6 and titles[1] == "+ 0.2 · sign of the gradient" and titles[2].startswith("= ") and titles[0].endswith(" %")
    assert set(np.unique(np.round(np.asarray(shown[1], float)/np.asarray(shown[1]).max(), 2))) == {0., 1.}, "the sign, at full scale"

def orbit(k): return {p: few(k - i) for i, p in enumerate(ORBIT[1:])}

def turned_records():
    return [record(n, hits=few(9), under=orbit(k) | {("same in all orientations", None): few(2), ("symmetrized", None): few(k)}, section="symmetry")
            for n, k in (("baseline", 7), ("all", 8))]

def test_eight_bars_a_model_and_what_averaging_gains():
    bars = plot_orientations(turned_records()).containers
    heights = [[b.get_height() for b in c] for c in bars if hasattr(c, "patches")]
    assert heights == [[90, 90], *[[10*(7 - i), 10*(8 - i)] for i in range(7)]]
    lines = [line.get_ydata().tolist() for line in plot_cost(turned_records()).lines if len(line.get_xdata()) == 2]
    assert [pytest.approx(v) for v in lines] == [[(90 + sum(range(10, 80, 10)))/8, 70], [(90 + sum(range(20, 90, 10)))/8, 80]]

def test_runs_with_the_same_filters_share_a_line():
    other = record("other", section="symmetry")
    other["metrics"]["filters"] = {**FILTERS, "float16": base64.b64encode(np.ones(108).astype("<f2").tobytes()).decode()}
    labels = [line.get_label() for line in plot_selectivity([*turned_records(), other]).lines]
    assert labels == ["baseline, all", "other", "random"]
    again = {**other, "name": "baseline", "seed": other["seed"] + 1, "id": "again"}
    assert [line.get_label() for line in plot_selectivity([*turned_records(), other, again]).lines] == labels, "a second seed of some makes no difference"

def noisy_records():
    corrupted = {(f"corruption: {kind}", s): few(6 - s) for kind in ("jpeg", "pixelate") for s in (1, 3)}
    return [record(n, hits=few(9), under={("noise, article", .1): few(k), ("noise, article", .4): few(1), ("certified", 0.): few(4),
                                          ("certified", .1): few(2)} | corrupted, section="stability")
            for n, k in (("baseline", 5), ("α = 1", 7))]

def test_the_trade_off_is_clean_accuracy_against_noise_and_corruptions_are_averaged_over_severities():
    ax = plot_trade_off(noisy_records())
    assert [c.lines[0].get_xydata().tolist() for c in ax.containers] == [[[90, 50]], [[90, 70]]]
    shown = plot_corruptions(noisy_records()).collections[0].get_array().reshape(2, 3).tolist()
    assert shown == [[90, 40, 40]]*2

def test_corruptions_in_two_numbers():
    a, b = noisy_records()
    b["metrics"]["evaluation"] = [dict(e, **{k: evaluation(few(8))[k] for k in ("hits", "correct")}) if e["perturbation"] == "corruption: jpeg" else e
                                  for e in b["metrics"]["evaluation"]]
    t = corruption_table([a, b]).set_index("model")
    right = np.mean([few(5), few(3)], 0)
    assert t.loc["baseline"].to_list() == ["90.0", f"40.0 ({40 - (half := 100*1.959964*right.std(ddof=1)/10**.5):.1f} to {40 + half:.1f})", "100"]
    assert t.loc["α = 1", "mean corruption accuracy"].startswith("60.0 (") and t.loc["α = 1", "mean corruption error"] == f"{(100*20/60 + 100)/2:.0f}"
    with pytest.raises(ValueError, match="baseline='none': is not on record; there are baseline, α = 1"): corruption_table([a, b], "none")

def test_the_table_of_orientations_is_about_the_whole_orbit():
    again = record("baseline", 1, few(7), 70., under=orbit(7) | {("same in all orientations", None): few(4), ("symmetrized", None): few(9)}, section="symmetry")
    t = orientation_table([*turned_records(), again]).set_index("model")
    assert t.loc["all"].to_list() == [1, "80.0", "90.0", f"{(90 + sum(range(20, 90, 10)))/8:.1f}", "20.0", "80.0"]
    assert t.loc["baseline"].to_list() == [2, "75.0 ± 7.1", "80.0 ± 14.1", "45.0 ± 1.8", "30.0 ± 14.1", "80.0 ± 14.1"]

def test_many_networks_are_drawn_in_rows_of_four():
    panels = plot_attacks([{**attacked()[0], "name": f"net {i}"} for i in range(6)]).axes
    assert [ax.get_title() for ax in panels] == [f"net {i}" for i in range(6)] and len({ax.get_subplotspec().rowspan.start for ax in panels}) == 2

def test_a_response_that_does_not_vary_is_said_to_be_constant():
    torch.manual_seed(0); model = build_model(MODEL, 2).eval()
    fig = plot_response({"net": model}, torch.full((2, 3, 32, 32), .5), "layer4" if "layer4" in model.stages else list(model.stages)[-2], range(0, 360, 90))
    assert fig.axes[0].get_title() == "net\nvariation 0 %"

def figure_names(records, folder):
    paths = draw_figures(records, folder)
    assert all(p.stat().st_size > 300 for p in paths) and sorted(paths) == sorted(folder.iterdir())
    return [p.name.removeprefix(f"{records[0]['section']}-smoke-").removesuffix(".png") for p in paths]

@pytest.mark.parametrize("records, expected", [
    ([record(), record(seed=1), record("flip + crop")], ["curves", "perturbations", "filters"]), ([record(n) for n in "abcd"], ["runs", "filters"]),
    (jittered(), ["runs", "fields"]), (jittered()[:3], ["curves", "perturbations", "fields"]),
    (jittered()[1:2], ["curves", "perturbations", "fields"]),
    (attacked(), ["curves", "perturbations", "attacks", "watched"]), (mixed(), ["curves", "perturbations", "attacks", "watched"]),
    (erased(), ["runs", "occlusion"]), (erased()[1:3], ["curves", "perturbations"]),
    (turned_records(), ["curves", "perturbations", "orientations", "cost", "selectivity", "filters"]),
    (noisy_records(), ["curves", "perturbations", "trade-off", "corruptions", "noise", "certified"])],
    ids=["baseline", "many runs", "jitter", "some jitter", "jitter without a baseline", "attacks", "attacks, some unwatched or without a history",
         "erase", "erase without a baseline",
         "symmetry", "stability"])
def test_every_section_has_its_figures(records, expected, tmp_path): assert figure_names(records, tmp_path/"figures") == expected


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
    assert run.settings(SCALES["lite-pretrained"]).lr == .05 and Run("s", "n").settings(SCALES["lite-pretrained"]).lr == .01

def test_the_baseline_is_plain_training_and_augmentation():
    assert {r.name for r in baseline()} == {"plain", "flip + crop"} and all(r.section == "baseline" for r in baseline())

@pytest.mark.parametrize("section", experiments.SECTIONS)
def test_the_runs_of_a_section_have_names_and_settings_of_their_own(section):
    runs = experiments.SECTIONS[section]()
    assert len({r.name for r in runs}) == len(runs) == len({json.dumps(describe(replace(r, name="")), sort_keys=True) for r in runs})
    assert all(r.section == section for r in runs)
    assert any(r.objective is cross_entropy for r in runs), "one has none of the section's objectives"

@pytest.mark.parametrize("section", ["adversarial_training", "stability", "symmetry", "multi_task", "recipe"]) # whose curves share a picture
def test_each_network_of_a_section_has_a_colour_of_its_own(section):
    colors = model_colors([r.name for r in experiments.SECTIONS[section]()])
    assert len(set(colors.values())) == len(colors)

AUGMENTED = [r for section in experiments.SECTIONS.values() for r in section() if r.transform is not None]

@pytest.mark.parametrize("run", AUGMENTED, ids=lambda r: f"{r.section}: {r.name}")
def test_the_transforms_of_the_runs_keep_size_and_range_and_repeat(run):
    x, go = torch.rand(6, 3, 64, 64), lambda seed: run.transform(x, torch.Generator().manual_seed(seed))
    y = go(1)
    assert y.shape == x.shape and y.min() >= -1e-6 and y.max() <= 1 + 1e-6 and torch.equal(y, go(1))
    assert any(not torch.equal(z, x) for z in (y, go(2), go(3)))

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

def model_files(tmp_path): return sorted(f.name for f in (tmp_path/"runs").rglob("*") if f.is_file() and f.suffix != ".lock")

def test_a_run_is_recorded_once_and_then_skipped(go, tmp_path, tiny):
    said = []
    record, = go(say=said.append)
    assert len(calls) == 6 and go(say=said.append) == [record] and len(calls) == 6
    assert load_records(tmp_path/"results"/"tiny-smoke.jsonl") == [record] and (tmp_path/"results"/"tiny-smoke.jsonl").read_text().count("\n") == 1
    assert said[0].startswith("[1/1] tiny / one run, seed 0, scale smoke: validation") and said[1].endswith("on record") and len(said) == 2
    assert model_files(tmp_path) == ["best.safetensors", "history.json", "model.safetensors"] # nothing to resume is left
    metrics = record["metrics"]
    assert record["config"]["run"]["objective"] == "counted" and record["data"]["classes"] == 2 and len(metrics["history"]) == 2
    assert metrics["valid_accuracy"] == metrics["history"][-1]["valid_accuracy"] and table([record]).shape == (1, 9)
    model = load_model(next((tmp_path/"runs").rglob("model.safetensors")))
    assert model.classes == ("apple", "striped balloon")
    torch.testing.assert_close(filters(record), model.net.conv1[0].weight.detach(), atol=1e-3, rtol=1e-3)
    names = [p.name for p in draw_figures([record], tmp_path/"figures")]
    assert names == [f"tiny-smoke-{n}.png" for n in ("curves", "perturbations")]
    assert all((tmp_path/"figures"/n).stat().st_size > 1000 for n in names)

# several processes with the same folders

TWO = [Run("tiny", "first", MODEL, objective=counted), Run("tiny", "second", MODEL, transform=RandomHorizontalFlip(), objective=counted)]

@pytest.mark.parametrize("finished", [True, False])
def test_what_another_process_is_at_is_left_to_it_and_done_if_it_dies(go, tmp_path, finished):
    first, _ = go(*TWO, results=tmp_path/"other", folder=tmp_path/"other runs"); calls.clear()
    lock, said = FileLock(tmp_path/"results"/".locks"/f"{first['id']}.lock"), []
    (tmp_path/"results"/".locks").mkdir(parents=True); lock.acquire()
    def say(line):
        said.append(line)
        if "second" not in line: return
        if finished: append_record(tmp_path/"results"/"tiny-smoke.jsonl", first)
        lock.release()
    records = go(*TWO, say=say)
    assert said[0].startswith("[1/2]") and said[0].endswith("another process is at it") and said[1].startswith("[2/2]") and "validation" in said[1]
    assert said[2].startswith("[1/2]") and (said[2].endswith("on record") if finished else "validation" in said[2]) and len(said) == 3
    assert len(calls) == (6 if finished else 12) and {r["name"] for r in records} == {"first", "second"}

def test_a_run_whose_network_another_process_trains_comes_last(go, tmp_path):
    first, _ = go(*TWO, results=tmp_path/"other", folder=tmp_path/"other runs")
    home, said = single_run._home(TWO[0], 0, SCALES["smoke"], first["data"], tmp_path/"runs"), []
    single_run._lock(home).parent.mkdir(parents=True)
    lock = FileLock(f"{single_run._lock(home)}.lock"); lock.acquire()
    def say(line):
        said.append(line)
        if "second" in line: lock.release()
    go(*TWO, say=say)
    assert said[0] == "[1/2] tiny / first, seed 0, scale smoke: another process trains a network for it"
    assert [line[:5] for line in said[1:]] == ["[2/2]", "[1/2]"] and all("validation" in line for line in said[1:])

@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_processes_started_one_by_one_do_nothing_twice(go, tmp_path):
    context = multiprocessing.get_context("fork"); out = context.Queue()
    def work(): ids = [r["id"] for r in go(*TWO)]; out.put((len(calls), ids))
    crowd = [context.Process(target=work) for _ in range(3)]
    for p in crowd: p.start()
    found = [out.get(timeout=120) for _ in crowd]
    for p in crowd: p.join(60)
    assert sum(n for n, _ in found) == 12 and len({tuple(sorted(ids)) for _, ids in found}) == 1
    assert (tmp_path/"results"/"tiny-smoke.jsonl").read_text().count("\n") == 2

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

def test_runs_can_be_chosen_by_name(go, tmp_path, monkeypatch):
    monkeypatch.setitem(single_run.EXTRA, "tiny", lambda: [Perturbation("black", lambda x, y, m: 0*x, 1., "all")])
    runs, said = [Run("tiny", n, MODEL, training={"epochs": 1}) for n in "abc"], []
    one, = go(*runs, names=["b"], say=said.append)
    assert one["name"] == "b" and said[0].startswith("[1/1] tiny / b")
    measured = [e["perturbation"] for e in one["metrics"]["evaluation"]]
    assert measured == [p.name for p in standard_perturbations()] + ["black"], "a section may measure more"
    assert [r["name"] for r in go(*runs, names=["c", "b"])] == ["b", "c"] == [r["name"] for r in load_records(tmp_path/"results")]
    for names in (["d"], ["b", "d"]):
        with pytest.raises(ValueError, match="unknown run 'd'.*valid: a, b, c"): go(*runs, names=names)
    assert go(*runs, names=[]) == [] and len(load_records(tmp_path/"results")) == 2

def test_a_run_is_measured_on_examples_of_its_source_which_is_trained_if_need_be(go, tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(single_run, "ATTACKED", ("tiny",))
    source, target = (Run("tiny", n, MODEL, training={"epochs": e}, sources=s) for n, e, s in (("source", 1, ()), ("target", 2, (("tiny", "source"),))))
    said = []
    first, = go(source, target, names=["target"], say=said.append)
    assert "tiny / source, seed 0: its network is needed, and trained first" in said and [r["name"] for r in load_records(tmp_path/"results")] == ["target"]
    alone, lent = go(source, target) # in the order of the grid
    assert lent == first
    own, more = ({e["perturbation"] for e in r["metrics"]["evaluation"]} for r in (alone, lent))
    assert {"random signs", "FGSM", "PGD-20", "strong attacks"} <= own and more - own == {"FGSM from source"}

def test_pictures_of_models_are_drawn_from_what_a_run_left(go, tmp_path, monkeypatch, tiny):
    go(Run("tiny", "net", MODEL, training={"epochs": 1}), Run("tiny", "boxes", MODEL, objective=multi_task_loss, boxes=True, training={"epochs": 1}))
    left = single_run.trained_model
    there = lambda section, name, **more: left("tiny", "boxes" if section == "multi_task" else "net", **more)
    monkeypatch.setattr("robustcv.model_figures.trained_model", there)
    few = lambda models, images: plot_response(models, images[:2], list(models["all"].stages)[-2], (0, 90))
    monkeypatch.setattr("robustcv.model_figures.plot_response", few)
    with pytest.warns(UserWarning, match="multi_task-smoke-worst is left out: .* has fewer than 8 boxes of each defect"): # drawn images have none
        files = draw_models(SCALES["smoke"], tiny, tmp_path/"runs", tmp_path/"figures")
    names = ("baseline-smoke-examples", "fgsm-smoke-example", "symmetry-smoke-response", "multi_task-smoke-boxes")
    assert files == [tmp_path/"figures"/f"{n}.png" for n in names] and all(f.stat().st_size > 1000 for f in files)

def test_pictures_whose_networks_are_not_there_are_left_out_with_a_warning(tmp_path, tiny):
    with pytest.warns(UserWarning, match="fgsm-smoke-example is left out: .*is not there; `robustcv run fgsm --only 'ResNet-18'"):
        files = draw_models(SCALES["smoke"], tiny, tmp_path/"runs", tmp_path/"figures")
    assert [f.name for f in files] == ["baseline-smoke-examples.png"] and files == list((tmp_path/"figures").iterdir())

def test_accuracy_and_gap_are_drawn_by_the_quality_of_the_boxes():
    records = [record(n, hits=few(k), training=10.*k + 20, section="multi_task")
               for n, k in {"baseline": 5, "multi-task": 6, "β = 10": 1, "boxes whole 1": 4}.items()]
    left, right = plot_degraded(records)
    assert [t.get_text() for t in left.get_yticklabels()] == ["no boxes", "exact boxes", "boxes whole 1"] and left.yaxis_inverted()
    assert [float(p.get_xdata()[0]) for p, _, _ in points(left)] == pytest.approx([50, 60, 40])
    assert [line.get_xdata()[0] for line in right.lines if line.get_marker() == "o"] == pytest.approx([20, 20, 20])
    for r in records: r["data"] = {**r["data"], "synthetic": False}
    assert plot_degraded(records)[0].get_yticklabels()[1].get_text() == "boxes as given", "nobody knows the exact ones"

def test_replays_take_the_place_of_epochs():
    run = Run("s", "free", training=dict(replays=4))
    assert [run.settings(SCALES[s]).epochs for s in ("smoke", "lite")] == [1, 4] and Run("s", "a").settings(SCALES["lite"]).epochs == SCALES["lite"].epochs

def test_only_records_of_this_scale_data_and_settings_are_returned(go, tmp_path):
    mine, = go(Run("tiny", "a", MODEL, training={"epochs": 1}))
    append_record(tmp_path/"results"/"tiny-smoke.jsonl", {**mine, "id": "f"*16, "scale": "full"})
    assert go(Run("tiny", "a", MODEL, training={"epochs": 1})) == [mine]

def test_a_record_is_strict_json(go, tmp_path):
    go(Run("tiny", "a", MODEL, training={"epochs": 1}))
    line = (tmp_path/"results"/"tiny-smoke.jsonl").read_text()
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
    metrics = single_run.train_run(run, 0, single_run.Setting(scale, train, valid, torch.device("cpu"), tmp_path))
    assert metrics["valid_accuracy"] == max(h["valid_accuracy"] for h in metrics["history"])


def test_what_a_member_is_worth_is_what_is_lost_without_it():
    def at(name, clean, noise): return record(name, hits=few(clean), under={("blur", 1.): few(noise), ("FGSM", .1): [1, 0]}, noise=few(5), section="ensemble")
    records = [at("ensemble", 8, 6), at("A", 6, 4), at("B", 5, 5), at("without A", 5, 5), at("without B", 6, 4)]
    t = member_table(records).set_index("member") # noise at 0.15 is 5 of 10 for all; what was measured on fewer images does not count
    assert t["mean"].tolist() == pytest.approx([50, 50, 63.3], abs=.05) and t["clean"].tolist() == [60, 50, 80]
    assert [c.split(" (")[0] for c in t.contributes] == ["+13.3", "+13.3", ""] and t["others without it"].tolist() == [50, 50, ""]
    gain = np.array([0]*5 + [2/3] + [1/3]*2 + [0]*2) # images 6 to 8 are gained, the first of them twice
    half = norm.ppf(.975)*gain.std(ddof=1)/10**.5
    assert float(t.contributes.iloc[0].split(" to ")[1].rstrip(")")) == pytest.approx(100*(gain.mean() + half), abs=.06)
    with pytest.raises(ValueError, match="the run 'ensemble' is not on record; there are A"): member_table(records[1:2])
