"""How much the spaces of several updates agree, whatever their ranks and gauges."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..packing import pack

__all__ = ["align", "canonical_bases", "mean_over_modules"]


def canonical_bases(
    pairs: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float]
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Canonical forms of one module: bases Q and Z (K, r, d), sigma and f (K, r); fp64."""
    packed = pack(pairs)
    scaling = torch.tensor(scalings, dtype=torch.float64)
    t_u, t_v, sigma, f = torch.ops.glora.canonicalize(packed.b, packed.a, packed.offsets, scaling)
    starts, rank = packed.offsets.tolist(), t_u.shape[-1]

    def basis(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack(
            [t[lo:hi].double().mT @ x[lo:hi].double() for lo, hi in pairwise(starts)]
        )

    def by_client(x: Tensor) -> Tensor:
        padded = x.new_zeros(len(pairs), rank)
        for i, (lo, hi) in enumerate(pairwise(starts)):
            padded[i, : hi - lo] = x[lo:hi]
        return padded

    return (basis(packed.b, t_u), basis(packed.a, t_v)), by_client(sigma), by_client(f)


def align(q: Tensor, f: Tensor) -> Tensor:
    """Mean squared cosine between the clients' spaces, softly weighted: (K, K), from 0 to 1.

    ⟨P_i, P_j⟩/Σ_k f_ik f_jk with P_i = Q_iᵀ diag(f_i) Q_i. The denominator is the most that the
    numerator can be (von Neumann), so a space within a larger one has alignment 1; with f = 1 on
    k_i directions this is ‖Q_i Q_jᵀ‖²_F/min(k_i, k_j).

    Parameters
    ----------
    q : Tensor (K, r, d)
        Orthonormal rows per client, or zero rows.
    f : Tensor (K, r)
        Votes, descending.
    """
    count, rank, _ = q.shape
    cosines = (q.flatten(0, 1) @ q.flatten(0, 1).mT).square().view(count, rank, count, rank)
    inner = torch.einsum("iajb,ia,jb->ij", cosines, f, f)
    most = f @ f.mT
    return torch.where(most > 0, inner / most.where(most > 0, 1.0), 0.0).clamp(max=1.0)


def mean_over_modules(alignments: Sequence[Tensor], energies: Tensor) -> Tensor:
    """Mean of (K, K) alignments over L modules, a pair's weight in a module being √(e_i e_j).

    e_i is the fraction of client i's own energy ‖ΔW_i‖² that lies in the module, so that a loud
    client counts no more than a quiet one. NaN where two clients share no module.

    Parameters
    ----------
    alignments : sequence of Tensor (K, K)
    energies : Tensor (K, L)
        ‖ΔW_i‖² per module.
    """
    total = energies.sum(1)
    own = (energies / total.where(total > 0, 1.0)[:, None]).sqrt()
    weights = own.T[:, :, None] * own.T[:, None, :]  # [L, K, K]
    return (weights / weights.sum(0) * torch.stack(list(alignments))).sum(0)
