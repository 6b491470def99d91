"""The package keeps to its layers, documents what it exports, and is what its settings say."""
import ast
import configparser
import importlib
import inspect
import sys
from pathlib import Path

import pytest

import robustcv

HERE = Path(robustcv.__file__).parent
LAYERS = [["core"], ["cache", "download", "drawing", "processes"], ["data"], ["synthetic", "transforms", "models"], ["affine", "checkpoints"],
          ["color_jitter", "random_erase", "fgsm", "stability", "symmetry", "multi_task", "ensemble", "recipe"], ["adversarial_training"],
          ["perturbations", "training"], ["evaluation", "grids", "features"], ["single_run", "tables", "scaling"],
          ["experiments"], ["comparisons"], ["claims", "scoreboard", "benchmarks"], ["figures"], ["model_figures"], ["__main__"]]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SECTIONS = {*LAYERS[5], *LAYERS[6]}
MODULES = sorted(f.stem for f in HERE.glob("*.py") if f.stem not in ("__init__", "_modidx"))
PACKAGES = {"torch", "torchvision", "numpy", "pandas", "scipy", "matplotlib", "seaborn", "tqdm", "accelerate", "safetensors",
            "typer", "PIL", "filelock"}
OPTIONAL = {"nbclient", "nbconvert", "nbformat", "timm", "kornia", "albumentations", "cv2", "torchattacks", "foolbox", "art"} # used where they are installed

def imports(name):
    "Modules of this package, and top-level packages, that a module imports anywhere."
    own, other = set(), set()
    for node in ast.walk(ast.parse((HERE/f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            own |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom): other.add(node.module)
        elif isinstance(node, ast.Import): other |= {a.name for a in node.names}
    own |= {m.split(".")[1] if "." in m else "__init__" for m in other if m.split(".")[0] == "robustcv"}
    return own, {m.split(".")[0] for m in other} - {"robustcv"}

@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name):
    assert name in LEVEL, f"give {name} a place in LAYERS"
    upward = {m for m in imports(name)[0] - {"__init__"} if not LEVEL[m] < LEVEL[name]}
    sideways = imports(name)[0] & SECTIONS - {"fgsm"} if name in SECTIONS else set()
    assert not upward | sideways, f"{name} imports {upward | sideways}"

@pytest.mark.parametrize("name", [*MODULES, "__init__"])
def test_only_required_packages_are_imported(name): # no nbdev, fastcore or execnb among them
    assert not imports(name)[1] - PACKAGES - OPTIONAL - sys.stdlib_module_names

def test_the_index_imports_nothing(): assert imports("_modidx") == (set(), set())

@pytest.mark.parametrize("name", MODULES)
def test_what_is_exported_exists_and_is_documented(name):
    module = importlib.import_module(f"robustcv.{name}")
    assert module.__doc__ and all(hasattr(module, n) for n in module.__all__)
    own = {n: o for n in module.__all__ if inspect.isfunction(o := getattr(module, n)) or inspect.isclass(o)}
    # a dataclass without a docstring of its own gets its signature for one
    bare = [n for n, o in own.items() if not o.__doc__ or not o.__doc__.strip() or o.__doc__.startswith(f"{n}(")]
    assert not bare, f"without a docstring: {bare}"

@pytest.mark.parametrize("name", MODULES)
def test_public_functions_are_exported(name):
    body = ast.parse((HERE/f"{name}.py").read_text()).body
    public = {n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"}
    assert public <= set(importlib.import_module(f"robustcv.{name}").__all__)

def test_the_version_is_the_settings():
    settings = configparser.ConfigParser(); settings.read(HERE.parent/"settings.ini")
    assert robustcv.__version__ == settings["DEFAULT"]["version"]

def test_no_module_is_longer_than_420_lines():
    lengths = {f.name: len(f.read_text().splitlines()) for f in HERE.glob("*.py") if f.name != "_modidx.py"}
    assert not {n: k for n, k in lengths.items() if k > 420}
