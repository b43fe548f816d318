"""Rates that the next design counts on: Gram matrices by tile, and long products by the library.

The Gram kernel here is a prototype of the lower half of x xᵀ, nothing that glora runs: tiles loaded
through pointers or descriptors, sums promoted into a second accumulator every 256 columns or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu.device import timed
from gpu.step import Step, main

PROMOTED = 256


@triton.jit
def gram_kernel(
    X, G, N, D, step_l, step_n, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    RUN: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Tiles of the lower half of x xᵀ (N, N) fp32 for x (N, D); grid (N/BM, N/BN, L)."""
    i, j, l = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if j * BN >= (i + 1) * BM:
        return
    x = X + l * step_l
    o_i, o_j, o_d = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_i, m_j = o_i[:, None] < N, o_j[:, None] < N
    p_i, p_j = x + o_i[:, None].to(tl.int64) * step_n, x + o_j[:, None].to(tl.int64) * step_n
    if DESCRIPTOR:
        t_i = tl.make_tensor_descriptor(x, [N, D], [step_n, 1], [BM, BD])
        t_j = tl.make_tensor_descriptor(x, [N, D], [step_n, 1], [BN, BD])
    b_G, b_S = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for turn in tl.range(0, tl.cdiv(D, BD)):
        at = turn * BD
        if DESCRIPTOR:
            b_i, b_j = t_i.load([i * BM, at]), t_j.load([j * BN, at])
        else:
            m_d = (at + o_d)[None, :] < D
            b_i = tl.load(p_i + at + o_d[None, :], m_i & m_d, 0.0)
            b_j = tl.load(p_j + at + o_d[None, :], m_j & m_d, 0.0)
        b_S = tl.dot(b_i, b_j.T, b_S, input_precision="ieee")
        if RUN > 0 and turn % RUN == RUN - 1:
            b_G += b_S
            b_S = tl.zeros((BM, BN), tl.float32)
    b_G += b_S
    o_G = l * N * N + o_i[:, None].to(tl.int64) * N + o_j[None, :]
    tl.store(G + o_G, b_G, m_i & (o_j[None, :] < N))


@dataclass(frozen=True)
class Tile:
    """One way to compile the Gram kernel."""

    rows: int
    columns: int
    promoted: bool = True
    descriptor: bool = False
    warps: int = 8

    def __str__(self) -> str:
        loads = "descriptors" if self.descriptor else "pointers"
        sums = "promoted" if self.promoted else "one accumulator"
        return f"{self.rows} × {self.columns}, {loads}, {sums}"


# Two accumulators of 128 × 256 spill about 100 bytes with 16 warps, 336 with 8 (sm_90).
TILES = [
    Tile(128, 128),
    Tile(128, 128, descriptor=True),
    Tile(128, 256, descriptor=True, warps=16),
    Tile(128, 128, promoted=False),
    Tile(128, 256, promoted=False),
]


def launch_gram(x: Tensor, g: Tensor, tile: Tile, depth: int = 64) -> None:
    modules, n, d = x.shape
    grid = (triton.cdiv(n, tile.rows), triton.cdiv(n, tile.columns), modules)
    gram_kernel[grid](
        x, g, n, d, x.stride(0), x.stride(1), tile.rows, tile.columns, depth,
        PROMOTED // depth if tile.promoted else 0, tile.descriptor,
        num_warps=tile.warps, num_stages=3,
    )  # fmt: skip


def library(step: Step, modules: int, n: int, d: int, k: int) -> None:
    """Products as `torch.bmm` makes them of 16-bit operands with sums in fp32."""
    device = step.device

    def bmm(x: Tensor, y: Tensor) -> Tensor:
        return torch.bmm(x, y, out_dtype=torch.float32) if device == "cuda" else torch.bmm(x, y)

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x = made(modules, n, d)
    cases: dict[str, tuple[Callable[[], Tensor], float]] = {
        "x xᵀ, both halves": (lambda: bmm(x, x.mT), 2 * modules * n * n * d),
    }
    for terms, name in ((1, "one term"), (3, "three terms side by side")):
        z = made(modules, n, terms * k)
        cases[f"xᵀ z, {name}"] = (lambda z=z: bmm(x.mT, z), 2 * modules * n * d * terms * k)
    metric, z = made(modules, n, n, dtype=torch.float16), made(modules, n, k, dtype=torch.float16)
    cases["Γ z, fp16"] = (lambda: bmm(metric, z), 2 * modules * n * n * k)
    for name, (call, flops) in cases.items():
        with step.row(probe="library", of=name, modules=modules, n=n, d=d, k=k) as r:
            for _ in range(1 if step.rehearse else 3):
                call()
            r |= timed(call, device, 1 if step.rehearse else 10, cold=True)
            r["tflop_s"] = flops / r["ms"] / 1e9


def tiles(step: Step, modules: int, n: int, d: int) -> None:
    """Rates are of the half that is made: n (n + 1) d of a module."""
    device = step.device
    if device == "cuda":
        triton.set_allocator(lambda size, *_: torch.empty(size, dtype=torch.int8, device=device))
    # The interpreter multiplies bf16 wrongly.
    dtype = torch.float32 if step.rehearse else torch.bfloat16
    x = torch.randn(modules, n, d, device=device).to(dtype)
    truth = x[0].double() @ x[0].double().T
    for tile in [Tile(16, 16), Tile(16, 32, descriptor=True)] if step.rehearse else TILES:
        with step.row(probe="gram", of=str(tile), modules=modules, n=n, d=d) as r:
            g = torch.zeros(modules, n, n, device=device)
            launch_gram(x, g, tile, 16 if step.rehearse else 64)
            error = (g[0].double() - truth).tril().abs().max() / truth.abs().max()
            r["error_u32"] = float(error) * 2**24
            r["ok"] = r["error_u32"] < 64
            r |= timed(
                lambda tile=tile, g=g: launch_gram(x, g, tile, 16 if step.rehearse else 64),
                device,
                1 if step.rehearse else 10,
                cold=True,
            )
            r["tflop_s"] = modules * n * (n + 1) * d / r["ms"] / 1e9


def body(step: Step) -> None:
    modules, n, d, k = (1, 40, 512, 4) if step.rehearse else (64, 1600, 4096, 80)
    library(step, modules, n, d, k)
    tiles(step, modules, n, d)


if __name__ == "__main__":
    main(body)
