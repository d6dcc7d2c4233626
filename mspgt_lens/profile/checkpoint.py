"""Where a pass over prompts is written down, so that one that was stopped goes on."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from mspgt_lens.folds import stable_hash
from mspgt_lens.gathering import BatchPlan
from mspgt_lens.moments import Moments
from mspgt_lens.processes import Processes, differences
from mspgt_lens.storage import PARTIAL_SUFFIX, held, read_result, write_result

# Between two times that moments are written; more where writing takes long, to stay below a
# twentieth of the pass.
SECONDS_BETWEEN = 300.0
_SHARE_OF_WRITING = 20
_KIND = "Checkpoint"

Description = Mapping[str, Any]


@contextmanager
def kept_in(
    folder: str | os.PathLike[str] | None, described: Description, processes: Processes
) -> Iterator[Checkpoint]:
    """One process's part of a pass, in a folder that all parts share; no other run may write there.

    Args:
        folder: The folder; made where there is none. None keeps nothing.
        described: What decides the sums, as JSON would hold it.
        processes: All that take part.

    Raises:
        ValueError: If ``folder`` is a file, another run writes there, or it holds the parts of
            another pass.
        OSError: If nothing can be written there.
    """
    if folder is None:
        yield Checkpoint(None, described)
        return
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"checkpoint must be a folder, got the file {folder}")
    file = folder / f"part-{processes.rank}-of-{processes.size}.safetensors"
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Better now than after the first minutes.
            with tempfile.TemporaryFile(dir=folder):
                pass
            stack.enter_context(held(file.with_suffix(".lock")))
        except BlockingIOError as error:
            raise ValueError(
                f"checkpoint: another run writes into {folder} at this moment: wait for its end, "
                "or give another folder"
            ) from error
        except OSError as error:
            raise type(error)(
                f"checkpoint: {folder} cannot be written ({error}): give another folder"
            ) from error
        # Left by a run that was killed: no other one writes there.
        for left in folder.glob(f"{file.stem}-*{PARTIAL_SUFFIX}"):
            left.unlink()
        for other in folder.glob("part-*-of-*.safetensors"):
            n_processes = other.stem.rpartition("-")[2]
            if n_processes != str(processes.size):
                _refuse(folder, [f"processes ({n_processes} there, {processes.size} here)"])
        yield Checkpoint(file, described)


class Checkpoint:
    """The sums of one process's batches so far, on the disk from time to time.

    Args:
        file: Where they are kept; None keeps nothing.
        described: What decides the sums, as JSON would hold it.
    """

    def __init__(self, file: Path | None, described: Description) -> None:
        self._file, self._described = file, described
        self._history = hashlib.blake2b(digest_size=16)
        self._n_batches = 0
        self._n_kept, self._kept_history = 0, ""
        self._due = time.monotonic() + SECONDS_BETWEEN

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

    def _refuse(self, differing: list[str]) -> NoReturn:
        assert self._file is not None
        _refuse(self._file.parent, differing)


def _refuse(folder: Path, differing: list[str]) -> NoReturn:
    raise ValueError(
        f"checkpoint: {folder} holds a pass that differs in {'; '.join(differing)}: start it again "
        "with the same model, prompts and arguments, or give another folder"
    )
