"""FedSVD: clients train B alone; the server turns the product so that A holds its directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..messages import Client, Reply, Sent
from ..server import Server
from .base import Method, mean_factors, next_state, shares

__all__ = ["FedSVD"]


@dataclass(frozen=True)
class FedSVD(Method):
    """B̄ = Σ w_i B_i with one frozen A; then B̄ A = U Σ Vᵀ, B = U_r Σ_r and A = V_rᵀ for the next.

    Source: Lee et al., "FedSVD: adaptive orthogonalization for private federated learning with
    LoRA" (NeurIPS 2025), arXiv 2505.12805. Read: the abstract, and the authors' code for the
    factorisation, its place after the averaging and the first A, which is LoRA's. Inferred: every
    round (their code has a period and a warm-up as options). Differential privacy is left out.
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
        factors = {}
        for m, (_, a) in frozen.items():
            u, sigma, vt = torch.linalg.svd(averaged[m][0] @ a, full_matrices=False)
            r = a.shape[0]
            factors[m] = ((u * sigma)[:, :r].contiguous(), vt[:r].contiguous())
        return next_state(server, replies, factors=factors)
