"""Renaming that takes nobody's place, and two names that change places in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

__all__ = ["Taken", "exchange", "rename_new"]

_AT_FDCWD = -100  # Linux: names count from the working directory
_NOREPLACE, _EXCHANGE = 1, 2  # Linux: flags of renameat2
#: What file systems answer that do not know a flag, or hard links.
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EOPNOTSUPP}
_OCCUPIED = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}


class Taken(FileExistsError):
    """Something stands under the name already."""


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or a folder to a name that nothing has.

    On Linux in one step (``RENAME_NOREPLACE``). Elsewhere, and on file systems without it: a folder
    by a plain rename, which refuses all but an empty folder; a file by a hard link, which refuses
    everything; where there are no links either, by a rename after a look.

    Raises
    ------
    Taken
        If something stands at `target`.
    """
    try:
        if _renameat2(source, target, _NOREPLACE):
            return
        if source.is_dir():
            os.rename(source, target)
        else:
            _link(source, target)
    except OSError as error:
        if error.errno in _OCCUPIED and os.path.lexists(target):
            raise Taken(str(target)) from None
        raise


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        if os.path.lexists(target):
            raise Taken(str(target)) from None
        os.rename(source, target)
    else:
        os.unlink(source)


def exchange(a: Path, b: Path) -> bool:
    """Let two files or folders change places in one step; False where the system cannot."""
    return _renameat2(a, b, _EXCHANGE)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """The system call, where there is one that knows the flag; False where there is not."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if not call(
        _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flag)
    ):
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
