"""The fixed-step solver: a number of power steps told beforehand, no value ever looked at.

Plain subspace iteration on blocks of k columns: nothing depends on how far it has come, so a call
makes the same launches every time and may be recorded and replayed as a CUDA graph. Both stacks
are read once for the clients' Gram matrices *and* the first products; both sides share launches
(`Vocabulary.each`); a consensus solves two small eigenproblems, the anchor's and that of both
sides at once, and its core comes from what the last reading of the factors gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..linalg.orthonormal import DEPENDENT, cholesky_qr
from ..linalg.ragged import Ragged
from ..linalg.random_signs import sign_matrix, start_matrix
from ..linalg.recording import refuse_in_recording
from ..linalg.vocabulary import Vocabulary
from .base import Factors, Found, Principal, Settings, Triplets, fill, row_votes
from .tall import SIDES, TallSolver

__all__ = ["FixedStepSolver"]

PROBES = 32  # sign vectors; why: what is left out is then known to a quarter of it (√(2/32))
# Columns up to which a small eigenproblem is cheap on a GPU: one more costs five times as much.
NARROW = 64


def block_columns(rank: int, oversample: int) -> int:
    """k = R + p, and 2R where that costs nothing."""
    return max(rank + oversample, min(2 * rank, NARROW))


@lru_cache(maxsize=64)
def test_matrix(
    seed: int, side: str, d: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(d, min(columns, d) + PROBES): where this side starts, then signs that no basis has seen."""
    refuse_in_recording(f"random signs of dimension {d}", device)
    probes = sign_matrix(seed, "probe", d, 2 * PROBES, dtype, device)[:, SIDES.index(side) :: 2]
    return torch.cat([start_matrix(seed, side, d, columns, dtype, device).T, probes.T]).T


@dataclass(frozen=True)
class Seen(Triplets):
    """Triplets whose left vectors have met the rows they are made of.

    Attributes
    ----------
    reach : Tensor (L, N, R) fp64
        b x.
    """

    reach: Tensor


class Projectors:
    """The mean projectors M Mᵀ of both sides, M = [x_iᵀ T_i √c_i, anchor · weight].

    Attributes
    ----------
    rows, t, anchor : one of each side
    root : Tensor (L, N)
        √c.
    weight : Tensor (L, e)
        Square roots of the anchor's votes.
    """

    def __init__(
        self,
        v: Vocabulary,
        ragged: Ragged,
        rows: Sequence[Tensor],
        t: Sequence[Tensor],
        votes: Tensor,
        anchor: Sequence[Tensor],
        weight: Tensor,
    ) -> None:
        self.v, self.ragged, self.rows, self.t = v, ragged, rows, t
        self.root, self.anchor, self.weight = votes.sqrt(), anchor, weight[..., None]

    def seen(self, y: Sequence[Tensor]) -> list[Tensor]:
        """(L, e, k) fp64: the anchor's vectors times y."""
        return self.v.each("inner", self.anchor, y)

    def folded(self, reached: Sequence[Tensor], seen: Sequence[Tensor]) -> list[Tensor]:
        """(L, N + e, k) fp64: Mᵀ y where x y and the anchor's vectors times y are known."""
        own = self.v.each("fold", self.t, [self.root] * 2, [self.ragged] * 2, reached)
        return [torch.cat([z, self.weight * e], -2) for z, e in zip(own, seen, strict=True)]

    def apply(self, z: Sequence[Tensor]) -> list[Tensor]:
        """(L, d, k): M z."""
        rows = self.ragged.rows
        own = [x[:, :rows] for x in z]
        own = self.v.each("unfold", self.t, [self.root] * 2, [self.ragged] * 2, own)
        lifted = self.v.each("lift", self.rows, own)
        return self.v.each("combine", self.anchor, [self.weight * x[:, rows:] for x in z], lifted)


class FixedStepSolver(TallSolver):
    """Randomized solutions at a cost known beforehand, all modules at once.

    Reads of both stacks: 1 for Gram matrices and first products, 1½ + 2q for the triplets of the
    anchor (or of the mean), ½ + 2 max(q, 1) for both consensus bases, their core and certificates.
    """

    def __init__(self, v: Vocabulary, factors: Factors, settings: Settings) -> None:
        super().__init__(v, factors, settings)
        self.steps = settings.power_iters
        self.columns = block_columns(settings.rank, settings.oversample)
        self.rows = self.b, self.a

    @cached_property
    def _tests(self) -> list[Tensor]:
        return [
            test_matrix(self.settings.seed, side, x.shape[-1], self.columns, x.dtype, x.device)[
                None
            ]
            for side, x in zip(SIDES, self.rows, strict=True)
        ]

    @cached_property
    def _first(self) -> tuple[list[Tensor], list[Tensor]]:
        """The clients' Gram matrices, and both stacks times their test matrices."""
        return self.v.sketch(list(self.rows), self.ragged, self._tests)

    @cached_property
    def client_grams(self) -> list[Tensor]:
        return self._first[0]

    @property
    def sizes(self) -> Tensor:
        return self.clients.size

    def _weights(self, y: Sequence[Tensor]) -> list[Tensor]:
        """(L, k, k) of both sides: y times its weights is orthonormal."""
        return self.v.each("inverse_cholesky", self.v.each("inner", y, y), [DEPENDENT] * len(y))

    def _orthonormal(self, y: Sequence[Tensor], passes: int = 1) -> list[Tensor]:
        """`cholesky_qr` of both sides."""
        for _ in range(passes):
            y = self.v.each("combine", y, self._weights(y))
        return list(y)

    def _lead(self, p: Tensor, warm: Tensor | None) -> tuple[Seen, Tensor]:
        """Leading triplets of W = Σ_j coef_j b_j a_jᵀ from W Ω, and the block they come from."""
        v, mean, rank = self.v, self.mean(p), self.settings.rank
        start = self._first[1][1][..., :-PROBES]
        if warm is not None:
            start = torch.cat([start, v.times(self.a, warm)], -1)
        y = mean.pulled(start)
        for _ in range(self.steps):
            for half in (mean.next, mean):  # weights on N × k blocks: y is not written again
                w = v.inverse_cholesky(v.inner(y, y), DEPENDENT)
                y = half.pulled(v.product(v.times(half.a, y), w))
        basis = cholesky_qr(v, y, passes=2)
        reach = v.times(self.b, basis)
        block = mean.next.pulled(reach)
        theta, vectors = v.eigh(v.inner(block, block), precise=False)
        leading = fill(vectors, rank)
        x, y = v.each("combine", [basis, block], [leading] * 2)
        y = cholesky_qr(v, y)
        sigma = theta.sqrt()
        lead = Seen(x, y, fill(sigma, rank + 1), sigma, self.steps, v.product(reach, leading))
        return lead, basis

    def triplets(self, p: Tensor, warm: Tensor | None) -> Seen:
        return self._lead(p, warm)[0]

    def update(self, p: Tensor, warm: Tensor | None) -> Found:
        lead, basis = self._lead(p, warm)
        image = self.mean(p).pulled(self._first[1][1][..., -PROBES:])
        missed = image - self.v.combine(basis, self.v.inner(basis, image))
        squares = torch.linalg.vector_norm(missed, dim=(-2, -1)).double().square() / PROBES
        norm = (lead.norm.square().sum(-1) + squares).sqrt()
        left, right = (
            Principal(basis, lead.sigma, lead.sigma, norm, lead.steps) for basis in (lead.x, lead.y)
        )
        return self.between((left, right), p, lead.sigma, norm)

    def consensus(
        self,
        votes: Tensor,
        anchor: tuple[Triplets, Tensor] | None,
        p: Tensor,
        warm: tuple[Tensor | None, Tensor | None],
    ) -> Found:
        """Both sides' blocks to their last step, then the eigenproblems of both in one launch."""
        v, rank, clients = self.v, self.settings.rank, self.clients
        first = [x[..., :-PROBES] for x in self._first[1]]
        tests = [x[..., :-PROBES] for x in self._tests]
        voices = row_votes(clients, votes, self.settings)
        steps = self.steps + 1
        if anchor is None:
            known, weight = [x[:, :0].mT.to(self.dtype) for x in self.rows], voices[:, :0]
        else:
            (lead, vote), steps = anchor, max(self.steps, 1)
            assert isinstance(lead, Seen)  # this solver's own
            known, weight = [lead.x, lead.y], vote.sqrt()
            reach = [lead.reach, v.times(self.a, lead.y)]
        m = Projectors(v, self.ragged, self.rows, (clients.t_u, clients.t_v), voices, known, weight)
        seen = v.each("inner", known, [x.expand(len(weight), -1, -1) for x in tests])
        if anchor is not None:
            same = torch.eye(rank, dtype=weight.dtype, device=weight.device)
            for side in (0, 1):
                n = min(rank, first[side].shape[-1])
                alive = (weight > 0)[..., None, :n]
                first[side], seen[side] = (
                    torch.cat([torch.where(alive, x[..., :n], y[..., :n]), y[..., n:]], -1)
                    for x, y in ((reach[side], first[side]), (same, seen[side]))
                )
        for side, x in enumerate(warm):
            if x is not None:
                x = x.to(self.dtype)
                first[side] = torch.cat([first[side], v.times(self.rows[side], x)], -1)
                seen[side] = torch.cat([seen[side], v.inner(known[side], x)], -1)
        y = m.apply(self._orthonormal(m.folded(first, seen)))
        for _ in range(steps - 1):
            w = self._weights(y)
            reached = v.each("product", v.each("times", self.rows, y), w)
            seen = v.each("product", m.seen(y), w)
            y = m.apply(self._orthonormal(m.folded(reached, seen)))
        y = self._orthonormal(y, passes=2)
        z = v.each("times", self.rows, y)
        images = m.folded(z, m.seen(y))
        solved = self._eigh(v.each("inner", images, images))
        return self._between(y, z, solved, p)

    def _between(
        self, y: list[Tensor], z: list[Tensor], solved: list[tuple[Tensor, Tensor]], p: Tensor
    ) -> Found:
        """The core between the leading vectors of two blocks, and what they hold of the mean.

        With [Y S, (I − Y Yᵀ)P/√32] on both sides, S the eigenvectors and P the probes, one matrix
        F holds the core, the energy of each vector and, in all its squares, that of W̄.
        """
        v, rank, coef = self.v, self.settings.rank, self.coefficients(p)
        unseen = [x[..., -PROBES:] for x in self._first[1]]
        tests = [x[..., -PROBES:].expand(len(coef), -1, -1) for x in self._tests]
        held = v.each("inner", y, tests)
        small = torch.eye(PROBES, dtype=coef.dtype, device=coef.device) / PROBES**0.5
        turn = []
        for (_, s), h in zip(solved, held, strict=True):
            below = torch.cat([s.new_zeros(PROBES, s.shape[-1]), small], -1)
            above = torch.cat([s, h / -(PROBES**0.5)], -1)
            turn.append(torch.cat([above, below.expand(len(s), -1, -1)], -2))
        left, right = (torch.cat(x, -1) for x in zip(z, unseen, strict=True))
        f = v.product(v.product(turn[0].mT, v.inner(left, coef[..., None] * right)), turn[1])
        squares = f.square()
        sums = [squares.sum(-1), squares.sum(-2)]
        norm = sums[0].sum(-1).sqrt()
        core = fill(fill(f[:, :, :-PROBES].mT[:, :, :-PROBES], rank).mT, rank)
        x, s, w = v.svd(core)
        weights = v.each("product", [fill(s_, rank) for _, s_ in solved], [x, w])
        u, w = v.each("combine", y, weights)
        reach = v.each("product", z, weights)
        sides = [(lam, e[:, :-PROBES]) for (lam, _), e in zip(solved, sums, strict=True)]
        width = max(lam.shape[-1] for lam, _ in sides)
        values, energies = (
            torch.stack([fill(x, width) for x in pair]) for pair in zip(*sides, strict=True)
        )
        ordered = fill(energies.sort(-1, True)[0], rank + 1)
        better = ordered[0, :, :rank].sum(-1) > ordered[1, :, :rank].sum(-1)
        sigma = torch.where(better[..., None], ordered[0], ordered[1]).sqrt()
        return Found(u, s, w, (reach[0], reach[1]), sigma, norm, values, energies, self.steps, True)

    def _eigh(self, grams: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        if grams[0].shape != grams[1].shape:  # a space with fewer dimensions than columns
            return [self.v.eigh(g, precise=False) for g in grams]
        lam, vectors = self.v.eigh(torch.cat(grams), precise=False)
        return list(zip(lam.chunk(2), vectors.chunk(2), strict=True))
