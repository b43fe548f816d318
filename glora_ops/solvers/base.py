"""What every solver takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..linalg.client_forms import Clients
from ..linalg.ragged import Ragged
from ..linalg.vocabulary import Vocabulary

__all__ = ["Factors", "Found", "Principal", "Settings", "Solver", "Triplets", "fill", "row_votes"]


@dataclass(frozen=True)
class Settings:
    """What a caller may choose; the op's arguments of the same names."""

    rank: int
    basis: str = "consensus"
    tau_rel: float = 0.1
    anchor: float = 1.0
    oversample: int = 16
    power_iters: int = -1
    tol: float = 1e-3
    seed: int = 0
    client_statistics: bool = True

    @property
    def columns(self) -> int:
        """R + p: the width of an iterated block, and how many eigenvalues are reported."""
        return self.rank + self.oversample


@dataclass(frozen=True)
class Factors:
    """The clients' factors: row stacks of L modules, and where each client's rows are.

    Attributes
    ----------
    b, a : Tensor (L, N, d_out), (L, N, d_in)
    ragged : Ragged
    scaling : Tensor (L, K) fp64
    roundoff : float
        Of the dtype they are stored in.
    """

    b: Tensor
    a: Tensor
    ragged: Ragged
    scaling: Tensor
    roundoff: float


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of a mean, x and y in the solver's own coordinates.

    Attributes
    ----------
    x, y : Tensor (L, ·, R)
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
    """Leading eigenpairs of the mean projector of one side.

    Attributes
    ----------
    basis : Tensor (L, d, R)
    values, energies : Tensor (L, m) fp64
        Descending eigenvalues, and ‖u_kᵀW̄‖² of each eigenvector (‖W̄u_k‖² on the right).
    trace : Tensor (L,) fp64
    steps : int
    """

    basis: Tensor
    values: Tensor
    energies: Tensor
    trace: Tensor
    steps: int


@dataclass(frozen=True)
class Found:
    """Ŵ = u diag(s) vᵀ, and what its certificates are made of.

    Attributes
    ----------
    u, v : Tensor (L, d, R)
        Orthonormal, or zero where the rank ends; signs as they came.
    s : Tensor (L, R) fp64
        Singular values of the core (7.1), descending.
    reach : tuple of Tensor (L, N, R) fp64
        Rows of b u and of a v, in the units of the clients' coordinates; of no use, and of no
        columns, where nobody asks for client statistics.
    sigma, norm : Tensor (L, ≥ R + 1), (L,) fp64
        Leading singular values and Frobenius norm of W̄.
    values, energies : Tensor (2, L, m) fp64
        Eigenvalues of the two mean projectors, and ‖u_kᵀW̄‖² of their eigenvectors; for `update`
        twice the singular values of W̄.
    steps : int
    randomized : bool
    """

    u: Tensor
    s: Tensor
    v: Tensor
    reach: tuple[Tensor, Tensor]
    sigma: Tensor
    norm: Tensor
    values: Tensor
    energies: Tensor
    steps: int
    randomized: bool


class Solver(Protocol):
    """A way to find consensus bases, leading triplets and the core between them.

    Attributes
    ----------
    v : Vocabulary
    roundoff : float
        Of the stored factors.
    unit : float
        Of the working precision.
    """

    v: Vocabulary
    roundoff: float
    unit: float

    @property
    def clients(self) -> Clients:
        """Canonical forms (3.2) of the clients, in the solver's own coordinates."""

    @property
    def sizes(self) -> Tensor:
        """(L, K): |s_i|‖B_i‖_F‖A_i‖_F after balancing (3.1)."""

    def coefficients(self, p: Tensor) -> Tensor:
        """(L, N): the mean with weights p (L, K) is the sum of these times the rows of `reach`."""

    def triplets(self, p: Tensor, warm: Tensor | None) -> Triplets:
        """Leading triplets of the mean Σ p_i ΔW_i, columns for `consensus` to count as votes."""

    def update(self, p: Tensor, warm: Tensor | None) -> Found:
        """Ŵ in the leading singular spaces of W̄ = Σ p_i ΔW_i (8.3)."""

    def consensus(
        self,
        votes: Tensor,
        anchor: tuple[Triplets, Tensor] | None,
        p: Tensor,
        warm: tuple[Tensor | None, Tensor | None],
    ) -> Found:
        """Ŵ in the leading eigenspaces of the mean projectors (5.1) with the anchor's vote (6.2).

        Parameters
        ----------
        votes : Tensor (L, K)
            p_i of the votes; f is soft, or hard for `projector`.
        anchor : pair of Triplets and Tensor (L, R)
            And the vote η g_k of each triplet.
        p : Tensor (L, K)
            Weights of W̄.
        """


def row_votes(clients: Clients, votes: Tensor, s: Settings) -> Tensor:
    """(L, N): p_i f_ij of every direction, f soft (4.1) or, for `projector`, hard (8.2)."""
    f = clients.hard if s.basis == "projector" else clients.soft
    return clients.ragged.weighed(f, votes)


def fill(x: Tensor, columns: int) -> Tensor:
    """The first `columns` columns, zero columns appended where there are fewer."""
    have = x.shape[-1]
    return x[..., :columns] if have >= columns else torch.nn.functional.pad(x, (0, columns - have))
