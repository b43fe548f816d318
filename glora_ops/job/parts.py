"""One part of a job: the state of its modules in a file, and a receipt beside it.

The receipt is written last: a part without one is not there.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from inspect import signature
from typing import Any

import torch

from ..api import KEPT, aggregate, available
from ..arguments import check_settings, check_weights
from ..batches import solve
from ..errors import GloraError, require
from ..merging.aggregate import Inspected
from ..merging.modules_to_save import dense_holders, dense_means
from ..runtime.outputs import new_file, ours
from ..runtime.tensors import save_tensors
from ..state import State
from ..state_file import MARK, encode
from ..state_file import read as read_state
from .clients import Careful
from .folder import Job, refuse_link, write_sealed

__all__ = ["device_of", "is_made", "load_part", "make_part"]

_DEFAULTS = {name: p.default for name, p in signature(aggregate).parameters.items()}


def device_of(job: Job, environment: Mapping[str, str] = os.environ) -> torch.device:
    """Where this worker computes: of GPUs, the one of its rank on this machine."""
    if job.about["device"] == "cpu":
        return torch.device("cpu")
    places = (environment.get(name) for name in ("LOCAL_RANK", "SLURM_LOCALID"))
    return available(f"cuda:{next(filter(None, places), '0')}")


def processor(device: torch.device) -> str:
    """Its kind as torch tells them apart: what bits may depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def settings_of(job: Job) -> dict[str, Any]:
    """The settings that the job's state has of `aggregate`."""
    given = job.about["arguments"]
    kept = {name: given.get(name, _DEFAULTS[name]) for name in KEPT}
    return check_settings(kept) | {"rank": job.about["rank"]}


def solve_part(job: Job, found: Inspected, number: int, device: torch.device) -> State:
    """The state of a part's modules, of all clients."""
    part = job.about["parts"][number]
    given = job.about["arguments"]
    adapters = list(found.clients.values())
    names = tuple(adapter.name for adapter in adapters)
    voices, _ = found.voices
    settings = settings_of(job)
    weights = check_weights(voices, names, settings)
    modules = part["modules"]
    sources = [Careful.of(adapter, modules) for adapter in adapters]
    solver = {k: v for k, v in settings.items() if k not in ("missing", "normalise")}
    solved = solve(
        sources, modules, weights,
        [{name: m.scaling for name, m in source.modules.items()} for source in sources],
        settings["missing"], given.get("max_bytes"), None, None, None, device,
        client_statistics=given.get("client_statistics", True), **solver,
    )  # fmt: skip
    holders = {n: having for n, having in dense_holders(adapters).items() if n in part["dense"]}
    means = dense_means(sources, holders, voices, lambda step, done, total: None)
    return State({m: solved[m] for m in modules}, names, tuple(weights), settings, means)


def make_part(job: Job, found: Inspected, device: torch.device, number: int) -> None:
    """Compute a part and put it into its files."""
    begun = time.monotonic()
    state = solve_part(job, found, number, device)
    tensors, metadata, _ = encode(
        {
            "modules": list(state.modules),
            "clients": state.clients,
            "weights": state.weights,
            "settings": state.settings,
            "layout": None,
        },
        {name: vars(m) for name, m in state.modules.items()},
        state.dense,
    )
    seconds = time.monotonic() - begun
    try:
        path = job.part(number)
        refuse_link(path)
        with new_file(path, ours) as building:
            save_tensors(tensors, building, metadata)
        receipt = {
            "plan": job.digest,
            "state": json.loads(metadata[MARK])["sha256"],
            "bytes": path.stat().st_size,
            "seconds": seconds,
            "torch": torch.__version__,
            "processor": processor(device),
        }
        write_sealed(job.receipt(number), receipt)
    except GloraError:
        # Two workers at one part write the same bytes; the second finds the first one's there.
        with suppress(GloraError):
            if is_made(job, number):
                return
        raise


def is_made(job: Job, number: int) -> bool:
    """Whether a part is there, whole; raises `GloraError` where it is damaged."""
    if job.read(job.receipt(number), "receipt") is None:
        return False
    load_part(job, number)
    return True


def load_part(job: Job, number: int) -> State:
    """A part's state, every checksum of it checked."""
    receipt = job.read(job.receipt(number), "receipt")
    path = job.part(number)
    remedy = "glora job work makes it again"
    require(
        receipt is not None, "part", f"{number} is not made", "its files", remedy, file=str(path)
    )
    assert receipt is not None
    file = read_state(path)
    require(file.sha256 == receipt["state"], "part", f"{number} with another receipt",
            "what was written", remedy, file=str(path))  # fmt: skip
    state = State.of(file)
    part = job.about["parts"][number]
    fits = list(state.modules) == part["modules"] and state.dense.keys() == set(part["dense"])
    names = [entry["name"] for entry in job.about["clients"] if entry["kept"]]
    fits = fits and list(state.clients) == names and state.settings == settings_of(job)
    require(fits, "part", f"{number} of other modules, clients or settings", "the plan's", remedy,
            file=str(path))  # fmt: skip
    return state
