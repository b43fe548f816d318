"""Sums as precise as fp64 ones where a processor has no fp64 units: exact products, fp32 pairs.

A block divided by 2^e, e the largest exponent of its row so far, is cut into SLICES integers of
9 bits and a sign, x = 2^e Σ_i s_i 2^(−8 − 9i) (Ozaki, Ogita, Oishi and Rump 2012). They are exact
in fp16; 32 products of two and SLICES such sums stay below 2²⁴, so that a tensor core adds them
exactly, in whatever order and however it rounds. Sums of one weight, i + j, are added to an
unevaluated pair of fp32 numbers by Knuth's two-sum; weights beyond SLICES are left out, 2⁻⁴⁵ of the
largest products (2⁻⁴² where an operand is fp64). Where a row's exponent grows the pair is scaled,
by a power of two. fp64 arithmetic is met once an entry of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .jacobi import power

__all__ = ["SLICES", "STEP", "add_products", "cut", "rescaled", "row_exponent", "value"]

SLICES = tl.constexpr(5)  # why: what is left out is 2⁻⁴⁵ of the largest product
# Columns whose products a sum may hold: 2 · 8 bits, 32 columns, 5 sums are less than 24 bits.
STEP = 32
# Adding and taking away 1.5 · 2²³ rounds an fp32 to an integer.
ROUND = tl.constexpr(1.5 * 2**23)
# What an empty row's exponent starts from, and what a power of two in fp32 can be.
LOWEST, HIGHEST = tl.constexpr(-120), tl.constexpr(126)


@triton.jit
def single_power(e):
    """2^e in fp32, exactly; 2⁻¹²⁶ and 2¹²⁶ beyond."""
    e = tl.minimum(tl.maximum(e, -126), 126)
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_exponent(b_X, axis: tl.constexpr):
    """Smallest e with |x| ≤ 2^e along an axis, int32."""
    if b_X.dtype == tl.float64:
        top = tl.max(tl.abs(b_X), axis)
        e = (((top.to(tl.int64, bitcast=True) >> 52) & 2047) - 1022).to(tl.int32)
        return tl.maximum(e, -1000)
    top = tl.max(tl.abs(b_X.to(tl.float32)), axis)
    e = ((top.to(tl.int32, bitcast=True) >> 23) & 255) - 126
    return tl.minimum(tl.maximum(e, LOWEST), HIGHEST)


@triton.jit
def cut(b_X, b_e):
    """SLICES blocks of integers in fp16: b_X 2^(−b_e), b_e with an axis of length one."""
    if b_X.dtype == tl.float64:
        b_X = b_X * power(-b_e)
        b_R = b_X.to(tl.float32)
        b_low = (b_X - b_R.to(tl.float64)).to(tl.float32)
    else:
        b_R = b_X.to(tl.float32) * single_power(-b_e)
        b_low = 0.0
    b_R *= 256
    b_0 = (b_R + ROUND) - ROUND
    b_R = (b_R - b_0) * 512
    b_1 = (b_R + ROUND) - ROUND
    b_R = (b_R - b_1 + b_low * 131072) * 512
    b_2 = (b_R + ROUND) - ROUND
    b_R = (b_R - b_2) * 512
    b_3 = (b_R + ROUND) - ROUND
    b_R = (b_R - b_3) * 512
    b_4 = (b_R + ROUND) - ROUND
    half = tl.float16
    return b_0.to(half), b_1.to(half), b_2.to(half), b_3.to(half), b_4.to(half)


@triton.jit
def rescaled(b_high, b_low, b_before, b_after):
    """The pair in units of 2^b_after instead of 2^b_before."""
    b_s = single_power(b_before - b_after)
    return b_high * b_s, b_low * b_s


@triton.jit
def add_weight(b_high, b_low, x, w, n: tl.constexpr):
    """The pair + 2^(−16 − 9n) Σ_{i + j = n} x_i w_j."""
    b_D = tl.zeros(b_high.shape, tl.float32)
    for i in tl.static_range(n + 1):
        b_D = tl.dot(x[i], w[n - i], b_D, input_precision="ieee")
    b_D *= 2.0 ** (-16 - 9 * n)
    b_sum = b_high + b_D
    b_new = b_sum - b_high
    b_low += (b_high - (b_sum - b_new)) + (b_D - b_new)
    return b_sum, b_low


@triton.jit
def add_products(b_high, b_low, x, w):
    """The pair + Σ_{i + j < SLICES} 2^(−16 − 9(i + j)) x_i w_j, the smallest first."""
    for k in tl.static_range(SLICES):
        b_high, b_low = add_weight(b_high, b_low, x, w, SLICES - 1 - k)
    return b_high, b_low


@triton.jit
def value(b_high, b_low, b_e, b_f):
    """The pair in units of 2^(b_e + b_f) as fp64, each with an axis of length one."""
    return (b_high.to(tl.float64) + b_low.to(tl.float64)) * power(b_e) * power(b_f)
