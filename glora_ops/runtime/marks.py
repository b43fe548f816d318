"""Marks: digests of a folder's files, by which what somebody changed there is told."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["digests", "unchanged"]


def digests(contents: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of what files hold, by their names, in order."""
    return {name: hashlib.sha256(contents[name]).hexdigest() for name in sorted(contents)}


def unchanged(entry: Path, mark: Mapping[str, Any]) -> bool:
    """Whether `entry` is a file, not a link, that holds what `mark`, made by `digests`, says."""
    if entry.is_symlink() or not entry.is_file() or entry.name not in mark:
        return False
    return bool(mark[entry.name] == digests({entry.name: entry.read_bytes()})[entry.name])
