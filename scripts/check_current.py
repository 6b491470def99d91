"Check, in a copy, that the notebooks are clean and that robustcv/ and README.md are what they generate; the tree is not touched."
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from readme import readme, root

wrong = []
with tempfile.TemporaryDirectory() as tmp:
    for name in ("nbs", "robustcv"):
        shutil.copytree(root / name, Path(tmp) / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "setup.py"):
        shutil.copy(root / name, tmp)
    bin = Path(sys.executable).parent
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([bin / command], cwd=tmp, check=True)
    for pattern, remedy in (("nbs/*.ipynb", "make export"), ("robustcv/*.py", "make export")):
        files = {p.relative_to(base) for base in (root, Path(tmp)) for p in base.glob(pattern)}
        for f in sorted(files):
            here, there = root / f, Path(tmp) / f
            if not (here.exists() and there.exists() and filecmp.cmp(here, there, shallow=False)):
                wrong.append(f"{f} is not current: run `{remedy}`")
if readme() != (root / "README.md").read_text(encoding="utf-8"):
    wrong.append("README.md is not current: run `make readme`")
print("\n".join(wrong) or "exports, notebooks and README are current")
sys.exit(bool(wrong))
