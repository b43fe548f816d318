"""RoLoRA: rounds take turns, one trains and averages B, the next A."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..messages import Client, Reply, Sent
from ..server import Server
from .base import Method, mean_factors, next_state, shares

__all__ = ["RoLoRA"]


@dataclass(frozen=True)
class RoLoRA(Method):
    """Rounds 0, 2, … train B with A frozen, rounds 1, 3, … train A with B frozen.

    The frozen factor is the same for every client, so averaging the other one is exact.
    Source: Chen et al., "Robust federated finetuning of LLMs via alternating optimization of LoRA",
    arXiv 2409.02346. B comes first, since A could not learn beside B = 0.
    """

    mixed_ranks: ClassVar[bool] = False
    needs_shared_start: ClassVar[bool] = True

    def broadcast(self, server: Server, client: Client) -> Sent:
        if not server.factors:
            return replace(self.opening(server, client), train="B")
        turn: Literal["A", "B"] = "A" if server.round % 2 else "B"
        return Sent(server.factors, server.dense, server.setup.scaling, train=turn)

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        frozen = replies[0].sent.factors
        averaged = mean_factors([r.factors for r in replies], shares(replies))
        if replies[0].sent.train == "B":
            factors = {m: (averaged[m][0], frozen[m][1]) for m in frozen}
        else:
            factors = {m: (frozen[m][0], averaged[m][1]) for m in frozen}
        return next_state(server, replies, factors=factors)
