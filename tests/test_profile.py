"""Layer profiles: invariances, slow twins, bad input, streaming, saving and merging."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny import ARCHITECTURES, as_text, random_tokens, tiny_model, tiny_tokenizer
from torch import Tensor

import mspgt_lens as ml
from mspgt_lens import gathering as gathering_module
from mspgt_lens import moments as moments_module
from mspgt_lens.folds import stable_hash
from mspgt_lens.gathering import add_batch, make_batches
from mspgt_lens.models import ModelAdapter, as_adapter
from mspgt_lens.moments import Moments, plan_moments
from mspgt_lens.profile import run as profile_module
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.prompts import Prompt
from mspgt_lens.results import Curve

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*more groups of text are needed:UserWarning"),
]
SMALL = {"n_layers": 2, "d_model": 16, "n_ctx": 128}
BANDS = {"local": (1, 1), "intermediate": (2, 4)}
QUICK: dict[str, Any] = {"bands": BANDS, "n_folds": 3}
TOKENS = random_tokens(24, 24)
LENGTHS = [24, 13, 18, 24, 16, 20, 12, 22, 15, 24, 19, 17] * 2
RAGGED = [row[:length].tolist() for row, length in zip(TOKENS, LENGTHS, strict=True)]


def prompts_of(tokens: Any = TOKENS, **kwargs: Any) -> ml.PromptDataset:
    return ml.PromptDataset.from_tokens(tokens, **kwargs)


def run(model: Any, prompts: Any = None, **kwargs: Any) -> LayerProfile:
    chosen = prompts_of() if prompts is None else prompts
    return ml.profile_layers(model, chosen, **{**QUICK, "progress": False, **kwargs})


@pytest.fixture
def model(tiny: Callable[..., Any]) -> Any:
    """A small model to be read only."""
    return tiny("llama", **SMALL)


@pytest.fixture(scope="module")
def profile(tiny: Callable[..., Any]) -> LayerProfile:
    """The profile of ``model`` at the settings of these tests."""
    return run(tiny("llama", **SMALL))


@pytest.fixture(scope="module")
def ragged(tiny: Callable[..., Any]) -> Callable[[str], LayerProfile]:
    """``ragged(architecture)``: the profile of prompts of many lengths, without any padding."""
    profiles: dict[str, LayerProfile] = {}

    def profile_of(architecture: str) -> LayerProfile:
        if architecture not in profiles:
            model = tiny(architecture, **SMALL)
            profiles[architecture] = run(model, prompts_of(RAGGED), logit_lens=True)
        return profiles[architecture]

    return profile_of


def assert_same(
    first: LayerProfile, second: LayerProfile, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """The same curves; by default to the last digit.

    The ends of an interval are small differences of large numbers: they get ``rtol`` of the
    largest number in the curve.
    """
    pairs = list(zip(first.curves(), second.curves(), strict=True))
    for (quantity, scale, a), (other_quantity, other_scale, b) in pairs:
        assert (quantity, scale) == (other_quantity, other_scale)
        largest = np.abs([b.values, b.low, b.high]).max()
        for name in ("values", "low", "high"):
            np.testing.assert_allclose(
                getattr(a, name),
                getattr(b, name),
                rtol=rtol,
                atol=atol if name == "values" else atol + rtol * largest,
                err_msg=f"{quantity} {scale} {name}",
            )
        assert (a.unit, a.guarantee) == (b.unit, b.guarantee)


def pad(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Rows padded on one side with an ordinary token, and their mask."""
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), 50)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        tokens[index, at], mask[index, at] = torch.tensor(row), True
    return tokens, mask


def cache_of(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Any:
    kwargs = {} if mask is None else {"attention_mask": mask.long()}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=ml.needed_hooks(model), **kwargs)
    return cache


def hooks_on(model: Any) -> list[int]:
    points = [len(hook.fwd_hooks) for hook in model.hook_dict.values()]
    return points + [len(module._forward_hooks) for module in model.modules()]


# ----------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_matter(
    model: Any, ragged: Callable[[str], LayerProfile], side: str
) -> None:
    tokens, mask = pad(RAGGED, side)
    assert_same(run(model, prompts_of(tokens, mask=mask), logit_lens=True), ragged("llama"))


def test_texts_and_their_tokens_give_the_same_profile() -> None:
    model = tiny_model("llama", **SMALL)
    model.tokenizer = tiny_tokenizer()
    texts = [as_text(row) for row in TOKENS]
    tokens = [[1, *row] for row in TOKENS.tolist()]
    by_texts = run(model, texts)
    assert_same(by_texts, run(model, prompts_of(tokens)))
    assert_same(by_texts, run(model, ml.PromptDataset.from_texts(model, iter(texts))))


def test_plain_texts_fit_a_model_with_a_short_context() -> None:
    """Without a length being asked for, windows are as long as the model takes."""
    model = tiny_model("llama", n_layers=2, d_model=16, n_ctx=64)
    model.tokenizer = tiny_tokenizer()
    assert run(model, [as_text(row) for row in random_tokens(24, 24)]).n_groups == 24


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_size_does_not_matter(
    tiny: Callable[..., Any], ragged: Callable[[str], LayerProfile], batch_size: int
) -> None:
    model, default = tiny("gpt2", **SMALL), ragged("gpt2")
    other = run(model, prompts_of(RAGGED), logit_lens=True, batch_size=batch_size)
    assert_same(other, default, rtol=1e-5, atol=1e-5)
    assert other.settings == default.settings


def test_batch_size_does_not_matter_where_wide_residuals_are_projected(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_module, "MAX_WIDTH", 8)
    model = tiny("llama", **SMALL)
    one = run(model, prompts_of(RAGGED), batch_size=1)
    many = run(model, prompts_of(RAGGED), batch_size=4)
    np.testing.assert_allclose(one.compression.values, many.compression.values, rtol=1e-3)


def test_two_runs_agree_to_the_last_digit(model: Any, profile: LayerProfile) -> None:
    again = run(model)
    assert_same(again, profile)
    assert (again.settings, again.n_tokens) == (profile.settings, profile.n_tokens)


def test_the_seed_decides_the_folds_and_nothing_else(model: Any, profile: LayerProfile) -> None:
    other = run(model, seed=1)
    assert not np.allclose(other.retained["local"].values, profile.retained["local"].values)
    np.testing.assert_allclose(other.compression.values, profile.compression.values, rtol=1e-6)


def test_no_global_random_state_is_touched(model: Any) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    run(model)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_what_was_measured_is_recorded(model: Any, profile: LayerProfile) -> None:
    assert (profile.model_name, profile.n_layers, profile.n_groups) == ("tiny-llama", 2, 24)
    assert profile.n_tokens == 24 * (24 - 4)
    assert dict(profile.bands) == BANDS
    recorded = {name: profile.settings[name] for name in ("noise", "n_folds", "skip_first", "seed")}
    assert recorded == {"noise": 0.1, "n_folds": 3, "skip_first": 4, "seed": 0}
    assert profile.settings["n_prompts"] == 24
    assert profile.settings["width"] == 16
    assert profile.versions["torch"] == torch.__version__
    grouped = run(model, prompts_of(groups=[i // 6 for i in range(24)]))
    assert (grouped.n_groups, grouped.n_tokens) == (4, profile.n_tokens)


def test_the_fingerprint_is_that_of_the_prompts(model: Any, profile: LayerProfile) -> None:
    def fingerprint(tokens: Tensor) -> str:
        return run(model, prompts_of(tokens)).settings["prompts_fingerprint"]

    assert fingerprint(TOKENS.flip(0)) == profile.settings["prompts_fingerprint"]
    changed = TOKENS.clone()
    changed[5, 5] = 4 + changed[5, 5] % 50
    assert fingerprint(changed) != profile.settings["prompts_fingerprint"]


def test_the_fingerprint_counts_repeated_prompts(model: Any) -> None:
    twice = run(model, prompts_of(TOKENS.repeat(2, 1))).settings["prompts_fingerprint"]
    others = run(model, prompts_of(random_tokens(12, 24, seed=9).repeat(2, 1)))
    assert twice != others.settings["prompts_fingerprint"]


def test_progress_is_shown_only_when_asked(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(model)
    assert capsys.readouterr() == ("", "")
    run(model, progress=True)
    assert "tok" in capsys.readouterr().err


# ------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_left_padded_cache_gives_the_same_profile(
    tiny: Callable[..., Any], ragged: Callable[[str], LayerProfile], architecture: str
) -> None:
    model = tiny(architecture, **SMALL)
    tokens, mask = pad(RAGGED, "left")
    cache = cache_of(model, tokens, mask)
    cached = ml.profile_cache(model, cache, tokens, mask=mask, logit_lens=True, **QUICK)
    assert_same(cached, ragged(architecture), rtol=1e-4, atol=2e-5)
    assert cached.settings == ragged(architecture).settings


@pytest.mark.parametrize("side", ["right", None])
def test_any_other_cache_gives_the_same_profile(model: Any, side: str | None) -> None:
    tokens, mask = (TOKENS, None) if side is None else pad(RAGGED, side)
    groups = [i // 2 for i in range(24)]
    cached = ml.profile_cache(
        model,
        cache_of(model, tokens, mask),
        tokens,
        mask=mask,
        groups=groups,
        logit_lens=True,
        coordinates="raw",
        seed=3,
        **QUICK,
    )
    direct = run(
        model,
        prompts_of(tokens, mask=mask, groups=groups),
        logit_lens=True,
        coordinates="raw",
        seed=3,
    )
    assert_same(cached, direct, rtol=1e-4, atol=2e-5)


def test_an_incomplete_cache_gives_the_names_filter(model: Any) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter=ml.needed_hooks(model)[1:])
    with pytest.raises(KeyError, match=r"names_filter=mspgt_lens\.needed_hooks"):
        ml.profile_cache(model, cache, TOKENS, **QUICK)


def test_a_cache_of_other_tokens_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"of shape \(24, 24\), got \(24, 23\)"):
        ml.profile_cache(model, cache_of(model, TOKENS), TOKENS[:, 1:], **QUICK)


def test_a_cache_is_left_as_it_was(model: Any) -> None:
    tokens, mask = pad(RAGGED, "left")
    cache = cache_of(model, tokens, mask)
    before = {name: cache[name].clone() for name in ml.needed_hooks(model)}
    ml.profile_cache(model, cache, tokens, mask=mask, **QUICK)
    assert all(torch.equal(cache[name], tensor) for name, tensor in before.items())


# ------------------------------------------------------------------------------ slow twins


@dataclasses.dataclass(frozen=True)
class Slow:
    """Everything that is measured, position by position in float64, from unpadded single runs."""

    residuals: np.ndarray  # [site, position, d_model]
    sites: np.ndarray  # The same, normalized.
    patterns: list[list[np.ndarray]]  # Per block, per valid query of every prompt: [head, key]
    log_likelihood: np.ndarray  # Of the next token where it is ordinary, [position]


def slow(model: Any, prompts: list[list[int]], skip_first: int = 4) -> Slow:
    adapter = as_adapter(model)
    n_layers = adapter.n_layers
    residuals: list[list[np.ndarray]] = [[] for _ in range(n_layers + 1)]
    patterns: list[list[np.ndarray]] = [[] for _ in range(n_layers)]
    log_likelihood = []
    for prompt in prompts:
        with torch.no_grad():
            logits, cache = model.run_with_cache(torch.tensor([prompt]))
        log_probability = logits[0].double().log_softmax(dim=-1).numpy()
        for t, token in enumerate(prompt):
            if t < skip_first or token in adapter.special_ids:
                continue
            for block in range(n_layers):
                residuals[block].append(cache["resid_pre", block][0, t].double().numpy())
                patterns[block].append(cache["pattern", block][0, :, t].double().numpy())
            residuals[n_layers].append(cache["resid_post", n_layers - 1][0, t].double().numpy())
            if t + 1 < len(prompt) and prompt[t + 1] not in adapter.special_ids:
                log_likelihood.append(log_probability[t, prompt[t + 1]])
    raw = np.array(residuals)
    centered = raw - raw.mean(axis=2, keepdims=True) if adapter.norm_kind == "layer" else raw
    power = (centered**2).mean(axis=2, keepdims=True)
    normalized = centered / np.sqrt(power + adapter.cfg.eps)
    return Slow(raw, normalized, patterns, np.array(log_likelihood))


def in_coordinates(sites: np.ndarray, coordinates: str) -> np.ndarray:
    centered = sites - sites.mean(axis=1, keepdims=True)
    return centered if coordinates == "raw" else centered / centered.std(axis=1, keepdims=True)


def rate(z: np.ndarray, noise: float) -> float:
    return float(np.linalg.slogdet(np.eye(z.shape[1]) + z.T @ z / len(z) / noise)[1] / 2)


def with_specials() -> list[list[int]]:
    """Prompts with BOS, and with end-of-text, unknown and padding tokens inside."""
    prompts = [[1, *row] for row in RAGGED[:12]]
    prompts[0][9], prompts[3][12], prompts[3][13], prompts[8][11] = 2, 3, 0, 2
    return prompts


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """Models that know their special tokens."""
    models = {name: tiny_model(name, **SMALL) for name in ("llama", "gpt2")}
    for model in models.values():
        model.tokenizer = tiny_tokenizer()
    return models


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"coordinates": "raw", "noise": 0.02},
        {"skip_first": 0, "noise": 1.0},
    ],
    ids=["defaults", "raw", "first tokens too"],
)
def test_curves_equal_a_direct_computation(
    told: dict[str, Any], architecture: str, choice: dict[str, Any]
) -> None:
    model, prompts = told[architecture], with_specials()
    measured = run(model, prompts_of(prompts), **choice)
    direct = slow(model, prompts, choice.get("skip_first", 4))
    noise, coordinates = choice.get("noise", 0.1), choice.get("coordinates", "standardized")
    z = in_coordinates(direct.sites, coordinates)
    assert measured.n_tokens == z.shape[1]

    rates = [rate(site, noise) for site in z]
    np.testing.assert_allclose(measured.compression.values, rates, rtol=1e-6)

    signals = {name: curve.values for name, curve in measured.signals.items()}
    joint = [rate(np.hstack(pair), noise) for pair in itertools.pairwise(z)]
    shared = np.array(rates[:-1]) + rates[1:] - joint
    np.testing.assert_allclose(signals["inter_layer_information"], shared, rtol=1e-4)

    # CKA from the Gram matrices of positions, Kornblith et al. 2019, equation 4.
    grams = [site @ site.T for site in z]
    cka = [
        (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()) for a, b in itertools.pairwise(grams)
    ]
    np.testing.assert_allclose(signals["novelty"], 1 - np.array(cka), rtol=1e-5, atol=1e-6)

    powers = [np.linalg.svd(site, compute_uv=False) ** 2 for site in z[1:]]
    participation = [power.sum() ** 2 / (power**2).sum() for power in powers]
    np.testing.assert_allclose(signals["effective_rank"], participation, rtol=1e-5)

    steps = np.linalg.norm(np.diff(direct.residuals, axis=0), axis=2)
    ratios = steps / np.linalg.norm(direct.residuals[:-1], axis=2)
    np.testing.assert_allclose(signals["update_ratio"], ratios.mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("skip_first", [0, 4])
def test_attention_signals_equal_a_direct_computation(
    told: dict[str, Any], architecture: str, skip_first: int
) -> None:
    """Query by query and head by head, the first key of the prompt left out."""
    model, prompts = told[architecture], with_specials()
    measured = run(model, prompts_of(prompts), skip_first=skip_first)
    special = as_adapter(model).special_ids
    queries = [
        t for p in prompts for t, token in enumerate(p) if t >= skip_first and token not in special
    ]
    for block, rows in enumerate(slow(model, prompts, skip_first).patterns):
        spans, entropies = [], []
        for query, row in zip(queries, rows, strict=True):
            for head in row:
                shares = [float(x) for x in head[1:]]
                total = sum(shares)
                if total == 0:
                    continue
                shares = [share / total for share in shares]
                spans.append(sum(p * (query - key) for key, p in enumerate(shares, start=1)))
                entropies.append(-sum(p * np.log(p) for p in shares if p > 0))
        assert measured.signals["attention_span"].values[block] == pytest.approx(
            np.mean(spans), rel=1e-5
        )
        assert measured.signals["attention_entropy"].values[block] == pytest.approx(
            np.mean(entropies), rel=1e-5
        )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_relevance_at_the_last_site_is_the_models_own_gain(
    told: dict[str, Any], architecture: str
) -> None:
    model, prompts = told[architecture], with_specials()
    measured = run(model, prompts_of(prompts), logit_lens=True)
    log_likelihood = slow(model, prompts).log_likelihood
    # So few positions that all are decoded.
    assert measured.settings["n_decoded"] == len(log_likelihood)
    gain = measured.settings["unigram_cross_entropy"] + log_likelihood.mean()
    assert measured.relevance.values[-1] == pytest.approx(gain, abs=1e-4)
    assert measured.logit_lens is not None
    assert measured.logit_lens.values[-1] == pytest.approx(gain, abs=1e-4)


def test_the_position_of_a_token_is_told_by_its_prompt_not_by_its_batch(model: Any) -> None:
    """Prompts of one length and prompts padded to it have the same valid positions."""
    short, long = TOKENS[:12, :16].tolist(), random_tokens(12, 24, seed=5).tolist()
    together = run(model, prompts_of(short + long))
    assert together.n_tokens == 12 * 12 + 12 * 20
    direct = slow(model, short + long)
    rates = [rate(site, 0.1) for site in in_coordinates(direct.sites, "standardized")]
    np.testing.assert_allclose(together.compression.values, rates, rtol=1e-6)


def test_a_large_mean_costs_no_digits(model: Any) -> None:
    """A constant 10,000 times the deviation in every coordinate, as the normalized rows see it."""
    cache = dict(cache_of(model, TOKENS).items())
    name = ml.needed_hooks(model)[1]
    residual = cache[name] = cache[name] / cache[name].std() + 1e4
    measured = ml.profile_cache(model, cache, TOKENS, **QUICK)
    # The twin begins where the package does, with float32 rows; only the summing is compared.
    rows = as_adapter(model).normalize(residual[:, 4:]).flatten(0, 1).double().numpy()
    assert np.abs(rows.mean(axis=0) / rows.std(axis=0)).min() > 5e3
    expected = rate(in_coordinates(rows[None], "standardized")[0], 0.1)
    assert measured.compression.values[1] == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "empty",
    [[], iter(()), ml.PromptDataset.from_tokens([])],
    ids=["list", "iterator", "tokens"],
)
def test_no_prompts(model: Any, empty: Any) -> None:
    with pytest.raises(ValueError, match="prompts holds no prompt"):
        run(model, empty)


def test_blank_texts_only(told: dict[str, Any]) -> None:
    with (
        pytest.warns(UserWarning, match="3 blank texts"),
        pytest.raises(ValueError, match="prompts holds no prompt"),
    ):
        run(told["llama"], ["", " ", "\n"])


def test_fewer_groups_than_folds(model: Any) -> None:
    groups = [i % 4 for i in range(24)]
    with pytest.raises(ValueError, match=r"groups as folds \(5\), got 4: .*groups=.*n_folds=4"):
        run(model, prompts_of(groups=groups), n_folds=5)
    run(model, prompts_of(groups=groups), n_folds=4)
    with pytest.raises(ValueError, match=r"groups as folds \(3\), got 2: .*groups= that tell"):
        run(model, prompts_of(groups=[i % 2 for i in range(24)]))


def test_prompts_too_short_for_the_bands(model: Any) -> None:
    with pytest.raises(ValueError, match="more than 40 tokens, or bands= with smaller offsets"):
        run(model, bands={"far": (20, 20)})
    run(model, prompts_of(random_tokens(24, 60)), bands={"far": (20, 20)})


def test_too_few_positions_in_a_fold_says_how_many_are_needed(model: Any) -> None:
    with pytest.raises(ValueError, match=r"give \d+ positions .* at least 32 are needed") as error:
        run(model, prompts_of(TOKENS[:12, :12]))
    assert int(str(error.value).split()[2]) < 32


def test_too_few_positions_for_the_width_says_how_many_are_needed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments_module, "N_FEATURES", 2)
    with pytest.raises(ValueError, match=r"give 24 valid positions.* width 16 need at least 32"):
        run(model, prompts_of(TOKENS[:12, :12]), bands={"local": (1, 1)}, skip_first=10)


@pytest.mark.parametrize("index", [0, 7])
def test_a_prompt_longer_than_the_context(model: Any, index: int) -> None:
    prompts = TOKENS.tolist()
    prompts[index] = random_tokens(1, 129)[0].tolist()
    with pytest.raises(ValueError, match=rf"prompt {index} has 129 tokens.*\(128\).*windows"):
        run(model, prompts_of(prompts))
    prompts[index] = prompts[index][:128]
    run(model, prompts_of(prompts))


@pytest.mark.parametrize("token", [-1, 101, 10**12])
@pytest.mark.parametrize("index", [0, 7])
def test_a_token_outside_the_vocabulary(model: Any, token: int, index: int) -> None:
    tokens = TOKENS.clone()
    tokens[index, 20] = token
    with pytest.raises(ValueError, match=rf"prompt {index} has a token outside .*\(0 to 100\)"):
        run(model, prompts_of(tokens))


def test_nan_weights_name_site_and_prompt() -> None:
    model = tiny_model("llama", **SMALL)
    with torch.no_grad():
        next(model.blocks[0].mlp.parameters())[0] = torch.nan
    before = hooks_on(model)
    with pytest.raises(FloatingPointError, match=r"site 1 .* prompt \d+"):
        run(model)
    assert hooks_on(model) == before


def broken_late(value: float, index: int) -> tuple[Any, list[list[int]]]:
    """A model whose activations break from position 20 on, where only one prompt reaches."""
    model = tiny_model("gpt2", **SMALL)
    with torch.no_grad():
        model.W_pos[20:] = value
    prompts = TOKENS[:, :20].tolist()
    prompts[index] = TOKENS[index].tolist()
    return model, prompts


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("index", [0, 7, 16])
def test_the_prompt_with_a_nan_is_named(value: float, index: int) -> None:
    model, prompts = broken_late(value, index)
    with pytest.raises(FloatingPointError, match=rf"site 0 .* prompt {index}\b"):
        run(model, prompts_of(prompts))


def test_a_nan_in_the_embedding_is_named() -> None:
    model = tiny_model("llama", **SMALL)
    with torch.no_grad():
        model.W_E[int(TOKENS[7, 8])] = torch.nan
    with pytest.raises(FloatingPointError, match=r"embedding|site 0"):
        run(model)


@pytest.mark.parametrize("index", [1, 7])
def test_the_prompt_with_a_nan_is_named_in_a_cache_too(model: Any, index: int) -> None:
    cache = dict(cache_of(model, TOKENS).items())
    name = ml.needed_hooks(model)[1]
    cache[name] = cache[name].clone()
    cache[name][index, 9, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=rf"site 1 .* prompt {index}\b"):
        ml.profile_cache(model, cache, TOKENS, **QUICK)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bands": {}}, "bands must name at least one"),
        ({"bands": {"odd": (3, 2)}}, r"bands\['odd'\] must be two offsets .* got \(3, 2\)"),
        ({"bands": {"odd": (0, 2)}}, r"bands\['odd'\]"),
        ({"bands": {"odd": (1.5, 2)}}, r"bands\['odd'\]"),
        ({"bands": {"odd": (1, 2, 3)}}, r"bands\['odd'\]"),
        ({"noise": 0.0}, "noise must be a positive variance, got 0.0"),
        ({"noise": float("nan")}, "noise must be a positive variance"),
        ({"coordinates": "whitened"}, "'standardized' or 'raw', got 'whitened'"),
        ({"n_folds": 2}, "n_folds must be at least 3 .* got 2"),
        ({"skip_first": -1}, "skip_first must be 0 or more tokens, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1 or None, got 0"),
    ],
)
def test_a_wrong_setting_is_named_before_the_model_runs(
    model: Any, wrong: dict[str, Any], message: str
) -> None:
    calls: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=message):
            run(model, **wrong)
    finally:
        handle.remove()
    assert not calls


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="HookedTransformer or TransformerBridge"):
        ml.profile_layers(object(), prompts_of())
    with pytest.raises(TypeError, match="HookedTransformer or TransformerBridge"):
        ml.profile_cache(object(), {}, TOKENS)


def test_attention_to_nothing_but_the_first_token() -> None:
    model = tiny_model("llama", **SMALL)

    def sink(pattern: Tensor, hook: Any) -> Tensor:
        first = torch.zeros_like(pattern)
        first[..., 0] = 1.0
        return first

    model.hook_dict["blocks.1.attn.hook_pattern"].add_hook(sink)
    with pytest.raises(ValueError, match="block 1 attends to nothing but the first token"):
        run(model)


def test_a_model_in_training_mode_is_evaluated_and_put_back() -> None:
    model = tiny_model("gpt2", **SMALL)
    expected = run(model)
    model.train()
    assert any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert_same(run(model), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(
    error: type[BaseException], profile: LayerProfile
) -> None:
    model = tiny_model("llama", **SMALL)
    model.blocks[0].train()
    modes = [module.training for module in model.modules()]
    calls: list[int] = []

    def fail(activation: Tensor, hook: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise error

    point = model.hook_dict["blocks.1.hook_resid_pre"]
    point.add_hook(fail, is_permanent=True)
    before = hooks_on(model)
    with pytest.raises(error):
        run(model, batch_size=2)
    assert len(calls) == 4
    assert hooks_on(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert_same(run(model), profile)


# ------------------------------------------------------------------------------- streaming


def watched(texts: list[str], taken: list[str]) -> Iterator[str]:
    for text in texts:
        taken.append(text)
        yield text


def test_an_iterator_streams(told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more prompts are held than the look-ahead; all enter the moments."""
    monkeypatch.setattr(profile_module, "LOOKAHEAD", 12)
    monkeypatch.setattr(profile_module, "_CHUNK", 4)
    texts = [as_text(row) for row in random_tokens(40, 24)]
    taken: list[str] = []
    waiting: list[int] = []
    done: list[int] = []

    def counting(moments: Moments, adapter: Any, batch: Any) -> None:
        waiting.append(len(taken) - sum(done))
        add_batch(moments, adapter, batch)
        done.append(len(batch.tokens))

    monkeypatch.setattr(profile_module, "add_batch", counting)
    streamed = run(told["llama"], watched(texts, taken))
    assert sum(done) == len(texts)
    assert waiting[0] == 12
    assert max(waiting) <= 12
    monkeypatch.undo()
    whole = run(told["llama"], texts)
    assert (
        (streamed.n_tokens, streamed.n_groups) == (whole.n_tokens, whole.n_groups) == (40 * 21, 40)
    )
    np.testing.assert_allclose(streamed.compression.values, whole.compression.values, rtol=1e-6)
    for name in ("settings", "retained", "predicted"):
        assert set(getattr(streamed, name)) == set(getattr(whole, name))
    fingerprints = {p.settings["prompts_fingerprint"] for p in (streamed, whole)}
    assert len(fingerprints) == 1


def test_windows_of_a_streamed_document_are_one_group(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_module, "LOOKAHEAD", 6)
    texts = [as_text(row) for row in random_tokens(9, 46)]
    prompts = ml.PromptDataset.from_texts(told["llama"], texts, max_length=24)
    assert run(told["llama"], prompts).n_groups == 9


@pytest.mark.parametrize("index", [3, 9, 11])
def test_a_bad_token_in_a_stream_is_found_and_counted_right(
    model: Any, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    monkeypatch.setattr(profile_module, "LOOKAHEAD", 6)
    monkeypatch.setattr(profile_module, "_CHUNK", 2)
    tokens = TOKENS.clone()
    tokens[index, 20] = 101
    with pytest.raises(ValueError, match=rf"prompt {index} has a token outside"):
        run(model, prompts_of(tokens))


@pytest.mark.parametrize("index", [9, 20])
def test_a_nan_in_a_stream_is_counted_right(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    monkeypatch.setattr(profile_module, "LOOKAHEAD", 6)
    monkeypatch.setattr(profile_module, "_CHUNK", 2)
    model, prompts = broken_late(torch.nan, index)
    with pytest.raises(FloatingPointError, match=rf"prompt {index}\b"):
        run(model, prompts_of(prompts))


# --------------------------------------------------------------------------------- results


def test_a_saved_profile_loads_back_equal(
    model: Any, profile: LayerProfile, tmp_path: Path
) -> None:
    for saved in (profile, run(model, logit_lens=True)):
        loaded = LayerProfile.load(saved.save(tmp_path / "deep" / "v1.0"))
        assert_same(loaded, saved)
        for field in dataclasses.fields(LayerProfile):
            first, second = getattr(loaded, field.name), getattr(saved, field.name)
            if field.name in ("retained", "predicted", "added", "signals", "bands"):
                assert list(first) == list(second)
            elif field.name == "correlations":
                assert list(first) == list(second)
                assert all(np.array_equal(first[scale], second[scale]) for scale in first)
            elif not isinstance(first, Curve):
                assert first == second, field.name
    assert profile.warnings
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["v1.0.safetensors"]


def test_profiles_compare_by_value(profile: LayerProfile, tmp_path: Path) -> None:
    loaded = LayerProfile.load(profile.save(tmp_path / "p"))
    assert loaded == profile
    assert loaded.compression == profile.compression
    assert loaded.compression != profile.relevance


def test_a_path_with_the_suffix_is_kept(profile: LayerProfile, tmp_path: Path) -> None:
    assert profile.save(tmp_path / "p.safetensors") == tmp_path / "p.safetensors"
    assert LayerProfile.load(tmp_path / "p").n_tokens == profile.n_tokens
    assert LayerProfile.load(str(tmp_path / "p.safetensors")).n_tokens == profile.n_tokens


def test_a_failed_save_keeps_the_old_file(
    profile: LayerProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = profile.save(tmp_path / "p")
    before = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("mspgt_lens.storage.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        profile.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    assert path.read_bytes() == before


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        LayerProfile.load(tmp_path / "nothing")


def make_garbage(path: Path, profile: LayerProfile) -> None:
    path.write_bytes(b"not a profile at all")


def make_empty(path: Path, profile: LayerProfile) -> None:
    path.write_bytes(b"")


def make_truncated(path: Path, profile: LayerProfile) -> None:
    path.write_bytes(profile.save(path).read_bytes()[:-100])


def make_weights(path: Path, profile: LayerProfile) -> None:
    save_file({"weight": np.zeros(3)}, path)


def make_other_kind(path: Path, profile: LayerProfile) -> None:
    header = json.dumps({"kind": "ScalePartition", "format": 1})
    save_file({"x": np.zeros(3)}, path, metadata={"mspgt_lens": header})


def make_other_format(path: Path, profile: LayerProfile) -> None:
    header = json.dumps({"kind": "LayerProfile", "format": 99})
    save_file({"x": np.zeros(3)}, path, metadata={"mspgt_lens": header})


def make_no_json(path: Path, profile: LayerProfile) -> None:
    save_file({"x": np.zeros(3)}, path, metadata={"mspgt_lens": "{"})


@pytest.mark.parametrize(
    "make",
    [
        make_garbage,
        make_empty,
        make_truncated,
        make_weights,
        make_other_kind,
        make_other_format,
        make_no_json,
    ],
)
def test_a_file_that_is_no_profile_is_refused(
    make: Callable[[Path, LayerProfile], None], profile: LayerProfile, tmp_path: Path
) -> None:
    path = tmp_path / "file.safetensors"
    make(path, profile)
    with pytest.raises(ValueError, match=r"path: .*file\.safetensors"):
        LayerProfile.load(path)


def test_the_table_has_one_row_per_curve_and_point(model: Any) -> None:
    profile = run(model, logit_lens=True)
    table = profile.to_dataframe()
    assert list(table.columns) == [
        "model",
        "quantity",
        "scale",
        "site",
        "value",
        "low",
        "high",
        "unit",
    ]
    counts = table.groupby(["quantity", "scale"]).size().to_dict()
    over_sites = {(q, ""): 3 for q in ("compression", "relevance", "logit_lens")}
    by_scale = {(q, s): 3 for q in ("retained", "predicted", "added") for s in BANDS}
    assert counts == over_sites | by_scale | {(q, ""): 2 for q in profile.signals}
    assert set(table["model"]) == {"tiny-llama"}
    mine = table[(table.quantity == "retained") & (table.scale == "local")]
    assert mine.site.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(mine.value, profile.retained["local"].values)
    np.testing.assert_array_equal(mine.low, profile.retained["local"].low)
    np.testing.assert_array_equal(mine.high, profile.retained["local"].high)


def test_the_table_in_bits(profile: LayerProfile) -> None:
    nats, bits = profile.to_dataframe(), profile.to_dataframe("bits")
    information = (nats.unit == "nats").to_numpy()
    assert 0 < information.sum() < len(nats)
    assert set(bits.unit[information]) == {"bits"}
    assert (bits.unit[~information] == nats.unit[~information]).all()
    for column in ("value", "low", "high"):
        ratio = np.where(information, 1 / np.log(2), 1.0)
        np.testing.assert_allclose(bits[column], nats[column] * ratio)


def test_results_cannot_be_changed(profile: LayerProfile) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.n_tokens = 1
    with pytest.raises(ValueError, match="read-only"):
        profile.compression.values[0] = 0.0
    with pytest.raises(TypeError):
        profile.retained["local"] = profile.compression
    assert profile.scales == ("local", "intermediate")


def test_curves_have_one_point_per_site_or_block(profile: LayerProfile) -> None:
    with pytest.raises(ValueError, match="compression needs 4 points for 3 blocks, got 3"):
        dataclasses.replace(profile, n_layers=3)


@pytest.mark.parametrize(
    ("values", "low", "high", "message"),
    [
        ([1.0, np.nan], [0.0, 0.0], [2.0, 2.0], "values must be a finite vector"),
        ([1.0, 1.0], [0.0, -np.inf], [2.0, 2.0], "low must be a finite vector"),
        ([1.0, 1.0], [0.0, 0.0], [2.0, np.inf], "high must be a finite vector"),
        ([[1.0]], [[0.0]], [[2.0]], "values must be a finite vector"),
        ([1.0, 1.0], [0.0], [2.0, 2.0], "same length"),
        ([1.0, 1.0], [0.0, 1.5], [2.0, 2.0], "the interval must hold the value"),
        ([1.0, 1.0], [0.0, 0.0], [2.0, 0.5], "the interval must hold the value"),
    ],
)
def test_a_curve_must_make_sense(values: Any, low: Any, high: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve(np.array(values), np.array(low), np.array(high), "nats", "")


def test_a_curve_is_a_copy_and_converts_between_units() -> None:
    values = np.array([1.0, 2.0])
    curve = Curve(values, values - 1, values + 1, "nats", "what it is")
    values[0] = 9.0
    assert curve.values.tolist() == [1.0, 2.0]
    bits = curve.to("bits")
    assert (bits.unit, bits.guarantee, len(bits)) == ("bits", "what it is", 2)
    np.testing.assert_allclose(bits.high, curve.high / np.log(2))
    np.testing.assert_allclose(bits.to("nats").low, curve.low, atol=1e-15)
    assert curve.to("nats") is curve
    with pytest.raises(ValueError, match="'nats' or 'bits', got 'hartleys'"):
        curve.to("hartleys")
    with pytest.raises(ValueError, match="in 'tokens'"):
        dataclasses.replace(curve, unit="tokens").to("bits")


# --------------------------------------------------------------------------------- moments


def gather(
    model: Any, tokens: Any, first: Moments | None = None, max_width: int = 1024, seed: int = 0
) -> Moments:
    """Moments of prompts dealt to three folds in turn; a further shard goes with a first one."""
    adapter = as_adapter(model)
    rows = [np.asarray(row) for row in tokens]
    if first is None:
        plan = plan_moments(
            adapter,
            np.bincount(TOKENS.flatten(), minlength=101),
            bands=BANDS,
            n_folds=3,
            skip_first=4,
            seed=seed,
            max_width=max_width,
        )
    else:
        plan = first.plan
    gathered = Moments(plan, adapter)
    if first is not None:
        gathered.reference = first.reference
    assigned = [(Prompt(row, int(row[0])), int(row[-1]) % 3) for row in rows]
    with adapter.inference():
        for batch in make_batches(assigned, None, 100):
            add_batch(gathered, adapter, batch)
    return gathered


def sample_only(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (moments_module, gathering_module):
        monkeypatch.setattr(module, "SAMPLE_CAPACITY", capacity)


def sums(moments: Moments) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(value)
        for name, value in vars(moments).items()
        if isinstance(value, torch.Tensor | np.ndarray)
    }


def test_shards_add_up_to_the_whole(model: Any) -> None:
    first = gather(model, TOKENS[:5])
    second, third = gather(model, TOKENS[5:9], first), gather(model, TOKENS[9:], first)
    whole = gather(model, TOKENS, first)
    for merged in (first + second + third, third + (second + first)):
        assert set(sums(merged)) == set(sums(whole)) != set()
        for name, expected in sums(whole).items():
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                sums(merged)[name], expected, rtol=1e-5, atol=1e-5 * scale, err_msg=name
            )
        assert (merged.n_read == whole.n_read).all()
        assert (merged.token_counts == whole.token_counts).all()
        assert (merged.n_prompts, merged.fingerprint) == (24, whole.fingerprint)
        assert (merged.sample.priority == whole.sample.priority).all()
        assert (merged.sample.next_token == whole.sample.next_token).all()
        assert (merged.sample.fold == whole.sample.fold).all()
        assert (merged.sample.group == whole.sample.group).all()
        torch.testing.assert_close(merged.sample.rows, whole.sample.rows)


def test_adding_leaves_the_shards_alone(model: Any) -> None:
    first = gather(model, TOKENS[:5])
    second = gather(model, TOKENS[5:], first)
    before = copy.deepcopy(sums(first)), copy.deepcopy(sums(second))
    first + second
    for shard, kept in zip((first, second), before, strict=True):
        assert all((sums(shard)[name] == value).all() for name, value in kept.items())


def test_shards_of_other_processes_add_up(model: Any) -> None:
    first = gather(model, TOKENS[:5])
    second = pickle.loads(pickle.dumps(gather(model, TOKENS[5:], first)))
    merged = first + second
    assert merged.n_prompts == 24
    assert merged.n_valid.sum() == 24 * 20


def test_shards_of_another_plan_or_reference_are_refused(model: Any) -> None:
    first = gather(model, TOKENS[:6])
    with pytest.raises(ValueError, match="one plan and one reference"):
        first + gather(model, TOKENS[6:])
    other = gather(model, TOKENS[6:], seed=1)
    other.reference = first.reference
    with pytest.raises(ValueError, match="one plan and one reference"):
        first + other


def test_shards_with_scales_in_another_order_are_refused(model: Any) -> None:
    """Their target columns stand in another order too."""
    first, second = gather(model, TOKENS[:6]), gather(model, TOKENS[6:])
    second.reference = first.reference
    assert (first + second).n_prompts == 24
    backwards = dict(reversed(first.plan.bands.items()))
    second.plan = dataclasses.replace(first.plan, bands=backwards)
    with pytest.raises(ValueError, match="one plan and one reference"):
        first + second


def test_memory_does_not_grow_with_prompts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample_only(30, monkeypatch)

    def held(moments: Moments) -> dict[str, tuple[int, ...]]:
        sample = {f"sample.{f.name}": getattr(moments.sample, f.name) for f in fields}
        arrays = sums(moments) | {name: np.asarray(value) for name, value in sample.items()}
        other = set(vars(moments)) - set(sums(moments))
        assert other == {"plan", "reference", "sample", "n_prompts", "n_groups", "fingerprint"}
        return {name: (*array.shape, array.itemsize) for name, array in arrays.items()}

    fields = dataclasses.fields(moments_module.Sample)
    few, many = gather(model, TOKENS[:6]), gather(model, random_tokens(60, 24))
    assert many.n_valid.sum() == 10 * few.n_valid.sum()
    assert held(few) == held(many)
    assert len(pickle.dumps(many)) < 1.01 * len(pickle.dumps(few))


def test_the_sample_does_not_depend_on_the_order_of_prompts(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_only(30, monkeypatch)
    first = gather(model, TOKENS)
    again = gather(model, TOKENS.flip(0), first)
    assert (first.sample.priority == again.sample.priority).all()
    assert (first.sample.next_token == again.sample.next_token).all()
    torch.testing.assert_close(first.sample.rows, again.sample.rows)
    other = gather(model, TOKENS, seed=1)
    assert not (first.sample.next_token == other.sample.next_token).all()


def test_every_sampled_position_knows_its_token_fold_and_group(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual at site 0 tells which token a row is from."""
    sample_only(200, monkeypatch)
    sample = gather(model, TOKENS).sample
    embedding = as_adapter(model).embedding()
    token_of = {
        tuple(as_adapter(model).normalize(row).tolist()): i for i, row in enumerate(embedding)
    }
    allowed = {
        (int(row[t]), int(row[t + 1]), int(row[-1]) % 3, stable_hash(int(row[0])))
        for row in TOKENS
        for t in range(4, 23)
    }
    sampled = {
        (token_of[tuple(rows[0].tolist())], int(following), int(fold), int(group))
        for rows, following, fold, group in zip(
            sample.rows, sample.next_token, sample.fold, sample.group, strict=True
        )
    }
    assert sampled <= allowed
    assert len(sample.priority) == 200
    assert len(sampled) > 150
    assert set(sample.fold.tolist()) == {0, 1, 2}


def test_a_failed_batch_adds_nothing() -> None:
    model = tiny_model("llama", **SMALL)
    first = gather(model, TOKENS[:6])
    before = copy.deepcopy(sums(first))

    def broken(activation: Tensor, hook: Any) -> Tensor:
        return activation * torch.nan

    model.hook_dict["blocks.1.hook_resid_pre"].add_hook(broken)
    (batch,) = make_batches([(Prompt(TOKENS[7].numpy(), 7), 0)], None, 100)
    with as_adapter(model).inference(), pytest.raises(FloatingPointError):
        add_batch(first, as_adapter(model), batch)
    assert all((sums(first)[name] == value).all() for name, value in before.items())
    assert first.n_prompts == 6


# -------------------------------------------------------------------------- wide residuals


def test_wide_residuals_are_projected_on_orthonormal_axes(model: Any) -> None:
    first = gather(model, TOKENS, max_width=8)
    assert first.reference is not None
    axes = first.reference.axes
    assert axes is not None
    assert axes.shape == (16, 8)
    torch.testing.assert_close(axes.T @ axes, torch.eye(8), atol=1e-5, rtol=0)
    assert first.zz_read.shape[-2:] == (8, 8)
    again = gather(model, TOKENS, max_width=8)
    assert again.reference is not None
    assert torch.equal(again.reference.axes, axes)
    other = gather(model, TOKENS, max_width=8, seed=1)
    assert other.reference is not None
    assert not torch.allclose(other.reference.axes, axes)


def test_projected_moments_equal_a_direct_computation(model: Any) -> None:
    first = gather(model, TOKENS, max_width=8)
    reference = first.reference
    assert reference is not None
    assert reference.axes is not None
    assert reference.spread is not None
    center, spread = reference.center.double().numpy(), reference.spread.double().numpy()
    sites = (slow(model, TOKENS.tolist()).sites - center[:, None]) / spread[:, None]
    z = sites @ reference.axes.double().numpy()
    sums_of_z = (first.z_read + first.z_rest).sum(dim=0).numpy()
    np.testing.assert_allclose(sums_of_z, z.sum(axis=1), rtol=1e-4, atol=1e-3)
    squares = (first.zz_read + first.zz_rest).sum(dim=0).numpy()
    np.testing.assert_allclose(squares, z.transpose(0, 2, 1) @ z, rtol=1e-4, atol=1e-3)
    across = first.z_next.sum(dim=0).numpy()
    np.testing.assert_allclose(across, z[:-1].transpose(0, 2, 1) @ z[1:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "coordinates"), [("llama", "standardized"), ("gpt2", "raw")]
)
def test_a_wide_model_is_profiled(
    tiny: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    coordinates: str,
) -> None:
    monkeypatch.setattr(profile_module, "MAX_WIDTH", 16)
    model = tiny(architecture, n_layers=2, d_model=32)
    prompts = prompts_of(random_tokens(48, 24))
    wide = run(model, prompts, coordinates=coordinates, logit_lens=True)
    assert wide.settings["width"] == 16
    for quantity, _, curve in wide.curves():
        assert np.isfinite([curve.values, curve.low, curve.high]).all(), quantity
    assert (wide.signals["effective_rank"].values < 16).all()
    monkeypatch.undo()
    full = run(model, prompts, coordinates=coordinates, logit_lens=True)
    assert full.settings["width"] == 32
    # These need no projection.
    for name in ("attention_span", "attention_entropy", "update_ratio"):
        np.testing.assert_allclose(wide.signals[name].values, full.signals[name].values)
    assert wide.relevance.values[-1] == pytest.approx(full.relevance.values[-1], abs=1e-5)
    assert wide.logit_lens is not None
    assert full.logit_lens is not None
    np.testing.assert_allclose(wide.logit_lens.values, full.logit_lens.values, atol=1e-5)


@pytest.mark.parametrize("coordinates", ["standardized", "raw"])
def test_a_wide_cache_gives_the_same_profile(
    model: Any, monkeypatch: pytest.MonkeyPatch, coordinates: str
) -> None:
    monkeypatch.setattr(profile_module, "MAX_WIDTH", 8)
    tokens, mask = pad(RAGGED, "left")
    choice = {**QUICK, "coordinates": coordinates}
    cached = ml.profile_cache(model, cache_of(model, tokens, mask), tokens, mask=mask, **choice)
    direct = run(model, prompts_of(RAGGED), coordinates=coordinates)
    assert_same(cached, direct, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("max_width", [8, 16], ids=["wide", "whole"])
def test_no_forward_pass_holds_more_than_a_batch_of_tokens(
    model: Any, monkeypatch: pytest.MonkeyPatch, max_width: int
) -> None:
    """Padding counts: a long prompt after many short ones must not make a huge batch."""
    monkeypatch.setattr(profile_module, "MAX_WIDTH", max_width)
    sizes: list[int] = []
    run_model = ModelAdapter.run

    def counting(self: ModelAdapter, tokens: Tensor, *args: Any) -> None:
        sizes.append(tokens.numel())
        run_model(self, tokens, *args)

    monkeypatch.setattr(ModelAdapter, "run", counting)
    prompts = [*random_tokens(120, 6).tolist(), *random_tokens(8, 120).tolist()]
    run(model, prompts_of(prompts))
    assert sum(sizes) >= 120 * 6 + 8 * 120
    assert max(sizes) <= 2048


def test_standardized_wide_residuals_have_unit_variances(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Hadamard's inequality the rate is at most that of independent coordinates."""
    monkeypatch.setattr(profile_module, "MAX_WIDTH", 16)
    prompts = prompts_of(random_tokens(48, 24))
    wide = run(tiny("llama", n_layers=2, d_model=32), prompts)
    assert (wide.compression.values < 16 * np.log1p(1 / 0.1) / 2).all()


def test_raw_coordinates_stay_raw_in_wide_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """One massive coordinate owns the raw spectrum, projected or not; standardized, it does not."""
    model = tiny_model("llama", n_layers=2, d_model=32)
    with torch.no_grad():
        model.W_E[:, 5] *= 100.0
    prompts = prompts_of(random_tokens(48, 24))
    full = run(model, prompts, coordinates="raw")
    standardized = run(model, prompts)
    monkeypatch.setattr(profile_module, "MAX_WIDTH", 16)
    wide = run(model, prompts, coordinates="raw")
    assert full.signals["effective_rank"].values[0] < 2
    assert standardized.signals["effective_rank"].values[0] > 4
    # Eigenvalues of a projection interlace: it can only lose.
    assert (wide.compression.values <= full.compression.values).all()
    assert wide.signals["effective_rank"].values[0] < 2


def test_a_target_that_is_read_without_error_does_not_stop_the_profile(
    tiny: Callable[..., Any],
) -> None:
    """At site 0 the token's own features are nearly linear in the residual: nothing is left."""
    run(tiny("llama", n_layers=2, d_model=32), prompts_of(random_tokens(18, 24)))


def test_folds_of_every_curve_average_to_it(tiny):
    """Means over folds are the values; pseudo-values are what the jackknife corrects to."""
    prompts = ml.PromptDataset.from_tokens(random_tokens(40, 140))
    profile = ml.profile_layers(tiny("llama"), prompts, progress=False)
    for quantity, _, curve in profile.curves():
        assert curve.by_fold.shape == (5, len(curve))
        if quantity in ("retained", "predicted", "attention_span", "update_ratio"):
            # Folds differ a little in size.
            assert np.allclose(curve.by_fold.mean(axis=0), curve.values, rtol=0.05, atol=0.02)
    bits = profile.compression.to("bits")
    assert np.allclose(bits.by_fold * np.log(2), profile.compression.by_fold)


@pytest.mark.parametrize("control", ["random_weights", "shuffled_tokens"])
def test_controls_leave_the_model_as_it_was(control):
    model = tiny_model("llama")
    before = [p.detach().clone() for p in model.parameters()]
    prompts = ml.PromptDataset.from_tokens(random_tokens(40, 140))
    plain = ml.profile_layers(model, prompts, progress=False)
    found, again = (
        ml.profile_layers(model, prompts, control=control, progress=False) for _ in range(2)
    )
    assert found == again
    assert found.predicted["local"] != plain.predicted["local"]
    assert control.replace("_", " ") in found.model_name
    assert found.settings["control"] == control
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_random_weights_are_put_back_after_an_error():
    model = tiny_model("gpt2")
    before = [p.detach().clone() for p in model.parameters()]
    bad = ml.PromptDataset.from_tokens(random_tokens(4, 20))
    with pytest.raises(ValueError, match="at least as many groups"):
        ml.profile_layers(model, bad, control="random_weights", progress=False)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="control must be None or one of"):
        ml.profile_layers(model, bad, control="random", progress=False)


def test_shuffled_tokens_say_nothing_of_their_neighbors(tiny):
    """Tokens that follow one another closely are foreseen; in random order they are not."""
    model = tiny("llama")
    prompts = ml.PromptDataset.from_tokens(random_tokens(60, 140, seed=3))
    plain = ml.profile_layers(model, prompts, progress=False)
    shuffled = ml.profile_layers(model, prompts, control="shuffled_tokens", progress=False)
    assert plain.predicted["local"].values[0] > 0.1
    assert abs(shuffled.predicted["local"].values[0]) < 0.02
