"""Patching: equal to plain hooks on every architecture, exact where nothing changes, no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_models import hooks_on, logits_of
from tiny import ARCHITECTURES, N_HEADS, random_tokens, tiny_model, tiny_tokenizer
from torch import Tensor

import mspgt_lens as ml
from mspgt_lens.models import RecordedRun, as_adapter
from mspgt_lens.patching import significance as patch_statistics
from mspgt_lens.patching import sweeping

N_LAYERS, N_POS, N_PAIRS = 4, 7, 3
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
}


def made_pairs(padding: str = "none", n_pairs: int = N_PAIRS, n_pos: int = N_POS) -> ml.PromptPairs:
    """Pairs that first differ at different positions; the first is shorter where there is padding.

    Padding is filled with random tokens, so that a run which reads it is found out.
    """
    clean, other = random_tokens(n_pairs, n_pos), random_tokens(n_pairs, n_pos, seed=1)
    corrupted = clean.clone()
    for pair in range(n_pairs):
        changed = [2 + pair % 2, 4]
        corrupted[pair, changed] = other[pair, changed]
    mask = torch.ones_like(clean, dtype=torch.bool)
    if padding == "left":
        mask[0, :2] = False
    elif padding == "right":
        mask[0, -2:] = False
    answer, foil = random_tokens(n_pairs, 2, seed=2).T
    return ml.PromptPairs.from_tokens(clean, corrupted, answer, foil, mask=mask)


def logit_difference(logits: Tensor, pairs: ml.PromptPairs) -> Tensor:
    last = logits[torch.arange(len(pairs)), pairs.last]
    return (last.gather(1, pairs.answer[:, None]) - last.gather(1, pairs.foil[:, None]))[:, 0]


def run(model: Any, tokens: Tensor, pairs: ml.PromptPairs, hooks: list[Any]) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(
            tokens, attention_mask=pairs.mask.long(), return_type="logits", fwd_hooks=hooks
        )


def activations(
    model: Any, tokens: Tensor, pairs: ml.PromptPairs, names: list[str]
) -> list[Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(activation: Tensor, hook: Any) -> None:
            found[name] = activation.clone()

        return hook

    run(model, tokens, pairs, [(name, keep(name)) for name in names])
    return [found[name] for name in names]


def plain_sweep(
    model: Any,
    pairs: ml.PromptPairs,
    site: str,
    direction: str = "denoise",
    window: int = 1,
    columns: np.ndarray | None = None,
) -> np.ndarray:
    """One forward pass with hooks per cell, the logit difference of each pair."""
    tokens = {"denoise": (pairs.clean, pairs.corrupted), "noise": (pairs.corrupted, pairs.clean)}
    from_tokens, into = tokens[direction]
    names = [f"blocks.{block}.{HOOKS[site]}" for block in range(N_LAYERS)]
    source = activations(model, from_tokens, pairs, names)
    if columns is None:
        columns = np.repeat(np.arange(pairs.clean.shape[1])[:, None], len(pairs), axis=1)
    heads: list[int | None] = list(range(N_HEADS)) if site == "z" else [None]
    values = np.zeros((len(pairs), N_LAYERS - window + 1, len(columns), len(heads)))
    every = torch.arange(len(pairs))
    for block in range(values.shape[1]):
        for pos, column in enumerate(columns):
            for index, head in enumerate(heads):

                def patch(
                    activation: Tensor,
                    hook: Any,
                    at: int,
                    column: np.ndarray = column,
                    head: int | None = head,
                ) -> Tensor:
                    place = torch.from_numpy(column)
                    where = (every, place) if head is None else (every, place, head)
                    activation = activation.clone()
                    activation[where] = source[at][where]
                    return activation

                hooks = [
                    (
                        names[at],
                        lambda activation, hook, at=at, patch=patch: patch(activation, hook, at),
                    )
                    for at in range(block, block + window)
                ]
                logits = run(model, into, pairs, hooks)
                values[:, block, pos, index] = logit_difference(logits, pairs).double().numpy()
    return values if site == "z" else values[..., 0]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("site", HOOKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_cell_equals_a_plain_patch_by_hooks(
    tiny: Callable[..., Any], architecture: str, site: Any, padding: str
) -> None:
    model, pairs = tiny(architecture), made_pairs(padding)
    sweep = ml.patch_layers(model, pairs, place=site, progress=False)
    expected = plain_sweep(model, pairs, site)
    assert sweep.settings["resumed_at_position"]
    # Padding is patched by nothing; a plain patch there changes what nobody reads.
    np.testing.assert_allclose(sweep.by_pair, expected, atol=2e-5)
    np.testing.assert_allclose(sweep.metric, expected.mean(axis=0), atol=2e-5)
    assert np.ptp(sweep.metric) > 1e-3


@pytest.mark.parametrize("site", HOOKS)
def test_p_values_are_corrected_over_the_cells_that_a_plain_patch_moves(
    tiny: Callable[..., Any], site: Any
) -> None:
    """The last block's parts, for one, reach the answer from its own position only."""
    model, pairs = tiny("llama"), made_pairs("right")
    sweep = ml.patch_layers(model, pairs, place=site, progress=False)
    start = logit_difference(run(model, pairs.corrupted, pairs, []), pairs).numpy()
    moved = (start != plain_sweep(model, pairs, site).T).T.any(axis=0)
    assert 0 < moved.sum() < moved.size
    assert f"Holm's correction over {moved.sum()} cells" in " ".join(sweep.warnings)
    assert (sweep.p_values[~moved] == 1).all()


@pytest.mark.parametrize("site", ["resid_pre", "mlp_out", "z"])
@pytest.mark.parametrize("options", [{"direction": "noise"}, {"window": 2}, {"batch_size": 2}])
def test_directions_windows_and_batches(
    tiny: Callable[..., Any], site: Any, options: dict[str, Any]
) -> None:
    model, pairs = tiny("llama"), made_pairs("left")
    sweep = ml.patch_layers(model, pairs, place=site, progress=False, **options)
    expected = plain_sweep(
        model, pairs, site, options.get("direction", "denoise"), options.get("window", 1)
    )
    np.testing.assert_allclose(sweep.by_pair, expected, atol=2e-5)
    start = sweep.clean if "direction" in options else sweep.corrupted
    untouched = plain_sweep(model, pairs, site, options.get("direction", "denoise"))[:, :, 0]
    assert start == pytest.approx(untouched.mean(axis=0).flat[0], abs=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_chosen_positions_and_each_pair_s_last(tiny: Callable[..., Any], padding: str) -> None:
    model, pairs = tiny("gpt2"), made_pairs(padding)
    last = ml.patch_layers(model, pairs, positions="last", progress=False)
    expected = plain_sweep(model, pairs, "resid_pre", columns=pairs.last[None].numpy())
    np.testing.assert_allclose(last.by_pair, expected, atol=2e-5)
    assert last.positions.tolist() == [-1]
    every = ml.patch_layers(model, pairs, progress=False)
    some = ml.patch_layers(model, pairs, positions=[4, 2], progress=False)
    np.testing.assert_allclose(some.metric, every.metric[:, [4, 2]], atol=1e-6)
    assert some.positions.tolist() == [4, 2]


def test_without_keys_and_values_of_the_prefix_the_numbers_are_the_same(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = made_pairs("left")
    fast = ml.patch_layers(tiny("neox"), pairs, place="attn_out", progress=False)
    monkeypatch.setattr(RecordedRun, "_resumes_at", lambda *_: False)
    slow = ml.patch_layers(tiny("neox"), pairs, place="attn_out", progress=False)
    assert (fast.settings["resumed_at_position"], slow.settings["resumed_at_position"]) == (
        True,
        False,
    )
    np.testing.assert_allclose(fast.metric, slow.metric, atol=1e-6)


def test_callables_in_the_manner_of_transformer_lens(tiny: Callable[..., Any]) -> None:
    model, pairs = tiny("qwen2"), made_pairs("right")
    named = ml.patch_layers(model, pairs, progress=False)
    each = ml.patch_layers(model, pairs, lambda x: logit_difference(x, pairs), progress=False)
    np.testing.assert_allclose(each.by_pair, named.by_pair, atol=1e-6)
    np.testing.assert_allclose(each.p_values, named.p_values)
    mean = ml.patch_layers(
        model, pairs, lambda x: logit_difference(x, pairs).mean(), progress=False
    )
    np.testing.assert_allclose(mean.metric, named.metric, atol=1e-6)
    np.testing.assert_allclose(mean.effect, named.effect, atol=1e-4)
    assert mean.low is None
    assert mean.p_values is None
    assert mean.by_pair is None
    assert "one value per pair" in mean.warnings[0]


def test_callables_see_every_position_as_it_is(tiny: Callable[..., Any]) -> None:
    model, pairs = tiny("llama"), made_pairs()

    def spread(logits: Tensor) -> Tensor:
        return (logits.double() ** 2).mean(dim=(1, 2))

    sweep = ml.patch_layers(model, pairs, spread, positions=[4], progress=False)
    source = activations(model, pairs.clean, pairs, ["blocks.2.hook_resid_pre"])[0]

    def patch(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[:, 4] = source[:, 4]
        return activation

    logits = run(model, pairs.corrupted, pairs, [("blocks.2.hook_resid_pre", patch)])
    np.testing.assert_allclose(sweep.by_pair[:, 2, 0], spread(logits), rtol=1e-5)


@pytest.mark.parametrize("metric", ["kl", "cross_entropy"])
def test_named_metrics_against_their_formulas(tiny: Callable[..., Any], metric: Any) -> None:
    model, pairs = tiny("gemma"), made_pairs()
    sweep = ml.patch_layers(model, pairs, metric, progress=False)
    clean, corrupted = (
        logits_of(model, tokens)[:, -1].double().log_softmax(-1)
        for tokens in (pairs.clean, pairs.corrupted)
    )
    if metric == "kl":
        expected = (clean.exp() * (clean - corrupted)).sum(-1).mean()
        assert sweep.clean == pytest.approx(0.0, abs=1e-6)
    else:
        expected = -corrupted.gather(1, pairs.answer[:, None]).mean()
    assert sweep.corrupted == pytest.approx(float(expected), abs=1e-5)
    # The whole residual at the last position of the last block decides the last logits.
    assert sweep.effect[0].max() <= 1.5


@pytest.mark.parametrize("site", HOOKS)
def test_clean_into_clean_changes_exactly_nothing(tiny: Callable[..., Any], site: Any) -> None:
    same = made_pairs()
    pairs = ml.PromptPairs.from_tokens(same.clean, same.clean, same.answer, same.foil)
    sweep = ml.patch_layers(tiny("llama"), pairs, place=site, progress=False)
    assert (sweep.metric == sweep.corrupted).all()
    assert not sweep.effect.any()
    assert not sweep.low.any()
    assert (sweep.p_values == 1).all()
    assert "no patch changes anything" in " ".join(sweep.warnings)


def test_cells_before_the_first_difference_and_after_the_last_read_are_exact_zeros(
    tiny: Callable[..., Any],
) -> None:
    pairs = made_pairs("right")
    sweep = ml.patch_layers(tiny("llama"), pairs, progress=False)
    assert (sweep.by_pair[:, :, :2] == sweep.by_pair[:, :1, :1]).all()
    assert (sweep.by_pair[0, :, 5:] == sweep.by_pair[0, 0, 0]).all()
    # Position 3 of the first block holds the same token in the first pair.
    assert sweep.by_pair[0, 0, 3] == sweep.by_pair[0, 0, 0]
    assert sweep.by_pair[0, 1, 3] != sweep.by_pair[0, 0, 0]


def test_patching_every_position_of_the_residual_gives_the_clean_run(
    tiny: Callable[..., Any],
) -> None:
    """One position differs and is the only one patched, so the clean run comes back."""
    clean = random_tokens(N_PAIRS, N_POS)
    corrupted = clean.clone()
    corrupted[:, -1] = random_tokens(N_PAIRS, 1, seed=4)[:, 0]
    answer, foil = random_tokens(N_PAIRS, 2, seed=2).T
    pairs = ml.PromptPairs.from_tokens(clean, corrupted, answer, foil)
    sweep = ml.patch_layers(tiny("neox"), pairs, positions="last", progress=False)
    np.testing.assert_allclose(sweep.effect, 1.0, atol=1e-4)
    noise = ml.patch_layers(
        tiny("neox"), pairs, positions="last", direction="noise", progress=False
    )
    np.testing.assert_allclose(noise.effect, 0.0, atol=1e-4)


def three_segments(n_layers: int = N_LAYERS) -> ml.results.ScalePartition:
    quarter = n_layers // 4
    return ml.results.ScalePartition(
        model_name="made up",
        n_layers=n_layers,
        boundaries=(quarter, n_layers - quarter),
        intervals=((quarter, quarter), (n_layers - quarter, n_layers - quarter)),
        p_values={1: 1.0, 2: 1.0, 3: 1.0},
        n_boundaries=0,
        explained=0.0,
        probability=np.zeros(n_layers),
        sharpness={"stages": 1.0, "drift": 1.0, "both": 1.0},
        by_method={},
        by_signal={},
        signals=np.zeros((n_layers, 1)),
        drift="none",
        autocorrelation=0.0,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_segment_patched_whole_equals_its_attention_and_mlp_outputs_patched(
    tiny: Callable[..., Any], architecture: str, padding: str
) -> None:
    model, pairs, partition = tiny(architecture), made_pairs(padding), three_segments()
    result = ml.patch_scales(model, pairs, partition, n_controls=20, progress=False)
    sites = ("hook_attn_out", "hook_mlp_out")
    for index, blocks in enumerate(partition.segments.values()):
        names = [f"blocks.{block}.{site}" for block in blocks for site in sites]
        source = activations(model, pairs.clean, pairs, names)
        hooks = [
            (name, lambda activation, hook, new=new: new)
            for name, new in zip(names, source, strict=True)
        ]
        logits = run(model, pairs.corrupted, pairs, hooks)
        expected = logit_difference(logits, pairs).mean()
        assert result.metric[index] == pytest.approx(float(expected), abs=2e-5)
    assert result.controls.shape[0] == 3
    assert result.blocks.tolist() == [[0, 0], [1, 2], [3, 3]]


@pytest.mark.parametrize("block", [1, 3])
def test_a_segment_patched_whole_with_its_entry_equals_the_residual_patched_after_it(
    tiny: Callable[..., Any], block: int
) -> None:
    """Entry plus all updates is the clean stream, so nothing of the corrupted run is left."""
    model, pairs = tiny("llama"), made_pairs()
    adapter = as_adapter(model)
    with adapter.inference():
        clean = RecordedRun(adapter, pairs.clean, pairs.mask)
        base = RecordedRun(adapter, pairs.corrupted, pairs.mask)
        base.prepare()
        every = torch.arange(len(pairs))
        residual = clean.residual[block]
        for later in range(block, N_LAYERS):
            residual = base.run_block(later, residual, every, 0)
    names = [f"blocks.{block}.hook_resid_pre"]
    source = activations(model, pairs.clean, pairs, names)[0]
    logits = run(model, pairs.corrupted, pairs, [(names[0], lambda activation, hook: source)])
    with adapter.inference():
        found = base.logits(residual.flatten(0, 1)).reshape(logits.shape)
    torch.testing.assert_close(found, logits, atol=2e-5, rtol=0)


def test_random_sets_are_others_and_seeded(tiny: Callable[..., Any]) -> None:
    model, pairs = tiny("llama", n_layers=8), made_pairs()
    partition = three_segments(8)
    results = [
        ml.patch_scales(model, pairs, partition, n_controls=25, seed=seed, progress=False)
        for seed in (0, 0, 1)
    ]
    assert results[0] == results[1]
    assert not np.array_equal(results[0].controls, results[2].controls)
    # Two of eight blocks: 27 other sets, of which 25 are drawn.
    assert results[0].settings["n_controls"] == [25, 25, 25]
    assert "random sets are too few" in " ".join(results[0].warnings)
    np.testing.assert_array_equal(results[0].effect, results[2].effect)


@pytest.mark.parametrize("site", HOOKS)
def test_attribution_is_the_slope_of_the_exact_patch(tiny: Callable[..., Any], site: Any) -> None:
    """Against a finite difference: a small step of the patch, scaled up."""
    model, pairs = tiny("llama"), made_pairs()
    estimate = ml.patch_layers(model, pairs, place=site, method="attribution", progress=False)
    names = [f"blocks.2.{HOOKS[site]}"]
    source = activations(model, pairs.clean, pairs, names)[0]
    base = logit_difference(run(model, pairs.corrupted, pairs, []), pairs)
    step = 1e-2

    def patch(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        where = (slice(None), 4, 1) if site == "z" else (slice(None), 4)
        activation[where] += step * (source[where] - activation[where])
        return activation

    moved = logit_difference(run(model, pairs.corrupted, pairs, [(names[0], patch)]), pairs)
    expected = (base + (moved - base) / step).numpy()
    found = estimate.by_pair[:, 2, 4, 1] if site == "z" else estimate.by_pair[:, 2, 4]
    np.testing.assert_allclose(found, expected, atol=2e-2)
    exact = ml.patch_layers(model, pairs, place=site, progress=False)
    np.testing.assert_allclose(
        estimate.checked_metric, exact.metric[tuple(estimate.checked_cells.T)], atol=1e-5
    )
    error = estimate.attribution_error
    assert error["n_cells"] == len(estimate.checked_cells) <= sweeping.CHECKED_CELLS
    assert exact.attribution_error is None


def test_attribution_keeps_no_gradient_and_needs_one(tiny: Callable[..., Any]) -> None:
    model, pairs = tiny("llama"), made_pairs()
    ml.patch_layers(model, pairs, method="attribution", progress=False)
    assert all(parameter.grad is None for parameter in model.parameters())

    def accuracy(logits: Tensor) -> Tensor:
        return (logits[:, -1].argmax(-1) + torch.arange(3)).float()

    with pytest.raises(ValueError, match="has no gradient"):
        ml.patch_layers(model, pairs, accuracy, method="attribution", progress=False)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [1, 5])
@pytest.mark.parametrize("site", ["resid_pre", "mlp_out"])
def test_errors_in_a_metric_leave_no_trace(
    tiny: Callable[..., Any], error: type[BaseException], calls: int, site: Any
) -> None:
    model, pairs = tiny("llama"), made_pairs()
    # In this order: the bridge adds hooks of its own when it first runs.
    logits, before = logits_of(model), hooks_on(model)
    count = 0

    def metric(logits: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == calls:
            raise error
        return logit_difference(logits, pairs)

    with pytest.raises(error):
        ml.patch_layers(model, pairs, metric, place=site, progress=False)
    assert hooks_on(model) == before
    assert torch.equal(logits_of(model), logits)


def test_interrupted_inside_a_block_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = tiny_model("llama"), made_pairs()
    # In this order: the bridge adds hooks of its own when it first runs.
    logits, before = logits_of(model), hooks_on(model)
    original, count = RecordedRun.run_block, 0

    def interrupted(self: RecordedRun, *args: Any) -> Tensor:
        nonlocal count
        count += 1
        if count > 6:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(RecordedRun, "run_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ml.patch_layers(model, pairs, place="z", progress=False)
    assert hooks_on(model) == before
    assert torch.equal(logits_of(model), logits)


def test_hooks_of_the_user_act_once_and_stay() -> None:
    model, pairs = tiny_model("llama"), made_pairs()

    def shift(activation: Tensor, hook: Any) -> Tensor:
        return activation + 0.5

    for name in ("blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"):
        model.hook_dict[name].add_hook(shift, is_permanent=True)
    logits_of(model)  # The bridge adds hooks of its own when it first runs.
    before = hooks_on(model)
    sweep = ml.patch_layers(model, pairs, place="attn_out", progress=False)
    np.testing.assert_allclose(sweep.by_pair, plain_sweep(model, pairs, "attn_out"), atol=2e-5)
    assert hooks_on(model) == before


def test_a_model_that_does_more_than_its_blocks_is_refused(tiny: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    begun: list[int] = []

    def changes_its_mind(module: Any, args: Any, out: Tensor) -> Tensor:
        return out if begun and begun.pop() else 2 * out

    # As it is in whole runs, then not: as if the model did something around its block.
    model.embed.register_forward_hook(lambda *_: begun.append(1))
    model.blocks[1].register_forward_hook(changes_its_mind)
    with pytest.raises(ValueError, match=r"block 1 of .* called on its own"):
        ml.patch_layers(model, made_pairs(), progress=False)


def test_interval_and_p_value_of_the_effect() -> None:
    """Ratio of means with its linearized interval; sign flips of the change."""
    rng = np.random.default_rng(0)
    clean, corrupted = rng.normal(3, 1, 400), rng.normal(0, 1, 400)
    share = rng.uniform(0, 1, 400)
    values = (corrupted + share * (clean - corrupted))[:, None]
    effects = patch_statistics.summarize_effects(values, clean, corrupted, range(400))
    assert effects.effect[0] == pytest.approx(0.5, abs=0.05)
    assert effects.low[0] < 0.5 < effects.high[0]
    draws = [
        ((values[i] - corrupted[i, None]).mean() / (clean[i] - corrupted[i]).mean())
        for i in rng.integers(400, size=(2000, 400))
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert effects.low[0] == pytest.approx(low, abs=0.008)
    assert effects.high[0] == pytest.approx(high, abs=0.008)


def test_few_pairs_are_told_how_many_it_takes(tiny: Callable[..., Any]) -> None:
    sweep = ml.patch_layers(tiny("llama"), made_pairs(), progress=False)
    note = next(text for text in sweep.warnings if "too few" in text)
    n_cells = int((sweep.by_pair != sweep.by_pair[:, :1, :1]).any(axis=0).sum())
    needed = int(note.split(";")[-1].split()[0])
    assert f"over {n_cells} cells" in note
    assert 2.0 ** (1 - needed) * n_cells <= 0.05 < 2.0 ** (2 - needed) * n_cells


def test_p_values_under_a_null_with_shuffled_labels(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answer and foil swapped at random: the change of the metric has no preferred sign."""
    # Holm's correction in statsmodels collects garbage every time, at most of this test's cost.
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    pairs = made_pairs(n_pairs=12)
    changes = ml.patch_layers(tiny("llama"), pairs, positions=[4, 6], progress=False)
    start = changes.by_pair[:, 0, 0]
    able = (changes.by_pair != start[:, None, None]).any(axis=0)
    rng = np.random.default_rng(0)
    n_runs = 200
    rejected = 0
    for _ in range(n_runs):
        signs = rng.choice([-1.0, 1.0], 12)
        values = signs[:, None, None] * changes.by_pair
        groups = np.arange(12)
        p, _ = patch_statistics.patch_p_values(values, signs * start, able, groups, 0)
        rejected += bool((p < 0.05).any())
    assert rejected / n_runs <= 0.05


def test_an_effect_that_is_there_is_found() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (20, 3, 4))
    values[:, 1, 2] += 3.0
    able = np.ones((3, 4), dtype=bool)
    p, notes = patch_statistics.patch_p_values(values, np.zeros(20), able, np.arange(20), 0)
    assert not notes
    assert np.argwhere(p < 0.05).tolist() == [[1, 2]]


def test_groups_are_resampled_whole(tiny: Callable[..., Any]) -> None:
    one = made_pairs()
    twice = ml.PromptPairs.from_tokens(
        one.clean.repeat(2, 1),
        one.corrupted.repeat(2, 1),
        one.answer.repeat(2),
        one.foil.repeat(2),
        groups=["a", "b", "c"] * 2,
    )
    first, second = (ml.patch_layers(tiny("llama"), p, progress=False) for p in (one, twice))
    np.testing.assert_allclose(first.low, second.low, atol=1e-3)
    np.testing.assert_allclose(first.p_values, second.p_values)
    alone = ml.PromptPairs.from_tokens(one.clean, one.corrupted, one.answer, one.foil, groups="aaa")
    single = ml.patch_layers(tiny("llama"), alone, progress=False)
    assert single.low is None
    assert "one group" in single.warnings[0]


@pytest.mark.parametrize("method", ["exact", "attribution"])
def test_results_are_frozen_tidy_and_saved(
    tiny: Callable[..., Any], tmp_path: Any, method: Any
) -> None:
    sweep = ml.patch_layers(tiny("llama"), made_pairs(), place="z", method=method, progress=False)
    again = ml.results.PatchSweep.load(sweep.save(tmp_path / "sweep"))
    assert again == sweep
    with pytest.raises(ValueError, match="read-only"):
        sweep.effect[0] = 1.0
    table = sweep.to_dataframe()
    assert len(table) == N_LAYERS * N_POS * N_HEADS
    row = table[(table.block == 2) & (table.position == 4) & (table["head"] == 1)].iloc[0]
    assert row["value"] == sweep.effect[2, 4, 1]
    assert row.p_value == sweep.p_values[2, 4, 1]
    scales = ml.patch_scales(
        tiny("llama"), made_pairs(), three_segments(), n_controls=20, progress=False
    )
    assert ml.results.ScalePatch.load(scales.save(tmp_path / "scales")) == scales
    assert list(scales.to_dataframe().segment) == ["local", "intermediate", "global"]
    with pytest.raises(ValueError, match="must hold a PatchSweep"):
        ml.results.PatchSweep.load(tmp_path / "scales")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "accuracy"}, "metric must be one of logit_difference"),
        ({"place": "q"}, "place must be one of resid_pre"),
        ({"direction": "up"}, "direction must be one of denoise, noise"),
        ({"method": "fast"}, "method must be one of exact"),
        ({"window": 5}, "window must be 1 to 4 blocks, got 5"),
        ({"window": 0}, "window must be 1 to 4"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"positions": "first"}, "positions must be 'all', 'last'"),
        ({"positions": [7]}, "from 0 to 6"),
        ({"positions": [-1]}, "'last' is each pair's last"),
        ({"positions": [1, 1]}, "different columns"),
        ({"metric": lambda logits: logits[:, -1]}, r"shape \[3\], or one number; it returned"),
        ({"metric": lambda logits: logits.sum() * float("nan")}, "finite values"),
        ({"metric": lambda logits: torch.zeros(3)}, "effects have no scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments_are_named(
    tiny: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ml.patch_layers(tiny("llama"), made_pairs(), progress=False, **options)


def test_wrong_pairs_and_partitions_are_named(tiny: Callable[..., Any]) -> None:
    model, pairs = tiny("llama"), made_pairs()
    with pytest.raises(TypeError, match="pairs must be PromptPairs, got list"):
        ml.patch_layers(model, [pairs], progress=False)
    tokens = torch.full((1, 3), 200)
    with pytest.raises(ValueError, match="tokens from 0 to 100, got"):
        ml.patch_layers(model, ml.PromptPairs.from_tokens(tokens, tokens, [1], [2]), progress=False)
    long = random_tokens(1, 300)
    with pytest.raises(ValueError, match="context of 256 tokens, got 300"):
        ml.patch_layers(model, ml.PromptPairs.from_tokens(long, long, [1], [2]), progress=False)
    with pytest.raises(ValueError, match="partition is of 8 blocks, but the model has 4"):
        ml.patch_scales(model, pairs, three_segments(8), progress=False)
    with pytest.raises(ValueError, match="n_controls must be at least 20, got 3"):
        ml.patch_scales(model, pairs, three_segments(), n_controls=3, progress=False)


def test_figures_of_patching(tiny: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.tokenizer = tiny_tokenizer()
    partition = three_segments()
    sweep = ml.patch_layers(model, made_pairs(), progress=False)
    figure = ml.plots.plot_patching(sweep, partition)
    heat = next(trace for trace in figure.data if trace.type == "heatmap")
    assert np.array(heat.z).shape == (N_POS, N_LAYERS)
    np.testing.assert_array_equal(heat.z, sweep.effect.T)
    assert "Intermediate" in figure.to_json()
    heads = ml.patch_layers(model, made_pairs(), place="z", direction="noise", progress=False)
    heat = next(t for t in ml.plots.plot_patching(heads).data if t.type == "heatmap")
    strongest = np.abs(heads.effect - 1).max(axis=1).T
    np.testing.assert_allclose(np.abs(np.array(heat.z) - 1), strongest)
    scales = ml.patch_scales(model, made_pairs(), partition, n_controls=20, progress=False)
    assert "random sets" in ml.plots.plot_scale_patch(scales).to_json()
    with pytest.raises(ValueError, match="partition is of 8 blocks, but the sweep is of 4"):
        ml.plots.plot_patching(sweep, three_segments(8))


def test_tokens_in_figures_are_escaped(tiny: Callable[..., Any]) -> None:
    sweep = ml.patch_layers(tiny("llama"), made_pairs(), progress=False)
    values = {name: getattr(sweep, name) for name in sweep.__dataclass_fields__}
    evil = ml.results.PatchSweep(**{**values, "tokens": ("<b>x</b>", "\n", " ", *sweep.tokens[3:])})
    labels = ml.plots.plot_patching(evil).layout.yaxis.ticktext
    assert labels[0].startswith("&lt;b&gt;x")
    assert labels[1].startswith("\\n")
    assert labels[2].startswith("\u2423")
