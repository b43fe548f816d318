"""State files taken apart, spoilt and put together again, with or without true checksums."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

Parts = tuple[dict[str, Tensor], dict[str, Any]]


def taken_apart(path: Path) -> Parts:
    """Tensors and metadata of a state file, without its checksums."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["glora"])
    about.pop("tensors", None)
    about.pop("sha256", None)
    return load_file(path), about


def put_together(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """A file of format 3 whose checksums are true, whatever it holds; older formats have none."""
    if about.get("format_version") == 3:
        about = about | {"tensors": {name: digest(x) for name, x in tensors.items()}}
        about["sha256"] = hashlib.sha256(canonical(about)).hexdigest()
    save_file(tensors, path, metadata={"glora": json.dumps(about)})


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(x: Tensor) -> str:
    """Of the tensor as safetensors itself writes it."""
    content = save({"x": x.contiguous()})
    (length,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + length])["x"]
    data = content[8 + length :]
    return hashlib.sha256(canonical([entry["dtype"], entry["shape"]]) + data).hexdigest()


def as_format(path: Path, version: int) -> None:
    """The same state as an earlier format has it."""
    tensors, about = taken_apart(path)
    if version == 1:
        del about["record"]
    put_together(path, tensors, about | {"format_version": version})
