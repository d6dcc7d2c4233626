"""Every class that a public function returns speaks, is frozen, tabulated, kept and drawn."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
import types
import typing
from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from made_results import HOSTILE, made_results
from markupsafe import Markup, escape
from tiny import tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.contract import COLUMNS, Result
from mspgt_lens.partition import Support
from mspgt_lens.perturbation.registry import PerturbationKind
from mspgt_lens.profile.planning import ProfilePlan
from mspgt_lens.profile.recording import Recording
from mspgt_lens.prompts import Passage, Prompt
from mspgt_lens.report.registry import KINDS, Kind
from mspgt_lens.theory.place_comparison import PlacedTheory

# What functions take rather than find, and parts that never stand alone.
# What is given, what handles a model, and what only plans finds nothing itself.
INPUTS = {
    Passage,
    PlacedTheory,
    PerturbationKind,
    ProfilePlan,
    Prompt,
    ml.PromptDataset,
    ml.PromptPairs,
    ml.Perturbation,
    Recording,
    Support,
}


def classes_in(hint):
    if isinstance(hint, type):
        yield hint
    for one in typing.get_args(hint):
        yield from classes_in(one)


def functions_of(thing):
    if inspect.isfunction(thing):
        yield thing
    elif inspect.isclass(thing):
        for name, member in inspect.getmembers(thing):
            if not name.startswith("_") or name in ("__getitem__", "__iter__"):
                plain = getattr(member, "fget", None) or getattr(member, "func", member)
                plain = getattr(plain, "__func__", plain)
                if inspect.isfunction(plain):
                    yield plain
    elif inspect.ismodule(thing):
        for name, member in vars(thing).items():
            if not name.startswith("_") and inspect.isfunction(member):
                yield member


def returned():
    """Classes of this package that public functions and methods of public classes return."""
    spaces = (ml, ml.arrays, ml.plots, ml.results, ml.studies, ml.synthetic, ml.theory)
    found, left = set(), [getattr(space, name) for space in spaces for name in space.__all__]
    while left:
        thing = left.pop()
        for function in functions_of(thing):
            hint = typing.get_type_hints(function).get("return")
            for kind in classes_in(hint):
                if kind.__module__.startswith("mspgt_lens.") and kind not in found:
                    found.add(kind)
                    left.append(kind)
    # What handles a model finds nothing itself.
    return {k for k in found - INPUTS if not k.__module__.startswith("mspgt_lens.models")}


RESULTS = sorted(returned(), key=lambda kind: kind.__name__)
MADE = made_results()


def test_every_class_that_is_returned_is_a_result_with_an_example():
    assert len(RESULTS) > 20
    assert not [kind.__name__ for kind in RESULTS if not issubclass(kind, Result)]
    assert {kind.__name__ for kind in RESULTS} - {Result.__name__} == set(MADE)


@pytest.fixture(params=sorted(MADE))
def result(request):
    return MADE[request.param]


def test_results_are_frozen(result):
    for item in dataclasses.fields(result):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, item.name, None)
        value = getattr(result, item.name)
        assert not isinstance(value, dict), item.name
        if isinstance(value, np.ndarray):
            assert not value.flags.writeable, item.name
        if isinstance(value, Mapping):
            assert isinstance(value, types.MappingProxyType), item.name


def test_results_say_what_they_found_in_a_few_lines(result):
    said = repr(result)
    assert len(said) <= 1000
    assert len(said.splitlines()) <= 12
    assert said.splitlines()[0].startswith(type(result).__name__)
    assert "object at 0x" not in said
    assert "array(" not in said
    summary = result.summary()
    assert summary.startswith(result.heading())
    for note in result.warnings:
        assert note in summary
    if result.warnings:
        assert "Note: " in said


def texts_of(model):
    return ml.PromptDataset.from_texts(model, [" ".join(f"w{i}" for i in range(4, 90))] * 40)


def pairs_of(n_pos, **kwargs):
    clean = np.arange(4, 4 + n_pos)
    return ml.PromptPairs.from_tokens([clean, clean], [clean + 1] * 2, [7, 8], [9, 10], **kwargs)


INPUTS_SAY = {
    "Prompt of 300 tokens, group 'b': 4 5 6": lambda _: Prompt(np.arange(4, 304), "b"),
    "Prompt of 1 token, group 'n": lambda _: Prompt(np.arange(1), "n" * 5000),
    "PromptDataset of 2 prompts, 3 to 90 tokens, 2 groups": lambda _: ml.PromptDataset.from_tokens(
        [[4, 5, 6], list(range(4, 94))]
    ),
    "PromptDataset of 0 prompts": lambda _: ml.PromptDataset.from_tokens([]),
    "windows of up to 128 tokens from 40 texts, tokenized for tiny-llama": texts_of,
    "from texts, tokenized for tiny-llama as they are read, once": lambda model: (
        ml.PromptDataset.from_texts(model, iter(["w4 w5"]))
    ),
    "from column 'text' of 1 row": lambda model: ml.PromptDataset.from_huggingface(
        model, [{"text": "w4"}]
    ),
    "whose tokens are shuffled": lambda model: texts_of(model).shuffled([0]),
    "Padding is told apart when the prompts meet": lambda _: ml.PromptDataset.from_tokens([[4, 0]]),
    "PromptPairs of 2 pairs, 400 tokens, group 'a'": lambda _: pairs_of(400, groups=["a", "a"]),
    "clean 4 5 6, answer 7\n       corrupted 5 6 7, foil 9": lambda _: pairs_of(3),
    "Passage, narrative about ": lambda _: ml.load_passages()[0],
    "translation 2, along a vector of 900, seed 3": lambda _: ml.Perturbation(
        "translation", 2.0, direction=torch.ones(900), seed=3
    ),
    "PerturbationKind 'skip'": lambda _: ml.Perturbation("skip").behavior,
}


@pytest.mark.parametrize("words", INPUTS_SAY)
def test_what_is_given_says_what_it_holds(words, tiny, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(model, "tokenizer", tiny_tokenizer())
    said = repr(INPUTS_SAY[words](model))
    assert words in said
    assert len(said) <= 300
    assert len(said.splitlines()) <= 4


def test_saying_what_it_holds_reads_no_text(tiny, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(model, "tokenizer", tiny_tokenizer())
    streamed = ml.PromptDataset.from_texts(model, iter(["w4 w5"]))
    assert repr(streamed) == repr(streamed)
    assert [prompt.tokens.tolist()[-2:] for prompt in streamed] == [[4, 5]]


def test_warnings_are_texts(result):
    assert isinstance(result.warnings, tuple)
    assert all(isinstance(note, str) for note in result.warnings)


def test_notebooks_show_hostile_names_as_text(result):
    html = result._repr_html_()
    assert "<script>alert" not in html
    assert ("&lt;script&gt;" in html) == (HOSTILE in result.summary())


def test_tables_are_tidy_and_name_columns_alike(result):
    table = result.to_dataframe()
    assert isinstance(table, pd.DataFrame)
    assert len(table)
    assert not set(table.columns) - set(COLUMNS)
    assert "value" in table
    assert {"low", "high"} <= set(table) or not {"low", "high"} & set(table)
    inside = table.dropna(subset=["low", "high"]) if "low" in table else table[:0]
    assert (inside["low"] <= inside["value"] + 1e-12).all() if len(inside) else True
    assert (inside["value"] <= inside["high"] + 1e-12).all() if len(inside) else True
    assert pd.api.types.is_numeric_dtype(table["value"])


def test_what_is_saved_comes_back_equal(result, tmp_path):
    again = type(result).load(result.save(tmp_path / "kept"))
    assert again == result
    assert repr(again) == repr(result)
    pd.testing.assert_frame_equal(again.to_dataframe(), result.to_dataframe())
    assert result != "something else"


def test_every_result_is_drawn(result, monkeypatch):
    monkeypatch.setattr(go.Figure, "show", lambda *_, **__: pytest.fail("a figure was shown"))
    figure = result.plot()
    assert isinstance(figure, go.Figure)
    assert figure.data
    assert "<script>alert" not in figure.to_json()


def test_results_are_not_pickled(result):
    with pytest.raises(TypeError, match="is not pickled: write it with save"):
        pickle.dumps(result)
    with pytest.raises(TypeError, match="is not pickled"):
        copy.deepcopy(result)


def test_a_change_of_any_field_tells_results_apart(result):
    for item in dataclasses.fields(result):
        value = getattr(result, item.name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size:
            changed = copy.copy(dict(vars(result)))
            other = object.__new__(type(result))
            for name, kept in changed.items():
                object.__setattr__(other, name, kept)
            object.__setattr__(other, item.name, value + 1)
            assert other != result, item.name


def test_computing_does_not_import_plotting():
    code = (
        "import sys, mspgt_lens.studies.analysis, mspgt_lens.results;"
        "assert 'mspgt_lens.plots.registry' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_long_finding_says_where_the_rest_is():
    @dataclasses.dataclass(frozen=True, eq=False, repr=False)
    class Long(ml.results.Estimate):
        def findings(self):
            return [f"finding {i} " + "word " * 30 for i in range(40)]

    notes = ("first " * 60, "second")
    said = repr(Long(1.0, 0.0, 2.0, "nats", "", None, notes))
    assert len(said) <= 1000
    assert len(said.splitlines()) <= 12
    assert "the rest: summary()" in said
    assert "and 1 more in .warnings" in said


def test_a_report_shows_every_kind_of_result_with_hostile_names_as_text(tmp_path):
    for result in MADE.values():
        html = ml.write_report(tmp_path / "r.html", result).read_text()
        assert "plotly-graph-div" in html
        assert "<script>alert" not in html
        assert "<b>note</b>" not in html
        for note in result.warnings[:1]:
            assert str(escape(note)) in html


def test_a_report_treats_a_kind_by_its_entry(monkeypatch, tmp_path):
    """A kind from elsewhere is shown by what it says; one entry makes it a section of its own."""

    @dataclasses.dataclass(frozen=True, eq=False, repr=False)
    class Mine(ml.results.Estimate):
        def heading(self):
            return "My <finding>"

    mine = Mine(1.0, 0.5, 2.0, "nats", "What it is.")
    html = ml.write_report(tmp_path / "r.html", mine, mine).read_text()
    assert html.count('<h2 dir="auto">My &lt;finding&gt;</h2>') == 2
    kind = Kind(lambda found, _: Markup("<p>a section</p>"), "Is it <mine>?")
    monkeypatch.setitem(KINDS, Mine, kind)
    html = ml.write_report(tmp_path / "r.html", mine).read_text()
    assert "<p>a section</p>" in html
    assert "Is it &lt;mine&gt;?" in html
    with pytest.raises(ValueError, match="one Mine at most, got 2"):
        ml.write_report(tmp_path / "r.html", mine, mine)
