"""Finds NaN, infinities, and values too large or small to compute with; reads a tensor once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["extent", "is_finite", "out_of_range", "value_faults"]

LEAST, MOST = 1e-40, 1e40  # of fp64; why: inner products hold four factors and their sums
# Of a tensor in any other dtype on a GPU, whose kernels scale nothing (docs/ops.md).
DEVICE_LEAST, DEVICE_MOST = 2.0**-100, 2.0**100


def extent(x: Tensor) -> Tensor:
    """(2,): smallest and largest value of a tensor that is not empty; NaN if any is."""
    return torch.stack(torch.aminmax(x))


def is_finite(x: Tensor) -> bool:
    """Whether every value of a tensor that is not empty is."""
    return bool(extent(x).isfinite().all())


def out_of_range(dtype: torch.dtype, peak: float) -> tuple[str, str, str] | None:
    """(problem, found, expected) of finite values up to `peak` whose squares fp64 cannot hold.

    Only fp64 has such values.
    """
    if dtype == torch.float64 and peak != 0 and not LEAST <= peak <= MOST:
        return (
            "values are too large or too small",
            f"{peak:.3g}",
            "moduli of 1e-40 to 1e40",
        )
    return None


def value_faults(tensors: Sequence[Tensor]) -> list[tuple[str, str, str] | None]:
    """(problem, found, expected) of each tensor that cannot be computed with where it is.

    One call a tensor, then one for all of a dtype and a device.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
    for i, x in enumerate(tensors):
        if x.numel():
            kinds[x.dtype, x.device].append(i)
    faults: list[tuple[str, str, str] | None] = [None] * len(tensors)
    for places in kinds.values():
        ends = [end for i in places for end in torch.aminmax(tensors[i])]
        low_high = torch.stack(ends).view(-1, 2).cpu()
        peaks = low_high.abs().amax(-1).tolist()  # NaN where any value is
        for i, peak in zip(places, peaks, strict=True):
            faults[i] = _fault(tensors[i], peak)
    return faults


def _fault(x: Tensor, peak: float) -> tuple[str, str, str] | None:
    if not math.isfinite(peak):
        bad = (~torch.isfinite(x)).nonzero()
        found = f"{len(bad)} of {x.numel()}, the first at {bad[0].tolist()}"
        return "value is not finite", found, "finite numbers"
    scaled = x.is_cpu or x.dtype == torch.float64
    if not scaled and peak != 0 and not DEVICE_LEAST <= peak <= DEVICE_MOST:
        problem = "values are too large or too small for a GPU"
        return problem, f"{peak:.3g}", "moduli of 2^-100 to 2^100, or the factors on the CPU"
    return out_of_range(x.dtype, peak)
