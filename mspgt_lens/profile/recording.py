"""Profiles from forward passes that the user runs: hooks, edits and loops of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from mspgt_lens.ambient import in_own_state, own_state, tell
from mspgt_lens.estimates import CannotMeasure
from mspgt_lens.models import Part, as_adapter, listening
from mspgt_lens.moments import Coordinates
from mspgt_lens.profile.intake import Intake
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.profile.run import ProfileRun
from mspgt_lens.profile.settings import ProfileSettings
from mspgt_lens.prompts import PromptDataset, as_dataset
from mspgt_lens.signals import Signal, choose_signals
from mspgt_lens.targets import DEFAULT_BANDS


class Recording:
    """What :func:`recording` gathers; :meth:`profile` gives its curves."""

    def __init__(self, intake: Intake, logit_lens: bool) -> None:
        self._intake, self._logit_lens = intake, logit_lens

    def __repr__(self) -> str:
        moments = self._intake.run.moments
        return (
            f"Recording of {self._intake.adapter.name}: {moments.n_prompts} prompts so far, "
            f"{self._intake.n_missing} to come"
        )

    @in_own_state
    def profile(self) -> LayerProfile:
        """The profile of all passes so far.

        Returns:
            What :func:`~mspgt_lens.profile_layers` gives for these prompts, with a warning where
            some of the prompts that were promised were never run.

        Raises:
            CannotMeasure: If too few prompts were run.
            ValueError: If the last pass stopped before the last block.
        """
        intake = self._intake
        intake.require_whole()
        if not intake.run.moments.n_prompts:
            raise CannotMeasure(
                "recording: no prompt was run; call the model inside the with block"
            )
        with intake.adapter.inference():
            profile = intake.run.finish(self._logit_lens, intake.notes())
        for note in profile.warnings:
            tell(note)
        return profile

    @own_state()
    def _on_tokens(self, tokens: Int[Tensor, "prompt pos"]) -> None:
        self._intake.begin(tokens)

    @own_state()
    def _on_site(self, site: int, residual: Float[Tensor, "prompt pos d_model"]) -> None:
        self._intake.on_site(site, residual)
        if site == self._intake.adapter.n_layers:
            self._intake.end()

    @own_state()
    def _on_pattern(self, block: int, pattern: Float[Tensor, "prompt head query key"]) -> None:
        self._intake.on_pattern(block, pattern)

    @own_state()
    def _on_part(self, block: int, part: Part, update: Float[Tensor, "prompt pos d_model"]) -> None:
        self._intake.on_part(block, part, update)


@contextmanager
def recording(
    model: Any,
    prompts: PromptDataset | Iterable[str],
    *,
    bands: Mapping[str, tuple[int, int]] = DEFAULT_BANDS,
    noise: float = 0.1,
    coordinates: Coordinates = "standardized",
    n_folds: int = 5,
    skip_first: int = 4,
    logit_lens: bool = False,
    signals: Sequence[str | Signal] | None = None,
    seed: int = 0,
) -> Iterator[Recording]:
    """Gather a profile while your own code runs the model, hooks and edits included.

    What is read of a site is what the model goes on with, after your hooks: so an edited model can
    be profiled. Nothing is changed, and nothing per token is kept. In place of your loop's logits
    the lens decodes by the model's own unembedding.

    Args:
        model: A ``HookedTransformer`` or a ``TransformerBridge``.
        prompts: All prompts that will be run, in any order and in batches of any size, padded at
            either end (with ``attention_mask`` where on the left). They decide the folds and what
            is read for before the first pass.
        bands, noise, coordinates, n_folds, skip_first, logit_lens, signals, seed: As in
            :func:`~mspgt_lens.profile_layers`.

    Yields:
        The recording. Its profile equals that of :func:`~mspgt_lens.profile_layers` on the same
        prompts, up to what other batches make of rounding in the model's own precision.

    Raises:
        ValueError: As :func:`~mspgt_lens.profile_layers`; inside, if a row that is run is none of
            the prompts, or a pass stops before the last block.
        CannotMeasure: If the model is an encoder, or the prompts do not suffice.

    Example:
        >>> with ml.recording(model, prompts) as record:
        ...     for prompt in prompts:
        ...         _ = model(torch.tensor(prompt.tokens)[None])
        >>> record.profile()  # of an edited model, where run_with_hooks edits
        LayerProfile of ...
        ...
    """
    with own_state():
        adapter = as_adapter(model)
        # An encoder is profiled on masked tokens, which only profile_layers hides.
        adapter.require_causal("recording (profile_layers does not)")
        promised = list(as_dataset(prompts, adapter))
        chosen = choose_signals(signals)
        settings = ProfileSettings(
            bands, noise, coordinates, n_folds, skip_first, seed, signals=chosen
        )
        run = ProfileRun(adapter, settings)
        with adapter.inference():
            intake = Intake(run, promised)
            intake.calibrate(promised)
    record = Recording(intake, logit_lens)
    on_pattern = record._on_pattern if intake.needs_patterns else None
    on_part = record._on_part if intake.needs_updates else None
    with listening(adapter, record._on_tokens, record._on_site, on_pattern, on_part):
        yield record
