"""Files that somebody else wrote or named, read without waiting, drowning or going too deep."""

from __future__ import annotations

import json
import os
import stat
from typing import Any, BinaryIO

from ..errors import GloraError, require, unfit

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "open_regular",
    "parse_json_object",
    "read_bytes",
    "read_json_object",
    "too_deep",
]

MAX_BYTES = 4 * 2**20  # of text
MAX_DEPTH = 32  # of lists and objects in each other


def open_regular(path: str | os.PathLike[str], buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading.

    Raises
    ------
    GloraError
        For a folder, a socket, a device, or a pipe, which could be waited for for ever.
    OSError
        For what cannot be opened.
    """
    fits = stat.S_ISREG(os.stat(path).st_mode)  # a device may act on being opened
    if fits:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return os.fdopen(handle, "rb", buffering)
        os.close(handle)  # it was changed in between
    raise unfit(
        "file", f"{str(path)!r}, a folder, pipe, socket or device", "a regular file",
        "name a file", file=str(path),
    )  # fmt: skip


def read_bytes(path: str | os.PathLike[str], most: int = MAX_BYTES) -> bytes:
    """All of a regular file of at most `most` bytes; raises as `open_regular` does, or for more."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    require(len(content) <= most, "file", f"{str(path)!r} of more than {most} bytes",
            f"at most {most} bytes", "it is not what it is taken for", file=str(path))  # fmt: skip
    return content


def parse_json_object(text: bytes) -> dict[str, Any]:
    """The JSON object in `text`; `ValueError` for anything else, duplicate keys included."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {key[:80]!r} stands twice")
            result[key] = value
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}")
    if too_deep(value):
        raise ValueError("nested too deeply")
    return value


def too_deep(value: Any) -> bool:
    """Whether lists and mappings lie in each other more than `MAX_DEPTH` deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def read_json_object(path: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """`parse_json_object` of a file.

    Raises
    ------
    GloraError
        Calling the file `name`, where it cannot be read or holds anything else.
    """
    try:
        return parse_json_object(read_bytes(path))
    except GloraError:
        raise
    except (OSError, ValueError) as error:
        raise unfit(
            name, f"{str(path)!r}, which cannot be read ({error})", "a file with one JSON object",
            "restore the file, or leave it out", file=str(path),
        ) from None  # fmt: skip
