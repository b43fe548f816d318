"""The randomized route: block Krylov iterations on tall blocks; nothing N × N, nothing d × d.

All products start from the same seeded signs in the *long* space, so the iterates depend on the
mean projector (or update) alone: they are as gauge-invariant as what they approximate.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..linalg.orthonormal import orthonormalise, whiten
from ..linalg.random_signs import sign_matrix, start_matrix
from ..linalg.vocabulary import Vocabulary, working
from .base import Coordinates, Mean, Principal, Side, Triplets, fill
from .krylov import Iteration, Operator, Ritz, block_krylov

__all__ = ["KrylovRoute", "principal_krylov", "start_block"]

PROBES = 32
# Squared sines, in units of tol², at which vectors have come to rest: those of a mean projector,
# and those of the anchor, which votes with half a voice (2/η²).
SETTLED, ANCHORED = 2.0, 8.0
# N²(d_out + d_in) up to which N × N Gram matrices cost less than two milliseconds.
CHEAP = 2**28


class KrylovRoute:
    """Randomized solutions for stacks too tall for N × N eigenproblems; one module at a time.

    Cost per module, side and power step: 4 N d k flops with k = R + oversample columns.
    """

    def __init__(
        self,
        v: Vocabulary,
        left: Side,
        right: Side,
        client_grams: tuple[Tensor, Tensor],
        how: Iteration,
    ) -> None:
        self.v = v
        self.left, self.right = left, right
        self.client_grams = client_grams
        self.how = how

    @cached_property
    def _grams(self) -> tuple[Tensor, Tensor] | None:
        """Both N × N Gram matrices in the working precision, where they cost next to nothing.

        In fp64 where squares of the rows, or products of them, might leave fp32's range.
        """
        v, b, a = self.v, self.left.rows, self.right.rows
        if b.shape[-2] ** 2 * (b.shape[-1] + a.shape[-1]) > CHEAP:
            return None
        if _moderate(b) and _moderate(a):
            return v.times(b, b.mT), v.times(a, a.mT)
        return v.inner(b.mT, b.mT), v.inner(a.mT, a.mT)

    def spectrum(self, mean: Mean, rank: int, known: Tensor | None) -> tuple[Tensor, Tensor]:
        how = self.how
        if self._grams is None:  # one step tells enough where steps are dear
            how = replace(how, power_iters=min(1, how.power_iters), most=1)
        ritz = self._iterate(mean.coef, rank, known, how)
        return fill(ritz.theta, rank + 1).sqrt(), ritz.total.sqrt()

    def update(self, mean: Mean, rank: int, warm: Tensor | None = None) -> Triplets:
        return self._triplets(self._iterate(mean.coef, rank, warm, self.how), rank)

    def triplets(self, mean: Mean, rank: int, warm: Tensor | None = None) -> Triplets:
        return self._triplets(self._iterate(mean.coef, rank, warm, self.how, ANCHORED), rank)

    def _triplets(self, ritz: Ritz, rank: int) -> Triplets:
        v, dtype = self.v, working(self.left.rows.dtype)
        leading = ritz.vectors[..., :rank]
        x = orthonormalise(v, v.combine(ritz.basis, leading))
        y = orthonormalise(v, v.combine(ritz.images, leading).to(dtype))
        sigma = fill(ritz.theta, rank + 1).sqrt()
        return Triplets(fill(x, rank), fill(y, rank), sigma, ritz.total.sqrt(), ritz.steps)

    def _iterate(
        self,
        coef: Tensor,
        rank: int,
        known: Tensor | None,
        how: Iteration,
        settled: float | None = None,
    ) -> Ritz:
        v, b, a = self.v, self.left.rows, self.right.rows
        weight = coef[..., None]
        first = start_block(self.right, rank, how, known)
        outside = Outside(self, weight)

        def apply(z: Tensor) -> Tensor:
            return v.lift(b, weight * v.times(a, z))

        def apply_t(y: Tensor) -> Tensor:
            reached = v.times(b, y)
            outside.reached.append(reached)
            return v.lift(a, weight * reached)

        operator = Operator(apply, apply_t, v, v, working(b.dtype))
        return block_krylov(operator, apply(first), outside, rank, how, settled)

    def principal(
        self,
        side: Side,
        other: Side,
        voters: Coordinates,
        rank: int,
        mean: Mean,
        warm: Tensor | None = None,
    ) -> Principal:
        return principal_krylov(self.v, side, voters, rank, self.how, warm, mean.coef, other)


def _moderate(rows: Tensor) -> bool:
    """Whether the largest entry of every row is zero or within 2^±30."""
    peak = torch.linalg.vector_norm(rows, torch.inf, dim=-1)
    return bool(((peak == 0) | ((peak > 2.0**-30) & (peak < 2.0**30))).all())


class Outside:
    """‖(I − QQᵀ)W̄‖² for a Q that grows: a call adds columns.

    From N × N Gram matrices where they are cheap, otherwise estimated with seeded signs; the
    clients' own parts Σ_i ‖(I − QQᵀ)w_iΔW_i‖², whose exact sum r × r matrices give, then serve as
    control variate.

    Parameters
    ----------
    weight : Tensor (1, N, 1) fp64
        W̄ = bᵀ diag(weight) a.

    Attributes
    ----------
    reached : list of Tensor (1, N, k)
        b · columns to be added; the iteration has them anyway and leaves them here.
    """

    def __init__(self, route: KrylovRoute, weight: Tensor) -> None:
        self.v = v = route.v
        b, a = route.left.rows, route.right.rows
        self.ragged = route.left.ragged
        self.reached: list[Tensor] = []
        self.total: Tensor | None = None
        if route._grams is not None:
            gram_b, gram_a = route._grams
            self.total = (weight * gram_b * weight.mT * gram_a).sum((-2, -1))
            return
        probes = sign_matrix(route.how.seed, "probe", a.shape[-1], PROBES, a.dtype, a.device)
        z = v.times(a, probes[None])
        self.image = v.lift(b, weight * z)
        self.z, self.scale = self.ragged.pad(z), self.ragged.pad(weight)
        gram_b, self.gram_a = route.client_grams
        self.gram_b = self.scale * gram_b * self.scale.mT

    def __call__(self, added: Tensor, seen: Tensor) -> Tensor:
        reached, self.reached = self.reached, []
        if self.total is not None:
            return (self.total - seen).clamp(min=0)
        v = self.v
        columns = self.scale * self.ragged.pad(torch.cat(reached, -1))
        self.gram_b = self.gram_b - columns @ columns.mT
        self.image = self.image - v.lift(added.mT, v.times(added.mT, self.image))
        own = (self.z * (self.gram_b @ self.z)).sum((-3, -2))
        own_exact = (self.gram_b * self.gram_a).sum((-3, -2, -1))
        each = self.image.square().sum(-2, dtype=torch.float64)
        spread = own - own.mean(-1, keepdim=True)
        slope = (spread * each).sum(-1) / spread.square().sum(-1).clamp(min=1e-300)
        return (each.mean(-1) - slope * (own.mean(-1) - own_exact)).clamp(min=0)


def start_block(side: Side, rank: int, how: Iteration, *known: Tensor | None) -> Tensor:
    """(1, d, k): columns known to matter, zero ones left out, then seeded signs of this side.

    At least `oversample` signs, and R + oversample columns in all; the whole space where d is no
    larger than that.
    """
    rows, count = side.rows, rank + how.oversample
    d = rows.shape[-1]
    given = [x[..., (x != 0).any(-2)[0]].to(rows.dtype) for x in known if x is not None]
    if count < d:
        count = max(count - sum(x.shape[-1] for x in given), how.oversample)
    signs = start_matrix(how.seed, side.name, d, count, rows.dtype, rows.device)[None]
    return torch.cat([*given, signs], -1) if given and count < d else signs


def principal_krylov(
    v: Vocabulary,
    side: Side,
    voters: Coordinates,
    rank: int,
    how: Iteration,
    warm: Tensor | None = None,
    coef: Tensor | None = None,
    other: Side | None = None,
    known: Tensor | None = None,
) -> Principal:
    """Eigenpairs of M Mᵀ by block Krylov on M = [xᵀ T √c, extra]; arguments as `principal_gram`.

    The first block is M·orth(Mᵀ Ω): the range of M Mᵀ Ω without squaring its small directions
    into rounding. Ω holds directions that are most of the answer, `known` or else the anchor's,
    and seeded signs.
    """
    rows, ragged, extra = side.rows, side.ragged, voters.extra

    def apply(z: Tensor) -> Tensor:
        in_rows, in_extra = z.split([ragged.rows, extra.shape[-1]], -2)
        return v.lift(rows, voters.unfold(ragged, in_rows)) + v.combine(extra, in_extra)

    def apply_t(y: Tensor) -> Tensor:
        return torch.cat([voters.fold(ragged, v.times(rows, y)), v.inner(extra, y)], -2)

    trace = voters.trace(ragged)

    def unseen(block: Tensor, seen: Tensor) -> Tensor:
        return (trace - seen).clamp(min=0)

    def held(pairs: Tensor) -> Tensor:
        if coef is None or other is None:  # no update: all alike
            return torch.ones_like(pairs[..., 0, :], dtype=torch.float64)
        reach = v.lift(other.rows, coef[..., None] * v.times(rows, pairs))
        return reach.double().square().sum(-2)

    first = start_block(side, rank, how, extra if known is None else known, warm)
    start = apply(whiten(v, apply_t(first), 1e-14))
    ritz = block_krylov(
        Operator(apply, apply_t, v, v, working(rows.dtype)),
        start,
        unseen,
        rank,
        how,
        SETTLED,
        held,
    )
    pairs = v.combine(ritz.basis, ritz.vectors[..., : rank + how.oversample])
    lam = ritz.theta[..., : rank + how.oversample]
    basis = fill(orthonormalise(v, pairs[..., :rank]), rank)
    return Principal(basis, lam, held(pairs), trace, ritz.steps)
