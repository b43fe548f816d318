"""The server step, written once in the words of `vocabulary`; docs/mathematics.md derives it.

Shapes: b (L, N, d_out) and a (L, N, d_in) are row stacks of L modules, `ragged` says which rows
are whose, weights and scaling are (L, K) fp64.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .certificates import STATS, U32, Cut, certify, information_vote
from .linalg.canonical import factor_coordinates
from .linalg.clients import Clients, canonicalize
from .linalg.ragged import Ragged
from .linalg.random_signs import sign_matrix
from .linalg.vocabulary import Vocabulary, working
from .solvers.base import (
    Coordinates,
    Mean,
    Principal,
    Route,
    Side,
    Triplets,
    dual_route_limit,
    fill,
    gram_route_limit,
)
from .solvers.dual_route import DualRoute
from .solvers.fixed_steps import CapturedRoute
from .solvers.gram_route import GramRoute, lifted, principal_gram, rounding2, whole_gram
from .solvers.krylov import Iteration
from .solvers.krylov_route import KrylovRoute, principal_krylov

__all__ = [
    "Clients",
    "aggregate",
    "canonicalize",
    "core",
    "factor_voters",
    "projector_matmul",
    "projector_svd",
    "readout",
]

ANCHOR_EPSILON = 0.02
# Squared rounding of a sum of rows, in units of its own roundoff, beyond which it takes fp64.
CANCELLING = 16.0


def factor_voters(v: Vocabulary, side: Side) -> Tensor:
    """T (L, N, r_max) of raw factor rows: x_iᵀ T_i is an orthonormal basis of their span."""
    return side.ragged.unpad(factor_coordinates(v.gram(side.rows, side.ragged), v.eigh))


def projector_matmul(v: Vocabulary, side: Side, voters: Coordinates, omega: Tensor) -> Tensor:
    """y = Σ_i x_iᵀ T_i diag(c_i) T_iᵀ x_i Ω, (L, d, k): neither projector nor basis is formed."""
    t, c, ragged = voters.t, voters.votes, side.ragged
    folded = v.fold(t, c, ragged, v.times(side.rows, omega))
    return v.lift(side.rows, v.unfold(t, torch.ones_like(c), ragged, folded))


def projector_svd(
    v: Vocabulary,
    side: Side,
    voters: Coordinates,
    rank: int,
    how: Iteration,
    warm: Tensor | None,
) -> Principal:
    """Leading eigenpairs of Σ_i x_iᵀ T_i diag(c_i) T_iᵀ x_i + extra extraᵀ, by either route."""
    if side.ragged.rows <= gram_route_limit(rank):
        return _exact_svd(v, side, voters, rank)
    return principal_krylov(v, side, voters, rank, how, warm)


def _exact_svd(v: Vocabulary, side: Side, voters: Coordinates, rank: int) -> Principal:
    """By the Gram route, with the extra columns as further rows of the stack."""
    rows = torch.cat([side.rows, voters.extra.mT], -2)
    gram = whole_gram(v, rows)
    extra = torch.eye(rows.shape[-2], dtype=gram.dtype, device=gram.device)
    extra = extra[:, side.ragged.rows :].expand(len(rows), -1, -1)
    z, lam, _ = principal_gram(v, side.ragged, gram, replace(voters, extra=extra))
    leading = z[..., :rank]
    cancelling = rounding2(gram, leading).amax(-1) > CANCELLING
    basis = fill(lifted(v, rows, leading, cancelling), rank)
    return Principal(basis, lam, torch.zeros_like(lam), lam.sum(-1), 0)


def core(
    v: Vocabulary, u: Tensor, w: Tensor, b: Tensor, a: Tensor, coef: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """C = Σ_j coef_j (Uᵀb_j)(a_jᵀV) (L, R, R), with the projections Z_U = bU and Z_V = aV."""
    return v.core(b, a, u, w, coef)


def anchor_columns(
    route: Route, clients: Clients, ragged: Ragged, votes: Tensor, scaling: Tensor,
    rank: int, strength: float, roundoff: float, warm: Tensor | None,
) -> tuple[Tensor, Tensor, Triplets, Tensor]:  # fmt: skip
    """The anchor: leading triplets of a mean in which every client has an equal voice.

    W̃ = Σ p_i ΔW_i (1/‖ΔW_i‖_F + ε/ρ̄); it votes with weight η g_k, g_k = σ̃_k²/(σ̃_k² + c²),
    c the largest of σ̃_R, 0.01 σ̃_1 and the storage noise of W̃; none at all for rounding.

    Returns
    -------
    left, right : Tensor (L, d, R)
        √(η g_k) x_k and √(η g_k) y_k, further columns of the two stacks.
    lead : Triplets
        Of W̃.
    floor : Tensor (L,)
        Rounding level of σ̃.
    """
    norm = ragged.gather(clients.sigma.square()).sqrt()
    mean_norm = (votes * norm).sum(-1, keepdim=True)
    heard = norm > 0
    voice = torch.where(
        heard,
        1 / norm.where(heard, 1.0) + ANCHOR_EPSILON / mean_norm.where(mean_norm > 0, 1.0),
        0.0,
    )
    lead = route.triplets(Mean.of(ragged, votes * voice, scaling), rank, warm)
    size = votes * voice * clients.size
    floor = 8 * U32 * size.sum(-1)
    head = lead.sigma[..., :rank]
    noise = 0.5 * roundoff * torch.linalg.vector_norm(size, dim=-1)
    c = torch.maximum(torch.maximum(head[..., -1], 0.01 * head[..., 0]), noise)[..., None]
    g = torch.where(head > floor[..., None], head.square() / (head.square() + c.square()), 0.0)
    column = (strength * g).sqrt()[..., None, :]
    left, right = (x * column.to(x.dtype) for x in (lead.x, lead.y))
    return left, right, lead, floor


def aggregate(
    v: Vocabulary,
    b: Tensor,
    a: Tensor,
    ragged: Ragged,
    weights: Tensor,
    scaling: Tensor,
    rank: int,
    basis: str,
    tau_rel: float,
    anchor: float,
    how: Iteration,
    warm_u: Tensor | None,
    warm_v: Tensor | None,
    roundoff: float,
    captured: bool = False,
) -> tuple[Tensor, ...]:
    """The whole server step for L modules of one shape; see the op of the same name.

    With `captured` the steps are fixed beforehand and no value is looked at.
    """
    b, a, _ = v.pair(b, a)
    left, right = Side("left", b, ragged), Side("right", a, ragged)
    route: Route
    exact = not captured and ragged.rows <= gram_route_limit(rank)
    if captured:
        route = CapturedRoute(v, left, right, rank, how)
        grams = route.client_grams()
    elif exact:
        route = GramRoute(v, left, right)
        grams = route.client_grams()
    else:
        grams = v.gram(b, ragged), v.gram(a, ragged)
    clients = canonicalize(v, *grams, ragged, scaling, tau_rel, roundoff)
    if not (captured or exact):
        route = tall = KrylovRoute(v, left, right, grams, how)
        if ragged.rows <= dual_route_limit(rank, b.shape[-1], a.shape[-1]):
            route = DualRoute(v, left, right, clients, tall)
    votes = weights / _positive(weights.sum(-1, keepdim=True))
    scale = (weights.abs() * clients.size).sum(-1)
    # Powers of two keep W̄ near one inside, whatever its size; they return at the end.
    unit = torch.exp2(torch.frexp(scale).exponent.double())
    scale, mean = scale / unit, Mean.of(ragged, weights / unit[..., None], scaling)
    count = rank + how.oversample
    one = torch.ones_like(scale)
    cut = Cut(one, one, one, 0 * one, 0 * one)

    if basis == "update":
        best = route.update(mean, rank, warm_v)
        u, w, sigma, norm = best.x, best.y, best.sigma, best.norm
        eig_u = fill(sigma * unit[..., None], count)
        eig_v = eig_u.clone()
        cut = cut.of_update(sigma, rank, 8 * U32 * scale)
        steps = best.steps
    else:
        soft = basis == "consensus"
        hard = clients.sigma > 8 * ragged.spread(clients.noise)
        row_votes = ragged.spread(votes) * (clients.f if soft else hard.double())
        extra_u, extra_v = (x[:, :0].mT.to(working(x.dtype)) for x in (b, a))
        steps, similar = 0, None
        if soft and anchor > 0:
            extra_u, extra_v, lead, floor = anchor_columns(
                route, clients, ragged, votes, scaling, rank, anchor, roundoff, warm_v
            )
            cut, steps, similar = cut.of_update(lead.sigma, rank, floor), lead.steps, lead.y
        sigma, norm = route.spectrum(mean, rank, similar)
        voters_u = Coordinates(clients.t_u, row_votes, extra_u)
        voters_v = Coordinates(clients.t_v, row_votes, extra_v)
        pu = route.principal(left, right, voters_u, rank, mean, warm_u)
        pv = route.principal(right, left, voters_v, rank, mean, warm_v)
        u, w = pu.basis, pv.basis
        eig_u, eig_v = fill(pu.eigenvalues, count), fill(pv.eigenvalues, count)
        noise = information_vote(votes, clients.noise, clients.tau) if soft else 0 * one
        cut = cut.of_projectors(pu, pv, rank, noise, norm)
        steps = max(steps, pu.steps, pv.steps)

    c, z_u, z_v = core(v, u, w, b, a, mean.coef)
    x, s, y = v.svd(c)
    s = torch.where(s > 8 * U32 * torch.linalg.vector_norm(s, dim=-1, keepdim=True), s, 0.0)
    u_out, v_out = _signed(v.combine(u, x), v.combine(w, y), s)

    present = norm > 8 * U32 * scale  # a mean that cancels to rounding has nothing to hold
    loudest = ragged.pad(clients.sigma[..., None])[..., 0, 0]
    heard = (weights != 0) & (loudest > 0)
    stats = certify(
        cut, c, sigma[..., :rank], norm, present, scale, torch.finfo(working(b.dtype)).eps / 2,
        voices=heard.sum(-1),
        rho_max=torch.where(heard, clients.size / _positive(loudest), 0.0).amax(-1),
        info_limited=(heard & (clients.noise > tau_rel * loudest)).sum(-1),
        effective_rank=(s > 0).sum(-1),
        power_iters=steps * one,
        krylov=(0 if exact else 1) * one,
    )  # fmt: skip
    client_stats = _client_stats(ragged, clients, c * present[..., None, None], z_u, z_v, mean.coef)
    for name in ("norm", "storage_scale"):
        stats[..., STATS.index(name)] *= unit
    return u_out, s * unit[..., None], v_out, eig_u, eig_v, stats, client_stats


def _positive(x: Tensor) -> Tensor:
    return x.where(x > 0, 1.0)


def _signed(u: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Zero columns where s is zero; otherwise the largest entry of each left vector positive."""
    peak = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0) * (s > 0)[..., None, :]
    return u * sign.to(u.dtype), v * sign.to(v.dtype)


def _client_stats(
    ragged: Ragged, clients: Clients, c: Tensor, z_u: Tensor, z_v: Tensor, coef: Tensor
) -> Tensor:
    """(L, K, 4): norm, alignment left and right, share of the core's energy."""
    kept = (clients.sigma > 8 * ragged.spread(clients.noise)).double()
    held = [
        ragged.gather(ragged.unpad(ragged.pad(t).mT @ ragged.pad(z)).square().sum(-1) * kept)
        for t, z in ((clients.t_u, z_u), (clients.t_v, z_v))
    ]
    directions = _positive(ragged.gather(kept))
    share = ragged.gather(coef * ((z_u @ c) * z_v).sum(-1))
    share = share / _positive(c.square().sum((-2, -1)))[..., None]
    norm = ragged.gather(clients.sigma.square()).sqrt()
    return torch.stack([norm, held[0] / directions, held[1] / directions, share], -1)


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
    """B = U_{:r}√(S_r/s_out) (L, d_out, r) and A = √(S_r/s_out)V_{:r}ᵀ (L, r, d_in).

    Beyond the effective rank B is zero, and A is zero or, with ``pad="trainable"``, seeded unit
    rows orthogonal to the others (as long as d_in has room), so that every pair has a gradient.
    """
    real = s > 8 * U32 * torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    root = torch.where(real, s.double() / scaling, 0.0).sqrt().to(u.dtype)
    b, a = words.readout(u, v, root, rank)
    if pad == "trainable":
        columns = a.mT
        orthonormal = fill(v * real[..., None, :].to(v.dtype), rank)
        empty = ~fill((real.to(v.dtype))[..., None, :], rank)[..., 0, :].bool()
        fresh = sign_matrix(seed, "pad", v.shape[-2], rank, v.dtype, v.device)
        for j in range(rank):  # in order, so that a wider readout extends a narrower one
            column = drawn = fresh[:, j].expand(*v.shape[:-2], -1)[..., None]
            for _ in range(2):
                rest = orthonormal @ (orthonormal.mT @ column)
                column = column - rest
            free = torch.linalg.vector_norm(column, dim=-2, keepdim=True) > 1e-3
            column = torch.nn.functional.normalize(torch.where(free, column, drawn), dim=-2)
            orthonormal[..., j] = torch.where(
                empty[..., j, None], column[..., 0], orthonormal[..., j]
            )
            columns[..., j] = torch.where(empty[..., j, None], column[..., 0], columns[..., j])
    return b, a
