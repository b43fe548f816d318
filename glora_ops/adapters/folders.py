"""Folders that appear complete or not at all."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import require

__all__ = ["check_free", "new_folder"]


def check_free(target: str | os.PathLike[str], *, overwrite: bool, marker: str) -> None:
    """Raise `GloraError` where `new_folder` could not put a folder at `target`."""
    final = Path(target).resolve()
    if os.path.lexists(final):
        require(
            overwrite,
            "folder",
            f"the existing {str(final)!r}",
            "a new one",
            "choose another, or replace it with overwrite=True (--overwrite)",
            file=str(final),
        )
        require(
            final.is_dir() and (not any(final.iterdir()) or (final / marker).is_file()),
            "folder",
            f"{str(final)!r}, which holds other things",
            f"an empty folder or one with a {marker}, to be overwritten",
            "choose another folder",
            file=str(final),
        )
    above = next(parent for parent in final.parents if os.path.lexists(parent))
    require(
        above.is_dir() and os.access(above, os.W_OK | os.X_OK),
        "folder",
        f"{str(final)!r} below {str(above)!r}",
        "a place in a folder that can be written to",
        "choose another folder",
        file=str(above),
    )


@contextmanager
def new_folder(
    target: str | os.PathLike[str], *, overwrite: bool = False, marker: str
) -> Iterator[Path]:
    """Give a folder to fill; when the block ends without an error, it stands at `target`.

    Until then it is a hidden folder beside `target`, removed again if the block fails. Everything
    in it is flushed to the disk before it is renamed.

    Parameters
    ----------
    target : path
        Must not exist, unless `overwrite`.
    overwrite : bool
        Replace an existing folder. On Linux old and new change places in one step; elsewhere the
        old one is first renamed to a hidden name, so that a kill between two renames leaves it
        whole under that name.
    marker : str
        A file that only a folder of this kind contains: nothing else is ever overwritten.

    Raises
    ------
    GloraError
        If `target` exists and may not be replaced; before anything is written.
    """
    check_free(target, overwrite=overwrite, marker=marker)
    final = Path(target).resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    unique = secrets.token_hex(4)
    building = final.with_name(f".{final.name}.{unique}.new")
    building.mkdir()
    try:
        yield building
        _flush(building)
        _put(building, final)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    # After an exchange the old folder bears the temporary name.
    shutil.rmtree(building, ignore_errors=True)
    _flush_one(final.parent)


def _put(building: Path, final: Path) -> None:
    """Rename `building` to `final`; what stood there is left at `building`, or gone."""
    if not final.exists():
        os.replace(building, final)
    elif not _exchange(building, final):
        aside = building.with_suffix(".old")
        os.replace(final, aside)
        try:
            os.replace(building, final)
        except BaseException:
            os.replace(aside, final)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_fdcwd, rename_exchange = -100, 2
    return renameat2 is not None and not renameat2(
        at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), ctypes.c_uint(rename_exchange)
    )


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
