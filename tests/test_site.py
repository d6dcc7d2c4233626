"""The site: its reference has every public name, its pages are where they are said to be."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
from operator import attrgetter
from pathlib import Path

import pytest
from declared import PROJECT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mspgt_lens as ml
from mspgt_lens.cli.command import _parser as parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def script(name):
    """A module of docs, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(name):
    """Package to version of a file of exact versions."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in pairs}


def directives():
    """What the reference's pages show."""
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [
        name
        for page in pages
        for name in re.findall(r"^::: mspgt_lens\.(\S+)$", page.read_text("utf-8"), flags=re.M)
    ]


def test_names_that_the_site_is_held_to_are_those_of_the_package():
    rooms = {n: getattr(ml, n) for n in ml.__all__ if type(getattr(ml, n)) is type(ml)}
    names = [name for name in ml.__all__ if name not in rooms]
    for room, module in rooms.items():
        own = getattr(module, "__all__", None) or [
            name
            for name, thing in vars(module).items()
            if getattr(thing, "__module__", "") == module.__name__ and not name.startswith("_")
        ]
        names += [f"{room}.{name}" for name in own]
    assert sorted(script("check_site").public_names()) == sorted(names)


def test_the_reference_shows_every_public_name_once():
    shown = directives()
    assert len(shown) == len(set(shown))
    rooms = {name for name in ml.__all__ if type(getattr(ml, name)) is type(ml)}
    # A room is shown whole, but for functions in a module of their own name.
    assert set(shown) >= {*ml.__all__}
    for room in rooms:
        module = getattr(ml, room)
        for name in getattr(module, "__all__", ()) if hasattr(module, "__path__") else ():
            if importlib.util.find_spec(f"{module.__name__}.{name}"):
                assert f"{room}.{name}.{name}" in shown


def test_what_the_site_lacks_is_found(tmp_path):
    check = script("check_site")
    entries = [f"mspgt_lens.{name} py:function 1 reference/#$ -" for name in check.public_names()]
    entries.remove("mspgt_lens.profile_layers py:function 1 reference/#$ -")
    body = check.zlib.compress("\n".join(entries).encode())
    (tmp_path / "objects.inv").write_bytes(b"#\n#\n#\n#\n" + body)
    assert check.missing(tmp_path) == ["profile_layers"]


def test_pages_of_the_navigation_exist():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    pages = re.findall(r"(\S+\.md)$", nav, flags=re.M)
    assert "reference/index.md" in pages
    assert [page for page in pages if not (DOCS / page).exists()] == []


def test_what_builds_the_site_is_pinned():
    pinned, shared = pins("constraints-docs.txt"), pins("constraints.txt")
    for line in PROJECT["optional-dependencies"]["docs"]:
        wanted = Requirement(line)
        assert pinned[canonicalize_name(wanted.name)] in wanted.specifier, line
    both = pinned.keys() & shared.keys()
    assert {name: pinned[name] for name in both} == {name: shared[name] for name in both}
    assert not any("mkdocs" in line for line in PROJECT["dependencies"])


@pytest.fixture(scope="module")
def errors():
    """The program that writes the page of errors, and all that the package's source says."""
    program = script("make_errors")
    return program, program.Source()


def spoken(source):
    return [(f, m) for f in source.functions.values() for m in f.messages if m.text]


def test_the_page_of_errors_is_current(errors):
    program, source = errors
    written = program.PAGE.read_text("utf-8").partition(program.MARK)[2]
    assert written == program.listing(source), "run: python docs/make_errors.py"


def test_every_error_of_the_source_is_on_the_page():
    page = " ".join((DOCS / "errors.md").read_text("utf-8").split())
    lacking = []
    for path in sorted((ROOT / "mspgt_lens").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            # The longest piece that is always the same.
            words = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            longest = max((w for w in words if isinstance(w, str)), key=len, default="")
            if " ".join(longest.split()) not in page:
                lacking.append(f"{path.name}:{node.lineno} {longest}")
    assert lacking == []


# What small samples, copies, rounding and the like are told by, as users get it.
@pytest.mark.parametrize(
    "note",
    [
        "if there is any, more groups of text are needed to see it",
        "samples repeat one of another group",
        "leave little power for changes of a few times the noise",
        "rounding in {dtype} alone gives",
        "blank texts hold no token and were left out",
        "so intervals leave out the choice of prompts",
    ],
)
def test_warnings_are_found_wherever_they_are_put_together(note, errors):
    assert {m.kind for _, m in spoken(errors[1]) if note in m.text} == {"warning"}


def test_what_is_shown_first_is_what_the_package_says(errors):
    program, source = errors
    texts = {" ".join(m.text.split()) for _, m in spoken(source)}
    by_hand = program.PAGE.read_text("utf-8").partition(program.MARK)[0]
    quoted = re.findall(r"^- `(.+)`$", by_hand, flags=re.M)
    assert len(quoted) > 8
    assert [text for text in quoted if text not in texts] == []


def test_messages_come_with_their_condition_and_the_calls_that_lead_there(errors, tmp_path):
    package = tmp_path / "toy"
    package.mkdir()
    (package / "__init__.py").write_text(
        '"""Toy."""\nfrom toy.outer import Thing, run\n\n__all__ = ["Thing", "run"]\n'
    )
    (package / "inner.py").write_text(
        '"""Inner things."""\n'
        "def check(n, names):\n"
        '    """Check.\n\n    Raises:\n        ValueError: If n is\n            low.\n    """\n'
        "    if n < 0:\n"
        "        raise ValueError(f\"n must be 0 or more, got {n:g} of {', '.join(names)}\")\n"
        "    raise wrong(2 * n)\n\n"
        "def wrong(k):\n"
        '    return TypeError("odd" + f" by {k}")\n\n'
        'WHY = {"a": "it is too small", "b": "it is too large"}\n\n'
        "def refuse(n):\n"
        "    raise KeyError(f\"no {n}: {WHY.get(n, 'it is gone')}\")\n\n"
        "def notes(n):\n"
        "    said = []\n"
        "    if n > 3:\n"
        '        said.append(f"{n} is many to bear")\n'
        "    return said\n"
    )
    (package / "outer.py").write_text(
        '"""Outer things."""\n'
        "from toy.inner import check, notes\n\n"
        "def run(n):\n    return _Hidden().step(n)\n\n"
        "class _Hidden:\n"
        "    def step(self, n):\n        check(n, [])\n\n"
        "class Thing:\n"
        "    def make(self, n):\n        return self.of(n, warnings=tuple(notes(n)))\n"
    )
    source = errors[0].Source(package)
    found = {
        (f.name, m.kind, m.text, m.when, tuple(source.reached_from(f))) for f, m in spoken(source)
    }
    assert found == {
        ("check", "ValueError", "n must be 0 or more, got {n} of {names, ...}", "n < 0", ("run",)),
        ("check", "TypeError", "odd by {k}", "", ("run",)),
        *(
            ("refuse", "KeyError", f"no {{n}}: it is {why}", "", ())
            for why in ("too small", "too large", "gone")
        ),
        ("notes", "warning", "{n} is many to bear", "n > 3", ("Thing.make",)),
    }
    assert source.functions["toy.inner", "check"].said == {"ValueError": "If n is low."}


def calls(text):
    """Every call of the package in a page's code, whether in a block or in a sentence."""
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    for code in [*blocks, *re.findall(r"`(ml\.[^`\n]+\))`", text)]:
        try:
            tree = ast.parse(code)
        except SyntaxError:  # What stands for anything, such as "for ...".
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.fullmatch(r"ml(\.\w+)+", ast.unparse(node.func)):
                yield ast.unparse(node.func)[3:], node


PAGES = [
    page
    for pattern in ("*.md", "docs/*.md")
    for page in sorted(ROOT.glob(pattern))
    if page.name != "CHANGELOG.md"
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_calls_on_pages_take_the_arguments_that_they_show(page):
    for name, call in calls(page.read_text("utf-8")):
        accepted = inspect.signature(attrgetter(name)(ml)).parameters
        variadic = {parameter.kind for parameter in accepted.values()}
        named = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
        if inspect.Parameter.VAR_KEYWORD not in variadic:
            assert named <= set(accepted), f"{name}: {named - set(accepted)}"
        by_place = [p for p in accepted.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if inspect.Parameter.VAR_POSITIONAL not in variadic:
            assert len(call.args) <= len(by_place), f"{name} takes {len(by_place)} by place"


TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))


def commands(text):
    """The commands of the package that a page shows, in a block or in a sentence."""
    lines = re.findall(r"^mspgt-lens (.+)$", text, flags=re.M)
    return [shlex.split(line, comments=True) for line in lines] + [
        shlex.split(line) for line in re.findall(r"`mspgt-lens ([^`]+)`", " ".join(text.split()))
    ]


# The page of errors names commands without what they take.
@pytest.mark.parametrize(
    "page",
    [page for page in (*PAGES, *TUTORIALS) if page.name != "errors.md"],
    ids=lambda page: page.name,
)
def test_commands_on_pages_are_taken_by_the_command_line(page):
    for arguments in commands(page.read_text("utf-8").replace("\n# ", "\n")):
        try:
            parser().parse_args([argument for argument in arguments if argument != "..."])
        except SystemExit as error:
            pytest.fail(f"mspgt-lens {' '.join(arguments)}: exit {error.code}")


def test_commands_are_found_in_blocks_and_in_sentences():
    page = "```sh\nmspgt-lens scales a --out b  # c\n```\nSee `mspgt-lens profile\nx`."
    assert commands(page) == [["scales", "a", "--out", "b"], ["profile", "x"]]


@pytest.mark.parametrize("page", [*PAGES, *TUTORIALS], ids=lambda page: page.name)
def test_links_to_files_of_the_repository_lead_to_files(page):
    text = page.read_text("utf-8")
    named = re.findall(r"github(?:\.com)?/mspgt-lens/mspgt_lens/blob/main/([^)\s]+)", text)
    beside = re.findall(r"\]\((?!\w+:)([^)#\s]+)", text) + re.findall(
        r'src(?:set)?="([^":]+)"', text
    )
    places = [ROOT / name for name in named] + [page.parent / name for name in beside]
    assert [str(place) for place in places if not place.exists()] == []


def test_calls_are_found_in_blocks_and_in_sentences():
    page = "`ml.a(1, x=2)` and\n```python\nb = ml.c.d(...)\n```\n"
    assert [name for name, _ in calls(page)] == ["c.d", "a"]
