"""Normalisation, stages, freezing, and files that are damaged, foreign or hostile."""
import json
import os
import re
import shutil

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.v2 import functional as tv

from robustcv.core import IMAGENET_MEAN, IMAGENET_STD
from robustcv.models import _load_state, build_model, evaluating, first_conv, load_model, save_model, show_filters

SMALL = "shufflenet_v2_x0_5" # the smallest of torchvision's networks
FAMILIES = ["resnet18", "resnet50", "densenet121", "mobilenet_v3_small", "vgg11", "convnext_tiny", "googlenet", "swin_t"]

def images(n=4, side=32): return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))

def state(model): return {k: v.clone() for k, v in model.state_dict().items()}

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def outline(name, **kwargs):
    "The model without memory for its weights."
    with torch.device("meta"): return build_model(name, 5, **kwargs)

@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0); model = build_model(SMALL, 5)
    model.classes = tuple("abcde"); model.train()(images(8)); return model.eval() # statistics that are not the initial ones

@pytest.fixture
def file(small, tmp_path): save_model(small, tmp_path/"model.safetensors"); return tmp_path/"model.safetensors"


# building

def test_the_normalisation_is_imagenet_s(small):
    with torch.no_grad():
        torch.testing.assert_close(small(images()), small.net(tv.normalize(images(), IMAGENET_MEAN, IMAGENET_STD)), atol=1e-5, rtol=1e-5)

def test_the_normalisation_is_no_part_of_the_state(small):
    assert all(k.startswith("net.") for k in small.state_dict()) and small.double().scale.dtype == torch.float64
    small.float()

@pytest.mark.parametrize("name, side", [("resnet18", 8), ("resnet50", 8), ("densenet121", 8)])
def test_stems_keep_the_image_s_size_or_half_of_it(name, side):
    sizes = {}
    for stem in ("imagenet", "half", "small"):
        model = outline(name, stem=stem)
        model.stage("layer1")[0].register_forward_pre_hook(lambda m, x, stem=stem: sizes.update({stem: x[0].shape[-1]}))
        assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 5)
    assert sizes == {"imagenet": side, "half": 16, "small": 32} and first_conv(model).kernel_size == (3, 3)

@pytest.mark.parametrize("kwargs, said", [({"name": "resnet19"}, "did you mean 'resnet1"), ({"num_classes": 1}, "num_classes=1"),
    ({"num_classes": "3"}, "num_classes=.3.: a whole number"),
    ({"stem": "tiny"}, "unknown stem 'tiny'"), ({"name": "vgg11", "stem": "small"}, "known for ResNets and DenseNets, not for VGG")])
def test_building_refuses(kwargs, said):
    with pytest.raises(ValueError, match=said): build_model(**{"name": "resnet18", "num_classes": 5, **kwargs})

def test_the_first_convolution_and_its_picture(small):
    import matplotlib.pyplot as plt
    assert first_conv(small) is small.net.conv1[0]
    figure = show_filters(small); plt.close(figure)
    assert len([a for a in figure.axes if a.images]) == 24
    with pytest.raises(ValueError, match="no convolution"): first_conv(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="1 input channels"): show_filters(nn.Conv2d(1, 4, 3))


# stages

@pytest.mark.parametrize("name", FAMILIES)
def test_the_stages_hold_every_parameter_and_buffer_exactly_once(name):
    model = outline(name)
    held = [id(t) for s in model.stages for m in model.stage(s) for t in [*m.parameters(), *m.buffers()]]
    assert sorted(held) == sorted(id(t) for t in [*model.net.parameters(), *model.net.buffers()])

@pytest.mark.parametrize("name", [*FAMILIES, "vit_b_16"])
def test_with_everything_below_the_head_frozen_only_its_classifier_is_trained(name):
    model = outline(name)
    model.freeze_below("head")
    head = model.net.get_submodule(model.stages["head"][-1])
    assert isinstance(head, nn.Linear) and head.out_features == 5
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in head.parameters()}

@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_stages_are_named_in_the_order_of_computation(name):
    model, order = outline(name), []
    assert list(model.stages) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    for s in model.stages:
        for m in model.stage(s): m.register_forward_hook(lambda *_, s=s: order.append(s))
    model(torch.empty(2, 3, 32, 32, device="meta"))
    assert list(dict.fromkeys(order)) == list(model.stages) and order == sorted(order, key=list(model.stages).index)

def test_an_unknown_stage_is_named(small):
    for act in (small.stage, small.freeze_below):
        with pytest.raises(ValueError, match="unknown stage of shufflenet_v2_x0_5 'boddy': did you mean 'body'"): act("boddy")
    assert small.frozen == ()

def step(model):
    "Train once in training mode; the names of what changed."
    before = state(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.1)
    model.train()(images()).logsumexp(1).sum().backward(); optimizer.step(); model.zero_grad()
    return {k.removeprefix("net.") for k, v in model.state_dict().items() if not torch.equal(v, before[k])}

@pytest.mark.parametrize("first", ["stem", "layer2", "layer4", "head"])
def test_frozen_stages_stand_still_and_the_others_move(first):
    model = build_model("resnet18", 5, stem="small"); names = list(model.stages)
    model.freeze_below(first)
    trained = [p for s in names[names.index(first):] for p in model.stages[s]]
    assert step(model) == {k for k in model.net.state_dict() if any(k.startswith(p + ".") for p in trained)}

def test_freezing_outlasts_a_change_of_mode_and_can_be_undone():
    model = build_model(SMALL, 5); everything = set(model.net.state_dict())
    model.eval(); model.freeze_below("head")
    assert not model.training and not any(m.training for m in model.modules())
    assert step(model) == {"fc.weight", "fc.bias"} and model.training # statistics stay although step() asks for training mode
    model.freeze_below("body")
    assert model.frozen == () and step(model) == everything

def test_a_frozen_model_in_training_mode_computes_as_in_evaluation_mode_below():
    model = build_model("resnet18", 5, stem="small"); model.freeze_below("head")
    with torch.no_grad(): assert torch.equal(model.train()(images()), model.eval()(images()))


# files

@pytest.mark.parametrize("name, stem", [("resnet18", "imagenet"), ("resnet18", "small"), (SMALL, "imagenet")])
def test_a_saved_model_comes_back_bit_for_bit(name, stem, tmp_path):
    model = build_model(name, 5, stem=stem).to(memory_format=torch.channels_last)
    model.classes = tuple("abcde"); model.train()(images()); model.eval()
    save_model(model, tmp_path/"new"/"m.safetensors")
    again = load_model(tmp_path/"new"/"m.safetensors")
    assert equal(state(model), state(again)) and again.config == model.config and again.classes == model.classes and not again.training
    with torch.no_grad(): assert torch.equal(again.to(memory_format=torch.channels_last)(images()), model(images()))

@pytest.mark.parametrize("name", ["m.safetensors", "m", "m.best"])

def test_a_model_without_class_names_comes_back_from_any_file_name(tmp_path, name):
    save_model(build_model(SMALL, 5), tmp_path/name); assert load_model(tmp_path/name).classes is None

@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("classes", [5, 7])
def test_weights_of_another_number_of_classes_get_a_new_head(small, file, suffix, classes):
    if suffix == ".pth": torch.save(small.net.state_dict(), file := file.with_suffix(".pth"))
    other = build_model(SMALL, classes, weights=file)
    same = {k for k, v in other.state_dict().items() if torch.equal(v, small.state_dict()[k])}
    assert set(small.state_dict()) - same == (set() if classes == 5 else {"net.fc.weight", "net.fc.bias"})
    assert other(images()).shape == (4, classes)

def test_weights_for_another_stem_keep_all_but_the_first_convolution(tmp_path):
    model = build_model("resnet18", 5); torch.save(model.net.state_dict(), tmp_path/"m.pth")
    other = build_model("resnet18", 5, stem="small", weights=tmp_path/"m.pth").state_dict()
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, other[k])} == {"net.conv1.weight"}

@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0"])
def test_weights_of_another_architecture_are_refused(file, name):
    with pytest.raises(ValueError, match="model.safetensors: .*another architecture"): build_model(name, 5, weights=file)

def changed(file, tensors=lambda t: t, config=lambda c: c):
    "A copy of a model file with other tensors or another description."
    from safetensors import safe_open
    with safe_open(file, "pt") as f: t, c = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["robustcv"])
    save_file(tensors(t), file.with_name("changed.safetensors"), {"robustcv": json.dumps(config(c))})
    return file.with_name("changed.safetensors")

@pytest.mark.parametrize("tensors, config, said", [
    (lambda t: t, lambda c: {**c, "num_classes": 6}, "names 5 classes for 6 outputs"),
    (lambda t: t, lambda c: {**c, "num_classes": 6, "classes": None}, "other shapes: fc"), (lambda t: t, lambda c: {**c, "name": "resnet18"}, "misses"),
    (lambda t: t, lambda c: {**c, "name": "resnet0"}, "unknown model"),
    (lambda t: {**t, "more": torch.zeros(1)}, lambda c: c, "unknown more"),
    (lambda t: {k: v for k, v in t.items() if k != "fc.bias"}, lambda c: c, "misses fc.bias"),
    (lambda t: {**t, "fc.bias": torch.full((5,), float("nan"))}, lambda c: c, "fc.bias holds values that are not finite"),
    (lambda t: {**t, "conv1.0.weight": t["conv1.0.weight"]/0}, lambda c: c, "conv1.0.weight holds values that are not finite"),
    (lambda t: t, lambda c: {"name": SMALL, "num_classes": 5}, "not a robustcv model"),
    (lambda t: t, lambda c: {**c, "weights": "/etc/hostname"}, "not a robustcv model"),
    (lambda t: t, lambda c: [c], "not a robustcv model")])
def test_a_file_that_does_not_fit_its_description_is_refused(file, tensors, config, said):
    with pytest.raises(ValueError, match=said): load_model(changed(file, tensors, config))

@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:1000], lambda c: c[:-1], lambda c: b"x"*1000, lambda c: b"\0"*1000])
@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_a_damaged_file_is_named(small, file, tmp_path, damage, name):
    if name == "m.pth": torch.save(small.net.state_dict(), tmp_path/name)
    else: shutil.copy(file, tmp_path/name)
    (tmp_path/name).write_bytes(damage((tmp_path/name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name}: (damaged|refused)"): build_model(SMALL, 5, weights=tmp_path/name)
    with pytest.raises(ValueError, match=f"{name}: damaged"): load_model(tmp_path/name)

class Trap:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)

@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"fc.weight": t}, lambda t: {"fc.weight": torch.zeros(1), "more": [t]}])
def test_code_in_a_file_is_not_executed(tmp_path, wrap):
    torch.save(wrap(Trap(tmp_path/"sprung")), tmp_path/"m.pth"); shutil.copy(tmp_path/"m.pth", tmp_path/"m.safetensors")
    for name in ("m.pth", "m.safetensors"):
        with pytest.raises(ValueError): build_model(SMALL, 5, weights=tmp_path/name)
        with pytest.raises(ValueError): load_model(tmp_path/name)
    assert not (tmp_path/"sprung").exists()
    torch.load(tmp_path/"m.pth", weights_only=False) # the trap works
    assert (tmp_path/"sprung").exists()

@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(2)])
def test_a_file_that_is_no_state_is_refused(tmp_path, content):
    torch.save(content, tmp_path/"m.pth")
    with pytest.raises(ValueError, match="expected a dictionary of tensors"): build_model(SMALL, 5, weights=tmp_path/"m.pth")

def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.pth: no such weights file"): build_model(SMALL, 5, weights=tmp_path/"no.pth")
    with pytest.raises(FileNotFoundError, match="no such model file"): load_model(tmp_path/"no.safetensors")

def test_a_refused_state_leaves_the_network_as_it_was(small):
    before, weights = state(small), {k: v + 1 for k, v in small.net.state_dict().items()}
    bias = weights["fc.bias"]
    for wrong in ({**weights, "fc.bias": bias*float("nan")}, {**weights, "fc.bias": torch.zeros(9)}, {"fc.bias": bias}):
        with pytest.raises(ValueError): _load_state(small.net, wrong, "file")
    assert equal(before, state(small))

def test_a_failed_save_leaves_the_older_file(small, file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError): save_model(small, file)
    assert file.read_bytes() == before and [f.name for f in file.parent.iterdir()] == [file.name]


# pretrained weights, without a network

RESNET = torchvision.models.ResNet18_Weights.IMAGENET1K_V1

@pytest.mark.parametrize("classes, stem, new", [(5, "imagenet", {"fc.weight", "fc.bias"}),
    (5, "small", {"fc.weight", "fc.bias", "conv1.weight"}),
                                                (1000, "imagenet", set())])
def test_pretrained_weights_are_loaded_and_the_head_replaced(hub, classes, stem, new):
    official = {k: v for k, v in torchvision.models.resnet18().state_dict().items() if "num_batches" not in k} # as in the official file
    hub("resnet18", RESNET, official)
    model = build_model("resnet18", classes, pretrained=True, stem=stem)
    mine = model.net.state_dict()
    assert {k for k, v in official.items() if mine[k].shape != v.shape or not torch.equal(mine[k], v)} == new
    assert model(images()).shape == (4, classes)

def test_the_official_names_of_a_densenet_s_weights_are_understood(hub):
    official = torchvision.models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))([12]\.)", r"\1.\2", k): v for k, v in official.items()}
    hub("densenet121", torchvision.models.DenseNet121_Weights.DEFAULT, old)
    mine = build_model("densenet121", 5, pretrained=True).net.state_dict()
    assert all(torch.equal(mine[k], v) for k, v in official.items() if not k.startswith("classifier"))

def test_pretrained_weights_with_a_wrong_hash_are_refused(hub):
    file = hub("resnet18", RESNET, {"fc.weight": torch.zeros(2, 2)}, wrong=True)
    with pytest.raises(ValueError, match=f"{file}: its hash begins with .* instead of 00000000: remove it"):
        build_model("resnet18", 5, pretrained=True)

def test_without_a_network_the_error_says_where_to_put_the_file(hub, tmp_path):
    place = f"{tmp_path}/hub/checkpoints/resnet18-"
    with pytest.raises(ConnectionError, match=rf"(?s)cannot download {RESNET.url}.*put that file at {place}.*weights=FILE"):
        build_model("resnet18", 5, pretrained=True)
    assert not list((tmp_path/"hub"/"checkpoints").glob("*"))

def test_pretrained_is_for_known_names(hub):
    with pytest.raises(ValueError, match="unknown model"): build_model("resnet19", 5, pretrained=True)


def test_a_network_without_a_linear_layer_has_a_body_only():
    model = build_model("squeezenet1_1", 5)
    assert list(model.stages) == ["body"] and model.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match="unknown stage of squeezenet1_1 'head'"): model.freeze_below("head")


def test_a_file_with_torchvision_s_old_densenet_names_loads_as_weights(tmp_path):
    source = build_model("densenet121", 5)
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in source.net.state_dict().items()}
    assert any(".norm.1." in k for k in old)
    torch.save(old, tmp_path/"densenet.pth")
    loaded = build_model("densenet121", 5, weights=tmp_path/"densenet.pth").net.state_dict()
    assert all(v.equal(loaded[k]) for k, v in source.net.state_dict().items())


def test_evaluation_mode_is_lent_and_every_module_gets_its_own_back():
    model = build_model("resnet18", 4).train().freeze_below("layer3")
    before = {n: m.training for n, m in model.named_modules()}
    assert len(set(before.values())) == 2
    with pytest.raises(KeyError), evaluating(model, other := build_model("resnet18", 4).train()):
        assert not any(m.training for m in (*model.modules(), *other.modules()))
        raise KeyError
    assert {n: m.training for n, m in model.named_modules()} == before and all(m.training for m in other.modules())

@pytest.mark.parametrize("name", ["efficientnet_v2_l", "googlenet", "inception_v3"])
def test_weights_for_another_normalisation_are_refused(name):
    with pytest.raises(ValueError, match=f"the weights of {name} expect pixels that are normalised in another way"): build_model(name, 5, pretrained=True)

def test_weights_are_known_by_their_content_and_not_by_their_name(tmp_path):
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed); save_model(build_model(SMALL, 5), tmp_path/"model.safetensors")
        starts.append(build_model(SMALL, 5, weights=tmp_path/"model.safetensors").config["start"])
    assert starts[0] == starts[1] != starts[2] and starts[0].startswith("model.safetensors ")
    with pytest.raises(ValueError, match="weights, pretrained"): build_model(SMALL, 5, pretrained=True, weights=tmp_path/"model.safetensors")

def test_a_module_of_ones_own_has_no_description_to_save(tmp_path):
    with pytest.raises(ValueError, match="a Linear has no description"): save_model(nn.Linear(2, 2), tmp_path/"m.safetensors")

@pytest.mark.parametrize("x", [torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 1, 32, 32), torch.zeros(3, 32, 32)],
                         ids=["bytes", "one channel", "one image"])
def test_what_is_no_batch_of_images_is_refused(small, x):
    with pytest.raises(ValueError, match=r"x: expected images \(B,3,H,W\) in \[0,1\], got"): small(x)

def test_a_head_that_also_gave_boxes_is_not_taken_for_one_of_more_classes(tmp_path):
    save_model(build_model("shufflenet_v2_x0_5", 4, boxes=True), tmp_path/"m.safetensors")
    save_model(build_model("shufflenet_v2_x0_5", 8), tmp_path/"n.safetensors")
    head = lambda file, **kwargs: build_model("shufflenet_v2_x0_5", weights=tmp_path/file, **kwargs).net.fc.weight
    kept = lambda file: load_model(tmp_path/file).net.fc.weight
    assert not head("m.safetensors", num_classes=8).equal(kept("m.safetensors")) and head("n.safetensors", num_classes=8).equal(kept("n.safetensors"))
