"""Tutorials as people write them, and the notebooks that are made of them.

A tutorial is a text file, ``tutorials/01_*.py``: cells between ``# %%`` lines. Its notebook has a
badge and the setup cell besides, and what its cells show, figures as pictures.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import jupytext
import plotly.io

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = ROOT / "tutorials"
TEXTS = sorted(TUTORIALS.glob("[0-9]*.py"))
SETUP = (TUTORIALS / "setup_cell.py").read_text("utf-8").rstrip("\n")
_ON_GITHUB = "mspgt-lens/mspgt_lens/blob/main/tutorials"
_FIGURE = "application/vnd.plotly.v1+json"
_WIDTH = 1200
_PLACE = re.compile(r"^/\S+/(?=[\w.]+:\d+: )", re.MULTILINE)
_SOLUTION = re.compile(
    r"^<details><summary>Solution</summary>\n\n```python\n(.*?)^```$.*?^</details>$",
    re.MULTILINE | re.DOTALL,
)


def notebook_of(path: Path) -> Any:
    """The notebook of a text file, without what its cells show."""
    notebook = jupytext.read(path)
    url = f"https://colab.research.google.com/github/{_ON_GITHUB}/{path.stem}.ipynb"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"
    title = notebook.cells[0]
    title.source = f"{badge}\n\n{title.source}"
    setup = type(title)(cell_type="code", metadata={}, source=SETUP)
    notebook.cells.insert(1, setup)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"c{number:02}"
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, []
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "colab": {"provenance": []},
    }
    return notebook


def solutions(notebook: Any) -> list[str]:
    """The code of its exercises' folded solutions."""
    texts = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return [code for text in texts for code in _SOLUTION.findall(text)]


def shown(notebook: Any) -> list[tuple[str, ...]]:
    """What each code cell shows, by kind: text, a table, a figure; warnings are left out."""
    return [
        tuple(_kind(output) for output in cell.outputs if output.get("name") != "stderr")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def write(notebook: Any, path: Path) -> None:
    """Write an executed notebook, its figures as pictures on white."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        # Where widgets are not installed, tqdm says so once.
        cell.outputs = [o for o in cell.outputs if "TqdmWarning" not in o.get("text", "")]
        for output in cell.outputs:
            if output.get("name") == "stderr":
                # Where a warning comes from on this machine is of no use to others.
                output.text = _PLACE.sub("", output.text)
            if _FIGURE in output.get("data", {}):
                picture = _picture(output["data"][_FIGURE])
                output["data"] = {"image/png": picture, "text/plain": "<plotly figure>"}
    notebook.metadata["language_info"] = {"name": "python"}
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    path.write_text(f"{text}\n", "utf-8")


def _kind(output: Any) -> str:
    data = output.get("data", {})
    if _FIGURE in data or "image/png" in data:
        return "figure"
    if "text/html" in data:
        return "table"
    return str(output.get("name", "text"))


def _picture(figure: Any) -> str:
    """A figure as base64 of a PNG."""
    sys.path.append(str(ROOT / "docs"))
    from make_figures import screenshot

    drawn = plotly.io.from_json(json.dumps(figure), skip_invalid=True)
    drawn.update_layout(width=_WIDTH)
    height = int(drawn.layout.height or 450)
    return base64.b64encode(screenshot(drawn, "light", _WIDTH, height)).decode()
