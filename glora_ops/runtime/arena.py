"""One block of memory that pieces are taken from and given back to.

Memory fresh from the system comes page by page, zeroed on the way; what is taken again is there.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

__all__ = ["LINE", "Arena"]

#: A cache line: every piece begins on one.
LINE = 64

# A shared mapping, which is Python's default, keeps its pages whoever gives them back.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Arena:
    """For one thread at a time.

    Parameters
    ----------
    size : int
        Bytes. Those that no piece reached are never touched.
    """

    def __init__(self, size: int) -> None:
        self.mapped = mmap.mmap(-1, size, **_PRIVATE)
        self.memory = torch.frombuffer(self.mapped, dtype=torch.uint8)
        self.taken: list[range] = []  # in order

    def take(self, size: int) -> Tensor | None:
        """The first gap of `size` bytes; None where there is none."""
        begin = 0
        for place, piece in enumerate([*self.taken, range(len(self.memory), 0)]):
            if piece.start - begin >= size:
                self.taken.insert(place, range(begin, begin + size))
                return self.memory[begin : begin + size]
            begin = -(-piece.stop // LINE) * LINE
        return None

    def keep(self, size: int) -> None:
        """Return to the system what lies above the first `size` bytes and above every piece."""
        begin = max([size, *(piece.stop for piece in self.taken)])
        begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        if begin < len(self.memory) and hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED, begin, len(self.memory) - begin)

    def give_back(self, piece: Tensor) -> None:
        """Let a piece that was taken be taken again."""
        self.taken.remove(next(x for x in self.taken if x.start == piece.storage_offset()))
