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
import dataclasses
import doctest
import inspect
import re
import textwrap
import warnings

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
    *("detect_scales", "segment_blocks", "boundary_signals", "synthetic_signals", "power"),
    *("PromptPairs.from_tokens", "PromptPairs.from_texts", "tasks.induction"),
    *("patch_layers", "patch_scales"),
    *("Perturbation", "perturb_scales", "measure_brittleness", "classify_tokens"),
    *("measure_dissociation", "residual_statistics", "generation_effects"),
    *("fit_hvib", "fit_hvib_arrays", "mutual_information", "channel_rate", "bottleneck_frontier"),
    *("analyze", "compare_models", "evaluate_predictions"),
    *("synthetic_models", "water_fill", "water_fill_whole", "fit_water_filling"),
    *("plot_profile", "plot_boundaries", "write_report"),
)


def functions():
    """Public functions and methods, by the name that one calls them by."""
    found = {}
    for name in ml.__all__:
        thing = getattr(ml, name)
        if inspect.isclass(thing):
            found |= {f"{name}.{key}": method for key, method in methods(thing)}
        elif inspect.ismodule(thing):
            found |= {
                f"{name}.{key}": member
                for key, member in vars(thing).items()
                if own(member, thing.__name__) and not key.startswith("_")
            }
        elif own(thing):
            found[name] = thing
    return {name: inspect.unwrap(function) for name, function in found.items()}


def methods(kind):
    for key in dir(kind):
        # Properties say in their first line what they are.
        method = inspect.getattr_static(kind, key)
        method = getattr(method, "__func__", method)
        if own(method) and not key.startswith("_"):
            yield key, method


def own(thing, module="mspgt_lens"):
    return inspect.isfunction(thing) and inspect.unwrap(thing).__module__.startswith(module)


def sections(text):
    """Section name to what stands in it."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):$", inspect.cleandoc(text or ""), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def said(name, function):
    """The sections of a function, and of those that it overrides where it has none."""
    kinds = []
    if "." in name and inspect.isclass(kind := getattr(ml, name.partition(".")[0])):
        kinds = kind.__mro__
    own_name = name.rpartition(".")[2]
    inherited = (getattr(k, own_name, None) for k in reversed(kinds))
    merged = {}
    for one in (*inherited, function):
        merged |= sections(getattr(one, "__doc__", None))
    return merged


def documented(section):
    """The arguments that are named at the beginning of a section's entries."""
    heads = re.findall(r"^    (\*{0,2}\w+(?:, \w+)*):", section, flags=re.M)
    return {one.strip().lstrip("*") for head in heads for one in head.split(",")}


def raised(function):
    """Names of the errors that a function's own code raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    errors = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc)
    return {ast.unparse(e.func if isinstance(e, ast.Call) else e) for e in errors}


def lacking(name, function):
    """What a function's docstring does not say."""
    parts = said(name, function)
    arguments = set(inspect.signature(function).parameters) - {"self", "cls"}
    absent = sorted(arguments - documented(parts.get("Args", "")))
    if function.__annotations__.get("return") not in (None, "None") and not (
        {"Returns", "Yields"} & set(parts)
    ):
        absent.append("Returns")
    named = documented(parts.get("Raises", ""))
    return absent + sorted(raised(function) - named)


FUNCTIONS = functions()


def test_public_functions_are_found():
    assert {"profile_layers", "tasks.induction", "Curve.to", "Analysis.load"} <= set(FUNCTIONS)
    assert len(FUNCTIONS) > 150


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_says_what_goes_in_comes_out_and_can_fail(name):
    assert lacking(name, FUNCTIONS[name]) == []


CLASSES = [n for n in ml.__all__ if dataclasses.is_dataclass(getattr(ml, n))]


@pytest.mark.parametrize("name", CLASSES)
def test_docstring_says_what_every_field_holds(name):
    kind = getattr(ml, name)
    told = documented(sections(kind.__doc__).get("Attributes", ""))
    assert {item.name for item in dataclasses.fields(kind)} - told == set()


def test_what_is_lacking_is_found():
    def silent(first, second) -> int:
        """Nothing.

        Args:
            first: One.
        """
        raise KeyError(second)

    assert lacking("silent", silent) == ["second", "Returns", "KeyError"]


def found(name):
    """A public name's object, also that of a method or of a function in a module."""
    thing = ml
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


EXAMPLES = sorted(
    name
    for name in {*FUNCTIONS, *ml.__all__}
    if ">>>" in (getattr(found(name), "__doc__", None) or "")
)


def test_main_names_have_examples():
    assert sorted(set(SHOWN) - set(EXAMPLES)) == []


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
    text = inspect.getdoc(found(name))
    example = doctest.DocTestParser().get_doctest(text, dict(things), name, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = []
    failed, tried = runner.run(example, out=said.append)
    assert tried
    assert not failed, "".join(said)
