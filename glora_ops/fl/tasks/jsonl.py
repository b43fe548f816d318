"""Local data files, one checked JSON object per line, or data sets of the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import GloraError, Refusal, Refused, require

__all__ = ["from_hub", "is_text", "read_jsonl"]

SHOWN = 5  # faulty lines; why: the others are mostly of the same kind


def read_jsonl(path: Path, check: Callable[[Mapping[str, Any]], str]) -> list[dict[str, Any]]:
    """The objects of a file.

    Parameters
    ----------
    path : path
    check : callable
        What is wrong with an object, in words; empty if nothing is.

    Raises
    ------
    Refused
        Naming the file, line and problem of the first bad lines.
    """
    require(path.is_file(), "data", str(path), "an existing .jsonl file", "give --data-dir DIR")
    rows, refusals = [], []
    with path.open("rb") as file:
        for n, line in enumerate(file, 1):
            text = line.decode("utf-8-sig", errors="replace")
            if not text.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                problem = check(row) if isinstance(row, dict) else "not a JSON object"
            except UnicodeDecodeError:
                problem = "not UTF-8"
            except (ValueError, RecursionError):
                problem = "not JSON"
            if not problem:
                rows.append(row)
                continue
            refusals.append(Refusal(problem, file=f"{path}:{n}", found=text.strip()[:80]))
            if len(refusals) == SHOWN:
                break
    if refusals:
        raise Refused(refusals)
    require(bool(rows), "data", f"{path} without a line", "at least one example")
    return rows


def is_text(value: object) -> bool:
    """Whether `value` is text that a tokenizer can read: no half of a surrogate pair."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def from_hub(*which: str, split: str) -> Any:
    """``datasets.load_dataset``.

    Raises
    ------
    GloraError
        Naming the data set that cannot be had.
    """
    try:
        from datasets import load_dataset

        return load_dataset(*which, split=split)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise GloraError(
            f"data: cannot load {' '.join(which)!r} ({why}); expected a data set on the Hub that "
            "can be reached, and the package datasets; or give --data-dir DIR with local files"
        ) from error
