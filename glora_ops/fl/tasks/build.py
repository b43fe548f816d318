"""From a configuration to its task."""

from __future__ import annotations

from pathlib import Path

from ..config import Config
from ..registry import find_task
from .base import HeldOut, Task

__all__ = ["build_task"]


def build_task(
    config: Config, seed: int, data_dir: Path | None = None, held_out: HeldOut = "test"
) -> Task:
    """The configuration's task, judged on `held_out`; only what it needs is imported."""
    registered = find_task(config.task.kind)
    if registered is not None:
        return registered(config, seed, data_dir, held_out)
    if config.task.kind == "digits":
        from .digits import Digits

        return Digits(seed, held_out)
    if config.task.kind == "glue":
        from .glue import Glue

        return Glue(config, seed, data_dir, held_out)
    from .superni import SuperNI

    return SuperNI(config, seed, data_dir, held_out)
