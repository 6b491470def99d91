"""Colour jitter is held to torchvision's operations, one image and one operation at a time, and its chance to the distributions it promises."""
import itertools
from functools import reduce

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare, kstest
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from robustcv.color_jitter import ADJUST, ColorJitter, adjust_contrast, adjust_hue, adjust_saturation, luma
from robustcv.core import describe
from robustcv.transforms import Compose

ORACLES = {name: getattr(tv, f"adjust_{name}") for name in ADJUST}
ORDERS = torch.tensor(list(itertools.permutations(range(4))))
LOUD = ColorJitter(5, 5, 5, .5)
fields, orders = pytest.mark.parametrize("name", ADJUST), pytest.mark.parametrize("order", ["sample", "chunk"])

def gen(seed=0): return torch.Generator().manual_seed(seed)
def batch(n=5, h=8, w=10, seed=0): return torch.rand(n, 3, h, w, generator=gen(seed))
def full(x, v): return torch.full((len(x),), float(v))
def same(a, b, atol=1e-5): torch.testing.assert_close(a, b, atol=atol, rtol=0)

def special(kind, n, h, w, seed):
    "Images where formulas have their cases: grays, equal channels, corners of the colour cube."
    x = batch(n, h, w, seed)
    return {"random": x, "gray": x.mean(1, keepdim=True).expand(-1, 3, -1, -1).clone(), "equal channels": (3*x).round()/3, "corners": x.round(),
            "black": torch.zeros_like(x), "white": torch.ones_like(x), "dark": x*1e-3, "nearly gray": .5 + (x - .5)*1e-3}[kind]

kinds = ["random", "gray", "equal channels", "corners", "black", "white", "dark", "nearly gray"]
batches = st.builds(special, st.sampled_from(kinds), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
seeds, strengths, shifts = st.integers(0, 2**40), st.floats(0, 8), st.floats(0, .5)


# torchvision's results, image by image

@fields
@pytest.mark.parametrize("kind", kinds)
@settings(max_examples=8)
@given(n=st.integers(1, 4), h=st.integers(1, 9), w=st.integers(1, 9), seed=st.integers(0, 99))
def test_each_operation_equals_torchvision(name, kind, n, h, w, seed):
    x = special(kind, n, h, w, seed); before = x.clone()
    amount = torch.rand(n, generator=gen(seed)) - .5 if name == "hue" else 3*torch.rand(n, generator=gen(seed))
    expected = torch.stack([ORACLES[name](i, float(a)) for i, a in zip(x, amount, strict=True)])
    same(ADJUST[name](x, amount), expected)
    assert torch.equal(x, before)

@fields
@pytest.mark.parametrize("amount", [0., .5, 1., 4.])
def test_each_operation_equals_torchvision_at_its_ends(name, amount):
    x, a = batch(), amount - .5 if name == "hue" else amount
    if abs(a) <= .5 or name != "hue": same(ADJUST[name](x, full(x, a)), ORACLES[name](x, a))

def test_luma_equals_torchvision(): same(luma(batch()), tv.rgb_to_grayscale(batch()), 1e-6)

@settings(max_examples=8)
@given(kind=st.sampled_from(kinds), h=st.integers(1, 9), w=st.integers(1, 9), seed=seeds)
def test_every_order_equals_torchvision_s_operations_one_after_another(kind, h, w, seed):
    x, t = special(kind, 24, h, w, seed % 100), ColorJitter(.9, .9, .9, .5)
    p = t.draw(x, gen(seed)) | {"order": ORDERS}
    apply = lambda i: reduce(lambda image, k: list(ORACLES.values())[k](image, p[list(ADJUST)[k]][i].item()), ORDERS[i].tolist(), x[i])
    expected = torch.stack([apply(i) for i in range(24)])
    same(t.transform(x, **p), expected)
    for i in range(24): same(t.transform(x[i:i+1], **{k: v[i:i+1] for k, v in p.items()}), expected[i:i+1]) # on the path of one order

def test_the_order_matters():
    x = batch(1).expand(24, -1, -1, -1)
    amounts = dict(brightness=1.6, contrast=.4, saturation=1.8, hue=.2)
    y = ColorJitter().transform(x, ORDERS, **{k: full(x, v) for k, v in amounts.items()})
    assert len({tuple(i.flatten().round(decimals=3).tolist()) for i in y}) > 12

@fields
@pytest.mark.parametrize("value", [0, 0., .1, .3, .5, (0., .25), (.1, .4), [0, .5], 1, 2.5, (.2, 3)])
def test_ranges_are_torchvision_s(name, value):
    if name == "hue" and (value if isinstance(value, (int, float)) else value[1]) > .5: value = (-.5, -.2)
    neutral = 0. if name == "hue" else 1.
    assert ColorJitter(**{name: value}).ranges[name] == (getattr(v2.ColorJitter(**{name: value}), name) or (neutral, neutral))

@fields
def test_one_field_alone_is_its_operation(name):
    x, t = batch(9), ColorJitter(**{name: .4})
    p = t.draw(x, gen(3))
    same(t(x, gen(3)), ADJUST[name](x, p[name]), 1e-6)
    for other in ADJUST.keys() - {name}: assert (p[other] == (other != "hue")).all()


# laws

@orders
@given(x=batches, seed=seeds)
def test_zero_strength_is_the_identity(order, x, seed): same(ColorJitter(order=order)(x, gen(seed)), x, 1e-6)

@fields
def test_the_neutral_amount_is_the_identity(name): same(ADJUST[name](batch(), full(batch(), name != "hue")), batch(), 1e-6)

@orders
@given(x=batches, seed=seeds, b=strengths, c=strengths, s=strengths, h=shifts)
def test_the_output_stays_in_range_repeats_and_leaves_the_input(order, x, seed, b, c, s, h):
    t, before = ColorJitter(b, c, s, h, order), x.clone()
    y = t(x, gen(seed))
    assert y.min() >= -1e-6 and y.max() <= 1 + 1e-6 and y.shape == x.shape
    assert torch.equal(y, t(x, gen(seed))) and torch.equal(x, before)

@orders
@given(x=batches, seed=seeds, pick=st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_images_do_not_depend_on_their_neighbours(order, x, seed, pick):
    t, index = ColorJitter(.9, .9, .9, .5, order), torch.tensor(pick) % len(x)
    p = t.draw(x, gen(seed))
    assert all(len(v) == len(x) for v in p.values())
    same(t.transform(x[index], **{k: v[index] for k, v in p.items()}), t.transform(x, **p)[index])

def test_generators_decide():
    x, before = batch(40), torch.get_rng_state()
    assert not torch.equal(LOUD(x, gen(1)), LOUD(x, gen(2))) and torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5); y = LOUD(x); torch.manual_seed(5)
    assert torch.equal(y, LOUD(x)) and not torch.equal(y, LOUD(x)), "without a generator, torch's own moves on"

@fields
@given(x=batches, seed=seeds)
def test_an_image_of_one_gray_is_only_moved_by_brightness(name, x, seed):
    gray = x[:, :1, :1, :1].expand(-1, 3, 5, 4)
    if name != "brightness": same(ColorJitter(**{name: .5})(gray, gen(seed)), gray, 1e-4) # luma's weights sum to 0.9999

@given(x=batches, f=st.floats(0, 1))
def test_means_are_kept_by_contrast_and_grays_by_saturation(x, f):
    same(luma(adjust_saturation(x, full(x, f))), luma(x), 1e-3)
    same(adjust_contrast(x, full(x, f)).mean((1, 2, 3)), f*x.mean((1, 2, 3)) + (1 - f)*luma(x).mean((1, 2, 3)))

@given(x=batches, s=st.floats(-.5, .5))
def test_turning_the_hue_back_returns_the_image(x, s): same(adjust_hue(adjust_hue(x, full(x, s)), full(x, -s)), x, 1e-4)

@given(x=batches, s=st.floats(-.5, .5))
def test_the_hue_keeps_value_and_chroma(x, s):
    y = adjust_hue(x, full(x, s))
    same(y.amax(1), x.amax(1)); same(y.amin(1), x.amin(1))

@given(x=batches)
def test_half_a_turn_is_the_same_either_way(x): same(adjust_hue(x, full(x, .5)), adjust_hue(x, full(x, -.5)))

def test_a_third_of_a_turn_permutes_the_channels(): same(adjust_hue(batch(), full(batch(), 1/3)), batch()[:, [2, 0, 1]])

@orders
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-4), (torch.bfloat16, .1)])
def test_the_precision_is_kept(order, dtype, atol):
    x, t = batch(40), ColorJitter(.4, .4, .4, .1, order)
    y = t(x.to(dtype), gen(1))
    assert y.dtype == dtype
    same(y.float(), t(x.to(dtype).float(), gen(1)), atol)
    for f in ADJUST.values(): assert f(x.to(dtype), full(x, .3)).dtype == dtype

@orders
def test_channels_last_sliced_and_expanded_images_are_taken(order):
    x, t = batch(6), ColorJitter(.4, .4, .4, .1, order)
    same(t(x.to(memory_format=torch.channels_last), gen(1)), t(x, gen(1)), 1e-6)
    same(t(x[::2, :, 1:-1], gen(1)), t(x[::2, :, 1:-1].clone(), gen(1)), 1e-6)
    same(t(x[:1].expand(6, -1, -1, -1), gen(1)), t(x[:1].repeat(6, 1, 1, 1), gen(1)), 1e-6)


# chance

def rank(order): return (order*torch.tensor([64, 16, 4, 1])).sum(1) # of a permutation, as a number of its own
def number(order): return torch.searchsorted(rank(ORDERS), rank(order))

def test_the_orders_are_uniform_and_independent_of_the_neighbour():
    order = ColorJitter().draw(torch.zeros(24_000, 3, 1, 1), gen())["order"]
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(24_000, 4))
    k = number(order)
    assert chisquare(k.bincount(minlength=24)).pvalue > 1e-3
    assert chisquare((24*k[::2] + k[1::2]).bincount(minlength=24*24)).pvalue > 1e-3

def test_a_chunk_s_order_comes_in_runs_of_64():
    p = ColorJitter(.4, .4, .4, .1, "chunk").draw(torch.zeros(64*2400 + 7, 3, 1, 1), gen())
    k = number(p["order"])
    assert len(k) == 64*2400 + 7 and (k[-7:] == k[-1]).all()
    runs = k[:-7].view(2400, 64)
    assert (runs == runs[:, :1]).all() and chisquare(runs[:, 0].bincount(minlength=24)).pvalue > 1e-3
    assert all(len(p[name].unique()) > 10_000 for name in ADJUST), "the factors stay an image's own"

def test_within_a_chunk_equal_images_differ_by_their_factors_only():
    x = batch(1, 4, 4).expand(64, -1, -1, -1)
    y = ColorJitter(brightness=.5, order="chunk")(x, gen())
    assert len({tuple(i.flatten().tolist()) for i in y}) == 64

@pytest.mark.parametrize("t", [ColorJitter(.4, .8, .1, .25), ColorJitter(5, (0, 2), (.5, 3), (-.1, .3)), ColorJitter(.4, .4, .4, .1, "chunk")],
                         ids=str)
def test_factors_are_uniform_in_their_ranges(t):
    p = t.draw(torch.zeros(4000, 3, 1, 1), gen(1))
    for name, (low, high) in t.ranges.items():
        assert low <= p[name].min() and p[name].max() <= high and kstest(p[name].numpy(), "uniform", (low, high - low)).pvalue > 1e-3, name

def test_factors_are_independent_of_each_other_and_of_the_order():
    p = ColorJitter(.5, .5, .5, .5).draw(torch.zeros(20_000, 3, 1, 1), gen())
    drawn = torch.stack([*(p[name] for name in ADJUST), *p["order"].T[:3].float()])
    off = torch.corrcoef(drawn)[:4].fill_diagonal_(0)
    assert off.abs().max() < 4.5/20_000**.5


# refusals and descriptions

@fields
@pytest.mark.parametrize("value", [-.1, (2, 1), (-1, 1), float("nan"), float("inf"), "a", None, (.1,), (.1, .2, .3), (.1, "a"), (0, float("nan")),
                                   (.1, float("inf")), (None, 1), (False, True), (0, True)])
def test_a_bad_strength_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}="): ColorJitter(**{name: value})

@pytest.mark.parametrize("hue", [.6, 1, (-.6, 0), (0, .51)])
def test_a_hue_beyond_half_a_turn_is_named(hue):
    with pytest.raises(ValueError, match="^hue="): ColorJitter(hue=hue)

@pytest.mark.parametrize("order", ["fixed", None, "", 1])
def test_an_unknown_order_is_named(order):
    with pytest.raises(ValueError, match="order=.*use 'sample' or 'chunk'"): ColorJitter(order=order)

@pytest.mark.parametrize("x, said", [*[(x, "expected shape") for x in (batch(2)[0], batch(2)[:, :1], batch(2)[:, [0, 1, 2, 0]])],
                                     (batch(2)[:0], "empty"), ((batch(2)*255).byte(), "divide uint8 images by 255"),
                                     (batch(2).numpy(), "expected a tensor")])
def test_what_is_no_batch_of_images_is_refused(x, said):
    for t in (LOUD, Compose(LOUD)):
        with pytest.raises(ValueError, match=f"images: .*{said}"): t(x)

@pytest.mark.parametrize("a, b", [*[({n: .1}, {n: .2}) for n in ADJUST], *[({n: (.1, .3)}, {n: (.1, .4)}) for n in ADJUST],
    ({"brightness": .4}, {"contrast": .4}), ({"order": "sample"}, {"order": "chunk"}), ({"contrast": .1}, {"contrast": .1 + 1e-9}),
    ({"contrast": (0, 1e6)}, {"contrast": (0, 1e6 + 1)}), ({"hue": .1}, {"hue": .1 + 1e-9})], ids=str)
def test_every_setting_shows_in_the_description(a, b):
    a, b = ColorJitter(**a), ColorJitter(**b)
    assert a.ranges != b.ranges or a.order != b.order
    assert describe(a) != describe(b) and describe(Compose(a)) != describe(Compose(b))

def test_equal_settings_have_equal_descriptions():
    assert describe(ColorJitter(.5)) == describe(ColorJitter((.5, 1.5))) == describe(ColorJitter([.5, 1.5]))

def test_hues_of_gray_pixels_are_turned_in_half_precision():
    gray = torch.full((1, 3, 2, 2), .5).half()
    assert adjust_hue(gray, torch.tensor([.1])).allclose(gray, atol=1e-3)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([.1, -.2, .3, .5])
    torch.testing.assert_close(adjust_hue(x.half(), shift).float(), adjust_hue(x, shift), rtol=0, atol=.02)

def test_a_hue_carries_no_gradient():
    x = torch.rand(1, 3, 2, 2, requires_grad=True)
    assert not adjust_hue(x, torch.tensor([.1])).requires_grad
