"""Files that are damaged, disks that are full, folders that cannot be written: told by name."""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_profile import made_profile
from safetensors.numpy import save_file

import mspgt_lens as ml
from mspgt_lens.hvib.activations import reserve
from mspgt_lens.storage import read_result, write_result

ROOT = Path(ml.__file__).parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_profile(n_layers=6).save(tmp_path_factory.mktemp("saved") / "profile")


def test_a_profile_cut_at_every_64th_byte_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    whole, path = saved.read_bytes(), tmp_path / "cut.safetensors"
    assert len(whole) > 64 * 50
    for length in range(0, len(whole), 64):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"path: .*cut\.safetensors"):
            ml.load_result(path)


def test_a_profile_with_any_byte_altered_is_refused_or_read_as_it_was(
    saved: Path, tmp_path: Path
) -> None:
    """Where a byte says nothing (a space, the checksum's own name), the numbers are still right."""
    whole, path = saved.read_bytes(), tmp_path / "altered.safetensors"
    kept = ml.load_result(saved)
    rng = np.random.default_rng(0)
    header = struct.unpack("<Q", whole[:8])[0] + 8
    places = [*range(8), *rng.integers(0, header, 300), *rng.integers(header, len(whole), 100)]
    refused = []
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(altered)
        try:
            found = ml.load_result(path)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert found == kept
    assert all("altered.safetensors" in message for message in refused)
    assert len(refused) > 0.95 * len(places)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "null",
        '"text"',
        "[" * 100_000,
        "1" * 5000,
        "{",
        '{"kind": "LayerProfile"}',
        '{"kind": "LayerProfile", "format": 2}',
        '{"kind": "LayerProfile", "format": 2, "checksum": 7}',
        '{"kind": "os", "format": 2}',
        '{"kind": ["LayerProfile"], "format": 2}',
        '{"kind": "LensReading", "format": 2, "values": "x"}',
    ],
    ids=lambda text: text[:40],
)
def test_any_header_is_refused_by_name(header: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"x": np.zeros(3)}, path, metadata={"mspgt_lens": header})
    for load in (ml.load_result, ml.results.LayerProfile.load):
        with pytest.raises(ValueError, match=r"path: .*odd\.safetensors"):
            load(path)


def test_a_file_without_checksum_that_lacks_anything_is_refused_by_name(
    saved: Path, tmp_path: Path
) -> None:
    """As another version's, whose class has other fields."""
    header, arrays = read_result(saved, "LayerProfile")
    path, refused = tmp_path / "other.safetensors", []
    for name in header:
        less = {key: value for key, value in header.items() if key != name}
        save_file(arrays, path, metadata={"mspgt_lens": json.dumps(less)})
        try:
            ml.load_result(path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all("other.safetensors" in message for message in refused)
    for name in list(arrays)[:20]:
        less = {key: value for key, value in arrays.items() if key != name}
        save_file(less, path, metadata={"mspgt_lens": json.dumps(header)})
        with pytest.raises(ValueError, match=r"other\.safetensors.*measure again"):
            ml.load_result(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK\x03\x04", b"\x80\x04.", b"{}"])
def test_other_files_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    for load in (ml.load_result, ml.results.LayerProfile.load):
        with pytest.raises(ValueError, match=r"path: .*other\.bin"):
            load(path)


def test_paths_that_name_no_file_are_refused(tmp_path: Path) -> None:
    profile = made_profile(n_layers=6)
    for path in ("", "/"):
        with pytest.raises(ValueError, match="path must name a file"):
            profile.save(path)
        with pytest.raises(ValueError, match="path must name a file"):
            ml.results.LayerProfile.load(path)
    with pytest.raises(FileNotFoundError, match="no saved LayerProfile at"):
        ml.results.LayerProfile.load(tmp_path)
    folder = tmp_path / "kept.safetensors"
    folder.mkdir()
    with pytest.raises(ValueError, match="must be a file"):
        profile.save(folder)
    with pytest.raises(ValueError, match="must be a file"):
        ml.write_report(folder, profile)


FULL_DISK = """
import resource, sys
import numpy as np
sys.path.insert(0, {tests!r})
import mspgt_lens as ml
from made_profile import made_profile
old, new = made_profile(n_layers=6), made_profile(n_layers=60)
kept, page = old.save("kept"), ml.write_report("page.html", old)
before = kept.read_bytes(), page.read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (kept.stat().st_size // 2, resource.RLIM_INFINITY))
for write in (lambda: new.save("kept"), lambda: ml.write_report("page.html", new)):
    try:
        write()
    except OSError as error:
        print(error)
assert before == (kept.read_bytes(), page.read_bytes())
assert ml.load_result(kept) == old
"""


def test_a_full_disk_leaves_what_was_there_and_says_so(tmp_path: Path) -> None:
    """A limit on the size of files stands for it; no file is left half written."""
    code = FULL_DISK.format(tests=str(Path(__file__).parent))
    paths = os.pathsep.join([str(ROOT.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    for line, name in ((first, "kept.safetensors"), (second, "page.html")):
        assert line.startswith("path: ")
        for words in (name, "cannot be written", "File too large", "what was there before"):
            assert words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.safetensors", "page.html"]


def test_a_file_to_be_mapped_has_its_room_beforehand(tmp_path: Path) -> None:
    """Without it, a disk that is full ends the process without a word."""
    path = tmp_path / "rows"
    reserve(path, 1 << 16)
    assert path.stat().st_blocks * 512 >= 1 << 16
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, most))
    try:
        with pytest.raises(OSError, match="rows cannot be written, 65,536 bytes"):
            reserve(path, 1 << 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
    assert not path.exists()


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = made_profile(n_layers=6)
    kept = profile.save(tmp_path / "kept")
    (tmp_path / "file").write_text("no folder")
    for write in (profile.save, lambda path: ml.write_report(path, profile)):
        with pytest.raises(OSError, match=r"path: .*file.inside.* cannot be written"):
            write(tmp_path / "file" / "inside")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(PermissionError, match=r"kept\.safetensors cannot be written.*denied"):
        profile.save(kept)
    monkeypatch.undo()
    assert ml.load_result(kept) == profile


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "report.html"
    link.symlink_to(tmp_path / "elsewhere" / "page.html")
    ml.write_report(link, made_profile(n_layers=6))
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_what_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_result(tmp_path / "kept", "Kept", {}, {"x": np.zeros(3)})
    assert not list(tmp_path.iterdir())


# Whatever makes objects of what a file says, or runs it.
UNSAFE = {
    *("cloudpickle", "dill", "jsonpickle", "joblib", "marshal", "pickle", "shelve"),
    *("eval", "exec", "read_pickle", "to_pickle", "allow_pickle", "trust_remote_code"),
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
}
MODULES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_trusts_code_from_elsewhere(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        elif isinstance(node, ast.Attribute):
            # A model's switch to evaluation mode runs nothing.
            names = [node.attr] if node.attr != "eval" else []
            if isinstance(node.value, ast.Name) and node.value.id in ("torch", "np"):
                assert node.attr not in ("load", "save"), f"{path}:{node.lineno}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id]
        assert not UNSAFE & set(names), f"{path}:{node.lineno} {names}"


def test_reading_and_writing_unpickle_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    profile = ml.load_result(saved)
    assert ml.load_result(profile.save(tmp_path / "again")) == profile
