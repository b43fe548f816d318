"""What a round did to the update: spectrum, effective rank, how much of the exact mean it kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..state import Factors
from .messages import Pairs, Reply, Sent
from .methods.base import shares
from .methods.flora import stack

__all__ = ["describe", "effective_rank", "spectrum"]

SHOWN = 64  # leading values that are recorded


def describe(model: Sent, before: Sequence[Pairs], replies: Sequence[Reply]) -> dict[str, Any]:
    """The server's new model, against the exact mean of what the clients sent.

    Parameters
    ----------
    model : Sent
        ``method.model(server)`` after the round.
    before : sequence of dict
        Pairs that were merged before the round.
    replies : sequence of Reply

    Returns
    -------
    dict
        captured: 1 − ‖Ŵ − W̄‖²/‖W̄‖² over all modules, W̄ the exact weighted mean; norm ‖Ŵ‖_F;
        spectrum: √(Σ_modules σ_j²), leading values; effective_rank: mean over modules of
        exp(entropy of σ/Σσ) (Roy & Vetterli 2007).
    """
    new = model.merged[len(before) :]
    weights = [r.sent.scaling * w for r, w in zip(replies, shares(replies), strict=True)]
    mean = stack([r.factors for r in replies], weights)
    lost = total = 0.0
    spectra, ranks = [], []
    for m in model.factors:
        update = _sum([_scaled(model.factors[m], model.scaling), *(p[m] for p in new)])
        exact = mean[m]
        lost += _square(_sum([update, _scaled(exact, -1.0)]))
        total += _square(exact)
        sigma = spectrum(_sum([update, *(p[m] for p in before)]))
        ranks.append(effective_rank(sigma))
        spectra.append(torch.nn.functional.pad(sigma[:SHOWN], (0, SHOWN - min(SHOWN, len(sigma)))))
    energy = torch.stack(spectra).square().sum(0).sqrt()
    return {
        "captured": 1 - lost / total if total > 0 else 1.0,
        "norm": float(energy.square().sum().sqrt()),
        "effective_rank": sum(ranks) / len(ranks),
        "spectrum": [round(float(x), 6) for x in energy if x > 1e-7 * energy[0]],
    }


def spectrum(pair: Factors) -> Tensor:
    """Singular values of B A, descending, fp64."""
    b, a = pair[0].double(), pair[1].double()
    if a.shape[0] >= min(b.shape[0], a.shape[1]):
        return torch.linalg.svdvals(b @ a)
    return torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT)


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of σ/Σσ: 1 for one direction, n for n equal ones, 0 for none."""
    p = sigma[sigma > 0]
    if not len(p):
        return 0.0
    p = p / p.sum()
    return float((-(p * p.log()).sum()).exp())


def _scaled(pair: Factors, s: float) -> Factors:
    return s * pair[0], pair[1]


def _sum(pairs: Sequence[Factors]) -> Factors:
    return torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs])


def _square(pair: Factors) -> float:
    """‖B A‖²_F by Gram matrices, fp64."""
    b, a = pair[0].double(), pair[1].double()
    return max(float(((b.mT @ b) * (a @ a.mT)).sum()), 0.0)
