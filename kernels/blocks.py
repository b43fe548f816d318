"""Blocks in registers: exact splitting, products of a stated precision, nothing else."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gram", "leading_bits", "product", "zeros"]


@triton.jit
def leading_bits(x):
    """The leading 8 of an fp32's 24 significant bits: exact in bf16, and so is the rest in two."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def product(b_X, b_W, b_Y, MODE: tl.constexpr):
    """b_Y [M, N] += b_X [M, C] b_W [C, N]; `precision` says what each MODE is for."""
    if MODE == "double":
        b_Y = tl.dot(wide(b_X), wide(b_W), b_Y, input_precision="ieee", out_dtype=tl.float64)
    elif MODE == "half":
        b_Y = tl.dot(b_X, b_W, b_Y, input_precision="ieee")
    elif MODE == "split w":
        b_high = leading_bits(b_W)
        b_mid = leading_bits(b_W - b_high)
        b_low = b_W - b_high - b_mid
        b_Y = tl.dot(b_X, b_low.to(tl.bfloat16), b_Y, input_precision="ieee")
        b_Y = tl.dot(b_X, b_mid.to(tl.bfloat16), b_Y, input_precision="ieee")
        b_Y = tl.dot(b_X, b_high.to(tl.bfloat16), b_Y, input_precision="ieee")
    else:
        b_Y = tl.dot(b_X.to(tl.float32), b_W.to(tl.float32), b_Y, input_precision=MODE)
    return b_Y


@triton.jit
def wide(b_X):
    """A block in fp64, as a dot operand.

    The sum over an axis of length one hides the narrow load from the layout heuristics, which
    would give an fp64 dot the operand layout of a bf16 or fp32 one and fail.
    """
    if b_X.dtype != tl.float64:
        b_X = tl.sum(b_X.to(tl.float32)[:, :, None], 2).to(tl.float64)
    return b_X


@triton.jit
def gram(b_X, b_G, CLIENTS: tl.constexpr, R: tl.constexpr, BC: tl.constexpr):
    """b_G += x xᵀ in fp64 of each client's R rows of b_X [CLIENTS · R, BC].

    b_G is [CLIENTS, R, R], or [R, R] where there is one client.
    """
    b_X = wide(b_X)
    if CLIENTS == 1:
        b_G = tl.dot(b_X, tl.trans(b_X), b_G, input_precision="ieee", out_dtype=tl.float64)
    else:
        b_X = tl.reshape(b_X, (CLIENTS, R, BC))
        b_X_T = tl.permute(b_X, (0, 2, 1))
        b_G = tl.dot(b_X, b_X_T, b_G, input_precision="ieee", out_dtype=tl.float64)
    return b_G


@triton.jit
def zeros(M: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr):
    """An accumulator for `product`."""
    return tl.zeros((M, N), tl.float64 if MODE == "double" else tl.float32)
