"""Federated LoRA: methods on equal footing, real PEFT clients, runs that can be killed.

A method is a frozen dataclass with pure functions, what each client is sent and how replies become
the next state (`methods`). Clients (`clients`) and data (`tasks`) know nothing of methods; engines
carry messages between them. `run_experiment` is all of ``glora fl run``; `register_method` and
`register_task` add one's own. Needs the extra: ``pip install 'glora[fl]'``.
"""

from . import extra  # noqa: F401  # says so where the extra is missing
from .config import Config, load_config, shipped
from .experiment import Result, run_experiment
from .methods import METHODS, Method
from .registry import register_method, register_task
from .run import Plan, run

__all__ = [
    "METHODS",
    "Config",
    "Method",
    "Plan",
    "Result",
    "load_config",
    "register_method",
    "register_task",
    "run",
    "run_experiment",
    "shipped",
]
