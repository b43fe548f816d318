"""The core: C = Σ_j coef_j (Uᵀb_j)(a_jᵀV), both projections and the weighted product in one pass.

One program per (64 rows, module) walks d_out, then d_in, keeps Z_U = bU and Z_V = aV in registers,
stores them, and leaves its share of C in a workspace; shares are added in fixed order. Projections
are fp32-exact products, the weighted product is fp64. R ≤ 64: beyond that the two projections and
`product.launch_inner` do the same in more launches.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from .blocks import contract, precise
from .launching import launch
from .precision import PROMOTED, precise_mode, product_mode, target_of

__all__ = ["MAX_RANK", "launch_core"]

MAX_RANK = 64  # of the bases; why: wider blocks do not stay in registers (README.md)
ROWS, STEP = 64, 32  # rows a program, columns at a time; slices: as many rows as they sum


@triton.jit
def core_kernel(
    B, A, U, V, coef, ZU, ZV, C, rows, d_out, d_in, k_u, k_v,
    bl, bn, bd, al, an, ad, ul, ud, uk, vl, vd, vk,
    MODE: tl.constexpr, EVERY: tl.constexpr, SMALL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows, BM)
    modules = tl.num_programs(0) // blocks
    i_m = (tl.program_id(0) % blocks).to(tl.int64)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = i_m * BM + tl.arange(0, BM)
    m_n = o_n < rows
    o_k = tl.arange(0, BN)
    b_U = contract(
        B + i_l * bl, U + i_l * ul, o_n, m_n, o_k, o_k < k_u, d_out, bn, bd, ud, uk,
        MODE, EVERY, BM, BN, BC,
    )  # fmt: skip
    o_z = (i_l * rows + o_n)[:, None]
    m_u = m_n[:, None] & (o_k < k_u)[None, :]
    tl.store(ZU + o_z * k_u + o_k[None, :], b_U.to(tl.float64), mask=m_u)
    b_V = contract(
        A + i_l * al, V + i_l * vl, o_n, m_n, o_k, o_k < k_v, d_in, an, ad, vd, vk,
        MODE, EVERY, BM, BN, BC,
    )  # fmt: skip
    m_v = m_n[:, None] & (o_k < k_v)[None, :]
    tl.store(ZV + o_z * k_v + o_k[None, :], b_V.to(tl.float64), mask=m_v)
    b_c = tl.load(coef + i_l * rows + o_n, mask=m_n, other=0.0)
    b_C = precise(tl.trans(b_U), b_c[:, None] * b_V.to(tl.float64), SMALL)
    i_c = i_m * modules + i_l
    o_C = i_c * k_u * k_v + o_k[:, None] * k_v + o_k[None, :]
    tl.store(C + o_C, b_C, mask=(o_k < k_u)[:, None] & (o_k < k_v)[None, :])


def launch_core(
    b: torch.Tensor, a: torch.Tensor, u: torch.Tensor, v: torch.Tensor, coef: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """C with both projections.

    Parameters
    ----------
    b, a : Tensor (L, N, d_out), (L, N, d_in), any strides, one dtype
    u, v : Tensor (L, d_out, R_u), (L, d_in, R_v), any strides; R ≤ `MAX_RANK`
    coef : Tensor (L, N) fp64

    Returns
    -------
    c : Tensor (L, R_u, R_v) fp64
    z_u, z_v : Tensor (L, N, R_u), (L, N, R_v) fp64
    """
    modules, rows, _ = b.shape
    k_u, k_v = u.shape[-1], v.shape[-1]
    mode, small = product_mode(b, u), precise_mode(b)
    # Slices sum no more rows than that; on sm_100 more would go through tensor memory and spill.
    height = ROWS if small == "double" and target_of(b) != "sm_100" else STEP
    blocks = triton.cdiv(rows, height)
    double = partial(torch.empty, dtype=torch.float64, device=b.device)
    z_u = double(modules, rows, k_u)
    z_v = double(modules, rows, k_v)
    shares = double(blocks, modules, k_u, k_v)
    launch(
        core_kernel, (blocks * modules,),
        b, a, u, v, coef.contiguous(), z_u, z_v, shares, rows, b.shape[-1], a.shape[-1], k_u, k_v,
        *b.stride(), *a.stride(), *u.stride(), *v.stride(),
        MODE=mode, EVERY=PROMOTED, SMALL=small, BM=height,
        BN=max(16, triton.next_power_of_2(max(k_u, k_v))), BC=16 if mode == "tf32x3" else STEP,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return shares.sum(0), z_u, z_v
