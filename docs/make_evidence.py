"""Measure what is known of real models, and write docs/evidence.csv, docs/evidence.md and README.

    python docs/make_evidence.py             # or: make evidence
    python docs/make_evidence.py --written   # the pages alone, from the table as it is

The demo model and its twin with random weights are measured on a third of the built-in passages.
The table and the pages are written after every step. What was measured stays in output/evidence,
and a run that was interrupted goes on where it stopped: empty that folder after a change of code.
Between their marks, pages are written anew, from the table alone.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import mspgt_lens as ml

DOCS = Path(__file__).parent
TABLE = DOCS / "evidence.csv"
FOLDER = DOCS.parent / "output" / "evidence"
RIVAL_SIGNALS = ("first_norm", "prompt_entropy", "intrinsic_dimension")
TRAINED, TWIN = "SmolLM2-135M", "its twin with random weights"
MSPGT = "MSPGT"
# Thresholds are those of evaluate_predictions, which were fixed before anything was measured.
SEGMENT_RATIO, EXCESS = 2.0, 0.1
SHARPNESS = {"stages": "stages alone", "drift": "gradual change alone", "both": "both"}
SHAPES = {"covariance": "noise shaped like the stream", "isotropic": "isotropic noise"}
WORDS = {
    "supports": "support the claim",
    "contradicts": "contradict it",
    "open": "leave it open",
}
HEADINGS = {"supports": "Supports", "contradicts": "Contradicts", "open": "Left open"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What was measured so far, by the names of ``ml.theory.ModelResults``; the last two whole."""

    profile: ml.results.LayerProfile
    partition: ml.results.ScalePartition
    random_profile: ml.results.LayerProfile
    random_weights: ml.results.ScalePartition
    block_effects: ml.results.BlockEffects | None = None
    brittleness: ml.results.Brittleness | None = None
    dissociation: ml.results.Dissociation | None = None

    @property
    def results(self) -> ml.theory.ModelResults:
        """What predictions of other theories are judged by."""
        return ml.theory.ModelResults(
            self.profile,
            self.partition,
            random_weights=self.random_weights,
            random_profile=self.random_profile,
            block_effects=self.block_effects,
        )


def measure(folder: Path) -> Iterator[Measured]:
    """What the rows need, from the folder or measured into it; more with every step."""
    model = ml.load_demo_model()
    texts = [passage.text for passage in passages()]
    prompts = ml.PromptDataset.from_texts(model, texts, max_length=384)
    shorter = ml.PromptDataset.from_texts(model, beginnings(texts, 100), max_length=384)
    starts = ml.PromptDataset.from_texts(model, beginnings(texts[::5], 32), max_length=384)

    def kept(name: str, make: Callable[[], Any]) -> Any:
        file = folder / f"{name}.safetensors"
        if not file.exists():
            print(name, flush=True)
            make().save(file)
        return ml.load_result(file)

    def profiled(control: Any) -> Any:
        signals = [*ml.extending.SIGNALS, *RIVAL_SIGNALS]
        return ml.profile_layers(model, prompts, control=control, signals=signals)

    profile = kept("trained", lambda: profiled(None))
    partition = kept("trained-scales", lambda: ml.detect_scales(profile=profile))
    twin = kept("random-weights", lambda: profiled("random_weights"))
    random_weights = kept("random-weights-scales", lambda: ml.detect_scales(profile=twin))
    measured = Measured(profile, partition, twin, random_weights)
    yield measured
    brittleness = kept(
        "brittleness", lambda: ml.measure_brittleness(model, starts, partition, levels=[0.05])
    )
    measured = replace(measured, brittleness=brittleness)
    yield measured
    effects = kept("blocks", lambda: ml.studies.block_effects(model, starts, n_places=1))
    measured = replace(measured, block_effects=effects)
    yield measured
    classes = kept("classes", lambda: ml.classify_tokens(model, shorter, n_tokens=400))
    dissociation = kept(
        "dissociation", lambda: ml.measure_dissociation(model, shorter, partition, classes)
    )
    yield replace(measured, dissociation=dissociation)


def passages() -> list[Any]:
    """The passages that are measured."""
    return ml.load_passages()[::3]


def beginnings(texts: list[str], n_words: int) -> list[str]:
    """The first words of every text: interventions take many runs."""
    return [" ".join(text.split()[:n_words]) for text in texts]


def rows(measured: Measured) -> Iterator[Row]:
    """What was found: claims first, theory by theory, then what no theory speaks of."""
    yield from boundaries(measured)
    yield from brittleness(measured)
    yield from diagonal(measured)
    yield from verdicts(measured)
    yield from curves(TRAINED, measured.profile)
    yield from curves(TWIN, measured.random_profile)


def boundaries(measured: Measured) -> Iterator[Row]:
    """How many boundaries there are, in the model and in its twin."""
    for of, partition in ((TRAINED, measured.partition), (TWIN, measured.random_weights)):
        n, claimed = partition.n_boundaries, of == TRAINED
        # What is not found is not shown to be absent.
        says = "supports" if n == 2 else "contradicts" if n > 2 else "open"
        yield row(
            MSPGT if claimed else "",
            "the layers have exactly two sharp boundaries" if claimed else "",
            of,
            "boundaries beyond gradual change",
            n,
            p=partition.p_found,
            says=says if claimed else "",
            call="ml.detect_scales",
        )
    for kind, error in measured.partition.sharpness.items():
        yield row(
            "",
            "",
            TRAINED,
            f"error of left-out blocks, {SHARPNESS[kind]}",
            error,
            unit="share of the mean's error",
            call="ml.detect_scales",
        )


def brittleness(measured: Measured) -> Iterator[Row]:
    """How much more a segment suffers from the same total noise than another."""
    if measured.brittleness is None:
        return
    table = measured.brittleness.ratios()
    for found in table[table["mode"] == "equal_energy"].itertuples():
        claimed = found.segment == "local"
        yield row(
            MSPGT if claimed else "",
            f"the local segment is more than {SEGMENT_RATIO:g} times as brittle as the "
            f"{found.against} one under {SHAPES[found.shape]}"
            if claimed
            else "",
            TRAINED,
            f"brittleness, {found.segment} over {found.against}, {SHAPES[found.shape]}",
            found.ratio,
            found.low,
            found.high,
            unit="ratio",
            p=found.p_value,
            says=of_segments(measured, found.low, found.high, SEGMENT_RATIO) if claimed else "",
            call="ml.measure_brittleness",
        )


def diagonal(measured: Measured) -> Iterator[Row]:
    """Whether each segment's perturbation hurts the tokens of its own scale most."""
    if measured.dissociation is None:
        return
    found = measured.dissociation.interaction
    yield row(
        MSPGT,
        "each segment matters most to the tokens of its own scale",
        TRAINED,
        "interaction of segments and token classes",
        found.value,
        found.low,
        found.high,
        unit=found.unit,
        p=found.p_value,
        says=of_segments(measured, found.low, found.high, EXCESS),
        call="ml.measure_dissociation",
    )


def verdicts(measured: Measured) -> Iterator[Row]:
    """What other theories predict of one model; MSPGT's verdicts need several."""
    said = {"supported": "supports", "refuted": "contradicts", "inconclusive": "open"}
    for verdict in ml.evaluate_predictions(measured.results):
        if verdict.theory == MSPGT or verdict.statistic is None:
            continue
        low, high = verdict.interval or (None, None)
        yield row(
            verdict.theory,
            verdict.statement.rstrip("."),
            TRAINED,
            verdict.quantity,
            verdict.statistic,
            low,
            high,
            says=said[verdict.verdict],
            call="ml.evaluate_predictions",
        )


def curves(of: str, profile: ml.results.LayerProfile) -> Iterator[Row]:
    """The ends and the top of every curve, and where it first reaches half of it."""
    named = {"compression": profile.compression, "relevance": profile.relevance}
    for kind in ("retained", "predicted"):
        named |= {f"{kind}, {scale}": curve for scale, curve in getattr(profile, kind).items()}
    for name, curve in named.items():
        top = int(np.argmax(curve.values))
        last = len(curve) - 1
        places = {0: "first site", last: "last site"}
        for site in sorted({0, top, last}):
            place = places.get(site, f"highest, site {site}")
            yield row(
                "",
                "",
                of,
                f"{name}: {place}",
                curve.values[site],
                curve.low[site],
                curve.high[site],
                unit=curve.unit,
                call="ml.profile_layers",
            )
        half = curve.half_depth()
        if name.startswith("predicted") and half is not None:
            yield row(
                "",
                "",
                of,
                f"{name}: half of its highest",
                half.value,
                half.low,
                half.high,
                unit=half.unit,
                call="ml.profile_layers",
            )


def side(low: float, high: float, threshold: float) -> str:
    """What an interval says of a claim to lie above a threshold."""
    return "supports" if low > threshold else "contradicts" if high < threshold else "open"


def of_segments(measured: Measured, low: float, high: float, threshold: float) -> str:
    """The same of segments: where the data support none, theirs is no claim to judge."""
    return side(low, high, threshold) if measured.partition.supported else "open"


def row(
    theory: str,
    claim: str,
    of: str,
    quantity: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    unit: str = "",
    p: float | None = None,
    says: str = "",
    call: str,
) -> Row:
    """One number with all that there is to say of it."""
    return {
        "theory": theory,
        "claim": claim,
        "of": of,
        "quantity": quantity,
        "value": value,
        "low": low,
        "high": high,
        "unit": unit,
        "p": p,
        "says": says,
        "call": call,
    }


def tabled(found: list[Row], measured: Measured) -> pd.DataFrame:
    """The rows, each with what it was measured with."""
    versions, profile = measured.profile.versions, measured.profile
    texts = "\0".join(passage.text for passage in passages())
    table = pd.DataFrame(found)
    for name in ("mspgt-lens", "transformer-lens", "torch"):
        table[name] = versions[name]
    table["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    table["weights"] = profile.settings["weights_digest"]
    table["passages"] = hashlib.sha256(texts.encode()).hexdigest()[:16]
    table["n_passages"] = len(passages())
    return table


def listing(table: pd.DataFrame) -> str:
    """What the page says of the table, from it alone."""
    first = table.iloc[0]
    parts = [
        f"Measured on {first['date']} with mspgt_lens {first['mspgt-lens']}, TransformerLens "
        f"{first['transformer-lens']} and torch {first['torch']}, on {first['n_passages']} of the "
        f"built-in passages (SHA-256 begins `{first['passages']}`), of {TRAINED}-Instruct (weights "
        f"`{first['weights']}`)."
    ]
    claims = table[table["says"] != ""]
    counts = claims["says"].value_counts()
    counted = ", ".join(f"{counts.get(word, 0)} {WORDS[word]}" for word in WORDS)
    parts.append(f"Of {len(claims)} findings on what theories claim, {counted}.")
    for word in WORDS:
        some = claims[claims["says"] == word]
        if len(some):
            items = map(sentence, some.to_dict("records"))
            parts += [f"### {HEADINGS[word]}", "\n".join(items)]
    parts.append("### Without a claim")
    rest = table[table["says"] == ""]
    lines = ["| quantity | of | value, 95% interval | unit | p |", f"| {' | '.join(['---'] * 5)} |"]
    for found in rest.to_dict("records"):
        p = "" if pd.isna(found["p"]) else f"{found['p']:.2g}"
        cells = (found["quantity"], found["of"], figure(found), found["unit"], p)
        lines.append(f"| {' | '.join(cells)} |")
    parts.append("\n".join(lines))
    return "\n\n".join(parts)


def short(table: pd.DataFrame) -> str:
    """What README says of the table: whose claims fare how."""
    claims = table[table["says"] != ""]
    lines = ["| | what theories claim, and what was measured |", "| --- | --- |"]
    for word in WORDS:
        some = claims[claims["says"] == word].to_dict("records")
        told = (f"{f['theory']}: {f['claim']}: {figure(f)}" for f in some)
        if some:
            lines.append(f"| {HEADINGS[word].lower()} | {'<br>'.join(told)} |")
    return "\n".join(lines)


def sentence(found: Row) -> str:
    """One finding as an item of a list."""
    tested = "" if pd.isna(found["p"]) else f", p = {found['p']:.2g}"
    unit = f" {found['unit']}" if found["unit"] not in ("", "ratio") else ""
    return (
        f"- **{found['theory']}: {found['claim']}.** Of {found['of']}: {found['quantity']} "
        f"{figure(found)}{unit}{tested} (`{found['call']}`)."
    )


def figure(found: Row) -> str:
    """A number with its interval."""
    value = number(found["value"])
    if pd.isna(found["low"]):
        return value
    return f"{value} ({number(found['low'])} to {number(found['high'])})"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def written(page: str, told: str) -> str:
    """A page with what is told between its marks."""
    marks = r"(<!-- from evidence.csv -->\n).*?(\n<!-- end -->)"
    return re.sub(marks, lambda m: f"{m[1]}\n{told}\n{m[2]}", page, flags=re.DOTALL)


def read_table() -> pd.DataFrame:
    """docs/evidence.csv, texts that are not there as empty ones."""
    table = pd.read_csv(TABLE)
    texts = ["theory", "claim", "unit", "says"]
    return table.assign(**table[texts].fillna(""))


PAGES = {DOCS / "evidence.md": listing, DOCS.parent / "README.md": short}


def write_pages() -> None:
    """All pages anew, from the table."""
    for page, tell in PAGES.items():
        page.write_text(written(page.read_text("utf-8"), tell(read_table())), "utf-8")


if __name__ == "__main__":
    if "--written" in sys.argv[1:]:
        write_pages()
    else:
        for measured in measure(FOLDER):
            tabled(list(rows(measured)), measured).to_csv(TABLE, index=False)
            write_pages()
