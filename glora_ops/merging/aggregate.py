"""Client folders in, one server state out."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..adapters.aligned_names import align_names
from ..adapters.compatible import adapter_layout, check_base_copies, check_compatible, incompatible
from ..adapters.config import CONFIG_NAME
from ..adapters.places import Place, find_places
from ..adapters.read import (
    EXAMPLES_NAME,
    MAX_BYTES,
    TENSORS_NAME,
    Adapter,
    check_values,
    inspect_adapter,
)
from ..api import aggregate
from ..arguments import check_settings, check_weights
from ..batches import check_ranks
from ..errors import GloraWarning, Refusal, Refusals, Refused, clean, listing, require
from ..inner_products import check_pairs
from ..runtime.threads import release_freed, workers
from ..state import State
from .modules_to_save import (
    base_copies,
    dense_holders,
    dense_means,
    heeded,
    unequal,
    with_dense,
    without_mean,
)

__all__ = ["Progress", "aggregate_adapters"]

Progress = Callable[[str, int, int], None]


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
    captured: float = 0.9,
    max_file_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
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
        One per client, each written by ``PeftModel.save_pretrained``; ``NAME=PATH`` names the
        client, which is otherwise called by its folder (and the parents that tell it from others).
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
    max_file_bytes : int
        Largest tensor file that is accepted from a client.
    progress : callable, optional
        Called as ``progress(step, done, total)``, step being "headers", "values", "modules" or
        "dense".
    **settings
        Passed on to `aggregate`: robust, normalise, tau_rel, anchor, seed, …. With `robust` all
        factors are read once more.

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
    return merge(
        folders, weights, rank=rank, basis=basis, missing=missing, dense=dense,
        on_bad_client=on_bad_client, base=base, captured=captured, max_file_bytes=max_file_bytes,
        progress=progress, **settings,
    )  # fmt: skip


def merge(
    folders: Sequence[str | os.PathLike[str] | Place],
    weights: Sequence[float] | None,
    *,
    dense: str = "mean",
    on_bad_client: str = "refuse",
    base: str | None = None,
    max_file_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
    known: Sequence[Refusal] = (),
    entries: Mapping[int, Mapping[str, Any]] | None = None,
    readouts: Sequence[int] = (),
    **settings: Any,
) -> State:
    """`aggregate_adapters`, listing what its caller refuses already, `known`, with the rest.

    Not public: for the command line and `renew`, whose own refusals belong into the same list.
    `readouts` are ranks that the caller will read out: absurd ones are refused before the work.
    `entries` are what an earlier state recorded of some of the clients, by place: a client that
    is not the same any more is refused.
    """
    require(
        not isinstance(folders, (str, os.PathLike)),
        "folders",
        repr(folders),
        "a list of folders",
        "put the one folder into a list",
    )
    tell: Progress = progress or (lambda step, done, total: None)
    places = find_places(folders)

    # What no client is to blame for cannot be skipped with one.
    common = list(known)
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
    for i, place in enumerate(places):
        adapter, refusals = inspect_adapter(place, max_bytes=max_file_bytes)
        if adapter is None and entries and i in entries:
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
    if dense == "refuse":
        _note(refused, clients, with_dense(list(clients.values())))
    good = {i: adapter for i, adapter in clients.items() if not refused[i]}
    if good and not common:
        voices, _ = _voices(good, weights)
        if weights is None or len(good) < len(places):  # otherwise they have been checked
            with listing(common):
                check_weights(voices, [adapter.name for adapter in good.values()], settings)
        common += without_mean(list(good.values()), voices)
    clients = _settle(clients, refused, on_bad_client, common)
    check_ranks(list(clients.values()), settings, readouts)

    digests: dict[int, str] = {}
    with workers(torch.get_num_threads()) as pool:
        found = zip(clients.items(), pool.map(_examine, clients.values()), strict=True)
        for done, ((i, adapter), (digest, refusals)) in enumerate(found, start=1):
            digests[i] = digest
            refused[i] += refusals
            if entries and i in entries and not refusals:
                refused[i] += _changes(adapter, digest, entries[i])
            tell("values", done, len(clients))
    for differing in (check_base_copies, unequal):
        _note(refused, clients, differing(list(clients.values())))
    clients = _settle(clients, refused, on_bad_client, [])
    # Shortened: they are kept in the state, and clients decide how long their values are.
    skipped = [f"{refusal!s:.2000}" for refusals in refused.values() for refusal in refusals]
    if skipped:
        warnings.warn(clean("left out:\n" + "\n".join(skipped)), GloraWarning, stacklevel=3)

    adapters = list(clients.values())
    voices, weights_from = _voices(clients, weights)
    names = [adapter.name for adapter in adapters]

    def tell_modules(done: int, total: int) -> None:
        release_freed()  # a tenth of the time, and memory stays that of a few modules
        tell("modules", done, total)

    state = aggregate(
        adapters,
        voices,
        [{name: m.scaling for name, m in adapter.modules.items()} for adapter in adapters],
        names=names,
        progress=tell_modules,
        **settings,
    )
    release_freed()  # the stacks' memory, before anything else is made
    holders = dense_holders(adapters)
    means = dense_means(adapters, holders, heeded(state, voices), tell)
    copies, uneven = base_copies(adapters)
    recorded = {
        "weights_from": weights_from,
        "skipped": skipped,
        "remarks": [*(f"{a.name}: {remark}" for a in adapters for remark in a.remarks), *uneven],
        "dense_from": {
            name: [names[i] for i in having]
            for name, having in holders.items()
            if len(having) < len(adapters)
        },
    }
    return replace(
        state,
        settings=state.settings | recorded,
        dense=means | copies,
        layout=adapter_layout(adapters, base),
        record={
            "arguments": {"dense": dense, "base": base}
            | {name: value for name, value in settings.items() if name not in ("warm", "scratch")},
            "clients": [
                _entry(
                    adapter,
                    places[i].named,
                    digests[i],
                    None if weights is None else float(weights[i]),
                )
                for i, adapter in clients.items()
            ],
        },
    )


_AS_IT_WAS = (
    "put the files back as they were, name the client's new folder with add (--add DIR; one of "
    "the same name takes its place), or withdraw the client with remove (--remove NAME)"
)


def _examine(adapter: Adapter) -> tuple[str, list[Refusal]]:
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
        "config_sha256": _config_digest(adapter),
        "ranks": sorted({m.rank for m in adapter.modules.values()}),
        "scalings": sorted({m.scaling for m in adapter.modules.values()}),
    }


def _config_digest(adapter: Adapter) -> str:
    return hashlib.sha256(json.dumps(adapter.config, sort_keys=True).encode()).hexdigest()


def _changes(adapter: Adapter, digest: str, entry: Mapping[str, Any]) -> list[Refusal]:
    """In what a client differs from what was recorded of it."""
    compared: list[tuple[str, str, object]] = [
        (TENSORS_NAME, "sha256", digest),
        (CONFIG_NAME, "config_sha256", _config_digest(adapter)),
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
    good = {i: adapter for i, adapter in clients.items() if not refused[i]}
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
