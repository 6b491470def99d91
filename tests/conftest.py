"""One thread, a cache of its own, and the two data sets that tests read."""
import hashlib
import os
import urllib.error
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

from robustcv.synthetic import make_synthetic

settings.register_profile("robustcv", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("robustcv")


@pytest.fixture(autouse=True, scope="session")
def isolated(tmp_path_factory):
    torch.set_num_threads(1)
    os.environ["ROBUSTCV_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def pytest_runtest_setup(item): torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "Four classes of six training and three validation images of 32 pixels, in the official layout; read only."
    return make_synthetic(tmp_path_factory.mktemp("data")/"tiny", 6, 3, classes=4, size=32)


@pytest.fixture(scope="session")
def real():
    "The folder of the real Tiny ImageNet."
    path = os.environ.get("ROBUSTCV_TINY_IMAGENET")
    if not path: pytest.skip("set ROBUSTCV_TINY_IMAGENET to the folder of the real data")
    return Path(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "Put a stand-in for a network's pretrained weights into an empty hub folder."
    monkeypatch.setenv("TORCH_HOME", str(tmp_path)); monkeypatch.setattr(torch.hub, "_hub_dir", None)
    def offline(*args, **kwargs): raise urllib.error.URLError("no network in tests")
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    undo = []
    def put(name, weights, state, wrong=False):
        folder = tmp_path/"hub"/"checkpoints"; folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder/"new")
        digest = "0"*8 if wrong else hashlib.sha256((folder/"new").read_bytes()).hexdigest()[:8]
        (folder/"new").rename(folder/f"{name}-{digest}.pth")
        undo.append((weights.value, weights.url)); object.__setattr__(weights.value, "url", f"https://example.invalid/{name}-{digest}.pth")
        return folder/f"{name}-{digest}.pth"
    yield put
    for value, url in undo: object.__setattr__(value, "url", url)
