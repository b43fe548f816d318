"""Gram–Schmidt from a Gram matrix: W upper triangular with (Y W)ᵀ(Y W) = I, rank-safe, no library.

In column order, in place, on one n × n block per program. X starts as the Gram matrix of unit
columns. Before columns J, 16 at a time, rows above J hold the unfinished part of W and rows from J
on the Schur complement. With w the factor of the diagonal block X_JJ and 1 in its place,

    L = X_{·J} w,     X −= L (L below J)ᵀ,     columns J of W = L down to J.

Only w is found column by column, at step j with p its pivot:

    row  r_k = X_jk / p,   X_ik −= X_ij r_k  (i ≠ j, k > j),   X_jk = −r_k,   column j /= √p.

A pivot below `drop` makes column j zero and leaves the others alone: dependent directions vanish
instead of becoming noise. So do columns 10⁻¹² times the longest. X_{·J} changes threads through W,
in global memory; products are fp64, n/16 of them; nothing synchronises with the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launching import launch
from .precision import target_of

__all__ = ["MAX_COLUMNS", "launch_triangular", "triangular_each"]

MAX_COLUMNS = 128  # why: one n × n block in fp64 fills a processor's registers
PANEL = 16  # columns at a time; why: the least that a product takes (tl.dot)
WARPS = {16: 1, 32: 2, 64: 8, 128: 8}  # by the block's side; README.md: registers


@triton.jit
def factor(b_X, drop, P: tl.constexpr):
    """w of one diagonal block [P, P]."""
    o = tl.arange(0, P)
    for j in range(P):
        column = tl.sum(tl.where(o[None, :] == j, b_X, 0.0), 1)
        row = tl.sum(tl.where(o[:, None] == j, b_X, 0.0), 0)
        p = tl.sum(tl.where(o == j, row, 0.0), 0, keep_dims=True)  # [1]
        kept = p > drop
        root = tl.where(kept, tl.rsqrt(tl.where(kept, p, 1.0)), 0.0)
        row = tl.where(o > j, row * root * root, 0.0)
        b_X -= tl.where(o == j, 0.0, column)[:, None] * row[None, :]
        b_X = tl.where((o[:, None] == j) & (o[None, :] > j), -row[None, :], b_X)
        column = tl.where(o == j, 1.0, tl.where(o < j, column, 0.0)) * root
        b_X = tl.where(o[None, :] == j, column[:, None], b_X)
    return b_X


@triton.jit
def unit(b_s):
    """1/√s, zero for columns that count as zero."""
    alive = b_s > tl.max(b_s, 0) * 1e-24
    return tl.where(alive, 1 / tl.sqrt(tl.where(alive, b_s, 1.0)), 0.0)


@triton.jit
def triangular_kernel(
    G, W, G1, W1, n, drop, BOTH: tl.constexpr, BN: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr
):
    if BOTH:
        G, W = G1 if tl.program_id(1) else G, W1 if tl.program_id(1) else W
    i = tl.program_id(0).to(tl.int64)
    G += i * n * n
    W += i * n * n
    o = tl.arange(0, BN)
    o_p = tl.arange(0, P)
    m_X = (o[:, None] < n) & (o[None, :] < n)
    o_X = o[:, None] * n + o[None, :]
    b_X = tl.load(G + o_X, mask=m_X, other=0.0)
    b_s = unit(tl.load(G + o * (n + 1), mask=o < n, other=0.0))
    b_X = b_s[:, None] * b_X * b_s[None, :]
    for start in range(0, n, P):
        end = start + P
        o_j = start + o_p
        tl.store(W + o_X, b_X, mask=m_X & (o[None, :] >= start) & (o[None, :] < end))
        tl.debug_barrier()
        o_C = o[:, None] * n + o_j[None, :]
        m_C = (o[:, None] < n) & (o_j[None, :] < n)
        b_C = tl.load(W + o_C, mask=m_C, other=0.0)
        m_H = (o_j[:, None] < n) & (o_j[None, :] < n)
        b_H = tl.load(W + o_j[:, None] * n + o_j[None, :], mask=m_H, other=0.0)
        b_H = factor(b_H, drop, P)
        inside = (o >= start) & (o < end)
        b_C = tl.where(inside[:, None], tl.where(o[:, None] == o_j[None, :], 1.0, 0.0), b_C)
        b_L = tl.dot(b_C, b_H, input_precision="ieee", out_dtype=tl.float64)
        b_X = tl.where(inside[:, None], 0.0, b_X)
        if DOT:
            below = tl.where((o >= end)[:, None], -b_L, 0.0)
            b_X = tl.dot(b_L, tl.trans(below), b_X, input_precision="ieee", out_dtype=tl.float64)
        else:  # the same, column by column from memory: X keeps its place in registers
            tl.debug_barrier()
            tl.store(W + o_C, b_L, mask=m_C)
            tl.debug_barrier()
            for k in range(start, tl.minimum(end, n)):
                b_l = tl.load(W + o * n + k, mask=o < n, other=0.0)
                b_X -= b_l[:, None] * tl.where(o >= end, b_l, 0.0)[None, :]
        tl.debug_barrier()
        tl.store(W + o_C, b_s[:, None] * tl.where((o < end)[:, None], b_L, 0.0), mask=m_C)


def triangular_each(grams: Sequence[torch.Tensor], drop: float) -> list[torch.Tensor]:
    """`launch_triangular` of one or two sides of one shape in one launch."""
    grams = [g.contiguous() for g in grams]
    w = [torch.empty_like(g) for g in grams]
    n = grams[0].shape[-1]
    block = max(16, triton.next_power_of_2(n))
    # From a dot's layout to memory's a block of 128 crosses twice the shared memory of an AMD chip.
    dot = block < 128 or not target_of(grams[0]).startswith("gfx")
    launch(
        triangular_kernel, (grams[0].numel() // (n * n), len(grams)),
        grams[0], w[0], grams[-1], w[-1], n, drop,
        BOTH=len(grams) > 1, BN=block, P=PANEL, DOT=dot, num_warps=WARPS[block], num_stages=1,
    )  # fmt: skip
    return w


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
    return triangular_each([g], drop)[0]
