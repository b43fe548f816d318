"""Clients listed in a file: one a line, tab-separated or as JSON objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import Refusal, Refusals, Refused, unfit
from .weights import is_file, numbers

if TYPE_CHECKING:
    from ..adapters.places import Place

__all__ = ["client_entry", "named_clients", "read_client_list"]

_FORM = (
    'PATH, or PATH, NAME and WEIGHT with tabs between, or {"path": …, "name": …, "weight": …} '
    "without what is not given"
)
_KEYS = ("path", "name", "weight")


def named_clients(
    clients: Sequence[str] | None, client_list: Path | None, weights: str | None
) -> tuple[Sequence[str], list[float] | None]:
    """Clients and weights that the command line itself names; files of either are read later."""
    if bool(clients) == (client_list is not None):
        raise typer.BadParameter(
            "either the clients' folders, or --clients FILE", param_hint="CLIENT_DIR"
        )
    if weights is not None and client_list is not None and not is_file(weights):
        raise typer.BadParameter("they stand in the file of --clients", param_hint="--weights")
    named = clients or []
    return named, None if weights is None or is_file(weights) else numbers(weights, len(named))


def read_client_list(file: Path) -> tuple[list[Place], list[float] | None]:
    """Clients and their weights, None where none is given; blank lines and ``#`` are skipped.

    Raises
    ------
    Refused
        With every line that is no client, or if only some of them have a weight.
    """
    from ..adapters.places import find_places

    specs: list[str] = []
    weights: list[float | None] = []
    refusals = Refusals()

    def refuse(problem: str, found: str, remedy: str = "correct the line") -> None:
        refusals.append(Refusal(problem, None, str(file), None, found, _FORM, remedy))

    for number, line in enumerate(_lines(file), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        entry = client_entry(text)
        if isinstance(entry, str):
            refuse("a line is no client", f"line {number}, {text[:80]!r}: {entry}")
            continue
        name = entry.get("name")
        specs.append(entry["path"] if name is None else f"{name}={entry['path']}")
        weights.append(entry.get("weight"))
    given = [w for w in weights if w is not None]
    if given and len(given) < len(weights):
        refuse("only some clients have a weight", f"{len(given)} of {len(weights)}",
               "give all of them one, or none")  # fmt: skip
    if not refusals and not specs:
        refuse("the list is empty", "no client", "name the clients' folders, one a line")
    if refusals:
        raise Refused(refusals)
    return find_places(specs), given or None


def _lines(file: Path) -> list[str]:
    from ..runtime.reading import read_bytes

    try:
        return read_bytes(file).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise unfit(
            "--clients", f"{str(file)!r}, which cannot be read ({error})",
            "a file of text, UTF-8, one client a line", "correct the file", file=str(file),
        ) from None  # fmt: skip


def client_entry(text: str) -> dict[str, Any] | str:
    """The fields of a line, or what is wrong with it."""
    from ..adapters.places import is_name
    from ..runtime.reading import parse_json_object

    if text.startswith("{"):
        try:
            entry = parse_json_object(text.encode())
        except ValueError as error:
            return str(error)
        entry = {key: value for key, value in entry.items() if value is not None}
    else:
        fields: Sequence[str] = [field.strip() for field in text.split("\t")]
        if len(fields) > len(_KEYS):
            return f"{len(fields)} fields"
        entry = {key: value for key, value in zip(_KEYS, fields, strict=False) if value}
        try:
            entry |= {"weight": float(entry["weight"])} if "weight" in entry else {}
        except ValueError:
            return f"the weight {entry['weight']!r} is no number"
    unknown = entry.keys() - set(_KEYS)
    if unknown:
        return f"unknown {', '.join(sorted(unknown))}"
    if not isinstance(entry.get("path"), str) or not entry["path"]:
        return "no path"
    if "name" in entry and not (isinstance(entry["name"], str) and is_name(entry["name"])):
        return f"the name {entry['name']!r} is not of letters, digits, '.', '-' and '_'"
    if "weight" in entry and type(entry["weight"]) not in (int, float):
        return f"the weight {entry['weight']!r} is no number"
    return entry
