"""`glora readout`: a server state in, an adapter of any rank out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from .options import DryRun, Dtype, Json, Overwrite, Pad, Quiet, Seed, Stored, option
from .show import (
    answering,
    clean,
    console,
    counted,
    labelled,
    print_json,
    print_notes,
    print_untouched,
    size,
)

__all__ = ["EXAMPLE", "readout"]

EXAMPLE = "Example: glora readout out -r 8 -o adapters/r8"


def readout(
    state: Stored,
    rank: Annotated[
        int,
        option(
            "--rank", "-r", metavar="N", min=1, default=None, example="-r 8",
            help="Rank of the adapter.",
        ),
    ],
    out: Annotated[
        Path,
        option(
            "--out", "-o", metavar="DIR", default=None, example="-o adapters/r8",
            help="New adapter folder.",
        ),
    ],
    pad: Pad = "zero",
    dtype: Dtype = "fp32",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Read an adapter of any rank out of a server state.

    It is a folder that PEFT loads. Adapters of different ranks are nested: the rank-4 adapter is
    the first half of the rank-8 one.
    """
    with answering(as_json, writes=True, quiet=quiet) as outcome:
        from ..runtime.outputs import apart
        from ..state import WRITTEN
        from .state_facts import file_notes, held_energy, load_state, padding_note

        apart(out, [state])
        loaded, file = load_state(state)
        loaded.write_adapter(
            out, rank, pad=pad, seed=seed, dtype=WRITTEN[dtype],
            overwrite=overwrite, dry_run=dry_run,
        )  # fmt: skip
        if not dry_run:
            outcome.wrote(out)
        facts: dict[str, Any] = {
            "dry_run": dry_run,
            "state": str(state),
            "out": str(out),
            "rank": rank,
            "pad": pad,
            "dtype": dtype,
            "energy": held_energy(loaded, rank),
            "modules": list(loaded.modules),
            "notes": [*padding_note(loaded, rank, pad), *file_notes(file)],
        }
        if as_json:
            print_json(facts)
            return
        line = (
            f"{clean(out)}  PEFT adapter of rank {rank}, "
            f"{counted(len(facts['modules']), 'module')}, "
            f"{facts['energy']:.2%} of the state's energy"
        )
        if dry_run:
            console().print(labelled("would write: ", "bold", line), soft_wrap=True)
        else:
            line += f", {size(out)}"
            console().print(labelled("written: ", "bold green", line), soft_wrap=True)
        print_notes(facts["notes"])
        if dry_run:
            print_untouched("")
