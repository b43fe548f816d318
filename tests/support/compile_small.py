"""Compile-only cases of the small dense problems: canonical forms, eigenproblem, SVD, Cholesky."""

from __future__ import annotations

import torch
from compile_case import case, meta

# Above 64 two 128 × 64 blocks of doubles fill half of a processor's registers, at 128 a thread;
# what a round needs beside them goes to the stack, a few per cent of its instructions.
WIDE = {"sm_80": 800, "sm_89": 800, "sm_90": 800}
# 8 warps leave 255, and what is stored is outside of the loop of rounds, in the factorisation.
EIGHT = {"sm_80": 1300, "sm_89": 1300, "sm_90": 1300}


def square(n: int) -> torch.Tensor:
    return meta(4, n, n, dtype=torch.float64)


@case(wide_loads=False, barriers=6)
def canonical_64() -> None:
    from glora_ops.kernels.canonical_solve import launch_canonical_solve

    grams = meta(2, 10, 64, 64, dtype=torch.float64)
    launch_canonical_solve(grams, grams, meta(10, dtype=torch.int64))


@case(wide_loads=False, barriers=6)
def eigh_16() -> None:
    from glora_ops.kernels.eigh import launch_eigh

    launch_eigh(square(16))


@case(wide_loads=False, barriers=6, stack={"sm_89": 64})  # ptxas stops at 128 registers there
def eigh_64() -> None:
    from glora_ops.kernels.eigh import launch_eigh

    launch_eigh(square(64))


@case(wide_loads=False, stack=EIGHT)
def eigh_80() -> None:
    from glora_ops.kernels.eigh import launch_eigh

    launch_eigh(square(80))


@case(wide_loads=False, tensor_cores="DMMA", without_doubles="")
def triangular_64() -> None:
    from glora_ops.kernels.triangular import launch_triangular, triangular_each

    launch_triangular(square(64), 1e-12)
    triangular_each([square(64), square(64)], 1e-12)


@case(wide_loads=False, tensor_cores="DMMA", without_doubles="", stack=WIDE)
def triangular_80() -> None:
    from glora_ops.kernels.triangular import triangular_each

    triangular_each([square(80), square(80)], 1e-12)


@case(wide_loads=False, barriers=6)
def svd_64() -> None:
    from glora_ops.kernels.svd import launch_svd

    launch_svd(square(64))


@case(wide_loads=False, stack=WIDE)
def svd_128() -> None:
    from glora_ops.kernels.svd import launch_svd

    launch_svd(square(128))


@case(wide_loads=False, stack=EIGHT)
def eigh_80_in_single() -> None:
    from glora_ops.kernels.eigh import launch_eigh

    launch_eigh(square(80), precise=False)


@case(wide_loads=False, barriers=6)
def eigh_64_in_single() -> None:
    from glora_ops.kernels.eigh import launch_eigh

    launch_eigh(square(64), precise=False)


@case(wide_loads=False)
def votes() -> None:
    from glora_ops.kernels.votes import launch_votes

    for rank in (16, 64):
        t, sigma, size = (meta(2, 10, *x, dtype=torch.float64) for x in ((rank, rank), (rank,), ()))
        marks = meta(11, dtype=torch.int64)
        launch_votes((t, t, sigma, size), size, marks, 10 * rank, 0.1, 2.0**-9)
