"""A lens to use: against plain regression on cached activations, kept, and read through."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import as_text, random_model, random_tokens, tiny_config, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens.folds import balanced_folds
from mspgt_lens.gathering import BatchReader
from mspgt_lens.information import lens as lens_module
from mspgt_lens.models import bridge_from_huggingface
from mspgt_lens.profile import passing, run

N_FOLDS, N_PROMPTS, N_POS, SKIP = 4, 24, 40, 4
N_LAYERS = 4
TOKENS = random_tokens(N_PROMPTS, N_POS)
QUICK = {"n_folds": N_FOLDS, "progress": False}
# Random weights predict nothing of random tokens.
pytestmark = [
    pytest.mark.filterwarnings("ignore:relevance is not seen to be above 0"),
    pytest.mark.filterwarnings("ignore:.*cannot be told from 0"),
]


def _rms(h, eps):
    return h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _layer(h, eps):
    return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + eps).sqrt()


# The norm without its learned part, and from there to the logits, by transformers' own modules.
PLAIN = {
    "llama": (
        lambda m, h: _rms(h, m.config.rms_norm_eps),
        lambda m, z: m.lm_head(m.model.norm.weight * z),
    ),
    "gemma": (
        lambda m, h: _rms(h, m.config.rms_norm_eps),
        lambda m, z: m.lm_head((1 + m.model.norm.weight) * z),
    ),
    "gpt2": (
        lambda m, h: _layer(h, m.config.layer_norm_epsilon),
        lambda m, z: m.lm_head(m.transformer.ln_f.weight * z + m.transformer.ln_f.bias),
    ),
    "neox": (
        lambda m, h: _layer(h, m.config.layer_norm_eps),
        lambda m, z: m.get_output_embeddings()(
            m.gpt_neox.final_layer_norm.weight * z + m.gpt_neox.final_layer_norm.bias
        ),
    ),
}


class Plain:
    """A lens by ridge regression on cached rows, in float64, with no sums over folds."""

    def __init__(self, architecture, directions=None):
        self.model = tiny_model(architecture).to(torch.float64)
        own = random_model(tiny_config(architecture)).to(torch.float64)
        norm, decode = PLAIN[architecture]
        self.norm, self.decode = (lambda h: norm(own, h)), (lambda z: decode(own, z))
        self.directions = directions or (lambda site, z: z)
        with torch.no_grad():
            _, cache = self.model.run_with_cache(TOKENS)
        names = [f"blocks.{block}.hook_resid_pre" for block in range(N_LAYERS)]
        names.append(f"blocks.{N_LAYERS - 1}.hook_resid_post")
        self.sites = [self.norm(cache[name])[:, SKIP:] for name in names]
        assigned = balanced_folds(dict.fromkeys(range(N_PROMPTS), N_POS), N_FOLDS, 0)
        self.fold = np.array([assigned[prompt] for prompt in range(N_PROMPTS)])

    def rows(self, site, z):
        """Rows as the regression sees them: projected, and every coordinate of unit variance."""
        return self.directions(site, z) / self.scale(site)

    def scale(self, site):
        return self.directions(site, self.sites[site]).flatten(0, 1).std(0, correction=0)

    def fit(self, site, left_out, strength):
        """The map fitted on the prompts of all other folds."""
        chosen = torch.from_numpy(~np.isin(self.fold, left_out))
        z = self.rows(site, self.sites[site][chosen]).flatten(0, 1)
        t = self.sites[-1][chosen].flatten(0, 1)
        mean_z, mean_t = z.mean(0), t.mean(0)
        covariance = (z - mean_z).T @ (z - mean_z) / len(z)
        weights = torch.linalg.solve(
            covariance + strength * torch.eye(len(covariance), dtype=torch.float64),
            (z - mean_z).T @ (t - mean_t) / len(z),
        )
        return lambda asked: mean_t + (self.rows(site, asked) - mean_z) @ weights

    def strengths(self):
        """The best of the grid per outer fold, and over all folds: by squared errors themselves."""
        grid = lens_module.LENS_GRID
        costs = np.zeros((N_FOLDS, len(grid)))
        for site in range(N_LAYERS):
            for first in range(N_FOLDS):
                pair = (first, (first + 1) % N_FOLDS)
                for outer, inner in (pair, pair[::-1]):
                    of_inner = torch.from_numpy(self.fold == inner)
                    z, t = (self.sites[s][of_inner].flatten(0, 1) for s in (site, -1))
                    for index, strength in enumerate(grid):
                        error = self.fit(site, pair, strength)(z) - t
                        share = error.pow(2).mean(0) / t.var(0, correction=0)
                        costs[outer, index] += float(share.mean())
        return np.array(grid)[costs.argmin(1)], grid[int(costs.sum(0).argmin())]

    def scores(self, strengths):
        """Held-out cross-entropy and divergence by prompt, position and site."""
        answers = TOKENS[:, SKIP + 1 :]
        own = self.decode(self.sites[-1][:, :-1]).log_softmax(-1)
        cross_entropy = torch.zeros(*answers.shape, N_LAYERS + 1, dtype=torch.float64)
        kl = torch.zeros_like(cross_entropy)
        for site in range(N_LAYERS + 1):
            told = own.clone()
            for k in range(N_FOLDS if site < N_LAYERS else 0):
                mine = torch.from_numpy(self.fold == k)
                final = self.fit(site, [k], strengths[k])(self.sites[site][mine, :-1])
                told[mine] = self.decode(final).log_softmax(-1)
            cross_entropy[..., site] = -told.gather(-1, answers[..., None])[..., 0]
            kl[..., site] = (own.exp() * (own - told)).sum(-1)
        return cross_entropy.detach().numpy(), kl.detach().numpy()


def _assert_means(curve, scores):
    """The curve is the mean over positions, its interval from prompts as the groups."""
    values = scores.mean((0, 1))
    sums = (scores - values).sum(1)
    error = np.sqrt(N_PROMPTS / (N_PROMPTS - 1) * (sums**2).sum(0)) / (
        scores.shape[0] * scores.shape[1]
    )
    reach = stats.t.ppf(0.975, N_PROMPTS - 1) * error
    for drawn, expected in (
        (curve.values, values),
        (curve.low, values - reach),
        (curve.high, values + reach),
    ):
        np.testing.assert_allclose(drawn, expected, atol=1e-5)


@pytest.fixture(scope="module", params=PLAIN)
def plain(request):
    return Plain(request.param)


@pytest.fixture(scope="module")
def fitted(plain):
    return ml.fit_lens(plain.model, ml.PromptDataset.from_tokens(TOKENS), **QUICK)


def test_scores_equal_plain_cross_fitted_regression(plain, fitted):
    strengths, _ = plain.strengths()
    cross_entropy, kl = plain.scores(strengths)
    assert fitted.n_decoded == kl.shape[0] * kl.shape[1]
    _assert_means(fitted.cross_entropy, cross_entropy)
    _assert_means(fitted.kl, kl)
    assert fitted.kl.values[-1] == 0.0
    gain = fitted.unigram - fitted.cross_entropy.values
    np.testing.assert_allclose(fitted.relevance.values, gain, atol=1e-12)


def test_logits_equal_plain_regression_on_all_prompts(plain, fitted):
    _, strength = plain.strengths()
    assert fitted.strength == strength
    tokens = random_tokens(3, 20, seed=5)
    with torch.no_grad():
        own, cache = plain.model.run_with_cache(tokens)
    for site in range(N_LAYERS):
        residual = cache[f"blocks.{site}.hook_resid_pre"]
        expected = plain.decode(plain.fit(site, [], strength)(plain.norm(residual)))
        torch.testing.assert_close(
            fitted.logits(site, residual), expected.detach(), atol=1e-5, rtol=1e-5
        )
    last = cache[f"blocks.{N_LAYERS - 1}.hook_resid_post"]
    torch.testing.assert_close(fitted.logits(N_LAYERS, last), own, atol=1e-5, rtol=1e-5)
    # Any shape: one position alone, and no prompt at all.
    assert fitted.logits(2, residual[1, 3]).shape == (101,)
    assert fitted.logits(2, residual[:0]).shape == (0, 20, 101)


def test_relevance_of_a_profile_is_the_lens_s_own(plain, monkeypatch):
    # The model's own attention, which runs where no pattern is asked for, rounds in its own way.
    monkeypatch.setattr(passing, "own_attention", lambda _: nullcontext(False))
    lens = ml.fit_lens(plain.model, ml.PromptDataset.from_tokens(TOKENS), **QUICK)
    # A profile decodes as many positions as it can afford; here all, as the lens does.
    monkeypatch.setattr(lens_module, "MIN_POSITIONS", 10_000)
    profile = ml.profile_layers(
        plain.model,
        ml.PromptDataset.from_tokens(TOKENS),
        bands={"local": (1, 1), "far": (2, 4)},
        **QUICK,
    )
    for name in ("values", "low", "high", "by_fold"):
        np.testing.assert_allclose(
            getattr(profile.relevance, name), getattr(lens.relevance, name), atol=1e-10, rtol=0
        )
    assert profile.settings["unigram_cross_entropy"] == lens.unigram


def test_wide_residuals_are_projected_alike_in_the_fit_and_in_the_logits(monkeypatch):
    monkeypatch.setattr(run, "MAX_WIDTH", 12)
    plain = Plain("llama")
    lens = ml.fit_lens(plain.model, ml.PromptDataset.from_tokens(TOKENS), **QUICK)
    assert lens.weights.shape == (N_LAYERS, 12, 32)
    plain = Plain("llama", lambda site, z: (z / lens.spread[site]) @ lens.axes)
    _, strength = plain.strengths()
    assert lens.strength == strength
    _, cache = plain.model.run_with_cache(TOKENS[:2])
    for site in range(N_LAYERS):
        residual = cache[f"blocks.{site}.hook_resid_pre"].detach()
        expected = plain.decode(plain.fit(site, [], strength)(plain.norm(residual)))
        torch.testing.assert_close(
            lens.logits(site, residual), expected.detach(), atol=1e-5, rtol=1e-5
        )


def test_the_soft_cap_of_logits_is_kept():
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
        architectures=["Gemma2ForCausalLM"],
    )
    model = bridge_from_huggingface(random_model(config), None, "tiny-gemma2")
    lens = ml.fit_lens(model, ml.PromptDataset.from_tokens(TOKENS), **QUICK)
    with torch.no_grad():
        own, cache = model.run_with_cache(TOKENS[:2])
    torch.testing.assert_close(
        lens.logits(2, cache["blocks.1.hook_resid_post"]), own, atol=1e-4, rtol=1e-4
    )
    early = lens.logits(0, 100 * cache["blocks.0.hook_resid_pre"])
    assert 1.0 < early.abs().max() <= 2.0


def test_neither_the_batches_nor_the_caller_s_grouping_of_prompts_decide(plain, fitted):
    again = ml.fit_lens(plain.model, ml.PromptDataset.from_tokens(TOKENS), batch_size=1, **QUICK)
    torch.testing.assert_close(again.weights, fitted.weights, atol=1e-8, rtol=1e-8)
    other = ml.fit_lens(plain.model, ml.PromptDataset.from_tokens(TOKENS), seed=1, **QUICK)
    assert not np.allclose(other.kl.values[:-1], fitted.kl.values[:-1], atol=1e-9)


def test_attention_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(BatchReader, "on_pattern", lambda *_: pytest.fail("a pattern was read"))
    ml.fit_lens(tiny_model("llama"), ml.PromptDataset.from_tokens(TOKENS), **QUICK)


@pytest.fixture(scope="module")
def worded():
    model = tiny_model("llama")
    model.tokenizer = tiny_tokenizer()
    lens = ml.fit_lens(model, [as_text(row) for row in TOKENS], **QUICK)
    return model, lens


def test_a_loaded_lens_says_that_it_has_no_model_and_takes_its_own_only(worded, tmp_path):
    model, lens = worded
    loaded = ml.load_result(lens.save(tmp_path / "lens"))
    assert loaded == lens
    assert "No model is attached" not in repr(lens)
    assert "No model is attached: attach(model)" in repr(loaded)
    residual = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for call in (lambda: loaded.logits(1, residual), lambda: loaded.read("w5 w6")):
        with pytest.raises(ValueError, match=r"made without it: lens = lens\.attach\(model\)"):
            call()
    attached = loaded.attach(model)
    assert torch.equal(attached.logits(1, residual), lens.logits(1, residual))
    with pytest.raises(ValueError, match="made without it"):
        loaded.logits(1, residual)
    other = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match="must be the one that the lens was fitted on, tiny-llama"):
        loaded.attach(other)
    with pytest.raises(ValueError, match="must be the one that the lens was fitted on"):
        ml.plot_lens(lens, other, [5, 6, 7])


def test_a_model_that_was_changed_since_is_refused(worded):
    model = tiny_model("gpt2")
    lens = ml.fit_lens(model, ml.PromptDataset.from_tokens(TOKENS), **QUICK)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    with pytest.raises(ValueError, match="fit_lens"):
        lens.attach(model)


@pytest.mark.parametrize(
    ("site", "shape", "said"),
    [
        (5, (2, 32), "site must be 0 to 4, got 5"),
        (-1, (2, 32), "site must be 0 to 4, got -1"),
        (1, (2, 31), r"end in the width of tiny-llama, 32; got shape \(2, 31\)"),
    ],
)
def test_what_cannot_be_decoded_is_named(worded, site, shape, said):
    with pytest.raises(ValueError, match=said):
        worded[1].logits(site, torch.zeros(*shape))


def test_a_reading_holds_what_plain_logits_say(worded):
    model, lens = worded
    ids = [1, *random_tokens(1, 9, seed=3)[0].tolist()]
    with torch.no_grad():
        own, cache = model.run_with_cache(torch.tensor([ids]))
    reading = lens.read(as_text(torch.tensor(ids[1:])))
    assert reading == lens.read(torch.tensor(ids)) == lens.read(ids)
    assert reading.tokens == ("<bos>", *(f"w{i}" for i in ids[1:]))
    assert reading.answers.tolist() == [*ids[1:], -1]
    for site in range(N_LAYERS + 1):
        logits = (
            own if site == N_LAYERS else lens.logits(site, cache[f"blocks.{site}.hook_resid_pre"])
        )
        share = logits[0].double().softmax(-1).numpy()
        order = np.argsort(-share, axis=1)
        np.testing.assert_array_equal(reading.top[site], order[:, :5])
        np.testing.assert_allclose(
            reading.probability[site], np.take_along_axis(share, order[:, :5], 1), atol=1e-6
        )
        np.testing.assert_allclose(
            reading.entropy[site], -(share * np.log(share)).sum(1), atol=1e-5
        )
        ranks = [1 + list(order[pos]).index(ids[pos + 1]) for pos in range(len(ids) - 1)]
        assert reading.rank[site].tolist() == [*ranks, 0]
    assert set(reading.texts.values()) >= {f"w{i}" for i in ids[1:]}
    assert "first 4 tokens lie outside" in reading.warnings[0]
    table = reading.to_dataframe()
    assert len(table) == (N_LAYERS + 1) * (3 * len(ids) - 1)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("", ValueError, "text must hold a token"),
        (" ".join(["w5"] * 300), ValueError, "fit the context of tiny-llama, 256 tokens; got 30"),
        ([[5, 6]], ValueError, r"as a vector of whole numbers; got shape \(1, 2\)"),
        ([5.0, 6.0], ValueError, "of torch.float32"),
        ([5, 101], ValueError, "outside the vocabulary"),
    ],
)
@pytest.mark.filterwarnings("ignore:1 blank text")
def test_texts_that_cannot_be_read_are_named(worded, text, error, said):
    with pytest.raises(error, match=said):
        worded[1].read(text)


def test_long_texts_are_decoded_in_parts(worded, monkeypatch):
    from mspgt_lens.lens import reading

    text = as_text(random_tokens(1, 30, seed=4)[0])
    whole = worded[1].read(text)
    monkeypatch.setattr(reading, "_LOGITS_PER_CHUNK", 7 * 101)
    parts = worded[1].read(text)
    np.testing.assert_array_equal(parts.top, whole.top)
    np.testing.assert_allclose(parts.entropy, whole.entropy, atol=1e-5)


def test_activations_that_are_not_finite_are_named(worded):
    broken = tiny_model("llama", seed=2)
    lens = ml.fit_lens(broken, ml.PromptDataset.from_tokens(TOKENS), **QUICK)
    with torch.no_grad():
        broken.original_model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="site 3 are NaN or infinite"):
        lens.read([5, 6, 7, 8, 9])


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_an_encoder_is_fitted_and_read_where_tokens_are_hidden(architecture, monkeypatch):
    from mspgt_lens.lens import reading as reading_module

    model = tiny_model(architecture, n_layers=2)
    model.tokenizer = tiny_tokenizer()
    texts = [as_text(row) for row in random_tokens(36, 120)]
    lens = ml.fit_lens(model, texts, n_folds=3, progress=False)
    # At most the share of ordinary tokens that is hidden, less those without a neighbor to see.
    assert 0.12 * 36 * 116 < lens.n_tokens <= 0.155 * 36 * 116
    assert lens.kl.values[-1] == 0.0
    ids = torch.tensor([1, 20, 30, 40, 50, 2])
    monkeypatch.setattr(reading_module, "_TOKENS_PER_RUN", 12)
    reading = lens.read(as_text(ids[1:-1]))
    assert reading.positions.tolist() == [1, 2, 3, 4]
    assert reading.answers.tolist() == [20, 30, 40, 50]
    for number, place in enumerate(range(1, 5)):
        hidden = ids.clone()
        hidden[place] = model.tokenizer.mask_token_id
        with torch.no_grad():
            own = model.original_model(hidden[None]).logits[0, place].softmax(-1).numpy()
            _, cache = model.run_with_cache(hidden[None])
        early = lens.logits(1, cache["blocks.1.hook_resid_pre"][0, place]).softmax(-1).numpy()
        for site, share in ((2, own), (1, early)):
            best = np.argsort(-share)[:5]
            np.testing.assert_array_equal(reading.top[site, number], best)
            np.testing.assert_allclose(reading.probability[site, number], share[best], atol=1e-5)
            answer = int(ids[place])
            assert reading.rank[site, number] == 1 + (share > share[answer]).sum()


def test_structure_that_the_model_uses_is_found_before_its_end():
    """A model made to predict token t + 1 from token t: the lens finds that at site 0."""
    model = tiny_model("llama", n_layers=2)
    own = model.original_model
    with torch.no_grad():
        for layer in own.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
    tokens = random_tokens(30, 40)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    lens = ml.fit_lens(model, ml.PromptDataset.from_tokens(tokens), **QUICK)
    # Blocks that add nothing: every site is the last one.
    assert (np.abs(lens.kl.values) < 1e-3).all()
    torch.testing.assert_close(
        lens.logits(0, cache["blocks.0.hook_resid_pre"]), logits.detach(), atol=0.05, rtol=0.05
    )


def test_too_little_text_and_models_that_cannot_be_decoded_are_refused():
    model = tiny_model("llama")
    few = ml.PromptDataset.from_tokens(TOKENS[:6, :20])
    with pytest.raises(ml.CannotMeasure, match="give more or longer prompts"):
        ml.fit_lens(model, few, n_folds=3, progress=False)
    with pytest.raises(ValueError, match="batch_size must be at least 1 or None, got 0"):
        ml.fit_lens(model, few, batch_size=0, progress=False)
    with pytest.raises(TypeError, match="HookedTransformer or TransformerBridge"):
        ml.fit_lens(torch.nn.Linear(2, 2), few, progress=False)
