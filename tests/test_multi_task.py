"""The box objective against torchvision's operations, boxes' defects on made-up boxes, and the linear probe against a closed case."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import box_iou as all_pairs
from torchvision.ops import generalized_box_iou

from robustcv.data import Batch, Batches, ImageSet, known_boxes, load_tiny_imagenet
from robustcv.evaluation import COLUMNS, evaluate, measure_boxes, measure_probe
from robustcv.perturbations import affine_perturbations
from robustcv.fgsm import fgsm, fold_batchnorm
from robustcv.model_figures import plot_boxes, plot_worst_boxes
from robustcv.models import build_model, load_model, save_model
from robustcv.multi_task import (box_iou, box_loss, box_quality, count_boxes, degrade_boxes, linear_probe, multi_task_loss, predict_boxes, saliency,
                                 trunk_features)
from robustcv.training import Training, fit
from robustcv.transforms import Compose, PerImage, RandomCrop

MODEL = "shufflenet_v2_x0_5"

def gen(seed=0): return torch.Generator().manual_seed(seed)

def boxes(n, seed=0):
    corners = torch.rand(n, 2, 2, generator=gen(seed))
    return torch.cat([corners.amin(1), corners.amax(1) + .01], 1)/1.01

def images(n=8, size=32, classes=4, given=None, seed=0):
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=gen(seed))
    return ImageSet(x, torch.arange(n) % classes, tuple("abcdefgh"[:classes]), boxes(n) if given is None else given)

def batch(n=6, **kwargs): return next(iter(Batches(images(n, **kwargs), n)))

@pytest.fixture(scope="module")
def model(): torch.manual_seed(0); return build_model(MODEL, 4, boxes=True)


# the objective

@given(st.integers(1, 12), st.integers(0, 99))
def test_iou_is_the_diagonal_of_torchvisions(n, seed):
    a, b = boxes(n, seed), boxes(n, seed + 1)
    torch.testing.assert_close(box_iou(a, b), all_pairs(a, b).diagonal())

def test_iou_without_area_is_zero():
    a = torch.tensor([[.2, .2, .2, .9], [0., 0, 0, 0]])
    assert box_iou(a, a).tolist() == [0, 0]

@given(st.integers(0, 99))
def test_the_giou_loss_is_one_less_torchvisions_giou_over_known_boxes(seed):
    a, b = boxes(6, seed), boxes(6, seed + 1); b[2] = .3
    rest = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(box_loss(a, b, "giou"), 1 - generalized_box_iou(a[rest], b[rest]).diagonal().mean())

def test_smooth_l1_is_quadratic_below_a_ninth_and_linear_above():
    given_box, small, large = torch.tensor([[.2, .2, .8, .8]]), .05, .3
    assert box_loss(given_box + torch.tensor([small, 0, 0, 0]), given_box).item() == pytest.approx(small**2/2*9, rel=1e-4)
    assert box_loss(given_box - torch.tensor([0, large, 0, 0]), given_box).item() == pytest.approx(large - 1/18, rel=1e-4)

@pytest.mark.parametrize("kind", ["smooth l1", "giou"])
def test_unknown_boxes_give_no_loss_and_no_gradient(kind):
    p = boxes(4).requires_grad_()
    given_boxes = boxes(4, 1); given_boxes[1] = torch.tensor([.4, .1, .4, .9])
    box_loss(p, given_boxes, kind).backward()
    assert p.grad.isfinite().all() and (p.grad[1] == 0).all() and (p.grad[[0, 2, 3]] != 0).any(1).all()
    q = boxes(4).requires_grad_()
    loss = box_loss(q, torch.zeros(4, 4), kind); loss.backward()
    assert loss == 0 and (q.grad == 0).all()

@pytest.mark.parametrize("kind", ["smooth l1", "giou"])
def test_the_objective_is_the_sum_of_its_parts(model, kind):
    model.train(); b = batch()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(0); loss = multi_task_loss(model, b, beta=.7, kind=kind)
    model.load_state_dict(state); logits, found = model(b.images, boxes=True)
    torch.testing.assert_close(loss, F.cross_entropy(logits, b.labels, label_smoothing=.1) + .7*box_loss(found, b.boxes, kind))

def test_at_weight_zero_the_box_head_learns_nothing(model):
    model.train(); multi_task_loss(model, batch(), beta=0).backward()
    grad = model.stage("head")[0].weight.grad
    assert (grad[4:] == 0).all() and (grad[:4] != 0).any()
    model.zero_grad()

@pytest.mark.parametrize("kwargs, message", [(dict(beta=-1), "beta=-1: a weight that is not negative"), (dict(beta=float("nan")), "beta=nan"),
                                             (dict(kind="l2"), "unknown kind of box loss 'l2'")])
def test_bad_settings(model, kwargs, message):
    with pytest.raises(ValueError, match=message): multi_task_loss(model, batch(), **kwargs)

def test_a_batch_without_boxes_says_what_to_do(model):
    with pytest.raises(ValueError, match="this batch has none: use images with boxes.*transforms that can move them"):
        multi_task_loss(model, Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), None, None))


# the model

def test_predicted_boxes_lie_inside_and_have_no_negative_sides(model):
    with torch.no_grad():
        for x in (torch.rand(8, 3, 32, 32), 1e4*torch.randn(8, 3, 32, 32)):
            _, b = model.eval()(x, boxes=True)
            assert b.shape == (8, 4) and (b >= 0).all() and (b <= 1 + 1e-6).all() and (b[:, 2:] >= b[:, :2]).all()

def test_every_box_can_be_predicted():
    from robustcv.models import _boxes
    target = boxes(50)
    side = target[:, 2:] - target[:, :2]
    place = target[:, :2]/(1 - side)
    torch.testing.assert_close(_boxes(torch.cat([place.logit(), side.logit()], 1)), target, atol=1e-5, rtol=0)

def test_without_boxes_it_is_a_classifier_like_any_other(model, tmp_path):
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        logits = model.eval()(x)
        assert logits.shape == (3, 4) and torch.equal(logits, model(x, boxes=True)[0])
        folded = fold_batchnorm(model)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
        torch.testing.assert_close(folded(x), logits, atol=1e-4, rtol=1e-4)
    assert fgsm(model, x, torch.tensor([0, 1, 2]), .1).shape == x.shape
    save_model(model, tmp_path/"m.safetensors"); again = load_model(tmp_path/"m.safetensors")
    with torch.no_grad():
        for a, b in zip(again(x, boxes=True), model(x, boxes=True), strict=True): assert torch.equal(a, b)

def test_models_without_a_head_for_boxes_say_so():
    with pytest.raises(ValueError, match=r"has no head for boxes; build it with build_model\(…, boxes=True\)"):
        build_model(MODEL, 4)(torch.rand(1, 3, 32, 32), boxes=True)
    with pytest.raises(ValueError, match="does not end with a linear layer"): build_model("squeezenet1_1", 4, boxes=True)

def test_predicting_restores_the_mode_and_does_not_depend_on_the_batch_size(model):
    model.train(); data = images(7)
    a, b = predict_boxes(model, data, 3), predict_boxes(model, data, 7)
    assert model.training and a.shape == (7, 4) and not a.requires_grad
    torch.testing.assert_close(a, b)

def test_steps_down_the_objective_teach_both_tasks(tiny):
    b = next(iter(Batches(load_tiny_imagenet(tiny, "train"), 24)))
    torch.manual_seed(0); model = build_model(MODEL, 4, boxes=True).train()
    optimizer, seen = torch.optim.SGD(model.parameters(), .1, .9), []
    for _ in range(15):
        multi_task_loss(model, b).backward(); optimizer.step(); optimizer.zero_grad()
        with torch.no_grad(): logits, found = model(b.images, boxes=True)
        seen.append((F.cross_entropy(logits, b.labels).item(), box_loss(found, b.boxes).item()))
    assert seen[-1][0] < .7*seen[0][0] and seen[-1][1] < .85*seen[0][1]

@pytest.mark.parametrize("transform", [PerImage(torch.nn.Identity()), Compose(RandomCrop(32, 2), PerImage(torch.nn.Identity())), lambda x, generator: x])
def test_transforms_that_cannot_move_boxes_are_refused_in_training(tiny, transform):
    train, valid = (load_tiny_imagenet(tiny, s) for s in ("train", "val"))
    with pytest.raises(ValueError, match="boxes: this batch has none"):
        fit(build_model(MODEL, 4, boxes=True), train, valid, multi_task_loss, transform, Training(1, 8, lr=.01))


# the quality of boxes

def test_defects_are_counted():
    given_boxes = torch.tensor([[0., 0, 0, 0], [.1, .1, .2, .2], [0, 0, 1, 1], [0, 0, 1, .96], [.3, .3, .3, .8], [.2, .2, .7, .7]])
    t = box_quality(images(6, given=given_boxes))
    assert t["empty"].tolist() == [True, False, False, False, True, False] and t.tiny.tolist() == [False, True] + [False]*4
    assert t.whole.tolist() == [False, False, True, True, False, False]
    assert not (t.unsalient & (t["empty"] | t.tiny | t.whole)).any()
    counts = count_boxes(images(6, given=given_boxes))
    assert {k: counts[k] for k in ("n", "empty", "tiny", "whole")} == dict(n=6, empty=2, tiny=1, whole=2)

def test_what_stands_out_is_salient_wherever_it_is():
    x = torch.randint(70, 110, (1, 3, 64, 64), dtype=torch.uint8, generator=gen()).repeat(4, 1, 1, 1)
    for i, (r, c) in enumerate(((8, 8), (8, 40), (40, 8), (40, 40))): x[i, :, r:r+16, c:c+16] = 230
    s = saliency(x)
    assert s.shape == (4, 32, 32) and torch.allclose(s.sum((1, 2)), torch.ones(4)) and (s >= 0).all()
    right = torch.tensor([[8., 8, 24, 24], [40, 8, 56, 24], [8, 40, 24, 56], [40, 40, 56, 56]])/64
    data = ImageSet(x, torch.zeros(4, dtype=torch.int64), ("a", "b"), right)
    assert (box_quality(data).salience > 1.5).all() and not box_quality(data).unsalient.any()
    wrong = ImageSet(x, data.labels, data.classes, right.roll(2, 0))
    assert box_quality(wrong).unsalient.all()

def test_salience_of_the_whole_image_is_one():
    t = box_quality(images(3, given=torch.tensor([[0., 0, 1, 1]]*3)))
    np.testing.assert_allclose(t.salience, 1, atol=1e-5)

def test_an_image_of_one_colour_has_finite_salience():
    data = ImageSet(torch.full((1, 3, 32, 32), 7, dtype=torch.uint8), torch.tensor([0]), ("a", "b"), torch.tensor([[.1, .1, .6, .6]]))
    assert np.isfinite(box_quality(data).salience).all()


# spoiled boxes

@given(st.floats(0, 1), st.integers(0, 9))
def test_a_share_of_the_boxes_is_replaced(amount, seed):
    data = images(40); n = round(amount*40)
    whole = degrade_boxes(data, "whole", amount, seed).boxes
    assert (whole == torch.tensor([0., 0, 1, 1])).all(1).sum() == n and (whole != data.boxes).any(1).sum() == n
    shuffled = degrade_boxes(data, "shuffled", amount, seed).boxes
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, data.boxes.tolist()))
    assert (shuffled != data.boxes).any(1).sum() == (n if n > 1 else 0)

def test_jitter_is_in_sides_of_the_box_and_grows_with_the_amount():
    data = images(400, given=torch.tensor([[.4, .3, .6, .7]]*400))
    moved = degrade_boxes(data, "jitter", .05).boxes - data.boxes
    assert moved.std(0).tolist() == pytest.approx([.01, .02, .01, .02], rel=.15) and moved.mean(0).abs().max() < .003
    overlaps = [box_iou(degrade_boxes(data, "jitter", a).boxes, data.boxes).mean() for a in (0., .1, .3, 1.)]
    assert overlaps[0] == pytest.approx(1) and overlaps == sorted(overlaps, reverse=True)
    wild = degrade_boxes(data, "jitter", 5.).boxes
    assert (wild >= 0).all() and (wild <= 1).all() and (wild[:, 2:] >= wild[:, :2]).all()
    corner = images(400, given=torch.tensor([[.5, .5, 1., 1.]]*400))
    assert known_boxes(degrade_boxes(corner, "jitter", 1.).boxes).all() # spoiled, and not lost

@pytest.mark.parametrize("kind", ["jitter", "whole", "shuffled"])
def test_spoiling_leaves_images_and_originals_alone_and_repeats(kind):
    data = images(20); before = data.boxes.clone(); data.boxes[3] = before[3] = 0
    a, b, other = degrade_boxes(data, kind, .5, 1), degrade_boxes(data, kind, .5, 1), degrade_boxes(data, kind, .5, 2)
    assert torch.equal(data.boxes, before) and a.images is data.images and torch.equal(a.boxes, b.boxes) and not torch.equal(a.boxes, other.boxes)
    assert not known_boxes(a.boxes[3:4]).any()

def test_only_known_boxes_are_exchanged():
    data = images(40); data.boxes[::4] = torch.tensor([.5, .2, .5, .9])
    new = degrade_boxes(data, "shuffled", 1.).boxes
    assert known_boxes(new).equal(known_boxes(data.boxes)) and (new != data.boxes).any(1).sum() == 30
    assert sorted(map(tuple, new.tolist())) == sorted(map(tuple, data.boxes.tolist()))

def test_a_checkpoint_of_other_boxes_is_not_continued(tiny, tmp_path):
    train, valid = (load_tiny_imagenet(tiny, s) for s in ("train", "val"))
    go = lambda data: fit(build_model(MODEL, 4, boxes=True), data, valid, multi_task_loss, None, Training(1, 8, lr=.01), folder=tmp_path)
    go(train)
    with pytest.raises(ValueError, match="other settings or data"): go(degrade_boxes(train, "whole", 1.))

def test_a_head_for_boxes_is_new_when_weights_come_from_a_file(tmp_path):
    torch.manual_seed(0); eight = build_model(MODEL, 8); save_model(eight, tmp_path/"m.safetensors")
    two = build_model(MODEL, 4, weights=tmp_path/"m.safetensors", boxes=True)
    assert torch.equal(two.net.conv1[0].weight, eight.net.conv1[0].weight) and not torch.equal(two.net.fc.weight, eight.net.fc.weight)

@pytest.mark.parametrize("kind, amount, message", [("blur", .1, "unknown kind of degradation 'blur'"), ("whole", 1.5, "amount=1.5"),
                                                   ("jitter", -.1, "amount=-0.1"), ("jitter", float("inf"), "amount=inf")])
def test_bad_degradations(kind, amount, message):
    with pytest.raises(ValueError, match=message): degrade_boxes(images(4), kind, amount)

def test_sets_without_boxes_are_refused():
    bare = ImageSet(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    for f in (box_quality, lambda s: degrade_boxes(s, "whole", 1.)):
        with pytest.raises(ValueError, match="has no boxes"): f(bare)


# the linear probe

def test_features_are_what_the_head_is_given(model):
    data = images(5)
    f = trunk_features(model, data, 2)
    head = model.stage("head")[0]
    with torch.no_grad(): torch.testing.assert_close(head(f)[:, :4], model.eval()(data.images/255), atol=1e-5, rtol=1e-4)
    assert len(head._forward_pre_hooks) == 0

def test_the_probe_is_a_logistic_regression_fitted_to_convergence(monkeypatch, model):
    x = torch.randn(300, 5, generator=gen()); w = torch.tensor([2., -1, 0, 0, .5])
    y = (torch.rand(300, generator=gen(1)) < (x @ w).sigmoid()).long()
    monkeypatch.setattr("robustcv.multi_task.trunk_features", lambda model, data, **kwargs: x[data.index])
    class Rows:
        def __init__(self, index): self.index, self.labels, self.classes, self.name = index, y[index], ("no", "yes"), "rows"
    train, valid = Rows(torch.arange(200)), Rows(torch.arange(200, 300))
    said = linear_probe(model, train, valid, penalty=1e-2)
    z = (x - x[:200].mean(0))/x[:200].std(0)
    from scipy.optimize import minimize # the same strictly convex problem, for two classes a difference of weights
    def loss(v):
        a = torch.as_tensor(v, dtype=torch.double)
        return float(F.binary_cross_entropy_with_logits(z[:200].double() @ a[:5] + a[5], y[:200].double()) + 1e-2*a[:5].square().sum()/4)
    best = minimize(loss, np.zeros(6), tol=1e-10).x
    assert torch.equal(said, (z[200:].double() @ torch.tensor(best[:5]) + best[5] > 0).long())

@pytest.mark.parametrize("kwargs, message", [(dict(penalty=-1), "penalty=-1")])
def test_bad_probes(model, kwargs, message):
    with pytest.raises(ValueError, match=message): linear_probe(model, images(4), images(4), **kwargs)
    with pytest.raises(ValueError, match="its classes differ"): linear_probe(model, images(4), images(4, classes=3))
    with pytest.raises(ValueError, match="does not end with a linear layer"): trunk_features(build_model("squeezenet1_1", 4), images(2))


# measured

def test_affine_perturbations_are_torchvisions():
    from torchvision.transforms.v2 import functional as tv
    x = torch.rand(2, 3, 32, 32, generator=gen())
    theirs = {"rotation": lambda s: dict(angle=-s), "translation": lambda s: dict(translate=[round(s*32)]*2),
              "scale": lambda s: dict(scale=s), "shear": lambda s: dict(shear=[s, 0.])}
    for p in affine_perturbations():
        how = dict(angle=0., translate=[0, 0], scale=1., shear=[0., 0.]) | theirs[p.name.removeprefix("affine: ")](p.strength)
        torch.testing.assert_close(p.apply(x, None, None), tv.affine(x, interpolation=tv.InterpolationMode.BILINEAR, **how), atol=1e-4, rtol=0)

def test_boxes_and_the_probe_are_measured(model):
    data, other = images(12), (images(16, seed=1), images(8, seed=2))
    for net in (model.eval(), build_model(MODEL, 4).eval()):
        t = measure_probe(net, evaluate(net, data, affine_perturbations()[:1]), *other)
        assert list(t) == COLUMNS and t.perturbation.tolist()[1:] == ["linear probe: images"] and t.n.tolist() == [12, 8]
        assert t.hits.iloc[1].tolist() == (linear_probe(net, *other) == other[1].labels).tolist()
    data.boxes[2] = 0
    t, mean = measure_boxes(model, t, data)
    overlap = box_iou(predict_boxes(model, data), data.boxes)
    assert t.perturbation.iloc[-1] == "box" and t.hits.iloc[-1].tolist() == (overlap >= .5).tolist()
    assert mean == pytest.approx(100*overlap[known_boxes(data.boxes)].mean().item())

def test_the_worst_boxes_are_drawn_in_rows_of_one_defect():
    tiny, whole, fine = [.1, .1, .2, .2], [0., 0, 1, 1], [.2, .2, .8, .8]
    few = images(6, given=torch.tensor([tiny, whole, whole, tiny, fine, whole]))
    fig = plot_worst_boxes(few, 2)
    assert [ax.get_title() for ax in fig.axes][:4] == ["1.0 %", "1.0 %", "100.0 %", "100.0 %"]
    with pytest.raises(ValueError, match="has fewer than 4 boxes of each defect"): plot_worst_boxes(few, 4)
    with pytest.raises(ValueError, match="has no boxes"): plot_worst_boxes(ImageSet(few.images, few.labels, few.classes))

def test_given_and_predicted_boxes_are_drawn_with_their_overlap(model):
    data = images(6)
    fig, said = plot_boxes(model.eval(), data, 3), box_iou(predict_boxes(model, data), data.boxes)
    assert [ax.get_title() for ax in fig.axes if ax.get_title()] == [f"IoU {said[i]:.2f}" for i in (0, 2, 5)]
    assert all(len(ax.patches) == 2 for ax in fig.axes[:3])

def test_boxes_are_drawn_where_they_are_in_oblong_images(monkeypatch):
    data = ImageSet(torch.zeros(3, 3, 32, 64, dtype=torch.uint8), torch.zeros(3).long(), ("a",), torch.tensor([[.25, .5, .75, 1.]]*3))
    monkeypatch.setattr("robustcv.model_figures.predict_boxes", lambda model, some: some.boxes.clone())
    for ax in plot_boxes(None, data, 3).axes[:3]:
        assert len({(*p.get_xy(), p.get_width(), p.get_height()) for p in ax.patches}) == 1 # predicted as given

def test_the_giou_loss_reads_nothing_from_the_device():
    with FakeTensorMode():
        for kind in ("smooth l1", "giou"):
            p = torch.rand(4, 4, requires_grad=True)
            box_loss(p, torch.rand(4, 4), kind).backward()

def test_a_box_between_the_cells_of_the_map_has_salience():
    images = ImageSet(torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a",),
                      boxes=torch.tensor([[109/224, .1, 114/224, .9]])) # no centre of 32 cells lies in its columns
    assert box_quality(images).salience[0] > 0
