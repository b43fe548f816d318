"""FedSVD: clients train B alone; the server turns the product so that A holds its directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..messages import Reply
from ..server import Server
from .base import truncated
from .ffa import FFALoRA

__all__ = ["FedSVD"]


@dataclass(frozen=True)
class FedSVD(FFALoRA):
    """B̄ = Σ w_i B_i with one A, as FFA-LoRA; then B̄ A = U Σ Vᵀ and B = U_r Σ_r, A = V_rᵀ go on.

    Source: Lee et al., "FedSVD: adaptive orthogonalization for private federated learning with
    LoRA" (NeurIPS 2025), arXiv 2505.12805. Read: the abstract, and the authors' code for the
    factorisation, its place after the averaging and the first A, which is LoRA's. Inferred: every
    round (their code has a period and a warm-up as options). Differential privacy is left out.
    """

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        exact = super().combine(server, replies)
        pairs = {m: truncated(b @ a, len(a)).pair for m, (b, a) in exact.factors.items()}
        factors = {m: (b, a.contiguous()) for m, (b, a) in pairs.items()}
        return replace(exact, factors=factors)
