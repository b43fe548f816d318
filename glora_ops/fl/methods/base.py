"""What every method is: a start, what each client is sent, how replies become the next state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import require
from ...linalg import eigen
from ..messages import Client, Pairs, Reply, Sent
from ..server import SVD, Server, Setup, untrained

__all__ = [
    "Method",
    "mean",
    "mean_dense",
    "mean_factors",
    "next_state",
    "pad_rank",
    "shares",
    "slice_rank",
    "stack",
    "truncated",
]


@dataclass(frozen=True)
class Method(ABC):
    """A federated method: frozen hyperparameters and pure functions of the server's state."""

    #: Whether clients may train different ranks.
    mixed_ranks: ClassVar[bool] = True
    #: Whether every client must draw the same first A.
    needs_shared_start: ClassVar[bool] = False

    def check(self, ranks: Sequence[int], shared_start: bool) -> None:
        """Raise `GloraError` where the method cannot do what is asked for."""
        name = type(self).__name__
        require(
            self.mixed_ranks or len(set(ranks)) == 1,
            "clients.ranks",
            sorted(set(ranks)),
            f"one rank for all clients: {name} averages factors of one shape",
            "use a method for mixed ranks (glora, flora, flexlora, hetlora, raflora, fedplora, "
            "fedit zero-padded)",
        )
        require(
            shared_start or not self.needs_shared_start,
            "clients.start",
            '"independent"',
            f'"shared": {name} relies on one common first A',
        )

    def start(self, setup: Setup) -> Server:
        """The state before the first round, if the setup passes `check`."""
        self.check(setup.ranks, setup.shared_start)
        return Server(setup, setup.dense, setup.ranks)

    @abstractmethod
    def broadcast(self, server: Server, client: Client) -> Sent:
        """What `client` starts the next round from."""

    @abstractmethod
    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        """The state after a round with these replies, at least one, in client order."""

    def exact(self, server: Server, replies: Sequence[Reply]) -> Pairs:
        """The update beside ``server.merged`` if `combine` lost nothing; here Σ w_i s B_i A_i."""
        weights = [r.sent.scaling * w for r, w in zip(replies, shares(replies), strict=True)]
        return stack([r.factors for r in replies], weights)

    def update(self, reply: Reply) -> tuple[Pairs, float]:
        """What of a reply enters the server's sum, and its scaling: what robust rules judge."""
        return reply.factors, reply.sent.scaling

    def scaled(self, reply: Reply, factor: float) -> Pairs:
        """The reply's factors with `update` times `factor`, in what was trained."""
        root = factor**0.5
        left, right = {"both": (root, root), "B": (factor, 1.0), "A": (1.0, factor)}[
            reply.sent.train
        ]
        return {m: (left * b, right * a) for m, (b, a) in reply.factors.items()}

    def weights(self, replies: Sequence[Reply]) -> list[float]:
        """The weight of each reply in the server's sum; they sum to 1."""
        return shares(replies)

    def model(self, server: Server) -> Sent:
        """The server's own model, to be evaluated; what the client of largest rank would get."""
        return self.broadcast(server, Client(-1, server.setup.max_rank))

    def opening(self, server: Server, client: Client) -> Sent:
        """A message with an untrained adapter that the client draws itself."""
        factors, seed = untrained(server.setup, client)
        return Sent(factors, server.dense, server.setup.scaling, drawn=seed)


def shares(replies: Sequence[Reply]) -> list[float]:
    """Each reply's share of the examples, as far as it is trusted."""
    total = sum(reply.examples * reply.trust for reply in replies)
    return [reply.examples * reply.trust / total for reply in replies]


def mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i x_i in fp64, returned in the dtype of x."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for x, w in zip(tensors, weights, strict=True):
        total += w * x.double()
    return total.to(tensors[0].dtype)


def mean_dense(replies: Sequence[Reply], weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted means of the full parameters."""
    return {n: mean([r.dense[n] for r in replies], weights) for n in replies[0].dense}


def mean_factors(factors: Sequence[Pairs], weights: Sequence[float]) -> Pairs:
    """Weighted means of A and of B, separately; short ones are padded with zero pairs."""
    rank = max(a.shape[0] for pairs in factors for _, a in pairs.values())
    padded = [{m: pad_rank(pair, rank) for m, pair in pairs.items()} for pairs in factors]
    return {
        m: (mean([p[m][0] for p in padded], weights), mean([p[m][1] for p in padded], weights))
        for m in padded[0]
    }


def stack(factors: Sequence[Pairs], weights: Sequence[float]) -> Pairs:
    """Pairs of the sum Σ w_i B_i A_i, of rank Σ r_i."""
    return {
        m: (
            torch.cat([w * p[m][0] for p, w in zip(factors, weights, strict=True)], 1),
            torch.cat([p[m][1] for p in factors]),
        )
        for m in factors[0]
    }


def pad_rank(pair: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    b, a = pair
    missing = rank - a.shape[0]
    pad = torch.nn.functional.pad
    return (pad(b, (0, missing)), pad(a, (0, 0, 0, missing))) if missing > 0 else pair


def truncated(w: Tensor, rank: int) -> SVD:
    """The leading triplets, at most `rank`, of w (d_out, d_in): a dense SVD."""
    u, s, vt = eigen.svd(w, full_matrices=False)
    return SVD(u[:, :rank].contiguous(), s[:rank].double(), vt[:rank].mT.contiguous())


def slice_rank(factors: Pairs, rank: int) -> Pairs:
    """The first `rank` pairs of every module."""
    return {m: (b[:, :rank].contiguous(), a[:rank].contiguous()) for m, (b, a) in factors.items()}


def next_state(server: Server, replies: Sequence[Reply], **changes: Any) -> Server:
    """The following round's state: `changes`, and dense parameters averaged.

    Those are weights and no updates: what shortened a reply's update lessens its voice here.
    """
    voices = shares([replace(r, trust=r.trust * r.scale) for r in replies])
    dense = mean_dense(replies, voices)
    return replace(server, round=server.round + 1, dense=dense, notes={}, **changes)
