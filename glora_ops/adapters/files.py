"""Files of an adapter folder, opened only where they cannot lead elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import GloraError, Refusal
from ..reading import parse_json_object, read_bytes

__all__ = ["find_file", "read_json_object"]


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


def read_json_object(
    folder: Path, name: str, client: str
) -> tuple[dict[str, Any] | None, list[Refusal]]:
    """The JSON object in the file `name` of `folder`, or why it cannot be had."""
    path, problems = find_file(folder, name, client)
    if path is None:
        return None, problems
    try:
        return parse_json_object(read_bytes(path)), []
    except GloraError as error:
        (refusal,) = error.refusals
        found, expected = refusal.found, refusal.expected
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
