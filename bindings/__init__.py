"""How the algorithm becomes ``torch.ops.glora.*``: importing this registers the ops."""

from functools import cache

from . import ops as _ops
from .cpu import CpuVocabulary


@cache
def _cpu() -> _ops.Ops:
    return _ops.Ops(CpuVocabulary())


@cache
def _cuda() -> _ops.Ops:
    from .cuda import CudaVocabulary  # imports Triton

    return _ops.Ops(CudaVocabulary(), fixed_steps=True)


_ops.register(_cpu, "CPU")
_ops.register(_cuda, "CUDA")
