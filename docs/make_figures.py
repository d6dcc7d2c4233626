"""Draw the pictures in README and docs.

    mspgt-lens profile demo --save output/demo
    python docs/make_figures.py profile output/demo
    python docs/make_figures.py kinds
    python docs/make_figures.py curves
    python docs/make_figures.py boundaries

Needs Chromium on the path, which turns a figure into a picture. ``curves`` runs the code of
docs/curves.md and writes what it prints into that page; ``boundaries`` draws the tables of
docs/boundaries.md.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

import mspgt_lens as ml
from mspgt_lens.plots.look import NEUTRAL, SCALE_COLORS, style_figure, transparent

DOCS = Path(__file__).parent
WIDTH, ROWS = 1200, 3
INK = {"light": ("#ffffff", "#4a4a4e"), "dark": ("#0d1117", "#b4b4ba")}


def draw_profile(saved: str) -> None:
    figure = ml.plot_profile(ml.results.LayerProfile.load(saved))
    height = figure.layout.height
    all_rows = len({axis.domain for axis in figure.select_yaxes()})
    # The README shows the first rows; what scales add and the signals are below the cut.
    picture(figure, "profile", 105 + round((height - 130) * ROWS / all_rows) + 6)


def draw_kinds() -> None:
    """Which block a jump and a bend belong to, in curves over blocks and over sites."""
    n_layers, jump, bend = 8, 3, 4
    panels = [
        ("A jump at block 3, rows are blocks", "block", jump, "jump"),
        ("A bend at block 4, rows are blocks", "block", bend, "bend"),
        ("The same jump, rows are sites", "site", jump, "jump"),
        ("The same bend, rows are sites", "site", bend, "bend"),
    ]
    figure = make_subplots(
        rows=1,
        cols=len(panels),
        subplot_titles=[title for title, *_ in panels],
        horizontal_spacing=0.035,
    )
    for col, (_, axis, block, kind) in enumerate(panels, start=1):
        # Site l is before block l, so the first new value stands a place further.
        first_new = block + (axis == "site")
        x = np.arange(n_layers + (axis == "site"))
        y = (x >= first_new) * 2.0 if kind == "jump" else np.clip(x - first_new + 1, 0, None)
        start = block if axis == "site" else block - 0.5
        figure.add_annotation(
            text=f"block {block}",
            x=start + 0.5,
            y=1,
            yref="y domain",
            yanchor="top",
            showarrow=False,
            row=1,
            col=col,
        )
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines+markers",
                line={"color": NEUTRAL, "width": 2},
                marker={
                    "size": 9,
                    "color": [
                        SCALE_COLORS["intermediate" if x_ >= first_new else "local"] for x_ in x
                    ],
                    "symbol": ["square" if x_ >= first_new else "circle" for x_ in x],
                },
                showlegend=False,
            ),
            row=1,
            col=col,
        )
        figure.add_vrect(
            x0=start,
            x1=start + 1,
            fillcolor=transparent(SCALE_COLORS["intermediate"], 0.25),
            line_width=0,
            layer="below",
            row=1,
            col=col,
        )
        figure.update_xaxes(title_text=axis, dtick=1, showgrid=False, row=1, col=col)
        figure.update_yaxes(
            showticklabels=False,
            showgrid=False,
            range=[-0.6, y.max() * 1.35],
            title_text="value" if col == 1 else "",
            row=1,
            col=col,
        )
    style_figure(
        figure,
        "A boundary bears the index of the block that makes the change",
        "squares: the first values that follow the new level or rate, and all after them; "
        "site l is the residual stream before block l",
        height=330,
    )
    picture(figure, "kinds", 330)


def draw_curves() -> None:
    """Run the how-to's code; its picture, and what it prints."""
    page = DOCS / "curves.md"
    text = page.read_text("utf-8")
    said = io.StringIO()
    scope: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(said),
    ):
        for block in python_blocks(text):
            exec(block, scope)
    figure = scope["figure"]
    picture(figure, "curves", figure.layout.height)
    marks = r"(<!-- output -->\n```text\n).*?(```\n<!-- end of output -->)"
    page.write_text(
        re.sub(marks, lambda m: f"{m[1]}{said.getvalue()}{m[2]}", text, flags=re.DOTALL), "utf-8"
    )


def python_blocks(text: str) -> list[str]:
    """The Python code of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def draw_boundaries() -> None:
    """The calibration's tables as colors with their numbers."""
    nulls, planted = (calibration(first) for first in ("null", "planted"))
    found, right = (planted.map(lambda cell, i=i: float(cell.split(", ")[i])) for i in (0, 1))
    panels = [
        ("Nothing planted: any change found", nulls.astype(float), 0.2, "blocks x signals"),
        ("Planted: any change found", found, 1.0, "size / noise deviation"),
        ("Planted: exactly these, within one block", right, 1.0, "size / noise deviation"),
    ]
    rows = max(len(nulls), len(planted))
    figure = make_subplots(
        rows=1,
        cols=3,
        subplot_titles=[title for title, *_ in panels],
        column_widths=[0.28, 0.36, 0.36],
        horizontal_spacing=0.015,
    )
    for col, (_, shares, most, axis) in enumerate(panels, start=1):
        wrong = col == 1
        figure.add_trace(
            go.Heatmap(
                x=[str(name) for name in shares.columns],
                y=list(shares.index),
                z=shares.to_numpy(),
                zmin=0,
                zmax=most,
                colorscale=[[0, "#c9c9c9"], [1, "#c65a11" if wrong else "#1f66a8"]],
                text=[[f"{100 * share:.0f}" for share in row] for row in shares.to_numpy()],
                texttemplate="%{text}",
                showscale=False,
                xgap=1,
                ygap=1,
            ),
            row=1,
            col=col,
        )
        figure.update_xaxes(type="category", title_text=axis, showgrid=False, row=1, col=col)
        figure.update_yaxes(
            autorange="reversed", showgrid=False, showticklabels=col != 3, row=1, col=col
        )
    # The names of planted cases stand between the first two panels.
    figure.update_xaxes(domain=[0.0, 0.24], row=1, col=1)
    figure.update_xaxes(domain=[0.45, 0.72], row=1, col=2)
    figure.update_xaxes(domain=[0.73, 1.0], row=1, col=3)
    for title, middle in zip(figure.layout.annotations, (0.12, 0.585, 0.865), strict=True):
        title.x = middle
    height = 26 * rows + 175
    style_figure(
        figure,
        "How often the boundary test is wrong, and right",
        "percent of draws with p < 0.05, and with exactly the planted boundaries; the tables of "
        "docs/boundaries.md",
        height,
    )
    figure.update_layout(margin={"l": 190})
    picture(figure, "boundaries", height)


def calibration(first: str) -> pd.DataFrame:
    """A table of docs/boundaries.md, by the name of its first column."""
    lines = (DOCS / "boundaries.md").read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    header, _, *cells = rows
    return pd.DataFrame(cells, columns=header).set_index(first)


def picture(figure: go.Figure, name: str, shown: int) -> None:
    """One PNG for light pages and one for dark ones, cut off below ``shown`` pixels."""
    figure.update_layout(width=WIDTH)
    for mode in INK:
        target = DOCS / f"{name}-{mode}.png"
        target.write_bytes(screenshot(figure, mode, WIDTH, shown))
        print(target)


def screenshot(figure: go.Figure, mode: str, width: int, height: int) -> bytes:
    """A figure as a PNG, on the paper and with the ink of light or dark pages."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no Chromium on the path: apt-get install chromium")
    paper, ink = INK[mode]
    figure.update_layout(paper_bgcolor=paper, plot_bgcolor=paper, font_color=ink)
    figure.update_annotations(font_color=ink)
    with tempfile.TemporaryDirectory() as folder:
        page, target = Path(folder) / "figure.html", Path(folder) / "figure.png"
        body = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
        page.write_text(body.replace("<body>", f"<body style='margin:0;background:{paper}'>"))
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={folder}/browser",
                "--virtual-time-budget=20000",
                f"--window-size={width},{height}",
                f"--screenshot={target}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
        )
        return target.read_bytes()


if __name__ == "__main__":
    wanted, *arguments = sys.argv[1:]
    {
        "profile": draw_profile,
        "kinds": draw_kinds,
        "curves": draw_curves,
        "boundaries": draw_boundaries,
    }[wanted](*arguments)
