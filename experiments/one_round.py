"""One round, three bases: the same trained clients merged at several R, loudnesses and settings.

OMP_NUM_THREADS=1 python experiments/one_round.py [SEEDS]    # writes results/one_round.csv

Eight clients train rank-8 adapters on digits from one start. One of them then sends k times its
update. Each row is one merge: its distance from the mean without the loudness, and its accuracy.
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import glora_ops as glora
from glora_ops.fl.config import Config
from glora_ops.fl.messages import Client, Pairs, Sent
from glora_ops.fl.run import Plan

OUT = Path(__file__).parent / "results" / "one_round.csv"
STEPS, LR, CLIENTS = 40, 0.005, 8
RANKS, LOUDNESS = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32)
BASES: dict[str, dict[str, Any]] = {
    "consensus": {"basis": "consensus", "anchor": 1.0},
    "projector": {"basis": "projector"},
    "update": {"basis": "update"},
}
KNOBS: dict[str, dict[str, Any]] = {
    **{f"eta={x:g}": {"basis": "consensus", "anchor": x} for x in (0.0, 0.5, 2.0)},
    **{
        f"tau_rel={x:g}": {"basis": "consensus", "anchor": 1.0, "tau_rel": x}
        for x in (0.01, 0.3, 1.0)
    },
}


def trained(data: dict[str, Any], seed: int) -> tuple[Plan, list[Pairs]]:
    """Clients after local training from one common start."""
    content = {
        "name": "one_round",
        "clients": {"count": CLIENTS, "ranks": [8], **data},
        "training": {"rounds": 1, "steps": STEPS, "batch": 16},
        "methods": {"update": {"kind": "glora", "mode": "adapter", "basis": "update"}},
    }
    plan = Plan(Config.model_validate(content), "update", seed, LR)
    server = plan.method.start(plan.setup)
    out = []
    for i in range(CLIENTS):
        client = Client(i, 8)
        sent = plan.method.broadcast(server, client)
        out.append(plan.trainer.train(sent, client, plan.parts[i], 0, {}).factors)
    return plan, out


def merges(plan: Plan, clients: list[Pairs]) -> Iterator[dict[str, Any]]:
    s = plan.setup.scaling
    plain = {
        m: sum(s * (c[m][0] @ c[m][1]) for c in clients) / CLIENTS for m in plan.trainer.shapes
    }
    norm = sum(float(x.square().sum()) for x in plain.values()) ** 0.5
    cases = [(r, 1, BASES) for r in RANKS]
    cases += [(r, k, BASES) for r in (8, 16) for k in LOUDNESS[1:]]
    cases += [(8, 1, KNOBS), (8, 8, KNOBS)]
    for rank, loudness, arms in cases:
        heard = [{m: (loudness * b, a) for m, (b, a) in clients[0].items()}, *clients[1:]]
        for label, how in arms.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", glora.GloraWarning)
                state = glora.aggregate(heard, [1.0] * CLIENTS, [s] * CLIENTS, rank, **how)
            made = {m: ((x.u * x.s.to(x.u.dtype)) / s, x.v.mT) for m, x in state.modules.items()}
            off = sum(float((s * (b @ a) - plain[m]).square().sum()) for m, (b, a) in made.items())
            found = plan.trainer.evaluate(Sent(made, plan.trainer.dense, s)).metrics
            yield {"rank": rank, "loudness": loudness, "arm": label,
                   "error": f"{off**0.5 / norm:.4f}", "accuracy": f"{found['accuracy']:.4f}",
                   "captured": f"{state.captured:.4f}"}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    rows = []
    for seed in range(seeds):
        for name, data in (
            ("iid", {"partition": "iid"}),
            ("dirichlet", {"partition": "dirichlet", "alpha": 0.1}),
        ):
            rows += [{"data": name, "seed": seed, **x} for x in merges(*trained(data, seed))]
            print(name, seed, flush=True)
            OUT.parent.mkdir(exist_ok=True)
            with OUT.open("w", newline="", encoding="utf-8") as file:
                out = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                out.writeheader()
                out.writerows(rows)


if __name__ == "__main__":
    main()
