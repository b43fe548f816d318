"""Gauge-invariant measurements of adapters: spectra of s·B·A, alignments between clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Adapter
from ..alignment import align, canonical_bases, mean_over_modules

__all__ = ["Comparison", "compare_clients", "spectra"]


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
    """Alignments of column and row spaces, averaged over modules (`mean_over_modules`)."""
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
    return Comparison(
        energies.sum(1).sqrt(),
        mean_over_modules(columns, energies),
        mean_over_modules(rows, energies),
    )


def _canonical(
    adapters: Sequence[Adapter], module: str
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    scalings = [adapter.modules[module].scaling for adapter in adapters]
    return canonical_bases([adapter.factors(module) for adapter in adapters], scalings)
