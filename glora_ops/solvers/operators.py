"""The two operators every basis comes from, each once in the long space and once in N-space.

The mean update W̄ = Σ_j coef_j b_j a_jᵀ, and the mean projector M Mᵀ of one side (5.1). In N-space,
with the clients' canonical bases side by side, Q = [Q_i] and Z = [Z_i], a tall vector Q z is N
coordinates z with the metric G_U = QᵀQ.

An iteration asks for `images`: what the operator makes of a block X, with the Gram matrices of X
and of the images (12.1), from which Ritz values come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..linalg.ragged import Ragged
from ..linalg.vocabulary import Vocabulary

__all__ = [
    "Images",
    "MeanProjector",
    "MeanUpdate",
    "NSpaceProjector",
    "NSpaceUpdate",
    "Operator",
    "Voters",
]


@dataclass(frozen=True)
class Images:
    """What an operator O made of a block X.

    Attributes
    ----------
    block : Tensor (L, n, k)
        Spans the next block: O X of one half-step, or O Oᵀ X of a whole one.
    gram : Tensor (L, k, k) fp64, optional
        XᵀX in the metric; None where X is orthonormal.
    energy : Tensor (L, k, k) fp64
        (Oᵀ X)ᵀ(Oᵀ X): Ritz values of O Oᵀ come from it.
    """

    block: Tensor
    gram: Tensor | None
    energy: Tensor


class Operator(Protocol):
    """A symmetric operator O Oᵀ, or the two halves of it in turn (`half`)."""

    half: bool

    @property
    def next(self) -> Operator:
        """What the images are to be given to."""

    def images(self, x: Tensor) -> Images:
        """Of a block (L, n, k)."""


@dataclass(frozen=True)
class Voters:
    """M = [x_iᵀ T_i √c_i, extra], whose M Mᵀ is the mean projector.

    Attributes
    ----------
    t : Tensor (L, N, r_max) fp64
    votes : Tensor (L, N) fp64
        c_ij = p_i f_ij, at row j of client i.
    extra : Tensor (L, d, e)
        Further columns of M (the anchor); e may be 0.
    """

    t: Tensor
    votes: Tensor
    extra: Tensor

    def trace(self, ragged: Ragged) -> Tensor:
        """(L,): tr M Mᵀ, dropped directions left out."""
        alive = ragged.unpad((ragged.pad(self.t) != 0).any(-2)[..., None])[..., 0]
        extra = torch.linalg.vector_norm(self.extra, dim=-2).double().square().sum(-1)
        return (self.votes * alive).sum(-1) + extra


class MeanUpdate:
    """W = Σ_j coef_j b_j a_jᵀ on tall blocks; `coef` is (L, N)."""

    half = True

    def __init__(self, v: Vocabulary, b: Tensor, a: Tensor, coef: Tensor) -> None:
        self.v, self.b, self.a, self.coef = v, b, a, coef

    def apply(self, y: Tensor) -> Tensor:
        """(L, d_out, k): W y."""
        return self.pulled(self.v.times(self.a, y))

    def pulled(self, z: Tensor) -> Tensor:
        """(L, d_out, k): bᵀ diag(coef) z, W y for z = a y."""
        return self.v.lift(self.b, self.coef[..., None] * z)

    @property
    def next(self) -> MeanUpdate:
        """Wᵀ, for the half-step that follows."""
        return MeanUpdate(self.v, self.a, self.b, self.coef)

    def images(self, x: Tensor) -> Images:
        block = self.apply(x)
        return Images(block, None, self.v.inner(block, block))


class MeanProjector:
    """M Mᵀ = Σ x_iᵀ T_i c_i T_iᵀ x_i + extra extraᵀ on tall blocks."""

    half = False

    def __init__(self, v: Vocabulary, rows: Tensor, ragged: Ragged, voters: Voters) -> None:
        self.v, self.rows, self.ragged, self.voters = v, rows, ragged, voters
        self.root = voters.votes.sqrt()

    @property
    def next(self) -> MeanProjector:
        return self

    def apply(self, z: Tensor) -> Tensor:
        """(L, d, k): M z."""
        in_rows, in_extra = z.split([self.ragged.rows, z.shape[-2] - self.ragged.rows], -2)
        y = self.v.lift(self.rows, self.v.unfold(self.voters.t, self.root, self.ragged, in_rows))
        return y + self.v.combine(self.voters.extra, in_extra)

    def apply_t(self, y: Tensor) -> Tensor:
        """(L, N + e, k) fp64: Mᵀ y."""
        return self.folded(self.v.times(self.rows, y), y)

    def folded(self, reached: Tensor, y: Tensor) -> Tensor:
        """Mᵀ y where x y is known."""
        folded = self.v.fold(self.voters.t, self.root, self.ragged, reached)
        return torch.cat([folded, self.v.inner(self.voters.extra, y)], -2)

    def images(self, x: Tensor) -> Images:
        z = self.apply_t(x)
        return Images(self.apply(z), None, z.mT @ z)


class NSpaceUpdate:
    """W = Q D Zᵀ on coordinates: W Wᵀ (Q x) = Q (D G_V D G_U x), D = diag(strength) (12.2).

    grams (2, N, N) holds G_U and G_V; strength is (1, N, 1).
    """

    half = False

    def __init__(self, v: Vocabulary, grams: Tensor, strength: Tensor) -> None:
        self.v, (self.left, self.right) = v, grams.split(1)
        self.strength = strength

    @property
    def next(self) -> NSpaceUpdate:
        return self

    def images(self, x: Tensor) -> Images:
        seen = self.v.product(self.left, x)
        crossed = self.strength * seen
        back = self.v.product(self.right, crossed)
        inner = self.v.inner
        return Images(self.strength * back, inner(x, seen), inner(crossed, back))


class NSpaceProjector:
    """Q (H + ref refᵀ) Qᵀ on coordinates, both sides at once; H = diag(votes) (12.3)."""

    half = False

    def __init__(self, v: Vocabulary, grams: Tensor, votes: Tensor, ref: Tensor) -> None:
        self.v, self.grams, self.ref = v, grams, ref
        self.votes = votes[..., None].to(grams.dtype)

    @property
    def next(self) -> NSpaceProjector:
        return self

    def apply(self, seen: Tensor) -> Tensor:
        """(2, N, k): coordinates of Q (H + ref refᵀ) y for seen = Qᵀ y."""
        return self.votes * seen + self.ref @ (self.ref.mT @ seen)

    def images(self, x: Tensor) -> Images:
        seen, inner = self.v.times(self.grams, x).to(x.dtype), self.v.inner
        block = self.apply(seen)
        return Images(block, inner(x, seen), inner(seen, block))
