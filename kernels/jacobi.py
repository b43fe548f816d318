"""One-sided Jacobi iterations on matrices held in registers; eigh, svd, canonical_solve share it.

Hestenes: rotations J make the columns of W orthogonal, W J = V Σ. Nothing else is accumulated:
column norms are the singular values, normalised columns the left singular vectors, orthogonal to
rounding even where σ is small, since the test |w_p·w_q| > tol‖w_p‖‖w_q‖ is relative. Where W is
itself the factor of a pivoted triangular factorisation (G = W Wᵀ, or C = Q Wᵀ) its columns are
graded from the start: 7–10 sweeps, 20 for clusters of width 1e-13 (numpy, n = 16…128), against
7–36 on G itself. The error is that of a backward stable method, c·n·2⁻⁵³‖G‖ with c ≤ 5.

Everything is fp64, on every target: forms of badly conditioned clients need it, and sums and
rotations are plain FMA (no tensor cores, so no target fails). Only `eigh` may sweep in fp32, on a
factor from fp64 whose columns it keeps relatively accurate; `straighten` then repairs the vectors.

Layout: n columns as `pairs` = ⌈n/2⌉ pairs (P_j, Q_j) in two blocks [N, H], N = 2H ≥ n. A round
rotates all pairs at once: dot products down the rows, one pair a lane. Then every column but P_0
moves one place round the ring P_1 … P_last Q_last … Q_0, a shuffle between lanes; after 2·pairs − 1
rounds each has met each and stands where it stood. A sweep without a rotation is the last.

     P_0   P_1 → P_2 → P_3
          ↗              ↓
     Q_0 ← Q_1 ← Q_2 ← Q_3

Matrices pass from stage to stage through global memory (the output buffers), rows contiguous;
`tl.debug_barrier` orders that, on gfx942 because the waves of a work-group share one L1.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

__all__ = ["MAX_SIZE", "JacobiConfig"]

# Beyond this, two blocks no longer fit in a processor's registers.
MAX_SIZE = 128
# Twice what the hardest spectra took; a bound, never a choice of accuracy.
SWEEPS = tl.constexpr(40)
U64 = tl.constexpr(2.0**-53)  # unit roundoff of fp64
# Squared cosine up to which two columns count as orthogonal: (2⁻⁴⁸)².
ORTHOGONAL = tl.constexpr(2.0**-96)
# The cosine in fp32; why: sums of 128 products leave 2⁻²⁰ of one.
ALMOST = tl.constexpr(2.0**-19)


@dataclass(frozen=True)
class JacobiConfig:
    """Block side (a power of two, at least 16), its rows beyond half of it, warps of a program."""

    block: int
    tail: int
    num_warps: int

    @classmethod
    def for_size(cls, n: int) -> JacobiConfig:
        """16 doubles of each of two blocks a thread at most; one warp where it suffices.

        One warp needs no barrier. Above 64 a program takes a whole processor's registers, and
        rows stand in two blocks: of 64, and of as many of 16, 32 or 64 as hold the others.
        """
        if not 1 <= n <= MAX_SIZE:
            raise ValueError(f"n: got {n}, expected 1 to {MAX_SIZE}; use torch.linalg beyond")
        block = max(16, triton.next_power_of_2(n))
        tail = max(16, triton.next_power_of_2(n - 64)) if n > 64 else 0
        return cls(block, tail, {16: 1, 32: 4, 64: 8, 128: 8 if tail == 16 else 16}[block])


@triton.jit
def exponent(x):
    """frexp's exponent of fp64 x > 0 (subnormal ones: that of the smallest normal)."""
    return ((x.to(tl.int64, bitcast=True) >> 52) & 2047) - 1022


@triton.jit
def power(e):
    """2^e in fp64, exactly, e in the normal range."""
    e = tl.minimum(tl.maximum(e, -1022), 1023)
    return ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def inverse(x):
    """1/x, zero for x = 0."""
    return 1 / tl.where(x > 0, x, float("inf"))


@triton.jit
def load_block(A, stride, n, N: tl.constexpr):
    """A [n, n] with rows `stride` apart, zero-padded to [N, N]."""
    o = tl.arange(0, N)
    m_A = (o[:, None] < n) & (o[None, :] < n)
    return tl.load(A + o[:, None] * stride + o[None, :], mask=m_A, other=0.0)


@triton.jit
def store_block(A, b_A, stride, n, N: tl.constexpr):
    """The reverse of `load_block`, after every thread has read what it had to."""
    o = tl.arange(0, N)
    m_A = (o[:, None] < n) & (o[None, :] < n)
    tl.debug_barrier()
    tl.store(A + o[:, None] * stride + o[None, :], b_A, mask=m_A)
    tl.debug_barrier()


@triton.jit
def diagonal(b_A, N: tl.constexpr):
    o = tl.arange(0, N)
    return tl.sum(tl.where(o[:, None] == o[None, :], b_A, 0.0), 0)


@triton.jit
def row(b_A, i, N: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, N)[:, None] == i, b_A, 0.0), 0)


@triton.jit
def column(b_A, j, N: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, N)[None, :] == j, b_A, 0.0), 1)


@triton.jit
def largest(x, N: tl.constexpr):
    """The maximum and the first place where it stands."""
    top = tl.max(x, 0)
    return top, tl.min(tl.where(x == top, tl.arange(0, N), N), 0)


@triton.jit
def multiply(A, a_row, a_step, B, b_step, n, N: tl.constexpr):
    """A B [N, N] as a sum of outer products in order; A[i, k] at i·a_row + k·a_step, B by rows."""
    o = tl.arange(0, N)
    b_C = tl.zeros([N, N], tl.float64)
    for k in range(n):
        b_A = tl.load(A + o * a_row + k * a_step, mask=o < n, other=0.0)
        b_B = tl.load(B + k * b_step + o, mask=o < n, other=0.0)
        b_C += b_A[:, None] * b_B[None, :]
    return b_C


@triton.jit
def cholesky(b_S, W, stride, scale, n, N: tl.constexpr):
    """diag(scale) L into W with S = L Lᵀ: pivoted on the largest remaining diagonal entry.

    Rows keep their places, so L is triangular only up to a permutation. Ends where nothing
    remains but rounding, n·2⁻⁵³ of the first pivot; further columns are zero.
    """
    o = tl.arange(0, N)
    left = tl.where(o < n, diagonal(b_S, N), -1.0)
    end = n * U64 * tl.max(left, 0)
    for k in range(n):
        pivot, i = largest(left, N)
        pivot = tl.where(pivot > end, pivot, float("inf"))
        b_L = tl.where(left >= 0, row(b_S, i, N) * tl.rsqrt(pivot), 0.0)
        b_S -= b_L[:, None] * b_L[None, :]
        left = tl.where(o == i, -1.0, tl.where(left >= 0, tl.maximum(left - b_L * b_L, 0.0), -1.0))
        tl.store(W + o * stride + k, b_L * scale, mask=o < n)
    tl.debug_barrier()


@triton.jit
def triangularise(b_S, W, stride, n, N: tl.constexpr):
    """Rᵀ into W with S = Q R: modified Gram-Schmidt, pivoted on the longest remaining column."""
    o = tl.arange(0, N)
    end = n * U64 * n * U64 * tl.max(tl.sum(b_S * b_S, 0), 0)
    for k in range(n):
        length, i = largest(tl.sum(b_S * b_S, 0), N)
        length = tl.where(length > end, length, float("inf"))
        b_Q = column(b_S, i, N) * tl.rsqrt(length)
        b_R = tl.sum(b_S * b_Q[:, None], 0)
        b_S = tl.where(o[None, :] == i, 0.0, b_S - b_Q[:, None] * b_R[None, :])
        tl.store(W + o * stride + k, b_R, mask=o < n)
    tl.debug_barrier()


@triton.jit
def angles(w, p, q):
    """Cosine and sine, by at most 45°, that make columns with the product w orthogonal.

    p, q are their squared lengths, and stand last among what is returned as they are then.
    """
    if w.dtype == tl.float32:  # squares of short columns are out of range
        turns = tl.abs(w) > tl.sqrt(p) * tl.sqrt(q) * ALMOST
    else:
        turns = w * w > p * q * ORTHOGONAL
    gap = q - p
    w = tl.where(turns, 2 * w, 0.0)
    far = tl.sqrt(gap * gap + w * w)
    t = w / tl.where(turns, gap + tl.where(gap < 0, -far, far), 1.0)
    c = tl.rsqrt(1 + t * t)
    if w.dtype == tl.float32:  # an approximation there
        c *= 1.5 - 0.5 * (1 + t * t) * c * c
    gain = 0.5 * t * w
    return c, c * t, turns, tl.maximum(p - gain, 0.0), q + gain


@triton.jit
def turned(b_P, b_Q, c, s):
    return c[None, :] * b_P - s[None, :] * b_Q, s[None, :] * b_P + c[None, :] * b_Q


@triton.jit
def move(b_P, b_Q, last, M: tl.constexpr, H: tl.constexpr):
    """Every column but P_0 one place on round the ring; places beyond `last` stay."""
    o = tl.broadcast_to(tl.arange(0, H)[None, :], [M, H])
    before = tl.where(o <= last, tl.maximum(o - 1, 0), o)
    after = tl.where(o < last, o + 1, o)
    first = o == 0
    b_next_P = tl.where(first, b_P, tl.gather(tl.where(first, b_Q, b_P), before, 1))
    b_next_Q = tl.where((o == last) & (o > 0), b_P, tl.gather(b_Q, after, 1))
    return b_next_P, b_next_Q


@triton.jit
def move_lengths(p, q, last, H: tl.constexpr):
    """The same for a number a column."""
    o = tl.arange(0, H)
    before = tl.where(o <= last, tl.maximum(o - 1, 0), o)
    after = tl.where(o < last, o + 1, o)
    first = o == 0
    next_p = tl.where(first, p, tl.gather(tl.where(first, q, p), before, 0))
    return next_p, tl.where((o == last) & (o > 0), p, tl.gather(q, after, 0))


@triton.jit
def lengths(b_P, b_R, TAIL: tl.constexpr):
    """Squared lengths of columns whose rows stand in one block, or in two."""
    p = tl.sum(b_P * b_P, 0)
    if TAIL:
        p += tl.sum(b_R * b_R, 0)
    return p


@triton.jit
def orthogonalise(b_P, b_Q, b_R, b_S, n, M: tl.constexpr, H: tl.constexpr, TAIL: tl.constexpr):
    """Sweeps of rotations until no pair turns; lengths are taken once a sweep and kept up."""
    pairs = (n + 1) // 2
    sweep = 0
    moving = n > 1
    while moving & (sweep < SWEEPS):
        p = lengths(b_P, b_R, TAIL)
        q = lengths(b_Q, b_S, TAIL)
        count = tl.zeros([H], tl.int32)
        for _ in range(2 * pairs - 1):
            w = tl.sum(b_P * b_Q, 0)
            if TAIL:
                w += tl.sum(b_R * b_S, 0)
            c, s, turns, p, q = angles(w, p, q)
            count += turns.to(tl.int32)
            b_P, b_Q = turned(b_P, b_Q, c, s)
            b_P, b_Q = move(b_P, b_Q, pairs - 1, M, H)
            if TAIL:
                b_R, b_S = turned(b_R, b_S, c, s)
                b_R, b_S = move(b_R, b_S, pairs - 1, TAIL, H)
            p, q = move_lengths(p, q, pairs - 1, H)
        moving = tl.sum(count, 0) > 0
        sweep += 1
    return b_P, b_Q, b_R, b_S


@triton.jit
def above(p, q, before):
    """How many of q stand above each of p in descending order; `before` settles ties."""
    higher = (q[None, :] > p[:, None]) | ((q[None, :] == p[:, None]) & before)
    return tl.sum(higher.to(tl.int32), 1)


@triton.jit
def left_vectors(W, stride, squares, n, N: tl.constexpr, TAIL: tl.constexpr, SINGLE: tl.constexpr):
    """W [n, n] becomes its left singular vectors in descending order of σ.

    σ² goes to `squares` (n). Zero columns stay zero and come last; returned is the number of
    others. Entries of W near one in size, so that squares neither over- nor underflow. The last
    TAIL rows are a block of their own. SINGLE: all sweeps are in fp32, and so is what is returned.
    """
    H: tl.constexpr = N // 2
    M: tl.constexpr = N // 2 if TAIL else N
    o_n = tl.arange(0, M)
    o_t = M + tl.arange(0, TAIL if TAIL else 1)
    o_h = tl.arange(0, H)
    half = (n + 1) // 2
    m_p = o_h < half
    m_q = o_h < n - half
    P = W + o_n[:, None] * stride + o_h[None, :]
    m_n = o_n[:, None] < n
    b_P = tl.load(P, mask=m_n & m_p[None, :], other=0.0)
    b_Q = tl.load(P + half, mask=m_n & m_q[None, :], other=0.0)
    R = W + o_t[:, None] * stride + o_h[None, :]
    m_t = (o_t[:, None] < n) & (TAIL > 0)
    b_R = tl.load(R, mask=m_t & m_p[None, :], other=0.0)
    b_S = tl.load(R + half, mask=m_t & m_q[None, :], other=0.0)
    if SINGLE:
        b_A, b_B, b_C, b_D = orthogonalise(
            b_P.to(tl.float32), b_Q.to(tl.float32), b_R.to(tl.float32), b_S.to(tl.float32),
            n, M, H, TAIL,
        )  # fmt: skip
        b_P, b_Q = b_A.to(tl.float64), b_B.to(tl.float64)
        b_R, b_S = b_C.to(tl.float64), b_D.to(tl.float64)
    else:
        b_P, b_Q, b_R, b_S = orthogonalise(b_P, b_Q, b_R, b_S, n, M, H, TAIL)
    p = lengths(b_P, b_R, TAIL)
    q = lengths(b_Q, b_S, TAIL)
    b_P *= inverse(tl.sqrt(p))[None, :]
    b_Q *= inverse(tl.sqrt(q))[None, :]
    # Padding stands below everything.
    key_p = tl.where(m_p, p, -1.0)
    key_q = tl.where(m_q, q, -1.0)
    earlier = o_h[None, :] < o_h[:, None]
    o_p = above(key_p, key_p, earlier) + above(key_p, key_q, earlier & False)
    o_q = above(key_q, key_q, earlier) + above(key_q, key_p, earlier | True)
    tl.debug_barrier()
    tl.store(squares + o_p, p, mask=m_p)
    tl.store(squares + o_q, q, mask=m_q)
    tl.store(W + o_n[:, None] * stride + o_p[None, :], b_P, mask=m_n & m_p[None, :])
    tl.store(W + o_n[:, None] * stride + o_q[None, :], b_Q, mask=m_n & m_q[None, :])
    if TAIL:
        b_R *= inverse(tl.sqrt(p))[None, :]
        b_S *= inverse(tl.sqrt(q))[None, :]
        tl.store(W + o_t[:, None] * stride + o_p[None, :], b_R, mask=m_t & m_p[None, :])
        tl.store(W + o_t[:, None] * stride + o_q[None, :], b_S, mask=m_t & m_q[None, :])
    tl.debug_barrier()
    return tl.sum((p > 0).to(tl.int32), 0) + tl.sum((q > 0).to(tl.int32), 0)


@triton.jit
def straighten(V, H, stride, n, N: tl.constexpr):
    """Nearly orthonormal columns made so: V (3 − VᵀV)/2, which squares what was missing.

    Newton and Schulz; zero columns stay zero, and no column is preferred. H is room for n × n.
    """
    o = tl.arange(0, N)
    b_H = multiply(V, 1, stride, V, stride, n, N)
    store_block(H, tl.where(o[:, None] == o[None, :], 1.5, 0.0) - 0.5 * b_H, n, n, N)
    store_block(V, multiply(V, stride, 1, H, n, n, N), stride, n, N)


@triton.jit
def complete(V, stride, first, n, N: tl.constexpr):
    """Make columns `first` … n − 1 of V orthonormal to all before them, leading ones foremost.

    A column that is zero, or lies in the span of those before it, is replaced by what they leave
    of the unit vector they cover least.
    """
    o = tl.arange(0, N)
    b_V = load_block(V, stride, n, N)
    for k in range(first, n):
        b_B = tl.where(o[None, :] < k, b_V, 0.0)
        _, i = largest(tl.where(o < n, 1 - tl.sum(b_B * b_B, 1), -1.0), N)
        v = column(b_V, k, N)
        for _ in range(3):  # one to see what is left, two to be orthogonal
            v -= tl.sum(b_B * tl.sum(b_B * v[:, None], 0)[None, :], 1)
            v = tl.where(tl.sum(v * v, 0) > 2.0**-20, v, (o == i).to(tl.float64))
        v *= tl.rsqrt(tl.sum(v * v, 0))
        b_V = tl.where(o[None, :] == k, v[:, None], b_V)
    store_block(V, b_V, stride, n, N)
