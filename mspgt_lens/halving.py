"""Batches halved where memory runs out: nothing is lost, and nothing is found by half."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mspgt_lens.ambient import tell
from mspgt_lens.contract import counted
from mspgt_lens.models import ran_out_of_memory

Found = TypeVar("Found")
Part = TypeVar("Part", bound="Divisible")


class Divisible(Protocol):
    """Rows of tokens that run together."""

    @property
    def n_rows(self) -> int:
        """How many there are."""

    @property
    def length(self) -> int:
        """Tokens of each, padding included."""

    def parts(self: Part, n_tokens: int) -> Sequence[Part]:
        """The same rows in batches of at most so many tokens each, or of one row."""


@dataclass(frozen=True)
class Span:
    """Neighbors among rows that are equally long.

    Attributes:
        start: Number of the first row.
        stop: One past the last.
        length: Tokens of each.
    """

    start: int
    stop: int
    length: int

    @property
    def n_rows(self) -> int:
        """How many there are."""
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """Where they are."""
        return slice(self.start, self.stop)

    def parts(self, n_tokens: int) -> list[Span]:
        """The same rows in spans of at most so many tokens each, or of one row."""
        size = max(1, n_tokens // self.length)
        return [
            Span(start, min(start + size, self.stop), self.length)
            for start in range(self.start, self.stop, size)
        ]


@dataclass
class Halving:
    """What fits into memory, as far as one pass has seen.

    Attributes:
        batch_size: Rows per batch, where the caller chose it; None lets batches be halved.
        can_choose: Whether the caller could choose it.
        rows: What the rows are, for messages.
        remedy: What to give where one row alone does not fit.
        bar: A progress bar, which is put back where it was before a batch that comes again.
        most: Tokens that a batch may hold, padding included; None until memory runs out.
    """

    batch_size: int | None = None
    can_choose: bool = False
    rows: str = "prompts"
    remedy: str = "shorter prompts, or more devices"
    bar: Any = None
    most: int | None = None

    def each(self, batch: Part, run: Callable[[Part], Found]) -> Iterator[Found]:
        """What is found in a batch, halved until it fits; later batches are as small.

        Args:
            batch: Rows that are to run together.
            run: From a batch to what is found in it. It may be stopped anywhere, and its batch come
                again in parts: it must keep nothing beyond what it returns.

        Yields:
            What is found in the batch, or in each of its parts in turn. A part runs once the one
            before it has been taken.

        Raises:
            RuntimeError: Torch's own, if a batch does not fit into memory and cannot be halved.
        """
        waiting = self._cut(batch)
        while waiting:
            part = waiting.pop(0)
            done = 0 if self.bar is None else self.bar.n
            try:
                found = run(part)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                if self.batch_size is not None or part.n_rows == 1:
                    # The kind of error stays, for those who catch it.
                    raise type(error)(f"{self._said(part)} ({error})") from error
            else:
                yield found
                # The next part needs the room.
                del found
                continue
            if self.bar is not None:
                self.bar.update(done - self.bar.n)
            self._halve(part)
            waiting = [smaller for larger in (part, *waiting) for smaller in self._cut(larger)]

    def _cut(self, batch: Part) -> list[Part]:
        return [batch] if self.most is None else list(batch.parts(self.most))

    def _halve(self, part: Divisible) -> None:
        if self.most is None:
            choice = "; batch_size= sets their size" if self.can_choose else ""
            tell(
                f"memory ran out in a batch of {part.n_rows} {self.rows}: from here on batches are "
                f"halved until they fit, which changes results by no more than rounding{choice}"
            )
        self.most = part.n_rows * part.length // 2

    def _said(self, part: Divisible) -> str:
        if part.n_rows > 1:
            return f"batch_size={self.batch_size} does not fit into memory: give fewer, or None"
        return (
            f"a batch of one with {counted(part.length, 'token')} does not fit into memory: give "
            f"{self.remedy}"
        )
