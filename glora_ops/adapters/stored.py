"""The tensors of a checked safetensors file, read from where its header says they are.

Plain reads into memory of our own, not a mapping: the pages of a mapped file count as this
process's memory for as long as it is mapped, and a client who shortens a mapped file kills
whoever reads it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import Refusal, Refused
from ..runtime.reading import open_regular
from ..runtime.urls import Url
from .safetensors_header import TensorInfo

__all__ = ["Stored", "signature"]

#: Bytes that `scan` reads at a time: still in cache when they are looked at.
PIECE = 2**20


_here = threading.local()


def _buffer(size: int) -> Tensor:
    """Bytes to read into, this thread's own where they are no more than a piece."""
    if size > PIECE:
        return torch.empty(size, dtype=torch.uint8)
    if not hasattr(_here, "buffer"):
        _here.buffer = torch.empty(PIECE, dtype=torch.uint8)
    return _here.buffer[:size]


def signature(status: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file is rewritten: its size, time and identity."""
    return status.st_size, status.st_mtime_ns, status.st_ino


@dataclass(frozen=True)
class Stored:
    """Tensors of one file.

    Attributes
    ----------
    path : Path, or Url of what is `remote.Remote`
    client : str or None
        Named in refusals.
    tensors : mapping of str to TensorInfo
        As the header says, checked: one range after the other to the end of the file.
    signature : tuple
        Its size and what else there is, of the file when its header was read; any other is refused.
    """

    path: Path | Url
    client: str | None
    tensors: Mapping[str, TensorInfo]
    signature: tuple[int, int, int] | tuple[int, str]
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def start(self) -> int:
        """Where the header ends."""
        return self.signature[0] - max((info.end for info in self.tensors.values()), default=0)

    def read(self, *names: str) -> list[Tensor]:
        """Tensors by name, as stored.

        Raises
        ------
        Refused
            If the file is no longer the one whose header was read.
        """
        infos = [self.tensors[name] for name in names]
        with self._open(*infos) as file:
            tensors = [self._tensor(file, info) for info in infos]
            self._check(file)
        return tensors

    def read_into(self, columns: str, rows: str, b: Tensor, a: Tensor) -> None:
        """A matrix (m, r), turned, into b (r, m), and one (r, n) into a; raises as `read` does.

        Dimensions beyond the second count as part of it. Memory beside b and a: one piece.
        """
        left, right = self.tensors[columns], self.tensors[rows]
        begin, end = min(left.begin, right.begin), max(left.end, right.end)
        side_by_side = end - begin == left.end - left.begin + right.end - right.begin
        with self._open(left, right) as file:
            if side_by_side and end - begin <= PIECE and left.dtype == right.dtype:
                both = _buffer(end - begin)  # as they are nearly always: one read for both
                file.seek(self.start + begin)
                self._fill(file, both)
                for info, to in ((left, b.mT), (right, a)):
                    values = both[info.begin - begin : info.end - begin].view(info.dtype)
                    to.copy_(values.view(info.shape[0], -1))
            else:
                for at, piece in self._pieces(file, columns):
                    b[:, at : at + len(piece)] = piece.mT
                if a.dtype == right.dtype:
                    file.seek(self.start + right.begin)
                    self._fill(file, a.view(-1).view(torch.uint8))
                else:
                    for at, piece in self._pieces(file, rows):
                        a[at : at + len(piece)] = piece
            self._check(file)

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        """`count` rows of a matrix; raises as `read` does."""
        info = self.tensors[name]
        row = info.shape[1] * info.dtype.itemsize
        part = replace(info, shape=(count, info.shape[1]), begin=info.begin + first * row)
        with self._open(part) as file:
            rows = self._tensor(file, part)
            self._check(file)
        return rows

    def read_kept(self, name: str) -> Tensor:
        """The tensor as `read` gives it, kept until another one is asked for in this way.

        For a stack whose parts, asked for one after the other, do not lie together.
        """
        kept = self._kept.get(name)
        if kept is None:
            (kept,) = self.read(name)
            self._kept.clear()
            self._kept[name] = kept
        return kept

    def scan(
        self, digest: Any = None, *, apart: bool = False
    ) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Every tensor in pieces of at most `PIECE` bytes, flat and in the file's order.

        Tensors of one dtype that follow each other come together, with the names of all of them,
        unless `apart`; those of fp64 never do, because the range of each matters. A piece is
        overwritten by the next. `digest`, of `hashlib`, is given the whole file.
        """
        buffer = torch.empty(min(PIECE, self.signature[0]), dtype=torch.uint8)

        def pieces(begin: int, end: int) -> Iterator[Tensor]:
            for at in range(begin, end, PIECE):
                piece = buffer[: min(PIECE, end - at)]
                self._fill(file, piece)
                if digest is not None:
                    digest.update(piece.numpy())
                yield piece

        def kind(item: tuple[str, TensorInfo]) -> Any:
            alone = apart or item[1].dtype == torch.float64
            return item[0] if alone else item[1].dtype

        in_order = sorted(self.tensors.items(), key=lambda item: item[1].begin)
        with self._open() as file:
            for _ in pieces(0, self.start):
                pass
            for _, named in groupby(in_order, kind):
                run = list(named)
                names = tuple(name for name, _ in run)
                for piece in pieces(run[0][1].begin, run[-1][1].end):
                    yield names, piece.view(run[0][1].dtype)
            self._check(file)

    def whole(self) -> BinaryIO:
        """The file, opened; raises as `read` does."""
        return self._open()

    def _open(self, *wanted: TensorInfo) -> BinaryIO:
        """The file, to read some of its tensors or all; which, matters to those that fetch it."""
        try:
            file = open_regular(str(self.path), buffering=0)
        except FileNotFoundError:
            raise self._changed("no such file any more") from None
        try:
            self._check(file)
        except Refused:
            file.close()
            raise
        return file

    def _check(self, file: BinaryIO) -> None:
        """Raise `Refused` unless the file is still the one whose header was read."""
        found = signature(os.fstat(file.fileno()))
        if found != self.signature:
            raise self._changed(f"{found[0]} bytes, written at another time")

    def _tensor(self, file: BinaryIO, info: TensorInfo) -> Tensor:
        tensor = torch.empty(math.prod(info.shape), dtype=info.dtype)
        file.seek(self.start + info.begin)
        self._fill(file, tensor.view(torch.uint8))
        return tensor.view(info.shape)

    def _pieces(self, file: BinaryIO, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor as a matrix, in turn the number and the values of as many rows as fit a piece.

        A piece is overwritten by the next.
        """
        info = self.tensors[name]
        count = info.shape[0]
        row = (info.end - info.begin) // count
        step = max(1, PIECE // row)
        buffer = _buffer(step * row)
        file.seek(self.start + info.begin)
        for first in range(0, count, step):
            piece = buffer[: min(step, count - first) * row]
            self._fill(file, piece)
            yield first, piece.view(info.dtype).view(-1, row // info.dtype.itemsize)

    def _fill(self, file: BinaryIO, target: Tensor) -> None:
        left = target.numpy().data
        while left:
            count = file.readinto(left)  # type: ignore[attr-defined]  # unbuffered: FileIO
            if not count:
                raise self._changed("an end of the file before the end of the tensor")
            left = left[count:]

    def _changed(self, found: str) -> Refused:
        return Refused(
            [
                Refusal(
                    "the file changed while it was being used",
                    self.client,
                    self.path.name,
                    None,
                    found,
                    f"the {self.signature[0]} bytes that were checked",
                    "start again when the file has been written",
                )
            ]
        )
