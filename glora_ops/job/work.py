"""A worker: its share of a job's checks and parts, each into a file, what is there left alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch

from ..errors import DamagedPartWarning, GloraError, Refusals, Refused, clean, require, unfit
from ..merging.aggregate import Inspected, Progress, examine, readers
from ..runtime.hidden import sweep
from ..runtime.outputs import ours
from ..runtime.threads import release_freed, workers
from .clients import look_again
from .folder import FOLDERS, Job, read_job, write_sealed
from .parts import device_of, is_made, make_part

__all__ = ["Share", "Worked", "share", "work"]


@dataclass(frozen=True)
class Share:
    """One of `of` workers; each takes every `of`-th check and part, from its `index` on."""

    index: int
    of: int


@dataclass
class Worked:
    """Numbers of the parts that a worker made, found made, and made anew because of damage."""

    made: list[int] = field(default_factory=list)
    found: list[int] = field(default_factory=list)
    again: list[int] = field(default_factory=list)


#: (index, count) as launchers tell them; Kubernetes tells the index only.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),  # torchrun
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("JOB_COMPLETION_INDEX", None),
)


def share(
    index: int | None = None, of: int | None = None, environment: Mapping[str, str] = os.environ
) -> Share:
    """Which worker this is: as given, or as the launcher says; else the only one.

    Raises
    ------
    GloraError
        An index without a number of workers, or beyond it.
    """
    if index is None:
        for name, count in _LAUNCHERS:
            if name not in environment:
                continue
            told = _whole(name, environment[name])
            if name == "SLURM_ARRAY_TASK_ID":  # an array need not begin at 0
                told -= _whole(name, environment.get("SLURM_ARRAY_TASK_MIN", "0"))
            if of is None and count is not None and count in environment:
                of = _whole(count, environment[count])
            require(of is not None, "of", f"nothing beside {name}={told}", "the number of workers",
                    "give it: --of N")  # fmt: skip
            index = told
            break
        else:
            require(of in (None, 1), "index", f"none of {of}", "this worker's number", "--index I")
            index, of = 0, 1
    require(
        of is not None, "of", f"nothing beside index {index}", "the number of workers", "--of N"
    )
    assert of is not None
    require(of >= 1 and 0 <= index < of, "index", f"{index} of {of}", f"0 to {of - 1}",
            "workers count from 0")  # fmt: skip
    return Share(index, of)


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise unfit(name, repr(text), "an integer", "give --index and --of instead") from None


def work(
    job: str | os.PathLike[str],
    index: int | None = None,
    of: int | None = None,
    *,
    progress: Progress | None = None,
) -> Worked:
    """Do a worker's share of a job, and nothing that is done.

    Parameters
    ----------
    job : path
        That `plan` made.
    index, of : int, optional
        As in `share`. Shares of different `of` may overlap: what another has done is not done
        again, and what two do at the same time is the same.
    progress : callable, optional
        As in `aggregate_adapters`, with the steps "values" and "modules".

    Returns
    -------
    Worked

    Raises
    ------
    Refused
        Clients that are not what they were when the job was planned, or whose values cannot be
        computed with: all of this worker's share, before any module is computed.
    GloraError
        No job, or a damaged plan; an index that is none.

    Notes
    -----
    As many parts are computed at a time as torch has threads, each on one; memory is their factors
    and what solving them needs. The bits are those of `aggregate_adapters`, which depend on neither
    threads nor shares.
    """
    tell: Progress = progress or (lambda step, done, total: None)
    mine = share(index, of)
    planned = read_job(job)
    outcome = Worked()
    for name in FOLDERS:
        sweep(planned.folder / name, ours)  # what killed workers were at
    numbers = range(mine.index, len(planned.about["parts"]), mine.of)
    todo = [number for number in numbers if not _is_there(planned, number, outcome)]
    checks = range(mine.index, len(planned.about["checks"]), mine.of)
    unchecked = [number for number in checks if not _is_checked(planned, number)]
    if not todo and not unchecked:
        return outcome
    device = device_of(planned)
    found = look_again(planned)
    _check(planned, found, unchecked, tell)
    _make(planned, found, device, todo, tell)
    outcome.made += [number for number in todo if number not in outcome.again]
    return outcome


def _is_there(job: Job, number: int, outcome: Worked) -> bool:
    try:
        there = is_made(job, number)
    except GloraError as error:
        warnings.warn(
            clean(f"part {number} is made again: {error}"), DamagedPartWarning, stacklevel=3
        )
        outcome.again.append(number)
        return False
    if there:
        outcome.found.append(number)
    return there


def _is_checked(job: Job, number: int) -> bool:
    with suppress(GloraError):
        check = job.read(job.check(number), "check")
        return check is not None and len(check["files"]) == len(job.about["checks"][number])
    return False


def _check(job: Job, found: Inspected, numbers: list[int], tell: Progress) -> None:
    """Read every value of some clients; `Refused` with all that is wrong."""
    refusals = Refusals()
    total = sum(len(job.about["checks"][number]) for number in numbers)
    done = 0
    with workers(readers(found.clients.values())) as pool:
        for number in numbers:
            clients = [found.clients[i] for i in job.about["checks"][number]]
            files = []
            for digest, wrong in pool.map(examine, clients):
                files.append(digest)
                refusals += wrong
                done += 1
                tell("values", done, total)
            if not refusals:
                write_sealed(job.check(number), {"plan": job.digest, "files": files})
    if refusals:
        raise Refused(refusals)


def _make(
    job: Job, found: Inspected, device: torch.device, numbers: list[int], tell: Progress
) -> None:
    """Make parts as `solve` runs batches: one a thread; a single one, or on a GPU, in turn."""
    make = partial(make_part, job, found, device)
    sizes = [len(job.about["parts"][number]["modules"]) for number in numbers]
    in_turn = len(job.about["parts"]) == 1 or device.type != "cpu"
    with nullcontext() if in_turn else workers(torch.get_num_threads()) as pool:
        made = map(make, numbers) if pool is None else pool.map(make, numbers)
        for done, _ in zip(accumulate(sizes), made, strict=True):
            release_freed()
            tell("modules", done, sum(sizes))
