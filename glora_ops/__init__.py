"""glora: gauge-invariant aggregation of LoRA adapters.

Importing this registers ``torch.ops.glora.*``. The functions and classes here are the public
Python API; PEFT folders are read and written by `aggregate_adapters`, `update_adapters` and
`State.write_adapter`.
"""

from typing import TYPE_CHECKING

from .api import aggregate
from .certificates import CLIENT_STATS, STATS
from .errors import GloraError, GloraWarning, Refusal, Refused
from .packing import Packed, pack, pack_modules
from .state import ModuleState, State
from .version import __version__

if TYPE_CHECKING:
    from .merging.aggregate import aggregate_adapters
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
    "pack",
    "pack_modules",
    "update_adapters",
]


def __getattr__(name: str) -> object:
    if name in ("aggregate_adapters", "update_adapters"):  # read folders: loaded when wanted
        from .merging import aggregate, update

        return getattr(aggregate if name == "aggregate_adapters" else update, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
