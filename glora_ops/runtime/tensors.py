"""safetensors files with JSON in their metadata, the same bytes for the same content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["read_mark", "save_tensors"]


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """`save_file`, whose order of metadata changes from call to call, with the metadata sorted."""
    save_file(dict(tensors), path, dict(metadata))
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))
    path.chmod(0o644)  # the library's are the owner's alone


def read_mark(path: Path, key: str) -> dict[str, Any] | None:
    """The JSON object under `key` in a file's metadata; None where there is no such thing."""
    try:
        if path.is_symlink() or not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(key, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
