"""Single parts of the GPU path as pytest-benchmark rows: what gpu_run.py's headline is made of.

    python bench/gpu_run.py OUT --only rows --minutes 60     # or pytest bench/test_gpu.py

A row is a way of doing one thing. Device time is taken with events around each call, cold (what L2
holds is overwritten) and warm apart. Server steps beside their peers are gpu_run.py's. Nothing
here has run on a GPU yet; without one all is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import measure
import pytest
import torch
import triton
from glora_ops.bindings import ops as bindings_ops
from gpu.device import LLAMA_7B, Stacks, clients, replayed, timed
from torch import Tensor

from glora_ops import algorithm

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: nothing was timed"
)

ROUNDS = 20
SQUARE = (4096, 4096)
RANK = 64
# Modules of each shape, and clients.
CASES = {
    "7B, K = 10": (LLAMA_7B, 10),
    "7B, K = 100": (LLAMA_7B, 100),
    "4096², K = 100": ({SQUARE: 1}, 100),
}


def copy_bandwidth() -> float:
    """Bytes a second of a large device copy, read and written: what floors are quoted against."""
    x, y = (torch.empty(2**28, device="cuda") for _ in range(2))
    return 2 * x.nbytes / (timed(lambda: y.copy_(x), "cuda", ROUNDS)["ms"] * 1e-3)


def record(benchmark: Any, call: Callable[[], object], **described: Any) -> None:
    """One row: pytest-benchmark's clock around a synchronised call, events in extra_info."""

    def whole() -> None:
        call()
        torch.cuda.synchronize()

    whole()
    benchmark.pedantic(whole, iterations=1, rounds=ROUNDS, warmup_rounds=3)
    torch.cuda.reset_peak_memory_stats()
    whole()
    benchmark.extra_info.update(
        described,
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        cuda=torch.version.cuda or torch.version.hip,
        triton=triton.__version__,
        commit=measure.conditions()["commit"],
        event_ms_warm=timed(call, "cuda", ROUNDS)["ms"],
        event_ms_cold=timed(call, "cuda", ROUNDS, cold=True)["ms"],
        peak_bytes=torch.cuda.max_memory_allocated(),
    )


def one_shape(case: str, dtype: torch.dtype) -> Stacks:
    """The modules of a case's first shape."""
    shapes, count = CASES[case]
    shape, modules = next(iter(shapes.items()))
    return clients(shape, modules, count, 16, dtype, "cuda")


def exact(aggregate: Callable[..., Any]) -> Callable[..., Any]:
    """By the exact solver, however many rows: N × N eigenproblems, the library's beyond 128."""

    def run(*args: Any, **settings: Any) -> Any:
        always = partial(patch.object, attribute="exact_limit", new=lambda rank: 2**31)
        with always(algorithm), always(bindings_ops):
            return aggregate(*args, **settings)

    return run


@pytest.mark.parametrize("way", ["exact", "adaptive (default)", "fixed steps, replayed"])
@pytest.mark.parametrize("count", [8, 16, 32, 64])
def test_crossover(benchmark, count, way):
    """Where N × N eigenproblems stop paying: N = 128 … 1024 rows of one 4096² module."""
    part, op = clients(SQUARE, 1, count, 16, torch.bfloat16, "cuda"), torch.ops.glora.aggregate
    call = {
        "exact": lambda: exact(op)(*part.arguments, 32),
        "adaptive (default)": lambda: op(*part.arguments, 32),
        "fixed steps, replayed": lambda: op(*part.arguments, 32, power_iters=1),
    }[way]
    call = replayed(call, "cuda") if "replayed" in way else call
    record(
        benchmark, call, case=f"4096², K = {count}", dtype="torch.bfloat16", way=way,
        rows=16 * count,
    )  # fmt: skip


@pytest.mark.parametrize("op", ["projector_matmul", "projector_svd"])
@pytest.mark.parametrize("way", ["glora", "formed bases"])
def test_projectors(benchmark, way, op):
    """Σ p_i Q_i Q_iᵀ applied to a block, and its leading eigenvectors by randomized iteration.

    glora goes from the factors to both without a basis, a projector or anything d × d; beside it
    each client's Q_i by Householder QR, stacked, in plain torch.
    """
    part, glora = one_shape("4096², K = 100", torch.float32), torch.ops.glora
    x, offsets, weights = part.b[0], part.offsets, part.weights
    omega = torch.randn(x.shape[-1], RANK + 16, device="cuda")

    def formed() -> Tensor:
        q = torch.linalg.qr(x.unflatten(0, (len(weights), -1)).mT)[0]
        return (q * weights.sqrt()[:, None, None]).movedim(0, 1).flatten(1)

    call = {
        ("projector_matmul", "glora"): lambda: glora.projector_matmul.factors(
            x, offsets, weights, omega
        ),
        ("projector_matmul", "formed bases"): lambda: (m := formed()) @ (m.mT @ omega),
        ("projector_svd", "glora"): lambda: glora.projector_svd.factors(
            x, offsets, weights, RANK, power_iters=2
        )[1],
        ("projector_svd", "formed bases"): lambda: torch.svd_lowrank(formed(), RANK + 16, niter=2)[
            1
        ].square(),
    }
    value, other = (call[op, who]()[..., :RANK].double() for who in ("glora", "formed bases"))
    limit = 1e-5 if op == "projector_matmul" else 0.1
    assert float((value - other).norm() / other.norm()) < limit
    record(
        benchmark, call[op, way], case="4096², K = 100", way=f"{op}, {way}", dtype="torch.float32"
    )


@pytest.mark.parametrize("scheduled", ["all together", "by module"])
def test_schedule(benchmark, scheduled):
    """128 modules in one call, or one after another so that each one's stacks stay in L2."""
    part = clients(SQUARE, 128, 100, 16, torch.bfloat16, "cuda")
    b, a, *rest = part.arguments
    pieces = (
        [(b, a)] if scheduled == "all together" else list(zip(b.split(1), a.split(1), strict=True))
    )

    def call() -> None:
        for pair in pieces:
            torch.ops.glora.aggregate(*pair, *rest, RANK, power_iters=1)

    record(
        benchmark, replayed(call, "cuda"), case="128 × 4096², K = 100", dtype="torch.bfloat16",
        way=scheduled,
    )  # fmt: skip


@pytest.mark.parametrize("problem", ["eigh", "eigh in fp32", "svd", "torch eigh", "torch svd"])
@pytest.mark.parametrize("modules", [1, 224])
@pytest.mark.parametrize("n", [32, 64, 80, 128])
def test_small_problems(benchmark, n, modules, problem):
    """Latency of the batched eigenproblem and SVD, beside the library's in fp64."""
    from glora_ops.kernels.eigh import launch_eigh
    from glora_ops.kernels.svd import launch_svd

    rng = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(modules, n, n, generator=rng, device="cuda", dtype=torch.float64)
    g = x @ x.mT
    solve = {
        "eigh": lambda: launch_eigh(g),
        "eigh in fp32": lambda: launch_eigh(g, precise=False),
        "svd": lambda: launch_svd(x),
        "torch eigh": lambda: torch.linalg.eigh(g),
        "torch svd": lambda: torch.linalg.svd(x),
    }[problem]
    record(benchmark, solve, case=f"{modules} × {n}²", dtype="torch.float64", way=problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["sketch", "times", "accumulate", "core"])
@pytest.mark.parametrize("case", CASES)
def test_pass_kernels(benchmark, case, kernel, dtype):
    """Bytes that must move, their floor at the measured copy bandwidth, and the share reached."""
    from glora_ops.kernels import core, product, sketch

    part, k = one_shape(case, dtype), 2 * RANK
    b, a = part.b, part.a
    marks = part.offsets.cuda()
    tests = [torch.ones(k, x.shape[-1], device="cuda", dtype=dtype).mT for x in (b, a)]
    y = torch.randn(b.shape[0], k, b.shape[-1], device="cuda").mT
    z = torch.randn(*b.shape[:2], k, device="cuda")
    u, v = (torch.randn(x.shape[0], RANK, x.shape[-1], device="cuda").mT for x in (b, a))
    coef = torch.ones(b.shape[:2], device="cuda", dtype=torch.float64)
    columns = {"sketch": 2 * k, "times": k, "accumulate": k, "core": 2 * RANK}[kernel]
    call, moved = {
        "sketch": (
            lambda: sketch.launch_sketch([b, a], marks, 16, tests),
            b.nbytes + a.nbytes + 2 * 8 * z.numel(),
        ),
        "times": (lambda: product.launch_times(b, y), b.nbytes + y.nbytes + 8 * z.numel()),
        "accumulate": (lambda: product.launch_accumulate(b, z), b.nbytes + z.nbytes + y.nbytes),
        "core": (
            lambda: core.launch_core(b, a, u, v, coef),
            b.nbytes + a.nbytes + u.nbytes + v.nbytes,
        ),
    }[kernel]
    floor = 1e3 * moved / copy_bandwidth()
    record(benchmark, call, case=case, way=kernel, dtype=str(dtype), bytes=moved,
           flops=2 * b.shape[0] * b.shape[1] * b.shape[2] * columns, floor_ms=floor,
           share_of_copy=floor / timed(call, "cuda", ROUNDS, cold=True)["ms"])  # fmt: skip
