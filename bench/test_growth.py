"""How time grows: one size at a time, by one solver, with the exponent beside the predicted one.

What a call captured is what it certifies here; test_aggregate.py judges that in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from measure import conditions, peak_memory, spread
from populations import Case, population

import glora_ops

#: By solver: a case, and for each axis its values; everything else is the case's.
CURVES: dict[str, tuple[Case, dict[str, tuple[int, ...]]]] = {
    "exact": (
        Case(4096, 4096, clients=8, ranks=(8,), rank=16),
        {"K": (4, 8, 16), "d": (1024, 2048, 4096, 8192)},
    ),
    "iterative": (
        Case(4096, 4096, clients=64, ranks=(16,), rank=16),
        {"K": (48, 64, 128), "d": (2048, 4096, 8192)},
    ),
}
POINTS = [
    (solver, axis, value)
    for solver, (_, axes) in CURVES.items()
    for axis, values in axes.items()
    for value in values
]


def at(case: Case, axis: str, value: int) -> Case:
    if axis == "d":
        return replace(case, d_out=value, d_in=value)
    return replace(case, clients=value)


def predicted(solver: str, case: Case) -> float:
    """Products of the long dimension: N × N Gram matrices, or passes over blocks of R + 16."""
    n, d = case.rows, case.d_out
    return n * d * ((n + 2 * case.rank) if solver == "exact" else (case.rank + 16))


@pytest.mark.parametrize("basis", ["update", "consensus"])
@pytest.mark.parametrize(("solver", "axis", "value"), POINTS)
def test_growth(solver: str, axis: str, value: int, basis: str, benchmark: Any) -> None:
    case = at(CURVES[solver][0], axis, value)
    p = population(case)
    steps = 2  # a fixed number: how many are needed is another question

    def call() -> tuple[torch.Tensor, ...]:
        return torch.ops.glora.aggregate(
            p.b, p.a, p.packed.offsets, p.weights, p.scaling, case.rank, basis, power_iters=steps
        )

    stats = dict(zip(glora_ops.STATS, call()[5].tolist(), strict=True))
    assert stats["iterative"] == (solver == "iterative")
    held = {name: stats[name] for name in ("captured", "attainable")}
    held["captured_of_optimum"] = held["captured"] / held["attainable"]
    assert held["captured_of_optimum"] > 0.9
    benchmark.pedantic(call, rounds=4, warmup_rounds=1)
    benchmark.extra_info.update(
        growth=solver, axis=axis, value=value, basis=basis, case=str(case), op="aggregate",
        predicted=predicted(solver, case), **held, **conditions(),
    )  # fmt: skip
    if benchmark.stats is not None:
        benchmark.extra_info["memory_mb"] = peak_memory(call) / 1e6
        benchmark.extra_info["median_ms"] = 1e3 * spread(benchmark.stats.stats.data)[0]
