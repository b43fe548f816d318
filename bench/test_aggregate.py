"""The server step against its peers: pytest bench/test_aggregate.py; see bench/README.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from measure import Arm, Floor
from peers import (
    FORMS,
    OVERSAMPLE,
    Lapack,
    Peft,
    Start,
    by_lapack,
    dense_lowrank,
    dense_svd,
    lists,
    naive_loop,
    omega,
    randomized_svd,
    stacked_qr,
    stacks,
)
from populations import Case, Population, population
from truth import Truth, truth_of

from glora_ops import STATS

SMALL = Case(1024, 1024, clients=8, ranks=(8,), rank=16)
LARGE = Case(4096, 4096, clients=32, ranks=(16,), rank=32)
KINDS = [replace(LARGE, kind=kind) for kind in ("partly", "shared", "disjoint")]
BF16 = torch.bfloat16
#: Small and large stacks, every kind of clients, ragged ranks, many clients, both dtypes.
CASES = [
    SMALL,
    replace(SMALL, dtype=BF16),
    replace(SMALL, clients=32),
    *KINDS,
    replace(LARGE, dtype=BF16),
    replace(LARGE, clients=30, ranks=(4, 8, 16, 32, 64)),
    replace(LARGE, clients=128, ranks=(8,)),
    Case(11008, 4096, clients=32, ranks=(16,), rank=32),
]
DRAWN = [SMALL, LARGE]  # in docs/performance.png and in the README
FROM_LISTS = [SMALL, replace(SMALL, clients=32), *KINDS]
BEST, CONSENSUS = "best rank R of the mean", "plain consensus"
STACKS, LISTS, ADAPTERS = "row stacks", "the clients' tensors", "adapters in a PEFT model"


def randomized(p: Population, steps: int, start: Start = stacks) -> list[Arm]:
    """Peer (0) with each kind of QR."""
    om, rank = omega(p.case.d_in, p.case.rank + OVERSAMPLE), p.case.rank

    def arm(form: str) -> Arm:
        calls = by_lapack(lambda x: randomized_svd(p, rank, steps, om, x, start), FORMS[form])
        return Arm.fastest(
            f"peer0 q{steps} {form}", calls, BEST, LISTS if start is lists else STACKS,
            peer="0", steps=steps, form=form,
        )  # fmt: skip

    return [arm(form) for form in FORMS]


def qr(p: Population, start: Start = stacks) -> Arm:
    calls = by_lapack(lambda lapack: stacked_qr(p, p.case.rank, lapack, start))
    return Arm.fastest("peer1", calls, BEST, LISTS if start is lists else STACKS, peer="1")


def dense(p: Population, slow: bool) -> list[Arm]:
    """Peers that form the mean: at one small and one large case, the slow ones at the small."""
    rank, only, arms = p.case.rank, "as it is", []
    if p.case in (SMALL, LARGE):
        low = {only: lambda: dense_lowrank(p, rank)}
        arms.append(Arm.fastest("peer3", low, BEST, STACKS, peer="3"))
    if p.case == SMALL or (slow and p.case == LARGE):
        full = {only: lambda: dense_svd(p, rank)}
        merge = Peft(p, rank)
        arms += [
            Arm.fastest("peer4", full, BEST, STACKS, peer="4"),
            Arm.fastest("peer2", {only: merge}, BEST, ADAPTERS, reset=merge.reset, peer="2"),
        ]
    return arms


def naive(p: Population) -> Arm:
    om_u, om_v = (omega(d, p.case.rank + OVERSAMPLE) for d in (p.case.d_out, p.case.d_in))
    calls = by_lapack(lambda lapack: naive_loop(p, p.case.rank, om_u, om_v, lapack))
    return Arm.fastest("peer5", calls, CONSENSUS, LISTS, peer="5")


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


def drop_in(p: Population, **how: Any) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The drop-in form, torch.ops.glora.aggregate.list, stacking on everybody's clock."""

    def call() -> tuple[torch.Tensor, ...]:
        return torch.ops.glora.aggregate.list(
            p.lora_b, p.lora_a, p.weights, p.scaling, p.case.rank, "update", **how
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
            if name in ("peer1", "peer2", "peer4"):
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
    p, truth = population(case), truth_of(case)
    call = operator(p, "update")
    matched = matched_steps(p, truth, truth.captured(*call()[:3]))
    arms = [arm for steps in sorted({1, matched}) for arm in randomized(p, steps)]
    race(
        case, call, [*arms, qr(p), *dense(p, slow)], floor(case, "update"),
        judge_update(truth, case.rank), op="aggregate", basis="update", start=STACKS,
        matched=matched, client_statistics=True, drawn=case in DRAWN,
    )  # fmt: skip


@pytest.mark.parametrize("told", [True, False], ids=["statistics", "lean"])
@pytest.mark.parametrize("case", FROM_LISTS, ids=str)
def test_update_from_lists(case: Case, told: bool, race: Any) -> None:
    """With and without per-client statistics, which no peer computes."""
    p, truth = population(case), truth_of(case)
    call = drop_in(p, client_statistics=told)
    matched = matched_steps(p, truth, truth.captured(*call()[:3]))
    arms = [arm for steps in sorted({1, matched}) for arm in randomized(p, steps, lists)]
    race(
        case, call, [*arms, qr(p, lists)], floor(case, "update"), judge_update(truth, case.rank),
        op="aggregate.list", basis="update", start=LISTS, matched=matched, client_statistics=told,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_update_at_equal_steps(case: Case, steps: int, race: Any) -> None:
    """As many power steps as peer (0), whether they are needed or not: the price of a step."""
    p, truth = population(case), truth_of(case)

    def judge(name: str, answer: Any) -> dict[str, float]:
        return figures(truth, case.rank, *answer[:3])

    race(
        case, drop_in(p, power_iters=steps, client_statistics=False), randomized(p, steps, lists),
        floor(case, "update"), judge, op="aggregate.list", basis="update", start=LISTS,
        power_iters=steps, matched=steps, client_statistics=False,
    )  # fmt: skip


def judge_consensus(truth: Truth, case: Case) -> Callable[[str, Any], dict[str, float]]:
    """The quality contract of support/bounds.py: rank-r readouts of a state of rank R = 2r."""
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
    p, truth = population(case), truth_of(case)
    projector = {"as it is": lambda: operator(p, "projector")()[:3]}
    arms = [
        *randomized(p, 1),
        qr(p),
        naive(p),
        Arm.fastest("glora_projector", projector, CONSENSUS, STACKS),
    ]
    race(
        case, operator(p, "consensus"), arms, floor(case, "consensus"),
        judge_consensus(truth, case), op="aggregate", basis="consensus", start=STACKS, matched=1,
        client_statistics=True, drawn=case in DRAWN,
    )  # fmt: skip
