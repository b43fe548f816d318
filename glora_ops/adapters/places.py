"""Where clients lie, and what they are called."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.urls import Url, is_url, where

__all__ = ["Place", "find_places", "is_name"]

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_NAMED = re.compile(rf"({_NAME.pattern})=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Place:
    """A client's name and its folder or file, absolute.

    `named` where the name was given, and not taken from the path.
    """

    name: str
    path: Path | Url
    named: bool = False


def is_name(text: str) -> bool:
    """Whether `text` can be given to a client as its name."""
    return _NAME.fullmatch(text) is not None


def find_places(
    clients: Sequence[str | os.PathLike[str] | Place], known: Collection[str] = ()
) -> list[Place]:
    """Name every client.

    Parameters
    ----------
    clients : sequence of str, path or Place
        ``NAME=PATH`` gives a name, of letters, digits, ``.``, ``-`` and ``_``; what exists under
        all of the text, or is a URL, has none. Without one, the name is the last part of the
        path, with as many of its parents as tell it from others that end alike.
    known : collection of str
        Names given before: a client whose path ends in one of them has it again.

    Returns
    -------
    list of Place
    """
    places: list[Place | None] = []
    alike: dict[str, list[int]] = defaultdict(list)
    paths: list[Path | Url] = []
    for i, client in enumerate(clients):
        if isinstance(client, Place):
            places.append(client)
            paths.append(client.path)
            continue
        text = os.fspath(client)
        named = None if os.path.lexists(text) or is_url(text) else _NAMED.fullmatch(text)
        paths.append(where(named[2] if named else text))
        places.append(Place(named[1], paths[i], named=True) if named else None)
        if not named:
            alike[paths[i].name].append(i)
    for having in alike.values():
        different = {paths[i] for i in having}
        depth = next(
            n
            for n in range(1, 1 + max(len(path.parts) for path in different))
            if len({path.parts[-n:] for path in different}) == len(different)
        )
        for i in having:
            parts = paths[i].parts
            again = [name for name in known if parts[-1 - name.count("/") :] == Path(name).parts]
            places[i] = Place(max(again, key=len, default="/".join(parts[-depth:])), paths[i])
    return [place for place in places if place is not None]
