"""A merge written down: ``glora aggregate RECIPE.toml``, read as the command line it stands for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ..errors import clean
from ..runtime.reading import read_bytes
from .client_list import client_entry
from .command import Command

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["RecipeCommand"]

_FORM = "a path, or a table with path, name and weight"


class RecipeCommand(Command):
    """A command whose first argument may be a file with its options, by their long names.

    Options given beside it come after those in the file, so that they count.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].endswith(".toml"):
            args = [*self._arguments(ctx, Path(args[0])), *args[1:]]
        return super().parse_args(ctx, args)

    def _arguments(self, ctx: click.Context, file: Path) -> Iterator[str]:
        try:
            recipe = tomllib.loads(read_bytes(file).decode())
        except (OSError, ValueError, RecursionError) as error:
            raise click.BadParameter(
                clean(f"{file} cannot be read: {error}"), ctx, param_hint="RECIPE.toml"
            ) from None
        flags = {
            name.removeprefix("--"): option
            for option in self.params
            if isinstance(option, click.Option) and option.is_flag
            for name in option.opts
        }
        for name, value in recipe.items():
            if name == "clients" and isinstance(value, list):
                yield from _clients(ctx, value)
            elif name in flags and isinstance(value, bool):
                off = flags[name].secondary_opts
                yield from [f"--{name}"] if value else off[:1]
            elif name in ("include", "exclude") and isinstance(value, list):
                yield from (f"--{name}={one}" for one in value)
            else:
                values = value if isinstance(value, list) else [value]
                if any(isinstance(one, (bool, Mapping, list)) for one in values):
                    problem = f"{name} = {value!r:.80} is nothing that --{name} takes"
                    raise click.BadParameter(clean(problem), ctx, param_hint="RECIPE.toml")
                yield f"--{name}={','.join(map(str, values))}"


def _clients(ctx: click.Context, clients: list[Any]) -> Iterator[str]:
    """Folders, or tables with path, name and weight, as in the lines of --clients FILE."""
    weights = []
    for client in clients:
        entry = {"path": client} if isinstance(client, str) else client
        entry = client_entry(json.dumps(entry, default=str)) if isinstance(entry, dict) else _FORM
        if isinstance(entry, str):
            problem = f"clients: {client!r:.80} is no client: {entry}"
            raise click.BadParameter(clean(problem), ctx, param_hint="RECIPE.toml")
        name = f"{entry['name']}=" if "name" in entry else ""
        yield f"{name}{entry['path']}"
        weights += [str(entry["weight"])] if "weight" in entry else []
    if weights:
        if len(weights) < len(clients):
            raise click.BadParameter(
                "clients: give all of them a weight, or none", ctx, param_hint="RECIPE.toml"
            )
        yield f"--weights={','.join(weights)}"
