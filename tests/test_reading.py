"""Files of prompts and pairs: their form by content, and what cannot be read by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mspgt_lens.cli import main
from mspgt_lens.cli.reading import read_documents, read_records

ONE_LINE = [f"Document {i} is on one line. It ends there." for i in range(24)]
WRAPPED = [
    f"This is text number {i}, wrapped as an editor\nwraps it. Its sentences go on past the end\n"
    "of a line, as they do in books. The last one\nends here."
    for i in range(3)
]
RECORDS = [{"text": text} for text in ONE_LINE]
LINES = "\n".join(map(json.dumps, RECORDS))


def written(folder: Path, content: str | bytes, name: str = "texts.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def stray(texts: list[str], *at: int) -> str:
    lines = list(texts)
    for place in sorted(at, reverse=True):
        lines.insert(place, "")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "expected", "said"),
    [
        ("one\ntwo\n", ["one", "two"], "2 documents, one per line"),
        ("one\r\ntwo\r\n", ["one", "two"], "2 documents, one per line"),
        ("\n\none\ntwo\n\n", ["one", "two"], "2 documents, one per line"),
        ("one\n\ntwo\n\nthree", ["one", "two", "three"], "3 documents, one per line"),
        (
            "one\nstill one\n\n\ntwo\n",
            ["one\nstill one", "two"],
            "2 documents, one per block between blank lines",
        ),
        (stray(ONE_LINE, 12), ONE_LINE, "24 documents, one per line"),
        (stray(ONE_LINE, 3, 19), ONE_LINE, "24 documents, one per line"),
        (stray(ONE_LINE[:5], 2), ONE_LINE[:5], "5 documents, one per line"),
        (
            stray([f"w{i} " * 80 for i in range(8)], 4),
            [(f"w{i} " * 80).strip() for i in range(8)],
            "8 documents, one per line",
        ),
        (stray([f"title {i}" for i in range(24)], 7), [f"title {i}" for i in range(24)], "24 doc"),
        ("\n\n".join(WRAPPED), WRAPPED, "3 documents, one per block between blank lines"),
        (
            "\n\n".join(["\n".join(ONE_LINE[:2])] * 4),
            ["\n".join(ONE_LINE[:2])] * 4,
            "4 documents, one per block",
        ),
        ("just one", ["just one"], "1 document, one per line"),
        ("[Music] plays\n[Music] stops", ["[Music] plays", "[Music] stops"], "one per line"),
        ("[1]\n[2]", ["[1]", "[2]"], "one per line"),
        ("[1, 2]", ["[1, 2]"], "one per line"),
    ],
)
def test_documents_of_a_text(tmp_path: Path, content: str, expected: list[str], said: str) -> None:
    found = read_documents(written(tmp_path, content))
    documents = list(found)
    assert [one["text"] for one in documents] == expected
    assert len({one["group"] for one in documents}) == found.number == len(expected)
    assert said in str(found)


def test_long_wrapped_documents_are_blocks(tmp_path: Path) -> None:
    long = ["\n".join([WRAPPED[0].replace("ends here.", "goes on")] * 8) for _ in range(2)]
    found = read_documents(written(tmp_path, "\n\n".join(long)))
    assert [one["text"] for one in found] == long


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.txt", "a"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_json_lines_by_suffix_or_content(tmp_path: Path, name: str, mark: bytes) -> None:
    found = read_documents(written(tmp_path, mark + LINES.encode(), name))
    assert [one["text"] for one in found] == ONE_LINE
    assert str(found) == "24 documents, one JSON record per line"


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.txt", "a"])
@pytest.mark.parametrize("values", [RECORDS, ONE_LINE], ids=["records", "strings"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_arrays(tmp_path: Path, name: str, values: Any, indent: int | None) -> None:
    found = read_documents(written(tmp_path, json.dumps(values, indent=indent), name))
    assert [one["text"] for one in found] == ONE_LINE
    assert str(found) == "24 documents, from one JSON array"


def test_line_separators_inside_of_a_record_are_text(tmp_path: Path) -> None:
    record = {"text": "one\u2028still one\x85and on"}
    path = written(tmp_path, json.dumps(record, ensure_ascii=False), "a.jsonl")
    assert next(iter(read_documents(path)))["text"] == record["text"]
    assert read_records("--pairs", path) == [(f"line 1 of {path}", record)]


def test_a_record_without_a_group_is_in_no_other_s(tmp_path: Path) -> None:
    content = '{"text": "a"}\n{"text": "b", "group": 0}\n{"text": "c", "group": 0}'
    groups = [one["group"] for one in read_documents(written(tmp_path, content, "a.jsonl"))]
    assert groups[1] == groups[2] == 0
    assert groups[0] != 0


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (LINES.encode("utf-16"), "a.jsonl", "is UTF-16: save it as UTF-8"),
        (LINES.encode("utf-16-be"), "a.jsonl", "zero bytes.*UTF-16"),
        ("".join(ONE_LINE).encode("utf-32"), "a.txt", "is UTF-32: save it as UTF-8"),
        ("caf\u00e9 au lait".encode("latin-1"), "a.txt", "not UTF-8.*0xe9.*LATIN1"),
        (b"fine\n" * 400_000 + b"caf\xe9", "a.txt", "not UTF-8.*0xe9.*LATIN1"),
        (gzip.compress(LINES.encode(), mtime=0), "a.jsonl", "is compressed: unpack it with gunzip"),
        (b"PAR1....", "a.parquet", "Parquet table.*from_huggingface"),
        ("text,group\nhello,1", "a.csv", "is a table: write its texts as .jsonl"),
        ("", "a.txt", "holds no prompt"),
        ("\ufeff \n\n", "a.txt", "holds no prompt"),
        ("[]", "a.json", "holds no prompt"),
        ('{"text": "a"}\nnot json', "a.jsonl", "line 2 of .* is not JSON"),
        ('{"words": "a"}', "a.json", "line 1 of .* lacks a 'text' field.*it has words"),
        ('[{"text": "a"}, {"text": 4}]', "a.json", "element 2 of .* lacks a 'text' field"),
        ('[{"text": "a"},', "a.json", "is not one JSON array"),
        ('{"text": "a", "group": NaN}', "a.jsonl", "line 1 of .* has the group nan"),
        ('{"text": "a"}\n{"text": "b", "group": null}', "a.txt", "line 2 of .* has the group None"),
        ('{"text": "a", "group": [1]}', "a.jsonl", r"line 1 of .* has the group \[1\]"),
    ],
)
def test_what_cannot_be_read_names_the_file_and_the_remedy(
    tmp_path: Path, content: str | bytes, name: str, message: str
) -> None:
    path = written(tmp_path, content, name)
    with pytest.raises(ValueError, match=rf"(?s)--prompts: .*{name}.*") as raised:
        read_documents(path)
    assert raised.match(f"(?s){message}")


def test_folders_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        read_documents(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_documents(tmp_path / "none.txt")


PAIR = {"clean": "w4", "corrupted": "w5", "answer": "w7", "foil": "w8"}


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_pairs_are_read_from_lines_and_arrays(tmp_path: Path, as_array: bool, mark: bytes) -> None:
    content = json.dumps([PAIR] * 3) if as_array else "\n".join([json.dumps(PAIR)] * 3)
    path = written(tmp_path, mark + content.encode(), "pairs.json")
    assert [record for _, record in read_records("--pairs", path)] == [PAIR] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(PAIR).encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b'"text"', "must be a JSON object, got str"),
        (json.dumps(PAIR | {"group": None}).encode(), "line 1 of .*group None"),
        (gzip.compress(b"x", mtime=0), "is compressed"),
    ],
)
def test_bad_pairs_name_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = written(tmp_path, content, "pairs.jsonl")
    assert main(["patch", "tiny", "--pairs", str(path)]) == 2
    shown = capsys.readouterr().err
    assert str(path) in shown
    assert message.split(".*")[-1] in shown
