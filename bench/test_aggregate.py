"""The server step against its peers: pytest bench/test_aggregate.py; see bench/README.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from measure import Arm, Floor
from peers import (
    OVERSAMPLE,
    Lapack,
    Peft,
    by_lapack,
    dense_lowrank,
    dense_svd,
    naive_loop,
    omega,
    randomized_svd,
    randomized_svd_from_lists,
    stacked_qr,
)
from populations import Case, Population, population
from truth import Truth, truth_of

import glora_ops
from glora_ops import STATS

SMALL = Case(1024, 1024, clients=8, ranks=(8,), rank=16)
LARGE = Case(4096, 4096, clients=32, ranks=(16,), rank=32)
RAGGED = (4, 8, 16, 32, 64)
BF16 = torch.bfloat16
#: Of all products of shape, K, ranks and dtype: each value of each at least twice.
CASES = [
    SMALL,
    replace(SMALL, dtype=BF16),
    replace(SMALL, clients=32),
    replace(SMALL, clients=128),
    replace(LARGE, clients=8),
    replace(LARGE, clients=8, dtype=BF16),
    LARGE,
    replace(LARGE, kind="shared"),
    replace(LARGE, kind="disjoint"),
    replace(LARGE, dtype=BF16),
    replace(LARGE, clients=30, ranks=RAGGED),
    replace(LARGE, clients=128, ranks=(8,)),
    Case(11008, 4096, clients=8, ranks=(16,), rank=32, dtype=BF16),
    Case(11008, 4096, clients=32, ranks=(16,), rank=32),
    Case(11008, 4096, clients=128, ranks=(8,), rank=32, dtype=BF16),
]
BEST, CONSENSUS = "best rank R of the mean", "plain consensus"
STACKS, LISTS, ADAPTERS = "row stacks", "the clients' tensors", "adapters in a PEFT model"
STEPS = (0, 1, 2)


def randomized(p: Population, steps: int, peer: Callable = randomized_svd) -> Arm:
    om = omega(p.case.d_in, p.case.rank + OVERSAMPLE)
    name = f"peer0_q{steps}" + ("" if peer is randomized_svd else "_lists")
    start = STACKS if peer is randomized_svd else LISTS
    calls = by_lapack(lambda lapack: peer(p, p.case.rank, steps, om, lapack))
    return Arm.fastest(name, calls, BEST, start)


def qr(p: Population) -> Arm:
    calls = by_lapack(lambda lapack: stacked_qr(p, p.case.rank, lapack))
    return Arm.fastest("peer1_qr", calls, BEST, STACKS)


def dense(p: Population, slow: bool) -> list[Arm]:
    rank, only = p.case.rank, "as it is"
    arms = [Arm.fastest("peer3_lowrank", {only: lambda: dense_lowrank(p, rank)}, BEST, STACKS)]
    if p.case == SMALL or (slow and p.case == LARGE):
        arms += [
            Arm.fastest("peer4_svd", {only: lambda: dense_svd(p, rank)}, BEST, STACKS),
            peft(p),
        ]
    return arms


def peft(p: Population) -> Arm:
    merge = Peft(p, p.case.rank)
    return Arm.fastest("peer2_peft", {"as it is": merge}, BEST, ADAPTERS, reset=merge.reset)


def naive(p: Population) -> Arm:
    om_u, om_v = (omega(d, p.case.rank + OVERSAMPLE) for d in (p.case.d_out, p.case.d_in))
    calls = by_lapack(lambda lapack: naive_loop(p, p.case.rank, om_u, om_v, lapack))
    return Arm.fastest("peer5_loop", calls, CONSENSUS, LISTS)


def matched_steps(p: Population, truth: Truth, captured: float) -> int:
    """Power steps peer (0) needs to capture what glora captured, less 1e-3 of the optimum."""
    rank = p.case.rank
    om = omega(p.case.d_in, rank + OVERSAMPLE)
    for steps in range(7):
        held = truth.captured(*randomized_svd(p, rank, steps, om, Lapack(1)))
        if held >= captured - 1e-3 * truth.optimum(rank):
            return steps
    return 6


def operator(p: Population, basis: str, **how: Any) -> Callable[[], tuple[torch.Tensor, ...]]:
    def call() -> tuple[torch.Tensor, ...]:
        return torch.ops.glora.aggregate(
            p.b, p.a, p.packed.offsets, p.weights, p.scaling, p.case.rank, basis, **how
        )

    return call


def floor(case: Case, basis: str) -> Floor:
    """Least work of an implicit method: the factors once, and products without power steps.

    One application of the mean or its transpose to k = R + p columns costs 2Nk(d_out + d_in).
    "update" needs two of them; a consensus basis needs the clients' Gram matrices, three
    passes over each side (MᵀΩ, M·, Mᵀ·) and the core, and the anchor two applications more.
    """
    d, rows, k = case.d_out + case.d_in, case.rows, case.rank + OVERSAMPLE
    application = 2 * rows * k * d
    grams = 2 * sum(case.rank_of(i) ** 2 for i in range(case.clients)) * d
    core = 2 * rows * case.rank * d
    flops = {
        "update": 2 * application,
        "consensus": 5 * application + grams + core,
        "projector": 3 * application + grams + core,
    }
    return Floor(bytes=(rows + case.rank) * d * case.dtype.itemsize, flops=flops[basis])


def figures(truth: Truth, rank: int, u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> dict:
    captured, optimum = truth.captured(u, s, v), truth.optimum(rank)
    return {
        "captured": captured,
        "optimum": optimum,
        "captured_of_optimum": captured / optimum,
        "error": max(0.0, 1 - captured) ** 0.5,
    }


def judge_update(truth: Truth, rank: int) -> Callable[[str, Any], dict[str, float]]:
    def judge(name: str, answer: Any) -> dict[str, float]:
        if name != "glora":
            found = figures(truth, rank, *answer)
            if name in ("peer1_qr", "peer2_peft", "peer4_svd"):
                assert found["captured_of_optimum"] > 0.9999, f"{name} is exact by construction"
            return found
        u, s, v, *_, stats, _ = answer
        found = figures(truth, rank, u, s, v)
        assert found["captured_of_optimum"] >= 0.999
        claimed = float(stats[STATS.index("captured")])
        return found | {"certified": claimed, "steps": float(stats[STATS.index("power_iters")])}

    return judge


@pytest.mark.parametrize("case", CASES, ids=str)
def test_update(case: Case, race: Any, slow: bool) -> None:
    p = population(case)
    truth = truth_of(case)
    call = operator(p, "update")
    u, s, v, *_ = call()
    matched = matched_steps(p, truth, truth.captured(u, s, v))
    arms = [randomized(p, steps) for steps in sorted({*STEPS, matched})]
    arms += [qr(p), *dense(p, slow)]
    race(
        case, call, arms, floor(case, "update"), judge_update(truth, case.rank),
        op="aggregate", basis="update", start=STACKS, matched=f"peer0_q{matched}",
    )  # fmt: skip


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["partly", "shared", "disjoint"])
def test_update_at_equal_steps(kind: Any, steps: int, race: Any) -> None:
    """As many power steps as peer (0), whether they are needed or not: the price of a step."""
    case = replace(LARGE, kind=kind)
    p, truth = population(case), truth_of(case)

    def judge(name: str, answer: Any) -> dict[str, float]:
        return figures(truth, case.rank, *answer[:3])

    race(
        case, operator(p, "update", power_iters=steps), [randomized(p, steps)],
        floor(case, "update"), judge, op=f"aggregate(power_iters={steps})", basis="update",
        start=STACKS, matched=f"peer0_q{steps}",
    )  # fmt: skip


def judge_consensus(truth: Truth, case: Case) -> Callable[[str, Any], dict[str, float]]:
    """The quality contract of tests/bounds.py: rank-r readouts of a state of rank R = 2r."""
    half = case.rank // 2
    best = max(0.0, 1 - truth.optimum(half)) ** 0.5

    def judge(name: str, answer: Any) -> dict[str, float]:
        if name != "glora":
            return figures(truth, case.rank, *answer)
        u, s, v, *_, stats, _ = answer
        error = figures(truth, half, u[:, :half], s[:half], v[:, :half])["error"]
        assert error <= 1.10 * best + 0.03, (
            f"rank-{half} readout: error {error:.4f}, best {best:.4f}"
        )
        attainable = float(stats[STATS.index("attainable")])
        return figures(truth, case.rank, u, s, v) | {
            "attainable": attainable,
            "readout_error": error,
            "readout_best": best,
            "steps": float(stats[STATS.index("power_iters")]),
        }

    return judge


@pytest.mark.parametrize("case", CASES, ids=str)
def test_consensus(case: Case, race: Any) -> None:
    p = population(case)
    truth = truth_of(case)
    arms = [randomized(p, 1), qr(p), naive(p)]
    projector = operator(p, "projector")
    arms.append(
        Arm.fastest("glora_projector", {"as it is": lambda: projector()[:3]}, CONSENSUS, STACKS)
    )
    race(
        case, operator(p, "consensus"), arms, floor(case, "consensus"),
        judge_consensus(truth, case), op="aggregate", basis="consensus", start=STACKS,
    )  # fmt: skip


@pytest.mark.parametrize("case", [SMALL, LARGE], ids=str)
def test_update_from_lists(case: Case, race: Any) -> None:
    """The drop-in form, torch.ops.glora.aggregate.list, stacking on everybody's clock."""
    p = population(case)
    truth = truth_of(case)

    def call() -> tuple[torch.Tensor, ...]:
        return torch.ops.glora.aggregate.list(
            p.lora_b, p.lora_a, p.weights, p.scaling, case.rank, "update"
        )

    arms = [randomized(p, steps, randomized_svd_from_lists) for steps in STEPS]
    race(
        case, call, arms, floor(case, "update"), judge_update(truth, case.rank),
        op="aggregate.list", basis="update", start=LISTS,
    )  # fmt: skip


def test_python_api(race: Any) -> None:
    """glora_ops.aggregate: values checked, stacked, aggregated, certified, reported."""
    p = population(LARGE)
    truth = truth_of(LARGE)
    clients = list(zip(p.lora_b, p.lora_a, strict=True))

    def call() -> tuple[torch.Tensor, ...]:
        state = glora_ops.aggregate(
            clients, p.weights.tolist(), p.scaling.tolist(), LARGE.rank, basis="update"
        )
        m = state.modules[""]
        return m.u, m.s, m.v, m.eig_u, m.eig_v, m.stats, m.client_stats

    race(
        LARGE, call, [randomized(p, 1, randomized_svd_from_lists)], floor(LARGE, "update"),
        judge_update(truth, LARGE.rank), op="glora_ops.aggregate", basis="update", start=LISTS,
    )  # fmt: skip
