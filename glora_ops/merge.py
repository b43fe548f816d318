"""Client folders in, one server state out."""

from __future__ import annotations

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters.compatible import adapter_layout, check_base_copies, check_compatible, incompatible
from .adapters.modules import PREFIX
from .adapters.read import MAX_BYTES, TENSORS_NAME, Adapter, check_values, inspect_adapter
from .api import aggregate
from .arguments import check_settings, check_weights
from .errors import GloraWarning, Refusal, Refused, listing, require
from .state import State

__all__ = ["aggregate_adapters", "merge"]

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
    each time every problem of every client is collected.

    Parameters
    ----------
    folders : sequence of path
        One per client, each written by ``PeftModel.save_pretrained``.
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
        Called as ``progress(step, done, total)``, step being "headers", "values", "dense" or
        "modules".
    **settings
        Passed on to `aggregate`: normalise, tau_rel, anchor, seed, ….

    Returns
    -------
    State
        Whose settings also hold ``weights_from``, ``skipped`` (the reasons) and ``dense_from``
        (the clients that had a dense tensor, where some had not).

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
    folders: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None,
    *,
    dense: str = "mean",
    on_bad_client: str = "refuse",
    base: str | None = None,
    max_file_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
    known: Sequence[Refusal] = (),
    **settings: Any,
) -> State:
    """`aggregate_adapters`, listing what its caller refuses already, `known`, with the rest."""
    require(
        not isinstance(folders, (str, os.PathLike)),
        "folders",
        repr(folders),
        "a list of folders",
        "put the one folder into a list",
    )
    tell: Progress = progress or (lambda step, done, total: None)

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
        check_settings(settings)
    with listing(common):
        check_weights(weights, [Path(os.path.abspath(f)).name for f in folders], settings)

    refused: dict[int, list[Refusal]] = defaultdict(list)
    clients: dict[int, Adapter] = {}
    for i, folder in enumerate(folders):
        adapter, refusals = inspect_adapter(folder, max_bytes=max_file_bytes)
        if adapter is None:
            refused[i] += refusals
        else:
            clients[i] = adapter
        tell("headers", i + 1, len(folders))
    if clients:
        _note(refused, clients, incompatible(list(clients.values()), base))
    if dense == "refuse":
        _note(refused, clients, _with_dense(list(clients.values())))
    good = {i: adapter for i, adapter in clients.items() if not refused[i]}
    if good and not common:
        voices, _ = _voices(good, weights)
        with listing(common):
            check_weights(voices, [adapter.name for adapter in good.values()], settings)
        common += _without_mean(list(good.values()), voices)
    clients = _settle(clients, refused, on_bad_client, common)

    for done, (i, adapter) in enumerate(clients.items(), start=1):
        refused[i] += check_values(adapter)
        tell("values", done, len(clients))
    _note(refused, clients, check_base_copies(list(clients.values())))
    clients = _settle(clients, refused, on_bad_client, [])
    skipped = [str(refusal) for refusals in refused.values() for refusal in refusals]
    if skipped:
        warnings.warn("left out:\n" + "\n".join(skipped), GloraWarning, stacklevel=3)

    adapters = list(clients.values())
    voices, weights_from = _voices(clients, weights)
    names = [adapter.name for adapter in adapters]
    holders = _dense_holders(adapters)
    means = _dense_means(adapters, holders, voices, tell)
    state = aggregate(
        [{name: adapter.factors(name) for name in adapter.modules} for adapter in adapters],
        voices,
        [{name: m.scaling for name, m in adapter.modules.items()} for adapter in adapters],
        names=names,
        progress=lambda done, total: tell("modules", done, total),
        **settings,
    )
    recorded = {
        "weights_from": weights_from,
        "skipped": skipped,
        "dense_from": {
            name: [names[i] for i in having]
            for name, having in holders.items()
            if len(having) < len(adapters)
        },
    }
    return replace(
        state,
        settings=state.settings | recorded,
        dense=means,
        layout=adapter_layout(adapters, base),
    )


def _note(
    refused: dict[int, list[Refusal]],
    clients: dict[int, Adapter],
    problems: Sequence[tuple[int, Refusal]],
) -> None:
    """File problems that count along `clients` under the clients' own numbers."""
    numbers = list(clients)
    for i, refusal in problems:
        refused[numbers[i]].append(refusal)


def _settle(
    clients: dict[int, Adapter],
    refused: dict[int, list[Refusal]],
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


def _with_dense(adapters: Sequence[Adapter]) -> list[tuple[int, Refusal]]:
    return [
        (
            i,
            Refusal(
                "the adapter holds weights saved in full",
                adapter.name,
                TENSORS_NAME,
                PREFIX + next(iter(adapter.dense)),
                f"{len(adapter.dense)} such tensors",
                "factor pairs only, because dense='refuse' (--dense refuse)",
                "average them with dense='mean' (--dense mean)",
            ),
        )
        for i, adapter in enumerate(adapters)
        if adapter.dense
    ]


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


def _without_mean(adapters: Sequence[Adapter], voices: Sequence[float]) -> list[Refusal]:
    """Weights saved in full whose holders' weights allow no mean."""
    refusals: list[Refusal] = []
    for name, having in _dense_holders(adapters).items():
        held = [voices[i] for i in having]
        with listing(refusals):
            require(sum(held) > 0 and min(held) >= 0, *_no_mean(name, held))
    return refusals


def _no_mean(name: str, voices: Sequence[float]) -> tuple[str, str, str, str]:
    return (
        f"weights of the clients with {name}",
        str(voices),
        "none negative, not all zero",
        "weights saved in full can only be averaged",
    )


def _dense_holders(adapters: Sequence[Adapter]) -> dict[str, list[int]]:
    holders: dict[str, list[int]] = defaultdict(list)
    for i, adapter in enumerate(adapters):
        for name in adapter.dense:
            holders[name].append(i)
    return dict(sorted(holders.items()))


def _dense_means(
    adapters: Sequence[Adapter],
    holders: Mapping[str, Sequence[int]],
    weights: Sequence[float],
    tell: Progress,
) -> dict[str, Tensor]:
    """Weighted means in float64, over the clients that have the tensor, in its stored dtype."""
    means = {}
    for done, (name, having) in enumerate(holders.items(), start=1):
        voices = [weights[i] for i in having]
        total = math.fsum(voices)
        require(total > 0, *_no_mean(name, voices))
        infos = [adapters[i].dense[name] for i in having]
        mean = torch.zeros(infos[0].shape, dtype=torch.float64)
        for i, voice in zip(having, voices, strict=True):
            mean += adapters[i].dense_tensor(name).double() * (voice / total)
        means[name] = mean.to(reduce(torch.promote_types, (info.dtype for info in infos)))
        tell("dense", done, len(holders))
    return means
