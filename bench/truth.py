"""What an answer is worth: its distance to the true mean, in float64, from factors only."""

from __future__ import annotations

from functools import lru_cache

import torch
from populations import Case, Population, population
from torch import Tensor

__all__ = ["Truth", "truth_of"]


class Truth:
    """The mean update W̄ of a population in orthonormal coordinates, by QR of its stacks.

    W̄ = Q_L M Q_Aᵀ exactly (float64), so norms, optima and errors need the small M alone.
    """

    def __init__(self, p: Population) -> None:
        coef = p.weights.double() * p.scaling.double()
        ranks = torch.tensor([x.shape[0] for x in p.lora_a])
        self.q_l, r_l = torch.linalg.qr(p.b.double().mT * coef.repeat_interleave(ranks))
        self.q_a, r_a = torch.linalg.qr(p.a.double().mT)
        self.m = r_l @ r_a.mT
        self.energies = torch.linalg.svdvals(self.m).square()
        self.energy = float(self.energies.sum())

    def optimum(self, rank: int) -> float:
        """The fraction of ‖W̄‖² that the best update of this rank captures."""
        return float(self.energies[:rank].sum()) / self.energy

    def captured(self, u: Tensor, s: Tensor, v: Tensor) -> float:
        """1 − ‖W̄ − u·diag(s)·vᵀ‖²/‖W̄‖²; a wrong answer may well be negative."""
        u, s, v = u.double(), s.double(), v.double()
        inner = float((((self.q_l.mT @ u).mT @ self.m @ (self.q_a.mT @ v)).diagonal() * s).sum())
        own = float(((u.mT @ u) * (v.mT @ v) * s[:, None] * s).sum())
        return (2 * inner - own) / self.energy


@lru_cache(maxsize=2)
def truth_of(case: Case) -> Truth:
    return Truth(population(case))
