"""The end of a job: its parts as one state."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from ..batches import check_ranks
from ..errors import GloraError, Refusal, Refusals, Refused, clean
from ..merging.aggregate import described
from ..merging.modules_to_save import dense_holders
from ..state import State
from ..state_report import notes
from .clients import look_again
from .folder import Job, read_job
from .parts import load_part

__all__ = ["join"]


def join(job: str | os.PathLike[str], *, readouts: Sequence[int] = ()) -> State:
    """The state of a job whose parts are all made: that of `aggregate_adapters`, to the bit.

    Parameters
    ----------
    job : path
    readouts : sequence of int
        Ranks that the caller will read out: absurd ones are refused.

    Raises
    ------
    Refused
        Parts and checks that are missing, damaged, of another plan, or made by different versions
        of torch or kinds of processors, by their numbers; clients that changed.
    GloraError
        No job, or a damaged plan.

    Warns
    -----
    GloraWarning
        As `aggregate`.

    Notes
    -----
    Reads headers, the parts, and the base weights that clients saved beside adapted embeddings.
    Nothing of the job is changed.
    """
    planned = read_job(job)
    refusals = Refusals()
    digests = _digests(planned, refusals)
    parts = _parts(planned, refusals)
    if refusals:
        raise Refused(refusals)
    found = look_again(planned)
    adapters = list(found.clients.values())
    check_ranks(adapters, {"rank": planned.about["rank"]}, readouts)
    made = {name: m for part in parts for name, m in part.modules.items()}
    dense = {name: x for part in parts for name, x in part.dense.items()}
    order = dict.fromkeys(name for adapter in adapters for name in adapter.modules)
    first = parts[0]
    state = State(
        {name: made[name] for name in order}, first.clients, first.weights, first.settings
    )
    for note in notes(state):
        if note.category is not None:
            warnings.warn(clean(note.text), note.category, stacklevel=2)
    means = {name: dense[name] for name in dense_holders(adapters)}
    return described(found, digests, state, means, planned.about["skipped"])


def _digests(job: Job, refusals: Refusals) -> dict[int, str]:
    """SHA-256 of the clients' files, by place."""
    digests = {i: e["sha256"] for i, e in enumerate(job.about["clients"]) if e["sha256"]}
    for number, clients in enumerate(job.about["checks"]):
        try:
            check = job.read(job.check(number), "check")
        except GloraError as error:
            refusals += error.refusals
            continue
        if check is None or len(check["files"]) != len(clients):
            refusals.append(_missing(job, f"check {number}", str(job.check(number))))
        else:
            digests |= zip(clients, check["files"], strict=True)
    return digests


def _parts(job: Job, refusals: Refusals) -> list[State]:
    parts: list[State] = []
    makers: dict[tuple[str, str], int] = {}
    for number in range(len(job.about["parts"])):
        try:
            receipt = job.read(job.receipt(number), "receipt")
            if receipt is None:
                refusals.append(_missing(job, f"part {number}", str(job.part(number))))
                continue
            makers.setdefault((receipt["torch"], receipt["processor"]), number)
            parts.append(load_part(job, number))
        except GloraError as error:
            refusals += error.refusals
    if len(makers) > 1:
        refusals.append(
            Refusal(
                "parts were made by different versions of torch or kinds of processors",
                found="; ".join(f"{' on '.join(m)} (part {n})" for m, n in makers.items()),
                expected="one of each, so that the bits are those of one process",
                remedy="remove the parts of one kind, and have the other make them",
            )
        )
    return parts


def _missing(job: Job, what: str, file: str) -> Refusal:
    return Refusal(
        f"{what} is not made",
        file=file,
        found="no such file",
        expected="all checks and parts of the plan",
        remedy=f"glora job work {job.folder} makes what is missing",
    )
