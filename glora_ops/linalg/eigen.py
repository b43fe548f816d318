"""Every small eigenproblem, singular value decomposition and Cholesky factor, with its fallback.

LAPACK gives up on a matrix now and then, by driver and by build. Each call here goes on to the
next way: the batch, then every matrix alone in fp64 near one, then by SciPy's other drivers,
imported only then. What none of them solves, such as values that are not finite, is a
`GloraError`. QR decompositions do not iterate and cannot fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import unfit

__all__ = ["cholesky_ex", "eigh", "eigvalsh", "svd"]

Parts = tuple[Tensor, ...]


def eigh(g: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of symmetric matrices (…, n, n).

    Raises
    ------
    GloraError
        No driver solves a matrix: its values are not finite.
    """

    def with_driver(driver: str) -> Callable[[Tensor], Parts]:
        def solve(x: Tensor) -> Parts:
            from scipy import linalg

            return _tensors(linalg.eigh(x.numpy(), driver=driver))

        return solve

    others = [with_driver("ev"), with_driver("evr")]
    lam, vec = _solved("eigenproblem", g, torch.linalg.eigh, others, scaled=0)
    return lam, vec


def eigvalsh(g: Tensor) -> Tensor:
    """The eigenvalues alone; raises as `eigh`."""
    try:
        return torch.linalg.eigvalsh(g)
    except torch.linalg.LinAlgError:
        return eigh(g)[0]


def svd(c: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """X, S, Yᵀ of matrices (…, n, m), as `torch.linalg.svd`.

    Raises
    ------
    GloraError
        As `eigh`.
    """

    def solve(x: Tensor) -> Parts:
        return torch.linalg.svd(x, full_matrices=full_matrices)

    def by_scipy(x: Tensor) -> Parts:
        from scipy import linalg

        return _tensors(linalg.svd(x.numpy(), full_matrices, lapack_driver="gesvd"))

    x, s, yh = _solved("singular value decomposition", c, solve, [by_scipy], scaled=1)
    return x, s, yh


def cholesky_ex(g: Tensor) -> tuple[Tensor, Tensor]:
    """Lower triangular L with L Lᵀ = g, and 0 for each matrix where it exists (…,).

    As `torch.linalg.cholesky_ex`. Falls back on the QR decomposition of √Λ Vᵀ.
    """
    try:
        lower, info = torch.linalg.cholesky_ex(g)
    except torch.linalg.LinAlgError:
        lam, vec = eigh(g)
        r = torch.linalg.qr(lam.clamp(min=0).sqrt()[..., None] * vec.mT).R
        signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        lower, info = r.mT * signs[..., None, :], lam[..., 0] <= 0
    return lower, info


def _tensors(arrays: Sequence[np.ndarray]) -> Parts:
    return tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays)


def _solved(
    name: str,
    x: Tensor,
    solve: Callable[[Tensor], Parts],
    others: Sequence[Callable[[Tensor], Parts]],
    scaled: int,
) -> Parts:
    """`solve`, or one matrix at a time by whatever solves it; part `scaled` is of x's scale."""
    try:
        return solve(x)
    except torch.linalg.LinAlgError:
        pass
    parts = [_alone(name, one, solve, others, scaled) for one in x.reshape(-1, *x.shape[-2:])]
    stacked = (torch.stack(part) for part in zip(*parts, strict=True))
    return tuple(part.reshape(*x.shape[:-2], *part.shape[1:]) for part in stacked)


def _alone(
    name: str,
    x: Tensor,
    solve: Callable[[Tensor], Parts],
    others: Sequence[Callable[[Tensor], Parts]],
    scaled: int,
) -> Parts:
    size = " × ".join(map(str, x.shape))
    if not bool(x.isfinite().all()):
        raise unfit(
            f"a small {name}",
            f"a {size} matrix with values that are not finite",
            "finite numbers, as finite factors of moderate size give",
            "glora_ops.aggregate checks factors and names the client; the ops do not",
        )
    unit = torch.exp2(torch.frexp(x.abs().amax().double()).exponent.double())
    near_one = (x.double() / unit).cpu()
    for way in (solve, *others):
        try:
            parts = list(way(near_one))
        except (torch.linalg.LinAlgError, np.linalg.LinAlgError, ImportError):
            continue
        parts[scaled] = parts[scaled] * unit.cpu()
        return tuple(part.to(x) for part in parts)
    raise unfit(
        f"a small {name}",
        f"a {size} matrix that no driver of LAPACK solves",
        "one of torch's or SciPy's drivers to converge",
        "install SciPy if it is missing; otherwise report the factors",
    )
