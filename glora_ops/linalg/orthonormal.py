"""Orthonormal bases of tall matrices through small Gram matrices, without looking at a value."""

from __future__ import annotations

import torch
from torch import Tensor

from .vocabulary import Vocabulary

__all__ = ["cholesky_qr", "inverse_cholesky", "straightened"]

# What is left of a column's squared length below which it depends on earlier ones: 1e-6 of it.
DEPENDENT = 1e-12


def cholesky_qr(v: Vocabulary, y: Tensor, passes: int = 1) -> Tensor:
    """An orthonormal basis in column order, by a fixed number of CholeskyQR passes.

    Leading columns are not touched by later ones. Zero columns stay zero, and a column that
    depends on earlier ones to 1e-6 becomes zero. One pass loses orthogonality by the roundoff
    times y's condition; two repair it (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya 2015).
    """
    for _ in range(passes):
        y = v.combine(y, v.inverse_cholesky(v.inner(y, y), DEPENDENT))
    return y


def straightened(v: Vocabulary, y: Tensor) -> Tensor:
    """Nearly orthonormal columns made so in their order, by Householder, and none turned back."""
    q, r = v.qr(y)
    q = q * r.diagonal(0, -2, -1).sign()[..., None, :]
    return torch.nn.functional.pad(q, (0, y.shape[-1] - q.shape[-1]))


def inverse_cholesky(g: Tensor, drop: float) -> Tensor:
    """W (…, n, n) upper triangular with Wᵀ g W = 1, column by column: R⁻¹ of g = RᵀR, rank-safe.

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
