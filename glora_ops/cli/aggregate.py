"""`glora aggregate`: client folders in, one folder with the state and its readouts out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import GloraWarning, Refusal, Refused, listing
from .options import Base, Clients, Json, Overwrite, Pad, Seed
from .show import answering, clean, console, labelled, print_json, progress

__all__ = ["EXAMPLE", "aggregate"]

EXAMPLE = (
    "Example: **glora aggregate clients/ann clients/bob -o out --rank auto --captured 0.95 "
    "--readout 8,16**"
)
PICTURE_NAME = "spectra.png"
DEFAULT_CAPTURED = 0.9


def aggregate(
    clients: Clients,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="OUT",
            help="New folder for server.safetensors and one adapter folder per readout.",
        ),
    ],
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
            help='How much each client counts: numbers in order, or a file {"folder name": '
            "number}. By default num_examples of the clients' glora.json if all have it, "
            "otherwise equal.",
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
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Merge LoRA adapters of any ranks and scalings into one server state.

    Everything is checked before it is computed, all problems are listed at once, and OUT appears
    complete or not at all.
    """
    server_rank = _rank(rank)
    if captured is not None and server_rank != "auto":
        raise typer.BadParameter("only means something with --rank auto", param_hint="--captured")
    readouts = _readouts(readout)
    given = None if weights is None or _is_file(weights) else _numbers(weights, len(clients))

    with answering(as_json, writes=True):
        from ..adapters.folders import check_free, new_folder
        from ..merge import merge
        from .facts import STATE_NAME, padding_note, print_state, state_facts

        refusals: list[Refusal] = []
        if plot:
            from ..plots import plot_state, require_matplotlib

            with listing(refusals):
                require_matplotlib()
        with listing(refusals):
            check_free(out, overwrite=overwrite, marker=STATE_NAME)
        if weights is not None and _is_file(weights):
            with listing(refusals):
                given = _from_file(Path(weights), clients, normalise, basis)
        # What warnings would say is in the state's notes and settings, and shown from there.
        with warnings.catch_warnings(), progress() as report:
            warnings.simplefilter("ignore", GloraWarning)
            state = merge(
                clients, given, rank=server_rank, basis=basis, missing=missing, dense=dense,
                normalise=normalise, on_bad_client=on_bad_client, base=base, seed=seed,
                captured=DEFAULT_CAPTURED if captured is None else captured,
                progress=report, known=refusals,
            )  # fmt: skip
        facts = state_facts(state)
        _add_what_was_stored(facts, clients)
        with (
            _parents_restored(out),
            new_folder(out, overwrite=overwrite, marker=STATE_NAME) as building,
        ):
            state.save(building / STATE_NAME)
            for r in readouts:
                state.write_adapter(building / f"r{r}", r, pad=pad, seed=seed)
            if plot:
                plot_state(state, building / PICTURE_NAME)

        facts["notes"] += padding_note(state, readouts[-1], pad) if readouts else []
        facts |= {
            "out": str(out),
            "state": str(out / STATE_NAME),
            "readouts": {str(r): str(out / f"r{r}") for r in readouts},
            "plot": str(out / PICTURE_NAME) if plot else None,
        }
        if as_json:
            print_json(facts)
        else:
            print_state(facts)
            _print_files(facts)
    if facts["skipped"]:
        raise typer.Exit(3)


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


def _from_file(path: Path, clients: Sequence[Path], normalise: bool, basis: str) -> list[float]:
    """Weights by folder name; every name that lacks one or has one for nothing is listed."""
    from ..adapters.files import parse_json_object
    from ..arguments import check_weights

    wanted = "one number for each client folder, by its name"
    remedy = 'write {"folder name": number, …}, or give the numbers in order: --weights 3,1,2'
    try:
        content = parse_json_object(path.read_bytes())
    except OSError as error:
        found = f"{error.strerror}: {str(path)!r}"
        raise Refused(
            [Refusal("the weights cannot be read", None, str(path), None, found, wanted, remedy)]
        ) from None
    except ValueError as error:
        found = str(error)
        raise Refused(
            [
                Refusal(
                    "the weights are no JSON object", None, str(path), None, found, wanted, remedy
                )
            ]
        ) from None
    names = list(dict.fromkeys(Path(os.path.abspath(client)).name for client in clients))
    refusals = [
        Refusal("the client has no weight", name, str(path), None, "no such name", wanted, remedy)
        for name in names
        if name not in content
    ]
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
            check_weights(given, known, {"normalise": normalise, "basis": basis})
    if refusals:
        raise Refused(refusals)
    return [float(numbers[Path(os.path.abspath(client)).name]) for client in clients]


@contextmanager
def _parents_restored(out: Path) -> Iterator[None]:
    """Take away again, if the block fails, the folders above `out` that did not exist."""
    new = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in new:
            with suppress(OSError):
                parent.rmdir()
        raise


def _add_what_was_stored(facts: dict[str, Any], folders: Sequence[Path]) -> None:
    """Each client's ranks and scalings, from the headers."""
    from ..adapters import inspect_adapter

    adapters = [adapter for adapter, _ in map(inspect_adapter, folders) if adapter is not None]
    modules = {adapter.name: adapter.modules.values() for adapter in reversed(adapters)}
    for client in facts["clients"]:
        held = modules[client["name"]]
        client["ranks"] = sorted({m.rank for m in held})
        client["scalings"] = sorted({m.scaling for m in held})


def _print_files(facts: dict[str, Any]) -> None:
    to = console()
    written = [
        (facts["state"], f"the state, rank {facts['rank']}"),
        *((path, f"PEFT adapter of rank {r}") for r, path in facts["readouts"].items()),
        *([(facts["plot"], "spectra")] if facts["plot"] else []),
    ]
    width = max(len(clean(path)) for path, _ in written)
    to.print()
    for path, what in written:
        line = f"{clean(path):<{width}}  {what}"
        to.print(labelled("written: ", "bold green", line), soft_wrap=True)
    if not facts["readouts"]:
        to.print(f"next: glora readout {clean(facts['out'])} -r 8 -o ADAPTER_DIR", soft_wrap=True)
