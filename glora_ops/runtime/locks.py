"""Lock files that tell who holds them and are gone afterwards."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GloraError, require
from .signals import surely

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["lock"]


@contextmanager
def lock(path: Path, refuse: Callable[[str], GloraError]) -> Iterator[None]:
    """Hold the lock file `path`, which is gone afterwards; the system frees it after a kill.

    Parameters
    ----------
    path : path
    refuse : callable
        Makes the error where another process holds it, from words that say which.
    """
    from filelock import FileLock, Timeout

    known = _holder(path)
    require(known is not None, "lock", repr(str(path)), "a lock file of glora", "move it away",
            file=str(path))  # fmt: skip
    held = FileLock(path)
    try:
        held.acquire(timeout=0)
        with suppress(OSError):  # a full disk, or a system whose locks keep everybody out
            path.write_text(json.dumps({"glora": os.getpid(), "host": socket.gethostname()}))
        yield
    except Timeout:
        raise refuse(_holder(path) or "another process") from None
    finally:
        surely(partial(_let_go, held))


def _holder(path: Path) -> str | None:
    """Who a lock file says holds it; None where it is no lock file of glora."""
    try:
        text = path.read_text() if os.path.lexists(path) else ""
        about = json.loads(text or "{}")
        which = f" ({about['glora']} on {about['host']})" if text else ""
        return f"another process{which}"
    except (FileNotFoundError, PermissionError):  # let go of just now, or not to be read
        return "another process"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _let_go(held: BaseFileLock) -> None:
    """Release a lock and remove its file, unless it is another process that holds it."""
    from filelock import Timeout

    path = Path(held.lock_file)
    if not path.exists():
        held.release()
        return
    try:
        held.acquire(timeout=0)  # a second time, or after an interruption the first
    except Timeout:
        return
    if os.name != "nt":  # there an open file cannot be removed
        path.unlink(missing_ok=True)
    held.release(force=True)
    if os.name == "nt":
        with suppress(OSError):
            path.unlink()
