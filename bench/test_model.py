"""Whole models in one call, against a loop over the best peers and against one module alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from measure import Arm, Floor
from peers import FORMS, OVERSAMPLE, by_lapack, lists, omega, randomized_svd, stacked_qr
from populations import Case, Population, population
from test_aggregate import BEST, CONSENSUS, LISTS, SMALL, floor, judge_consensus, judge_update
from truth import truth_of

import glora_ops

#: By name: modules, the case of each, and whether peer (1) takes part (its SVD is of order N).
MODELS = {
    "112 small": (112, SMALL, True),
    "16 like Llama-3.2-1B's": (16, Case(2048, 2048, clients=32, ranks=(24,), rank=48), False),
}


def copies(p: Population, modules: int) -> list[Population]:
    """Modules of their own memory: nobody multiplies what the last product left in the cache."""
    return [
        replace(p, lora_b=[x.clone() for x in p.lora_b], lora_a=[x.clone() for x in p.lora_a])
        for _ in range(modules)
    ]


def loops(model: list[Population], exact: bool) -> list[Arm]:
    """Peers (0), at q = 1, and (1), module by module, from the clients' tensors."""
    case = model[0].case
    om = omega(case.d_in, case.rank + OVERSAMPLE)

    def each(peer: Callable[[Population, Any], Any]) -> Callable[[Any], list[Any]]:
        return lambda lapack: [peer(p, lapack) for p in model]

    zero = each(lambda p, lapack: randomized_svd(p, case.rank, 1, om, lapack, lists))
    arms = [
        Arm.fastest(
            f"peer0 q1 {form}", by_lapack(zero, kind), BEST, LISTS, peer="0", steps=1, form=form
        )
        for form, kind in FORMS.items()
    ]
    if exact:
        one = by_lapack(each(lambda p, lapack: stacked_qr(p, case.rank, lapack, lists)))
        arms.append(Arm.fastest("peer1", one, BEST, LISTS, peer="1"))
    return arms


@pytest.mark.parametrize(
    ("basis", "told"), [("update", True), ("update", False), ("consensus", True)]
)
@pytest.mark.parametrize("model", MODELS)
def test_whole_model(model: str, basis: str, told: bool, race: Any) -> None:
    """glora checks the clients' values as well."""
    modules, case, exact = MODELS[model]
    truth = truth_of(case)
    parts = copies(population(case), modules)
    weights, scalings = parts[0].weights.tolist(), parts[0].scaling.tolist()

    def merge(parts: list[Population]) -> Any:
        clients = [
            {f"layer {l}": (p.lora_b[i], p.lora_a[i]) for l, p in enumerate(parts)}
            for i in range(case.clients)
        ]
        state = glora_ops.aggregate(
            clients, weights, scalings, case.rank, basis=basis, client_statistics=told
        )
        return list(state.modules.values())[-1]

    judged = judge_update(truth, case.rank) if basis == "update" else judge_consensus(truth, case)

    def judge(name: str, answer: Any) -> dict[str, float]:
        if name.startswith("peer"):
            return judged(name, answer[-1])
        m = answer
        return judged("glora", (m.u, m.s, m.v, m.eig_u, m.eig_v, m.stats, m.client_stats))

    answer = BEST if basis == "update" else CONSENSUS
    alone = Arm.fastest("one_module", {"as it is": lambda: merge(parts[:1])}, answer, LISTS)
    one = floor(case, basis)
    race(
        case, lambda: merge(parts), [*loops(parts, exact), alone],
        Floor(modules * one.bytes, modules * one.flops), judge, op="glora_ops.aggregate",
        basis=basis, start=LISTS, modules=modules, rounds=7, matched=1, client_statistics=told,
    )  # fmt: skip


def test_one_module_is_the_op(race: Any) -> None:
    """What the Python API adds to the op for a single module."""
    p = population(SMALL)
    clients = list(zip(p.lora_b, p.lora_a, strict=True))

    def call() -> Any:
        m = glora_ops.aggregate(
            clients, p.weights.tolist(), p.scaling.tolist(), SMALL.rank, basis="update"
        ).modules[""]
        return m.u, m.s, m.v, m.eig_u, m.eig_v, m.stats, m.client_stats

    def op() -> Any:
        return torch.ops.glora.aggregate.list(
            p.lora_b, p.lora_a, p.weights, p.scaling, SMALL.rank, "update"
        )

    judged = judge_update(truth_of(SMALL), SMALL.rank)
    race(
        SMALL, call, [Arm.fastest("glora_op", {"as it is": op}, BEST, LISTS)],
        floor(SMALL, "update"), lambda name, answer: judged("glora", answer),
        op="glora_ops.aggregate", basis="update", start=LISTS, client_statistics=True,
    )  # fmt: skip
