"""Products with one long dimension: Y = X W for any strides, fp32-exact, all modules at once.

Three uses of one kernel, told apart by which dimension is long:

    times       z = x Ω     M = N rows, N = k columns, C = d: long contraction, cut into `splits`
                            whose partial sums are added in fixed order in fp64
    inner       yᵀ z        the same in fp64, for two tall blocks or a whole stack's Gram matrix
    accumulate  y = Σ_i x_iᵀ z_i    M = d, N = k, C = N rows: one long product over the stacked
                            rows in client order, sums in registers from the first to the last

One program per (M tile, N tile, split, module) and side: both sides of an aggregation are one
launch. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import contract_two
from .launching import launch
from .precision import PRECISE, PROMOTED, precise_mode, product_mode, target_of

__all__ = [
    "ProductConfig",
    "accumulate_each",
    "inner_each",
    "launch_accumulate",
    "launch_inner",
    "launch_times",
    "times_each",
]

# Programs that fill the smaller of the GPUs in use (A100: 108 processors, H100: 132).
FILL = 128

# Rows from which tiles of 128 of them leave enough programs.
TALL = 512
# Numbers that tiles read from which it pays to make them narrower once, in a launch of its own.
REREAD = 2**23


@dataclass(frozen=True)
class ProductConfig:
    """Tile (block_m, block_n + rest), step of the contraction, launch options."""

    block_m: int
    block_n: int
    rest: int
    block_c: int
    num_warps: int
    num_stages: int

    @classmethod
    def for_shape(cls, m: int, n: int, mode: str, target: str) -> ProductConfig:
        """Wide enough for wgmma (M = 64) where there are rows; narrow where registers end.

        Columns come in powers of two: of 65 to 96 the last 16 or 32 are a second block, so that
        neither is x read twice nor are 128 multiplied.
        """
        block_m = 64 if m > 32 else 32 if m > 16 else 16
        # sm_80 and sm_89 hold operands in registers, where tf32 terms leave no room for that.
        full = mode in PRECISE or (mode == "tf32x3" and target.startswith("sm_8"))
        rest = (16 if n <= 80 else 32) if 64 < n <= 96 and not full else 0
        if mode == "split w" and m >= TALL:  # each row tile reads w again, from L2
            return cls(128, 64 if n > 32 else 32 if n > 16 else 16, rest, 32, 8, 2)
        block_n = min(max(16, triton.next_power_of_2(n)), 32 if mode in PRECISE else 64)
        # Operands of several terms are the register budget: 64 columns of one, 32 of three bf16
        # terms or of fp64, 16 of three tf32 terms; three terms take twice as many warps.
        block_c = {"half": 64, "tf32x3": 16}.get(mode, 32)
        terms = mode in ("split w", "tf32x3")
        return cls(
            block_m,
            block_n,
            rest,
            block_c,
            8 if terms and block_m == 64 else 4,
            2 if mode == "ieee" else 3,
        )

    def tiles(self, m: int, n: int) -> int:
        return triton.cdiv(m, self.block_m) * triton.cdiv(n, self.block_n + self.rest)


@triton.jit
def put(Y, b_Y, o_Y, m_m, m_n, ADD: tl.constexpr):
    m_Y = m_m[:, None] & m_n[None, :]
    b_Y = b_Y.to(Y.dtype.element_ty)
    if ADD:
        b_Y += tl.load(Y + o_Y, mask=m_Y, other=0.0)
    tl.store(Y + o_Y, b_Y, mask=m_Y)


@triton.jit
def product_side(
    X, W, Y, M, N, C, chunk, splits, modules, xl, xm, xc, wl, wc, wn, ys, yl, ym, yn,
    MODE: tl.constexpr, EVERY: tl.constexpr, ADD: tl.constexpr, BOTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BN + BR)
    tiles = tl.cdiv(M, BM) * across
    tile = tl.program_id(0) % tiles
    i_s = (tl.program_id(0) // tiles % splits).to(tl.int64)
    i_l = (tl.program_id(0) // tiles // splits).to(tl.int64)
    if not BOTH or i_l < modules:  # the other side may have more tiles
        o_m = (tile // across).to(tl.int64) * BM + tl.arange(0, BM)
        start = (tile % across).to(tl.int64) * (BN + BR)
        o_n = start + tl.arange(0, BN)
        o_r = start + BN + tl.arange(0, BR if BR else 1)
        m_m = o_m < M
        first = i_s * chunk
        b_Y, b_R = contract_two(
            X + i_l * xl + first * xc, W + i_l * wl + first * wc, o_m, m_m, o_n, o_n < N,
            o_r, o_r < N, tl.minimum(chunk, C - first).to(tl.int32), xm, xc, wc, wn,
            MODE, EVERY, BM, BN, BR, BC,
        )  # fmt: skip
        Y += i_s * ys + i_l * yl
        put(Y, b_Y, o_m[:, None] * ym + o_n[None, :] * yn, m_m, o_n < N, ADD)
        if BR:
            put(Y, b_R, o_m[:, None] * ym + o_r[None, :] * yn, m_m, o_r < N, ADD)


@triton.jit
def product_kernel(
    X0, W0, Y0, M0, N0, C0, chunk0, splits0, modules0,
    xl0, xm0, xc0, wl0, wc0, wn0, ys0, yl0, ym0, yn0,
    X1, W1, Y1, M1, N1, C1, chunk1, splits1, modules1,
    xl1, xm1, xc1, wl1, wc1, wn1, ys1, yl1, ym1, yn1,
    MODE: tl.constexpr, EVERY: tl.constexpr, ADD: tl.constexpr, BOTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    if BOTH and tl.program_id(1) > 0:
        product_side(
            X1, W1, Y1, M1, N1, C1, chunk1, splits1, modules1,
            xl1, xm1, xc1, wl1, wc1, wn1, ys1, yl1, ym1, yn1,
            MODE, EVERY, ADD, BOTH, BM, BN, BR, BC,
        )  # fmt: skip
    else:
        product_side(
            X0, W0, Y0, M0, N0, C0, chunk0, splits0, modules0,
            xl0, xm0, xc0, wl0, wc0, wn0, ys0, yl0, ym0, yn0,
            MODE, EVERY, ADD, BOTH, BM, BN, BR, BC,
        )  # fmt: skip


@dataclass(frozen=True)
class Product:
    """y (splits, L, M, N) from x (L, M, C) and w (L or 1, C, N), C in pieces of `chunk`."""

    x: Tensor
    w: Tensor
    y: Tensor
    chunk: int

    def tiles(self, config: ProductConfig) -> int:
        splits, modules, m, n = self.y.shape
        return config.tiles(m, n) * splits * modules

    @property
    def arguments(self) -> tuple[Tensor | int, ...]:
        splits, modules, m, n = self.y.shape
        w = self.w.expand(modules, -1, -1)
        shape = m, n, self.x.shape[-1], self.chunk, splits, modules
        return (
            self.x, w, self.y, *shape, *self.x.stride(), *w.stride(), *self.y.stride(),
        )  # fmt: skip


def _launch(products: list[Product], mode: str, config: ProductConfig, add: bool = False) -> None:
    products = [p for p in products if p.tiles(config)]
    if not products:
        return
    launch(
        product_kernel, (max(p.tiles(config) for p in products), len(products)),
        *products[0].arguments, *products[-1].arguments,
        MODE=mode, EVERY=PROMOTED, ADD=add, BOTH=len(products) > 1,
        BM=config.block_m, BN=config.block_n, BR=config.rest, BC=config.block_c,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _config(shapes: Sequence[tuple[int, int]], mode: str, target: str) -> ProductConfig:
    m, n = (max(sizes) for sizes in zip(*shapes, strict=True))
    return ProductConfig.for_shape(m, n, mode, target)


def times_each(x: Sequence[Tensor], omega: Sequence[Tensor]) -> list[Tensor]:
    """`launch_times` of one or two sides, of the same dtypes, in one launch."""
    return _contract(x, omega, product_mode(x[0], omega[0]))


def inner_each(y: Sequence[Tensor], z: Sequence[Tensor]) -> list[Tensor]:
    """`launch_inner` of one or two sides, of the same dtypes, in one launch."""
    return _contract([x.mT for x in y], z, precise_mode(y[0]))


def launch_times(x: Tensor, omega: Tensor) -> Tensor:
    """Z = x Ω.

    Parameters
    ----------
    x : Tensor (L, n, d), any strides
    omega : Tensor (L or 1, d, k), any strides; (k, d) memory is the fast one

    Returns
    -------
    Tensor (L, n, k) fp64
    """
    return times_each([x], [omega])[0]


def launch_inner(y: Tensor, z: Tensor) -> Tensor:
    """yᵀ z in fp64: (L, k, m) from y (L, d, k) and z (L, d, m), any strides and dtypes."""
    return inner_each([y], [z])[0]


def _contract(x: Sequence[Tensor], w: Sequence[Tensor], mode: str) -> list[Tensor]:
    """(L, m, n) fp64: x (L, m, c) w (L or 1, c, n), the long c cut so that the device is full."""
    shapes = [(a.shape[1], b.shape[-1]) for a, b in zip(x, w, strict=True)]
    config = _config(shapes, mode, target_of(x[0]))
    tiles = [config.tiles(*shape) for shape in shapes]
    programs = sum(len(a) * n for a, n in zip(x, tiles, strict=True))
    chunks = []
    for a in x:
        c = a.shape[-1]
        splits = max(1, min(FILL // max(programs, 1), c // 512))
        chunks.append(triton.cdiv(triton.cdiv(c, splits), config.block_c) * config.block_c)
    parts = [triton.cdiv(a.shape[-1], chunk) for a, chunk in zip(x, chunks, strict=True)]
    whole = max(parts) == 1
    dtype = torch.float64 if whole or mode in PRECISE else torch.float32
    z = [
        torch.empty(n, len(a), *shape, dtype=dtype, device=a.device)
        for a, n, shape in zip(x, parts, shapes, strict=True)
    ]
    _launch([Product(*p) for p in zip(x, w, z, chunks, strict=True)], mode, config)
    return [y[0] if whole else y.sum(0, dtype=torch.float64) for y in z]


def accumulate_each(
    x: Sequence[Tensor], z: Sequence[Tensor], onto: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """`launch_accumulate` of one or two sides, of the same dtypes, in one launch."""
    double = x[0].dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    y = [
        torch.empty(len(a), b.shape[-1], a.shape[-1], dtype=dtype, device=a.device).mT
        for a, b in zip(x, z, strict=True)
    ] if onto is None else list(onto)  # fmt: skip
    reread = sum(triton.cdiv(a.shape[-1], 64) * b.numel() for a, b in zip(x, z, strict=True))
    if z[0].dtype != dtype and reread > REREAD:
        z = [b.to(dtype) for b in z]
    mode = product_mode(x[0], y[0])  # an fp64 z becomes fp32 on its way
    shapes = [(a.shape[-1], b.shape[-1]) for a, b in zip(x, z, strict=True)]
    config = _config(shapes, mode, target_of(x[0]))
    products = [Product(a.mT, b, c[None], a.shape[1]) for a, b, c in zip(x, z, y, strict=True)]
    _launch(products, mode, config, onto is not None)
    return y


def launch_accumulate(x: Tensor, z: Tensor, onto: Tensor | None = None) -> Tensor:
    """Y = xᵀ z, summed over the rows in their order.

    Parameters
    ----------
    x : Tensor (L, n, d), any strides
    z : Tensor (L, n, k), any strides; taken in fp32 unless x is fp64
    onto : Tensor (L, d, k), optional
        What it is added to, in place.

    Returns
    -------
    Tensor (L, d, k), a view of (L, k, d) memory; fp32, fp64 for fp64 x
    """
    return accumulate_each([x], [z], None if onto is None else [onto])[0]
