"""A job's plan: the clients as they are, and which modules are computed together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from ..adapters.places import Place, find_places
from ..adapters.read import MAX_BYTES, Adapter
from ..api import aggregate
from ..batches import BATCH_BYTES, DEVICE_BATCH_BYTES
from ..batches import plan as batches_of
from ..errors import Refusal, listing, require
from ..merging.aggregate import (
    Inspected,
    Progress,
    examined,
    inspect,
    with_equal_copies,
)
from ..merging.modules_to_save import dense_holders
from ..runtime.outputs import apart, check_free, claimed, new_folder
from .folder import FOLDERS, PLAN_NAME, Job, check_fit, read_job, sealed, strangers
from .folder import MAX_BYTES as PLAN_BYTES

__all__ = ["plan"]

#: A check reads clients of about as many bytes, or of as many clients.
CHECK_BYTES, CHECK_CLIENTS = 2**28, 256
DEVICES = ("cpu", "cuda")
#: Of `aggregate_adapters`, which a state records.
_DEFAULTS = {
    name: signature(aggregate).parameters[name].default
    for name in ("rank", "basis", "missing", "captured")
}


def plan(
    folders: Sequence[str | os.PathLike[str] | Place],
    job: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    *,
    on_bad_client: str = "refuse",
    max_file_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
    known: Sequence[Refusal] = (),
    **settings: Any,
) -> Job:
    """Check clients by their headers, and write down what is to be done to aggregate them.

    Parameters
    ----------
    folders, weights, on_bad_client, max_file_bytes, progress
        As in `aggregate_adapters`. With "refuse" the clients' values are read by the workers; with
        "skip" they are read here, every byte, because whoever is left out changes every module.
    job : path
        New folder; one that holds the same plan is left as it is, with all that was done.
    known : sequence of Refusal
        What the caller refuses already, to be listed with the rest.
    **settings
        Of `aggregate_adapters`, but ``rank="auto"`` and ``robust``, which need all modules several
        times, one time after the other. `device` is "cpu" or "cuda": every worker takes the GPU of
        its local rank (LOCAL_RANK, SLURM_LOCALID).

    Returns
    -------
    Job

    Raises
    ------
    Refused
        As `aggregate_adapters` does, but for values that are not read here.
    GloraError
        Arguments that no job has; a folder that is there and holds anything else.
    """
    tell: Progress = progress or (lambda step, done, total: None)
    arguments = _DEFAULTS | settings
    refusals = list(known)
    device = arguments.pop("device", "cpu")
    with listing(refusals):
        require(device in DEVICES, "device", repr(device), f"one of {DEVICES}",
                "of several GPUs each worker takes the one of its local rank")  # fmt: skip
    for name, refused, remedy in (
        ("rank", "auto", "find the rank by aggregating a few clients, and give it"),
        ("robust", arguments.get("robust"), "a verdict needs all modules first: aggregate as one"),
        ("warm", arguments.pop("warm", None), "aggregate as one"),
        ("scratch", arguments.pop("scratch", None), "aggregate as one, or with more memory"),
    ):
        with listing(refusals):
            expected = "an integer" if name == "rank" else "none"
            require(refused is None or settings.get(name) != refused, name, repr(refused),
                    f"{expected}: a job computes every module once, by itself", remedy)  # fmt: skip
    place = Path(os.path.realpath(job))
    with listing(refusals):
        apart(job, [place.path for place in find_places(folders)])
        if not (place / PLAN_NAME).is_file():
            require(not os.path.lexists(place), "job", f"the existing {str(place)!r}",
                    "a new folder, or one with the same plan", "choose another",
                    file=str(place))  # fmt: skip
            check_free(place, strangers)
    found = inspect(
        folders, weights, on_bad_client=on_bad_client, max_file_bytes=max_file_bytes, tell=tell,
        known=refusals, **arguments,
    )  # fmt: skip
    digests: dict[int, str] = {}
    if on_bad_client == "skip":
        found, digests = examined(found, on_bad_client, tell, {})
    else:
        found = with_equal_copies(found, on_bad_client)
    about = sealed(_content(found, digests, max_file_bytes, device))
    check_fit(about, "plan", place, "leave out what aggregate_adapters does not know")
    text = json.dumps(about)
    require(len(text) <= PLAN_BYTES, "plan", f"{len(text)} bytes of {len(found.places)} clients",
            f"at most {PLAN_BYTES}", "plan groups of them, or take shorter paths")  # fmt: skip
    with claimed(place, strangers):  # which clears away what a killed one left
        if (place / PLAN_NAME).is_file():
            require(read_job(place).about == about, "job",
                    f"{str(place)!r}, which holds another plan", "a new folder",
                    "choose another, or remove it", file=str(place))  # fmt: skip
            return Job(place, about)
        with new_folder(place, strangers, overwrite=False) as building:
            for name in FOLDERS:
                (building / name).mkdir()
            (building / PLAN_NAME).write_text(text, encoding="utf-8")
    return Job(place, about)


def _content(
    found: Inspected, digests: dict[int, str], max_file_bytes: int, device: str
) -> dict[str, Any]:
    adapters = list(found.clients.values())
    modules = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    wanted = BATCH_BYTES if device == "cpu" else DEVICE_BATCH_BYTES
    limit = found.arguments.get("max_bytes") or wanted
    batches = batches_of(adapters, modules, min(wanted, limit))
    parts: list[dict[str, Any]] = [
        {"modules": list(batch.modules), "dense": [], "bytes": batch.bytes} for batch in batches
    ]
    for i, (name, having) in enumerate(dense_holders(adapters).items()):
        part = parts[-1 - i % len(parts)]  # the smallest first
        part["dense"].append(name)
        infos = (adapters[j].stored.tensors[adapters[j].dense[name].key] for j in having)
        part["bytes"] += sum(info.end - info.begin for info in infos)
    largest = max(m.rank for adapter in adapters for m in adapter.modules.values())
    unread = [i for i in found.clients if i not in digests]
    return {
        "format_version": 1,
        "arguments": found.arguments,
        "device": device,
        "rank": found.arguments.get("rank") or 2 * largest,
        "max_file_bytes": max_file_bytes,
        "skipped": found.skipped,
        "clients": [
            {
                "name": place.name,
                "path": str(place.path),
                "named": place.named,
                "weight": None if found.weights is None else float(found.weights[i]),
                "kept": i in found.clients,
                "files": fingerprint(found.readable[i]) if i in found.readable else None,
                "sha256": digests.get(i) if i in found.clients else None,
            }
            for i, place in enumerate(found.places)
        ],
        "parts": parts,
        "checks": list(_checks(unread, found.clients)),
    }


def fingerprint(adapter: Adapter) -> dict[str, Any]:
    """What tells that a client's files are no longer the same, as `schema.Files` or `Object`."""
    names = ("size", "mark") if adapter.waits else ("size", "mtime_ns", "inode")
    return dict(zip(names, adapter.stored.signature, strict=True)) | {
        "num_examples": adapter.num_examples,
        "config_sha256": adapter.config_sha256,
    }


def _checks(unread: Iterable[int], clients: dict[int, Adapter]) -> Iterator[list[int]]:
    """Clients in runs that are read by one worker."""
    run: list[int] = []
    size = 0
    for i in unread:
        run.append(i)
        size += clients[i].stored.signature[0]
        if size >= CHECK_BYTES or len(run) == CHECK_CLIENTS:
            yield run
            run, size = [], 0
    if run:
        yield run
