"""The fixed-step solver: a number of power steps told beforehand, no value ever looked at.

Plain subspace iteration on blocks of k columns: nothing depends on how far it has come, so a call
makes the same launches every time and may be recorded and replayed as a CUDA graph. Both stacks
are read once for the clients' Gram matrices *and* the first product; a consensus solves two small
eigenproblems, the anchor's and that of both sides at once.
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

PROBES = 32  # sign vectors; why: what is left out is then known to a quarter of it (√(2/32))
# Columns up to which a small eigenproblem is cheap on a GPU: one more costs five times as much.
NARROW = 64


def block_columns(rank: int, oversample: int) -> int:
    """k = R + p, and 2R where that costs nothing."""
    return max(rank + oversample, min(2 * rank, NARROW))


def energies(y: Tensor) -> Tensor:
    """(L, k) fp64: squared lengths of tall columns, read once and not copied to fp64."""
    return torch.linalg.vector_norm(y, dim=-2).double().square()


class FixedStepSolver(TallSolver):
    """Randomized solutions at a cost known beforehand, all modules at once.

    Reads of both stacks: 1 for Gram matrices and sketch, ½ for the probes, 1½ + 2q for the triplets
    of the anchor (or of the mean), 3½ + 2q for both consensus bases and the mean's certificates.
    """

    def __init__(self, v: Vocabulary, factors: Factors, settings: Settings) -> None:
        super().__init__(v, factors, settings)
        self.steps = settings.power_iters
        self.columns = block_columns(settings.rank, settings.oversample)

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
        """Subspace iteration on W = Σ_j coef_j b_j a_jᵀ, from W Ω."""
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
        total = theta.sum(-1) + self._left_out(basis, image)
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

    def _solve(
        self,
        voters: tuple[Voters, Voters],
        p: Tensor,
        known: Tensor | None,
        warm: tuple[Tensor | None, Tensor | None],
    ) -> Found:
        """Both sides' blocks to their last step, then the eigenproblems of both in one launch.

        The mean's certificates come from what the blocks hold of it: its norm from the left one and
        what that missed, σ from the better side, whose energy is never more than the truth's.
        """
        v, rank, mean = self.v, self.settings.rank, self.mean(p)
        blocks = [self._block(side, voters[side], warm[side]) for side in (0, 1)]
        solved = self._eigh([v.inner(images, images) for _, _, images in blocks])
        sides = []
        for (y, z, _), (lam, vectors), back in zip(blocks, solved, (mean.next, mean), strict=True):
            basis = cholesky_qr(v, v.combine(y, vectors[..., :rank]), passes=2)
            held = energies(back.pulled(v.product(z, vectors)))
            sides.append(Principal(fill(basis, rank), lam, held, lam.sum(-1), self.steps))
        missed = self._left_out(blocks[0][0], mean.pulled(self._probes))
        norm = (sides[0].energies.sum(-1) + missed).sqrt()
        left, right = (fill(x.energies.sort(-1, True)[0], rank + 1) for x in sides)
        better = left[..., :rank].sum(-1) > right[..., :rank].sum(-1)
        sigma = torch.where(better[..., None], left, right).sqrt()
        return self.between((sides[0], sides[1]), p, sigma, norm)

    def _eigh(self, grams: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        if grams[0].shape != grams[1].shape:  # a space with fewer dimensions than columns
            return [self.v.eigh(g) for g in grams]
        lam, vectors = self.v.eigh(torch.cat(grams))
        return list(zip(lam.chunk(2), vectors.chunk(2), strict=True))

    def _left_out(self, basis: Tensor, image: Tensor) -> Tensor:
        """(L,): ‖(I − QQᵀ)W‖² from W times the probes; relative standard error ≤ √(2/32)."""
        v = self.v
        missed = image - v.combine(basis, v.inner(basis, image))
        return energies(missed).sum(-1) / PROBES

    def _block(
        self, side: int, voters: Voters, warm: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Subspace iteration on M Mᵀ, M = [xᵀ T √c, extra], from the anchor and M Mᵀ Ω.

        Columns of the anchor that are zero leave their place to more of Ω. Returned are an
        orthonormal block y, the rows times it, and Mᵀ y.
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
        y = torch.cat([*starts, *([] if warm is None else [warm.to(y.dtype)])], -1)
        for _ in range(self.steps):
            y = cholesky_qr(v, y)
            y = operator.apply(cholesky_qr(v, operator.apply_t(y)))
        y = cholesky_qr(v, y, passes=2)
        z = v.times(rows, y)
        return y, z, operator.folded(z, y)
