"""Seeds, devices, units, safe files and records."""
import errno
import json
import math
import multiprocessing
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from robustcv import core
from robustcv.core import (COLORS, IMAGENET_STD, SCALES, append_record, atomic_path, check_record, choose, derive_seed, describe, generator, load_records,
                           make_record, model_colors, normalized, pick_device, run_id, seed_everything, temporary_folder, whole_number)

BASE = make_record("baseline", "plain", "smoke", {"lr": 0.1}, 0, {"fingerprint": "abc"}, torch.device("cpu"), 1.5, {"accuracy": 0.5})

def record(n): return {**BASE, "id": f"{n:016x}", "seed": n}

def ids(path): return [r["seed"] for r in load_records(path)]


def test_derive_seed_is_the_same_on_every_machine():
    assert derive_seed(0, "order", 3) == 8244215730568551301

@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["order", "transform", "1"]), st.integers(0, 9)), min_size=2, unique=True))
def test_derived_seeds_are_distinct(purposes):
    assert len({derive_seed(*p) for p in purposes}) == len(purposes)

def test_a_number_and_its_text_are_two_purposes(): assert derive_seed(0, 1) != derive_seed(0, "1")

@given(st.integers(), st.text())
def test_derived_seeds_suit_torch(seed, purpose): assert 0 <= derive_seed(seed, purpose) < 2**63

def test_generators_of_two_purposes_are_independent():
    a, b = (torch.randn(4000, generator=generator(0, p)) for p in "ab")
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.06
    assert torch.equal(a, torch.randn(4000, generator=generator(0, "a")))

def test_a_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(0, "x"))
    assert torch.equal(before, torch.get_rng_state())

def test_seed_everything_repeats_all_three_streams():
    import random
    import numpy as np
    def draws(): seed_everything(2**40 + 7); return random.random(), np.random.rand(), torch.rand(1).item()
    assert draws() == draws()


def test_choose_returns_a_valid_name(): assert choose("scale", "demo", iter(["smoke", "demo"])) == "demo"

@pytest.mark.parametrize("name, said", [("smok", "did you mean 'smoke'"), ("zzz", "unknown scale 'zzz': valid: smoke, demo")])
def test_choose_says_what_was_meant(name, said):
    with pytest.raises(ValueError, match=said): choose("scale", name, ["smoke", "demo"])

def test_choose_shortens_long_lists():
    with pytest.raises(ValueError, match=r"… \(99 in all\)"): choose("n", "x", [f"n{i}" for i in range(99)])

def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu") == pick_device(torch.device("cpu"))
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")

@pytest.mark.parametrize("name, said", [("gpu", "use 'cpu', 'cuda'"), ("cuda:99", "torch sees"), ("", "unknown device")])
def test_pick_device_refuses(name, said):
    with pytest.raises(ValueError, match=said): pick_device(name)

def test_normalized_is_the_change_that_normalisation_makes_one_strength_large():
    radius = normalized(0.2)
    assert radius.shape == (3, 1, 1)
    assert radius.flatten().tolist() == pytest.approx([0.2*s for s in IMAGENET_STD])


def test_atomic_path_writes_the_whole_file(tmp_path):
    with atomic_path(tmp_path/"new"/"file") as part:
        part.write_text("text")
        assert not (tmp_path/"new"/"file").exists()
    assert (tmp_path/"new"/"file").read_text() == "text" and len(list((tmp_path/"new").iterdir())) == 1

def test_atomic_path_keeps_the_old_file_on_a_crash(tmp_path):
    (tmp_path/"file").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path/"file") as part:
        part.write_text("half"); raise RuntimeError
    assert (tmp_path/"file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX systems")
def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    (tmp_path/"real").write_text("old"); (tmp_path/"link").symlink_to("real"); os.mkfifo(tmp_path/"pipe")
    with atomic_path(tmp_path/"link") as part: part.write_text("new")
    assert (tmp_path/"link").is_symlink() and (tmp_path/"real").read_text() == "new"
    reader = os.open(tmp_path/"pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic_path(tmp_path/"pipe") as part: part.write_text("through")
    assert os.read(reader, 99) == b"through" and (tmp_path/"pipe").is_fifo() and len(list(tmp_path.iterdir())) == 3
    os.close(reader)

@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2)])
def test_whole_numbers_of_numpy_are_python_s(value): assert type(whole_number("n", value, 2)) is int

@pytest.mark.parametrize("value", [1, 2., "2", None, True, np.float32(2)])
def test_what_is_no_whole_number_is_named(value):
    with pytest.raises(ValueError, match="^n=.*: a whole number, at least 2$"): whole_number("n", value, 2)


def test_records_round_trip_in_order_and_the_last_of_an_id_counts(tmp_path):
    for r in (record(1), record(2), {**record(1), "scale": "demo"}): append_record(tmp_path/"r.jsonl", r)
    assert load_records(tmp_path/"r.jsonl") == [record(2), {**record(1), "scale": "demo"}]
    assert load_records(tmp_path) == load_records(tmp_path/"r.jsonl") # a folder is searched

def test_a_missing_file_holds_no_records(tmp_path): assert load_records(tmp_path/"none.jsonl") == []

@given(st.integers(0, 10**6))
def test_a_file_cut_anywhere_loses_at_most_its_last_record(tmp_path_factory, cut):
    file = tmp_path_factory.mktemp("cut")/"r.jsonl"
    for n in (1, 2): append_record(file, record(n))
    whole = file.read_bytes(); cut = cut % (len(whole) + 1)
    file.write_bytes(whole[:cut])
    kept = (whole[:cut] + b"\n").count(b"}}\n") # a line that lacks only its end counts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ids(file) == [1, 2][:kept]
        append_record(file, record(3))
        assert ids(file) == [*[1, 2][:kept], 3]

def test_an_unfinished_line_is_named(tmp_path):
    file = tmp_path/"r.jsonl"
    append_record(file, record(1))
    with open(file, "a") as f: f.write(json.dumps(record(2))[:50])
    with pytest.warns(UserWarning, match=r"r.jsonl:2: unfinished record"): assert ids(file) == [1]

def test_processes_that_append_together_lose_nothing(tmp_path):
    file, context = tmp_path/"r.jsonl", multiprocessing.get_context("fork")
    def work(k):
        for n in range(40): append_record(file, {**record(40*k + n), "metrics": {"pad": "x"*5000}})
    workers = [context.Process(target=work, args=(k,)) for k in range(4)]
    for w in workers: w.start()
    for w in workers: w.join()
    assert sorted(ids(file)) == list(range(160))

@pytest.mark.parametrize("change, said", [({"seed": None}, "field 'seed'"), ({"schema": 99}, "schema 99"),
                                          ({"metrics": [1]}, "field 'metrics'")])
def test_a_record_off_the_schema_is_named_by_line_and_field(tmp_path, change, said):
    file = tmp_path/"r.jsonl"
    file.write_text(f"{json.dumps(record(1))}\n{json.dumps({**record(2), **change})}\n")
    with pytest.raises(ValueError, match=f"r.jsonl:2: .*{said}"): load_records(file)
    with pytest.raises(ValueError, match=said): append_record(file, {**record(2), **change})

@pytest.mark.parametrize("line", ["[1]", "3", '"text"'])
def test_a_line_that_is_no_object_is_refused(line):
    with pytest.raises(ValueError, match="r:1: a record is a JSON object"): check_record(json.loads(line), "r:1")

def test_a_missing_field_is_refused():
    for field in BASE:
        with pytest.raises(ValueError): check_record({k: v for k, v in BASE.items() if k != field})

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_refused(tmp_path, value):
    with pytest.raises(ValueError): append_record(tmp_path/"r.jsonl", {**record(1), "metrics": {"loss": value}})
    assert load_records(tmp_path) == []


def identify(config, seed=0, fingerprint="f", **other):
    return run_id("s", "n", "smoke", config, seed, {"fingerprint": fingerprint, **other})

@pytest.mark.parametrize("off", [None, False, {}, []])
def test_settings_that_are_off_do_not_change_the_id(off):
    assert identify({"lr": 1, "deep": {"a": 2}}) == identify({"lr": 1, "new": off, "deep": {"a": 2, "b": off}})

@pytest.mark.parametrize("on", [0, 0.0, "", True, {"c": 0}, {"c": 1}, [None]])
def test_settings_that_are_on_change_the_id(on): assert identify({"lr": 1}) != identify({"lr": 1, "new": on})

def test_a_group_of_settings_that_are_all_off_does_not_change_the_id():
    assert identify({"lr": 1}) == identify({"lr": 1, "new": {"a": None, "b": False}})

def test_the_id_depends_on_what_was_run_and_not_on_circumstances():
    assert len({identify({"lr": 1}), identify({"lr": 2}), identify({"lr": 1}, seed=1), identify({"lr": 1}, fingerprint="g")}) == 4
    assert identify({"a": 1, "b": 2}) == identify({"b": 2, "a": 1}, name="elsewhere")


@dataclass
class Settings: lr: float = 0.1; layers: tuple = (1, 2)

def objective(model, batch, alpha=1): pass

@pytest.mark.parametrize("value, said", [(Settings(), {"lr": 0.1, "layers": [1, 2]}), (objective, "objective"), (None, None), (True, True),
    (partial(objective, alpha=2), {"call": "objective", "alpha": 2}), (torch.ones(2), [1., 1.]), (nn.ReLU(), "ReLU()"),
    ({1: (2,)}, {"1": [2]})])
def test_describe_gives_plain_values(value, said):
    assert describe(value) == said and json.loads(json.dumps(describe(value))) == said

def test_describe_keeps_positional_arguments(): assert describe(partial(objective, 1)) != describe(partial(objective, 2))

@pytest.mark.parametrize("value", [object(), Path("x"), lambda x: x])
def test_describe_refuses_what_it_cannot_tell_apart(value):
    with pytest.raises(TypeError, match="cannot describe"): describe(value)


# colours

@given(st.lists(st.sampled_from(sorted(COLORS)), unique=True), st.integers(0, 5))
def test_models_keep_their_colours_and_new_ones_get_others(known, k):
    new = [f"new {i}" for i in range(k)]
    colors = model_colors(new + known)
    assert list(colors) == new + known and colors == model_colors(dict.fromkeys(new + known))
    assert {n: colors[n] for n in known} == {n: COLORS[n] for n in known} == model_colors(known)
    assert len({colors[n] for n in new}) == len(new) and not {colors[n] for n in new} & {colors[n] for n in known}

def test_there_is_a_colour_for_each_of_many_models():
    from matplotlib.colors import is_color_like
    assert all(map(is_color_like, model_colors([*COLORS, *map(str, range(30))]).values()))


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True).stdout.strip()
    host = core._HOST
    names = [f".file.{host}-{gone}-1a.part", f".file.{host}-{os.getpid()}-1a.part", f".file.another-{gone}-1a.part",
             f".other.{host}-{gone}-1a.part", f".file.{host}-x-1a.part"]
    for n in names: (tmp_path/n).write_text("half")
    with atomic_path(tmp_path/"file") as part: part.write_text("whole")
    assert {p.name for p in tmp_path.iterdir()} == {"file", *names[1:]}, "only what a process that is no more left of the same file, on this machine"

@pytest.mark.parametrize("error, said", [(torch.OutOfMemoryError("CUDA"), True), (MemoryError(), True),
    (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("shape mismatch"), False), (ValueError("can't allocate memory"), False)])
def test_errors_that_mean_no_memory(error, said): assert core.out_of_memory(error) is said

@dataclass
class Scaled:
    by:float=1.
    def __call__(self, model, batch, backward): return 0

@dataclass
class Shifted(Scaled): pass

def test_objectives_that_are_dataclasses_are_told_apart_by_their_class():
    assert describe(Scaled()) == {"call": "Scaled", "by": 1.} != describe(Shifted()) and "call" not in describe(SCALES["smoke"])

def test_a_setting_that_is_switched_off_against_its_default_tells_runs_apart():
    def f(x, on=True, quiet=False): return x
    ids = {run_id("s", "n", "smoke", describe(dict(run=partial(f, **kwargs))), 0, dict(fingerprint="f")) for kwargs in ({}, dict(on=False), dict(quiet=True))}
    same = [run_id("s", "n", "smoke", describe(dict(run=partial(f, **kwargs))), 0, dict(fingerprint="f")) for kwargs in ({}, dict(quiet=False))]
    assert len(ids) == 3 and same[0] == same[1]

def test_a_number_that_json_cannot_hold_is_named(tmp_path):
    record = make_record("s", "n", "smoke", {}, 0, dict(fingerprint="f"), torch.device("cpu"), 1., {"rows": [dict(accuracy=1.), dict(accuracy=math.nan)]})
    with pytest.raises(ValueError, match=r"r.jsonl: record\['metrics'\]\['rows'\]\[1\]\['accuracy'\] is not a finite number"):
        append_record(tmp_path/"r.jsonl", record)
    assert not (tmp_path/"r.jsonl").exists()

def test_the_commit_is_that_of_the_files_that_run(tmp_path, monkeypatch):
    def git(*args):
        call = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()
    commit, package = core.git_commit.__wrapped__, tmp_path/"robustcv"
    package.mkdir(); (tmp_path/"results").mkdir(); (package/"core.py").write_text("1"); (tmp_path/"results"/"r.jsonl").write_text("")
    monkeypatch.setattr(core, "__file__", str(package/"core.py"))
    git("init", "-q"); assert commit() == "unknown", "not part of this checkout"
    git("add", "."); git("commit", "-qm", "a"); git("tag", "-a", "v9", "-m", "v9")
    (tmp_path/"results"/"r.jsonl").write_text("a record")
    assert commit() == git("rev-parse", "--short=12", "HEAD"), "records do not change what runs"
    (package/"core.py").write_text("2")
    assert commit() == git("rev-parse", "--short=12", "HEAD") + "-dirty"

ROW = dict(perturbation="clean", strength=None, unit="", correct=3, n=10, seconds=0., hits="4AA=")

@pytest.mark.parametrize("row, said", [("clean", "a JSON object, not str"), ({**ROW, "n": 0}, "3 correct of 0"), ({**ROW, "correct": 11}, "11 correct of 10"),
    ({**ROW, "hits": "!!"}, "'hits' is not of 10 images"), ({k: v for k, v in ROW.items() if k != "hits"}, "field 'hits' is missing"),
    ({**ROW, "strength": "much"}, "field 'strength'"), ({**ROW, "hits": "*AA="}, "'hits' is not of 10 images"),
    ({**ROW, "hits": "8AA="}, "'hits' is not of 10 images of which 3 are right"),
    *[({k: v for k, v in ROW.items() if k != lost}, f"field '{lost}'") for lost in ("strength", "unit", "seconds")]])
def test_a_damaged_measurement_is_named_by_file_line_and_row(tmp_path, row, said):
    sound = {**BASE, "metrics": {"evaluation": [ROW]}}
    (tmp_path/"r.jsonl").write_text(json.dumps(sound) + "\n" + json.dumps({**sound, "id": "b", "metrics": {"evaluation": [ROW, row]}}) + "\n")
    with pytest.raises(ValueError, match=f"r.jsonl:2: metrics, evaluation, row 2: .*{said}"): load_records(tmp_path)

@pytest.mark.parametrize("number, remedy", [(errno.ENOSPC, "free some space"), (errno.EACCES, "the right to write there"),
                                            (errno.ENOTDIR, "move away the file"), (errno.EISDIR, "move away the folder")])
def test_a_disk_error_says_what_helps(number, remedy):
    with pytest.raises(OSError, match=remedy):
        with core.disk_errors("file"): raise OSError(number, "no")

def test_a_folder_in_the_making_is_removed_and_so_is_what_a_killed_process_left(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True).stdout.strip()
    left = core._part(tmp_path/"set"); left = left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead}-")); (left/"inside").mkdir(parents=True)
    with temporary_folder(tmp_path/"set") as part:
        assert part.is_dir() and part.parent == tmp_path and not left.exists()
        (part/"file").write_text("x")
    assert not list(tmp_path.iterdir())

def test_numbers_of_numpy_are_numbers(): assert derive_seed(0, np.float64(.1), np.int64(3)) == derive_seed(0, .1, 3)

@pytest.mark.parametrize("rows", [None, 3, {}])
def test_measurements_are_a_list(rows):
    record = make_record("s", "a", "smoke", {}, 0, {"fingerprint": "f"}, torch.device("cpu"), 1., {"evaluation": rows})
    with pytest.raises(ValueError, match="evaluation is no list"): check_record(json.loads(json.dumps(record)))

def test_a_file_where_a_folder_is_needed_is_named_with_the_remedy(tmp_path):
    (tmp_path/"file").write_text("x"); (tmp_path/"folder").mkdir()
    def build(path):
        with core.temporary_folder(path): pass
    def lock(path):
        with core.alone_with(path): pass
    def write(path):
        with core.atomic_path(path) as part: part.write_text("x")
    for act in (build, lock, write):
        with pytest.raises(OSError, match=r"cannot write .*file/x: .*; move away the file that is where a folder is needed or choose another folder$"):
            act(tmp_path/"file"/"x")
    with pytest.raises(OSError, match="move away the folder of that name"): write(tmp_path/"folder")
    assert (tmp_path/"file").read_text() == "x" and sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
