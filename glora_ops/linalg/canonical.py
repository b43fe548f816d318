"""Canonical forms from Gram matrices: ΔW_i = Q_i Σ_i Z_iᵀ with Q_i = B_i T_U, Z_i = A_iᵀ T_V.

Everything here is r × r (or N × N) and fp64; the long dimension never appears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .eigen import cholesky_ex

__all__ = [
    "Balanced",
    "Forms",
    "balance",
    "canonical_forms",
    "factor_coordinates",
    "orthonormal_coordinates",
    "positive",
    "soft_votes",
]

U64 = 2.0**-53  # unit roundoff of fp64
Eigh = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Balanced:
    """A pair of Gram matrices after dead pairs were dropped and the others balanced.

    Attributes
    ----------
    gram_b, gram_a : Tensor (..., r, r) fp64
        D BᵀB D and D⁻¹ A Aᵀ D⁻¹.
    d : Tensor (..., r) fp64
        The diagonal of D: powers of two, zero for a dropped pair.
    """

    gram_b: Tensor
    gram_a: Tensor
    d: Tensor

    @property
    def d_inverse(self) -> Tensor:
        return torch.where(self.d > 0, 1 / self.d, 0.0)

    @property
    def size(self) -> Tensor:
        """(...): Σ_j ‖b_j‖‖a_j‖, which is ‖B‖_F ‖A‖_F after exact balancing."""
        return (_diagonal(self.gram_b) * _diagonal(self.gram_a)).sqrt().sum(-1)


@dataclass(frozen=True)
class Forms:
    """Canonical coordinates of a batch of factor pairs.

    Attributes
    ----------
    t_u, t_v : Tensor (..., r, r) fp64
        Q = B T_U and Z = Aᵀ T_V have orthonormal (or zero) columns.
    sigma : Tensor (..., r) fp64
        Singular values of B·A, descending; zero where a direction was dropped.
    """

    t_u: Tensor
    t_v: Tensor
    sigma: Tensor


def _diagonal(g: Tensor) -> Tensor:
    return g.diagonal(dim1=-2, dim2=-1)


def balance(gram_b: Tensor, gram_a: Tensor) -> Balanced:
    """Drop pairs with a zero factor, balance the rest by exact powers of two (3.1).

    D_j⁴ = ‖a_j‖²/‖b_j‖² rounded to an exponent divisible by four, so that rescaling a pair by a
    power of two changes D by exactly its inverse and nothing else by a single bit.
    """
    norm_b, norm_a = _diagonal(gram_b), _diagonal(gram_a)
    alive = (norm_b > 0) & (norm_a > 0)
    ratio = torch.where(alive, norm_a, 1.0) / torch.where(alive, norm_b, 1.0)
    exponent = (torch.frexp(ratio).exponent + 1) >> 2
    d, d_inverse = (torch.exp2(e.double()) * alive for e in (exponent, -exponent))
    return Balanced(
        d[..., :, None] * gram_b * d[..., None, :],
        d_inverse[..., :, None] * gram_a * d_inverse[..., None, :],
        d,
    )


def orthonormal_coordinates(t: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """T R⁻¹ with RᵀR = Tᵀ G T: one Cholesky clean-up, leading directions untouched by later ones.

    Zero columns stay zero. Where the factorisation fails T is returned as it is.
    """
    g = t.mT @ gram @ t
    _diagonal(g).add_(~kept)
    lower, info = cholesky_ex(g)
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    lower = torch.where((info == 0)[..., None, None], lower, identity)
    return torch.linalg.solve_triangular(lower.mT, t, upper=True, left=False)


def canonical_forms(pair: Balanced, eigh: Eigh) -> Forms:
    """Canonical coordinates of B·A, for the *unbalanced* factors, from their Gram matrices (3.2).

    eigh(G_A) = V Λ Vᵀ, F = √Λ Vᵀ; eigh(F G_B Fᵀ) = Y σ² Yᵀ; T_U = Fᵀ Y/σ, T_V = G_B T_U/σ.

    Parameters
    ----------
    pair : Balanced
    eigh : callable
        The device's eigensolver.

    Notes
    -----
    σ² carries a backward error of order 2⁻⁵³‖G_A‖‖G_B‖; directions within 16·r of that are
    dropped. They are below 1e-7·‖B‖‖A‖, the last digits of fp32 factors.
    """
    lam, vec = eigh(pair.gram_a)
    f = lam.sqrt()[..., :, None] * vec.mT
    sigma2, y = eigh(f @ pair.gram_b @ f.mT)
    rank = pair.d.shape[-1]
    noise = 16 * rank * U64 * lam[..., :1] * torch.linalg.matrix_norm(pair.gram_b)[..., None]
    kept = sigma2 > noise
    sigma = (sigma2 * kept).sqrt()
    inverse = (kept / torch.where(kept, sigma, 1.0))[..., None, :]
    t_u = f.mT @ y * inverse
    t_v = pair.gram_b @ t_u * inverse
    t_u = orthonormal_coordinates(t_u, pair.gram_b, kept)
    t_v = orthonormal_coordinates(t_v, pair.gram_a, kept)
    return Forms(pair.d[..., :, None] * t_u, pair.d_inverse[..., :, None] * t_v, sigma)


def factor_coordinates(gram: Tensor, eigh: Eigh) -> Tensor:
    """T (..., r, r) with x_iᵀ T_i an orthonormal basis of client i's row space.

    The plain form, from one factor alone: rows balanced to unit size by powers of two, rank cut
    at λ ≤ 16·r·2⁻⁵³·λ₁ of the balanced Gram matrix.
    """
    norm = gram.diagonal(dim1=-2, dim2=-1)
    half = torch.frexp(norm).exponent.div(2, rounding_mode="floor")
    d = torch.where(norm > 0, torch.exp2(-half.double()), 0.0)
    balanced = d[..., :, None] * gram * d[..., None, :]
    lam, vec = eigh(balanced)
    kept = lam > 16 * gram.shape[-1] * U64 * lam[..., :1]
    t = vec * torch.where(kept, lam, 1.0).rsqrt()[..., None, :] * kept[..., None, :]
    return d[..., :, None] * orthonormal_coordinates(t, balanced, kept)


def soft_votes(sigma: Tensor, tau: Tensor) -> Tensor:
    """f(σ) = σ²/(σ² + τ²), f(0) = 0 (4.1), as a squared sine: no square under- or overflows."""
    return torch.atan2(sigma, tau).sin().square()


def positive(x: Tensor) -> Tensor:
    """x ≥ 0, lifted off zero: what zeros may be divided by."""
    return x.clamp(min=1e-300)
