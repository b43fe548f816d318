"""The exact solver: dense fp64 eigenproblems in N-space, two passes over the factors.

A stack is held as unit rows, B̂ = L_B Q_Bᵀ with L_B from the Cholesky factorisation of its Gram
matrix: all of W̄ and of the mean projectors happens in the frames Q_B, Q_A, which are never made
unless rows depend on each other: then both come from the rows, by Householder. Dead rows, frozen A
and exact copies take no rank decision.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..linalg.canonical import U64, orthonormal_coordinates, positive
from ..linalg.client_forms import Clients
from ..linalg.eigen import cholesky_ex
from ..linalg.orthonormal import cholesky_qr, straightened
from ..linalg.ragged import Ragged
from ..linalg.vocabulary import Vocabulary, working
from .base import Factors, Found, Settings, Triplets, fill, row_votes
from .operators import Voters

__all__ = ["ExactSolver", "exact_limit", "principal_of_rows"]

# Added to the unit diagonal of an n × n Gram matrix, per row: four times what rounding leaves.
SHIFT = 4 * U64
# Shifts end here; what needs more is no Gram matrix.
LAST_SHIFT = 2.0**60
# Share of a squared pivot that the shift may make up, in roundoffs of the result; beyond it rows
# depend on each other, and frames come from the rows themselves.
TILT = 0.25


def exact_limit(rank: int) -> int:
    """Largest N for which dense fp64 eigenproblems cost no more than iterations.

    At 1024² and r = 8 an `update` by iterations is faster from N = 160 on and a consensus from 192
    on, by 4 and 2.4 times at 256; blocks of R + p columns must be narrower than N.
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
        self.dtype = working(b.dtype, a.dtype)
        self.unit = torch.finfo(self.dtype).eps / 2
        if self.dtype == torch.float64:  # squares of anything narrower are in its range
            b, a, _, size = v.pair(b, a, self.ragged)
            self.scaling = self.scaling * size
        self.rows = v.precise(b), v.precise(a)
        gram = torch.cat([v.inner(x.mT, x.mT) for x in self.rows])
        left, right = _diagonal(gram).sqrt().chunk(2)
        self.weight = left * right
        self.inverse = positive(_diagonal(gram)).rsqrt()  # makes unit rows, or zero ones
        self.gram = gram.mul_(self.inverse[..., :, None]).mul_(self.inverse[..., None, :])
        self.frames = self.lower = cholesky(self.gram)
        least = (SHIFT * self.gram.shape[-1] / (TILT * self.unit)) ** 0.5
        dependent = _diagonal(self.lower) < least
        if bool(dependent.any()):
            self._straighten(dependent.any(-1))

    def _straighten(self, at: Tensor) -> None:
        """Frames of some stacks by Householder QR, which are those of their bases Q as well.

        A Gram matrix tells dependent rows to √u64: the anchor of clients that nearly cancel, or a
        client far smaller than its factors, would have that much of directions that are none.
        """
        n, rows = self.lower.shape[-1], []
        self.frames, self.lower = self.lower.clone(), self.lower.clone()
        both = (y.chunk(2) for y in (at, self.inverse, self.frames, self.lower))
        for x, here, inverse, frames, lower in zip(self.rows, *both, strict=True):
            q, r = self.v.qr((inverse[here][..., None] * x[here]).mT)
            frames[here], lower[here] = fill(r.mT, n), torch.eye(n).to(r)
            inverse[here] = 1
            rows.append(x.double().index_copy(0, here.nonzero()[:, 0], fill(q, n).mT))
        self.rows = rows[0], rows[1]

    @cached_property
    def _total(self) -> Tensor:
        """(L, K): sizes without the scaling."""
        return self.ragged.segment_sum(self.weight)

    @cached_property
    def sizes(self) -> Tensor:
        return self.scaling.abs() * self._total

    def coefficients(self, p: Tensor) -> Tensor:
        return self.ragged.weighed(self.weight, p * self.scaling)

    @cached_property
    def clients(self) -> Clients:
        """In units of each client's size: T_U = n L_A Y/σ, T_V = orth(n G_B T_U) (3.2).

        From Y σ² Yᵀ = (n L_A)ᵀ G_B (n L_A), n the signed weight of the client's pairs. A weak
        direction of T_V holds u64/σ² of the strong ones, which one clean-up takes out.
        """
        ragged, sizes = self.ragged, self.sizes
        gram_b, gram_a = ragged.diagonal_blocks(self.gram).flatten(0, 1).chunk(2)
        per_size = self.scaling.sign() / positive(self._total)
        n = ragged.pad(ragged.weighed(self.weight, per_size)[..., None]).flatten(0, 1)
        other = n * cholesky(gram_a)
        blocks = len(sizes), ragged.clients
        small = torch.bmm(torch.bmm(other.mT, gram_b), other)
        sigma2, y = self.v.eigh(small.unflatten(0, blocks))
        kept = sigma2 > 16 * ragged.max_rank * U64
        sigma = (sigma2 * kept).sqrt()
        inverse = (kept / positive(sigma)).flatten(0, 1)[:, None, :]
        t_u = torch.bmm(other, y.flatten(0, 1)) * inverse
        t_v = orthonormal_coordinates(n * torch.bmm(gram_b, t_u), gram_a, kept.flatten(0, 1))
        t_u, t_v = (ragged.unpad(t.unflatten(0, blocks)) for t in (t_u, t_v))
        sigma, noise = sigma * sizes[..., None], 0.5 * self.roundoff * sizes
        tau = torch.maximum(self.settings.tau_rel * sigma[..., 0], noise)
        flat = ragged.unpad(sigma[..., None])[..., 0]
        return Clients(ragged, t_u, t_v, flat, sizes, noise, tau)

    def _frame(self, p: Tensor) -> Tensor:
        """(L, N, N): the mean with weights p, Q_B M Q_Aᵀ."""
        left, right = self.frames.chunk(2)
        return torch.bmm(left.mT, self.coefficients(p)[..., None] * right)

    def _eigh(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenpairs, zero where rounding has made them."""
        values, x = self.v.eigh(g)
        kept = values > 16 * values.shape[-1] * U64 * values[..., :1]
        return values * kept, x * kept[..., None, :]

    def triplets(self, p: Tensor, warm: Tensor | None = None) -> Triplets:
        m, rank = self._frame(p), self.settings.rank
        theta, x = self._eigh(torch.bmm(m, m.mT))
        x = fill(x, rank)
        y = straightened(self.v, torch.bmm(m.mT, x))  # y = Mᵀx/σ
        sigma = fill(theta.sqrt(), max(rank + 1, theta.shape[-1]))
        return Triplets(x, y, sigma, torch.linalg.matrix_norm(m), 0)

    def update(self, p: Tensor, warm: Tensor | None = None) -> Found:
        lead = self.triplets(p)
        s = lead.sigma[..., : self.settings.rank]
        values = lead.sigma.expand(2, -1, -1)
        x = torch.cat([lead.x, lead.y])
        return self._found(x, None, s, lead.sigma, lead.norm, values, values)

    def consensus(
        self,
        votes: Tensor,
        anchor: tuple[Triplets, Tensor] | None,
        p: Tensor,
        warm: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Found:
        rank, m, ragged = self.settings.rank, self._frame(p), self.ragged
        # Rows √(p_i f_i) T_iᵀ L of every client: their Gram matrix is (5.1) in the frames.
        root = row_votes(self.clients, votes, self.settings).sqrt().repeat(2, 1)
        rows = self.v.fold(self.clients.t.flatten(0, 1), root, ragged, self.frames)
        if anchor is not None:
            lead, vote = anchor
            column = torch.stack([lead.x, lead.y]) * vote.sqrt()[..., None, :]
            rows = torch.cat([rows, column.flatten(0, 1).mT], -2)
        values, x = self._eigh(torch.bmm(rows.mT, rows))
        images = torch.bmm(torch.cat([m.mT, m]), x)
        energies = images.square().sum(-2).unflatten(0, (2, -1))
        bases = fill(x, rank)
        seen, right = fill(images.chunk(2)[0], rank), bases.chunk(2)[1]
        x, s, y = self.v.svd(torch.bmm(seen.mT, right))
        turn, norm = torch.cat([x, y]), torch.linalg.matrix_norm(m)
        sigma = fill(self.v.eigenvalues(torch.bmm(m, m.mT)).sqrt(), rank + 1)
        values = values.unflatten(0, (2, -1))
        return self._found(bases, turn, s, sigma, norm, values, energies)

    def _found(
        self,
        x: Tensor,
        turn: Tensor | None,
        s: Tensor,
        sigma: Tensor,
        norm: Tensor,
        values: Tensor,
        energies: Tensor,
    ) -> Found:
        """From bases (2 L, N, R) in the frames, turned into Ŵ's vectors, to the long spaces."""
        if turn is not None:
            x = torch.bmm(x, turn)
        z = torch.linalg.solve_triangular(self.lower.mT, x, upper=True)  # Q_B x = B̂ᵀ L⁻ᵀ x
        scaled = (self.inverse[..., None] * z).chunk(2)
        u, v = (
            self.v.inner(y, part).to(self.dtype) for y, part in zip(self.rows, scaled, strict=True)
        )
        reach = x[..., :0]
        if self.settings.client_statistics:
            reach = torch.bmm(self.frames, x)
        left, right = reach.chunk(2)
        return Found(u, s, v, (left, right), sigma, norm, values, energies, 0, False)


def _diagonal(g: Tensor) -> Tensor:
    return g.diagonal(0, -2, -1)


def cholesky(g: Tensor, shift: float = 1.0) -> Tensor:
    """L of g + shift = L Lᵀ, for a Gram matrix of unit rows, in units of `SHIFT` a row.

    Row-wise backward stable: rows of any size keep their digits. Where rounding has left less than
    nothing of a row, that matrix takes sixteen times the shift.
    """
    _diagonal(g).fill_(1 + shift * SHIFT * g.shape[-1])
    lower, info = cholesky_ex(g)
    if bool(info.any()) and shift < LAST_SHIFT:
        failed = info != 0
        lower[failed] = cholesky(g[failed], 16 * shift)
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
