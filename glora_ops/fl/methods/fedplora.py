"""Fed-PLoRA: R one-rank modules; a client trains some, and the others are folded into its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..messages import Client, Pairs, Reply, Sent, draw_factors
from ..seeds import numpy_stream, stream_seed
from ..server import Server, Setup
from .base import Method, mean, next_state, shares

__all__ = ["FedPLoRA"]


@dataclass(frozen=True)
class FedPLoRA(Method):
    """W = Σ_j s b_j a_j; client i trains r_i modules K_i drawn anew each round, the rest is frozen.

    b_j and a_j are averaged, each on its own, over the clients that trained module j; a module that
    nobody trained stays. R is the largest client rank.

    Source: Zhang et al., "Heterogeneous federated fine-tuning with parallel one-rank adaptation"
    (ICLR 2026), arXiv 2602.16936. Read, in its abstract and public notes on its text: the sum of
    one-rank modules, the folding W⁰ + Σ_{j∉K_i} b_j a_j, the random choice of K_i, the mean over
    the set that trained j. Inferred: weights by examples, as every method has them here (its bound
    divides by the number of clients), R, and that the first A comes from one seed.
    """

    needs_shared_start: ClassVar[bool] = True

    def start(self, setup: Setup) -> Server:
        pool = draw_factors(setup.shapes, setup.max_rank, stream_seed(setup.seed, "start"))
        return replace(super().start(setup), factors=pool)

    def broadcast(self, server: Server, client: Client) -> Sent:
        chosen = self.chosen(server, client)
        rest = [j for j in range(server.setup.max_rank) if j not in chosen]
        s = server.setup.scaling
        mine = {m: (b[:, chosen], a[chosen]) for m, (b, a) in server.factors.items()}
        folded: Pairs = {m: (s * b[:, rest], a[rest]) for m, (b, a) in server.factors.items()}
        anything = any(b.any() for b, _ in folded.values())  # at first all of B is zero
        return Sent(mine, server.dense, s, merged=(folded,) if anything else ())

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        chosen = [self.chosen(server, r.client) for r in replies]
        factors = {m: (b.clone(), a.clone()) for m, (b, a) in server.factors.items()}
        for j in range(server.setup.max_rank):
            trained = [(r, k.index(j)) for r, k in zip(replies, chosen, strict=True) if j in k]
            if not trained:
                continue
            weights = shares([r for r, _ in trained])
            for m, (b, a) in factors.items():
                b[:, j] = mean([r.factors[m][0][:, i] for r, i in trained], weights)
                a[j] = mean([r.factors[m][1][i] for r, i in trained], weights)
        return next_state(server, replies, factors=factors)

    def model(self, server: Server) -> Sent:
        return Sent(server.factors, server.dense, server.setup.scaling)

    def exact(self, server: Server, replies: Sequence[Reply]) -> Pairs:
        """The mean of what clients hold: trained and folded modules."""
        s = server.setup.scaling
        out: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {
            m: ([], []) for m in server.factors
        }
        for r, w in zip(replies, shares(replies), strict=True):
            for m, (bs, as_) in out.items():
                held = [(s * r.factors[m][0], r.factors[m][1]), *(p[m] for p in r.sent.merged)]
                bs += [w * b for b, _ in held]
                as_ += [a for _, a in held]
        return {m: (torch.cat(bs, 1), torch.cat(as_)) for m, (bs, as_) in out.items()}

    def chosen(self, server: Server, client: Client) -> list[int]:
        """K_i of this round."""
        pool = server.setup.max_rank
        draw = numpy_stream(server.setup.seed, "modules", server.round, client.index)
        return sorted(int(j) for j in draw.choice(pool, min(client.rank, pool), replace=False))
