"""``mspgt-lens profile``: what every layer compresses, retains and predicts, as a report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mspgt_lens.cli.options import (
    add_checkpoint,
    add_documents,
    add_files,
    add_length,
    add_model,
    add_prompts,
    add_run,
    prompts_for,
)
from mspgt_lens.cli.placing import load_placed
from mspgt_lens.contract import aligned
from mspgt_lens.profile.layers import profile_layers
from mspgt_lens.profile.results import LayerProfile
from mspgt_lens.report.tables import summary_rows
from mspgt_lens.report.writing import write_report
from mspgt_lens.scales.detection import check_depth, detect_scales
from mspgt_lens.targets import DEFAULT_BANDS, OFFSET_BANDS

# One for each fold.
_FEWEST_DOCUMENTS = 5


def add_profile_command(commands: Any) -> None:
    """Add ``profile`` to the command's subparsers."""
    command = commands.add_parser(
        "profile",
        help="profile a model's layers and write a report",
        description="Profile a model's layers on your texts (or on the built-in passages) and "
        "write one self-contained HTML report.",
        epilog="example: mspgt-lens profile gpt2 --prompts texts.jsonl --out report.html",
    )
    add_model(command)
    add_prompts(command)
    add_documents(command, least=_FEWEST_DOCUMENTS)
    add_length(command)
    command.add_argument(
        "--scale-map",
        action="store_true",
        help="also read every offset 1, 2, 4 ... 64 on its own, in the same pass; what is read of "
        "then has 64 tokens on both sides, for all curves",
    )
    command.add_argument(
        "--scales",
        action="store_true",
        help="also seek scale boundaries and show them in the report",
    )
    add_files(command, "report.html", "profile, for LayerProfile.load and scales --profile")
    add_checkpoint(command)
    add_run(command)
    command.set_defaults(run=_profile, shares_work=True)


def _profile(options: argparse.Namespace) -> int:
    model = load_placed(options, options.model)
    if options.scales:
        check_depth(model)
    whole = profile_layers(
        model,
        prompts_for(options, model, options.n_documents),
        bands={**DEFAULT_BANDS, **OFFSET_BANDS} if options.scale_map else DEFAULT_BANDS,
        seed=options.seed,
        progress=not options.no_progress,
        process_group=options.launch.group(model),
        checkpoint=options.checkpoint,
    )
    if not options.launch.is_first:
        return 0
    profile = _of_bands(whole, DEFAULT_BANDS)
    scale_map = _of_bands(whole, OFFSET_BANDS) if options.scale_map else None
    print(
        f"\n{profile.model_name}: {profile.n_layers} blocks, {profile.n_tokens:,} tokens "
        f"from {profile.n_groups:,} groups\n"
    )
    print(aligned(summary_rows(profile)))
    # Before boundaries are sought: what a long pass found must not hang on them.
    if options.save is not None:
        print(f"\nprofile: {profile.save(options.save).resolve()}")
    shown: list[Any] = [profile]
    if options.scales:
        partition = detect_scales(profile=profile, seed=options.seed)
        print("", *partition.findings(), sep="\n")
        shown.append(partition)
    path = write_report(options.out, *shown, scale_map=scale_map)
    print(f"\nreport: {path.resolve()}")
    return 0


def _of_bands(profile: LayerProfile, bands: Mapping[str, tuple[int, int]]) -> LayerProfile:
    """A profile's curves of some of its bands, and those of none."""
    by_scale = ("retained", "predicted", "added", "correlations")
    parts: dict[str, Any] = {
        name: {scale: one for scale, one in getattr(profile, name).items() if scale in bands}
        for name in by_scale
    }
    return replace(profile, bands=dict(bands), **parts)
