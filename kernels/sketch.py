"""Gram matrices and a sketch in one pass: G_i = x_i x_iᵀ in fp64 and Z = x Ω, both sides at once.

One program per (run of clients, module, side) walks the long dimension once. Its rows are slots:
CLIENTS clients × R slots, R a power of two ≥ the largest rank; empty slots read nothing. A factor
entry is loaded once and used twice: against its own client's rows (a batched fp64 dot) and
against Ω. Ranks above 64 do not fit: their Gram matrices are `product.launch_inner`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from .blocks import gram, gram_slices, load_tile, product, promoted, zeros
from .launching import launch
from .precision import PROMOTED, precise_mode, product_mode
from .product import FILL
from .slices import value

__all__ = ["MAX_COLUMNS", "MAX_RANK", "SketchConfig", "fits", "launch_sketch"]

MAX_RANK, MAX_COLUMNS = 64, 128  # why: what a program holds at once fills its registers


@dataclass(frozen=True)
class SketchConfig:
    """Clients a program, slots a client, columns of Ω, step along d, launch options."""

    clients: int
    slots: int
    columns: int
    block_c: int
    num_warps: int
    num_stages: int

    @classmethod
    def for_stack(
        cls,
        clients: int,
        max_rank: int,
        modules: int,
        columns: int,
        dtype: torch.dtype,
        gram: str,
    ) -> SketchConfig:
        """64 rows a program where there is work for every processor: Ω is read once per program."""
        slots = max(16, triton.next_power_of_2(max_rank))
        run = MAX_RANK // slots
        while run > 1 and triton.cdiv(clients, run) * modules * 2 < 2 * FILL:
            run //= 2
        # tf32x3 fills the registers, and so do slices.
        block_c = 32 if dtype != torch.float32 and gram == "double" else 16
        return cls(run, slots, max(16, triton.next_power_of_2(columns)), block_c, 8, 3)


def fits(rows: torch.Tensor, max_rank: int, columns: int) -> bool:
    """Whether one pass can do both; `columns` is 0 where only Gram matrices are asked for.

    fp32 products and slices do not share one processor's registers.
    """
    crowded = rows.dtype == torch.float32 and columns > 0 and precise_mode(rows) == "slices"
    wide = max_rank > MAX_RANK or columns > MAX_COLUMNS
    return not (crowded or wide or rows.dtype == torch.float64)


@triton.jit
def sketch_side(
    X, W, G, Z, offsets, clients, rank, d, k, xl, xn, xd, wd, wk,
    MODE: tl.constexpr, EVERY: tl.constexpr, GRAM: tl.constexpr, SKETCH: tl.constexpr,
    CLIENTS: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    runs = tl.cdiv(clients, CLIENTS)
    i_l = (tl.program_id(0) // runs).to(tl.int64)
    i_r = tl.program_id(0) % runs
    o_t = tl.arange(0, CLIENTS * R)
    o_i = i_r * CLIENTS + o_t // R
    first = tl.load(offsets + o_i, mask=o_i < clients, other=0)
    last = tl.load(offsets + o_i + 1, mask=o_i < clients, other=0)
    o_n = first + o_t % R
    m_n = o_n < last
    o_k = tl.arange(0, BN)
    m_k = o_k < k
    X += i_l * xl
    shape: tl.constexpr = (R, R) if CLIENTS == 1 else (CLIENTS, R, R)
    b_G = tl.zeros(shape, tl.float64 if GRAM == "double" else tl.float32)
    if GRAM == "slices":
        b_low = tl.zeros(shape, tl.float32)
        b_e = tl.full(shape[:-1], -1000, tl.int32)
    b_Z = zeros(CLIENTS * R, BN, MODE)
    b_part = zeros(CLIENTS * R, BN, MODE)
    for c in range(0, d, BC):
        o_c = c + tl.arange(0, BC)
        # [CLIENTS · R, BC], [BC, BN]
        b_X = load_tile(X, o_n, m_n, o_c.to(tl.int64), o_c < d, xn, xd)
        if GRAM == "double":
            b_G = gram(b_X, b_G, CLIENTS, R, BC)
        else:
            b_G, b_low, b_e = gram_slices(b_X, b_G, b_low, b_e, CLIENTS, R, BC)
        if SKETCH:
            b_W = load_tile(W, o_c.to(tl.int64), o_c < d, o_k, m_k, wd, wk)
            b_part = product(b_X, b_W, b_part, MODE)
            b_Z, b_part = promoted(b_Z, b_part, c + BC, MODE, EVERY)
    b_Z += b_part
    if GRAM == "slices":
        b_G = value(b_G, b_low, tl.expand_dims(b_e, -1), tl.expand_dims(b_e, -2))
    o_j = tl.arange(0, R)
    o_g = i_l * clients + i_r * CLIENTS + tl.arange(0, CLIENTS)
    m_g = i_r * CLIENTS + tl.arange(0, CLIENTS) < clients
    o_G = (o_g[:, None, None] * rank + o_j[None, :, None]) * rank + o_j[None, None, :]
    m_G = m_g[:, None, None] & (o_j < rank)[None, :, None] & (o_j < rank)[None, None, :]
    tl.store(G + o_G, tl.reshape(b_G, (CLIENTS, R, R)), mask=m_G)
    if SKETCH:
        rows = tl.load(offsets + clients)
        o_Z = (i_l * rows + o_n[:, None]) * k + o_k[None, :]
        tl.store(Z + o_Z, b_Z.to(tl.float64), mask=m_n[:, None] & m_k[None, :])


@triton.jit
def sketch_kernel(
    X0, W0, G0, Z0, d0, k0, xl0, xn0, xd0, wd0, wk0,
    X1, W1, G1, Z1, d1, k1, xl1, xn1, xd1, wd1, wk1,
    offsets, clients, rank,
    MODE: tl.constexpr, EVERY: tl.constexpr, GRAM: tl.constexpr, SKETCH: tl.constexpr,
    CLIENTS: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        sketch_side(
            X0, W0, G0, Z0, offsets, clients, rank, d0, k0, xl0, xn0, xd0, wd0, wk0,
            MODE, EVERY, GRAM, SKETCH, CLIENTS, R, BN, BC,
        )  # fmt: skip
    else:
        sketch_side(
            X1, W1, G1, Z1, offsets, clients, rank, d1, k1, xl1, xn1, xd1, wd1, wk1,
            MODE, EVERY, GRAM, SKETCH, CLIENTS, R, BN, BC,
        )  # fmt: skip


def launch_sketch(
    sides: list[torch.Tensor],
    offsets: torch.Tensor,
    max_rank: int,
    omegas: list[torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gram matrices, and sketches where test matrices are given, of one or two row stacks.

    Parameters
    ----------
    sides : one or two Tensor (L, N, d), any strides, one dtype
    offsets : Tensor (K + 1,) int64 on the device
    max_rank : int
        At least the largest rank, at most `MAX_RANK`.
    omegas : Tensor (d, k) each, any strides; (k, d) memory is the fast one

    Returns
    -------
    grams : Tensor (L, K, max_rank, max_rank) fp64 each, zero-padded
    sketches : Tensor (L, N, k) fp64 each
    """
    modules, rows, _ = sides[0].shape
    clients, device = offsets.shape[0] - 1, offsets.device
    tests = omegas or [x[0].mT[:, :1] for x in sides]
    columns = max(w.shape[1] for w in tests) if omegas else 1
    gram = precise_mode(sides[0])
    config = SketchConfig.for_stack(clients, max_rank, modules, columns, sides[0].dtype, gram)
    double = partial(torch.empty, dtype=torch.float64, device=device)
    grams = [double(modules, clients, max_rank, max_rank) for _ in sides]
    sketches = [double(modules, rows, w.shape[1]) for w in tests] if omegas else []
    groups = [
        (x, w, g, z, x.shape[-1], w.shape[1], *x.stride(), *w.stride())
        for x, w, g, z in zip(sides, tests, grams, sketches or grams, strict=True)
    ]
    launch(
        sketch_kernel, (triton.cdiv(clients, config.clients) * modules, len(sides)),
        *groups[0], *groups[-1], offsets, clients, max_rank,
        MODE=product_mode(sides[0], tests[0]), EVERY=PROMOTED, GRAM=gram, SKETCH=bool(omegas),
        CLIENTS=config.clients, R=config.slots, BN=config.columns, BC=config.block_c,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return grams, sketches
