"""The fixed-step solver: a number of power steps told beforehand, no value ever looked at.

Plain subspace iteration on blocks of k = R + p columns, p ≥ R: nothing depends on how far it has
come, so a call makes the same launches every time and may be recorded and replayed as a CUDA
graph. Both stacks are read once for the clients' Gram matrices *and* the first product.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..linalg.orthonormal import cholesky_qr
from ..linalg.random_signs import sign_matrix, start_matrix
from ..linalg.vocabulary import Vocabulary
from .base import Factors, Found, Principal, Settings, Triplets, fill
from .operators import MeanProjector, MeanUpdate, Voters
from .stopping import Ritz
from .tall import TallSolver

__all__ = ["FixedStepSolver"]

PROBES = 32


def energies(y: Tensor) -> Tensor:
    """(L, k) fp64: squared lengths of tall columns, read once and not copied to fp64."""
    return torch.linalg.vector_norm(y, dim=-2).double().square()


class FixedStepSolver(TallSolver):
    """Randomized solutions at a cost known beforehand, all modules at once.

    Reads of both stacks: 1 for Gram matrices and sketch, 2 for the certificates of the mean,
    1½ + 2q for the triplets of the anchor (or of the mean), 3 + 2q for both consensus bases.
    """

    def __init__(self, v: Vocabulary, factors: Factors, settings: Settings) -> None:
        super().__init__(v, factors, settings)
        self.steps = settings.power_iters
        self.columns = settings.rank + max(settings.rank, settings.oversample)

    def _omega(self, side: str, rows: Tensor) -> Tensor:
        d, dtype, device = rows.shape[-1], rows.dtype, rows.device
        return start_matrix(self.settings.seed, side, d, self.columns, dtype, device)[None]

    @cached_property
    def _first(self) -> tuple[list[Tensor], list[Tensor]]:
        """The clients' Gram matrices, and both stacks times their Ω."""
        omegas = [self._omega("left", self.b), self._omega("right", self.a)]
        return self.v.sketch([self.b, self.a], self.ragged, omegas)

    @cached_property
    def _probes(self) -> Tensor:
        """(L, N, PROBES) fp64: a times signs that no basis has seen."""
        d, dtype, device = self.a.shape[-1], self.a.dtype, self.a.device
        return self.v.times(
            self.a, sign_matrix(self.settings.seed, "probe", d, PROBES, dtype, device)[None]
        )

    @cached_property
    def client_grams(self) -> list[Tensor]:
        return self._first[0]

    @property
    def sizes(self) -> Tensor:
        return self.clients.size

    def _ritz(self, p: Tensor, warm: Tensor | None, steps: int) -> Ritz:
        """Subspace iteration on W = Σ_j coef_j b_j a_jᵀ, from W Ω.

        ‖(I − QQᵀ)W‖² is estimated from W times the probes, with a relative standard error of
        √(2/32) at most: what the basis missed, so little where it is good.
        """
        v, mean = self.v, MeanUpdate(self.v, self.b, self.a, self.coefficients(p))
        starts = [self._first[1][1], self._probes]
        if warm is not None:
            starts.insert(1, v.times(self.a, warm))
        y = mean.pulled(torch.cat(starts, -1))
        y, image = y.split([y.shape[-1] - PROBES, PROBES], -1)
        for _ in range(steps):  # a basis after each half: W Wᵀ in fp32 ends at σ₁/4000, W at u32 σ₁
            y = mean.apply(cholesky_qr(v, mean.next.apply(cholesky_qr(v, y))))
        basis = cholesky_qr(v, y, passes=2)
        images = mean.next.images(basis)
        theta, vectors = v.eigh(images.energy)
        missed = image - v.combine(basis, v.inner(basis, image))
        total = theta.sum(-1) + energies(missed).sum(-1) / PROBES
        return Ritz(basis, images, theta, vectors, total, 2 * steps, steps)

    def triplets(self, p: Tensor, warm: Tensor | None) -> Triplets:
        ritz, rank = self._ritz(p, warm, self.steps), self.settings.rank
        leading = ritz.vectors[..., :rank]
        x, y = (
            fill(cholesky_qr(self.v, self.v.combine(block, leading), passes=2), rank)
            for block in (ritz.x, ritz.images.block)
        )
        sigma = fill(ritz.theta, rank + 1).sqrt()
        return Triplets(x, y, sigma, ritz.total.sqrt(), self.steps)

    def update(self, p: Tensor, warm: Tensor | None) -> Found:
        lead = self.triplets(p, warm)
        left, right = (
            Principal(basis, lead.sigma, lead.sigma, lead.norm, lead.steps)
            for basis in (lead.x, lead.y)
        )
        return self.between((left, right), p, lead.sigma, lead.norm)

    def _spectrum(self, p: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """σ from the first block alone, never larger than the truth, and the norm."""
        ritz = self._ritz(p, None, 0)
        return fill(ritz.theta, self.settings.rank + 1).sqrt(), ritz.total.sqrt()

    def _principal(
        self, side: int, voters: Voters, mean: MeanUpdate, *known: Tensor | None
    ) -> Principal:
        """Subspace iteration on M Mᵀ, M = [xᵀ T √c, extra], from the anchor and M Mᵀ Ω.

        Columns of the anchor that are zero leave their place to more of Ω.
        """
        v, rows, extra = self.v, (self.b, self.a)[side], voters.extra
        operator = MeanProjector(v, rows, self.ragged, voters)
        omega = self._omega(("left", "right")[side], rows).expand(rows.shape[0], -1, -1)
        y = operator.apply(cholesky_qr(v, operator.folded(self._first[1][side], omega)))
        voting = min(extra.shape[-1], y.shape[-1])
        rest, spare = y.split([y.shape[-1] - voting, voting], -1)
        anchor = extra[..., :voting]
        empty = (anchor == 0).all(-2, keepdim=True)
        starts = [torch.where(empty, spare, anchor), rest]
        y = torch.cat([*starts, *(x.to(y.dtype) for x in known if x is not None)], -1)
        for _ in range(self.steps):
            y = cholesky_qr(v, y)
            y = operator.apply(cholesky_qr(v, operator.apply_t(y)))
        y = cholesky_qr(v, y, passes=2)
        z = v.times(rows, y)
        images = operator.folded(z, y)
        lam, vectors = v.eigh(v.inner(images, images))
        basis = cholesky_qr(v, v.combine(y, vectors[..., : self.settings.rank]), passes=2)
        held = energies(mean.pulled(z @ vectors))
        return Principal(fill(basis, self.settings.rank), lam, held, lam.sum(-1), self.steps)
