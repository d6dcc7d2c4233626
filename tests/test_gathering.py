"""What gathering may cost."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from mspgt_lens.moments import PROJECTED_WIDTH, SAMPLE_CAPACITY, MomentPlan, Moments
from mspgt_lens.profile import _TOKENS_PER_BATCH
from mspgt_lens.targets import DEFAULT_BANDS


def test_a_model_of_7b_parameters_stays_under_six_gigabytes():
    """33 sites of width 4,096: the sums, the sample, and one batch's rows."""
    d_model, n_layers = 4096, 32
    plan = MomentPlan(
        bands=DEFAULT_BANDS,
        n_folds=5,
        skip_first=4,
        seed=0,
        width=PROJECTED_WIDTH,
        coordinates="standardized",
        features=torch.zeros(1, 32),
    )
    adapter = SimpleNamespace(
        n_layers=n_layers, d_model=d_model, d_vocab=128_256, device=torch.device("cpu")
    )
    moments = Moments(plan, adapter)
    sums = sum(getattr(moments, name).nbytes for name in Moments._SUMS)
    sample = SAMPLE_CAPACITY * (n_layers + 1) * d_model * 4
    rows = _TOKENS_PER_BATCH["cpu"] * ((n_layers + 1) * PROJECTED_WIDTH + 2 * d_model) * 4
    assert sums + sample + rows < 6e9
