"""Encoders: read where tokens are hidden from them."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny import ENCODERS, as_text, random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.gathering import HIDDEN_SHARE
from mspgt_lens.models import as_adapter
from mspgt_lens.targets import masked_targets

N_PROMPTS, N_POS = 28, 60
SPECIAL = torch.arange(4)
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be told from 0")


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    model = tiny_model(request.param, n_layers=6)
    model.tokenizer = tiny_tokenizer()
    return model


def dataset(model, n_prompts=N_PROMPTS):
    texts = [as_text(row) for row in random_tokens(n_prompts, N_POS)]
    return ml.PromptDataset.from_texts(model, texts)


@pytest.fixture(scope="module")
def profile(encoder):
    return ml.profile_layers(encoder, dataset(encoder), n_folds=3, progress=False)


def test_prompts_begin_and_end_as_the_model_expects(encoder):
    prompt = next(iter(dataset(encoder)))
    assert (prompt.tokens[0], prompt.tokens[-1]) == (1, 2)
    assert len(prompt.tokens) == N_POS + 2
    short = ml.PromptDataset.from_texts(encoder, [as_text(torch.arange(4, 24))], max_length=12)
    windows = [p.tokens for p in short]
    assert [len(w) for w in windows] == [12, 12]
    assert all((w[0], w[-1]) == (1, 2) for w in windows)


def test_logits_are_decoded_exactly(encoder):
    adapter = as_adapter(encoder)
    tokens = torch.from_numpy(next(iter(dataset(encoder))).tokens)
    final = []
    with adapter.inference():
        adapter.run(
            tokens[None],
            torch.ones(1, len(tokens), dtype=torch.bool),
            lambda site, residual: final.append(residual[0]),
        )
        decoded = adapter.decode(adapter.normalize(final[-1]))
        expected = encoder.original_model(tokens[None]).logits[0]
    assert len(final) == adapter.n_layers + 1
    torch.testing.assert_close(decoded, expected)
    adapter.check_decoding(tokens)


def test_targets_are_those_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    tokens = random_tokens(3, 40)
    tokens[:, 0], tokens[1, 35:] = 1, 0
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 35:] = False
    ordinary = mask & (tokens >= 4)
    hidden = (torch.rand(tokens.shape, generator=generator) < 0.3) & ordinary
    hidden[:, :2] = False
    features = torch.randn(101, 5, generator=generator)
    bands = {"near": (1, 1), "middle": (2, 6), "wide": (1, 3)}
    found = masked_targets(
        tokens, mask, hidden, features=features, special=SPECIAL, bands=bands, skip_first=2
    )
    rows = []
    for p in range(3):
        for t in range(40):
            if not (hidden[p, t] and t >= 2):
                assert not found.read[p, t]
                continue
            columns, defined = [], True
            for a, b in bands.values():
                seen = [q for q in range(40) if a <= abs(q - t) <= b and ordinary[p, q]]
                seen = [q for q in seen if not hidden[p, q]]
                defined &= 2 * len(seen) >= b - a + 1
                columns.append(features[tokens[p, seen]].mean(0))
            for a, b in bands.values():
                unseen = [q for q in range(40) if a - 1 <= abs(q - t) <= b - 1 and hidden[p, q]]
                defined &= len(unseen) >= 1
                columns.append(features[tokens[p, unseen]].mean(0))
            assert bool(found.read[p, t]) == defined
            if defined:
                rows.append(torch.cat(columns))
    torch.testing.assert_close(found.values, torch.stack(rows))
    # The only band of one token: visible ones on either side, and the hidden one itself.
    assert found.single.shape == (3, 40, 2, 2)
    for p, t in np.ndindex(3, 40):
        beside = [
            int(tokens[p, q]) if 0 <= q < 40 and ordinary[p, q] and not hidden[p, q] else -1
            for q in (t + 1, t - 1)
        ]
        assert found.single[p, t, 0].tolist() == beside
        assert found.single[p, t, 1].tolist() == [int(tokens[p, t]) if hidden[p, t] else -1, -1]
    assert torch.equal(found.answered, hidden & (torch.arange(40) >= 2))
    assert torch.equal(found.answers, tokens)


@contextmanager
def inputs_of(model, change=lambda tokens: tokens):
    """What the model is given while inside, longer than the check of decoding; changed first."""
    run, given = model.run_with_hooks, []

    def keep(tokens, *args, **kwargs):
        if tokens.shape[1] > 16:
            tokens = change(tokens)
            given.append(tokens)
        return run(tokens, *args, **kwargs)

    model.run_with_hooks = keep
    try:
        yield given
    finally:
        del model.run_with_hooks


def originals(prompts):
    """Prompts by their beginning, where nothing is hidden."""
    return {tuple(p.tokens[:4].tolist()): torch.from_numpy(p.tokens) for p in prompts}


def test_relevance_ends_at_the_model_s_own_gain_on_hidden_tokens(encoder, profile):
    truth = originals(dataset(encoder))
    with inputs_of(encoder) as batches:
        again = ml.profile_layers(encoder, dataset(encoder), n_folds=3, progress=False)
    assert again == profile
    losses = []
    with torch.no_grad():
        for batch in batches:
            scores = encoder.original_model(batch).logits.log_softmax(-1)
            for row, row_scores in zip(batch, scores, strict=True):
                tokens = truth[tuple(row[:4].tolist())]
                hidden = row != tokens
                # The first four, BOS among them, and EOS are never hidden.
                assert hidden.sum() == round(HIDDEN_SHARE * (N_POS - 3))
                assert not hidden[:4].any()
                losses += (-row_scores[hidden].gather(1, tokens[hidden, None])).flatten().tolist()
    # All hidden tokens are decoded here.
    assert profile.settings["n_decoded"] == len(losses)
    loss = profile.settings["unigram_cross_entropy"] - profile.relevance.values[-1]
    assert loss == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_token_that_is_not_really_hidden_is_read_off_the_first_site():
    model = tiny_model("bert", n_layers=6)
    model.tokenizer = tiny_tokenizer()
    prompts = list(dataset(model, 60))
    truth = originals(prompts)

    def unhidden(tokens):
        return torch.stack([truth[tuple(row[:4].tolist())] for row in tokens])

    settings = {"n_folds": 3, "progress": False}
    blind = ml.profile_layers(model, dataset(model, 60), **settings).predicted["local"]
    with inputs_of(model, unhidden):
        told = ml.profile_layers(model, dataset(model, 60), **settings).predicted["local"]
    assert (blind.values < 0.1).all()
    # Of 97 tokens, which tell 4.6 nats.
    assert 4.4 < told.values[0] < np.log(101)


def test_signals_use_the_distance_on_both_sides(profile):
    # Uniform attention over n keys spans (n^2 - 1) / 3n on average over all queries.
    n = N_POS
    assert np.allclose(profile.signals["attention_span"].values, (n**2 - 1) / (3 * n), rtol=0.25)
    assert np.allclose(profile.signals["attention_entropy"].values, np.log(n), rtol=0.15)


def test_results_say_what_was_read(profile):
    assert profile.settings["hidden_share"] == HIDDEN_SHARE
    assert "hidden" in profile.relevance.guarantee
    assert "visible tokens" in profile.retained["global"].guarantee
    figure = ml.plot_profile(profile).to_json()
    assert "the hidden token" in figure
    assert "visible tokens 2 to 16 away" in figure
    assert "hidden tokens" in ml.plots.plot_information_plane(profile).to_json()
    partition = ml.detect_scales(profile=profile, n_bootstraps=20)
    assert partition.n_layers == 6


def test_what_needs_a_causal_model_says_so(encoder):
    prompts = dataset(encoder)
    pairs = ml.PromptPairs.from_tokens([[5, 6]], [[7, 6]], [8], [9])
    tokens = random_tokens(4, 20)
    calls = {
        "patching": lambda: ml.patch_layers(encoder, pairs),
        "perturbing": lambda: ml.perturb_scales(encoder, prompts, (2, 4)),
        "brittleness": lambda: ml.measure_brittleness(encoder, prompts, (2, 4)),
        "classes": lambda: ml.classify_tokens(encoder, prompts),
        "generating": lambda: ml.generation_effects(encoder, prompts, (2, 4)),
        "probe": lambda: ml.fit_hvib(encoder, prompts),
        "cache": lambda: ml.profile_cache(encoder, {}, tokens),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="attends in both directions"):
            call()


def test_a_tokenizer_with_a_mask_token_is_needed():
    with pytest.raises(ValueError, match=r"tokenizer with a mask token; set model\.tokenizer"):
        as_adapter(tiny_model("bert"))
