"""How far a job is."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from ..errors import GloraError
from .folder import read_job

__all__ = ["Status", "status"]


@dataclass(frozen=True)
class Status:
    """What of a job is done.

    Attributes
    ----------
    parts, checks : int
        There are.
    missing, unchecked : list of int
        Numbers of those that are not made; of a damaged file only what its size tells.
    seconds : float
        That one thread took for the parts that are made.
    left : float or None
        That one thread will take for the rest, by bytes of factors; None while none is made.
    """

    parts: int
    checks: int
    missing: list[int]
    unchecked: list[int]
    seconds: float
    left: float | None


def status(job: str | os.PathLike[str]) -> Status:
    """What of a job is done, from receipts and sizes; `join` looks at every byte.

    Raises
    ------
    GloraError
        No job, or a damaged plan.
    """
    planned = read_job(job)
    parts, checks = planned.about["parts"], planned.about["checks"]
    missing, unchecked = [], []
    seconds, read = 0.0, 0
    for number, part in enumerate(parts):
        receipt = None
        with suppress(GloraError, OSError):
            receipt = planned.read(planned.receipt(number), "receipt")
            if receipt is not None and planned.part(number).stat().st_size != receipt["bytes"]:
                receipt = None
        if receipt is None:
            missing.append(number)
        else:
            seconds += receipt["seconds"]
            read += part["bytes"]
    for number in range(len(checks)):
        check = None
        with suppress(GloraError):
            check = planned.read(planned.check(number), "check")
        if check is None:
            unchecked.append(number)
    rest = sum(parts[number]["bytes"] for number in missing)
    left = 0.0 if not missing else seconds * rest / read if read else None
    return Status(len(parts), len(checks), missing, unchecked, seconds, left)
