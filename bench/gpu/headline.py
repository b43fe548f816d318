"""Server steps beside plain torch of the same mathematics and an implicit randomized SVD.

Each row's answer is looked at before its clock runs. Before any memory is asked for, meta tensors
of the real shapes tell how many kernels a call launches.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import peers
import torch
from glora_ops.bindings.cuda import CudaVocabulary
from glora_ops.bindings.ops import Ops
from glora_ops.kernels.launching import Call, observed
from torch import Tensor

from gpu.device import LLAMA_7B, Stacks, clients, replayed, server_step, timed
from gpu.plain import plain_aggregate
from gpu.step import Step, main

STEPS, CLIENT_RANK = 1, 16
ROUNDS, SLOW = 5, 2.0  # one round of what takes longer than that many seconds
LEAST = 0.9  # of what a rank can capture: below it an answer is wrong and is not timed
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """Shapes with their number of modules, and the clients."""

    name: str
    shapes: dict[tuple[int, int], int]
    clients: int
    rank: int = 64

    def stacks(self, step: Step) -> list[Stacks]:
        if step.rehearse:
            return [clients((24, 16), 1, 2, 2, DTYPE, step.device)]
        return [
            clients(shape, modules, self.clients, CLIENT_RANK, DTYPE, step.device)
            for shape, modules in self.shapes.items()
        ]


CASES = [
    Case("7B, K = 10", LLAMA_7B, 10),
    Case("4096², K = 100", {(4096, 4096): 1}, 100),
    Case("7B, K = 100", LLAMA_7B, 100),
    Case("1024², K = 8", {(1024, 1024): 1}, 8, rank=16),
]
LARGE, SINGLE = CASES[2], CASES[1]


def population(part: Stacks, l: int) -> Any:
    """One module as `peers` takes it: b (N, d_out), a (N, d_in), coef (N, 1)."""
    ranks = part.offsets.diff().to(part.weights.device)
    coef = part.weights.repeat_interleave(ranks)[:, None]
    return SimpleNamespace(b=part.b[l], a=part.a[l], coef=coef)


def launches(case: Case) -> dict[str, Any]:
    """Kernels of one call, on tensors of the real shapes without values."""
    seen: Counter[str] = Counter()
    op = Ops(CudaVocabulary(), fixed_steps=True).aggregate
    one = torch.ones(case.clients, device="meta")
    offsets = CLIENT_RANK * torch.arange(case.clients + 1)

    def record(call: Call) -> bool:
        seen[call.name] += 1
        return False

    for shape, modules in case.shapes.items():
        rows = case.clients * CLIENT_RANK
        b, a = (torch.empty(modules, rows, d, dtype=DTYPE, device="meta") for d in shape)
        with torch.no_grad(), observed(record):
            op(b, a, offsets, one, one, case.rank, power_iters=STEPS)
    return dict(seen)


def settings_of(step: Step, case: Case) -> tuple[int, str]:
    """Server rank and basis; `update` has a third of the launches that `consensus` has."""
    return (2, "update") if step.rehearse else (case.rank, "consensus")


def energies(answer: tuple[Tensor, ...], part: Stacks) -> tuple[float, float]:
    """What the first module's answer u s vᵀ captures of ‖W̄‖², and what its rank could; fp64."""
    u, s, v = (x[0].double() for x in answer[:3])
    b, a = part.b[0].double().mT, part.a[0].double().mT
    coef = population(part, 0).coef.double()
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b * coef.mT), torch.linalg.qr(a)
    middle = r_b @ r_a.mT
    total = middle.square().sum()
    best = torch.linalg.eigvalsh(middle.mT @ middle)[-s.shape[0] :].sum()
    # ‖W̄ − Ŵ‖² inside and outside of the factors' spaces.
    inside = middle - ((q_b.mT @ u) * s) @ (q_a.mT @ v).mT
    outside = s.square().sum() - ((q_b.mT @ u * s) @ (q_a.mT @ v).mT).square().sum()
    missed = inside.square().sum() + outside.clamp(min=0)
    return float(1 - missed / total), float(best / total)


Way = tuple[str, Callable[[Step, Case, list[Stacks]], Callable[[], Any]]]


def glora(step: Step, case: Case, parts: list[Stacks]) -> Callable[[], Any]:
    op, settings = server_step(step.device), settings_of(step, case)
    return lambda: [op(*p.arguments, *settings, power_iters=STEPS) for p in parts]


def plain(step: Step, case: Case, parts: list[Stacks]) -> Callable[[], Any]:
    return lambda: [
        plain_aggregate(*p.arguments, *settings_of(step, case), power_iters=STEPS) for p in parts
    ]


def compiled(step: Step, case: Case, parts: list[Stacks]) -> Callable[[], Any]:
    op, settings = (
        torch.compile(plain_aggregate, dynamic=False, disable=step.rehearse),
        settings_of(step, case),
    )
    return lambda: [op(*p.arguments, *settings, power_iters=STEPS) for p in parts]


def randomized_svd(step: Step, case: Case, parts: list[Stacks]) -> Callable[[], Any]:
    lapack, rank = peers.Lapack(), settings_of(step, case)[0]

    def one(part: Stacks) -> tuple[Tensor, ...]:
        columns = min(rank + peers.OVERSAMPLE, *part.a.shape[1:])
        omega = peers.omega(part.a.shape[-1], columns).to(step.device)
        found = [
            peers.randomized_svd(population(part, l), rank, STEPS, omega, lapack)
            for l in range(len(part.b))
        ]
        return tuple(torch.stack(x) for x in zip(*found, strict=True))

    return lambda: [one(part) for part in parts]


# By value: what compiles for minutes comes last.
WAYS: dict[str, Callable[[Step, Case, list[Stacks]], Callable[[], Any]]] = {
    "glora, replayed": lambda step, case, parts: replayed(glora(step, case, parts), step.device),
    "plain torch": plain,
    "glora": glora,
    "implicit randomized SVD": randomized_svd,
    "plain torch, compiled": compiled,
}


def measure(step: Step, case: Case, way: str) -> None:
    described = {"case": case.name, "way": way, "dtype": str(DTYPE)[6:], "q": STEPS}
    with step.row(**described) as r:
        parts = case.stacks(step)
        r["rank"], r["factors_gb"] = settings_of(step, case)[0], sum(p.nbytes for p in parts) / 1e9
        call = WAYS[way](step, case, parts)
        began = time.monotonic()
        r["captured"], r["optimum"] = energies(call()[0], parts[0])
        if r["captured"] < LEAST * r["optimum"]:
            raise ValueError(f"captured {r['captured']:.4f} of {r['optimum']:.4f}: not timed")
        rounds = ROUNDS if time.monotonic() - began < SLOW and not step.rehearse else 1
        if step.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        r |= timed(call, step.device, rounds, cold=True)
        if step.device == "cuda":
            r["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if step.device == "cuda":
        torch.cuda.empty_cache()


def body(step: Step) -> None:
    for case in CASES:
        with step.row(case=case.name, way="shapes alone") as r:
            r["kernels"] = launches(case)
    for way in WAYS:
        for case in CASES[: 1 if step.rehearse else None]:
            measure(step, case, way)


if __name__ == "__main__":
    main(body)
