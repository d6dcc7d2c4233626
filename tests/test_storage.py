"""Results on disk: what is read is what was written, whatever its shape and order in memory."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mspgt_lens.contract import Result
from mspgt_lens.estimates import Estimate
from mspgt_lens.partition import Boundary
from mspgt_lens.storage import decode, read_result, saved_kind, write_result


@dataclass(frozen=True, eq=False)
class Kept(Result):
    name: str
    table: np.ndarray
    segments: Mapping[str, tuple[int, ...]]
    estimate: Estimate
    pairs: tuple[tuple[int, int], ...] = ()
    missing: np.ndarray | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def heading(self):
        return "Kept"

    def to_dataframe(self):
        raise NotImplementedError


def kept(table):
    return Kept(
        "one",
        table,
        {"local": (0, 1)},
        Estimate(1.0, 0.5, 2.0, "nats", "Made up.", warnings=("few",)),
        ((1, 2), (3, 4)),
        settings={"levels": [1, 2]},
    )


@pytest.mark.parametrize(
    "table",
    [
        np.arange(24.0).reshape(4, 6).T,
        np.arange(24.0).reshape(2, 3, 4)[:, ::2, ::-1],
        np.array(3.0),
        np.zeros((0, 3)),
    ],
    ids=["transposed", "strided", "a number", "empty"],
)
def test_what_is_read_is_what_was_written(table, tmp_path):
    result = kept(table)
    found = Kept.load(result.save(tmp_path / "kept"))
    assert found == result
    assert found.table.shape == table.shape
    assert found.segments == {"local": (0, 1)}
    assert found.pairs == ((1, 2), (3, 4))
    assert found.settings["levels"] == [1, 2]


def test_results_are_frozen_and_compared_by_value():
    result, other = kept(np.ones(3)), kept(np.ones(3))
    assert result == other
    assert result != kept(np.zeros(3))
    assert result != "one"
    with pytest.raises(ValueError, match="read-only"):
        result.table[0] = 2
    with pytest.raises(TypeError, match="assignment"):
        result.segments["global"] = (1,)
    given = np.ones(3)
    assert kept(given).table is not given


def test_what_is_not_finite_is_refused_unless_it_stands_for_undefined():
    with pytest.raises(ValueError, match="Kept: table must be finite"):
        kept(np.array([1.0, np.nan]))

    class Undefined(Kept):
        nan_is_undefined = True

    result = Undefined("one", np.array([np.nan]), {}, Estimate(0.0, 0.0, 0.0, "nats", ""))
    assert np.isnan(result.table).all()


def test_other_files_are_refused(tmp_path):
    path = write_result(tmp_path / "other", "Other", {}, {"x": np.zeros(2)})
    with pytest.raises(ValueError, match="must hold a Kept of format 2, got Other"):
        Kept.load(path)
    with pytest.raises(FileNotFoundError, match="no saved Kept at"):
        Kept.load(tmp_path / "nowhere")
    (tmp_path / "text.safetensors").write_text("no such thing")
    with pytest.raises(ValueError, match="is not a saved Kept"):
        read_result(tmp_path / "text", "Kept")


def test_a_file_that_is_cut_short_anywhere_is_refused_by_name(tmp_path):
    path = kept(np.arange(50.0)).save(tmp_path / "kept")
    whole = path.read_bytes()
    for length in (0, 4, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"path: .*kept\.safetensors is not a saved Kept"):
            Kept.load(path)


def test_a_file_that_was_altered_is_refused_by_name(tmp_path):
    path = kept(np.arange(50.0)).save(tmp_path / "kept")
    whole = path.read_bytes()
    assert whole.count(b"Made up.") == 1
    in_words = whole.index(b"Made up.")
    # Another number, and another word in the header, which stays JSON.
    for place in (len(whole) - 3, in_words):
        altered = bytearray(whole)
        altered[place] ^= 1
        path.write_bytes(altered)
        for read in (Kept.load, saved_kind):
            with pytest.raises(ValueError, match=r"kept\.safetensors is not as it was saved"):
                read(path)


def test_equal_results_make_equal_files(tmp_path):
    files = {kept(np.arange(50.0)).save(tmp_path / "kept").read_bytes() for _ in range(20)}
    assert len(files) == 1


def test_files_of_before_there_were_checksums_load(tmp_path):
    path = kept(np.arange(50.0)).save(tmp_path / "kept")
    with safe_open(path, framework="np") as opened:
        header = opened.metadata()["mspgt_lens"]
    told = json.loads(header)
    assert told.pop("checksum")
    save_file(load_file(path), path, metadata={"mspgt_lens": json.dumps(told)})
    assert Kept.load(path) == kept(np.arange(50.0))


def test_boundaries_of_before_they_had_widths_load():
    saved = [3, "jump", ["a", "b"], 20.0, 0.01]
    assert decode(Boundary, saved, {}) == Boundary(3, "jump", ("a", "b"), 20.0, 0.01, width=1)
    assert decode(Boundary, [*saved, 2], {}).width == 2
    with pytest.raises(ValueError, match="longer"):
        decode(Boundary, [*saved, 2, "new"], {})


def test_what_is_saved_has_reached_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    flush, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("flush"), flush(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("name"), replace(*paths)))
    kept(np.ones(3)).save(tmp_path / "kept")
    assert done[:2] == ["flush", "name"]
