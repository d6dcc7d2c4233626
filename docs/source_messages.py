"""What the package's source says of its errors and warnings: read, never imported or run."""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mspgt_lens"
WARNING = "warning"
# Methods that many things have: a call by such a name leads nowhere in particular.
_MOST_OWNERS = 3
_ELSEWHERE = {name for kind in (str, list, dict, set, Path) for name in dir(kind)}
# Those of tensors, tables, models and figures.
_ELSEWHERE |= {"plot", "run", "save", "load", "to", "sum", "mean", "hook", "logits", "values"}
_LONGEST_CONDITION = 110
_LONGEST_SUM = 28


@dataclass(frozen=True)
class Message:
    """One thing that the package may say.

    Attributes:
        kind: The exception's name, or ``"warning"``.
        text: Its words, with ``{placeholders}``.
        when: The condition under which it is said, as code; empty where there is none nearby.
        line: Where in its module.
    """

    kind: str
    text: str
    when: str
    line: int


@dataclass
class Function:
    """A function or method of the package, or what a module does when it is imported."""

    module: str
    name: str
    node: ast.FunctionDef
    owner: str = ""
    messages: list[Message] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        """Module and qualified name."""
        return self.module, self.name

    @property
    def said(self) -> dict[str, str]:
        """What the docstring's ``Raises:`` says of each exception."""
        lines = (ast.get_docstring(self.node) or "").partition("\nRaises:\n")[2].splitlines()
        found: dict[str, str] = {}
        last = ""
        for line in lines:
            if not line.startswith("    "):
                break
            head, colon, rest = line.strip().partition(": ")
            if line[4] != " " and colon:
                last, found[head] = head, rest
            elif last:
                found[last] += f" {line.strip()}"
        return found


class Source:
    """The package's modules, functions, and who calls whom."""

    def __init__(self, package: Path = PACKAGE) -> None:
        self.package = package
        self.trees: dict[str, ast.Module] = {}
        self.functions: dict[tuple[str, str], Function] = {}
        self.imports: dict[str, dict[str, tuple[str, str]]] = {}
        self.classes: dict[tuple[str, str], ast.ClassDef] = {}
        self.tables: dict[tuple[str, str], ast.expr] = {}
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            module = ".".join(part for part in parts if part != "__init__")
            self.trees[module] = ast.parse(path.read_text("utf-8"))
            self._read(module)
        for function in self.functions.values():
            reading = _Reading(self, function)
            function.messages += reading.errors()
            for speaker, message in reading.warnings():
                speaker.messages.append(message)
        for function in self.functions.values():
            by_line = sorted(function.messages, key=lambda message: message.line)
            function.messages = list(dict.fromkeys(by_line))

    def _read(self, module: str) -> None:
        tree = self.trees[module]
        self.imports[module] = {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                self.functions[module, node.name] = Function(module, node.name, node)
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                self.tables[module, ast.unparse(target)] = node.value
            if isinstance(node, ast.ClassDef):
                self.classes[module, node.name] = node
                for member in node.body:
                    if isinstance(member, ast.FunctionDef):
                        name = f"{node.name}.{member.name}"
                        self.functions[module, name] = Function(module, name, member, node.name)

    def resolve(self, module: str, name: str) -> tuple[str, str] | None:
        """Where a name that a module uses is defined, if the package defines it."""
        seen = set()
        while (module, name) not in seen:
            seen.add((module, name))
            if any((module, name) in kind for kind in (self.functions, self.classes, self.tables)):
                return module, name
            if name not in self.imports.get(module, {}):
                return None
            module, name = self.imports[module][name]
        return None

    @cached_property
    def public(self) -> dict[tuple[str, str], str]:
        """Key of every public function and method to the name that one calls it by."""
        found: dict[tuple[str, str], str] = {}
        top = self.package.name
        for module, before in self._rooms(top):
            for name in self._offered(module):
                place = self.resolve(module, name)
                if place is None:
                    continue
                # The shortest name comes first: rooms follow the top level.
                found.setdefault(place, f"{before}{name}")
                if place in self.classes:
                    for key in self.functions:
                        owner, _, method = key[1].partition(".")
                        shown = not method.startswith("_")
                        if (key[0], owner) == place and method and shown:
                            found.setdefault(key, f"{before}{name}.{method}")
        return found

    def _rooms(self, top: str) -> Iterator[tuple[str, str]]:
        yield top, ""
        for name in self._offered(top):
            module = ".".join(self.imports[top].get(name, ("", "")))
            if module in self.trees:
                yield module, f"{name}."

    def _offered(self, module: str) -> list[str]:
        for node in self.trees[module].body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return list(ast.literal_eval(node.value))
        return [name for at, name in self.functions if at == module and name[0].islower()]

    @cached_property
    def callers(self) -> dict[tuple[str, str], set[tuple[str, str]]]:
        """What is defined, to whatever names it: functions, classes, and tables of functions."""
        found: dict[tuple[str, str], set[tuple[str, str]]] = {}
        for key, function in self.functions.items():
            for target in _Names(self, function.module, function.node, function.owner).found():
                found.setdefault(target, set()).add(key)
        for key, node in self.tables.items():
            for target in _Names(self, key[0], node).found():
                found.setdefault(target, set()).add(key)
        for module, name in self.classes:
            for method in ("__init__", "__post_init__"):
                if (made := (module, f"{name}.{method}")) in self.functions:
                    found.setdefault(made, set()).add((module, name))
        return found

    def reached_from(self, function: Function) -> list[str]:
        """Public calls that may lead to a function, the nearest first."""
        waiting, seen, names = deque([function.key]), {function.key}, []
        while waiting:
            key = waiting.popleft()
            if key in self.public:
                names.append(self.public[key])
            for caller in sorted(self.callers.get(key, ())):
                if caller not in seen:
                    seen.add(caller)
                    waiting.append(caller)
        return list(dict.fromkeys(names))

    @cached_property
    def owners(self) -> dict[str, list[tuple[str, str]]]:
        """A method's name to the methods that bear it."""
        found: dict[str, list[tuple[str, str]]] = {}
        for key in self.functions:
            if "." in key[1]:
                found.setdefault(key[1].partition(".")[2], []).append(key)
        return found

    def methods(self, kind: tuple[str, str], name: str) -> Iterator[tuple[str, str]]:
        """A class's method, or the one that it takes over from another class."""
        if (kind[0], f"{kind[1]}.{name}") in self.functions:
            yield kind[0], f"{kind[1]}.{name}"
            return
        for base in self.classes[kind].bases if kind in self.classes else ():
            place = self.resolve(kind[0], ast.unparse(base).partition("[")[0])
            if place is not None:
                yield from self.methods(place, name)

    def doc(self, module: str) -> str:
        """The first line of a module's docstring."""
        return (ast.get_docstring(self.trees[module]) or "").partition("\n")[0]


class _Names:
    """What of the package a piece of code names."""

    def __init__(self, source: Source, module: str, node: ast.AST, owner: str = "") -> None:
        self.source, self.module, self.node, self.owner = source, module, node, owner
        self.arguments: dict[str, ast.expr | None] = {}
        self.values: dict[str, ast.expr] = {}
        for inner in ast.walk(node):
            if isinstance(inner, ast.arg):
                self.arguments[inner.arg] = inner.annotation
            if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                self.values.setdefault(inner.targets[0].id, inner.value)

    def found(self) -> Iterator[tuple[str, str]]:
        for node in ast.walk(self.node):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                place = self.source.resolve(self.module, node.id)
                if place is not None:
                    yield place
            if isinstance(node, ast.Attribute):
                yield from self._attribute(node)

    def _attribute(self, node: ast.Attribute) -> Iterator[tuple[str, str]]:
        if isinstance(node.value, ast.Name):
            at = ".".join(self.source.imports[self.module].get(node.value.id, ("", "")))
            if at in self.source.trees:
                place = self.source.resolve(at, node.attr)
                yield from [] if place is None else [place]
                return
        kind = self._kind(node.value)
        if kind is not None:
            yield from self.source.methods(kind, node.attr)
            return
        owners = self.source.owners.get(node.attr, ())
        if len(owners) <= _MOST_OWNERS and node.attr not in _ELSEWHERE:
            yield from owners

    def _kind(self, made: ast.expr) -> tuple[str, str] | None:
        """The package's class of a value, where the code around says it."""
        if isinstance(made, ast.Call):
            place = self._place(made.func)
            if place in self.source.functions:
                return self._annotated(self.source.functions[place].node.returns, place[0])
            return place if place in self.source.classes else None
        if isinstance(made, ast.Name):
            if made.id in ("self", "cls"):
                return (self.module, self.owner) if self.owner else None
            if made.id in self.arguments:
                return self._annotated(self.arguments[made.id], self.module)
            # Once followed, a name is not followed again: it may be put into itself.
            value = self.values.pop(made.id, None)
            if value is not None:
                kind = self._kind(value)
                self.values[made.id] = value
                return kind
        return None

    def _place(self, made: ast.expr) -> tuple[str, str] | None:
        if isinstance(made, ast.Name):
            return self.source.resolve(self.module, made.id)
        if isinstance(made, ast.Attribute):
            kind = self._kind(made.value)
            return next(iter(self.source.methods(kind, made.attr)), None) if kind else None
        return None

    def _annotated(self, made: ast.expr | None, module: str) -> tuple[str, str] | None:
        for node in ast.walk(made) if made is not None else ():
            if isinstance(node, ast.Name):
                place = self.source.resolve(module, node.id)
                if place in self.source.classes:
                    return place
        return None


class _Reading:
    """What one function says, and where its warnings come from."""

    def __init__(self, source: Source, function: Function) -> None:
        self.source, self.function = source, function
        self.nodes = list(ast.walk(function.node))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def errors(self) -> Iterator[Message]:
        """Everything that it raises, but what it only lets pass."""
        for node in self.nodes:
            if isinstance(node, ast.Raise) and node.exc is not None:
                kind, texts = self._error(node.exc)
                for text in texts:
                    yield Message(kind, text, self._when(node), node.lineno)

    def warnings(self) -> Iterator[tuple[Function, Message]]:
        """Everything that it warns of, with the function that has the words."""
        for node in self.nodes:
            if isinstance(node, ast.Call) and _called(node) == "tell" and len(node.args) == 1:
                yield from self._notes(node.args[0], set())
            if isinstance(node, ast.keyword) and node.arg == "warnings":
                yield from self._notes(node.value, set())

    def _error(self, made: ast.expr) -> tuple[str, list[str]]:
        """The exception's name and its words; from the helper that makes it, if one does."""
        if not isinstance(made, ast.Call):
            return ast.unparse(made), [""]
        helper = self._called_function(made)
        if helper is None:
            return _called(made), [t for word in made.args[:1] for t in self._texts(word)] or [""]
        within = _Reading(self.source, helper)
        returned = [n.value for n in within.nodes if isinstance(n, ast.Return) and n.value]
        kind, texts = within._error(returned[-1])
        # What the call puts into the helper's words.
        names = [argument.arg for argument in helper.node.args.args if argument.arg != "self"]
        for name, given in zip(names, made.args, strict=False):
            if isinstance(given, ast.Constant | ast.JoinedStr) and _is_text(given):
                put = self._texts(given)[0]
                texts = [text.replace(f"{{{name}}}", put) for text in texts]
        return kind, texts

    def _notes(self, made: ast.AST, seen: set[int]) -> Iterator[tuple[Function, Message]]:
        """The texts that an expression may hold, through names, lists and helpers."""
        if id(made) in seen:
            return
        seen.add(id(made))
        if isinstance(made, ast.Constant | ast.JoinedStr | ast.BinOp) and _is_text(made):
            for text in self._texts(made):
                yield self.function, Message(WARNING, text, self._when(made), made.lineno)
        elif isinstance(made, ast.Name):
            for value in self._values_of(made):
                yield from self._notes(value, seen)
        elif isinstance(made, ast.Call) and (helper := self._called_function(made)) is not None:
            within = _Reading(self.source, helper)
            for node in within.nodes:
                if isinstance(node, ast.Return | ast.Yield | ast.YieldFrom) and node.value:
                    yield from within._notes(node.value, seen)
        elif isinstance(made, ast.IfExp):
            yield from self._notes(made.body, seen)
            yield from self._notes(made.orelse, seen)
        elif not isinstance(made, ast.Attribute | ast.Constant):
            for part in ast.iter_child_nodes(made):
                yield from self._notes(part, seen)

    def _values_of(self, used: ast.Name) -> list[ast.expr]:
        """What a name may hold where it is used: a text, or what was put into a list."""
        name, values = used.id, []
        for node in self.nodes:
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(ast.unparse(target) == name for target in targets):
                    values.append(node.value)
            if isinstance(node, ast.For) and ast.unparse(node.target) == name:
                values.append(node.iter)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                f"{name}.append",
                f"{name}.extend",
            ):
                values.append(node.args[0])
        # Of texts under one name, the last before the use.
        texts = [v for v in values if isinstance(v, ast.Constant | ast.JoinedStr) and _is_text(v)]
        before = [value for value in texts if value.lineno < used.lineno]
        return before[-1:] if len(texts) == len(values) else values

    def _part(self, part: ast.expr) -> list[str]:
        """A part of an f-string: words, or what a name puts into it."""
        if isinstance(part, ast.FormattedValue):
            put = part.value
            kept = self._kept_in_table(put)
            if kept or isinstance(put, ast.Name) or (isinstance(put, ast.IfExp) and _is_text(put)):
                return kept or self._texts(put)
            return [_placeholder(put)]
        return self._texts(part)

    def _kept_in_table(self, made: ast.expr) -> list[str]:
        """The texts of a table of the module, where one of them is chosen."""
        chosen = made.value if isinstance(made, ast.Subscript) else None
        if isinstance(made, ast.Call) and isinstance(made.func, ast.Attribute):
            chosen = made.func.value if made.func.attr == "get" else None
        if not isinstance(chosen, ast.Name):
            return []
        place = self.source.resolve(self.function.module, chosen.id)
        table = self.source.tables.get(place) if place is not None else None
        if not isinstance(table, ast.Dict) or not all(map(_is_text, table.values)):
            return []
        rest = made.args[1:] if isinstance(made, ast.Call) else []
        return [text for value in [*table.values, *rest] for text in self._texts(value)]

    def _texts(self, made: ast.expr) -> list[str]:
        """A text with its placeholders; several where a condition decides between them."""
        if isinstance(made, ast.Constant):
            return [str(made.value)]
        if isinstance(made, ast.JoinedStr):
            parts = [self._part(part) for part in made.values]
            return ["".join(chosen) for chosen in product(*parts)]
        if isinstance(made, ast.BinOp) and isinstance(made.op, ast.Add):
            return [a + b for a in self._texts(made.left) for b in self._texts(made.right)]
        if isinstance(made, ast.BinOp):
            return self._texts(made.left)
        if isinstance(made, ast.IfExp):
            return [*self._texts(made.body), *self._texts(made.orelse)]
        if isinstance(made, ast.Call) and (helper := self._called_function(made)) is not None:
            within = _Reading(self.source, helper)
            returned = [n.value for n in within.nodes if isinstance(n, ast.Return) and n.value]
            return [text for value in returned for text in within._texts(value)]
        if isinstance(made, ast.Name):
            values = [v for v in self._values_of(made) if _is_text(v)]
            return [t for value in values for t in self._texts(value)] or [_placeholder(made)]
        return [_placeholder(made)]

    def _called_function(self, call: ast.Call) -> Function | None:
        """The package's function that a call names."""
        if isinstance(call.func, ast.Name):
            place = self.source.resolve(self.function.module, call.func.id)
        elif isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "self":
            place = (self.function.module, f"{self.function.owner}.{call.func.attr}")
        else:
            return None
        return self.source.functions.get(place) if place is not None else None

    def _when(self, node: ast.AST) -> str:
        """The nearest condition around a node, as code."""
        while (above := self.parents.get(node)) is not None:
            if isinstance(above, ast.If | ast.IfExp):
                body = above.body if isinstance(above.body, list) else [above.body]
                if all(isinstance(n, ast.Name | ast.expr_context) for n in ast.walk(above.test)):
                    return ""  # A name alone says nothing to who reads no code.
                test = ast.unparse(above.test)
                told = test if node in body else f"not ({test})"
                return told if len(told) <= _LONGEST_CONDITION else ""
            if isinstance(above, ast.ExceptHandler) and above.type is not None:
                return f"except {ast.unparse(above.type)}"
            node = above
        return ""


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _is_text(made: ast.AST) -> bool:
    """Whether an expression is words: not a name, a key or a number."""
    texts = [n for n in ast.walk(made) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return any(" " in str(n.value).strip() for n in texts)


def _placeholder(made: ast.AST) -> str:
    """What stands in a message's place, in braces: the nearest name that says what it is."""
    return f"{{{_word(made)}}}"


def _word(made: ast.AST) -> str:
    if isinstance(made, ast.Name):
        return made.id.strip("_").lower()
    if isinstance(made, ast.Attribute):
        return "type" if made.attr == "__name__" else made.attr.strip("_")
    if isinstance(made, ast.Subscript):
        return _word(made.value)
    if isinstance(made, ast.Call):
        if _called(made) == "len":
            return "number"
        if _called(made) == "join":
            return f"{_word(made.args[0])}, ..."
        if isinstance(made.func, ast.Attribute) and not made.args:
            return _word(made.func.value)
        return _word(made.args[-1]) if made.args else _called(made)
    if isinstance(made, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return _word(made.generators[0].iter)
    if isinstance(made, ast.BinOp):
        whole = ast.unparse(made)
        return whole if len(whole) <= _LONGEST_SUM and "'" not in whole else _word(made.left)
    if isinstance(made, ast.Starred | ast.UnaryOp):
        return _word(next(ast.iter_child_nodes(made)))
    return "..."
