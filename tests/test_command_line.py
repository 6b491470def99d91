"The command `robustcv`, as a user meets it."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from typer.testing import CliRunner

from robustcv.__main__ import app, write_report
from robustcv.color_jitter import ColorJitter
from robustcv.core import SCALES, alone_with, load_records
from robustcv.grids import DEMO, SECTIONS, Run
from robustcv.models import build_model, load_model, save_model
from robustcv.tables import filters


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
    table = json.loads((tmp_path / "table.json").read_text()); del table["evaluation"][1]
    (tmp_path / "table.json").write_text(json.dumps(table))
    with pytest.warns(UserWarning, match="table.json: 1 of 25 rows are not in it"):
        fewer = call("evaluate", out / "model.safetensors", data, "--size", 32, "--against", tmp_path / "table.json")
    assert all(line.split()[-3:] == ["0", "0", "8"] for line in fewer.splitlines()[-24:]), "each row is compared with its own"
    (tmp_path / "table.json").write_text(json.dumps(dict(evaluation=table["evaluation"])))
    assert "not a table written by" in call("evaluate", out / "model.safetensors", data, "--size", 32, "--against", tmp_path / "table.json", code=1)


def test_images_that_were_added_since_are_no_secret(tmp_path):
    data, out = photos(tmp_path / "photos"), tmp_path / "run"
    call("train", data, "--size", 32, "--epochs", 1, "--batch-size", 8, "--lr", 0.02, "--out", out)
    Image.new("RGB", (40, 40)).save(data / "cats" / "new.png")
    with pytest.warns(UserWarning, match="its training part is not what .* was trained on; if images came or went since"):
        call("evaluate", out / "model.safetensors", data)


def test_small_slips_are_named(tmp_path):
    assert "size=0" in call("evaluate", _small_model(tmp_path), photos(tmp_path / "photos", 4), "--size", 0, code=1)
    assert "unknown section 'foo'" in call("run", "all", "foo", "--dry-run", code=1)
    assert "no such folder of records" in call("record", "abc", "--results", tmp_path / "nowhere", code=1)


def _small_model(tmp_path):
    model = build_model("shufflenet_v2_x0_5", 2); save_model(model, tmp_path / "m.safetensors"); return tmp_path / "m.safetensors"


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    data, out = photos(tmp_path / "photos"), tmp_path / "run"
    call("train", data, "--size", 32, "--epochs", 1, "--batch-size", 8, "--lr", 0.02, "--out", out)
    assert "other settings" in call("train", data, "--size", 32, "--epochs", 1, "--batch-size", 8, "--lr", 0.01, "--out", out, code=1)


@pytest.fixture
def minute(monkeypatch):
    "The demo, but with two sections of three small networks."
    net = lambda section, name, **kwargs: Run(section, name, "shufflenet_v2_x0_5", training={"epochs": 1}, **kwargs)
    runs = {"baseline": [net("baseline", "plain")],
            "color_jitter": [net("color_jitter", "baseline"), net("color_jitter", "contrast 5", stem="imagenet", transform=ColorJitter(contrast=5.))]}
    for section in SECTIONS: monkeypatch.setitem(SECTIONS, section, lambda section=section: runs.get(section, []))
    for section in list(DEMO): monkeypatch.delitem(DEMO, section)
    for section, own in runs.items(): monkeypatch.setitem(DEMO, section, tuple(r.name for r in own))
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], classes=2, train_per_class=6, val_per_class=3, batch_size=4))


def test_the_demo_writes_records_models_figures_and_a_report(tmp_path, monkeypatch, minute):
    monkeypatch.setattr("robustcv.__main__.write_report", lambda path, results, scale: f"{path} of {results} at {scale}")
    out = tmp_path / "demo"
    text = call("demo", "--scale", "smoke", "--out", out)
    assert [(r["section"], r["name"]) for r in load_records(out / "results")] == [("baseline", "plain"), ("color_jitter", "baseline"),
                                                                                  ("color_jitter", "contrast 5")]
    assert f"--results {out/'results'} --folder {out/'runs'}" in " ".join(text.split()), "what is missing goes where the rest is"
    figures = {f.name for f in (out / "figures").glob("*.png")}
    assert {"summary-smoke-claims.png", "summary-smoke-scoreboard.png", "color_jitter-smoke-fields.png"} <= figures and f"({len(figures)})" in text
    assert "no evidence about natural" in text and "C21" in text and "worst" in text and f"report: {out / 'report.html'} of {out / 'results'} at smoke" in text
    assert text.count("on record") < call("demo", "--scale", "smoke", "--out", out).count("on record")  # a second time nothing is trained


def test_the_report_is_a_page_whose_links_lead_to_the_notebooks(tmp_path, monkeypatch):
    for name in ("nbconvert", "nbformat"): pytest.importorskip(name)
    nbs = tmp_path / "checkout" / "nbs"; nbs.mkdir(parents=True)
    monkeypatch.setattr("robustcv.__main__.__file__", str(tmp_path / "checkout" / "robustcv" / "__main__.py"))
    assert "is not there; it comes with a checkout" in write_report(tmp_path / "r.html", tmp_path, "smoke") and not (tmp_path / "r.html").exists()
    import nbformat
    cells = [nbformat.v4.new_markdown_cell("# Claims\n\n[symmetry](15_symmetry.ipynb)"),
             nbformat.v4.new_code_cell("import os\nprint('at', os.environ['ROBUSTCV_SCALE'], 'in', os.environ['ROBUSTCV_RESULTS'])")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), nbs / "21_claims.ipynb")
    assert write_report(tmp_path / "r.html", tmp_path / "records", "smoke") == str(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert f"at smoke in {tmp_path / 'records'}" in page and f'<base href="{nbs.as_uri()}/">' in page and "15_symmetry.ipynb" in page
    assert "import os" not in page and "ROBUSTCV_SCALE" not in os.environ


def test_a_dry_run_lists_what_is_missing_and_trains_nothing(tmp_path, minute, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = call("run", "all", "--scale", "smoke", "--dry-run")
    assert text.count("to train") == 2 and text.count("to measure") == 1 and "3 runs, 0 on record" in text and "3 runs are of unknown length" in text
    assert not (tmp_path / "results").exists() and not (tmp_path / "runs").exists()
    call("run", "baseline", "--scale", "smoke")
    text = call("run", "baseline", "color_jitter", "--scale", "smoke", "--dry-run")
    assert "3 runs, 1 on record; the rest takes about 1 min\n" in text and text.count("to measure") == 1


def test_a_grid_starts_from_pretrained_weights(tmp_path, tiny, monkeypatch, hub):
    monkeypatch.setitem(SECTIONS, "baseline", lambda: [Run("baseline", "plain", training={"epochs": 1})])
    for name in ("smoke", "smoke-pretrained"):
        monkeypatch.setitem(SCALES, name, replace(SCALES[name], classes=2, train_per_class=4, val_per_class=3, batch_size=4))
    official = torchvision.models.resnet18().state_dict()
    hub("resnet18", torchvision.models.ResNet18_Weights.IMAGENET1K_V1, official)
    run = ("run", "baseline", "--scale", "smoke", "--data", tiny, "--results", tmp_path / "results", "--folder", tmp_path / "runs")
    assert "scale smoke-pretrained" in call(*run, "--pretrained") and "scale smoke:" in call(*run)
    pretrained, scratch = load_records(tmp_path / "results")
    assert [r["scale"] for r in (pretrained, scratch)] == ["smoke-pretrained", "smoke"] and pretrained["id"] != scratch["id"]
    moved = [(filters(r) - official["conv1.weight"]).norm() / official["conv1.weight"].norm() for r in (pretrained, scratch)]
    assert moved[0] < .1 < moved[1]  # fine-tuned, or something else altogether
    assert "on record" in call(*run, "--pretrained")
    assert "smoke-pretrained" in call("scoreboard", "--scale", "smoke-pretrained", "--results", tmp_path / "results")


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
    (claim, comparison), = (pair for pair in zip(text.splitlines(), text.splitlines()[1:]) if pair[0].startswith("C1 "))
    assert claim.split()[1] == "undecided" and comparison.endswith("contrast 0.8 − contrast 5") and " 1 seed " in comparison
    assert "robustcv run random_erase" in text  # what is missing, and how to make it
    assert f"--scale smoke --results {results}" in text
    rows = json.loads(call("claims", *where, "--json"))
    assert rows[0]["claim"] == "C1" and rows[0]["records"] and {r["claim"] for r in rows} >= {"C1", "C21"}
    assert call("claims", *where, "--markdown").startswith("| claim |")
    shown = call("record", rows[0]["records"].split()[0], "--results", results)
    assert '"name": "contrast 5"' in shown or '"name": "contrast 0.8"' in shown
    assert '"fingerprint"' in shown and "rotation" in shown and "hits" not in shown
    assert "4 records in" in call("record", "", "--results", results, code=1) and "give an id from" in call("record", "zz", "--results", results, code=1)
    text = call("scoreboard", *where, "--out", tmp_path / "board.png")
    assert "color_jitter / baseline" in text and "worst" in text and (tmp_path / "board.png").stat().st_size > 1000
    text = call("figures", *where, "--out", tmp_path / "figures")
    assert sorted(text.split("figure: ")[1:]) == sorted(f"{f}\n" for f in (tmp_path / "figures").iterdir())
    assert "nowhere" in call("figures", *where, "--data", tmp_path / "nowhere", "--out", tmp_path / "none", code=1) and not (tmp_path / "none").exists()
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
    (("claims",), "results: no such folder of records"),
    (("scoreboard", "--scale", "smoke"), "results: no such folder of records"),
    (("figures", "--scale", "smoke"), "results: no such folder of records"),
    (("claims", "--results", "none"), "none: no such folder of records"),
    (("data", "synthetic", "x", "--classes", "99"), "classes"),
])
def test_errors_are_one_line_with_the_culprit(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = call(*args, code=1)
    assert text.startswith("error: ") and says in text and "Traceback" not in text and len(text.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "a failed command leaves nothing behind"


def test_a_measurement_is_shown_whatever_becomes_of_its_file(tmp_path):
    images = photos(tmp_path / "a")
    call("train", images, "--size", 32, "--epochs", 1, "--batch-size", 8, "--out", tmp_path / "run")
    (tmp_path / "out").write_text("in the way")
    def refuse(path): raise OSError(28, f"cannot write {path}")
    with pytest.MonkeyPatch.context() as m:
        m.setattr("robustcv.__main__.atomic_path", refuse)
        text = call("evaluate", tmp_path / "run/model.safetensors", images, "--size", 32, "--out", tmp_path / "t.json", code=1)
    assert "perturbation" in text and "rotation" in text and "cannot write" in text


def test_what_cannot_be_done_with_these_images_is_an_error(tmp_path):
    images = photos(tmp_path / "a")
    one = tmp_path / "one"; shutil.copytree(images, one / "inner")
    assert "one class ('inner') alone; give the folder with" in call("train", one, "--size", 32, "--out", tmp_path / "run", code=1)
    run = ("run", "multi_task", "--only", "multi-task", "--scale", "smoke", "--results", tmp_path / "r", "--folder", tmp_path / "f", "--device", "cpu")
    assert "no run is left: multi-task learn boxes, and" in call(*run, "--data", images, code=1)


def test_records_at_other_scales_are_named(tmp_path):
    (tmp_path / "results").mkdir()
    shutil.copy(Path(__file__).parent.parent / "results" / "fgsm-lite.jsonl", tmp_path / "results")
    text = call("claims", "--scale", "smoke", "--results", tmp_path / "results", code=1)
    assert re.search(r"no records at scale 'smoke'; there are some at .*lite.*: --scale \w+", text)


def test_usage_errors_exit_with_2_and_help_shows_an_example():
    call("train", code=2)
    call("run", "baseline", "--sclae", "lite", code=2)
    for command in ("train", "evaluate", "run", "demo", "figures", "claims", "scoreboard", "record", "data get", "data synthetic", "data info"):
        assert "Example:" in call(*command.split(), "--help")


def test_the_version_says_what_results_depend_on():
    text = call("--version")
    assert all(f"{p} {version(p)}" in text for p in ("robustcv", "torch", "torchvision", "numpy")) and "commit" in text


def test_as_a_process_debug_shows_the_traceback(tmp_path):
    def run(*args): return subprocess.run([sys.executable, "-m", "robustcv", *args], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    plain, debug = run("train", "nowhere"), run("--debug", "train", "nowhere")
    assert (plain.returncode, plain.stdout) == (1, "") and plain.stderr.startswith("error: nowhere")
    assert debug.returncode == 1 and "Traceback" in debug.stderr


def test_records_of_other_images_are_left_out_with_a_warning(tmp_path, minute, tiny):
    where = ("--scale", "smoke", "--results", tmp_path / "results", "--folder", tmp_path / "runs")
    call("run", "baseline", *where, "--data", tiny)
    call("run", "color_jitter", *where, "--data", photos(tmp_path / "photos"))
    with pytest.warns(UserWarning, match="of 3 records at scale 'smoke', 2 are of other images than tiny/train"): # files are read in the order of their names
        text = call("scoreboard", *where[:4])
    assert "baseline / plain" in text and "color_jitter" not in text
    with (tmp_path / "results" / "baseline-smoke.jsonl").open("a") as f: f.write('{"schema": 1, "id": "cut')
    with pytest.warns(UserWarning, match=r"baseline-smoke.jsonl:2: unfinished record skipped"): call("claims", *where[:4])


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_training_cleanly_and_it_goes_on_afterwards(sent, code, tmp_path):
    data, out = photos(tmp_path / "photos"), tmp_path / "run"
    args = ["train", str(data), "--size", "32", "--epochs", "200", "--batch-size", "8", "--lr", "0.02", "--out", str(out)]
    child = subprocess.Popen([sys.executable, "-m", "robustcv", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "state.pt").exists(): assert child.poll() is None, child.stderr.read(); time.sleep(.05)
    child.send_signal(sent)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == code and "stopped; run the same command again to continue" in said and "Traceback" not in said
    assert not list(out.rglob("*.part")) and 0 < len(json.loads(torch.load(out / "state.pt", weights_only=True)["history"])) < 200

def test_two_trainings_do_not_share_a_folder(tmp_path):
    data, out = photos(tmp_path / "photos"), tmp_path / "run"
    train = ("train", data, "--size", 32, "--epochs", 1, "--batch-size", 8, "--lr", 0.02, "--out", out)
    with alone_with(out / ".training"): assert "another process is training there" in call(*train, code=1)
    call(*train); (out / "state.pt").unlink()
    before = (out / "model.safetensors").read_bytes()
    assert "away, or choose another folder" in call(*train, code=1) and (out / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("")
    assert "file" in call(*train[:-1], tmp_path / "file", code=1)

def test_what_is_wrong_with_a_comparison_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    data, out = photos(tmp_path / "photos"), tmp_path / "run"
    call("train", data, "--size", 32, "--epochs", 1, "--batch-size", 8, "--lr", 0.02, "--out", out)
    monkeypatch.setattr("robustcv.__main__.evaluate", None)
    assert "typo.json: no such table" in call("evaluate", out / "model.safetensors", data, "--against", tmp_path / "typo.json", code=1)
    assert "is a folder; give the name of a file" in call("evaluate", out / "model.safetensors", data, "--out", tmp_path, code=1)

def test_the_record_of_the_example_is_on_record():
    id = re.search(r"robustcv record (\w+)", call("record", "--help")).group(1)
    assert '"section": "baseline"' in call("record", id, "--results", Path(__file__).parent.parent/"results")

@pytest.mark.parametrize("part, field", [("data", "name"), ("config", "run"), ("metrics", "evaluation"), ("metrics", "train_accuracy")])
@pytest.mark.parametrize("command", ["claims", "scoreboard", "figures", "run"])
def test_a_record_that_lacks_something_is_named(tmp_path, part, field, command):
    record = load_records(Path(__file__).parent.parent/"results"/"baseline-lite.jsonl")[0]
    record = {**record, part: {k: v for k, v in record[part].items() if k != field}}
    (tmp_path/"baseline.jsonl").write_text(json.dumps(record) + "\n")
    if command == "run":
        (tmp_path/"baseline.jsonl").write_text(json.dumps({**record, "scale": "smoke"}) + "\n"); record["scale"] = "smoke"
    done = CliRunner().invoke(app, [command, *(["baseline", "--dry-run"] if command == "run" else []), "--scale", record["scale"], "--results", str(tmp_path)])
    assert done.exit_code == 1 and record["id"][:8] in done.output and f"{part}: {field}" in done.output.replace("\n", " ")
