"""The few words the algorithm is written in; a device supplies them, `algorithm` combines them.

Every tensor has a leading module dimension L. `x` is a row stack (L, N, d); "rows" are a stack
in a range where products are safe; a device may keep it in the dtype it came in. Tall
blocks (L, d, k) are views of (L, k, d) memory, so that products read them without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .ragged import Ragged

if TYPE_CHECKING:
    from .client_forms import Clients

__all__ = ["Vocabulary", "working"]


def working(*dtypes: torch.dtype) -> torch.dtype:
    """The precision of tall blocks: fp32, or fp64 where any rows are."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class Vocabulary(Protocol):
    """What a device must be able to do."""

    def each(self, word: str, *operands: Sequence[Any]) -> list[Tensor]:
        """A word of one result for both sides: [word(*x) for x in zip(*operands)].

        In one launch where the device can.
        """

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and their (L, N) fp64 scale, exact powers of two: x = scale · rows."""

    def pair(self, b: Tensor, a: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of both factors, a scale (L, N) and a size (L, K), exact powers of two.

        b = scale · rows_b and a = size/scale · rows_a, but that a row with a zero partner is zero.
        """

    def precise(self, x: Tensor) -> Tensor:
        """Rows as products in fp64 take them."""

    def lengths(self, x: Tensor) -> Tensor:
        """(L, N) fp64: norms of the rows."""

    def gram(self, rows: Tensor, ragged: Ragged) -> Tensor:
        """(L, K, r, r) fp64: x_i x_iᵀ of every client, accumulated in fp64, zero-padded."""

    def times(self, rows: Tensor, omega: Tensor) -> Tensor:
        """(L, N, k) fp64: x Ω in the working precision."""

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """(L, n, m): x y of two matrices of one dtype, in it."""

    def turned(self, rows: Tensor, ragged: Ragged, t: Tensor) -> Tensor:
        """(L, N, d): T_iᵀ x_i of every client in the working precision; t (L, N, r)."""

    def overlaps(self, q: Tensor, scale: Tensor | None = None) -> Tensor:
        """(L, N, N): q qᵀ in the working precision.

        Rows are multiplied by `scale` (L, N) fp32 first, powers of two; not those of fp64.
        """

    def whitened(self, grams: Sequence[Tensor], ragged: Ragged, turns: Sequence[Tensor]) -> Tensor:
        """(2, S·L, N, N) fp16: T_iᵀ G_ij T_j of S grams (L, N, N) as pairs, one after the other.

        A pair is hi + 2⁻¹¹ lo, of a number between -1 and 1. A client's own block is the identity
        on the columns of its T_i (L, N, r) that hold anything.
        """

    def metric_product(
        self, gamma: Tensor, z: Tensor, precise: bool = False, unit: bool = False
    ) -> Tensor:
        """(L, 2N, k): z (L, N, k) as it enters the product, and below it Γ z, in fp32.

        Its entries are rounded to 11 bits of each column's largest one, and Γ to its first term;
        where it is precise to 22 bits, and Γ to both terms. With `unit` both come in units of
        that entry's power of two: largest entries from ½ to 1.
        """

    def metric_energy(self, left: Tensor, right: Tensor, d: Tensor) -> Tensor:
        """(L,) fp64: Σ_ij d_i d_j (Γ_U)_ij (Γ_V)_ij of two pairs (2, L, N, N), for d (L, N)."""

    def sketch(
        self, stacks: Sequence[Tensor], ragged: Ragged, omegas: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`gram` and `times` of both stacks, every row read once."""

    def canonical(
        self, gram_b: Tensor, gram_a: Tensor, ragged: Ragged, scaling: Tensor, tau_rel: float,
        roundoff: float,
    ) -> Clients:  # fmt: skip
        """Canonical forms of all clients from their Gram matrices, as `client_forms.canonicalize`.

        `scaling` (L, K) fp64, `roundoff` of the dtype that factors are stored in.
        """

    def fold(self, t: Tensor, scale: Tensor, ragged: Ragged, z: Tensor) -> Tensor:
        """(L, N, k) fp64: diag(scale_i) T_iᵀ z_i per client."""

    def unfold(self, t: Tensor, scale: Tensor, ragged: Ragged, z: Tensor) -> Tensor:
        """(L, N, k): T_i diag(scale_i) z_i per client."""

    def core(
        self, b: Tensor, a: Tensor, u: Tensor, w: Tensor, coef: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """C = Σ_j coef_j (Uᵀb_j)(a_jᵀW), and the projections b U and a W; all fp64."""

    def readout(self, u: Tensor, w: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """u diag(root) and (w diag(root))ᵀ, contiguous, cut or filled with zeros to `rank`."""

    def inverse_cholesky(self, g: Tensor, drop: float) -> Tensor:
        """Upper triangular W with y W orthonormal for g = yᵀy, as `orthonormal` has it."""

    def qr(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Householder's Q (L, d, k) and R, of min(d, k) columns and rows."""

    def lift(self, rows: Tensor, z: Tensor) -> Tensor:
        """(L, d, k): xᵀ z in the working precision."""

    def combine(self, y: Tensor, c: Tensor, onto: Tensor | None = None) -> Tensor:
        """(L, d, m): y c in y's precision, for a tall y (L, d, k) and a small fp64 c (L, k, m).

        Added to `onto`, in place, where that is given.
        """

    def inner(self, y: Tensor, z: Tensor) -> Tensor:
        """(L, k, m) fp64: yᵀ z of two tall matrices, accumulated in fp64."""

    def eigh(self, g: Tensor, precise: bool = True) -> tuple[Tensor, Tensor]:
        """Eigenvalues, descending and clamped at 0, and eigenvectors of small PSD matrices.

        Not precise, a device may take fp32: a Ritz problem of fp32 products knows no more.
        """

    def eigenvalues(self, g: Tensor) -> Tensor:
        """The same without the vectors."""

    def svd(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X, S, Y with c = X diag(S) Yᵀ for small matrices."""
