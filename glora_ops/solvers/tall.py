"""The tall solver: subspace iteration on d × k blocks; nothing N × N, nothing d × d.

All products start from the same seeded signs in the *long* space, so the iterates depend on the
mean projector (or update) alone: they are as gauge-invariant as what they approximate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import isqrt

import torch
from torch import Tensor

from ..linalg.canonical import positive
from ..linalg.client_forms import Clients
from ..linalg.orthonormal import straightened
from ..linalg.ragged import Ragged
from ..linalg.random_signs import sign_matrix, start_matrix
from ..linalg.vocabulary import Vocabulary, working
from ..runtime.threads import all_threads
from .base import Factors, Found, Principal, Settings, Triplets, fill, row_votes
from .operators import MeanProjector, MeanUpdate, Voters
from .stopping import ANCHORED, MOST, SETTLED, Ritz, StopRule, subspace_iteration

__all__ = ["CANCELLED", "SIDES", "TallSolver", "principal", "short_terms", "start_block"]

SIDES = ("left", "right")
# Eigenvalues of a mean projector below this fraction of the top are rounding of fp32 products.
ROUNDED = 1e-12
# N²(d_out + d_in) up to which N × N Gram matrices cost less than two milliseconds.
CHEAP = 2**28
# Rows whose sketches exist at a time; why: more would need as much memory as both factors.
SKETCHED = 2**14
# ‖W‖² over the sizes of its terms from which products in the working precision tell it to 1e-5.
CANCELLED = 2.0**-8
# Length of the terms of a unit vector from which it is summed in fp64: a badly factored client.
LONG = 2.0**8
# Singular values over the largest below which their squares in fp64 leave vectors askew.
WEAK = 1e-5


class TallSolver:
    """Randomized solutions for stacks too tall for N × N eigenproblems; one module at a time.

    Cost per module: 4 N d k flops a side and whole power step, with k = R + oversample columns.
    """

    def __init__(self, v: Vocabulary, factors: Factors, settings: Settings) -> None:
        self.v, self.settings = v, settings
        self.ragged, self.roundoff = factors.ragged, factors.roundoff
        self.b, self.a, self.scale, self.size = v.pair(factors.b, factors.a, self.ragged)
        self.scaling = factors.scaling * self.size
        self.dtype = working(self.b.dtype)
        self.unit = torch.finfo(self.dtype).eps / 2

    @cached_property
    def client_grams(self) -> list[Tensor]:
        """(L, K, r, r) of b and of a, as they are scaled."""
        return [self.v.gram(rows, self.ragged) for rows in (self.b, self.a)]

    @cached_property
    def clients(self) -> Clients:
        gram_b, gram_a = self.client_grams
        tau_rel = self.settings.tau_rel
        return self.v.canonical(gram_b, gram_a, self.ragged, self.scaling, tau_rel, self.roundoff)

    @cached_property
    def sizes(self) -> Tensor:
        if self.settings.client_statistics or self.settings.basis != "update":
            return self.clients.size
        size = self.v.lengths(self.b) * self.v.lengths(self.a)
        return self.scaling.abs() * self.ragged.segment_sum(size)

    def coefficients(self, p: Tensor) -> Tensor:
        return self.ragged.per_row(p * self.scaling)

    def mean(self, p: Tensor) -> MeanUpdate:
        return MeanUpdate(self.v, self.b, self.a, self.coefficients(p))

    def triplets(self, p: Tensor, warm: Tensor | None) -> Triplets:
        rule = StopRule(self.settings, True, self.unit, ANCHORED)
        return self._triplets(self._iterate(p, warm, rule))

    def update(self, p: Tensor, warm: Tensor | None) -> Found:
        rule = StopRule(self.settings, True, self.unit)
        return self._update(self._triplets(self._iterate(p, warm, rule)))

    def _update(self, lead: Triplets) -> Found:
        """W̄ᵀU = V Σ is known already: no core to be made (7.2)."""
        reach = lead.x[:, :0], lead.y[:, :0]
        if self.settings.client_statistics:
            reach = self.v.times(self.b, lead.x), self.v.times(self.a, lead.y)
        sigma = torch.stack([lead.sigma, lead.sigma])
        return Found(
            lead.x, lead.sigma[..., : self.settings.rank], lead.y, reach,
            lead.sigma, lead.norm, sigma, sigma, lead.steps, True,
        )  # fmt: skip

    def consensus(
        self,
        votes: Tensor,
        anchor: tuple[Triplets, Tensor] | None,
        p: Tensor,
        warm: tuple[Tensor | None, Tensor | None],
    ) -> Found:
        extra = [rows[:, :0].mT.to(self.dtype) for rows in (self.b, self.a)]
        if anchor is not None:
            lead, vote = anchor
            column = vote.sqrt()[..., None, :].to(self.dtype)
            extra = [lead.x * column, lead.y * column]
        voices = row_votes(self.clients, votes, self.settings)
        known = None if anchor is None else extra[1]
        left = Voters(self.clients.t_u, voices, extra[0])
        right = Voters(self.clients.t_v, voices, extra[1])
        return self._solve((left, right), p, known, warm)

    def _solve(
        self,
        voters: tuple[Voters, Voters],
        p: Tensor,
        known: Tensor | None,
        warm: tuple[Tensor | None, Tensor | None],
    ) -> Found:
        """`consensus` where it is known who votes; `known` are right vectors of W̄ or near them."""
        mean = self.mean(p)
        sides = (
            self._principal(0, voters[0], mean.next, warm[0]),
            self._principal(1, voters[1], mean, warm[1]),
        )
        return self.between(sides, p, *self._spectrum(p, known))

    def _principal(
        self, side: int, voters: Voters, mean: MeanUpdate, *known: Tensor | None
    ) -> Principal:
        rows = (self.b, self.a)[side]
        return principal(self.v, SIDES[side], rows, self.ragged, voters, self.settings, known, mean)

    def _spectrum(self, p: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """σ and norm of W̄ for certificates: one step tells enough where steps are dear."""
        most = MOST if self._is_cheap else 1
        rule = StopRule(self.settings, True, self.unit, most=most)
        lead = self._triplets(self._iterate(p, known, rule))
        return lead.sigma, lead.norm

    def between(
        self, sides: tuple[Principal, Principal], p: Tensor, sigma: Tensor, norm: Tensor
    ) -> Found:
        """The core (7.1) between two bases, from the factors themselves."""
        v, (left, right) = self.v, sides
        core, z_u, z_v = v.core(self.b, self.a, left.basis, right.basis, self.coefficients(p))
        x, s, y = v.svd(core)
        width = max(left.values.shape[-1], right.values.shape[-1])
        values, energies = (
            torch.stack([fill(x, width) for x in pair])
            for pair in ((left.values, right.values), (left.energies, right.energies))
        )
        return Found(
            v.combine(left.basis, x), s, v.combine(right.basis, y),
            (v.product(z_u, x), v.product(z_v, y)), sigma, norm,
            values, energies, max(left.steps, right.steps), True,
        )  # fmt: skip

    def _iterate(
        self, p: Tensor, warm: Tensor | None, rule: StopRule, norm2: Tensor | None = None
    ) -> Ritz:
        """Alternating half-steps, each a Rayleigh–Ritz problem of its own, from W Ω.

        norm2 is ‖W‖² where it is known.
        """
        mean, settings = self.mean(p), self.settings
        first, rule.drawn = start_block(self.a, "right", settings, warm), warm is None
        whole = min(self.b.shape[-1], self.a.shape[-1]) <= first.shape[-1]

        def total(x: Tensor, images: Tensor, seen: Tensor) -> Tensor:
            if norm2 is not None or self._is_cheap:
                return torch.maximum(self._norm2(p) if norm2 is None else norm2, seen)
            return seen if whole else seen + self._missed(mean.coef, x, images)

        return subspace_iteration(self.v, mean.next, mean.apply(first), rule, total)

    @property
    def _is_cheap(self) -> bool:
        return self.b.shape[-2] ** 2 * (self.b.shape[-1] + self.a.shape[-1]) <= CHEAP

    def _norm2(self, p: Tensor) -> Tensor:
        """‖W‖² from both N × N Gram matrices, in fp64 where their terms cancel."""
        coef = self.coefficients(p)
        for gram in (self.v.overlaps, self._precise_gram):
            terms = coef[..., :, None] * gram(self.b).double() * gram(self.a) * coef[..., None, :]
            total = terms.sum((-2, -1))
            if bool((total > CANCELLED * terms.abs().sum((-2, -1))).all()):
                break
        return total

    def _precise_gram(self, rows: Tensor) -> Tensor:
        columns = rows.mT
        return self.v.inner(columns, columns)

    def _missed(self, coef: Tensor, q: Tensor, images: Tensor) -> Tensor:
        """‖(I − QQᵀ)W‖² of orthonormal q with images WᵀQ, from a sketch of both sides (12.9)."""
        width = isqrt(min(self.b.shape[-1], self.a.shape[-1]) * q.shape[-1]) | 1
        seed, coef = self.settings.seed, coef[..., None].to(self.dtype)
        runs = list(zip(*(x.split(SKETCHED, -2) for x in (self.b, self.a, coef)), strict=True))
        parts = []
        for i, (b, a, c) in enumerate(runs):
            ends = i == len(runs) - 1
            left = count_sketch([b, q.mT][: 1 + ends], 0, width, seed)
            right = count_sketch([a, -images.mT][: 1 + ends], 1, width, seed)
            right[..., : a.shape[-2], :].mul_(c)
            parts.append(self.v.lift(left, right))
        missed = sum(parts[1:], parts[0])
        return torch.linalg.vector_norm(missed, dim=(-2, -1)).double().square()

    def _triplets(self, ritz: Ritz) -> Triplets:
        """The basis on one side; its images, orthonormal by their Gram matrix, on the other."""
        v, rank = self.v, self.settings.rank
        sigma = fill(ritz.theta.sqrt(), max(rank + 1, ritz.theta.shape[-1]))
        lead = sigma[..., None, :rank]
        turn = fill(ritz.vectors, rank) * (lead > 0)
        on = v.combine(ritz.x, turn)
        seen = v.combine(ritz.images.block.double(), turn / positive(lead))
        if bool((lead < WEAK * lead[..., :1]).any()):
            seen = straightened(v, seen) * (lead > 0)
        seen = seen.to(self.dtype)
        x, y = (seen, on) if ritz.blocks % 2 else (on, seen)
        return Triplets(x, y, sigma, ritz.total.sqrt(), ritz.steps)


def count_sketch(stacks: Sequence[Tensor], side: int, width: int, seed: int) -> Tensor:
    """(L, n, width): rows of stacks (L, ·, d), one below the other, with random signs.

    Numbers that are `width` apart are added up. Squared lengths of sketched combinations of rows
    have a relative error of √(2/width) at most. An odd width does not keep step with what repeats
    along a row, such as heads.
    """
    counts = [rows.shape[-2] for rows in stacks]
    dtype = working(*(rows.dtype for rows in stacks))
    out = stacks[0].new_zeros(*stacks[0].shape[:-2], sum(counts), width, dtype=dtype)
    with all_threads():
        for rows, onto in zip(stacks, out.split(counts, -2), strict=True):
            d = rows.shape[-1]
            signs = sign_matrix(seed, "probe", d, 2, rows.dtype, rows.device)[:, side]
            for part, sign in zip(rows.split(width, -1), signs.split(width), strict=True):
                onto[..., : len(sign)].addcmul_(part, sign)
    return out


def start_block(rows: Tensor, side: str, settings: Settings, *known: Tensor | None) -> Tensor:
    """(1, d, k): columns known to matter, zero ones left out, then seeded signs of this side.

    At least `oversample` signs, and R + oversample columns in all; the whole space where d is no
    larger than that.
    """
    d, count = rows.shape[-1], settings.columns
    given = [x[..., (x != 0).any(-2)[0]].to(rows.dtype) for x in known if x is not None]
    if count < d:
        count = max(count - sum(x.shape[-1] for x in given), settings.oversample)
    signs = start_matrix(settings.seed, side, d, count, rows.dtype, rows.device)[None]
    return torch.cat([*given, signs], -1) if given and count < d else signs


def short_terms(v: Vocabulary, rows: Tensor, t: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor]:
    """Rows and T with the same unit vectors T_iᵀ x_i, turned in fp64 where terms are long.

    So long that the working precision would round their sums away; T is then the identity.
    """
    terms = ragged.segment_sum((t.abs() * v.lengths(rows)[..., None]).amax(-1))
    if not bool((terms > LONG).any()):
        return rows, t
    own = torch.eye(ragged.max_rank).to(t).expand(len(rows), ragged.clients, -1, -1)
    return v.turned(rows.double(), ragged, t).to(working(rows.dtype)), ragged.unpad(own)


def principal(
    v: Vocabulary,
    side: str,
    rows: Tensor,
    ragged: Ragged,
    voters: Voters,
    settings: Settings,
    known: tuple[Tensor | None, ...] = (),
    mean: MeanUpdate | None = None,
) -> Principal:
    """Leading eigenpairs of the mean projector M Mᵀ of one side.

    The first block is M·orth(Mᵀ Ω): the range of M Mᵀ Ω without squaring its small directions
    into rounding. Ω holds directions that are most of the answer, the anchor's and `known`, and
    seeded signs.

    Parameters
    ----------
    mean : MeanUpdate, optional
        W̄ as it acts on this side's vectors, for their energies; all alike without.
    """
    trace, count = voters.trace(ragged), settings.columns
    rows, t = short_terms(v, rows, voters.t, ragged)
    voters = replace(voters, t=t)
    operator = MeanProjector(v, rows, ragged, voters)

    def energies(x: Tensor, vectors: Tensor) -> Tensor:
        if mean is None:
            return torch.ones_like(vectors[..., 0, :])
        return v.lengths(mean.apply(v.combine(x, vectors)).mT).square()

    first = start_block(rows, side, settings, voters.extra, *known)
    start = operator.apply(v.qr(operator.apply_t(first))[0])
    rule = StopRule(settings, False, torch.finfo(start.dtype).eps / 2, SETTLED, energies)
    ritz = subspace_iteration(v, operator, start, rule, lambda *_: trace)
    values = fill(ritz.theta * (ritz.theta > ROUNDED * ritz.theta[..., :1]), count)
    vectors = fill(ritz.vectors, count) * (values > 0)[..., None, :]
    basis = v.combine(ritz.x, vectors[..., : settings.rank])
    return Principal(basis, values, energies(ritz.x, vectors), trace, ritz.steps)
