"""Mixing images and labels: torchvision's own targets, shares that are areas, and the plain loss where nothing is mixed."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms import v2

from robustcv.core import seed_everything
from robustcv.data import Batch
from robustcv.recipe import mix_images, mixed_loss
from robustcv.training import cross_entropy

KINDS = {"cutmix": v2.CutMix, "mixup": v2.MixUp}
X, Y, K = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 1]), 3

def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, K))

@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_torchvision_s_targets(kind):
    model = linear(); seed_everything(5); loss = mixed_loss(model, Batch(X, Y, None, None), kind=kind)
    seed_everything(5); x, target = KINDS[kind](num_classes=K)(X, Y)
    torch.testing.assert_close(loss, F.cross_entropy(model(x), target, label_smoothing=0.1))

@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(2, 7), st.sampled_from([.2, 1., 5.]), st.integers(0, 2**31))
def test_the_shares_say_how_much_of_each_image_is_seen(kind, n, alpha, seed):
    seed_everything(seed)
    x = torch.arange(1., n + 1).view(-1, 1, 1, 1).expand(n, 3, 16, 16).clone() # image i holds i + 1 everywhere
    mixed, share = mix_images(x, kind, alpha)
    torch.testing.assert_close(share.sum(1), torch.ones(n))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), share @ torch.arange(1., n + 1), rtol=1e-4, atol=1e-4)
    assert x.flatten(1).std(1).max() == 0, "the caller's images were changed"

def test_one_image_cannot_be_mixed():
    x, share = mix_images(X[:1]); assert x.equal(X[:1]) and share.tolist() == [[1.]]

@pytest.mark.parametrize("kind", KINDS)
def test_without_a_second_image_the_loss_is_the_plain_one(kind):
    model, batch = linear(), Batch(X[:1], Y[:1], None, None)
    torch.testing.assert_close(mixed_loss(model, batch, kind=kind), cross_entropy(model, batch))

@pytest.mark.parametrize("bad, message", [(dict(kind="blend"), "unknown kind of mixture 'blend'"), (dict(alpha=0.), "alpha=0.0"), (dict(alpha=-1), "alpha=-1")])
def test_bad_arguments_are_named(bad, message):
    with pytest.raises(ValueError, match=message): mix_images(X, **bad)

def test_targets_are_exact_under_autocast():
    torch.manual_seed(0); seen = []
    class Spy(nn.Module):
        def forward(self, x): return torch.zeros(len(x), 3)
    batch = Batch(torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]), None, None)
    with pytest.MonkeyPatch.context() as m:
        m.setattr("robustcv.recipe.F.cross_entropy", lambda out, target, **kwargs: seen.append(target) or out.sum())
        torch.manual_seed(1); share = mix_images(batch.images)[1]
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16): mixed_loss(Spy(), batch)
    expected = torch.stack([share[:, batch.labels == k].sum(1) for k in range(3)], 1)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)
