"""Every transform is held to torchvision's functional op given the same parameters, and to the laws that all of them obey."""
import platform
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from scipy.stats import binomtest, chisquare
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional as tv

from robustcv.affine import RandomAffine, RandomRotation, affine
from robustcv.core import describe
from robustcv.random_erase import RandomErase
from robustcv.symmetry import RandomSymmetry
from robustcv.transforms import (Compose, Pad, PerImage, RandomCrop, RandomGaussianBlur, RandomGrayscale, RandomHorizontalFlip,
                                 RandomVerticalFlip, Transform, _crop_gather, gaussian_blur, in_chunks)

ALL = [RandomHorizontalFlip(), RandomVerticalFlip(0.3), RandomCrop(12, 3), RandomCrop((9, 14), 4, "reflect"), RandomCrop(8),
       RandomAffine(30, (.2, .1), (.7, 1.4), 20), RandomAffine((-90, 0), (.3, 0), interpolation="bilinear", fill=.3), RandomRotation(180),
       RandomRotation((10, 80), "bilinear", .5), RandomGrayscale(0.5), RandomGaussianBlur(), RandomGaussianBlur(9, (.5, 3), 1.),
       PerImage(v2.RandomErasing(1.)), PerImage(v2.RandomHorizontalFlip())]
OFF = [RandomHorizontalFlip(0), RandomVerticalFlip(0), RandomCrop((16, 20)), RandomCrop((16, 20), 0, "reflect"), RandomAffine(0),
       RandomRotation(0), RandomGrayscale(0), RandomGaussianBlur(p=0), Pad(0), PerImage(v2.Identity())]
CHAIN = Compose(RandomHorizontalFlip(), RandomCrop(12, 2), RandomAffine(20), RandomGaussianBlur())
named = lambda ts: pytest.mark.parametrize("t", ts, ids=[str(t) for t in ts])
each, modes = named(ALL), pytest.mark.parametrize("mode", ["nearest", "bilinear"])

def gen(seed=0): return torch.Generator().manual_seed(seed)
def batch(n=5, h=16, w=20, seed=0, **kwargs): return torch.rand(n, 3, h, w, generator=gen(seed), **kwargs)

batches = st.builds(batch, st.integers(1, 5), st.integers(16, 24), st.integers(16, 24), st.integers(0, 99))
seeds, angles = st.integers(0, 2**40), st.floats(-200, 200)

def agree(ours, theirs, mode):
    "Bilinear sampling agrees to 1e-5; nearest pixels may differ where two are equally near."
    if mode == "bilinear": torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    else: assert ((ours - theirs).abs() > 1e-6).float().mean() < 0.01

def sampled(op, x, *args, mode, fill):
    "torchvision's op; its bilinear `fill` weighs border pixels twice, so the image is shifted to make the outside 0 instead."
    if mode == "nearest": return op(x, *args, interpolation=InterpolationMode.NEAREST, fill=[fill]*3)
    return op(x - fill, *args, interpolation=InterpolationMode.BILINEAR) + fill


# torchvision's results, image by image

@given(batches, seeds, st.floats(0, 1))
def test_flips_equal_torchvision(x, seed, p):
    for t, flip in ((RandomHorizontalFlip(p), tv.horizontal_flip), (RandomVerticalFlip(p), tv.vertical_flip)):
        drawn = t.draw(x, gen(seed))
        expected = torch.stack([flip(i) if f else i for i, f in zip(x, drawn["flip"], strict=True)])
        assert torch.equal(t.transform(x, **drawn), expected) and torch.equal(t(x, gen(seed)), expected)

@given(batches, seeds, st.integers(1, 16), st.integers(1, 16), st.integers(0, 9), st.sampled_from(["constant", "reflect"]))
def test_crops_equal_torchvision_on_either_path(x, seed, height, width, padding, mode):
    t = RandomCrop((height, width), padding, mode)
    drawn = t.draw(x, gen(seed))
    expected = torch.stack([tv.crop(tv.pad(i, [padding]*4, padding_mode=mode), int(top), int(left), height, width)
                            for i, top, left in zip(x, drawn["top"], drawn["left"], strict=True)])
    assert torch.equal(t.transform(x, **drawn), expected)
    assert torch.equal(_crop_gather(x, **drawn, size=t.size, padding=padding, mode=mode), expected)

def test_crops_of_many_images_equal_torchvision(): # the CPU pads them in portions
    x, t = batch(70, 6, 6), RandomCrop(6, 2)
    drawn = t.draw(x, gen())
    places = zip(x, drawn["top"], drawn["left"], strict=True)
    expected = torch.stack([tv.crop(tv.pad(i, [2]*4), int(top), int(left), 6, 6) for i, top, left in places])
    assert torch.equal(t.transform(x, **drawn), expected)
    assert torch.equal(_crop_gather(x, **drawn, size=(6, 6), padding=2, mode="constant"), expected)

@modes
@given(x=batches, seed=seeds, angle=st.floats(0, 180), shear=st.floats(0, 60), translate=st.floats(0, .5),
    fill=st.sampled_from([0., .3, 1.]))
def test_affine_maps_equal_torchvision(mode, x, seed, angle, shear, translate, fill):
    t = RandomAffine(angle, (translate, translate/2), (.6, 1.5), shear, mode, fill)
    d = t.draw(x, gen(seed))
    shift = d["translate"]
    assert shift.shape == (len(x), 2) and (shift == shift.round()).all()
    agree(t.transform(x, **d), torch.stack([
        sampled(tv.affine, i, float(d["angle"][k]), shift[k].tolist(), float(d["scale"][k]), [float(d["shear"][k]), 0.],
                mode=mode, fill=fill)
        for k, i in enumerate(x)]), mode)

@modes
@given(x=batches, angle=angles, sx=st.floats(-60, 60), sy=st.floats(-60, 60), tx=st.integers(-9, 9), ty=st.integers(-9, 9),
    scale=st.floats(.4, 2))
def test_the_affine_function_equals_torchvision(mode, x, angle, sx, sy, tx, ty, scale):
    agree(affine(x, angle, (tx, ty), scale, (sx, sy), mode), tv.affine(x, angle, [tx, ty], scale, [sx, sy], InterpolationMode(mode)), mode)

@modes
@given(x=batches, seed=seeds, low=angles, high=angles, fill=st.sampled_from([0., .3]))
def test_rotations_equal_torchvision(mode, x, seed, low, high, fill):
    t = RandomRotation((min(low, high), max(low, high)), mode, fill)
    d = t.draw(x, gen(seed))
    assert ((t.degrees[0] - 1e-4 <= d["angle"]) & (d["angle"] <= t.degrees[1] + 1e-4)).all()
    expected = [sampled(tv.rotate, i, float(a), mode=mode, fill=fill) for i, a in zip(x, d["angle"], strict=True)]
    agree(t.transform(x, **d), torch.stack(expected), mode)

def test_a_quarter_turn_is_exact(): x = batch(2, 16, 16); assert torch.equal(RandomRotation((90, 90))(x), torch.rot90(x, 1, (2, 3)))

@given(batches, seeds)
def test_grayscale_equals_torchvision(x, seed):
    d = RandomGrayscale(.5).draw(x, gen(seed))
    expected = torch.stack([tv.rgb_to_grayscale(i, 3) if g else i for i, g in zip(x, d["gray"], strict=True)])
    torch.testing.assert_close(RandomGrayscale(.5).transform(x, **d), expected, atol=1e-6, rtol=0)

@given(batches, seeds, st.sampled_from([1, 3, 5, 9]), st.floats(.1, 4))
def test_blur_equals_torchvision(x, seed, kernel_size, sigma):
    t = RandomGaussianBlur(kernel_size, (sigma, 2*sigma), .6)
    d = t.draw(x, gen(seed))
    expected = torch.stack([tv.gaussian_blur(i, [kernel_size]*2, [float(s)]*2) if b else i
                            for i, b, s in zip(x, d["blur"], d["sigma"], strict=True)])
    torch.testing.assert_close(t.transform(x, **d), expected, atol=1e-5, rtol=0)

@given(batches, st.integers(0, 9))
def test_padding_equals_torchvision(x, n): assert torch.equal(Pad(n)(x), tv.pad(x, [n]*4))

@pytest.mark.parametrize("theirs", [v2.TrivialAugmentWide(), v2.RandomPerspective(.5, 1.), v2.ElasticTransform(20., 2.),
                                    v2.RandomErasing(1., value="random")], ids=lambda t: type(t).__name__)
def test_torchvision_s_own_are_called_on_each_image_with_the_seed_drawn_for_it(theirs):
    x, t, state = batch(6), PerImage(theirs), torch.get_rng_state()
    d = t.draw(x, gen(3))
    assert d["seed"].dtype == torch.int64 and len(d["seed"].unique()) == 6
    y = t(x, gen(3))
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(y, t.transform(x, **d)) and y.shape == x.shape and not torch.equal(y, x)
    def alone(image, seed): torch.manual_seed(seed); return theirs(image)
    expected = torch.stack([alone(i, s) for i, s in zip(x, d["seed"].tolist(), strict=True)]).clamp(0, 1)
    assert torch.equal(y, expected)

def test_what_torchvision_returns_is_clipped(): assert torch.equal(PerImage(v2.Lambda(lambda i: 3*i - 1))(batch()), (3*batch() - 1).clamp(0, 1))


# laws

@named([*ALL, CHAIN])
@given(x=batches, seed=seeds)
def test_the_input_is_untouched_and_the_output_repeats_and_stays_in_range(t, x, seed):
    before = x.clone()
    y = t(x, gen(seed))
    assert torch.equal(x, before) and torch.equal(y, t(x, gen(seed)))
    assert y.min() >= -1e-6 and y.max() <= 1 + 1e-6 and len(y) == len(x) and y.dtype == x.dtype

@named(OFF)
@given(seed=seeds)
def test_a_transform_that_is_off_is_the_identity(t, seed): x = batch(); assert torch.equal(t(x, gen(seed)), x)

@pytest.mark.parametrize("t", [RandomAffine(0, interpolation="bilinear"), RandomRotation(0, "bilinear", .5)])
def test_bilinear_sampling_at_zero_strength_is_the_identity(t): torch.testing.assert_close(t(batch()), batch(), atol=1e-5, rtol=0)

@named([RandomHorizontalFlip(1), RandomVerticalFlip(1)])
def test_flipping_twice_is_the_identity(t): x = batch(); assert torch.equal(t(t(x)), x) and not torch.equal(t(x), x)

@each
@given(x=batches, seed=seeds, pick=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_images_do_not_depend_on_their_neighbours(t, x, seed, pick):
    index, drawn = torch.tensor(pick) % len(x), t.draw(x, gen(seed))
    assert all(len(v) == len(x) for v in drawn.values()), "the first dimension of all parameters is the batch"
    some = t.transform(x[index], **{k: v[index] for k, v in drawn.items()})
    torch.testing.assert_close(some, t.transform(x, **drawn)[index], atol=1e-6, rtol=0)

@named([*ALL, CHAIN])
def test_images_get_draws_of_their_own(t):
    y = t(batch(1).expand(40, -1, -1, -1), gen())
    assert len({tuple(i.flatten().tolist()) for i in y}) > 1

@named([*ALL, CHAIN])
def test_double_precision_is_kept(t):
    x = batch(dtype=torch.float64); y = t(x, gen(1))
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, t(x.float(), gen(1)).double(), atol=1e-4 if "bilinear" in str(t) else 1e-5, rtol=0)

@named([*ALL, CHAIN])
def test_channels_last_and_sliced_images_are_taken(t):
    x = batch(6, 18, 20)
    assert torch.equal(t(x.to(memory_format=torch.channels_last), gen(1)), t(x, gen(1)))
    assert torch.equal(t(x[::2, :, 1:-1], gen(1)), t(x[::2, :, 1:-1].clone(), gen(1)))

@each
def test_without_a_generator_torch_s_own_is_used(t):
    torch.manual_seed(3); a = t(batch()); b = t(batch()); torch.manual_seed(3)
    assert torch.equal(a, t(batch())) and not torch.equal(a, b)

@each
def test_with_a_generator_torch_s_own_is_left_alone(t):
    before = torch.get_rng_state(); t(batch(), gen())
    assert torch.equal(before, torch.get_rng_state())

@named([t for t in ALL if not isinstance(t, RandomCrop) and getattr(t, "interpolation", "") != "nearest"])
def test_gradients_flow_through(t):
    x = batch(2).requires_grad_()
    g, = torch.autograd.grad(t(x, gen()).sum(), x)
    assert g.isfinite().all() and g.any()


# chance

@pytest.mark.parametrize("p", [.1, .5, .6])
@pytest.mark.parametrize("kind, key", [(RandomHorizontalFlip, "flip"), (RandomVerticalFlip, "flip"), (RandomGrayscale, "gray"),
                                       (lambda p: RandomGaussianBlur(p=p), "blur")], ids=["hflip", "vflip", "grayscale", "blur"])
def test_the_probability_is_p(kind, key, p):
    hits = kind(p).draw(batch(4000, 1, 1), gen(7))[key]
    assert binomtest(int(hits.sum()), 4000, p).pvalue > 1e-3

@pytest.mark.parametrize("p", [0, 1])
def test_certainty_is_certain(p): assert (RandomHorizontalFlip(p).draw(batch(4000, 1, 1), gen())["flip"] == bool(p)).all()

def test_crops_cover_all_places_evenly():
    d = RandomCrop((4, 6), 2).draw(batch(6000, 4, 8), gen())
    counts = (d["top"]*7 + d["left"]).bincount()
    assert len(counts) == 5*7 and chisquare(counts).pvalue > 1e-3

@pytest.mark.parametrize("key, low, high", [("angle", -30, 30), ("scale", .5, 2), ("shear", -10, 10)])
def test_affine_parameters_are_uniform(key, low, high):
    v = RandomAffine(30, (.1, .1), (.5, 2), 10).draw(batch(6000, 2, 2), gen())[key]
    assert low <= v.min() and v.max() <= high and chisquare(torch.histc(v, 12, low, high)).pvalue > 1e-3

def test_affine_shifts_are_whole_pixels_up_to_the_fraction():
    x, y = RandomAffine(0, (.2, .5)).draw(batch(2000, 8, 20), gen())["translate"].T
    assert set(x.tolist()) == set(range(-4, 5)) == set(y.tolist())


# putting together

def test_compose_feeds_all_its_parts_from_one_generator():
    a, b, g = RandomHorizontalFlip(), RandomAffine(30), gen(5)
    assert torch.equal(Compose(a, b)(batch(), gen(5)), b(a(batch(), g), g)) and torch.equal(Compose()(batch()), batch())

@given(st.integers(1, 70), st.integers(1, 40))
def test_portions_make_up_the_whole(n, chunk):
    x, sizes = batch(n, 2, 3), []
    y, none = in_chunks(lambda part, b: (sizes.append(len(part)) or F.pad(2*part, (1, 1, 0, 0)).double(), b), x, None, chunk)
    assert none is None
    assert torch.equal(y, F.pad(2*x, (1, 1, 0, 0)).double()) and y.dtype == torch.float64
    assert sum(sizes) == n and max(sizes) <= chunk and len(sizes) == -(-n//chunk)

def test_without_a_limit_there_is_one_portion():
    sizes = []
    assert torch.equal(in_chunks(lambda part, b: (sizes.append(len(part)) or part, b), batch(70), None, None)[0], batch(70)) and sizes == [70]

@pytest.mark.parametrize("n", [10, 70])
def test_a_portion_is_the_work_of_one_thread(n):
    seen, threads = [], torch.get_num_threads()
    def fails(part, b): seen.append(torch.get_num_threads()); raise ArithmeticError
    try:
        torch.set_num_threads(2)
        in_chunks(lambda part, b: (seen.append(torch.get_num_threads()) or part, b), batch(n), None, 32)
        assert torch.get_num_threads() == 2
        with pytest.raises(ArithmeticError): in_chunks(fails, batch(n), None, 32)
        assert torch.get_num_threads() == 2 and set(seen) == {1}
        in_chunks(lambda part, b: (seen.append(torch.get_num_threads()) or part, b), batch(n), None, None)
        assert seen[-1] == 2, "a whole batch is the work of all"
    finally: torch.set_num_threads(threads)

def test_gradients_flow_through_portions():
    x = batch(70, 2, 2).requires_grad_()
    in_chunks(lambda part, b: (part**2, b), x, None, 32)[0].sum().backward()
    assert torch.equal(x.grad, 2*x.detach())

@pytest.mark.parametrize("t", [RandomCrop(12, 2), RandomCrop(12, 2, "reflect"), RandomErase(), RandomErase(value="mean"), RandomSymmetry()], ids=str)
def test_what_is_copied_image_by_image_agrees_with_what_carries_gradients_and_with_bfloat16(t):
    x, at = batch(40, 16, 16), t.draw(batch(40, 16, 16), gen(1))
    plain, traced, short = t.transform(x, **at), x.clone().requires_grad_(), x.bfloat16()
    out = t.transform(traced, **at)
    assert torch.equal(out, plain)
    out.sum().backward()
    if not isinstance(t, RandomErase): assert traced.grad.sum() == (plain > 0).sum() # each pixel that is there came from one
    else: assert torch.equal(traced.grad, (plain == x).float())
    assert torch.equal(t.transform(short, **at), t.transform(short.float(), **at).bfloat16())

@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory by other rules")
def test_memory_of_large_batches_is_kept_for_the_next():
    code = """if 1:
        import resource, torch, robustcv.transforms
        rounds = []
        for _ in range(8):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = [torch.zeros(2**23, dtype=torch.uint8) for _ in range(4)]
            del blocks
            rounds.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(sorted(rounds)[4])"""
    faults = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert faults < 2048 # as many as one of four blocks has when it is new

class Watched(RandomHorizontalFlip):
    "Remembers how many images it was given."
    def draw(self, x, generator=None): self.seen = [*getattr(self, "seen", []), len(x)]; return super().draw(x, generator)

@pytest.mark.parametrize("n", [1, 64, 65, 150])
def test_a_composition_of_many_images_repeats_and_works_on_few_at_a_time(n):
    x, watched = batch(n, 16, 18), Watched()
    t = Compose(watched, RandomCrop(12, 2), RandomAffine(20), RandomGaussianBlur(), Pad(2))
    y = t(x, gen(1))
    assert y.shape == (n, 3, 16, 16) and sum(watched.seen) == n and max(watched.seen) <= 64
    assert torch.equal(y, t(x, gen(1))) and not torch.equal(y, t(x, gen(2)))
    g = gen(1)
    assert torch.equal(y, torch.cat([t(part, g) for part in x.split(64)])), "the generator serves one portion after the other"

def test_a_transform_without_a_rule_says_so():
    with pytest.raises(TypeError, match="defines no transform"): Transform()(batch())

@pytest.mark.parametrize("a, b", [(RandomHorizontalFlip(.5), RandomHorizontalFlip(.6)), (RandomHorizontalFlip(), RandomVerticalFlip()),
    (RandomCrop(8), RandomCrop(9)), (RandomCrop(8, 1), RandomCrop(8, 2)), (RandomCrop(8, 1), RandomCrop(8, 1, "reflect")),
    (RandomAffine(1), RandomAffine(2)), (RandomAffine(1, (.1, 0)), RandomAffine(1)), (RandomAffine(1, scale=(1, 2)), RandomAffine(1)),
    (RandomAffine(1, shear=1), RandomAffine(1)), (RandomAffine(1, interpolation="bilinear"), RandomAffine(1)),
    (RandomAffine(1, fill=.5), RandomAffine(1)),
    (RandomRotation(1), RandomRotation(2)), (RandomRotation(1, "bilinear"), RandomRotation(1)),
    (RandomRotation(1, fill=.5), RandomRotation(1)),
    (RandomGrayscale(.1), RandomGrayscale(.2)), (RandomGaussianBlur(5), RandomGaussianBlur(3)),
    (RandomGaussianBlur(sigma=(1, 2)), RandomGaussianBlur()),
    (RandomGaussianBlur(p=.1), RandomGaussianBlur(p=.2)), (Pad(1), Pad(2)),
    (PerImage(v2.RandomErasing(.1)), PerImage(v2.RandomErasing(.2))), (PerImage(v2.RandomErasing()), PerImage(v2.TrivialAugmentWide())),
    (PerImage(v2.ElasticTransform(20., 4.)), PerImage(v2.ElasticTransform(20., 5.)))], ids=str)

def test_every_setting_shows_in_the_description(a, b):
    assert describe(a) != describe(b) and describe(Compose(a)) != describe(Compose(b))


# refusals

@pytest.mark.parametrize("argument, make", [
    *[("p", lambda k=k, p=p: k(p=p)) for k in (RandomHorizontalFlip, RandomVerticalFlip, RandomGrayscale, RandomGaussianBlur)
      for p in (-.1, 1.1, float("nan"), "a", None)],
    *[("size", lambda s=s: RandomCrop(s)) for s in (0, -1, (4,), (4, 4, 4), (4, 0), 2.5, (2.5, 4))],
    *[("padding", lambda p=p: RandomCrop(4, p)) for p in (-1, 1.5)],
    *[("padding", lambda p=p: Pad(p)) for p in (-1, 1.5, (1, 1), "a", None)], ("padding_mode", lambda: RandomCrop(4, 1, "edge")),
    *[("degrees", lambda k=k, d=d: k(d)) for k in (RandomAffine, RandomRotation)
      for d in (-1, (3, 1), float("nan"), "a", None, (1,), (0, float("inf")))],
    *[("translate", lambda t=t: RandomAffine(1, t)) for t in ((1.1, 0), (-.1, 0), (.1,), .1)],
    *[("scale", lambda s=s: RandomAffine(1, scale=s)) for s in ((0, 1), (2, 1), 2, (-1, 1))],
    *[("shear", lambda s=s: RandomAffine(1, shear=s)) for s in (90, -1, (5, 1))],
    *[("interpolation", lambda k=k: k(1, interpolation="cubic")) for k in (RandomAffine, RandomRotation)],
    *[("fill", lambda k=k, f=f: k(1, fill=f)) for k in (RandomAffine, RandomRotation) for f in (128, 1.1, -.1, float("nan"))],
    *[("kernel_size", lambda k=k: RandomGaussianBlur(k)) for k in (0, 4, -3, 2.5)],
    *[("sigma", lambda s=s: RandomGaussianBlur(sigma=s)) for s in ((0, 1), (2, 1), 1., (.1, float("nan")))]])
def test_a_bad_argument_is_named(argument, make):
    with pytest.raises(ValueError, match=argument): make()

@each
@pytest.mark.parametrize("x, said", [(batch(2)[0], "expected shape"), (batch(2)[:, :1], "expected shape"), (batch(2)[:0], "empty"),
                                     ((batch(2)*255).byte(), "divide uint8 images by 255"), (batch(2).numpy(), "expected a tensor")])
def test_what_is_no_batch_of_images_is_refused(t, x, said):
    for transform in (t, Compose(t)):
        with pytest.raises(ValueError, match=f"images: .*{said}"): transform(x)

@pytest.mark.parametrize("t, argument", [(RandomCrop(40, 2), "size"), (RandomCrop((4, 30), 2), "size"),
                                         (RandomCrop(8, 16, "reflect"), "padding"), (RandomGaussianBlur(33, p=1), "kernel_size")])
def test_images_that_are_too_small_are_refused(t, argument):
    with pytest.raises(ValueError, match=argument): t(batch())

def test_the_blur_of_no_image_is_none(): assert gaussian_blur(batch()[:0], torch.ones(0)).shape == (0, 3, 16, 20)

def test_threads_that_transform_at_once_leave_the_number_of_torch_threads_alone():
    usual, x, found = torch.get_num_threads(), torch.rand(256, 3, 32, 32), []
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            at_once = [threading.Thread(target=lambda: Compose(RandomHorizontalFlip(), RandomCrop(32, 4))(x)) for _ in range(3)]
            for t in at_once: t.start()
            for t in at_once: t.join()
            later = threading.Thread(target=lambda: found.append(torch.get_num_threads())); later.start(); later.join()
    finally: torch.set_num_threads(usual)
    assert found == [2]*5

@pytest.mark.parametrize("theirs", [v2.RandomErasing(1., inplace=True), v2.Normalize([.5]*3, [.5]*3, inplace=True)])
def test_torchvision_s_in_place_ones_do_not_write_into_the_batch(theirs):
    x = batch(); before = x.clone(); PerImage(theirs)(x)
    assert x.equal(before)

def test_a_blur_of_no_width_leaves_images_alone():
    x = batch(); torch.testing.assert_close(gaussian_blur(x, torch.zeros(len(x))), x, atol=1e-6, rtol=0)

@pytest.mark.parametrize("size", [4, 0, -1, 5.])
def test_kernels_are_odd_and_whole(size):
    for make in (lambda: gaussian_blur(batch(), torch.ones(len(batch())), size), lambda: RandomGaussianBlur(size)):
        with pytest.raises(ValueError, match="kernel_size="): make()
