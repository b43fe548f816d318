"""Products in the metric Γ of coordinates, Γ held as pairs of fp16 numbers (`whitened`).

    round      z to 11 or 22 bits of each column's largest entry, in units of its power of two
    product    Γ z of that, beside z as it was rounded
    energy     Σ_ij d_i d_j (Γ_U)_ij (Γ_V)_ij

Products of fp16 numbers are exact in fp32, sums promoted. Rounding is a launch of its own: every
row tile of a product reads z again, so it is narrow by then. No atomics: the same input gives the
same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .blocks import load_tile, product, promoted
from .launching import launch
from .precision import PROMOTED, product_mode
from .slices import row_exponent, single_power
from .whitened import UNIT, halves

__all__ = [
    "launch_metric_energy",
    "launch_metric_product",
    "launch_metric_round",
    "launch_metric_terms",
]

ROWS, STEP, COLUMNS = 64, 64, 16  # a tile of Γ, and the least columns that tensor cores take


@triton.jit
def metric_round_kernel(
    Z, TERMS, UNITS, Y, rows, k, low, zl, zn, zk,
    PRECISE: tl.constexpr, SCALED: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(k, BN)
    i_l = (tl.program_id(0) // across).to(tl.int64)
    o_k = (tl.program_id(0) % across).to(tl.int64) * BN + tl.arange(0, BN)
    m_k = o_k < k
    Z += i_l * zl
    TERMS += i_l * rows * k
    Y += i_l * 2 * rows * k
    b_peak = tl.zeros((BN,), tl.float32)
    for c in range(0, rows, BC):
        o_c = c + tl.arange(0, BC)
        b_Z = load_tile(Z, o_c.to(tl.int64), o_c < rows, o_k, m_k, zn, zk)
        b_peak = tl.maximum(b_peak, tl.max(tl.abs(b_Z), 0))
    b_e = row_exponent(b_peak[:, None], 1)
    b_up = single_power(b_e)
    b_down = single_power(-b_e)[None, :]
    tl.store(UNITS + i_l * k + o_k, b_up, mask=m_k)
    for c in range(0, rows, BC):
        o_c = c + tl.arange(0, BC)
        m_Z = (o_c < rows)[:, None] & m_k[None, :]
        b_Z = load_tile(Z, o_c.to(tl.int64), o_c < rows, o_k, m_k, zn, zk)
        b_high, b_low = halves(b_Z * b_down)
        b_Z = b_high.to(tl.float32)
        o_Z = o_k[None, :] * rows + o_c[:, None]
        tl.store(TERMS + o_Z, b_high, mask=m_Z)
        if PRECISE:
            b_Z += b_low.to(tl.float32) * UNIT
            tl.store(TERMS + low + o_Z, b_low, mask=m_Z)
        if SCALED:
            b_Z *= b_up[None, :]
        tl.store(Y + o_k[None, :] * 2 * rows + o_c[:, None], b_Z, mask=m_Z)


@triton.jit
def add_terms(
    b_G, b_L, TERMS, b_Y, b_part, b_rest, o_c, m_c, o_k, m_k, rows, seen, low_z,
    MODE: tl.constexpr, EVERY: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Some rows of z more, of columns o_k: b_G and b_L are hi and lo of Γ."""
    b_Z = load_tile(TERMS, o_c, m_c, o_k, m_k, 1, rows)
    b_part = product(b_G, b_Z, b_part, MODE)
    b_Y, b_part = promoted(b_Y, b_part, seen, MODE, EVERY)
    if PRECISE:
        b_low = load_tile(TERMS + low_z, o_c, m_c, o_k, m_k, 1, rows)
        b_rest = product(b_G, b_low, b_rest, MODE)
        b_rest = product(b_L, b_Z, b_rest, MODE)
    return b_Y, b_part, b_rest


@triton.jit
def put_below(
    Y, UNITS, b_Y, b_rest, o_m, m_m, o_k, m_k, rows,
    PRECISE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    if PRECISE:
        b_Y += b_rest * UNIT
    if SCALED:
        b_Y *= tl.load(UNITS + o_k, mask=m_k, other=0.0)[None, :]
    o_Y = o_k[None, :] * 2 * rows + rows + o_m[:, None]
    tl.store(Y + o_Y, b_Y, mask=m_m[:, None] & m_k[None, :])


@triton.jit
def metric_product_kernel(
    GAMMA, TERMS, UNITS, Y, rows, k, low, gl, low_z,
    MODE: tl.constexpr, EVERY: tl.constexpr, PRECISE: tl.constexpr, SCALED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(k, BN + BR)
    tiles = tl.cdiv(rows, BM) * across
    tile = tl.program_id(0) % tiles
    i_l = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = (tile // across).to(tl.int64) * BM + tl.arange(0, BM)
    start = (tile % across).to(tl.int64) * (BN + BR)
    o_k = start + tl.arange(0, BN)
    o_r = start + BN + tl.arange(0, BR if BR else 1)
    m_m = o_m < rows
    m_k = o_k < k
    m_r = o_r < k
    GAMMA += i_l * gl
    TERMS += i_l * rows * k
    Y += i_l * 2 * rows * k
    b_Y = tl.zeros((BM, BN), tl.float32)
    b_part = tl.zeros((BM, BN), tl.float32)
    b_rest = b_part
    b_R = tl.zeros((BM, BR if BR else 1), tl.float32)
    b_R_part = b_R
    b_R_rest = b_R
    for c in range(0, rows, BC):
        o_c = c + tl.arange(0, BC)
        m_c = o_c < rows
        o_c = o_c.to(tl.int64)
        b_G = load_tile(GAMMA, o_m, m_m, o_c, m_c, rows, 1)
        b_L = b_G
        if PRECISE:
            b_L = load_tile(GAMMA + low, o_m, m_m, o_c, m_c, rows, 1)
        b_Y, b_part, b_rest = add_terms(
            b_G, b_L, TERMS, b_Y, b_part, b_rest, o_c, m_c, o_k, m_k, rows, c + BC, low_z,
            MODE, EVERY, PRECISE,
        )  # fmt: skip
        if BR:
            b_R, b_R_part, b_R_rest = add_terms(
                b_G, b_L, TERMS, b_R, b_R_part, b_R_rest, o_c, m_c, o_r, m_r, rows, c + BC, low_z,
                MODE, EVERY, PRECISE,
            )  # fmt: skip
    UNITS += i_l * k
    put_below(Y, UNITS, b_Y + b_part, b_rest, o_m, m_m, o_k, m_k, rows, PRECISE, SCALED)
    if BR:
        put_below(Y, UNITS, b_R + b_R_part, b_R_rest, o_m, m_m, o_r, m_r, rows, PRECISE, SCALED)


def launch_metric_round(
    z: torch.Tensor, precise: bool, unit: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z in terms of 11 bits, and the upper half of what `launch_metric_product` returns.

    Returns
    -------
    terms : Tensor (1 or 2, L, k, N) fp16, in units of each column's power of two
    units : Tensor (L, k) fp32
    y : Tensor (L, 2N, k) fp32, a view of (L, k, 2N) memory
    """
    modules, rows, k = z.shape
    device = z.device
    y = torch.empty(modules, k, 2 * rows, dtype=torch.float32, device=device).mT
    terms = torch.empty(1 + precise, modules, k, rows, dtype=torch.float16, device=device)
    units = torch.empty(modules, k, dtype=torch.float32, device=device)
    launch(
        metric_round_kernel, (triton.cdiv(k, COLUMNS) * modules,), z, terms, units, y, rows, k,
        terms.stride(0), *z.stride(), PRECISE=precise, SCALED=not unit, BN=COLUMNS, BC=STEP,
        num_warps=4,
    )  # fmt: skip
    return terms, units, y


def launch_metric_terms(
    gamma: torch.Tensor, terms: torch.Tensor, units: torch.Tensor, y: torch.Tensor, unit: bool
) -> None:
    """Γ z into the lower half of y, z as `launch_metric_round` gives it."""
    count, modules, k, rows = terms.shape
    precise = count == 2
    columns = min(max(16, triton.next_power_of_2(k)), 128)
    rest = (16 if k <= 80 else 32) if 64 < k <= 96 else 0  # as `product.ProductConfig` has it
    columns = 64 if rest else columns
    height = 2 * ROWS if rows >= 8 * ROWS and not precise else ROWS
    tiles = triton.cdiv(rows, height) * triton.cdiv(k, columns + rest)
    launch(
        metric_product_kernel, (tiles * modules,), gamma, terms, units, y, rows, k,
        gamma.stride(0), gamma.stride(1), terms.stride(0),
        MODE=product_mode(gamma, terms), EVERY=PROMOTED, PRECISE=precise, SCALED=not unit,
        BM=height, BN=columns, BR=rest, BC=STEP, num_warps=4 if columns < 64 else 8, num_stages=2,
    )  # fmt: skip


def launch_metric_product(
    gamma: torch.Tensor, z: torch.Tensor, precise: bool = False, unit: bool = False
) -> torch.Tensor:
    """z as it was rounded, and Γ z below it.

    Parameters
    ----------
    gamma : Tensor (2, L, N, N) fp16, matrices contiguous
    z : Tensor (L, N, k) fp32, any strides; (k, N) memory is the fast one
    precise : bool
        22 bits of z and both terms of Γ, but for the product of both lower ones.
    unit : bool
        Leave both in units of each column's power of two: largest entries of z from ½ to 1.

    Returns
    -------
    Tensor (L, 2N, k) fp32, a view of (L, k, 2N) memory
    """
    terms, units, y = launch_metric_round(z, precise, unit)
    launch_metric_terms(gamma, terms, units, y, unit)
    return y


@triton.jit
def whole(GAMMA, low, o_G, m_G):
    """hi + UNIT lo in fp32, exactly."""
    b_high = tl.load(GAMMA + o_G, mask=m_G, other=0.0).to(tl.float32)
    b_low = tl.load(GAMMA + low + o_G, mask=m_G, other=0.0).to(tl.float32)
    return b_high + b_low * UNIT


@triton.jit
def metric_energy_kernel(
    LEFT, RIGHT, D, E, rows, tiles, low_u, low_v, gl_u, gl_v, BM: tl.constexpr, BC: tl.constexpr
):
    i_t = tl.program_id(0) % tiles
    i_l = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = i_t * BM + tl.arange(0, BM)
    m_m = o_m < rows
    D += i_l * rows
    b_E = tl.zeros((BM,), tl.float64)
    for c in range(0, rows, BC):
        o_c = c + tl.arange(0, BC)
        m_G = m_m[:, None] & (o_c < rows)[None, :]
        o_G = o_m[:, None].to(tl.int64) * rows + o_c[None, :]
        b_G = whole(LEFT + i_l * gl_u, low_u, o_G, m_G)
        b_G *= whole(RIGHT + i_l * gl_v, low_v, o_G, m_G)
        b_G *= tl.load(D + o_c, mask=o_c < rows, other=0.0)[None, :]
        b_E += tl.sum(b_G.to(tl.float64), 1)
    b_d = tl.load(D + o_m, mask=m_m, other=0.0).to(tl.float64)
    tl.store(E + tl.program_id(0), tl.sum(b_d * b_E, 0))


def launch_metric_energy(left: torch.Tensor, right: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Σ_ij d_i d_j (Γ_U)_ij (Γ_V)_ij, (L,) fp64.

    Parameters
    ----------
    left, right : Tensor (2, L, N, N) fp16, matrices contiguous
    d : Tensor (L, N) fp32
    """
    modules, rows = d.shape
    tiles = triton.cdiv(rows, ROWS)
    shares = torch.empty(modules, tiles, dtype=torch.float64, device=d.device)
    launch(
        metric_energy_kernel, (tiles * modules,), left, right, d.contiguous(), shares, rows, tiles,
        left.stride(0), right.stride(0), left.stride(1), right.stride(1),
        BM=ROWS, BC=STEP, num_warps=4,
    )  # fmt: skip
    return shares.sum(-1)
