"""Pages say of what was found on real models what the table holds, and no more."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_site import script

evidence = script("make_evidence")


def made(**cells):
    found = evidence.row("T", "it is so", "m", "q", 1.234567, 1.0, 1.5, says="open", call="ml.f")
    constants = {
        "mspgt-lens": "1",
        "transformer-lens": "2",
        "torch": "3",
        "date": "2000-01-01",
        "weights": "aa",
        "passages": "bb",
        "n_passages": 7,
    }
    return found | constants | cells


@pytest.mark.parametrize("page", evidence.PAGES, ids=lambda page: page.name)
def test_pages_are_those_of_the_table(page):
    text = page.read_text("utf-8")
    told = evidence.PAGES[page](evidence.read_table())
    assert told in text
    assert text == evidence.written(text, told), "run: python docs/make_evidence.py --written"


def test_rows_say_where_they_come_from_and_speak_of_claims():
    table = evidence.read_table()
    assert len(table) > 20
    origin = ["date", "mspgt-lens", "transformer-lens", "torch", "weights", "passages", "call"]
    assert table[origin].notna().all(axis=None)
    assert set(table["says"]) <= {"", *evidence.WORDS}
    # A claim has an answer, an answer a claim, and both a theory.
    assert (table["claim"].eq("") == table["says"].eq("")).all()
    assert (table["claim"].eq("") == table["theory"].eq("")).all()
    inside = table.dropna(subset=["low", "high"])
    assert ((inside["low"] <= inside["value"]) & (inside["value"] <= inside["high"])).all()
    assert not table.duplicated(["of", "quantity", "claim"]).any()


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(2.1, 3.0, "supports"), (1.0, 1.9, "contradicts"), (1.9, 2.1, "open"), (2.0, 3.0, "open")],
)
def test_only_a_whole_interval_on_one_side_supports_or_contradicts(low, high, says):
    assert evidence.side(low, high, 2.0) == says


def test_segments_that_the_data_do_not_support_leave_claims_on_them_open():
    for supported, says in ((True, "contradicts"), (False, "open")):
        measured = SimpleNamespace(partition=SimpleNamespace(supported=supported))
        assert evidence.of_segments(measured, 1.0, 1.9, 2.0) == says


def test_findings_are_told_under_what_they_say_and_counted():
    rows = [
        made(says="contradicts", claim="there are two", low=np.nan, high=np.nan, p=0.25),
        made(says="supports"),
        made(theory="", claim="", says="", quantity="height", unit="nats", value=1234.5),
    ]
    told = evidence.listing(pd.DataFrame(rows))
    assert "Of 2 findings on what theories claim, 1 support the claim, 1 contradict it, 0 " in told
    parts = dict(re.findall(r"### (.+)\n\n(.+)", told))
    assert parts["Supports"] == "- **T: it is so.** Of m: q 1.23 (1 to 1.5) (`ml.f`)."
    assert parts["Contradicts"] == "- **T: there are two.** Of m: q 1.23, p = 0.25 (`ml.f`)."
    assert "Left open" not in parts
    assert "| height | m | 1,234 (1 to 1.5) | nats |  |" in told
    assert evidence.short(pd.DataFrame(rows)).splitlines()[2:] == [
        "| supports | T: it is so: 1.23 (1 to 1.5) |",
        "| contradicts | T: there are two: 1.23 |",
    ]


def test_only_what_is_between_the_marks_is_renewed():
    page = "before\n<!-- from evidence.csv -->\nold\n<!-- end -->\nafter\n"
    new = "before\n<!-- from evidence.csv -->\n\nnew\n\n<!-- end -->\nafter\n"
    assert evidence.written(page, "new") == evidence.written(new, "new") == new


def test_boundaries_of_the_model_alone_speak_of_the_claim():
    class Found:
        def __init__(self, n, p):
            self.n_boundaries, self.p_found, self.sharpness = n, p, {"drift": 0.5}

    def said(n):
        both = SimpleNamespace(partition=Found(n, 0.01), random_weights=Found(2, 0.01))
        trained, twin, error = evidence.boundaries(both)
        assert (twin["says"], twin["theory"], twin["value"]) == ("", "", 2)
        assert (error["value"], error["says"]) == (0.5, "")
        return trained["says"]

    assert [said(n) for n in range(4)] == ["open", "open", "supports", "contradicts"]
