"""The one training loop: closed form, objectives, checkpoints, refusals."""
import json
import math
import platform
import random
import resource
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from robustcv.data import Batch, Batches, ImageSet, take
from robustcv.models import build_model, load_model, save_model
from robustcv.adversarial_training import FreeAdversarial, WarmUp, adversarial_loss
from robustcv.recipe import mixed_loss
from robustcv.checkpoints import Checkpoint
from robustcv.training import Training, _epoch, _Run, _set_up, accuracy, autocast, cross_entropy, fit, plot_history
from robustcv.transforms import Compose, RandomCrop, RandomHorizontalFlip

K, CONFIG = 3, Training(epochs=3, batch_size=8, lr=0.01, precision="fp32")

def images(n=24, seed=0, classes=K):
    "Noise, and each class somewhat brighter in one channel."
    labels, noise = torch.arange(n) % classes, torch.randint(0, 200, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    noise[torch.arange(n), labels % 3] += 50
    return ImageSet(noise.to(torch.uint8), labels, tuple("abcdefgh"[:classes]))

def linear(seed=0):
    torch.manual_seed(seed); return nn.Sequential(nn.Flatten(), nn.Linear(192, K))

def deep(seed=0):
    "Batch statistics and a random layer, to be hard on checkpoints."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, K))

def weights(model): return torch.cat([v.detach().double().flatten() for v in model.state_dict().values()])

def run(model=None, objective=cross_entropy, config=CONFIG, train=None, valid=None, **kwargs):
    "Train; returns the model's weights and the history without its times."
    model = model or linear()
    train, valid = images() if train is None else train, images(12, 1) if valid is None else valid
    history = fit(model, train, valid, objective, config=config, device="cpu", **kwargs)
    return weights(model), history.drop(columns=["seconds", "images_per_second"])


# what it computes

def one_cycle(step, steps, peak, warmup):
    "Learning rate of one step: up from peak/25 along a cosine, and down to peak/250000."
    swing = lambda a, b, t: b + (a - b)*(1 + math.cos(math.pi*t))/2
    top, last = warmup*steps - 1, steps - 1
    return swing(peak/25, peak, step/top) if step <= top else swing(peak, peak/25e4, (step - top)/(last - top))

@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, epochs=2, batch_size=6, lr=.2, momentum=0, weight_decay=.1, warmup=.5)])
def test_a_linear_model_follows_the_closed_form(config):
    data, model = images(), linear()
    w, b = (p.detach().double().numpy().copy() for p in model[1].parameters())
    batches, velocity, t = Batches(data, config.batch_size, shuffle=True, drop_last=True, seed=5), [0, 0], 0
    steps = config.epochs*len(batches)
    for epoch in range(config.epochs):
        for batch in batches.epoch(epoch):
            x = batch.images.double().flatten(1).numpy()
            logits = x@w.T + b
            p = np.exp(logits - logits.max(1, keepdims=True)); p /= p.sum(1, keepdims=True)
            error = (p - (0.9*np.eye(K)[batch.labels.numpy()] + 0.1/K))/len(x) # targets smoothed by 0.1
            for i, (value, gradient) in enumerate([(w, error.T@x), (b, error.sum(0))]):
                velocity[i] = config.momentum*velocity[i] + gradient + config.weight_decay*value
                value -= one_cycle(t, steps, config.lr, config.warmup)*velocity[i]
            t += 1
    fit(model, data, images(12, 1), config=config, seed=5, device="cpu")
    np.testing.assert_allclose(model[1].weight.detach().numpy(), w, atol=1e-5)
    np.testing.assert_allclose(model[1].bias.detach().numpy(), b, atol=1e-5)

@pytest.mark.parametrize("warmup", [0, .25, .5, 1])
@pytest.mark.parametrize("steps", range(1, 7))
def test_runs_of_few_steps_train_too(steps, warmup):
    history = run(config=Training(epochs=steps, batch_size=8, lr=.01, warmup=warmup), train=images(8))[1]
    assert len(history) == steps and history.lr.between(0, .01 + 1e-9).all()

def test_the_history_tells_loss_accuracies_and_rate():
    model = linear(); history = fit(model, images(), images(12, 1), config=CONFIG, device="cpu")
    assert list(history) == ["epoch", "lr", "loss", "seconds", "images_per_second", "train_accuracy", "valid_accuracy"]
    assert history.epoch.tolist() == [1, 2, 3] and history.loss.is_monotonic_decreasing and not model.training
    correct, total = accuracy(model, Batches(images(12, 1)), "fp32").tolist()
    assert total == 12 and history.valid_accuracy.iloc[-1] == 100*correct/total

def test_it_learns():
    assert run(config=Training(epochs=15, batch_size=8, lr=.01))[1].valid_accuracy.iloc[-1] > 90

def test_the_loss_is_the_cross_entropy_smoothed():
    batch = Batch(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]), None, None); logits = linear()(batch.images)
    for s in (0, .1, 1): # smoothing mixes in the mean over all classes
        expected = -(1 - s)*logits.log_softmax(1)[range(4), batch.labels].mean() - s*logits.log_softmax(1).mean()
        torch.testing.assert_close(cross_entropy(linear(), batch, label_smoothing=s), expected)

@pytest.mark.parametrize("make", [linear, deep])
def test_a_seed_decides_the_result(make):
    one, again, other = (run(make(), seed=s, transform=RandomHorizontalFlip()) for s in (1, 1, 2))
    assert torch.equal(one[0], again[0]) and one[1].equals(again[1]) and not torch.allclose(one[0], other[0])

def test_the_result_does_not_depend_on_the_global_seed():
    def with_global(seed): model = deep(); torch.manual_seed(seed); return run(model)[0]
    assert torch.equal(with_global(1), with_global(2))

def test_the_global_random_state_is_left_alone():
    def states(): return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    model = deep(); before = states()
    run(model, transform=RandomHorizontalFlip())
    assert states() == before

def test_each_process_draws_chance_of_its_own_for_its_images():
    def drawn(rank, world):
        seen, data = [], images()
        def objective(model, batch, backward): seen.append(float(torch.rand(1))); return cross_entropy(model, batch)
        run = _set_up(deep(), data, data, objective, None, Training(1, 8, precision="fp32"), 0, "cpu", None, None)
        run.batches.rank, run.batches.world = rank, world
        _epoch(run, 0)
        return seen
    assert drawn(0, 1)[0] == drawn(0, 2)[0] != drawn(1, 2)[0]

def test_the_images_are_left_alone():
    data = images(); before = data.images.clone(), data.labels.clone()
    def rude(x, generator): return x.mul_(0)
    run(train=data, transform=rude)
    assert torch.equal(data.images, before[0]) and torch.equal(data.labels, before[1])

def test_the_transform_sees_every_batch_once_with_its_own_generator():
    seen = []
    def watch(x, generator): seen.append((tuple(x.shape), float(torch.rand(1, generator=generator)))); return x
    run(transform=watch)
    assert {s for s, _ in seen} == {(8, 3, 8, 8)} and len(seen) == 9 == len({v for _, v in seen})

def test_the_transform_changes_what_is_learnt():
    assert not torch.allclose(run(transform=Compose(RandomCrop(8, 2)))[0], run()[0])

def test_frozen_parameters_are_not_decayed():
    model = deep(); model[0].requires_grad_(False); before = model[0].weight.clone()
    run(model, config=Training(epochs=1, batch_size=8, weight_decay=.5))
    assert torch.equal(model[0].weight, before)

@pytest.mark.parametrize("precision, expected", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_is_the_one_asked_for(precision, expected):
    with autocast(torch.device("cpu"), precision): assert linear()(torch.rand(2, 3, 8, 8)).dtype == expected


# objectives

def halves_at_once(model, batch, backward): return 0.5*cross_entropy(model, batch) + 0.5*cross_entropy(model, batch, label_smoothing=.4)

def first_half_early(model, batch, backward):
    backward(0.5*cross_entropy(model, batch))
    return 0.5*cross_entropy(model, batch, label_smoothing=.4)

def test_an_objective_may_back_propagate_its_first_term_early():
    at_once, early = run(objective=halves_at_once)[0], run(objective=first_half_early)[0]
    torch.testing.assert_close(at_once, early, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(at_once, run()[0], atol=1e-4)

def test_gradients_do_not_leak_from_one_step_to_the_next():
    seen = []
    def watch(model, batch, backward): seen.append([p.grad for p in model.parameters()]); return cross_entropy(model, batch)
    run(objective=watch)
    assert all(g is None or not g.any() for grads in seen for g in grads)

def test_an_objective_gets_images_labels_and_a_model_in_training_mode():
    def check(model, batch, backward):
        assert model.training and batch.images.shape == (8, 3, 8, 8) and 0 <= batch.images.min() and batch.images.max() <= 1
        assert torch.equal(data.labels[batch.index], batch.labels)
        return cross_entropy(model, batch)
    data = images(); run(objective=check, train=data)


# checkpoints

class Crash(Exception): pass

class Interrupted:
    "An objective that fails once, at one call."
    __name__ = "interrupted"
    def __init__(self, at=-1): self.at, self.calls = at, 0
    def __call__(self, model, batch, backward):
        self.calls += 1
        if self.calls == self.at: raise Crash
        return cross_entropy(model, batch)

@pytest.mark.parametrize("at", [2, 5, 9])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_run_resumed_after_a_crash_ends_bit_for_bit_as_one_that_never_crashed(tmp_path, at, keep):
    config, kwargs = replace(CONFIG, keep=keep), dict(transform=Compose(RandomHorizontalFlip(), RandomCrop(8, 1)), seed=3)
    whole = run(deep(), Interrupted(), config, **kwargs)
    crashing, resumed = Interrupted(at), Interrupted()
    with pytest.raises(Crash): run(deep(), crashing, config, folder=tmp_path, **kwargs)
    torch.rand(7) # another process would have another global state, and other initial weights
    again = run(deep(9 if at > 3 else 0), resumed, config, folder=tmp_path, **kwargs)
    assert torch.equal(whole[0], again[0]) and whole[1].equals(again[1])
    assert resumed.calls == 9 - 3*((at - 1)//3) # finished epochs are not repeated

def test_a_finished_run_is_loaded_and_not_repeated(tmp_path):
    first, objective = run(deep(), Interrupted(), folder=tmp_path), Interrupted()
    again = run(deep(7), objective, folder=tmp_path)
    assert torch.equal(first[0], again[0]) and first[1].equals(again[1]) and objective.calls == 0

@pytest.mark.parametrize("change, named", [
    ({"config": replace(CONFIG, epochs=4)}, "epochs"), ({"config": replace(CONFIG, lr=.02, warmup=.5)}, "lr, warmup"), ({"seed": 1}, "seed"),
    ({"train": images(seed=5)}, "data"), ({"valid": images(12, 6)}, "data"), ({"transform": RandomHorizontalFlip()}, "transform"),
    ({"objective": halves_at_once}, "objective")])
def test_a_folder_of_other_settings_is_refused_and_kept(tmp_path, change, named):
    run(folder=tmp_path); before = (tmp_path/"state.pt").read_bytes()
    model = linear(4); start = weights(model)
    said = rf"state.pt: belongs to a run with other settings or data \({named}\); remove .* or choose another folder"
    with pytest.raises(ValueError, match=said): run(model, folder=tmp_path, **change)
    assert (tmp_path/"state.pt").read_bytes() == before and torch.equal(weights(model), start)

def other(path): torch.save({"epoch": 3}, path)

def flip_a_bit(path): # of a weight
    content, weight = bytearray(path.read_bytes()), next(iter(torch.load(path, weights_only=True)["model"].values()))
    content[content.index(weight.numpy().tobytes())] ^= 1; path.write_bytes(content)

@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(b""), lambda f: f.write_bytes(f.read_bytes()[:-200]),
                                    lambda f: f.write_bytes(b"x"*999), lambda f: f.write_text("state"), other, flip_a_bit],
                         ids=["empty", "truncated", "garbage", "text", "another file", "a bit"])
def test_a_damaged_state_is_named(tmp_path, damage):
    run(folder=tmp_path); damage(tmp_path/"state.pt")
    with pytest.raises(ValueError, match="state.pt: (damaged|belongs)"): run(folder=tmp_path)

def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); run()
    assert not list(tmp_path.iterdir())

def spoil(model, batch, backward): return -cross_entropy(model, batch)

def test_the_best_weights_are_kept_where_asked(tmp_path):
    config, good, ends = Training(epochs=4, batch_size=8, lr=.05, precision="fp32"), linear(), {}
    run(good, config=Training(epochs=8, batch_size=8, lr=.01))
    for keep in ("last", "best"):
        model = linear(); model.load_state_dict(good.state_dict())
        history = run(model, spoil, replace(config, keep=keep), folder=tmp_path/keep)[1]
        correct, total = accuracy(model, Batches(images(12, 1)), "fp32").tolist()
        ends[keep] = 100*correct/total
    assert history.valid_accuracy.max() > history.valid_accuracy.iloc[-1] # unlearning makes it worse
    assert ends == {"last": history.valid_accuracy.iloc[-1], "best": history.valid_accuracy.max()}

def test_a_classifier_leaves_its_best_weights_and_classes_as_a_model_file(tmp_path):
    torch.manual_seed(0); model = build_model("shufflenet_v2_x0_5", K)
    fit(model, images(), images(12, 1), config=Training(epochs=1, batch_size=8, lr=.01, precision="fp32"), device="cpu", folder=tmp_path)
    best = load_model(tmp_path/"best.safetensors")
    assert best.classes == model.classes == tuple("abc")
    assert all(torch.equal(a, b) for a, b in zip(best.state_dict().values(), model.state_dict().values(), strict=True))

def test_the_best_weights_are_in_the_model_file_even_if_their_epoch_was_not_written(tmp_path):
    model, states = build_model("shufflenet_v2_x0_5", K), []
    checkpoint = Checkpoint(tmp_path, model, torch.optim.SGD(model.parameters(), .1), torch.nn.Identity(), "s", pause=math.inf)
    for epoch, right in enumerate((10., 50., 20.)):
        torch.nn.init.constant_(model.net.fc.weight, epoch); states.append({k: v.clone() for k, v in model.state_dict().items()})
        checkpoint.save({"valid_accuracy": right}, last=epoch == 2)
        assert (tmp_path/"best.safetensors").exists() == (tmp_path/"state.pt").exists() == (epoch == 2)
    best = load_model(tmp_path/"best.safetensors").state_dict()
    assert all(torch.equal(best[k], v) for k, v in states[1].items()) and best.keys() == states[1].keys()


# refusals

def test_a_checkpoint_of_other_layers_is_refused(tmp_path):
    other = lambda act: nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Flatten(), nn.Linear(144, K))
    run(other(nn.ReLU()), folder=tmp_path)
    for model in (other(nn.Tanh()), nn.Sequential(nn.Flatten(), nn.Linear(192, K))):
        with pytest.raises(ValueError, match="other settings or data"): run(model, folder=tmp_path)
    run(other(nn.ReLU()), folder=tmp_path)

def test_training_accuracy_is_measured_on_the_probe():
    model, data = linear(), images()
    wrong = replace(data, labels=(data.labels + 1) % K)
    history = run(model, config=replace(CONFIG, epochs=10), probe=wrong)[1]
    correct, total = accuracy(model, Batches(wrong, 8), "fp32").tolist()
    assert history.train_accuracy.iloc[-1] == 100*correct/total

def blow_up(at, value=math.nan):
    calls = []
    def explode(model, batch, backward): calls.append(1); return cross_entropy(model, batch)*(value if len(calls) == at else 1)
    return explode

@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_earlier_checkpoint(tmp_path, value):
    with pytest.raises(FloatingPointError, match=r"epoch 2, step 3: lower the learning rate \(lr=0.01\).*checkpoint in .* from before"):
        run(objective=blow_up(5, value), folder=tmp_path)
    state = torch.load(tmp_path/"state.pt", weights_only=True)
    assert all(v.isfinite().all() for v in state["model"].values()) and len(json.loads(state["history"])) == 1

def test_without_a_checkpoint_the_error_says_that_nothing_was_saved():
    with pytest.raises(FloatingPointError, match="epoch 1.*nothing was saved"): run(objective=blow_up(1))

def infinite_slope(model, batch, backward): # a finite loss whose gradient is not
    return cross_entropy(model, batch) + (model(batch.images).sum()*0).sqrt()

def test_weights_that_are_not_finite_are_neither_returned_nor_saved(tmp_path):
    with pytest.raises(FloatingPointError):
        run(objective=infinite_slope, config=Training(epochs=1, batch_size=24, precision="fp32"), folder=tmp_path)
    assert not (tmp_path/"state.pt").exists()

@pytest.mark.parametrize("kwargs, said", [
    ({"valid": images(12, 1, 4)}, "valid: its classes differ"), ({"valid": take(images(), torch.arange(0))}, "valid: no images"),
    ({"model": build_model("shufflenet_v2_x0_5", 5)}, "model: has 5 outputs, the images have 3 classes; build it with num_classes=3"),
    ({"model": linear().requires_grad_(False)}, "model: all of its parameters are frozen"),
    ({"train": images(6)}, "batch_size=8: images has only 6")])
def test_what_does_not_fit_together_is_refused(kwargs, said):
    with pytest.raises(ValueError, match=said): run(**kwargs)

def test_a_model_with_a_config_of_another_kind_is_trained():
    model = linear(); model.config = SimpleNamespace(hidden=3)
    assert len(run(model)[1]) == 3

@pytest.mark.parametrize("name, value", [("epochs", 0), ("batch_size", 0), ("lr", 0), ("lr", -1), ("lr", math.nan), ("keep", "bets"),
                                         ("precision", "fp16"), ("warmup", 1.5), ("momentum", -1), ("weight_decay", -1)])
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(ValueError, match=name): run(config=replace(CONFIG, **{name: value}))

@pytest.mark.parametrize("mode", [True, False])
def test_measuring_leaves_the_model_s_mode_alone(mode):
    model = deep().train(mode); model[1].eval()
    accuracy(model, Batches(images()), "fp32")
    assert model.training == mode and not model[1].training and model[3].training == mode

def test_accuracy_counts_what_is_right():
    model, data = linear(), images(10)
    with torch.no_grad(): model[1].weight.zero_(); model[1].bias.copy_(torch.tensor([0., 1., 0.])) # always class 1
    assert accuracy(model, Batches(data, 4), "fp32").tolist() == [int((data.labels == 1).sum()), 10]

def test_histories_are_drawn():
    import matplotlib.pyplot as plt
    history = run()[1]; ax = plot_history({"a": history, "b": history})
    assert len(ax.lines) == 4 and ax.lines[0].get_ydata().tolist() == history.valid_accuracy.tolist()
    plt.close(ax.figure)

def test_cross_entropy_is_torch_s():
    logits, y = torch.randn(5, K), torch.tensor([0, 1, 2, 1, 0])
    batch = Batch(torch.rand(5, 3, 8, 8), y, None, None)
    torch.testing.assert_close(cross_entropy(lambda x: logits, batch, label_smoothing=0), F.cross_entropy(logits, y))


def test_a_folder_is_not_continued_from_other_initial_weights(tmp_path):
    torch.manual_seed(0); first = build_model("resnet18", K)
    save_model(first, tmp_path/"first.safetensors")
    go = dict(train=images(), valid=images(12, 1), config=Training(epochs=1, batch_size=8, lr=.01, precision="fp32"), device="cpu", folder=tmp_path/"run")
    fit(first, **go)
    with pytest.raises(ValueError, match="other settings"): fit(build_model("resnet18", K, weights=tmp_path/"first.safetensors"), **go)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_names_a_batch_size_that_may_fit(error):
    def greedy(model, batch, backward): raise error
    with pytest.raises(RuntimeError, match=r"out of memory with batch_size=8 on cpu: try batch_size=4, with lr=0.005"): run(objective=greedy)
    with pytest.raises(RuntimeError, match=r"^shapes$"): run(objective=lambda *a: (_ for _ in ()).throw(RuntimeError("shapes")))

def test_a_network_remembers_what_it_was_trained_on(tmp_path):
    model = build_model("resnet18", K); run(model, config=replace(CONFIG, epochs=1))
    save_model(model, tmp_path/"m.safetensors")
    assert load_model(tmp_path/"m.safetensors").trained_on == model.trained_on == images().fingerprint

@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere memory is left to the system")
def test_steps_use_the_memory_of_the_steps_before():
    "Activations of 100 MB a step: 25,000 pages, if they were new."
    model, data = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), *[nn.Sequential(nn.ReLU(), nn.Conv2d(64, 64, 1)) for _ in range(6)],
                                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, K)), images(24)
    data = ImageSet(data.images.repeat(1, 1, 8, 8), data.labels, data.classes)
    pages = []
    def count(model, batches, before): pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt); return {}
    fit(model, data, images_like(data, 4), config=Training(4, 24, lr=.01, precision="fp32"), device="cpu", watch=count)
    assert np.diff(pages).min() < 2_000, np.diff(pages)

def images_like(data, n): return take(data, torch.arange(n))

def test_an_objective_is_recorded_once_for_as_long_as_it_stays(monkeypatch):
    "Which passes an epoch gets on a GPU; what recording does is tested there."
    class Recorded:
        def __init__(self, run, objective): self.objective = objective
    monkeypatch.setattr("robustcv.training._Recorded", Recorded)
    def passes(objective, epochs=4, config=CONFIG, parallel=None):
        model = linear()
        run = _Run(model, parallel or model, None, {}, objective, None, config, 0, SimpleNamespace(type="cuda"), *[None]*7)
        return [run.choose_passes(n) or run.passes for n in range(epochs)]
    clean, *rest = passes(WarmUp(adversarial_loss))
    assert clean.objective is not adversarial_loss and clean is not rest[0] and rest[0].objective is adversarial_loss and all(p is rest[0] for p in rest)
    assert passes(part := partial(adversarial_loss, alpha=.3))[0].objective is part, "a partial of one that is marked"
    for unmarked in (mixed_loss, FreeAdversarial(), lambda *args: None): assert not isinstance(passes(unmarked)[0], Recorded)
    assert not isinstance(passes(cross_entropy, config=replace(CONFIG, cuda_graph=False))[0], Recorded)
    assert not isinstance(passes(cross_entropy, parallel=linear())[0], Recorded)

class Outputs(nn.Module):
    def __init__(self, wrap, k=K): super().__init__(); self.net, self.wrap = nn.Sequential(nn.Flatten(), nn.Linear(192, k)), wrap
    def forward(self, x): return self.wrap(self.net(x))

@pytest.mark.parametrize("model, said", [(Outputs(lambda z: {"logits": z}), "returns a dict and not logits"), (Outputs(lambda z: z, 2), "there are 3 classes"),
                                         (Outputs(lambda z: z[:, 0]), "there are 3 classes")])
def test_a_model_without_a_logit_a_class_is_refused_before_it_is_trained(model, said):
    before = weights(model)
    with pytest.raises(ValueError, match=said): run(model)
    assert torch.equal(weights(model), before)

@pytest.mark.parametrize("kwargs, said", [(dict(transform=v2.RandomHorizontalFlip()), "go into PerImage"), (dict(transform=3), "a int is not called"),
    (dict(objective=nn.CrossEntropyLoss()), "is a loss of logits and labels"), (dict(config=replace(CONFIG, precision="fp32"), folder=__file__), "is a file")])
def test_parts_of_another_kind_are_refused(kwargs, said):
    with pytest.raises((ValueError, OSError), match=said): run(**kwargs)

def test_settings_are_a_training():
    with pytest.raises(ValueError, match="config: expected such as .*got a dict"): run(config={"epochs": 2})

@pytest.mark.parametrize("kwargs", [dict(epochs=1.5), dict(momentum=1.), dict(momentum=-.1), dict(batch_size=0)])
def test_settings_out_of_range_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))): Training(**kwargs)

class Shift(nn.Module):
    def __init__(self, by): super().__init__(); self.by = by
    def forward(self, x, generator): return (x + self.by).clamp(0, 1)

def test_what_a_transform_keeps_in_attributes_tells_checkpoints_apart(tmp_path):
    run(transform=Shift(.1), folder=tmp_path); run(transform=Shift(.1), folder=tmp_path)
    with pytest.raises(ValueError, match="other settings or data"): run(transform=Shift(.2), folder=tmp_path)

class Kept(nn.Module):
    "A transform, or an objective, with a setting in an attribute or a buffer."
    def __init__(self, by, buffer=False):
        super().__init__()
        if buffer: self.register_buffer("by", torch.tensor(by))
        else: self.by = by
    def forward(self, x, *args): return x if args and isinstance(args[0], torch.Generator) else cross_entropy(x, args[0])

@pytest.mark.parametrize("part", ["transform", "objective"])
@pytest.mark.parametrize("one, other", [(Kept((.9, 1.1)), Kept((.9, 5.))), (Kept({"a": [1]}), Kept({"a": [2]})), (Kept(1), Kept(2)),
                                        (Kept(.1, True), Kept(.2, True))])
def test_whatever_a_module_keeps_tells_checkpoints_apart(tmp_path, part, one, other):
    first = run(folder=tmp_path, **{part: one})
    assert torch.equal(run(folder=tmp_path, **{part: one})[0], first[0])
    with pytest.raises(ValueError, match=rf"other settings or data \({part}\)"): run(folder=tmp_path, **{part: other})

def test_other_frozen_weights_are_other_settings(tmp_path):
    def go(frozen):
        torch.manual_seed(0); model = build_model("shufflenet_v2_x0_5", K)
        for n, p in model.named_parameters(): p.requires_grad_(frozen not in n)
        return run(model, config=replace(CONFIG, epochs=1), folder=tmp_path)
    go("fc.bias")
    with pytest.raises(ValueError, match=r"other settings or data \(frozen\)"): go("fc.weight")

def test_gradients_that_were_there_before_do_not_count():
    spoilt = linear(); (100*spoilt(torch.rand(4, 3, 8, 8))).square().sum().backward()
    assert torch.equal(run(spoilt)[0], run()[0])

class Leaving(Interrupted):
    "Crashes between a gradient and its step."
    def __call__(self, model, batch, backward):
        if self.calls == self.at - 1: backward(cross_entropy(model, batch))
        return super().__call__(model, batch, backward)

def test_an_interrupted_step_leaves_nothing_behind_in_the_same_model(tmp_path):
    whole, model = run(deep()), deep()
    with pytest.raises(Crash): run(model, Leaving(5), folder=tmp_path)
    assert any(p.grad is not None for p in model.parameters())
    assert torch.equal(run(model, Leaving(), folder=tmp_path)[0], whole[0])

def test_a_refused_model_is_as_it_was(tmp_path):
    go = lambda model, **kwargs: fit(model, images(), images(12, 1), config=replace(CONFIG, epochs=1, **kwargs), device="cpu", folder=tmp_path)
    go(build_model("shufflenet_v2_x0_5", K)); other = build_model("shufflenet_v2_x0_5", K)
    with pytest.raises(ValueError, match="other settings"): go(other, lr=.5)
    assert (other.classes, other.size, other.trained_on) == (None, None, None)

def test_a_lambda_is_named_where_it_cannot_be_described(tmp_path):
    objective = lambda model, batch, backward: cross_entropy(model, batch)
    run(objective=objective)
    with pytest.raises(TypeError, match="objective: cannot describe function .*; with folder=None, anything goes"):
        run(objective=objective, folder=tmp_path/"new")
    assert not (tmp_path/"new"/"state.pt").exists()

def test_a_folder_that_cannot_be_made_is_refused_before_the_first_epoch(tmp_path):
    (tmp_path/"file").write_text(""); counted = Interrupted()
    with pytest.raises(OSError, match="file.*move away the file"): run(objective=counted, folder=tmp_path/"file"/"sub")
    assert counted.calls == 0

def test_a_single_image_a_step_is_told_what_batch_normalisation_takes():
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, K))
    with pytest.raises(ValueError, match="batch_size=1: batch normalisation takes at least 2 images"): run(model, config=replace(CONFIG, batch_size=1))

def test_settings_may_be_numpy_s():
    assert run(config=replace(CONFIG, epochs=np.int64(3), lr=np.float64(.01), momentum=np.float32(.5)))[1].equals(run(config=replace(CONFIG, momentum=.5))[1])

def test_numbers_of_any_kind_may_be_watched_and_be_seeds(tmp_path):
    history = run(watch=lambda model, batches, before: {"a": torch.tensor(2.), "b": np.float32(3)}, seed=np.int64(1), folder=tmp_path)[1]
    assert (history.a == 2).all() and (history.b == 3).all()

def test_a_checkpoint_with_parts_missing_is_named(tmp_path):
    run(folder=tmp_path)
    state = torch.load(tmp_path/"state.pt", weights_only=True); del state["model"]; torch.save(state, tmp_path/"state.pt")
    with pytest.raises(ValueError, match="state.pt: damaged .*lacks model.*remove it to start again"): run(folder=tmp_path)

@pytest.mark.parametrize("given, says", [(dict(epochs=2.), "epochs=2.0: a whole number"), (dict(batch_size="8"), "batch_size='8': a whole number"),
                                         (dict(lr="a"), "lr='a': a number"), (dict(weight_decay=-1), "weight_decay=-1: not negative")])
def test_settings_of_the_wrong_kind_are_refused(given, says):
    with pytest.raises(ValueError, match=says): Training(**given)

def test_a_model_for_other_sizes_is_told_so():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"model: fails on images of \d+×\d+ pixels \(.*\); if it is made for others, resize: size= \(--size\)"): run(model)
