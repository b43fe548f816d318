"""`glora aggregate`: client folders in, one folder with the state and its readouts out."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import GloraError, GloraWarning, Refusal, Refusals, Refused, listing
from .options import PICTURE_NAME, Base, Json, Overwrite, Pad, Seed
from .show import answering, clean, console, labelled, print_json, progress

__all__ = ["EXAMPLE", "aggregate"]

EXAMPLE = (
    "Example: **glora aggregate clients/ann clients/bob -o out --rank auto --captured 0.95 "
    "--readout 8,16**"
)
DEFAULT_CAPTURED = 0.9
DEFAULT_CLIP = 2.0


def aggregate(
    context: typer.Context,
    clients: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CLIENT_DIR...",
            help="One folder per client, as PeftModel.save_pretrained writes it; NAME=DIR names "
            "the client, which is otherwise called by its folder.",
            show_default=False,
        ),
    ] = None,
    client_list: Annotated[
        Path | None,
        typer.Option(
            "--clients", metavar="FILE",
            help="Instead of CLIENT_DIR…: one client a line, PATH, NAME and WEIGHT with tabs "
            'between, or {"path": …, "name": …, "weight": …}; name and weight may be left out.',
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="OUT",
            help="New folder for server.safetensors and one adapter folder per readout.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Rank of the server state; auto: the smallest that captures --captured. "
            "By default twice the largest rank of a client.",
        ),
    ] = None,
    captured: Annotated[
        float | None,
        typer.Option(
            min=0, max=1,
            help="With --rank auto: the fraction of the mean update's energy to hold. "
            f"{DEFAULT_CAPTURED} by default.",
        ),
    ] = None,
    readout: Annotated[
        str,
        typer.Option(
            metavar="4,8,…",
            help="Also write adapters of these ranks, as folders r4, r8, … in OUT.",
        ),
    ] = "",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="3,1,…|FILE.json",
            help="How much each client counts: numbers in order, or a file {NAME: number} with "
            "the clients' names. By default num_examples of the clients' glora.json if all have "
            "it, otherwise equal.",
        ),
    ] = None,
    normalise: Annotated[
        bool,
        typer.Option(
            "--normalise/--no-normalise",
            help="Divide the weights by their sum; or take them as they are, with --basis update "
            "signed ones too (task arithmetic).",
        ),
    ] = True,
    missing: Annotated[
        Literal["zero", "renormalise"],
        typer.Option(
            help="A client without a module counts as zero there, or is left out there and the "
            "others' weights are renormalised."
        ),
    ] = "zero",
    basis: Annotated[
        Literal["consensus", "projector", "update"],
        typer.Option(
            help="What the state's directions serve: soft votes, one client one voice; the mean "
            "of hard projectors, as published; or the least error to the mean update."
        ),
    ] = "consensus",
    robust: Annotated[
        Literal["clip", "gate", "geometric-median"] | None,
        typer.Option(
            help="Against bad clients: clip long updates; or leave out, by name, also those that "
            "point elsewhere than the others; or weigh by the distance from the geometric median. "
            "Off by default; reads all factors once more.",
        ),
    ] = None,
    clip: Annotated[
        float | None,
        typer.Option(
            help="With --robust clip or gate: longest update, in median norms. "
            f"{DEFAULT_CLIP:g} by default.",
        ),
    ] = None,
    base: Base = None,
    on_bad_client: Annotated[
        Literal["refuse", "skip"],
        typer.Option(help="Refuse everything, or go on without the client (exit code 3)."),
    ] = "refuse",
    pad: Pad = "zero",
    dense: Annotated[
        Literal["mean", "refuse"],
        typer.Option(help="Modules saved in full, such as heads: weighted mean, or refuse."),
    ] = "mean",
    seed: Seed = 0,
    plot: Annotated[
        bool, typer.Option("--plot", help=f"Draw the spectra into OUT/{PICTURE_NAME}.")
    ] = False,
    update: Annotated[
        Path | None,
        typer.Option(
            metavar="STATE",
            help="Instead of CLIENT_DIR…: the clients, weights and settings of this state, with "
            "--add and --remove. The readouts beside STATE are made anew as well; without -o its "
            "folder is replaced.",
        ),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="With --update: one more client, or NAME=DIR; of a name that STATE has, in its "
            "place.",
        ),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="With --update: a client to withdraw."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Merge LoRA adapters of any ranks and scalings into one server state.

    Everything is checked before it is computed, all problems are listed at once, and OUT appears
    complete or not at all. Client files are read twice: all values are checked, then factors are
    read module by module, so that memory is the state and a few modules' factors of all clients.

    **--update** gives exactly the state of a fresh run over the resulting clients. It reads every
    client's file again, because the bases depend on all clients together; folders, weights and
    settings come from STATE, and a client that changed or vanished since is refused by name. Which
    folders it reads is said on stderr before it does:
    **glora aggregate --update out --add clients/cyd --remove bob**.
    """
    if update is not None:
        _check_update(context, clients or client_list, add, remove)
    else:
        if add or remove:
            raise typer.BadParameter("only means something with --update", param_hint="--add")
        if bool(clients) == (client_list is not None):
            raise typer.BadParameter(
                "at least one client's folder, or --clients FILE", param_hint="CLIENT_DIR"
            )
        if out is None:
            raise typer.BadParameter("a new folder for the result", param_hint="--out")
    server_rank = _rank(rank)
    if captured is not None and server_rank != "auto":
        raise typer.BadParameter("only means something with --rank auto", param_hint="--captured")
    if clip is not None and robust not in ("clip", "gate"):
        raise typer.BadParameter(
            "only means something with --robust clip or gate", param_hint="--clip"
        )
    readouts = _readouts(readout)
    if weights is not None and client_list is not None and not _is_file(weights):
        raise typer.BadParameter("stand in the file of --clients", param_hint="--weights")
    named = (clients or []) if update is None else (add or [])
    given = None if weights is None or _is_file(weights) else _numbers(weights, len(named))

    with answering(as_json, writes=True) as outcome, ExitStack() as held:
        from ..adapters.places import find_places
        from ..merging.aggregate import merge
        from ..merging.update import renew
        from ..runtime.outputs import apart, check_free, claimed, new_folder
        from .client_list import read_client_list
        from .facts import (
            STATE_NAME,
            file_notes,
            held_energy,
            load_state,
            padding_note,
            print_state,
            state_facts,
        )
        from .outputs import strangers

        inputs: list[str | Path] = [weights] if weights is not None and _is_file(weights) else []
        old, file = (None, None) if update is None else load_state(update)
        if update is not None and old is not None:
            seed = old.settings["seed"]
            made = (old.record or {}).get("readouts", {"ranks": [], "pad": "zero"})
            if out is None:
                out, overwrite = (update if update.is_dir() else update.parent), True
            else:
                inputs.append(update)
            readouts = sorted({*readouts, *made["ranks"]})
            pad = pad if _is_given(context, "pad") else made["pad"]
            inputs += [entry["path"] for entry in (old.record or {"clients": []})["clients"]]
        assert out is not None

        refusals = Refusals()
        weighed = find_places(named, known=() if old is None else old.clients)
        if client_list is not None:
            inputs.append(client_list)
            weighed, given = read_client_list(client_list)
        inputs += [place.path for place in weighed]
        if plot:
            from ..analysis.plots import plot_state, require_matplotlib

            with listing(refusals):
                require_matplotlib()
        place = Path(os.path.realpath(out))
        with listing(refusals):
            held.enter_context(claimed(place, strangers))
            check_free(place, strangers, overwrite=overwrite)
            apart(out, inputs)
        if weights is not None and _is_file(weights):
            with listing(refusals):
                settings: Mapping[str, Any] = {
                    "normalise": normalise, "basis": basis, "robust": robust,
                } if old is None else old.settings  # fmt: skip
                given = _from_file(Path(weights), [client.name for client in weighed], settings)
        reads: list[str] = []

        def opening(recorded: Sequence[str], named: Sequence[str]) -> None:
            reads.extend([*recorded, *named])
            _print_reads(recorded, "recorded in STATE")
            _print_reads(named, "added")

        # What warnings would say is in the state's notes and settings, and shown from there.
        with warnings.catch_warnings(), progress() as report:
            warnings.simplefilter("ignore", GloraWarning)
            if old is not None:
                state = renew(
                    old, add=weighed, remove=remove or [], weights=given, progress=report,
                    known=refusals, readouts=readouts, opening=opening,
                )  # fmt: skip
            else:
                state = merge(
                    weighed, given, rank=server_rank, basis=basis, missing=missing, dense=dense,
                    normalise=normalise, on_bad_client=on_bad_client, base=base, seed=seed,
                    captured=DEFAULT_CAPTURED if captured is None else captured,
                    robust=robust, clip=DEFAULT_CLIP if clip is None else clip,
                    progress=report, known=refusals, readouts=readouts,
                )  # fmt: skip
        state = replace(
            state,
            record=(state.record or {}) | {"readouts": {"ranks": readouts, "pad": pad}},
        )
        facts = state_facts(state)
        with new_folder(place, strangers, overwrite=overwrite) as building:
            state.save(building / STATE_NAME)
            for r in readouts:
                state.write_adapter(building / f"r{r}", r, pad=pad, seed=seed)
            if plot:
                plot_state(state, building / PICTURE_NAME)
        outcome.wrote(out)
        held.close()

        facts["notes"] += padding_note(state, readouts[-1], pad) if readouts else []
        facts["notes"] += file_notes(file) if file is not None else []
        facts |= {
            "out": str(out),
            "state": str(out / STATE_NAME),
            "readouts": {str(r): str(out / f"r{r}") for r in readouts},
            "energy": {str(r): held_energy(state, r) for r in readouts},
            "plot": str(out / PICTURE_NAME) if plot else None,
        }
        if update is not None:
            facts["reads"] = reads
        if as_json:
            print_json(facts)
        else:
            print_state(facts)
            _print_files(facts)
    if facts["skipped"]:
        raise typer.Exit(3)


#: What STATE decides; given beside --update it would be another run.
_DECIDED = (
    "rank", "captured", "normalise", "missing", "basis", "robust", "clip", "base",
    "on_bad_client", "dense", "seed",
)  # fmt: skip


def _check_update(
    context: typer.Context,
    clients: object,
    add: Sequence[str] | None,
    remove: Sequence[str] | None,
) -> None:
    if clients:
        raise typer.BadParameter(
            "with --update, new clients are named by --add", param_hint="CLIENT_DIR"
        )
    if not add and not remove:
        raise typer.BadParameter("needs --add DIR or --remove NAME", param_hint="--update")
    for name in _DECIDED:
        if _is_given(context, name):
            raise typer.BadParameter(
                "is a matter of STATE; aggregate anew to change it",
                param_hint="--" + name.replace("_", "-"),
            )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _print_reads(folders: Sequence[str], why: str) -> None:
    """The folders an update is about to read, before it does: a state may name any."""
    together = defaultdict(list)
    for folder in folders:
        together[os.path.dirname(folder)].append(os.path.basename(folder))
    for parent, names in together.items():
        line = clean(f"in {parent}: {', '.join(names)} ({why})")
        console(stderr=True).print(labelled("reads: ", "bold", line), soft_wrap=True)


def _rank(text: str | None) -> int | str | None:
    if text in (None, "auto"):
        return text
    if not _is_rank(text):
        raise typer.BadParameter(
            f"{text[:40]!r} is neither an integer ≥ 1 nor auto", param_hint="--rank"
        )
    return int(text)


def _is_rank(text: str) -> bool:
    return text.isdecimal() and len(text) < 10 and int(text) >= 1


def _readouts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(map(_is_rank, parts)):
        raise typer.BadParameter(
            f"{text[:40]!r} is no list of ranks ≥ 1 such as 4,8,16", param_hint="--readout"
        )
    return sorted({int(part) for part in parts})


def _is_file(weights: str) -> bool:
    return weights.endswith(".json")


def _numbers(text: str, clients: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither numbers such as 3,1,2 nor a .json file", param_hint="--weights"
        ) from None
    if len(numbers) != clients:
        raise typer.BadParameter(
            f"{len(numbers)} numbers for {clients} clients", param_hint="--weights"
        )
    return numbers


def _from_file(path: Path, clients: Sequence[str], settings: Mapping[str, Any]) -> list[float]:
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
    numbers = {name: value for name, value in content.items() if type(value) in (int, float)}
    refusals += [
        Refusal("the weight is no number", name, str(path), None, repr(value)[:80], wanted, remedy)
        for name, value in content.items()
        if name not in numbers
    ]
    known = [name for name in names if name in numbers]
    if known:
        with listing(refusals):
            given = [numbers[name] for name in known]
            check_weights(given, known, settings)
    if refusals:
        raise Refused(refusals)
    return [float(numbers[client]) for client in clients]


def _print_files(facts: dict[str, Any]) -> None:
    to = console()
    written = [
        (facts["state"], f"the state, rank {facts['rank']}"),
        *(
            (path, f"PEFT adapter of rank {r}, {facts['energy'][r]:.2%} of the state's energy")
            for r, path in facts["readouts"].items()
        ),
        *([(facts["plot"], "spectra")] if facts["plot"] else []),
    ]
    width = max(len(clean(path)) for path, _ in written)
    to.print()
    for path, what in written:
        line = f"{clean(path):<{width}}  {what}"
        to.print(labelled("written: ", "bold green", line), soft_wrap=True)
    if not facts["readouts"]:
        rank = min(8, facts["rank"])
        to.print(
            f"next: glora readout {clean(facts['out'])} -r {rank} -o ADAPTER_DIR", soft_wrap=True
        )
