"""A partition says what was found as a person would, and only what is true."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import mspgt_lens as ml
from mspgt_lens.partition import Boundary, Support

SIGNALS = ("a", "b", "c", "d", "e")


def jump(block: int, size: float = 30.0, n_signals: int = 4) -> Boundary:
    return Boundary(block, "jump", SIGNALS[:n_signals], size, 0.001)


def bend(block: int, size: float = 3.6) -> Boundary:
    return Boundary(block, "bend", SIGNALS, size, 0.002)


def made(
    found: Sequence[Boundary] = (),
    boundaries: tuple[int, ...] = (3, 8),
    method: str = "fused",
    sharpness: tuple[float, float, float] = (0.5, 0.7, 0.6),
    signals: tuple[str, ...] = SIGNALS,
    alone: tuple[Boundary, ...] = (),
    edges: tuple[Boundary, ...] = (),
) -> ml.results.ScalePartition:
    """Of 12 blocks."""
    p = {number: 0.001 * number if number <= len(found) else 0.4 for number in (1, 2, 3)}
    return ml.results.ScalePartition(
        model_name="made",
        n_layers=12,
        boundaries=boundaries,
        intervals=tuple((b - 1, b + 1) for b in boundaries),
        p_values=p,
        n_boundaries=len(found),
        explained=0.5,
        probability=np.full(12, 1 / 12),
        sharpness=dict(zip(("stages", "drift", "both"), sharpness, strict=True)),
        by_method={method: boundaries},
        by_signal={name: Support(1 / len(signals), None, None) for name in signals},
        signals=np.random.default_rng(0).standard_normal((12, len(signals))),
        drift="noise",
        autocorrelation=0.0,
        found=tuple(found),
        alone=alone,
        edges=edges,
        method=method,
    )


def test_a_change_is_told_with_its_block_who_shares_it_and_its_size():
    lines = made([jump(3), bend(8)]).findings()
    assert lines[0] == "Two boundaries beyond gradual change with depth (p = 0.002)."
    assert (
        lines[1] == "A sharp change at block 3, shared by 4 of 5 signals, 30 times a typical "
        "block's."
    )
    assert (
        lines[2] == "A bend at block 8, shared by 5 of 5 signals: from there on the change per "
        "block differs by 3.6 times a typical block's."
    )
    spread = made([jump(3)._replace(width=3)]).findings()
    assert spread[1].startswith("A sharp change at block 3, over 3 blocks, shared by 4 of 5")


@pytest.mark.parametrize(
    ("size", "words"),
    [(3.14, "3.1"), (31.4, "31"), (100.0, "100"), (690.0, "690"), (12_345.0, "12,000"), (7.0, "7")],
)
def test_sizes_have_two_digits_that_count_and_no_exponent(size, words):
    assert f", {words} times a typical block's." in made([jump(3, size)]).summary()


@pytest.mark.parametrize(
    ("found", "boundaries", "places"),
    [
        (
            [],
            (3, 8),
            [
                "Best places, which the data do not support as such: block 3 (2 to 4); "
                "block 8 (7 to 9)."
            ],
        ),
        (
            [jump(3)],
            (3, 8),
            [
                "Boundary: block 3 (2 to 4).",
                "Best other place, which the data do not support as such: block 8 (7 to 9).",
            ],
        ),
        ([jump(3), bend(8)], (3, 8), ["Boundaries: block 3 (2 to 4); block 8 (7 to 9)."]),
        (
            [jump(3), bend(6), jump(8)],
            (3, 8),
            ["Boundaries with most evidence: block 3 (2 to 4); block 8 (7 to 9)."],
        ),
        (
            [jump(3), jump(8)],
            (3,),
            ["Boundary with most evidence: block 3 (2 to 4)."],
        ),
    ],
    ids=["none", "one", "two", "three found, two placed", "two found, one placed"],
)
def test_places_are_called_unsupported_where_they_are_and_nowhere_else(found, boundaries, places):
    partition = made(found, boundaries)
    assert partition.findings()[-len(places) :] == places
    assert sum("places" in line or "Boundar" in line for line in partition.findings()[1:]) == sum(
        "places" in line or "Boundar" in line for line in places
    )
    assert partition.supported == (len(found) == len(boundaries))


def test_places_of_another_method_are_supported_where_the_test_finds_them():
    near = made([jump(4), jump(8)], (3, 8), method="stages")
    assert near.supported
    assert near.findings()[-1] == "Boundaries by stages: block 3 (2 to 4); block 8 (7 to 9)."
    far = made([jump(5), jump(8)], (3, 8), method="thirds")
    assert not far.supported
    assert far.findings()[-2:] == [
        "Boundary by thirds: block 8 (7 to 9).",
        "Best other place by thirds, which the data do not support as such: block 3 (2 to 4).",
    ]


def test_no_boundary_beside_a_change_of_one_signal_and_the_edges():
    alone = (Boundary(5, "jump", ("c",), 46.0, 0.01),)
    edges = (Boundary(0, "edge", SIGNALS, 47.0, None), Boundary(11, "edge", (), 0.5, None))
    lines = made(alone=alone, edges=edges).changes_in_words()
    assert lines == [
        "No boundary beyond gradual change with depth (p = 0.400).",
        "A sharp change of c alone at block 5, 46 times a typical block's.",
        "The first block changes 5 of 5 signals more than any gradual block does (47 times a "
        "typical block's change); it is not counted.",
    ]


def test_what_several_signals_show_by_too_little_is_not_said_to_be_one_signals():
    few = (Boundary(5, "jump", ("a", "c"), 46.0, 0.03, 2),)
    assert made(alone=few).changes_in_words()[1:] == [
        "A sharp change of a and c, too little for a boundary, at block 5, over 2 blocks, "
        "46 times a typical block's."
    ]


def test_one_signal_shares_nothing():
    partition = made(
        [Boundary(3, "jump", ("a",), 20.0, 0.01)],
        signals=("a",),
        edges=(Boundary(0, "edge", ("a",), 5.0, None), Boundary(11, "edge", (), 1.0, None)),
    )
    text = partition.summary()
    assert "A sharp change at block 3, 20 times a typical block's." in text
    assert "The first block changes the signal more than" in text


def test_what_describes_no_better_than_the_mean_is_not_said_to_describe():
    assert "described best by stages:" in made().summary()
    assert "described best by their mean alone:" in made(sharpness=(1.1, 1.04, 1.2)).summary()


def test_more_boundaries_than_have_a_word_are_counted():
    found = [jump(block) for block in (1, 2, 3, 5, 6, 8, 9)]
    assert made(found).changes_in_words()[0].startswith("7 boundaries beyond")
    assert made(found[:5]).changes_in_words()[0].startswith("Five boundaries beyond")
