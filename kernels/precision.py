"""Which arithmetic each step uses, by the dtype of the factors and the target. README.md: why.

| step | factors | sm_80, sm_90 | sm_100 | gfx942 |
| --- | --- | --- | --- | --- |
| Gram, inner | any | fp64 tensor cores | fp64 FMA | fp64 FMA |
| times, lift, core | bf16 | bf16 × 3 exact bf16 terms | the same | the same |
| times, lift, core | fp16, fp32 | tf32x3 | tf32x3 | fp32 (mfma) |
| combine | fp32 | tf32x3 | tf32x3 | fp32 (mfma) |

Every sum is fp32 within a block and fp64 between blocks, or fp64 throughout. Triton's interpreter
multiplies bf16 wrongly and knows one precision: there every product is fp32 or fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .launching import interpreted

__all__ = ["SPLIT", "TERMS", "assumed_target", "double_dot", "exact_product", "target_of"]

# How an fp32-exact product is taken; names of the constexpr MODE of `blocks.exact_dot`.
SPLIT, TERMS, FULL = "bf16 terms", "tf32x3", "ieee"

_assumed = "sm_90"


@contextmanager
def assumed_target(target: str) -> Iterator[None]:
    """The target that meta tensors stand for."""
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before


def target_of(x: torch.Tensor) -> str:
    """``"sm_90"``, ``"gfx942"`` …; ``"interpreter"`` where nothing is compiled."""
    if interpreted():
        return "interpreter"
    if x.device.type == "meta":
        return _assumed
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(x.device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}"


def exact_product(x: torch.Tensor) -> str:
    """How x (of any input dtype) meets fp32 operands."""
    target = target_of(x)
    if target == "interpreter":
        return FULL
    if x.dtype == torch.bfloat16:
        return SPLIT
    return TERMS if target.startswith("sm_") else FULL


def double_dot(x: torch.Tensor) -> bool:
    """Whether fp64 products are `tl.dot`; otherwise sums of outer products, plain fp64 FMA."""
    return target_of(x) in ("interpreter", "sm_80", "sm_90")
