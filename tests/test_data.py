"""Image sets and batches."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st

from robustcv.data import Batches, ImageSet, _has_room, split, subset, take

def images(n=12, k=3, seed=0, side=8):
    gen = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % k
    return ImageSet(torch.randint(0, 256, (n, 3, side, side), generator=gen, dtype=torch.uint8), labels,
                    tuple(f"class {c}" for c in range(k)), torch.rand(n, 4, generator=gen))

def rebuilt(data, **change): return ImageSet(**{"images": data.images, "labels": data.labels, "classes": data.classes, **change})

sets = st.builds(images, st.integers(6, 30), st.integers(2, 3), st.integers(0, 99))


@pytest.mark.parametrize("change, said", [
    ({"images": torch.rand(12, 3, 8, 8)}, "images: expected uint8"), ({"images": torch.zeros(12, 1, 8, 8, dtype=torch.uint8)}, "images"),
    ({"images": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "images"),
    ({"labels": torch.zeros(12, dtype=torch.int32)}, "labels: expected int64"),
    ({"labels": torch.zeros(11, dtype=torch.int64)}, "labels"), ({"labels": torch.full((12,), 3)}, "do not index the 3 classes"),
    ({"labels": torch.full((12,), -1)}, "do not index"), ({"boxes": torch.rand(12, 3)}, "boxes: expected shape")])
def test_a_set_refuses_parts_that_do_not_fit(change, said):
    with pytest.raises(ValueError, match=said): rebuilt(images(), **change)

def test_a_set_tells_what_it_is():
    assert repr(replace(images(), name="pets")) == "ImageSet(pets: 12 images 8×8, 3 classes)" and len(images()) == 12


@given(sets)
def test_the_fingerprint_survives_a_copy(data):
    assert data.fingerprint == rebuilt(data, images=data.images.clone(), labels=data.labels.clone()).fingerprint
    assert len(data.fingerprint) == 16

@given(sets, st.data())
def test_the_fingerprint_notices_a_pixel_a_label_and_an_order(data, draw):
    i = draw.draw(st.integers(0, len(data) - 1))
    pixels, labels = data.images.clone(), data.labels.clone()
    pixels[i, draw.draw(st.integers(0, 2)), 3, 4] ^= 1; labels[i] = (labels[i] + 1) % len(data.classes)
    changed = [rebuilt(data, images=pixels), rebuilt(data, labels=labels), take(data, torch.arange(len(data)).roll(1)),
               rebuilt(data, classes=tuple(c.upper() for c in data.classes)), take(data, torch.arange(len(data) - 1))]
    assert len({data.fingerprint, *(c.fingerprint for c in changed)}) == 6

def test_the_boxes_have_a_fingerprint_of_their_own():
    data = images(3); moved = replace(data, boxes=data.boxes.flip(0) + 0)
    assert data.box_fingerprint != moved.box_fingerprint and data.fingerprint == moved.fingerprint
    assert replace(data, boxes=data.boxes.clone()).box_fingerprint == data.box_fingerprint and replace(data, boxes=None).box_fingerprint is None

def test_take_keeps_rows_together():
    data, index = images(), torch.tensor([5, 0, 5])
    some = take(data, index)
    for part in ("images", "labels", "boxes", "digests"): assert torch.equal(getattr(some, part), getattr(data, part)[index])


@given(sets, st.integers(1, 3), st.integers(1, 5))
def test_a_subset_holds_the_first_images_of_each_class(data, classes, per_class):
    assume(classes <= len(data.classes))
    some = subset(data, classes, per_class)
    assert set(some.classes) <= set(data.classes) and len(some.classes) == classes
    for label, name in enumerate(some.classes):
        theirs = data.images[data.labels == data.classes.index(name)][:per_class]
        assert torch.equal(some.images[some.labels == label], theirs)
    assert some.fingerprint == subset(data, classes, per_class).fingerprint

def test_a_subset_spreads_its_classes_and_keeps_boxes():
    some = subset(images(10, 10), 5)
    assert some.classes == tuple(f"class {c}" for c in (0, 2, 4, 6, 8)) and torch.equal(some.boxes, images(10, 10).boxes[::2])

def test_a_subset_of_everything_is_the_set(): data = images(); assert subset(data) is data

@pytest.mark.parametrize("kwargs", [{"classes": 0}, {"classes": 4}, {"per_class": 0}, {"per_class": -1}])
def test_a_subset_refuses(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))): subset(images(), **kwargs)


@given(sets, st.floats(0.05, 0.95), st.integers(0, 9))
def test_a_split_is_stratified_and_disjoint(data, fraction, seed):
    parts = split(data, fraction, seed)
    for c in range(len(data.classes)):
        n, (a, b) = int((data.labels == c).sum()), (int((p.labels == c).sum()) for p in parts)
        assert a + b == n and a >= 1 and b >= 1 and (abs(b - n*fraction) <= 0.5 or 1 in (a, b))
    found = torch.cat([p.digests for p in parts])
    assert sorted(found.tolist()) == sorted(data.digests.tolist()) # random images: digests tell them apart
    assert [p.fingerprint for p in parts] == [p.fingerprint for p in split(data, fraction, seed)]

@given(st.integers(0, 9))
def test_a_new_image_hardly_moves_the_others(seed):
    data, more = images(60), images(61)
    was, now = (set(map(tuple, split(d, 0.2, seed)[1].digests.tolist())) for d in (data, more))
    assert len(was - now) <= 1 and len(now - was) <= 2 # it pushes one out, and may make room for one more

def test_another_seed_splits_otherwise():
    assert len({split(images(30), 0.5, s)[0].fingerprint for s in range(3)}) == 3

@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_split_refuses_a_share_of_nothing(fraction):
    with pytest.raises(ValueError, match="fraction"): split(images(), fraction)

@pytest.mark.parametrize("part, value, said", [
    ("images", [1], "images: expected a tensor, got a list"), ("images", np.zeros((4, 3, 8, 8), np.uint8), "got a ndarray; torch.from_numpy"),
    ("labels", np.zeros(4, np.int64), "labels: expected a tensor"), ("boxes", np.zeros((4, 4)), "boxes: expected a tensor")])
def test_arrays_are_told_how_to_become_tensors(part, value, said):
    with pytest.raises(ValueError, match=said): replace(images(4), **{part: value})

def test_split_names_a_class_with_too_few_images():
    with pytest.raises(ValueError, match="'class 2' of images has 1 image"): split(take(images(12, 3), torch.tensor([0, 1, 2, 3, 4])), 0.5)


@given(sets, st.integers(1, 3), st.integers(3, 8), st.booleans(), st.booleans(), st.integers(0, 3))
def test_ranks_share_an_epoch(data, world, batch_size, shuffle, drop_last, epoch):
    drop_last = drop_last and batch_size <= len(data)
    make = lambda **kwargs: Batches(data, batch_size, shuffle, drop_last, seed=1, **kwargs)
    one, ranks = list(make().epoch(epoch)), [list(make(rank=r, world=world).epoch(epoch)) for r in range(world)]
    assert len(one) == len(make()) and all(len(r) == len(one) for r in ranks)
    for whole, *parts in zip(one, *ranks, strict=True):
        assert sorted(whole.index.tolist()) == sorted(torch.cat([p.index for p in parts]).tolist())
    seen = torch.cat([b.index for b in one]).tolist()
    assert len(set(seen)) == len(seen) == (len(data)//batch_size*batch_size if drop_last else len(data))

@given(sets, st.booleans(), st.integers(1, 9))
def test_batches_hold_the_images_that_their_index_says(data, shuffle, batch_size):
    for b in Batches(data, batch_size, shuffle):
        assert b.images.dtype == torch.float32 and torch.equal(b.images, data.images[b.index]/255)
        assert torch.equal(b.labels, data.labels[b.index]) and torch.equal(b.boxes, data.boxes[b.index])

def test_the_order_is_fixed_by_seed_and_epoch():
    order = lambda seed, epoch: tuple(torch.cat([b.index for b in Batches(images(30), 8, True, seed=seed).epoch(epoch)]).tolist())
    assert order(0, 0) == order(0, 0) and len({order(0, 0), order(0, 1), order(1, 0), tuple(range(30))}) == 4

def test_without_shuffling_the_order_is_the_set_s():
    assert torch.cat([b.index for b in Batches(images(), 5).epoch(3)]).tolist() == list(range(12))

def test_batches_do_not_copy_the_set_on_the_cpu(): data = images(); assert Batches(data).images.data_ptr() == data.images.data_ptr()

def test_a_set_that_would_fill_half_of_a_gpu_s_memory_stays_outside(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9999))
    gpu, some = torch.device("cuda"), torch.zeros(499, dtype=torch.uint8)
    assert _has_room(gpu, some) and not _has_room(gpu, torch.zeros(500, dtype=torch.uint8)) and _has_room(torch.device("cpu"), torch.zeros(9999))

def test_writing_into_a_batch_leaves_the_set_alone():
    data = images(); before = data.images.clone()
    for b in Batches(data, 5): b.images.zero_(); b.labels.zero_(); b.boxes.zero_()
    assert torch.equal(data.images, before) and data.fingerprint == images().fingerprint and data.boxes.any() and data.labels.any()

def test_a_set_without_boxes_has_none_in_its_batches():
    assert next(iter(Batches(rebuilt(images()), 4))).boxes is None

@pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"batch_size": 1, "world": 2}, {"batch_size": 13, "drop_last": True}])
def test_batches_refuse(kwargs):
    with pytest.raises(ValueError, match="batch_size"): Batches(images(), **kwargs)

@pytest.mark.parametrize("change, said", [(dict(boxes=torch.rand(12, 4) + 5), "boxes: from 5"), (dict(boxes=torch.full((12, 4), torch.nan)), "boxes: from nan"),
                                          (dict(digests=torch.zeros(11, 8, dtype=torch.uint8)), r"digests: expected shape \(12,8\)")])
def test_boxes_and_digests_that_do_not_fit_are_refused(change, said):
    with pytest.raises(ValueError, match=said): rebuilt(images(), **change)
