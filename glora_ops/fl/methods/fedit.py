"""FedIT: average A and B, each on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..messages import Client, Reply, Sent
from ..server import Server
from .base import Method, mean_factors, next_state, shares, slice_rank

__all__ = ["FedIT"]


@dataclass(frozen=True)
class FedIT(Method):
    """Ā = Σ w_i A_i, B̄ = Σ w_i B_i, w_i the share of examples.

    Source: Zhang et al., "Towards building the federated GPT: federated instruction tuning",
    arXiv 2305.05644, which is FedAvg on the adapter's parameters. The publication knows one rank
    only; with mixed ranks short factors are padded with zeros and clients get the first r_i pairs
    back (the report labels this). Pairs that no reply of a round holds are zero from then on, and a
    zero pair has no gradient: nobody is sent them again.
    """

    def broadcast(self, server: Server, client: Client) -> Sent:
        if not server.factors:
            return self.opening(server, client)
        factors = slice_rank(server.factors, client.rank)
        return Sent(factors, server.dense, server.setup.scaling)

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        factors = mean_factors([r.factors for r in replies], shares(replies))
        return next_state(server, replies, factors=factors)
