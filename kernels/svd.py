"""Small singular value decompositions C = X diag(S) Yᵀ, a batch in one launch.

C = Q R by pivoted Gram-Schmidt, one-sided Jacobi on Rᵀ (`jacobi`): S its singular values, Y its
left singular vectors. X = C Y/S, orthonormalised from the largest singular value down: an error
2⁻⁵³‖C‖/σ_k in x_k is removed from x_k alone. Small singular values are good to c·n·2⁻⁵³‖C‖; where
C ends, X and Y are completed to orthogonal matrices.

One program per matrix; fp64 on every target. One launch, no synchronisation, as `eigh`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .jacobi import (
    JacobiConfig,
    complete,
    exponent,
    inverse,
    left_vectors,
    load_block,
    multiply,
    power,
    store_block,
    triangularise,
)
from .launching import launch

__all__ = ["launch_svd"]


@triton.jit
def svd_kernel(C, X, S, Y, n, N: tl.constexpr, TAIL: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    C += i_b * n * n
    X += i_b * n * n
    Y += i_b * n * n
    S += i_b * n
    o = tl.arange(0, N)
    b_C = load_block(C, n, n, N)
    # Powers of two keep squares in range.
    e = exponent(tl.max(tl.max(tl.abs(b_C), 0), 0))
    b_C *= power(-e)
    invalid = 0 * tl.sum(tl.sum(b_C, 0), 0)  # NaN for NaN or infinity
    triangularise(b_C, Y, n, n, N)
    rank = left_vectors(Y, n, S, n, N, TAIL, False)
    b_S = tl.sqrt(tl.load(S + o, mask=o < n, other=0.0))
    b_X = multiply(C, n, 1, Y, n, n, N) * power(-e)
    b_X *= inverse(b_S)[None, :]
    store_block(X, b_X, n, n, N)
    tl.store(S + o, b_S * power(e) + invalid, mask=o < n)
    complete(X, n, 0, n, N)
    if rank < n:
        complete(Y, n, rank, n, N)


def launch_svd(c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular value decompositions of square matrices.

    Parameters
    ----------
    c : Tensor (..., n, n) fp64
        1 ≤ n ≤ `jacobi.MAX_SIZE`.

    Returns
    -------
    x, y : Tensor (..., n, n) fp64
        Orthogonal.
    s : Tensor (..., n) fp64
        Descending, between x and y; NaN where c is not finite.

    Notes
    -----
    ‖C − X diag(S) Yᵀ‖ ≤ c·n·2⁻⁵³‖C‖, orthogonality likewise. Cost: about 5n³ multiply-adds a sweep,
    7 to 20 sweeps, and 15n³ around them.
    """
    n = c.shape[-1]
    config = JacobiConfig.for_size(n)
    c = c.contiguous()
    x, y = torch.empty_like(c), torch.empty_like(c)
    s = torch.empty(c.shape[:-1], dtype=c.dtype, device=c.device)
    launch(
        svd_kernel, (c.numel() // (n * n),), c, x, s, y, n, N=config.block,
        TAIL=config.tail, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
    return x, s, y
