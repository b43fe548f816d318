"""FedRot-LoRA: turn every client's pair towards the last global one, then average the factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import require
from ...linalg import eigen
from ...state import Factors
from ..messages import Client, Reply, Sent
from ..server import Server
from .base import Method, mean_factors, next_state, shares

__all__ = ["FedRotLoRA", "rotation"]


@dataclass(frozen=True)
class FedRotLoRA(Method):
    """(B_i R_i, R_iᵀ A_i) is averaged, R_i the rotation that brings A_i (or B_i) nearest to what
    the client was sent: orthogonal Procrustes, A in odd rounds, B in even ones, none in the first.

    Soft: R = polar((1 − λ) I + λ R*). Source: Zhang et al., "FedRot-LoRA: mitigating rotational
    misalignment in federated LoRA" (ICML 2026), arXiv 2602.23638, and the authors' code for the
    alternation and the exclusion of reflections. Clients rotate there; the server knows the same
    two pairs, so it is done here.

    Attributes
    ----------
    strength : float
        λ in [0, 1]; 1 is the full rotation.
    """

    strength: float = 1.0
    mixed_ranks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(0 <= self.strength <= 1, "strength", self.strength, "a number in [0, 1]")

    def broadcast(self, server: Server, client: Client) -> Sent:
        if not server.factors:
            return self.opening(server, client)
        return Sent(server.factors, server.dense, server.setup.scaling)

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        turned = [
            {m: self._turn(server.round, pair, r.sent.factors[m]) for m, pair in r.factors.items()}
            if server.factors
            else r.factors
            for r in replies
        ]
        return next_state(server, replies, factors=mean_factors(turned, shares(replies)))

    def _turn(self, round: int, pair: Factors, reference: Factors) -> Factors:
        (b, a), (b_ref, a_ref) = pair, reference
        correlation = a @ a_ref.mT if round % 2 else b.mT @ b_ref
        r = rotation(correlation.double(), self.strength).to(a.dtype)
        return b @ r, r.mT @ a


def rotation(correlation: Tensor, strength: float) -> Tensor:
    """polar((1 − λ) I + λ R*), R* the rotation (determinant 1) with the largest tr(R*ᵀ M)."""
    u, _, vt = eigen.svd(correlation)
    if torch.linalg.det(u @ vt) < 0:
        vt = torch.cat([vt[:-1], -vt[-1:]])
    soft = (1 - strength) * torch.eye(len(u), dtype=u.dtype) + strength * (u @ vt)
    u, _, vt = eigen.svd(soft)
    return u @ vt
