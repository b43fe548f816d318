"""`glora readout`: a server state in, an adapter of any rank out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json, Overwrite, Pad, Seed
from .show import answering, clean, console, labelled, print_json, print_notes

if TYPE_CHECKING:
    from ..state import State

__all__ = ["EXAMPLE", "readout"]

EXAMPLE = "Example: **glora readout out -r 8 -o adapters/r8**"


def readout(
    state: Annotated[
        Path,
        typer.Argument(
            metavar="STATE", help="A server.safetensors, or the folder glora aggregate wrote."
        ),
    ],
    rank: Annotated[int, typer.Option("--rank", "-r", min=1, help="Rank of the adapter.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New adapter folder.")],
    pad: Pad = "zero",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Read an adapter of any rank out of a server state, as a folder that PEFT loads.

    Adapters of different ranks are nested: the rank-4 adapter is the first half of the rank-8 one.
    """
    with answering(as_json, writes=True):
        from .facts import file_notes, load_state, padding_note

        loaded, file = load_state(state)
        loaded.write_adapter(out, rank, pad=pad, seed=seed, overwrite=overwrite)
        facts: dict[str, Any] = {
            "state": str(state),
            "out": str(out),
            "rank": rank,
            "pad": pad,
            "energy": _energy(loaded, rank),
            "modules": list(loaded.modules),
            "notes": [*padding_note(loaded, rank, pad), *file_notes(file)],
        }
        if as_json:
            print_json(facts)
            return
        line = (
            f"{clean(out)}  PEFT adapter of rank {rank}, {len(facts['modules'])} modules, "
            f"{facts['energy']:.2%} of the state's energy"
        )
        console().print(labelled("written: ", "bold green", line), soft_wrap=True)
        print_notes(facts["notes"])


def _energy(state: State, rank: int) -> float:
    """Fraction of ‖Ŵ‖² over all modules in the leading `rank` directions of each."""
    total = sum(float(m.s.square().sum()) for m in state.modules.values())
    kept = sum(float(m.s[:rank].square().sum()) for m in state.modules.values())
    return kept / total if total else 1.0
