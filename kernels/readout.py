"""Readout: B = U diag(root) as it is, A = (V diag(root))ᵀ, first r columns, both in one launch.

One program per (tile along d, module, side); zero beyond the columns there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launching import launch

__all__ = ["launch_readout"]

TILE = 64  # long rows of a program


@triton.jit
def scale(U, root, Y, tiles, d, k, r, ul, ud, uk, yl, yd, yk, BM: tl.constexpr, BN: tl.constexpr):
    i_l = (tl.program_id(0) // tiles).to(tl.int64)
    o_d = (tl.program_id(0) % tiles).to(tl.int64) * BM + tl.arange(0, BM)
    for start in range(0, r, BN):
        o_k = start + tl.arange(0, BN)
        m_U = (o_d < d)[:, None] & (o_k < k)[None, :]
        b_U = tl.load(U + i_l * ul + o_d[:, None] * ud + o_k[None, :] * uk, mask=m_U, other=0.0)
        b_s = tl.load(root + i_l * k + o_k, mask=o_k < k, other=0.0)
        o_Y = i_l * yl + o_d[:, None] * yd + o_k[None, :] * yk
        tl.store(Y + o_Y, b_U * b_s[None, :], mask=(o_d < d)[:, None] & (o_k < r)[None, :])


@triton.jit
def readout_kernel(
    U, B, d_out, ul, ud, uk, bl, bd, bk, V, A, d_in, vl, vd, vk, al, ad, ak, root, k, r, tiles,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        scale(U, root, B, tiles, d_out, k, r, ul, ud, uk, bl, bd, bk, BM, BN)
    else:
        scale(V, root, A, tiles, d_in, k, r, vl, vd, vk, al, ad, ak, BM, BN)


def launch_readout(
    u: torch.Tensor, v: torch.Tensor, root: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_b (L, d_out, rank) and lora_a (L, rank, d_in), contiguous.

    Parameters
    ----------
    u, v : Tensor (L, d_out, R), (L, d_in, R), any strides
    root : Tensor (L, R), u's dtype
    rank : int
        May exceed R: zero columns follow.
    """
    modules, d_out, k = u.shape
    d_in = v.shape[1]
    b = u.new_empty(modules, d_out, rank)
    a = u.new_empty(modules, rank, d_in)
    tiles = triton.cdiv(max(d_out, d_in), TILE)
    launch(
        readout_kernel, (tiles * modules, 2),
        u, b, d_out, *u.stride(), *b.stride(), v, a, d_in, *v.stride(), *a.mT.stride(),
        root.contiguous(), k, rank, tiles, BM=TILE, BN=16, num_warps=4,
    )  # fmt: skip
    return b, a
