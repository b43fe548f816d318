"""The same update in another gauge: (B G, G⁻¹ A) for an invertible G, random or nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state import Factors
from .messages import Pairs
from .seeds import torch_stream

__all__ = ["regauge", "turned"]


def turned(factors: Pairs, towards: Pairs) -> Pairs:
    """(B Q, Qᵀ A), Q orthogonal, of every module, nearest to `towards` of the same shapes.

    Q = polar(Bᵀ B' + A A'ᵀ) minimises ‖B Q − B'‖² + ‖Qᵀ A − A'‖²; fp64.
    """
    return {m: _turned(pair, towards[m]) for m, pair in factors.items()}


def _turned(pair: Factors, towards: Factors) -> Factors:
    b, a = (x.double() for x in pair)
    u, _, vt = torch.linalg.svd(b.mT @ towards[0].double() + a @ towards[1].double().mT)
    q = u @ vt
    return (b @ q).to(pair[0].dtype), (q.mT @ a).to(pair[1].dtype)


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
