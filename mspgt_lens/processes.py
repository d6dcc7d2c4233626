"""Processes that share one computation: what each has is added up, and if one stops, all do.

They meet before they exchange numbers, and whoever waits looks meanwhile for what stopped another
one, and for signs of life: no process is left waiting for one that is gone, and none gives up one
that only needs longer.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SHORTEST_WAIT, _LONGEST_WAIT = 0.001, 0.1
# How long a process that failed stays, so that the others can learn why.
_FAREWELL = 10.0
# Seconds between signs of life, and without one after which a process must have been killed.
_BEAT, _SILENCE = 5.0, 60.0
_FAILED, _KNOWN = "failed", "known"


class PeerError(RuntimeError):
    """Another process of the group failed; the message says which one, and why."""


class Processes:
    """The processes of a group of ``torch.distributed``; without a group, this one alone.

    All of them must call the same methods in the same order.

    Attributes:
        rank: This process's number, from 0.
        size: How many there are.

    Raises:
        PeerError: If another process ended before it came here.
        TypeError: If ``group`` is no process group.
        ValueError: If this process is none of the group's.
    """

    def __init__(self, group: Any = None) -> None:
        self.rank, self.size = 0, 1
        self._store: Any = None
        if group is None:
            return
        from torch import distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a group of torch.distributed that this process is in, such "
                f"as torch.distributed.group.WORLD after init_process_group, got {group!r}"
            )
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("process_group must be one that this process is in: it is not")
        self._group = group
        # NCCL moves what is on a GPU only, and gloo what is in memory.
        on_gpu = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda" if on_gpu else "cpu")
        name = np.frombuffer(uuid.uuid4().bytes, dtype=np.uint8).copy()
        try:
            self._broadcast(name, 0)
        except RuntimeError as error:
            raise PeerError(
                "another process of the group ended before it came to this computation "
                f"({str(error).splitlines()[0]}); see what it wrote last"
            ) from error
        # Each computation has names of its own there.
        self._store = PrefixStore(f"mspgt_lens {name.tobytes().hex()}", _get_default_store())
        self._n_meetings = 0

    def check(self) -> None:
        """Raise :class:`PeerError` if another process has failed."""
        if self._store is None:
            return
        with _reaching():
            if not self._store.check([_FAILED]):
                return
            told = self._store.get(_FAILED).decode()
            self._store.add(_KNOWN, 1)
        raise PeerError(told)

    def meet(self) -> None:
        """Wait for all processes.

        Raises:
            PeerError: If one fails or is killed instead of coming.
        """
        if self._store is None:
            return
        self._n_meetings += 1
        key, wait = f"meeting {self._n_meetings}", _SHORTEST_WAIT
        heard = [(-1, time.monotonic())] * self.size
        look = time.monotonic() + _BEAT
        with _reaching():
            self._store.add(key, 1)
        while True:
            with _reaching():
                if self._store.add(key, 0) == self.size:
                    return
            self.check()
            if time.monotonic() >= look:
                heard = self._listened(heard)
                look = time.monotonic() + _BEAT
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def texts(self, text: str) -> list[str]:
        """What every process says, in their order."""
        if self._store is None:
            return [text]
        keys = [f"text {self._n_meetings} {rank}" for rank in range(self.size)]
        with _reaching():
            self._store.set(keys[self.rank], text)
        self.meet()
        with _reaching():
            return [self._store.get(key).decode() for key in keys]

    def agree(self, described: Mapping[str, Any]) -> None:
        """See that all processes do the same.

        Args:
            described: What decides what they do, as JSON would hold it.

        Raises:
            ValueError: If this one does something else than the first.
        """
        if self._store is None:
            return
        # Whatever JSON does not know is told in words, such as numpy's numbers.
        texts = self.texts(json.dumps(described, default=repr))
        first, own = json.loads(texts[0]), json.loads(texts[self.rank])
        differing = differences(first, own, "in process 0", f"in process {self.rank}")
        if differing:
            raise ValueError(
                "process_group: all processes must be given the same model, prompts and "
                f"arguments, got others: {'; '.join(differing)}"
            )

    def sum_(self, values: Tensor | np.ndarray) -> None:
        """Put the sum over all processes in the place of each one's values."""
        if self._store is None:
            return
        from torch import distributed as dist

        self.meet()
        own = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        moved = own.to(self._device)
        dist.all_reduce(moved, group=self._group)
        if moved is not own:
            own.copy_(moved)

    def give(self, arrays: Mapping[str, np.ndarray], source: int) -> dict[str, np.ndarray]:
        """The arrays of one process, in all of them.

        Args:
            arrays: What the source has; of other processes it is not looked at.
            source: Which process gives.
        """
        if self._store is None:
            return dict(arrays)
        own = arrays if self.rank == source else {}
        told = self.texts(json.dumps({name: (x.dtype.str, x.shape) for name, x in own.items()}))
        given = {}
        for name, (dtype, shape) in json.loads(told[source]).items():
            array = np.empty(shape, dtype)
            if self.rank == source:
                array[...] = arrays[name]
            if array.size:
                self._broadcast(array.reshape(-1).view(np.uint8), source)
            given[name] = array
        return given

    def each(
        self, count: int, compute: Callable[[int], Mapping[str, np.ndarray]]
    ) -> list[dict[str, np.ndarray]]:
        """What is computed for each number below a count, in all processes.

        Each of them computes its share: every so many numbers, from its own on.

        Args:
            count: How many there are.
            compute: What one number gives; of all of them the same names and shapes.
        """
        own = []
        for number in range(self.rank, count, self.size):
            self.check()
            own.append(dict(compute(number)))
        if self._store is None:
            return own
        together = {name: np.stack([one[name] for one in own]) for name in (own[0] if own else ())}
        found: list[dict[str, np.ndarray]] = [{} for _ in range(count)]
        for source in range(self.size):
            for name, values in self.give(together, source).items():
                for one, value in zip(found[source :: self.size], values, strict=True):
                    one[name] = value
        return found

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process stops, and wait a little for them to hear it."""
        if self._store is None or isinstance(error, PeerError):
            return
        told = f"process {self.rank} of {self.size} stopped: {type(error).__name__}: {error}"
        # Where nobody can be told any more, the error itself is still raised.
        with suppress(RuntimeError):
            self._store.set(_FAILED, told)
            known, end = self._store.add(_KNOWN, 1), time.monotonic() + _FAREWELL
            while known < self.size and time.monotonic() < end:
                time.sleep(_LONGEST_WAIT)
                known = self._store.add(_KNOWN, 0)

    def live(self, stopped: threading.Event) -> None:
        """Give signs of life until told to stop; in a thread of its own."""
        # Where the others cannot be reached, whoever waits for them will see.
        with suppress(RuntimeError):
            while not stopped.wait(_BEAT):
                self._store.add(f"beat {self.rank}", 1)

    def _listened(self, before: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """Each process's signs of life, with the time of the last one."""
        now, heard = time.monotonic(), []
        with _reaching():
            counts = [self._store.add(f"beat {rank}", 0) for rank in range(self.size)]
        for rank, (count, (last, since)) in enumerate(zip(counts, before, strict=True)):
            heard.append((count, now if count != last else since))
            if now - heard[-1][1] > _SILENCE:
                raise PeerError(
                    f"process {rank} of {self.size} has given no sign of life for "
                    f"{_SILENCE:.0f} s: it was killed, for want of memory perhaps"
                )
        return heard

    def _broadcast(self, values: np.ndarray, source: int) -> None:
        from torch import distributed as dist

        own = torch.from_numpy(values)
        moved = own.to(self._device)
        dist.broadcast(moved, dist.get_global_rank(self._group, source), group=self._group)
        if moved is not own:
            own.copy_(moved)


ALONE = Processes()


class Turns:
    """Pieces of work dealt out: each goes to the process that has been given the least so far.

    Args:
        processes: Those that share the work. All of them must ask for the same pieces in the same
            order.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self._processes = processes
        self._given = [0.0] * processes.size

    def is_mine(self, work: float) -> bool:
        """Whether the next piece is this process's.

        Args:
            work: How much the piece is, in any unit.

        Raises:
            PeerError: If another process failed.
        """
        rank = self._given.index(min(self._given))
        self._given[rank] += work
        if rank != self._processes.rank:
            return False
        self._processes.check()
        return True


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], at_first: str, here: str
) -> list[str]:
    """What differs between two descriptions, in words."""
    names = [*first, *(name for name in second if name not in first)]
    return [
        f"{name} ({first.get(name)} {at_first}, {second.get(name)} {here})"
        for name in names
        if first.get(name) != second.get(name)
    ]


@contextmanager
def joined(group: Any) -> Iterator[Processes]:
    """The processes of a group, which stop together: what one raises, the others are told.

    Raises:
        PeerError: If another process failed.
        TypeError: If ``group`` is no process group.
    """
    processes = Processes(group)
    stopped = threading.Event()
    living = threading.Thread(target=processes.live, args=(stopped,), daemon=True)
    if processes.size > 1:
        living.start()
    try:
        yield processes
    except BaseException as error:
        processes.fail(error)
        raise
    finally:
        stopped.set()
        if processes.size > 1:
            living.join()


@contextmanager
def _reaching() -> Iterator[None]:
    """While asking what all processes can read; whoever holds it may be gone."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            f"the process that connects the others can no longer be reached ({error}); see what it "
            "wrote last"
        ) from error
