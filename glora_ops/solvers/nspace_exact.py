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
from ..linalg.orthonormal import cholesky_qr, straightened
from ..linalg.ragged import Ragged
from ..linalg.vocabulary import Vocabulary
from .base import Factors, Found, Settings, Triplets, fill
from .operators import Voters

__all__ = ["ExactSolver", "exact_limit", "principal_of_rows"]

# Added to the unit diagonal of an n × n Gram matrix, per row: four times what rounding leaves.
SHIFT = 4 * U64
# Share of a basis vector's squared length that the shift may have made up; beyond it bases are
# orthonormalised in the long space. fp32 results are orthonormal to ten times as much.
TILT = 1e-7
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
        self.dtype = torch.promote_types(
            torch.promote_types(factors.b.dtype, factors.a.dtype), torch.float32
        )
        self.unit = torch.finfo(self.dtype).eps / 2
        self.rows, power = zip(*(v.precise(x) for x in (factors.b, factors.a)), strict=True)
        gram = torch.stack([v.inner(x.mT, x.mT) for x in self.rows])
        length = _diagonal(gram).sqrt()
        alive = (length > 0).all(0)
        self.inverse = alive / positive(length)
        self.gram = self.inverse[..., :, None] * gram * self.inverse[..., None, :]
        self.lower = cholesky(self.gram)
        self.length = length if power[0] is None else length * torch.stack(power)
        self.weight = self.length[0] * self.length[1] * alive

    @cached_property
    def sizes(self) -> Tensor:
        return self.scaling.abs() * balanced_sizes(*self.length.square(), self.ragged)

    def coefficients(self, p: Tensor) -> Tensor:
        return self.weight * self.ragged.per_row(p * self.scaling)

    @cached_property
    def clients(self) -> Clients:
        """T_U = n L_A Y/σ and T_V = n G_B T_U/σ from Y σ² Yᵀ = (n L_A)ᵀ G_B (n L_A)."""
        blocks = self.ragged.diagonal_blocks(self.gram)
        lower = cholesky(blocks[1])
        n = self.ragged.pad((self.weight * self.ragged.per_row(self.scaling.abs()))[..., None])
        other, seen = n * lower, n * blocks[0]
        floor = 16 * blocks.shape[-1] * U64 * self.sizes.square()
        sigma2, y = self.v.eigh(other.mT @ blocks[0] @ other)
        kept = sigma2 > floor[..., None]
        sigma = (sigma2 * kept).sqrt()
        inverse = (kept / positive(sigma))[..., None, :]
        t_u = other @ y * inverse
        sign = torch.where(self.scaling < 0, -1.0, 1.0)[..., None, None]
        t_v = seen @ t_u * (sign * inverse)
        noise = 0.5 * self.roundoff * self.sizes
        return Clients(
            self.ragged,
            self.ragged.unpad(t_u),
            self.ragged.unpad(t_v),
            self.ragged.unpad(sigma[..., None])[..., 0],
            self.sizes,
            noise,
            torch.maximum(self.settings.tau_rel * sigma[..., 0], noise),
        )

    def _voters(self, votes: Tensor) -> Tensor:
        """(2, L, N, N): rows √(p_i f_i) T_iᵀ L of every client; their Gram matrix is (5.1)."""
        clients, ragged = self.clients, self.ragged
        hard = self.settings.basis == "projector"
        row_votes = ragged.per_row(votes) * (clients.hard if hard else clients.soft)
        t = ragged.pad(torch.stack([clients.t_u, clients.t_v]))
        root = ragged.pad(row_votes.sqrt()[..., None])
        return ragged.unpad(root * (t.mT @ ragged.pad(self.lower)))

    def _frame(self, p: Tensor) -> Tensor:
        """(L, N, N): the mean with weights p, Q_B M Q_Aᵀ."""
        return self.lower[0].mT @ (self.coefficients(p)[..., None] * self.lower[1])

    def triplets(self, p: Tensor, warm: Tensor | None = None) -> Triplets:
        m, rank = self._frame(p), self.settings.rank
        theta, x = self.v.eigh(m @ m.mT)
        noise = 16 * theta.shape[-1] * U64 * theta[..., :1]
        sigma = (theta * (theta > noise)).sqrt()
        head = sigma[..., None, :rank]
        x = x[..., :rank] * (head > 0)
        y = straightened(self.v, m.mT @ x / positive(head)) * (head > 0)
        norm = torch.linalg.matrix_norm(m)
        return Triplets(
            fill(x, rank), fill(y, rank), fill(sigma, max(rank + 1, sigma.shape[-1])), norm, 0
        )

    def update(self, p: Tensor, warm: Tensor | None = None) -> Found:
        lead = self.triplets(p)
        core = torch.diag_embed(lead.sigma[..., : self.settings.rank])
        values = torch.stack([lead.sigma, lead.sigma])
        x = torch.stack([lead.x, lead.y])
        return self._found(x, core, p, lead.sigma, lead.norm, values, values)

    def consensus(
        self,
        votes: Tensor,
        anchor: tuple[Triplets, Tensor] | None,
        p: Tensor,
        warm: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Found:
        rank, m = self.settings.rank, self._frame(p)
        rows = self._voters(votes)
        if anchor is not None:
            lead, vote = anchor
            column = torch.stack([lead.x, lead.y]) * vote.sqrt()[..., None, :]
            rows = torch.cat([rows, column.mT], -2)
        values, x = self.v.eigh(rows.mT @ rows)
        floor = 16 * values.shape[-1] * U64 * values[..., :1]
        values = values * (values > floor)
        images = torch.stack([m.mT, m]) @ x
        bases = fill(x * (values > 0)[..., None, :], rank)
        return self._found(
            bases,
            bases[0].mT @ m @ bases[1],
            p,
            fill(self.v.eigenvalues(m @ m.mT).sqrt(), rank + 1),
            torch.linalg.matrix_norm(m),
            values,
            images.square().sum(-2),
        )

    def _found(
        self,
        x: Tensor,
        core: Tensor,
        p: Tensor,
        sigma: Tensor,
        norm: Tensor,
        values: Tensor,
        energies: Tensor,
    ) -> Found:
        """From bases (2, L, N, R) in the frames and the core between them into the long spaces."""
        left, s, right = self.v.svd(core)
        turn = torch.stack([left, right])
        z = self._coordinates(x)
        reach = self.lower @ x
        tilted = SHIFT * x.shape[-2] * z.square().sum(-2) > TILT
        u, v = self._lift(z @ turn)
        reach = reach @ turn
        tilted = tilted.any(-1).any(0)
        if bool(tilted.any()):
            at = tilted.nonzero()[:, 0]
            straight = self._straight(at, z[:, at], p)
            for whole, part in zip((u, s, v, reach[0], reach[1]), straight, strict=True):
                whole[at] = part
        dtype = self.dtype
        return Found(
            u.to(dtype), s, v.to(dtype), (reach[0], reach[1]), sigma, norm, values, energies, 0,
            False,
        )  # fmt: skip

    def _coordinates(self, x: Tensor) -> Tensor:
        """(2, L, N, R): coefficients of the unit rows, Q_B x = B̂ᵀ L⁻ᵀ x."""
        return torch.linalg.solve_triangular(self.lower.mT, x, upper=True)

    def _lift(self, z: Tensor) -> list[Tensor]:
        scaled = self.inverse[..., None] * z
        return [self.v.inner(rows, part) for rows, part in zip(self.rows, scaled, strict=True)]

    def _straight(self, at: Tensor, z: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        """u, s, v and reach of some modules from bases made orthonormal in the long spaces."""
        bases, seen = [], []
        for rows, inverse, part in zip(self.rows, self.inverse[:, at], z, strict=True):
            y = self.v.inner(rows[at], inverse[..., None] * part)
            y = y * (y.square().sum(-2, keepdim=True) > SHORT)
            bases.append(cholesky_qr(self.v, y, passes=2))
            seen.append(inverse[..., None] * self.v.inner(rows[at].mT, bases[-1]))
        core = seen[0].mT @ (self.coefficients(p)[at, :, None] * seen[1])
        left, s, right = self.v.svd(core)
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
        lower, info = torch.linalg.cholesky_ex(g)
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
        rows, _ = v.precise(rows)

    def fold(g: Tensor) -> Tensor:
        return torch.cat([v.fold(voters.t, root, ragged, g[..., :n, :]), g[..., n:, :]], -2)

    inner = fold(fold(v.inner(rows.mT, rows.mT)).mT.contiguous())
    lam, y = v.eigh((inner + inner.mT) / 2)
    lam = lam * (lam > 16 * lam.shape[-1] * U64 * lam[..., :1])
    lead = lam[..., None, :rank]
    y = y[..., :rank] * ((lead > 0) / positive(lead).sqrt())
    z = torch.cat([v.unfold(voters.t, root, ragged, y[..., :n, :]), y[..., n:, :]], -2)
    return fill(cholesky_qr(v, v.inner(rows, z), passes=2), rank), lam
