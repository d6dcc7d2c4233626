"""A report in a real browser: what is drawn, what answers to the mouse, what it asks for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest

# Hovers over every figure until something is said, and writes what happened where it can be read.
_SCRIPT = """
<script>
window.addEventListener('load', () => setTimeout(() => {
  const found = {plots: 0, drawn: 0, hovered: 0, said: []};
  for (const plot of document.querySelectorAll('.plotly-graph-div')) {
    found.plots += 1;
    const marks = '.trace, .hm, .points path, .bars path';
    if (plot.querySelector(marks.split(', ').map(m => '.main-svg ' + m).join(', '))) {
      found.drawn += 1;
    }
    for (const trace of plot._fullData) {
      if (trace.hoverinfo === 'skip' || trace.visible !== true) continue;
      const point = [{curveNumber: trace.index, pointNumber: 0}];
      const at = trace.type === 'heatmap' ? {xval: 1, yval: 1} : point;
      Plotly.Fx.hover(plot, at, [trace.xaxis + trace.yaxis]);
      const said = plot.querySelector('.hoverlayer .hovertext');
      if (said) { found.hovered += 1; found.said.push(said.textContent); break; }
    }
  }
  found.requests = performance.getEntriesByType('resource').map(entry => entry.name);
  document.body.dataset.found = JSON.stringify(found);
}, 500));
</script>
"""


@dataclass(frozen=True)
class Page:
    """What a browser made of a page."""

    html: str
    console: list[str]
    plots: int
    drawn: int
    hovered: int
    said: list[str]
    requests: list[str]


def open_page(path: Path, folder: Path, *, dark: bool = False) -> Page:
    """Open a report in headless Chromium; skips, visibly, where there is none."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    probed = folder / "probed.html"
    before, after = path.read_text("utf-8").rsplit("</body>", 1)
    probed.write_text(f"{before}{_SCRIPT}</body>{after}", "utf-8")
    ran = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'browser'}",
            "--virtual-time-budget=30000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--dump-dom",
            probed.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    told = re.search(r'data-found="([^"]*)"', ran.stdout)
    assert told, "the page's own script did not run to its end"
    return Page(
        html=ran.stdout,
        console=[line for line in ran.stderr.splitlines() if "CONSOLE" in line],
        **json.loads(unescape(told[1])),
    )
