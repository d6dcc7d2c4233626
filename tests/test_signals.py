"""Signals of blocks are chosen by name, and whoever uses the package adds their own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from test_recording import LENGTHS, QUICK, TOKENS, assert_same, batches, padded, prompts  # noqa: F401
from tiny import random_tokens, tiny_model, tiny_tokenizer

import mspgt_lens as ml
from mspgt_lens import gathering
from mspgt_lens.extending import SIGNALS, Signal
from mspgt_lens.profile import passing

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be told from 0:UserWarning")
SKIPPED = 4


def shrunk(rows):
    """How much shorter the block makes the residual."""
    return 1 - rows.after.norm(dim=1) / rows.before.norm(dim=1)


def to_itself(rows):
    """What the first head of a position attends to itself, later positions counting more."""
    own = rows.pattern[torch.arange(len(rows.position)), 0, rows.position]
    return own * rows.position


SHRINKING = Signal(
    name="shrinking",
    unit="share",
    guarantee="Share of the residual's length that the block takes away.",
    title="Shrinking <b>",
    sentence="the block takes {number} of the length & more",
    of=shrunk,
    from_zero=False,
)
SELF = Signal(
    name="self_attention",
    unit="tokens",
    guarantee="Attention of the first head to the token itself, times its position.",
    title="Attention to itself",
    sentence="attends {value} to itself",
    of=to_itself,
    patterns=True,
    logarithmic=True,
)
CHOSEN = ["novelty", SHRINKING, SELF]


@pytest.fixture(scope="module", params=["llama", "gpt2", "neox"])
def model(request):
    """In float64, where another batch rounds by less than the agreement that is asked for."""
    model = tiny_model(request.param)
    model.tokenizer = tiny_tokenizer()
    return model.to(torch.float64)


@pytest.fixture(scope="module")
def profile(model, prompts):  # noqa: F811
    return ml.profile_layers(model, prompts, signals=CHOSEN, progress=False, **QUICK)


def by_plain_hooks(model, row):
    """Both signals at every block and valid position of one prompt, ``[signal, block, pos]``."""
    kept = {}

    def keep(activation, hook):
        kept[hook.name] = activation

    at = ("hook_resid_pre", "hook_resid_post", "attn.hook_pattern")
    points = [model.hook_dict[f"blocks.{block}.{name}"] for block in range(4) for name in at]
    with torch.no_grad(), model.hooks(fwd_hooks=[(point.name, keep) for point in points]):
        model(TOKENS[row : row + 1, : LENGTHS[row]])
    before, after, pattern = (
        torch.stack([kept[point.name][0] for point in points[i::3]]) for i in range(3)
    )
    shrinking = 1 - after.norm(dim=2) / before.norm(dim=2)
    attended = pattern[:, 0].diagonal(dim1=1, dim2=2) * torch.arange(LENGTHS[row])
    return torch.stack([shrinking, attended])[..., SKIPPED:].numpy()


def test_signals_of_ones_own_equal_plain_hooks(model):
    rows = [TOKENS[i, : LENGTHS[i]].tolist() for i in range(18)]
    groups = np.arange(18) // 6
    given = ml.PromptDataset.from_tokens(rows, groups=groups.tolist())
    found = ml.profile_layers(model, given, signals=CHOSEN, progress=False, **QUICK)
    assert list(found.signals) == ["novelty", "shrinking", "self_attention"]
    plain = [by_plain_hooks(model, row) for row in range(18)]
    # As many folds as groups: each fold is one of them.
    means, sizes = [], []
    for group in range(3):
        values = np.concatenate([plain[i] for i in range(18) if groups[i] == group], axis=-1)
        means.append(values.mean(axis=-1))
        sizes.append(values.shape[-1])
    share = np.array(sizes) / np.sum(sizes)
    for index, signal in enumerate((SHRINKING, SELF)):
        curve = found.signals[signal.name]
        of_folds = np.array([mean[index] for mean in means])
        mean = share @ of_folds
        # Llama takes its softmax in float32, which rounds by the length of the batch.
        np.testing.assert_allclose(curve.values, mean, rtol=1e-7)
        np.testing.assert_allclose(
            np.sort(curve.by_fold, axis=0), np.sort(of_folds, axis=0), rtol=1e-7
        )
        error = np.sqrt(1.5 * (share**2 @ (of_folds - mean) ** 2))
        np.testing.assert_allclose(curve.high - mean, stats.t.ppf(0.975, 2) * error, rtol=1e-6)
        assert (curve.unit, curve.guarantee) == (signal.unit, signal.guarantee)


def test_passes_of_ones_own_bring_the_same_signals(model, prompts, profile):  # noqa: F811
    with ml.recording(model, prompts, signals=CHOSEN, **QUICK) as record, torch.no_grad():
        for rows in batches():
            tokens, mask = padded(rows)
            model(tokens, attention_mask=mask)
    assert_same(record.profile(), profile)
    hooks = ml.needed_hooks(model)

    def pairs():
        for rows in batches():
            tokens, mask = padded(rows)
            yield model.run_with_cache(tokens, attention_mask=mask, names_filter=hooks)[1], tokens

    cached = ml.profile_cache(model, pairs(), prompts=prompts, signals=CHOSEN, **QUICK)
    assert_same(cached, profile)


def test_names_choose_among_the_packages_own(model, prompts, monkeypatch):  # noqa: F811
    whole = ml.profile_layers(model, prompts, progress=False, **QUICK)
    assert list(whole.signals) == list(SIGNALS)
    names = ["effective_rank", "update_ratio", "novelty"]
    expected = replace(whole, signals={name: whole.signals[name] for name in names})
    # Without signals of attention no pattern is asked for; the same attention as for the whole,
    # since the model's own, which runs there otherwise, rounds in its own way.
    monkeypatch.setattr(passing, "own_attention", lambda _: nullcontext(False))
    monkeypatch.setattr(gathering.BatchReader, "on_pattern", lambda *_: pytest.fail("a pattern"))
    found = ml.profile_layers(model, prompts, signals=names, progress=False, **QUICK)
    assert found == expected
    patterns = [model.hook_dict[f"blocks.{block}.attn.hook_pattern"] for block in range(4)]
    with ml.recording(model, prompts, signals=names, **QUICK) as record, torch.no_grad():
        for rows in batches():
            tokens, mask = padded(rows)
            model(tokens, attention_mask=mask)
        assert not any(point.fwd_hooks for point in patterns)
    assert_same(record.profile(), expected)
    hooks = ml.needed_hooks(model, patterns=False)
    assert not [name for name in hooks if "pattern" in name]
    pairs = []
    for rows in batches():
        tokens, mask = padded(rows)
        cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=hooks)[1]
        pairs.append((cache, tokens))
    cached = ml.profile_cache(model, pairs, prompts=prompts, signals=names, **QUICK)
    assert_same(cached, expected)
    with pytest.raises(KeyError, match="pattern"):
        ml.profile_cache(model, pairs, prompts=prompts, **QUICK)


def test_what_a_signal_does_to_its_rows_changes_no_other(model, prompts, profile):  # noqa: F811
    def spoil(rows):
        values = shrunk(rows)
        for tensor in (rows.before, rows.after, rows.position, rows.pattern):
            tensor.zero_()
        return values

    spoiling = replace(SHRINKING, name="spoiling", of=spoil, patterns=True)
    chosen = ["novelty", spoiling, SHRINKING, SELF]
    found = ml.profile_layers(model, prompts, signals=chosen, progress=False, **QUICK)
    assert found.signals["spoiling"].values.tolist() == found.signals["shrinking"].values.tolist()
    rest = {name: curve for name, curve in found.signals.items() if name != "spoiling"}
    words = {name: said for name, said in found.signal_words.items() if name != "spoiling"}
    assert replace(found, signals=rest, signal_words=words) == profile


def test_an_encoder_has_signals_of_ones_own(tiny):
    model = tiny_model("bert")
    model.tokenizer = tiny_tokenizer()
    given = ml.PromptDataset.from_tokens(random_tokens(60, 60))
    found = ml.profile_layers(
        model, given, bands={"near": (1, 4)}, n_folds=3, signals=[SHRINKING, SELF], progress=False
    )
    assert len(found.signals["self_attention"]) == model.cfg.n_layers


def test_a_saved_profile_knows_the_words_of_its_signals(profile, tmp_path):
    loaded = ml.results.LayerProfile.load(profile.save(tmp_path / "kept"))
    assert loaded == profile
    figure = ml.plot_profile(loaded)
    titles = [note.text for note in figure.layout.annotations]
    assert {"Novelty", "Shrinking &lt;b&gt;", "Attention to itself"} <= set(titles)
    hovers = " ".join(str(trace.hovertext) for trace in figure.data)
    assert "of the length &amp; more" in hovers
    assert "tokens to itself" in hovers
    axes = figure.to_dict()["layout"].values()
    kinds = {a["title"]["text"]: a["type"] for a in axes if isinstance(a, dict) and "type" in a}
    assert (kinds["tokens"], kinds["share"]) == ("log", "linear")
    html = ml.write_report(tmp_path / "report.html", loaded).read_text()
    assert "Attention to itself" in html
    assert "Shrinking <b>" not in html


def test_boundaries_are_found_in_signals_of_ones_own(prompts):  # noqa: F811
    model = tiny_model("llama", n_layers=8)
    chosen = [SHRINKING, SELF]
    short = ml.profile_layers(model, prompts, signals=chosen, progress=False, **QUICK)
    assert "self attention" in ml.arrays.boundary_signals(short)
    found = ml.detect_scales(profile=short, n_bootstraps=20)
    assert {"shrinking", "self attention"} <= set(found.by_signal)
    assert found.by_method["attention_span"] is None
    assert found.by_method["mi_peaks"] is None
    for method in ("attention_span", "mi_peaks"):
        with pytest.raises(ml.CannotMeasure, match="was not profiled"):
            ml.detect_scales(profile=short, method=method, n_bootstraps=20)


@pytest.mark.parametrize(
    ("signals", "error", "message"),
    [
        (["noveltie"], ValueError, r"among attention_span, .*, effective_rank, .*'noveltie'"),
        ("novelty", TypeError, "a sequence of names and signals, got 'novelty' alone"),
        (["novelty", 3], TypeError, "names and Signal objects, got 3"),
        (["novelty", "novelty"], ValueError, "names of their own, got 'novelty' twice"),
        ([replace(SHRINKING, name="novelty")], ValueError, "names of their own, got 'novelty'"),
    ],
)
def test_signals_that_are_none_are_refused(tiny, prompts, signals, error, message):  # noqa: F811
    with pytest.raises(error, match=message):
        ml.profile_layers(tiny("llama"), prompts, signals=signals, progress=False, **QUICK)


@pytest.mark.parametrize(
    ("of", "error", "message"),
    [
        (lambda rows: rows.before, ValueError, r"'shrinking' must give one number per row.*got \("),
        (lambda rows: 1.0, ValueError, r"'shrinking' must give one number per row.*got float"),
        (
            lambda rows: torch.log(rows.position - 5.0),
            FloatingPointError,
            r"'shrinking' is NaN or infinite at block 0, first in prompt \d+",
        ),
    ],
)
def test_what_a_signal_gives_is_checked(tiny, prompts, of, error, message):  # noqa: F811
    signals = [replace(SHRINKING, of=of)]
    with pytest.raises(error, match=message):
        ml.profile_layers(tiny("llama"), prompts, signals=signals, progress=False, **QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "relevance"}, "other than those of a profile's other curves"),
        ({"name": ""}, "name of a signal must be a text"),
        ({"of": "spans"}, r"a function of BlockRows, or be one of span, .*'spans'"),
        ({"sentence": "{share} of it"}, "no fields but {number} and {value}"),
        ({"sentence": "{"}, "no fields but {number} and {value}"),
    ],
)
def test_a_signal_that_cannot_be_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SHRINKING, **change)
