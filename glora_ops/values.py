"""Values that can be computed with, told from those that cannot, at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["extent", "out_of_range", "value_fault"]

LEAST, MOST = 1e-40, 1e40
# Of a tensor in any other dtype on a GPU, whose kernels scale nothing (docs/ops.md).
DEVICE_LEAST, DEVICE_MOST = 2.0**-100, 2.0**100


def extent(x: Tensor) -> Tensor:
    """(2,): smallest and largest value of a tensor that is not empty; NaN if any is."""
    return torch.stack(torch.aminmax(x))


def out_of_range(low_high: Tensor) -> tuple[str, str, str] | None:
    """(problem, found, expected) of finite values whose squares fp64 cannot hold.

    Only fp64 has such values.
    """
    peak = float(low_high.abs().max())
    if low_high.dtype == torch.float64 and peak != 0 and not LEAST <= peak <= MOST:
        return (
            "values are too large or too small",
            f"{peak:.3g}",
            "moduli of 1e-40 to 1e40",
        )
    return None


def value_fault(x: Tensor) -> tuple[str, str, str] | None:
    """(problem, found, expected) of values that cannot be computed with where they are."""
    if x.numel() == 0:
        return None
    low_high = extent(x).cpu()
    if not bool(low_high.isfinite().all()):
        bad = (~torch.isfinite(x)).nonzero()
        found = f"{len(bad)} of {x.numel()}, the first at {bad[0].tolist()}"
        return "value is not finite", found, "finite numbers"
    if not x.is_cpu and x.dtype != torch.float64:
        peak = float(low_high.abs().max())
        if peak != 0 and not DEVICE_LEAST <= peak <= DEVICE_MOST:
            problem = "values are too large or too small for a GPU"
            return problem, f"{peak:.3g}", "moduli of 2^-100 to 2^100, or the factors on the CPU"
    return out_of_range(low_high)
