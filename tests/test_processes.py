"""Several processes give what one gives, and stop together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from profiles import RAGGED, SMALL, assert_same, prompts_of, run
from sharing import (
    SETTINGS,
    analyze,
    assert_same_table,
    counted,
    die,
    fail,
    in_processes,
    interventions,
    leave,
    share,
    unread,
)
from tiny import random_tokens, tiny_model

import mspgt_lens as ml
from mspgt_lens.processes import Processes
from mspgt_lens.profile import run as run_module
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.targets import DEFAULT_BANDS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*more groups of text are needed:UserWarning"),
]


# The defaults, instead of quick ones.
WHOLE: dict[str, Any] = {"bands": DEFAULT_BANDS, "n_folds": 5}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Profiles that processes made together."""
    folder = tmp_path_factory.mktemp("shared")
    assert in_processes(share, 4, folder) == [0, 0, 0, 0]
    return folder


@pytest.mark.parametrize("name", ["four", "two", "empty", "ragged", "projected"])
def test_processes_together_give_what_one_gives(
    shared: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "projected":
        monkeypatch.setattr(run_module, "MAX_WIDTH", 8)
    changes: dict[str, Any] = {"empty": {"batch_size": 24}, "ragged": {"control": "random_weights"}}
    prompts = prompts_of(RAGGED) if name == "ragged" else None
    one = run(tiny_model("llama", **SMALL), prompts, **SETTINGS | changes.get(name, {}))
    files = sorted(shared.glob(f"{name}-*"))
    assert len(files) == (2 if name == "two" else 4)
    for file in files:
        several = LayerProfile.load(file)
        assert_same(several, one, rtol=1e-6, atol=1e-9)
        assert several.settings == one.settings
        assert (several.n_tokens, several.n_groups) == (one.n_tokens, one.n_groups)
        assert several.fold_weights == one.fold_weights
        # All end with the same, to the bit.
        assert several == LayerProfile.load(files[0])


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Any], dict[str, int]]:
    """What one process perturbs and patches, and in how many runs."""
    with counted() as counts:
        return interventions(), counts


@pytest.mark.parametrize("name", ["two", "three"])
def test_processes_together_perturb_and_patch_as_one(
    shared: Path, alone: tuple[dict[str, Any], dict[str, int]], name: str
) -> None:
    results, counts = alone
    shares = [json.loads(file.read_text()) for file in sorted(shared.glob(f"counts-{name}-*"))]
    assert len(shares) == (2 if name == "two" else 3)
    for kind, count in counts.items():
        own = [share[kind] for share in shares]
        # Every run is of one process only, and none has more than its share of them.
        assert sum(own) == count > 0
        assert max(own) < 1.3 * count / len(own)
    for kind, one in results.items():
        files = sorted(shared.glob(f"{kind}-{name}-*"))
        several = [type(one).load(file) for file in files]
        assert len(several) == len(shares)
        assert all(other == several[0] for other in several)
        assert several[0].settings == one.settings
        assert_same_table(several[0], one)


def test_what_stops_one_process_stops_all(tmp_path: Path) -> None:
    """A wait for the others would last an hour here."""
    assert in_processes(fail, 3, tmp_path) == [0, 0, 0]
    told = [(tmp_path / f"told-{rank}").read_text().splitlines() for rank in range(3)]
    nan, arguments, others, perturbed, patched = zip(*told, strict=True)
    assert nan[1].startswith("FloatingPointError: activations at site 1 are NaN")
    for text in (nan[0], nan[2]):
        assert text.startswith("PeerError: process 1 of 3 stopped: FloatingPointError: activations")
    assert arguments[2].startswith("ValueError: noise must be")
    for text in arguments[:2]:
        assert text.startswith("PeerError: process 2 of 3 stopped: ValueError: noise must be")
    assert "skip_first (4 in process 0, 3 in process 1)" in others[1]
    for text in (others[0], others[2]):
        assert "process 1 of 3 stopped: ValueError: process_group: all processes must be" in text
    assert perturbed[1].endswith("got others: seed (0 in process 0, 1 in process 1)")
    for text in (perturbed[0], perturbed[2]):
        assert text.startswith("PeerError: process 1 of 3 stopped: ValueError: process_group: all")
    assert patched[2] == "ArithmeticError: no such number"
    for text in patched[:2]:
        assert text == "PeerError: process 2 of 3 stopped: ArithmeticError: no such number"


def test_prompts_that_one_process_cannot_read_stop_all(tmp_path: Path) -> None:
    """Whatever is measured: a wait for the others would last an hour here."""
    assert in_processes(unread, 2, tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"told-{rank}").read_text()) for rank in range(2))
    assert len(second) == 7
    for name, error in second.items():
        assert error == "OSError: this disk is gone", name
        assert first[name] == "PeerError: process 1 of 2 stopped: OSError: this disk is gone", name


def test_a_process_that_never_came_is_missed_at_once(tmp_path: Path) -> None:
    """A wait for it would last an hour here."""
    assert in_processes(leave, 2, tmp_path) == [3, 4]
    told = (tmp_path / "told-0").read_text()
    assert told.startswith("PeerError: another process of the group ended before it came to this")


def test_a_process_that_was_killed_is_missed(tmp_path: Path) -> None:
    assert in_processes(die, 2, tmp_path) == [3, -9]
    told = (tmp_path / "told-0").read_text()
    assert told.startswith("process 1 of 2 has given no sign of life for 4 s")


def test_an_analysis_is_shared(tmp_path: Path) -> None:
    assert in_processes(analyze, 2, tmp_path) == [0, 0]
    first, second = ((tmp_path / f"told-{rank}").read_text().splitlines() for rank in (0, 1))
    assert first[0] == "ValueError: broken"
    assert second[0] == "PeerError: process 0 of 2 stopped: ValueError: broken"
    # Sums are gone once there is the result that they were for.
    assert "profile.safetensors" in first[1]
    assert "sums" not in first[1]
    one, other = (ml.results.Analysis.load(tmp_path / f"analysis-{rank}") for rank in (0, 1))
    assert dict(one.skipped)["shuffled_tokens"] == "not in this process"
    assert dict(one.skipped) == dict(other.skipped)
    assert list(one.parts) == list(other.parts)
    for name, part in one.parts.items():
        assert part == other.parts[name]
    assert {"profile", "partition", "random_weights", "brittleness", "effects"} <= set(one.parts)
    prompts = ml.PromptDataset.from_tokens(random_tokens(24, 130))
    names = list(one.profile.signals)
    alone = run(tiny_model("llama", n_layers=6), prompts, **WHOLE, signals=names)
    assert_same(one.profile, alone, rtol=1e-6, atol=1e-9)


def test_what_is_no_group_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="process_group must be a group of"):
        run(model, process_group="gloo")


def test_one_process_alone_needs_no_group() -> None:
    alone = Processes()
    alone.meet()
    alone.check()
    values = np.arange(3)
    alone.sum_(values)
    assert values.tolist() == [0, 1, 2]
    assert (alone.texts("word"), alone.rank, alone.size) == (["word"], 0, 1)
    squares = alone.each(3, lambda number: {"square": np.array(number**2)})
    assert [int(one["square"]) for one in squares] == [0, 1, 4]
