"""Block Krylov iteration for the leading singular space of an operator, in any space.

The first block comes from outside: an image of something intrinsic, so that the iterates are as
gauge-invariant as what they approximate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .tall import Space, whiten

__all__ = ["Iteration", "Operator", "Ritz", "block_krylov"]


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
    images : Tensor (L, n, m)
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


@dataclass(frozen=True)
class Operator:
    """A linear map O (d × n) and the spaces its two sides live in.

    Attributes
    ----------
    apply, apply_t : callable
        O z and Oᵀ y for blocks of columns.
    left, right : Space
    dtype : torch.dtype
        The precision of the products, whatever blocks are kept in.
    noise : Tensor (L,), optional
        Squared length on the left that rounding may give to unit coordinates; without it the
        coordinates are the vectors.
    """

    apply: Callable[[Tensor], Tensor]
    apply_t: Callable[[Tensor], Tensor]
    left: Space
    right: Space
    dtype: torch.dtype
    noise: Tensor | None = None


def block_krylov(
    o: Operator,
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
    start : Tensor (1, d, k)
        First block, O times something intrinsic.
    unseen : callable (block, seen) → (1,)
        ‖(I − QQᵀ)O‖_F² or an estimate, called once for every block of Q as it is added, with
        seen = ‖QᵀO‖_F² over all of them.
    """
    drop = max((64 * torch.finfo(o.dtype).eps) ** 2, 1e-14)
    steps = how.most if how.power_iters < 0 else how.power_iters
    q = whiten(o.left, start, drop, noise=o.noise)
    last = o.apply_t(q)
    basis, images = Columns(q, steps + 1), Columns(last, steps + 1)
    h = o.right.inner(last, last)
    found = gained = 0.0
    limit = min(q.shape[-2], last.shape[-2])
    for step in range(steps + 1):
        theta, vectors = o.left.eigh(h)
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
        w = o.apply(last)
        size = h[..., -q.shape[-1] :].square().sum((-2, -1))  # of what w has inside the basis
        for _ in range(2):
            w = o.left.without(basis.all, w)
        q = whiten(o.left, w, drop, size, o.noise, basis.all)
        last = o.apply_t(q)
        basis.append(q)
        images.append(last)
        edge = o.right.inner(images.all, last)
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
