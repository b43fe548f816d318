"""Values that can be computed with, told from those that cannot, at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["extent", "out_of_range", "value_fault"]

LEAST, MOST = 1e-40, 1e40


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
    """(problem, found, expected) of values that cannot be computed with."""
    if x.numel() == 0:
        return None
    low_high = extent(x)
    if not bool(low_high.isfinite().all()):
        bad = (~torch.isfinite(x)).nonzero()
        found = f"{len(bad)} of {x.numel()}, the first at {bad[0].tolist()}"
        return "value is not finite", found, "finite numbers"
    return out_of_range(low_high)
