"""The same mathematics in plain torch: what glora's kernels are measured against."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.ops import Ops
from torch import Tensor

from glora_ops import algorithm
from glora_ops.linalg.ragged import Ragged

__all__ = ["TorchVocabulary", "plain_aggregate"]


class TorchVocabulary(CpuVocabulary):
    """cuBLAS and cuSOLVER, batched over modules."""

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.float(), torch.ones(x.shape[:-1], dtype=torch.float64, device=x.device)

    def pair(self, b: Tensor, a: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, scale = self.rows(b)
        return b.float(), a.float(), scale, scale.new_ones(len(b), ragged.clients)

    def gram(self, rows: Tensor, ragged: Ragged) -> Tensor:
        blocks = ragged.pad(rows).double()
        return blocks @ blocks.mT

    def times(self, rows: Tensor, omega: Tensor) -> Tensor:
        return (rows @ omega.to(rows.dtype)).double()

    def lift(self, rows: Tensor, z: Tensor) -> Tensor:
        return rows.mT @ z.to(rows.dtype)

    def combine(self, y: Tensor, c: Tensor, onto: Tensor | None = None) -> Tensor:
        out = y @ c.to(y.dtype)
        return out if onto is None else onto.add_(out)

    def inner(self, y: Tensor, z: Tensor) -> Tensor:
        return y.double().mT @ z.double()

    def inverse_cholesky(self, g: Tensor, drop: float) -> Tensor:
        unit = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
        size = g.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-300)
        r, _ = torch.linalg.cholesky_ex(g + drop * size * unit, upper=True)
        return torch.linalg.solve_triangular(r, unit.expand_as(r), upper=True)


OPS = Ops(TorchVocabulary(), fixed_steps=True)


@torch.no_grad()
def plain_aggregate(*arguments: Any, **settings: Any) -> tuple[Tensor, ...]:
    """`aggregate` on tall blocks: N-space needs a Gram–Schmidt that libraries do not have."""
    with patch.object(algorithm, "fixed_in_nspace", lambda *_: False):
        return tuple(OPS.aggregate(*arguments, **settings))
