"""The folder with a state and its readouts: its place kept free, written, told of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any

from rich.filesize import decimal

from ..adapters import Adapter
from ..analysis.plots import plot_state, require_matplotlib
from ..errors import listing
from ..runtime.outputs import apart, check_free, claimed, new_folder
from ..runtime.urls import Url
from ..state import WRITTEN, State
from .options import PICTURE_NAME
from .show import (
    clean,
    console,
    counted,
    duration,
    labelled,
    print_untouched,
    size,
    span,
)
from .state_facts import STATE_NAME, held_energy, padding_note, print_state, state_facts
from .strangers import strangers

__all__ = ["Planned", "StateFolder", "print_joined", "print_plan", "print_written"]


class Planned(Exception):
    """A dry run has come as far as it goes; `facts` says what would follow."""

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__()
        self.facts = facts


@dataclass(frozen=True)
class StateFolder:
    """What `glora aggregate`, `update` and `job join` write, and where."""

    out: Path
    readouts: list[int]
    pad: str
    dtype: str
    seed: int
    plot: bool
    overwrite: bool
    dry_run: bool
    began: float

    def reserve(
        self, held: ExitStack, inputs: Sequence[str | Path | Url], refusals: list[Any]
    ) -> None:
        """Keep its place for this process; what speaks against it is added to `refusals`."""
        if self.plot:
            with listing(refusals):
                require_matplotlib()
        with listing(refusals):
            if not self.dry_run:
                held.enter_context(claimed(self._place, strangers))
            check_free(self._place, strangers, overwrite=self.overwrite)
            apart(self.out, inputs)

    @cached_property
    def _place(self) -> Path:
        """Resolved once: a link that comes to stand there during a run is not followed."""
        return Path(os.path.realpath(self.out))

    @property
    def writes(self) -> list[str]:
        """The state, its readouts and its picture."""
        names = [STATE_NAME, *(f"r{r}" for r in self.readouts), *[PICTURE_NAME] * self.plot]
        return [str(self.out / name) for name in names]

    def planned(self, adapters: Sequence[Adapter]) -> None:
        """End a dry run."""
        if not self.dry_run:
            return
        clients = [
            {
                "name": adapter.name,
                "path": str(adapter.path),
                "bytes": adapter.stored.signature[0],
                "ranks": sorted({m.rank for m in adapter.modules.values()}),
            }
            for adapter in adapters
        ]
        raise Planned(
            {
                "dry_run": True,
                "clients": clients,
                "modules": list(dict.fromkeys(name for a in adapters for name in a.modules)),
                "writes": self.writes,
            }
        )

    def write(self, state: State) -> dict[str, Any]:
        """Write all of it in one step; what there is to say of it."""
        made = {"ranks": self.readouts, "pad": self.pad}
        made |= {} if self.dtype == "fp32" else {"dtype": self.dtype}  # as it always was
        state = replace(state, record=(state.record or {}) | {"readouts": made})
        facts = state_facts(state)
        with new_folder(self._place, strangers, overwrite=self.overwrite) as building:
            state.save(building / STATE_NAME)
            for r in self.readouts:
                state.write_adapter(
                    building / f"r{r}", r, pad=self.pad, seed=self.seed, dtype=WRITTEN[self.dtype]
                )
            if self.plot:
                plot_state(state, building / PICTURE_NAME)
        if self.readouts:
            facts["notes"] += padding_note(state, self.readouts[-1], self.pad)
        return facts | {
            "out": str(self.out),
            "state": str(self.out / STATE_NAME),
            "readouts": {str(r): str(self.out / f"r{r}") for r in self.readouts},
            "energy": {str(r): held_energy(state, r) for r in self.readouts},
            "dtype": self.dtype,
            "plot": str(self.out / PICTURE_NAME) if self.plot else None,
            "seconds": monotonic() - self.began,
        }


def print_plan(facts: dict[str, Any]) -> None:
    """What a run would read and write."""
    to = console()
    read = decimal(sum(client["bytes"] for client in facts["clients"]))
    what = f"{counted(len(facts['clients']), 'client')}, {counted(len(facts['modules']), 'module')}"
    to.print(labelled("would read: ", "bold", f"{what}, {read}"), soft_wrap=True)
    for client in facts["clients"]:
        line = f"  {clean(client['name'])}  rank {span(client['ranks'])}  {clean(client['path'])}"
        to.print(line, soft_wrap=True)
    _print_writes(facts)
    print_untouched()


def print_joined(facts: dict[str, Any]) -> None:
    """What would be written of a job whose parts were all looked at."""
    _print_writes(facts)
    print_untouched("")


def _print_writes(facts: dict[str, Any]) -> None:
    for path in facts["writes"]:
        console().print(labelled("would write: ", "bold", clean(path)), soft_wrap=True)


def print_written(facts: dict[str, Any], verbose: bool) -> None:
    """The state, and every file with its size and the share of the energy it holds."""
    print_state(facts, verbose)
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
        line = f"{clean(path):<{width}}  {what}, {size(Path(path))}"
        to.print(labelled("written: ", "bold green", line), soft_wrap=True)
    to.print(f"in {duration(facts['seconds'])}", style="dim")
    if not facts["readouts"]:
        rank = min(8, facts["rank"])
        to.print(
            f"next: glora readout {clean(facts['out'])} -r {rank} -o ADAPTER_DIR", soft_wrap=True
        )
