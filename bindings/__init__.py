"""How the algorithm becomes ``torch.ops.glora.*``: importing this registers the ops."""

from . import ops as _ops
from .cpu import CpuVocabulary

_ops.register(_ops.Ops(CpuVocabulary()), "CPU")
