"""Boxes go where their images go: every geometric transform against torchvision's bounding boxes."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from robustcv.affine import RandomAffine, RandomRotation
from robustcv.color_jitter import ColorJitter
from robustcv.random_erase import GaussianDistortion, RandomErase
from robustcv.stability import RandomNoise
from robustcv.symmetry import RandomSymmetry, apply_symmetry
from robustcv.transforms import (Compose, Pad, PerImage, RandomCrop, RandomGaussianBlur, RandomGrayscale, RandomHorizontalFlip,
                                 RandomVerticalFlip)

H, W = 24, 32

def gen(seed=0): return torch.Generator().manual_seed(seed)

def made(n=12, seed=0):
    "Images, and boxes of at least 2 pixels."
    corners = torch.rand(n, 2, 2, generator=gen(seed))*torch.tensor([W - 4., H - 4.])
    low, high = corners.amin(1), corners.amax(1) + 3
    return torch.rand(n, 3, H, W, generator=gen(seed)), torch.cat([low, high], 1)/torch.tensor([W, H, W, H])

def theirs(box, f, size=(H, W)):
    "What torchvision makes of one box, as fractions of the new image."
    pixels = tv_tensors.BoundingBoxes((box.double()*torch.tensor([W, H, W, H]))[None], format="XYXY", canvas_size=(H, W))
    out = f(pixels)
    h, w = out.canvas_size
    assert (h, w) == size
    return (tv.clamp_bounding_boxes(out).as_subclass(torch.Tensor)[0]/torch.tensor([w, h, w, h])).float()

def check(t, one, size=(H, W), seed=0, tol=1e-5):
    "`one(drawn, i)` is torchvision's function for image i, given what was drawn."
    x, boxes = made(seed=seed)
    images, moved = t.with_boxes(x, boxes, gen(seed))
    assert torch.equal(images, t(x, gen(seed))) and images.shape[2:] == size
    drawn = t.draw(x, gen(seed))
    for i, (before, after) in enumerate(zip(boxes, moved, strict=True)):
        torch.testing.assert_close(after, theirs(before, one(drawn, i), size), atol=tol, rtol=0)
    return boxes, moved

@pytest.mark.parametrize("t, f", [(RandomHorizontalFlip(.5), tv.horizontal_flip), (RandomVerticalFlip(.5), tv.vertical_flip)])
def test_flips(t, f):
    boxes, moved = check(t, lambda drawn, i: f if drawn["flip"][i] else lambda b: b)
    assert 0 < (moved != boxes).any(1).sum() < len(boxes)

@given(st.integers(0, 99), st.sampled_from([((H, W), 4), ((16, 20), 0), ((10, 12), 3)]))
def test_crops(seed, how):
    size, padding = how
    def one(drawn, i):
        top, left = int(drawn["top"][i]), int(drawn["left"][i])
        return lambda b: tv.crop(tv.pad(b, [padding]), top, left, *size)
    check(RandomCrop(size, padding), one, size, seed)

def test_padding(): check(Pad(3), lambda drawn, i: lambda b: tv.pad(b, [3]), (H + 6, W + 6))

@given(st.integers(0, 99))
def test_affine_maps(seed):
    def one(drawn, i):
        angle, scale, shear = (float(drawn[n][i]) for n in ("angle", "scale", "shear"))
        return lambda b: tv.affine(b, angle, drawn["translate"][i].tolist(), scale, [shear, 0.])
    check(RandomAffine(40, (.2, .1), (.7, 1.3), 25), one, seed=seed, tol=1e-4)

@given(st.integers(0, 99))
def test_rotations(seed): check(RandomRotation(90), lambda drawn, i: lambda b: tv.rotate(b, float(drawn["angle"][i])), seed=seed, tol=1e-4)

def test_symmetries():
    inside = torch.zeros(8, 1, 16, 16); inside[:, :, 2:5, 7:15] = 1 # rows 2 to 4, columns 7 to 14
    boxes = torch.tensor([[7., 2, 15, 5]]).expand(8, 4)/16
    moved = RandomSymmetry().move(boxes, inside, torch.arange(8))
    for e in range(8):
        rows, columns = apply_symmetry(inside[e], e)[0].nonzero().unbind(1)
        assert (16*moved[e]).tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]

@pytest.mark.parametrize("t", [ColorJitter(.4, .4, .4, .1), RandomErase(), RandomGrayscale(.5), RandomGaussianBlur(), RandomNoise()])
def test_what_is_not_geometric_leaves_boxes_alone(t):
    x, boxes = made()
    assert torch.equal(t.with_boxes(x, boxes, gen())[1], boxes)

def test_a_composition_moves_boxes_step_by_step_and_draws_as_without_them():
    steps = RandomHorizontalFlip(), RandomCrop((20, 20)), Pad(2), RandomSymmetry(), ColorJitter(.2)
    x, boxes = made(150) # three chunks
    images, moved = Compose(*steps).with_boxes(x, boxes, gen())
    assert torch.equal(images, Compose(*steps)(x, gen()))
    g, parts = gen(), []
    for part, b in zip(x.split(64), boxes.split(64), strict=True):
        for t in steps: part, b = t.with_boxes(part, b, g)
        parts.append(b)
    assert torch.equal(moved, torch.cat(parts)) and not torch.equal(moved, boxes)

@pytest.mark.parametrize("t", [GaussianDistortion(), PerImage(v2.RandomPerspective(.5)), Compose(RandomHorizontalFlip(), GaussianDistortion(), Pad(1)),
                               Compose(torch.nn.Identity())])
def test_no_boxes_where_they_cannot_be_told(t):
    if isinstance(t, Compose) and isinstance(t.transforms[0], torch.nn.Identity): t.transforms[0].forward = lambda x, generator: x
    assert t.with_boxes(*made(), gen())[1] is None

@pytest.mark.parametrize("t", [RandomRotation((45, 45)), RandomCrop((H, W), 4), RandomSymmetry(), RandomAffine(0, shear=40), RandomHorizontalFlip(1.)])
def test_an_empty_box_stays_empty(t):
    boxes = torch.tensor([[0., 0, 0, 0], [.2, .3, .2, .9], [.5, .5, .9, .5]])
    x = torch.rand(3, 3, H, H if isinstance(t, RandomSymmetry) else W)
    moved = t.with_boxes(x, boxes, gen())[1]
    assert ((moved[:, 2:] - moved[:, :2]).amin(1) == 0).all()

def test_a_box_that_leaves_the_image_is_empty():
    moved = RandomCrop((4, 4)).move(torch.tensor([[.9, .9, 1., 1.]]), torch.rand(1, 3, H, W), torch.tensor([0]), torch.tensor([0])).clamp(0, 1)
    assert (moved[:, 2:] - moved[:, :2]).prod() == 0

def test_bad_boxes():
    with pytest.raises(ValueError, match=r"boxes: expected shape \(2,4\), got \(3, 4\)"): Pad(1).with_boxes(torch.rand(2, 3, 8, 8), torch.rand(3, 4))

@pytest.mark.parametrize("box", [[10., 20, 50, 60], [-.1, 0, 1, 1]])
def test_boxes_in_pixels_are_refused(box):
    with pytest.raises(ValueError, match=r"boxes: some coordinates lie outside of \[0,1\]"):
        RandomHorizontalFlip(0).with_boxes(torch.rand(2, 3, H, W), torch.tensor([box]*2))
