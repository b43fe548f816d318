"""The class of every command: typer's, with plain help, and files that are no URLs."""

from __future__ import annotations

from typing import get_type_hints

import click
from typer.core import TyperCommand
from typer.models import ArgumentInfo

from ..runtime.urls import is_url

__all__ = ["Command"]


class Command(TyperCommand):
    """Lists arguments and options with what their annotations say of them.

    Under click 8.5 typer 0.20 loses the help of arguments.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for param in self.get_params(ctx):
            given = ctx.params.get(param.name or "")
            if isinstance(param.type, click.Path) and isinstance(given, str) and is_url(given):
                raise click.BadParameter(
                    f"{given} is a URL. Only clients are read from URLs, by aggregate, compare, "
                    "job plan and update --add: name a place of this machine, and copy it from or "
                    "to where it belongs",
                    ctx,
                    param,
                )
        return rest

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: `format_options` writes them, whichever click asks for what."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.find_help()
        for title, kind in (("Arguments", click.Argument), ("Options", click.Option)):
            params = [param for param in self.get_params(ctx) if isinstance(param, kind)]
            records = [record for param in params if (record := param.get_help_record(ctx))]
            if records:
                with formatter.section(title):
                    # typer escapes brackets for rich, which is not in use here
                    formatter.write_dl([(name, said.replace("\\[", "[")) for name, said in records])

    def find_help(self) -> None:
        """Give arguments the help that the command's annotations hold."""
        written = getattr(self.callback, "__wrapped__", self.callback)
        hints = get_type_hints(written, include_extras=True)
        for param in self.params:
            for info in getattr(hints.get(param.name or ""), "__metadata__", ()):
                if isinstance(param, click.Argument) and isinstance(info, ArgumentInfo):
                    param.help = info.help
