"""The server step, written once in the words of `vocabulary`; docs/mathematics.md derives it.

Numbers in brackets are equations there. L modules run at once; rows are those of all clients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .certificates import (
    ROUNDING,
    Cut,
    certify,
    client_stats,
    information_vote,
    of_clients,
)
from .linalg.canonical import factor_coordinates, positive, soft_votes
from .linalg.ragged import Ragged
from .linalg.random_signs import sign_matrix
from .linalg.vocabulary import Vocabulary
from .solvers.base import Factors, Settings, Solver, Triplets, fill
from .solvers.fixed_nspace import FixedNSpaceSolver
from .solvers.fixed_nspace import fits as fixed_in_nspace
from .solvers.fixed_steps import FixedStepSolver
from .solvers.nspace_exact import ExactSolver, exact_limit, principal_of_rows
from .solvers.nspace_iterative import IterativeSolver, consensus_limit, update_limit
from .solvers.operators import Voters
from .solvers.tall import TallSolver, principal

__all__ = [
    "aggregate",
    "choose",
    "client_stats",
    "factor_voters",
    "projector_matmul",
    "projector_svd",
    "readout",
]

ANCHOR_EPSILON = 0.02  # ε of W̃ (6.1); why: so that exact cancellation is no trap


def choose(v: Vocabulary, factors: Factors, s: Settings, fixed: bool = False) -> Solver:
    """The solver for so many rows; each limit says why it stands where it does."""
    rows, d_out, d_in = factors.b.shape[-2], factors.b.shape[-1], factors.a.shape[-1]
    if fixed:
        return (FixedNSpaceSolver if fixed_in_nspace(factors, s) else FixedStepSolver)(
            v, factors, s
        )
    if rows <= exact_limit(s.rank):
        return ExactSolver(v, factors, s)
    limit = update_limit if s.basis == "update" else consensus_limit
    few = rows <= limit(s.rank, d_out, d_in)
    return (IterativeSolver if few else TallSolver)(v, factors, s)


def aggregate(
    solver: Solver, weights: Tensor, s: Settings, warm: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, ...]:
    """The whole server step; see the op of the same name."""
    size = (weights.abs() * solver.sizes).sum(-1)
    # Powers of two keep W̄ near one inside, whatever its size; they return at the end.
    scale, exponent = torch.frexp(size)
    unit = torch.exp2(exponent.double())
    p, rounding = weights / unit[..., None], ROUNDING * scale
    mean = projectors = None
    if s.basis == "update":
        found = solver.update(p, warm[1])  # (8.3)
        mean = Cut.of_mean(found.sigma, s.rank, rounding)
        eig = found.values * unit[..., None]
    else:
        clients = solver.clients  # (3.2), (4.1)
        votes = weights / positive(weights.sum(-1, keepdim=True))
        soft, voter = s.basis == "consensus", None
        noise = information_vote(votes, clients) if soft else torch.zeros_like(scale)
        if soft and s.anchor > 0:
            lead, vote, floor = anchor(solver, votes, s, warm[1])  # (6.1), (6.3)
            voter, mean = (lead, vote), Cut.of_mean(lead.sigma, s.rank, floor)
        found = solver.consensus(votes, voter, p, warm)  # (5.1), (6.2), (7.1)
        projectors, eig = Cut.of_projectors(found, s.rank, noise), found.values
    real = found.s > ROUNDING * torch.linalg.vector_norm(found.s, dim=-1, keepdim=True)
    present = found.norm > rounding
    known = s.client_statistics or s.basis != "update"
    told = of_clients(solver.clients, weights, s.basis == "projector") if known else {}
    stats = certify(mean, projectors, found, real, present, size, unit, solver.unit, told)
    if s.client_statistics:
        reach = found.reach
        if s.basis == "update":  # where Ŵ ends, so do its bases
            reach = reach[0] * real[..., None, :], reach[1] * real[..., None, :]
        held = found.s * present[..., None]
        each = client_stats(solver.v, solver.clients, reach, held, solver.coefficients(p))
    else:
        each = scale.new_empty(len(scale), 0, 4)
    u, w = _signed(found.u, found.v, real)
    eig_u, eig_v = (x.clone() for x in fill(eig, s.columns))
    return u, found.s * real * unit[..., None], w, eig_u, eig_v, stats, each


def anchor(
    solver: Solver, votes: Tensor, s: Settings, warm: Tensor | None
) -> tuple[Triplets, Tensor, Tensor]:
    """Leading triplets of W̃ with their votes η g_k, and the rounding among its σ̃.

    W̃ = Σ p_i ΔW_i (1/‖ΔW_i‖_F + ε/ρ̄) (6.1), g_k = σ̃_k²/(σ̃_k² + c²), c the largest of σ̃_R,
    0.01 σ̃_1 and the storage noise of W̃ (6.3); none at all for rounding.
    """
    norm = solver.clients.norm
    mean_norm = (votes * norm).sum(-1, keepdim=True)
    heard = votes * norm.sign()
    loud = positive(mean_norm)
    voice = torch.addcdiv(heard / positive(norm), heard, loud, value=ANCHOR_EPSILON)  # (6.1)
    lead = solver.triplets(voice, warm)
    size = voice * solver.clients.size
    floor = ROUNDING * size.sum(-1, keepdim=True)
    head = lead.sigma[..., : s.rank]
    noise = torch.linalg.vector_norm(0.5 * solver.roundoff * size, dim=-1, keepdim=True)
    c = torch.maximum(torch.maximum(head[..., -1:], 0.01 * head[..., :1]), noise)
    return lead, s.anchor * soft_votes(head * (head > floor), c), floor[..., 0]


def _signed(u: Tensor, v: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Zero columns where Ŵ has ended; otherwise the largest entry of each left vector positive."""
    lowest, highest = torch.aminmax(u, dim=-2, keepdim=True)
    sign = torch.copysign(real[..., None, :].to(u.dtype), lowest + highest)
    return u * sign, v * sign


def factor_voters(v: Vocabulary, rows: Tensor, ragged: Ragged) -> Tensor:
    """T (L, N, r_max) of raw factor rows: x_iᵀ T_i is an orthonormal basis of their span."""
    return ragged.unpad(factor_coordinates(v.gram(rows, ragged), v.eigh))


def projector_matmul(
    v: Vocabulary, rows: Tensor, ragged: Ragged, voters: Voters, omega: Tensor
) -> Tensor:
    """y = Σ_i x_iᵀ T_i diag(c_i) T_iᵀ x_i Ω, (L, d, k): neither projector nor basis is formed."""
    one = torch.ones_like(voters.votes)
    folded = v.fold(voters.t, voters.votes, ragged, v.times(rows, omega))
    return v.lift(rows, v.unfold(voters.t, one, ragged, folded))


def projector_svd(
    v: Vocabulary, rows: Tensor, ragged: Ragged, voters: Voters, s: Settings, warm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigenpairs of Σ_i x_iᵀ T_i diag(c_i) T_iᵀ x_i + extra extraᵀ, and its trace."""
    if ragged.rows <= exact_limit(s.rank):
        basis, lam = principal_of_rows(v, rows, ragged, voters, s.rank)
        return basis.to(voters.extra.dtype), lam, lam.sum(-1)
    found = principal(v, "left", rows, ragged, voters, s, (warm,))
    return found.basis, found.values, found.trace


def readout(
    words: Vocabulary,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    rank: int,
    scaling: float,
    pad: str,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """B = U_{:r}√(S_r/s_out) (L, d_out, r) and A = √(S_r/s_out)V_{:r}ᵀ (L, r, d_in) (10.1).

    Beyond the effective rank B is zero, and A is zero or, with ``pad="trainable"``, seeded unit
    rows orthogonal to the others (as long as d_in has room), so that every pair has a gradient.
    """
    real = s > ROUNDING * torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    root = torch.where(real, s.double() / scaling, 0.0).sqrt().to(u.dtype)
    b, a = words.readout(u, v, root, rank)
    if pad == "trainable":
        room = min(rank, s.shape[-1] + v.shape[-2])  # no direction is free from there on
        columns, drawn = a.mT, sign_matrix(seed, "pad", v.shape[-2], rank, v.dtype, v.device)
        orthonormal = fill(v * real[..., None, :].to(v.dtype), room)
        empty = ~fill((real.to(v.dtype))[..., None, :], room)[..., 0, :].bool()
        for j in range(room):  # in order, so that a wider readout extends a narrower one
            column = fresh = drawn[:, j].expand(*v.shape[:-2], -1)[..., None]
            before = orthonormal[..., :j]
            for _ in range(2):
                column = column - before @ (before.mT @ column)
            free = torch.linalg.vector_norm(column, dim=-2, keepdim=True) > 1e-3
            column = torch.nn.functional.normalize(torch.where(free, column, fresh), dim=-2)
            orthonormal[..., j] = torch.where(
                empty[..., j, None], column[..., 0], orthonormal[..., j]
            )
            columns[..., j] = torch.where(empty[..., j, None], column[..., 0], columns[..., j])
        columns[..., room:] = torch.nn.functional.normalize(drawn[:, room:], dim=-2)
    return b, a
