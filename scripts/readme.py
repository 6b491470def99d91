"Write README.md from nbs/index.ipynb: its prose, code and outputs, without cells marked `#| hide` and code marked `#| echo: false`."
import re
from pathlib import Path

from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor

root = Path(__file__).resolve().parent.parent


class Directives(Preprocessor):
    "Obey nbdev's directives; keep a cell's Markdown output where it has one."

    def preprocess(self, nb, resources):
        nb.metadata["language_info"] = {"name": "python"}
        nb.cells = [c for c in nb.cells if not re.match(r"#\| *hide\b", c.source)]
        for c in nb.cells:
            if c.cell_type != "code":
                continue
            if re.match(r"#\| *echo: *false", c.source):
                c.metadata["transient"] = {"remove_source": True}
            c.source = re.sub(r"^#\|.*\n", "", c.source, flags=re.M)
        return nb, resources


def readme() -> str:
    "The text of README.md."
    exporter = MarkdownExporter(preprocessors=[Directives])
    text, _ = exporter.from_filename(str(root / "nbs" / "index.ipynb"))
    text = re.sub(r"\]\(\.\./", "](", text)  # ../figures/a.png -> figures/a.png
    text = re.sub(r"\]\((\w+\.ipynb)\)", r"](nbs/\1)", text)
    note = "<!-- Generated from nbs/index.ipynb by scripts/readme.py; edit the notebook. -->\n"
    return note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    (root / "README.md").write_text(readme(), encoding="utf-8")
