"""Gram–Schmidt from a Gram matrix: W upper triangular with (Y W)ᵀ(Y W) = I, rank-safe, no library.

In column order, in place, on one n × n block per program. X starts as the Gram matrix of unit
columns. At step j column j of X holds W's finished part above the diagonal and the Schur
complement's column below it; with p the pivot,

    row  r_k = X_jk / p,   X_ik −= X_ij r_k  (i ≠ j, k > j),   X_jk = −r_k,   column j /= √p.

A pivot below `drop` makes column j zero and leaves the others alone: dependent directions vanish
instead of becoming noise. So do columns 10⁻¹² times the longest. n steps of n² work; nothing
synchronises.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launching import launch
from .precision import target_of

__all__ = ["MAX_COLUMNS", "launch_triangular"]

MAX_COLUMNS = 128


@triton.jit
def triangular_kernel(G, W, n, drop, BN: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BN)
    m_X = (o[:, None] < n) & (o[None, :] < n)
    o_X = i * n * n + o[:, None] * n + o[None, :]
    diagonal = o[:, None] == o[None, :]
    b_X = tl.load(G + o_X, mask=m_X, other=0.0)
    b_s = tl.sum(tl.where(diagonal, b_X, 0.0), 1)
    alive = b_s > tl.max(b_s, 0) * 1e-24
    b_s = tl.where(alive, 1 / tl.sqrt(tl.where(alive, b_s, 1.0)), 0.0)
    b_X = b_s[:, None] * b_X * tl.sum(tl.where(diagonal, b_s[:, None], 0.0), 0)[None, :]
    for j in range(0, n):
        column = tl.sum(tl.where(o[None, :] == j, b_X, 0.0), 1)
        row = tl.sum(tl.where(o[:, None] == j, b_X, 0.0), 0)
        p = tl.sum(tl.where(o == j, row, 0.0), 0, keep_dims=True)  # [1]
        kept = p > drop
        p = tl.where(kept, p, 1.0)
        row = tl.where((o > j) & kept, row / p, 0.0)
        b_X -= tl.where(o == j, 0.0, column)[:, None] * row[None, :]
        b_X = tl.where((o[:, None] == j) & (o[None, :] > j), -row[None, :], b_X)
        column = tl.where(o == j, 1.0, tl.where(o < j, column, 0.0)) / tl.sqrt(p)
        column = tl.where(kept, column, 0.0)
        b_X = tl.where(o[None, :] == j, column[:, None], b_X)
    tl.store(W + o_X, b_s[:, None] * b_X, mask=m_X)


def launch_triangular(g: torch.Tensor, drop: float) -> torch.Tensor:
    """W from Gram matrices.

    Parameters
    ----------
    g : Tensor (..., n, n) fp64, positive semidefinite, n ≤ `MAX_COLUMNS`
    drop : float
        Squared length, of unit columns, below which what is left of a column counts as zero.

    Returns
    -------
    Tensor (..., n, n) fp64
    """
    g = g.contiguous()
    w = torch.empty_like(g)
    n = g.shape[-1]
    block = max(16, triton.next_power_of_2(n))
    most = 16 if target_of(g).startswith("gfx") else 32  # 1024 threads a program
    launch(
        triangular_kernel, (g.numel() // (n * n),), g, w, n, drop, BN=block,
        num_warps=min({16: 1, 32: 2, 64: 8, 128: 32}[block], most), num_stages=1,
    )  # fmt: skip
    return w
