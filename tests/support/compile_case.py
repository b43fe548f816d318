"""What a compile-only case is; compile_passes.py and compile_small.py hold the cases.

A case runs a launcher on meta tensors; compiling.py compiles what it would launch. Shapes are
those the kernels are judged at: rank 64, 16 columns beyond it, ragged 4–64, N > 256. To add one:

    @case(tensor_cores="HGMMA|HMMA")
    def lift_bf16() -> None:
        launch_lift(meta(2, 320, 4096, dtype=torch.bfloat16), meta(2, 320, 80))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

__all__ = ["CASES", "Case", "case", "meta"]


@dataclass(frozen=True)
class Case:
    """What is compiled and what its artifacts must look like.

    Attributes
    ----------
    wide_loads : bool
        16-byte loads and no 2-byte ones (sm_80, sm_90).
    tensor_cores : str
        A pattern of SASS families of which at least one must occur (sm_80, sm_90).
    without_doubles : str
        The pattern on sm_89, which has no fp64 units to speak of.
    tf32 : bool
        Whether tf32 instructions may occur (three of them make one fp32 product).
    stack : dict
        Bytes of stack (spills) allowed by target; 0 where not named, on sm_80, sm_89 and sm_90.
    barriers : int
        Barriers of the whole program at least (sm_80 and later), which order global memory too:
        matrices pass between threads through it, in programs of one warp as well.
    exceptions : dict
        Target → why the case does not compile there.
    """

    name: str
    run: Callable[[], None]
    wide_loads: bool = True
    tensor_cores: str = ""
    without_doubles: str = "HMMA"
    tf32: bool = False
    stack: dict[str, int] = field(default_factory=dict)
    barriers: int = 0
    exceptions: dict[str, str] = field(default_factory=dict)


CASES: list[Case] = []


def case(**expected: object) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(run: Callable[[], None]) -> Callable[[], None]:
        CASES.append(Case(run.__name__, run, **expected))  # type: ignore[arg-type]
        return run

    return add


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
