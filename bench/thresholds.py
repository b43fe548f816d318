"""What the thresholds of the iterative solvers decide, for the table of docs/solvers.md; no clock.

python bench/thresholds.py [NAME …]

Every value is tried by both iterative solvers, in every basis, on clients of four kinds. Told are
the power steps of all runs together and the worst of each: captured short of the exact solver's in
float64, printed `captured` above what Ŵ holds, and relative error of ‖W̄‖.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from glora_ops.bindings.cpu import CpuVocabulary
from populations import Case, population
from torch import Tensor

from glora_ops import STATS, algorithm
from glora_ops.linalg.ragged import Ragged
from glora_ops.solvers import nspace_iterative, stopping, tall
from glora_ops.solvers.base import Factors, Settings
from glora_ops.solvers.nspace_exact import ExactSolver

SOLVERS = (nspace_iterative.IterativeSolver, tall.TallSolver)
M, N, CLIENTS, RANK, SERVER = 400, 360, 40, 8, 16
TRIED = {
    "SAFE": (0.4, 0.8, 1.6),
    "SLOWEST": (0.5, 0.9, 0.99),
    "SETTLED": (0.5, 2.0, 8.0, 1e3),
    "ANCHORED": (2.0, 8.0, 32.0, 1e3),
    "JITTER": (0.0, 4.0, 64.0),
    "EMPTY": (0.0, 1e-13, 1e-9),
    "DROP": (1e-7, 1e-5, 1e-3),
    "RESOLVED": (1e-7, 1e-5, 1e-3),
    "FLAT": (1e-3, 1e-2, 1e-1),
    "CANCELLED": (0.0, 2.0**-16, 2.0**-8),
    "WEAK": (0.0, 1e-5, 1e-2),
}


def gauged(b: Tensor, a: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same update in a gauge of condition 1000, rounded to float32."""
    turns = torch.randn(2, RANK, RANK, generator=draw, dtype=torch.float64)
    left, right = torch.linalg.qr(turns).Q
    d = torch.logspace(0, 3, RANK, dtype=torch.float64)
    return (b @ (left * d) @ right.mT).float(), ((right / d) @ left.mT @ a).float()


def problems() -> Iterator[tuple[Tensor, Tensor]]:
    """Row stacks of clients of four kinds, the last nearly cancelling in a gauge of 1000."""
    for kind in ("partly", "shared", "disjoint"):
        p = population(Case(M, N, CLIENTS, (RANK,), SERVER, kind))
        yield p.b, p.a
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    cancelling = []
    for i in range(CLIENTS):
        if i % 2 == 0:
            b, a = normal(M, RANK), normal(RANK, N)
        noise = 1e-2 * normal(M, RANK), 1e-2 * normal(RANK, N)
        cancelling.append(gauged((-1) ** i * b + noise[0], a + noise[1], draw))
    left, right = zip(*cancelling, strict=True)
    yield torch.cat(left, 1).mT.contiguous(), torch.cat(right)


def run(solver: Callable, b: Tensor, a: Tensor, basis: str) -> tuple[Tensor, dict[str, float]]:
    s, ragged = (
        Settings(SERVER, basis),
        Ragged.of(RANK * torch.arange(CLIENTS + 1), len(b), b.device),
    )
    w = torch.full((1, CLIENTS), 1 / CLIENTS, dtype=torch.float64)
    factors = Factors(b[None], a[None], ragged, torch.ones_like(w), 2.0**-24)
    u, sigma, v, *_, stats, _ = algorithm.aggregate(
        solver(CpuVocabulary(), factors, s), w, s, (None, None)
    )
    found = (u[0].double() * sigma[0]) @ v[0].double().mT
    return found, dict(zip(STATS, stats[0].tolist(), strict=True))


def main(names: list[str]) -> None:
    wanted = []
    for b, a in problems():
        mean = b.double().mT @ a.double() / CLIENTS
        for basis in ("update", "consensus", "projector"):
            best, _ = run(ExactSolver, b.double(), a.double(), basis)
            wanted.append((b, a, basis, mean, best))
    for name in names or TRIED:
        for value in TRIED[name]:
            for module in (stopping, tall, nspace_iterative):
                if hasattr(module, name):
                    before = getattr(module, name)
                    setattr(module, name, value)
            steps, worst = 0.0, {"short": 0.0, "above": 0.0, "norm": 0.0}
            for b, a, basis, mean, best in wanted:
                size = mean.norm()
                for solver in SOLVERS:
                    found, stats = run(solver, b, a, basis)
                    held = 1 - float((found - mean).norm() / size) ** 2
                    told = {
                        "short": 1 - float((best - mean).norm() / size) ** 2 - held,
                        "above": stats["captured"] - held,
                        "norm": abs(stats["norm"] / float(size) - 1),
                    }
                    worst = {key: max(worst[key], told[key]) for key in worst}
                    steps += stats["power_iters"]
            print(f"{name} {value:.3g}: {steps:.0f} steps,",
                  ", ".join(f"{key} {x:.1e}" for key, x in worst.items()), flush=True)  # fmt: skip
            for module in (stopping, tall, nspace_iterative):
                if hasattr(module, name):
                    setattr(module, name, before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
