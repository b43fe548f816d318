"""Hidden folders in which files and folders are built, beside where they will stand.

Such a folder, `.NAME.<hex>.new`, holds a lock file for as long as its maker lives. One whose lock
is free is what a killed process left behind, and whoever writes to the same target next removes it.
A folder that only has such a name, and anything in it, is left alone.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LeftoverWarning
from .rename import rename_new
from .signals import surely

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["ASIDE", "UNSURE", "Strangers", "destination", "hidden_folder", "sweep"]

#: What of a file or folder glora did not write, by name; nothing: it may be replaced.
Strangers = Callable[[Path], Sequence[str]]

_LOCK = ".glora-lock"  # it is glora's, and its maker lives while it is locked
UNSURE = ".glora-unsure"  # stands while old and new change places, until the old was looked at
ASIDE = ".glora-aside"  # the old one, where it cannot change places with the new in one step
_HIDDEN = re.compile(r"\.(.+)\.[0-9a-f]{8}\.new")


@contextmanager
def hidden_folder(final: Path, strangers: Strangers) -> Iterator[Path]:
    """A locked folder of glora's own beside `final`, cleared away at the end."""
    from filelock import FileLock, Timeout

    while True:
        hidden = final.with_name(f".{final.name}.{secrets.token_hex(4)}.new")
        held = FileLock(hidden / _LOCK)
        try:
            hidden.mkdir()
            try:
                held.acquire(timeout=0)
                if not (hidden / _LOCK).exists():
                    continue
            except (Timeout, FileNotFoundError):
                continue  # another process took it for a leftover before it was locked
            yield hidden
            return
        finally:
            surely(partial(_let_hidden_go, held, hidden, final, strangers))


def _let_hidden_go(held: BaseFileLock, hidden: Path, final: Path, strangers: Strangers) -> None:
    held.release()
    _clear_unlocked(hidden, final, strangers)


def destination(path: str | os.PathLike[str]) -> Path:
    """Where what is built at `path` will stand; any other path as it is, resolved."""
    parts = list(Path(os.path.realpath(path)).parts)
    for i in range(len(parts) - 1, 0, -1):
        found = _HIDDEN.fullmatch(parts[i - 1])
        if found and found[1] == parts[i]:
            del parts[i - 1]
    return Path(*parts)


def sweep(folder: Path, strangers: Strangers, name: str | None = None) -> None:
    """Clear away what killed processes were building in `folder`, for `name` or for any target."""
    try:
        entries = list(folder.iterdir())
    except PermissionError:  # a folder may be written to that is not to be read
        return
    for hidden in entries:
        found = _HIDDEN.fullmatch(hidden.name)
        if found and name in (None, found[1]):
            _clear_unlocked(hidden, folder / found[1], strangers)


def _clear_unlocked(hidden: Path, final: Path, strangers: Strangers) -> None:
    """Remove a hidden folder if it is glora's and its maker does not live."""
    from filelock import FileLock, Timeout

    if hidden.is_symlink() or not hidden.is_dir():
        return
    if not (hidden / _LOCK).is_file():
        with suppress(OSError):  # killed before it was locked: empty, or not glora's
            hidden.rmdir()
        return
    held = FileLock(hidden / _LOCK)
    try:
        held.acquire(timeout=0)
    except (Timeout, OSError):
        return
    try:
        _clear(hidden, final, strangers)
    finally:
        held.release()


def _clear(hidden: Path, final: Path, strangers: Strangers) -> None:
    """Remove a hidden folder, its lock last; what might be somebody's is put back or kept."""
    aside, path = hidden / ASIDE, hidden / final.name
    if os.path.lexists(aside):
        with suppress(OSError):
            rename_new(aside, final)
    if os.path.lexists(hidden / UNSURE):
        for left in (aside, path):
            others = list(strangers(left)) if os.path.lexists(left) else []
            if others:
                warnings.warn(
                    f"{str(left)!r} was replaced by a run that was killed, and holds what glora "
                    f"did not write: {', '.join(others[:5])}; it is kept",
                    LeftoverWarning,
                    stacklevel=2,
                )
                return
    for entry in hidden.iterdir():
        if entry.name != _LOCK:
            _remove(entry)
    for remove in ((hidden / _LOCK).unlink, hidden.rmdir):
        with suppress(OSError):
            remove()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
