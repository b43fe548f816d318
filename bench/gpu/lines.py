"""Results as JSON lines: whole or not there at all, whatever ends the process that writes them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

__all__ = ["NAME", "Lines", "attempts", "read"]

NAME = "run.jsonl"


class Lines:
    """Appends to a file, one system call a line: a kill falls between lines, never into one."""

    def __init__(self, path: Path, **common: Any) -> None:
        self.path, self.common = path, common

    def add(self, kind: str, **values: Any) -> None:
        """One line, on its way to the disk when this returns."""
        line = {"kind": kind, "at": round(time.time(), 3), **self.common, **values}
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps(line, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """Every line of a run, in order; none where there is no file yet."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def attempts(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines of each step's last attempt, by step; a repeated step replaces what it found."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        step = line["step"]
        if line["kind"] in ("start", "skipped") or step not in found:
            found[step] = []
        found[step].append(line)
    return found
