"""Where each client's rows stand in a row stack, and how to see them as padded blocks.

Index arithmetic only: no numerics, no copies of factors beyond what padding needs.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import require
from .recording import refuse_in_recording

__all__ = ["Group", "Ragged"]

# What a plan keeps on a device.
INDICES = ("marks", "ranks", "owner", "within", "exists", "index")


@dataclass(frozen=True, eq=False)
class Group:
    """The clients of one rank.

    Attributes
    ----------
    clients : Tensor (n,) int64
    rows : slice or Tensor (n · rank,) int64
        Their rows of the stack, client by client; a slice where they stand together.
    rank : int
    """

    clients: Tensor
    rows: slice | Tensor
    rank: int


@dataclass(frozen=True, eq=False)
class Ragged:
    """Row ranges of K clients in a stack of N rows.

    Parameters
    ----------
    offsets : Tensor (K + 1,) int64 on the CPU
        Client i owns rows ``offsets[i]:offsets[i + 1]``.
    max_rank : int
        Width of the padded blocks, at least the largest rank.
    device : torch.device
        Where the index tensors live.
    """

    offsets: Tensor
    max_rank: int
    device: torch.device

    @classmethod
    def of(cls, offsets: Tensor, rows: int, device: torch.device, max_rank: int = -1) -> Ragged:
        """Check `offsets` against a stack of `rows` rows and wrap them."""
        require(
            offsets.dim() == 1 and offsets.dtype == torch.int64 and offsets.device.type == "cpu",
            "offsets",
            f"{offsets.dtype} of shape {tuple(offsets.shape)} on {offsets.device}",
            "one-dimensional int64 on the CPU",
        )
        marks = offsets.tolist()
        require(
            len(marks) >= 2
            and marks[0] == 0
            and marks[-1] == rows
            and all(lo <= hi for lo, hi in pairwise(marks)),
            "offsets",
            marks if len(marks) <= 8 else f"{marks[:4]} … {marks[-2:]}",
            f"K + 1 ascending marks from 0 to the stack's {rows} rows",
        )
        largest = max(hi - lo for lo, hi in pairwise(marks))
        require(
            max_rank < 0 or max_rank >= largest,
            "max_rank",
            max_rank,
            f"-1 or at least the largest rank, {largest}",
        )
        return _kept(tuple(marks), largest if max_rank < 0 else max_rank, device)

    def keeping(self, counts: Tensor) -> Ragged:
        """The stack in which client i has counts[i] rows left, counts (K,)."""
        marks = [0, *counts.cumsum(0).tolist()]
        return _kept(tuple(marks), max(hi - lo for lo, hi in pairwise(marks)), self.device)

    @property
    def clients(self) -> int:
        return self.offsets.numel() - 1

    @cached_property
    def rows(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def marks(self) -> Tensor:
        """(K + 1,) int64: the offsets where the rows are."""
        return self.offsets.to(self.device)

    @cached_property
    def ranks(self) -> Tensor:
        """(K,) int64: rows of each client."""
        return self.marks.diff()

    @cached_property
    def uniform(self) -> bool:
        """Whether every client fills its padded block, so that padding is a view."""
        return self.rows == self.clients * self.max_rank

    @cached_property
    def owner(self) -> Tensor:
        """(N,) int64: the client of each row."""
        return torch.repeat_interleave(self.ranks, output_size=self.rows)

    @cached_property
    def within(self) -> Tensor:
        """(N,) int64: position of each row among its client's rows."""
        first = self.marks[:-1]
        return torch.arange(self.rows, device=self.device) - first[self.owner]

    @cached_property
    def exists(self) -> Tensor:
        """(K, max_rank) bool: which places of the padded blocks hold a row."""
        return torch.arange(self.max_rank, device=self.device) < self.ranks[:, None]

    @cached_property
    def index(self) -> Tensor:
        """(K, max_rank) int64: the row at each place, any valid row where none exists."""
        first = self.marks[:-1, None]
        return (first + torch.arange(self.max_rank, device=self.device)).clamp_(max=self.rows - 1)

    @cached_property
    def groups(self) -> list[Group]:
        """Clients by rank, those without rows left out: blocks of one shape, without padding."""
        marks = self.offsets.tolist()
        members: dict[int, list[int]] = defaultdict(list)
        for client, (lo, hi) in enumerate(pairwise(marks)):
            members[hi - lo].append(client)
        members.pop(0, None)
        groups = []
        for rank, clients in members.items():
            rows: slice | Tensor = slice(marks[clients[0]], marks[clients[-1] + 1])
            if marks[clients[-1] + 1] - marks[clients[0]] != rank * len(clients):
                first = torch.tensor([marks[client] for client in clients])
                rows = (first[:, None] + torch.arange(rank)).flatten().to(self.device)
            groups.append(Group(torch.tensor(clients, device=self.device), rows, rank))
        return groups

    def pad(self, x: Tensor) -> Tensor:
        """(…, N, c) → (…, K, max_rank, c), zero where a client has no row; a view if uniform."""
        shape = (*x.shape[:-2], self.clients, self.max_rank, x.shape[-1])
        if self.uniform:
            return x.reshape(shape)
        blocks = x.index_select(-2, self.index.flatten()).view(shape)
        return blocks.masked_fill_(~self.exists[..., None], 0)

    def unpad(self, blocks: Tensor) -> Tensor:
        """(…, K, max_rank, c) → (…, N, c): the inverse of `pad`."""
        flat = blocks.flatten(-3, -2)
        if self.uniform:
            return flat
        return flat.index_select(-2, self.owner * self.max_rank + self.within)

    def per_row(self, per_client: Tensor) -> Tensor:
        """(…, K) → (…, N): each client's value at each of its rows."""
        return per_client.index_select(-1, self.owner)

    def weighed(self, per_row: Tensor, per_client: Tensor) -> Tensor:
        """(…, N): what rows have (…, N) times what their clients have (…, K)."""
        if not self.uniform:
            return per_row * self.per_row(per_client)
        blocks = per_row.unflatten(-1, (self.clients, self.max_rank))
        return (blocks * per_client[..., None]).flatten(-2)

    def segment_sum(self, per_row: Tensor) -> Tensor:
        """(…, N) → (…, K): sums of each client's rows, in a fixed order."""
        return self.pad(per_row[..., None]).sum((-2, -1))

    def diagonal_blocks(self, gram: Tensor) -> Tensor:
        """(…, N, N) → (…, K, max_rank, max_rank): a copy of the clients' own blocks."""
        if self.uniform:
            shape = (self.clients, self.max_rank)
            squares = gram.unflatten(-1, shape).unflatten(-3, shape)
            return (
                squares.diagonal(0, -4, -2)
                .movedim(-1, -3)
                .clone(memory_format=torch.contiguous_format)
            )
        blocks = gram[..., self.index[:, :, None], self.index[:, None, :]]
        both = self.exists[:, :, None] & self.exists[:, None, :]
        return blocks.masked_fill_(~both, 0)


@lru_cache(maxsize=32)
def _kept(marks: tuple[int, ...], max_rank: int, device: torch.device) -> Ragged:
    """One plan per layout, so that a repeated call copies no index to the device."""
    refuse_in_recording("a plan of client ranks", device)
    plan = Ragged(torch.tensor(marks), max_rank, device)
    if device.type != "cpu":  # none is left to be made later, while a graph is recorded
        for name in INDICES:
            getattr(plan, name)
    return plan
