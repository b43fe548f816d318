"""What an aggregation says about itself: how much it kept, and whether its cut was well defined."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CLIENT_STATS", "STATS", "U32", "ambiguity", "cut_gap", "information_floor"]

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

FLAG_KAPPA = 1e-2
FLAG_GAP = 1e-3


def information_floor(
    eigenvalues: Tensor, votes: Tensor, noise: Tensor, tau: Tensor, soft: bool
) -> Tensor:
    """(L,): eigenvalues of a mean projector below this are not told apart from zero.

    A direction at a client's information limit, ½·u_in·|s|‖B‖‖A‖, has vote w_i f_i there; four
    times the largest such vote is storage noise, and so is 1e-12 of the top, the square of fp32
    rounding with a margin.

    Parameters
    ----------
    eigenvalues : Tensor (L, m)
    votes, noise, tau : Tensor (L, K)
        Weights of the clients, their information limits and their τ_i.
    soft : bool
        Whether votes are soft; hard votes cut the noise themselves.
    """
    floor = 1e-12 * eigenvalues[..., 0]
    if not soft:
        return floor
    f = torch.where(noise > 0, noise.square() / (noise.square() + tau.square()), 0.0)
    return torch.maximum(floor, 4 * (votes * f).amax(-1))


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
    floor = 1e-12 * eigenvalues[..., :1, None]
    both = (inside > floor) & (outside > floor)
    energy = energies[..., :rank, None] + energies[..., None, rank:]
    distance2 = (inside - outside).clamp(min=32 * U32).square()
    total = torch.where(both, energy / distance2, 0.0).sum((-2, -1))
    return (total / norm.square().clamp(min=1e-300)).sqrt()
