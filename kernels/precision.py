"""Which arithmetic a product uses, by what meets what and where. README.md justifies each row.

| x | w | NVIDIA | AMD, interpreter |
| --- | --- | --- | --- |
| bf16 or fp16 | the same (signs) | ``half``: one dot, products exact in fp32 | ``ieee`` |
| bf16 | fp32 | ``split w``: w as three bf16 terms, exactly; three dots | ``split w``, ``ieee`` |
| fp16 or fp32 | fp32 | ``tf32x3``: three tf32 dots, error 2⁻²² of a product | ``ieee`` |
| any | any, if one is fp64 | ``double``: fp64 throughout | ``double`` |

Sums are fp32 except in ``double``, promoted every PROMOTED columns. Gram matrices and
inner products, which square a condition number, are as precise as fp64:

| target | fp64 units | Gram matrices, inner products |
| --- | --- | --- |
| `FULL_DOUBLES`: data centre chips, the interpreter | half the rate of fp32 or more | ``double`` |
| every other, such as sm_89 | one 32nd of it or less | ``slices``: exact products, fp32 pairs |

Nothing is left to Triton's default. The interpreter multiplies bf16 wrongly and knows one
precision, so it up-casts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .launching import interpreted

__all__ = ["PRECISE", "PROMOTED", "assumed_target", "precise_mode", "product_mode", "target_of"]

HALVES = (torch.bfloat16, torch.float16)
# Columns of a long sum that one accumulator of a tensor core may hold: `blocks` says why.
PROMOTED = 256
# Modes whose sums are as precise as fp64.
PRECISE = ("double", "slices")
# Where fp64 has units of its own. B300 (sm_103) has none worth the name.
FULL_DOUBLES = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx950", "interpreter")

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


def product_mode(x: torch.Tensor, w: torch.Tensor) -> str:
    """The constexpr MODE of `blocks.product` for operands of these dtypes."""
    if torch.float64 in (x.dtype, w.dtype):
        return "double"
    target = target_of(x)
    if target == "interpreter":
        return "ieee"
    if x.dtype == w.dtype and x.dtype in HALVES:
        return "half"
    if x.dtype == torch.bfloat16:
        return "split w"
    return "tf32x3" if target.startswith("sm_") else "ieee"


def precise_mode(x: torch.Tensor) -> str:
    """The MODE of a sum that squares a condition number."""
    return "double" if target_of(x) in FULL_DOUBLES else "slices"
