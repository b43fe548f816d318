"""`glora aggregate`: client folders in, one folder with the state and its readouts out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import GloraWarning, Refusals, listing
from .client_list import named_clients, read_client_list
from .options import (
    Base,
    Device,
    DryRun,
    Dtype,
    Json,
    Overwrite,
    Pad,
    Quiet,
    Readouts,
    Seed,
    Spectra,
    Threads,
    Verbose,
    option,
)
from .show import answering, print_json, progress
from .weights import is_file, weights_file

if TYPE_CHECKING:
    from ..runtime.urls import Url
    from ..state import State

__all__ = ["EXAMPLE", "aggregate", "ranks", "server_rank"]

EXAMPLE = (
    "Example: glora aggregate clients/ann clients/bob -o out --rank auto --captured 0.95 "
    "--readout 8,16"
)
DEFAULT_CAPTURED = 0.9  # why: as in glora_ops.aggregate; a place to begin, not an optimum
DEFAULT_CLIP = 2.0  # why: as in glora_ops.robust, which cannot be imported before torch is wanted


def aggregate(
    clients: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CLIENT_DIR...|RECIPE.toml",
            help="One folder per client, as PeftModel.save_pretrained writes it, or its URL "
            "(s3://bucket/ann); NAME=DIR names the client, which is otherwise called by its "
            "folder. Or a recipe: the options below by their names, and clients = a list of "
            "folders; what is given beside it counts.",
            show_default=False,
        ),
    ] = None,
    client_list: Annotated[
        Path | None,
        option(
            "--clients", metavar="FILE", default="none", example="--clients clients.tsv",
            help="Instead of CLIENT_DIR…: one client a line, PATH, NAME and WEIGHT with tabs "
            'between, or {"path": …, "name": …, "weight": …}; name and weight may be left out.',
        ),
    ] = None,
    out: Annotated[
        Path | None,
        option(
            "--out", "-o", metavar="OUT", default="a recipe's; without one it has to be given",
            example="-o merged",
            help="New folder for server.safetensors and one adapter folder per readout.",
        ),
    ] = None,
    rank: Annotated[
        str | None,
        option(
            "--rank", metavar="N|auto", default="twice the largest rank of a client",
            example="--rank 32",
            help="Rank of the server state; auto: the smallest that captures --captured.",
        ),
    ] = None,
    captured: Annotated[
        float | None,
        option(
            "--captured", metavar="FRACTION", min=0, max=1, default=f"{DEFAULT_CAPTURED}",
            example="--rank auto --captured 0.95",
            help="With --rank auto: the fraction of the mean update's energy to hold.",
        ),
    ] = None,
    readout: Readouts = "",
    weights: Annotated[
        str | None,
        option(
            "--weights", metavar="3,1,…|FILE.json", example="--weights 600,200",
            default="num_examples of the clients' glora.json if all have it, otherwise equal",
            help="How much each client counts: numbers in order, or a file {NAME: number} with "
            "the clients' names.",
        ),
    ] = None,
    normalise: Annotated[
        bool,
        option(
            "--normalise/--no-normalise", default="on",
            example="--no-normalise --basis update --weights 1,-1",
            help="Divide the weights by their sum; or take them as they are, with --basis update "
            "signed ones too (task arithmetic).",
        ),
    ] = True,
    missing: Annotated[
        Literal["zero", "renormalise"],
        option(
            "--missing", default="zero", example="--missing renormalise",
            help="A client without a module counts as zero there, or is left out there and the "
            "others' weights are renormalised.",
        ),
    ] = "zero",
    basis: Annotated[
        Literal["consensus", "projector", "update"],
        option(
            "--basis", default="consensus", example="--basis update",
            help="What the state's directions serve: soft votes, one client one voice; the mean "
            "of hard projectors, as published; or the least error to the mean update.",
        ),
    ] = "consensus",
    robust: Annotated[
        Literal["clip", "gate", "geometric-median"] | None,
        option(
            "--robust", example="--robust gate",
            help="Against bad clients: clip long updates; or leave out, by name, also those that "
            "point elsewhere than the others; or weigh by the distance from the geometric median. "
            "Reads all factors once more.",
        ),
    ] = None,
    clip: Annotated[
        float | None,
        option(
            "--clip", metavar="TIMES", default=f"{DEFAULT_CLIP:g}",
            example="--robust clip --clip 3",
            help="With --robust clip or gate: longest update, in median norms.",
        ),
    ] = None,
    base: Base = None,
    include: Annotated[
        list[str] | None,
        option(
            "--include", metavar="PATTERN", default="all", example="--include q_proj",
            help="Only modules whose path, or its end after a dot, matches; may be repeated.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        option(
            "--exclude", metavar="PATTERN", default="none", example="--exclude '*.layers.0.*'",
            help="No modules that match; may be repeated.",
        ),
    ] = None,
    on_bad_client: Annotated[
        Literal["refuse", "skip"],
        option(
            "--on-bad-client", default="refuse", example="--on-bad-client skip",
            help="Refuse everything, or go on without the client (exit code 3).",
        ),
    ] = "refuse",
    pad: Pad = "zero",
    dtype: Dtype = "fp32",
    dense: Annotated[
        Literal["mean", "refuse"],
        option(
            "--dense", default="mean", example="--dense refuse",
            help="Modules saved in full, such as heads: weighted mean, or refuse.",
        ),
    ] = "mean",
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    engine: Annotated[
        Literal["torchrun", "ray"] | None,
        option(
            "--engine", default="this process", example="--engine torchrun --workers 4",
            help="What has workers compute, as parts of a job: torchrun on this machine, or Ray "
            "where it runs, else on this machine. glora job does the same step by step.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        option(
            "--workers", metavar="N", min=1, example="--engine ray --workers 16",
            default="as many as this machine has processors, with --device cuda as GPUs",
            help="With --engine: how many.",
        ),
    ] = None,
    job: Annotated[
        Path | None,
        option(
            "--job", metavar="JOB", default="OUT.job, removed once OUT is written",
            example="--engine ray --job /srv/job",
            help="With --engine: folder of the job, which all workers can reach. What is in it is "
            "not computed again, so that the same command goes on after a kill.",
        ),
    ] = None,
    plot: Spectra = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Merge LoRA adapters of any ranks into one server state.

    Everything is checked before it is computed, all problems are listed at once, and OUT appears
    complete or not at all. Client files are read twice: all values are checked, then factors are
    read module by module, so that memory is the state and a few modules' factors of all clients.

    glora update adds and withdraws clients later.
    """
    began = monotonic()
    named, given = named_clients(clients, client_list, weights)
    if out is None:
        raise typer.BadParameter("a new folder for the result", param_hint="--out")
    rank_of_server = server_rank(rank)
    if captured is not None and rank_of_server != "auto":
        raise typer.BadParameter("only means something with --rank auto", param_hint="--captured")
    if clip is not None and robust not in ("clip", "gate"):
        raise typer.BadParameter(
            "only means something with --robust clip or gate", param_hint="--clip"
        )
    for name, value in (("--workers", workers), ("--job", job)):
        if value is not None and engine is None:
            raise typer.BadParameter("only means something with --engine", param_hint=name)
    readouts = ranks(readout)
    kept = "" if engine is None else "finished parts are kept; the same command goes on"

    with (
        answering(as_json, writes=True, kept=kept, quiet=quiet, threads=threads) as outcome,
        ExitStack() as held,
    ):
        from ..adapters.places import find_places
        from ..job.launch import engine as on_engine
        from ..job.launch import in_parts, remove
        from ..merging.aggregate import merge
        from .state_folder import Planned, StateFolder, print_plan, print_written

        refusals = Refusals()
        inputs: list[str | Path | Url] = []
        places = find_places(named)
        if client_list is not None:
            inputs.append(client_list)
            places, given = read_client_list(client_list)
        inputs += [place.path for place in places]
        inputs += [weights] if weights is not None and is_file(weights) else []
        place = Path(f"{os.path.realpath(out)}.job") if job is None else job
        inputs += [] if engine is None else [place]
        folder = StateFolder(out, readouts, pad, dtype, seed, plot, overwrite, dry_run, began)
        folder.reserve(held, inputs, refusals)
        if weights is not None and is_file(weights):
            settings: Mapping[str, Any] = {
                "normalise": normalise,
                "basis": basis,
                "robust": robust,
            }
            with listing(refusals):
                given = weights_file(Path(weights), [place.name for place in places], settings)
        try:
            # What warnings would say is in the state's notes and settings, and shown from there.
            with warnings.catch_warnings(), progress() as report:
                warnings.simplefilter("ignore", GloraWarning)
                make: Callable[..., State] = merge
                if engine is not None:
                    do = on_engine(engine, workers, device, threads)
                    make = partial(in_parts, job=place, do=do)
                state = make(
                    places, given, rank=rank_of_server, basis=basis, missing=missing, dense=dense,
                    normalise=normalise, on_bad_client=on_bad_client, base=base, seed=seed,
                    captured=DEFAULT_CAPTURED if captured is None else captured,
                    robust=robust, clip=DEFAULT_CLIP if clip is None else clip,
                    include=include or (), exclude=exclude or (), device=device,
                    progress=report, planned=folder.planned, known=refusals, readouts=readouts,
                )  # fmt: skip
        except Planned as plan:
            (print_json if as_json else print_plan)(plan.facts)
            return
        facts = folder.write(state)
        outcome.wrote(out)
        held.close()
        if engine is not None and job is None:
            remove(place)
        if as_json:
            print_json(facts)
        else:
            print_written(facts, verbose)
    if facts["skipped"]:
        raise typer.Exit(3)


def server_rank(text: str | None) -> int | str | None:
    """A rank, or auto."""
    if text in (None, "auto"):
        return text
    if not _is_rank(text):
        raise typer.BadParameter(
            f"{text[:40]!r} is neither an integer ≥ 1 nor auto", param_hint="--rank"
        )
    return int(text)


def _is_rank(text: str) -> bool:
    return text.isdecimal() and len(text) < 10 and int(text) >= 1


def ranks(text: str) -> list[int]:
    """The ranks in a list such as 4,8,16."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(map(_is_rank, parts)):
        raise typer.BadParameter(
            f"{text[:40]!r} is no list of ranks ≥ 1 such as 4,8,16", param_hint="--readout"
        )
    return sorted({int(part) for part in parts})
