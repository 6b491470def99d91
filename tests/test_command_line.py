"The command `robustcv`, as a user meets it."
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from robustcv.__main__ import app
from robustcv.core import SCALES, load_records
from robustcv.experiments import SECTIONS, Run
from robustcv.models import load_model


def call(*args, code=0):
    done = CliRunner().invoke(app, [str(a) for a in args], prog_name="robustcv")
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done.output


def photos(root, per_class=20, classes=("cats", "dogs")):
    "A class-per-folder tree of images of several sizes and formats, told apart by their brightness."
    rng = np.random.default_rng(0)
    for k, c in enumerate(classes):
        (root / c).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 100, (40 + i, 70 - i, 3)) + 150 * k
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / c / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


def test_a_folder_of_ones_own_is_trained_and_measured(tmp_path):
    data, out = photos(tmp_path / "photos"), tmp_path / "run"
    assert "2 classes" in call("data", "info", data, "--size", 32)
    train = ("train", data, "--size", 32, "--epochs", 3, "--batch-size", 8, "--lr", 0.02, "--out", out)
    assert "model.safetensors" in call(*train)
    assert load_model(out / "model.safetensors").classes == ("cats", "dogs")
    first = (out / "model.safetensors").read_bytes()
    call(*train)  # everything is done: the same model comes out
    assert (out / "model.safetensors").read_bytes() == first
    text = call("evaluate", out / "model.safetensors", data, "--size", 32, "--out", tmp_path / "table.json")
    assert "rotation" in text and "clean" in text
    rows = json.loads((tmp_path / "table.json").read_text())["evaluation"]
    assert rows[0]["perturbation"] == "clean" and rows[0]["n"] == 8
    again = call("evaluate", out / "model.safetensors", data, "--size", 32, "--against", tmp_path / "table.json")
    assert "difference" in again


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    data, out = photos(tmp_path / "photos"), tmp_path / "run"
    call("train", data, "--size", 32, "--epochs", 1, "--batch-size", 8, "--lr", 0.02, "--out", out)
    assert "other settings" in call("train", data, "--size", 32, "--epochs", 1, "--batch-size", 8, "--lr", 0.01, "--out", out, code=1)


def test_demo_at_smoke_scale_writes_records_figures_and_models(tmp_path):
    out = tmp_path / "demo"
    text = call("demo", "--scale", "smoke", "--out", out)
    assert {r["name"] for r in load_records(out / "results")} == {"flip + crop", "plain"}
    figures = sorted((out / "figures").glob("*.png"))
    assert len(figures) == 4 and all(str(f) in text for f in figures)
    assert "no evidence about natural" in text
    assert "on record" in call("demo", "--scale", "smoke", "--out", out)  # a second time nothing is trained


def test_some_runs_of_a_section_are_run_drawn_and_held_against_the_claims(tmp_path, tiny, monkeypatch):
    runs = [Run("color_jitter", n, "shufflenet_v2_x0_5", training={"epochs": 1}) for n in ("baseline", "contrast 5", "contrast 0.8", "hue 0.1")]
    monkeypatch.setitem(SECTIONS, "color_jitter", lambda: runs)
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], classes=2, train_per_class=4, val_per_class=3, batch_size=4))
    where, results = ("--scale", "smoke", "--results", tmp_path / "results"), tmp_path / "results"
    run = ("run", "color_jitter", *where, "--data", tiny, "--folder", tmp_path / "runs", "--device", "cpu")
    text = call(*run, "--only", "contrast 5", "--only", "contrast 0.8")
    assert [r["name"] for r in load_records(results)] == ["contrast 5", "contrast 0.8"] and "[2/2]" in text and "baseline" not in text
    assert "unknown run 'contrast 7': did you mean 'contrast 5'" in call(*run, "--only", "contrast 7", code=1)
    call(*run)
    assert len(load_records(results)) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = call("claims", *where)
    c1, = (line for line in text.splitlines() if line.split()[:1] == ["C1"])
    assert "contrast 0.8 − contrast 5" in c1 and "undecided" in c1 and "no records" in text
    text = call("figures", *where, "--out", tmp_path / "figures")
    assert sorted(text.split("figure: ")[1:]) == sorted(f"{f}\n" for f in (tmp_path / "figures").iterdir())
    assert "color_jitter-smoke-fields.png" in text


def test_evaluating_on_other_classes_is_refused(tmp_path):
    call("train", photos(tmp_path / "a"), "--size", 32, "--epochs", 1, "--batch-size", 8, "--out", tmp_path / "run")
    other = photos(tmp_path / "b", classes=("ants", "bees"))
    assert "was trained on 2 classes (cats" in call("evaluate", tmp_path / "run/model.safetensors", other, "--size", 32, code=1)


@pytest.mark.parametrize("args, says", [
    (("train", "nowhere"), "nowhere: no such folder"),
    (("evaluate", "none.safetensors", "nowhere"), "no such model file"),
    (("run", "baselin"), "did you mean 'baseline'"),
    (("run", "baseline", "--scale", "lit"), "did you mean 'lite'"),
    (("run", "baseline", "--scale", "lite"), "needs real images"),
    (("run", "baseline", "--scale", "smoke", "--device", "cuda:99"), "device 'cuda:99' is not here"),
    (("run", "baseline", "--seeds", "0,x"), "seeds=0,x"),
    (("run", "baseline", "--scale", "smoke", "--only", "plane"), "unknown run 'plane': did you mean 'plain'"),
    (("claims",), "no records at scale 'lite'"),
    (("figures", "--scale", "smoke"), "no records at scale 'smoke'"),
    (("data", "synthetic", "x", "--classes", "99"), "classes"),
])
def test_errors_are_one_line_with_the_culprit(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = call(*args, code=1)
    assert text.startswith("error: ") and says in text and "Traceback" not in text and len(text.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "a failed command leaves nothing behind"


def test_usage_errors_exit_with_2_and_help_shows_an_example():
    call("train", code=2)
    call("run", "baseline", "--sclae", "lite", code=2)
    for command in ("train", "evaluate", "run", "demo", "figures", "claims", "data get", "data synthetic", "data info"):
        assert "Example:" in call(*command.split(), "--help")


def test_as_a_process_debug_shows_the_traceback(tmp_path):
    def run(*args): return subprocess.run([sys.executable, "-m", "robustcv", *args], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    plain, debug = run("train", "nowhere"), run("--debug", "train", "nowhere")
    assert (plain.returncode, plain.stdout) == (1, "") and plain.stderr.startswith("error: nowhere")
    assert debug.returncode == 1 and "Traceback" in debug.stderr
