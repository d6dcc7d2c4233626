"""Public functions say what they take, return and raise; examples do what they show.

Every public function and method names each of its arguments under ``Args:``, says under
``Returns:`` (or ``Yields:``) what comes back, and under ``Raises:`` which errors its own code
raises. A method that overrides another may leave that to it. Classes of data name each of their
fields under ``Attributes:``.

Examples are doctests. They find ``ml``, ``np``, ``torch``, ``model`` (8 blocks, with a tokenizer of
words such as ``w7``), ``prompts`` and ``pairs`` that suit it, a ``profile`` of both, and an empty
working folder.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import textwrap
import warnings
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Warns", "Example")
# Names that everybody meets first; others may have an example.
SHOWN = (
    *("profile_layers", "profile_cache", "recording", "needed_hooks", "load_passages"),
    *("PromptDataset.from_texts", "PromptDataset.from_tokens", "PromptDataset.from_huggingface"),
    *("detect_scales", "segment_blocks", "synthetic.synthetic_signals", "synthetic.power"),
    *("PromptPairs.from_tokens", "PromptPairs.from_texts", "tasks.induction"),
    *("patch_layers", "patch_scales"),
    *("Perturbation", "perturb_scales", "measure_brittleness", "classify_tokens"),
    *("measure_dissociation", "residual_statistics", "generation_effects"),
    "rate_distortion",
    *("fit_lens", "results.RidgeLens.logits", "results.RidgeLens.read", "plot_lens"),
    *(
        "fit_hvib",
        "arrays.fit_hvib_arrays",
        "mutual_information",
        "arrays.channel_rate",
        "arrays.bottleneck_frontier",
    ),
    *("analyze", "studies.compare_models", "evaluate_predictions"),
    *("synthetic.synthetic_models", "theory.fit_water_filling"),
    *("theory.water_fill", "theory.water_fill_whole"),
    *("plot_profile", "plot_boundaries", "write_report"),
)


def public(module=ml, before=""):
    """What the package offers, by the name that one calls it by."""
    for name in getattr(module, "__all__", None) or own_functions(module):
        thing = getattr(module, name)
        yield f"{before}{name}", thing
        if inspect.ismodule(thing):
            yield from public(thing, f"{before}{name}.")


def own_functions(module):
    return [
        name
        for name, thing in vars(module).items()
        if is_own(thing, module.__name__) and not name.startswith("_")
    ]


def methods(kind):
    for name in dir(kind):
        # Properties say in their first line what they are.
        method = inspect.getattr_static(kind, name)
        method = getattr(method, "__func__", method)
        if is_own(method) and not name.startswith("_"):
            yield name, method


def is_own(thing, module="mspgt_lens"):
    return inspect.isfunction(thing) and inspect.unwrap(thing).__module__.startswith(module)


# What is offered in two places counts once, by its shorter name.
PUBLIC = {}
for called, offered in sorted(public(), key=lambda item: item[0].count(".")):
    if not any(offered is other for other in PUBLIC.values()):
        PUBLIC[called] = offered
CLASSES = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing)}
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if is_own(thing)}
METHODS = {
    f"{name}.{key}": (method, kind)
    for name, kind in CLASSES.items()
    for key, method in methods(kind)
}


def sections(text):
    """Section name to what stands in it."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):$", inspect.cleandoc(text or ""), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def said(function, kind=None):
    """A function's sections; a method's also where it leaves them to what it overrides."""
    merged = {}
    for parent in reversed(kind.__mro__ if kind else ()):
        merged |= sections(getattr(vars(parent).get(function.__name__), "__doc__", None))
    return merged | sections(function.__doc__)


def documented(section):
    """The arguments that are named at the beginning of a section's entries."""
    heads = re.findall(r"^    (\*{0,2}\w+(?:, \w+)*):", section, flags=re.M)
    return {one.strip().lstrip("*") for head in heads for one in head.split(",")}


def raised(function):
    """Names of the errors that a function's own code raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    errors = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc)
    return {ast.unparse(e.func if isinstance(e, ast.Call) else e) for e in errors}


def lacking(function, kind=None):
    """What a function's docstring does not say."""
    function = inspect.unwrap(function)
    parts = said(function, kind)
    arguments = set(inspect.signature(function).parameters) - {"self", "cls"}
    absent = sorted(arguments - documented(parts.get("Args", "")))
    gives = function.__annotations__.get("return") not in (None, "None")
    if gives and not {"Returns", "Yields"} & set(parts):
        absent.append("Returns")
    return absent + sorted(raised(function) - documented(parts.get("Raises", "")))


def test_what_is_public_is_found():
    assert {"profile_layers", "tasks.induction", "theory.water_fill"} <= set(FUNCTIONS)
    assert {"results.Curve.to", "results.Analysis.load", "PromptDataset.from_texts"} <= set(METHODS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_of_a_function_says_what_goes_in_comes_out_and_can_fail(name):
    assert lacking(FUNCTIONS[name]) == []


@pytest.mark.parametrize("name", METHODS)
def test_docstring_of_a_method_says_what_goes_in_comes_out_and_can_fail(name):
    assert lacking(*METHODS[name]) == []


@pytest.mark.parametrize("name", [n for n, kind in CLASSES.items() if is_dataclass(kind)])
def test_docstring_of_a_class_says_what_every_field_holds(name):
    told = documented(sections(CLASSES[name].__doc__).get("Attributes", ""))
    assert {item.name for item in fields(CLASSES[name])} - told == set()


def test_what_is_lacking_is_found():
    def silent(first, second) -> int:
        """Nothing.

        Args:
            first: One.
        """
        raise KeyError(second)

    assert lacking(silent) == ["second", "Returns", "KeyError"]


REPOSITORY = Path(__file__).parents[1]
PAGES = [
    page
    for pattern in ("*.md", "docs/*.md", "tutorials/*.ipynb", "benchmarks/*.py")
    for page in sorted(REPOSITORY.glob(pattern))
    # It tells of names that are gone.
    if page.name != "CHANGELOG.md"
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_that_pages_use_exist(page):
    used = set(re.findall(r"(?<![\w.])ml\.(\w+(?:\.[a-z_]\w*)?)", page.read_text("utf-8")))
    for name in sorted(used):
        attrgetter(name)(ml)


EXAMPLES = {
    name: inspect.getdoc(thing)
    for name, thing in {**{n: m for n, (m, _) in METHODS.items()}, **PUBLIC}.items()
    if ">>>" in (getattr(thing, "__doc__", None) or "")
}


def test_main_names_have_examples():
    assert set(SHOWN) - set(EXAMPLES) == set()


@pytest.fixture(scope="module")
def things():
    model = tiny_model("llama", n_layers=8)
    model.tokenizer = tiny_tokenizer()
    prompts = ml.PromptDataset.from_tokens(random_tokens(15, 128))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        profile = ml.profile_layers(model, prompts, progress=False)
    pairs = ml.tasks.induction(model, 8)
    known = {"model": model, "prompts": prompts, "pairs": pairs, "profile": profile}
    return known | {"ml": ml, "np": np, "torch": torch}


# Shapes are checked where the functions are tested.
@pytest.mark.simulation
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_does_what_it_shows(name, things, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(EXAMPLES[name], dict(things), name, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    told = []
    failed, tried = runner.run(example, out=told.append)
    assert tried
    assert not failed, "".join(told)
