"""FLoRA: stack all adapters, merge the stack into the frozen weights, start afresh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..messages import Client, Reply, Sent
from ..server import Server, untrained
from .base import Method, next_state, shares, stack

__all__ = ["FLoRA"]


@dataclass(frozen=True)
class FLoRA(Method):
    """The stack [w_1 s B_1 … w_K s B_K]·[A_1; …; A_K] = Σ w_i s B_i A_i is exact at any ranks.

    It goes to every client, is added to its frozen weights, and each client draws a new adapter
    (A random, B = 0). Source: Wang et al., "FLoRA: federated fine-tuning large language models with
    heterogeneous low-rank adaptations" (NeurIPS 2024), arXiv 2409.05976.
    """

    def broadcast(self, server: Server, client: Client) -> Sent:
        factors, seed = untrained(server.setup, client, server.round)
        scaling = server.setup.scaling
        return Sent(factors, server.dense, scaling, merged=server.merged, drawn=seed)

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        scaled = [w * server.setup.scaling for w in shares(replies)]
        stacked = stack([r.factors for r in replies], scaled)
        return next_state(server, replies, merged=(*server.merged, stacked))
