"""Runs as their folders hold them, checked and grouped by configuration."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Refusals, Refused, listing, require
from .forms import read_about, read_sweep
from .records import Run, replied

__all__ = ["RunData", "by_config", "load_runs", "with_finished"]


@dataclass(frozen=True)
class RunData:
    """One finished or unfinished run, as its folder has it."""

    folder: Path
    about: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    done: bool

    @property
    def method(self) -> str:
        return str(self.about["method"])

    @property
    def seed(self) -> int:
        return int(self.about["seed"])

    @property
    def metric(self) -> str:
        return str(self.about["metric"])

    @property
    def evaluated(self) -> list[Mapping[str, Any]]:
        """The rounds in which something was measured."""
        return [line for line in self.lines if "metrics" in line]

    @property
    def score(self) -> float:
        """The headline metric of the server's model after the last round."""
        return float(self.evaluated[-1]["metrics"][self.metric])

    @property
    def received(self) -> list[float]:
        """The same of what each client is sent, at its own rank, if that was judged."""
        line = self.lines[-1]
        return [line["by_rank"][str(r)][self.metric] for r in line.get("sent_ranks", [])]

    @property
    def own(self) -> list[float]:
        """What clients read of it in their own mix of labels, as far as that was judged."""
        return [score for score in self.lines[-1].get("own", []) if score is not None]

    def total(self, name: str) -> float:
        return float(sum(line[name] for line in self.lines))

    @property
    def silent(self) -> bool:
        """Whether it ran to its end without a single reply: its model is the base."""
        return self.done and not replied(self.lines)

    @property
    def failures(self) -> list[Mapping[str, Any]]:
        return [f | {"round": line["round"]} for line in self.lines for f in line["failures"]]

    @property
    def left_out(self) -> dict[str, int]:
        """Rounds in which a robust rule left a client out, by its name."""
        judged = [line["robust"] for line in self.lines if "robust" in line]
        return dict(Counter(name for verdict in judged for name in verdict["left_out"]))


def load_runs(folders: Iterable[Path]) -> tuple[list[RunData], dict[str, dict[str, Any]]]:
    """Every run below the folders, and the outcomes of sweeps by ``config/method``.

    Raises
    ------
    GloraError
        If there is no run.
    """
    runs, sweeps, refusals = [], {}, Refusals()
    folders = list(folders)
    found = {p.parent for folder in folders for name in ("run.json", "metrics.jsonl")
             for p in folder.rglob(name)}  # fmt: skip
    for place in sorted(found):
        if not place.name.startswith("seed"):  # a trial of a sweep
            continue
        run = Run(place)
        with listing(refusals):
            about = read_about(run.about_path)
            runs.append(_sound(RunData(place, about, run.lines(), run.done)))
    for path in sorted({p for folder in folders for p in folder.rglob("sweep/*.json")}):
        with listing(refusals):
            sweeps[f"{path.resolve().parents[1].name}/{path.stem}"] = read_sweep(path)
    if refusals:
        raise Refused(refusals)
    require(
        bool(runs), "runs", ", ".join(map(str, folders)), "a folder with runs",
        "glora fl run makes them",
    )  # fmt: skip
    return runs, sweeps


def _sound(run: RunData) -> RunData:
    """The run, if every round it measured has the same metrics, its headline among them."""
    names = [sorted(line["metrics"]) for line in run.evaluated]
    require(all(run.metric in found and found == names[0] for found in names), "metrics",
            f"{str(run.folder)!r} with other metrics in another round",
            f"the same in each, with {run.metric!r}", "restore metrics.jsonl")  # fmt: skip
    return run


def by_config(runs: Iterable[RunData]) -> dict[str, list[RunData]]:
    out: dict[str, list[RunData]] = defaultdict(list)
    for run in runs:
        out[run.about["config"]["name"]].append(run)
    return dict(out)


def with_finished(runs: Iterable[RunData]) -> tuple[dict[str, list[RunData]], list[str]]:
    """The runs of each configuration that has a finished one, and the folders of all others.

    Raises
    ------
    GloraError
        If no run is finished.
    """
    groups = by_config(runs)
    ready = {name: mine for name, mine in groups.items() if any(run.done for run in mine)}
    require(bool(ready), "runs", ", ".join(groups), "at least one finished run",
            "go on with glora fl run --resume")  # fmt: skip
    left = [str(run.folder) for name, mine in groups.items() if name not in ready for run in mine]
    return ready, left
