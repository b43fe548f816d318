"""Overlaps of orthonormal client bases, Γ_ij = T_iᵀ G_ij T_j, as pairs of fp16 numbers.

A pair is hi + 2⁻¹¹ lo: 22 bits of a number near one. One program per (two clients, module); fp64,
rounded once. A client's own block is the identity on the directions it has, which its T_i was
made for. Others are cut to what products of unit vectors can be: directions of storage noise, of a
millionth of a client's size, have T_i that make more of the rounding of G.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .blocks import wide
from .launching import launch
from .overlaps import lower_place

__all__ = ["UNIT", "halves", "launch_whitened"]

# Columns of a program: scalar products, where there are no fp64 units, hold whole rows of them.
COLUMNS = 16
# Of the second number of a pair: the first has 11 bits.
UNIT = tl.constexpr(2.0**-11)


@triton.jit
def halves(b_X):
    """Two blocks in fp16, b_X = hi + UNIT lo."""
    b_high = b_X.to(tl.float32).to(tl.float16)
    b_low = (b_X - b_high.to(b_X.dtype)) * (1 / UNIT)
    return b_high, b_low.to(tl.float32).to(tl.float16)


@triton.jit
def turn(T, first, last, rank, o_k, R: tl.constexpr):
    """Columns o_k of a client's T_i [R, ·], zero beyond its rows."""
    o = tl.arange(0, R)
    o_T = (first + o)[:, None] * rank + o_k[None, :]
    here = (first + o < last)[:, None] & (first + o_k < last)[None, :]
    return tl.load(T + o_T, mask=here, other=0.0)


@triton.jit
def whitened_kernel(G, T, Y, offsets, places, rows, rank, ys, R: tl.constexpr, BN: tl.constexpr):
    i, j = lower_place(tl.program_id(0) % places)
    i_l = (tl.program_id(0) // places).to(tl.int64)
    first_i, last_i = tl.load(offsets + i), tl.load(offsets + i + 1)
    first_j, last_j = tl.load(offsets + j), tl.load(offsets + j + 1)
    o = tl.arange(0, R)
    o_k = tl.program_id(1) * BN + tl.arange(0, BN)  # this program's columns, in client j
    o_i = first_i + o
    o_j = first_j + o_k
    m_Y = (o_i < last_i)[:, None] & (o_j < last_j)[None, :]
    G += i_l * rows * rows
    Y += i_l * rows * rows
    T += i_l * rows * rank
    b_T = turn(T, first_j, last_j, rank, o_k, R)
    if i == j:
        there = tl.sum((b_T != 0).to(tl.int32), 0) > 0
        b_Y = tl.where((o[:, None] == o_k[None, :]) & there[None, :], 1.0, 0.0).to(tl.float64)
    else:
        o_G = o_i[:, None] * rows + (first_j + o)[None, :]
        m_G = (o_i < last_i)[:, None] & (first_j + o < last_j)[None, :]
        b_G = wide(tl.load(G + o_G, mask=m_G, other=0.0))
        b_Y = tl.dot(b_G, b_T, input_precision="ieee", out_dtype=tl.float64)
        b_I = tl.trans(turn(T, first_i, last_i, rank, o, R))
        b_Y = tl.dot(b_I, b_Y, input_precision="ieee", out_dtype=tl.float64)
        b_Y = tl.minimum(tl.maximum(b_Y, -1.0), 1.0)
    b_high, b_low = halves(b_Y)
    o_Y = o_i[:, None] * rows + o_j[None, :]
    tl.store(Y + o_Y, b_high, mask=m_Y)
    tl.store(Y + ys + o_Y, b_low, mask=m_Y)
    if i != j:
        o_Y = o_j[None, :] * rows + o_i[:, None]
        tl.store(Y + o_Y, b_high, mask=m_Y)
        tl.store(Y + ys + o_Y, b_low, mask=m_Y)


def launch_whitened(
    grams: list[torch.Tensor], turns: list[torch.Tensor], offsets: torch.Tensor, max_rank: int
) -> torch.Tensor:
    """Γ of some sides, one after the other.

    Parameters
    ----------
    grams : Tensor (L, N, N) fp32 each
    turns : Tensor (L, N, r) fp64 each
    offsets : Tensor (K + 1,) int64 on the device
    max_rank : int
        At least the largest rank, at most 64.

    Returns
    -------
    Tensor (2, S·L, N, N) fp16
        hi and lo; symmetric.
    """
    modules, rows, _ = grams[0].shape
    clients, sides = offsets.shape[0] - 1, len(grams)
    y = torch.empty(2, sides * modules, rows, rows, dtype=torch.float16, device=grams[0].device)
    block = max(16, triton.next_power_of_2(max_rank))
    places = clients * (clients + 1) // 2
    for gram, t, part in zip(grams, turns, y.chunk(sides, 1), strict=True):
        launch(
            whitened_kernel, (places * modules, triton.cdiv(max_rank, COLUMNS)), gram,
            t.contiguous(), part, offsets, places, rows, t.shape[-1], part.stride(0), R=block,
            BN=COLUMNS, num_warps={16: 1, 32: 4, 64: 16}[block],
        )  # fmt: skip
    return y
