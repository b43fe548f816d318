"""What the algorithm asks of a solver, and which of the three routes answers.

`GramRoute` solves N × N eigenproblems in fp64 and is exact. `DualRoute` iterates in N-space, on
Gram matrices of the clients' orthonormal bases; `KrylovRoute` iterates on tall blocks and never
forms anything N × N. `gram_route_limit` and `dual_route_limit` pick by the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..linalg.ragged import Ragged

__all__ = [
    "Coordinates",
    "Mean",
    "Principal",
    "Route",
    "Side",
    "Triplets",
    "dual_route_limit",
    "fill",
    "gram_route_limit",
]


@dataclass(frozen=True)
class Side:
    """One side of the clients' factors: a row stack and where each client's rows are.

    Attributes
    ----------
    name : str
        ``"left"`` for b (columns of the update), ``"right"`` for a.
    rows : Tensor (L, N, d)
    """

    name: str
    rows: Tensor
    ragged: Ragged


@dataclass(frozen=True)
class Coordinates:
    """The voters: M = [x_iᵀ T_i √c_i, extra], whose M Mᵀ is the mean projector.

    Attributes
    ----------
    t : Tensor (L, N, r_max) fp64
    votes : Tensor (L, N) fp64
        c_ij = w_i f_ij, at row j of client i.
    extra : Tensor (L, d, e)
        Further columns of M (the anchor); e may be 0.
    """

    t: Tensor
    votes: Tensor
    extra: Tensor

    def fold(self, ragged: Ragged, z: Tensor) -> Tensor:
        """(L, N, k) → (L, N, k): √c_i T_iᵀ z_i per client."""
        folded = ragged.unpad(ragged.pad(self.t).mT @ ragged.pad(z))
        return self.votes.sqrt()[..., None] * folded

    def unfold(self, ragged: Ragged, z: Tensor) -> Tensor:
        """(L, N, k) → (L, N, k): T_i √c_i z_i per client."""
        return ragged.unpad(ragged.pad(self.t) @ ragged.pad(self.votes.sqrt()[..., None] * z))

    def trace(self, ragged: Ragged) -> Tensor:
        """(L,): tr M Mᵀ, dropped directions left out."""
        alive = ragged.unpad((ragged.pad(self.t) != 0).any(-2)[..., None])[..., 0]
        return (self.votes * alive).sum(-1) + self.extra.double().square().sum((-2, -1))


@dataclass(frozen=True)
class Mean:
    """A mean Σ_i p_i ΔW_i of the clients' updates.

    Attributes
    ----------
    share : Tensor (L, N) fp64
        p_i at each row of client i.
    coef : Tensor (L, N) fp64
        p_i s_i: the mean is Σ_j coef_j b_j a_jᵀ over the factor rows.
    """

    share: Tensor
    coef: Tensor

    @classmethod
    def of(cls, ragged: Ragged, p: Tensor, scaling: Tensor) -> Mean:
        """From p and scaling (L, K)."""
        return cls(ragged.spread(p), ragged.spread(p * scaling))


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of a mean.

    Attributes
    ----------
    x, y : Tensor (L, d_out, R), (L, d_in, R)
        Orthonormal, or zero where the rank ends.
    sigma : Tensor (L, ≥ R + 1) fp64
        Leading singular values, more than R of them where they exist, zero beyond the rank.
    norm : Tensor (L,) fp64
        Frobenius norm of the whole matrix.
    steps : int
        Power iterations taken.
    """

    x: Tensor
    y: Tensor
    sigma: Tensor
    norm: Tensor
    steps: int


@dataclass(frozen=True)
class Principal:
    """Leading eigenpairs of a mean projector M Mᵀ.

    Attributes
    ----------
    basis : Tensor (L, d, R)
    eigenvalues : Tensor (L, m) fp64
        Descending, m as many as the route knows.
    energies : Tensor (L, m) fp64
        ‖u_kᵀW̄‖² of each eigenvector (‖W̄u_k‖² on the right).
    trace : Tensor (L,) fp64
        tr M Mᵀ.
    steps : int
    """

    basis: Tensor
    eigenvalues: Tensor
    energies: Tensor
    trace: Tensor
    steps: int


class Route(Protocol):
    """A way to find consensus bases and leading triplets."""

    def spectrum(self, mean: Mean, rank: int, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """σ (L, R + 1) and Frobenius norm (L,) of a mean, for certificates.

        known: right singular vectors of a similar mean, as `triplets` gave them.
        """
        ...

    def update(self, mean: Mean, rank: int, warm: Tensor | None) -> Triplets:
        """Leading triplets of a mean."""
        ...

    def triplets(self, mean: Mean, rank: int, warm: Tensor | None) -> Triplets:
        """The same, x and y in the route's own coordinates: `extra` columns of its `principal`."""
        ...

    def principal(
        self,
        side: Side,
        other: Side,
        voters: Coordinates,
        rank: int,
        mean: Mean,
        warm: Tensor | None,
    ) -> Principal:
        """Leading eigenpairs of the mean projector of one side, and the mean's energy in each."""
        ...


def gram_route_limit(rank: int) -> int:
    """Largest N for which N × N eigenproblems cost no more than iterations (measured, CPU)."""
    return max(128, 3 * (rank + 16))


def dual_route_limit(rank: int, d_out: int, d_in: int) -> int:
    """Largest N for which N × N Gram matrices cost less than the passes they save.

    Gram matrices of both sides cost as much as N/(2(R + 16)) pairs of passes over the stacks;
    the four problems of a consensus take about ten. A stack wider than long has nothing to gain.
    """
    return min(20 * (rank + 16), d_out, d_in)


def fill(x: Tensor, columns: int) -> Tensor:
    """The first `columns` columns, zero columns appended where there are fewer."""
    have = x.shape[-1]
    return x[..., :columns] if have >= columns else torch.nn.functional.pad(x, (0, columns - have))
