"""Digits by the protocol of docs/experiments.md: resumable, the estimate printed first.

OMP_NUM_THREADS=1 python experiments/protocol.py
    [--stage 1] [--cell CELL] [--arm ARM] [--until 2026-12-01T00:15] [--estimate]

A finished run is a line of results/protocol.jsonl and is never repeated. Nothing else is kept. Two
processes with other cells of skewed clients share no run and may write one ledger side by side.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from itertools import product
from math import isclose
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from glora_ops.fl.config import Config
from glora_ops.fl.run import Plan, run
from glora_ops.fl.tasks.base import HeldOut

RESULTS = Path(__file__).parent / "results" / "protocol.jsonl"
SEEDS = range(10)
TUNING = (1000, 1001, 1002)
FIRST, RATIO = 0.005, 2**0.5  # the grid of rates: FIRST · RATIO^k
GUESS = 2.5  # seconds a run, before one is measured

RANKS = {"mixed": [1, 2, 4, 8], "equal": [8]}
WHO = {
    "full": ({"count": 6, "participation": 1.0}, 5),
    "sparse": ({"count": 20, "participation": 0.2, "at_least": 10}, 8),
    "long": ({"count": 6, "participation": 1.0}, 25),
}
DATA = {"dirichlet": {"partition": "dirichlet", "alpha": 0.1}, "iid": {"partition": "iid"}}
SKEWED, IID = (list(product((data,), RANKS, ("full", "sparse"))) for data in DATA)
CELLS = SKEWED + IID
LONG = ("dirichlet", "mixed", "long")  # five times the rounds


@dataclass(frozen=True)
class Arm:
    """A method and the values of its own knobs, swept together with the rate."""

    method: Mapping[str, Any]
    knobs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    equal_only: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def choices(self) -> list[dict[str, Any]]:
        return [dict(zip(self.knobs, x, strict=True)) for x in product(*self.knobs.values())]


GLORA = {"kind": "glora", "mode": "adapter", "anchor": 1.0}
STEPS = {"step": (1.0, 0.7, 0.5)}
FIRST_ARMS = {
    "restart": Arm(GLORA | {"mode": "restart"}, STEPS),
    "consensus": Arm(GLORA),
    "fedit": Arm({"kind": "fedit"}),
    "flora": Arm({"kind": "flora"}),
    "momentum": Arm(GLORA, {"momentum": (0.3, 0.5, 0.7)}),
    "ffa": Arm({"kind": "ffa"}, equal_only=True),
}
OTHER_ARMS = {
    "delta": Arm(GLORA | {"mode": "delta"}, STEPS),
    "context": Arm(GLORA | {"mode": "delta", "context": True}, STEPS),
    "projector": Arm(GLORA | {"basis": "projector"}),
    "update": Arm(GLORA | {"basis": "update"}),
    "flexlora": Arm({"kind": "flexlora"}),
    "hetlora": Arm({"kind": "hetlora"}, {"gamma": (0.99, 0.5), "penalty": (1e-3, 1e-2)}),
    "rolora": Arm({"kind": "rolora"}, equal_only=True),
    "fedex": Arm({"kind": "fedex"}, equal_only=True),
    "fedrot": Arm({"kind": "fedrot"}, {"strength": (0.5, 1.0)}, equal_only=True),
    "raflora": Arm({"kind": "raflora"}),
    "fedplora": Arm({"kind": "fedplora"}),
    "fedsvd": Arm({"kind": "fedsvd"}, equal_only=True),
}
KEEP = {"optimiser_state": "keep"}
FRESH = ("restart", "flora")  # draw their adapters each round: nothing to keep
KEPT_ARMS = {
    f"{label}-keep": Arm(arm.method, arm.knobs, arm.equal_only, KEEP)
    for label, arm in (FIRST_ARMS | OTHER_ARMS).items()
    if label not in FRESH
}
SERVED_ARMS = {
    f"{label}-{kind}": Arm(
        FIRST_ARMS[label].method, {"server": tuple({"kind": kind, "lr": lr} for lr in rates)}
    )
    for label in ("restart", "consensus", "fedit", "flora")
    for kind, rates in (("fedavgm", (0.3, 1.0)), ("fedadam", (0.003, 0.01, 0.03)))
}
KEPT_FIRST = {
    f"{label}-keep": KEPT_ARMS[f"{label}-keep"] for label in FIRST_ARMS if label not in FRESH
}
KEPT_OTHER = {label: arm for label, arm in KEPT_ARMS.items() if label not in KEPT_FIRST}
LONG_ARMS = {
    label: (FIRST_ARMS | KEPT_ARMS)[label]
    for label in ("restart", "fedit-keep", "flora", "consensus-keep", "fedit")
}
# A stage's groups of cells and arms, the most wanted first.
STAGES = {
    1: ((SKEWED, FIRST_ARMS), (IID, FIRST_ARMS)),
    2: (
        (SKEWED, OTHER_ARMS),
        (SKEWED, KEPT_FIRST),
        (IID, OTHER_ARMS),
        (SKEWED, SERVED_ARMS),
        (SKEWED, KEPT_OTHER),
        (IID, KEPT_FIRST | SERVED_ARMS | KEPT_OTHER),
    ),
    3: (([LONG], LONG_ARMS),),
}
ARMS = FIRST_ARMS | OTHER_ARMS | KEPT_ARMS | SERVED_ARMS

Cell = tuple[str, str, str]  # data, ranks, turnout
Key = tuple[str, str, int, float, str, HeldOut]


def config_of(cell: Cell, label: str, knobs: Mapping[str, Any], lr: float) -> Config:
    data, ranks, turnout = cell
    who, rounds = WHO[turnout]
    arm = ARMS[label]
    return Config.model_validate(
        {
            "name": "_".join(cell),
            "clients": {**who, **DATA[data], "ranks": RANKS[ranks]},
            "training": {"rounds": rounds, "steps": 6, "batch": 16, **arm.training},
            "evaluation": {"agreement": "never"},
            "methods": {label: {**arm.method, **knobs, "lr": lr}},
        }
    )


def end_point(turnout: str, scores: list[float]) -> float:
    """After the last round with all clients; over the second half of the rounds with a few."""
    return fmean(scores[len(scores) // 2 + 1 :]) if turnout == "sparse" else scores[-1]


def judged(plan: Plan, turnout: str) -> dict[str, Any]:
    """A run's curve, end point, clients' own scores, bytes and answers; its folder is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        lines = run(plan, Path(folder) / "run")
        text = (Path(folder) / "run" / "predictions.jsonl").read_text()
    answers, last = [json.loads(x) for x in text.splitlines()], lines[-1]
    scores = [x["metrics"]["accuracy"] for x in lines]
    return {
        "scores": scores,
        "end_point": end_point(turnout, scores),
        "own": last["own"],
        "norm": last["update"]["norm"],
        "captured": last["update"]["captured"],
        "bytes": sum(x["bytes_down"] + x["bytes_up"] for x in lines),
        "predictions": "".join(str(x["prediction"]) for x in answers),
        "labels": "".join(str(x["truth"]) for x in answers),
    }


class Ledger:
    """Finished runs by what they are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # without a line that a kill cut off
        self.cut = whole != text
        self.done = {self.key(x): x for x in map(json.loads, whole.splitlines())}

    @staticmethod
    def key(x: Mapping[str, Any]) -> Key:
        knobs = json.dumps(x["knobs"], sort_keys=True)
        return x["cell"], x["arm"], x["seed"], x["lr"], knobs, x["held_out"]

    def add(self, x: dict[str, Any]) -> None:
        if self.cut:
            lines = (json.dumps(y, sort_keys=True) + "\n" for y in self.done.values())
            self.path.write_text("".join(lines), encoding="utf-8")
            self.cut = False
        self.done[self.key(x)] = x
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(x, sort_keys=True) + "\n")

    @property
    def seconds(self) -> float:
        return fmean(x["seconds"] for x in self.done.values()) if self.done else GUESS


@dataclass
class Runner:
    """Runs what the ledger lacks; stops before a run that would begin after `until`."""

    ledger: Ledger
    until: datetime | None = None
    chosen: dict[tuple[Cell, str], tuple[float, dict[str, Any]]] = field(default_factory=dict)

    def score(self, cell: Cell, label: str, seed: int, lr: float, knobs: Mapping[str, Any],
              held_out: HeldOut) -> float:  # fmt: skip
        about = {"cell": "_".join(cell), "arm": label, "seed": seed, "lr": lr,
                 "knobs": dict(knobs), "held_out": held_out}  # fmt: skip
        key = Ledger.key(about)
        if key not in self.ledger.done:
            if self.until and datetime.now() > self.until:
                raise TimeoutError
            begun = perf_counter()
            found = self.result(cell, label, seed, lr, knobs, held_out)
            seconds = round(perf_counter() - begun, 1)
            self.ledger.add(about | found | {"seconds": seconds})
            print(
                f"{datetime.now():%H:%M:%S} {'_'.join(cell)} {label} {dict(knobs)} seed {seed} "
                f"lr {lr:.4g} {held_out}: {self.ledger.done[key]['end_point']:.4f}",
                flush=True,
            )
        return float(self.ledger.done[key]["end_point"])

    def result(self, cell: Cell, label: str, seed: int, lr: float, knobs: Mapping[str, Any],
               held_out: HeldOut) -> dict[str, Any]:  # fmt: skip
        """What a line of the ledger holds of one run."""
        plan = Plan(config_of(cell, label, knobs, lr), label, seed, lr, None, held_out)
        return judged(plan, cell[2])

    def rate(self, cell: Cell, label: str) -> tuple[float, dict[str, Any]]:
        """The best rate and knobs on the tuning seeds, of this arm, rank setting and turnout.

        Skewed clients decide, for IID too. For each choice of knobs the grid grows until two rates
        above the best and one below it are worse.
        """
        where: Cell = ("dirichlet", *cell[1:]) if cell[0] == "iid" else cell
        if (where, label) not in self.chosen:
            best: tuple[float, float, dict[str, Any]] = (-1.0, 0.0, {})
            for knobs in ARMS[label].choices:
                tried: dict[int, float] = {}
                for k in wanted(tried):
                    lr = rate_at(k)
                    tried[k] = fmean(
                        self.score(where, label, seed, lr, knobs, "validation") for seed in TUNING
                    )
                top = max(tried, key=lambda k: tried[k])
                best = max(best, (tried[top], rate_at(top), knobs), key=lambda x: x[0])
            self.chosen[where, label] = best[1:]
        return self.chosen[where, label]


def wanted(tried: Mapping[int, float]) -> Iterator[int]:
    """The next step of the grid, until the best has one lower and two higher worse neighbours.

    Rates that are level but for rounding are all the best.
    """
    while True:
        best = [k for k in tried if isclose(tried[k], max(tried.values()))] or [0]
        low, top = min(best), max(best)
        missing = [k for k in (low, top, top + 1, top + 2, low - 1) if k not in tried]
        if not missing:
            return
        yield missing[0]


@cache
def rate_at(k: int) -> float:
    return float(f"{FIRST * RATIO**k:.6g}")


def work(stage: int) -> Iterator[tuple[Cell, str]]:
    """Cells and arms in the order they run: group by group, cell by cell."""
    for cells, arms in STAGES[stage]:
        for cell in cells:
            for label, arm in arms.items():
                if cell[1] == "equal" or not arm.equal_only:
                    yield cell, label


def estimate(runner: Runner, todo: Iterable[tuple[Cell, str]]) -> str:
    """Runs that are missing: five rates a sweep, as many runs as seeds; before anything runs."""
    trials = runs = 0
    for cell, label in todo:
        name = "_".join(cell)
        mine = [x for x in runner.ledger.done.values() if (x["cell"], x["arm"]) == (name, label)]
        reported = sum(x["held_out"] == "test" for x in mine)
        runs += len(SEEDS) - reported
        if cell[0] != "iid" and not reported:
            expected = 5 * len(TUNING) * len(ARMS[label].choices)
            trials += max(0, expected - len(mine))
    hours = (trials + runs) * runner.ledger.seconds / 3600
    return (
        f"about {trials} trials and {runs} runs are missing, "
        f"{runner.ledger.seconds:.1f} s each so far: {hours:.1f} h"
    )


def carry_out(runner: Runner, todo: list[tuple[Cell, str]], only_estimate: bool) -> None:
    """Sweep each arm in its cell and run it on the reported seeds, until the runner's time ends."""
    print(estimate(runner, todo), flush=True)
    if only_estimate:
        return
    try:
        for cell, label in todo:
            lr, knobs = runner.rate(cell, label)
            for seed in SEEDS:
                runner.score(cell, label, seed, lr, knobs, "test")
    except TimeoutError:
        print(estimate(runner, todo), flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--stage", type=int, choices=list(STAGES), default=1)
    names = ["_".join(cell) for cell in (*CELLS, LONG)]
    p.add_argument("--cell", choices=names, action="append", help="only these cells")
    p.add_argument("--arm", choices=list(ARMS), action="append", help="only these arms")
    p.add_argument("--until", type=datetime.fromisoformat, help="start no run after this time")
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--estimate", action="store_true", help="print it and stop")
    args = p.parse_args()
    runner = Runner(Ledger(args.results), args.until)
    todo = [
        (cell, arm)
        for cell, arm in work(args.stage)
        if (not args.cell or "_".join(cell) in args.cell) and (not args.arm or arm in args.arm)
    ]
    carry_out(runner, todo, args.estimate)


if __name__ == "__main__":
    main()
