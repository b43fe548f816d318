"""Methods and tasks by the names that configurations use: ours, and those of other packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import require
from .methods import METHODS, Method
from .tasks.base import HeldOut, Task

if TYPE_CHECKING:
    from .config import Config

__all__ = ["METHOD_GROUP", "TASK_GROUP", "find_method", "find_task", "register_method",
           "register_task"]  # fmt: skip

TaskFactory = Callable[["Config", int, Path | None, HeldOut], Task]

#: Entry points of an installed package, by the name that configurations use.
METHOD_GROUP, TASK_GROUP = "glora.methods", "glora.tasks"
#: Tasks that come with glora (`tasks.build`).
OWN_TASKS = ("digits", "glue", "superni")

_methods: dict[str, type[Method]] = {}
_tasks: dict[str, TaskFactory] = {}


def register_method(name: str, method: type[Method]) -> None:
    """Let configurations of this process say ``kind = name``.

    Parameters
    ----------
    name : str
        None of ours.
    method : type
        A frozen dataclass derived from `Method`; its fields become keys of ``[methods.LABEL]``.

    Notes
    -----
    An installed package needs no call: it declares an entry point in the group ``glora.methods``,
    which Flower's own processes and the command line find too.
    """
    fits = isinstance(method, type) and issubclass(method, Method)
    require(fits and dataclasses.is_dataclass(method), "method", repr(method),
            "a dataclass derived from glora_ops.fl.Method")  # fmt: skip
    _require_new(name, METHODS, method, _methods)
    _methods[name] = method


def register_task(kind: str, task: TaskFactory) -> None:
    """Let configurations of this process say ``task.kind = kind``.

    Parameters
    ----------
    kind : str
        None of ours.
    task : callable
        ``task(config, seed, data_dir, held_out)`` gives a `glora_ops.fl.tasks.Task`.

    Notes
    -----
    The group of entry points is ``glora.tasks``, otherwise as `register_method`.
    """
    require(callable(task), "task", repr(task), "a callable that makes a Task")
    _require_new(kind, OWN_TASKS, task, _tasks)
    _tasks[kind] = task


def find_method(name: str) -> type[Method]:
    """The method of that name; ours cannot be replaced."""
    found = METHODS.get(name) or _methods.get(name) or _installed(METHOD_GROUP, name)
    names = [*METHODS, *_methods, *sorted(entry_points(group=METHOD_GROUP).names)]
    require(found is not None, "kind", repr(name), f"one of {', '.join(names)}")
    return found


def find_task(kind: str) -> TaskFactory | None:
    """What makes a task of that kind; None for ours."""
    if kind in OWN_TASKS:
        return None
    found = _tasks.get(kind) or _installed(TASK_GROUP, kind)
    names = [*OWN_TASKS, *_tasks, *sorted(entry_points(group=TASK_GROUP).names)]
    require(found is not None, "kind", repr(kind), f"one of {', '.join(names)}")
    return found


def _installed(group: str, name: str) -> Any:
    """What an installed package declares under that name; only that one is imported."""
    return next((found.load() for found in entry_points(group=group, name=name)), None)


def _require_new(
    name: str, ours: Collection[str], thing: object, known: Mapping[str, object]
) -> None:
    free = name not in ours and known.get(name, thing) is thing
    require(free, "name", repr(name), f"one that is not taken: not {', '.join([*ours, *known])}")
