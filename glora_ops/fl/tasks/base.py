"""What a task is to the rest: a model, training examples with labels, and a way to be judged."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor, nn

from ...errors import require
from ..seeds import numpy_stream

__all__ = ["HeldOut", "Task", "half"]

HeldOut = Literal["test", "validation"]  # what runs report, and what a sweep chooses on


def half(rows: list[Any], part: HeldOut, *name: object) -> list[Any]:
    """One half of the held-out rows; the halves are the same for every seed and disjoint."""
    require(len(rows) > 1, " ".join(["held-out examples", *map(str, name)]), len(rows),
            "two or more, as a sweep is judged on half of them")  # fmt: skip
    chosen = set(numpy_stream(0, "validation", *name).permutation(len(rows))[: len(rows) // 2])
    return [row for i, row in enumerate(rows) if (i in chosen) == (part == "validation")]


class Task(Protocol):
    """A task knows nothing of clients, adapters or methods.

    Attributes
    ----------
    metric : str
        The key of `evaluate` that reports rank methods by; larger is better.
    labels : ndarray (n,) of int
        Of the training examples: classes, or task numbers where a client holds tasks.
    label_names : tuple of str
    targets : tuple of str
        Linear modules to adapt, as PEFT's ``target_modules``.
    heads : tuple of str
        Modules that are trained and averaged in full.
    """

    metric: str
    labels: np.ndarray
    label_names: tuple[str, ...]
    targets: tuple[str, ...]
    heads: tuple[str, ...]

    def model(self) -> nn.Module:
        """The pretrained base, always the same weights."""

    def loss(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        """Mean loss over training examples `rows`."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics on the held-out examples."""
