"""What the arms of protocol.py lie between: clients alone, all data in one place, full weights.

OMP_NUM_THREADS=1 python experiments/outer_bounds.py [--until 2026-12-01T00:15]

Digits, skewed, all clients, into the same ledger; rates by the same sweep. *alone*: each client
trains its LoRA on its own examples, for as many steps, and nothing is exchanged (mean over
clients). *central*: one client holds all examples and takes all clients' steps. *full*: FedAvg of
all weights, the base's included, no LoRA.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from protocol import ARMS, RESULTS, SEEDS, Arm, Cell, Ledger, Runner, config_of, judged

from glora_ops.fl.messages import Client, Reply, Sent
from glora_ops.fl.methods import Method
from glora_ops.fl.methods.base import next_state
from glora_ops.fl.run import Plan
from glora_ops.fl.server import Server
from glora_ops.fl.tasks.base import HeldOut
from glora_ops.fl.trainer import Trainer

CELLS: list[Cell] = [("dirichlet", "mixed", "full"), ("dirichlet", "equal", "full")]
KEEP = {"optimiser_state": "keep"}
BOUNDS = {
    "alone": Arm({"kind": "fedit"}, training=KEEP),
    "central": Arm({"kind": "fedit"}, training=KEEP),
    "full": Arm({"kind": "fedit"}),
}


class FullWeights(Method):
    """FedAvg: every weight is a "head"; A has no gradient beside B = 0, so LoRA stays zero."""

    def broadcast(self, server: Server, client: Client) -> Sent:
        return replace(self.opening(server, client), train="A")

    def combine(self, server: Server, replies: Sequence[Reply]) -> Server:
        return next_state(server, replies)


class Bounds(Runner):
    def result(self, cell: Cell, label: str, seed: int, lr: float, knobs: Mapping[str, Any],
               held_out: HeldOut) -> dict[str, Any]:  # fmt: skip
        def plan() -> Plan:
            return Plan(config_of(cell, label, knobs, lr), label, seed, lr, None, held_out)

        whole = plan()
        if label == "full":
            task = whole.task
            task.heads = (*(name for name, _ in task.model().named_children()), "position")
            whole.trainer = Trainer(task, whole.trainer.how)
            whole.setup = replace(whole.setup, dense=whole.trainer.dense)
            whole.method = FullWeights()
            return judged(whole, cell[2])
        if label == "central":
            steps = whole.trainer.how.steps * len(whole.parts)
            whole.trainer.how = replace(whole.trainer.how, steps=steps)
            whole.parts = [np.concatenate(whole.parts)]
            whole.setup = replace(whole.setup, ranks=(whole.setup.max_rank,))
            return judged(whole, cell[2])
        found = []
        for i, rows in enumerate(whole.parts):
            one = plan()
            one.parts, one.setup = [rows], replace(one.setup, ranks=(one.setup.ranks[i],))
            found.append(judged(one, cell[2]))
        return found[0] | {
            "scores": [fmean(x) for x in zip(*(f["scores"] for f in found), strict=True)],
            "end_point": fmean(f["end_point"] for f in found),
            "own": [f["own"][0] for f in found],
            "bytes": 0,
            "predictions": "",
            "labels": "",
        }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--until", type=datetime.fromisoformat, help="start no run after this time")
    p.add_argument("--results", type=Path, default=RESULTS)
    args = p.parse_args()
    ARMS.update(BOUNDS)
    runner = Bounds(Ledger(args.results), args.until)
    try:
        for cell in CELLS:
            for label in BOUNDS:
                lr, knobs = runner.rate(cell, label)
                for seed in SEEDS:
                    runner.score(cell, label, seed, lr, knobs, "test")
    except TimeoutError:
        print("not finished; the same command goes on")


if __name__ == "__main__":
    main()
