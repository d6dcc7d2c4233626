"""AGENTS.md, llms.txt and CITATION.cff say what is so: names, commands, files, modules."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path

import pytest
from declared import PROJECT
from test_layout import ORDER

import mspgt_lens as ml

ROOT = Path(__file__).parents[1]
AGENTS = (ROOT / "AGENTS.md").read_text("utf-8")
LLMS = (ROOT / "llms.txt").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def test_the_map_has_every_module_in_the_order_of_the_layout():
    listed = AGENTS.partition("## Map of the code")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \| .", listed, flags=re.M) == ORDER


def test_contributing_has_the_same_layout():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    drawn = text.partition("## Layout")[2].partition("```\n")[2].partition("```")[0]
    assert re.findall(r"\w+", drawn) == ORDER


@pytest.mark.parametrize("page", ["AGENTS.md", "CONTRIBUTING.md", "README.md"])
def test_targets_that_pages_name_are_in_the_makefile(page):
    targets = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, flags=re.M))
    named = set(re.findall(r"`?make ([a-z-]+)", (ROOT / page).read_text("utf-8")))
    # "make" is also a word: what is meant as a command stands in code.
    code = set(re.findall(r"`make ([a-z-]+)", (ROOT / page).read_text("utf-8")))
    assert code <= targets
    assert named & targets


@pytest.mark.parametrize("text", [AGENTS, LLMS], ids=["AGENTS.md", "llms.txt"])
def test_files_that_are_named_exist(text):
    linked = re.findall(r"\]\(([^):]+)\)", text)
    in_code = re.findall(r"(?:`|python )((?:docs|tests|mspgt_lens)/[\w/]*(?:\.\w+)?)", text)
    plain = re.findall(r"`([A-Z]+\.md)`", text)
    named = {*linked, *in_code, *plain}
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("text", [AGENTS, LLMS], ids=["AGENTS.md", "llms.txt"])
def test_names_that_are_used_exist(text):
    used = set(re.findall(r"(?<![\w.])ml\.(\w+(?:\.[a-z_]\w*)?)", text))
    assert used
    for name in sorted(used):
        attrgetter(name)(ml)
    for method in ("summary", "to_dataframe", "plot", "save", "warnings"):
        assert f"{method}" in text
        assert hasattr(ml.results.Result, method)


def test_every_page_of_the_site_is_listed_or_in_the_reference():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    pages = re.findall(r"(\S+\.md)$", nav, flags=re.M)
    absent = [page for page in pages if f"docs/{page}" not in LLMS]
    assert [page for page in absent if not page.startswith("reference/")] == []


def test_the_citation_is_of_this_version_and_license():
    # Plain lines, so that no parser is needed.
    text = (ROOT / "CITATION.cff").read_text("utf-8")
    fields = dict(re.findall(r"^([\w-]+): (\S.*)$", text, flags=re.M))
    assert fields["cff-version"] == "1.2.0"
    assert fields["version"] == ml.__version__
    assert fields["license"] == PROJECT["license"]
    assert "2505.18244" in text
