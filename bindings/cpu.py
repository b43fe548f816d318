"""The CPU's vocabulary: torch products in the working precision, LAPACK on one thread."""

from __future__ import annotations

import torch
from torch import Tensor

from glora_ops.isolation import one_thread
from glora_ops.ragged import Ragged

__all__ = ["CpuVocabulary"]

# Row sizes within 2^±40 (fp32) or 2^±300 (fp64) leave every product in range as they are.
SAFE_EXPONENT = {torch.float32: 40, torch.float64: 300}
# Elements converted to fp64 at a time: 64 MiB.
CHUNK = 2**23


def _working(x: Tensor) -> Tensor:
    return x if x.dtype in SAFE_EXPONENT else x.float()


def _exponent(x: Tensor) -> Tensor:
    """(L, N) int32: binary exponent of each row's largest entry."""
    return torch.frexp(torch.linalg.vector_norm(x, float("inf"), dim=-1)).exponent


def _power(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent.double())


class CpuVocabulary:
    """Implements `glora_ops.vocabulary.Vocabulary`."""

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = _working(x)
        exponent = _exponent(x)
        if int(exponent.abs().max()) <= SAFE_EXPONENT[x.dtype]:
            return x, torch.ones(x.shape[:-1], dtype=torch.float64)
        return (x * _power(-exponent)[..., None]).to(x.dtype), _power(exponent)

    def pair(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, a = _working(b), _working(a)
        dtype = torch.promote_types(b.dtype, a.dtype)
        b, a = b.to(dtype), a.to(dtype)
        exponent_b, exponent_a = _exponent(b), _exponent(a)
        largest = max(int(e.abs().max()) for e in (exponent_b, exponent_a))
        if largest <= SAFE_EXPONENT[dtype]:
            return b, a, torch.ones(b.shape[:-1], dtype=torch.float64)
        half = (exponent_b - exponent_a).div(2, rounding_mode="floor")
        down, up = _power(-half)[..., None], _power(half)
        return (b * down).to(dtype), (a * up[..., None]).to(dtype), up

    def gram(self, rows: Tensor, ragged: Ragged) -> Tensor:
        modules, _, d = rows.shape
        height = ragged.clients * ragged.max_rank
        out = torch.zeros(
            modules, ragged.clients, ragged.max_rank, ragged.max_rank, dtype=torch.float64
        )
        flat = out.view(-1, ragged.max_rank, ragged.max_rank)
        width = max(256, CHUNK // max(1, modules * height))
        for start in range(0, d, width):
            x = ragged.pad(rows[..., start : start + width].double()).flatten(0, 1)
            flat.baddbmm_(x, x.mT)
        return out

    def times(self, rows: Tensor, omega: Tensor) -> Tensor:
        return (rows @ omega.to(rows.dtype)).double()

    def lift(self, rows: Tensor, z: Tensor) -> Tensor:
        return rows.mT @ z.to(rows.dtype)

    def inner(self, y: Tensor, z: Tensor) -> Tensor:
        return y.double().mT @ z.double()

    def eigh(self, g: Tensor) -> tuple[Tensor, Tensor]:
        with one_thread():
            lam, vec = torch.linalg.eigh(g)
        return lam.flip(-1).clamp_(min=0), vec.flip(-1)

    def svd(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with one_thread():
            x, s, yh = torch.linalg.svd(c)
        return x, s, yh.mT
