"""`glora` on the command line.

One file per command. What a command finds out is one plain dictionary (`facts`, `measure`), which
`show` prints for people and ``--json`` prints for machines. torch and the rest of glora are
imported by the commands when they run (`loading`), so that usage and help answer at once.
"""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from ..errors import shown
from ..runtime.streams import steady
from ..version import __version__
from . import aggregate, apply, compare, fl, inspect, job, readout, update
from .command import Command
from .options import option
from .recipe import RecipeCommand

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """The commands; what was one of aggregate's options names its successor."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["aggregate"] and (update := _as_update(args[1:])):
            raise click.UsageError(
                f"aggregate has no {update[0]}, that is a command of its own: "
                f"glora update {shlex.join(update[1:])}",
                ctx,
            )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:  # what was typed may be a signed URL
            raise click.UsageError(shown(error.format_message()), error.ctx) from None


def _as_update(words: list[str]) -> list[str]:
    """The option that makes an update of `aggregate`'s words, and what `glora update` then takes.

    Empty if there is none.
    """
    names = [word.partition("=")[0] for word in words]
    former = [name for name in names if name in ("--update", "--add", "--remove")]
    state, rest = "STATE", list(words)
    if "--update" in former:
        at = names.index("--update")
        _, _, value = rest.pop(at).partition("=")
        if not value and rest[at:] and not rest[at].startswith("-"):
            value = rest.pop(at)
        state = value or state
    return [former[0], state, *rest] if former else []


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
