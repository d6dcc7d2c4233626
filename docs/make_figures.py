"""Draw the pictures in README and docs.

    mspgt-lens profile demo --save output/demo
    python docs/make_figures.py profile output/demo

    python benchmarks/boundaries.py --calibration > docs/boundaries.csv
    python docs/make_figures.py boundaries docs/boundaries.csv

Needs Chromium on the path, which turns a figure into a picture. The second also rewrites the table
in docs/boundaries.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

import mspgt_lens as ml
from mspgt_lens.plots.look import NEUTRAL, OTHER_COLORS, SCALE_COLORS, style_figure

WIDTH, ROWS = 1200, 3
INK = {"light": ("#ffffff", "#4a4a4e"), "dark": ("#0d1117", "#b4b4ba")}


def draw_profile(saved: str) -> None:
    figure = ml.plot_profile(ml.results.LayerProfile.load(saved))
    height = figure.layout.height
    all_rows = len({axis.domain for axis in figure.select_yaxes()})
    # The README shows the first rows; what scales add and the signals are below the cut.
    picture(figure, "profile", 105 + round((height - 130) * ROWS / all_rows) + 6)


def draw_boundaries(path: str) -> None:
    table = pd.read_csv(path)
    table = table[table["signals"] > 1]
    nulls, planted = table[table["planted"] == 0], table[table["planted"] == 2]
    plain = planted[(planted["drift"] == "flat") & (planted["autocorrelation"] == 0)]
    figure = make_subplots(
        rows=1,
        cols=4,
        subplot_titles=[
            "No boundary: found by error",
            "Planted: by depth",
            "Planted: by size of jumps",
            "Planted: by autocorrelation",
        ],
        horizontal_spacing=0.055,
    )
    colors = [*SCALE_COLORS.values(), *OTHER_COLORS]
    kinds = nulls["drift"].where(
        nulls["autocorrelation"] == 0, "AR(" + nulls["autocorrelation"].astype(str) + ")"
    )
    for color, kind in zip([*colors, *colors], kinds.unique(), strict=False):
        rows = nulls[(kinds == kind) & (nulls["correlation"] == 0)]
        look = color, "dot" if kind.startswith("AR") else "solid"
        name = kind.replace("_", " ")
        add(figure, rows["blocks"], rows["rejected"], rows["draws"], name, look, 1)
    figure.add_hline(y=0.05, line={"color": NEUTRAL, "dash": "dash", "width": 1}, row=1, col=1)
    eight = plain[(plain["signals"] == 8) & (plain["effect"] == 2)].sort_values("blocks")
    jumps = plain[(plain["signals"] == 8) & (plain["blocks"] == 30)].sort_values("effect")
    correlated = planted[
        (planted["drift"] == "flat") & (planted["blocks"] == 30) & (planted["signals"] == 8)
    ]
    correlated = correlated[correlated["effect"] == 2].sort_values("autocorrelation")
    for col, (rows, axis) in enumerate(
        ((eight, "blocks"), (jumps, "effect"), (correlated, "autocorrelation")), start=2
    ):
        for name, quantity, look in (
            ("p < 0.05", "rejected", (NEUTRAL, "solid")),
            ("both within one block", "located", (NEUTRAL, "dash")),
        ):
            add(figure, rows[axis], rows[quantity], rows["draws"], name, look, col, show=col == 2)
        figure.update_yaxes(range=[0, 1.03], tickformat=".0%", row=1, col=col)
    figure.update_yaxes(range=[0, 0.2], tickformat=".0%", title_text="share of draws", row=1, col=1)
    titles = ("blocks", "blocks", "jump / noise deviation", "lag-one autocorrelation")
    for col, title in enumerate(titles, start=1):
        figure.update_xaxes(title_text=title, row=1, col=col)
    style_figure(
        figure,
        "How often the boundary test is wrong, and right",
        "8 signals; planted: two jumps of twice the noise at 30 blocks unless said otherwise; "
        "bars: 95% binomial intervals",
        height=500,
    )
    legend = {"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.25, "yref": "paper"}
    figure.update_layout(legend=legend, margin={"b": 130})
    picture(figure, "boundaries", 500)
    write_table(table)


def add(
    figure: go.Figure,
    x: pd.Series,
    share: pd.Series,
    draws: pd.Series,
    name: str,
    look: tuple[str, str],
    col: int,
    show: bool = True,
) -> None:
    """A line of shares with Wilson's 95% intervals."""
    z = 1.96
    center = (share + z**2 / (2 * draws)) / (1 + z**2 / draws)
    half = z / (1 + z**2 / draws) * np.sqrt(share * (1 - share) / draws + z**2 / (4 * draws**2))
    bars = {"array": center + half - share, "arrayminus": share - center + half}
    figure.add_trace(
        go.Scatter(
            x=x,
            y=share,
            error_y={"type": "data", "symmetric": False, **bars, "thickness": 1, "width": 0},
            mode="lines+markers",
            line={"color": look[0], "dash": look[1], "width": 2},
            name=name,
            showlegend=show,
        ),
        row=1,
        col=col,
    )


def write_table(table: pd.DataFrame) -> None:
    """All rows, good and bad, between the two marks in docs/boundaries.md."""
    lines = ["| " + " | ".join(table.columns) + " |", "| " + "--- | " * len(table.columns)]
    text = table.astype(object).where(table.notna(), "")
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in text.to_numpy()]
    page = Path(__file__).parent / "boundaries.md"
    head, rest = page.read_text().split("<!-- table -->")[:2]
    tail = page.read_text().split("<!-- end of table -->")[1]
    assert rest
    page.write_text(
        f"{head}<!-- table -->\n\n" + "\n".join(lines) + f"\n\n<!-- end of table -->{tail}"
    )


def picture(figure: go.Figure, name: str, shown: int) -> None:
    """One PNG for light pages and one for dark ones, cut off below ``shown`` pixels."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no Chromium on the path: apt-get install chromium")
    for mode, (paper, ink) in INK.items():
        figure.update_layout(paper_bgcolor=paper, plot_bgcolor=paper, font_color=ink, width=WIDTH)
        figure.update_annotations(font_color=ink)
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "figure.html"
            body = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
            page.write_text(body.replace("<body>", f"<body style='margin:0;background:{paper}'>"))
            target = Path(__file__).parent / f"{name}-{mode}.png"
            subprocess.run(
                [
                    browser,
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--hide-scrollbars",
                    f"--user-data-dir={folder}/browser",
                    "--virtual-time-budget=20000",
                    f"--window-size={WIDTH},{shown}",
                    f"--screenshot={target}",
                    page.as_uri(),
                ],
                check=True,
                capture_output=True,
            )
            print(target)


if __name__ == "__main__":
    {"profile": draw_profile, "boundaries": draw_boundaries}[sys.argv[1]](sys.argv[2])
