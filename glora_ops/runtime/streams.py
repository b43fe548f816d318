"""stdout and stderr that never raise: what cannot be shown does not undo what was done."""

from __future__ import annotations

import io
import select
import sys
from typing import Any

__all__ = ["output_trouble", "steady"]


class _Steady(io.FileIO):
    """Writes to a descriptor until the first error, and remembers that."""

    trouble: OSError | None = None

    def write(self, data: Any, /) -> int:
        while self.trouble is None:
            try:
                count = super().write(data)
            except OSError as error:
                self.trouble = error
                break
            if count is not None:
                return count
            select.select([], [self], [])  # a descriptor that does not block, and is full
        return len(memoryview(data).cast("B"))


def steady() -> None:
    """Put such streams in the place of `sys.stdout` and `sys.stderr`.

    Characters that their encoding lacks are replaced.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):  # closed, or not a file
            continue
        stream.flush()
        made = io.TextIOWrapper(
            io.BufferedWriter(_Steady(descriptor, "w", closefd=False)),
            encoding=stream.encoding,
            errors="replace" if name == "stdout" else "backslashreplace",
            line_buffering=stream.line_buffering,
        )
        setattr(sys, name, made)


def output_trouble() -> OSError | None:
    """Why stdout did not take all that was printed; None where it did, or is not steady."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Steady):
        return None
    sys.stdout.flush()
    return raw.trouble
