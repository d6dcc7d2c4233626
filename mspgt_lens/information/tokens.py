"""What a site tells of single tokens, in tokens: held-out gains over the unigram model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.information.lens import TokenRelevance
from mspgt_lens.information.site_reader import Predictions
from mspgt_lens.information.tilting import (
    FIRST_TRIED,
    AmongTokens,
    Tilt,
    best_temperature,
    channel,
    mean_gain,
)
from mspgt_lens.information.unigram import unigram_log_probability
from mspgt_lens.models import ModelAdapter
from mspgt_lens.moments import Moments
from mspgt_lens.statistics import cluster_interval
from mspgt_lens.targets import single_targets

# Of the null reader's variance: the least that a reader of a token leaves in any direction. Tokens
# are told apart far above it, and float32 still resolves their scores.
LEAST_LEFT = 1e-3
# Of the tokens that the other folds do not hold, so many stand for all while a reader is chosen.
UNSEEN = 1024
_LOGITS_PER_CHUNK = 7_500_000


@dataclass(frozen=True)
class TokenReading:
    """Held-out information about one token at every site, nats.

    Attributes:
        values: The share of the unigram model's cross-entropy that the reader saves, times its
            cross-entropy on the next token, which the value therefore never exceeds; ``[site]``.
        low: Lower end of the 95% interval, resampling groups.
        high: Upper end of the 95% interval, raised by what a reader fitted on more text may gain.
        by_fold: The value on each fold's positions, shape ``[fold, site]``; None if one has none.
    """

    values: Float[np.ndarray, " site"]
    low: Float[np.ndarray, " site"]
    high: Float[np.ndarray, " site"]
    by_fold: Float[np.ndarray, "fold site"] | None


class TokenReader:
    """Reads every target that is one token at the sampled positions, site by site.

    A reader is the discriminant that a linear-Gaussian reader of a token's features implies: the
    unigram model of the other folds, tilted (:class:`~mspgt_lens.information.tilting.Tilt`) with a
    temperature chosen on inner folds. Of the next token, the ridge lens says more wherever the
    model is any good; of tokens after it, a reader of the model's own later prediction does, which
    tilts by leading logits. Whichever gains most on the other folds is taken.

    Args:
        moments: The sums, with their sample.
        adapter: The model.
        relevance: The ridge lens at the first positions of the sample, which are read here too.
    """

    def __init__(self, moments: Moments, adapter: ModelAdapter, relevance: TokenRelevance) -> None:
        self._moments, self._relevance = moments, relevance
        plan, sample = moments.plan, moments.sample
        bands, single = list(plan.bands.values()), single_targets(plan.bands)
        self._next = len(bands) + bands.index((1, 1)) if (1, 1) in bands else None
        device = moments.zz_read.device
        self._priors = [_Prior(moments, k) for k in range(plan.n_folds)]
        features = plan.features.to(device)
        self._readers = {t: [_Reader(t, features)] for t in single}
        if plan.far:
            later = _leading_logits(moments, adapter).to(features)
            for index, target in enumerate(plan.far, start=2 * len(bands)):
                self._readers[target].append(_Reader(index, later, of_logits=True))
        count = relevance.n_positions
        self._tokens = {t: _Tokens(sample.single[:count, i]) for i, t in enumerate(single)}
        n_sites = moments.z_read.shape[1]
        self._gain = {t: np.zeros((len(self._tokens[t].wanted), n_sites)) for t in single}
        self._beyond = {t: np.zeros(n_sites) for t in single}
        # Where the search for a temperature begins: by reader and fold, what was best last.
        self._latest: dict[tuple[int, int], float] = {}

    def read(self, site: int, told: Predictions) -> dict[str, np.ndarray]:
        """What is seen in what the readers of one site predict."""
        seen: dict[str, np.ndarray] = {}
        for target, tokens in self._tokens.items():
            gain, beyond = np.zeros(len(tokens.wanted)), 0.0
            for fold in range(len(self._priors)):
                beyond += self._read_fold(site, target, fold, told, gain)
            seen |= {f"gain {target}": gain, f"beyond {target}": np.array(beyond)}
        return seen

    def keep(self, site: int, seen: Mapping[str, np.ndarray]) -> None:
        """Take in what was seen of one site, perhaps by another process."""
        for target in self._tokens:
            self._gain[target][:, site] = seen[f"gain {target}"]
            self._beyond[target][site] = seen[f"beyond {target}"]

    def readings(self) -> dict[int, TokenReading]:
        """By target, once every site was read."""
        return {target: self._reading(target) for target in self._tokens}

    def _read_fold(
        self,
        site: int,
        target: int,
        fold: int,
        told: Predictions,
        gain: Float[np.ndarray, " token"],
    ) -> float:
        """Put in the gain on one fold's tokens of one target, unless the prior is not beaten.

        Returns:
            How much more, on average over all folds, the best reader of this one may gain.
        """
        tokens = self._tokens[target]
        own = self._moments.sample.fold[tokens.position] == fold
        tried = [self._try(target, reader, fold, told) for reader in self._readers[target]]
        best = max(tried, key=lambda trial: trial.most)
        most, lens = best.most, None
        if target == self._next:
            lens = self._relevance.gain[tokens.position, site]
            most = max(most, float(lens[~own].mean()))
        if lens is not None and lens[~own].mean() >= best.most:
            gain[own] = lens[own]
        elif best.temperature:
            size = max(1, _LOGITS_PER_CHUNK // len(best.scorer.features))
            mine = np.flatnonzero(own)
            for part in (mine[i : i + size] for i in range(0, len(mine), size)):
                held_out = told.held_out[tokens.position[part]]
                gained = best.scorer.gain(
                    held_out, self._priors[fold].every, tokens.wanted[part], best.temperature
                )
                gain[part] = gained.cpu().double().numpy()
        at_best = max(self._at_best(target, trial, fold, told) for trial in tried)
        return float(own.mean()) * max(0.0, at_best - most)

    def _try(self, target: int, reader: _Reader, fold: int, told: Predictions) -> _Trial:
        """One reader on the inner folds."""
        tokens, prior = self._tokens[target], self._priors[fold]
        either = prior.covariance(reader.features) if tokens.two_sided else None
        scorer = reader.scorer(told, fold, either)
        gain_at = cache(partial(mean_gain, self._asked(target, scorer, fold, told, fitted=False)))
        start = self._latest.get((reader.target, fold), FIRST_TRIED)
        temperature, most = best_temperature(gain_at, start)
        self._latest[reader.target, fold] = temperature
        return _Trial(scorer, gain_at, temperature, most)

    def _at_best(self, target: int, trial: _Trial, fold: int, told: Predictions) -> float:
        """What a reader of a trial's kind may gain, were it fitted on any amount of text.

        That lies as far above what is held out as below what was fitted, but for the text of the
        readers: errors fall with it, and the former had one fold less. So it is at whatever
        temperature, and with more text another may be the best.
        """
        fitted = self._asked(target, trial.scorer, fold, told, fitted=True)
        n_folds = len(self._priors)
        above = (n_folds - 1) / (2 * n_folds - 3)
        _, between = best_temperature(
            lambda t: (1 - above) * trial.gain_at(t) + above * mean_gain(fitted, t),
            trial.temperature,
        )
        return between

    def _asked(
        self, target: int, scorer: _Scorer, fold: int, told: Predictions, *, fitted: bool
    ) -> list[AmongTokens]:
        """The neighbors' tokens, from readers that left the neighbor out, or were fitted on it."""
        tokens, prior = self._tokens[target], self._priors[fold]
        among = scorer.among(prior.among)
        asked = []
        for (neighbor, position, apart), seen in zip(
            told.inner[fold], told.fitted[fold], strict=True
        ):
            row, token = tokens.among(position)
            if len(row):
                scores = among.scores((seen if fitted else apart)[row])
                place = prior.place[torch.from_numpy(token)]
                asked.append(AmongTokens(scores, prior.without(neighbor), place))
        return asked

    def _reading(self, target: int) -> TokenReading:
        relevance, sample, tokens = self._relevance, self._moments.sample, self._tokens[target]
        gain, count = self._gain[target], relevance.n_positions
        fold = sample.fold[tokens.position]
        surprise = self._surprise(tokens.wanted, fold)
        ahead = self._surprise(sample.next_token[:count], sample.fold[:count])
        share = gain.sum(axis=0) / surprise.sum()
        values = share * ahead.mean()
        # What a position adds to the error of a ratio times a mean.
        error = share * (ahead - ahead.mean())[:, None]
        scale = ahead.mean() * count / surprise.sum()
        np.add.at(error, tokens.position, scale * (gain - share * surprise[:, None]))
        _, low, high = cluster_interval(error, sample.group[:count])
        folds = [fold == k for k in range(len(self._priors))]
        by_fold = (
            np.stack([ahead.mean() * gain[k].sum(axis=0) / surprise[k].sum() for k in folds])
            if all(k.any() for k in folds)
            else None
        )
        beyond = ahead.mean() / surprise.mean() * self._beyond[target]
        return TokenReading(values, values + low, values + high + beyond, by_fold)

    def _surprise(
        self, tokens: Int[np.ndarray, " token"], fold: Int[np.ndarray, " token"]
    ) -> Float[np.ndarray, " token"]:
        """How unexpected tokens are to the unigram model of the other folds."""
        surprise = np.zeros(len(tokens))
        for k, prior in enumerate(self._priors):
            surprise[fold == k] = -prior.every.cpu().double().numpy()[tokens[fold == k]]
        return surprise


@dataclass(frozen=True)
class _Scorer:
    """Scores of tokens under one fold's reader.

    Attributes:
        tilt: Made of what the reader leaves unexplained.
        features: Of every token, about ``center`` where the reader is of these.
        center: Mean of what is read.
        columns: Where predictions have it.
    """

    tilt: Tilt
    features: Float[Tensor, "token feature"]
    center: Float[Tensor, " feature"]
    columns: slice

    def among(self, chosen: Int[Tensor, " chosen"]) -> _Scorer:
        """The same of some tokens."""
        return replace(self, features=self.features[chosen])

    def scores(
        self, predicted: Float[Tensor, "position column"]
    ) -> Float[Tensor, "position token"]:
        """Of every token at every position."""
        return self.tilt.scores(self._shown(predicted), self.features)

    def gain(
        self,
        predicted: Float[Tensor, "position column"],
        log_prior: Float[Tensor, " token"],
        wanted: Int[np.ndarray, " position"],
        temperature: float,
    ) -> Float[Tensor, " position"]:
        """How much more likely the wanted token is than by the prior."""
        shown = self._shown(predicted)
        right = torch.from_numpy(wanted).to(shown.device)
        return self.tilt.gain(shown, self.features, log_prior, right, temperature)

    def _shown(
        self, predicted: Float[Tensor, "position column"]
    ) -> Float[Tensor, "position feature"]:
        return predicted[:, self.columns].to(self.features) - self.center


@dataclass(frozen=True)
class _Reader:
    """What may read one token: which predictions, and the features of tokens that go with them.

    Attributes:
        target: Index of the predictions.
        features: Of every token.
        of_logits: Whether predictions are of logits; else they are of the features.
    """

    target: int
    features: Float[Tensor, "token feature"]
    of_logits: bool = False

    def scorer(
        self, told: Predictions, fold: int, either: Float[Tensor, "feature feature"] | None
    ) -> _Scorer:
        """Of one fold; with ``either``, the covariance of one of two tokens whose mean is read."""
        size = self.features.shape[1]
        columns = slice(self.target * size, (self.target + 1) * size)
        center = told.mean[fold, columns].to(self.features)
        if self.of_logits:
            identity = torch.eye(size).to(self.features)
            return _Scorer(Tilt(identity, None), self.features, center, columns)
        reader, null = told.left[fold].covariances(self.target)
        if either is not None:
            # Either token varies more than their mean, and goes with the site as much.
            reader, null = either.to(null) - (null - reader), either.to(null)
        least = LEAST_LEFT * null
        tilt = channel(reader + least, null + least).to(self.features)
        return _Scorer(tilt, self.features - center, center, columns)


@dataclass(frozen=True)
class _Trial:
    """What a reader does on the inner folds.

    Attributes:
        scorer: It.
        gain_at: Its mean gain at a temperature.
        temperature: The best.
        most: The mean gain at that.
    """

    scorer: _Scorer
    gain_at: Callable[[float], float]
    temperature: float
    most: float


class _Tokens:
    """The tokens that one target is at the sampled positions: one each, or one on either side."""

    def __init__(self, column: Int[np.ndarray, "position side"]) -> None:
        self.position, side = np.nonzero(column >= 0)
        self.wanted = column[self.position, side]
        self.two_sided = bool((column >= 0).all(axis=1).any()) and column.shape[1] == 2

    def among(
        self, chosen: Int[np.ndarray, " chosen"]
    ) -> tuple[Int[np.ndarray, " token"], Int[np.ndarray, " token"]]:
        """Tokens at some positions: which of these each is at, and the token."""
        inside = np.isin(self.position, chosen)
        # The chosen positions are in order.
        return np.searchsorted(chosen, self.position[inside]), self.wanted[inside]


class _Prior:
    """The unigram model of all folds but one, over the vocabulary, whole or by a part of it.

    The part is every token that these folds hold, and some of the others. A token that nobody wrote
    may lie between those that were written and win, which what is chosen must know. All of them are
    equally likely, so that some, evenly spread over the vocabulary, stand for all: the total of any
    function of tokens is estimated without bias, and that of the prior itself is exactly 1.
    """

    def __init__(self, moments: Moments, fold: int) -> None:
        self._moments, self._fold = moments, fold
        device = moments.zz_read.device
        every = unigram_log_probability(moments, [fold])
        counts = moments.token_counts.sum(axis=0) - moments.token_counts[fold]
        self.every = torch.from_numpy(every).to(device, torch.float32)
        seen, unseen = np.flatnonzero(counts), np.flatnonzero(counts == 0)
        n_some = min(len(unseen), UNSEEN)
        each = len(unseen) / max(n_some, 1)
        some = unseen[((np.arange(n_some) + 0.5) * each).astype(int)]
        self.among = torch.from_numpy(np.concatenate([seen, some])).to(device)
        self._stand_for = torch.zeros(len(self.among), device=device)
        if n_some:
            self._stand_for[len(seen) :] = np.log(each)
        self.place = torch.zeros(len(counts), dtype=torch.long, device=device)
        self.place[self.among] = torch.arange(len(self.among), device=device)
        self._without: dict[int, Tensor] = {}

    def without(self, other: int) -> Float[Tensor, " token"]:
        """Log-probabilities of the part, from the counts without another fold's too."""
        if other not in self._without:
            every = unigram_log_probability(self._moments, [self._fold, other])
            among = torch.from_numpy(every).to(self.every)[self.among]
            self._without[other] = among + self._stand_for
        return self._without[other]

    def covariance(
        self, features: Float[Tensor, "token feature"]
    ) -> Float[Tensor, "feature feature"]:
        """Of the features of one token."""
        share = self.every.exp()[:, None]
        centered = features - (share * features).sum(dim=0)
        return centered.T @ (share * centered)


def _leading_logits(moments: Moments, adapter: ModelAdapter) -> Float[Tensor, "token feature"]:
    """How every token's logit depends on the leading directions of the final residual."""
    assert moments.reference is not None
    basis = moments.reference.logit_basis
    assert basis is not None
    return (adapter.decode(basis) - adapter.decode(torch.zeros_like(basis[:1]))).T
