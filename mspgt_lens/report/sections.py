"""What a report says of each kind of result: a heading, a few sentences, a table or a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from mspgt_lens.contract import Result
from mspgt_lens.generation.results import GenerationEffects
from mspgt_lens.hvib.results import HvibFit
from mspgt_lens.partition import ScalePartition
from mspgt_lens.patching.results import PatchSweep, ScalePatch
from mspgt_lens.perturbation.brittleness import Brittleness
from mspgt_lens.perturbation.dependence import TokenClasses
from mspgt_lens.perturbation.dissociation import Dissociation
from mspgt_lens.perturbation.massive import MassiveAblation
from mspgt_lens.perturbation.perturbing import PerturbationEffects
from mspgt_lens.perturbation.skipping import BlockEffects
from mspgt_lens.plots.block_effects import plot_block_effects
from mspgt_lens.plots.boundaries import plot_boundaries, plot_stability
from mspgt_lens.plots.comparison import plot_comparison
from mspgt_lens.plots.emergence import plot_emergence
from mspgt_lens.plots.explore import explore
from mspgt_lens.plots.forest import plot_effects
from mspgt_lens.plots.hvib import plot_hvib
from mspgt_lens.plots.massive import plot_massive_ablation
from mspgt_lens.plots.patching import plot_patching, plot_scale_patch
from mspgt_lens.plots.perturbation import plot_brittleness, plot_dissociation
from mspgt_lens.plots.places import plot_places
from mspgt_lens.plots.plane import plot_information_plane, plot_scale_map
from mspgt_lens.plots.profile import plot_profile
from mspgt_lens.plots.rate_distortion import plot_rate_distortion
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.rates.results import RateDistortion
from mspgt_lens.report.page import heading, paragraphs, section, table
from mspgt_lens.report.tables import (
    ratio_rows,
    slope_rows,
    strongest_cells,
    summary_rows,
    verdict_rows,
)
from mspgt_lens.studies.comparison import Comparison, records
from mspgt_lens.studies.emergence import Emergence
from mspgt_lens.studies.stability import Stability
from mspgt_lens.theory.place_comparison import PlaceComparison
from mspgt_lens.theory.verdicts import Verdicts

_PLACES_SAY = (
    "p says how often as many boundaries, anywhere in the depth, are as near to a theory's places; "
    "a method that places two in a mere drift puts them near its thirds."
)


def profile_sections(
    profiles: Sequence[LayerProfile],
    partition: ScalePartition | None,
    scale_map: LayerProfile | None,
) -> Iterator[Markup]:
    """Summary, curves, plane and map; several profiles are overlaid."""
    first = profiles[0]
    for profile in profiles:
        title = "Values" if len(profiles) == 1 else f"Values of {profile.model_name}"
        yield heading(
            title,
            "With 95% intervals from resampling groups. Retained and predicted information is what "
            "readers can use, and may rise with depth: of a band of one token in nats about the "
            "token, at most the unigram model's cross-entropy; of others in nats about the mean of "
            "the band's features, read as if that were Gaussian, which is no bound on Shannon's.",
        ) + table(summary_rows(profile))
    yield section(
        "Curves over depth",
        "Site l is the residual stream before block l; the last site is after the last block. "
        "Compression is what a noisy channel needs to carry the stream. Retained is what a linear "
        "reader can still tell of the tokens already read, predicted what it can tell of the "
        "tokens to come, both on documents it was not fitted on.",
        plot_profile(first, partition) if len(profiles) == 1 else plot_profile(profiles),
    )
    yield section(
        "Information plane",
        "Each path follows one scale from the first site to the last. A step to the left forgets "
        "the past; a step up predicts more of what is to come.",
        plot_information_plane(first),
    )
    if scale_map is not None:
        yield section(
            "Scale map",
            "At which depth each single token offset is read best. A row's label gives its largest "
            "value; rows that cannot be told from 0 at any site stay blank.",
            plot_scale_map(scale_map),
        )
    shown = [*profiles, *([] if scale_map is None else [scale_map])]
    if len({one.n_layers for one in shown}) == 1:
        yield section(
            "Look around",
            "Choose curves from the menus, and a site with the slider. Shares are of "
            "the site that retains or predicts most of a scale; on the right, a curve leaves 0 at "
            "the beta from which on a Gaussian bottleneck finds the scale worth its rate.",
            explore(shown),
        )


def boundary_sections(partition: ScalePartition, controls: Sequence[ScalePartition]) -> Markup:
    """The partition with its test, and what the controls give."""
    shown = section(
        "Scale boundaries",
        f"{' '.join(partition.findings())} p says how often gradual change alone gives as much "
        "evidence for sharp changes; what signals share weighs more than what one of them shows.",
        plot_boundaries(partition),
    )
    if not controls:
        return shown
    rows = [("", "boundaries", "where", "p", "left-out blocks described best by")]
    for one in (partition, *controls):
        where = ", ".join(f"{change.kind} at block {change.block}" for change in one.found)
        rows.append(
            (
                one.model_name or "signals",
                str(one.n_boundaries),
                where or "none",
                f"{one.p_found:.3g}",
                one.best_description,
            )
        )
    words = (
        "What the architecture and the method give for free: the same measurement on controls, "
        "which the theory says have no stages."
    )
    return shown + paragraphs([words]) + table(rows)


def verdict_section(verdicts: Verdicts) -> Markup:
    """The table of verdicts, and where theories contradict one another."""
    head, *rows = verdict_rows(verdicts)
    ordered = (v for own in verdicts.theories.values() for v in own)
    reasons = (f"{v.statement} {v.reason}" for v in ordered)
    told = [(*head, "why"), *((*row, why) for row, why in zip(rows, reasons, strict=True))]
    n = len(verdicts.models)
    several = len(verdicts.theories) > 1
    shown = heading(
        "Predictions of several theories" if several else "The theory's predictions",
        f"From {n} model{'s' if n > 1 else ''}. A prediction is supported or refuted only if "
        "the whole interval lies on that side of its threshold; thresholds were fixed before "
        "anything was measured.",
    ) + table(told, marked=2)
    contested = verdicts.contradictions()
    if not contested.empty:
        words = "Questions that these theories answer differently: at most one answer can hold."
        answers = [tuple(map(str, row)) for row in contested.itertuples(index=False)]
        columns = [tuple(map(str, contested.columns))]
        shown += paragraphs([words]) + table([*columns, *answers], marked=4)
    return shown + _places_of(list(verdicts.places.values()))


def place_section(found: PlaceComparison) -> Markup:
    """Boundaries against the places that theories name."""
    return section(
        f"Whose places? {found.model_name}".rstrip(),
        " ".join([*found.findings(), *found.warnings, _PLACES_SAY]),
        plot_places(found),
    ) + table(found.rows())


def _places_of(found: Sequence[PlaceComparison]) -> Markup:
    """One model's with its figure; several as a table."""
    if len(found) < 2:
        return Markup().join(map(place_section, found))
    rows = [("model", "boundaries", *found[0].rows()[0])]
    for one in found:
        at = ", ".join(map(str, one.boundaries))
        rows += [(one.model_name, at, *row) for row in one.rows()[1:]]
    return heading("Whose places?", _PLACES_SAY) + table(rows)


def comparison_section(comparison: Comparison) -> Markup:
    """Models side by side."""
    rows = [("model", "family", "blocks", "boundaries", "chosen", "p of two")]
    for row in records(comparison.models):
        family = row["family"]
        rows.append(
            (
                str(row["model"]),
                family if isinstance(family, str) else "",
                str(row["n_layers"]),
                f"{row['first']}, {row['second']}",
                str(row["n_boundaries"]),
                f"{row['p_value']:.3g}",
            )
        )
    return (
        section(
            "Models side by side",
            "Profiles of different depth on relative depth, the segments of every model, and the "
            "brittleness of each segment.",
            plot_comparison(comparison),
        )
        + table(rows)
        + paragraphs(comparison.findings())
    )


def brittleness_sections(found: Brittleness) -> Markup:
    """Response curves, slopes and ratios."""
    return (
        section(
            "Brittleness",
            "Noise at the entries of all of a segment's blocks, with the same total variance for "
            "every segment. Below, the slope of every block alone: KL over the squared level.",
            plot_brittleness(found),
        )
        + heading(
            "Slopes and half levels",
            "Of whole segments at equal energy, and of one block at a time, averaged over the "
            "segment's blocks.",
        )
        + table(slope_rows(found))
        + heading("Ratios of slopes")
        + table(ratio_rows(found))
    )


def dissociation_section(found: Dissociation) -> Markup:
    """Segments by token classes."""
    e = found.interaction
    return section(
        "Which tokens each scale's perturbation hurts",
        f"Loss increase under {found.perturbation}. MSPGT predicts that the diagonal leads. "
        f"Interaction of segments and classes: {e.value:.2f} ({e.low:.2f} to {e.high:.2f}; p "
        f"{e.p_value:.3f}); above 0, the diagonal holds more than segments and classes on their "
        "own explain.",
        plot_dissociation(found),
    )


def classes_section(found: TokenClasses) -> Markup:
    """How many tokens depend on each band."""
    rows = [("longest band that the token depends on", "tokens")]
    rows += [(name, f"{count:,}") for name, count in found.counts.items()]
    return heading(
        "Tokens by the context they depend on",
        f"A token depends on a band if its loss falls by {found.threshold:g} nats or more when the "
        "context grows to the band's end.",
    ) + table(rows)


def effects_section(found: PerturbationEffects | GenerationEffects) -> Markup:
    """Every perturbation of every segment."""
    if isinstance(found, GenerationEffects):
        return section(
            "Text written under interventions",
            f"{' '.join(found.findings())} Filled points are the effects that MSPGT's first "
            "version predicts.",
            plot_effects(found),
        )
    return section(
        "Every kind of perturbation",
        "How far predictions move when every block of a segment is perturbed at full strength. "
        "A longer segment gets more of it, so read each against random sets of as many blocks "
        "(gray).",
        plot_effects(found),
    )


def block_effects_section(found: BlockEffects) -> Markup:
    """Blocks skipped and swapped."""
    return section(
        "Blocks skipped and swapped",
        f"{' '.join(found.findings())} A block is changed everywhere; at the predicting token "
        "only; or at earlier tokens only, so that a prediction meets it through what it takes "
        "from them.",
        plot_block_effects(found),
    ) + table(found.rows())


def massive_section(found: MassiveAblation) -> Markup:
    """Massive activations taken away."""
    return section(
        "Massive activations",
        f"{' '.join(found.findings())} What the block writes into those coordinates there is taken "
        "away; what later blocks write stays.",
        plot_massive_ablation(found),
    ) + table(found.rows())


def sweep_section(sweep: PatchSweep, partition: ScalePartition | None) -> Markup:
    """Patching by block and position."""
    return (
        heading("Strongest cells")
        + table(strongest_cells(sweep))
        + section(
            "Patching by block and position",
            "Each cell is one run with that one activation replaced. The effect is the share of "
            "the way from the corrupted run (0) to the clean one (1). Dots: the change differs "
            "from none by a sign-flip test over pairs, after Holm's correction over all cells.",
            plot_patching(sweep, partition),
        )
    )


def scale_patch_section(found: ScalePatch) -> Markup:
    """Patching by scale."""
    return section(
        "Patching by scale",
        "What every block of a segment writes, replaced at once, against random sets of as "
        "many blocks. p says whether it matters which blocks these are.",
        plot_scale_patch(found),
    )


def result_section(found: Result) -> Markup:
    """Any other result: what it says of itself, and its figure."""
    words = " ".join([*found.findings(), *found.warnings])
    rows = found.rows()
    shown = table(rows) if rows else Markup()
    return section(found.heading(), words, found.plot()) + shown


def hvib_section(fit: HvibFit) -> Markup:
    """The trained probe."""
    return section(
        "The trained H-VIB probe",
        "Stochastic readers of every site, trained at several weights of relevance against rate: "
        "what each keeps, and what it predicts with that, on groups it has not seen.",
        plot_hvib(fit),
    )


def rate_section(found: RateDistortion) -> Markup:
    """What predictions need of every site."""
    return section(
        "The rate that predictions need",
        "How little one site can pass on through a noisy channel before predictions move, for the "
        "positions of each band before a prediction. " + found.guarantee,
        plot_rate_distortion(found),
    )


def stability_section(found: Stability) -> Markup:
    """The partition under conditions that should not matter."""
    return section(
        "Stability of the boundaries",
        "The partition from halves of the prompts, other texts, seeds and bands. Boundaries that "
        "are real stay where they are.",
        plot_stability(found),
    )


def emergence_section(found: Emergence) -> Markup:
    """Profiles along training."""
    return section(
        "Along training",
        "What the model predicts at each checkpoint, and where the best two boundaries lie; filled "
        "where the data support two.",
        plot_emergence(found),
    )
