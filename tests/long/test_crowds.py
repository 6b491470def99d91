"""Several processes at the same files at once: one result, nothing lost, nothing torn."""
import multiprocessing
import os

import pytest
import torch

from robustcv.core import append_record, load_records, make_record
from robustcv.data import load_data
from robustcv.synthetic import make_synthetic

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks of POSIX systems")
CROWD = 6

def together(work, n=CROWD):
    "Let n processes do `work(i)` at the same moment."
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(n)
    def go(i): gate.wait(); work(i)
    crowd = [context.Process(target=go, args=(i,)) for i in range(n)]
    for p in crowd: p.start()
    for p in crowd: p.join(120)
    assert [p.exitcode for p in crowd] == [0]*n

def test_a_crowd_that_decodes_the_same_images_gets_one_cache(tmp_path):
    source = make_synthetic(tmp_path/"images", 100, 10, classes=4, size=32)
    for i in range(5):
        together(lambda _, i=i: load_data(source, cache=tmp_path/f"{i}", workers=1))
        files = sorted(f.name for f in (tmp_path/f"{i}").iterdir())
        assert len(files) == 2 and not any(f.endswith(".part") for f in files)
        train, valid = load_data(source, cache=tmp_path/f"{i}")
        assert (len(train), len(valid)) == (400, 40)
        alone = load_data(source, cache=tmp_path/"alone", rebuild=True)[0]
        assert train.images.equal(alone.images) and train.fingerprint == alone.fingerprint

def test_a_crowd_that_draws_the_same_images_gets_one_set(tmp_path):
    for i in range(5):
        together(lambda _, i=i: make_synthetic(tmp_path/f"{i}"/"set", 5, 2, classes=3, size=32))
        assert [f.name for f in (tmp_path/f"{i}").iterdir()] == ["set"] and len(list((tmp_path/f"{i}").rglob("*.JPEG"))) == 3*7

def test_a_crowd_that_appends_to_the_same_records_loses_none(tmp_path):
    def work(i):
        for k in range(50):
            append_record(tmp_path/"r.jsonl", make_record("s", f"{i} {k}", "smoke", {"text": "x"*5000}, i, {"fingerprint": "f"}, torch.device("cpu"), 1., {}))
    together(work)
    found = {r["name"] for r in load_records(tmp_path/"r.jsonl")}
    assert found == {f"{i} {k}" for i in range(CROWD) for k in range(50)}
    lines = (tmp_path/"r.jsonl").read_text().split("\n") # one that looks while another is half through its write adds an empty line
    assert len([l for l in lines if l]) == len(found)
