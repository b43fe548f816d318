"""Between the factors' rows and the clients' own coordinates, r × r per client.

    fold    Z'_i = diag(c_i) T_iᵀ Z_i       of Mᵀ y, with M = [x_iᵀ T_i diag(c_i)]
    unfold  Z'_i = T_i diag(c_i) Z_i        of M z

stand between two long products: Σ_i x_iᵀ T_i diag(c_i) T_iᵀ x_i Ω is times, fold, unfold,
accumulate. Rows of client i hold T_i. One program per (client and 32 of its rows, column tile,
module) walks the client's rows in tiles of 32; fp64 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .blocks import precise
from .launching import launch
from .precision import precise_mode

__all__ = ["fold_each", "launch_fold"]

TILE, COLUMNS = 32, 32  # rows of a client, columns; why: fp64 blocks stay in registers


@triton.jit
def fold_side(
    T, scale, Z, Y, zl, zn, offsets, clients, rows, rank, k, tiles,
    MODE: tl.constexpr, BACK: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0) % tiles
    i = tl.program_id(0) // tiles % clients
    i_l = (tl.program_id(0) // tiles // clients).to(tl.int64)
    base = i_l * rows
    first, last = tl.load(offsets + i), tl.load(offsets + i + 1)
    o_j = i_t * R + tl.arange(0, R)  # this program's rows, in the client
    m_j = first + o_j < last
    o_k = tl.program_id(1) * BN + tl.arange(0, BN)
    b_Y = tl.zeros((R, BN), tl.float64)
    if first + i_t * R < last:
        for start in range(0, last - first, R):
            o_n = start + tl.arange(0, R)
            m_n = first + o_n < last
            m_Z = m_n[:, None] & (o_k < k)[None, :]
            o_Z = i_l * zl + (first + o_n)[:, None] * zn + o_k[None, :]
            b_Z = tl.load(Z + o_Z, mask=m_Z, other=0.0).to(tl.float64)
            # [R, R]: row n of T holds what client row n has of every direction
            if BACK:
                o_T = (base + first + o_j)[:, None] * rank + o_n[None, :]
                b_T = tl.load(T + o_T, mask=m_j[:, None] & m_n[None, :], other=0.0)
                b_Z *= tl.load(scale + base + first + o_n, mask=m_n, other=0.0)[:, None]
            else:
                o_T = (base + first + o_n)[:, None] * rank + o_j[None, :]
                b_T = tl.load(T + o_T, mask=m_n[:, None] & m_j[None, :], other=0.0)
                b_T = tl.trans(b_T)
            b_Y += precise(b_T, b_Z, MODE)
        if not BACK:
            b_Y *= tl.load(scale + base + first + o_j, mask=m_j, other=0.0)[:, None]
    o_Y = (base + first + o_j)[:, None] * k + o_k[None, :]
    tl.store(Y + o_Y, b_Y.to(Y.dtype.element_ty), mask=m_j[:, None] & (o_k < k)[None, :])


@triton.jit
def fold_kernel(
    T0, scale0, Z0, Y0, zl0, zn0, T1, scale1, Z1, Y1, zl1, zn1,
    offsets, clients, rows, rank, k, tiles,
    BOTH: tl.constexpr, MODE: tl.constexpr, BACK: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    if BOTH and tl.program_id(2) > 0:
        fold_side(
            T1, scale1, Z1, Y1, zl1, zn1, offsets, clients, rows, rank, k, tiles, MODE, BACK, R, BN
        )
    else:
        fold_side(
            T0, scale0, Z0, Y0, zl0, zn0, offsets, clients, rows, rank, k, tiles, MODE, BACK, R, BN
        )


def fold_each(
    t: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    z: Sequence[torch.Tensor],
    offsets: torch.Tensor,
    max_rank: int,
    back: bool,
) -> list[torch.Tensor]:
    """`launch_fold` of one or two sides of one shape in one launch."""
    modules, rows, rank = t[0].shape
    k = z[0].shape[-1]
    z = [x if x.stride(-1) == 1 else x.contiguous() for x in z]
    dtype = torch.float32 if back else torch.float64
    y = [torch.empty(modules, rows, k, dtype=dtype, device=x.device) for x in z]
    sides = [
        (a.contiguous(), c.contiguous(), b, d, b.stride(0), b.stride(1))
        for a, c, b, d in zip(t, scale, z, y, strict=True)
    ]
    clients, tiles = offsets.shape[0] - 1, triton.cdiv(max_rank, TILE)
    launch(
        fold_kernel, (clients * tiles * modules, triton.cdiv(k, COLUMNS), len(sides)),
        *sides[0], *sides[-1], offsets, clients, rows, rank, k, tiles, BOTH=len(sides) > 1,
        MODE=precise_mode(z[0]), BACK=back, R=TILE, BN=COLUMNS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return y


def launch_fold(
    t: torch.Tensor,
    scale: torch.Tensor,
    z: torch.Tensor,
    offsets: torch.Tensor,
    max_rank: int,
    back: bool,
) -> torch.Tensor:
    """diag(c_i) T_iᵀ z_i, or `back`, T_i diag(c_i) z_i.

    Parameters
    ----------
    t : Tensor (L, N, r) fp64
    scale : Tensor (L, N) fp64
        c_ij at row j of client i.
    z : Tensor (L, N, k), fp32 or fp64
    offsets : Tensor (K + 1,) int64 on the device
    max_rank : int
        At least the largest rank, at most r.

    Returns
    -------
    Tensor (L, N, k) fp64; fp32 where `back`, for `product.launch_accumulate`
    """
    return fold_each([t], [scale], [z], offsets, max_rank, back)[0]
