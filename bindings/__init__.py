"""How the algorithm becomes ``torch.ops.glora.*``: importing this registers the ops."""

from functools import cache

from .cpu import CpuVocabulary
from .library import register
from .ops import Ops


@cache
def _cpu() -> Ops:
    return Ops(CpuVocabulary())


@cache
def _cuda() -> Ops:
    from .cuda import CudaVocabulary  # imports Triton

    return Ops(CudaVocabulary(), fixed_steps=True)


register(_cpu, "CPU")
register(_cuda, "CUDA")
