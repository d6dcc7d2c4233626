"""What a profile will take: memory, operations and bytes on disk, before any weights are loaded.

Every term follows the code that it is of, by the same sizes and the same constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import pandas as pd
import torch
from torch import Tensor

from mspgt_lens.ambient import in_own_state
from mspgt_lens.contract import Rows, aligned, counted
from mspgt_lens.gathering import prompts_per_batch
from mspgt_lens.information.lens import LOGITS_PER_CHUNK, affordable_positions
from mspgt_lens.information.readers import RIDGE_GRID, SELECTION_SITES
from mspgt_lens.models.placing import DTYPES
from mspgt_lens.models.sizing import ModelSize, model_size
from mspgt_lens.moments import N_FEATURES, SAMPLE_CAPACITY, MomentPlan, Moments, kept_width
from mspgt_lens.profile.passing import TOKENS_PER_BATCH
from mspgt_lens.profile.run import CALIBRATION_TOKENS, LOOKAHEAD
from mspgt_lens.signals import SIGNALS
from mspgt_lens.targets import DEFAULT_BANDS

PlannedDevice = Literal["cpu", "cuda", "mps"]
Stage = Literal["throughout", "before", "pass", "reading"]

_N_FOLDS = 5
# Bytes of numbers that are kept or computed in these.
_SINGLE, _DOUBLE = 4, 8
# Of a saved profile: what every curve guarantees, in words.
_WORDS = 12_000
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class PlannedTerm:
    """Memory for one thing on one device.

    Attributes:
        device: Such as ``"cuda:0"``; ``"cpu"`` is the memory of the machine.
        stage: When it is taken: ``"throughout"``, ``"before"`` the pass (targets), in the
            ``"pass"`` over the prompts, or in ``"reading"`` curves from the sums.
        term: What it is.
        n_bytes: How much.
    """

    device: str
    stage: Stage
    term: str
    n_bytes: int


@dataclass(frozen=True)
class ProfilePlan:
    """What one profile of default settings will take, beside what Python and torch take.

    Attributes:
        model: Sizes of the model.
        n_prompts: Prompts of ``length`` tokens each.
        length: Tokens per prompt.
        dtype: Of the weights.
        memory: Every term on every device.
        operations: Floating-point operations by what they are for, on all devices together.
        disk: Bytes by what is written.
    """

    model: ModelSize
    n_prompts: int
    length: int
    dtype: str
    memory: tuple[PlannedTerm, ...]
    operations: Mapping[str, float]
    disk: Mapping[str, int]

    @property
    def peaks(self) -> Mapping[str, int]:
        """Device to the most that is taken there at one time, in bytes."""
        return {device: max(self._by_stage(device).values()) for device in self._devices()}

    def to_dataframe(self) -> pd.DataFrame:
        """Every term as a table.

        Returns:
            One row per term: ``kind`` (memory, operations or disk), ``device``, ``stage``,
            ``term``, ``value`` and ``unit``.
        """
        rows = [("memory", *vars(term).values(), "bytes") for term in self.memory]
        rows += [("operations", "", "", n, v, "operations") for n, v in self.operations.items()]
        rows += [("disk", "", "", name, value, "bytes") for name, value in self.disk.items()]
        return pd.DataFrame(rows, columns=["kind", "device", "stage", "term", "value", "unit"])

    def summary(self) -> str:
        """All terms in words, device by device.

        Returns:
            Lines of text.
        """
        size = self.model
        lines = [
            f"{size.name or 'model'}: {counted(size.n_parameters, 'weight')} in {self.dtype}, "
            f"{counted(size.n_layers, 'block')} of width {size.d_model:,}; "
            f"{self.n_prompts:,} prompts of {self.length:,} tokens"
        ]
        for device, peak in self.peaks.items():
            own = [term for term in self.memory if term.device == device]
            rows: Rows = [(f"{device}: {shown_bytes(peak)}", "when", "")]
            rows += [(f"  {x.term}", x.stage, shown_bytes(x.n_bytes)) for x in own]
            lines += ["", aligned(rows)]
        total = sum(self.operations.values())
        rows = [(f"operations: {total:.2g}", "")]
        rows += [(f"  {name}", f"{value:.2g}") for name, value in self.operations.items()]
        lines += ["", aligned(rows), ""]
        rows = [(f"  {name}", shown_bytes(value)) for name, value in self.disk.items()]
        return "\n".join([*lines, aligned([("disk", ""), *rows])])

    def __str__(self) -> str:
        return self.summary()

    def _devices(self) -> list[str]:
        return list(dict.fromkeys(term.device for term in self.memory))

    def _by_stage(self, device: str) -> dict[str, int]:
        found = dict.fromkeys(get_args(Stage), 0)
        for term in self.memory:
            if term.device == device:
                found[term.stage] += term.n_bytes
        kept = found["throughout"]
        return {stage: kept + (0 if stage == "throughout" else n) for stage, n in found.items()}


@in_own_state
def plan_profile(
    model: Any,
    n_prompts: int,
    length: int,
    *,
    n_devices: int = 1,
    device: PlannedDevice = "cuda",
    dtype: str = "float32",
) -> ProfilePlan:
    """What ``profile_layers`` will take at its defaults, from the model's configuration alone.

    Args:
        model: As :func:`~mspgt_lens.load_model` takes it (a hub name, a folder, a GGUF file or
            ``"demo"``), or a configuration of transformers.
        n_prompts: Number of prompts, of one length.
        length: Tokens per prompt.
        n_devices: Devices that the model is spread over, block by block.
        device: Their kind.
        dtype: Precision of the weights, as for :func:`~mspgt_lens.load_model`.

    Returns:
        Memory on every device, operations and bytes on disk, term by term.

    Raises:
        CannotMeasure: If the configuration does not say how large the model is, or its weights are
            quantized.
        FileNotFoundError: If ``model`` looks like a path and there is nothing.
        TypeError: If ``model`` is neither a name nor a configuration.
        ValueError: If an argument is out of range.

    Example:
        >>> plan = ml.studies.plan_profile("demo", 1000, 128, device="cpu")
        >>> sorted(plan.peaks)
        ['cpu']
    """
    _check(n_prompts, length, n_devices, device, dtype)
    size = model_size(model)
    if size.n_ctx is not None and length > size.n_ctx:
        raise ValueError(
            f"length must be at most the model's context, {size.n_ctx:,} tokens, got {length:,}"
        )
    planner = _Planner(size, n_prompts, length, n_devices, device, DTYPES[dtype])
    return ProfilePlan(
        model=size,
        n_prompts=n_prompts,
        length=length,
        dtype=dtype,
        memory=tuple(term for term in planner.memory() if term.n_bytes),
        operations=planner.operations(),
        disk=planner.disk(),
    )


def shown_bytes(n_bytes: float) -> str:
    """A number of bytes in words: ``1.5 GB``."""
    power = 0
    while n_bytes >= 1000 and power < len(_UNITS) - 1:
        n_bytes, power = n_bytes / 1000, power + 1
    return f"{n_bytes:.3g} {_UNITS[power]}"


def _check(n_prompts: int, length: int, n_devices: int, device: str, dtype: str) -> None:
    if n_prompts < _N_FOLDS:
        raise ValueError(f"n_prompts must be at least {_N_FOLDS}, one per fold, got {n_prompts}")
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, got {length}")
    if device not in get_args(PlannedDevice):
        raise ValueError(f"device must be one of cpu, cuda, mps, got {device!r}")
    if n_devices < 1 or (n_devices > 1 and device != "cuda"):
        raise ValueError(
            f"n_devices must be at least 1, and 1 but for device='cuda', got {n_devices} of "
            f"{device}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


class _Planner:
    """The terms of one profile."""

    def __init__(
        self,
        size: ModelSize,
        n_prompts: int,
        length: int,
        n_devices: int,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        self.size, self.n_prompts, self.length = size, n_prompts, length
        self.device, self.dtype = device, dtype
        self.devices = [f"cuda:{i}" for i in range(n_devices)] if device == "cuda" else [device]
        self.n_tokens, self.n_sites = n_prompts * length, size.n_layers + 1
        self.width = kept_width(size.d_model)
        at_once = prompts_per_batch(length, TOKENS_PER_BATCH[device], size.n_heads)
        self.batch = min(at_once, -(-n_prompts // _N_FOLDS))
        self.sums = self._sums()
        self.n_sampled = min(SAMPLE_CAPACITY, self.n_tokens)
        self.sample = self.n_sites * self.n_sampled * size.d_model * _SINGLE

    def _sums(self) -> dict[str, Tensor]:
        """The sums as the pass makes them, as shapes without memory."""
        meta = torch.device("meta")
        plan = MomentPlan(
            bands=DEFAULT_BANDS,
            n_folds=_N_FOLDS,
            skip_first=4,
            seed=0,
            width=self.width,
            coordinates="standardized",
            features=torch.empty(self.size.d_vocab, N_FEATURES, device=meta),
        )
        self.n_columns = plan.n_columns
        shaped = _Shaped(self.size, meta, self.dtype)
        sums = Moments(plan, cast(Any, shaped)).sums()
        return {name: value for name, value in sums.items() if isinstance(value, Tensor)}

    def memory(self) -> list[PlannedTerm]:
        """Every term on every device; some may be 0."""
        size = self.size
        first, last = self.devices[0], self.devices[-1]
        has_one = len(self.devices) == 1
        n_bytes = self.dtype.itemsize
        sums = sum(value.nbytes for value in self.sums.values())
        embedding = size.d_vocab * size.d_model
        terms = []
        for index, device in enumerate(self.devices):
            # The first ones have a block more where blocks do not divide evenly.
            n_blocks = size.n_layers // len(self.devices)
            n_blocks += index < size.n_layers % len(self.devices)
            own = size.n_blocks * n_blocks // size.n_layers
            own += size.n_before * (device == first) + size.n_after * (device == last)
            # Of a tied unembedding, what runs apart from the embedding holds its own copy.
            own += embedding * (device == last and not has_one and size.n_after < embedding)
            sites = n_blocks + (device == last)
            terms += [
                PlannedTerm(device, "throughout", "weights", own * n_bytes),
                PlannedTerm(
                    device, "throughout", "sums of all folds", sums if device == first else 0
                ),
                PlannedTerm(device, "pass", "one batch: rows of its sites", self._rows(sites)),
                PlannedTerm(device, "pass", "one batch: inside of a block", self._block(n_bytes)),
                PlannedTerm(
                    device, "reading", "logits of sampled positions", self._decoding(device == last)
                ),
            ]
        apart = self.device != "cpu"
        tokens_seen = min(size.d_vocab, self.n_tokens)
        # Read in float64; a copy in float32 where it is elsewhere or in another precision.
        copied = _SINGLE * embedding * (apart or self.dtype != torch.float32)
        targets = 2 * _DOUBLE * tokens_seen * size.d_model + copied
        prompts = _DOUBLE * min(self.n_prompts, LOOKAHEAD) * self.length
        features = _SINGLE * size.d_vocab * N_FEATURES
        return [
            *terms,
            PlannedTerm("cpu", "throughout", "first prompts", prompts),
            PlannedTerm("cpu", "throughout", "features of tokens", features),
            PlannedTerm("cpu", "before", "target features from the embedding", targets),
            # What is kept, and as much again where it is merged, and where it is read.
            PlannedTerm("cpu", "pass", "sampled positions", 2 * self.sample),
            PlannedTerm("cpu", "reading", "sampled positions", 2 * self.sample),
            PlannedTerm("cpu", "reading", "copy of the sums", sums * apart),
            PlannedTerm("cpu", "reading", "readers and lenses", self._reading()),
        ]

    def _rows(self, n_sites: int) -> int:
        """Rows of the sites on one device; where they are projected, those of the calibration."""
        size, tokens = self.size, self.batch * self.length
        most = tokens * self.width
        if self.width < size.d_model:
            calibrated = max(1, CALIBRATION_TOKENS // self.length) * self.length
            most = max(most, min(calibrated, self.n_tokens) * size.d_model)
        return n_sites * most * _SINGLE

    def _block(self, n_bytes: int) -> int:
        """Of a block: its MLP, residuals, three patterns (one of them in float32), four rows."""
        size, tokens = self.size, self.batch * self.length
        patterns = self.batch * size.n_heads * self.length**2 * (2 * n_bytes + _SINGLE)
        inner = tokens * (3 * size.d_mlp + 4 * size.d_model) * n_bytes
        return patterns + inner + 4 * tokens * size.d_model * _SINGLE

    def _reading(self) -> int:
        """Readers of the sites that strengths are chosen at, or the lens of one site."""
        width, kept = self.width, _N_FOLDS + 1
        # In float64 and float32: each fold's sums, those of all, and each fold's covariances; and
        # of one fit the factors at every strength.
        per_site = kept * _DOUBLE + _N_FOLDS * (_DOUBLE + _SINGLE)
        readers = min(SELECTION_SITES, self.n_sites) * per_site * width * (width + self.n_columns)
        factors = len(RIDGE_GRID) * (_DOUBLE + _SINGLE) // 2 * width**2
        lens = 2 * kept * _DOUBLE * width * (width + self.size.d_model)
        return max(readers + factors, lens)

    def _decoding(self, is_last: bool) -> int:
        """Logits at a time, and the unembedding in float32 where weights are narrower."""
        if not is_last:
            return 0
        wide = self.size.d_vocab * self.size.d_model * _SINGLE
        logits = min(LOGITS_PER_CHUNK, self._n_decoded() * self.size.d_vocab)
        return 3 * logits * _SINGLE + wide * (self.dtype.itemsize < _SINGLE)

    def _n_decoded(self) -> int:
        size = self.size
        count = affordable_positions(
            forward=self.n_tokens * (size.n_active + size.d_vocab * size.d_model),
            per_position=self.n_sites * size.d_model * size.d_vocab,
        )
        return min(count, SAMPLE_CAPACITY, self.n_tokens)

    def operations(self) -> dict[str, float]:
        """By what they are for: products only, a multiplication and an addition each."""
        size, width, d_model = self.size, self.width, self.size.d_model
        attended = 2 * self.length * size.n_heads * size.d_head * size.n_layers
        projected = width * d_model * (width < d_model)
        # Of a symmetric product, five eighths are computed.
        per_site = projected + 0.625 * width**2 + width * (self.n_columns + d_model)
        decoded = self._n_decoded() * self.n_sites * d_model * size.d_vocab
        return {
            "forward passes": 2.0 * self.n_tokens * size.n_active,
            "attention": 2.0 * self.n_tokens * attended,
            "sums": 2.0 * self.n_tokens * (self.n_sites * per_site + size.n_layers * width**2),
            "decoding": 2.0 * decoded,
        }

    def disk(self) -> dict[str, int]:
        """What is written where a checkpoint and the profile are."""
        size, width = self.size, self.width
        projection = (width < size.d_model) * size.d_model * (self.n_sites + width)
        reference = self.n_sites * size.d_model + projection
        features = size.d_vocab * N_FEATURES
        counts = _DOUBLE * _N_FOLDS * size.d_vocab
        sums = sum(value.nbytes for value in self.sums.values())
        sample = self.sample + _SINGLE * self.n_sampled * self.n_columns
        checkpoint = sums + counts + sample + _SINGLE * (reference + features)
        n_curves = 2 + 3 * len(DEFAULT_BANDS) + len(SIGNALS)
        numbers = n_curves * (3 + _N_FOLDS) + _N_FOLDS * len(DEFAULT_BANDS) * N_FEATURES
        return {
            "checkpoint, if asked for": checkpoint,
            "saved profile": _WORDS + _DOUBLE * self.n_sites * numbers,
        }


@dataclass(frozen=True)
class _Shaped:
    """What sums ask a model for, of one that has shapes only."""

    size: ModelSize
    device: torch.device
    dtype: torch.dtype

    @property
    def n_layers(self) -> int:
        return self.size.n_layers

    @property
    def d_model(self) -> int:
        return self.size.d_model

    @property
    def d_vocab(self) -> int:
        return self.size.d_vocab
