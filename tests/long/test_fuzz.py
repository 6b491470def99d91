"""Thousands of damaged files: each is read, or refused with an error that names it; nothing hangs, crashes, or is taken for something else."""
import io
import json
import random
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from robustcv import cache
from robustcv.cache import _read_image
from robustcv.core import append_record, check_record, load_records, make_record
from robustcv.data import ImageSet, load_tiny_imagenet
from robustcv.download import unpack_zip
from robustcv.models import Classifier, build_model, load_model, save_model
from robustcv.synthetic import make_synthetic
from robustcv.training import Training, fit

IMAGES = {"JPEG": 3000, "PNG": 2500, "GIF": 1000, "BMP": 1000, "WEBP": 1000, "TIFF": 1500, "PPM": 500} # damaged files of each format

def damaged(content, rng):
    "Some bytes changed, cut off, left out, doubled, or set to what is often too large."
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not out: break
        at, kind = rng.randrange(len(out)), rng.randrange(6)
        if kind < 2: out[at] = rng.randrange(256)
        elif kind == 2: del out[at:]
        elif kind == 3: del out[at:at + rng.randrange(1, 9)]
        elif kind == 4: out[at:at] = out[at:at + rng.randrange(1, 33)]
        else: out[at:at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
    return bytes(out)

def outcome(read, path):
    "What reading gave, or None for a clear error; anything else fails."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: return read(path)
        except (ValueError, OSError) as e:
            assert path.name in str(e) and "Traceback" not in str(e), f"does not name the file: {e!r}"
            return None


@pytest.mark.parametrize("kind, n", IMAGES.items())
def test_damaged_images(kind, n, tmp_path):
    rng, path, pixels = random.Random(kind), tmp_path/"image", np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    read = refused = 0
    for i in range(n):
        size = rng.choice((None, 16))
        image = Image.fromarray(pixels).convert(rng.choice(("RGB", "L", "P") if kind in ("PNG", "GIF", "BMP", "TIFF") else ("RGB",)))
        image.save(content := io.BytesIO(), kind)
        path.write_bytes(damaged(content.getvalue(), rng))
        found = outcome(lambda p, size=size: _read_image(p, size), path)
        if found is None: refused += 1; continue
        read += 1
        assert found[0].dtype == np.uint8 and found[0].shape[0] == 3 and found[0].ndim == 3 and (size is None or found[0].shape[1:] == (16, 16)), i
    assert read and refused

def test_damaged_jpegs_are_read_as_pillow_reads_them(tmp_path, monkeypatch):
    rng, path, pixels = random.Random(1), tmp_path/"image.jpg", np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    at_once = 0
    for i in range(2000):
        Image.fromarray(pixels).convert(rng.choice(("RGB", "L", "CMYK"))).save(content := io.BytesIO(), "JPEG", progressive=rng.random() < .3)
        path.write_bytes(damaged(content.getvalue(), rng))
        at_once += cache._plain_jpeg(path.read_bytes()) is not None
        found = outcome(lambda p: _read_image(p, None), path)
        with monkeypatch.context() as m:
            m.setattr(cache, "_plain_jpeg", lambda content: None)
            expected = outcome(lambda p: _read_image(p, None), path)
        assert (found is None) == (expected is None) and (found is None or np.array_equal(found[0], expected[0])), i
    assert at_once > 200

@pytest.mark.parametrize("file, n", [("val/val_annotations.txt", 400), ("wnids.txt", 200), ("words.txt", 100), ("train/{}/{}_boxes.txt", 200)])
def test_damaged_lists(file, n, tmp_path):
    root, rng = make_synthetic(tmp_path/"images", 2, 2, classes=2, size=32), random.Random(file)
    first = (root/"wnids.txt").read_text().split()[0]
    path = root/file.format(first, first)
    content = path.read_bytes()
    whole = {s: load_tiny_imagenet(root, s, cache=tmp_path/"cache", rebuild=True, workers=1) for s in ("train", "val")}
    for _ in range(n):
        path.write_bytes(damaged(content, rng))
        for s in whole:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try: data = load_tiny_imagenet(root, s, cache=tmp_path/"cache", rebuild=True, workers=1)
                except (ValueError, OSError) as e:
                    assert str(root) in str(e) or path.name in str(e), f"does not name the file: {e!r}"
                    continue
            assert len(data.classes) == len(set(data.classes)) and 0 <= int(data.labels.min()) and int(data.labels.max()) < len(data.classes)
            assert data.boxes is None or (data.boxes.isfinite().all() and data.boxes.min() >= 0 and data.boxes.max() <= 1)

def test_damaged_networks(tmp_path):
    path, rng = tmp_path/"model.safetensors", random.Random(0)
    model = build_model("squeezenet1_1", 2); save_model(model, path)
    content = path.read_bytes(); head = 8 + int.from_bytes(content[:8], "little")
    for _ in range(300):
        part = damaged(content[:head], rng) + content[head:] if rng.random() < .7 else content[:rng.randrange(len(content))]
        path.write_bytes(part)
        assert isinstance(outcome(load_model, path), (Classifier, type(None)))

def test_damaged_checkpoints(tmp_path):
    images = ImageSet(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8) % 2, ("a", "b"))
    make = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    go = lambda: fit(make(), images, images, config=Training(epochs=1, batch_size=4, lr=.01, precision="fp32"), device="cpu", folder=tmp_path)
    go(); path, rng = tmp_path/"state.pt", random.Random(0)
    content = path.read_bytes()
    for _ in range(300):
        path.write_bytes(damaged(content, rng))
        found = outcome(lambda p: go(), path)
        assert found is None or len(found) == 1

def test_damaged_records(tmp_path):
    path, rng = tmp_path/"records.jsonl", random.Random(0)
    for i in range(3):
        append_record(path, make_record("s", f"run {i}", "smoke", {"lr": .1}, i, {"fingerprint": "f"}, torch.device("cpu"), 1., {"accuracy": .5}))
    content = path.read_bytes()
    for _ in range(1500):
        path.write_bytes(damaged(content, rng))
        found = outcome(load_records, path)
        assert found is None or all(check_record(r) for r in found)

def test_damaged_archives(tmp_path):
    path, rng = tmp_path/"archive.zip", random.Random(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(5): z.writestr(f"top/{i}.txt", json.dumps(list(range(50*i))))
    content = path.read_bytes()
    for i in range(1000):
        path.write_bytes(damaged(content, rng))
        try: unpack_zip(path, tmp_path/f"out{i}", "top")
        except (ValueError, OSError): assert not (tmp_path/f"out{i}").exists()
        assert {p.name for p in tmp_path.iterdir()} <= {"archive.zip", *(f"out{k}" for k in range(i + 1))}, "something lies outside"
