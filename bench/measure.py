"""Clocks, floors, memory and the machine: how a number of this bench comes to be."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["Arm", "Floor", "conditions", "interleave", "peak_memory", "spread"]

ROOT = Path(__file__).resolve().parent.parent
HEAVY_SECONDS = 2.0  # an arm runs in every round, or in as many as fit into this


@dataclass
class Arm:
    """One competitor of a race.

    Attributes
    ----------
    call : callable
    answer, start : str
        What it computes, and from what.
    reset : callable, optional
        Runs before every call, not timed.
    variant : str
        Which of several equivalent ways was the fastest here.
    peer : str
        Its number in bench/README.md; empty for glora's own ways and for plain torch.
    steps : int, optional
        Power steps of peer (0).
    form : str
        Of `peers.FORMS`, for peer (0).
    seconds : float
        Of one warm call: decides in how many rounds the arm runs.
    """

    name: str
    call: Callable[[], Any]
    answer: str
    start: str
    reset: Callable[[], None] | None = None
    variant: str = ""
    peer: str = ""
    steps: int | None = None
    form: str = ""
    seconds: float = 0.0
    times: list[tuple[int, float]] = field(default_factory=list)

    def timed(self) -> float:
        if self.reset is not None:
            self.reset()
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start

    @classmethod
    def fastest(
        cls, name: str, calls: dict[str, Callable[[], Any]], answer: str, start: str, **more: Any
    ) -> Arm:
        """The fastest of several equivalent calls, by the best of two warm ones each."""
        arms = [cls(name, call, answer, start, variant=v, **more) for v, call in calls.items()]
        for arm in arms:
            first = arm.timed()  # cold
            arm.seconds = min(arm.timed() for _ in range(2)) if first < HEAVY_SECONDS else first
        return min(arms, key=lambda arm: arm.seconds)


def interleave(benchmark: Any, target: Callable[[], Any], arms: list[Arm], rounds: int) -> None:
    """Time `target` with the fixture and `arms` between its rounds: A B C, A C B, …

    The fixture's untimed setup is where the arms run, in rotating order, so every round of the
    target has a round of each arm beside it. Heavy arms sit rounds out.
    """
    every = {
        arm.name: -(-rounds // max(1, min(rounds, int(HEAVY_SECONDS / max(arm.seconds, 1e-9)))))
        for arm in arms
    }
    turn = -1  # the warm-up round

    def setup() -> None:
        nonlocal turn
        shift = max(turn, 0) % max(len(arms), 1)
        for arm in arms[shift:] + arms[:shift]:
            if turn >= 0 and turn % every[arm.name] == 0:
                arm.times.append((turn, arm.timed()))
        turn += 1

    benchmark.pedantic(target, setup=setup, rounds=rounds, warmup_rounds=1)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


# --- floors ----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def rates() -> dict[str, float]:
    """What this process reaches: copy_gb_s (read + written) and sgemm_gflop_s, best of many."""
    source = torch.ones(2**25)  # 128 MiB: beyond the last-level cache
    target = torch.empty_like(source)
    square = torch.randn(2048, 2048)
    product = torch.empty_like(square)

    def best(call: Callable[[], Any], times: int) -> float:
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    copy = best(lambda: target.copy_(source), 8)
    gemm = best(lambda: torch.mm(square, square, out=product), 6)
    return {
        "copy_gb_s": 2 * source.numel() * 4 / copy / 1e9,
        "sgemm_gflop_s": 2 * 2048**3 / gemm / 1e9,
    }


@dataclass(frozen=True)
class Floor:
    """Counted work: bytes that must move once, flops of the method at its cheapest.

    The floor is the larger of bytes / copy bandwidth and flops / sgemm rate, both measured in
    this process. Inputs that fit into the last-level cache can beat the first.
    """

    bytes: float
    flops: float

    @property
    def seconds(self) -> float:
        r = rates()
        return max(self.bytes / r["copy_gb_s"], self.flops / r["sgemm_gflop_s"]) / 1e9

    def info(self, median: float) -> dict[str, float]:
        return {
            "floor_ms": 1e3 * self.seconds,
            "percent_of_floor": 100 * self.seconds / median,
            "floor_bytes": self.bytes,
            "floor_flops": self.flops,
        } | rates()


# --- memory ----------------------------------------------------------------------------------


def peak_memory(call: Callable[[], Any], reset: Callable[[], None] | None = None) -> float:
    """Bytes of tensors alive at the worst moment of a call, beyond what was there before.

    From the CPU allocator's own log: every allocation and release of a tensor, LAPACK workspaces
    included, whoever makes it. Packing buffers inside the BLAS (a few MB) are not in it.
    """
    if reset is not None:
        reset()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return float(peak)


# --- machine ---------------------------------------------------------------------------------


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    vector = next((v for v in ("avx512f", "avx2") if v in text), "")
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} ({family}, {vector or 'no AVX2'})"


def _blas() -> str:
    shown = torch.__config__.show()
    found = re.findall(r"(oneAPI Math Kernel Library Version \S+|MKL-DNN v\S+|OpenBLAS \S+)", shown)
    return "; ".join(found).replace("oneAPI Math Kernel Library Version", "MKL")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


@lru_cache(maxsize=1)
def _machine() -> dict[str, Any]:
    # The bench's own results may be uncommitted without the code being another one.
    dirty = _git("status", "--porcelain", "--", "glora_ops", "bindings", "bench/*.py")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "blas": _blas(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if dirty else ""),
    }


def conditions() -> dict[str, Any]:
    """CPU, threads, versions, BLAS, commit and load: what a time means nothing without."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return _machine() | {"threads": torch.get_num_threads(), "load_average": load}
