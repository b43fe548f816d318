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

from ..linalg.orthonormal import Space, whiten

__all__ = ["Iteration", "Operator", "Ritz", "block_krylov"]

# Share of the contract that an adaptive run uses up: what is still to be gained is an estimate.
SAFE = 0.8


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
    settled: float | None = None,
    held: Callable[[Tensor], Tensor] | None = None,
) -> Ritz:
    """Block Krylov iteration for the leading left singular space of an operator O.

    Adaptive runs stop when further steps gain too little: less than `tol` of the energy found,
    moving the error √(1 − captured) by less than tol + error/100 (four fifths of each). Before a
    step the gain to come is bounded by the energy outside the basis, and once two steps have gained
    by twice what gains falling at their rate would add up to; half-way through it, by what
    `_ahead` expects of it and of gains that go on falling at that rate (by 4 at most in the first
    two steps, where they fall fastest).

    Parameters
    ----------
    start : Tensor (1, d, k)
        First block, O times something intrinsic.
    unseen : callable (block, seen) → (1,)
        ‖(I − QQᵀ)O‖_F² or an estimate, called with the columns that Q has got since the last
        call, and seen = ‖QᵀO‖_F² over all of them.
    settled : float, optional
        For vectors that something else is made of: they too must have come to rest, to a mean
        squared sine of settled · tol². What U and V capture together is of first order in the sine.
    held : callable (d, R) → (1, R), optional
        The energies by which that mean weighs the vectors; by default their own.
    """
    eps = torch.finfo(o.dtype).eps
    drop = max((64 * eps) ** 2, 1e-14)
    adaptive = how.power_iters < 0
    steps = how.most if adaptive else how.power_iters
    # Exactness needs every direction above 8·u32; a later block, O Oᵀ q, cannot bring it back.
    q = whiten(o.left, start, max((4 * eps) ** 2, 1e-14), noise=o.noise)
    last = o.apply_t(q)
    basis, images = Columns(q, steps + 1), Columns(last, steps + 1)
    h = o.right.inner(last, last)
    found = gained = 0.0
    known = 0
    limit = min(q.shape[-2], last.shape[-2])
    for step in range(steps + 1):
        seen = h.diagonal(dim1=-2, dim2=-1).sum(-1)
        done = step == steps or int((h.diagonal(dim1=-2, dim2=-1) > 0).sum()) >= limit
        if done or adaptive:
            outside = unseen(basis.all[..., known:], seen)
            known = basis.all.shape[-1]
            theta, vectors = o.left.eigh(h)
        if done:
            break
        if adaptive:
            total, now = max(float(seen + outside), 1e-300), float(theta[..., :rank].sum())
            previous, gained, found = gained, now - found, now
            bound = float(outside)
            if step > 1 and settled is None:
                rate = min(max(gained / max(previous, 1e-300), 0.0), 0.9)
                bound = min(bound, 2 * gained * rate / (1 - rate))
            if _little(bound, found, total, how.tol):
                break
        w = o.apply(last)
        size = h[..., -q.shape[-1] :].square().sum(-2)  # of what w's columns have inside the basis
        w = o.left.without(basis.all, w)
        if adaptive:
            last_rows = vectors[..., -q.shape[-1] :, :rank]
            gains, turns = _ahead(theta, last_rows, o.left.inner(w, w))
            gain = float(gains.sum())
            rate = min(gain / max(gained, 1e-300), 0.9) if step else 0.0
            more = 1 / (1 - max(rate, 0.25 if step < 2 else 0.0))
            if _little(min(more * gain, bound), found, total, how.tol):
                if settled is None:
                    break
                leading = vectors[..., :rank]
                energy = (
                    theta[..., :rank] if held is None else held(o.left.combine(basis.all, leading))
                )
                turn = (energy * turns).sum() / energy.sum().clamp(min=1e-300)
                if more * float(turn) < settled * how.tol**2:
                    break
        w = o.left.without(basis.all, w)
        q = whiten(o.left, w, drop, size, o.noise, basis.all)
        last = o.apply_t(q)
        basis.append(q)
        images.append(last)
        edge = o.right.inner(images.all, last)
        h = torch.cat([torch.cat([h, edge[..., : -q.shape[-1], :]], -1), edge.mT], -2)
    return Ritz(basis.all, images.all, theta, vectors, seen + outside, step)


def _little(gain: float, found: float, total: float, tol: float) -> bool:
    """Whether a gain in energy is too small to matter."""
    error = math.sqrt(max(0.0, 1 - found / total))
    left = math.sqrt(max(0.0, 1 - (found + gain) / total))
    return gain < SAFE * tol * found and error - left < SAFE * (tol + 0.01 * error)


def _ahead(theta: Tensor, last: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """What the leading eigenpairs are about to gain from a block W that joins the basis.

    Ritz pair k has the residual W·last_k, r_k² = ‖W last_k‖², and against a new direction of
    Rayleigh quotient ν it grows to the larger eigenvalue of [[θ_k, r_k], [r_k, ν]]; ν lies
    between 0 and about the first value left out, and half of that is taken.

    Parameters
    ----------
    theta : Tensor (1, m)
    last : Tensor (1, k, R)
        Rows of the last block in the leading eigenvectors.
    gram : Tensor (1, k, k)
        WᵀW.

    Returns
    -------
    gains, turns : Tensor (1, R)
        Of the eigenvalues; of the vectors: gain_k/(θ_k − ν), about a squared sine.
    """
    rank = last.shape[-1]
    r2 = (last * (gram @ last)).sum(-2)
    gap = theta[..., :rank] - theta[..., rank : rank + 1].sum(-1, keepdim=True) / 2
    gains = ((gap.square() + 4 * r2).sqrt() - gap) / 2
    present = gap > 0
    return gains, gains / gap.where(present, 1.0) * present


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
