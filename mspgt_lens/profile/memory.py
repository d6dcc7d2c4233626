"""Memory that a long pass keeps for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Less than the 32 MB from which glibc never puts an allocation on the heap; 1 GB in all, which
# are addresses only until something is written there.
_HEAP_BLOCK = 31 * 2**20
_HEAP_BLOCKS = 32


@contextmanager
def kept_memory() -> Iterator[None]:
    """While open, memory that one block of the model frees stays with the process for the next.

    An allocator that gives freed memory at the heap's end back to the system (glibc's does) takes
    it anew, page by page, in every block: a tenth of a forward pass. So the heap's end is held
    meanwhile by an allocation that is never written to. Elsewhere this changes nothing.
    """
    # Freeing a block of its own raises the size from which glibc keeps allocations off the heap.
    torch.empty(_HEAP_BLOCK + 4096, dtype=torch.uint8)
    blocks = [torch.empty(_HEAP_BLOCK, dtype=torch.uint8) for _ in range(_HEAP_BLOCKS)]
    end = blocks.pop()
    del blocks
    try:
        yield
    finally:
        del end
