"""The one way to start a kernel: on the tensors' device, watched by whoever asks.

An observer sees every call before it happens and may keep it from happening: tests count launches
and check that repeated runs make the same ones; the compile-only gate runs launchers on meta
tensors and compiles what they would have launched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton

__all__ = ["Call", "interpreted", "launch", "observed"]


@dataclass(frozen=True)
class Call:
    """A kernel, its grid and its arguments by name; `options` are the compiler's."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


Observer = Callable[[Call], bool]
_observers: list[Observer] = []


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Show every call to `observer`; where it returns False the kernel does not run."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, decided when Triton was imported."""
    return bool(triton.knobs.runtime.interpret)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int = 2,
    **constants: Any,
) -> None:  # fmt: skip
    """Run `kernel` on `grid` with positional arguments and constexpr keywords.

    An empty grid launches nothing. What may be many stands on the grid's first axis, which holds
    2³¹ − 1 programs; the others hold 65 535.
    """
    if grid[0] >= 2**31 or max(grid[1:], default=1) >= 2**16:
        raise ValueError(
            f"{kernel.fn.__name__}: got a grid of {grid} programs, expected at most 2³¹ − 1 by "
            "65 535; aggregate fewer modules at a time"
        )
    if 0 in grid:
        return
    # Fused multiply-adds, whatever a Triton version's default is.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if _observers:
        bound = inspect.signature(kernel.fn).bind(*arguments, **constants)
        call = Call(kernel, grid, dict(bound.arguments), options)
        answers = [observer(call) for observer in _observers]  # every one of them sees it
        if not all(answers):
            return
    device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, **options)
