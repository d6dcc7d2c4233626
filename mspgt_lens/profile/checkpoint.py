"""Where a pass over prompts is written down, so that one that was stopped goes on."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mspgt_lens.folds import stable_hash
from mspgt_lens.gathering import BatchPlan
from mspgt_lens.moments import Moments
from mspgt_lens.processes import Processes, differences
from mspgt_lens.storage import PARTIAL_SUFFIX, read_result, write_result

# Between two times that moments are written; more where writing takes long, to stay below a
# twentieth of the pass.
SECONDS_BETWEEN = 300.0
_SHARE_OF_WRITING = 20
_KIND = "Checkpoint"

Description = Mapping[str, Any]


class Checkpoint:
    """One process's part of a pass, in a folder that all parts share.

    Args:
        folder: The folder; made where there is none. None keeps nothing.
        described: What decides the sums, as JSON would hold it.
        processes: All that take part.

    Raises:
        ValueError: If ``folder`` is a file, or holds the parts of another pass.
        OSError: If nothing can be written there.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, described: Description, processes: Processes
    ) -> None:
        self._described = described
        self._history = hashlib.blake2b(digest_size=16)
        self._n_batches = 0
        self._n_kept, self._kept_history = 0, ""
        self._file: Path | None = None
        self._due = time.monotonic() + SECONDS_BETWEEN
        if folder is not None:
            self._open(Path(folder), processes)

    def take_up(self, moments: Moments) -> bool:
        """Put what was written down in the place of moments of the same plan, if there is any.

        Raises:
            ValueError: If it is of another pass, or damaged.
        """
        if self._file is None or not self._file.exists():
            return False
        try:
            header, arrays = read_result(self._file, _KIND)
        except ValueError as error:
            raise ValueError(
                f"checkpoint: {error}, or delete {self._file.parent} to start anew"
            ) from error
        differing = differences(header["described"], self._described, "there", "here")
        if differing:
            self._refuse(differing)
        moments.take_(arrays)
        self._n_kept, self._kept_history = header["n_batches"], header["history"]
        return True

    def is_done(self, planned: BatchPlan) -> bool:
        """Whether the next batch of this process is among those that were written down.

        Args:
            planned: The batch, whether it is to be run or not: all count, in their order.

        Raises:
            ValueError: If other prompts were run before.
        """
        for prompt in planned.prompts:
            told = stable_hash(planned.fold, prompt.group, prompt.tokens.tobytes())
            self._history.update(told.to_bytes(8, "little"))
        self._n_batches += 1
        if self._n_batches == self._n_kept and self._history.hexdigest() != self._kept_history:
            self._refuse(["prompts"])
        return self._n_batches <= self._n_kept

    def write_if_due(self, moments: Moments) -> None:
        """Write the moments of all batches so far, if that was long enough ago."""
        if self._file is not None and time.monotonic() >= self._due:
            self._write(moments)

    def close(self, moments: Moments) -> None:
        """Write the moments of the whole pass, once it is over.

        Raises:
            ValueError: If fewer prompts came than were run before.
        """
        if self._n_batches < self._n_kept:
            self._refuse(["prompts"])
        if self._file is not None and self._n_batches > self._n_kept:
            self._write(moments)

    def _open(self, folder: Path, processes: Processes) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"checkpoint must be a folder, got the file {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        # Better now than after the first minutes.
        with tempfile.TemporaryFile(dir=folder):
            pass
        self._file = folder / f"part-{processes.rank}-of-{processes.size}.safetensors"
        for left in folder.glob(f"{self._file.stem}-*{PARTIAL_SUFFIX}"):
            left.unlink()
        for other in folder.glob("part-*-of-*.safetensors"):
            n_processes = other.stem.rpartition("-")[2]
            if n_processes != str(processes.size):
                self._refuse([f"processes ({n_processes} there, {processes.size} here)"])

    def _write(self, moments: Moments) -> None:
        assert self._file is not None
        start = time.monotonic()
        header = {
            "described": self._described,
            "n_batches": self._n_batches,
            "history": self._history.hexdigest(),
        }
        write_result(self._file, _KIND, header, moments.to_arrays())
        end = time.monotonic()
        self._due = end + max(SECONDS_BETWEEN, _SHARE_OF_WRITING * (end - start))

    def _refuse(self, differing: list[str]) -> None:
        assert self._file is not None
        raise ValueError(
            f"checkpoint: {self._file.parent} holds a pass that differs in {'; '.join(differing)}: "
            "start it again with the same model, prompts and arguments, or give another folder"
        )
