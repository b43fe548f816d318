"""A whole model in one call, against a loop over the best peers and against one module alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import Arm, Floor
from peers import OVERSAMPLE, by_lapack, omega, randomized_svd, stacked_qr
from populations import Case, population
from test_aggregate import BEST, CONSENSUS, LISTS, STACKS, floor, judge_consensus, judge_update
from truth import truth_of

import glora_ops

MODULES = 112
CASE = Case(1024, 1024, clients=8, ranks=(8,), rank=16)


@pytest.mark.parametrize("basis", ["update", "consensus"])
def test_whole_model(basis: str, race: Any) -> None:
    """glora starts from the clients' tensors and checks their values; peers from row stacks."""
    p = population(CASE)
    truth = truth_of(CASE)
    om = omega(CASE.d_in, CASE.rank + OVERSAMPLE)
    clients = [
        {f"layer {l}": (b.clone(), a.clone()) for l in range(MODULES)}
        for b, a in zip(p.lora_b, p.lora_a, strict=True)
    ]

    def merge(modules: int) -> Any:
        held = [{m: c[m] for m in list(c)[:modules]} for c in clients]
        state = glora_ops.aggregate(
            held, p.weights.tolist(), p.scaling.tolist(), CASE.rank, basis=basis
        )
        return list(state.modules.values())[-1]

    loops = {
        "peer1_qr": lambda lapack: [stacked_qr(p, CASE.rank, lapack) for _ in range(MODULES)],
        "peer0_q1": lambda lapack: [
            randomized_svd(p, CASE.rank, 1, om, lapack) for _ in range(MODULES)
        ],
    }
    judged = judge_update(truth, CASE.rank) if basis == "update" else judge_consensus(truth, CASE)

    def judge(name: str, answer: Any) -> dict[str, float]:
        if name.startswith("peer"):
            return judged(name, answer[-1])
        m = answer
        return judged("glora", (m.u, m.s, m.v, m.eig_u, m.eig_v, m.stats, m.client_stats))

    answer = BEST if basis == "update" else CONSENSUS
    arms = [Arm.fastest(name, by_lapack(call), BEST, STACKS) for name, call in loops.items()]
    arms.append(Arm.fastest("one_module", {"as it is": lambda: merge(1)}, answer, LISTS))
    one = floor(CASE, basis)
    race(
        CASE, lambda: merge(MODULES), arms, Floor(MODULES * one.bytes, MODULES * one.flops), judge,
        op="glora_ops.aggregate", basis=basis, start=LISTS, modules=MODULES, rounds=7,
    )  # fmt: skip


def test_one_module_is_the_op(race: Any) -> None:
    """What the Python API adds to the op for a single module."""
    p = population(CASE)
    clients = list(zip(p.lora_b, p.lora_a, strict=True))

    def call() -> Any:
        m = glora_ops.aggregate(
            clients, p.weights.tolist(), p.scaling.tolist(), CASE.rank, basis="update"
        ).modules[""]
        return m.u, m.s, m.v, m.eig_u, m.eig_v, m.stats, m.client_stats

    def op() -> Any:
        return torch.ops.glora.aggregate(
            p.b, p.a, p.packed.offsets, p.weights, p.scaling, CASE.rank, "update"
        )

    judged = judge_update(truth_of(CASE), CASE.rank)
    race(
        CASE, call, [Arm.fastest("glora_op", {"as it is": op}, BEST, STACKS)],
        floor(CASE, "update"), lambda name, answer: judged("glora", answer),
        op="glora_ops.aggregate", basis="update", start=LISTS,
    )  # fmt: skip
