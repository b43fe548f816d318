"""Overlaps G = x xᵀ of all rows, lower tiles alone: the upper ones are a mirror.

One program per (tile on or below the diagonal, module) walks the long dimension; an entry is
stored twice, so that G is symmetric to the last bit. Rows may be scaled by powers of two on their
way, which keeps squares in range and changes no digit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .blocks import load_tile, product, promoted, zeros
from .launching import launch
from .precision import PROMOTED, product_mode, target_of

__all__ = ["OverlapsConfig", "launch_overlaps", "lower_place"]


@dataclass(frozen=True)
class OverlapsConfig:
    """Rows and columns of a tile, step along d, launch options."""

    block: int
    block_c: int
    num_warps: int
    num_stages: int

    @classmethod
    def for_rows(cls, rows: int, mode: str, target: str) -> OverlapsConfig:
        """Large tiles read less from L2; small ones leave less of themselves above the diagonal."""
        if mode == "double":
            return cls(32, 32, 4, 3)
        if mode == "half" and rows >= 512 and target.startswith("sm_8"):
            return cls(128, 32, 16, 3)  # operands are in registers there, beside the sums
        if mode == "half":
            return cls(128, 64, 8, 3) if rows >= 512 else cls(64, 64, 4, 3)
        return cls(64, 16, 8, 3)


@triton.jit
def lower_place(t):
    """Row and column of place t, places counted along rows of a lower triangle, int32."""
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    return i, t - i * (i + 1) // 2


@triton.jit
def scaled(b_X, b_s):
    """b_X b_s in b_X's precision, exactly; b_s with an axis of length one."""
    return (b_X.to(tl.float32) * b_s).to(b_X.dtype)


@triton.jit
def overlaps_kernel(
    X, S, G, rows, d, places, xl, xn, xd,
    MODE: tl.constexpr, EVERY: tl.constexpr, SCALED: tl.constexpr,
    B: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i, j = lower_place(tl.program_id(0) % places)
    i_l = (tl.program_id(0) // places).to(tl.int64)
    o_m = i.to(tl.int64) * B + tl.arange(0, B)
    o_n = j.to(tl.int64) * B + tl.arange(0, B)
    m_m = o_m < rows
    m_n = o_n < rows
    X += i_l * xl
    if SCALED:
        b_m = tl.load(S + i_l * rows + o_m, mask=m_m, other=0.0)[:, None]
        b_n = tl.load(S + i_l * rows + o_n, mask=m_n, other=0.0)[None, :]
    b_G = zeros(B, B, MODE)
    b_part = zeros(B, B, MODE)
    for c in range(0, d, BC):
        o_c = c + tl.arange(0, BC)
        b_X = load_tile(X, o_m, m_m, o_c.to(tl.int64), o_c < d, xn, xd)
        b_W = load_tile(X, o_c.to(tl.int64), o_c < d, o_n, m_n, xd, xn)
        if SCALED:
            b_X = scaled(b_X, b_m)
            b_W = scaled(b_W, b_n)
        b_part = product(b_X, b_W, b_part, MODE)
        b_G, b_part = promoted(b_G, b_part, c + BC, MODE, EVERY)
    b_G = (b_G + b_part).to(G.dtype.element_ty)
    G += i_l * rows * rows
    below = m_m[:, None] & m_n[None, :] & (o_m[:, None] >= o_n[None, :])
    tl.store(G + o_m[:, None] * rows + o_n[None, :], b_G, mask=below)
    tl.store(G + o_n[None, :] * rows + o_m[:, None], b_G, mask=below)


def launch_overlaps(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """G = x xᵀ.

    Parameters
    ----------
    x : Tensor (L, N, d), any strides
    scale : Tensor (L, N) fp32, optional
        Powers of two by which rows are multiplied first; not for fp64 x.

    Returns
    -------
    Tensor (L, N, N), fp32; fp64 for fp64 x
    """
    modules, rows, d = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    g = torch.empty(modules, rows, rows, dtype=dtype, device=x.device)
    mode = product_mode(x, x)
    config = OverlapsConfig.for_rows(rows, mode, target_of(x))
    tiles = triton.cdiv(rows, config.block)
    places = tiles * (tiles + 1) // 2
    launch(
        overlaps_kernel, (places * modules,), x, x if scale is None else scale.contiguous(), g,
        rows, d, places, *x.stride(),
        MODE=mode, EVERY=PROMOTED, SCALED=scale is not None, B=config.block, BC=config.block_c,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return g
