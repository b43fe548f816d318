"""The exact route: all eigenproblems in N-space, fp64, two passes over the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from .canonical import U64, Balanced, balance, canonical_forms, singular_values
from .ragged import Ragged
from .solver import Coordinates, Mean, Principal, Side, Triplets, fill
from .tall import orthonormalise
from .vocabulary import Vocabulary, working

__all__ = ["GramRoute", "principal_gram", "whole_gram"]


class GramRoute:
    """Both N × N Gram matrices once; everything else follows from them.

    Cost per module: 2 N² d flops and 8 N d bytes a side, and a few N × N eigenproblems.
    """

    def __init__(self, v: Vocabulary, left: Side, right: Side) -> None:
        self.v = v
        self.left, self.right = left, right
        self.grams = {side.name: whole_gram(v, side) for side in (left, right)}

    def client_grams(self) -> tuple[Tensor, Tensor]:
        ragged = self.left.ragged
        return (
            ragged.diagonal_blocks(self.grams["left"]),
            ragged.diagonal_blocks(self.grams["right"]),
        )

    def spectrum(self, mean: Mean, rank: int, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pair, norm = self._whole(mean.coef)
        return fill(singular_values(pair, self.v.eigh), rank + 1), norm

    def _whole(self, coef: Tensor) -> tuple[Balanced, Tensor]:
        """All rows as one client, and the norm of its update."""
        gram_b = coef[..., :, None] * self.grams["left"] * coef[..., None, :]
        gram_a = self.grams["right"]
        norm2 = (gram_b * gram_a).sum((-2, -1)).clamp(min=0)
        return balance(gram_b, gram_a), norm2.sqrt()

    def triplets(self, mean: Mean, rank: int, warm: Tensor | None = None) -> Triplets:
        pair, norm = self._whole(mean.coef)
        forms = canonical_forms(pair, self.v.eigh, rank)
        x = lifted(self.v, self.left.rows, mean.coef[..., :, None] * forms.t_u)
        y = lifted(self.v, self.right.rows, forms.t_v)
        return Triplets(fill(x, rank), fill(y, rank), fill(forms.sigma, rank + 1), norm, 0)

    def principal(
        self,
        side: Side,
        other: Side,
        voters: Coordinates,
        rank: int,
        mean: Mean,
        warm: Tensor | None = None,
    ) -> Principal:
        return principal_gram(
            self.v, side, self.grams[side.name], voters, rank, mean.coef, self.grams[other.name]
        )


def whole_gram(v: Vocabulary, side: Side) -> Tensor:
    """(L, N, N) fp64: x xᵀ of the whole stack."""
    return v.gram(side.rows, Ragged.whole(side.ragged.rows, side.rows.device))[:, 0]


def lifted(v: Vocabulary, rows: Tensor, z: Tensor, extra: Tensor | float = 0.0) -> Tensor:
    """rowsᵀ z + extra with orthonormal columns, computed in fp64 and rounded at the end.

    In fp32 the error u32·ρ of one badly stored client would tilt every column, a loud client's
    directions included.
    """
    return orthonormalise(v, v.inner(rows, z) + extra).to(working(rows.dtype))


def principal_gram(
    v: Vocabulary,
    side: Side,
    gram: Tensor,
    voters: Coordinates,
    rank: int,
    coef: Tensor | None = None,
    other_gram: Tensor | None = None,
) -> Principal:
    """Eigenpairs of M Mᵀ from MᵀM (N + e square), M = [xᵀ T √c, extra].

    Parameters
    ----------
    gram : Tensor (L, N, N) fp64
        x xᵀ of this side.
    coef, other_gram : Tensor (L, N), (L, N, N) fp64, optional
        Coefficients of W̄ = Σ coef_j b_j a_jᵀ and the Gram matrix of the other side, for the
        energies; zero energies without them.
    """
    ragged, rows = side.ragged, side.rows
    folded = voters.fold(ragged, gram)  # √c Tᵀ G
    cross = v.inner(rows.mT, voters.extra)  # x · extra; fp64, or MᵀM would not be one Gram matrix
    inner = voters.fold(ragged, folded.mT.contiguous())
    edge = voters.fold(ragged, cross)
    corner = v.inner(voters.extra, voters.extra)
    top = torch.cat([(inner + inner.mT) / 2, edge], -1)
    lam, y = v.eigh(torch.cat([top, torch.cat([edge.mT, corner], -1)], -2))
    n = lam.shape[-1]
    lam = torch.where(lam > 16 * n * U64 * lam[..., :1], lam, 0.0)
    scale = torch.where(lam > 0, lam, 1.0).rsqrt() * (lam > 0)
    leading = (y * scale[..., None, :])[..., :rank]
    in_rows, in_extra = leading.split([ragged.rows, n - ragged.rows], -2)
    extra = v.combine(voters.extra.double(), in_extra)
    basis = lifted(v, rows, voters.unfold(ragged, in_rows), extra)
    energies = torch.zeros_like(lam)
    if coef is not None and other_gram is not None:
        reach = (
            (y * scale[..., None, :]).mT @ torch.cat([folded, cross.mT], -2) * coef[..., None, :]
        )
        energies = ((reach @ other_gram) * reach).sum(-1)
    return Principal(fill(basis, rank), lam, energies.clamp(min=0), lam.sum(-1), 0)
