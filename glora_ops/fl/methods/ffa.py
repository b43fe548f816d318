"""FFA-LoRA: A stays as it was drawn; only B is trained and averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..messages import Client, Reply, Sent
from ..server import Server
from .base import Method, mean_factors, next_state, shares

__all__ = ["FFALoRA"]


@dataclass(frozen=True)
class FFALoRA(Method):
    """B̄ = Σ w_i B_i with one frozen A₀ for all: averaging is exact, Σ w_i B_i A₀ = B̄ A₀.

    Source: Sun et al., "Improving LoRA in privacy-preserving federated learning" (ICLR 2024),
    arXiv 2403.12313.
    """

    mixed_ranks: ClassVar[bool] = False
    needs_shared_start: ClassVar[bool] = True

    def broadcast(self, server: Server, client: Client) -> Sent:
        if not server.factors:
            return replace(self.opening(server, client), train="B")
        return Sent(server.factors, server.dense, server.setup.scaling, train="B")

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        frozen = replies[0].sent.factors
        averaged = mean_factors([r.factors for r in replies], shares(replies))
        factors = {m: (averaged[m][0], frozen[m][1]) for m in frozen}
        return next_state(server, replies, factors=factors)
