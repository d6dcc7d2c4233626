"""Massive activations are found where they are planted, and taken away as plain hooks do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_editing import hooks_on
from tiny import random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml

N_LAYERS, SKIP_FIRST = 4, 3
PLANTED = {5: 300.0, 9: -200.0, 30: 100.0}


def ragged():
    tokens = random_tokens(4, 12)
    rows = [row[:length] for row, length in zip(tokens, (12, 9, 7, 12), strict=True)]
    return ml.PromptDataset.from_tokens(rows, groups=["a", "b", "b", "c"])


def planting(block, column=0):
    """A hook by which a block writes massive values at one position."""

    def write(activation, hook):
        activation = activation.clone()
        for coordinate, value in PLANTED.items():
            activation[:, column, coordinate] += value
        return activation

    return f"blocks.{block}.hook_resid_post", write


def measured(model, block=None, prompts=None, **options):
    return ml.studies.ablate_massive(
        model,
        ragged() if prompts is None else prompts,
        block,
        skip_first=SKIP_FIRST,
        progress=False,
        **options,
    )


def plain(model, tokens, hooks):
    """Logits, residuals of all sites and patterns of one prompt."""
    seen = {}
    last = f"blocks.{N_LAYERS - 1}.hook_resid_post"
    names = [*(f"blocks.{b}.hook_resid_pre" for b in range(N_LAYERS)), last]
    names += [f"blocks.{b}.attn.hook_pattern" for b in range(N_LAYERS)]
    keep = [(n, lambda x, hook, n=n: seen.__setitem__(n, x[0].detach().clone())) for n in names]
    with torch.no_grad():
        logits = model.run_with_hooks(tokens[None], fwd_hooks=[*hooks, *keep])[0]
    found = [seen[name].double() for name in names]
    return logits.double().log_softmax(-1), found[: N_LAYERS + 1], found[N_LAYERS + 1 :]


def traits(sites, patterns):
    share = [float(p.sort().values[-3:].sum() / p.sum()) for p in ((x**2).sum(0) for x in sites)]
    sinks = [float((p[:, :, 0].mean(1) > 0.3).double().mean()) for p in patterns]
    entropy = []
    for rows in sites:
        own = rows - rows.mean(0)
        unit = own / own.norm(dim=1, keepdim=True)
        spectrum = torch.linalg.eigvalsh((unit @ unit.T / len(unit)).clamp(min=0))
        entropy.append(-float((spectrum**2).sum().log()))
    return {"massive_share": share, "sink_rate": sinks, "prompt_entropy": entropy}


@pytest.mark.parametrize("architecture", ["llama", "neox", "glm4", "gpt2"])
def test_the_ablation_is_that_of_plain_hooks(tiny, architecture):
    model, block, prompts = tiny(architecture), 1, ragged()
    plant = planting(block)
    entered = []

    def put_back(activation, hook):
        activation = activation.clone()
        for coordinate in PLANTED:
            activation[:, 0, coordinate] = entered[-1][:, 0, coordinate]
        return activation

    keep = (f"blocks.{block}.hook_resid_pre", lambda x, hook: entered.append(x.clone()))
    expected = {trait: [[], []] for trait in ("massive_share", "sink_rate", "prompt_entropy")}
    shifts = []
    for prompt in prompts:
        tokens = torch.from_numpy(prompt.tokens)
        runs = [
            plain(model, tokens, [plant]),
            plain(model, tokens, [keep, plant, (plant[0], put_back)]),
        ]
        for index, (_, sites, patterns) in enumerate(runs):
            for trait, values in traits(sites, patterns).items():
                expected[trait][index].append(values)
        p, q = (run[0][SKIP_FIRST:] for run in runs)
        kept = (p.argmax(-1) == q.argmax(-1)).double()
        entropies = [-(x.exp() * x).sum(-1) for x in (p, q)]
        shifts.append(torch.stack([(p.exp() * (p - q)).sum(-1), kept, entropies[1] - entropies[0]]))
    before = hooks_on(model)
    with model.hooks(fwd_hooks=[plant]):
        found = measured(model, prompts=prompts)
    assert hooks_on(model) == before
    assert (found.block, found.coordinates, found.n_massive, found.at_first) == (
        1,
        (5, 9, 30),
        1,
        1,
    )
    owners = [[0], [1, 2], [3]]
    for trait, runs in expected.items():
        by_group = [[np.mean([run[i] for i in own], axis=0) for own in owners] for run in runs]
        wanted = np.moveaxis(np.array(by_group), 1, 2)
        np.testing.assert_allclose(getattr(found, trait), wanted, atol=2e-5, err_msg=trait)
    wanted = [torch.cat([shifts[i] for i in own], dim=1).mean(dim=1).numpy() for own in owners]
    np.testing.assert_allclose(found.shifts, np.array(wanted).T, atol=1e-5)
    # There was something to see.
    assert found.curve("massive_share").values[2] > 0.9
    assert found.curve("massive_share", ablated=True).values[2] < 0.6
    assert found.shift("kl").value > 1e-3


@pytest.mark.parametrize("block", range(N_LAYERS))
def test_the_onset_is_the_block_that_writes_and_positions_are_found_wherever_they_are(tiny, block):
    model = tiny("llama")
    with model.hooks(fwd_hooks=[planting(block, column=4)]):
        found = measured(model)
    assert (found.block, found.n_massive, found.at_first) == (block, 1, 0)
    assert set(found.coordinates) == set(PLANTED)
    assert found.summary()


def test_a_block_that_is_given_is_taken(tiny):
    model = tiny("gpt2")
    with model.hooks(fwd_hooks=[planting(1)]):
        # Massive values pass block 2, which writes little there itself.
        found = measured(model, 2)
    assert found.block == 2
    assert found.curve("massive_share", ablated=True).values[3] > 0.9


def test_batches_do_not_matter(tiny):
    model = tiny("neox")
    with model.hooks(fwd_hooks=[planting(2)]):
        one, other = measured(model), measured(model, batch_size=1)
    assert one.n_massive == other.n_massive
    for name in ("massive_share", "sink_rate", "prompt_entropy", "shifts"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name), atol=1e-6)


def test_tables_hold_what_curves_do(tiny):
    model = tiny("llama")
    with model.hooks(fwd_hooks=[planting(1)]):
        found = measured(model)
    table = found.to_dataframe()
    assert len(table) == 2 * (2 * (N_LAYERS + 1) + N_LAYERS) + 3
    part = table.query("quantity == 'sink_rate' and condition == 'ablated'")
    assert part["block"].tolist() == list(range(N_LAYERS))
    assert part["site"].isna().all()
    np.testing.assert_allclose(part["value"], found.curve("sink_rate", ablated=True).values)


def test_what_cannot_be_measured_is_refused(tiny):
    with pytest.raises(ml.CannotMeasure, match="no position holds 100 times the median power"):
        measured(tiny("llama"))
    with pytest.raises(ValueError, match=r"block must be 0 to 3 in tiny-llama.*got 4"):
        measured(tiny("llama"), 4)
    encoder = tiny_model("bert")
    encoder.tokenizer = tiny_tokenizer()
    with pytest.raises(ml.CannotMeasure, match="attends in both directions"):
        measured(encoder)


def test_what_is_not_there_is_named(tiny):
    model = tiny("llama")
    with model.hooks(fwd_hooks=[planting(1)]):
        found = measured(model)
    with pytest.raises(ValueError, match="trait must be one of massive_share, sink_rate, prompt_e"):
        found.curve("sinks")
    with pytest.raises(ValueError, match="measure must be one of kl, top1_kept, entropy, got 'x'"):
        found.shift("x")
