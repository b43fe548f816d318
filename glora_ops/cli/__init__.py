"""`glora` on the command line.

One file per command. What a command finds out is one plain dictionary (`facts`, `measure`), which
`show` prints for people and ``--json`` prints for machines. torch and the rest of glora are
imported by the commands when they run (`loading`), so that usage and help answer at once.
"""

from __future__ import annotations

from typing import Annotated

import click
import typer
from typer.core import TyperGroup

from ..runtime.streams import steady
from ..version import __version__
from . import aggregate, apply, compare, fl, inspect, job, readout, update
from .command import Command
from .options import option
from .recipe import RecipeCommand

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """The commands; until the next version also the former spelling of one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--update") if "--update" in args[:-1] else None
        if at is not None and args[0] == "aggregate" and not args[at + 1].startswith("-"):
            args = ["update", args[at + 1], *args[1:at], *args[at + 2 :]]
            typer.echo("glora aggregate --update STATE is glora update STATE now", err=True)
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="glora",
    cls=_Commands,
    no_args_is_help=True,
    suggest_commands=False,  # click does
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"glora {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Example: glora aggregate clients/ann clients/bob -o out --rank 32 --readout 8"
)
def glora(
    version: Annotated[
        bool,
        option(
            "--version", example="glora --version", help="Print the version.",
            callback=_version, is_eager=True,
        ),
    ] = False,
) -> None:  # fmt: skip
    """Merge the LoRA adapters of many clients into one server state, whatever their ranks.

    1. Look. A client is a folder as PeftModel.save_pretrained writes it, with a glora.json
    {"num_examples": n} in it if it is to count by its data. glora inspect shows what one
    holds, glora compare which of several agree.

    2. Aggregate. glora aggregate writes server.safetensors, the state: the weighted mean
    of all updates at a rank of your choice, and certificates of how much of it that rank holds.

    3. Read out. glora readout slices an adapter of any rank out of the state;
    PeftModel.from_pretrained loads it, and glora apply adds it to the base model's weights.

    glora update adds clients to a state and withdraws others.

    glora job aggregates in parts, with any number of processes on any machines.

    glora fl runs federated experiments: training, aggregation, reports.

    Exit codes: 0 done, 1 refused, 2 usage, 3 done with clients skipped, 130 interrupted,
    143 terminated.
    """


for module in (inspect, compare, aggregate, update, readout, apply):
    name = module.__name__.rpartition(".")[2]
    command = RecipeCommand if module is aggregate else Command
    app.command(name, cls=command, epilog=module.EXAMPLE)(getattr(module, name))
app.add_typer(fl.app)
app.add_typer(job.app)


def main() -> None:
    """Run `glora` with the arguments of the process."""
    steady()
    app(prog_name="glora")
