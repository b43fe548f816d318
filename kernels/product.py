"""Products with one long dimension: Y = X W for any strides, fp32-exact, all modules at once.

Three uses of one kernel, told apart by which dimension is long:

    times       z = x Ω     M = N rows, N = k columns, C = d: long contraction, cut into `splits`
                            whose partial sums are added in fixed order in fp64
    inner       yᵀ z        the same in fp64, for two tall blocks or a whole stack's Gram matrix
    accumulate  y = Σ_i x_iᵀ z_i    M = d, N = k, C = N rows: one long product over the stacked
                            rows in client order, sums in registers from the first to the last

One program per (M tile, N tile, split, module). No atomics: the same input gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .blocks import contract
from .launching import launch
from .precision import PRECISE, PROMOTED, precise_mode, product_mode

__all__ = ["ProductConfig", "launch_accumulate", "launch_inner", "launch_times"]

# Programs that fill the smaller of the GPUs in use (A100: 108 processors, H100: 132).
FILL = 128

# Rows from which tiles of 128 of them leave enough programs.
TALL = 512
# Numbers that tiles read from which it pays to make them narrower once, in a launch of its own.
REREAD = 2**23


@dataclass(frozen=True)
class ProductConfig:
    """Tile (block_m, block_n), step of the contraction, launch options."""

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int

    @classmethod
    def for_shape(cls, m: int, n: int, mode: str) -> ProductConfig:
        """Wide enough for wgmma (M = 64) where there are rows; narrow where registers end."""
        block_m = 64 if m > 32 else 32 if m > 16 else 16
        if mode == "split w" and m >= TALL:  # each row tile reads w again, from L2
            return cls(128, 64 if n > 32 else 32 if n > 16 else 16, 32, 8, 2)
        block_n = min(max(16, triton.next_power_of_2(n)), 32 if mode in PRECISE else 64)
        # Operands of several terms are the register budget: 64 columns of one, 32 of three bf16
        # terms or of fp64, 16 of three tf32 terms; three terms take twice as many warps.
        block_c = {"half": 64, "tf32x3": 16}.get(mode, 32)
        terms = mode in ("split w", "tf32x3")
        return cls(block_m, block_n, block_c, 8 if terms and block_m == 64 else 4, 3)


@triton.jit
def product_kernel(
    X, W, Y, M, N, C, chunk, splits, xl, xm, xc, wl, wc, wn, ys, yl, ym, yn,
    MODE: tl.constexpr, EVERY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * across
    tile = tl.program_id(0) % tiles
    i_s = (tl.program_id(0) // tiles % splits).to(tl.int64)
    i_l = (tl.program_id(0) // tiles // splits).to(tl.int64)
    o_m = (tile // across).to(tl.int64) * BM + tl.arange(0, BM)
    o_n = (tile % across).to(tl.int64) * BN + tl.arange(0, BN)
    m_m = o_m < M
    m_n = o_n < N
    first = i_s * chunk
    b_Y = contract(
        X + i_l * xl + first * xc, W + i_l * wl + first * wc, o_m, m_m, o_n, m_n,
        tl.minimum(chunk, C - first).to(tl.int32), xm, xc, wc, wn, MODE, EVERY, BM, BN, BC,
    )  # fmt: skip
    o_Y = i_s * ys + i_l * yl + o_m[:, None] * ym + o_n[None, :] * yn
    tl.store(Y + o_Y, b_Y.to(Y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def launch_times(x: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    """Z = x Ω.

    Parameters
    ----------
    x : Tensor (L, n, d), any strides
    omega : Tensor (L or 1, d, k), any strides; (k, d) memory is the fast one

    Returns
    -------
    Tensor (L, n, k) fp64
    """
    return _contract(x, omega, product_mode(x, omega))


def launch_inner(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """yᵀ z in fp64: (L, k, m) from y (L, d, k) and z (L, d, m), any strides and dtypes."""
    return _contract(y.mT, z, precise_mode(y))


def _contract(x: torch.Tensor, w: torch.Tensor, mode: str) -> torch.Tensor:
    """(L, m, n) fp64: x (L, m, c) w (L or 1, c, n), the long c cut so that the device is full."""
    modules, m, c = x.shape
    n = w.shape[-1]
    config = ProductConfig.for_shape(m, n, mode)
    programs = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n) * modules
    splits = max(1, min(FILL // max(programs, 1), c // 512))
    chunk = triton.cdiv(triton.cdiv(c, splits), config.block_c) * config.block_c
    splits = triton.cdiv(c, chunk)
    dtype = torch.float64 if splits == 1 or mode in PRECISE else torch.float32
    z = torch.empty(splits, modules, m, n, dtype=dtype, device=x.device)
    _launch(x, w, z, (m, n, c), chunk, mode, config)
    return z[0] if splits == 1 else z.sum(0, dtype=torch.float64)


def launch_accumulate(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Y = xᵀ z, summed over the rows in their order.

    Parameters
    ----------
    x : Tensor (L, n, d), any strides
    z : Tensor (L, n, k), any strides; taken in fp32 unless x is fp64

    Returns
    -------
    Tensor (L, d, k), a view of (L, k, d) memory; fp32, fp64 for fp64 x
    """
    modules, n, d = x.shape
    k = z.shape[-1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty(modules, k, d, dtype=dtype, device=x.device).mT
    if z.dtype != dtype and triton.cdiv(d, 64) * z.numel() > REREAD:
        z = z.to(dtype)
    mode = product_mode(x, y)  # an fp64 z becomes fp32 on its way
    _launch(x.mT, z, y[None], (d, k, n), n, mode, ProductConfig.for_shape(d, k, mode))
    return y


def _launch(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, shape: tuple[int, int, int], chunk: int,
    mode: str, config: ProductConfig,
) -> None:  # fmt: skip
    """y (splits, L, M, N) from x (L, M, C) and w (L or 1, C, N)."""
    m, n, c = shape
    splits, modules = y.shape[:2]
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    w = w.expand(modules, -1, -1)
    launch(
        product_kernel, (tiles * splits * modules,),
        x, w, y, m, n, c, chunk, splits, *x.stride(), *w.stride(), *y.stride(),
        MODE=mode, EVERY=PROMOTED, BM=config.block_m, BN=config.block_n, BC=config.block_c,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
