"""`glora job`: an aggregation in parts, by any number of processes on any machines."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import GloraWarning, Refusals, clean, listing
from . import aggregate as one_process
from .options import Json, Overwrite, Pad
from .show import answering, console, labelled, number, print_json, progress

__all__ = ["app"]

app = typer.Typer(
    name="job",
    no_args_is_help=True,
    help="Aggregate in parts: plan once, work in any number of processes on any machines that see "
    "the same files, join at the end. The result is that of **glora aggregate**, to the bit.",
    epilog="Example: **glora job plan --clients list.txt -o job && glora job work job --workers 4 "
    "&& glora job join job -o out --readout 8,16**",
)

Folder = Annotated[Path, typer.Argument(metavar="JOB", help="The folder that plan made.")]
#: Options of `glora aggregate` that a plan takes, as they are there.
PLANNED = (
    "clients", "client_list", "rank", "weights", "normalise", "missing", "basis", "robust", "base",
    "include", "exclude", "on_bad_client", "dense", "seed",
)  # fmt: skip


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of `glora aggregate` before its own."""
    those = signature(one_process.aggregate, eval_str=True).parameters
    own = [p for p in signature(command, eval_str=True).parameters.values()
           if p.kind is not Parameter.VAR_KEYWORD]  # fmt: skip
    taken = [those[name].replace(kind=Parameter.KEYWORD_ONLY) for name in PLANNED if name in those]
    own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in own]
    command.__signature__ = Signature([*taken, *own])  # type: ignore[attr-defined]  # for typer
    return command


@app.command(epilog="Example: **glora job plan clients/* -o job --rank 32**")
@_with_options
def plan(
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="JOB",
            help="New folder, which all workers can reach; one with the same plan is left as it "
            "is, with what was done of it.",
        ),
    ],
    as_json: Json = False,
    **options: Any,
) -> None:  # fmt: skip
    """Look at the clients, and write down which modules are computed together.

    Options are those of **glora aggregate**. Nothing but headers is read, and with
    **--on-bad-client skip** every value.
    """
    clients, client_list = options.pop("clients"), options.pop("client_list")
    if bool(clients) == (client_list is not None):
        raise typer.BadParameter(
            "at least one client's folder, or --clients FILE", param_hint="CLIENT_DIR"
        )
    rank, weights = one_process._rank(options.pop("rank")), options.pop("weights")
    in_file = weights is not None and one_process._is_file(weights)
    if weights is not None and client_list is not None and not in_file:
        raise typer.BadParameter("stand in the file of --clients", param_hint="--weights")
    given = None
    if weights is not None and not in_file:
        given = one_process._numbers(weights, len(clients))
    with answering(as_json, writes=True) as outcome:
        from .. import job
        from ..adapters.places import find_places
        from .client_list import read_client_list

        refusals = Refusals()
        places = find_places(clients or [])
        if client_list is not None:
            places, given = read_client_list(client_list)
        if in_file:
            with listing(refusals):
                names = [place.name for place in places]
                given = one_process._from_file(Path(weights), names, options)
        with warnings.catch_warnings(), progress() as report:
            warnings.simplefilter("ignore", GloraWarning)
            planned = job.plan(
                places, out, given, rank=rank, progress=report, known=refusals,
                captured=one_process.DEFAULT_CAPTURED, clip=one_process.DEFAULT_CLIP, **options,
            )  # fmt: skip
        outcome.wrote(out)
        about = planned.about
        kept = sum(client["kept"] for client in about["clients"])
        facts = {
            "job": str(out),
            "clients": kept,
            "skipped": about["skipped"],
            "modules": sum(len(part["modules"]) for part in about["parts"]),
            "parts": len(about["parts"]),
            "bytes": sum(part["bytes"] for part in about["parts"]),
            "largest": max(part["bytes"] for part in about["parts"]),
        }
        if as_json:
            print_json(facts)
        else:
            for reason in about["skipped"]:
                console().print(labelled("left out: ", "bold yellow", clean(reason)))
            line = (
                f"{clean(out)}  {kept} clients, {facts['modules']} modules in {facts['parts']} "
                f"parts of at most {number(facts['largest'] / 1e6)} MB"
            )
            console().print(labelled("planned: ", "bold green", line), soft_wrap=True)
            console().print(f"next: glora job work {clean(out)}", soft_wrap=True)
    if about["skipped"]:
        raise typer.Exit(3)


@app.command(epilog="Example: **glora job work job --index 0 --of 4**")
def work(
    job: Folder,
    index: Annotated[
        int | None,
        typer.Option(
            metavar="I",
            help="Which worker this is, from 0. By default what torchrun, Slurm or Kubernetes say "
            "in the environment, otherwise the only one.",
        ),
    ] = None,
    of: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many workers there are. By default as --index."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1,
            help="Instead of being one, start so many workers on this machine with torchrun, which "
            "starts them again when one is killed.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make this worker's parts, but for those that are made.

    A worker may be killed and started again, and two may have the same index. It reads the
    folders that JOB names, and computes on as many threads as torch has (OMP_NUM_THREADS).
    """
    if workers is not None and (index, of) != (None, None):
        raise typer.BadParameter("starts workers, and is none itself", param_hint="--workers")
    with answering(as_json, writes=False, kept="finished parts are kept; the same command goes on"):
        from ..job import torchrun
        from ..job import work as do

        if workers is not None:
            torchrun(job, workers)
        with warnings.catch_warnings(record=True) as said, progress() as report:
            warnings.simplefilter("always", GloraWarning)
            done = do(job, *((0, 1) if workers else (index, of)), progress=report)
        if as_json:
            print_json(asdict(done))
            return
        for warning in said:
            if issubclass(warning.category, GloraWarning):
                console(stderr=True).print(clean(warning.message), soft_wrap=True)
        made = len(done.made) + len(done.again)
        console().print(f"{made} parts made, {len(done.found)} were there", soft_wrap=True)


@app.command(epilog="Example: **glora job status job**")
def status(job: Folder, as_json: Json = False) -> None:
    """How far a job is: what is made, what is missing, how long the rest may take."""
    with answering(as_json, writes=False):
        from ..job import status as look

        found = look(job)
        if as_json:
            print_json(asdict(found))
            return
        to = console()
        to.print(f"{found.parts - len(found.missing)} of {found.parts} parts are made"
                 + _which(found.missing), soft_wrap=True)  # fmt: skip
        if found.checks:
            to.print(f"{found.checks - len(found.unchecked)} of {found.checks} groups of clients "
                     f"are checked{_which(found.unchecked)}", soft_wrap=True)  # fmt: skip
        to.print(f"{number(found.seconds)} seconds of one thread were spent; the rest may take "
                 + ("nobody knows how many" if found.left is None else number(found.left)),
                 soft_wrap=True)  # fmt: skip


def _which(missing: list[int]) -> str:
    more = ", …" * (len(missing) > 10)
    return f"; missing: {', '.join(map(str, missing[:10]))}{more}" if missing else ""


@app.command(epilog="Example: **glora job join job -o out --readout 8,16**")
def join(
    job: Folder,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="OUT",
            help="New folder for server.safetensors and one adapter folder per readout.",
        ),
    ],
    readout: Annotated[
        str,
        typer.Option(
            metavar="4,8,…",
            help="Also write adapters of these ranks, as folders r4, r8, … in OUT.",
        ),
    ] = "",
    pad: Pad = "zero",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Put the parts of a job together: what **glora aggregate** writes, to the bit.

    All parts have to be there. JOB is left as it is; nothing needs it afterwards.
    """
    readouts = one_process._readouts(readout)
    with answering(as_json, writes=True) as outcome, ExitStack() as held:
        from ..job import join as put_together
        from ..runtime.outputs import apart, check_free, claimed, new_folder
        from .facts import STATE_NAME, held_energy, padding_note, print_state, state_facts
        from .outputs import strangers

        place = Path(os.path.realpath(out))
        held.enter_context(claimed(place, strangers))
        check_free(place, strangers, overwrite=overwrite)
        apart(out, [job])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GloraWarning)
            state = put_together(job, readouts=readouts)
        state = replace(
            state, record=(state.record or {}) | {"readouts": {"ranks": readouts, "pad": pad}}
        )
        facts: dict[str, Any] = state_facts(state)
        with new_folder(place, strangers, overwrite=overwrite) as building:
            state.save(building / STATE_NAME)
            for r in readouts:
                state.write_adapter(building / f"r{r}", r, pad=pad, seed=state.settings["seed"])
        outcome.wrote(out)
        held.close()
        facts["notes"] += padding_note(state, readouts[-1], pad) if readouts else []
        facts |= _written(out, STATE_NAME, {r: held_energy(state, r) for r in readouts})
        if as_json:
            print_json(facts)
        else:
            print_state(facts)
            one_process._print_files(facts)
    if facts["skipped"]:
        raise typer.Exit(3)


def _written(out: Path, state: str, energy: Mapping[int, float]) -> dict[str, Any]:
    return {
        "out": str(out),
        "state": str(out / state),
        "readouts": {str(r): str(out / f"r{r}") for r in energy},
        "energy": {str(r): share for r, share in energy.items()},
        "plot": None,
    }
