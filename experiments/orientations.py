"""Digits in orientations that no client has: what is learnt of one task for others.

OMP_NUM_THREADS=1 python experiments/orientations.py [--until 2026-12-01T00:15] [--estimate]

Each of six clients has its digits in one orientation (leaning, two of them inverted, all on their
side); judged are five orientations that none has. Into the ledger of protocol.py, by its rules.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import RESULTS, Cell, Ledger, Runner, carry_out, config_of, judged
from torch import nn

from glora_ops.fl import register_task
from glora_ops.fl.config import Config
from glora_ops.fl.run import Plan
from glora_ops.fl.seeds import numpy_stream
from glora_ops.fl.tasks.base import Answer, HeldOut, Judged
from glora_ops.fl.tasks.digits import Digits, Part

CELL: Cell = ("orientations", "mixed", "full")
ARMS = ("restart", "consensus", "fedit", "flora", "momentum")
Orientation = tuple[float, bool]  # degrees it leans, inverted
SEEN: list[Orientation] = [(-40, False), (-24, True), (-8, False), (8, False), (24, True),
                           (40, False)]  # fmt: skip
UNSEEN: list[Orientation] = [(-32, False), (-16, True), (0, False), (16, False), (32, True)]


class Orientations(Digits):
    """`labels` are orientations, so that a client holds one; accuracy is on those that none has."""

    def __init__(
        self, config: Config, seed: int, data_dir: Path | None, held_out: HeldOut = "test"
    ) -> None:
        super().__init__(seed, held_out)
        self.label_names = tuple(f"{lean:+g}{' inverted' * inv}" for lean, inv in SEEN)
        self.labels = numpy_stream(seed, "orientations").permutation(len(self.train)) % len(SEEN)
        self.train = shown(self.train, SEEN, self.labels)
        each = np.arange(len(self.held_out))
        self.unseen = shown(self.held_out, UNSEEN, each % len(UNSEEN))
        self.held_by = each % len(SEEN)
        self.held_out = shown(self.held_out, SEEN, self.held_by)

    def evaluate(self, model: nn.Module) -> Judged:
        """Each digit once in an orientation that no client has, and once in one that some has."""
        own = super().evaluate(model)
        with torch.no_grad():
            found = model(self.unseen.x).argmax(1)
        right = found == self.unseen.y
        new = [
            Answer(int(i), p, y, float(p == y), None)
            for i, p, y in zip(self._ids, found.tolist(), self.unseen.y.tolist(), strict=True)
        ]
        seen = [
            a._replace(label=int(held)) for a, held in zip(own.answers, self.held_by, strict=True)
        ]
        metrics = {"accuracy": float(right.double().mean()), "seen": own.metrics["accuracy"]}
        return Judged(metrics, [*new, *seen])


def shown(part: Part, orientations: Sequence[Orientation], which: np.ndarray) -> Part:
    """Each digit in its own orientation."""
    x = part.x.clone()
    for k, (lean, inverted) in enumerate(orientations):
        turned = part[which == k].leaning(lean).x
        x[which == k] = 1 - turned if inverted else turned
    return Part(x, part.y)


class Unseen(Runner):
    def result(self, cell: Cell, label: str, seed: int, lr: float, knobs: Mapping[str, Any],
               held_out: HeldOut) -> dict[str, Any]:  # fmt: skip
        content = config_of(("iid", *cell[1:]), label, knobs, lr).model_dump()
        content["name"] = "_".join(cell)
        content["task"]["kind"] = "orientations"
        content["clients"]["partition"] = "task"
        plan = Plan(Config.model_validate(content), label, seed, lr, None, held_out)
        found = judged(plan, cell[2])
        judged_on = len(found["labels"]) // 2  # the unseen ones, which come first
        return found | {x: found[x][:judged_on] for x in ("predictions", "labels")}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--until", type=datetime.fromisoformat, help="start no run after this time")
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--estimate", action="store_true", help="print it and stop")
    args = p.parse_args()
    runner = Unseen(Ledger(args.results), args.until)
    register_task("orientations", Orientations)
    carry_out(runner, [(CELL, label) for label in ARMS], args.estimate)


if __name__ == "__main__":
    main()
