"Run notebooks in place and keep their outputs; cells marked `#| eval: false`, and without --gpu `#| gpu`, are left as they are."
import argparse
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient


class Client(NotebookClient):
    gpu = False

    async def async_execute_cell(self, cell, *args, **kwargs):
        skip = re.match(r"(#\|.*\n)*#\| *(eval: *false" + ("" if self.gpu else "|gpu") + r")\b", cell.source)
        return cell if skip else await super().async_execute_cell(cell, *args, **kwargs)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("notebooks", nargs="+", type=Path)
parser.add_argument("--gpu", action="store_true")
args = parser.parse_args()
for path in args.notebooks:
    nb = nbformat.read(path, as_version=4)
    client = Client(nb, timeout=None, coalesce_streams=True, extra_arguments=["--log-level=ERROR"], kernel_name="python3", store_widget_state=False,
                    resources={"metadata": {"path": str(path.parent)}})
    client.gpu = args.gpu
    client.execute()
    for cell in nb.cells:  # a progress bar is no output to keep
        if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
    nbformat.write(nb, path)
    print(f"{path}: {path.stat().st_size/1e3:,.0f} kB")
