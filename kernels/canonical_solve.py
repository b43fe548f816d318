"""Canonical forms ΔW = Q Σ Zᵀ, Q = B T_U, Z = Aᵀ T_V, of all clients and modules from their Grams.

With G_B = BᵀB, G_A = A Aᵀ (r × r) and the balancing D of rows by powers of two (zero for a pair
with a zero factor):

    D⁻¹ G_A D⁻¹ = L Lᵀ          pivoted Cholesky (`jacobi`); K = D L
    KᵀG_B K = Y σ² Yᵀ           pivoted Cholesky, then one-sided Jacobi
    T_U = K Y/σ,  T_V = G_B T_U/σ
    T ← T R⁻¹,  RᵀR = Tᵀ G T    one Cholesky clean-up, leading directions foremost

Directions with σ² ≤ 16·r·2⁻⁵³ of the product of the balanced Grams' Frobenius norms are rounding
and dropped: σ = 0, zero columns. (The CPU's forms take the largest eigenvalue of G_A instead; what
lies between the two is rounding too.) All is fp64, r ≤ 64, a few r × r blocks in registers.

One program per client and module and one launch per block side, 16, 32 and 64, up to the widest
client, whatever the clients: a client of rank 4 beside one of rank 64 costs what rank 4 costs. A
launch skips the clients of the others. Larger ranks go through `eigh` and library products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .jacobi import (
    U64,
    JacobiConfig,
    cholesky,
    column,
    diagonal,
    exponent,
    inverse,
    left_vectors,
    load_block,
    multiply,
    power,
    row,
    store_block,
)
from .launching import launch

__all__ = ["MAX_RANK", "launch_canonical_solve"]

# The widest client whose blocks stay in registers.
MAX_RANK = 64


@triton.jit
def balance(G_B, G_A, stride, n, N: tl.constexpr):
    """d (N) and 1/d, exact powers of two, zero for a pair with a zero factor."""
    o = tl.arange(0, N)
    norm_b = tl.load(G_B + o * stride + o, mask=o < n, other=0.0)
    norm_a = tl.load(G_A + o * stride + o, mask=o < n, other=0.0)
    alive = (norm_b > 0) & (norm_a > 0)
    ratio = tl.where(alive, norm_a, 1.0) / tl.where(alive, norm_b, 1.0)
    e = (exponent(ratio) + 1) >> 2
    return tl.where(alive, power(e), 0.0), tl.where(alive, power(-e), 0.0)


@triton.jit
def clean(T, b_W, kept, stride, n, N: tl.constexpr):
    """T becomes T R⁻¹ with RᵀR = TᵀW, W = G T; it stays as it is where TᵀW is not definite."""
    o = tl.arange(0, N)
    b_H = tl.where((o[:, None] == o[None, :]) & (kept[None, :] == 0), 1.0, 0.0).to(tl.float64)
    for k in range(n):
        b_t = tl.load(T + k * stride + o, mask=o < n, other=0.0)
        b_H += b_t[:, None] * row(b_W, k, N)[None, :]
    b_T = load_block(T, stride, n, N)
    definite = 1
    for j in range(n):
        b_R = row(b_H, j, N)
        pivot = tl.sum(tl.where(o == j, b_R, 0.0), 0)
        definite = tl.where(pivot > 0, definite, 0)
        scale = tl.rsqrt(tl.where(pivot > 0, pivot, 1.0))
        b_R = tl.where(o > j, b_R * scale, 0.0)
        b_t = column(b_T, j, N) * scale
        b_T = tl.where(o[None, :] == j, b_t[:, None], b_T - b_t[:, None] * b_R[None, :])
        b_H -= b_R[:, None] * b_R[None, :]
    if definite > 0:
        store_block(T, b_T, stride, n, N)


@triton.jit
def canonical_kernel(
    G_B, G_A, RANKS, T_U, T_V, SIGMA, SIZE, clients, stride, narrow, N: tl.constexpr
):
    i_k = tl.program_id(0) % clients
    n = tl.load(RANKS + i_k).to(tl.int32)
    if (n <= narrow) | (n > N):
        return
    i_b = tl.program_id(0).to(tl.int64)
    G_B += i_b * stride * stride
    G_A += i_b * stride * stride
    T_U += i_b * stride * stride
    T_V += i_b * stride * stride
    SIGMA += i_b * stride
    o = tl.arange(0, N)
    d, d_inverse = balance(G_B, G_A, stride, n, N)
    # T_U and T_V hold what is at hand until they hold the result.
    b_G = d[:, None] * load_block(G_B, stride, n, N) * d[None, :]
    norm2_b = diagonal(b_G, N)
    square_b = tl.sum(tl.sum(b_G * b_G, 0), 0)
    b_G = d_inverse[:, None] * load_block(G_A, stride, n, N) * d_inverse[None, :]
    norm2_a = diagonal(b_G, N)
    square_a = tl.sum(tl.sum(b_G * b_G, 0), 0)
    tl.store(SIZE + i_b, tl.sum(tl.sqrt(norm2_b * norm2_a), 0))
    noise = 16 * n * U64 * tl.sqrt(square_b) * tl.sqrt(square_a)
    cholesky(b_G, T_U, stride, d, n, N)
    store_block(T_V, multiply(G_B, 1, stride, T_U, stride, n, N), stride, n, N)
    b_M = multiply(T_U, 1, stride, T_V, stride, n, N)
    e = exponent(tl.max(diagonal(b_M, N), 0))
    tl.debug_barrier()
    cholesky(b_M * power(-e), T_V, stride, 1.0, n, N)
    left_vectors(T_V, stride, SIGMA, n, N, 0, False)
    b_square = tl.load(SIGMA + o, mask=o < n, other=0.0) * power(e)
    kept = b_square > noise
    b_sigma = tl.where(kept, tl.sqrt(b_square), 0.0)
    b_scale = inverse(b_sigma)
    tl.debug_barrier()
    tl.store(SIGMA + o, b_sigma, mask=o < n)
    b_U = multiply(T_U, stride, 1, T_V, stride, n, N) * b_scale[None, :]
    store_block(T_U, b_U, stride, n, N)
    b_W = multiply(G_B, 1, stride, T_U, stride, n, N)
    b_V = tl.where(d[:, None] > 0, b_W * b_scale[None, :], 0.0)
    store_block(T_V, b_V, stride, n, N)
    clean(T_U, b_W, kept, stride, n, N)
    clean(T_V, multiply(G_A, 1, stride, T_V, stride, n, N), kept, stride, n, N)


def launch_canonical_solve(
    gram_b: torch.Tensor, gram_a: torch.Tensor, ranks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Canonical coordinates of every client's update.

    Parameters
    ----------
    gram_b, gram_a : Tensor (L, K, r, r) fp64, r ≤ `MAX_RANK`
        BᵀB and A Aᵀ of the factors as they are, or balanced already; what stands beyond a
        client's rank is not read.
    ranks : Tensor (K,) int64 on the same device

    Returns
    -------
    t_u, t_v : Tensor (L, K, r, r) fp64
        Q = B T_U and Z = Aᵀ T_V have orthonormal or zero columns.
    sigma : Tensor (L, K, r) fp64
        Descending; zero where a direction was dropped and beyond a client's rank.
    size : Tensor (L, K) fp64
        Σ_j ‖b_j‖‖a_j‖, which is ‖B‖_F ‖A‖_F after exact balancing.
    """
    modules, clients, width, _ = gram_b.shape
    if width > MAX_RANK:
        raise ValueError(f"rank: got {width}, expected at most {MAX_RANK}; use eigh beyond")
    gram_b, gram_a = gram_b.contiguous(), gram_a.contiguous()
    t_u, t_v = gram_b.new_zeros(2, *gram_b.shape)
    sigma, size = gram_b.new_zeros(gram_b.shape[:-1]), gram_b.new_zeros(modules, clients)
    narrow, block = 0, 16
    while narrow < width:
        launch(
            canonical_kernel, (clients * modules,),
            gram_b, gram_a, ranks, t_u, t_v, sigma, size, clients, width, narrow, N=block,
            num_warps=JacobiConfig.for_size(block).num_warps, num_stages=1,
        )  # fmt: skip
        narrow, block = block, 2 * block
    return t_u, t_v, sigma, size
