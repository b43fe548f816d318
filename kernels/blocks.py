"""Blocks in registers: exact splitting, products of a stated precision, sums that hold.

A tensor core may cut its accumulator to 24 bits at every step instead of rounding it (published
for V100 and A100), an error that grows with the number of steps: 4e-5 of a sum of 11008 terms of
one sign. So no accumulator of a tensor core sees more than `precision.PROMOTED` columns: it is
added to a second one in fp32, rounded to nearest, and starts again from zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .slices import add_products, cut, rescaled, row_exponent, value

__all__ = ["contract", "contract_two", "gram", "leading_bits", "product", "zeros"]


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
        b_W = b_W.to(tl.float32)
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
def promoted(b_Y, b_part, seen, MODE: tl.constexpr, EVERY: tl.constexpr):
    """Both accumulators after `seen` columns: the second has what the first gives up."""
    if MODE != "double" and seen % EVERY == 0:
        b_Y += b_part
        b_part = tl.zeros_like(b_part)
    return b_Y, b_part


@triton.jit
def load_tile(X, o_m, m_m, o_c, m_c, xm, xc):
    """Rows o_m and columns o_c of X."""
    return tl.load(
        X + o_m[:, None] * xm + o_c[None, :] * xc, mask=m_m[:, None] & m_c[None, :], other=0.0
    )


@triton.jit
def contract(
    X, W, o_m, m_m, o_n, m_n, length, xm, xc, wc, wn,
    MODE: tl.constexpr, EVERY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """[BM, BN]: rows o_m of x times columns o_n of w, over the first `length` columns of x."""
    b_Y, _ = contract_two(
        X, W, o_m, m_m, o_n, m_n, o_n, m_n, length, xm, xc, wc, wn, MODE, EVERY, BM, BN, 0, BC
    )
    return b_Y


@triton.jit
def contract_two(
    X, W, o_m, m_m, o_n, m_n, o_r, m_r, length, xm, xc, wc, wn,
    MODE: tl.constexpr, EVERY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The same of columns o_n, and [BM, BR] of columns o_r, for which x is read once.

    Without BR the second is of no use; "slices" take none.
    """
    if MODE == "slices":
        b_Y = tl.zeros((BM, BN), tl.float32)
        b_low = tl.zeros((BM, BN), tl.float32)
        b_e = tl.full((BM,), -1000, tl.int32)
        b_f = tl.full((BN,), -1000, tl.int32)
        for c in range(0, length, BC):
            o_c = c + tl.arange(0, BC)
            b_X = load_tile(X, o_m, m_m, o_c.to(tl.int64), o_c < length, xm, xc)
            b_W = load_tile(W, o_c.to(tl.int64), o_c < length, o_n, m_n, wc, wn)
            b_e_new = tl.maximum(b_e, row_exponent(b_X, 1))
            b_f_new = tl.maximum(b_f, row_exponent(b_W, 0))
            b_Y, b_low = rescaled(b_Y, b_low, b_e[:, None], b_e_new[:, None])
            b_Y, b_low = rescaled(b_Y, b_low, b_f[None, :], b_f_new[None, :])
            b_e, b_f = b_e_new, b_f_new
            b_Y, b_low = add_products(b_Y, b_low, cut(b_X, b_e[:, None]), cut(b_W, b_f[None, :]))
        b_Y = value(b_Y, b_low, b_e[:, None], b_f[None, :])
        return b_Y, b_Y
    else:
        b_Y = zeros(BM, BN, MODE)
        b_part = zeros(BM, BN, MODE)
        b_R = zeros(BM, BR if BR else 1, MODE)
        b_rest = b_R
        for c in range(0, length, BC):
            o_c = c + tl.arange(0, BC)
            b_X = load_tile(X, o_m, m_m, o_c.to(tl.int64), o_c < length, xm, xc)
            b_W = load_tile(W, o_c.to(tl.int64), o_c < length, o_n, m_n, wc, wn)
            b_part = product(b_X, b_W, b_part, MODE)
            b_Y, b_part = promoted(b_Y, b_part, c + BC, MODE, EVERY)
            if BR:
                b_W = load_tile(W, o_c.to(tl.int64), o_c < length, o_r, m_r, wc, wn)
                b_rest = product(b_X, b_W, b_rest, MODE)
                b_R, b_rest = promoted(b_R, b_rest, c + BC, MODE, EVERY)
        return b_Y + b_part, b_R + b_rest


@triton.jit
def precise(b_X, b_W, MODE: tl.constexpr):
    """[M, N] fp64: b_X [M, C] b_W [C, N] of at most `slices.STEP` columns."""
    if MODE == "double":
        return tl.dot(wide(b_X), wide(b_W), input_precision="ieee", out_dtype=tl.float64)
    else:
        b_Y = tl.zeros((b_X.shape[0], b_W.shape[1]), tl.float32)
        b_e = row_exponent(b_X, 1)[:, None]
        b_f = row_exponent(b_W, 0)[None, :]
        b_Y, b_low = add_products(b_Y, b_Y, cut(b_X, b_e), cut(b_W, b_f))
        return value(b_Y, b_low, b_e, b_f)


@triton.jit
def gram(b_X, b_G, CLIENTS: tl.constexpr, R: tl.constexpr, BC: tl.constexpr):
    """b_G += x xᵀ in fp64 of each client's R rows of b_X [CLIENTS · R, BC].

    b_G is [CLIENTS, R, R], or [R, R] where there is one client.
    """
    b_X = per_client(wide(b_X), CLIENTS, R, BC)
    return tl.dot(b_X, flipped(b_X), b_G, input_precision="ieee", out_dtype=tl.float64)


@triton.jit
def gram_slices(b_X, b_G, b_low, b_e, CLIENTS: tl.constexpr, R: tl.constexpr, BC: tl.constexpr):
    """The same as a pair of fp32 blocks in units of each row's 2^b_e; see `slices`."""
    b_X = per_client(b_X.to(tl.float32), CLIENTS, R, BC)
    axis: tl.constexpr = len(b_X.shape) - 1
    b_new = tl.maximum(b_e, row_exponent(b_X, axis))
    b_G, b_low = rescaled(b_G, b_low, tl.expand_dims(b_e, -1), tl.expand_dims(b_new, -1))
    b_G, b_low = rescaled(b_G, b_low, tl.expand_dims(b_e, -2), tl.expand_dims(b_new, -2))
    x = cut(b_X, tl.expand_dims(b_new, -1))
    w = flipped(x[0]), flipped(x[1]), flipped(x[2]), flipped(x[3]), flipped(x[4])
    b_G, b_low = add_products(b_G, b_low, x, w)
    return b_G, b_low, b_new


@triton.jit
def per_client(b_X, CLIENTS: tl.constexpr, R: tl.constexpr, BC: tl.constexpr):
    """[CLIENTS, R, BC] of [CLIENTS · R, BC]; one client keeps its two dimensions."""
    if CLIENTS > 1:
        b_X = tl.reshape(b_X, (CLIENTS, R, BC))
    return b_X


@triton.jit
def flipped(b_X):
    """Rows and columns changed, of one block or a batch."""
    if len(b_X.shape) == 2:
        return tl.trans(b_X)
    else:
        return tl.permute(b_X, (0, 2, 1))


@triton.jit
def zeros(M: tl.constexpr, N: tl.constexpr, MODE: tl.constexpr):
    """An accumulator for `product`."""
    return tl.zeros((M, N), tl.float64 if MODE == "double" else tl.float32)
