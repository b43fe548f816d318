"""A job's clients as a worker has them: looked at again, and refused where they changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..adapters.adapter_config import CONFIG_NAME
from ..adapters.aligned_names import align_names
from ..adapters.places import Place
from ..adapters.read import EXAMPLES_NAME, TENSORS_NAME, Adapter, Layouts, inspect_adapter
from ..batches import check_ranks
from ..errors import Refusal, Refusals, Refused, require
from ..merging.aggregate import Inspected
from ..merging.selection import select
from ..runtime.overlap import overlapped
from ..values import value_faults
from .folder import Job
from .plan import fingerprint

__all__ = ["Careful", "look_again"]

_AS_IT_WAS = "put the files back as they were, or plan a new job"
_FILES = {
    "num_examples": EXAMPLES_NAME, "config_sha256": CONFIG_NAME,
    "size": TENSORS_NAME, "mtime_ns": TENSORS_NAME, "inode": TENSORS_NAME,
}  # fmt: skip


def look_again(job: Job) -> Inspected:
    """The clients of a plan by their headers; `Refused`, naming all that are not what they were."""
    entries = job.about["clients"]
    places = [Place(e["name"], Path(e["path"]), named=e["named"]) for e in entries]
    readable: dict[int, Adapter] = {}
    changed = Refusals()
    look = partial(inspect_adapter, max_bytes=job.about["max_file_bytes"], layouts=Layouts())
    there = [i for i, entry in enumerate(entries) if entry["files"] is not None]
    looked = overlapped(look, [places[i] for i in there])
    for i, (adapter, refusals) in zip(there, looked, strict=True):
        place, entry = places[i], entries[i]
        if adapter is None:
            changed += [replace(refusal, remedy=_AS_IT_WAS) for refusal in refusals]
            continue
        readable[i] = adapter
        now = fingerprint(adapter)
        changed += [
            Refusal(
                "the client is not what it was when the job was planned", place.name, file,
                None, f"{field} {now[field]!s:.16}", f"{entry['files'][field]!s:.16}", _AS_IT_WAS,
            )
            for field, file in _FILES.items()
            if now[field] != entry["files"][field]
        ][:1]  # fmt: skip
    if changed:
        raise Refused(changed)
    arguments = job.about["arguments"]
    aligned, _ = align_names(list(readable.values()), arguments["base"])
    patterns = arguments.get("include", ()), arguments.get("exclude", ())
    chosen = select(aligned, *patterns) if any(patterns) else aligned
    readable = dict(zip(readable, chosen, strict=True))
    clients = {i: adapter for i, adapter in readable.items() if entries[i]["kept"]}
    _check_parts(job, list(clients.values()))
    weights = [entry["weight"] for entry in entries]
    return Inspected(
        places,
        None if None in weights else weights,
        clients,
        readable,
        defaultdict(Refusals),
        arguments,
    )


def _check_parts(job: Job, adapters: Sequence[Adapter]) -> None:
    """Raise `GloraError` where a plan is not one of these clients, which an edited one may be."""
    about = job.about
    for what in ("modules", "dense"):
        held = {name for adapter in adapters for name in getattr(adapter, what)}
        planned = {name for part in about["parts"] for name in part[what]}
        require(held == planned, "plan", f"{len(planned)} {what}", f"the clients' {len(held)}",
                "plan a new job", file=str(job.folder))  # fmt: skip
    check_ranks(adapters, about["arguments"] | {"rank": about["rank"]})


class Careful(Adapter):
    """A client that refuses values which cannot be computed with when they are read."""

    @classmethod
    def of(cls, adapter: Adapter, modules: Collection[str]) -> Careful:
        """The client with some of its modules."""
        held = {name: adapter.modules[name] for name in modules if name in adapter.modules}
        return cls(**vars(adapter) | {"modules": held})

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        b, a = super().factors(module)
        found = self.modules[module]
        self._look_at({found.b_key: b, found.a_key: a})
        return b, a

    def read_into(self, module: str, b: Tensor, a: Tensor) -> None:
        """`factors` in rows: Bᵀ (r, d_out) into b, A into a."""
        left, right = self.factors(module)
        b.copy_(left.mT)
        a.copy_(right)

    def dense_tensor(self, name: str) -> Tensor:
        x = super().dense_tensor(name)
        if x.is_floating_point() and not bool(x.float().isfinite().all()):
            self._look_at({self.dense[name].key: x.float()})
        return x

    def _look_at(self, read: Mapping[str, Tensor]) -> None:
        remedy = "leave this client out, or find out why its training diverged"
        refusals = [
            Refusal(problem, self.name, TENSORS_NAME, key, found, expected, remedy)
            for key, fault in zip(read, value_faults(list(read.values())), strict=True)
            if fault is not None
            for problem, found, expected in (fault,)
        ]
        if refusals:
            raise Refused(refusals)
