"""The exact route: all eigenproblems in N-space, fp64, two passes over the factors.

Vectors are N coordinates z of tall vectors xᵀ z until the very end.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..linalg.canonical import U64, Balanced, balance, canonical_forms, singular_values
from ..linalg.orthonormal import orthonormalise
from ..linalg.ragged import Ragged
from ..linalg.vocabulary import Vocabulary
from .base import Coordinates, Mean, Principal, Side, Triplets, fill

__all__ = ["GramRoute", "principal_gram", "whole_gram"]


class GramRoute:
    """Both N × N Gram matrices once; everything else follows from them.

    Cost per module: N² d flops and 8 N d bytes a side, and a few N × N eigenproblems.
    """

    def __init__(self, v: Vocabulary, left: Side, right: Side) -> None:
        self.v = v
        self.left, self.right = left, right
        self.grams = {side.name: whole_gram(v, side.rows) for side in (left, right)}

    def client_grams(self) -> tuple[Tensor, Tensor]:
        ragged = self.left.ragged
        return (
            ragged.diagonal_blocks(self.grams["left"]),
            ragged.diagonal_blocks(self.grams["right"]),
        )

    def spectrum(self, mean: Mean, rank: int, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pair, norm = self._whole(mean.coef)
        return fill(singular_values(pair, self.v.eigh), rank + 1), norm

    def triplets(self, mean: Mean, rank: int, warm: Tensor | None = None) -> Triplets:
        pair, norm = self._whole(mean.coef)
        forms = canonical_forms(pair, self.v.eigh, rank)
        x = mean.coef[..., :, None] * forms.t_u
        return Triplets(fill(x, rank), fill(forms.t_v, rank), fill(forms.sigma, rank + 1), norm, 0)

    def update(self, mean: Mean, rank: int, warm: Tensor | None = None) -> Triplets:
        found = self.triplets(mean, rank)
        energies = found.sigma[..., :rank].square()
        x = self._lifted(self.left, found.x, energies, mean)
        y = self._lifted(self.right, found.y, energies, mean)
        return replace(found, x=x, y=y)

    def principal(
        self,
        side: Side,
        other: Side,
        voters: Coordinates,
        rank: int,
        mean: Mean,
        warm: Tensor | None = None,
    ) -> Principal:
        if not voters.extra.shape[-1]:  # without an anchor it has d rows, not N
            voters = replace(voters, extra=voters.t[..., :0])
        z, lam, image = principal_gram(self.v, side.ragged, self.grams[side.name], voters)
        reach = mean.coef[..., None] * image
        energies = (reach * (self.grams[other.name] @ reach)).sum(-2)
        basis = self._lifted(side, z[..., :rank], energies[..., :rank], mean)
        return Principal(fill(basis, rank), lam, energies.clamp(min=0), lam.sum(-1), 0)

    def _whole(self, coef: Tensor) -> tuple[Balanced, Tensor]:
        """All rows as one client, and the norm of its update."""
        gram_b = coef[..., :, None] * self.grams["left"] * coef[..., None, :]
        gram_a = self.grams["right"]
        norm2 = (gram_b * gram_a).sum((-2, -1)).clamp(min=0)
        return balance(gram_b, gram_a), norm2.sqrt()

    def _lifted(self, side: Side, z: Tensor, energies: Tensor, mean: Mean) -> Tensor:
        """Bases good to the mean's own rounding, Σ_j |coef_j|‖b_j‖‖a_j‖, times the roundoff."""
        length = [g.diagonal(dim1=-2, dim2=-1).sqrt() for g in self.grams.values()]
        size = (mean.coef.abs() * length[0] * length[1]).sum(-1)
        tilt2 = (rounding2(self.grams[side.name], z) * energies).sum(-1)
        return lifted(self.v, side.rows, z, tilt2 > (2 * size).square())


def whole_gram(v: Vocabulary, rows: Tensor) -> Tensor:
    """(L, N, N) fp64: x xᵀ of a whole stack."""
    return v.gram(rows, Ragged.whole(rows.shape[-2], rows.device))[:, 0]


def rounding2(gram: Tensor, z: Tensor) -> Tensor:
    """(L, k): squared error of the columns of xᵀ z in the rows' precision, in units of roundoff."""
    return (gram.diagonal(dim1=-2, dim2=-1)[..., None] * z.square()).sum(-2)


def lifted(v: Vocabulary, rows: Tensor, z: Tensor, exactly: Tensor) -> Tensor:
    """rowsᵀ z with orthonormal columns; `exactly` (L,) names modules that need fp64.

    In fp32 the error u32·ρ of one badly stored client tilts every column it takes part in, a loud
    client's directions included.
    """
    basis = orthonormalise(v, v.lift(rows, z))
    if not bool(exactly.any()):
        return basis
    precise = orthonormalise(v, v.inner(rows, z)).to(basis.dtype)
    return torch.where(exactly[:, None, None], precise, basis)


def principal_gram(
    v: Vocabulary, ragged: Ragged, gram: Tensor, voters: Coordinates
) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenpairs of M Mᵀ from MᵀM, M = xᵀ [T √c, extra] for `extra` (L, n, e) in coordinates.

    Parameters
    ----------
    gram : Tensor (L, n, n) fp64
        x xᵀ; the first N rows of x are the clients'.

    Returns
    -------
    z : Tensor (L, n, N + e) fp64
        xᵀ z are the eigenvectors.
    lam : Tensor (L, N + e) fp64
    image : Tensor (L, n, N + e) fp64
        x xᵀ z.
    """
    n, extra = ragged.rows, voters.extra

    def fold(g: Tensor) -> Tensor:
        return torch.cat([voters.fold(ragged, g[..., :n, :]), extra.mT @ g], -2)

    folded = fold(gram)
    inner = fold(folded.mT.contiguous())
    lam, y = v.eigh((inner + inner.mT) / 2)
    lam = torch.where(lam > 16 * lam.shape[-1] * U64 * lam[..., :1], lam, 0.0)
    y = y * (torch.where(lam > 0, lam, 1.0).rsqrt() * (lam > 0))[..., None, :]
    in_rows, in_extra = y.split([n, y.shape[-2] - n], -2)
    z = extra @ in_extra
    z[..., :n, :] += voters.unfold(ragged, in_rows)
    return z, lam, folded.mT @ y
