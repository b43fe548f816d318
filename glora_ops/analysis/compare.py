"""Gauge-invariant measurements of adapters: spectra of s·B·A, alignments between clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters import Adapter
from ..inner_products import check_pairs, of_pairs
from ..robust import cosines, median_cosines
from .alignment import align, canonical_bases, mean_over_modules

if TYPE_CHECKING:
    from ..state import Factors

__all__ = ["Comparison", "compare_clients", "spectra"]


def spectra(adapter: Adapter) -> dict[str, Tensor]:
    """Singular values of each module's s·B·A, descending (r,) fp64; their norm is ‖s·B·A‖_F."""
    return {name: canonical_bases(*_held([adapter], name))[1][0] for name in adapter.modules}


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
    cosines : Tensor (K, K)
        ⟨ΔW_i, ΔW_j⟩/(‖ΔW_i‖‖ΔW_j‖) over all modules, from −1 to 1; NaN beside a zero update.
    """

    norms: Tensor
    columns: Tensor
    rows: Tensor
    cosines: Tensor

    @property
    def with_others(self) -> Tensor:
        """(K,): mean alignment with the other clients, both sides; NaN where there is none."""
        both = (self.columns + self.rows) / 2
        both.fill_diagonal_(float("nan"))
        return both.nanmean(1)

    @property
    def median_cosines(self) -> Tensor:
        """(K,): median signed cosine with the other clients; NaN where there is none."""
        return median_cosines(self.cosines, self.norms > 0)


def compare_clients(adapters: Sequence[Adapter]) -> Comparison:
    """Alignments of column and row spaces, averaged over modules, and signed cosines over all."""
    count = len(adapters)
    check_pairs(count)
    modules = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    energies = torch.zeros(count, len(modules), dtype=torch.float64)
    columns: list[Tensor] = []
    rows: list[Tensor] = []
    inner = torch.zeros(count, count, dtype=torch.float64)
    for l, name in enumerate(modules):
        holders = [i for i, adapter in enumerate(adapters) if name in adapter.modules]
        pairs, scalings = _held([adapters[i] for i in holders], name)
        (q, z), sigma, f = canonical_bases(pairs, scalings)
        energies[holders, l] = sigma.square().sum(-1)
        here = torch.tensor(holders)[:, None], torch.tensor(holders)
        for found, basis in ((columns, q), (rows, z)):
            placed = torch.zeros(count, count, dtype=torch.float64)
            placed[here] = align(basis, f)
            found.append(placed)
        inner[here] += of_pairs(pairs, scalings)
    return Comparison(
        energies.sum(1).sqrt(),
        mean_over_modules(columns, energies),
        mean_over_modules(rows, energies),
        cosines(inner),
    )


def _held(adapters: Sequence[Adapter], module: str) -> tuple[list[Factors], list[float]]:
    scalings = [adapter.modules[module].scaling for adapter in adapters]
    return [adapter.factors(module) for adapter in adapters], scalings
