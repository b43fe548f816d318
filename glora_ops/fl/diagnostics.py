"""What a round did to the update, and how much the clients that made it agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import floor, log10
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..analysis.alignment import align, canonical_bases, mean_over_modules
from ..linalg import eigen
from ..robust import cosines
from ..state import Factors
from .gauge import procrustes
from .judging import inner
from .messages import Pairs, Reply, Sent
from .tasks.base import Answer

__all__ = [
    "alignment",
    "effective_rank",
    "misalignment",
    "own_score",
    "significant",
    "spectrum",
    "update_facts",
]

SHOWN = 64  # leading values that are recorded


def update_facts(model: Sent, before: Sequence[Pairs], exact: Pairs) -> dict[str, Any]:
    """The server's new model, against what it would be if nothing were lost.

    Parameters
    ----------
    model : Sent
        ``method.model(server)`` after the round.
    before : sequence of dict
        Pairs that were merged before the round.
    exact : dict of str to (B, A)
        ``method.exact`` of the round.

    Returns
    -------
    dict
        captured: 1 − ‖Ŵ − W̄‖²/‖W̄‖² over all modules, W̄ that of `exact`; norm ‖Ŵ‖_F;
        spectrum: √(Σ_modules σ_j²), leading values; effective_rank: mean over modules of
        exp(entropy of σ/Σσ) (Roy & Vetterli 2007).
    """
    new = model.merged[len(before) :]
    lost = total = 0.0
    spectra, ranks = [], []
    for m in model.factors:
        update = _sum([_scaled(model.factors[m], model.scaling), *(p[m] for p in new)])
        lost += _square(_sum([update, _scaled(exact[m], -1.0)]))
        total += _square(exact[m])
        sigma = spectrum(_sum([update, *(p[m] for p in before)]))
        ranks.append(effective_rank(sigma))
        spectra.append(torch.nn.functional.pad(sigma[:SHOWN], (0, SHOWN - min(SHOWN, len(sigma)))))
    energy = torch.stack(spectra).square().sum(0).sqrt()
    # Nine digits of the largest: rounding in the others is relative to that.
    digits = 8 - floor(log10(energy[0])) if energy[0] > 0 else 0
    shown = max(1, int((energy > 1e-7 * energy[0]).sum()))  # one of an update that is zero
    return {
        "captured": 1 - lost / total if total > 0 else 1.0,
        "norm": float(energy.square().sum().sqrt()),
        "effective_rank": sum(ranks) / len(ranks),
        "spectrum": [round(float(x), digits) for x in energy[:shown]],
    }


def alignment(replies: Sequence[Reply]) -> dict[str, Any]:
    """Client-by-client alignment of the column and row spaces of ΔW_i, from 0 to 1, lists of lists.

    And their signed cosines. Of the updates as clients train them; NaN becomes None.
    """
    columns, rows, energies = [], [], []
    for m in replies[0].factors:
        pairs = [r.factors[m] for r in replies]
        (q, z), sigma, f = canonical_bases(pairs, [r.sent.scaling for r in replies])
        energies.append(sigma.square().sum(-1))
        columns.append(align(q, f))
        rows.append(align(z, f))
    energy = torch.stack(energies, 1)
    return {
        "clients": [r.client.index for r in replies],
        "columns": _listed(mean_over_modules(columns, energy)),
        "rows": _listed(mean_over_modules(rows, energy)),
        "cosines": _listed(cosines(inner([(r.factors, r.sent.scaling) for r in replies]))),
    }


def misalignment(replies: Sequence[Reply]) -> dict[str, float]:
    """How far the clients' factors are turned against each other, mean over pairs and modules.

    For two clients R minimises ‖B_i R − B_j‖² + ‖Rᵀ A_i − A_j‖² over orthogonal matrices (the polar
    factor of B_iᵀB_j + A_i A_jᵀ); clients of different ranks are compared in their first pairs.

    Returns
    -------
    dict
        turn: ‖R − I‖_F/(2√r), 0 for factors that need no turning, 1 for opposite ones; apart and
        apart_turned: that sum before and after turning, relative to the factors' own squares.
    """
    turns, apart, turned = [], [], []
    for one, other in combinations(replies, 2):
        for m in one.factors:
            rank = min(one.factors[m][1].shape[0], other.factors[m][1].shape[0])
            (b, a), (c, d) = (
                (x.factors[m][0][:, :rank].double(), x.factors[m][1][:rank].double())
                for x in (one, other)
            )
            q, gain = procrustes((b, a), (c, d))
            eye = torch.eye(rank, dtype=q.dtype)
            own = float(sum(x.square().sum() for x in (a, b, c, d))) or 1.0
            turns.append(float(torch.linalg.matrix_norm(q - eye)) / (2 * rank**0.5))
            apart.append(1 - 2 * float((b * c).sum() + (a * d).sum()) / own)
            turned.append(1 - 2 * gain / own)
    return {
        name: sum(values) / len(values) if values else 0.0
        for name, values in (("turn", turns), ("apart", apart), ("apart_turned", turned))
    }


def own_score(answers: Sequence[Answer], held: np.ndarray) -> float | None:
    """Mean score in a client's own mix of labels; None where nothing is judged of what it holds.

    Σ_l p_l · (mean score of the answers of label l), p_l the share of label l in its training
    examples, over the labels that were judged; `held` (L,) counts those examples, label by label.
    """
    scores: dict[int, list[float]] = defaultdict(list)
    for answer in answers:
        if answer.label is not None:
            scores[answer.label].append(answer.score)
    total = sum(float(held[label]) for label in scores)
    if total == 0:
        return None
    return sum(float(held[label]) * fmean(mine) for label, mine in scores.items()) / total


def _listed(x: Tensor) -> list[list[float | None]]:
    return [[None if v != v else round(v, 4) for v in row] for row in x.tolist()]


def significant(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Floats to nine digits: the last bits of fp64 LAPACK results vary from call to call."""

    def short(x: Any) -> Any:
        if isinstance(x, list):
            return [short(y) for y in x]
        if isinstance(x, dict):
            return significant(x)
        return float(f"{x:.9g}") if isinstance(x, float) else x

    return {name: short(x) for name, x in numbers.items()}


def spectrum(pair: Factors) -> Tensor:
    """Singular values of B A, descending, fp64."""
    b, a = pair[0].double(), pair[1].double()
    if a.shape[0] >= min(b.shape[0], a.shape[1]):
        return eigen.svd(b @ a, full_matrices=False)[1]
    return eigen.svd(torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT)[1]


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
