"""FedEx-LoRA: average the factors, and merge what averaging got wrong into the frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..messages import Client, Reply, Sent
from ..server import Server
from .base import Method, mean_factors, next_state, shares, stack

__all__ = ["FedExLoRA"]


@dataclass(frozen=True)
class FedExLoRA(Method):
    """ΔW_res = s (Σ w_i B_i A_i − B̄ Ā) is added to W₀, so that W₀ + s B̄ Ā is the exact mean.

    The residual travels as a pair of rank (K + 1) r, as the publication proposes.
    Source: Singhal et al., "FedEx-LoRA: exact aggregation for federated and efficient fine-tuning
    of foundation models", arXiv 2410.09432.
    """

    mixed_ranks: ClassVar[bool] = False

    def broadcast(self, server: Server, client: Client) -> Sent:
        if not server.factors:
            return self.opening(server, client)
        scaling = server.setup.scaling
        return Sent(server.factors, server.dense, scaling, merged=server.merged)

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        weights, s = shares(replies), server.setup.scaling
        averaged = mean_factors([r.factors for r in replies], weights)
        residual = stack([*(r.factors for r in replies), averaged], [*(s * w for w in weights), -s])
        return next_state(server, replies, factors=averaged, merged=(*server.merged, residual))
