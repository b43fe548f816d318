"""Fixed steps in N-space: a Chebyshev filter on coordinates, products with N × N overlaps in fp16.

With orthonormal client bases Q and Z a tall vector Q z is N coordinates z, orthonormal in the
metric Γ = QᵀQ, and an iteration reads Γ instead of the factors: those are read for the clients'
Gram matrices and the first product, for Γ, for the bases and for the core. Γ is held as a pair of
fp16 numbers, of which most products take one. docs/solvers.md says which rules that needs, and
what breaks without each. No value is looked at: a call may be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ..linalg.canonical import positive
from ..linalg.orthonormal import DEPENDENT
from ..linalg.random_signs import sign_matrix
from ..linalg.vocabulary import Vocabulary
from .base import Factors, Found, Settings, Triplets, fill, row_votes
from .tall import CANCELLED, SIDES, TallSolver

__all__ = ["FixedNSpaceSolver", "fits"]

# Plain steps before a filter.
LEAST = 2
# Degrees of the filters: more amplifies the leading directions beyond what fp16 keeps apart.
ANCHOR_DEGREE, MEAN_DEGREE = 3, 2
# The filter's lower end over the largest eigenvalue, at least: degree 3 stays in range.
LOWEST = 1e-6
# Largest N by how the factors are stored.
MOST_HALF, MOST_SINGLE = 1024, 384
# Ranks up to which a client's forms come from one kernel.
WIDEST = 64

Operator = Callable[[Tensor], Tensor]


def fits(factors: Factors, settings: Settings) -> bool:
    """Whether fixed steps read N × N overlaps instead of the factors: by shape alone.

    In bf16 and fp16 overlaps cost a sixth of what they do in fp32; fp64 asks for more digits
    than pairs of fp16 have, and wider clients for the library's eigenproblems. A block that
    holds all there is takes no filter: on tall blocks it is exact.
    """
    rows, d_out, d_in = factors.b.shape[-2], factors.b.shape[-1], factors.a.shape[-1]
    dtype = torch.promote_types(factors.b.dtype, factors.a.dtype)
    if dtype == torch.float64 or factors.ragged.max_rank > WIDEST:
        return False
    most = MOST_SINGLE if dtype == torch.float32 else MOST_HALF
    return settings.columns < min(rows, d_out, d_in) and rows <= most


class FixedNSpaceSolver(TallSolver):
    """Consensus bases and triplets by filters told beforehand, all modules at once.

    Every block takes q + 1 plain steps, two at least, for `power_iters` = q; the filters are two
    and three further ones. Warm starts are not needed and not used.
    """

    def __init__(self, v: Vocabulary, factors: Factors, settings: Settings) -> None:
        super().__init__(v, factors, settings)
        self.steps = max(settings.power_iters + 1, LEAST)

    @cached_property
    def _first(self) -> tuple[list[Tensor], list[Tensor]]:
        """The clients' Gram matrices, and both stacks times their signs."""
        s, stacks = self.settings, (self.b, self.a)
        omegas = [
            sign_matrix(s.seed, side, x.shape[-1], s.columns, x.dtype, x.device)[None]
            for side, x in zip(SIDES, stacks, strict=True)
        ]
        return self.v.sketch(stacks, self.ragged, omegas)

    @cached_property
    def client_grams(self) -> list[Tensor]:
        return self._first[0]

    @property
    def sizes(self) -> Tensor:
        return self.clients.size

    @cached_property
    def gamma(self) -> Tensor:
        """(2, 2L, N, N) fp16: Γ_U of all modules, then Γ_V, as pairs."""
        grams, turns = [], []
        for rows, own, t in zip((self.b, self.a), self.client_grams, self.clients.t, strict=True):
            norm = self.ragged.unpad(_diagonal(own)[..., None])[..., 0].sqrt()
            up = torch.exp2(torch.frexp(norm).exponent.double())
            if rows.dtype == torch.float16:  # squares are in range, scaled rows might not be
                up = torch.ones_like(up)
            grams.append(self.v.overlaps(rows, (1 / up).float()))
            turns.append(t * up[..., None])
        return self.v.whitened(grams, self.ragged, turns)

    @property
    def _metrics(self) -> tuple[Tensor, Tensor]:
        left, right = self.gamma.chunk(2, 1)
        return left, right

    @cached_property
    def _one(self) -> Tensor:
        """(L, N) fp64: coordinates are not scaled on their way into T_i."""
        return torch.ones_like(self.clients.sigma)

    @cached_property
    def _signs(self) -> tuple[Tensor, Tensor]:
        """(L, N, k): Qᵀ Ω of both sides in coordinates."""
        left, right = (
            self.v.fold(t, self._one, self.ragged, x).to(self.dtype)
            for t, x in zip(self.clients.t, self._first[1], strict=True)
        )
        return left, right

    def _strength(self, p: Tensor) -> Tensor:
        """(L, N, 1): D of the mean with weights p."""
        return (self.ragged.per_row(p) * self.clients.sigma)[..., None].to(self.dtype)

    # --- one block in a metric -------------------------------------------------------------------

    def _image(self, gamma: Tensor, z: Tensor, precise: bool = False) -> Tensor:
        return self.v.metric_product(gamma, z, precise)[..., z.shape[-2] :, :]

    def _orthonormal(
        self, gamma: Tensor, z: Tensor, precise: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z orthonormal in the metric, Γ z, and the W of z W; twice where it is precise.

        z is rounded as the product takes it before zᵀ Γ z is made: both are then of one block.
        W is for columns in units of their largest entry, short ones being no less real.
        """
        v, both = self.v, self.v.metric_product(gamma, z, precise, unit=True)
        for _ in range(2 if precise else 1):
            w = v.inverse_cholesky(v.inner(*both.chunk(2, -2)), DEPENDENT)
            both = v.combine(both, w)
            if precise:
                both = v.metric_product(gamma, both.chunk(2, -2)[0], True)
        z, image = both.chunk(2, -2)
        return z, image, w

    def _iterated(
        self, gamma: Tensor, z: Tensor, operator: Operator, plain: int, degree: int
    ) -> Tensor:
        """Plain steps, then T_degree(2 M/b − 1) by its recurrence, b the smallest pivot."""
        z, image, w = self._orthonormal(gamma, z)
        for _ in range(plain):
            moved = operator(image)
            z, image, w = self._orthonormal(gamma, moved)
        twice = 2 * _inverse_end(moved, w)
        # Its columns up to a sign, as which each step is two operations.
        before, z = z, torch.addcmul(z, twice, operator(image), value=-1)
        for i in range(degree - 1):
            less = torch.addcmul(z, twice, operator(self._image(gamma, z)), value=-1)
            before, z = z, torch.add(before, less, alpha=2 if i % 2 else -2)
        return z

    # --- the mean update -------------------------------------------------------------------------

    def triplets(self, p: Tensor, warm: Tensor | None) -> Triplets:
        v, rank, d, (left, right) = self.v, self.settings.rank, self._strength(p), self._metrics

        def step(image: Tensor) -> Tensor:
            return d * self._image(right, d * image)

        z = self._iterated(left, d * self._signs[1], step, self.steps, ANCHOR_DEGREE)
        z, image, _ = self._orthonormal(left, z, precise=True)
        image = d * image
        energy = v.inner(image, self._image(right, image, True))
        theta, vectors = v.eigh(_symmetric(energy), precise=False)
        sigma = fill(theta.sqrt(), max(rank + 1, theta.shape[-1]))
        turn = fill(vectors, rank)
        head = sigma[..., None, :rank]
        x, y = v.combine(z, turn), v.combine(image, turn * (head > 0) / positive(head))
        held = torch.linalg.vector_norm(sigma, dim=-1)  # who wants all of the mean asks `_norm`
        return Triplets(x, y, sigma, held, self.steps + ANCHOR_DEGREE)

    def _norm(self, p: Tensor) -> Tensor:
        """(L,): ‖W‖ from the overlaps; where clients cancel, from ΩᵀWΩ, which errs by √(4/k)."""
        d = self._strength(p)
        norm2 = self.v.metric_energy(*self._metrics, d[..., 0])
        left, right = self._first[1]
        probed = self.v.inner(left, self.coefficients(p)[..., None] * right).square().sum((-2, -1))
        clear = norm2 > CANCELLED * d.double().square().sum((-2, -1))
        return torch.where(clear, norm2, probed / self.settings.columns**2).sqrt()

    def update(self, p: Tensor, warm: Tensor | None) -> Found:
        lead = self.triplets(p, None)
        twice = torch.stack([lead.sigma, lead.sigma])
        norm = self._norm(p)
        return self._found((lead.x, lead.y), p, lead.sigma, norm, twice, twice, lead.steps)

    # --- the mean projectors ---------------------------------------------------------------------

    def consensus(
        self,
        votes: Tensor,
        anchor: tuple[Triplets, Tensor] | None,
        p: Tensor,
        warm: tuple[Tensor | None, Tensor | None],
    ) -> Found:
        v, rank = self.v, self.settings.rank
        voice = row_votes(self.clients, votes, self.settings)[..., None].to(self.dtype)
        known, vote = (voice[..., :0], voice[..., :0]), voice[..., 0, :0].double()
        if anchor is not None:
            lead, vote = anchor
            known = lead.x, lead.y
        both, root = torch.cat([voice, voice]), vote.sqrt()[..., None, :].to(self.dtype)
        f = torch.cat([x * root for x in known])

        def step(image: Tensor) -> Tensor:
            voted = both * image
            return v.combine(f, v.inner(f, image), voted) if f.shape[-1] else voted

        spare = torch.cat([voice * x for x in self._signs])
        z = _placed(torch.cat(known), torch.cat([vote, vote]), spare)
        z = self._iterated(self.gamma, z, step, self.steps, MEAN_DEGREE)
        z, image, _ = self._orthonormal(self.gamma, z, precise=True)
        values, vectors = v.eigh(_symmetric(v.inner(image, step(image))), precise=False)
        x, image = v.combine(z, vectors[..., :rank]), v.combine(image, vectors)
        d, energies = self._strength(p), []
        for seen, other in zip(image.chunk(2), reversed(self._metrics), strict=True):
            crossed = d * seen
            back = crossed * self._image(other, crossed, True)
            energies.append(back.sum(-2, dtype=torch.float64).clamp(min=0))
        left, right = (fill(x.sort(-1, True)[0], rank + 1) for x in energies)
        better = left[..., :rank].sum(-1) > right[..., :rank].sum(-1)
        sigma = torch.where(better[..., None], left, right).sqrt()
        sides, norm, steps = x.chunk(2), self._norm(p), self.steps + MEAN_DEGREE
        values = values.unflatten(0, (2, -1))
        return self._found(sides, p, sigma, norm, values, torch.stack(energies), steps)

    def _found(
        self,
        sides: tuple[Tensor, ...],
        p: Tensor,
        sigma: Tensor,
        norm: Tensor,
        values: Tensor,
        energies: Tensor,
        steps: int,
    ) -> Found:
        """The core (7.1) between the spans of Q z of both sides, from the factors themselves.

        Tall vectors are turned once: by what makes them orthonormal and the core diagonal.
        """
        v, lifted = self.v, [self._lifted(i, z) for i, z in enumerate(sides)]
        turns = [v.inverse_cholesky(v.inner(y, y), DEPENDENT) for y in lifted]
        coef = self.coefficients(p)
        core, *reach = v.core(self.b, self.a, lifted[0], lifted[1], coef)
        x, s, y = v.svd(v.product(v.product(turns[0].mT, core), turns[1]))
        turns = [v.product(turn, by) for turn, by in zip(turns, (x, y), strict=True)]
        left, right = map(v.combine, lifted, turns)
        seen_u, seen_v = map(v.product, reach, turns)
        return Found(left, s, right, (seen_u, seen_v), sigma, norm, values, energies, steps, True)

    def _lifted(self, side: int, z: Tensor) -> Tensor:
        """(L, d, R): Q z."""
        v, rows, t = self.v, (self.b, self.a)[side], self.clients.t[side]
        return v.lift(rows, v.unfold(t, self._one, self.ragged, z))


def _placed(known: Tensor, vote: Tensor, spare: Tensor) -> Tensor:
    """The anchor's vectors, then signs; one without a vote leaves its place to one of those."""
    first, rest = spare.split([known.shape[-1], spare.shape[-1] - known.shape[-1]], -1)
    return torch.cat([torch.where(vote[..., None, :] > 0, known, first), rest], -1)


def _diagonal(g: Tensor) -> Tensor:
    return g.diagonal(dim1=-2, dim2=-1)


def _symmetric(g: Tensor) -> Tensor:
    return (g + g.mT) / 2


def _inverse_end(moved: Tensor, w: Tensor) -> Tensor:
    """(L, 1, 1): 1/b, b the smallest pivot of a column that is there, not far below the largest.

    Pivots are what is left of the columns' lengths: 1/w_jj of Gram–Schmidt's W, which is for
    columns in units of their largest entry, and zero where there is none.
    """
    exponent = torch.frexp(moved.abs().amax(-2)).exponent
    inverse = _diagonal(w) * torch.exp2(-exponent.double())
    least = torch.where(inverse > 0, inverse, torch.inf).amin(-1)
    end = torch.minimum(inverse.amax(-1), least / LOWEST)
    return end.to(moved.dtype)[..., None, None]
