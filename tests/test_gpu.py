"""What differs on a GPU: recorded steps, transforms of whole batches, evaluation. Skipped where there is none."""
import os
from functools import partial

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8") # for sums in a fixed order

import pytest
import torch

from robustcv import adversarial_training as adv
from robustcv.affine import RandomAffine, RandomRotation
from robustcv.color_jitter import ColorJitter
from robustcv.core import generator, normalized, seed_everything
from robustcv.data import Batches, ImageSet
from robustcv.evaluation import evaluate
from robustcv.fgsm import Transferred
from robustcv.models import build_model
from robustcv.multi_task import multi_task_loss
from robustcv.perturbations import attack_perturbations, color_perturbations, stability_perturbations, standard_perturbations, symmetry_perturbations
from robustcv.random_erase import GaussianDistortion, RandomErase
from robustcv.recipe import mixed_loss
from robustcv.stability import RandomNoise, stability_loss
from robustcv.symmetry import RandomSymmetry
from robustcv.features import fit_from
from robustcv.training import Training, _Recorded, _set_up, _step, cross_entropy, fit
from robustcv.transforms import (
    Compose,
    Pad,
    RandomCrop,
    RandomGaussianBlur,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomVerticalFlip,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

def images(n=96, side=64, k=4):
    gen = torch.Generator().manual_seed(0)
    boxes = torch.tensor([.1, .2, .7, .8]).repeat(n, 1)
    return ImageSet(torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=gen), torch.arange(n) % k, tuple("abcdefgh"[:k]), boxes)

def test_a_set_that_stays_outside_is_served_all_the_same(monkeypatch):
    inside = Batches(images(), 32, shuffle=True, device="cuda")
    monkeypatch.setattr("robustcv.data._has_room", lambda device, images: False)
    outside = Batches(images(), 32, shuffle=True, device="cuda")
    assert inside.images.is_cuda and not outside.images.is_cuda
    for a, b in zip(inside, outside, strict=True): assert b.images.is_cuda and a.images.equal(b.images) and a.labels.equal(b.labels) and a.boxes.equal(b.boxes)

OBJECTIVES = {
    "cross-entropy": cross_entropy, "adversarial": adv.adversarial_loss, "data": adv.adversarial_data_loss,
    "data, drawn": partial(adv.adversarial_data_loss, label="least likely", draw_eps=True), "pgd": partial(adv.pgd_loss, steps=2), "fgsm-rs": adv.fgsm_rs_loss,
    "trades": partial(adv.trades_loss, steps=2), "stability": partial(stability_loss, alpha=.1, std=normalized(.2)), "boxes": multi_task_loss,
    "boxes, giou": partial(multi_task_loss, kind="giou")}

def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])

@pytest.fixture
def deterministic():
    was = torch.backends.cudnn.allow_tf32
    torch.use_deterministic_algorithms(True, warn_only=True); torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False); torch.backends.cudnn.allow_tf32 = was

def steps(objective, cuda_graph, n=8):
    "Weights and losses after some steps, and the run."
    seed_everything(0)
    model = build_model("resnet18", 4, boxes=getattr(objective, "func", objective) is multi_task_loss)
    run = _set_up(model, images(), images(8), objective, None, Training(4, 16, lr=.001, precision="fp32", cuda_graph=cuda_graph), 0, "cuda", None, None)
    model.train(); torch.manual_seed(1); run.choose_passes(1)
    losses = [float(_step(run, batch)) for epoch in range(2) for batch in run.batches.epoch(1)][:n]
    return weights(model), losses, run

@pytest.mark.parametrize("name", OBJECTIVES)
def test_recorded_steps_are_those_that_python_takes(name, deterministic):
    recorded, losses, run = steps(OBJECTIVES[name], None)
    assert isinstance(run.passes, _Recorded) and run.passes.graph is not None
    expected, others, other = steps(OBJECTIVES[name], False)
    assert not isinstance(other.passes, _Recorded)
    assert losses == pytest.approx(others, rel=1e-3)
    assert (recorded - expected).norm() < .02*(expected - weights(build_same(name))).norm()

def build_same(name):
    seed_everything(0)
    return build_model("resnet18", 4, boxes=name.startswith("boxes")).cuda()

def test_objectives_that_change_are_recorded_anew_and_others_not_at_all():
    config = Training(3, 16, lr=.01)
    for objective in (adv.WarmUp(adv.adversarial_loss), adv.FreeAdversarial(), mixed_loss):
        history = fit(build_model("resnet18", 4), images(), images(8), objective, Compose(RandomHorizontalFlip(), RandomCrop(64, 4, "reflect")),
                      config, device="cuda")
        assert len(history) == 3 and history.loss.notna().all() and (history.loss < 3).all()

def test_training_resumes(tmp_path):
    half, config = Training(2, 16, lr=.01), Training(2, 16, lr=.01)
    model = build_model("resnet18", 4)
    history = fit(model, images(), images(8), config=half, device="cuda", folder=tmp_path)
    again = fit(build_model("resnet18", 4), images(), images(8), config=config, device="cuda", folder=tmp_path)
    assert history.loss.tolist() == again.loss.tolist(), "nothing is left to do"

def test_cached_features_are_trained_on():
    assert len(fit_from(build_model("resnet18", 4), "layer4", images(), images(8), Training(2, 16, lr=.01), device="cuda")) == 2

TRANSFORMS = [RandomHorizontalFlip(), RandomVerticalFlip(), RandomCrop(64, 4), RandomCrop(64, 4, "reflect"), Compose(RandomCrop(56), Pad(4)),
              RandomAffine(15, (.1, .1), (.9, 1.1), 10, "bilinear"), RandomRotation(15, "bilinear"), RandomGrayscale(.5),
              RandomGaussianBlur(5, (.5, 2.), .5), ColorJitter(.4, .4, .4, .1), ColorJitter(.4, .4, .4, .1, "chunk"), RandomErase(),
              RandomErase(value="mean"), GaussianDistortion(), RandomNoise(normalized(.1)), RandomSymmetry()]

@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_transforms_do_on_a_gpu_what_they_do_on_a_cpu(transform):
    x, boxes = torch.rand(32, 3, 64, 64, generator=generator(0)), torch.tensor([.1, .2, .7, .8]).repeat(32, 1)
    drawn = transform.with_boxes(x.cuda(), boxes.cuda(), generator(1, device="cuda"))
    assert drawn[0].is_cuda and drawn[0].isfinite().all() and (drawn[1] is None or drawn[1].is_cuda)
    here, there = transform.with_boxes(x, boxes, generator(1)), transform.with_boxes(x.cuda(), boxes.cuda(), generator(1))
    apart = (here[0] - there[0].cpu()).abs()
    assert (apart < 1e-3).float().mean() > .999, float(apart.max())
    if here[1] is not None: torch.testing.assert_close(here[1], there[1].cpu(), atol=1e-5, rtol=0)

def test_networks_are_measured():
    model, data = build_model("resnet18", 4), images()
    fit(model, data, images(8), config=Training(3, 16, lr=.01), device="cuda")
    data = ImageSet(data.images, data.labels, data.classes)
    sources = {"itself": Transferred(build_model("resnet18", 4).eval())}
    perturbations = standard_perturbations() + color_perturbations() + stability_perturbations() + symmetry_perturbations() + \
        attack_perturbations(sources, eps=(.1, .2), most=(16, 8), steps=3, targets=2, queries=10)
    table = evaluate(model, data, perturbations, device="cuda", precision="fp32")
    assert len(table) == len(perturbations) and table.accuracy.between(0, 100).all()
    clean = evaluate(model.cpu(), data, standard_perturbations()[:1], device="cpu", precision="fp32")
    assert abs(table.accuracy[0] - clean.accuracy[0]) <= 3
