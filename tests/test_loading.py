"""Folders of images: the official layout, any class-per-folder tree, and the cache."""
import errno
import multiprocessing
import os
import shutil
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps

from robustcv.cache import _plain_jpeg
from robustcv.data import in_both, load_data, load_folder, load_tiny_imagenet

def picture(seed=0, size=(16, 16), mode="RGB"):
    "A smooth random picture; `size` is width, height."
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)

def write_tree(root, names=("a/0.png", "a/1.png", "b/0.png"), size=(16, 16)):
    for seed, name in enumerate(names):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed, size).save(root/name)
    return root

def pixels(path): return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)

@pytest.fixture
def official(tiny, tmp_path): return shutil.copytree(tiny, tmp_path/"official")

@pytest.fixture
def cache(tmp_path): return tmp_path/"cache"

def edit(file, change):
    "Change a text file line by line; `change` maps the number and text of a line to its new text."
    file.write_text("".join(f"{change(n, line)}\n" for n, line in enumerate(file.read_text().splitlines())))


# the official layout

def test_the_official_layout_is_read_in_full(tiny):
    train, valid = (load_tiny_imagenet(tiny, s) for s in ("train", "val"))
    assert train.images.shape == (24, 3, 32, 32) and valid.images.shape == (12, 3, 32, 32)
    assert train.classes == valid.classes == ("apple", "umbrella", "striped balloon", "house")
    assert train.labels.tolist() == [i//6 for i in range(24)] and train.name == "tiny/train" and train.synthetic
    for i in (0, 7, 23):
        w = f"s0000000{i//6 + 1}"
        assert torch.equal(train.images[i], pixels(tiny/"train"/w/"images"/f"{w}_{i%6}.JPEG"))

def test_the_flat_validation_folder_is_not_one_class(tiny):
    valid, wnids = load_tiny_imagenet(tiny, "val"), (tiny/"wnids.txt").read_text().split()
    for i, line in enumerate((tiny/"val"/"val_annotations.txt").read_text().splitlines()):
        file, wnid, *box = line.split("\t")
        assert torch.equal(valid.images[i], pixels(tiny/"val"/"images"/file)) and wnids[valid.labels[i]] == wnid
        x0, y0, x1, y1 = map(int, box)
        assert valid.boxes[i].tolist() == pytest.approx([x0/32, y0/32, (x1 + 1)/32, (y1 + 1)/32]) # inclusive corners

def test_the_folder_above_is_found_too(official):
    official.rename(official.parent/"tiny-imagenet-200")
    assert len(load_tiny_imagenet(official.parent)) == 24

@pytest.mark.parametrize("box, expected", [("0\t0\t31\t31", [0, 0, 1, 1]), ("0\t0\t0\t0", None), ("9\t9\t3\t3", None),
                                           ("5\t5\t5\t20", None), ("0\t0\t63\t99", [0, 0, 1, 1]), ("8\t4\t15\t11", [.25, .125, .5, .375])])
def test_boxes_are_inclusive_and_clipped_and_empty_ones_have_no_area(official, box, expected):
    edit(official/"train"/"s00000001"/"s00000001_boxes.txt", lambda n, line: f"{line.split(chr(9))[0]}\t{box}" if n == 2 else line)
    x0, y0, x1, y1 = load_tiny_imagenet(official).boxes[2].tolist()
    assert [x0, y0, x1, y1] == expected if expected else (x1 - x0)*(y1 - y0) == 0

def test_a_grayscale_image_gets_three_equal_channels(official):
    file = official/"train"/"s00000002"/"images"/"s00000002_1.JPEG"
    Image.open(file).convert("L").save(file)
    image = load_tiny_imagenet(official).images[7]
    assert torch.equal(image[0], image[1]) and torch.equal(image, pixels(file))

def test_annotations_of_images_that_are_not_there_are_tolerated(official):
    (official/"train"/"s00000001"/"images"/"s00000001_3.JPEG").unlink()
    (official/"val"/"images"/"val_0.JPEG").unlink()
    train, valid = load_tiny_imagenet(official), load_tiny_imagenet(official, "val")
    assert len(train) == 23 and len(valid) == 11
    assert torch.equal(valid.images[0], pixels(official/"val"/"images"/"val_1.JPEG"))

def test_an_image_without_a_box_gets_an_empty_one(official):
    edit(official/"train"/"s00000001"/"s00000001_boxes.txt", lambda n, line: "" if n == 0 else line)
    train = load_tiny_imagenet(official)
    assert len(train) == 24 and not train.boxes[0].any() and train.boxes[1].any()

def test_classes_of_one_name_are_told_apart_and_unnamed_ones_keep_their_wnid(official):
    (official/"words.txt").write_text("s00000001\tcrane, bird\ns00000002\tcrane\n")
    assert load_tiny_imagenet(official).classes == ("crane (s00000001)", "crane (s00000002)", "s00000003", "s00000004")

@pytest.mark.parametrize("line", ["x.JPEG\t1\t2\t3", "x.JPEG\ta\tb\tc\td", "x.JPEG\t0\t0\tnan\t5", "x.JPEG 0 0 5 5",
    "x.JPEG\t1\t2\t3\t4\t5"])
def test_a_malformed_annotation_is_named_by_file_and_line(official, line):
    edit(official/"train"/"s00000002"/"s00000002_boxes.txt", lambda n, old: line if n == 3 else old)
    with pytest.raises(ValueError, match="s00000002_boxes.txt:4: expected 5 tab-separated columns"): load_tiny_imagenet(official)

def test_an_unknown_class_in_the_annotations_is_named(official):
    edit(official/"val"/"val_annotations.txt", lambda n, line: line.replace(line.split("\t")[1], "n777") if n == 1 else line)
    with pytest.raises(ValueError, match=r"val_annotations.txt: class n777 of val_1.JPEG is not in wnids.txt"):
        load_tiny_imagenet(official, "val")

@pytest.mark.parametrize("gone, split", [("train/s00000003/images", "train"), ("train/s00000003/s00000003_boxes.txt", "train"),
                                         ("val/images", "val"), ("val/val_annotations.txt", "val")])
def test_a_missing_part_is_named(official, gone, split):
    shutil.rmtree(official/gone) if (official/gone).is_dir() else (official/gone).unlink()
    with pytest.raises(FileNotFoundError, match=gone): load_tiny_imagenet(official, split)

@pytest.mark.parametrize("left", [None, ".hidden"])
def test_a_class_without_images_is_named(official, left):
    folder = official/"train"/"s00000003"/"images"
    for f in folder.iterdir(): f.unlink()
    if left: (folder/left).touch()
    with pytest.raises(ValueError, match="class s00000003 has no image"): load_tiny_imagenet(official)

def test_other_folders_and_splits_are_refused(tmp_path, tiny):
    with pytest.raises(FileNotFoundError, match="wnids.txt"): load_tiny_imagenet(tmp_path)
    with pytest.raises(ValueError, match="use 'train' or 'val'"): load_tiny_imagenet(tiny, "test")

# any folder

def test_every_format_is_decoded_as_pil_does(tmp_path):
    root = tmp_path/"mixed"; (root/"a"/"deep").mkdir(parents=True)
    picture(1).save(root/"a"/"0.png"); picture(2).save(root/"a"/"1.JPEG"); picture(3, mode="P").save(root/"a"/"2.png")
    picture(4, mode="RGBA").save(root/"a"/"3.png")
    picture(5, mode="CMYK").save(root/"a"/"4.jpg")
    picture(6, mode="L").save(root/"a"/"5.png")
    picture(7).save(root/"a"/"6.gif")
    picture(8).save(root/"a"/"7.webp")
    picture(9).save(root/"a"/"8.bmp")
    picture(10).save(root/"a"/"9.tif")
    picture(11, mode="1").save(root/"a"/"9a.png")
    picture(12).save(root/"a"/"deep"/"0.ppm")
    (root/"a"/"notes.txt").write_text("not an image")
    data = load_folder(root)
    files = [*sorted(f for f in (root/"a").iterdir() if f.is_file() and f.suffix != ".txt"), root/"a"/"deep"/"0.ppm"]
    assert len(data) == len(files) == 12 and data.boxes is None
    for image, file in zip(data.images, files, strict=True): assert torch.equal(image, pixels(file)), file.name

@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_keep_their_upper_eight(tmp_path, name):
    deep = np.random.default_rng(0).integers(0, 65536, (16, 16), np.uint16)
    (tmp_path/"in"/"a").mkdir(parents=True); file = tmp_path/"in"/"a"/name
    if name == "a.pgm": file.write_bytes(b"P5 16 16 65535\n" + deep.astype(">u2").tobytes())
    else: Image.fromarray(deep).save(file)
    assert load_folder(tmp_path/"in").images[0, 1].tolist() == (deep >> 8).tolist()

KINDS = {"plain": {}, "gray": {"mode": "L"}, "whole colours": {"subsampling": 0}, "half colours": {"subsampling": 1}, "progressive": {"progressive": True},
         "restarts": {"restart_marker_rows": 1}, "no conversion": {"keep_rgb": True}}

@pytest.mark.parametrize("kind", KINDS)
def test_a_small_jpeg_is_decoded_at_once_to_the_pixels_it_has(tmp_path, kind):
    keep = dict(KINDS[kind]); mode = keep.pop("mode", "RGB")
    picture(1, (37, 50), mode).save(file := tmp_path/"a.jpg", **keep)
    assert torch.equal(torch.from_numpy(_plain_jpeg(file.read_bytes()).copy()), pixels(file))

def test_what_is_no_small_jpeg_gets_a_second_look(tmp_path):
    exif = Image.Exif(); exif[0x0112] = 3
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
    for name, image, keep in (("turned.jpg", picture(), {"exif": exif}), ("turned too.jpg", picture(), {"xmp": xmp}),
                              ("inks.jpg", picture(mode="CMYK"), {}), ("other.png", picture(), {}),
                              ("large.jpg", Image.new("RGB", (1025, 1024)), {})):
        image.save(tmp_path/name, **keep)
        assert _plain_jpeg((tmp_path/name).read_bytes()) is None, name
    Image.new("RGB", (1024, 1024)).save(tmp_path/"million.jpg")
    whole = (tmp_path/"million.jpg").read_bytes(); assert _plain_jpeg(whole).shape == (3, 1024, 1024)
    for n in range(700): assert _plain_jpeg(whole[:n]) is None, n

def test_a_photograph_with_odd_metadata_is_read(tmp_path):
    exif = Image.Exif(); exif[0x0112], exif[0x010e] = 6, "text"
    (tmp_path/"in"/"a").mkdir(parents=True); file = tmp_path/"in"/"a"/"0.jpg"
    picture().save(file, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(file))
    file.write_bytes(file.read_bytes().replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02")) # the text becomes the image's width
    assert load_folder(tmp_path/"in").images[0].permute(1, 2, 0).tolist() == np.array(upright).tolist()

@pytest.mark.parametrize("size", [None, 16])
def test_a_rotated_photograph_is_turned_upright(tmp_path, size):
    exif = Image.Exif(); exif[0x0112] = 6
    (tmp_path/"in"/"a").mkdir(parents=True); file = tmp_path/"in"/"a"/"0.jpg"
    picture(0, (32, 32)).save(file, exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    if size: upright = upright.resize((size, size), Image.Resampling.BICUBIC)
    difference = load_folder(tmp_path/"in", size).images[0].float() - torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert difference.abs().max() <= (12 if size else 0) # a JPEG may be decoded at a reduced size

@pytest.mark.parametrize("shape, box", [((40, 20), (10, 0, 30, 20)), ((20, 50), (0, 15, 20, 35))])
def test_resizing_takes_the_centred_square(tmp_path, shape, box):
    write_tree(tmp_path/"in", ["a/0.png"], shape)
    expected = Image.open(tmp_path/"in/a/0.png").resize((10, 10), Image.Resampling.BICUBIC, box)
    assert load_folder(tmp_path/"in", 10).images[0].permute(1, 2, 0).tolist() == np.array(expected).tolist()

def test_images_of_several_sizes_need_a_size(tmp_path):
    root = write_tree(tmp_path/"in"); picture(0, (20, 16)).save(root/"b"/"odd.png")
    said = r"(?s)1 of 4 image files are of other sizes; give size= \(--size\) to resize all:.*odd.png: 20×16 pixels where others have 16×16$"
    with pytest.raises(ValueError, match=said): load_folder(root)
    assert load_folder(root, 16).images.shape == (4, 3, 16, 16)

def test_damaged_files_are_named_together(tmp_path, cache):
    root = write_tree(tmp_path/"in", ["a/0.png", "a/1.jpg", "b/0.png", "b/1.png"])
    (root/"a"/"1.jpg").write_bytes((root/"a"/"1.jpg").read_bytes()[:300]) # cut short
    (root/"b"/"0.png").write_text("<html>404</html>"); (root/"b"/"1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="(?s)3 of 4 image files.*1.jpg.*b/0.png.*b/1.png"): load_folder(root, cache=cache)
    assert not list(cache.iterdir())

@settings(max_examples=60)
@given(st.sampled_from(["jpg", "png", "gif", "tif", "webp", "bmp", "ppm"]), st.data())
def test_no_damage_escapes_as_another_error(tmp_path_factory, kind, data):
    root = write_tree(tmp_path_factory.mktemp("fuzz"), [f"a/0.{kind}"]); file = root/"a"/f"0.{kind}"
    content = bytearray(file.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)): content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(content[:data.draw(st.integers(1, len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # PIL's, of odd metadata
        try: load_folder(root, 16)
        except ValueError as e: assert f"0.{kind}" in str(e)

@pytest.mark.parametrize("names", [[], ["0.png"]])
def test_a_folder_without_classes_is_refused(tmp_path, names):
    (tmp_path/"in").mkdir(); write_tree(tmp_path/"in", names)
    with pytest.raises(FileNotFoundError, match="no class folders"): load_folder(tmp_path/"in")

def test_an_empty_class_and_a_missing_folder_are_named(tmp_path):
    root = write_tree(tmp_path/"in"); (root/"c").mkdir(); (root/"c"/"readme.txt").touch()
    with pytest.raises(ValueError, match="class 'c' has no image"): load_folder(root)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"): load_folder(tmp_path/"nowhere")

@pytest.mark.parametrize("size", [0, 7, 5000, -1])
def test_a_size_out_of_range_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"size={size}"): load_folder(write_tree(tmp_path/"in"), size)

def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write_tree(tmp_path/"pets"))
    assert load_folder(".").name == "pets"

def test_hidden_files_are_left_out(tmp_path):
    root = write_tree(tmp_path/"in", ["a/0.png", "a/.0.png", ".git/0.png"])
    assert load_folder(root).classes == ("a",) and len(load_folder(root)) == 1

def test_many_files_decoded_in_parallel_equal_those_decoded_in_turn(tmp_path):
    root = write_tree(tmp_path/"in", [f"{c}/{i:04}.bmp" for c in "ab" for i in range(1000)], (4, 4))
    both = [load_folder(root, cache=tmp_path/str(w), workers=w) for w in (1, 2)]
    assert both[0].fingerprint == both[1].fingerprint and torch.equal(both[0].images, both[1].images)
    assert torch.equal(both[1].images[1999], pixels(root/"b"/"0999.bmp"))


# the cache

@pytest.fixture
def no_decoding(monkeypatch):
    def forbid(): monkeypatch.setattr(Image, "open", lambda *args: pytest.fail("decoded again"))
    return forbid

def test_a_second_opening_decodes_nothing(tmp_path, cache, no_decoding, official):
    root = write_tree(tmp_path/"in")
    first = [load_folder(root, cache=cache), load_folder(root, 8, cache=cache), *load_data(official, cache=cache)]
    no_decoding()
    again = [load_folder(root, cache=cache), load_folder(root, 8, cache=cache), *load_data(official, cache=cache)]
    assert [a.fingerprint for a in first] == [a.fingerprint for a in again] and len(list(cache.iterdir())) == 4
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))

@pytest.mark.parametrize("change, classes, n", [
    (lambda r: picture(9).save(r/"a"/"new.png"), 2, 4), (lambda r: (r/"a"/"1.png").unlink(), 2, 2), (lambda r: shutil.rmtree(r/"b"), 1, 2),
    (lambda r: write_tree(r, ["c/0.png"]), 3, 4), (lambda r: (r/"b").rename(r/"z"), 2, 3)])
def test_a_changed_folder_is_noticed(tmp_path, cache, change, classes, n):
    root = write_tree(tmp_path/"in"); before = load_folder(root, cache=cache).fingerprint
    change(root)
    data = load_folder(root, cache=cache)
    assert (len(data.classes), len(data)) == (classes, n) and data.fingerprint != before

@pytest.mark.parametrize("change", [lambda r: (r/"train"/"s00000001"/"images"/"s00000001_0.JPEG").unlink(),
    lambda r: edit(r/"train"/"s00000001"/"s00000001_boxes.txt", lambda n, line: line + "0"),
    lambda r: edit(r/"wnids.txt", lambda n, line: "" if n == 3 else line)])
def test_a_changed_official_set_is_noticed(official, cache, change):
    before = load_tiny_imagenet(official, cache=cache)
    change(official)
    after = load_tiny_imagenet(official, cache=cache)
    assert len(after) != len(before) or not torch.equal(after.boxes, before.boxes)

def test_rebuilding_sees_files_that_were_overwritten(tmp_path, cache):
    root = write_tree(tmp_path/"in"); load_folder(root, cache=cache)
    picture(99).save(root/"a"/"0.png")
    assert torch.equal(load_folder(root, cache=cache, rebuild=True).images[0], pixels(root/"a"/"0.png"))
    assert torch.equal(load_folder(root, cache=cache).images[0], pixels(root/"a"/"0.png"))

def foreign(path):
    from safetensors.torch import save_file
    save_file({"x": torch.zeros(3)}, path)

@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(b""), lambda f: f.write_bytes(f.read_bytes()[:-100]),
    lambda f: f.write_bytes(b"x"*500),
    lambda f: f.write_bytes(f.read_bytes()[:40]), lambda f: f.write_bytes(f.read_bytes().replace(b"stamp", b"stomp")),
    foreign,
    lambda f: f.write_bytes(f.read_bytes().replace((1).to_bytes(8, "little"), (77).to_bytes(8, "little")))],
    ids=["empty", "truncated", "garbage", "head only", "no stamp", "another file", "labels"])
def test_a_damaged_cache_file_is_rebuilt(tmp_path, cache, damage):
    root = write_tree(tmp_path/"in"); good = load_folder(root, cache=cache).fingerprint
    damage(next(cache.iterdir()))
    with pytest.warns(UserWarning, match="damaged cache file"): assert load_folder(root, cache=cache).fingerprint == good
    assert load_folder(root, cache=cache).fingerprint == good

@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_images_are_mapped_and_not_copied(tmp_path, cache):
    data = load_folder(write_tree(tmp_path/"in"), cache=cache); file = str(next(cache.iterdir()))
    maps = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(file)]
    assert any(int(a, 16) <= data.images.data_ptr() < int(b, 16) for a, b in maps)

def test_writing_into_a_set_does_not_reach_its_cache_file(tmp_path, cache):
    data = load_folder(write_tree(tmp_path/"in"), cache=cache); before = next(cache.iterdir()).read_bytes()
    data.images.zero_()
    assert next(cache.iterdir()).read_bytes() == before and load_folder(tmp_path/"in", cache=cache).images.any()

def test_processes_that_build_one_cache_at_once_all_succeed(tmp_path, cache):
    root, context = write_tree(tmp_path/"in", [f"a/{i}.png" for i in range(60)]), multiprocessing.get_context("fork")
    barrier, found = context.Barrier(3), context.Queue()
    def build(): barrier.wait(30); found.put(load_folder(root, cache=cache).fingerprint)
    workers = [context.Process(target=build) for _ in range(3)]
    for w in workers: w.start()
    prints = {found.get(timeout=30) for _ in workers}
    for w in workers: w.join()
    assert prints == {load_folder(root, cache=cache).fingerprint} and len(list(cache.iterdir())) == 1

@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="reserves space on POSIX systems only")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_and_leaves_no_file(tmp_path, cache, monkeypatch, code):
    def full(*args): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"(?s)cannot write {cache}.*free some space.*ROBUSTCV_CACHE") as e:
        load_folder(write_tree(tmp_path/"in"), cache=cache)
    assert e.value.errno == code and not list(cache.iterdir())

def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTCV_CACHE", str(tmp_path/"there"))
    load_folder(write_tree(tmp_path/"in"))
    assert len(list((tmp_path/"there").iterdir())) == 1


# whatever layout is there

def test_load_data_reads_the_three_layouts(tmp_path, tiny):
    assert [len(s) for s in load_data(tiny)] == [24, 12]
    for val in ("val", "valid", "validation"):
        root = write_tree(tmp_path/val, ["train/a/0.png", "train/a/1.png", "train/b/0.png", f"{val}/a/0.png", f"{val}/b/0.png"])
        assert [s.labels.tolist() for s in load_data(root)] == [[0, 0, 1], [0, 1]]
    root = write_tree(tmp_path/"flat", [f"{c}/{i}.png" for c in "ab" for i in range(5)])
    assert [s.labels.tolist() for s in load_data(root, 8, 0.4)] == [[0]*3 + [1]*3, [0]*2 + [1]*2]

@pytest.mark.parametrize("size", [None, 16, 32])
def test_load_data_resizes_the_official_set_too(tiny, cache, size):
    train, valid = load_data(tiny, size, cache=cache)
    assert train.images.shape[2:] == valid.images.shape[2:] == ((size or 32),)*2
    assert torch.equal(train.boxes, load_tiny_imagenet(tiny).boxes)
    if size == 32: assert train.fingerprint == load_tiny_imagenet(tiny).fingerprint

def test_load_data_names_classes_of_one_half_only(tmp_path):
    root = write_tree(tmp_path/"in", ["train/a/0.png", "train/b/0.png", "val/a/0.png", "val/c/0.png"])
    with pytest.raises(ValueError, match="different classes: b, c"): load_data(root)
    with pytest.raises(FileNotFoundError, match="no such folder"): load_data(tmp_path/"nowhere")

@pytest.mark.parametrize("ids, said", [("s00000001 s00000002 s00000001", r"wnids.txt: lists s00000001 more than once"),
                                       ("\xff s00000001", r"wnids.txt lists .* unpack")])
def test_a_damaged_list_of_classes_is_named(official, cache, ids, said):
    (official/"wnids.txt").write_bytes("\n".join(ids.split()).encode("latin1"))
    with pytest.raises((ValueError, OSError), match=said): load_tiny_imagenet(official, "train", cache=cache)

@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_an_image_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path, kind, size):
    root = write_tree(tmp_path/"in"); file = root/"b"/f"0.{kind}"
    picture(0, (30, 40)).save(file); content = bytearray(file.read_bytes())
    at = 16 if kind == "png" else content.index(b"\xff\xc0") + 5 # width and height in the header
    if kind == "png":
        content[at:at + 8] = (30_000).to_bytes(4, "big")*2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    else: content[at:at + 4] = (30_000).to_bytes(2, "big")*2
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"0.{kind}: .*exceeds limit"): load_folder(root, size)

def test_a_folder_for_training_without_one_to_measure_on_is_no_class(tmp_path, cache):
    root = write_tree(tmp_path/"d", ("train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png"))
    with pytest.raises(ValueError, match="d: holds test, train, which look like parts of a data set and not like classes; name them train and val"):
        load_data(root, cache=cache)
    for parts in (("Train", "Val"), ("training", "validation"), ("train",)):
        with pytest.raises(ValueError, match=f"holds {', '.join(parts)}, which"):
            load_data(write_tree(tmp_path/parts[0], [f"{p}/a/0.png" for p in parts]), cache=cache)
    vehicles = write_tree(tmp_path/"v", [f"{c}/{i}.png" for c in ("boat", "train") for i in range(5)])
    assert load_data(vehicles, cache=cache)[0].classes == ("boat", "train")

def test_a_new_image_behind_a_link_is_noticed(tmp_path, cache):
    write_tree(tmp_path/"real", ("cat/0.png", "dog/0.png")); (tmp_path/"links").mkdir()
    for c in ("cat", "dog"): (tmp_path/"links"/c).symlink_to(tmp_path/"real"/c)
    assert len(load_folder(tmp_path/"links", cache=cache)) == 2
    picture(9).save(tmp_path/"real"/"cat"/"1.png")
    assert len(load_folder(tmp_path/"links", cache=cache)) == 3

def test_images_of_several_sizes_in_the_official_layout_keep_their_boxes_when_resized(official, cache):
    folder, file = official/"train"/"s00000001"/"images", official/"train"/"s00000001"/"s00000001_boxes.txt"
    picture(1, (64, 32)).save(folder/"s00000001_0.JPEG"); picture(1, (32, 96)).save(folder/"s00000001_1.JPEG")
    given = {0: (16, 0, 31, 15), 1: (0, 0, 31, 15), 2: (0, 0, 15, 15)} # inclusive; the second one is cropped away
    edit(file, lambda n, line: "\t".join(map(str, (f"s00000001_{n}.JPEG", *given[n]))) if n in given else line)
    boxes = load_data(official, size=16, cache=cache)[0].boxes[:3]
    torch.testing.assert_close(boxes, torch.tensor([[0, 0, .5, .5], [0, 0, 1, 0], [0, 0, .5, .5]]))
    with pytest.raises(ValueError, match=r"are of other sizes; give size= \(--size\) to resize all"): load_data(official, cache=cache)

@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_an_unknown_range_are_refused(tmp_path, cache, mode):
    write_tree(tmp_path/"d", ("a/0.png", "b/0.png"))
    Image.fromarray(np.ones((16, 16), np.float32 if mode == "F" else np.int32)).save(tmp_path/"d"/"a"/"1.tif")
    with pytest.raises(ValueError, match=rf"1.tif: not a readable image \(its pixels have mode '{mode}'"): load_folder(tmp_path/"d", cache=cache)

# what a folder may hold besides

def test_hidden_folders_are_left_out_and_linked_ones_are_followed(tmp_path):
    root, away = write_tree(tmp_path/"in"), write_tree(tmp_path/"away", ["0.png", "more/1.png"])
    write_tree(root, ["a/.thumbnails/0.png"]); (root/"b"/"linked").symlink_to(away); (away/"round").symlink_to(away)
    assert load_folder(root).labels.tolist() == [0, 0, 1, 1, 1]

def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    root, walk = write_tree(tmp_path/"in", ["a/0.png", "a/sub/1.png", "b/0.png"]), os.scandir
    def refuse(path):
        if Path(path).name == "sub": raise PermissionError(13, "Permission denied", str(path))
        return walk(path)
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(PermissionError, match="cannot read .*sub"): load_folder(root)

@pytest.mark.parametrize("name", ["words.txt", "synthetic.json"])
def test_names_and_origin_that_change_are_noticed(official, cache, name):
    before = load_tiny_imagenet(official, cache=cache)
    (official/name).rename(official/"aside"); without = load_tiny_imagenet(official, cache=cache)
    assert without.classes != before.classes if name == "words.txt" else before.synthetic and not without.synthetic
    (official/"aside").rename(official/name); again = load_tiny_imagenet(official, cache=cache)
    assert again.classes == before.classes and again.synthetic

def test_oblong_images_are_made_square_where_a_size_is_asked_for(official, cache):
    for file in official.rglob("*.JPEG"): Image.open(file).resize((32, 48)).save(file)
    for s in load_data(official, 32, cache=cache): assert s.images.shape[2:] == (32, 32)

def test_a_header_that_promises_too_many_pixels_is_named(official, cache):
    file = next(official.rglob("*.JPEG")); content = file.read_bytes(); at = content.index(b"\xff\xc0")
    file.write_bytes(content[:at + 5] + b"\xff\xff\xff\xff" + content[at + 9:])
    with pytest.raises(ValueError, match=file.name): load_tiny_imagenet(official, cache=cache, size=16)

def test_files_that_do_not_end_like_images_are_named(tmp_path):
    root = write_tree(tmp_path/"in")
    for name in ("a/0.HEIC", "a/1.heic", "b/notes", "b/.DS_Store"): (root/name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"3 files are left out \(2 .heic, 1 without an ending\); images end with .avif, .bmp"): load_folder(root)

def test_copies_of_training_images_among_validation_images_are_told(tmp_path):
    root = write_tree(tmp_path/"in", [f"{part}/{c}/{i}.png" for part in ("train", "val") for c in "ab" for i in range(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(root)
    for c in "ab": shutil.copy(root/"train"/c/"0.png", root/"val"/c/"copy.png")
    with pytest.warns(UserWarning, match="2 of 8 validation images are training images, too, byte for byte"): train, valid = load_data(root)
    copies = in_both(train, valid)
    assert copies.sum() == 2 and all((train.images == x).flatten(1).all(1).any() for x in valid.images[copies])

def test_images_that_no_line_names_are_counted(official, tmp_path):
    file = official/"val"/"val_annotations.txt"
    lines = file.read_text().splitlines(keepends=True); file.write_text("".join(lines[:-2]))
    with pytest.warns(UserWarning, match="val/images: 2 images, such as val_.*, are left out, as val_annotations.txt does not name them"):
        assert len(load_tiny_imagenet(official, "val", cache=tmp_path/"own")) == len(lines) - 2

def test_images_in_no_class_s_folder_are_counted(tmp_path):
    for name in ("a/1.png", "b/1.png", "loose.png"):
        (tmp_path/"t"/name).parent.mkdir(parents=True, exist_ok=True); Image.new("RGB", (8, 8)).save(tmp_path/"t"/name)
    with pytest.warns(UserWarning, match="1 images, such as loose.png, are left out, as they lie in no class's folder"):
        load_folder(tmp_path/"t", cache=tmp_path)

@pytest.mark.parametrize("size", ["32", (32, 32), 32.5, 7, 5000])
def test_a_size_is_a_whole_number(tmp_path, size):
    with pytest.raises(ValueError, match="size="): load_folder(tmp_path, size)
