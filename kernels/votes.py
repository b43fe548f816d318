"""Votes and sizes of all clients from their canonical forms, all at once.

    σ ← |s| σ,   size ← |s| size,   noise = ½ u_in size,   τ = max(τ_rel σ₁, noise)
    soft = σ²/(σ² + τ²),   hard = σ > 8 noise,   norm = ‖σ‖

One program per client and module; T moves from padded blocks to the rows of the stack, zero where
σ is, V's with the sign of s. Entries of a row beyond its client's rank are zero.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from .launching import launch

__all__ = ["launch_votes"]


@triton.jit
def votes_kernel(
    T_U, T_V, S, WHOLE, SCALING, offsets, T, SIGMA, SOFT, HARD, SIZE, NOISE, TAU, NORM, LOUDEST,
    clients, rows, stride, below, tau_rel: tl.constexpr, HALF: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    i_k = tl.program_id(0) % clients
    first, last = tl.load(offsets + i_k), tl.load(offsets + i_k + 1)
    o = tl.arange(0, N)
    m = o < last - first
    s = tl.load(SCALING + i_b)
    b_s = tl.load(S + i_b * stride + o, mask=m, other=0.0) * tl.abs(s)
    size = tl.load(WHOLE + i_b) * tl.abs(s)
    loudest = tl.sum(tl.where(o == 0, b_s, 0.0), 0)
    noise = HALF * size
    tau = tl.maximum(tau_rel * loudest, noise, propagate_nan=tl.PropagateNan.ALL)
    b_f = b_s / tl.maximum(tau, 1e-300, propagate_nan=tl.PropagateNan.ALL)
    b_f *= b_f
    tl.store(SIZE + i_b, size)
    tl.store(NOISE + i_b, noise)
    tl.store(TAU + i_b, tau)
    tl.store(NORM + i_b, tl.sqrt(tl.sum(b_s * b_s, 0)))
    tl.store(LOUDEST + i_b, loudest)
    o_n = i_b // clients * rows + first + o
    tl.store(SIGMA + o_n, b_s, mask=m)
    tl.store(SOFT + o_n, b_f / (b_f + 1), mask=m)
    tl.store(HARD + o_n, (b_s > 8 * noise).to(tl.float64), mask=m)
    m_T = m[:, None] & (o < stride)[None, :]
    o_P = (i_b * stride + o[:, None]) * stride + o[None, :]
    o_T = o_n[:, None] * stride + o[None, :]
    voting = b_s > 0
    b_T = tl.load(T_U + o_P, mask=m_T & voting[None, :], other=0.0)
    tl.store(T + o_T, b_T, mask=m_T)
    b_T = tl.load(T_V + o_P, mask=m_T & voting[None, :], other=0.0)
    tl.store(T + below + o_T, tl.where(s < 0, -b_T, b_T), mask=m_T)


def launch_votes(
    forms: tuple[torch.Tensor, ...],
    scaling: torch.Tensor,
    offsets: torch.Tensor,
    rows: int,
    tau_rel: float,
    roundoff: float,
) -> tuple[torch.Tensor, ...]:
    """What all that follows needs to know of the clients.

    Parameters
    ----------
    forms : tuple of Tensor
        t_u, t_v, sigma and size of `canonical_solve.launch_canonical_solve`.
    scaling : Tensor (L, K) fp64
    offsets : Tensor (K + 1,) int64 on the device

    Returns
    -------
    t : Tensor (2, L, N, r) fp64
    sigma, soft, hard : Tensor (L, N) fp64
    size, noise, tau, norm, loudest : Tensor (L, K) fp64
    """
    t_u, _, _, size = forms
    (modules, clients), width = size.shape, t_u.shape[-1]
    double = partial(torch.empty, dtype=torch.float64, device=size.device)
    t, per_row = double(2, modules, rows, width), [double(modules, rows) for _ in range(3)]
    per_client = [double(modules, clients) for _ in range(5)]
    launch(
        votes_kernel, (modules * clients,), *forms, scaling.contiguous(), offsets, t, *per_row,
        *per_client, clients, rows, width, t.stride(0), tau_rel=tau_rel, HALF=0.5 * roundoff,
        N=max(16, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip
    return t, *per_row, *per_client
