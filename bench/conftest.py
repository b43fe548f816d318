"""Options, the thread count, and the race that every bench row runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import Arm, Floor, conditions, interleave, peak_memory, spread
from populations import Case


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("glora benches")
    group.addoption("--threads", type=int, default=2, help="torch threads (default: 2)")
    group.addoption("--rounds", type=int, default=0, help="rounds per row (default: by size)")
    group.addoption("--slow", action="store_true", help="also the peers that take 20 s a call")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # whose machine it was is nobody's business


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.config.getoption("--threads"))


@pytest.fixture
def slow(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--slow")


def rounds_of(case: Case) -> int:
    """By size: six minutes for everything."""
    numbers = case.rows * (case.d_out + case.d_in)
    return 30 if numbers < 2**20 else 15 if numbers < 2**22 else 7


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """race(case, target, arms, floor, judge): time, weigh, and write it all into extra_info.

    `judge` maps an answer to a dict of quality figures; it runs on every arm before the clock
    (and is where a test asserts), so that no wrong answer is ever timed.
    """

    def run(
        case: Case,
        target: Callable[[], Any],
        arms: list[Arm],
        floor: Floor,
        judge: Callable[[str, Any], dict[str, float]],
        modules: int = 1,
        rounds: int = 0,
        **described: Any,
    ) -> None:
        quality = {"glora": judge("glora", target())}
        for arm in arms:
            if arm.reset is not None:
                arm.reset()
            quality[arm.name] = judge(arm.name, arm.call())
        asked = request.config.getoption("--rounds")
        interleave(benchmark, target, arms, asked or rounds or rounds_of(case))
        info = benchmark.extra_info
        info.update(
            case=str(case), d_out=case.d_out, d_in=case.d_in, clients=case.clients,
            ranks=list(case.ranks), rows=case.rows, rank=case.rank, population=case.kind,
            noise=case.noise, dtype=str(case.dtype).removeprefix("torch."),
            modules=modules, dense_mb=modules * case.d_out * case.d_in * case.dtype.itemsize / 1e6,
            **described, **quality["glora"], **conditions(),
        )  # fmt: skip
        if benchmark.stats is None:  # --benchmark-disable: values only
            return
        own = benchmark.stats.stats.data
        info.update(floor.info(spread(own)[0]))
        info["memory_mb"] = peak_memory(target) / 1e6
        info["arms"] = {}
        for arm in arms:
            median, low, high = spread([seconds for _, seconds in arm.times])
            ratio = spread([seconds / own[turn] for turn, seconds in arm.times])
            # One extra call of a 20 s peer is not worth its memory.
            memory = peak_memory(arm.call, arm.reset) / 1e6 if arm.seconds < 2 else None
            info["arms"][arm.name] = {
                "median_ms": 1e3 * median, "iqr_ms": [1e3 * low, 1e3 * high],
                "ratio": ratio[0], "ratio_iqr": ratio[1:], "rounds": len(arm.times),
                "memory_mb": memory, "answer": arm.answer, "start": arm.start,
                "variant": arm.variant, "peer": arm.peer, "steps": arm.steps, "form": arm.form,
                **quality[arm.name],
            }  # fmt: skip

    return run
