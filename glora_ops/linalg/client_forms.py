"""Canonical forms and votes of all clients of a round, from their Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .canonical import Eigh, balance, canonical_forms, soft_votes
from .ragged import Ragged

__all__ = ["Clients", "canonicalize"]


@dataclass(frozen=True)
class Clients:
    """Canonical forms of all clients, ΔW_i = Q_i Σ_i Z_iᵀ (3.2), and what was learnt on the way.

    Attributes
    ----------
    ragged : Ragged
    t_u, t_v : Tensor (L, N, r_max) fp64
    sigma : Tensor (L, N) fp64
        Singular values (times |s_i|), descending within a client.
    size : Tensor (L, K)
        |s_i| Σ_j ‖b_j‖‖a_j‖ (3.1).
    noise, tau : Tensor (L, K)
        Information limit ½·u_in·size, and τ_i (4.1).
    """

    ragged: Ragged
    t_u: Tensor
    t_v: Tensor
    sigma: Tensor
    size: Tensor
    noise: Tensor
    tau: Tensor

    @cached_property
    def norm(self) -> Tensor:
        """(L, K): ‖ΔW_i‖_F."""
        return torch.linalg.vector_norm(self.ragged.pad(self.sigma[..., None]), dim=(-2, -1))

    @cached_property
    def t(self) -> Tensor:
        """(2, L, N, r_max): both sides."""
        return torch.stack([self.t_u, self.t_v])

    @cached_property
    def loudest(self) -> Tensor:
        """(L, K): σ₁ of each client."""
        return self.ragged.pad(self.sigma[..., None])[..., 0, 0]

    @cached_property
    def soft(self) -> Tensor:
        """(L, N): f(σ) of each direction (4.1)."""
        return soft_votes(self.sigma, self.ragged.per_row(self.tau))

    @cached_property
    def hard(self) -> Tensor:
        """(L, N) fp64: 1 for directions above the numerical rank, σ > 4·u_in·size (8.2)."""
        return (self.sigma > self.ragged.per_row(8 * self.noise)).double()


def canonicalize(
    eigh: Eigh,
    gram_b: Tensor,
    gram_a: Tensor,
    ragged: Ragged,
    scaling: Tensor,
    tau_rel: float,
    roundoff: float,
) -> Clients:
    """Canonical forms from the clients' Gram matrices (L, K, r, r), by the device's eigensolver."""
    pair = balance(gram_b, gram_a)
    forms = canonical_forms(pair, eigh)
    sigma = forms.sigma * scaling.abs()[..., None]
    voting = (sigma > 0)[..., None, :]
    size = scaling.abs() * pair.size
    noise = 0.5 * roundoff * size
    tau = torch.maximum(tau_rel * sigma[..., 0], noise)
    signed = forms.t_v * torch.where(scaling < 0, -1.0, 1.0)[..., None, None]
    return Clients(
        ragged,
        ragged.unpad(forms.t_u * voting),
        ragged.unpad(signed * voting),
        ragged.unpad(sigma[..., None])[..., 0],
        size,
        noise,
        tau,
    )
