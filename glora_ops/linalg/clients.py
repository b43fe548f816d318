"""Canonical forms and votes of all clients of a round, from their Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .canonical import balance, soft_votes
from .ragged import Ragged
from .vocabulary import Vocabulary

__all__ = ["Clients", "canonicalize"]


@dataclass(frozen=True)
class Clients:
    """Canonical forms of all clients, ΔW_i = Q_i Σ_i Z_iᵀ, and what was learnt on the way.

    Attributes
    ----------
    t_u, t_v : Tensor (L, N, r_max) fp64
    sigma, f : Tensor (L, N) fp64
        Singular values (times |s_i|) and soft votes, descending within a client.
    size : Tensor (L, K)
        |s_i|‖B_i‖_F‖A_i‖_F after balancing.
    noise, tau : Tensor (L, K)
        Information limit ½·u_in·size, and τ_i.
    """

    t_u: Tensor
    t_v: Tensor
    sigma: Tensor
    f: Tensor
    size: Tensor
    noise: Tensor
    tau: Tensor


def canonicalize(
    v: Vocabulary,
    gram_b: Tensor,
    gram_a: Tensor,
    ragged: Ragged,
    scaling: Tensor,
    tau_rel: float,
    roundoff: float,
) -> Clients:
    """Canonical forms from the clients' Gram matrices (L, K, r, r)."""
    pair = balance(gram_b, gram_a)
    forms = v.canonical(pair, ragged)
    sigma = forms.sigma * scaling.abs()[..., None]
    voting = (sigma > 0)[..., None, :]
    size = scaling.abs() * pair.size
    noise = 0.5 * roundoff * size
    tau = torch.maximum(tau_rel * sigma[..., 0], noise)
    signed = forms.t_v * torch.where(scaling < 0, -1.0, 1.0)[..., None, None]

    def rows(blocks: Tensor) -> Tensor:
        return ragged.unpad(blocks[..., None])[..., 0]

    return Clients(
        ragged.unpad(forms.t_u * voting),
        ragged.unpad(signed * voting),
        rows(sigma),
        rows(soft_votes(sigma, tau)),
        size,
        noise,
        tau,
    )
