"""The same mathematics in plain torch: what glora's kernels are measured against."""

from __future__ import annotations

import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.ops import Ops
from torch import Tensor

from glora_ops.linalg.orthonormal import SHORTEST
from glora_ops.linalg.ragged import Ragged

__all__ = ["PLAIN", "TorchVocabulary"]


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

    def combine(self, y: Tensor, c: Tensor) -> Tensor:
        return y @ c.to(y.dtype)

    def inner(self, y: Tensor, z: Tensor) -> Tensor:
        return y.double().mT @ z.double()

    def overlaps(self, q: Tensor, scale: Tensor | None = None) -> Tensor:
        q = q if scale is None else q * scale[..., None]
        return q @ q.mT

    def inverse_cholesky(self, g: Tensor, drop: float, shortest: float = SHORTEST) -> Tensor:
        unit, norm2 = torch.eye(g.shape[-1]).to(g), g.diagonal(dim1=-2, dim2=-1)
        alive = norm2 > shortest * norm2.amax(-1, keepdim=True)
        scale = torch.where(alive, norm2, 1.0).rsqrt() * alive
        g = scale[..., :, None] * g * scale[..., None, :]
        r, _ = torch.linalg.cholesky_ex(g + drop * unit, upper=True)
        return scale[..., :, None] * torch.linalg.solve_triangular(r, unit.expand_as(r), upper=True)


PLAIN = torch.no_grad()(Ops(TorchVocabulary(), fixed_steps=True).aggregate)
