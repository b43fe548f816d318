"""Files and folders that appear under their name complete, or not at all, and take nobody's place.

What is written is built in a hidden folder beside its target (`hidden`), flushed to the disk and
renamed. The rename refuses whatever has come to stand at the target meanwhile. What is replaced on
request is looked at right before it changes places with the new, and again once it is out of
everybody's reach: if it is not glora's own any more, both change back.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ..errors import GloraError, Refusal, Refused, require, unfit
from .hidden import ASIDE, UNSURE, Strangers, hidden_folder, sweep
from .locks import lock
from .rename import Taken, exchange, rename_new
from .signals import heed, surely
from .urls import Url

__all__ = [
    "Strangers",
    "apart",
    "check_free",
    "claimed",
    "new_file",
    "new_folder",
    "ours",
    "write_text",
]


def check_free(
    final: Path, strangers: Strangers, *, overwrite: bool = True, what: str = "folder"
) -> None:
    """Raise `GloraError` where nothing could be put at `final`.

    Parameters
    ----------
    final : path
        Resolved: a link that has come to stand there since is not followed.
    strangers : callable
        What of an existing `final` glora did not write.
    overwrite : bool
        Whether `final` may be replaced where there is nothing of that kind; else it must not exist.
    what : str
        "folder" or "file", for the message.
    """
    if os.path.lexists(final):
        require(
            overwrite,
            what,
            f"the existing {str(final)!r}",
            "a new one",
            "choose another, or replace it with overwrite=True (--overwrite)",
            file=str(final),
        )
        _require_own(final, final, strangers, what)
    _require_place(final, what)


def _require_place(final: Path, what: str) -> None:
    scheme = re.search(r"(?<=/)[A-Za-z][A-Za-z0-9+.-]+:(?=/)", str(final))
    require(
        scheme is None or os.path.lexists(str(final)[: scheme.end()]),
        what,
        f"the URL {str(final)[scheme.start() if scheme else 0 :]!r}",
        "a place on this machine",
        "write it here, and copy it to where it belongs",
    )
    above = next(parent for parent in final.parents if os.path.lexists(parent))
    require(
        above.is_dir() and os.access(above, os.W_OK | os.X_OK),
        what,
        f"{str(final)!r} below {str(above)!r}",
        "a place in a folder that can be written to",
        "choose another place",
        file=str(above),
    )


def _require_own(found: Path, final: Path, strangers: Strangers, what: str) -> None:
    """Refuse to replace what lies at `found`, and stands or stood at `final`, unless it is ours."""
    others = list(strangers(found))
    named = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    holds = f", which holds what glora did not write: {named}" if found.is_dir() else ""
    require(
        not others,
        what,
        f"the existing {str(final)!r}{holds or ', which glora did not write'}",
        "nothing but what glora wrote, and nobody changed since, to be replaced",
        f"choose another {what} (for commands -o), or move that away",
        file=str(final),
    )


def apart(out: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str] | Url]) -> None:
    """Raise `Refused` for every input of this machine that lies in `out`, is `out`, or holds it."""
    place = Path(os.path.realpath(out))
    refusals = [
        Refusal(
            "the output and an input lie in one another",
            file=str(out),
            found=f"the input {str(given)!r} and the output {str(out)!r}",
            expected="an output outside every input, and no input in it",
            remedy="choose another place for the output",
        )
        for given in inputs
        if not isinstance(given, Url)
        if (real := Path(os.path.realpath(given))) == place
        or real in place.parents
        or place in real.parents
    ]
    if refusals:
        raise Refused(refusals)


# --- who writes ------------------------------------------------------------------------------


@contextmanager
def claimed(final: Path, strangers: Strangers) -> Iterator[None]:
    """Be the only process of glora that writes to `final`, and clear away what a killed one left.

    Folders above `final`, a resolved path, are made, and taken away again if the block fails.

    Raises
    ------
    GloraError
        If another process is at work there, or nothing can be written there.
    """
    _require_place(final, "folder")
    made = [parent for parent in final.parents if not parent.exists()]

    def refuse(holder: str) -> GloraError:
        return unfit(
            "output",
            f"{str(final)!r}, where {holder} is at work",
            "one process for an output",
            "wait for it or stop it, or choose another place",
            file=str(final),
        )

    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with lock(final.with_name(f".{final.name}.lock"), refuse):
            sweep(final.parent, strangers, final.name)
            yield
    except BaseException:
        surely(partial(_remove_empty, made))
        raise


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


# --- writing ---------------------------------------------------------------------------------


@contextmanager
def new_folder(final: Path, strangers: Strangers, *, overwrite: bool = True) -> Iterator[Path]:
    """Give a folder to fill; when the block ends without an error, it stands at `final`.

    Parameters
    ----------
    final : path
        Resolved.
    strangers, overwrite
        As in `check_free`.

    Raises
    ------
    GloraError
        If something stands at `final` that may not be replaced, whenever it came there. The
        new folder is gone then, and `final` as it was.
    """
    with _built(final, strangers, overwrite, "folder") as path:
        path.mkdir()
        yield path


@contextmanager
def new_file(target: str | os.PathLike[str], strangers: Strangers) -> Iterator[Path]:
    """Give a path to write a file to; when the block ends without an error, it is `target`.

    Otherwise as `new_folder`; a link at `target` is followed.
    """
    with _built(Path(os.path.realpath(target)), strangers, True, "file") as path:
        yield path
        path.chmod(0o644)


def ours(path: Path) -> list[str]:
    """The strangers of a file whose folder tells that it is glora's."""
    return []


def write_text(path: Path, text: str, strangers: Strangers = ours) -> None:
    with new_file(path, strangers) as building:
        building.write_text(text, encoding="utf-8")


@contextmanager
def _built(final: Path, strangers: Strangers, overwrite: bool, what: str) -> Iterator[Path]:
    if final.parent.is_dir():
        sweep(final.parent, strangers, final.name)
    check_free(final, strangers, overwrite=overwrite, what=what)
    if not final.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(final.parent))
    with hidden_folder(final, strangers) as hidden:
        path = hidden / final.name
        yield path
        _flush(path)
        heed()
        try:
            if overwrite and os.path.lexists(final):
                _replace(path, final, strangers, what)
            else:
                rename_new(path, final)
        except Taken:
            raise unfit(
                what,
                f"{str(final)!r}, which has come to stand there meanwhile",
                "a new one",
                "choose another, or look whether it may go",
                file=str(final),
            ) from None
    _flush_one(final.parent)


def _replace(path: Path, final: Path, strangers: Strangers, what: str) -> None:
    """Put `path` in the place of what is at `final`, which is left beside it, if that may go."""
    _require_own(final, final, strangers, what)
    unsure = path.with_name(UNSURE)
    unsure.touch()
    old = _swap(path, final)
    try:
        _require_own(old, final, strangers, what)
    except BaseException:
        if not exchange(path, final):
            os.rename(final, path)
            rename_new(old, final)
        unsure.unlink()
        raise
    unsure.unlink()


def _swap(path: Path, final: Path) -> Path:
    """Put `path` in the place of what is at `final`; where that is now.

    In two steps where the system cannot do it in one.
    """
    if exchange(path, final):
        return path
    aside = path.with_name(ASIDE)
    os.rename(final, aside)
    try:
        rename_new(path, final)
    except BaseException:
        rename_new(aside, final)
        raise
    return aside


def _flush(path: Path) -> None:
    for inner in path.rglob("*") if path.is_dir() else ():
        _flush_one(inner)
    _flush_one(path)


def _flush_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
