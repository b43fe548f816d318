"""`glora job`: an aggregation in parts, by any number of processes on any machines."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from inspect import Parameter, Signature, signature
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer

from ..errors import GloraWarning, Refusals, listing
from . import aggregate as whole
from .client_list import named_clients, read_client_list
from .command import Command
from .options import DryRun, Dtype, Json, Overwrite, Pad, Quiet, Readouts, Threads, Verbose, option
from .show import (
    answering,
    clean,
    console,
    counted,
    decimal,
    duration,
    labelled,
    print_json,
    print_skipped,
    progress,
)
from .weights import is_file, weights_file

__all__ = ["app"]

app = typer.Typer(
    name="job",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Aggregate in parts, by many processes on many machines.\n\nPlan once, work in any number "
    "of processes on any machines that see the same files, join at the end. The result is that of "
    "glora aggregate, to the bit.",
    epilog="Example: glora job plan --clients clients.tsv -o job && glora job work job --workers 4 "
    "&& glora job join job -o out --readout 8,16",
)

Folder = Annotated[Path, typer.Argument(metavar="JOB", help="The folder that plan made.")]
#: Options of `glora aggregate` that a plan takes, as they stand there.
PLANNED = (
    "client_list", "weights", "normalise", "missing", "basis", "base", "include", "exclude",
    "on_bad_client", "dense", "seed", "device",
)  # fmt: skip


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with those options before its own."""
    theirs = signature(whole.aggregate, eval_str=True).parameters
    own = [
        p
        for p in signature(command, eval_str=True).parameters.values()
        if p.kind is not Parameter.VAR_KEYWORD
    ]
    all_of_them = [*(theirs[name] for name in PLANNED), *own]
    command.__annotations__ = {p.name: p.annotation for p in all_of_them}
    command.__signature__ = Signature(  # type: ignore[attr-defined]  # which typer looks at
        [p.replace(kind=Parameter.KEYWORD_ONLY) for p in all_of_them]
    )
    return command


@app.command(cls=Command, epilog="Example: glora job plan clients/ann clients/bob -o job --rank 32")
@_with_options
def plan(
    out: Annotated[
        Path,
        option(
            "--out", "-o", metavar="JOB", default=None, example="-o job",
            help="New folder, which all workers can reach. One with the same plan is left as it "
            "is, with what was done of it.",
        ),
    ],
    clients: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CLIENT_DIR...",
            help="One folder per client, as PeftModel.save_pretrained writes it, or its URL "
            "(s3://bucket/ann); NAME=DIR names the client, which is otherwise called by its "
            "folder.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        str | None,
        option(
            "--rank", metavar="N", default="twice the largest rank of a client",
            example="--rank 32",
            help="Rank of the server state.",
        ),
    ] = None,
    robust: Annotated[str | None, typer.Option("--robust", hidden=True)] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    **options: Any,
) -> None:  # fmt: skip
    """Write down which modules are computed together.

    Options are those of glora aggregate, but for what needs all modules at once: --rank auto and
    --robust. Of the clients headers are read, and with --on-bad-client skip every value.
    """
    client_list = options.pop("client_list")
    options |= {"rank": whole.server_rank(rank), "robust": robust}
    weights = options.pop("weights")
    named, given = named_clients(clients, client_list, weights)
    with answering(as_json, writes=True, quiet=quiet) as outcome:
        from ..adapters.places import find_places
        from ..job import plan as make

        refusals = Refusals()
        places = find_places(named)
        if client_list is not None:
            places, given = read_client_list(client_list)
        if is_file(weights):
            with listing(refusals):
                given = weights_file(Path(weights), [place.name for place in places], options)
        options |= {name: options[name] or () for name in ("include", "exclude")}
        with warnings.catch_warnings(), progress() as report:
            warnings.simplefilter("ignore", GloraWarning)
            about = make(
                places, out, given, captured=whole.DEFAULT_CAPTURED, clip=whole.DEFAULT_CLIP,
                progress=report, known=refusals, **options,
            ).about  # fmt: skip
        outcome.wrote(out)
        facts = {
            "job": str(out),
            "clients": [client["name"] for client in about["clients"] if client["kept"]],
            "skipped": about["skipped"],
            "modules": [name for part in about["parts"] for name in part["modules"]],
            "part_bytes": [part["bytes"] for part in about["parts"]],
        }
        if as_json:
            print_json(facts)
        else:
            _print_plan(facts)
    if facts["skipped"]:
        raise typer.Exit(3)


def _print_plan(facts: dict[str, Any]) -> None:
    to = console()
    print_skipped(facts["skipped"])
    clients, modules = counted(len(facts["clients"]), "client"), len(facts["modules"])
    sizes = facts["part_bytes"]
    line = (
        f"{clean(facts['job'])}  {clients}, {counted(modules, 'module')} in "
        f"{counted(len(sizes), 'part')} of at most {decimal(max(sizes))}"
    )
    to.print(labelled("planned: ", "bold green", line), soft_wrap=True)
    to.print(f"next: glora job work {clean(facts['job'])}", soft_wrap=True)


@app.command(cls=Command, epilog="Example: glora job work job --index 0 --of 4")
def work(
    job: Folder,
    index: Annotated[
        int | None,
        option(
            "--index", metavar="I", example="--index 0 --of 4",
            default="what torchrun, Slurm or Kubernetes say in the environment; else 0 of 1",
            help="Which worker this is, from 0.",
        ),
    ] = None,
    of: Annotated[
        int | None,
        option(
            "--of", metavar="N", default="as --index", example="--of 4",
            help="How many workers there are.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        option(
            "--workers", metavar="N", min=1, default="none", example="--workers 4",
            help="Instead of being one, start so many workers on this machine with torchrun, which "
            "starts them again when one is killed.",
        ),
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make this worker's parts, but for those that are made.

    A worker may be killed and started again, and two may have the same index. It reads the
    folders that JOB names. Each of --workers has --threads, or they share the machine's.
    """
    if workers is not None and (index, of) != (None, None):
        raise typer.BadParameter("starts workers, and is none itself", param_hint="--workers")
    kept = "finished parts are kept; the same command goes on"
    with answering(as_json, writes=False, kept=kept, quiet=quiet, threads=threads):
        from ..job import torchrun
        from ..job import work as do

        if workers is not None:
            torchrun(job, workers, threads=threads)
            index, of = 0, 1  # nothing is left, or this process does it
        with warnings.catch_warnings(record=True) as said, progress() as report:
            warnings.simplefilter("always", GloraWarning)
            done = do(job, index, of, progress=report)
        if as_json:
            print_json(asdict(done))
            return
        for warning in said:
            if issubclass(warning.category, GloraWarning):
                console(stderr=True).print(clean(warning.message), soft_wrap=True)
        made = counted(len(done.made) + len(done.again), "part")
        console().print(f"{made} made, {len(done.found)} there already", soft_wrap=True)


@app.command(cls=Command, epilog="Example: glora job status job")
def status(job: Folder, as_json: Json = False) -> None:
    """Say what of a job is made, and how long the rest may take."""
    with answering(as_json, writes=False):
        from ..job import status as look

        found = look(job)
        if as_json:
            print_json(asdict(found))
            return
        to = console()
        for what, count, missing in (
            ("parts made", found.parts, found.missing),
            ("groups of clients checked", found.checks, found.unchecked),
        ):
            if count:
                line = f"{what}: {count - len(missing)} of {count}{_missing(missing)}"
                to.print(line, soft_wrap=True)
        left = "not known yet" if found.left is None else duration(found.left)
        line = f"one thread's time: {duration(found.seconds)} so far, for the rest {left}"
        to.print(line, soft_wrap=True)


def _missing(numbers: Sequence[int]) -> str:
    more = ", …" * (len(numbers) > 10)
    return f"; missing: {', '.join(map(str, numbers[:10]))}{more}" if numbers else ""


@app.command(cls=Command, epilog="Example: glora job join job -o out --readout 8,16")
def join(
    job: Folder,
    out: Annotated[
        Path,
        option(
            "--out", "-o", metavar="OUT", default=None, example="-o merged",
            help="New folder for server.safetensors and one adapter folder per readout.",
        ),
    ],
    readout: Readouts = "",
    pad: Pad = "zero",
    dtype: Dtype = "fp32",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Put a job's parts together.

    The result is what glora aggregate writes, to the bit. All parts have to be there. JOB is left
    as it is; nothing needs it afterwards.
    """
    began = monotonic()
    readouts = whole.ranks(readout)
    with answering(as_json, writes=True, quiet=quiet) as outcome, ExitStack() as held:
        from ..errors import Refused
        from ..job import join as put_together
        from ..job import read_job
        from .state_folder import StateFolder, print_joined, print_written

        seed = read_job(job).about["arguments"].get("seed", 0)
        folder = StateFolder(out, readouts, pad, dtype, seed, False, overwrite, dry_run, began)
        refusals = Refusals()
        folder.reserve(held, [job], refusals)
        if refusals:
            raise Refused(refusals)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GloraWarning)
            state = put_together(job, readouts=readouts)
        if dry_run:
            facts = {
                "dry_run": True,
                "job": str(job),
                "clients": list(state.clients),
                "modules": list(state.modules),
                "writes": folder.writes,
            }
            (print_json if as_json else print_joined)(facts)
            return
        facts = folder.write(state)
        outcome.wrote(out)
        held.close()
        if as_json:
            print_json(facts)
        else:
            print_written(facts, verbose)
    if facts["skipped"]:
        raise typer.Exit(3)
