"""The ops as functions: ``torch.ops.glora.*`` with types, documentation and examples.

Calling one is calling the op: the same checks, the same bits, and `torch.compile` sees the op.

Row j of `b` (N, d_out) and row j of `a` (N, d_in) are one rank-one pair; client i owns the rows
``offsets[i]:offsets[i + 1]`` (`glora_ops.pack` makes them). All tensors may have a leading module
dimension L with the same offsets. Floats are fp32, bf16, fp16 or fp64; what is tall comes out in
fp32 (fp64 for fp64), what is small in fp64. None of the ops is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bindings.ops import (
    Aggregate,
    AggregateList,
    Canonicalize,
    ProjectorSvd,
    ProjectorSvdFactors,
    Readout,
)

__all__ = [
    "aggregate",
    "aggregate_list",
    "canonicalize",
    "client_stats",
    "core",
    "projector_matmul",
    "projector_matmul_factors",
    "projector_svd",
    "projector_svd_factors",
    "readout",
]

Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def canonicalize(
    b: Tensor,
    a: Tensor,
    offsets: Tensor,
    scaling: Tensor,
    tau_rel: float = Canonicalize.tau_rel,
    max_rank: int = Canonicalize.max_rank,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Canonical forms of clients: coordinates in which what they span is orthonormal.

    Parameters
    ----------
    b : Tensor (N, d_out)
    a : Tensor (N, d_in)
    offsets : Tensor (K + 1,) int64, on the CPU
    scaling : Tensor (K,)
        alpha/r of each client.
    tau_rel : float
        Directions are softened below this part of a client's largest singular value.
    max_rank : int
        Width of what comes out; -1: the largest rank in `offsets`. Inside
        ``torch.compile(fullgraph=True)`` give it.

    Returns
    -------
    t_u, t_v : Tensor (N, max_rank) fp64
        Rows of client i hold T_i: Q_i = b_iᵀ T_U and Z_i = a_iᵀ T_V are orthonormal.
    sigma : Tensor (N,) fp64
        Singular values of s_i B_i A_i, descending within a client.
    f : Tensor (N,) fp64
        Soft votes, zero where a direction is dropped.

    Raises
    ------
    GloraError
        Shapes, dtypes or numbers that do not fit; as all ops do.

    Notes
    -----
    O(N r (d_out + d_in)).

    Examples
    --------
    >>> import torch, glora_ops
    >>> p = glora_ops.pack([(torch.randn(6, 2), torch.randn(2, 5))])
    >>> t_u, t_v, sigma, f = glora_ops.ops.canonicalize(p.b, p.a, p.offsets, torch.ones(1))
    >>> q = p.b.mT.double() @ t_u
    >>> bool(torch.allclose(q.mT @ q, torch.eye(2).double(), atol=1e-5))
    True
    """
    return torch.ops.glora.canonicalize(b, a, offsets, scaling, tau_rel, max_rank)


def projector_matmul(
    x: Tensor, offsets: Tensor, t: Tensor, row_weights: Tensor, omega: Tensor
) -> Tensor:
    """The sum of clients' weighted projectors times a block: Σ_i x_iᵀ T_i diag(c_i) T_iᵀ x_i Ω.

    Parameters
    ----------
    x : Tensor (N, d)
        One side's row stack, `b` or `a`.
    offsets : Tensor (K + 1,) int64, on the CPU
    t : Tensor (N, r_max)
        As `canonicalize` gives it for this side.
    row_weights : Tensor (N,)
        c, the vote of column j of T_i at row j of client i, ≥ 0.
    omega : Tensor (d, k)

    Returns
    -------
    Tensor (d, k)

    Notes
    -----
    O(N d k); no d × d matrix.

    Examples
    --------
    >>> import torch, glora_ops
    >>> p = glora_ops.pack([(torch.randn(6, 2), torch.randn(2, 5))])
    >>> t, _, _, f = glora_ops.ops.canonicalize(p.b, p.a, p.offsets, torch.ones(1))
    >>> glora_ops.ops.projector_matmul(p.b, p.offsets, t, f, torch.randn(6, 3)).shape
    torch.Size([6, 3])
    """
    return torch.ops.glora.projector_matmul(x, offsets, t, row_weights, omega)


def projector_matmul_factors(x: Tensor, offsets: Tensor, weights: Tensor, omega: Tensor) -> Tensor:
    """Σ_i w_i P_i Ω for raw factor rows, P_i the orthogonal projector on client i's span.

    Parameters
    ----------
    x : Tensor (N, d)
    offsets : Tensor (K + 1,) int64, on the CPU
    weights : Tensor (K,)
    omega : Tensor (d, k)

    Returns
    -------
    Tensor (d, k)

    Examples
    --------
    >>> import torch, glora_ops
    >>> p = glora_ops.pack([(torch.eye(4, 2), torch.randn(2, 5))])
    >>> glora_ops.ops.projector_matmul_factors(p.b, p.offsets, torch.ones(1), torch.eye(4)).trace()
    tensor(2.)
    """
    return torch.ops.glora.projector_matmul.factors(x, offsets, weights, omega)


def projector_svd(
    x: Tensor,
    offsets: Tensor,
    t: Tensor,
    row_weights: Tensor,
    rank: int,
    oversample: int = ProjectorSvd.oversample,
    power_iters: int = ProjectorSvd.power_iters,
    tol: float = ProjectorSvd.tol,
    extra: Tensor | None = None,
    warm: Tensor | None = None,
    seed: int = ProjectorSvd.seed,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigenvectors of the sum of clients' weighted projectors: the consensus basis.

    Parameters
    ----------
    x, offsets, t, row_weights
        As in `projector_matmul`.
    rank : int
        R ≥ 1.
    oversample : int
        Further directions that are iterated, p ≥ 1.
    power_iters : int
        Steps of the iteration; -1: until the gain is below `tol`.
    tol : float
        That gain, as a fraction of the captured energy.
    extra : Tensor (d, e), optional
        Further columns: M gains extra extraᵀ.
    warm : Tensor (d, k), optional
        Directions to start from.
    seed : int
        Of the random start.

    Returns
    -------
    basis : Tensor (d, R)
    eigenvalues : Tensor (R + p,) fp64
    explained : Tensor () fp64
        Part of the trace in the first R.

    Examples
    --------
    >>> import torch, glora_ops
    >>> p = glora_ops.pack([(torch.randn(6, 2), torch.randn(2, 5))])
    >>> t, _, _, f = glora_ops.ops.canonicalize(p.b, p.a, p.offsets, torch.ones(1))
    >>> basis, eigenvalues, explained = glora_ops.ops.projector_svd(p.b, p.offsets, t, f, 2)
    >>> basis.shape, round(float(explained), 4)
    (torch.Size([6, 2]), 1.0)
    """
    return torch.ops.glora.projector_svd(
        x, offsets, t, row_weights, rank, oversample, power_iters, tol, extra, warm, seed
    )


def projector_svd_factors(
    x: Tensor,
    offsets: Tensor,
    weights: Tensor,
    rank: int,
    oversample: int = ProjectorSvdFactors.oversample,
    power_iters: int = ProjectorSvdFactors.power_iters,
    tol: float = ProjectorSvdFactors.tol,
    extra: Tensor | None = None,
    warm: Tensor | None = None,
    seed: int = ProjectorSvdFactors.seed,
) -> tuple[Tensor, Tensor, Tensor]:
    """`projector_svd` for raw factor rows: of Σ_i w_i P_i, the projectors on the clients' spans.

    Parameters
    ----------
    x : Tensor (N, d)
    offsets : Tensor (K + 1,) int64, on the CPU
    weights : Tensor (K,)
        ≥ 0.
    rank, oversample, power_iters, tol, extra, warm, seed
        As in `projector_svd`.

    Returns
    -------
    basis, eigenvalues, explained
        As `projector_svd`.

    Examples
    --------
    >>> import torch, glora_ops
    >>> p = glora_ops.pack([(torch.randn(6, 2), torch.randn(2, 5))])
    >>> glora_ops.ops.projector_svd_factors(p.b, p.offsets, torch.ones(1), 2)[0].shape
    torch.Size([6, 2])
    """
    return torch.ops.glora.projector_svd.factors(
        x, offsets, weights, rank, oversample, power_iters, tol, extra, warm, seed
    )


def core(
    u: Tensor, v: Tensor, b: Tensor, a: Tensor, offsets: Tensor, weights: Tensor, scaling: Tensor
) -> Tensor:
    """The mean update in the coordinates of two bases: C = Σ w_i s_i (UᵀB_i)(A_iV).

    Parameters
    ----------
    u : Tensor (d_out, R_u)
    v : Tensor (d_in, R_v)
        Orthonormal columns; the ranks may differ.
    b, a, offsets
        The row stacks.
    weights, scaling : Tensor (K,)

    Returns
    -------
    Tensor (R_u, R_v) fp64

    Examples
    --------
    >>> import torch, glora_ops
    >>> p = glora_ops.pack([(torch.eye(3, 2), torch.eye(2, 3))])
    >>> one = torch.ones(1)
    >>> glora_ops.ops.core(torch.eye(3, 1), torch.eye(3, 1), p.b, p.a, p.offsets, one, one)
    tensor([[1.]], dtype=torch.float64)
    """
    return torch.ops.glora.core(u, v, b, a, offsets, weights, scaling)


def client_stats(
    b: Tensor, a: Tensor, offsets: Tensor, weights: Tensor, scaling: Tensor,
    u: Tensor, s: Tensor, v: Tensor,
) -> Tensor:  # fmt: skip
    """What `aggregate` tells of each client, for given bases and singular values.

    Parameters
    ----------
    b, a, offsets, weights, scaling
        As in `aggregate`.
    u : Tensor (d_out, R)
    s : Tensor (R,)
    v : Tensor (d_in, R)

    Returns
    -------
    Tensor (K, 4) fp64
        Columns in the order of `glora_ops.CLIENT_STATS`: norm, align_u, align_v, share.

    Examples
    --------
    >>> import torch, glora_ops
    >>> p = glora_ops.pack([(torch.eye(3, 2), torch.eye(2, 3))])
    >>> one = torch.ones(1)
    >>> u, s, v, *_ = glora_ops.ops.aggregate(p.b, p.a, p.offsets, one, one, rank=2)
    >>> stats = glora_ops.ops.client_stats(p.b, p.a, p.offsets, one, one, u, s, v)
    >>> dict(zip(glora_ops.CLIENT_STATS, stats[0].round(decimals=4).tolist()))
    {'norm': 1.4142, 'align_u': 1.0, 'align_v': 1.0, 'share': 1.0}
    """
    return torch.ops.glora.client_stats(b, a, offsets, weights, scaling, u, s, v)


def aggregate(
    b: Tensor,
    a: Tensor,
    offsets: Tensor,
    weights: Tensor,
    scaling: Tensor,
    rank: int,
    basis: str = Aggregate.basis,
    tau_rel: float = Aggregate.tau_rel,
    anchor: float = Aggregate.anchor,
    oversample: int = Aggregate.oversample,
    power_iters: int = Aggregate.power_iters,
    tol: float = Aggregate.tol,
    warm_u: Tensor | None = None,
    warm_v: Tensor | None = None,
    seed: int = Aggregate.seed,
    client_statistics: bool = Aggregate.client_statistics,
) -> Step:
    """The server step: Ŵ = u·diag(s)·vᵀ of rank R from the factors of K clients.

    Parameters
    ----------
    b : Tensor (N, d_out)
        Columns of every client's lora_B as rows.
    a : Tensor (N, d_in)
        Rows of every lora_A.
    offsets : Tensor (K + 1,) int64, on the CPU
    weights : Tensor (K,)
        Taken as they are: divide them by their sum for a mean.
    scaling : Tensor (K,)
        alpha/r of each client.
    rank : int
        R ≥ 1; beyond what exists, columns are zero.
    basis : {"consensus", "projector", "update"}
        As in `glora_ops.aggregate`.
    tau_rel, anchor : float
        Softness of votes, and weight of the anchor, ≥ 0 (docs/mathematics.md).
    oversample, power_iters, tol, seed
        As in `projector_svd`. On CUDA tensors ``power_iters ≥ 0`` looks at no value.
    warm_u : Tensor (d_out, k), optional
    warm_v : Tensor (d_in, k), optional
        Bases to start from.
    client_statistics : bool
        False leaves `client_stats` out: (0, 4).

    Returns
    -------
    u : Tensor (d_out, R)
    s : Tensor (R,) fp64
        Descending. fp64 also where u and v are fp32: ``(u * s.to(u.dtype)) @ v.mT`` is Ŵ.
    v : Tensor (d_in, R)
    eig_u, eig_v : Tensor (R + oversample,) fp64
    stats : Tensor (16,) fp64
        In the order of `glora_ops.STATS`.
    client_stats : Tensor (K, 4) fp64
        In the order of `glora_ops.CLIENT_STATS`.

    Notes
    -----
    O(N d (R + p)) a side and step; equations in docs/mathematics.md, after arXiv 2605.06733.

    Examples
    --------
    >>> import torch, glora_ops
    >>> p = glora_ops.pack([(torch.randn(6, 2), torch.randn(2, 5)) for _ in range(2)])
    >>> w, scaling = torch.tensor([0.5, 0.5]), torch.ones(2)
    >>> u, s, v, *certificates = glora_ops.ops.aggregate(p.b, p.a, p.offsets, w, scaling, rank=4)
    >>> mean = 0.5 * p.b.mT @ p.a  # of all ranks together: nothing is lost at rank 4
    >>> bool(torch.allclose((u * s.to(u.dtype)) @ v.mT, mean, atol=1e-5))
    True
    """
    return torch.ops.glora.aggregate(
        b, a, offsets, weights, scaling, rank, basis, tau_rel, anchor, oversample, power_iters, tol,
        warm_u, warm_v, seed, client_statistics,
    )  # fmt: skip


def aggregate_list(
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    weights: Tensor,
    scaling: Tensor,
    rank: int,
    basis: str = AggregateList.basis,
    tau_rel: float = AggregateList.tau_rel,
    anchor: float = AggregateList.anchor,
    oversample: int = AggregateList.oversample,
    power_iters: int = AggregateList.power_iters,
    tol: float = AggregateList.tol,
    warm_u: Tensor | None = None,
    warm_v: Tensor | None = None,
    seed: int = AggregateList.seed,
    client_statistics: bool = AggregateList.client_statistics,
) -> Step:
    """`aggregate` from PEFT's matrices, whose ranks may differ.

    Parameters
    ----------
    lora_B : sequence of Tensor (d_out, r_i)
    lora_A : sequence of Tensor (r_i, d_in)
    weights, scaling, rank, basis, …
        As in `aggregate`.

    Returns
    -------
    u, s, v, eig_u, eig_v, stats, client_stats
        As `aggregate`.

    Examples
    --------
    >>> import torch, glora_ops
    >>> lora_B = [torch.randn(6, 2), torch.randn(6, 3)]
    >>> lora_A = [torch.randn(2, 5), torch.randn(3, 5)]
    >>> one = torch.ones(2)
    >>> u, s, v, *_ = glora_ops.ops.aggregate_list(lora_B, lora_A, one / 2, one, rank=4)
    >>> u.shape, v.shape
    (torch.Size([6, 4]), torch.Size([5, 4]))
    """
    return torch.ops.glora.aggregate.list(
        lora_B, lora_A, weights, scaling, rank, basis, tau_rel, anchor, oversample, power_iters,
        tol, warm_u, warm_v, seed, client_statistics,
    )  # fmt: skip


def readout(
    u: Tensor,
    s: Tensor,
    v: Tensor,
    rank: int,
    scaling: float = Readout.scaling,
    pad: str = Readout.pad,
    seed: int = Readout.seed,
) -> tuple[Tensor, Tensor]:
    """An adapter of any rank in PEFT's layouts; readouts of different ranks are nested.

    Parameters
    ----------
    u : Tensor (d_out, R)
    s : Tensor (R,)
    v : Tensor (d_in, R)
        As `aggregate` returns them; u and v of one dtype.
    rank : int
        r ≥ 1.
    scaling : float
        alpha/r of the receiving adapter, > 0: scaling · lora_b @ lora_a is the update.
    pad : {"zero", "trainable"}
        Pairs beyond the effective rank: zeros, or zero in lora_b beside seeded rows of lora_a.
    seed : int
        Of those rows.

    Returns
    -------
    lora_b : Tensor (d_out, r)
    lora_a : Tensor (r, d_in)
        In the dtype of u and v.

    Examples
    --------
    >>> import torch, glora_ops
    >>> s = torch.tensor([4.0, 1.0], dtype=torch.float64)
    >>> lora_b, lora_a = glora_ops.ops.readout(torch.eye(3, 2), s, torch.eye(3, 2), rank=1)
    >>> lora_b @ lora_a
    tensor([[4., 0., 0.],
            [0., 0., 0.],
            [0., 0., 0.]])
    """
    return torch.ops.glora.readout(u, s, v, rank, scaling, pad, seed)
