"""The exact solver: dense fp64 eigenproblems in N-space, two passes over the factors.

A stack is held as unit rows, B̂ = L_B Q_Bᵀ with L_B from the Cholesky factorisation of its Gram
matrix: all of W̄ and of the mean projectors happens in the frames Q_B, Q_A, which are never made.
Dead rows, frozen A and exact copies pass through a shift of the diagonal, without a rank decision.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..linalg.canonical import U64, positive
from ..linalg.clients import Clients, balanced_sizes
from ..linalg.eigen import cholesky_ex
from ..linalg.orthonormal import cholesky_qr, straightened
from ..linalg.ragged import Ragged
from ..linalg.vocabulary import Vocabulary, working
from .base import Factors, Found, Settings, Triplets, fill, row_votes
from .operators import Voters

__all__ = ["ExactSolver", "exact_limit", "principal_of_rows"]

# Added to the unit diagonal of an n × n Gram matrix, per row: four times what rounding leaves.
SHIFT = 4 * U64
# Share of a basis vector's squared length that the shift may have made up, in roundoffs of the
# result; beyond it bases are orthonormalised in the long space.
TILT = 2.0
# Squared length of a basis vector below which it is nothing but shift and rounding.
SHORT = 1e-6


def exact_limit(rank: int) -> int:
    """Largest N for which dense fp64 eigenproblems cost no more than iterations.

    At N = 256 the iterations win; blocks of R + p columns must be narrower than N.
    """
    return max(128, rank + 16)


class ExactSolver:
    """All modules of a batch at once.

    Cost per module and side: 2 N² d flops for the Gram matrix, 2 N d R for the bases, in fp64, and
    a few N × N eigenproblems.
    """

    def __init__(self, v: Vocabulary, factors: Factors, settings: Settings) -> None:
        self.v, self.ragged, self.scaling = v, factors.ragged, factors.scaling
        self.settings, self.roundoff = settings, factors.roundoff
        b, a = factors.b, factors.a
        self.dtype = working(torch.promote_types(b.dtype, a.dtype))
        self.unit = torch.finfo(self.dtype).eps / 2
        if self.dtype == torch.float64:  # squares of anything narrower are in its range
            b, a, _, size = v.pair(b, a, self.ragged)
            self.scaling = self.scaling * size
        self.rows = v.precise(b), v.precise(a)
        gram = torch.cat([v.inner(x.mT, x.mT) for x in self.rows])
        self.length = _diagonal(gram).sqrt()
        left, right = self.length.chunk(2)
        self.weight = left * right
        # Unit rows, or zero where a pair is dead: its partner counts no more than it does.
        self.inverse = (self.weight > 0).repeat(2, 1) / positive(self.length)
        self.gram = gram.mul_(self.inverse[..., :, None]).mul_(self.inverse[..., None, :])
        self.lower = cholesky(self.gram)

    @cached_property
    def sizes(self) -> Tensor:
        norm2 = self.length.square().chunk(2)
        return self.scaling.abs() * balanced_sizes(norm2[0], norm2[1], self.ragged)

    def coefficients(self, p: Tensor) -> Tensor:
        return self.weight * self.ragged.per_row(p * self.scaling)

    @cached_property
    def clients(self) -> Clients:
        """T_U = n L_A Y/σ and T_V = n G_B T_U/σ from Y σ² Yᵀ = (n L_A)ᵀ G_B (n L_A)."""
        pad, unpad = self.ragged.pad, self.ragged.unpad
        gram_b, gram_a = self.ragged.diagonal_blocks(self.gram).chunk(2)
        # Powers of two keep every client near one: LAPACK scales what is far from it by others.
        unit = torch.exp2(torch.frexp(self.sizes).exponent.double())
        n = pad((self.weight * self.ragged.per_row(self.scaling / unit))[..., None])
        other = n * cholesky(gram_a)
        sigma2, y = self.v.eigh(other.mT @ gram_b @ other)
        floor = 16 * self.ragged.max_rank * U64 * (self.sizes / unit).square()
        kept = sigma2 > floor[..., None]
        sigma = sigma2.sqrt() * kept
        inverse = (kept / positive(sigma))[..., None, :]
        t_u = other @ y * (inverse * self.scaling.sign()[..., None, None])
        t_v = n * (gram_b @ t_u) * inverse
        sigma = sigma * unit[..., None]
        noise = 0.5 * self.roundoff * self.sizes
        tau = torch.maximum(self.settings.tau_rel * sigma[..., 0], noise)
        flat = unpad(sigma[..., None])[..., 0]
        return Clients(self.ragged, unpad(t_u), unpad(t_v), flat, self.sizes, noise, tau)

    def _frame(self, p: Tensor) -> Tensor:
        """(L, N, N): the mean with weights p, Q_B M Q_Aᵀ."""
        left, right = self.lower.chunk(2)
        return torch.bmm(left.mT, self.coefficients(p)[..., None] * right)

    def triplets(self, p: Tensor, warm: Tensor | None = None) -> Triplets:
        m, rank = self._frame(p), self.settings.rank
        theta, x = self.v.eigh(torch.bmm(m, m.mT))
        noise = 16 * theta.shape[-1] * U64 * theta[..., :1]
        sigma = theta.sqrt() * (theta > noise)
        head = sigma[..., None, :rank]
        x = x[..., :rank] * head.sign()
        y = straightened(self.v, torch.bmm(m.mT, x) / positive(head)) * head.sign()
        sigma = fill(sigma, max(rank + 1, sigma.shape[-1]))
        return Triplets(fill(x, rank), fill(y, rank), sigma, torch.linalg.matrix_norm(m), 0)

    def update(self, p: Tensor, warm: Tensor | None = None) -> Found:
        lead = self.triplets(p)
        s = lead.sigma[..., : self.settings.rank]
        values = lead.sigma.expand(2, -1, -1)
        x = torch.cat([lead.x, lead.y])
        return self._found(x, None, s, p, lead.sigma, lead.norm, values, values)

    def consensus(
        self,
        votes: Tensor,
        anchor: tuple[Triplets, Tensor] | None,
        p: Tensor,
        warm: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Found:
        rank, m, ragged = self.settings.rank, self._frame(p), self.ragged
        # Rows √(p_i f_i) T_iᵀ L of every client: their Gram matrix is (5.1) in the frames.
        root = ragged.pad(row_votes(self.clients, votes, self.settings).sqrt()[..., None])
        t = ragged.pad(torch.cat([self.clients.t_u, self.clients.t_v]))
        rows = ragged.unpad(root.repeat(2, 1, 1, 1) * (t.mT @ ragged.pad(self.lower)))
        if anchor is not None:
            lead, vote = anchor
            column = torch.cat([lead.x, lead.y]) * vote.sqrt().repeat(2, 1)[..., None, :]
            rows = torch.cat([rows, column.mT], -2)
        values, x = self.v.eigh(torch.bmm(rows.mT, rows))
        values = values * (values > 16 * values.shape[-1] * U64 * values[..., :1])
        images = torch.bmm(torch.cat([m.mT, m]), x)
        bases = fill(x * values.sign()[..., None, :], rank)
        left, right = bases.chunk(2)
        x, s, y = self.v.svd(torch.bmm(torch.bmm(left.mT, m), right))
        sigma = fill(self.v.eigenvalues(torch.bmm(m, m.mT)).sqrt(), rank + 1)
        values, energies = (e.unflatten(0, (2, -1)) for e in (values, images.square().sum(-2)))
        turn, norm = torch.cat([x, y]), torch.linalg.matrix_norm(m)
        return self._found(bases, turn, s, p, sigma, norm, values, energies)

    def _found(
        self,
        x: Tensor,
        turn: Tensor | None,
        s: Tensor,
        p: Tensor,
        sigma: Tensor,
        norm: Tensor,
        values: Tensor,
        energies: Tensor,
    ) -> Found:
        """From bases (2 L, N, R) in the frames, turned into Ŵ's vectors, to the long spaces."""
        z = torch.linalg.solve_triangular(self.lower.mT, x, upper=True)  # Q_B x = B̂ᵀ L⁻ᵀ x
        tilted = (
            torch.linalg.vector_norm(z, dim=-2) > (TILT * self.unit / SHIFT / x.shape[-2]) ** 0.5
        ).any(-1)
        x, lifted = (x, z) if turn is None else (torch.bmm(x, turn), torch.bmm(z, turn))
        u, v = self._lift(lifted)
        reach = torch.bmm(self.lower, x).chunk(2)
        if bool(tilted.any()):
            at = tilted.view(2, -1).any(0).nonzero()[:, 0]
            straight = self._straight(at, z.unflatten(0, (2, -1))[:, at], p)
            s = s.clone()
            for whole, part in zip((u, s, v, *reach), straight, strict=True):
                whole[at] = part
        u, v = u.to(self.dtype), v.to(self.dtype)
        return Found(u, s, v, (reach[0], reach[1]), sigma, norm, values, energies, 0, False)

    def _lift(self, z: Tensor) -> list[Tensor]:
        scaled = (self.inverse[..., None] * z).chunk(2)
        return [self.v.inner(rows, part) for rows, part in zip(self.rows, scaled, strict=True)]

    def _straight(self, at: Tensor, z: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        """u, s, v and reach of some modules from bases made orthonormal in the long spaces."""
        bases, seen = [], []
        inverses = self.inverse.unflatten(0, (2, -1))[:, at, :, None]
        for rows, inverse, part in zip(self.rows, inverses, z, strict=True):
            y = self.v.inner(rows[at], inverse * part)
            y = y * (y.square().sum(-2, keepdim=True) > SHORT)
            bases.append(cholesky_qr(self.v, y, passes=2))
            seen.append(inverse * self.v.inner(rows[at].mT, bases[-1]))
        left, s, right = self.v.svd(seen[0].mT @ (self.coefficients(p)[at, :, None] * seen[1]))
        return bases[0] @ left, s, bases[1] @ right, seen[0] @ left, seen[1] @ right


def _diagonal(g: Tensor) -> Tensor:
    return g.diagonal(0, -2, -1)


def cholesky(g: Tensor) -> Tensor:
    """L of g + shift = L Lᵀ, for a Gram matrix of unit rows.

    Row-wise backward stable: rows of any size keep their digits. Where rounding has left less than
    nothing of a row, that matrix takes sixteen times the shift.
    """
    shift = torch.full(g.shape[:-2], SHIFT * g.shape[-1], dtype=g.dtype, device=g.device)
    for _ in range(16):
        _diagonal(g).copy_(1 + shift[..., None])
        lower, info = cholesky_ex(g)
        if not bool(info.any()):
            break
        shift = shift * (1 + 15 * (info != 0))
    _diagonal(g).fill_(1)
    return lower


def principal_of_rows(
    v: Vocabulary, rows: Tensor, ragged: Ragged, voters: Voters, rank: int
) -> tuple[Tensor, Tensor]:
    """Basis (L, d, R) and all eigenvalues of Σ x_iᵀ T_i diag(c_i) T_iᵀ x_i + extra extraᵀ.

    Eigenvectors Y of MᵀM, M = xᵀ[T √c, extra], give M Y Λ^(-1/2); further columns are further rows.
    """
    n, root = ragged.rows, voters.votes.sqrt()
    rows = torch.cat([rows, voters.extra.mT.to(rows.dtype)], -2)
    if rows.dtype != torch.float64:  # those are in a safe range as they come
        rows = v.precise(rows)

    def fold(g: Tensor) -> Tensor:
        return torch.cat([v.fold(voters.t, root, ragged, g[..., :n, :]), g[..., n:, :]], -2)

    inner = fold(fold(v.inner(rows.mT, rows.mT)).mT.contiguous())
    lam, y = v.eigh((inner + inner.mT) / 2)
    lam = lam * (lam > 16 * lam.shape[-1] * U64 * lam[..., :1])
    lead = lam[..., None, :rank]
    y = y[..., :rank] * ((lead > 0) / positive(lead).sqrt())
    z = torch.cat([v.unfold(voters.t, root, ragged, y[..., :n, :]), y[..., n:, :]], -2)
    return fill(cholesky_qr(v, v.inner(rows, z), passes=2), rank), lam
