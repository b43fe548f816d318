"""Orthonormal bases of tall matrices through small Gram matrices, rank-safe."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .vocabulary import Vocabulary

__all__ = ["Space", "gram_schmidt", "orthonormalise", "triangular", "whiten"]


# Squared length over its own rounding from which one pass leaves a direction orthogonal to 1e-4.
CLEAR = 256.0
# Squares of the columns over those of a direction they add up to, from which an fp32 sum is not
# orthonormal enough; the 1.5th power of it is too much for an fp64 sum, whose Gram matrix rounds.
CANCELS = 1e6


class Space(Protocol):
    """Where blocks of columns live: tall vectors (a `Vocabulary`), or coordinates with a metric."""

    def inner(self, y: Tensor, z: Tensor) -> Tensor:
        """(L, k, m) fp64: inner products of the columns."""
        ...

    def combine(self, y: Tensor, c: Tensor) -> Tensor:
        """y c for a small fp64 c (L, k, m)."""
        ...

    def without(self, basis: Tensor, w: Tensor) -> Tensor:
        """w less its component in the span of an orthonormal basis."""
        ...

    def eigh(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenpairs of a small PSD matrix, as the vocabulary's."""
        ...


def orthonormalise(space: Space, y: Tensor) -> Tensor:
    """Gram–Schmidt in column order by CholeskyQR with fp64 Gram matrices.

    Leading columns are not touched by later ones; zero columns stay zero, and a column that
    depends on earlier ones to 1e-6 becomes zero. Rounds are repeated until the columns were
    within 1e-2 of orthogonal before the last; where the Cholesky factorisation fails, `whiten`
    takes over.
    """
    for _ in range(4):
        gram = space.inner(y, y)
        norm2 = gram.diagonal(dim1=-2, dim2=-1)
        alive = norm2 > 0
        scale = torch.where(alive, norm2, 1.0).rsqrt() * alive
        unit = scale[..., :, None] * gram * scale[..., None, :] + torch.diag_embed(~alive * 1.0)
        r, info = torch.linalg.cholesky_ex(unit, upper=True)
        if bool(info.any()):
            return whiten(space, y, 1e-12, again=False)
        dependent = r.diagonal(dim1=-2, dim2=-1) < 1e-6
        if bool(dependent.any()):
            y = y * ~dependent[..., None, :]
            continue
        identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device).expand_as(r)
        inverse = torch.linalg.solve_triangular(r, identity, upper=True)
        y = space.combine(y, scale[..., :, None] * inverse)
        if bool(((unit - identity).abs() < 1e-2).all()):
            break
    return y


def whiten(
    space: Space,
    y: Tensor,
    drop: float,
    reference: Tensor | None = None,
    noise: Tensor | None = None,
    basis: Tensor | None = None,
    again: bool = True,
) -> Tensor:
    """An orthonormal basis of y's range, directions below √drop of the largest left out (zero).

    What an ill-conditioned y would lose to its own rounding is summed in fp64; a second pass
    repairs what that cannot, and what noise and a basis did.

    Parameters
    ----------
    y : Tensor (L, d, k)
    drop : float
        Relative to the largest eigenvalue of yᵀy, or to what `reference`, a squared length for
        every column (L, k), gives a direction where that is larger.
    noise : Tensor (L,), optional
        Squared length that rounding may give to unit coordinates; directions below it go too.
    basis : Tensor (L, d, m), optional
        What y has been made orthogonal to: a second pass does so again, and leaves out what that
        takes more than half of.
    again : bool
        Whether a second pass may follow.
    """
    gram = space.inner(y, y)
    lam, vec = space.eigh(gram)
    top = lam[..., :1]
    if reference is not None:
        top = torch.maximum(top, (vec.square() * reference[..., None]).sum(-2))
    rounding = 0 * lam if noise is None else noise[..., None] * (vec * (y.mT @ y @ vec)).sum(-2)
    kept = (lam > drop * top) & (lam > rounding)
    scale = torch.where(kept, lam, 1.0).rsqrt() * kept
    columns = gram.diagonal(dim1=-2, dim2=-1)[..., None]
    cancels = ((vec.square() * columns).sum(-2) * scale.square()).amax(-1)
    poor = bool((cancels > CANCELS).any())
    q = space.combine(y.double() if poor else y, vec * scale[..., None, :]).to(y.dtype)
    limit = CANCELS**1.5 if basis is None and noise is None else CANCELS
    unsure = (cancels > limit) | (kept & (lam < CLEAR * rounding)).any(-1)
    if not again or not bool(unsure.any()):
        return q
    if basis is not None:
        q = space.without(basis, q)
        q = q * (space.inner(q, q).diagonal(dim1=-2, dim2=-1) > 0.25)[..., None, :]
    return orthonormalise(space, q)


def gram_schmidt(v: Vocabulary, y: Tensor, passes: int = 1) -> Tensor:
    """Gram–Schmidt in column order without looking at a value: a fixed number of passes.

    Zero columns stay zero, and a column that depends on earlier ones to 1e-6 becomes zero. One
    pass loses orthogonality by the roundoff times y's condition; two repair it.
    """
    for _ in range(passes):
        y = v.combine(y, v.triangular(v.inner(y, y), 1e-12))
    return y


def triangular(g: Tensor, drop: float) -> Tensor:
    """W (…, n, n) upper triangular with Wᵀ g W = 1, column by column, in place.

    Parameters
    ----------
    g : Tensor (…, n, n) fp64
        Positive semidefinite.
    drop : float
        What is left of a column's squared length, as a fraction, below which it counts as zero;
        so does a column 1e-12 times the longest.
    """
    norm2 = g.diagonal(dim1=-2, dim2=-1)
    alive = norm2 > 1e-24 * norm2.amax(-1, keepdim=True)
    scale = torch.where(alive, norm2, 1.0).rsqrt() * alive
    x = scale[..., :, None] * g * scale[..., None, :]
    for j in range(g.shape[-1]):
        pivot = x[..., j, j, None]
        kept = pivot > drop
        pivot = torch.where(kept, pivot, 1.0)
        row = x[..., j, j + 1 :] / pivot * kept
        column = x[..., :, j].clone()
        x[..., :, j + 1 :] -= column[..., :, None] * row[..., None, :]
        x[..., j, j + 1 :] = -row
        column[..., j] = 1
        x[..., :, j] = column * pivot.rsqrt() * kept
    return scale[..., :, None] * x.triu()
