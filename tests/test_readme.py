"What the front page promises, run as it stands there."
import re
from pathlib import Path

import matplotlib
import pytest

root = Path(__file__).resolve().parent.parent
text = (root / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run_on_a_folder_of_images(tmp_path, monkeypatch):
    matplotlib.use("Agg")
    from test_command_line import photos
    code, = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    photos(tmp_path / "photos", per_class=42)
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(code.replace("epochs=20", "epochs=1"), space)
    assert len(space["valid"]) == 16 and len(space["train"]) == 68


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", text))))
def test_links_and_pictures_exist(path):
    assert (root / path).exists()


def test_the_table_is_the_records(monkeypatch):
    from robustcv.core import load_records
    from robustcv.tables import caption, markdown, table
    records = load_records(root / "results/baseline-lite.jsonl")
    assert markdown(table(records)) in text and caption(records) in text
