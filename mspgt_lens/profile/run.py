"""One profile: what its first prompts decide, and its curves from its moments."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.folds import balanced_folds, stable_hash
from mspgt_lens.gathering import HIDDEN_SHARE
from mspgt_lens.information.lens import logit_lens_relevance, ridge_lens_relevance
from mspgt_lens.information.readers import read_targets
from mspgt_lens.information.sampled import SampledReadings
from mspgt_lens.information.unigram import unigram_entropy
from mspgt_lens.models import ModelAdapter, provenance, weight_digest
from mspgt_lens.moments import MAX_WIDTH, Moments, plan_moments
from mspgt_lens.processes import ALONE, Processes
from mspgt_lens.profile.curves import (
    guarantee,
    site_curves,
    small_sample_warnings,
    target_curves,
    token_curve,
)
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.profile.sampled_curves import sampled_curves
from mspgt_lens.profile.settings import ProfileSettings
from mspgt_lens.prompts import (
    Prompt,
    check_prompt,
    count_tokens,
    n_ordinary,
)
from mspgt_lens.signals import SIGNALS
from mspgt_lens.storage import package_versions

# Windows looked at before the pass: they decide the folds and the target features.
LOOKAHEAD = 10_000
CALIBRATION_TOKENS = 2048
_CONTROL_WORDS = {
    None: "",
    "random_weights": " (random weights)",
    "shuffled_tokens": " (shuffled tokens)",
}


class ProfileRun:
    """One profile: begun with its first prompts, finished once its moments are gathered."""

    def __init__(self, adapter: ModelAdapter, settings: ProfileSettings) -> None:
        self.adapter, self.settings = adapter, settings
        self.folds: dict[Hashable, int] = {}
        self.n_seen = 0
        self.last_group: Hashable = None
        self.n_later_groups = 0
        self.moments: Moments

    def first_prompts(self, stream: Iterator[Prompt]) -> list[Prompt]:
        """Those that :meth:`begin` is given; the others stay in the stream."""
        return list(itertools.islice(stream, LOOKAHEAD))

    def has_all(self, first: Sequence[Prompt]) -> bool:
        """Whether nothing comes after the first prompts."""
        return len(first) < LOOKAHEAD

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """Folds and target features from the first prompts; checks what can be checked early."""
        settings = self.settings
        if not prompts:
            raise ValueError("prompts holds no prompt with a token")
        if self.adapter.mask_id is None:
            self.adapter.require_causal("profiling without a mask token")
        self.adapter.require_every_logit("relevance in tokens")
        for index, prompt in enumerate(prompts):
            check_prompt(self.adapter, prompt, index)
        sizes: dict[Hashable, int] = {}
        for prompt in prompts:
            sizes[prompt.group] = sizes.get(prompt.group, 0) + n_ordinary(self.adapter, prompt)
        if len(sizes) < settings.n_folds:
            raise CannotMeasure(
                f"prompts need at least as many groups as folds ({settings.n_folds}), got "
                f"{len(sizes)}: give more documents, or groups= that tell them apart"
                + (f", or n_folds={len(sizes)}" if len(sizes) >= 3 else "")
            )
        self.folds = balanced_folds(sizes, settings.n_folds, settings.seed)
        plan = plan_moments(
            self.adapter,
            count_tokens(self.adapter, prompts),
            bands=settings.bands,
            n_folds=settings.n_folds,
            skip_first=settings.skip_first,
            seed=settings.seed,
            max_width=MAX_WIDTH,
            coordinates=settings.coordinates,
            signals=settings.signals,
        )
        self.moments = Moments(plan, self.adapter)
        if self.has_all(prompts):
            # Nobody should wait for a pass that cannot be enough.
            self._check_enough(*self._most_positions(prompts))
        self.adapter.check_decoding(torch.from_numpy(prompts[0].tokens[:16]))

    @property
    def n_groups(self) -> int:
        """Groups of all prompts so far."""
        return len(self.folds) + self.n_later_groups

    @property
    def projects(self) -> bool:
        """Whether residuals are projected, so that their axes need a calibration first."""
        return self.adapter.d_model > self.moments.plan.width

    def described(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What decides the sums, as JSON would hold it.

        Args:
            prompts: The first prompts.
        """
        digest = hashlib.blake2b(digest_size=8)
        for prompt in prompts:
            told = stable_hash(prompt.group, prompt.tokens.tobytes())
            digest.update(told.to_bytes(8, "little"))
        settings = vars(self.settings) | {
            "bands": {name: list(band) for name, band in self.settings.bands.items()},
            "signals": [signal.source for signal in self.settings.signals],
        }
        return {
            **provenance(self.adapter),
            "prompts": digest.hexdigest(),
            **settings,
        }

    def first_tokens(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The first prompts to calibrate on: as many as fit one padded batch, at least one."""
        longest = itertools.accumulate((len(prompt.tokens) for prompt in prompts), max)
        padded = (count * length for count, length in enumerate(longest, start=1))
        count = sum(1 for _ in itertools.takewhile(lambda size: size <= CALIBRATION_TOKENS, padded))
        return list(prompts[: max(1, count)])

    def assign(self, prompts: Sequence[Prompt]) -> list[tuple[Prompt, int]]:
        """Each prompt with its fold; groups that the first prompts lacked go by hash."""
        assigned = []
        for prompt in prompts:
            if self.n_seen >= LOOKAHEAD:
                check_prompt(self.adapter, prompt, self.n_seen)
            fold = self.folds.get(prompt.group)
            if fold is None:
                fold = stable_hash(prompt.group, self.settings.seed) % self.settings.n_folds
                # A group's windows follow one another, so a change of label is a new group.
                self.n_later_groups += prompt.group != self.last_group
                self.last_group = prompt.group
            self.n_seen += 1
            assigned.append((prompt, fold))
        return assigned

    def require_enough(self) -> None:
        """Raise :class:`CannotMeasure` if what was gathered does not suffice."""
        self._check_enough(self.moments.n_read, int(self.moments.n_valid.sum()))

    def finish(
        self, logit_lens: bool, notes: Sequence[str] = (), processes: Processes = ALONE
    ) -> LayerProfile:
        """All curves from the moments.

        Args:
            logit_lens: Also decode the raw logit lens.
            notes: Warnings that the passes gave.
            processes: Those that share the sites, each with the moments of all.
        """
        moments, settings = self.moments.on_cpu(), self.settings
        self.require_enough()
        relevance = ridge_lens_relevance(moments, self.adapter, settings.coordinates, processes)
        sampled = SampledReadings(moments, self.adapter, settings.coordinates, relevance)
        reading = read_targets(moments, settings.coordinates, sampled, processes)
        raw_lens = logit_lens_relevance(moments, self.adapter, processes) if logit_lens else None
        of_sample = sampled_curves(moments, self.adapter, settings.coordinates)
        compression, signals = site_curves(
            moments, settings.noise, settings.coordinates, of_sample, processes
        )
        scales = list(settings.bands)
        said = partial(guarantee, masked=moments.plan.masked)
        curves = target_curves(reading, sampled.tokens(), sampled.forged, scales, said)
        retained, predicted, added = (curves[name] for name in ("retained", "predicted", "added"))
        notes = [*notes, *small_sample_warnings(retained, predicted)]
        return LayerProfile(
            model_name=self.adapter.name + _CONTROL_WORDS[settings.control],
            n_layers=self.adapter.n_layers,
            n_tokens=int(moments.n_valid.sum()),
            n_groups=self.n_groups,
            bands=settings.bands,
            compression=compression,
            relevance=token_curve(relevance, said("relevance")),
            retained=retained,
            predicted=predicted,
            added=added,
            correlations=dict(zip(scales, reading.correlations.swapaxes(0, 1), strict=True)),
            fold_weights=tuple(moments.n_read.astype(float).tolist()),
            signals=signals,
            signal_words={s.name: s.words for s in settings.signals if s.name not in SIGNALS},
            control=settings.control,
            logit_lens=None if raw_lens is None else token_curve(raw_lens, said("logit_lens")),
            settings={
                "noise": settings.noise,
                "coordinates": settings.coordinates,
                "n_folds": settings.n_folds,
                "skip_first": settings.skip_first,
                "seed": settings.seed,
                "control": settings.control,
                "n_prompts": moments.n_prompts,
                "n_read": int(moments.n_read.sum()),
                "n_features": int(moments.plan.features.shape[1]),
                "width": moments.plan.width,
                "n_decoded": relevance.n_positions,
                "unigram_cross_entropy": relevance.unigram,
                "unigram_entropy": unigram_entropy(moments),
                "ridge": [[None if np.isinf(x) else x for x in row] for row in reading.ridge],
                "weights": self.adapter.weight_processing,
                "weights_digest": weight_digest(self.adapter),
                "prompts_fingerprint": f"{moments.fingerprint:016x}",
                **({"hidden_share": HIDDEN_SHARE} if moments.plan.masked else {}),
            },
            versions=package_versions(),
            warnings=tuple(notes),
        )

    def _most_positions(self, prompts: Sequence[Prompt]) -> tuple[Int[np.ndarray, " fold"], int]:
        """Positions per fold that may be read, and valid ones, if every token is ordinary text."""
        skip_first = self.settings.skip_first
        reach = [a - 1 + (b - a + 2) // 2 for a, b in self.settings.bands.values()]
        n_read = np.zeros(self.settings.n_folds, dtype=np.int64)
        n_valid = 0
        for prompt in prompts:
            valid = max(0, len(prompt.tokens) - skip_first)
            first = max(skip_first, max(reach) - 1)
            read = max(0, len(prompt.tokens) - first - max(reach))
            if self.moments.plan.masked:
                read = round(HIDDEN_SHARE * valid)
            n_read[self.folds[prompt.group]] += read
            n_valid += valid
        return n_read, n_valid

    def _check_enough(self, n_read: Int[np.ndarray, " fold"], n_valid: int) -> None:
        settings = self.settings
        n_features = self.moments.plan.features.shape[1]
        longest = max(b for _, b in settings.bands.values())
        if not n_read.sum():
            raise CannotMeasure(
                f"prompts are too short for the bands {settings.bands}: no position has half of "
                f"every band before and after it; use prompts of more than {2 * longest} tokens, "
                "or bands= with smaller offsets"
            )
        if n_read.min() < 2 * n_features:
            what = "hidden tokens" if self.moments.plan.masked else "positions with every band"
            raise CannotMeasure(
                f"prompts give {int(n_read.min())} {what} in one of "
                f"{settings.n_folds} folds; at least {2 * n_features} are needed: give more or "
                "longer prompts, fewer folds, or smaller bands"
            )
        width = self.moments.plan.width
        if n_valid < 2 * width:
            raise CannotMeasure(
                f"prompts give {n_valid} valid positions; residuals of width {width} "
                f"need at least {2 * width}: give more or longer prompts"
            )
