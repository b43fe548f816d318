"""HetLoRA: zero-padded averaging with clients weighted by norm, and clients prune their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import torch

from ...errors import require_all
from ..messages import Client, Pairs, Reply, Sent, Tail
from ..server import Server
from .base import Method, mean_factors, next_state, shares, slice_rank

__all__ = ["HetLoRA"]


@dataclass(frozen=True)
class HetLoRA(Method):
    """Ā, B̄ = Σ p_i (A_i, B_i) zero-padded, p_i = ‖ΔW_i‖_F / Σ_j ‖ΔW_j‖_F; first r_i pairs back.

    Self-pruning: a client trains with the penalty λ ‖B_i[:, γr_i:]‖·‖A_i[γr_i:]‖ on its last pairs,
    and where that product ends below where it began, its rank becomes γ r_i. Pairs that no reply of
    a round holds are zero from then on, and a zero pair has no gradient: nobody is sent them again.
    Source: Cho et al., "Heterogeneous LoRA for federated fine-tuning of on-device foundation
    models" (EMNLP 2024), arXiv 2401.06432. The norm is over all modules together.

    Attributes
    ----------
    gamma : float
        Fraction γ of its rank that a pruned client keeps, in (0, 1]; 1 never prunes.
    penalty : float
        λ ≥ 0.
    """

    gamma: float = 0.99
    penalty: float = 1e-3

    def __post_init__(self) -> None:
        require_all(
            (0 < self.gamma <= 1, "gamma", self.gamma, "a fraction in (0, 1]"),
            (0 <= self.penalty < inf, "penalty", self.penalty, "a number ≥ 0"),
        )

    def broadcast(self, server: Server, client: Client) -> Sent:
        rank = server.ranks[client.index] if client.index >= 0 else client.rank
        if not server.factors:
            sent = self.opening(server, replace(client, rank=rank))
        else:
            sent = Sent(slice_rank(server.factors, rank), server.dense, server.setup.scaling)
        keep = self._kept(rank)
        return replace(sent, tail=Tail(keep, self.penalty)) if keep < rank else sent

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        ranks = list(server.ranks)
        for reply in replies:
            tail = reply.sent.tail
            before = reply.scale * tail_size(reply.sent.factors, tail) if tail else 0.0
            if tail and tail_size(reply.factors, tail) < before:
                ranks[reply.client.index] = tail.keep
        factors = mean_factors([r.factors for r in replies], self.weights(replies))
        return next_state(server, replies, factors=factors, ranks=tuple(ranks))

    def weights(self, replies: Sequence[Reply]) -> list[float]:
        norms = [_norm(r.factors) * r.trust for r in replies]
        total = sum(norms)
        return [n / total for n in norms] if total > 0 else shares(replies)

    def _kept(self, rank: int) -> int:
        return max(1, int(self.gamma * rank))


def _norm(factors: Pairs) -> float:
    """‖ΔW‖_F over all modules, by Gram matrices."""
    total = sum(float(((b.mT @ b) * (a @ a.mT)).sum()) for b, a in factors.values())
    return max(total, 0.0) ** 0.5


def tail_size(factors: Pairs, tail: Tail) -> float:
    """Σ_modules ‖B[:, keep:]‖·‖A[keep:]‖."""
    norm = torch.linalg.matrix_norm
    return sum(float(norm(b[:, tail.keep :]) * norm(a[tail.keep :])) for b, a in factors.values())
