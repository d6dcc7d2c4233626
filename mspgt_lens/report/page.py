"""One self-contained HTML file in the look of all reports: no network is needed to read it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5c5c60; --paper: #fff; --line: #ddd;
  --yes: #00664b; --no: #a84300; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececee; --soft: #a0a0a6; --paper: #121214; --line: #333338;
    --yes: #3fc79a; --no: #ff9d5c; }
}
body { margin: 0 auto; max-width: 1180px; padding: 24px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 4px; }
p { max-width: 78ch; } .soft { color: var(--soft); }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } td { overflow-wrap: anywhere; }
.words td, .words th { text-align: left; vertical-align: top; }
td.supported { color: var(--yes); } td.refuted { color: var(--no); }
td.supported, td.refuted, td.inconclusive { font-weight: 600; white-space: nowrap; }
td.inconclusive { font-weight: 400; }
.wide { overflow-x: auto; } .note { border-left: 4px solid #d55e00; padding: 2px 12px; }
figure { margin: 0; } summary { cursor: pointer; }
@page { size: A3; margin: 14mm; }
@media print {
  :root { --ink: #1d1d1f; --soft: #5c5c60; --paper: #fff; --line: #ddd;
    --yes: #00664b; --no: #a84300; }
  body { max-width: none; padding: 0; }
  section, tr { break-inside: avoid; } h2 { break-after: avoid; } .modebar { display: none; }
}
"""
# Ink follows the reader's light or dark setting, and so do the figures.
_SCRIPT = """
const dark = window.matchMedia('(prefers-color-scheme: dark)');
const print = window.matchMedia('print');
function ink() {
  const color = dark.matches && !print.matches ? '#b4b4ba' : '#4a4a4e';
  for (const plot of document.querySelectorAll('.plotly-graph-div')) {
    const update = {'font.color': color};
    (plot.layout.annotations || []).forEach(
      (_, i) => { update['annotations[' + i + '].font.color'] = color; });
    Plotly.relayout(plot, update);
  }
}
dark.addEventListener('change', ink); print.addEventListener('change', ink); ink();
"""


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    title_line: str,
    subtitle: str,
    notes: Sequence[str],
    body: str,
) -> Path:
    """One self-contained HTML file in the look of all reports.

    Args:
        path: Where to write.
        title: Of the browser's window, plain text.
        title_line: Plain text.
        subtitle: Plain text.
        notes: What a reader has to know first, plain text each.
        body: The rest, HTML; see :func:`section` and :func:`table`.

    Returns:
        The path that was written.
    """
    html = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<h1 dir="auto">{escape(title_line)}</h1>
<p class="soft">{escape(subtitle)}</p>
{"".join(f"<p class='note' dir='auto'>{escape(note)}</p>" for note in notes)}
{body}
<script>{_SCRIPT}</script>
</body>
</html>
"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def heading(title: str, text: str) -> str:
    """A heading and a paragraph of plain text, as HTML."""
    paragraph = f"<p dir='auto'>{escape(text)}</p>" if text else ""
    return f"<h2 dir='auto'>{escape(title)}</h2>{paragraph}"


def table(rows: Sequence[Sequence[str]], *, marked: int | None = None) -> str:
    """Rows of plain text as an HTML table; the first is the header.

    Args:
        rows: The rows.
        marked: A column whose words decide its color: supported, refuted, inconclusive.
    """
    head, *body = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)

    def shown(column: int, cell: str) -> str:
        kind = f" class='{escape(cell)}'" if column == marked else ""
        return f"<td dir='auto'{kind}>{escape(cell)}</td>"

    lines = "".join(
        "<tr>" + "".join(shown(i, cell) for i, cell in enumerate(row)) + "</tr>" for row in body
    )
    numbers = "" if marked is None else " class='words'"
    return (
        f"<div class='wide'><table{numbers}><thead><tr>{cells}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def section(title: str, text: str, figure: go.Figure) -> str:
    """A heading, a paragraph of plain text and a figure, as HTML."""
    body = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False}
    )
    return f"<section>{heading(title, text)}<figure>{body}</figure></section>"
