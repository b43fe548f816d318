"""PEFT LoRA folders in and out; PEFT itself is not needed."""

from .aligned_names import align_names
from .compatible import adapter_layout, check_base_copies, check_compatible
from .modules import DenseTensor, Module
from .read import Adapter, inspect_adapter, read_adapter
from .value_checks import check_values
from .write import write_adapter

__all__ = [
    "Adapter",
    "DenseTensor",
    "Module",
    "adapter_layout",
    "align_names",
    "check_base_copies",
    "check_compatible",
    "check_values",
    "inspect_adapter",
    "read_adapter",
    "write_adapter",
]
