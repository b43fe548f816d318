"""Gauge-invariant measurements of adapters: spectra of s·B·A, alignments between clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .. import bindings  # noqa: F401  # registers torch.ops.glora
from ..adapters import Adapter
from ..packing import pack

__all__ = ["Comparison", "align", "compare_clients", "spectra"]


def spectra(adapter: Adapter) -> dict[str, Tensor]:
    """Singular values of each module's s·B·A, descending (r,) fp64; their norm is ‖s·B·A‖_F."""
    return {name: _canonical([adapter], name)[1][0] for name in adapter.modules}


@dataclass(frozen=True)
class Comparison:
    """K clients against each other.

    Attributes
    ----------
    norms : Tensor (K,)
        ‖ΔW_i‖_F over all modules.
    columns, rows : Tensor (K, K)
        Alignment of the updates' column and row spaces, 1 where they are the same and NaN where
        two clients share no module.
    """

    norms: Tensor
    columns: Tensor
    rows: Tensor

    @property
    def with_others(self) -> Tensor:
        """(K,): mean alignment with the other clients, both sides; NaN where there is none."""
        both = (self.columns + self.rows) / 2
        both.fill_diagonal_(float("nan"))
        return both.nanmean(1)


def compare_clients(adapters: Sequence[Adapter]) -> Comparison:
    """Alignments averaged over modules, a pair's weight in a module being √(e_i e_j).

    e_i is the fraction of client i's own energy ‖ΔW_i‖² that lies in the module, so that a loud
    client counts no more than a quiet one.
    """
    count = len(adapters)
    modules = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    energies = torch.zeros(count, len(modules), dtype=torch.float64)
    columns: list[Tensor] = []
    rows: list[Tensor] = []
    for l, name in enumerate(modules):
        holders = [i for i, adapter in enumerate(adapters) if name in adapter.modules]
        (q, z), sigma, f = _canonical([adapters[i] for i in holders], name)
        energies[holders, l] = sigma.square().sum(-1)
        for found, basis in ((columns, q), (rows, z)):
            placed = torch.zeros(count, count, dtype=torch.float64)
            placed[torch.tensor(holders)[:, None], torch.tensor(holders)] = align(basis, f)
            found.append(placed)
    total = energies.sum(1)
    own = (energies / total.where(total > 0, 1.0)[:, None]).sqrt()
    weights = own.T[:, :, None] * own.T[:, None, :]  # [L, K, K]
    mean = weights / weights.sum(0)
    return Comparison(
        total.sqrt(), (mean * torch.stack(columns)).sum(0), (mean * torch.stack(rows)).sum(0)
    )


def align(q: Tensor, f: Tensor) -> Tensor:
    """Mean squared cosine between the clients' spaces, softly weighted: (K, K), from 0 to 1.

    ⟨P_i, P_j⟩/Σ_k f_ik f_jk with P_i = Q_iᵀ diag(f_i) Q_i. The denominator is the most that the
    numerator can be (von Neumann), so a space within a larger one has alignment 1; with f = 1 on
    k_i directions this is ‖Q_i Q_jᵀ‖²_F/min(k_i, k_j).

    Parameters
    ----------
    q : Tensor (K, r, d)
        Orthonormal rows per client, or zero rows.
    f : Tensor (K, r)
        Votes, descending.
    """
    count, rank, _ = q.shape
    cosines = (q.flatten(0, 1) @ q.flatten(0, 1).mT).square().view(count, rank, count, rank)
    inner = torch.einsum("iajb,ia,jb->ij", cosines, f, f)
    most = f @ f.mT
    return torch.where(most > 0, inner / most.where(most > 0, 1.0), 0.0).clamp(max=1.0)


def _canonical(
    adapters: Sequence[Adapter], module: str
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Canonical forms of one module: bases Q and Z (K, r, d), sigma and f (K, r); fp64."""
    packed = pack([adapter.factors(module) for adapter in adapters])
    scaling = torch.tensor([a.modules[module].scaling for a in adapters], dtype=torch.float64)
    t_u, t_v, sigma, f = torch.ops.glora.canonicalize(packed.b, packed.a, packed.offsets, scaling)
    starts, rank = packed.offsets.tolist(), t_u.shape[-1]

    def basis(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack(
            [t[lo:hi].double().mT @ x[lo:hi].double() for lo, hi in pairwise(starts)]
        )

    def by_client(x: Tensor) -> Tensor:
        padded = x.new_zeros(len(adapters), rank)
        for i, (lo, hi) in enumerate(pairwise(starts)):
            padded[i, : hi - lo] = x[lo:hi]
        return padded

    return (basis(packed.b, t_u), basis(packed.a, t_v)), by_client(sigma), by_client(f)
