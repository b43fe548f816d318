"""The captured route: a fixed number of power steps, all modules at once, no value ever looked at.

Plain subspace iteration on blocks of k = R + p columns, p ≥ R: nothing depends on how far it has
come, so a call makes the same launches every time and may be recorded and replayed as a CUDA
graph. Both stacks are read once for the clients' Gram matrices *and* the first product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..linalg.orthonormal import gram_schmidt
from ..linalg.random_signs import sign_matrix, start_matrix
from ..linalg.vocabulary import Vocabulary
from .base import Coordinates, Mean, Principal, Side, Triplets, fill
from .krylov import Iteration

__all__ = ["CapturedRoute"]

PROBES = 32


@dataclass(frozen=True)
class Ritz:
    """W ≈ basis · imagesᵀ with eigenpairs of imagesᵀ images, and ‖W‖_F² as estimated."""

    basis: Tensor
    images: Tensor
    theta: Tensor
    vectors: Tensor
    total: Tensor


def energies(y: Tensor) -> Tensor:
    """(L, k) fp64: squared lengths of tall columns, read once and not copied to fp64."""
    return torch.linalg.vector_norm(y, dim=-2).double().square()


class CapturedRoute:
    """Randomized solutions at a cost known beforehand.

    Reads of both stacks: 1 for Gram matrices and sketch, 2 for the certificates of the mean,
    1½ + 2q for the triplets of the anchor (or of the mean), 3 + 2q for both consensus bases.
    """

    def __init__(self, v: Vocabulary, left: Side, right: Side, rank: int, how: Iteration) -> None:
        self.v = v
        self.left, self.right = left, right
        self.seed, self.steps = how.seed, how.power_iters
        self.columns = rank + max(rank, how.oversample)

    def _start(self, side: Side) -> Tensor:
        d, dtype, device = side.rows.shape[-1], side.rows.dtype, side.rows.device
        return start_matrix(self.seed, side.name, d, self.columns, dtype, device)[None]

    @cached_property
    def _first(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The clients' Gram matrices, and x Ω by side."""
        sides = (self.left, self.right)
        omegas = [self._start(side) for side in sides]
        grams, sketches = self.v.sketch([s.rows for s in sides], self.left.ragged, omegas)
        return grams, {side.name: z for side, z in zip(sides, sketches, strict=True)}

    @cached_property
    def _probes(self) -> Tensor:
        """(L, N, PROBES) fp64: a times signs that no basis has seen."""
        rows = self.right.rows
        d, dtype, device = rows.shape[-1], rows.dtype, rows.device
        return self.v.times(rows, sign_matrix(self.seed, "probe", d, PROBES, dtype, device)[None])

    def client_grams(self) -> tuple[Tensor, Tensor]:
        gram_b, gram_a = self._first[0]
        return gram_b, gram_a

    def spectrum(self, mean: Mean, rank: int, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """σ from the first block alone, never larger than the truth, and the norm."""
        ritz = self._ritz(mean.coef, None, 0)
        return fill(ritz.theta, rank + 1).sqrt(), ritz.total.sqrt()

    def update(self, mean: Mean, rank: int, warm: Tensor | None = None) -> Triplets:
        v, ritz = self.v, self._ritz(mean.coef, warm, self.steps)
        leading = ritz.vectors[..., :rank]
        x = gram_schmidt(v, v.combine(ritz.basis, leading), passes=2)
        y = gram_schmidt(v, v.combine(ritz.images, leading), passes=2)
        sigma = fill(ritz.theta, rank + 1).sqrt()
        return Triplets(fill(x, rank), fill(y, rank), sigma, ritz.total.sqrt(), self.steps)

    def _ritz(self, coef: Tensor, warm: Tensor | None, steps: int) -> Ritz:
        """Subspace iteration on W = Σ_j coef_j b_j a_jᵀ, from W Ω.

        ‖(I − QQᵀ)W‖² is estimated from W times the probes, with a relative standard error of
        √(2/32) at most: what the basis missed, so little where it is good.
        """
        v, b, a = self.v, self.left.rows, self.right.rows
        weight = coef[..., None]
        starts = [self._first[1]["right"], self._probes]
        if warm is not None:
            starts.insert(1, v.times(a, warm))
        y = v.lift(b, weight * torch.cat(starts, -1))
        probes = self._probes.shape[-1]
        y, image = y.split([y.shape[-1] - probes, probes], -1)
        for _ in range(steps):  # a basis after each half: W Wᵀ in fp32 ends at σ₁/4000, W at u32 σ₁
            y = gram_schmidt(v, v.lift(a, weight * v.times(b, gram_schmidt(v, y))))
            y = v.lift(b, weight * v.times(a, y))
        basis = gram_schmidt(v, y, passes=2)
        images = v.lift(a, weight * v.times(b, basis))
        theta, vectors = v.eigh(v.inner(images, images))
        missed = image - v.combine(basis, v.inner(basis, image))
        outside = energies(missed).sum(-1) / probes
        return Ritz(basis, images, theta, vectors, theta.sum(-1) + outside)

    triplets = update

    def principal(
        self,
        side: Side,
        other: Side,
        voters: Coordinates,
        rank: int,
        mean: Mean,
        warm: Tensor | None = None,
    ) -> Principal:
        """Subspace iteration on M Mᵀ, M = [xᵀ T √c, extra], from the anchor and M Mᵀ Ω.

        Columns of the anchor that are zero leave their place to more of Ω.
        """
        v, rows, ragged, extra = self.v, side.rows, side.ragged, voters.extra
        root = voters.votes.sqrt()

        def apply(z: Tensor) -> Tensor:
            in_rows, in_extra = z.split([ragged.rows, extra.shape[-1]], -2)
            return v.lift(rows, v.unfold(voters.t, root, ragged, in_rows)) + v.combine(
                extra, in_extra
            )

        def apply_t(y: Tensor, reached: Tensor) -> Tensor:
            return torch.cat([v.fold(voters.t, root, ragged, reached), v.inner(extra, y)], -2)

        omega = self._start(side).expand(rows.shape[0], -1, -1)
        y = apply(gram_schmidt(v, apply_t(omega, self._first[1][side.name])))
        known = min(extra.shape[-1], y.shape[-1])
        rest, spare = y.split([y.shape[-1] - known, known], -1)
        anchor = extra[..., :known]
        empty = (anchor == 0).all(-2, keepdim=True)
        starts = [torch.where(empty, spare, anchor), rest]
        y = torch.cat(starts if warm is None else [*starts, warm.to(y.dtype)], -1)
        for _ in range(self.steps):
            y = gram_schmidt(v, y)
            y = apply(gram_schmidt(v, apply_t(y, v.times(rows, y))))
        y = gram_schmidt(v, y, passes=2)
        z = v.times(rows, y)
        images = apply_t(y, z)
        lam, vectors = v.eigh(v.inner(images, images))
        reach = v.lift(other.rows, mean.coef[..., None] * (z @ vectors))
        basis = gram_schmidt(v, v.combine(y, vectors[..., :rank]), passes=2)
        own = replace(voters, extra=extra[..., :0]).trace(ragged)
        trace = own + energies(extra).sum(-1)
        return Principal(fill(basis, rank), lam, energies(reach), trace, self.steps)
