"""Plan, work and join in one go, on whatever runs workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

from ..errors import require, unfit
from ..state import State
from .join import join
from .plan import plan
from .work import Worked, work

__all__ = ["aggregate", "submit", "torchrun"]

RESTARTS = 3  # of all of torchrun's workers, once one was killed


def aggregate(
    folders: Sequence[str | os.PathLike[str]],
    job: str | os.PathLike[str],
    executor: Executor,
    workers: int,
    weights: Sequence[float] | None = None,
    **settings: Any,
) -> State:
    """`aggregate_adapters` on the processes of an executor, with what is done kept in a folder.

    Parameters
    ----------
    folders, weights, **settings
        As in `plan`.
    job : path
        Folder of the job. Where the same was planned before, it goes on; it is left at the end.
    executor : concurrent.futures.Executor
        ``ProcessPoolExecutor``, Dask's ``Client.get_executor()``, …: its processes must reach
        `job` and the clients by the same paths.
    workers : int
        How many shares the work is dealt into.

    Returns
    -------
    State

    Raises
    ------
    GloraError
        As `plan`, `work` and `join`.
    """
    plan(folders, job, weights, **settings)
    submit(job, executor, workers)
    return join(job)


def submit(job: str | os.PathLike[str], executor: Executor, workers: int) -> list[Worked]:
    """Have an executor work on a job that was planned; raises what the first worker raised."""
    require(workers >= 1, "workers", workers, "at least one")
    path = os.path.abspath(job)
    futures = [executor.submit(work, path, index, workers) for index in range(workers)]
    return [future.result() for future in futures]


def torchrun(
    job: str | os.PathLike[str],
    workers: int,
    restarts: int = RESTARTS,
    *,
    threads: int | None = None,
) -> None:
    """Have torchrun's local processes work on a job; raises `GloraError` where they fail.

    torchrun starts all of them again when one is killed, up to `restarts` times; what they had
    done is kept. Each computes on `threads`; by default on OMP_NUM_THREADS, or where that is not
    set on an equal share of the machine's.
    """
    require(workers >= 1, "workers", workers, "at least one")
    shared = max(1, (os.cpu_count() or 1) // workers)
    environment = {"OMP_NUM_THREADS": str(shared)} | os.environ
    environment |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={workers}", f"--max-restarts={restarts}",
            "-m", "glora_ops.job.worker", os.path.abspath(job),
        ],
        env=environment, check=False, stdout=sys.stderr,
    )  # fmt: skip
    if done.returncode:
        raise unfit(
            "torchrun",
            f"exit status {done.returncode}",
            "workers that end well",
            "what they refused stands above; finished parts are kept, the same command goes on",
        )
