"""Rounds as TensorBoard scalars: a copy of metrics.jsonl to look at, which nothing reads back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import require

__all__ = ["mirror", "require_tensorboard"]


def require_tensorboard() -> None:
    require(
        find_spec("tensorboard") is not None,
        "TensorBoard",
        "no package tensorboard",
        "the extra tensorboard",
        "pip install 'glora[tensorboard]', or go without: metrics.jsonl holds all of it",
    )


@contextmanager
def mirror(folder: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give a function that writes a round's line as scalars below `folder`, or nowhere for None.

    A run that goes on gives all its lines again: TensorBoard drops those of the earlier start.
    """
    if folder is None:
        yield lambda line: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=0) as writer:

        def write(line: Mapping[str, Any]) -> None:
            for name, value in _scalars(line).items():
                writer.add_scalar(name, value, line["round"])
            writer.flush()

        yield write


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by path, as metrics/accuracy or by_rank/8/loss, and how many failed."""
    out = {"failures": float(len(line["failures"]))}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{path}/{key}", inner)
        elif isinstance(value, (int, float)):
            out[path] = float(value)

    for key, value in line.items():
        if key not in ("round", "processes"):
            walk(key, value)
    return out
