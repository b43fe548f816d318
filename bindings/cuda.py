"""The CUDA vocabulary: Triton kernels for what is long or many, the library where it is wide.

Importing this imports Triton; `bindings` does so when the first CUDA tensor arrives. The same
class runs on CPU tensors in Triton's interpreter, which is how it is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from glora_ops.kernels import canonical_solve, core, jacobi, sketch, triangular
from glora_ops.kernels.eigh import launch_eigh
from glora_ops.kernels.fold import fold_each, launch_fold
from glora_ops.kernels.metric import launch_metric_energy, launch_metric_product
from glora_ops.kernels.overlaps import launch_overlaps
from glora_ops.kernels.product import (
    accumulate_each,
    inner_each,
    launch_accumulate,
    launch_inner,
    launch_times,
    times_each,
)
from glora_ops.kernels.readout import launch_readout
from glora_ops.kernels.svd import launch_svd
from glora_ops.kernels.votes import launch_votes
from glora_ops.kernels.whitened import launch_whitened
from torch import Tensor

from glora_ops.linalg import eigen, orthonormal
from glora_ops.linalg.client_forms import Clients, canonicalize
from glora_ops.linalg.ragged import Ragged
from glora_ops.linalg.vocabulary import working

__all__ = ["CudaVocabulary"]


def _combine(
    y: Sequence[Tensor], c: Sequence[Tensor], onto: Sequence[Tensor] | None = None
) -> list[Tensor]:
    return accumulate_each([x.mT for x in y], c, onto)


def _product(x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
    if x[0].dtype == torch.float64:  # a library may choose another order of sums in a graph
        return inner_each([a.mT for a in x], y)
    return [a @ b for a, b in zip(x, y, strict=True)]


def _fold(
    t: Sequence[Tensor], scale: Sequence[Tensor], ragged: Sequence[Ragged], z: Sequence[Tensor]
) -> list[Tensor]:
    return fold_each(t, scale, z, ragged[0].marks, ragged[0].max_rank, back=False)


def _unfold(
    t: Sequence[Tensor], scale: Sequence[Tensor], ragged: Sequence[Ragged], z: Sequence[Tensor]
) -> list[Tensor]:
    return fold_each(t, scale, z, ragged[0].marks, ragged[0].max_rank, back=True)


def _inverse_cholesky(g: Sequence[Tensor], drop: Sequence[float]) -> list[Tensor]:
    if g[0].shape[-1] > triangular.MAX_COLUMNS:
        return [orthonormal.inverse_cholesky(x, drop[0]) for x in g]
    return triangular.triangular_each(g, drop[0])


# Words that take both sides in one launch, and those of them whose sides must have one shape.
TOGETHER: dict[str, Callable[..., list[Tensor]]] = {
    "times": times_each,
    "lift": accumulate_each,
    "combine": _combine,
    "inner": inner_each,
    "product": _product,
    "fold": _fold,
    "unfold": _unfold,
    "inverse_cholesky": _inverse_cholesky,
}
SAME = ("fold", "unfold", "inverse_cholesky")


def _alike(sides: Sequence[Sequence[Any]], same: bool) -> bool:
    """Whether the sides have the same dtypes, and the same shapes where one grid needs them."""
    first, *others = [[x for x in side if isinstance(x, Tensor)] for side in sides]
    return all(
        x.dtype == y.dtype and (x.shape == y.shape or not same)
        for other in others
        for x, y in zip(first, other, strict=True)
    )


class CudaVocabulary:
    """Implements `glora_ops.linalg.vocabulary.Vocabulary`; factors stay in the dtype they came in.

    Stacks are neither scaled nor looked at: Gram matrices are fp64, and in fp32 or bf16 entries
    from 2⁻¹⁰⁰ to 2¹⁰⁰ leave every product in range, gauges by powers of two included.
    """

    def each(self, word: str, *operands: Sequence[Any]) -> list[Tensor]:
        sides = list(zip(*operands, strict=True))
        together = TOGETHER.get(word)
        if together is None or not _alike(sides, word in SAME):
            return [getattr(self, word)(*side) for side in sides]
        return together(*operands)

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.ones(x.shape[:-1], dtype=torch.float64, device=x.device)

    def pair(self, b: Tensor, a: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(b.dtype, a.dtype)
        _, scale = self.rows(b)
        return b.to(dtype), a.to(dtype), scale, scale.new_ones(len(b), ragged.clients)

    def precise(self, x: Tensor) -> Tensor:
        return x

    def lengths(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return torch.linalg.vector_norm(wide, dim=-1).double()

    def gram(self, rows: Tensor, ragged: Ragged) -> Tensor:
        if sketch.fits(rows, ragged.max_rank, 0):
            return sketch.launch_sketch([rows], ragged.marks, ragged.max_rank)[0][0]
        blocks = ragged.pad(rows)
        flat = blocks.flatten(0, 1).mT
        return launch_inner(flat, flat).unflatten(0, blocks.shape[:2])

    def times(self, rows: Tensor, omega: Tensor) -> Tensor:
        return launch_times(rows, omega)

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return _product([x], [y])[0]

    def turned(self, rows: Tensor, ragged: Ragged, t: Tensor) -> Tensor:
        x = rows.to(working(rows.dtype))
        return ragged.unpad(ragged.pad(t).mT.to(x.dtype) @ ragged.pad(x))

    def overlaps(self, q: Tensor, scale: Tensor | None = None) -> Tensor:
        return launch_overlaps(q, scale)

    def whitened(self, grams: Sequence[Tensor], ragged: Ragged, turns: Sequence[Tensor]) -> Tensor:
        return launch_whitened(list(grams), list(turns), ragged.marks, ragged.max_rank)

    def metric_product(
        self, gamma: Tensor, z: Tensor, precise: bool = False, unit: bool = False
    ) -> Tensor:
        return launch_metric_product(gamma, z, precise, unit)

    def metric_energy(self, left: Tensor, right: Tensor, d: Tensor) -> Tensor:
        return launch_metric_energy(left, right, d)

    def sketch(
        self, stacks: Sequence[Tensor], ragged: Ragged, omegas: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        columns = max(w.shape[-1] for w in omegas)
        if not sketch.fits(stacks[0], ragged.max_rank, columns):
            grams = [self.gram(x, ragged) for x in stacks]
            return grams, [launch_times(x, w) for x, w in zip(stacks, omegas, strict=True)]
        return sketch.launch_sketch(
            list(stacks), ragged.marks, ragged.max_rank, [w[0] for w in omegas]
        )

    def canonical(
        self, gram_b: Tensor, gram_a: Tensor, ragged: Ragged, scaling: Tensor, tau_rel: float,
        roundoff: float,
    ) -> Clients:  # fmt: skip
        if ragged.max_rank > canonical_solve.MAX_RANK:
            return canonicalize(self.eigh, gram_b, gram_a, ragged, scaling, tau_rel, roundoff)
        forms = canonical_solve.launch_canonical_solve(gram_b, gram_a, ragged.ranks)
        t, sigma, soft, hard, size, noise, tau, norm, loudest = launch_votes(
            forms, scaling, ragged.marks, ragged.rows, tau_rel, roundoff
        )
        clients = Clients(ragged, t[0], t[1], sigma, size, noise, tau)
        # The same launch has made what the others are asked for later.
        vars(clients).update(t=t, soft=soft, hard=hard, norm=norm, loudest=loudest)
        return clients

    def fold(self, t: Tensor, scale: Tensor, ragged: Ragged, z: Tensor) -> Tensor:
        return launch_fold(t, scale, z, ragged.marks, ragged.max_rank, back=False)

    def unfold(self, t: Tensor, scale: Tensor, ragged: Ragged, z: Tensor) -> Tensor:
        return launch_fold(t, scale, z, ragged.marks, ragged.max_rank, back=True)

    def core(
        self, b: Tensor, a: Tensor, u: Tensor, w: Tensor, coef: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if max(u.shape[-1], w.shape[-1]) > core.MAX_RANK or b.dtype == torch.float64:
            z_u, z_w = launch_times(b, u), launch_times(a, w)
            return launch_inner(z_u, coef[..., None] * z_w), z_u, z_w
        return core.launch_core(b, a, u, w, coef)

    def readout(self, u: Tensor, w: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return launch_readout(u, w, root, rank)

    def lift(self, rows: Tensor, z: Tensor) -> Tensor:
        return launch_accumulate(rows, z)

    def combine(self, y: Tensor, c: Tensor, onto: Tensor | None = None) -> Tensor:
        return launch_accumulate(y.mT, c, onto)

    def inner(self, y: Tensor, z: Tensor) -> Tensor:
        return launch_inner(y, z)

    def inverse_cholesky(self, g: Tensor, drop: float) -> Tensor:
        return _inverse_cholesky([g], [drop])[0]

    def qr(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.qr(y)

    def eigh(self, g: Tensor, precise: bool = True) -> tuple[Tensor, Tensor]:
        if g.shape[-1] > jacobi.MAX_SIZE:
            lam, vec = eigen.eigh(g)
            return lam.flip(-1).clamp_(min=0), vec.flip(-1)
        return launch_eigh(g, precise)

    def eigenvalues(self, g: Tensor) -> Tensor:
        return self.eigh(g)[0]

    def svd(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if c.shape[-1] > jacobi.MAX_SIZE:
            x, s, yh = eigen.svd(c)
            return x, s, yh.mT
        return launch_svd(c)
