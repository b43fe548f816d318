"""The same update in another gauge: (B G, G⁻¹ A) for an invertible G, random or nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import eigen
from ..state import Factors
from .messages import Pairs
from .seeds import torch_stream

__all__ = ["procrustes", "regauge", "turned"]


def procrustes(pair: Factors, towards: Factors) -> tuple[Tensor, float]:
    """Q (r, r) orthogonal that minimises ‖B Q − B'‖² + ‖Qᵀ A − A'‖², and what it gains; fp64.

    Q = polar(M), M = Bᵀ B' + A A'ᵀ of pairs of one rank; tr(Qᵀ M), the sum of M's singular values.
    """
    (b, a), (b_to, a_to) = pair, towards
    u, s, vt = eigen.svd(b.double().mT @ b_to.double() + a.double() @ a_to.double().mT)
    return u @ vt, float(s.sum())


def turned(factors: Pairs, towards: Pairs) -> Pairs:
    """(B Q, Qᵀ A), Q orthogonal, of every module, nearest to `towards` of the same shapes."""
    out = {}
    for m, (b, a) in factors.items():
        q, _ = procrustes((b, a), towards[m])
        out[m] = (b.double() @ q).to(b.dtype), (q.mT @ a.double()).to(a.dtype)
    return out


def regauge(factors: Pairs, condition: float, seed: int) -> Pairs:
    """Every module's pair under a random G with cond G = `condition`; B A stays, up to rounding."""
    return {
        m: _regauge(b, a, condition, torch_stream(seed, "gauge", m))
        for m, (b, a) in factors.items()
    }


def _regauge(b: Tensor, a: Tensor, condition: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    r = a.shape[0]
    left, right = (
        torch.linalg.qr(torch.randn(r, r, generator=rng, dtype=torch.float64)).Q for _ in range(2)
    )
    d = torch.logspace(-0.5, 0.5, r, base=condition, dtype=torch.float64)
    turned_b = (b.double() @ (left * d)) @ right  # G = left · diag(d) · right
    turned_a = (right.mT / d) @ (left.mT @ a.double())
    return turned_b.to(b.dtype), turned_a.to(a.dtype)
