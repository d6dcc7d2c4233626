"""Along training: curves rise as a tiny model learns, and one model is in memory at a time."""

from __future__ import annotations

import weakref

import pandas as pd
import pytest
import torch
from tiny import random_tokens, tiny_model

import mspgt_lens as ml

pytestmark = pytest.mark.simulation

BANDS = {"local": (1, 1), "intermediate": (2, 6), "global": (7, 16)}
QUICK = {"profile_settings": {"bands": BANDS, "n_folds": 3}, "n_bootstraps": 20}
STEPS = (0, 15, 80)


def prompts(n_prompts=48, seed=1):
    return ml.PromptDataset.from_tokens(random_tokens(n_prompts, 40, seed=seed))


def checkpoints(model, steps):
    """Trains the model between one step and the next."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    done = 0
    for step in steps:
        for number in range(done, step):
            loss = model(random_tokens(24, 32, seed=1000 + number), return_type="loss")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        done = step
        yield step, model


@pytest.fixture(scope="module")
def trained():
    model = tiny_model("llama", n_layers=6)
    with pytest.warns(UserWarning, match="cannot be told from 0"):
        return ml.studies.emergence(checkpoints(model, STEPS), prompts(), progress=False, **QUICK)


def test_relevance_appears_with_training(trained):
    """Text whose next token is one of 15: a trained model gains up to log(97 / 15) = 1.87 nats."""
    assert trained.steps == STEPS
    relevance = trained.table["relevance"]
    assert relevance[0] < 0.3
    assert relevance.is_monotonic_increasing
    assert relevance[2] > 1.2
    deep = [profile.predicted["local"].values[-1] for profile in trained.profiles]
    assert deep[2] > deep[0] + 0.3


def test_every_checkpoint_has_its_partition_and_its_rows(trained):
    table = trained.table
    assert list(table["step"]) == list(STEPS)
    for partition, found in zip(trained.partitions, table["boundaries"], strict=True):
        assert partition.boundaries == found
        assert partition.n_layers == 6
    tidy = trained.to_dataframe()
    one = tidy[tidy["step"] == 15].drop(columns="step").reset_index(drop=True)
    pd.testing.assert_frame_equal(one, trained.profiles[1].to_dataframe())


def test_saved_and_loaded(trained, tmp_path):
    again = ml.results.Emergence.load(trained.save(tmp_path / "along"))
    assert again.steps == trained.steps
    assert again.partitions == trained.partitions
    pd.testing.assert_frame_equal(again.to_dataframe(), trained.to_dataframe())


def test_the_figure_has_a_line_per_checkpoint_and_its_segments(trained):
    figure = ml.plots.plot_emergence(trained)
    lines = [t for t in figure.data if t.type == "scatter" and t.mode == "lines"]
    assert len(lines) == len(STEPS) * 4
    assert len([t for t in figure.data if t.type == "bar"]) == len(STEPS) * 3


def test_names_are_loaded_one_after_the_other_and_let_go():
    alive: list[weakref.ref] = []

    def load(name):
        assert not any(reference() is not None for reference in alive), "two models in memory"
        model = tiny_model("gpt2", seed=int(name[-1]), n_layers=4)
        alive.append(weakref.ref(model))
        return model

    with pytest.warns(UserWarning, match="cannot be told from 0"):
        found = ml.studies.emergence(
            ["step0", "step1"], prompts(), load=load, progress=False, **QUICK
        )
    assert found.steps == ("step0", "step1")
    # Four blocks are too few for boundaries, and the figure says so.
    assert found.partitions == (None, None)
    assert "too few blocks" in ml.plots.plot_emergence(found).layout.title.text
    assert len(alive) == 2


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="at least one"):
        ml.studies.emergence([], prompts())
    with pytest.raises(ValueError, match="load="):
        ml.studies.emergence(["step0"], prompts())
