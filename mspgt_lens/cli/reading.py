"""Users' files of texts and records: what form they have is seen by content, and said."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mspgt_lens.prompts import Prompt, PromptDataset, group_label

Form = Literal["line", "block", "records", "array"]
_WORDS: dict[Form, str] = {
    "line": "one per line",
    "block": "one per block between blank lines",
    "records": "one JSON record per line",
    "array": "from one JSON array",
}
_RECORD_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
_TABLE_SUFFIXES = (".csv", ".tsv")
_PEEK = 1 << 20
# What files begin with that hold no UTF-8, and what to do about it.
_MARKS = {
    b"\x1f\x8b": "is compressed: unpack it with gunzip",
    b"BZh": "is compressed: unpack it with bunzip2",
    b"\xfd7zXZ": "is compressed: unpack it with unxz",
    b"(\xb5/\xfd": "is compressed: unpack it with unzstd",
    b"PK\x03\x04": "is a ZIP archive (as office documents are): save its text as UTF-8",
    b"PAR1": "is a Parquet table: write its texts as .jsonl, or load it with datasets in Python "
    "and use PromptDataset.from_huggingface",
    b"\xff\xfe\x00\x00": "is UTF-32: save it as UTF-8, as by iconv -f UTF-32 -t UTF-8",
    b"\x00\x00\xfe\xff": "is UTF-32: save it as UTF-8, as by iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "is UTF-16: save it as UTF-8, as by iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8, as by iconv -f UTF-16 -t UTF-8",
}
_LONGEST_WRAPPED = 160
_SENTENCE_END = re.compile("[.!?:\u3002\uff01\uff1f\"')\\]\u2019\u201d]")
_SENTENCE_WITHIN = re.compile("[.!?][\"')\\]\u2019\u201d]* \\S|[\u3002\uff01\uff1f].")
# Blank lines per line of text, above which they are no accident.
_MANY, _MANY_AMONG_WHOLE = 0.1, 0.3


@dataclass(frozen=True)
class Documents:
    """The documents of one file, read from it anew at every iteration.

    Attributes:
        path: The file.
        form: How documents are told apart.
        number: How many there are.
    """

    path: Path
    form: Form
    number: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Mappings with ``text`` and ``group``."""
        return _documents(self.path, self.form)

    def __str__(self) -> str:
        return f"{self.number:,} document{'s' * (self.number != 1)}, {_WORDS[self.form]}"


def read_documents(path: Path) -> Documents:
    """See what a file of prompts holds, to its end.

    A suffix of JSON lines is believed. Otherwise a file of JSON records with a ``text`` field, or
    an array of such records or strings, is known by its content; all else is text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no UTF-8, a record is wrong, or there is no document.
    """
    _check_documents("--prompts", path)
    form = _form(path)
    number = sum(1 for _ in _documents(path, form))
    if not number:
        raise ValueError(f"--prompts: {path} holds no prompt")
    return Documents(path, form, number)


def first_windows(prompts: PromptDataset, n_documents: int) -> PromptDataset:
    """The first window of each of the first documents."""
    first: dict[Hashable, Prompt] = {}
    for prompt in prompts:
        if prompt.group not in first:
            if len(first) == n_documents:
                break
            first[prompt.group] = prompt
    return PromptDataset.from_tokens([p.tokens.tolist() for p in first.values()], groups=first)


def read_records(flag: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Objects of a file of JSON lines, or of one JSON array, each with where it stands.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no UTF-8, no JSON, or holds something else than objects.
    """
    _check_documents(flag, path)
    head = _head(flag, path).lstrip()
    values = _array(flag, path) if head.startswith("[") else _json_lines(flag, path)
    records = []
    for where, value in values:
        if not isinstance(value, dict):
            raise ValueError(f"{flag}: {where} must be a JSON object, got {type(value).__name__}")
        records.append((where, value))
    return records


def check_file(flag: str, path: Path) -> None:
    """See that there is such a file, and that it may be UTF-8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a folder or a pipe, or cannot be UTF-8.
    """
    if path.is_dir():
        raise ValueError(f"{flag}: {path} is a folder: give one file")
    if not path.exists():
        raise FileNotFoundError(f"{flag}: no file at {path}")
    if not path.is_file():
        raise ValueError(f"{flag}: {path} is no file that can be read twice: save it as one first")
    with path.open("rb") as file:
        head = file.read(_PEEK)
    for mark, said in _MARKS.items():
        if head.startswith(mark):
            raise ValueError(f"{flag}: {path} {said}")
    if b"\0" in head:
        raise ValueError(
            f"{flag}: {path} holds zero bytes, so it is no UTF-8 text; if it is UTF-16, save it as "
            "UTF-8, as by iconv -f UTF-16LE -t UTF-8"
        )


def _check_documents(flag: str, path: Path) -> None:
    if path.is_file() and path.suffix.lower() in _TABLE_SUFFIXES:
        raise ValueError(
            f"{flag}: {path} is a table: write its texts as .jsonl, one record with a 'text' field "
            "per line"
        )
    check_file(flag, path)


def read_lines(flag: str, path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file; a byte order mark is no part of the first."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{flag}: {path} is not UTF-8 ({error.reason}, byte "
            f"0x{error.object[error.start]:02x}): save it as UTF-8; if it is Latin-1, by "
            "iconv -f LATIN1 -t UTF-8"
        ) from error


def _head(flag: str, path: Path) -> str:
    size, taken = 0, []
    for line in read_lines(flag, path):
        taken.append(line)
        size += len(line)
        if size > _PEEK:
            break
    return "".join(taken)


def _form(path: Path) -> Form:
    suffix = path.suffix.lower()
    if suffix in _RECORD_SUFFIXES:
        return "records"
    head = _head("--prompts", path).strip()
    if head.startswith("[") and _is_array(path):
        return "array"
    if suffix == ".json" or _is_record(head.split("\n", 1)[0]):
        return "records"
    return "block" if _has_blocks(head) else "line"


def _is_array(path: Path) -> bool:
    """Whether the whole file is one JSON array, and no text that begins with a bracket."""
    if path.suffix.lower() == ".json":
        return True
    text = "".join(read_lines("--prompts", path))
    try:
        values = _loaded(text)
    except ValueError:
        return False
    return any(isinstance(value, dict | str) for value in values)


def _is_record(line: str) -> bool:
    try:
        value = _loaded(line)
    except ValueError:
        return False
    return isinstance(value, dict) and isinstance(value.get("text"), str)


def _has_blocks(text: str) -> bool:
    """Whether blank lines part documents, rather than stray between documents of one line.

    Lines that have another one right below tell: those of wrapped text are short and end anywhere
    in a sentence, so their blank lines part documents. Whole documents are long or end like a
    sentence, and blank lines must be many to part groups of them.
    """
    lines = [line.strip() for line in text.split("\n")]
    pairs = list(itertools.pairwise(lines))
    n_gaps = sum(bool(above) and not below for above, below in pairs)
    inner = [above for above, below in pairs if above and below]
    if not n_gaps or not inner:
        return False
    whole = [x for x in inner if len(x) > _LONGEST_WRAPPED or _SENTENCE_END.fullmatch(x[-1:])]
    share = n_gaps / (sum(map(bool, lines)) - 1)
    if len(whole) >= len(inner) / 2:
        return share > _MANY_AMONG_WHOLE
    return share > _MANY or any(_SENTENCE_WITHIN.search(line) for line in inner)


def _documents(path: Path, form: Form) -> Iterator[dict[str, Any]]:
    if form in ("records", "array"):
        read = _array if form == "array" else _json_lines
        for number, (where, value) in enumerate(read("--prompts", path)):
            yield _document(number, where, value)
        return
    number = 0
    for blank, lines in itertools.groupby(
        read_lines("--prompts", path), key=lambda line: not line.strip()
    ):
        if blank:
            continue
        for text in ["".join(lines)] if form == "block" else lines:
            yield {"text": text.strip(), "group": number}
            number += 1


def _document(number: int, where: str, value: Any) -> dict[str, Any]:
    record = {"text": value} if isinstance(value, str) else value
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        has = f"; it has {', '.join(map(str, record))}" if isinstance(record, dict) else ""
        raise ValueError(f"--prompts: {where} lacks a 'text' field that holds a string{has}")
    return {"text": record["text"], "group": record_group("--prompts", where, record, number)}


def record_group(flag: str, where: str, record: dict[str, Any], number: int) -> Any:
    """The group of one record; a group of its own where it names none.

    Raises:
        ValueError: If it is missing (null, NaN) or a list.
    """
    if "group" not in record:
        # Not a number alone: another record may name that as its group.
        return f"record {number}"
    try:
        return group_label(record["group"], number)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{flag}: {where} has the group {record['group']!r}; it must be a string or a number, "
            "or left out in every record"
        ) from error


def _json_lines(flag: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_lines(flag, path), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            value = _loaded(line)
        except ValueError as error:
            raise ValueError(
                f"{flag}: {where} is not JSON ({error}); one record per line is read, or one array "
                "of records"
            ) from error
        yield where, value


def _array(flag: str, path: Path) -> Iterator[tuple[str, Any]]:
    text = "".join(read_lines(flag, path))
    try:
        values = _loaded(text)
    except ValueError as error:
        raise ValueError(f"{flag}: {path} is not one JSON array ({error})") from error
    for number, value in enumerate(values, start=1):
        yield f"element {number} of {path}", value


def _loaded(text: str) -> Any:
    """What JSON says.

    Raises:
        ValueError: If it is none, or Python cannot hold it.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("brackets are nested too deep") from error
