"""The CPU's vocabulary: products in the working precision on all threads, the rest on one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from glora_ops.linalg import eigen, orthonormal
from glora_ops.linalg.client_forms import Clients, canonicalize
from glora_ops.linalg.ragged import Ragged
from glora_ops.runtime import scratch
from glora_ops.runtime.threads import all_threads, keep_freed
from glora_ops.solvers.base import fill

__all__ = ["CpuVocabulary"]

# Rows as long as 2^±30 (fp32) or 2^±100 (fp64) leave every product, and every product of two
# products, in range as they are.
SAFE_LENGTH = {torch.float32: 2.0**30, torch.float64: 2.0**100}
# More than any binary exponent of a product of two numbers, and its inverse.
FAR = 2**13
# Elements converted to fp64 at a time: 1 MiB, so that they are still in cache when multiplied.
CHUNK = 2**17
# Bits of an fp16 number.
BITS = 11
# Multiply-adds, or bytes to be read, from which more than one thread pays.
LARGE = 2**22


def _threads(work: int) -> AbstractContextManager[None]:
    return all_threads() if work >= LARGE else nullcontext()


def _working(x: Tensor) -> Tensor:
    """In the working dtype, on a cache line: BLAS rounds by the address it is given."""
    if x.dtype not in SAFE_LENGTH:
        return scratch.empty(tuple(x.shape), torch.float32).copy_(x)
    return x if x.data_ptr() % 64 == 0 else x.clone()


def _lengths(x: Tensor) -> Tensor:
    with _threads(x.nbytes):
        return torch.linalg.vector_norm(x, dim=-1)


def _is_safe(x: Tensor) -> bool:
    """Whether every row is; a zero row asks for a closer look."""
    length, safe = _lengths(x), SAFE_LENGTH[x.dtype]
    return bool(((length > 1 / safe) & (length < safe)).all())


def _exponent(x: Tensor) -> Tensor:
    """(L, N) int32: binary exponent of each row's largest entry, 0 of a row of zeros."""
    return torch.frexp(x.abs().amax(-1)).exponent


def _power(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent.double())


def _onednn() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's fp32 x wᵀ, a private entry of torch: tried once, used only if it is right."""
    try:
        x, w = torch.eye(2, 3), torch.arange(12.0).view(4, 3)
        linear = torch.ops.mkldnn._linear_pointwise
        product = linear(x, w, None, "none", [], "")
        return (lambda x, w: linear(x, w, None, "none", [], "")) if product.equal(x @ w.T) else None
    except (RuntimeError, AttributeError):
        return None


keep_freed()
ONEDNN = _onednn()
# Multiply-adds from which oneDNN beats the BLAS by more than its call costs.
ONEDNN_FROM = 2**21


# Rows of a strip of x xᵀ at least, and strips at most: wide enough for full speed, narrow enough
# to skip three eighths of the square.
STRIP, STRIPS = 128, 4


def _linear(x: Tensor, w: Tensor) -> Tensor:
    """(L, n, d) · (L, k, d)ᵀ. oneDNN reaches twice MKL's rate on these shapes (AMD EPYC)."""
    work = x.shape[-2] * x.shape[-1] * w.shape[-2]
    modules = max(x.shape[0], w.shape[0])
    with _threads(work * modules):
        if ONEDNN is None or x.dtype != torch.float32 or work < ONEDNN_FROM:
            return x @ w.mT
        x, w = x.expand(modules, -1, -1), w.expand(modules, -1, -1)
        parts = [ONEDNN(x[l], w[l])[None] for l in range(modules)]
        return parts[0] if modules == 1 else torch.cat(parts)


def _pair(x: Tensor) -> Tensor:
    """(2, …) fp16: x as hi + 2^−BITS lo."""
    hi = x.half()
    return torch.stack([hi, ((x - hi) * 2.0**BITS).half()])


def _turned(rows: Tensor, ragged: Ragged, turn: Tensor) -> Tensor:
    """(L, N, d): turn_i x_i of every client, turn (L, K, r, r) in the rows' dtype."""
    out = None if len(ragged.groups) == 1 else torch.zeros_like(rows)
    for group in ragged.groups:
        x = rows[:, group.rows].unflatten(1, (-1, group.rank))
        with _threads(x.numel() * group.rank):
            y = (turn[:, group.clients, : group.rank, : group.rank] @ x).flatten(1, 2)
        if out is None:
            return y
        out[:, group.rows] = y
    return torch.zeros_like(rows) if out is None else out


class CpuVocabulary:
    """Implements `glora_ops.linalg.vocabulary.Vocabulary`."""

    def each(self, word: str, *operands: Sequence[Any]) -> list[Tensor]:
        return [getattr(self, word)(*x) for x in zip(*operands, strict=True)]

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = _working(x)
        if _is_safe(x):
            return x, torch.ones(x.shape[:-1], dtype=torch.float64)
        exponent = _exponent(x)
        return (x * _power(-exponent)[..., None]).to(x.dtype), _power(exponent)

    def pair(self, b: Tensor, a: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b, a = _working(b), _working(a)
        dtype = torch.promote_types(b.dtype, a.dtype)
        b, a = b.to(dtype), a.to(dtype)
        one = torch.ones(len(b), ragged.clients, dtype=torch.float64)
        if _is_safe(b) and _is_safe(a):
            return b, a, torch.ones(b.shape[:-1], dtype=torch.float64), one
        alive = (b != 0).any(-1) & (a != 0).any(-1)
        of_b, of_a = _exponent(b), _exponent(a)
        # The loudest pair of every client ends near one; places without a pair do not count. An
        # even exponent is shared out evenly, so that balancing rounds as it would have.
        product = ragged.pad(torch.where(alive, of_b + of_a + FAR, 0)[..., None]).amax((-2, -1))
        size = torch.where(product > 0, (product - FAR).div(2, rounding_mode="floor") * 2, 0)
        half = (of_b - of_a + ragged.per_row(size)).div(2, rounding_mode="floor")
        down = _power(-half) * alive
        up = _power(half - ragged.per_row(size)) * alive
        b, a = ((x * by[..., None]).to(dtype) for x, by in ((b, down), (a, up)))
        return b, a, torch.where(alive, _power(half), 1.0), one * _power(size)

    def precise(self, x: Tensor) -> Tensor:
        return x.double()

    def lengths(self, x: Tensor) -> Tensor:
        return _lengths(x).double()

    def gram(self, rows: Tensor, ragged: Ragged) -> Tensor:
        modules, _, d = rows.shape
        widest = ragged.max_rank
        out = torch.zeros(modules, ragged.clients, widest, widest, dtype=torch.float64)
        for group in ragged.groups:
            rank = group.rank
            blocks = rows[:, group.rows].unflatten(1, (-1, rank)).flatten(0, 1)
            g = torch.zeros(len(blocks), rank, rank, dtype=torch.float64)
            width = min(d, max(256, CHUNK // rank))
            step = max(1, CHUNK // (rank * width))
            buffer = torch.empty(step * rank * width, dtype=torch.float64)
            with _threads(g.numel() * d):
                for first in range(0, len(blocks), step):
                    for start in range(0, d, width):
                        here = blocks[first : first + step, :, start : start + width]
                        x = buffer[: here.numel()].view(here.shape).copy_(here)
                        g[first : first + step].baddbmm_(x, x.mT)
            out[:, group.clients, :rank, :rank] = g.view(modules, -1, rank, rank)
        return out

    def times(self, rows: Tensor, omega: Tensor) -> Tensor:
        return _linear(rows, omega.mT.to(rows.dtype)).double()

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        # oneDNN's sums of N terms are 2.5 times as far off, too far where small directions follow.
        with _threads(x.numel() * y.shape[-1]):
            return x @ y

    def turned(self, rows: Tensor, ragged: Ragged, t: Tensor) -> Tensor:
        return _turned(rows, ragged, ragged.pad(t).mT.to(rows.dtype))

    def overlaps(self, q: Tensor, scale: Tensor | None = None) -> Tensor:
        modules, n, _ = q.shape
        q = q if scale is None else q * scale[..., None]
        out = q.new_empty(modules, n, n)
        for rows in torch.arange(n).tensor_split(min(STRIPS, -(-n // STRIP))):
            top, end = int(rows[0]), int(rows[-1]) + 1
            out[:, top:, top:end] = _linear(q[:, top:], q[:, top:end])
            out[:, top:end, end:] = out[:, end:, top:end].mT  # the rest is a mirror
        return out

    def whitened(self, grams: Sequence[Tensor], ragged: Ragged, turns: Sequence[Tensor]) -> Tensor:
        parts = []
        for gram, t in zip(grams, turns, strict=True):
            one = torch.ones_like(t[..., 0])
            half = self.fold(t, one, ragged, gram.double())
            gamma = self.fold(t, one, ragged, half.mT)
            there = ragged.unpad((ragged.pad(t) != 0).any(-2)[..., None])[..., 0]
            own = ragged.owner[:, None] == ragged.owner
            gamma = torch.where(own, torch.diag_embed(there.double()), gamma.clamp(-1, 1))
            parts.append(_pair(gamma))
        return torch.cat(parts, 1)

    def metric_product(
        self, gamma: Tensor, z: Tensor, precise: bool = False, unit: bool = False
    ) -> Tensor:
        scale = torch.exp2(torch.frexp(z.abs().amax(-2, keepdim=True)).exponent.float())
        hi, lo = _pair(z / scale).float()
        first, second = gamma.float()
        image = self.product(first, hi)
        if precise:
            image = image + 2.0**-BITS * (self.product(first, lo) + self.product(second, hi))
            hi = hi + 2.0**-BITS * lo
        both = torch.cat([hi, image], -2)
        return both if unit else both * scale

    def metric_energy(self, left: Tensor, right: Tensor, d: Tensor) -> Tensor:
        whole = [hi + 2.0**-BITS * lo for hi, lo in (left.double(), right.double())]
        d = d.double()
        return (d[..., :, None] * whole[0] * whole[1] * d[..., None, :]).sum((-2, -1))

    def sketch(
        self, stacks: Sequence[Tensor], ragged: Ragged, omegas: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        grams = [self.gram(rows, ragged) for rows in stacks]
        return grams, [self.times(x, w) for x, w in zip(stacks, omegas, strict=True)]

    def canonical(
        self, gram_b: Tensor, gram_a: Tensor, ragged: Ragged, scaling: Tensor, tau_rel: float,
        roundoff: float,
    ) -> Clients:  # fmt: skip
        return canonicalize(self.eigh, gram_b, gram_a, ragged, scaling, tau_rel, roundoff)

    def fold(self, t: Tensor, scale: Tensor, ragged: Ragged, z: Tensor) -> Tensor:
        blocks = torch.bmm(ragged.pad(t).flatten(0, 1).mT, ragged.pad(z).flatten(0, 1))
        return ragged.unpad(blocks.unflatten(0, (len(z), -1))).mul_(scale[..., None])

    def unfold(self, t: Tensor, scale: Tensor, ragged: Ragged, z: Tensor) -> Tensor:
        return ragged.unpad(ragged.pad(t) @ ragged.pad(scale[..., None] * z))

    def core(
        self, b: Tensor, a: Tensor, u: Tensor, w: Tensor, coef: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        z_u, z_w = self.times(b, u), self.times(a, w)
        return z_u.mT @ (coef[..., None] * z_w), z_u, z_w

    def readout(self, u: Tensor, w: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        scaled = [fill(x * root[..., None, :], rank) for x in (u, w)]
        return scaled[0].contiguous(), scaled[1].mT.contiguous()

    def inverse_cholesky(self, g: Tensor, drop: float) -> Tensor:
        return orthonormal.inverse_cholesky(g, drop)

    def qr(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.qr(y)

    def lift(self, rows: Tensor, z: Tensor) -> Tensor:
        return _linear(z.mT.to(rows.dtype), rows.mT).mT

    def combine(self, y: Tensor, c: Tensor, onto: Tensor | None = None) -> Tensor:
        out = _linear(c.mT.to(y.dtype), y).mT
        return out if onto is None else onto.add_(out)

    def inner(self, y: Tensor, z: Tensor) -> Tensor:
        modules, d, k = y.shape
        m = z.shape[-1]
        if y.dtype == z.dtype == torch.float64:
            with _threads(modules * d * k * m):
                return torch.bmm(z.mT, y).mT  # MKL takes a quarter of yᵀ z's time
        out = y.new_zeros(modules, k, m, dtype=torch.float64)
        columns = k + (z is not y) * m or 1
        width = min(d, max(256, CHUNK // columns))
        step = max(1, CHUNK // (columns * width))
        across = max(256, CHUNK // width)  # columns of a y that is wider than tall
        with _threads(modules * d * k * m):
            for first in range(0, modules, step):
                for start in range(0, d, width):
                    here = slice(first, first + step), slice(start, start + width)
                    right = z[here].mT.double()
                    for column in range(0, k, across):
                        part = slice(column, column + across)
                        whole = z is y and k <= across
                        left = right if whole else y[here][..., part].mT.double()
                        out[here[0], part].baddbmm_(left, right.mT)
        return out

    def eigh(self, g: Tensor, precise: bool = True) -> tuple[Tensor, Tensor]:
        lam, vec = eigen.eigh(g)
        # LAPACK's columns would keep their strides in a flip, and MKL is slower on those.
        return lam.flip(-1).clamp_(min=0), vec.mT.flip(-2).mT

    def eigenvalues(self, g: Tensor) -> Tensor:
        return eigen.eigvalsh(g).flip(-1).clamp_(min=0)

    def svd(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, s, yh = eigen.svd(c)
        return x, s, yh.mT
