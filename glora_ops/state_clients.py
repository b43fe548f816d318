"""What a state keeps of very many clients beside its file: a folder of two files.

``clients-<key>/clients.jsonl`` has a line of JSON for each client, its name, weight and record, and
``clients-<key>/clients.safetensors`` the statistics of each module. The key is made of their
digests, which stand in the state: another state's clients lie in another folder, so that a state
that is replaced is the old or the new one at any moment, and where both lie may be moved or copied.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapters.safetensors_header import read_header
from .adapters.stored import Stored, signature
from .errors import GloraError, require, unfit
from .runtime.outputs import new_folder
from .runtime.reading import parse_json_object, read_bytes
from .runtime.tensors import read_mark, save_tensors

__all__ = [
    "BESIDE",
    "MAX_LINES",
    "Apart",
    "about_clients",
    "folder_name",
    "read_apart",
    "remove_unused",
    "strangers",
]

#: Clients that a state's own file holds: with more their record is beside it.
BESIDE = 2**16  # why: 340 bytes each are a fifth of what a header may be
MAX_LINES = 2**31  # bytes; why: two thousand for each of the most clients
LINES, TENSORS = "clients.jsonl", "clients.safetensors"
#: Parts of a module that hold a row for each client.
PARTS = ("client_stats", "present")

_FOLDER = "the folder that was written beside the state"
_LOST = "copy it to beside the state, whole, or aggregate again"


@dataclass(frozen=True)
class Apart:
    """Clients of a state on their way into files.

    Attributes
    ----------
    name : str
        Of the folder.
    lines : bytes
    tensors : dict of str to Tensor
        By their names in the state.
    """

    name: str
    lines: bytes
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, about: dict[str, Any], tensors: dict[str, Tensor]) -> Apart:
        """Take the clients out of what a state's file would hold, leaving a digest there."""
        record = about["record"]
        entries = [None] * len(about["clients"]) if record is None else record["clients"]
        rows = zip(about.pop("clients"), about.pop("weights"), entries, strict=True)
        lines = "".join(
            json.dumps({"name": name, "weight": weight, "record": entry}) + "\n"
            for name, weight, entry in rows
        ).encode()
        require(len(lines) <= MAX_LINES, "state", f"clients of {len(lines)} bytes",
                f"at most {MAX_LINES}", "fewer clients, or shorter names")  # fmt: skip
        about["beside"] = {
            "clients": len(entries),
            "bytes": len(lines),
            "sha256": hashlib.sha256(lines).hexdigest(),
        }
        if record is not None:
            about["record"] = record | {"clients": []}
        own = [name for name in tensors if name.rpartition("/")[2] in PARTS]
        return cls(folder_name(about), lines, {name: tensors.pop(name) for name in own})

    def write(self, folder: Path) -> None:
        """Put both files beside a state in `folder`, in one step."""
        with new_folder(folder / self.name, strangers) as building:
            (building / LINES).write_bytes(self.lines)
            save_tensors(self.tensors, building / TENSORS, {})


def folder_name(about: Mapping[str, Any]) -> str:
    """Where the clients lie that the metadata of a state tell of."""
    digests = [about["tensors"][name] for name in sorted(about["tensors"])]
    key = hashlib.sha256("".join([about["beside"]["sha256"], *digests]).encode()).hexdigest()
    return f"clients-{key[:16]}"


def strangers(folder: Path) -> list[str]:
    """What in such a folder glora did not write, by name."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name]
    return [
        path.name
        for path in sorted(folder.iterdir())
        if path.name not in (LINES, TENSORS) or path.is_symlink() or not path.is_file()
    ]


def remove_unused(place: Path, about: Mapping[str, Any], mark: str) -> None:
    """Remove the clients of a state that was replaced, unless another in `place` has the same."""
    with suppress(KeyError, TypeError, OSError):  # of metadata that nobody has checked
        folder = place / folder_name(about)
        others = (read_mark(path, mark) or {} for path in place.glob("*.safetensors"))
        used = any("beside" in other and folder_name(other) == folder.name for other in others)
        if not used and not strangers(folder):
            shutil.rmtree(folder)


def about_clients(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a state with its clients in them; checked by their digest only.

    Raises
    ------
    GloraError
        If the lines are missing, or not what was written.
    """
    beside = about["beside"]
    file = _file(path, about, LINES)
    text = read_bytes(file, beside["bytes"])
    require(hashlib.sha256(text).hexdigest() == beside["sha256"], "clients",
            f"{str(file)!r} with another SHA-256", "what was written with the state", _LOST,
            file=str(file))  # fmt: skip
    try:
        rows = parse_json_object(b'{"rows": [%s]}' % b",".join(text.splitlines()))["rows"]
        fit = len(rows) == beside["clients"]
        names, weights, entries = zip(
            *((row.pop("name"), row.pop("weight"), row.pop("record")) for row in rows), strict=True
        )
        fit = fit and not any(rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _odd(file, repr(error)) from None
    record = about.get("record")
    without = record is None
    if not fit or any((entry is None) != without for entry in entries):
        raise _odd(file, "other entries")
    told = dict(about) | {"clients": list(names), "weights": list(weights)}
    if isinstance(record, dict):
        told["record"] = record | {"clients": list(entries)}
    del told["beside"]
    return told


def read_apart(path: Path, about: Mapping[str, Any], max_bytes: int) -> Stored:
    """What reads the clients' tensors; raises `GloraError` where there are none."""
    file = _file(path, about, TENSORS)
    found = signature(file.stat())
    header, problems = read_header(file, None, max_bytes=max_bytes)
    if header is None or header.metadata:
        raise _odd(file, str(problems[0]) if problems else "metadata")
    return Stored(file, None, header.tensors, found)


def _file(path: Path, about: Mapping[str, Any], name: str) -> Path:
    folder = path.resolve().parent / folder_name(about)
    file = folder / name
    there = file.is_file() and not file.is_symlink() and not folder.is_symlink()
    require(
        there, "state", f"no file {str(file)!r}", f"{_FOLDER}, {str(path)!r}", _LOST, file=str(file)
    )
    return file


def _odd(file: Path, found: str) -> GloraError:
    return unfit(
        "clients",
        f"{str(file)!r}, {found:.200}",
        "clients as glora writes them",
        _LOST,
        file=str(file),
    )
