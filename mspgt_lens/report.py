"""One self-contained HTML report of a profile, readable by somebody who did not run it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from mspgt_lens.plots.boundaries import plot_boundaries
from mspgt_lens.plots.plane import plot_information_plane, plot_scale_map
from mspgt_lens.plots.profile import plot_profile
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.results import Curve
from mspgt_lens.scales.partition import ScalePartition

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5c5c60; --paper: #fff; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececee; --soft: #a0a0a6; --paper: #121214; --line: #333338; }
}
body { margin: 0 auto; max-width: 1180px; padding: 24px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 4px; }
p { max-width: 78ch; } .soft { color: var(--soft); }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } td { overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .note { border-left: 4px solid #d55e00; padding: 2px 12px; }
figure { margin: 0; } summary { cursor: pointer; }
@media print { body { max-width: none; padding: 0; } figure { break-inside: avoid; } }
"""
# Ink follows the reader's light or dark setting, and so do the figures.
_SCRIPT = """
const dark = window.matchMedia('(prefers-color-scheme: dark)');
function ink() {
  const color = dark.matches && !window.matchMedia('print').matches ? '#b4b4ba' : '#4a4a4e';
  for (const plot of document.querySelectorAll('.plotly-graph-div')) {
    const update = {'font.color': color};
    (plot.layout.annotations || []).forEach(
      (_, i) => { update['annotations[' + i + '].font.color'] = color; });
    Plotly.relayout(plot, update);
  }
}
dark.addEventListener('change', ink); ink();
"""


def write_report(
    path: str | os.PathLike[str],
    profile: LayerProfile,
    partition: ScalePartition | None = None,
    *,
    scale_map: LayerProfile | None = None,
) -> Path:
    """Write a profile as one HTML file with its figures; no network is needed to read it.

    Args:
        path: Where to write.
        profile: The profile.
        partition: Its scale boundaries.
        scale_map: A profile of the same model with one band per offset, for the scale map.

    Returns:
        The path that was written.
    """
    sections = []
    if partition is not None:
        sections.append(
            section(
                "Scale boundaries",
                f"{partition.summary()} Jumps that all signals share are tested against gradual "
                "drift with depth: p says how often drift alone gives as much.",
                plot_boundaries(partition),
            )
        )
    sections += [
        section(
            "Curves over depth",
            "Site l is the residual stream before block l; the last site is after the last block. "
            "Compression is what a noisy channel needs to carry the stream. Retained is what a "
            "linear reader can still tell of the tokens already read, predicted what it can tell "
            "of the tokens to come, both on documents it was not fitted on.",
            plot_profile(profile, partition),
        ),
        section(
            "Information plane",
            "Each path follows one scale from the first site to the last. A step to the left "
            "forgets the past; a step up predicts more of what is to come.",
            plot_information_plane(profile),
        ),
    ]
    if scale_map is not None:
        sections.append(
            section(
                "Scale map",
                "At which depth each single token offset is read best. A row's label gives its "
                "largest value; rows that cannot be told from 0 at any site stay blank.",
                plot_scale_map(scale_map),
            )
        )
    shown = [profile] if scale_map is None else [profile, scale_map]
    said = dict.fromkeys(
        note for one in (*shown, partition) if one is not None for note in one.warnings
    )
    body = f"""
<h2>In short</h2>
<div class="wide">{_summary(profile)}</div>
<p class="soft">Values with 95% intervals from resampling groups. Retained and predicted
information is what linear-Gaussian readers can use, in nats per token; it may rise with depth and
is no bound on Shannon's.</p>
{"".join(sections)}
<h2>How it was made</h2>
<details><summary>Settings, versions and what each number means</summary>
<div class="wide">{_settings(shown)}</div>
{_meanings(profile)}
</details>"""
    return write_page(
        path,
        title=f"{profile.model_name}: layer profile",
        heading=f"{profile.model_name}: what each layer keeps and predicts",
        subtitle=f"{profile.n_layers} blocks; {profile.n_tokens:,} token positions from "
        f"{profile.n_groups:,} groups of text. Made with mspgt_lens "
        f"{profile.versions.get('mspgt-lens', '')}.",
        notes=list(said),
        body=body,
    )


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    heading: str,
    subtitle: str,
    notes: Sequence[str],
    body: str,
) -> Path:
    """One self-contained HTML file in the look of all reports.

    Args:
        path: Where to write.
        title: Of the browser's window, plain text.
        heading: Plain text.
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
<h1>{escape(heading)}</h1>
<p class="soft">{escape(subtitle)}</p>
{"".join(f"<p class='note'>{escape(note)}</p>" for note in notes)}
{body}
<script>{_SCRIPT}</script>
</body>
</html>
"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def summary_rows(profile: LayerProfile) -> list[tuple[str, ...]]:
    """A few sites and the best one per curve, as text: a header row, then one row per curve."""
    last = profile.n_layers
    sites = [0, round(last / 4), round(last / 2), round(3 * last / 4), last]
    rows = [("nats per token", *(f"site {site}" for site in sites), "highest (95% interval)")]
    for quantity, scale, curve in profile.curves():
        if len(curve) <= profile.n_layers or curve.unit != "nats":
            continue
        name = f"{quantity} {scale}".strip().replace("_", " ")
        rows.append((name, *(f"{curve.values[site]:.3g}" for site in sites), _best(curve)))
    return rows


def _best(curve: Curve) -> str:
    site = int(np.argmax(curve.values))
    return (
        f"{curve.values[site]:.3g} ({curve.low[site]:.3g} to {curve.high[site]:.3g}) at site {site}"
    )


def _summary(profile: LayerProfile) -> str:
    head, *rows = summary_rows(profile)
    return table([head, *rows])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of plain text as an HTML table; the first is the header."""
    head, *body = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def section(title: str, text: str, figure: go.Figure) -> str:
    """A heading, a paragraph of plain text and a figure, as HTML."""
    body = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False}
    )
    return f"<h2>{escape(title)}</h2><p>{escape(text)}</p><figure>{body}</figure>"


def _settings(profiles: Sequence[LayerProfile]) -> str:
    rows = [("setting", *("main profile", "scale map")[: len(profiles)])]
    keys = [key for key in profiles[0].settings if key != "ridge"]
    rows += [(key, *(str(p.settings.get(key, "")) for p in profiles)) for key in keys]
    rows.append(("bands", *(str(dict(p.bands)) for p in profiles)))
    rows += [
        (f"version of {name}", *(p.versions.get(name, "") for p in profiles))
        for name in profiles[0].versions
    ]
    return table(rows)


def _meanings(profile: LayerProfile) -> str:
    items = {quantity: curve.guarantee for quantity, _, curve in profile.curves()}
    return (
        "<ul>"
        + "".join(
            f"<li><b>{escape(name.replace('_', ' '))}</b>: {escape(text)}</li>"
            for name, text in items.items()
        )
        + "</ul>"
    )
