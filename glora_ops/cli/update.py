"""`glora update`: the same state for other clients, added, replaced or withdrawn."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import GloraWarning, Refusals, listing
from .aggregate import ranks
from .options import (
    Device,
    DryRun,
    Json,
    Overwrite,
    Quiet,
    Spectra,
    Stored,
    Threads,
    Verbose,
    option,
)
from .show import answering, clean, console, labelled, print_json, progress
from .weights import is_file, numbers, weights_file

if TYPE_CHECKING:
    from ..runtime.urls import Url

__all__ = ["EXAMPLE", "update"]

EXAMPLE = "Example: glora update out --add clients/cyd --remove bob"


def update(
    state: Stored,
    add: Annotated[
        list[str] | None,
        option(
            "--add", metavar="DIR", default="none", example="--add clients/cyd",
            help="One more client, its URL, or NAME=DIR; of a name that STATE has, in its place.",
        ),
    ] = None,
    remove: Annotated[
        list[str] | None,
        option(
            "--remove", metavar="NAME", default="none", example="--remove bob",
            help="A client to withdraw.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        option(
            "--out", "-o", metavar="OUT", default="the folder of STATE is replaced",
            example="-o merged/today",
            help="New folder for the state and its readouts.",
        ),
    ] = None,
    readout: Annotated[
        str,
        option(
            "--readout", metavar="4,8,…", default="the ranks that stand beside STATE",
            example="--readout 32",
            help="Adapters of these ranks as well.",
        ),
    ] = "",
    weights: Annotated[
        str | None,
        option(
            "--weights", metavar="3,1,…|FILE.json", example="--add clients/cyd --weights 2",
            default="a replaced client's own",
            help="If STATE's weights were given: how much each added client counts.",
        ),
    ] = None,
    pad: Annotated[
        Literal["zero", "trainable"] | None,
        option(
            "--pad", default="as STATE's", example="--pad trainable",
            help="Pairs beyond what the state holds, as for glora aggregate.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        option(
            "--dtype", default="as STATE's", example="--dtype bf16",
            help="Numbers of the adapters that are written.",
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    plot: Spectra = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Add clients to a state, and withdraw others, exactly.

    The result is that of a fresh run over who is left. Every client's file is read again, because
    the bases depend on all clients together; folders, weights and settings come from STATE, and a
    client that changed or vanished since is refused by name. Which folders it reads is said on
    stderr before it does.
    """
    began = monotonic()
    if not add and not remove:
        raise typer.BadParameter("or --remove NAME: at least one of them", param_hint="--add DIR")
    wanted = ranks(readout)
    named = add or []
    given = None if weights is None or is_file(weights) else numbers(weights, len(named))

    with (
        answering(as_json, writes=True, quiet=quiet, threads=threads) as outcome,
        ExitStack() as held,
    ):
        from ..adapters.places import find_places
        from ..merging.update import renew
        from ..runtime.urls import where
        from .state_facts import file_notes, load_state
        from .state_folder import Planned, StateFolder, print_plan, print_written

        old, file = load_state(state)
        record = old.record or {"clients": []}
        made = {"ranks": [], "pad": "zero", "dtype": "fp32"} | record.get("readouts", {})
        places = find_places(named, known=old.clients)
        inputs: list[str | Path | Url] = [where(entry["path"]) for entry in record["clients"]]
        inputs += [place.path for place in places]
        inputs += [weights] if weights is not None and is_file(weights) else []
        if out is None:
            out, overwrite = (state if state.is_dir() else state.parent), True
        else:
            inputs.append(state)
        folder = StateFolder(
            out, sorted({*wanted, *made["ranks"]}), pad or made["pad"], dtype or made["dtype"],
            old.settings["seed"], plot, overwrite, dry_run, began,
        )  # fmt: skip
        refusals = Refusals()
        folder.reserve(held, inputs, refusals)
        if weights is not None and is_file(weights):
            with listing(refusals):
                names = [place.name for place in places]
                given = weights_file(Path(weights), names, old.settings)
        reads: list[str] = []

        def opening(recorded: Sequence[str], added: Sequence[str]) -> None:
            reads.extend([*recorded, *added])
            _print_reads(recorded, "recorded in STATE")
            _print_reads(added, "added")

        try:
            # What warnings would say is in the state's notes and settings, and shown from there.
            with warnings.catch_warnings(), progress() as report:
                warnings.simplefilter("ignore", GloraWarning)
                new = renew(
                    old, add=places, remove=remove or [], weights=given, device=device,
                    progress=report, planned=folder.planned, known=refusals,
                    readouts=folder.readouts, opening=opening,
                )  # fmt: skip
        except Planned as plan:
            (print_json if as_json else print_plan)(plan.facts)
            return
        facts = folder.write(new) | {"reads": reads}
        outcome.wrote(out)
        held.close()
        facts["notes"] += file_notes(file)
        if as_json:
            print_json(facts)
        else:
            print_written(facts, verbose)
    if facts["skipped"]:
        raise typer.Exit(3)


def _print_reads(folders: Sequence[str], why: str) -> None:
    """The folders an update is about to read, before it does: a state may name any."""
    together = defaultdict(list)
    for folder in folders:
        together[os.path.dirname(folder)].append(os.path.basename(folder))
    for parent, names in together.items():
        line = clean(f"in {parent}: {', '.join(names)} ({why})")
        console(stderr=True).print(labelled("reads: ", "bold", line), soft_wrap=True)
