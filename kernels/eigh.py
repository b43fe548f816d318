"""Small symmetric positive semidefinite eigenproblems G = V diag(λ) Vᵀ, a batch in one launch.

G = L Lᵀ by pivoted Cholesky, one-sided Jacobi on L (`jacobi`): λ = σ², V the left singular
vectors. The one-sided form keeps no second matrix in registers, is faster on L than on G, and
needs no test against ‖G‖, which clustered spectra (mean projectors have them) never pass.
Eigenvalues below n·2⁻⁵³ of the largest diagonal entry may come out as exact zeros; their vectors
complete the basis.

One program per matrix; fp64 on every target. It never synchronises and always makes one launch,
so it can be captured in a CUDA graph; sweeps end early inside the kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .jacobi import (
    JacobiConfig,
    cholesky,
    complete,
    diagonal,
    exponent,
    left_vectors,
    load_block,
    power,
    straighten,
)
from .launching import launch

__all__ = ["launch_eigh"]


@triton.jit
def eigh_kernel(G, LAM, V, ROOM, n, N: tl.constexpr, TAIL: tl.constexpr, SINGLE: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    G += i_b * n * n
    V += i_b * n * n
    LAM += i_b * n
    o = tl.arange(0, N)
    b_G = load_block(G, n, n, N)
    # Powers of two keep squares in range.
    e = exponent(tl.max(tl.abs(diagonal(b_G, N)), 0))
    b_G *= power(-e)
    invalid = 0 * tl.sum(tl.sum(b_G, 0), 0)  # NaN for NaN or infinity
    cholesky(b_G, V, n, 1.0, n, N)
    rank = left_vectors(V, n, LAM, n, N, TAIL, SINGLE)
    b_lam = tl.load(LAM + o, mask=o < n, other=0.0)
    tl.debug_barrier()
    tl.store(LAM + o, b_lam * power(e) + invalid, mask=o < n)
    if SINGLE:
        straighten(V, ROOM + i_b * n * n, n, n, N)
    if rank < n:
        complete(V, n, rank, n, N)


def launch_eigh(g: torch.Tensor, precise: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors of positive semidefinite matrices.

    Parameters
    ----------
    g : Tensor (..., n, n) fp64
        Symmetric to rounding, positive semidefinite to rounding, 1 ≤ n ≤ `jacobi.MAX_SIZE`.

    precise : bool
        Otherwise in fp32 but for the factorisation: both bounds below with 2⁻²⁴ for 2⁻⁵³ in the
        first, 2⁻³⁴ in the second, and a third of the time.

    Returns
    -------
    lam : Tensor (..., n) fp64
        Descending, never negative; NaN where g is not finite.
    v : Tensor (..., n, n) fp64
        Orthonormal columns.

    Notes
    -----
    ‖G − V diag(λ) Vᵀ‖ ≤ c·n·2⁻⁵³‖G‖ and ‖VᵀV − 1‖ ≤ c·n·2⁻⁵³ with c of order one. Cost: n³ for the
    factorisation, about 5n³ multiply-adds a sweep, 7 to 20 sweeps.
    """
    n = g.shape[-1]
    config = JacobiConfig.for_size(n)
    g = g.contiguous()
    lam, v = torch.empty(g.shape[:-1], dtype=g.dtype, device=g.device), torch.empty_like(g)
    launch(
        eigh_kernel, (g.numel() // (n * n),), g, lam, v,
        g if precise else torch.empty_like(g), n, N=config.block, TAIL=config.tail,
        SINGLE=not precise, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
    return lam, v
