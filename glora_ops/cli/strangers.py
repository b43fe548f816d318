"""What of a folder `glora aggregate` did not write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .. import state_clients
from ..adapters.write import strangers as strangers_in_adapter
from ..adapters.write import strangers_unmarked
from ..analysis.plots import no_picture
from ..runtime.tensors import read_mark
from ..state_file import MARK
from .options import PICTURE_NAME
from .state_facts import STATE_NAME

__all__ = ["strangers"]

UNMARKED = 2  # up to this format of states, readouts and pictures beside them carry no mark


def strangers(folder: Path) -> list[str]:
    """What in a folder `glora aggregate` did not write, or somebody has changed since, by name.

    Readouts and pictures carry a mark. Those of versions that left none are known by the record of
    the state beside them.
    """
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name]
    about = read_mark(folder / STATE_NAME, MARK)
    clients = state_clients.folder_name(about) if about and _has_clients_beside(about) else None
    out = []
    for entry in sorted(folder.iterdir()):
        if about is None:
            out.append(entry.name)
        elif entry.name == PICTURE_NAME:
            out += [] if _is_before(about) and _drawn(entry) else no_picture(entry)
        elif re.fullmatch(r"r[1-9]\d*", entry.name) and entry.is_dir():
            inside = strangers_in_adapter(entry)
            if inside and _is_before(about) and int(entry.name[1:]) in _ranks(about):
                inside = strangers_unmarked(entry)
            out += [f"{entry.name}/{name}" for name in inside]
        elif entry.name == clients:
            out += [f"{entry.name}/{name}" for name in state_clients.strangers(entry)]
        elif entry.name != STATE_NAME:
            out.append(entry.name)
    return out


def _has_clients_beside(about: dict[str, Any]) -> bool:
    return isinstance(about.get("beside"), dict) and isinstance(about.get("tensors"), dict)


def _is_before(about: dict[str, Any]) -> bool:
    version = about.get("format_version")
    return isinstance(version, int) and version <= UNMARKED


def _ranks(about: dict[str, Any]) -> list[Any]:
    try:
        return list(about["record"]["readouts"]["ranks"])
    except (KeyError, TypeError):
        return []


def _drawn(path: Path) -> bool:
    """Whether matplotlib wrote it: all that is known of a picture without a mark."""
    return path.is_file() and not path.is_symlink() and b"Matplotlib" in path.read_bytes()[:1024]
