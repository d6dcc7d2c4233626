"""Texts under interventions: nothing from nothing, matched doses, tests that keep their level."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from tiny import as_text, random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.generation.results import GenerationEffects, compare_texts, text_deltas
from mspgt_lens.generation.writing import DEFAULT_PERTURBATIONS, generation_effects
from mspgt_lens.models import as_adapter
from mspgt_lens.perturbation.batches import make_batches
from mspgt_lens.perturbation.kinds import Perturbation
from mspgt_lens.perturbation.matching import match_strengths
from mspgt_lens.perturbation.residuals import residual_statistics

TEXTS = [as_text(row) for row in random_tokens(8, 14)]
SMALL = {"n_new": 10, "n_controls": 1, "progress": False}


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama")
    made.tokenizer = tiny_tokenizer()
    return made


@pytest.fixture(scope="module")
def effects(model):
    return generation_effects(model, TEXTS, (1, 3), target_kl=0.05, **SMALL | {"n_controls": 2})


def same(one, other):
    return all(
        np.array_equal(mine, theirs, equal_nan=True)
        if isinstance(mine, np.ndarray)
        else mine == theirs
        for mine, theirs in (
            (getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__
        )
    )


def test_an_identity_changes_no_text_and_has_no_effect(model):
    kinds = [
        Perturbation("noise", strength=0.0),
        Perturbation("scaling", strength=1.0),
        Perturbation("temperature", strength=1.0),
    ]
    found = generation_effects(model, TEXTS, (1, 3), perturbations=kinds, target_kl=None, **SMALL)
    assert all(texts == found.clean_texts for row in found.texts for texts in row)
    assert (found.kl == 0).all()
    table = found.to_dataframe().dropna(subset="p_value")
    assert len(table) == 9 * 6
    assert (table[["value", "low", "high", "delta", "delta_low", "delta_high"]] == 0).all(axis=None)
    assert (table["p_value"] == 1).all()
    assert (table["control"] == 0).all()


def test_result_is_as_described_and_comes_back_from_disk(effects, tmp_path):
    n = len(effects.metrics)
    assert effects.perturbations == ("covariance noise", "scaling", "temperature")
    assert effects.segments == {"local": (0,), "intermediate": (1, 2), "global": (3,)}
    assert effects.deltas.shape == effects.p_values.shape == (3, 3, n)
    assert effects.controls.shape == (3, 3, 2, n)
    assert effects.control_kl.shape == (3, 3, 2)
    # Local and global have the same size, so the same random sets.
    np.testing.assert_array_equal(effects.controls[:, 0], effects.controls[:, 2])
    assert len(effects.texts[0][0]) == len(effects.clean_texts) == len(effects.prompts) == 8
    assert effects.prompts[0] == TEXTS[0]
    assert effects.metrics["mtld"] == "local"
    assert effects.metrics["sentence_length"] == "intermediate"
    assert effects.metrics["embedding_coherence"] == "global"
    table = effects.to_dataframe()
    assert len(table) == 9 * n
    assert set(table["segment"][table["predicted"] & (table["quantity"] == "mtld")]) == {"local"}
    assert (table["n_pairs"] + table["n_undefined"] == 8).all()
    assert "predicted by MSPGT's first version" in effects.summary()
    assert same(GenerationEffects.load(effects.save(tmp_path / "effects")), effects)


def test_same_seed_same_texts_and_another_seed_others(model, effects):
    options = (
        {"perturbations": DEFAULT_PERTURBATIONS[:1], "target_kl": 0.05} | SMALL | {"n_controls": 0}
    )
    again = generation_effects(model, TEXTS, (1, 3), batch_size=3, **options)
    assert again.clean_texts == effects.clean_texts
    assert again.texts == effects.texts[:1]
    assert again.to_dataframe()["control"].isna().all()
    other = generation_effects(model, TEXTS, (1, 3), seed=1, **options)
    assert all(a != b for a, b in zip(other.clean_texts, effects.clean_texts, strict=True))


def test_perturbed_texts_differ_and_ones_without_sentences_are_counted(effects):
    assert any(texts != effects.clean_texts for row in effects.texts for texts in row)
    # Texts of the tiny tokenizer hold one sentence: no neighbors to compare.
    column = list(effects.metrics).index("embedding_coherence")
    assert (effects.n_pairs[..., column] == 0).all()
    assert np.isnan(effects.p_values[..., column]).all()
    assert any("undefined" in warning for warning in effects.warnings)


def test_doses_match_on_every_segment(model):
    adapter = as_adapter(model)
    batches = make_batches(adapter, TEXTS, skip_first=4, batch_size=None)
    statistics = residual_statistics(adapter, batches)
    kinds = [
        *DEFAULT_PERTURBATIONS,
        Perturbation("resample"),
        Perturbation("noise", shape="isotropic"),
    ]
    pairs = [(kind, blocks) for kind in kinds for blocks in ((0,), (1, 2), (3,))]
    least = min(
        one.kl
        for one in match_strengths(
            adapter,
            batches,
            statistics,
            [(Perturbation("temperature", 3000.0), blocks) for _, blocks in pairs[:3]],
            None,
        )
    )
    for one in match_strengths(adapter, batches, statistics, pairs, least / 2):
        assert one.kl == pytest.approx(least / 2, rel=0.06), one
        again = match_strengths(
            adapter, batches, statistics, [(one.perturbation, one.blocks)], None
        )
        assert again[0].kl == pytest.approx(one.kl)


def test_a_dose_out_of_reach_is_said(model):
    found = generation_effects(
        model, TEXTS, (1, 3), perturbations=[Perturbation("scaling")], target_kl=50.0, **SMALL
    )
    assert (found.strengths == 0).all()
    assert (found.kl < 50).all()
    assert any("not met everywhere by scaling" in warning for warning in found.warnings)


def test_no_effect_is_found_where_there_is_none(monkeypatch):
    """Both texts of a pair drawn alike, with documents of several prompts: Holm keeps the level."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(9), 3)
    # statsmodels collects garbage in every correction, which costs more than all else here.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    runs, wrong = 400, 0
    for _ in range(runs):
        document = rng.standard_normal((2, 9, 2))[:, groups]
        clean, changed = document + rng.standard_normal((2, 27, 2))
        found = compare_texts(clean, changed[None], groups, n_draws=20)
        wrong += (found["p_values"] < 0.05).any()
    assert wrong <= 0.05 * runs + 2 * np.sqrt(0.05 * 0.95 * runs)


def test_effects_by_hand_with_undefined_texts_left_out():
    clean = np.array([[1.0], [2.0], [3.0], [np.nan], [5.0]])
    changed = np.array([[[2.0], [4.0], [6.0], [8.0], [np.nan]], [[np.nan]] * 5])
    found = compare_texts(clean, changed, np.arange(5))
    assert found["n_pairs"].ravel().tolist() == [3, 0]
    assert found["differences"][0, 0] == 2.0
    # 2, 4, 6 against 1, 2, 3: seven of nine above, one tie, one below.
    assert found["deltas"][0, 0] == pytest.approx((7 - 1) / 9)
    assert found["p_values"][0, 0] == 0.25
    assert np.isnan(found["p_values"][1, 0])
    deltas = text_deltas(clean, changed)
    assert deltas[0, 0] == found["deltas"][0, 0]
    assert np.isnan(deltas[1, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_kl": 0.0}, "target_kl must be"),
        ({"target_kl": float("nan")}, "target_kl must be"),
        ({"n_controls": -1}, "n_controls must be"),
        ({"n_new": 0}, "n_new must be"),
        ({"n_new": 250}, "to fit the context"),
        ({"temperature": -0.5}, "temperature must be"),
        ({"perturbations": []}, "perturbations must all differ"),
        (
            {"perturbations": [Perturbation("noise", 0.1), Perturbation("noise", 0.2)]},
            "perturbations must all differ",
        ),
        ({"perturbations": [Perturbation("skip")]}, "no strength that could be matched"),
        ({"partition": (3, 1)}, "boundaries that rise"),
        ({"prompts": TEXTS[:2]}, "at least 3 groups"),
    ],
)
def test_wrong_arguments_are_named(model, options, message):
    arguments = {"prompts": TEXTS, "partition": (1, 3)} | SMALL | options
    with pytest.raises(ValueError, match=message):
        generation_effects(model, **arguments)


def test_a_model_without_a_tokenizer_is_named(tiny):
    prompts = ml.PromptDataset.from_tokens(random_tokens(4, 9))
    with pytest.raises(ValueError, match="no tokenizer"):
        generation_effects(tiny("gpt2"), prompts, (1, 3), **SMALL)
