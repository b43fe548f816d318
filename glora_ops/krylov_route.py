"""The randomized route: block Krylov iterations on tall blocks; nothing N × N, nothing d × d.

All products start from the same seeded signs in the *long* space, so the iterates depend on the
mean projector (or update) alone: they are as gauge-invariant as what they approximate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .signs import sign_matrix
from .solver import Coordinates, Principal, Side, Triplets, fill
from .tall import orthonormalise, whiten
from .vocabulary import Vocabulary

__all__ = ["Iteration", "KrylovRoute", "principal_krylov"]

PROBES = 32


@dataclass(frozen=True)
class Iteration:
    """How a block Krylov iteration runs.

    Attributes
    ----------
    oversample : int
        Columns carried beyond the rank.
    power_iters : int
        Fixed number of steps, or -1: at most `most`, stopped by `tol`.
    tol : float
        Largest gain in captured energy (fraction of the trace) at which to stop.
    seed : int
    most : int
    """

    oversample: int
    power_iters: int
    tol: float
    seed: int
    most: int = 6


@dataclass(frozen=True)
class Ritz:
    """Ritz approximation of an operator O (d × n): O ≈ basis · imagesᵀ.

    Attributes
    ----------
    basis : Tensor (L, d, m)
        Orthonormal columns, or zero.
    images : Tensor (L, n, m) fp64
        Oᵀ basis.
    theta, vectors : Tensor (L, m), (L, m, m) fp64
        Eigenpairs of imagesᵀ images: squared singular values of basisᵀO.
    total : Tensor (L,) fp64
        ‖O‖_F², as far as it is known.
    """

    basis: Tensor
    images: Tensor
    theta: Tensor
    vectors: Tensor
    total: Tensor
    steps: int


def block_krylov(
    v: Vocabulary,
    apply: Callable[[Tensor], Tensor],
    apply_t: Callable[[Tensor], Tensor],
    start: Tensor,
    unseen: Callable[[Tensor, Tensor], Tensor],
    rank: int,
    how: Iteration,
) -> Ritz:
    """Block Krylov iteration for the leading left singular space of an operator O.

    Adaptive runs stop when what further steps could still gain is too little: below `tol` of the
    energy found, and moving the error √(1 − captured) by less than `tol`/2 or 1/2 %. The gain to
    come is at most the energy outside the basis, since a basis loses no more of the best rank-R
    part than that; after a step it is taken to be at most twice what gains falling at the last
    rate (1/4 after the first step) would add up to.

    Parameters
    ----------
    apply, apply_t : callable
        O z and Oᵀ y for blocks of columns.
    start : Tensor (1, d, k)
        First block, O times something intrinsic.
    unseen : callable (basis, seen) → (1,)
        ‖(I − QQᵀ)O‖_F² or an estimate, for Q = basis and seen = ‖QᵀO‖_F².
    """
    drop = max((64 * torch.finfo(start.dtype).eps) ** 2, 1e-14)
    basis = whiten(v, start, drop)
    images = last = apply_t(basis).double()
    h = v.inner(images, images)
    found = gained = 0.0
    limit = min(basis.shape[-2], images.shape[-2])
    steps = how.most if how.power_iters < 0 else how.power_iters
    for step in range(steps + 1):
        theta, vectors = v.eigh(h)
        seen = theta.sum(-1)
        outside = unseen(basis, seen)
        if step == steps or basis.shape[-1] >= limit:
            break
        if how.power_iters < 0:
            before, found, last_gain = found, float(theta[..., :rank].sum()), gained
            total = max(float(seen + outside), 1e-300)
            to_come, gained = float(outside), found - before
            if step > 0:
                rate = min(max(gained / max(last_gain, 1e-300), 0.0), 0.9) if step > 1 else 0.25
                to_come = min(to_come, 2 * gained * rate / (1 - rate))
            gain, missing = max(to_come, 0.0) / total, max(0.0, 1 - found / total)
            error = math.sqrt(missing)
            moves = error - math.sqrt(max(0.0, missing - gain))
            if gain < how.tol * found / total and moves < max(how.tol, 0.01 * error) / 2:
                break
        w = apply(last)
        size = w.square().sum((-2, -1), dtype=torch.float64)
        for _ in range(2):
            w = w - v.lift(basis.mT, v.times(basis.mT, w))
        q = whiten(v, w, drop, size)
        last = apply_t(q).double()
        side = v.inner(images, last)
        h = torch.cat([torch.cat([h, side], -1), torch.cat([side.mT, v.inner(last, last)], -1)], -2)
        basis, images = _append(basis, q), _append(images, last)
    return Ritz(basis, images, theta, vectors, seen + outside, step)


def _append(block: Tensor, more: Tensor) -> Tensor:
    """Columns side by side, in (L, k, d) memory."""
    return torch.cat([block.mT, more.mT], -2).mT


class KrylovRoute:
    """Randomized solutions for stacks too tall for N × N eigenproblems; one module at a time.

    Cost per module, side and power step: 4 N d k flops with k = R + oversample columns.
    """

    name = "krylov"

    def __init__(self, v: Vocabulary, left: Side, right: Side, how: Iteration) -> None:
        self.v = v
        self.left, self.right = left, right
        self.how = how

    @cached_property
    def _client_grams(self) -> tuple[Tensor, Tensor]:
        ragged = self.left.ragged
        return self.v.gram(self.left.rows, ragged), self.v.gram(self.right.rows, ragged)

    def client_grams(self) -> tuple[Tensor, Tensor]:
        return self._client_grams

    def spectrum(self, coef: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        how = replace(self.how, power_iters=min(1, self.how.power_iters), most=1)
        ritz = self._iterate(coef, rank, None, how)
        return fill(ritz.theta, rank + 1).sqrt(), ritz.total.sqrt()

    def triplets(self, coef: Tensor, rank: int, warm: Tensor | None = None) -> Triplets:
        v, dtype = self.v, self.left.rows.dtype
        ritz = self._iterate(coef, rank, warm, self.how)
        leading = ritz.vectors[..., :rank]
        x = orthonormalise(v, v.combine(ritz.basis, leading))
        y = orthonormalise(v, v.combine(ritz.images, leading).to(dtype))
        sigma = fill(ritz.theta, rank + 1).sqrt()
        return Triplets(fill(x, rank), fill(y, rank), sigma, ritz.total.sqrt(), ritz.steps)

    def _iterate(self, coef: Tensor, rank: int, warm: Tensor | None, how: Iteration) -> Ritz:
        v, b, a = self.v, self.left.rows, self.right.rows
        weight = coef[..., None]
        reached: list[Tensor] = []  # b · basis, block by block

        def apply(z: Tensor) -> Tensor:
            return v.lift(b, weight * v.times(a, z))

        def apply_t(y: Tensor) -> Tensor:
            reached.append(v.times(b, y))
            return v.lift(a, weight * reached[-1])

        start = apply(start_block(self.right, rank, how, warm))
        return block_krylov(v, apply, apply_t, start, self._unseen(weight, reached), rank, how)

    def _unseen(self, weight: Tensor, reached: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """‖(I − QQᵀ)W̄‖² as a function of an orthonormal Q; `reached` holds the blocks of bQ.

        Estimated with seeded signs; the clients' own parts Σ_i ‖(I − QQᵀ)w_iΔW_i‖², whose exact
        sum r × r matrices give, serve as control variate.
        """
        v, b, a, ragged = self.v, self.left.rows, self.right.rows, self.left.ragged
        gram_b, gram_a = self._client_grams
        probes = sign_matrix(self.how.seed, "probe", a.shape[-1], PROBES, a.dtype, a.device)
        z = v.times(a, probes[None])
        image = v.lift(b, weight * z)
        z, scale = ragged.pad(z), ragged.pad(weight)

        def unseen(basis: Tensor, seen: Tensor) -> Tensor:
            blocks = ragged.pad(torch.cat(reached, -1))
            left = scale * (gram_b - blocks @ blocks.mT) * scale.mT
            own = (z * (left @ z)).sum((-3, -2))
            own_exact = (left * gram_a).sum((-3, -2, -1))
            outside = image - v.lift(basis.mT, v.times(basis.mT, image))
            each = outside.double().square().sum(-2)
            spread = own - own.mean(-1, keepdim=True)
            slope = (spread * each).sum(-1) / spread.square().sum(-1).clamp(min=1e-300)
            return (each.mean(-1) - slope * (own.mean(-1) - own_exact)).clamp(min=0)

        return unseen

    def principal(
        self,
        side: Side,
        other: Side,
        voters: Coordinates,
        rank: int,
        coef: Tensor,
        warm: Tensor | None = None,
    ) -> Principal:
        return principal_krylov(self.v, side, voters, rank, self.how, warm, coef, other)


def start_block(side: Side, rank: int, how: Iteration, warm: Tensor | None) -> Tensor:
    """(1, d, k): the seeded signs of this side, a warm basis appended where one is given."""
    d = side.rows.shape[-1]
    columns = min(rank + how.oversample, d)
    signs = sign_matrix(how.seed, side.name, d, columns, side.rows.dtype, side.rows.device)[None]
    return signs if warm is None else torch.cat([signs, warm.to(signs.dtype)], -1)


def principal_krylov(
    v: Vocabulary,
    side: Side,
    voters: Coordinates,
    rank: int,
    how: Iteration,
    warm: Tensor | None = None,
    coef: Tensor | None = None,
    other: Side | None = None,
) -> Principal:
    """Eigenpairs of M Mᵀ by block Krylov on M = [xᵀ T √c, extra]; arguments as `principal_gram`.

    The first block is M·orth(Mᵀ Ω): the range of M Mᵀ Ω without squaring its small directions
    into rounding.
    """
    rows, ragged, extra = side.rows, side.ragged, voters.extra

    def apply(z: Tensor) -> Tensor:
        in_rows, in_extra = z.split([ragged.rows, extra.shape[-1]], -2)
        return v.lift(rows, voters.unfold(ragged, in_rows)) + v.combine(extra, in_extra)

    def apply_t(y: Tensor) -> Tensor:
        return torch.cat([voters.fold(ragged, v.times(rows, y)), v.inner(extra, y)], -2)

    trace = voters.trace(ragged)

    def unseen(basis: Tensor, seen: Tensor) -> Tensor:
        return (trace - seen).clamp(min=0)

    image = apply_t(start_block(side, rank, how, warm))
    start = apply(whiten(v, image, 1e-14))
    ritz = block_krylov(v, apply, apply_t, start, unseen, rank, how)
    known = v.combine(ritz.basis, ritz.vectors[..., : rank + how.oversample])
    lam = ritz.theta[..., : rank + how.oversample]
    energies = torch.zeros_like(lam)
    if coef is not None and other is not None:
        reach = v.lift(other.rows, coef[..., None] * v.times(rows, known))
        energies = reach.double().square().sum(-2)
    basis = fill(orthonormalise(v, known[..., :rank]), rank)
    return Principal(basis, lam, energies, trace, ritz.steps)
