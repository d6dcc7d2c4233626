"""Draw the README's figure from a saved profile of the demo model.

    mspgt-lens profile demo --save output/demo
    python docs/make_figures.py output/demo

Needs Chromium on the path, which turns the figure into a picture.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mspgt_lens as ml

WIDTH, ROWS = 1200, 3
INK = {"light": ("#ffffff", "#4a4a4e"), "dark": ("#0d1117", "#b4b4ba")}


def main(saved: str) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no Chromium on the path: apt-get install chromium")
    figure = ml.plot_profile(ml.LayerProfile.load(saved))
    height = figure.layout.height
    # The README shows the information curves; the signals are below the cut.
    shown = 105 + round((height - 130) * ROWS / 5) + 6
    for name, (paper, ink) in INK.items():
        figure.update_layout(paper_bgcolor=paper, plot_bgcolor=paper, font_color=ink, width=WIDTH)
        figure.update_annotations(font_color=ink)
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "figure.html"
            body = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
            page.write_text(body.replace("<body>", f"<body style='margin:0;background:{paper}'>"))
            target = Path(__file__).parent / f"profile-{name}.png"
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
    main(*sys.argv[1:])
