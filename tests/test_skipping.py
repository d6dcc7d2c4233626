"""Blocks skipped and swapped: the same as plain hooks, and as a model whose layers are swapped."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_editing import hooks_on
from tiny import random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.models import RecordedRun, as_adapter
from mspgt_lens.perturbation.batches import make_batches
from mspgt_lens.perturbation.block_runs import REACHES, SHIFTS
from mspgt_lens.perturbation.skipping import _places

N_LAYERS, SKIP_FIRST, N_PLACES = 4, 3, 2
# Attention and MLP side by side, norms after both, layers that differ, biases of ALiBi.
ARCHITECTURES = ("llama", "gpt2", "neox", "glm4", "gptneo", "bloom")


def ragged():
    """Three documents, one of them in two prompts, of different lengths."""
    tokens = random_tokens(4, 12)
    rows = [row[:length] for row, length in zip(tokens, (12, 9, 7, 12), strict=True)]
    return ml.PromptDataset.from_tokens(rows, groups=["a", "b", "b", "c"])


def measured(model, prompts=None, **options):
    return ml.studies.block_effects(
        model,
        ragged() if prompts is None else prompts,
        n_places=N_PLACES,
        skip_first=SKIP_FIRST,
        progress=False,
        **options,
    )


class Plain:
    """One prompt, by plain hooks and by changing places of the layers themselves."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, torch.from_numpy(tokens)[None]
        with torch.no_grad():
            logits, cache = model.run_with_cache(self.tokens)
        self.clean = logits[0]
        self.sites = [cache[f"blocks.{b}.hook_resid_pre"][0] for b in range(N_LAYERS)]
        self.sites.append(cache[f"blocks.{N_LAYERS - 1}.hook_resid_post"][0])

    def put(self, site, new, where):
        """Logits, and the later sites, with other residuals at some positions of a site."""
        seen = {}

        def change(activation, hook):
            activation = activation.clone()
            activation[0, where] = new[where]
            return activation

        def see(later):
            return lambda activation, hook: seen.__setitem__(later, activation[0].clone())

        last = f"blocks.{N_LAYERS - 1}.hook_resid_post"
        names = [*(f"blocks.{b}.hook_resid_pre" for b in range(N_LAYERS)), last]
        hooks = [(names[site], change)]
        hooks += [(names[later], see(later)) for later in range(site + 1, N_LAYERS + 1)]
        with torch.no_grad():
            logits = self.model.run_with_hooks(self.tokens, fwd_hooks=hooks)[0]
        return logits, seen

    def swapped(self, block):
        """Logits and the residual after both, of the model with two layers exchanged."""
        layers = next(
            m
            for m in self.model.original_model.modules()
            if isinstance(m, torch.nn.ModuleList) and len(m) == N_LAYERS
        )
        own = list(layers)
        seen = []
        after = own[block].register_forward_hook(
            lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        try:
            layers[block], layers[block + 1] = own[block + 1], own[block]
            with torch.no_grad():
                out = self.model.original_model(input_ids=self.tokens, use_cache=False)
        finally:
            after.remove()
            for index, layer in enumerate(own):
                layers[index] = layer
        return out.logits[0], seen[0].reshape(self.sites[0].shape)


def shifts(clean, changed):
    p, q = (x.double().log_softmax(-1) for x in (clean, changed))
    kl = (p.exp() * (p - q)).sum(-1)
    kept = (p.argmax(-1) == q.argmax(-1)).double()
    entropy = [-(x.exp() * x).sum(-1) for x in (p, q)]
    return torch.stack([kl, kept, entropy[1] - entropy[0]], dim=-1).numpy()


def expected_effects(model, prompts, seed=0):
    """Change to its table, as of the result."""
    found = {
        change: np.full((3, N_LAYERS - (change == "swap"), 3), None, dtype=object)
        for change in ("skip", "swap")
    }
    for table in found.values():
        for index in np.ndindex(table.shape):
            table[index] = []
    places = drawn_places(model, prompts, seed)
    for number, prompt in enumerate(prompts):
        plain, group = Plain(model, prompt.tokens), "abc".index(prompt.group)
        n_pos = len(prompt.tokens)
        every, read = torch.arange(n_pos), torch.arange(SKIP_FIRST, n_pos)
        for change, table in found.items():
            for block in range(table.shape[1]):
                site = block + (1 if change == "skip" else 2)
                if change == "skip":
                    new = plain.sites[block]
                    logits, _ = plain.put(site, new, every)
                else:
                    logits, new = plain.swapped(block)
                table[0, block, group].append(shifts(plain.clean, logits)[read])
                for place in places[number]:
                    logits, _ = plain.put(site, new, every[: place + 1])
                    later = shifts(plain.clean, logits)[place + 1 :]
                    table[2, block, group].append(later)
                for position in read.tolist():
                    here = torch.tensor([position])
                    new = plain.sites[block]
                    for one in (block + 1, block) if change == "swap" else ():
                        new = plain.put(one, new, here)[1][one + 1]
                    logits, _ = plain.put(site, new, here)
                    table[1, block, group].append(shifts(plain.clean, logits)[[position]])
    return {
        change: np.moveaxis(
            np.array(
                [
                    [[np.concatenate(cell).mean(axis=0) for cell in row] for row in reach]
                    for reach in table
                ]
            ),
            3,
            1,
        )
        for change, table in found.items()
    }


def drawn_places(model, prompts, seed):
    batches = make_batches(as_adapter(model), prompts, skip_first=SKIP_FIRST, batch_size=None)
    return {
        number: places
        for batch in batches
        for number, places in zip(batch.numbers, _places(batch, N_PLACES, seed).T, strict=True)
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_effects_are_those_of_plain_hooks_and_of_layers_exchanged(tiny, architecture):
    model, prompts = tiny(architecture), ragged()
    expected = expected_effects(model, prompts)
    before = hooks_on(model)
    found = measured(model, prompts)
    assert hooks_on(model) == before
    np.testing.assert_allclose(found.skip, expected["skip"], atol=1e-5)
    np.testing.assert_allclose(found.swap, expected["swap"], atol=1e-5)
    # There was something to compare.
    assert found.curve("skip", "all").values.min() > 1e-3
    assert found.curve("swap", "same").values.min() > 1e-4


def test_what_cannot_reach_later_tokens_does_not(tiny):
    """The last block, and the last two swapped, hand nothing on to later tokens."""
    found = measured(tiny("neox"))
    for change in ("skip", "swap"):
        for measure, nothing in (("kl", 0.0), ("top1_kept", 1.0), ("entropy", 0.0)):
            curve = found.curve(change, "future", measure)
            assert curve.values[-1] == curve.low[-1] == curve.high[-1] == nothing
            assert (curve.values[:-1] != nothing).all()
    # Nothing comes after the last block, so that only its own token counts.
    last = (slice(None), -1)
    np.testing.assert_allclose(found.skip[0][last], found.skip[1][last], atol=1e-6)


def test_a_model_without_reuse_of_keys_gives_the_same(tiny, monkeypatch):
    model = tiny("llama")
    found = measured(model)
    monkeypatch.setattr(RecordedRun, "_resumes_at", lambda *_: False)
    slow = measured(model)
    np.testing.assert_allclose(slow.skip, found.skip, atol=1e-6)
    np.testing.assert_allclose(slow.swap, found.swap, atol=1e-6)


def test_batches_their_order_and_calls_do_not_matter(tiny, monkeypatch):
    model, prompts = tiny("gpt2"), ragged()
    found = measured(model, prompts)
    monkeypatch.setattr("mspgt_lens.perturbation.block_runs._PREFIX_TOKENS", 1)
    for other in (measured(model, prompts, batch_size=1), measured(model, prompts, batch_size=3)):
        np.testing.assert_allclose(other.skip, found.skip, atol=1e-6)
        np.testing.assert_allclose(other.swap, found.swap, atol=1e-6)
    turned = measured(model, ml.PromptDataset([list(prompts)[i] for i in (3, 1, 2, 0)]))
    # Groups are numbered by the first prompt that runs.
    np.testing.assert_allclose(np.sort(turned.skip), np.sort(found.skip), atol=1e-6)
    assert turned.settings == found.settings


def test_places_are_drawn_by_seed_and_leave_a_later_position(tiny):
    model = tiny("llama")
    adapter = as_adapter(model)
    (batch,) = make_batches(adapter, ragged(), skip_first=SKIP_FIRST, batch_size=None)
    drawn = np.stack([_places(batch, 50, seed) for seed in (0, 0, 1)])
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    last = batch.mask.sum(dim=1).numpy() - 1
    assert drawn.min() == SKIP_FIRST
    assert (drawn.max(axis=(0, 1)) == last - 1).all()


def test_a_curve_holds_every_group_and_its_interval(tiny):
    found = measured(tiny("llama"))
    curve = found.curve("swap", "same", "top1_kept")
    index = REACHES.index("same"), SHIFTS.index("top1_kept")
    np.testing.assert_array_equal(curve.by_fold, found.swap[index].T)
    np.testing.assert_allclose(curve.values, found.swap[index].mean(axis=1))
    spread = found.swap[index].std(axis=1, ddof=1) / math.sqrt(3)
    np.testing.assert_allclose(curve.high - curve.values, 4.302653 * spread, rtol=1e-5)
    table = found.to_dataframe()
    assert len(table) == 9 * (N_LAYERS + N_LAYERS - 1)
    part = table.query("perturbation == 'swap' and mode == 'same' and quantity == 'top1_kept'")
    np.testing.assert_allclose(part["value"], curve.values)


def test_prompts_without_a_future_are_left_out_and_said_so(tiny):
    tokens = random_tokens(4, 9)
    rows = [*tokens[:3], tokens[3, : SKIP_FIRST + 1]]
    prompts = ml.PromptDataset.from_tokens(rows)
    with pytest.warns(UserWarning, match="1 of 4 prompts were left out.*no two positions"):
        found = measured(tiny("llama"), prompts)
    assert found.skip.shape[3] == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_places": 0}, "n_places must be at least 1 position, got 0"),
        ({"skip_first": -1}, "skip_first must be 0 or more tokens, got -1"),
    ],
)
def test_wrong_arguments_are_named(tiny, wrong, message):
    with pytest.raises(ValueError, match=message):
        ml.studies.block_effects(tiny("llama"), ragged(), progress=False, **wrong)


def test_what_is_not_there_is_named(tiny):
    found = measured(tiny("llama"))
    for wrong in ({"change": "drop"}, {"change": "skip", "reach": "past"}):
        with pytest.raises(ValueError, match="must be one of"):
            found.curve(**wrong)
    with pytest.raises(ValueError, match="measure must be one of kl, top1_kept, entropy"):
        found.curve("skip", "all", "agreement")


def test_models_that_cannot_be_served_are_refused(tiny):
    with pytest.raises(ml.CannotMeasure, match="has 1 block; swapping neighboring blocks needs"):
        measured(tiny_model("llama", n_layers=1))
    encoder = tiny_model("bert")
    encoder.tokenizer = tiny_tokenizer()
    with pytest.raises(ml.CannotMeasure, match="attends in both directions"):
        measured(encoder)
