"""Files of an adapter folder, opened only where they cannot lead elsewhere."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import Refusal

__all__ = ["find_file", "parse_json_object", "read_json_object", "unread_weights"]

MAX_JSON_BYTES = 4 * 2**20

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf")
#: Such files that hold no trained weights, or those of the adapter once more.
_NO_WEIGHTS = (
    "adapter_model.", "optimizer", "scheduler", "scaler", "rng_state", "training_args",
    "random_states", "sampler", "server.safetensors",
)  # fmt: skip
_LOOKED_AT = 1000


def unread_weights(folder: Path) -> tuple[str, ...]:
    """A sentence on the weight files beside an adapter that are not part of it, where there are.

    Folders in the folder are looked into once, unless they are adapters or checkpoints themselves.
    """
    found = []
    for path in islice(folder.iterdir(), _LOOKED_AT):
        if path.is_file():
            found += [path.name] * _is_weights(path.name)
        elif path.is_dir() and not (
            path.name.startswith((".", "checkpoint-", "global_step"))
            or (path / "adapter_config.json").exists()
        ):
            inside = islice(path.iterdir(), _LOOKED_AT)
            found += [f"{path.name}/{p.name}" for p in inside if _is_weights(p.name)]
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
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a symlink loop, before Python 3.13
        return None, [
            Refusal(
                "the file is missing",
                client=client,
                file=name,
                found="nothing that can be opened",
                expected=f"a regular file {name}",
                remedy="save the adapter with PeftModel.save_pretrained",
            )
        ]
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
    return value


def read_json_object(
    folder: Path, name: str, client: str
) -> tuple[dict[str, Any] | None, list[Refusal]]:
    """The JSON object in the file `name` of `folder`, or why it cannot be had."""
    path, problems = find_file(folder, name, client)
    if path is None:
        return None, problems
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        found, expected = f"{size} bytes", f"at most {MAX_JSON_BYTES} bytes"
    else:
        try:
            return parse_json_object(path.read_bytes()), []
        except ValueError as error:
            found, expected = str(error), "one JSON object with distinct keys"
    return None, [
        Refusal(
            "the file is not readable JSON",
            client=client,
            file=name,
            found=found,
            expected=expected,
            remedy="save the adapter again",
        )
    ]
