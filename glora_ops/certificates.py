"""What an aggregation says about itself: how much it kept, and whether its cut was well defined."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg.canonical import positive, soft_votes
from .linalg.clients import Clients
from .linalg.vocabulary import Vocabulary
from .solvers.base import Found

__all__ = [
    "CLIENT_STATS",
    "FROM_CLIENTS",
    "ROUNDING",
    "STATS",
    "U32",
    "Cut",
    "certify",
    "client_stats",
    "information_vote",
    "of_clients",
]

U32 = 2.0**-24
# A singular value of a mean below this fraction of S may be made of rounding alone.
ROUNDING = 8 * U32

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
    "info_limited",  # clients whose storage precision, not tau_rel, softens their vote; projector:
    # clients with directions below their storage limit, which have no vote there
    "effective_rank",  # singular values of the state above rounding
    "storage_scale",  # S = Σ w_i|s_i|‖B_i‖_F‖A_i‖_F, the unit of rounding errors
    "power_iters",  # power iterations taken (0 where the exact solver was used)
    "iterative",  # 0: solved exactly, 1: by iterations
)

#: Those of `stats` that need the clients' canonical forms; NaN where nobody asks for them.
FROM_CLIENTS = ("voices", "rho_max", "info_limited")

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


def information_vote(votes: Tensor, clients: Clients) -> Tensor:
    """(L,): the largest vote that pure storage noise could earn, with a margin (11.1).

    A direction at a client's information limit, ½·u_in·|s|‖B‖‖A‖, has vote p_i f_i there.

    Parameters
    ----------
    votes : Tensor (L, K)
        Normalised weights of the clients.
    """
    return 4 * (votes * soft_votes(clients.noise, clients.tau)).amax(-1)


@dataclass(frozen=True)
class Cut:
    """How well defined the choice of directions is: relative gap and sensitivity, (…, L) each."""

    gap: Tensor
    kappa: Tensor

    @classmethod
    def of_mean(cls, sigma: Tensor, rank: int, floor: Tensor) -> Cut:
        """The cut of a mean update's singular values (L, ≥ R + 1), rounding below floor (11.3)."""
        gap = cut_gap(sigma, rank, floor)
        return cls(gap, (sigma[..., rank - 1] > floor) / gap.clamp(min=1e-16))

    @classmethod
    def of_projectors(cls, found: Found, rank: int, noise: Tensor) -> Cut:
        """(2, L): of the two mean projectors; eigenvalues up to noise count as zero."""
        resolved = RESOLVED * found.values[..., 0]
        kappa = ambiguity(found.values, found.energies, rank, resolved, found.norm)
        return cls(cut_gap(found.values, rank, torch.maximum(noise, resolved)), kappa)


def certify(
    mean: Cut | None,
    projectors: Cut | None,
    found: Found,
    real: Tensor,
    present: Tensor,
    size: Tensor,
    unit: Tensor,
    roundoff: float,
    clients: dict[str, Tensor],
) -> Tensor:
    """`stats` (L, 16).

    Parameters
    ----------
    mean, projectors : Cut, optional
        Of a mean update (L,) and of the mean projectors (2, L); None where nothing is cut.
    real : Tensor (L, R) bool
        The singular values of Ŵ that are not rounding.
    present : Tensor (L,) bool
        Whether the mean is more than rounding; one that cancels is held whole.
    size, unit : Tensor (L,)
        S, and what `found` is in units of.
    roundoff : float
        Of the working precision.
    clients : dict of Tensor (L,)
        What only canonical forms tell, by name; NaN for what is missing.
    """
    energies = torch.stack([found.s, found.sigma[..., : found.s.shape[-1]]])
    length = torch.linalg.vector_norm(energies, dim=-1)
    held, best = ((length / positive(found.norm)).square() + ~present).clamp(max=1.0)
    values: dict[str, Tensor | float] = dict.fromkeys(STATS, torch.nan) | {
        "captured": held,
        "attainable": torch.maximum(best, held),
        "norm": found.norm * unit,
        **dict.fromkeys(("gap_u", "gap_v", "gap_w"), 1.0),
        **dict.fromkeys(("kappa_p", "kappa_w"), 0.0),
        "effective_rank": real.sum(-1),
        "storage_scale": size,
        "power_iters": float(found.steps),
        "iterative": float(found.randomized),
    }
    flags, worst = [], FLAG_KAPPA / roundoff
    if mean is not None:
        values |= {"gap_w": mean.gap, "kappa_w": mean.kappa}
        flags += [mean.kappa > worst, mean.gap < FLAG_GAP]
    if projectors is not None:
        kappa = projectors.kappa.amax(0) * present
        values |= {"gap_u": projectors.gap[0], "gap_v": projectors.gap[1], "kappa_p": kappa}
        flags += [kappa > worst, (projectors.gap < FLAG_GAP).any(0)]
    values |= {"ambiguous": torch.stack(flags).any(0)} | clients
    same = {x: torch.full_like(size, x) for x in values.values() if isinstance(x, float)}
    return torch.stack([same[x] if isinstance(x, float) else x for x in values.values()], -1)


def of_clients(clients: Clients, weights: Tensor, hard: bool) -> dict[str, Tensor]:
    """Entries of `stats` that only canonical forms tell, (L,) each, for hard votes or soft ones."""
    loudest = clients.loudest
    if hard:  # directions that exist in what is stored, and have no vote
        stored = clients.sigma > ROUNDING * clients.ragged.per_row(clients.size)
        limited = clients.ragged.segment_sum(stored * (1 - clients.hard)) > 0
    else:
        limited = clients.noise >= clients.tau
    heard = torch.logical_and(weights, loudest)
    return {
        "voices": heard.sum(-1),
        "rho_max": (heard * clients.size / positive(loudest)).amax(-1),
        "info_limited": (heard & limited).sum(-1),
    }


def client_stats(
    v: Vocabulary, clients: Clients, reach: tuple[Tensor, Tensor], s: Tensor, coef: Tensor
) -> Tensor:
    """`client_stats` (L, K, 4) of Ŵ = U diag(s) Vᵀ.

    Parameters
    ----------
    reach : tuple of Tensor (L, N, R)
        Rows of b U and of a V.
    s : Tensor (L, R)
    coef : Tensor (L, N)
        W̄ is the sum of these times the rows' products.
    """
    ragged, hard = clients.ragged, clients.hard
    folded = v.each("fold", (clients.t_u, clients.t_v), [hard] * 2, [ragged] * 2, reach)
    left, right = (z.square().sum(-1) for z in folded)
    share = coef * (reach[0] * s[..., None, :] * reach[1]).sum(-1)
    sums = ragged.segment_sum(torch.stack([left, right, share, hard]))
    energy = s.square().sum(-1, keepdim=True).expand_as(sums[0])
    over = torch.stack([sums[3], sums[3], energy])
    return torch.cat([clients.norm[None], sums[:3] / positive(over)]).movedim(0, -1)


def cut_gap(values: Tensor, rank: int, floor: Tensor) -> Tensor:
    """(…): (x_R − x_{R+1})/x_R of descending values (…, m); 1 where nothing above floor is cut."""
    if values.shape[-1] <= rank:
        return torch.ones_like(floor)
    outside = values[..., rank] * (values[..., rank] > floor)
    return 1 - outside / positive(values[..., rank - 1])


def ambiguity(
    eigenvalues: Tensor, energies: Tensor, rank: int, resolved: Tensor, norm: Tensor
) -> Tensor:
    """κ_P (2, L) of both sides (11.2).

    κ_P² = Σ_{j ≤ R < k} (e_j + e_k)/((λ_j − λ_k)² ‖W̄‖²), over eigenpairs above `resolved` (2, L):
    the first-order change of the projected mean when the mean projector moves by a unit. A
    distance counts as 32·u32 at least, where a perturbation of that size has swapped the two
    directions and cannot do more.
    """
    outside = eigenvalues[..., rank:]
    outside = outside.masked_fill(outside <= resolved[..., None], -torch.inf)[..., None, :]
    apart = (eigenvalues[..., :rank, None] - outside).clamp(min=32 * U32)
    both = energies[..., :rank, None] + energies[..., None, rank:]
    return (both * apart.pow(-2)).sum((-2, -1)).sqrt() / positive(norm)
