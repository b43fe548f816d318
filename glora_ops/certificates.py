"""What an aggregation says about itself: how much it kept, and whether its cut was well defined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .solvers.base import Principal

__all__ = ["CLIENT_STATS", "STATS", "U32", "Cut", "certify", "information_vote"]

U32 = 2.0**-24

#: Columns of `aggregate`'s `stats`, in order.
STATS = (
    "captured",  # ‖C‖²/‖W̄‖²: the fraction of the mean update's energy that the state holds
    "attainable",  # the same fraction for the best possible state of this rank
    "norm",  # ‖W̄‖_F
    "voices",  # clients whose update is not zero
    "gap_u",  # (λ_R − λ_{R+1})/λ_R of the left mean projector; 1 where nothing is cut
    "gap_v",  # the same on the right
    "gap_w",  # (σ_R − σ_{R+1})/σ_R of the anchor's mean (consensus) or of W̄ (update)
    "kappa_p",  # first-order sensitivity of U Uᵀ W̄ V Vᵀ to the mean projectors
    "kappa_w",  # σ_R/(σ_R − σ_{R+1}) of the anchor's mean (consensus) or of W̄ (update)
    "ambiguous",  # 1 where the cut falls into a tie: the state is then one of several equals
    "rho_max",  # largest ‖B_i‖_F‖A_i‖_F/σ₁: how badly the worst client is stored
    "info_limited",  # clients whose vote is softened by their storage precision, not by tau_rel
    "effective_rank",  # singular values of the state above rounding
    "storage_scale",  # S = Σ w_i|s_i|‖B_i‖_F‖A_i‖_F, the unit of rounding errors
    "power_iters",  # power iterations taken (0 on the exact route)
    "krylov",  # 0: exact Gram route, 1: randomized block Krylov route
)

#: Columns of `aggregate`'s `client_stats`, in order.
CLIENT_STATS = (
    "norm",  # ‖ΔW_i‖_F
    "align_u",  # ‖Uᵀ Q_i‖²_F/k_i, over the k_i directions of the client above storage noise
    "align_v",  # the same for its row space
    "share",  # w_i⟨Uᵀ ΔW_i V, C⟩/‖C‖²: the client's share of the state's energy; sums to 1
)

# Eigenvalues below this fraction of the top are zero: the square of fp32 rounding, with a margin.
RESOLVED = 1e-12
FLAG_KAPPA = 1e-2
FLAG_GAP = 1e-3


def information_vote(votes: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
    """(L,): the largest vote that pure storage noise could earn, with a margin.

    A direction at a client's information limit, ½·u_in·|s|‖B‖‖A‖, has vote p_i f_i there.

    Parameters
    ----------
    votes, noise, tau : Tensor (L, K)
        Normalised weights of the clients, their information limits and their τ_i.
    """
    f = torch.where(noise > 0, noise.square() / (noise.square() + tau.square()), 0.0)
    return 4 * (votes * f).amax(-1)


@dataclass(frozen=True)
class Cut:
    """How well defined the choice of directions is, per module: gaps and sensitivities (L,)."""

    gap_u: Tensor
    gap_v: Tensor
    gap_w: Tensor
    kappa_p: Tensor
    kappa_w: Tensor

    def of_update(self, sigma: Tensor, rank: int, floor: Tensor) -> Cut:
        """With the cut of a mean update's singular values (L, ≥ R + 1), rounding below floor."""
        gap = cut_gap(sigma, rank, floor)
        kappa = torch.where(sigma[..., rank - 1] > floor, 1 / gap.clamp(min=1e-16), 0.0)
        return replace(self, gap_w=gap, kappa_w=kappa)

    def of_projectors(
        self, left: Principal, right: Principal, rank: int, noise: Tensor, norm: Tensor
    ) -> Cut:
        """With the cuts of the two mean projectors; eigenvalues up to noise count as zero."""
        gaps = [
            cut_gap(p.eigenvalues, rank, torch.maximum(noise, RESOLVED * p.eigenvalues[..., 0]))
            for p in (left, right)
        ]
        kappas = [ambiguity(p.eigenvalues, p.energies, rank, norm) for p in (left, right)]
        return replace(self, gap_u=gaps[0], gap_v=gaps[1], kappa_p=torch.maximum(*kappas))

    def ambiguous(self, roundoff: float) -> Tensor:
        """(L,) bool: rounding could move the result, or a relative gap has all but closed."""
        gap = torch.minimum(torch.minimum(self.gap_u, self.gap_v), self.gap_w)
        kappa = torch.maximum(self.kappa_p, self.kappa_w)
        return (kappa * roundoff > FLAG_KAPPA) | (gap < FLAG_GAP)


def certify(
    cut: Cut,
    core: Tensor,
    sigma: Tensor,
    norm: Tensor,
    present: Tensor,
    scale: Tensor,
    roundoff: float,
    **others: Tensor,
) -> Tensor:
    """`stats` (L, 16).

    Parameters
    ----------
    core : Tensor (L, R, R)
        C.
    sigma : Tensor (L, R)
        Leading singular values of W̄.
    norm, scale : Tensor (L,)
        ‖W̄‖_F and S.
    present : Tensor (L,) bool
        Whether W̄ is more than rounding.
    roundoff : float
        Of the working precision.
    **others : Tensor (L,)
        The remaining entries by name.
    """
    cut = replace(cut, kappa_p=torch.where(present, cut.kappa_p, 0.0))
    energy = torch.where(present, norm.square(), 1.0)
    held = torch.where(present, core.square().sum((-2, -1)) / energy, 1.0).clamp(max=1.0)
    best = torch.where(present, sigma.square().sum(-1) / energy, 1.0).clamp(max=1.0)
    values = others | {
        "captured": held,
        "attainable": torch.maximum(best, held),
        "norm": norm,
        "gap_u": cut.gap_u,
        "gap_v": cut.gap_v,
        "gap_w": cut.gap_w,
        "kappa_p": cut.kappa_p,
        "kappa_w": cut.kappa_w,
        "ambiguous": cut.ambiguous(roundoff),
        "storage_scale": scale,
    }
    return torch.stack([values[name].double() for name in STATS], -1)


def cut_gap(values: Tensor, rank: int, floor: Tensor) -> Tensor:
    """(L,): (x_R − x_{R+1})/x_R of descending values (L, m); 1 where nothing above floor is cut."""
    if values.shape[-1] <= rank:
        return torch.ones_like(floor)
    inside, outside = values[..., rank - 1], values[..., rank]
    cut = (inside > floor) & (outside > floor)
    return torch.where(cut, (inside - outside) / inside.where(cut, 1.0), 1.0)


def ambiguity(eigenvalues: Tensor, energies: Tensor, rank: int, norm: Tensor) -> Tensor:
    """κ_P (L,) of one side.

    κ_P² = Σ_{j ≤ R < k} (e_j + e_k)/((λ_j − λ_k)² ‖W̄‖²), over eigenpairs above 1e-12 of the top:
    the first-order change of the projected mean when the mean projector moves by a unit. A
    distance counts as 32·u32 at least, where a perturbation of that size has swapped the two
    directions and cannot do more.
    """
    inside, outside = eigenvalues[..., :rank, None], eigenvalues[..., None, rank:]
    floor = RESOLVED * eigenvalues[..., :1, None]
    both = (inside > floor) & (outside > floor)
    energy = energies[..., :rank, None] + energies[..., None, rank:]
    distance2 = (inside - outside).clamp(min=32 * U32).square()
    total = torch.where(both, energy / distance2, 0.0).sum((-2, -1))
    return (total / norm.square().clamp(min=1e-300)).sqrt()
