"""Client folders in, one server state out."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter_config import CONFIG_NAME
from ..adapters.aligned_names import align_names
from ..adapters.compatible import adapter_layout, check_base_copies, check_compatible, incompatible
from ..adapters.places import Place, find_places
from ..adapters.read import (
    EXAMPLES_NAME,
    MAX_BYTES,
    TENSORS_NAME,
    Adapter,
    Layouts,
    inspect_adapters,
)
from ..adapters.value_checks import check_values
from ..api import aggregate
from ..arguments import check_settings, check_weights
from ..batches import check_ranks
from ..errors import Refusal, Refusals, Refused, SkippedClientWarning, clean, listing, require
from ..inner_products import check_pairs
from ..runtime.overlap import READERS
from ..runtime.threads import release_freed, workers
from ..state import State
from ..state_file import check_saveable
from .modules_to_save import (
    base_copies,
    dense_holders,
    dense_means,
    heeded,
    unequal,
    with_dense,
    without_mean,
)
from .selection import check_patterns, select, unselected

__all__ = [
    "Inspected",
    "Progress",
    "described",
    "examine",
    "examined",
    "inspect",
    "merge",
    "readers",
    "warn_of",
    "with_equal_copies",
]

Progress = Callable[[str, int, int], None]

# Batches between which freed memory goes back to the system: after each, a tenth of the time went
# into having it again (bench/test_folders.py), and it would be kept up to 64 MB a thread.
RELEASE = 8
# Bytes of files from which a thread's turn is worth its cost.
HANDFUL = 2**22


@dataclass(frozen=True)
class Inspected:
    """Clients whose headers are in order, and what is to be made of them.

    Attributes
    ----------
    places : list of Place
        All that were named.
    weights : sequence of float or None
        As given, one for each of `places`.
    clients : dict of int to Adapter
        Those that nothing is held against, by place.
    readable : dict of int to Adapter
        Those whose headers could be read: names are common to all of them.
    refused : mapping of int to Refusals
        What is held against others, by place.
    arguments : dict
        dense, base, include and exclude if there are any, and checked settings of `aggregate`.
    """

    places: list[Place]
    weights: Sequence[float] | None
    clients: dict[int, Adapter]
    readable: dict[int, Adapter]
    refused: Mapping[int, Refusals]
    arguments: dict[str, Any]

    @property
    def voices(self) -> tuple[list[float], str]:
        """One weight per client, not normalised, and where they come from."""
        return _voices(self.clients, self.weights)

    @property
    def skipped(self) -> list[str]:
        """Why others were left out."""
        # Shortened: they are kept in the state, and clients decide how long their values are.
        return [f"{refusal!s:.2000}" for refusals in self.refused.values() for refusal in refusals]


def merge(
    folders: Sequence[str | os.PathLike[str] | Place],
    weights: Sequence[float] | None,
    *,
    on_bad_client: str = "refuse",
    progress: Progress | None = None,
    entries: Mapping[int, Mapping[str, Any]] | None = None,
    **how: Any,
) -> State:
    """`aggregate_adapters` in this process, listing what its caller refuses already, `known`, too.

    Not public: for the command line and `renew`, whose own refusals belong into the same list.
    `entries` are what an earlier state recorded of some of the clients, by place: a client that
    is not the same any more is refused. Everything else is as in `inspect`.
    """
    tell: Progress = progress or (lambda step, done, total: None)
    found = inspect(
        folders, weights, on_bad_client=on_bad_client, tell=tell, recorded=entries or (), **how
    )
    found, digests = examined(found, on_bad_client, tell, entries or {})
    skipped = found.skipped
    warn_of(skipped)

    release_freed()  # what reading took

    adapters = list(found.clients.values())
    voices, _ = found.voices

    turn = count(1)

    def tell_modules(done: int, total: int) -> None:
        if next(turn) % RELEASE == 0:
            release_freed()
        tell("modules", done, total)

    own = ("dense", "base", "include", "exclude")
    settings = {k: v for k, v in found.arguments.items() if k not in own}
    state = aggregate(
        adapters,
        voices,
        scalings(adapters),
        names=[adapter.name for adapter in adapters],
        progress=tell_modules,
        **settings,
    )
    release_freed()  # the stacks' memory, before anything else is made
    means = dense_means(adapters, dense_holders(adapters), heeded(state, voices), tell)
    return described(found, digests, state, means, skipped)


def scalings(adapters: Sequence[Adapter]) -> list[dict[str, float]]:
    """Of each client by module; clients of one layout share theirs."""
    layouts = {id(adapter.modules): adapter.modules for adapter in adapters}
    found = {i: {name: m.scaling for name, m in held.items()} for i, held in layouts.items()}
    return [found[id(adapter.modules)] for adapter in adapters]


def warn_of(skipped: Sequence[str]) -> None:
    """Warn the caller of whoever calls `aggregate_adapters` of clients that were left out."""
    if skipped:
        warnings.warn(clean("left out:\n" + "\n".join(skipped)), SkippedClientWarning, stacklevel=4)


def inspect(
    folders: Sequence[str | os.PathLike[str] | Place],
    weights: Sequence[float] | None,
    *,
    dense: str = "mean",
    on_bad_client: str = "refuse",
    base: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_file_bytes: int = MAX_BYTES,
    tell: Progress = lambda step, done, total: None,
    planned: Callable[[Sequence[Adapter]], None] | None = None,
    known: Sequence[Refusal] = (),
    recorded: Collection[int] = (),
    readouts: Sequence[int] = (),
    **settings: Any,
) -> Inspected:
    """The clients by their headers; no value is read.

    `readouts` are ranks that the caller will read out: absurd ones are refused before the work.
    `recorded` are the places of clients that should be as an earlier state recorded them.
    `planned` is called with the clients whose headers are in order.
    """
    require(
        not isinstance(folders, (str, os.PathLike)),
        "folders",
        repr(folders),
        "a list of folders",
        "put the one folder into a list",
    )
    places = find_places(folders)

    # What no client is to blame for cannot be skipped with one.
    common = list(known)
    for name, patterns in (("include", include), ("exclude", exclude)):
        with listing(common):
            check_patterns(name, patterns)
    with listing(common):
        require(dense in ("mean", "refuse"), "dense", repr(dense), "'mean' or 'refuse'")
    with listing(common):
        require(
            on_bad_client in ("refuse", "skip"),
            "on_bad_client",
            repr(on_bad_client),
            "'refuse' or 'skip'",
        )
    with listing(common):
        settings |= check_settings(settings)
    with listing(common):
        if settings.get("robust") is not None:
            check_pairs(len(folders))
    with listing(common):
        check_weights(weights, [place.name for place in places], settings)

    refused: dict[int, Refusals] = defaultdict(Refusals)
    clients: dict[int, Adapter] = {}
    inspected = inspect_adapters(places, max_bytes=max_file_bytes, layouts=Layouts())
    for i, (adapter, refusals) in enumerate(inspected):
        if adapter is None and i in recorded:
            refused[i] += [replace(refusal, remedy=_AS_IT_WAS) for refusal in refusals]
        elif adapter is None:
            refused[i] += refusals
        else:
            clients[i] = adapter
        tell("headers", i + 1, len(folders))
    if clients:
        aligned, problems = align_names(list(clients.values()), base)
        clients = dict(zip(clients, aligned, strict=True))
        _note(refused, clients, problems + incompatible(aligned, base))
    if (include or exclude) and not common:
        chosen = select(list(clients.values()), include, exclude)
        for (i, adapter), left in zip(clients.items(), chosen, strict=True):
            if not left.modules:
                refused[i].append(unselected(adapter, include, exclude))
        clients = dict(zip(clients, chosen, strict=True))
    if dense == "refuse":
        _note(refused, clients, with_dense(list(clients.values())))
    good = {i: adapter for i, adapter in clients.items() if not refused.get(i)}
    if good and not common:
        voices, _ = _voices(good, weights)
        if weights is None or len(good) < len(places):  # otherwise they have been checked
            with listing(common):
                check_weights(voices, [adapter.name for adapter in good.values()], settings)
        common += without_mean(list(good.values()), voices)
    readable, clients = clients, _settle(clients, refused, on_bad_client, common)
    check_ranks(list(clients.values()), settings, readouts)
    check_saveable(
        len(clients),
        (
            _entry(adapter, False, "0" * 64, None) | {"path": adapter.path.name}
            for adapter in clients.values()
        ),
    )
    if planned is not None:
        planned(list(clients.values()))
    arguments = {"dense": dense, "base": base} | settings
    arguments |= {k: list(v) for k, v in (("include", include), ("exclude", exclude)) if v}
    return Inspected(places, weights, clients, readable, refused, arguments)


def examined(
    found: Inspected,
    on_bad_client: str,
    tell: Progress,
    entries: Mapping[int, Mapping[str, Any]],
) -> tuple[Inspected, dict[int, str]]:
    """The clients whose values are in order too, and the SHA-256 of their files, by place."""
    digests: dict[int, str] = {}

    def examine_all(places: Sequence[int]) -> list[tuple[str, list[Refusal]]]:
        return [examine(found.clients[i]) for i in places]

    with workers(readers(found.clients.values())) as pool:
        runs = list(_runs(found.clients))
        for places, told in zip(runs, pool.map(examine_all, runs), strict=True):
            for i, (digest, refusals) in zip(places, told, strict=True):
                digests[i] = digest
                if i in entries and not refusals:
                    refusals = _changes(found.clients[i], digest, entries[i])
                if refusals:
                    found.refused[i].extend(refusals)
                tell("values", len(digests), len(found.clients))
    return with_equal_copies(found, on_bad_client), digests


def readers(clients: Iterable[Adapter]) -> int:
    """Threads that read whole files: the caller's, or as many as may wait for a server."""
    return max(torch.get_num_threads(), READERS * any(adapter.waits for adapter in clients))


def _runs(clients: Mapping[int, Adapter]) -> Iterator[list[int]]:
    """Clients that a thread looks at one after the other: small ones in handfuls."""
    run: list[int] = []
    size = 0
    for i, adapter in clients.items():
        run.append(i)
        size += adapter.stored.signature[0]
        if size >= HANDFUL:
            yield run
            run, size = [], 0
    if run:
        yield run


def with_equal_copies(found: Inspected, on_bad_client: str) -> Inspected:
    """The clients that agree with most in what they saved in full and should have in common."""
    for differing in (check_base_copies, unequal):
        _note(found.refused, found.clients, differing(list(found.clients.values())))
    return replace(found, clients=_settle(found.clients, found.refused, on_bad_client, []))


def described(
    found: Inspected,
    digests: Mapping[int, str],
    state: State,
    means: Mapping[str, Tensor],
    skipped: Sequence[str],
) -> State:
    """What was solved, with full weights and all that is known of the clients' files."""
    adapters = list(found.clients.values())
    names = [adapter.name for adapter in adapters]
    _, weights_from = found.voices
    copies, uneven = base_copies(adapters)
    layout = adapter_layout(adapters, found.arguments["base"])
    if found.arguments.keys() & {"include", "exclude"}:
        layout["exact"] = True  # names that end alike are not adapted with those that are
    recorded = {
        "weights_from": weights_from,
        "skipped": list(skipped),
        "remarks": [*(f"{a.name}: {remark}" for a in adapters for remark in a.remarks), *uneven],
        "dense_from": {
            name: [names[i] for i in having]
            for name, having in dense_holders(adapters).items()
            if len(having) < len(adapters)
        },
    }
    return replace(
        state,
        settings=state.settings | recorded,
        dense={**means, **copies},
        layout=layout,
        record={
            "arguments": {
                name: value
                for name, value in sorted(found.arguments.items())
                if name not in ("warm", "scratch", "device")
            },
            "clients": [
                _entry(
                    adapter,
                    found.places[i].named,
                    digests[i],
                    None if found.weights is None else float(found.weights[i]),
                )
                for i, adapter in found.clients.items()
            ],
        },
    )


_AS_IT_WAS = (
    "put the files back as they were, name the client's new folder with add (--add DIR; one of "
    "the same name takes its place), or withdraw the client with remove (--remove NAME)"
)


def examine(adapter: Adapter) -> tuple[str, list[Refusal]]:
    """SHA-256 of a client's tensor file, and what is wrong with its values."""
    digest = hashlib.sha256()
    refusals = check_values(adapter, digest)
    return digest.hexdigest(), refusals


def _entry(adapter: Adapter, named: bool, digest: str, weight: float | None) -> dict[str, Any]:
    """What a state records of a client."""
    return {
        "name": adapter.name,
        "named": named,
        "path": str(adapter.path),
        "weight": weight,
        "num_examples": adapter.num_examples,
        "bytes": adapter.stored.signature[0],
        "sha256": digest,
        "config_sha256": adapter.config_sha256,
        "ranks": sorted({m.rank for m in adapter.modules.values()}),
        "scalings": sorted({m.scaling for m in adapter.modules.values()}),
    }


def _changes(adapter: Adapter, digest: str, entry: Mapping[str, Any]) -> list[Refusal]:
    """In what a client differs from what was recorded of it."""
    compared: list[tuple[str, str, object]] = [
        (TENSORS_NAME, "sha256", digest),
        (CONFIG_NAME, "config_sha256", adapter.config_sha256),
    ]
    if entry["weights_from"] != "given":
        compared.append((EXAMPLES_NAME, "num_examples", adapter.num_examples))
    return [
        Refusal(
            "the client is not what it was when the state was made",
            adapter.name,
            file,
            None,
            f"{field} {found!s:.16}",
            f"{entry[field]!s:.16}",
            _AS_IT_WAS,
        )
        for file, field, found in compared
        if found != entry[field]
    ]


def _note(
    refused: Mapping[int, Refusals],
    clients: dict[int, Adapter],
    problems: Sequence[tuple[int, Refusal]],
) -> None:
    """File problems that count along `clients` under the clients' own numbers."""
    numbers = list(clients)
    for i, refusal in problems:
        refused[numbers[i]].append(refusal)


def _settle(
    clients: dict[int, Adapter],
    refused: Mapping[int, Refusals],
    on_bad_client: str,
    common: Sequence[Refusal],
) -> dict[int, Adapter]:
    """The clients nothing is held against; raises where the caller, or the lack of any, says so."""
    good = {i: adapter for i, adapter in clients.items() if not refused.get(i)}
    reasons = [*common, *(refusal for i in sorted(refused) for refusal in refused[i])]
    if not good:
        raise Refused([*reasons, *check_compatible([])])
    if common or (reasons and on_bad_client == "refuse"):
        raise Refused(reasons)
    return good


def _voices(
    clients: Mapping[int, Adapter], weights: Sequence[float] | None
) -> tuple[list[float], str]:
    """One weight per client, not normalised, and where they come from."""
    if weights is not None:
        return [float(weights[i]) for i in clients], "given"
    counts = [adapter.num_examples for adapter in clients.values()]
    if None not in counts:
        return [float(n) for n in counts if n is not None], "num_examples"
    return [1.0] * len(clients), "equal"
