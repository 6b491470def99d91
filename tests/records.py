"""Records of runs that never happened, for tests of what is made of records."""
import base64

import numpy as np
import torch

N = 200

def hits(share, seed=0, n=N): return np.random.default_rng(seed).random(n) < share

def row(right, perturbation="clean", strength=None):
    packed = base64.b64encode(np.packbits(right).tobytes()).decode()
    return dict(perturbation=perturbation, strength=strength, unit="", correct=int(right.sum()), n=len(right), seconds=0., hits=packed)

def pack_filters(w): return dict(shape=list(w.shape), float16=base64.b64encode(w.numpy().astype("<f2").tobytes()).decode())

def made(name, right, seed=0, section="s", training=80., scale="lite", **more):
    "A record of this run: which clean images it has right, and under which other perturbations."
    rows = [row(right), *[row(r, *p) for p, r in more.get("under", {}).items()]]
    kernels, boxes = pack_filters(more.get("filters", torch.randn(8, 3, 7, 7))), {"boxes": more["boxes"]} if "boxes" in more else {}
    metrics = dict(evaluation=rows, train_accuracy=training, filters=kernels, **boxes)
    config = dict(run=dict(section=section, name=name, model=f"that of {section} / {name}")) # what tells its network apart
    return dict(id=f"{section}{name}{seed}", section=section, name=name, seed=seed, scale=scale, config=config, metrics=metrics,
                data=dict(name="simulated", fingerprint="f", valid=len(right), train=1000, synthetic=True))
