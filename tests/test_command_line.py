"The command `robustcv`, as a user meets it."
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from robustcv.__main__ import app
from robustcv.core import load_records
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
    for command in (("train",), ("evaluate",), ("run",), ("demo",), ("data", "get"), ("data", "synthetic"), ("data", "info")):
        assert "Example:" in call(*command, "--help")


def test_as_a_process_debug_shows_the_traceback(tmp_path):
    def run(*args): return subprocess.run([sys.executable, "-m", "robustcv", *args], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    plain, debug = run("train", "nowhere"), run("--debug", "train", "nowhere")
    assert (plain.returncode, plain.stdout) == (1, "") and plain.stderr.startswith("error: nowhere")
    assert debug.returncode == 1 and "Traceback" in debug.stderr
