"""The server's state between rounds, and what a method may know before the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..arguments import check_padding
from ..state import Factors
from .messages import Client, Pairs, draw_factors
from .seeds import stream_seed

__all__ = ["SVD", "Server", "Setup", "clients_of", "untrained"]


class SVD(NamedTuple):
    """An update u · diag(s) · vᵀ of one module: u (d_out, R), s (R,) fp64, v (d_in, R)."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def pair(self) -> Factors:
        """(u · diag(s), vᵀ): the update as one product."""
        return self.u * self.s.to(self.u.dtype), self.v.mT


@dataclass(frozen=True, eq=False)
class Setup:
    """Fixed facts of a run, for methods.

    Attributes
    ----------
    shapes : dict of str to (d_out, d_in)
        Adapted modules.
    ranks : tuple of int
        What each client can train.
    scaling : float
        alpha/r of every adapter that is sent.
    dense : dict of str to Tensor
        Initial full parameters that are trained (classifier heads).
    shared_start : bool
        All clients draw their first A from one seed (nested rows), or each its own.
    seed : int
    """

    shapes: dict[str, tuple[int, int]]
    ranks: tuple[int, ...]
    scaling: float
    dense: dict[str, Tensor]
    shared_start: bool
    seed: int

    def __post_init__(self) -> None:
        self.check_rank("ranks", self.max_rank)

    def check_rank(self, name: str, rank: int) -> None:
        """Refuse a rank that would be mostly padding in every module of the model."""
        widest = max((size for shape in self.shapes.values() for size in shape), default=1)
        check_padding(name, rank, widest, "the model's widest module")

    @property
    def max_rank(self) -> int:
        return max(self.ranks)


@dataclass(frozen=True, eq=False)
class Server:
    """What a method carries from round to round; each uses the fields it needs.

    Attributes
    ----------
    setup : Setup
    round : int
        Rounds that are done.
    dense : dict of str to Tensor
    factors : dict of str to (B, A)
        Methods that keep one averaged pair.
    svd : dict of str to SVD
        Methods that keep a decomposition of the update itself.
    merged : tuple of dict
        Pairs added to the frozen weights so far, oldest first.
    ranks : tuple of int
        What each client trains now (HetLoRA prunes).
    moments : dict of str to Tensor
        Of a server optimiser (`server_optimiser`).
    notes : dict
        Certificates of the last aggregation, for the records; not part of the state.
    """

    setup: Setup
    dense: dict[str, Tensor]
    ranks: tuple[int, ...]
    round: int = 0
    factors: Pairs = field(default_factory=dict)
    svd: dict[str, SVD] = field(default_factory=dict)
    merged: tuple[Pairs, ...] = ()
    moments: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def untrained(setup: Setup, client: Client, *name: object) -> tuple[Pairs, int]:
    """A client's first adapter, and the seed it draws it from."""
    own = () if setup.shared_start else (client.index,)
    seed = stream_seed(setup.seed, "start", *name, *own)
    return draw_factors(setup.shapes, client.rank, seed), seed


def clients_of(ranks: Sequence[int]) -> list[Client]:
    return [Client(i, rank) for i, rank in enumerate(ranks)]
