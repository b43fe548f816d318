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
from .vocabulary import Vocabulary, working

__all__ = ["Iteration", "KrylovRoute", "principal_krylov"]

PROBES = 32
# N²(d_out + d_in) up to which N × N Gram matrices cost less than two milliseconds.
CHEAP = 2**28


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
    unseen : callable (block, seen) → (1,)
        ‖(I − QQᵀ)O‖_F² or an estimate, called once for every block of Q as it is added, with
        seen = ‖QᵀO‖_F² over all of them.
    """
    drop = max((64 * torch.finfo(start.dtype).eps) ** 2, 1e-14)
    steps = how.most if how.power_iters < 0 else how.power_iters
    q = whiten(v, start, drop)
    last = apply_t(q).double()
    basis, images = Columns(q, steps + 1), Columns(last, steps + 1)
    h = v.inner(last, last)
    found = gained = 0.0
    limit = min(q.shape[-2], last.shape[-2])
    for step in range(steps + 1):
        theta, vectors = v.eigh(h)
        seen = theta.sum(-1)
        outside = unseen(q, seen)
        if step == steps or basis.all.shape[-1] >= limit:
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
        size = w.square().sum((-2, -1)).double()
        for _ in range(2):
            w = w - v.lift(basis.all.mT, v.times(basis.all.mT, w))
        q = whiten(v, w, drop, size)
        last = apply_t(q).double()
        basis.append(q)
        images.append(last)
        edge = v.inner(images.all, last)
        h = torch.cat([torch.cat([h, edge[..., : -q.shape[-1], :]], -1), edge.mT], -2)
    return Ritz(basis.all, images.all, theta, vectors, seen + outside, step)


class Columns:
    """Blocks of columns side by side, (L, d, k · blocks) at most, in (L, columns, d) memory."""

    def __init__(self, block: Tensor, blocks: int) -> None:
        modules, d, k = block.shape
        self._memory = block.new_empty(modules, k * blocks, d)
        self._width = 0
        self.append(block)

    def append(self, block: Tensor) -> None:
        end = self._width + block.shape[-1]
        self._memory[:, self._width : end] = block.mT
        self._width = end

    @property
    def all(self) -> Tensor:
        return self._memory[:, : self._width].mT


class KrylovRoute:
    """Randomized solutions for stacks too tall for N × N eigenproblems; one module at a time.

    Cost per module, side and power step: 4 N d k flops with k = R + oversample columns.
    """

    def __init__(self, v: Vocabulary, left: Side, right: Side, how: Iteration) -> None:
        self.v = v
        self.left, self.right = left, right
        self.how = how

    @cached_property
    def _client_grams(self) -> tuple[Tensor, Tensor]:
        ragged = self.left.ragged
        return self.v.gram(self.left.rows, ragged), self.v.gram(self.right.rows, ragged)

    @cached_property
    def _grams(self) -> tuple[Tensor, Tensor] | None:
        """Both N × N Gram matrices in the working precision, where they cost next to nothing."""
        b, a = self.left.rows, self.right.rows
        if b.shape[-2] ** 2 * (b.shape[-1] + a.shape[-1]) > CHEAP:
            return None
        return self.v.times(b, b.mT), self.v.times(a, a.mT)

    def client_grams(self) -> tuple[Tensor, Tensor]:
        return self._client_grams

    def spectrum(self, coef: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        how = self.how
        if self._grams is None:  # one step tells enough where steps are dear
            how = replace(how, power_iters=min(1, how.power_iters), most=1)
        ritz = self._iterate(coef, rank, None, how)
        return fill(ritz.theta, rank + 1).sqrt(), ritz.total.sqrt()

    def triplets(self, coef: Tensor, rank: int, warm: Tensor | None = None) -> Triplets:
        v, dtype = self.v, working(self.left.rows.dtype)
        ritz = self._iterate(coef, rank, warm, self.how)
        leading = ritz.vectors[..., :rank]
        x = orthonormalise(v, v.combine(ritz.basis, leading))
        y = orthonormalise(v, v.combine(ritz.images, leading).to(dtype))
        sigma = fill(ritz.theta, rank + 1).sqrt()
        return Triplets(fill(x, rank), fill(y, rank), sigma, ritz.total.sqrt(), ritz.steps)

    def _iterate(self, coef: Tensor, rank: int, warm: Tensor | None, how: Iteration) -> Ritz:
        v, b, a = self.v, self.left.rows, self.right.rows
        weight = coef[..., None]
        outside = Outside(self, weight)

        def apply(z: Tensor) -> Tensor:
            return v.lift(b, weight * v.times(a, z))

        def apply_t(y: Tensor) -> Tensor:
            outside.reached = v.times(b, y)
            return v.lift(a, weight * outside.reached)

        start = apply(start_block(self.right, rank, how, warm))
        return block_krylov(v, apply, apply_t, start, outside, rank, how)

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


class Outside:
    """‖(I − QQᵀ)W̄‖² for a Q that grows block by block: a call adds a block.

    From N × N Gram matrices where they are cheap, otherwise estimated with seeded signs; the
    clients' own parts Σ_i ‖(I − QQᵀ)w_iΔW_i‖², whose exact sum r × r matrices give, then serve as
    control variate.

    Attributes
    ----------
    reached : Tensor (1, N, k)
        b · block of the block to be added; the iteration has it anyway and leaves it here.
    """

    reached: Tensor

    def __init__(self, route: KrylovRoute, weight: Tensor) -> None:
        self.v, self.ragged = route.v, route.left.ragged
        self.total: Tensor | None = None
        if route._grams is not None:
            gram_b, gram_a = route._grams
            self.total = (weight * gram_b * weight.mT * gram_a).sum((-2, -1))
            return
        a = route.right.rows
        probes = sign_matrix(route.how.seed, "probe", a.shape[-1], PROBES, a.dtype, a.device)
        z = self.v.times(a, probes[None])
        self.image = self.v.lift(route.left.rows, weight * z)
        self.z, self.scale = self.ragged.pad(z), self.ragged.pad(weight)
        gram_b, self.gram_a = route.client_grams()
        self.gram_b = self.scale * gram_b * self.scale.mT

    def __call__(self, block: Tensor, seen: Tensor) -> Tensor:
        if self.total is not None:
            return (self.total - seen).clamp(min=0)
        v = self.v
        columns = self.scale * self.ragged.pad(self.reached)
        self.gram_b = self.gram_b - columns @ columns.mT
        self.image = self.image - v.lift(block.mT, v.times(block.mT, self.image))
        own = (self.z * (self.gram_b @ self.z)).sum((-3, -2))
        own_exact = (self.gram_b * self.gram_a).sum((-3, -2, -1))
        each = self.image.double().square().sum(-2)
        spread = own - own.mean(-1, keepdim=True)
        slope = (spread * each).sum(-1) / spread.square().sum(-1).clamp(min=1e-300)
        return (each.mean(-1) - slope * (own.mean(-1) - own_exact)).clamp(min=0)


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

    def unseen(block: Tensor, seen: Tensor) -> Tensor:
        return (trace - seen).clamp(min=0)

    # The anchor's directions are most of the answer: they start the iteration beside the signs.
    first = start_block(side, rank, how, warm)
    known = int((extra != 0).any(-2).sum())
    image = apply_t(torch.cat([extra[..., :known], first[..., : first.shape[-1] - known]], -1))
    start = apply(whiten(v, image, 1e-14))
    ritz = block_krylov(v, apply, apply_t, start, unseen, rank, how)
    pairs = v.combine(ritz.basis, ritz.vectors[..., : rank + how.oversample])
    lam = ritz.theta[..., : rank + how.oversample]
    energies = torch.zeros_like(lam)
    if coef is not None and other is not None:
        reach = v.lift(other.rows, coef[..., None] * v.times(rows, pairs))
        energies = reach.double().square().sum(-2)
    basis = fill(orthonormalise(v, pairs[..., :rank]), rank)
    return Principal(basis, lam, energies, trace, ritz.steps)
