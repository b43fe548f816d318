"""The command `glora`: help, usage errors and completion at once, torch only when there is work.

Importing anything of `glora_ops` runs its ``__init__``, which registers the ops and so loads torch;
that takes seconds. This module lies outside: it puts the package in place without running it, so
that the command line can be imported alone. `glora_ops.cli.loading.load` runs it when a command
begins to work.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec

__all__ = ["main"]


def main() -> None:
    """Run `glora` with the arguments of the process."""
    spec = find_spec("glora_ops")
    if spec is None:
        sys.exit("glora_ops is not installed beside this command: pip install glora")
    sys.modules["glora_ops"] = module_from_spec(spec)
    from glora_ops.runtime.signals import end_at_once

    end_at_once()
    from glora_ops.cli import main as run

    run()
