"""The scoreboard and the two pictures that sum up all sections."""
import base64
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from robustcv.core import SCALES
from robustcv.perturbations import standard_perturbations
from robustcv.single_run import _home, identity
from robustcv.figures import draw_figures, draw_summary
from robustcv.grids import SECTIONS
from robustcv.scoreboard import FAMILIES, as_text, plot_scoreboard, scoreboard
from robustcv.tables import network_id

STANDARD = {(p.name, None if math.isnan(p.strength) else p.strength): 10*k for k, p in enumerate(standard_perturbations())} # percent right, in steps
SIZES = {"clean": 1, "orientation": 5, "noise": 5, "blur": 3, "occlusion": 3, "brightness": 2, "contrast": 2, "saturation": 2, "hue": 2}
HISTORY = [dict(epoch=e, train_loss=1., train_accuracy=80., valid_loss=1., valid_accuracy=50., images_per_second=9.) for e in (1, 2)]

def made(name, section="baseline", seed=0, under=None, scale="smoke", start=0, **metrics):
    "A record whose accuracy under each perturbation is given, in %, of 1,000 images."
    rows = []
    for (perturbation, strength), percent in ({p: min(100, start + v/10) for p, v in STANDARD.items()} if under is None else under).items():
        right = np.arange(1000) < 10*percent
        rows.append(dict(perturbation=perturbation, strength=strength, unit="", correct=int(right.sum()), n=1000, seconds=0.,
                         hits=base64.b64encode(np.packbits(right).tobytes()).decode()))
    data = dict(name="synthetic", synthetic=True, fingerprint="f", classes=2, train=1000, valid=1000, pixels=64)
    return dict(id=f"{section}{name}{seed}", section=section, name=name, seed=seed, scale=scale, data=data, device="a CPU", commit="abc",
                config={"run": {"section": section, "name": name, "objective": f"{section} / {name}"}},
                metrics=dict(evaluation=rows, train_accuracy=80., valid_accuracy=50., history=HISTORY) | metrics)

def more(**under):
    "The standard perturbations at 50 %, and others."
    return {**{p: 50. for p in STANDARD}, **{tuple(k): v for k, v in under.get("also", [])}}


# numbers

def test_the_standard_perturbations_fall_into_nine_families():
    assert {f: sum(p in names for p, _ in STANDARD) for f, names in FAMILIES.items()} == SIZES and sum(SIZES.values()) == len(STANDARD)

def test_a_family_counts_with_its_mean():
    t, percent, at = scoreboard([made("plain")]), [k for k in range(len(STANDARD))], 0
    assert list(t) == [*SIZES, "mean", "worst"] and t.index.tolist() == ["baseline / plain"]
    for family, size in SIZES.items(): # in the order of the standard perturbations
        assert t.loc["baseline / plain", family] == pytest.approx(np.mean(percent[at:at + size])); at += size
    families = t.iloc[0][list(SIZES)]
    assert t["mean"].iloc[0] == pytest.approx(families.mean()) and t.worst.iloc[0] == families.min() == 0

def test_seeds_are_averaged():
    t = scoreboard([made("plain", seed=0), made("plain", seed=1, start=20), made("other", start=4)])
    assert t.loc["baseline / plain", "clean"] == pytest.approx(10) and t.loc["baseline / other", "clean"] == pytest.approx(4) and len(t) == 2

def test_strengths_beyond_the_standard_ones_do_not_count():
    also = [(("brightness", .25), 0.), (("noise, article", .4), 0.), (("occlusion at 0.1, 0.1", .25), 0.), (("hue", .5), 0.),
            (("random symmetry", None), 0.), (("uniform noise", .1), 0.)]
    t = scoreboard([made("E", "random_erase", under=more(also=also))])
    assert list(t) == [*SIZES, "mean", "worst"] and (t.iloc[0] == 50).all()

def test_further_families_are_means_of_what_was_measured_and_no_part_of_mean_and_worst():
    also = [(("JPEG", 80.), 10.), (("JPEG", 10.), 20.), (("corruption: fog", 1.), 1.), (("corruption: jpeg", 5.), 4.),
            (("affine: shear", 15.), 7.), (("affine: scale", .75), 9.),
            (("FGSM from DenseNet-121", .2), 25.), (("FGSM from B, not augmented", .2), 20.), (("FGSM from DenseNet-121", .1), 90.), (("FGSM", .2), 6.),
            (("FGSM", .05), 80.), (("PGD-20", .2), 5.), (("strong attacks", .2), 3.), (("random signs", .2), 0.)]
    t = scoreboard([made("plain", under=more()), made("all", under=more(also=also))])
    assert list(t) == [*SIZES, "JPEG", "corruptions", "affine", "FGSM, transferred", "FGSM", "PGD-20", "strong attacks", "mean", "worst"]
    assert t.iloc[1][list(t)[9:]].tolist() == pytest.approx([15, 2.5, 8, 25, 6, 5, 3, 50, 50])
    assert t.iloc[0].isna().tolist() == [False]*9 + [True]*7 + [False]*2
    assert scoreboard([made("all", under=more(also=also))]).iloc[0][["mean", "worst"]].tolist() == [50, 50], "even where every run has them"

def test_a_run_without_a_standard_perturbation_is_blank_there_and_the_family_counts_for_no_run():
    partial = more(); del partial["blur", 2.]
    for p in [p for p in partial if p[0] == "hue"]: del partial[p]
    whole = more() | {("blur", s): 0. for s in (.5, 1., 2.)} | {("clean", None): 70.}
    t = scoreboard([made("plain", under=whole), made("partial", under=partial)])
    assert t.loc["baseline / partial"].isna().to_dict() == {f: f in ("blur", "hue") for f in t}
    assert t.loc["baseline / plain", ["blur", "mean", "worst"]].tolist() == pytest.approx([0, (70 + 6*50)/7, 50])

def test_a_seed_that_lacks_a_family_leaves_the_others():
    t = scoreboard([made("plain", under=more()), made("plain", seed=1, under=more(also=[(("JPEG", 80.), 10.)]))])
    assert t.loc["baseline / plain", ["clean", "JPEG"]].tolist() == [50, 10]


# rows

def test_rows_are_in_the_order_of_the_sections():
    records = [made("two phases", "symmetry"), made("mine", "elsewhere"), made("E", "random_erase"), made("plain"), made("FE", "random_erase"),
               made("E", "random_erase", 1)]
    assert scoreboard(records).index.tolist() == ["baseline / plain", "random_erase / E", "random_erase / FE", "symmetry / two phases", "elsewhere / mine"]

def test_a_network_that_several_sections_measure_has_one_row_with_all_that_they_measured():
    alike = dict(config={"run": {"section": "baseline", "name": "plain", "model": "resnet18"}, "training": {"lr": .1}})
    again = {"config": {"run": {"section": "stability", "name": "baseline", "model": "resnet18", "sources": [["a", "b"]], "members": []},
                        "training": {"lr": .1}}}
    other = {"config": {"run": {"section": "stability", "name": "α = 1", "model": "resnet18", "objective": "f"}, "training": {"lr": .1}}}
    records = [made("α = 1", "stability") | other, made("baseline", "stability", under=more(also=[(("JPEG", 30.), 40.), (("clean", None), 10.)])) | again,
               made("plain", start=10) | alike, made("plain", seed=1, start=20) | alike]
    board = scoreboard(records)
    assert board.index.tolist() == ["baseline / plain", "stability / α = 1"] and board.JPEG.tolist()[0] == 40 and np.isnan(board.JPEG.iloc[1])
    first, second = (scoreboard([r])["clean"].iloc[0] for r in records[2:])
    assert board["clean"].iloc[0] == (first + second)/2, "the first section's where both have measured, the mean over seeds"
    assert scoreboard(records, ["stability / baseline", "baseline / plain"]).index.tolist() == ["stability / baseline", "baseline / plain"], "asked for by name"

def test_an_ensemble_of_one_is_its_member():
    of = lambda *members: {"config": {"run": {"section": "ensemble", "members": [list(m) for m in members]}}}
    seen = [made("E", "random_erase"), made("E", "random_erase", 1), made("FE", "random_erase")]
    one, both = made("E", "ensemble", under=more(also=[(("JPEG", 30.), 40.), (("clean", None), 0.)])) | of(("random_erase", "E")), \
        made("ensemble", "ensemble") | of(("random_erase", "E"), ("random_erase", "FE"))
    board = scoreboard([*seen, one, both])
    assert board.index.tolist() == ["random_erase / E", "random_erase / FE", "ensemble / ensemble"] and board.JPEG.iloc[0] == 40
    assert board["clean"].iloc[0] == scoreboard(seen)["clean"].iloc[0], "as its own section has measured it"
    assert scoreboard([one, both]).index.tolist() == ["ensemble / ensemble", "ensemble / E"], "of which nothing else is on record"

def test_of_two_trainings_of_a_network_the_row_has_the_one_that_more_is_known_of():
    alike = dict(config={"run": {"section": "baseline", "name": "plain", "model": "resnet18"}, "training": {"lr": .1}})
    again = {"config": {"run": {"section": "stability", "name": "baseline", "model": "resnet18"}, "training": {"lr": .1}}}
    other = made("baseline", "stability", under=more(also=[(("JPEG", 30.), 40.)])) | again # 50 % on clean images
    row = scoreboard([made("plain", start=10) | alike, other, made("plain", seed=1, start=20) | alike])
    assert row.index.tolist() == ["baseline / plain"] and row["clean"].iloc[0] == (50 + 20)/2 and row.JPEG.iloc[0] == 40

def test_a_family_is_made_of_what_all_were_measured_under():
    both = [made(n, under=more(also=[(("corruption: fog", 1.), k), *rest])) for n, k, rest in (("a", 10., []), ("b", 20., [(("corruption: jpeg", 1.), 90.)]))]
    assert scoreboard([*both, made("c", under=more())]).corruptions.tolist()[:2] == [10, 20]

def test_rows_are_told_apart_as_the_folders_of_networks_are():
    scale, about, runs = SCALES["lite"], dict(fingerprint="f"), [r for runs in SECTIONS.values() for r in runs()]
    def split(key): return {frozenset(i for i, r in enumerate(runs) if key(r) == k) for k in map(key, runs)}
    record = lambda r: dict(scale="lite", data=about, config=identity(r, 0, scale, about)[0])
    assert split(lambda r: network_id(record(r))) == split(lambda r: _home(replace(r, watch=None), 0, scale, about, "."))

def test_runs_are_chosen_by_section_and_name():
    records = [made("plain"), made("E", "random_erase"), made("FE", "random_erase")]
    names = ["random_erase / FE", "baseline / plain", "random_erase / FE"]
    assert scoreboard(records, names).index.tolist() == names[:2]

@pytest.mark.parametrize("records, runs, said", [
    ([], None, "no records"), ([made("plain"), made("plain", scale="lite")], None, "records of 2 settings"),
    ([made("plain"), {**made("plain"), "id": "again"}], None, "on record with several settings"), ([made("plain")], ["plain"], "unknown run 'plain'"),
    ([made("plain")], ["baseline / plane"], "did you mean 'baseline / plain'"), ([made("plain")], [], "none is named")])
def test_what_cannot_be_shown_is_refused(records, runs, said):
    with pytest.raises(ValueError, match=said): scoreboard(records, runs)


def test_as_text_rounds_leaves_blanks_and_drops_a_shared_section():
    frame = pd.DataFrame({"clean": [51.25, math.nan], "worst": [3., 4.06]}, index=["a / x", "a / y"])
    assert as_text(frame).to_dict("records") == [{"run": "x", "clean": "51.2", "worst": "3.0"}, {"run": "y", "clean": "", "worst": "4.1"}]
    assert as_text(frame.set_axis(["a / x", "b / y"])).run.tolist() == ["a / x", "b / y"]
    assert frame.index.tolist() == ["a / x", "a / y"]


# pictures

def test_the_heat_map_shows_numbers_blanks_and_sections():
    records = [made("plain"), made("E", "random_erase", under=more(also=[(("JPEG", 80.), 12.)])), made("FE", "random_erase", start=3)]
    t = scoreboard(records)
    ax = plot_scoreboard(t)
    values = np.ma.filled(ax.collections[0].get_array().reshape(t.shape).astype(float), np.nan)
    np.testing.assert_allclose(values, t.to_numpy())
    assert [x.get_text() for x in ax.texts] == [f"{v:.0f}" for v in t.to_numpy().ravel() if not math.isnan(v)]
    assert [x.get_text() for x in ax.get_yticklabels()] == t.index.tolist() and [x.get_text() for x in ax.get_xticklabels()] == t.columns.tolist()
    assert ax.get_xlabel() == "blank: not measured" and plt.matplotlib.colors.to_hex(ax.get_facecolor()) == "#e6e6e6"
    lines = [(line.get_xdata(), line.get_ydata()) for line in ax.lines]
    assert [x[0] for x, y in lines if x[0] == x[1]] == [t.shape[1] - 2], "before mean and worst"
    assert [y[0] for x, y in lines if y[0] == y[1]] == [1], "between sections"
    assert plot_scoreboard(t.drop(columns="JPEG")).get_xlabel() == ""
    own = plt.figure().gca()
    assert plot_scoreboard(t, own) is own
    plt.close("all")

def test_labels_are_inside_of_the_picture():
    some = [more(also=[(("FGSM from DenseNet-121", .2), 1.)]), more()]
    t = scoreboard([made(f"a rather long name, number {k}", "adversarial_training", under=some[k % 2]) for k in range(41)])
    for part in (t[1:2], t):
        fig = plot_scoreboard(part).figure
        fig.canvas.draw()
        (ax, bar), whole = fig.axes, fig.bbox
        texts = [*ax.get_xticklabels(), *ax.get_yticklabels(), ax.xaxis.label, bar.yaxis.label]
        boxes = [x.get_window_extent() for x in texts]
        assert len(texts) == len(part) + t.shape[1] + 2 and all(x.get_text() for x in texts)
        assert all(whole.x0 <= b.x0 and b.x1 <= whole.x1 and whole.y0 <= b.y0 and b.y1 <= whole.y1 for b in boxes)
    assert plot_scoreboard(t).figure.get_figheight() > plot_scoreboard(t[:1]).figure.get_figheight() + 5
    plt.close("all")

def test_the_summary_is_two_files_named_after_the_scale(tmp_path):
    plt.close("all")
    files = draw_summary([made("contrast 0.8", "color_jitter"), made("contrast 5", "color_jitter")], tmp_path/"new")
    assert [f.name for f in files] == ["summary-smoke-claims.png", "summary-smoke-scoreboard.png"] and set(files) == set((tmp_path/"new").iterdir())
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files) and not plt.get_fignums()
    with pytest.raises(ValueError, match="no records"): draw_summary([], tmp_path)

def test_drawn_images_are_said_to_be_drawn(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(plt.Figure, "text", lambda fig, x, y, text, **kwargs: said.append(" ".join(text.split())))
    real = made("plain", scale="lite"); real["data"] |= dict(name="photographs", synthetic=False)
    draw_summary([made("plain")], tmp_path); draw_summary([real], tmp_path)
    assert ["no evidence about natural" in s for s in said] == [True]*2 + [False]*2 and all("n = 1,000" in s for s in said)

def test_a_section_of_ensembles_has_neither_curves_nor_filters(tmp_path):
    records = [made(n, "ensemble", history=[]) for n in ("ensemble", "E", "FE")]
    assert [f.name for f in draw_figures(records, tmp_path)] == ["ensemble-smoke-runs.png"]
