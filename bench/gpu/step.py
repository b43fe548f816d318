"""What every step has: where it writes, whether it rehearses, and rows that may fail alone."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu.lines import NAME, Lines

__all__ = ["Step", "main"]

ROOT = Path(__file__).resolve().parents[2]


class Step:
    """One step from inside.

    Attributes
    ----------
    rehearse : bool
        No device: Triton's interpreter on the CPU, tiny shapes, times that mean nothing.
    """

    def __init__(self, name: str, out: Path, rehearse: bool) -> None:
        self.name, self.out, self.rehearse = name, out, rehearse
        self.device = "cpu" if rehearse else "cuda"
        self.lines = Lines(out / NAME, step=name)
        self.wrong = 0

    @contextmanager
    def row(self, **described: Any) -> Iterator[dict[str, Any]]:
        """One line of results, written when the block ends; an error goes into it, not further.

        A row that sets ``ok`` to False counts as a failure of its step too.
        """
        found: dict[str, Any] = {}
        try:
            yield found
        except Exception as error:
            traceback.print_exc()
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            found["error"] = told.replace(str(ROOT), "…")[:300]
        self.wrong += "error" in found or found.get("ok") is False
        self.lines.add("row", **described, **found)


def main(body: Callable[[Step], None]) -> None:
    """Run a step's body; the exit status is 1 where a row failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    # A copy of it: pytest puts another in its place.
    threading.Thread(target=_leave_with, args=(os.dup(0),), daemon=True).start()
    step = Step(Path(sys.argv[0]).stem, given.out, given.rehearse)
    step.lines.add("process", process=os.getpid())
    body(step)
    sys.exit(step.wrong > 0)


def _leave_with(parent: int) -> None:
    """End with the process that holds the other end of this pipe."""
    if not os.isatty(parent) and not os.read(parent, 1):
        os._exit(1)
