"""The dual route: block Krylov iterations in N-space, on orthonormal client bases.

With the clients' canonical bases side by side, Q = [Q_i] (N columns) and Z = [Z_i], every mean is
Q D Zᵀ with a diagonal D, every mean projector Q H Qᵀ, and a tall vector Q z is N coordinates z
with the metric G = QᵀQ. Two N × N Gram matrices replace all further passes over the stacks.
Orthonormal columns keep G's entries accurate to the working precision in any gauge, which the
Gram matrices of raw factors are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..linalg.clients import Clients
from ..linalg.orthonormal import orthonormalise, whiten
from ..linalg.vocabulary import Vocabulary, working
from .base import Coordinates, Mean, Principal, Side, Triplets, fill
from .krylov import Operator, Ritz, block_krylov
from .krylov_route import ANCHORED, SETTLED, KrylovRoute, principal_krylov, start_block

__all__ = ["DualRoute"]

# An eigenvalue below this fraction of the top is not resolved by fp32 Gram matrices.
RESOLVED = 1e-5
# A sum over pairs of clients this small against the clients' own energy may be rounding.
NOISE = 2.0**-16


@dataclass(frozen=True)
class Metric:
    """Coordinates z of tall vectors Q z, seen through gram = QᵀQ (L, N, N); None: the identity."""

    v: Vocabulary
    gram: Tensor | None

    def image(self, z: Tensor) -> Tensor:
        """(L, N, k) fp64: QᵀQ z."""
        return z if self.gram is None else self.v.times(self.gram, z)

    def inner(self, y: Tensor, z: Tensor) -> Tensor:
        return y.mT @ self.image(z)

    def combine(self, y: Tensor, c: Tensor) -> Tensor:
        return y @ c

    def without(self, basis: Tensor, w: Tensor) -> Tensor:
        return w - basis @ self.inner(basis, w)

    def eigh(self, g: Tensor) -> tuple[Tensor, Tensor]:
        return self.v.eigh(g)


class DualRoute:
    """N × N products instead of passes; one module at a time.

    What ends within the rank must be found to the last digit: `tall` blocks do that, from what is
    known by then.

    Cost per module: 2 N d r + N² d flops a side, then 2 N² k flops a product.
    """

    def __init__(
        self, v: Vocabulary, left: Side, right: Side, clients: Clients, tall: KrylovRoute
    ) -> None:
        self.v, self.how, self.tall = v, tall.how, tall
        self.sigma = clients.sigma
        self.sides = {side.name: side for side in (left, right)}
        self.t = {"left": clients.t_u, "right": clients.t_v}
        self.dtype = working(left.rows.dtype)
        self._seen: dict[str, Tensor] = {}

    @cached_property
    def grams(self) -> dict[str, Tensor]:
        return {
            name: self.v.overlaps(side.rows, side.ragged, self.t[name])
            for name, side in self.sides.items()
        }

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        return {name: Metric(self.v, gram) for name, gram in self.grams.items()}

    def spectrum(self, mean: Mean, rank: int, known: Tensor | None) -> tuple[Tensor, Tensor]:
        ritz = self._iterate(
            mean, rank, None if known is None else self.metrics["right"].image(known)
        )
        return fill(ritz.theta, rank + 1).sqrt(), ritz.total.sqrt()

    def update(self, mean: Mean, rank: int, warm: Tensor | None = None) -> Triplets:
        """One problem alone does not pay for two Gram matrices."""
        return self.tall.update(mean, rank, warm)

    def triplets(self, mean: Mean, rank: int, warm: Tensor | None = None) -> Triplets:
        known = None if warm is None else self._pull(self.sides["right"], warm)
        ritz = self._iterate(mean, rank, known, ANCHORED)
        leading = ritz.vectors[..., :rank]
        x = ritz.basis @ leading
        y = orthonormalise(self.metrics["right"], ritz.images @ leading)
        sigma = fill(ritz.theta, rank + 1).sqrt()
        return Triplets(fill(x, rank), fill(y, rank), sigma, ritz.total.sqrt(), ritz.steps)

    def principal(
        self,
        side: Side,
        other: Side,
        voters: Coordinates,
        rank: int,
        mean: Mean,
        warm: Tensor | None = None,
    ) -> Principal:
        v, metric = self.v, self.metrics[side.name]
        n, root = side.ragged.rows, voters.votes.sqrt()[..., None]
        extra = voters.extra if voters.extra.shape[-1] else root[..., :0]

        def fold(g: Tensor) -> Tensor:
            return torch.cat([root * g, extra.mT @ g], -2)

        def apply(z: Tensor) -> Tensor:
            return root * z[..., :n, :] + extra @ z[..., n:, :]

        def held(pairs: Tensor) -> Tensor:
            reach = strength * metric.image(pairs)
            return (reach * self.metrics[other.name].image(reach)).sum(-2).clamp(min=0)

        strength = (mean.share * self.sigma)[..., None]
        pull = metric.image(extra)
        trace = (voters.votes * self.grams[side.name].diagonal(dim1=-2, dim2=-1)).sum(-1)
        trace = trace + (extra * pull).sum((-2, -1))
        known = pull if warm is None else torch.cat([pull, self._pull(side, warm)], -1)
        image = fold(self._first(side, rank, known))
        plain = Metric(v, None)
        operator = Operator(
            apply,
            lambda y: fold(metric.image(y)),
            metric,
            plain,
            self.dtype,
            self._noise(side.name),
        )
        ritz = block_krylov(
            operator,
            apply(whiten(plain, image, 1e-14)),
            lambda block, seen: (trace - seen).clamp(min=0),
            rank,
            self.how,
            SETTLED,
            held,
        )
        pairs = ritz.basis @ ritz.vectors[..., : rank + self.how.oversample]
        lam = ritz.theta[..., : rank + self.how.oversample]
        clear = int((lam[..., :rank] > RESOLVED * lam[..., :1]).sum())
        basis = orthonormalise(v, self._lift(side, pairs[..., :clear]))
        if clear < rank:
            long = Coordinates(voters.t, voters.votes, self._lift(side, extra))
            return principal_krylov(v, side, long, rank, self.how, None, mean.coef, other, basis)
        return Principal(basis, lam, held(pairs), trace, ritz.steps)

    def _iterate(
        self, mean: Mean, rank: int, known: Tensor | None, settled: float | None = None
    ) -> Ritz:
        """Ritz approximation of Q D Zᵀ, D = p σ; known: Zᵀ y of columns y to start from."""
        left, right = self.metrics["left"], self.metrics["right"]
        strength = (mean.share * self.sigma)[..., None]
        both = self.grams["left"] * self.grams["right"]
        total = (strength * self.v.times(both, strength)).sum((-2, -1))
        # Clients that cancel leave less than the rounding of this sum: what is seen then counts.
        total = total.where(total > NOISE * strength.square().sum((-2, -1)), 0.0)
        operator = Operator(
            lambda z: strength * right.image(z),
            lambda y: strength * left.image(y),
            left,
            right,
            self.dtype,
            self._noise("left"),
        )
        start = strength * self._first(self.sides["right"], rank, known)
        return block_krylov(
            operator,
            start,
            lambda block, seen: (total - seen).clamp(min=0),
            rank,
            self.how,
            settled,
        )

    def _noise(self, name: str) -> Tensor:
        """(L,): bound of the rounding of zᵀ G z for unit coordinates z."""
        return 64 * torch.finfo(self.dtype).eps / 2 * self.grams[name].abs().sum(-1).amax(-1)

    def _first(self, side: Side, rank: int, known: Tensor | None) -> Tensor:
        """(L, N, k): Qᵀ times known columns (given as that) and seeded signs to fill up."""
        if side.name not in self._seen:
            self._seen[side.name] = self._pull(side, start_block(side, rank, self.how))
        signs = self._seen[side.name]
        if known is None:
            return signs
        known = known[..., : int((known != 0).any(-2).sum())]
        count = max(signs.shape[-1] - known.shape[-1], self.how.oversample)
        return torch.cat([known, signs[..., :count]], -1)

    def _pull(self, side: Side, x: Tensor) -> Tensor:
        """(L, N, k): Qᵀ x of tall vectors x."""
        t, z = self.t[side.name], self.v.times(side.rows, x)
        return self.v.fold(t, torch.ones_like(self.sigma), side.ragged, z)

    def _lift(self, side: Side, z: Tensor) -> Tensor:
        """(L, d, k): the tall vectors Q z."""
        t, one = self.t[side.name], torch.ones_like(self.sigma)
        return self.v.lift(side.rows, self.v.unfold(t, one, side.ragged, z))
