"""The rest of glora_ops, torch with it, loaded when a command has work to do."""

from __future__ import annotations

import sys

__all__ = ["load"]


def load() -> None:
    """Run the package's ``__init__`` where `glora_command` has put that off."""
    package = sys.modules[__name__.partition(".")[0]]
    spec = package.__spec__
    if "__all__" not in vars(package) and spec is not None and spec.loader is not None:
        spec.loader.exec_module(package)
