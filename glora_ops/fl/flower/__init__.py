"""Flower as the engine: the same methods, data and records, clients on nodes of their own.

A run's loop is `glora_ops.fl.run`, unchanged: `FlowerEngine` carries its messages over a Flower
`Grid` to the `ClientApp` of `client_app`. `simulate` has Flower's simulation runtime under it,
`server_app` is what a SuperLink starts. Nodes are told what to train message by message; no file is
shared with them, and nothing that travels is ever unpickled.
"""

import os
import sys
from importlib.util import find_spec

from ...errors import require

require(
    sys.version_info >= (3, 11), "Python", sys.version.split()[0], "3.11 or newer for Flower",
    "--engine local gives the same numbers",
)  # fmt: skip
require(find_spec("flwr") is not None, "Flower", "no package flwr", "the extra fl",
        "pip install 'glora[fl]'")  # fmt: skip
# Flower and Ray report usage to their makers unless told otherwise before they are imported.
for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
    os.environ.setdefault(name, "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns where it is not set

from .apps import server_app, simulate  # noqa: E402  # after the settings above
from .engine import FlowerEngine  # noqa: E402  # as well
from .node import client_app  # noqa: E402  # as well

__all__ = ["FlowerEngine", "client_app", "server_app", "simulate"]
