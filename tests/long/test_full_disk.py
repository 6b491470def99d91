"""A file system that is really full: a clear error, and nothing that was there is lost."""
import errno
import subprocess

import pytest
import torch
from torch import nn

from robustcv.core import append_record, load_records, make_record
from robustcv.data import ImageSet, load_data
from robustcv.models import build_model, load_model, save_model
from robustcv.synthetic import make_synthetic
from robustcv.training import Training, fit

@pytest.fixture
def disk(tmp_path):
    "A folder on a file system of its own, with two megabytes."
    folder = tmp_path/"disk"; folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)

def fill(disk, leave):
    "Fill the disk up to some bytes."
    free = subprocess.run(["df", "-B1", "--output=avail", disk], capture_output=True, text=True, check=True).stdout.split()[1]
    (disk/"ballast").write_bytes(bytes(max(0, int(free) - leave)))

def refused(work, path):
    with pytest.raises(OSError, match="free some space") as e: work()
    assert e.value.errno == errno.ENOSPC and str(path) in str(e.value)

def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(disk, tmp_path):
    images = ImageSet(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 2, ("a", "b"))
    def go(folder, watch=None):
        torch.manual_seed(0); model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 12), nn.Linear(12, 2)) # 0.15 MB, as much of momentum and of the best weights
        history = fit(model, images, images, config=Training(epochs=3, batch_size=4, lr=1e-3, precision="fp32"), device="cpu", folder=folder, watch=watch)
        return history.drop(columns=["seconds", "images_per_second"]), model.state_dict()
    def fills_up(model, valid, before): # after the first epoch
        if (disk/"state.pt").exists(): fill(disk, 100_000)
        return {}
    refused(lambda: go(disk, fills_up), disk/"state.pt")
    kept = torch.load(disk/"state.pt", weights_only=True)["history"]
    assert '"epoch": 1' in kept and '"epoch": 2' not in kept and not list(disk.glob(".*.part"))
    (disk/"ballast").unlink()
    (history, weights), (expected, fresh) = go(disk), go(tmp_path/"elsewhere")
    assert history.equals(expected) and all(weights[k].equal(fresh[k]) for k in weights)

def test_records_that_fit_stay(disk):
    path, n = disk/"r.jsonl", 0
    record = lambda i: make_record("s", f"{i}", "smoke", {"text": "x"*50_000}, i, {"fingerprint": "f"}, torch.device("cpu"), 1., {})
    def write():
        nonlocal n
        while True: append_record(path, record(n)); n += 1
    refused(write, path)
    with pytest.warns(UserWarning) if path.read_bytes()[-1:] != b"\n" else pytest.MonkeyPatch.context(): found = load_records(path)
    assert n > 20 and [r["name"] for r in found] == [f"{i}" for i in range(n)]

def test_a_network_that_does_not_fit_leaves_the_old_one(disk):
    model = build_model("shufflenet_v2_x0_5", 2); save_model(model, disk/"m.safetensors") # 1.4 MB, and there is no room for two
    before = (disk/"m.safetensors").read_bytes()
    refused(lambda: save_model(model, disk/"m.safetensors"), disk/"m.safetensors")
    assert (disk/"m.safetensors").read_bytes() == before and load_model(disk/"m.safetensors") and [f.name for f in disk.iterdir()] == ["m.safetensors"]

def test_a_cache_that_does_not_fit_leaves_nothing(disk, tmp_path):
    source = make_synthetic(tmp_path/"images", 200, 10, classes=4, size=64)
    refused(lambda: load_data(source, cache=disk), disk)
    assert not list(disk.iterdir())
