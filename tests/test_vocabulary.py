"""One vocabulary: public signatures use the same words, in one order, with the same defaults."""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import mspgt_lens as ml

ROOT = Path(ml.__file__).parent
NAMESPACES = (
    ml,
    ml.arrays,
    ml.extending,
    ml.plots,
    ml.results,
    ml.studies,
    ml.synthetic,
    ml.tasks,
    ml.theory,
)
# What comes first, in this order, where a function takes it.
LEADING = (
    ("model",),
    ("prompts", "pairs", "cache", "texts", "dataset", "clean"),
    ("partition",),
)
DEFAULTS = {"seed": 0, "progress": True, "batch_size": None, "statistics": None, "groups": None}
# Trained by steps of so many positions: no prompts per forward pass.
TRAINED = ("fit_hvib", "fit_hvib_arrays")
# Words that once stood for what has another name now.
RETIRED = {
    "kinds": "perturbations",
    "dose": "target_kl",
    "n_blocks": "n_layers",
    "n_random": "n_controls",
}
# The same for fields of results.
RETIRED_FIELDS = {"control_effect": "controls"}
MAX_POSITIONAL = 8
MAX_CODE_LINES = 80


def public_functions() -> Iterator[tuple[str, typing.Any]]:
    """Every public function and every public method of a public class."""
    seen = set()
    for space in NAMESPACES:
        for name in space.__all__:
            value = getattr(space, name)
            if inspect.isfunction(value):
                members = [(name, value)]
            elif inspect.isclass(value):
                members = [
                    (f"{name}.{key}", getattr(value, key))
                    for key, member in vars(value).items()
                    if not key.startswith("_")
                    and (inspect.isfunction(member) or isinstance(member, classmethod))
                ]
            else:
                continue
            for label, function in members:
                function = inspect.unwrap(function)
                if id(function) not in seen and function.__module__.startswith("mspgt_lens"):
                    seen.add(id(function))
                    yield label, function


FUNCTIONS = dict(public_functions())


def parameters(function: typing.Any) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(function).parameters)
    return {name: p for name, p in found.items() if name not in ("self", "cls")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_words_are_those_of_the_vocabulary(name):
    retired = [
        f"{word}: say {RETIRED[word]}" for word in parameters(FUNCTIONS[name]) if word in RETIRED
    ]
    assert not retired


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_model_comes_first_then_prompts_then_the_partition(name):
    names = list(parameters(FUNCTIONS[name]))
    ranks = [next((i for i, group in enumerate(LEADING) if n in group), None) for n in names]
    leading = [rank for rank in ranks if rank is not None]
    assert leading == sorted(leading)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_settings_have_the_same_defaults_everywhere(name):
    for word, parameter in parameters(FUNCTIONS[name]).items():
        if name in TRAINED and word == "batch_size":
            continue
        if word in DEFAULTS and parameter.default is not inspect.Parameter.empty:
            assert parameter.default == DEFAULTS[word], word


# What these share with profile_layers decides the same numbers.
@pytest.mark.parametrize("name", ["profile_cache", "recording"])
def test_profiles_of_passes_that_others_run_take_the_same_settings(name):
    whole, own = parameters(FUNCTIONS["profile_layers"]), parameters(FUNCTIONS[name])
    run = {"model", "prompts", "batch_size", "control", "progress", "process_group", "checkpoint"}
    assert set(whole) - set(own) <= run
    for word in set(whole) - run:
        assert (own[word].default, own[word].annotation) == (
            whole[word].default,
            whole[word].annotation,
        ), word


@pytest.mark.parametrize("name", FUNCTIONS)
def test_site_is_a_number(name):
    hints = typing.get_type_hints(FUNCTIONS[name])
    for word in ("site", "block"):
        if word in hints:
            assert hints[word] in (int, int | None), (word, hints[word])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_seeds_and_flags_are_given_by_name(name):
    for word, parameter in parameters(FUNCTIONS[name]).items():
        if word in ("seed", "progress", "batch_size") and "tasks" not in FUNCTIONS[name].__module__:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, word


RESULTS = [getattr(ml.results, name) for name in ml.results.__all__ if name != "load_result"]


@pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)
def test_results_call_one_p_value_so_and_several_p_values(kind):
    hints = typing.get_type_hints(kind)
    assert hints.get("p_value", float) in (float, float | None)
    assert hints.get("p_values") not in (float, float | None)
    assert not [name for name in hints if name in RETIRED or name in RETIRED_FIELDS]


def functions_in(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_one_screen_of_purpose(path):
    for node in functions_in(path):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        assert lines <= MAX_CODE_LINES, f"{node.name} has {lines} lines of code"
        n_positional = len(node.args.posonlyargs) + len(node.args.args)
        assert n_positional <= MAX_POSITIONAL + 1, f"{node.name} takes {n_positional} arguments"
