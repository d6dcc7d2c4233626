"""The figures of blocks skipped and swapped, and of massive activations taken away."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from made_results import made_ablation, made_block_effects

import mspgt_lens as ml

MADE = made_block_effects(np.random.default_rng(1))


def lines(figure, name):
    return [t for t in figure.data if t.name == name and t.mode == "lines+markers"]


def test_every_curve_is_drawn_in_its_row_and_column():
    figure = MADE.plot()
    for reach, name in (
        ("all", "changed everywhere"),
        ("same", "at the predicting token only"),
        ("future", "at earlier tokens only"),
    ):
        drawn = [trace.y for trace in lines(figure, name)]
        expected = [
            np.where(
                (measure == "kl") & (MADE.curve(change, reach, measure).values == 0),
                np.nan,
                MADE.curve(change, reach, measure).values,
            )
            for change in ("skip", "swap")
            for measure in ("kl", "top1_kept", "entropy")
        ]
        assert len(drawn) == len(expected) == 6
        for got, wanted in zip(drawn, expected, strict=True):
            np.testing.assert_allclose(got, wanted)


def test_the_axis_of_divergence_is_not_stretched_by_rounding():
    skip = np.array(MADE.skip)
    skip[2, 0, 0] = 1e-12
    figure = ml.plots.plot_block_effects(replace(MADE, skip=skip))
    low, high = figure.layout.yaxis.range
    assert high - low < 5.3
    assert high > np.log10(MADE.skip[:, 0].max())


def test_a_model_that_nothing_moves_is_drawn_too():
    figure = ml.plots.plot_block_effects(replace(MADE, skip=0 * MADE.skip, swap=0 * MADE.swap))
    assert len(figure.data) == 36


def test_traits_are_drawn_clean_and_ablated_with_the_block_marked():
    made = made_ablation(np.random.default_rng(2))
    figure = made.plot()
    for ablated, name in ((False, "clean"), (True, "without what the block writes")):
        for trace, trait in zip(
            lines(figure, name), ("massive_share", "sink_rate", "prompt_entropy"), strict=True
        ):
            np.testing.assert_allclose(trace.y, made.curve(trait, ablated=ablated).values)
    # Sites before and after block 1 are 1 and 2.
    assert [shape.x0 for shape in figure.layout.shapes] == [1.5, 1, 1.5]
    assert "keep" in figure.layout.title.text
