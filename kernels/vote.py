"""The clients' votes in their own coordinates: Z'_i = T_i diag(c_i) T_iᵀ Z_i.

Between the two long products of y = Σ_i x_iᵀ T_i diag(c_i) T_iᵀ x_i Ω stands this short one, r × r
per client. One program per (client, column tile, module); fp64 inside, fp32 out (what
`product.launch_accumulate` takes). T lives in memory as row blocks: rows of client i hold T_i.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launching import launch

__all__ = ["MAX_RANK", "launch_vote"]

MAX_RANK = 64
COLUMNS = 32


@triton.jit
def vote_kernel(
    T, votes, Z, Y, offsets, rows, rank, k, R: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0)
    i_l = tl.program_id(2).to(tl.int64)
    first, last = tl.load(offsets + i), tl.load(offsets + i + 1)
    o_j = tl.arange(0, R)
    o_n = i_l * rows + first + o_j
    m_n = first + o_j < last
    o_k = tl.program_id(1) * BN + tl.arange(0, BN)
    m_Z = m_n[:, None] & (o_k < k)[None, :]
    # [R, R], [R, BN]: row j of T_i, column j of T_i and vote j belong to the same direction
    m_T = m_n[:, None] & (o_j < rank)[None, :]
    b_T = tl.load(T + o_n[:, None] * rank + o_j[None, :], mask=m_T, other=0.0)
    b_Z = tl.load(Z + o_n[:, None] * k + o_k[None, :], mask=m_Z, other=0.0)
    b_c = tl.load(votes + o_n, mask=m_n, other=0.0)
    b_Y = tl.dot(tl.trans(b_T), b_Z, input_precision="ieee", out_dtype=tl.float64)
    b_Y = tl.dot(b_T, b_c[:, None] * b_Y, input_precision="ieee", out_dtype=tl.float64)
    tl.store(Y + o_n[:, None] * k + o_k[None, :], b_Y.to(tl.float32), mask=m_Z)


def launch_vote(
    t: torch.Tensor, votes: torch.Tensor, z: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """T_i diag(c_i) T_iᵀ z_i for every client.

    Parameters
    ----------
    t : Tensor (L, N, r) fp64, r ≤ `MAX_RANK`
    votes : Tensor (L, N) fp64
    z : Tensor (L, N, k) fp64
    offsets : Tensor (K + 1,) int64 on the device

    Returns
    -------
    Tensor (L, N, k) fp32
    """
    modules, rows, rank = t.shape
    k = z.shape[-1]
    t, votes, z = t.contiguous(), votes.contiguous(), z.contiguous()
    y = torch.empty(modules, rows, k, dtype=torch.float32, device=z.device)
    slots = max(16, triton.next_power_of_2(rank))
    launch(
        vote_kernel, (offsets.shape[0] - 1, triton.cdiv(k, COLUMNS), modules),
        t, votes, z, y, offsets, rows, rank, k, R=slots, BN=COLUMNS,
        num_warps=8 if slots == MAX_RANK else 4, num_stages=1,
    )  # fmt: skip
    return y
