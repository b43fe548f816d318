"""Plan, work and join in one go, on whatever runs workers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..adapters.places import Place
from ..adapters.read import MAX_BYTES
from ..errors import require, unfit
from ..merging.aggregate import Progress, merge, warn_of
from ..state import State
from .folder import FOLDERS, PLAN_NAME, read_job
from .join import join
from .plan import plan
from .work import Worked, work

__all__ = ["ATTENDED", "aggregate_adapters", "engine", "in_parts", "remove", "submit", "torchrun"]

Engine = Callable[[Path], object]
#: To a worker: its standard input ends with whoever started it.
ATTENDED = "--attended"
RESTARTS = 3  # of all of torchrun's workers, once one was killed


def in_parts(
    folders: Sequence[str | os.PathLike[str] | Place],
    weights: Sequence[float] | None,
    job: str | os.PathLike[str],
    do: Engine,
    readouts: Sequence[int] = (),
    **how: Any,
) -> State:
    """`plan`, have `do` work on the job in its folder, and `join`; warns as `merge` does."""
    planned = plan(folders, job, weights, readouts=readouts, **how)
    warn_of(planned.about["skipped"])
    do(planned.folder)
    return join(planned.folder, readouts=readouts)


def engine(name: str, workers: int | None, device: str, threads: int | None) -> Engine:
    """What has workers of torchrun or Ray work on a job; by default one a GPU or processor."""
    on_gpus = device == "cuda"
    count = workers or (torch.cuda.device_count() if on_gpus else os.cpu_count()) or 1
    if name == "torchrun":
        return partial(torchrun, workers=count, threads=threads)

    def on_ray(place: Path) -> None:
        from .ray import RayExecutor

        submit(place, RayExecutor(gpus=int(on_gpus)), count)

    return on_ray


def remove(job: str | os.PathLike[str]) -> None:
    """Remove a job's folder, all but what `glora job` did not write there."""
    planned = read_job(job)
    about = planned.about
    parts = range(len(about["parts"]))
    files = [planned.part(number) for number in parts]
    files += [planned.receipt(number) for number in parts]
    files += [planned.check(number) for number in range(len(about["checks"]))]
    for path in [*files, planned.folder / PLAN_NAME]:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # strangers
        for folder in (*(planned.folder / name for name in FOLDERS), planned.folder):
            folder.rmdir()


def submit(job: str | os.PathLike[str], executor: Executor, workers: int) -> list[Worked]:
    """Have an executor work on a job that was planned; raises what the first worker raised."""
    require(workers >= 1, "workers", workers, "at least one")
    path = os.path.abspath(job)
    futures = [executor.submit(work, path, index, workers) for index in range(workers)]
    return [future.result() for future in futures]


def aggregate_adapters(
    folders: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    *,
    rank: int | str | None = None,
    basis: str = "consensus",
    missing: str = "zero",
    dense: str = "mean",
    on_bad_client: str = "refuse",
    base: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    captured: float = 0.9,
    max_file_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
    executor: Executor | None = None,
    job: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    **settings: Any,
) -> State:
    """Aggregate PEFT LoRA folders into one server state.

    All headers are checked before any tensor is read, then all values before anything is computed;
    each time every problem of every client is collected. Then factors are read module by module,
    a few ahead of the computation, and dropped: memory is the state, the factors of `max_bytes`
    (see `aggregate`) and the solver's own. So every file is read twice, the second time from the
    system's cache where it has room; with ``rank="auto"`` once more for every rank tried.

    Parameters
    ----------
    folders : sequence of path
        One per client, each written by ``PeftModel.save_pretrained``, or its URL, which fsspec
        reads with the credentials of the environment; ``NAME=PATH`` names the client, which is
        otherwise called by its folder (and the parents that tell it from others).
    weights : sequence of float, optional
        One per folder. By default the ``num_examples`` in the clients' ``glora.json`` if every
        client has it, otherwise equal; ``settings["weights_from"]`` of the state says which.
    rank, basis, missing, captured
        As in `aggregate`.
    dense : {"mean", "refuse"}
        What to do with modules saved in full, such as classifier heads: their weighted mean over
        the clients that have them, or refuse such clients.
    on_bad_client : {"refuse", "skip"}
        Raise, or go on without the client, with a warning and an entry in
        ``settings["skipped"]``; the weights of the others stand.
    base : str, optional
        Vouches that all clients adapt the same base although its names differ, and names it.
    include, exclude : sequence of str
        Only modules whose path, or the end of it after a dot, matches a pattern of `include` (if
        there are any) and none of `exclude`: ``["q_proj", "*.layers.0.*"]``. Weights saved in full
        are not modules: `dense` decides on them.
    max_file_bytes : int
        Largest tensor file that is accepted from a client.
    progress : callable, optional
        Called as ``progress(step, done, total)``, step being "headers", "values", "modules" or
        "dense"; what workers of an executor do is not told.
    executor : concurrent.futures.Executor, optional
        Whose workers compute, as parts of a job: ``ProcessPoolExecutor``, Dask's
        ``Client.get_executor()``, `job.ray.RayExecutor`, …. They must reach `job` and the folders
        by the same paths. The state is the same, to the bit.
    job : path, optional
        Folder of that job, as in `job.plan`: parts that are made are kept there, so that the same
        call goes on after a kill. Without an executor this process makes them. By default a
        temporary folder of this machine, where there is an executor; else there is no job.
    workers : int, optional
        How many shares the executor gets; by default as many as this machine has processors.
    **settings
        Passed on to `aggregate`: robust, normalise, tau_rel, anchor, seed, device, …. With
        `robust` all factors are read once more.

    Returns
    -------
    State
        Whose settings also hold ``weights_from``, ``skipped`` (the reasons), ``remarks`` (what was
        found out about the clients' files) and ``dense_from`` (the clients that had a dense
        tensor, where some had not), and whose ``record`` is what `update_adapters` needs.

    Raises
    ------
    Refused
        With every reason that was found.
    GloraError
        If an argument is none of the above.
    """
    how: dict[str, Any] = settings | {
        "rank": rank, "basis": basis, "missing": missing, "dense": dense,
        "on_bad_client": on_bad_client, "base": base, "include": include, "exclude": exclude,
        "captured": captured, "max_file_bytes": max_file_bytes, "progress": progress,
    }  # fmt: skip
    if executor is None and job is None:
        return merge(folders, weights, **how)

    def do(place: Path) -> object:
        if executor is None:
            return work(place, 0, 1, progress=progress)
        return submit(place, executor, workers or os.cpu_count() or 1)

    if job is not None:
        return in_parts(folders, weights, job, do, **how)
    with tempfile.TemporaryDirectory(prefix="glora-") as made:
        return in_parts(folders, weights, Path(made) / "job", do, **how)


def torchrun(
    job: str | os.PathLike[str],
    workers: int,
    restarts: int = RESTARTS,
    *,
    threads: int | None = None,
) -> None:
    """Have torchrun's local processes work on a job; raises `GloraError` where they fail.

    torchrun starts all of them again when one is killed, up to `restarts` times; what they had
    done is kept. When this process ends, by SIGKILL too, so do they. Each computes on `threads`; by
    default on OMP_NUM_THREADS, or where that is not set on an equal share of the machine's.
    """
    require(workers >= 1, "workers", workers, "at least one")
    shared = max(1, (os.cpu_count() or 1) // workers)
    environment = {"OMP_NUM_THREADS": str(shared)} | os.environ
    environment |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    # Workers stop where their input ends: with this process, however that ends.
    heard, held = os.pipe()
    try:
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc-per-node={workers}", f"--max-restarts={restarts}",
                "-m", "glora_ops.job.worker", os.path.abspath(job), ATTENDED,
            ],
            env=environment, check=False, stdin=heard, stdout=sys.stderr,
        )  # fmt: skip
    finally:
        os.close(heard)
        os.close(held)
    if done.returncode:
        raise unfit(
            "torchrun",
            f"exit status {done.returncode}",
            "workers that end well",
            "what they refused stands above; finished parts are kept, the same command goes on",
        )
