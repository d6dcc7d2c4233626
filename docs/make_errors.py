"""Write every error and warning of the package into docs/errors.md, below what is written by hand.

    python docs/make_errors.py

Reads the source only: words and conditions are the code's, reasons the docstrings'. The test of the
page fails until this was run after a message has changed.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from source_messages import WARNING, Function, Source

PAGE = Path(__file__).parent / "errors.md"
MARK = "<!-- below: python docs/make_errors.py -->\n"
_MOST_CALLS = 4
_CLI = "mspgt_lens.cli"


def page() -> str:
    """The whole page, as it has to be."""
    return PAGE.read_text("utf-8").partition(MARK)[0] + MARK + listing(Source())


def listing(source: Source) -> str:
    """All messages, module by module; those of the command come last."""
    speaking = [
        function
        for function in source.functions.values()
        if any(message.text for message in function.messages)
    ]
    speaking.sort(key=lambda function: function.module.startswith(_CLI))
    lines: list[str] = []
    for module, functions in groupby(speaking, key=lambda function: function.module):
        name = module.partition(".")[2] or module
        lines += ["", f"### `{name}`", "", source.doc(module)]
        for function in functions:
            lines += ["", *_entry(source, function)]
    return "\n".join([*lines, ""])


def _entry(source: Source, function: Function) -> list[str]:
    """A function, what its docstring says of its errors, and its messages."""
    head = f"**`{function.name}`**"
    calls = source.reached_from(function)
    if function.module.startswith(_CLI):
        head += ", the `mspgt-lens` command"
    elif calls and calls != [function.name]:
        shown = ", ".join(f"`{call}`" for call in calls[:_MOST_CALLS])
        more = " and more" if len(calls) > _MOST_CALLS else ""
        head += f", reached from {shown}{more}"
    kinds = {message.kind for message in function.messages}
    told = [f"`{kind}`: {why}" for kind, why in function.said.items() if kind in kinds]
    said: dict[tuple[str, str], list[str]] = {}
    for message in function.messages:
        if message.text:
            conditions = said.setdefault((message.kind, " ".join(message.text.split())), [])
            conditions += [message.when] if message.when else []
    return [
        head,
        "",
        *(["Its docstring: " + " ".join(told), ""] if told else []),
        *(_item(kind, text, whens) for (kind, text), whens in said.items()),
    ]


def _item(kind: str, text: str, whens: list[str]) -> str:
    named = "warning" if kind == WARNING else f"`{kind}`"
    when = " or ".join(f"`{one}`" for one in dict.fromkeys(whens))
    return f"- {named}: {_code(text)}" + (f"<br>when {when}" if when else "")


def _code(text: str) -> str:
    """As code, whatever ticks it holds."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
