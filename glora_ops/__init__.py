"""glora: gauge-invariant aggregation of LoRA adapters.

Importing this registers ``torch.ops.glora.*``; `glora_ops.ops` has them as documented functions.
The functions and classes here are the public Python API; PEFT folders are read and written by
`aggregate_adapters`, `update_adapters`, `apply_adapter` and `State.write_adapter`.
"""

from typing import TYPE_CHECKING

try:
    from . import ops
except ModuleNotFoundError as error:
    if error.name != f"{__name__}.bindings":
        raise
    raise ImportError(
        "glora_ops lies here uninstalled: the folder bindings/ becomes glora_ops.bindings when it "
        "is installed. In the clone: pip install -e ."
    ) from None
from .api import aggregate
from .certificates import CLIENT_STATS, STATS
from .errors import GloraError, GloraWarning, Refusal, Refused
from .packing import Packed, pack, pack_modules
from .state import ModuleState, State
from .version import __version__

if TYPE_CHECKING:
    from .job.launch import aggregate_adapters
    from .merging.apply import apply_adapter
    from .merging.update import update_adapters

__all__ = [
    "CLIENT_STATS",
    "STATS",
    "GloraError",
    "GloraWarning",
    "ModuleState",
    "Packed",
    "Refusal",
    "Refused",
    "State",
    "__version__",
    "aggregate",
    "aggregate_adapters",
    "apply_adapter",
    "ops",
    "pack",
    "pack_modules",
    "update_adapters",
]

#: What reads folders, by the module it lies in: loaded when wanted.
_FOLDERS = {
    "aggregate_adapters": "job.launch",
    "apply_adapter": "merging.apply",
    "update_adapters": "merging.update",
}
#: Modules that are loaded when wanted.
_MODULES = ("distributed", "job")


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _FOLDERS:
        return getattr(import_module(f"{__name__}.{_FOLDERS[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
