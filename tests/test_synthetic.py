"""The drawn data set: layout, determinism, boxes."""
import numpy as np
import pytest
from PIL import Image

from robustcv.data import load_tiny_imagenet
from robustcv.drawing import CLASSES, draw_image, draw_scene, mask_box
from robustcv.synthetic import make_synthetic

def contents(root): return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


def test_the_layout_is_the_official_one(tiny):
    wnids = (tiny/"wnids.txt").read_text().split()
    assert wnids == list(CLASSES)[:4] and sorted(f.name for f in (tiny/"train").iterdir()) == wnids
    for w in wnids:
        images = {f.name for f in (tiny/"train"/w/"images").iterdir()}
        boxes = [line.split("\t") for line in (tiny/"train"/w/f"{w}_boxes.txt").read_text().splitlines()]
        assert images == {f"{w}_{i}.JPEG" for i in range(6)} == {b[0] for b in boxes} and all(len(b) == 5 for b in boxes)
    notes = [line.split("\t") for line in (tiny/"val"/"val_annotations.txt").read_text().splitlines()]
    assert {f.name for f in (tiny/"val"/"images").iterdir()} == {n[0] for n in notes} and all(len(n) == 6 for n in notes)
    assert sorted(n[1] for n in notes) == sorted(wnids*3) and [n[1] for n in notes] != sorted(n[1] for n in notes)
    with Image.open(tiny/"val"/"images"/"val_0.JPEG") as im: assert (im.format, im.mode, im.size) == ("JPEG", "RGB", (32, 32))

def test_the_loader_reads_it(tiny):
    train = load_tiny_imagenet(tiny)
    assert train.labels.bincount().tolist() == [6]*4 and train.classes == tuple(CLASSES.values())[:4]
    assert ((train.boxes[:, 2:] - train.boxes[:, :2]).prod(1) > 0.02).all() and (train.boxes >= 0).all() and (train.boxes <= 1).all()

def test_two_builds_are_equal_and_another_seed_is_not(tiny, tmp_path):
    assert contents(make_synthetic(tmp_path/"a", 6, 3, 4, 32)) == contents(tiny)
    other = contents(make_synthetic(tmp_path/"b", 6, 3, 4, 32, seed=1))
    assert not {v for k, v in other.items() if k.endswith("JPEG")} & set(contents(tiny).values())

def test_pictures_are_all_different(tiny):
    pictures = [v for k, v in contents(tiny).items() if k.endswith("JPEG")]
    assert len(pictures) == 36 == len(set(pictures))

def test_more_pictures_keep_the_ones_there_were(tiny, tmp_path):
    more = contents(make_synthetic(tmp_path/"more", 8, 1, 5, 32))
    assert all(more[k] == v for k, v in contents(tiny).items() if k.startswith("train") and k.endswith("JPEG"))

def test_a_second_call_writes_nothing(tmp_path):
    root = make_synthetic(tmp_path/"a", 1, 1, 2, 32)
    stamps = {f: f.stat().st_mtime_ns for f in root.rglob("*")}
    assert make_synthetic(root, 1, 1, 2, 32) == root and {f: f.stat().st_mtime_ns for f in root.rglob("*")} == stamps
    assert [f.name for f in tmp_path.iterdir()] == ["a"]

def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path/"a").mkdir()
    assert len(load_tiny_imagenet(make_synthetic(tmp_path/"a", 1, 1, 2, 32))) == 2

def test_an_occupied_folder_is_refused_and_left_alone(tmp_path, tiny):
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"file").write_text("mine"); (tmp_path/"file").write_text("file")
    for path in (tmp_path/"mine", tmp_path/"file"):
        with pytest.raises(FileExistsError, match="something other than a synthetic data set"): make_synthetic(path, 1, 1, 2, 32)
    with pytest.raises(FileExistsError, match="with other arguments"): make_synthetic(tiny, 7, 3, 4, 32)
    assert contents(tmp_path) == {"mine/file": b"mine", "file": b"file"}

@pytest.mark.parametrize("name, value", [("train_per_class", 0), ("val_per_class", -1), ("classes", 1), ("classes", 11), ("size", 31),
                                         ("size", 64.), ("seed", -1), ("seed", None), ("classes", True), ("train_per_class", "9")])
def test_a_bad_argument_is_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name}(=| must be)"):
        make_synthetic(tmp_path/"a", **{"train_per_class": 1, "val_per_class": 1, name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cls", range(10))
@pytest.mark.parametrize("size", [32, 64])
def test_every_class_is_drawn_whole_with_its_box(cls, size):
    image, (x0, y0, x1, y1) = draw_image(np.random.default_rng([cls, size]), cls, size)
    scene, mask = draw_scene(np.random.default_rng([cls, size]), cls, size)
    assert image.dtype == np.uint8 and image.shape == (size, size, 3) and np.array_equal(image, scene)
    assert 0 <= x0 < x1 < size and 0 <= y0 < y1 < size and (x1 - x0)*(y1 - y0) > size*size/40
    inside = np.zeros_like(mask, bool); inside[y0:y1+1, x0:x1+1] = True
    assert not (mask[~inside] >= 0.5).any() and (mask >= 0.5).any() and image.std() > 5

def test_the_box_is_the_tightest_one():
    mask = np.zeros((8, 9)); mask[2:5, 3:7] = 1; mask[7, 8] = 0.4
    assert mask_box(mask) == (3, 2, 6, 4)
