"""Files of an adapter folder, opened only where they cannot lead elsewhere."""

from __future__ import annotations

import os
import stat
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import GloraError, Refusal
from ..runtime.reading import parse_json_object, read_bytes

__all__ = [
    "find_file",
    "missing",
    "only_adapter",
    "parse_object",
    "read_text",
    "unread_weights",
    "what_else",
]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf")
#: Such files that hold no trained weights, or those of the adapter once more.
_NO_WEIGHTS = (
    "adapter_model.", "optimizer", "scheduler", "scaler", "rng_state", "training_args",
    "random_states", "sampler", "server.safetensors",
)  # fmt: skip
_LOOKED_AT = 1000  # entries of a folder; why: only to name what lies there, of perhaps millions


def _adapters_in(folder: Path) -> list[Path]:
    """Folders in `folder`, no links, that are adapters: checkpoints, or named ones."""
    inside = (path for path in islice(folder.iterdir(), _LOOKED_AT) if not path.is_symlink())
    found = [path for path in inside if (path / "adapter_config.json").is_file()]
    return sorted(found, key=lambda path: (len(path.name), path.name))  # checkpoint-1000 last


def only_adapter(folder: Path) -> Path:
    """The one adapter folder that `folder` holds where it is none itself; else `folder`."""
    if os.path.lexists(folder / "adapter_config.json"):
        return folder
    inside = _adapters_in(folder)
    return inside[0] if len(inside) == 1 else folder


def what_else(path: Path) -> Refusal | None:
    """Why `path` is no adapter at first sight, None where it may be one."""
    expected = "a folder written by PeftModel.save_pretrained"
    if path.is_file():
        if (path.parent / "adapter_config.json").is_file():
            remedy = f"name its folder, {str(path.parent)!r}"
            found = "a file of an adapter folder"
        elif path.suffix == ".safetensors":
            return None
        else:
            found = "a file that holds no safetensors"
            remedy = "name a folder, or a LoRA file that carries its configuration"
        return Refusal(
            "a file, not an adapter folder", None, str(path), None, found, expected, remedy
        )
    if not path.is_dir():
        there = os.path.lexists(path)
        found = f"{'no folder or regular file' if there else 'nothing'} at {str(path)!r}"
        return Refusal("no such folder", found=found, expected=expected, remedy="check the path")
    if os.path.lexists(path / "adapter_config.json"):
        return None
    inside = [p.name for p in _adapters_in(path)]
    if inside:
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        return Refusal(
            "the folder holds several adapters and is none itself",
            found=f"adapters in {', '.join(inside[:3])}{more}",
            expected=expected,
            remedy=f"name one of them, {str(path / inside[-1])!r}, or all with {str(path)!r}/*",
        )
    files = [p for p in islice(path.iterdir(), _LOOKED_AT) if p.suffix == ".safetensors"]
    if (path / "config.json").is_file():
        return Refusal(
            "the folder holds a base model, not an adapter",
            file="config.json",
            found="config.json without adapter_config.json",
            expected=expected,
            remedy="name the adapter's folder; the base is not needed",
        )
    if len(files) == 1 and files[0].name != "adapter_model.safetensors":
        return Refusal(
            "the folder is no adapter folder",
            file=files[0].name,
            found=f"{files[0].name} without adapter_config.json",
            expected=expected,
            remedy=f"name the file itself, {str(files[0])!r}, if it carries its configuration",
        )
    return None


def unread_weights(folder: Path) -> tuple[str, ...]:
    """A sentence on the weight files beside an adapter that are not part of it, where there are.

    Folders in the folder are looked into once, unless they are adapters or checkpoints themselves.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in islice(entries, _LOOKED_AT):
            if entry.is_file():
                found += [entry.name] * _is_weights(entry.name)
            elif not entry.is_dir() or entry.name.startswith((".", "checkpoint-", "global_step")):
                continue
            elif os.path.exists(os.path.join(entry, "adapter_config.json")):
                found.append(f"{entry.name}/ (an adapter by itself)")
            else:
                inside = islice(os.listdir(entry), _LOOKED_AT)
                found += [f"{entry.name}/{name}" for name in inside if _is_weights(name)]
    if not found:
        return ()
    found.sort()
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    beside = f"{', '.join(found[:3])}{more}"
    return (f"weights beside the adapter are not read and not in the result: {beside}",)


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS) and not name.startswith(_NO_WEIGHTS)


def find_file(folder: Path, name: str, client: str) -> tuple[Path | None, list[Refusal]]:
    """Path of the regular file `name` in `folder`, or why it cannot be used.

    A symlink may point anywhere inside the folder, never outside: a client's folder must not make
    the server read its own files.
    """
    path = folder / name
    try:
        if stat.S_ISREG(os.lstat(path).st_mode):  # as nearly always: no link to be followed
            return path, []
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a symlink loop, before Python 3.13
        return None, [missing(name, client, "nothing that can be opened")]
    if not target.is_relative_to(folder.resolve()):
        return None, [
            Refusal(
                "the file lies outside its folder",
                client=client,
                file=name,
                found=f"a link to {str(target)!r}",
                expected=f"a file inside {str(folder)!r}",
                remedy="copy the folder with its links followed (cp -rL)",
            )
        ]
    if not target.is_file():
        return None, [
            Refusal(
                "not a regular file",
                client=client,
                file=name,
                found="a folder, pipe or device",
                expected="a regular file",
                remedy="save the adapter with PeftModel.save_pretrained",
            )
        ]
    return target, []


def missing(name: str, client: str, found: str) -> Refusal:
    return Refusal(
        "the file is missing",
        client=client,
        file=name,
        found=found,
        expected=f"a regular file {name}",
        remedy="save the adapter with PeftModel.save_pretrained",
    )


def read_text(folder: Path, name: str, client: str) -> tuple[bytes | None, list[Refusal]]:
    """What stands in the file `name` of `folder`, or why it cannot be had."""
    path, problems = find_file(folder, name, client)
    if path is None:
        return None, problems
    try:
        return read_bytes(path), []
    except GloraError as error:
        (refusal,) = error.refusals
        return None, [_unreadable(name, client, refusal.found, refusal.expected)]


def parse_object(
    text: bytes, name: str, client: str
) -> tuple[dict[str, Any] | None, list[Refusal]]:
    """The JSON object in what `read_text` gave, or why there is none."""
    try:
        return parse_json_object(text), []
    except ValueError as error:
        return None, [_unreadable(name, client, str(error), "one JSON object with distinct keys")]


def _unreadable(name: str, client: str, found: str, expected: str) -> Refusal:
    return Refusal(
        "the file is not readable JSON",
        client=client,
        file=name,
        found=found,
        expected=expected,
        remedy="save the adapter again",
    )
