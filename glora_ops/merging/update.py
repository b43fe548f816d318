"""The same state again for other clients: added, replaced, withdrawn."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapters.places import Place, find_places, is_name
from ..adapters.read import MAX_BYTES
from ..arguments import kind
from ..errors import Refusal, Refused, listing, require, unfit
from ..runtime.urls import is_url
from ..state import State
from .aggregate import Progress, merge

__all__ = ["update_adapters"]


def update_adapters(
    state: State,
    *,
    add: Sequence[str | os.PathLike[str]] = (),
    remove: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    scratch: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    max_file_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
) -> State:
    """Add, replace and withdraw clients of a state: `aggregate_adapters` of who is left.

    The result is to the last bit that of a fresh run over the resulting clients with the settings
    of the first. Every client's file is read again: the bases depend on all clients together, and
    only their factors tell how. What need not be given again are the folders, the weights and the
    settings. Nothing is read but the folders in `add` and those that ``state.record`` names.

    Parameters
    ----------
    state : State
        Of `aggregate_adapters` or of this function, in memory or loaded.
    add : sequence of path
        Folders of new clients, or ``NAME=PATH``; one with the name of a client of the state takes
        its place.
    remove : sequence of str
        Names of clients to be withdrawn.
    weights : sequence of float, optional
        One per folder in `add`, if the state's weights were given; a replaced client keeps its
        own by default. Other states take ``num_examples`` of all clients, or equal weights, as
        a fresh run does.
    scratch, device
        As in `aggregate`; the state remembers ``max_bytes`` but not where there was room.
    max_file_bytes, progress
        As in `aggregate_adapters`.

    Returns
    -------
    State

    Raises
    ------
    Refused
        Clients that are not what they were when the state was made, or are gone; names that are
        not in the state; whatever `aggregate_adapters` refuses.
    GloraError
        The state records no clients: it was not made from folders, or by an older glora.
    """
    return renew(
        state, add=add, remove=remove, weights=weights, scratch=scratch, device=device,
        max_file_bytes=max_file_bytes, progress=progress,
    )  # fmt: skip


def renew(
    state: State,
    *,
    add: Sequence[str | os.PathLike[str] | Place] = (),
    remove: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    known: Sequence[Refusal] = (),
    opening: Callable[[Sequence[str], Sequence[str]], None] | None = None,
    **how: Any,
) -> State:
    """`update_adapters`, listing what its caller refuses already, `known`, with the rest.

    Not public: for the command line, whose own refusals belong into the same list.
    `opening` is called with the folders of recorded and of added clients, absolute, before any of
    them is looked at.
    """
    record = state.record
    if record is None:
        raise unfit(
            "state",
            f"one of {len(state.clients)} clients without a record of their files",
            "a state made from PEFT folders by this version of glora",
            "aggregate the folders once more",
        )
    for name, value in (("add", add), ("remove", remove)):
        require(not isinstance(value, (str, os.PathLike)), name, kind(value), "a list")
    entries = {entry["name"]: entry for entry in record["clients"]}
    places = find_places(add, known=entries)
    added = {place.name: place for place in places}
    refusals = [
        *known,
        *(_unknown(name, entries) for name in remove if name not in entries),
        *(_both(name) for name in added if name in remove),
    ]
    with listing(refusals):
        require(len(added) == len(places), "add", [str(place.path) for place in places],
                "folders of different names", "name each once, or apart: NAME=DIR")  # fmt: skip
    kept = {name: e for name, e in entries.items() if name not in remove and name not in added}
    for name, entry in kept.items():
        if is_url(entry["path"]):
            refusals.append(_behind_url(name, entry["path"]))
        elif not _is_own(entry):
            refusals.append(_elsewhere(name, entry["path"]))
    order = [name for name in entries if name in kept or name in added]
    order += [name for name in added if name not in entries]
    voices = None
    if state.settings["weights_from"] == "given":
        with listing(refusals):
            voices = _renewed_weights(order, entries, list(added), weights)
    else:
        with listing(refusals):
            require(
                weights is None,
                "weights",
                weights,
                f"none: the state's are {state.settings['weights_from']}",
                "aggregate anew to give weights to all clients",
            )
    if refusals:
        raise Refused(refusals)
    if opening is not None:
        opening(
            [entry["path"] for entry in kept.values()],
            [str(place.path) for place in added.values()],
        )
    return merge(
        [added[n] if n in added else _place(kept[n]) for n in order],
        voices,
        entries={
            i: kept[name] | {"weights_from": state.settings["weights_from"]}
            for i, name in enumerate(order)
            if name in kept
        },
        **record["arguments"],
        **how,
    )


def _unknown(name: str, entries: Mapping[str, Any]) -> Refusal:
    return Refusal(
        "the client to be withdrawn is not in the state",
        name,
        found=repr(name),
        expected=f"one of {', '.join(entries)}",
        remedy="glora inspect shows the clients of a state",
    )


def _place(entry: Mapping[str, Any]) -> Place:
    path = Path(os.path.abspath(entry["path"]))
    return Place(entry["name"], path, named=entry.get("named", False))


def _is_own(entry: Mapping[str, Any]) -> bool:
    """Whether what is recorded is a client's as `find_places` calls it.

    Its path, or the folder around the only adapter in it, ends in the name; or the name was given.
    """
    if entry.get("named", False):
        return is_name(entry["name"])
    path, called = Path(entry["path"]), Path(entry["name"]).parts
    return called in (path.parts[-len(called) :], path.parent.parts[-len(called) :])


def _elsewhere(name: str, path: str) -> Refusal:
    return Refusal(
        "the state records a folder that is not the client's: clients are called by their folders",
        name,
        found=repr(path),
        expected=f"a folder called {name!r}, or a name that was given with NAME=DIR",
        remedy="name the client's folder with add (--add DIR), or withdraw it",
    )


def _behind_url(name: str, path: str) -> Refusal:
    return Refusal(
        "the state records a URL, and URLs are fetched only where they are named",
        name,
        found=repr(path),
        expected="a folder, or the URL named once more",
        remedy="name it with add (--add URL), which takes the client's place, or withdraw it",
    )


def _both(name: str) -> Refusal:
    return Refusal(
        "the client is to be added and withdrawn",
        name,
        found=repr(name),
        expected="one of the two",
        remedy="adding a folder of the same name replaces the client",
    )


def _renewed_weights(
    order: Sequence[str],
    entries: Mapping[str, Mapping[str, Any]],
    added: Sequence[str],
    weights: Sequence[float] | None,
) -> list[float]:
    """Weights as they were given, by the order of the clients."""
    lacking = [name for name in added if name not in entries]
    require(
        weights is not None or not lacking,
        "weights",
        None,
        f"one for each of {', '.join(added)}: the state's weights were given",
        "pass weights (--weights)",
    )
    given = [entries[name]["weight"] for name in added] if weights is None else list(weights)
    require(len(given) == len(added), "weights", len(given), f"one per added client, {len(added)}")
    new = dict(zip(added, given, strict=True))
    return [new[name] if name in new else entries[name]["weight"] for name in order]
