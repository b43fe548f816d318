"""Memory in a file, for stacks that a limit keeps out of memory.

The pages of a mapped file are the system's cache: written back and dropped when memory is short,
read again when asked for. The arithmetic on them is the same, so are its bits.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import unfit

__all__ = ["empty", "in_folder"]

_here = threading.local()


@contextmanager
def in_folder(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """What this thread makes with `empty` lies in files in `folder`; in memory for None."""
    before = getattr(_here, "folder", None)
    _here.folder = folder
    try:
        yield
    finally:
        _here.folder = before


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor of any values, in memory or, inside `in_folder`, in a file.

    The file has no name from the start (on Linux), so that it is gone with the tensor or with the
    process, however that ends.

    Raises
    ------
    GloraError
        If the disk has no room for it.
    """
    folder = getattr(_here, "folder", None)
    size = math.prod(shape) * dtype.itemsize
    if folder is None or not size:
        return torch.empty(shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".glora-") as file:
            _reserve(file.fileno(), size)
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise unfit(
            "scratch",
            f"{os.fspath(folder)!r}: {error.strerror}",
            f"a folder that takes a file of {size} bytes",
            "name one on another disk, or raise max_bytes",
        ) from error
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _reserve(file: int, size: int) -> None:
    """All blocks now: a full disk met when a mapped page is written kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # macOS, Windows
        os.ftruncate(file, size)
