"""One self-contained HTML file in the look of all reports: no network is needed to read it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mspgt_lens.storage import written_whole

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
p, ul { max-width: 78ch; } .soft { color: var(--soft); }
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


_PARTS = """
{%- macro heading(title, text) -%}
<h2 dir="auto">{{ title }}</h2>{% if text %}<p dir="auto">{{ text }}</p>{% endif %}
{%- endmacro -%}
{%- macro paragraphs(lines) -%}
{% for line in lines %}<p dir="auto">{{ line }}</p>{% endfor %}
{%- endmacro -%}
{%- macro items(lines) -%}
<ul>{% for name, text in lines -%}
<li dir="auto">{% if name %}<b>{{ name }}</b>: {% endif %}{{ text }}</li>{% endfor %}</ul>
{%- endmacro -%}
{%- macro table(rows, marked) -%}
<div class="wide"><table{% if marked is not none %} class="words"{% endif %}><thead><tr>
{%- for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{%- for row in rows[1:] %}<tr>{% for cell in row -%}
<td dir="auto"{% if loop.index0 == marked %} class="{{ cell }}"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>{% endfor %}</tbody></table></div>
{%- endmacro -%}
{%- macro section(title, text, figure) -%}
<section>{{ heading(title, text) }}<figure>{{ figure }}</figure></section>
{%- endmacro -%}
{%- macro folded(label, body) -%}
<details><summary>{{ label }}</summary>{{ body }}</details>
{%- endmacro -%}
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
<script>{{ plotly }}</script>
</head>
<body>
<h1 dir="auto">{{ title_line }}</h1>
<p class="soft">{{ subtitle }}</p>
{% for note in notes %}<p class="note" dir="auto">{{ note }}</p>{% endfor %}
{{ body }}
<script>{{ script }}</script>
</body>
</html>
"""
# Whatever is no Markup is text: names of models, tokens and files are escaped where they are put.
_TEMPLATES = Environment(autoescape=True)
_MACROS: Any = _TEMPLATES.from_string(_PARTS).module


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    title_line: str,
    subtitle: str,
    notes: Sequence[str],
    body: Markup,
) -> Path:
    """One self-contained HTML file in the look of all reports.

    Args:
        path: Where to write.
        title: Of the browser's window, plain text.
        title_line: Plain text.
        subtitle: Plain text.
        notes: What a reader has to know first, plain text each.
        body: The rest; see :func:`section` and :func:`table`.

    Returns:
        The path that was written.

    Raises:
        OSError: If it cannot be written; what was there before is as it was.
    """
    html = _TEMPLATES.from_string(_PAGE).render(
        title=title,
        title_line=title_line,
        subtitle=subtitle,
        notes=notes,
        body=body,
        style=Markup(_STYLE),
        plotly=Markup(get_plotlyjs()),
        script=Markup(_SCRIPT),
    )
    path = Path(path)
    with written_whole(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def heading(title: str, text: str = "") -> Markup:
    """A heading and a paragraph of plain text."""
    return Markup(_MACROS.heading(title, text))


def paragraphs(lines: Sequence[str]) -> Markup:
    """Paragraphs of plain text."""
    return Markup(_MACROS.paragraphs(lines))


def items(lines: Sequence[tuple[str, str]]) -> Markup:
    """A list of plain texts, each after its name, which may be empty."""
    return Markup(_MACROS.items(lines))


def table(rows: Sequence[Sequence[str]], *, marked: int | None = None) -> Markup:
    """Rows of plain text as a table; the first is the header.

    Args:
        rows: The rows.
        marked: A column whose words decide its color: supported, refuted, inconclusive.
    """
    return Markup(_MACROS.table(rows, marked))


def section(title: str, text: str, figure: go.Figure) -> Markup:
    """A heading, a paragraph of plain text and a figure."""
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False}
    )
    return Markup(_MACROS.section(title, text, Markup(drawn)))


def folded(label: str, body: Markup) -> Markup:
    """What a click unfolds."""
    return Markup(_MACROS.folded(label, body))
