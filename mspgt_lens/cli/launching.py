"""Processes that were started together, as by torchrun: one of them speaks, and all end alike."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import distributed

from mspgt_lens.models import as_adapter
from mspgt_lens.processes import ALONE, PeerError, Processes, joined

_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
# On machines with GPUs, of which each process takes its own.
_NEEDED_HERE = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Launch:
    """The processes that run one command together; of most commands, this one alone.

    Args:
        processes: All of them.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self._processes, self._stderr = processes, sys.stderr
        # What every process said when they last met: its exit code, and its error.
        self._said: list[tuple[int, str]] = []

    @property
    def size(self) -> int:
        """How many there are."""
        return self._processes.size

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self._processes.rank == 0

    def device(self, asked: str | None, is_spread: bool) -> str | None:
        """The device of this process's model; a GPU of its own where there are any.

        Args:
            asked: The device that was asked for, if any.
            is_spread: Whether each model goes to several devices.

        Raises:
            ValueError: If the processes of this machine would have to share GPUs, or the
                environment does not say how many there are.
        """
        if self.size == 1:
            return asked
        missing = [name for name in _NEEDED_HERE if name not in os.environ]
        if missing and torch.cuda.is_available():
            raise ValueError(
                f"each process takes a GPU of its own, and {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set: start the processes by torchrun"
            )
        n_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        if n_here == 1:
            return asked
        if is_spread:
            raise ValueError(
                f"--device-map and --n-devices spread one model over the devices of a machine, and "
                f"{n_here} processes were started on this one: start one per machine"
            )
        if asked is None and not torch.cuda.is_available():
            return None
        if asked not in (None, "cuda"):
            if asked.startswith("cuda"):
                raise ValueError(
                    f"--device {asked} is one GPU, and {n_here} processes were started on this "
                    "machine: give --device cuda, and each takes a GPU of its own"
                )
            return asked
        if torch.cuda.device_count() < n_here:
            raise ValueError(
                f"{n_here} processes were started on this machine and would have to share its GPUs "
                f"({torch.cuda.device_count()}): start as many as there are GPUs, or give "
                "--device cpu"
            )
        number = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(number)
        return f"cuda:{number}"

    def group(self, model: Any) -> Any:
        """What the processes compute in, once all have come this far; None for one alone.

        Raises:
            PeerError: If another one failed on its way.
        """
        if self.size == 1:
            return None
        self._meet(0, "")
        if any(code for code, _ in self._said):
            raise PeerError("another process stopped before")
        if as_adapter(model).device.type == "cuda" and distributed.is_nccl_available():
            return distributed.new_group(backend="nccl")
        return distributed.group.WORLD

    def end(self, code: int, error: str = "") -> int:
        """End together: the first process prints what went wrong, in whichever it was.

        Args:
            code: Exit code of this process.
            error: Why it stopped; empty if another one was the cause.

        Returns:
            The exit code of all.
        """
        try:
            if not any(code for code, _ in self._said):
                self._meet(code, error)
            if self.is_first:
                self._print_errors()
            # A launcher stops the others as soon as one is gone, though it be about to print.
            self._processes.meet()
        except PeerError as lost:
            print(f"mspgt-lens: {error or lost}", file=self._stderr)
            return max(code, 2)
        return max(code for code, _ in self._said)

    def _meet(self, code: int, error: str) -> None:
        texts = self._processes.texts(json.dumps([code, error]))
        self._said = [tuple(json.loads(text)) for text in texts]

    def _print_errors(self) -> None:
        ranks: dict[str, list[int]] = {}
        for rank, (_, error) in enumerate(self._said):
            if error:
                ranks.setdefault(error, []).append(rank)
        for error, where in ranks.items():
            # What all of them met is said as by one.
            one = len(where) < self.size
            by = f"process {', '.join(map(str, where))} of {self.size}: " if one else ""
            print(f"mspgt-lens: {by}{error}", file=sys.stderr)


@contextmanager
def launched() -> Iterator[Launch]:
    """The processes that a launcher started, by its environment; this one alone without one.

    All but the first write nothing to their standard output and error.

    Raises:
        ValueError: If the environment says how many there are, but not how they meet, or they
            cannot.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield Launch()
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={size} says that several processes were started together, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: start them by "
            "torchrun, or unset WORLD_SIZE"
        )
    is_mine = not distributed.is_initialized()
    if is_mine:
        try:
            # For meeting; on GPUs, numbers go through a group of their own.
            distributed.init_process_group("gloo")
        except RuntimeError as error:
            raise ValueError(
                f"the {size} processes that were started together could not meet at "
                f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']} "
                f"({str(error).splitlines()[0]}): start all of them, with an address that all reach"
            ) from error
    try:
        with joined(distributed.group.WORLD) as processes, ExitStack() as stack:
            launch = Launch(processes)
            if not launch.is_first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield launch
    finally:
        if is_mine:
            distributed.destroy_process_group()
