"""What a task is to the rest: a model, training examples with labels, and a way to be judged."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from ...errors import require
from ..seeds import numpy_stream

__all__ = ["Answer", "HeldOut", "Judged", "Task", "half"]

HeldOut = Literal["test", "validation"]  # what runs report, and what a sweep chooses on


class Answer(NamedTuple):
    """What a model answered to one held-out example, as JSON has it.

    Attributes
    ----------
    id : int or str
        Of the example, the same for every seed, method and model.
    prediction, truth : int, float, str or list of str
    score : float
        Larger is better: 1 where right, Rouge-L, minus the squared error.
    label : int, optional
        As in ``Task.labels``; None where no client could hold such an example.
    """

    id: int | str
    prediction: Any
    truth: Any
    score: float
    label: int | None


class Judged(NamedTuple):
    """Metrics on the held-out examples, and the answers they come from."""

    metrics: dict[str, float]
    answers: list[Answer]


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

    def evaluate(self, model: nn.Module) -> Judged:
        """Metrics and answers on the held-out examples."""
