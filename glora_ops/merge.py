"""Client folders in, one server state out."""

from __future__ import annotations

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters.compatible import adapter_layout, check_base_copies, check_compatible, incompatible
from .adapters.modules import PREFIX
from .adapters.read import MAX_BYTES, TENSORS_NAME, Adapter, check_values, inspect_adapter
from .api import aggregate, check_weights
from .errors import GloraWarning, Refusal, Refused, require
from .state import State

__all__ = ["aggregate_adapters"]

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
    require(
        not isinstance(folders, (str, os.PathLike)),
        "folders",
        repr(folders),
        "a list of folders",
        "put the one folder into a list",
    )
    require(dense in ("mean", "refuse"), "dense", repr(dense), "'mean' or 'refuse'")
    require(
        on_bad_client in ("refuse", "skip"),
        "on_bad_client",
        repr(on_bad_client),
        "'refuse' or 'skip'",
    )
    require(
        weights is None or len(weights) == len(folders),
        "weights",
        f"{0 if weights is None else len(weights)} of them",
        f"one for each of the {len(folders)} folders",
    )
    tell: Progress = progress or (lambda step, done, total: None)

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
    try:
        if weights is not None:
            names = [Path(folder).name for folder in folders]
            check_weights(weights, names, settings.get("normalise", True), basis)
    except Refused as bad:  # listed with the rest, before anything large is read
        reasons = [refusal for i in sorted(refused) for refusal in refused[i]]
        raise Refused([*reasons, *bad.refusals]) from None
    clients = _settle(clients, refused, on_bad_client)

    for done, (i, adapter) in enumerate(clients.items(), start=1):
        refused[i] += check_values(adapter)
        tell("values", done, len(clients))
    _note(refused, clients, check_base_copies(list(clients.values())))
    clients = _settle(clients, refused, on_bad_client)
    skipped = [str(refusal) for refusals in refused.values() for refusal in refusals]
    if skipped:
        warnings.warn("left out:\n" + "\n".join(skipped), GloraWarning, stacklevel=2)

    adapters = list(clients.values())
    counts = [adapter.num_examples for adapter in adapters]
    voices: list[float] | None = None
    if weights is not None:
        voices, weights_from = [float(weights[i]) for i in clients], "given"
    elif None not in counts:
        voices, weights_from = [float(n) for n in counts if n is not None], "num_examples"
    else:
        weights_from = "equal"
    names = [adapter.name for adapter in adapters]
    holders = _dense_holders(adapters)
    return aggregate(
        [{name: adapter.factors(name) for name in adapter.modules} for adapter in adapters],
        voices,
        [{name: m.scaling for name, m in adapter.modules.items()} for adapter in adapters],
        rank,
        basis=basis,
        missing=missing,
        captured=captured,
        names=names,
        layout=adapter_layout(adapters, base),
        dense=_dense_means(adapters, holders, voices or [1.0] * len(adapters), tell),
        recorded={
            "weights_from": weights_from,
            "skipped": skipped,
            "dense_from": {
                name: [names[i] for i in having]
                for name, having in holders.items()
                if len(having) < len(adapters)
            },
        },
        progress=lambda done, total: tell("modules", done, total),
        **settings,
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
    clients: dict[int, Adapter], refused: dict[int, list[Refusal]], on_bad_client: str
) -> dict[int, Adapter]:
    """The clients nothing is held against; raises where the caller, or the lack of any, says so."""
    good = {i: adapter for i, adapter in clients.items() if not refused[i]}
    reasons = [refusal for i in sorted(refused) for refusal in refused[i]]
    if not good:
        raise Refused([*reasons, *check_compatible([])])
    if reasons and on_bad_client == "refuse":
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
                "factor pairs only, because dense='refuse'",
                "average them with dense='mean'",
            ),
        )
        for i, adapter in enumerate(adapters)
        if adapter.dense
    ]


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
        require(
            total > 0 and min(voices) >= 0,
            f"weights of the clients with {name}",
            str(voices),
            "none negative, not all zero",
            "weights saved in full can only be averaged",
        )
        infos = [adapters[i].dense[name] for i in having]
        mean = torch.zeros(infos[0].shape, dtype=torch.float64)
        for i, voice in zip(having, voices, strict=True):
            mean += adapters[i].dense_tensor(name).double() * (voice / total)
        means[name] = mean.to(reduce(torch.promote_types, (info.dtype for info in infos)))
        tell("dense", done, len(holders))
    return means
