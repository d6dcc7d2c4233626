"""Classes of tokens by the context they need, and the table of scales against classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.perturbation.dissociation import interaction

BANDS = {"local": (1, 1), "intermediate": (2, 4), "global": (5, 9)}


@pytest.fixture(scope="module")
def spoken(tiny):
    """Prompts that a tiny model wrote itself, so that perturbing it raises their loss."""
    model = tiny("llama", n_layers=6)
    generator = torch.Generator().manual_seed(0)
    tokens = random_tokens(12, 3)
    with torch.no_grad():
        for _ in range(27):
            weights = model(tokens, return_type="logits")[:, -1].mul(1.5).softmax(-1)
            weights[:, :4] = 0
            tokens = torch.cat([tokens, torch.multinomial(weights, 1, generator=generator)], dim=1)
    return model, ml.PromptDataset.from_tokens(tokens, groups=[i // 2 for i in range(12)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_are_those_of_truncated_prompts(tiny, architecture):
    model, rows = tiny(architecture), random_tokens(5, 24)
    found = ml.classify_tokens(
        model, ml.PromptDataset.from_tokens(rows), bands=BANDS, n_tokens=30, progress=False
    )
    assert len(found.classes) == 30
    assert found.positions.min() >= 4 + 9
    for i in (0, 11, 29):
        n, p = found.prompts[i], found.positions[i]
        for column, length in enumerate((1, 4, 9), start=1):
            with torch.no_grad():
                scores = model(rows[n, p - length : p][None], return_type="logits")[0, -1]
            expected = -float(scores.log_softmax(-1)[rows[n, p]])
            assert found.losses[i, column] == pytest.approx(expected, abs=1e-4)
        others = torch.cat([rows[:n], rows[n + 1 :]]).flatten()
        count = int((others == rows[n, p]).sum())
        expected = -np.log((count + 1) / (len(others) + 101))
        assert found.losses[i, 0] == pytest.approx(expected)


def test_a_class_is_the_longest_band_that_matters(tiny):
    prompts = ml.PromptDataset.from_tokens(random_tokens(6, 24))
    found = ml.classify_tokens(tiny("llama"), prompts, bands=BANDS, threshold=0.2, progress=False)
    for gains, one in zip(found.gains, found.classes, strict=True):
        assert one == max((i for i in range(3) if gains[i] >= 0.2), default=-1)
    assert sum(found.counts.values()) == 6 * (24 - 13)
    table = found.to_dataframe()
    assert list(table["context"][:4]) == [0, 1, 4, 9]
    np.testing.assert_array_equal(table["value"].to_numpy().reshape(-1, 4), found.losses)
    assert dict(table["class"][::4].value_counts()) == {k: v for k, v in found.counts.items() if v}


def test_every_window_begins_with_bos_where_the_model_takes_one():
    model = tiny_model("gpt2")
    model.tokenizer = tiny_tokenizer()
    rows = random_tokens(4, 20)
    with_bos = torch.cat([torch.ones(4, 1, dtype=torch.long), rows], dim=1)
    prompts = ml.PromptDataset.from_tokens(with_bos)
    found = ml.classify_tokens(model, prompts, bands=BANDS, n_tokens=5, progress=False)
    n, p = found.prompts[0], found.positions[0]
    window = torch.cat([torch.tensor([1]), with_bos[n, p - 4 : p]])[None]
    with torch.no_grad():
        scores = model(window, return_type="logits")[0, -1]
    expected = -float(scores.log_softmax(-1)[with_bos[n, p]])
    assert found.losses[0, 2] == pytest.approx(expected, abs=1e-4)


def test_the_table_holds_the_rises_of_single_runs(spoken):
    model, prompts = spoken
    classes = ml.classify_tokens(model, prompts, bands=BANDS, threshold=0.1, progress=False)
    kind = ml.Perturbation("skip")
    found = ml.measure_dissociation(
        model, prompts, [2, 4], classes, perturbation=kind, progress=False
    )
    assert found.counts.tolist() == [classes.counts[name] for name in BANDS]
    tokens = torch.stack([torch.from_numpy(p.tokens) for p in prompts])
    # Skipping at every position but the first four.
    runs = []
    for blocks in ((), (0, 1), (2, 3), (4, 5)):
        kept = {}

        def keep(x, hook, kept=kept):
            kept[0] = x

        def put_back(x, hook, kept=kept):
            return torch.cat([x[:, :4], kept[0][:, 4:]], dim=1)

        hooks = [
            (f"blocks.{b}.hook_resid_{end}", change)
            for b in blocks
            for end, change in (("pre", keep), ("post", put_back))
        ]
        with torch.no_grad():
            scores = model.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1)
        runs.append(-scores[:, :-1].gather(2, tokens[:, 1:, None])[..., 0])
    for j in range(3):
        own = classes.classes == j
        place = classes.prompts[own], classes.positions[own] - 1
        expected = [float((run - runs[0])[place].mean()) for run in runs[1:]]
        np.testing.assert_allclose(found.values[:, j], expected, atol=1e-4)
    np.testing.assert_allclose(found.relative.mean(axis=1), 1.0)
    assert (found.low <= found.values).all()
    assert found.interaction.low <= found.interaction.value <= found.interaction.high


def test_noise_is_shared_out_over_a_segment(spoken):
    model, prompts = spoken
    classes = ml.classify_tokens(model, prompts, bands=BANDS, threshold=0.1, progress=False)
    found = [
        ml.measure_dissociation(
            model,
            prompts,
            parts,
            classes,
            perturbation=ml.Perturbation("noise", 4.0),
            progress=False,
        )
        for parts in ([1, 2], {"a": [0], "b": [1, 2], "c": [3]})
    ]
    np.testing.assert_array_equal(found[0].values[0], found[1].values[0])
    assert not np.allclose(found[0].values[2], found[1].values[2])


def simulated(rng, table, n_groups=24, per_group=12):
    """Rises with the table's means; documents differ in how easily they are hurt."""
    n = n_groups * per_group
    groups = np.repeat(np.arange(n_groups), per_group)
    classes = rng.integers(3, size=n)
    ease = rng.gamma(4, 0.25, size=n_groups)[groups]
    rises = table[:, classes].T * ease[:, None] + 0.5 * rng.standard_normal((n, 3))
    return rises, classes, groups


@pytest.mark.parametrize("kind", ["equal", "proportional"])
def test_the_interaction_keeps_its_level(kind):
    """Stronger segments and more sensitive classes alone are no interaction."""
    rng = np.random.default_rng(0)
    table = np.full((3, 3), 0.6)
    if kind == "proportional":
        table = np.outer([0.5, 1.0, 2.0], [0.4, 0.6, 1.4])
    found = [interaction(*simulated(rng, table)) for _ in range(200)]
    # 5% of 200 is 10; 18 or more come once in a hundred.
    assert np.sum([one.p_value < 0.05 for one in found]) <= 18
    assert np.mean([one.low <= 0 <= one.high for one in found]) > 0.9
    assert abs(np.mean([one.value for one in found])) < 0.03


def test_a_planted_diagonal_is_found_and_covered():
    rng = np.random.default_rng(1)
    table = np.outer([0.5, 1.0, 2.0], [0.4, 0.6, 1.4]) * (1 + 0.8 * np.eye(3))
    shares = table / table.mean(axis=1, keepdims=True)
    truth = np.trace(shares - shares.mean(axis=0)) / 3
    found = [interaction(*simulated(rng, table)) for _ in range(100)]
    assert np.mean([one.p_value < 0.05 for one in found]) > 0.9
    assert np.mean([one.low <= truth <= one.high for one in found]) > 0.88


def test_results_are_kept_as_they_are(spoken, tmp_path):
    model, prompts = spoken
    classes = ml.classify_tokens(model, prompts, bands=BANDS, threshold=0.1, progress=False)
    loaded = ml.results.TokenClasses.load(classes.save(tmp_path / "classes"))
    assert loaded.to_dataframe().equals(classes.to_dataframe())
    assert loaded.bands == classes.bands
    kind = ml.Perturbation("skip")
    table = ml.measure_dissociation(
        model, prompts, [2, 4], classes, perturbation=kind, progress=False
    )
    again = ml.results.Dissociation.load(table.save(tmp_path / "table"))
    assert again.to_dataframe().equals(table.to_dataframe())
    assert again.interaction == table.interaction
    assert again.segments == table.segments


def test_wrong_arguments_are_named(spoken, tiny):
    model, prompts = spoken
    with pytest.raises(ValueError, match=r"ordinary tokens before them.*30 tokens"):
        ml.classify_tokens(model, prompts)
    with pytest.raises(ValueError, match="reach farther than the one before"):
        ml.classify_tokens(model, prompts, bands={"a": (1, 4), "b": (1, 4)})
    with pytest.raises(ValueError, match="threshold"):
        ml.classify_tokens(model, prompts, threshold=0)
    with pytest.raises(ValueError, match="n_tokens"):
        ml.classify_tokens(model, prompts, n_tokens=0)
    with pytest.raises(ValueError, match="more than the context"):
        ml.classify_tokens(model, prompts, bands={"far": (1, 300)})
    classes = ml.classify_tokens(model, prompts, bands=BANDS, threshold=0.1, progress=False)
    with pytest.raises(ValueError, match="as many segments as classes has bands"):
        ml.measure_dissociation(model, prompts, [2], classes)
    others = ml.PromptDataset.from_tokens(random_tokens(12, 30, seed=9))
    with pytest.raises(ValueError, match="in the same order: they differ"):
        ml.measure_dissociation(model, others, [2, 4], classes, progress=False)
    few = ml.PromptDataset.from_tokens([p.tokens for p in prompts][:6])
    with pytest.raises(ValueError, match="classified tokens are not among"):
        ml.measure_dissociation(model, few, [2, 4], classes, progress=False)
    weak = ml.Perturbation("noise", 0.0)
    with pytest.raises(ValueError, match="does not raise the loss"):
        ml.measure_dissociation(model, prompts, [2, 4], classes, perturbation=weak, progress=False)
