"""Random erasing draws torchvision's boxes and fills them, and nothing else; Gaussian distortion bends the middle of an image."""
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.stats import binomtest, chisquare, ks_2samp, kstest
from torchvision.transforms import v2

from robustcv.core import IMAGENET_MEAN, IMAGENET_STD, describe
from robustcv.random_erase import GaussianDistortion, RandomErase, _fill_mask, _fill_slices, bend, random_boxes, random_pixels
from robustcv.transforms import Compose

VALUES = ["random", "zero", "mean", .5, 0, 1, (.1, .2, .3), [1., 0., .5]]
CORNERS = ("top", "left", "height", "width")
values = pytest.mark.parametrize("value", VALUES, ids=str)

def gen(seed=0): return torch.Generator().manual_seed(seed)
def batch(n=5, h=16, w=20, seed=0): return torch.rand(n, 3, h, w, generator=gen(seed))
def same(a, b, atol=1e-5): torch.testing.assert_close(a, b, atol=atol, rtol=0)

seeds, sides = st.integers(0, 2**40), st.integers(1, 24)
batches = st.builds(batch, st.integers(1, 5), sides, sides, st.integers(0, 99))
def ordered(low, high): return st.tuples(st.floats(low, high), st.floats(low, high)).map(sorted)


# boxes

@pytest.mark.parametrize("size, scale, ratio", [((64, 64), (.02, .33), (.3, 3.3)), ((32, 80), (.02, .33), (.3, 3.3)), ((64, 64), (.2, .9), (.3, 3.3)),
                                                ((50, 40), (.05, .1), (.9, 4.)), ((33, 47), (.5, 1.), (.2, 5.))])
def test_boxes_have_torchvision_s_distribution(size, scale, ratio):
    n, image, theirs = 3000, torch.zeros(3, *size), v2.RandomErasing(1., scale, ratio)
    ours = {k: v.numpy() for k, v in random_boxes(n, size, 1., scale, ratio, gen(1)).items()}
    torch.manual_seed(1)
    drawn = [theirs.make_params([image]) for _ in range(n)]
    fits = np.array([d["v"] is not None for d in drawn]) # otherwise torchvision erases nothing
    assert math.isclose((ours["height"] > 0).mean(), fits.mean(), abs_tol=4*(.25*2/n)**.5)
    ours = np.stack([ours[k] for k in CORNERS])[:, ours["height"] > 0]
    theirs = np.array([[d[k] for k in ("i", "j", "h", "w")] for d in drawn])[fits].T
    about = lambda t, l, h, w: dict(area=h*w, ratio=h/w, height=h, width=w, top=t, left=l, below=size[0] - t - h, right=size[1] - l - w)
    ours, theirs = about(*ours), about(*theirs)
    for k in ours: assert ks_2samp(ours[k], theirs[k]).pvalue > 1e-3, k

@pytest.mark.parametrize("p", [.1, .3, .5, .9])
def test_the_share_of_erased_images_is_p(p):
    height = RandomErase(p).draw(batch(1).expand(4000, -1, -1, -1), gen(2))["height"]
    assert binomtest(int((height > 0).sum()), 4000, p).pvalue > 1e-3

def test_certainty_is_certain():
    x = batch(1).expand(4000, -1, -1, -1)
    assert (RandomErase(1).draw(x, gen())["height"] > 0).all() and not (RandomErase(0).draw(x, gen())["height"] > 0).any()

def test_places_are_even_among_those_that_fit():
    box = random_boxes(8000, (10, 12), 1., (.2, .2), (1., 1.), gen()) # 5 × 5 pixels
    assert (box["height"] == 5).all() and (box["width"] == 5).all()
    counts = (box["top"]*8 + box["left"]).bincount()
    assert len(counts) == 6*8 and chisquare(counts).pvalue > 1e-3

def test_area_and_ratio_are_uniform_and_log_uniform():
    box = random_boxes(4000, (2000, 2000), 1., (.02, .33), (.3, 3.3), gen()) # large, to be nearly continuous
    h, w = box["height"].double(), box["width"].double()
    assert kstest((h*w/4e6).numpy(), "uniform", (.02, .31)).pvalue > 1e-3
    assert kstest((h/w).log().numpy(), "uniform", (math.log(.3), math.log(3.3/.3))).pvalue > 1e-3

@given(st.integers(1, 40), sides, sides, ordered(0, 1), ordered(.05, 20), st.floats(0, 1), seeds)
def test_boxes_lie_inside(n, h, w, scale, ratio, p, seed):
    box = random_boxes(n, (h, w), p, scale, ratio, gen(seed))
    top, left, height, width = (box[k] for k in CORNERS)
    assert all(v.shape == (n,) and v.dtype == torch.int64 and (v >= 0).all() for v in box.values())
    assert (top + height <= h).all() and (left + width <= w).all() and (height < h).all() and (width < w).all()
    assert (top < h).all() and (left < w).all(), "also of boxes that are empty"

@pytest.mark.parametrize("size, scale, ratio", [((8, 8), (1., 1.), (1., 1.)), ((1, 1), (.5, 1.), (.3, 3.3)), ((4, 64), (.5, .5), (4., 5.))])
@values
def test_where_no_box_fits_the_image_stays(value, size, scale, ratio):
    x = batch(20, *size)
    assert torch.equal(RandomErase(1., scale, ratio, value)(x, gen()), x)


# filling

def inside(box, i, h, w):
    "Which pixels of image i its box covers."
    t, l, height, width = (int(box[k][i]) for k in CORNERS)
    mask = torch.zeros(h, w, dtype=torch.bool); mask[t:t+height, l:l+width] = True
    return mask

def expected(x, box, value):
    "The batch with its boxes filled, pixel by pixel."
    color = {"zero": 0, "mean": IMAGENET_MEAN}.get(value, value) if isinstance(value, str) else value
    out, fill = x.clone(), iter(box["pixels"].T) if value == "random" else itertools.repeat(torch.tensor(color))
    for i in range(len(x)):
        for r, c in inside(box, i, *x.shape[2:]).nonzero().tolist(): out[i, :, r, c] = next(fill)
    assert value != "random" or next(fill, None) is None, "every pixel is used"
    return out

@values
@given(x=batches, seed=seeds, p=st.floats(0, 1), scale=ordered(0, 1), ratio=ordered(.1, 10))
def test_boxes_are_filled_with_what_was_asked_for_and_the_rest_stays(value, x, seed, p, scale, ratio):
    t, before = RandomErase(p, scale, ratio, value), x.clone()
    box = t.draw(x, gen(seed))
    y = t.transform(x, **box)
    assert torch.equal(y, expected(x, box, value)) and torch.equal(y, t(x, gen(seed))) and torch.equal(x, before)

@values
@given(x=batches, seed=seeds, box=st.lists(st.tuples(*[st.integers(0, 24)]*4), min_size=5, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]))
def test_both_ways_to_fill_agree(value, x, seed, box, dtype): # also for boxes that are empty in one direction, or as large as the image
    x, (h, w) = x.to(dtype), x.shape[2:]
    places = [(t % h, l % w, height % (h + 1), width % (w + 1)) for t, l, height, width in box[:len(x)]]
    box = torch.tensor([(t, l, min(height, h - t), min(width, w - l)) for t, l, height, width in places]).T
    fill = random_pixels(int((box[2]*box[3]).sum()), gen(seed)) if value == "random" else RandomErase(value=value).fill
    before = x.clone()
    a, b = _fill_slices(x, box, fill), _fill_mask(x, box, fill)
    assert torch.equal(a, b) and a.dtype == b.dtype == dtype and torch.equal(x, before)

@pytest.mark.parametrize("fill", [_fill_slices, _fill_mask])
def test_a_single_random_pixel_is_placed(fill):
    x, one = batch(2, 4, 4), torch.tensor([[.1], [.2], [.3]])
    y = fill(x, torch.tensor([[0, 2], [0, 1], [0, 1], [0, 1]]), one) # one box is empty
    x[1, :, 2, 1] = one[:, 0]
    assert torch.equal(y, x)

def test_the_mean_is_imagenet_s():
    y = RandomErase(1., value="mean")(torch.zeros(9, 3, 16, 16), gen())
    assert y.transpose(0, 1)[:, y[:, 0] > 0].T.unique(dim=0).tolist() == [pytest.approx(IMAGENET_MEAN)]

def test_random_pixels_look_like_imagenet_s():
    pixels = random_pixels(40_000, gen())
    assert pixels.shape == (3, 40_000) and pixels.min() == 0 and pixels.max() == 1
    assert pixels.mean(1).tolist() == pytest.approx(IMAGENET_MEAN, abs=.007) and pixels.std(1).tolist() == pytest.approx(IMAGENET_STD, rel=.04)
    assert torch.corrcoef(pixels).fill_diagonal_(0).abs().max() < .02 # colours of their own
    assert random_pixels(0).shape == (3, 0) and torch.equal(random_pixels(9, gen(3)), random_pixels(9, gen(3)))

@given(x=batches, seed=seeds, pick=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_images_do_not_depend_on_their_neighbours(x, seed, pick):
    t, index = RandomErase(.7, value="mean"), torch.tensor(pick) % len(x)
    box = t.draw(x, gen(seed))
    assert torch.equal(t.transform(x[index], **{k: v[index] for k, v in box.items()}), t.transform(x, **box)[index])

@values
def test_each_of_many_images_gets_a_box_of_its_own_from_the_generator(value):
    x, t, before = torch.full((100, 3, 16, 16), .7), RandomErase(1., value=value), torch.get_rng_state()
    y = t(x, gen(1))
    assert len({tuple(i.flatten().tolist()) for i in y}) > 60 and torch.equal(y, t(x, gen(1))) and not torch.equal(y, t(x, gen(2)))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4); a = t(x); torch.manual_seed(4)
    assert torch.equal(a, t(x)) and not torch.equal(a, t(x)), "without a generator, torch's own moves on"

@values
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_is_kept(value, dtype):
    x, t = batch(40), RandomErase(1., value=value)
    y = t(x.to(dtype), gen(1))
    assert y.dtype == dtype
    same(y.float(), t(x, gen(1)), 1e-2 if dtype == torch.bfloat16 else 1e-6)

@values
def test_channels_last_sliced_and_expanded_images_are_taken(value):
    x, t = batch(6), RandomErase(1., value=value)
    assert torch.equal(t(x.to(memory_format=torch.channels_last), gen(1)), t(x, gen(1)))
    assert torch.equal(t(x[::2, :, 1:-1], gen(1)), t(x[::2, :, 1:-1].clone(), gen(1)))
    y = x[:1].expand(6, -1, -1, -1)
    assert torch.equal(t(y, gen(1)), t(y.clone(), gen(1)))


# Gaussian distortion

def ramp(n=1, h=40, w=48): # the first channel is the column, the second the row, in pixels
    return torch.stack([torch.arange(w).expand(h, w), torch.arange(h)[:, None].expand(h, w), torch.zeros(h, w)]).expand(n, -1, -1, -1).float()

@given(x=batches, seed=seeds, grid=st.integers(2, 8), width=st.floats(.1, 10))
def test_no_magnitude_is_no_distortion(x, seed, grid, width): same(GaussianDistortion(0, grid, width)(x, gen(seed)), x)

@given(x=batches, seed=seeds, magnitude=st.floats(0, 30), grid=st.integers(2, 8), width=st.floats(.1, 10))
def test_distortion_keeps_shape_and_range_repeats_and_leaves_the_input(x, seed, magnitude, grid, width):
    t, before = GaussianDistortion(magnitude, grid, width), x.clone()
    y = t(x, gen(seed))
    assert y.shape == x.shape and torch.equal(y, t(x, gen(seed))) and torch.equal(x, before)
    assert y.min() >= x.min() - 1e-6 and y.max() <= x.max() + 1e-6 # bilinear interpolation never overshoots

def test_distortion_moves_the_middle_and_hardly_the_border():
    t, x = GaussianDistortion(6.), ramp(200)
    moved = (t(x, gen()) - x)[:, :2].norm(dim=1)
    middle, border = moved[:, 15:25, 18:30], torch.cat([moved[:, [0, -1]].flatten(), moved[:, :, [0, -1]].flatten()])
    assert border.mean() < .15*middle.mean() and border.max() < 1.5 and moved[:, [0, 0, -1, -1], [0, -1, 0, -1]].max() < .2
    assert 2 < middle.mean() and middle.max() < 6*2**.5*1.1

def test_a_grid_point_moves_its_pixels_by_its_shift():
    shift = torch.zeros(2, 2, 5, 5); shift[0, 0, 2, 2], shift[1, 1, 2, 2] = 4., -3.
    moved = bend(ramp(2, 41, 41), shift, .5) - ramp(2, 41, 41)
    same(moved[:, :, 20, 20], torch.tensor([[4., 0, 0], [0, -3., 0]]), 1e-3)
    assert moved[:, :, ::40].abs().max() < 1e-3 and moved[0, 1].abs().max() < 1e-3 and moved[1, 0].abs().max() < 1e-3

def test_the_bell_weighs_the_shifts():
    moved = bend(ramp(1, 41, 41), torch.ones(1, 2, 5, 5), .5) - ramp(1, 41, 41)
    points = math.exp(-.5), math.exp(-1) # half an image from the middle along one direction, and along both
    same(moved[0, 0, 20, [10, 20, 30]], torch.tensor([points[0], 1., points[0]]), .05)
    same(moved[0, 1, [10, 30], [10, 30]], torch.tensor([points[1]]*2), .05)

def test_the_same_shift_everywhere_moves_the_image_as_a_whole():
    moved = bend(batch(), torch.tensor([3., 2.]).view(1, 2, 1, 1).expand(5, 2, 4, 4), 1e6)
    same(moved[:, :, :-2, :-3], batch()[:, :, 2:, 3:], 1e-4)

@pytest.mark.parametrize("magnitude, grid", [(6., 5), (1.5, 2)])
def test_shifts_are_uniform_up_to_the_magnitude(magnitude, grid):
    shift = GaussianDistortion(magnitude, grid).draw(torch.zeros(200, 3, 1, 1), gen())["shift"]
    assert shift.shape == (200, 2, grid, grid) and shift.abs().max() <= magnitude
    assert kstest(shift.flatten().numpy(), "uniform", (-magnitude, 2*magnitude)).pvalue > 1e-3

def test_distortion_is_an_image_s_own_and_the_generator_s():
    t, x, before = GaussianDistortion(), batch(1).expand(40, -1, -1, -1), torch.get_rng_state()
    y = t(x, gen(1))
    assert len({tuple(i.flatten().tolist()) for i in y}) == 40 and not torch.equal(y, t(x, gen(2))) and torch.equal(before, torch.get_rng_state())
    p = t.draw(x, gen(3))["shift"]
    same(t.transform(x, p)[3:5], t.transform(x[3:5], p[3:5]), 1e-6)
    assert t(x.double(), gen(1)).dtype == torch.float64


# refusals and descriptions

@pytest.mark.parametrize("argument, make", [
    *[("p", lambda p=p: RandomErase(p)) for p in (-.1, 1.1, float("nan"), "a", None)],
    *[("scale", lambda s=s: RandomErase(scale=s)) for s in ((.3, .1), (-.1, .3), (0, 1.1), .3, (.1,), (0, float("nan")), ("a", 1), None)],
    *[("ratio", lambda r=r: RandomErase(ratio=r)) for r in ((3, .3), (0, 1), (-1, 1), 1., (1, float("inf")), ("a", 1), None)],
    *[("value", lambda v=v: RandomErase(value=v)) for v in ("gray", "", -.1, 1.1, 255, float("nan"), None, (0, 0), (0, 0, 0, 0), (0, 0, 2),
                                                            (0, 0, "a"), torch.zeros(3))],
    *[("magnitude", lambda m=m: GaussianDistortion(m)) for m in (-1, float("nan"), float("inf"), "a", None, (1, 2))],
    *[("grid", lambda g=g: GaussianDistortion(grid=g)) for g in (1, 0, -3, 2.5, "a", None)],
    *[("width", lambda w=w: GaussianDistortion(width=w)) for w in (0, -1, float("nan"), float("inf"), "a", None)]])
def test_a_bad_argument_is_named(argument, make):
    with pytest.raises(ValueError, match=f"^{argument}="): make()

@pytest.mark.parametrize("t", [RandomErase(), RandomErase(1, value="mean"), GaussianDistortion()], ids=str)
@pytest.mark.parametrize("x, said", [*[(x, "expected shape") for x in (batch(2)[0], batch(2)[:, :1], batch(2)[:, [0, 1, 2, 0]])],
                                     (batch(2)[:0], "empty"), ((batch(2)*255).byte(), "divide uint8 images by 255"),
                                     (batch(2).numpy(), "expected a tensor")])
def test_what_is_no_batch_of_images_is_refused(t, x, said):
    for transform in (t, Compose(t)):
        with pytest.raises(ValueError, match=f"images: .*{said}"): transform(x)

@pytest.mark.parametrize("a, b", [
    *[(RandomErase(**k), RandomErase()) for k in (dict(p=.5 + 1e-9), dict(scale=(.02, .33 + 1e-9)), dict(ratio=(.3, 3.3 + 1e-9)))],
    *[(RandomErase(value=a), RandomErase(value=b)) for a, b in (("random", "mean"), ("zero", "mean"), (.5, .5 + 1e-9), (.5, (.5, .5, .6)))],
    *[(GaussianDistortion(**k), GaussianDistortion()) for k in (dict(magnitude=6 + 1e-9), dict(grid=6), dict(width=.5 + 1e-9))]], ids=str)
def test_every_setting_shows_in_the_description(a, b): assert describe(a) != describe(b) and describe(Compose(a)) != describe(Compose(b))
