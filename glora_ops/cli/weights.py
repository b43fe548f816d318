"""``--weights``: numbers in the clients' order, or a JSON file by the clients' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from ..errors import GloraError, Refusal, Refusals, Refused, listing
from .show import counted

__all__ = ["is_file", "numbers", "weights_file"]


def is_file(weights: str | None) -> bool:
    return weights is not None and weights.endswith(".json")


def numbers(text: str, clients: int) -> list[float]:
    try:
        given = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither numbers such as 3,1,2 nor a .json file", param_hint="--weights"
        ) from None
    if len(given) != clients:
        raise typer.BadParameter(
            f"{counted(len(given), 'number')} for {counted(clients, 'client')}",
            param_hint="--weights",
        )
    return given


def weights_file(path: Path, clients: Sequence[str], settings: Mapping[str, Any]) -> list[float]:
    """Weights by the clients' names; every name that lacks one or has one for nothing is listed."""
    from ..arguments import check_weights
    from ..runtime.reading import parse_json_object, read_bytes

    wanted = "one number for each client folder, by its name"
    remedy = 'write {"folder name": number, …}, or give the numbers in order: --weights 3,1,2'
    try:
        content = parse_json_object(read_bytes(path))
    except GloraError:
        raise
    except (OSError, ValueError) as error:
        problem = "the weights cannot be read"
        raise Refused(
            [Refusal(problem, None, str(path), None, str(error), wanted, remedy)]
        ) from None
    names = dict.fromkeys(clients)
    refusals = Refusals(
        Refusal("the client has no weight", name, str(path), None, "no such name", wanted, remedy)
        for name in names
        if name not in content
    )
    refusals += [
        Refusal("the weight is for no client", None, str(path), None, repr(name), wanted, remedy)
        for name in content
        if name not in names
    ]
    known_numbers = {name: value for name, value in content.items() if type(value) in (int, float)}
    refusals += [
        Refusal("the weight is no number", name, str(path), None, repr(value)[:80], wanted, remedy)
        for name, value in content.items()
        if name not in known_numbers
    ]
    known = [name for name in names if name in known_numbers]
    if known:
        with listing(refusals):
            given = [known_numbers[name] for name in known]
            check_weights(given, known, settings)
    if refusals:
        raise Refused(refusals)
    return [float(known_numbers[client]) for client in clients]
