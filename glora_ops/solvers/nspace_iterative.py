"""The iterative N-space solver: subspace iteration on coordinates, N × N products for passes.

Orthonormal client bases keep the entries of G = QᵀQ accurate to the working precision in any
gauge, which the Gram matrices of raw factors are not. What fp32 overlaps cannot resolve is found
on tall blocks, from what is known by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..linalg.canonical import positive
from .base import Found, Principal, Triplets, fill, row_votes
from .operators import NSpaceProjector, NSpaceUpdate, Voters
from .stopping import ANCHORED, SETTLED, Ritz, StopRule, subspace_iteration
from .tall import CANCELLED, SIDES, TallSolver, short_terms, start_block

__all__ = ["IterativeSolver", "consensus_limit", "update_limit"]

# An eigenvalue below this fraction of the top is not resolved by fp32 overlaps.
RESOLVED = 1e-5
# What is to come of a mean, over what is found, from which N-space is nearer than more steps.
FLAT = 1e-2
# Numbers of turned rows that are held at a time, 3 MiB: still in cache when they are multiplied.
STRETCH = 3 * 2**18


def consensus_limit(rank: int, d_out: int, d_in: int) -> int:
    """Largest N for which a consensus makes N × N overlaps instead of passes over the factors.

    Overlaps of both sides cost as much as N/(2(R + 16)) pairs of passes; the four problems of a
    consensus take about ten. A stack wider than long has nothing to gain.
    """
    return min(20 * (rank + 16), d_out, d_in)


def update_limit(rank: int, d_out: int, d_in: int) -> int:
    """The same for an `update` on a flat spectrum, which has one problem left to solve."""
    return min(12 * (rank + 16), d_out, d_in)


class IterativeSolver(TallSolver):
    """N × N products instead of passes; one module at a time.

    Cost per module: 2 N d r + N² d flops a side, then 2 N² k flops a product.
    """

    @cached_property
    def bases(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Rows (1, N, d) and T (1, N, r) of both sides: the clients' bases are T_iᵀ x_i."""
        left, right = ((self.b, self.clients.t_u), (self.a, self.clients.t_v))
        return short_terms(self.v, *left, self.ragged), short_terms(self.v, *right, self.ragged)

    @cached_property
    def grams(self) -> Tensor:
        """(2, N, N): the bases' overlaps G_U, G_V in the working precision.

        Of a stretch of the long dimension at a time: turned rows are never there as a whole.
        """
        out = self.b.new_zeros(2, self.ragged.rows, self.ragged.rows)
        for gram, (rows, t) in zip(out, self.bases, strict=True):
            for x in rows.split(max(1, STRETCH // self.ragged.rows), -1):
                gram += self.v.overlaps(self.v.turned(x, self.ragged, t))[0]
        return out

    def triplets(self, p: Tensor, warm: Tensor | None) -> Triplets:
        rule = StopRule(self.settings, True, self.unit, ANCHORED)
        norm2 = self._energy(p)
        if norm2 is None:
            return self._in_coordinates(p, self._iterate(p, warm, rule))
        start = start_block(self.a, "right", self.settings, warm)
        lead = self._leading(p, norm2, self._pull(1, start), ANCHORED)
        if lead.sigma[0, self.settings.rank - 1] > RESOLVED**0.5 * lead.sigma[0, 0]:
            return lead
        # Tall blocks take from rounding the size that would earn it votes.
        right = self.v.qr(self._lift(1, lead.y))[0]
        return self._in_coordinates(p, self._iterate(p, right, rule, norm2))

    def _in_coordinates(self, p: Tensor, ritz: Ritz) -> Triplets:
        far = self._triplets(ritz)
        strength = self._strength(p) * self._inverse(far.sigma)
        x, y = strength * self._pull(1, far.y), strength * self._pull(0, far.x)
        return replace(far, x=x, y=y)

    def update(self, p: Tensor, warm: Tensor | None) -> Found:
        """On tall blocks; a spectrum too flat for that is finished in N-space."""
        rule = StopRule(self.settings, True, self.unit, patience=FLAT)
        ritz = self._iterate(p, warm, rule)
        if not rule.flat:
            return self._update(self._triplets(ritz))
        norm2 = self._energy(p)
        if norm2 is None:
            return super().update(p, warm)
        block = ritz.x if ritz.blocks % 2 else ritz.images.block
        lead = self._leading(p, norm2, self._pull(1, block))
        values, steps = lead.sigma, lead.steps + ritz.steps
        left, right = (
            Principal(self.v.qr(self._lift(side, z))[0], values, values, lead.norm, steps)
            for side, z in enumerate((lead.x, lead.y))
        )
        return self.between((left, right), p, lead.sigma, lead.norm)

    def consensus(
        self,
        votes: Tensor,
        anchor: tuple[Triplets, Tensor] | None,
        p: Tensor,
        warm: tuple[Tensor | None, Tensor | None],
    ) -> Found:
        norm2 = self._energy(p)
        if norm2 is None:
            if anchor is not None:
                lead, vote = anchor
                anchor = replace(lead, x=self._lift(0, lead.x), y=self._lift(1, lead.y)), vote
            return super().consensus(votes, anchor, p, warm)
        settings, rank, v, dtype = self.settings, self.settings.rank, self.v, self.dtype
        grams, strength = self.grams, self._strength(p)
        voices = row_votes(self.clients, votes, settings)
        ref, trace = grams[..., :0], (voices * grams.diagonal(0, -2, -1)).sum(-1).double()
        if anchor is not None:
            lead, vote = anchor
            trace = trace + vote.sum(-1)
            ref = torch.cat([lead.x, lead.y]) * vote.sqrt()[..., None, :].to(dtype)
        operator = NSpaceProjector(v, grams, voices, ref)

        @lru_cache(1)  # asked for the last block once more when the iteration has ended
        def energies(x: Tensor, vectors: Tensor) -> Tensor:
            crossed = strength * v.product(grams, v.product(x, vectors.to(dtype)))
            back = v.product(grams, crossed.flip(0)).flip(0)
            return (crossed * back).sum(-2).clamp(min=0).double()

        known = ref[..., (ref != 0).any(-2).any(0)]
        signs = replace(settings, rank=max(rank - known.shape[-1], 0))
        pulled = [
            self._pull(side, start_block(rows, SIDES[side], signs, warm[side]))
            for side, rows in enumerate((self.b, self.a))
        ]
        width = min(x.shape[-1] for x in pulled)
        first = operator.apply(torch.cat([x[..., :width] for x in pulled]))
        rule = StopRule(settings, False, self.unit, SETTLED, energies)
        start = torch.cat([known, first], -1)
        ritz = subspace_iteration(v, operator, start, rule, lambda *_: trace)
        held = energies(ritz.x, ritz.vectors)
        values, vectors, held = (
            fill(x, settings.columns) for x in (ritz.theta, ritz.vectors, held)
        )
        x = v.product(ritz.x, vectors.to(dtype))
        mean, sides = self.mean(p), []
        for side, t, w in ((0, self.clients.t_u, mean.next), (1, self.clients.t_v, mean)):
            here = slice(side, side + 1)
            clear = int((values[side, :rank] > RESOLVED * values[side, 0]).sum())
            basis = v.qr(self._lift(side, x[here, :, :clear]))[0]
            if clear == rank:
                sides.append(Principal(basis, values[here], held[here], trace, ritz.steps))
                continue
            voters = Voters(t, voices, self._lift(side, ref[here]))
            sides.append(self._principal(side, voters, w, basis))
        seen = x[:1] if anchor is not None else strength * pulled[1]
        spectrum = self._coordinates(p, norm2, seen, StopRule(settings, False, self.unit))
        sigma = fill(spectrum.theta, rank + 1).sqrt()
        return self.between((sides[0], sides[1]), p, sigma, spectrum.total.sqrt())

    def _strength(self, p: Tensor) -> Tensor:
        """(1, N, 1): D of the mean with weights p."""
        return self.ragged.weighed(self.clients.sigma, p)[..., None].to(self.dtype)

    def _energy(self, p: Tensor) -> Tensor | None:
        """(1,): ‖W‖² from the overlaps; None where clients cancel until it is rounding."""
        strength, (left, right) = self._strength(p), self.grams.split(1)
        norm2 = (strength * self.v.product(left * right, strength)).sum((-2, -1)).double()
        return norm2 if bool(norm2 > CANCELLED * strength.square().sum()) else None

    def _coordinates(self, p: Tensor, norm2: Tensor, start: Tensor, rule: StopRule) -> Ritz:
        """Subspace iteration on a mean in N-space, from left coordinates."""
        operator = NSpaceUpdate(self.v, self.grams, self._strength(p))
        return subspace_iteration(self.v, operator, start, rule, _at_least(norm2))

    def _leading(
        self, p: Tensor, norm2: Tensor, seen: Tensor, settled: float | None = None
    ) -> Triplets:
        """Leading triplets in coordinates; `seen` is Zᵀ Ω of a block to start from."""
        v, rank = self.v, self.settings.rank
        rule = StopRule(self.settings, False, self.unit, settled)
        # Coordinates know nothing of length: a column that holds some of every direction would
        # round the small ones by the large. Axes of the metric keep them apart.
        start, _ = v.qr(self._strength(p) * seen)
        gram = v.inner(start, v.product(self.grams[:1], start))
        start = v.combine(start, v.eigh(gram)[1])
        ritz = self._coordinates(p, norm2, start, rule)
        turn = fill(ritz.vectors, rank).to(self.dtype)
        sigma = fill(ritz.theta.sqrt(), max(rank + 1, ritz.theta.shape[-1]))
        x = v.product(ritz.x, turn)
        y = self._strength(p) * self._inverse(sigma) * v.product(self.grams[:1], x)
        return Triplets(x, y, sigma, ritz.total.sqrt(), ritz.steps)

    def _inverse(self, sigma: Tensor) -> Tensor:
        """(1, 1, R): 1/σ, zero where σ is."""
        head = sigma[..., None, : self.settings.rank]
        return ((head > 0) / positive(head)).to(self.dtype)

    def _pull(self, side: int, y: Tensor) -> Tensor:
        """(1, N, k): Qᵀ y of tall vectors."""
        rows, t = self.bases[side]
        return self.v.fold(t, self._ones, self.ragged, self.v.times(rows, y)).to(self.dtype)

    def _lift(self, side: int, z: Tensor) -> Tensor:
        """(1, d, k): the tall vectors Q z."""
        rows, t = self.bases[side]
        return self.v.lift(rows, self.v.unfold(t, self._ones, self.ragged, z.double()))

    @property
    def _ones(self) -> Tensor:
        return torch.ones_like(self.clients.sigma)


def _at_least(norm2: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The trace of an iteration on a mean of known norm, rounding apart."""
    return lambda x, images, seen: torch.maximum(norm2, seen)
