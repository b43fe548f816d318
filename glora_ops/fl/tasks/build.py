"""From a configuration to its task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .base import Task

if TYPE_CHECKING:
    from ..config import Config

__all__ = ["build_task"]


def build_task(config: Config, seed: int, data_dir: Path | None = None) -> Task:
    """The configuration's task; only what it needs is imported."""
    if config.task.kind == "digits":
        from .digits import Digits

        return Digits(seed)
    raise NotImplementedError(config.task.kind)
