"""glora on a GPU beside the same mathematics and other answers in plain torch on that GPU.

    make bench-gpu        # pytest bench/test_gpu.py, JSON under bench/results/gpu, then the report

A row is one case × way × arm. Device time is taken with events around each call, cold (inputs
rotated through more memory than L2) and warm apart, captured calls also as graph replays. Values
are checked before any clock runs. Nothing here has run on a GPU yet; without one all is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import measure
import peers
import pytest
import torch
import triton
from glora_ops.bindings import ops as bindings_ops
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.ops import Ops
from torch import Tensor

from glora_ops import algorithm
from glora_ops.linalg.ragged import Ragged

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: nothing was timed"
)

# d_out × d_in and how many modules of it a Llama-2-7B has: all linear layers.
LLAMA_7B = {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}
L2_BYTES = 2**27  # more than any L2: inputs cycled through this much memory are cold
ROUNDS = 20
EXACT_ROWS = 1024  # beyond, one library eigenproblem of N × N after another is not worth a row


@dataclass(frozen=True)
class Case:
    """Shapes with their number of modules, clients and server rank."""

    name: str
    shapes: dict[tuple[int, int], int]
    clients: int
    rank: int

    def __str__(self) -> str:
        return f"{self.name}-K{self.clients}"


CASES = [
    Case("7B", LLAMA_7B, 10, 64),
    Case("7B", LLAMA_7B, 100, 64),
    Case("4096", {(4096, 4096): 1}, 100, 64),
    Case("1024", {(1024, 1024): 1}, 8, 16),
]
RANKS = {"uniform": [16], "ragged": [4, 8, 16, 32, 64]}


class TorchVocabulary(CpuVocabulary):
    """The same mathematics in plain torch: cuBLAS, cuSOLVER, batched over modules."""

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.float(), torch.ones(x.shape[:-1], dtype=torch.float64, device=x.device)

    def pair(self, b: Tensor, a: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, scale = self.rows(b)
        return b.float(), a.float(), scale, scale.new_ones(len(b), ragged.clients)

    def gram(self, rows: Tensor, ragged: Ragged) -> Tensor:
        blocks = ragged.pad(rows).double()
        return blocks @ blocks.mT

    def times(self, rows: Tensor, omega: Tensor) -> Tensor:
        return (rows @ omega.to(rows.dtype)).double()

    def lift(self, rows: Tensor, z: Tensor) -> Tensor:
        return rows.mT @ z.to(rows.dtype)

    def combine(self, y: Tensor, c: Tensor) -> Tensor:
        return y @ c.to(y.dtype)

    def inner(self, y: Tensor, z: Tensor) -> Tensor:
        return y.double().mT @ z.double()

    def inverse_cholesky(self, g: Tensor, drop: float) -> Tensor:
        unit = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
        size = g.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-300)
        r, _ = torch.linalg.cholesky_ex(g + drop * size * unit, upper=True)
        return torch.linalg.solve_triangular(r, unit.expand_as(r), upper=True)


@dataclass(frozen=True, eq=False)
class Stacks:
    """One shape's modules, as `peers` wants a population: b, a, coef of the first module."""

    pair: tuple[Tensor, Tensor]
    offsets: Tensor
    weights: Tensor
    scaling: Tensor

    @property
    def first(self) -> Any:
        class One:
            b, a = (x[0].float() for x in self.pair)
            coef = self.weights.repeat_interleave(self.offsets.diff().cuda())[:, None]

        return One


def stacks(case: Case, ranks: list[int], dtype: torch.dtype) -> list[Stacks]:
    rng = torch.Generator(device="cuda").manual_seed(0)
    each = [ranks[i % len(ranks)] for i in range(case.clients)]
    offsets = torch.tensor([0, *each]).cumsum(0)
    weights = torch.full((case.clients,), 1 / case.clients, device="cuda")
    out = []
    for (d_out, d_in), modules in case.shapes.items():
        b, a = (
            torch.randn(modules, sum(each), d, generator=rng, device="cuda", dtype=dtype)
            for d in (d_out, d_in)
        )
        out.append(Stacks((b, a), offsets, weights, torch.ones_like(weights)))
    return out


def device_ms(call: Callable[[], object], rounds: int = ROUNDS, cold: bool = False) -> float:
    """Median device milliseconds of a call; cold: L2 is overwritten before each."""
    flush = torch.empty(L2_BYTES // 4, device="cuda")
    times = []
    for _ in range(rounds):
        if cold:
            flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times)


def copy_bandwidth() -> float:
    """Bytes a second of a large device copy, read and written: what floors are quoted against."""
    x, y = (torch.empty(2**28, device="cuda") for _ in range(2))
    return 2 * x.nbytes / (device_ms(lambda: y.copy_(x)) * 1e-3)


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


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
        event_ms_warm=device_ms(call),
        event_ms_cold=device_ms(call, cold=True),
        peak_bytes=torch.cuda.max_memory_allocated(),
    )


def exact(aggregate: Callable[..., Any]) -> Callable[..., Any]:
    """By the exact solver, however many rows: N × N eigenproblems, the library's beyond 128."""

    def run(*args: Any, **settings: Any) -> Any:
        always = partial(patch.object, attribute="exact_limit", new=lambda rank: 2**31)
        with always(algorithm), always(bindings_ops):
            return aggregate(*args, **settings)

    return run


def ways(parts: list[Stacks], case: Case, steps: int) -> dict[str, Callable[[], Any]]:
    """What makes each way's call; nothing is compiled or recorded before it is asked for."""
    glora = torch.ops.glora.aggregate
    plain = torch.no_grad()(Ops(TorchVocabulary(), fixed_steps=True).aggregate)

    def each(aggregate: Callable[..., Any], **settings: Any) -> Callable[[], Any]:
        return lambda: [
            aggregate(*p.pair, p.offsets, p.weights, p.scaling, case.rank, **settings)
            for p in parts
        ]

    return {
        "adaptive (default)": lambda: each(glora),
        "exact": lambda: each(exact(glora)),
        "captured": lambda: each(glora, power_iters=steps),
        "captured, replayed": lambda: replayed(each(glora, power_iters=steps)),
        "plain torch": lambda: each(plain, power_iters=steps),
        "plain torch, compiled": lambda: each(
            torch.compile(plain, dynamic=False), power_iters=steps
        ),
    }


WAYS = {  # which depend on the number of power steps
    "adaptive (default)": False, "exact": False, "captured": True, "captured, replayed": True,
    "plain torch": True, "plain torch, compiled": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("way", "steps"),
    [(way, steps) for way, counted in WAYS.items() for steps in ((1, 2) if counted else (1,))],
)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_aggregate(benchmark, case, dtype, ranks, way, steps):
    parts = stacks(case, RANKS[ranks], dtype)
    rows = parts[0].pair[0].shape[1]
    if way == "exact" and rows > EXACT_ROWS:
        pytest.skip(f"exact solver at N = {rows}: its eigenproblems are N × N and the library's")
    arms = ways(parts, case, steps)
    u, s, v, *_ = arms["captured"]()()[0]
    other, t, w, *_ = arms["plain torch"]()()[0]
    gap = (u[0].double() * s[0]) @ v[0].double().mT - (other[0].double() * t[0]) @ w[0].double().mT
    assert float(gap.norm() / s[0].norm()) < 5e-2  # one mathematics, another rounding of ties
    factors = sum(x.nbytes for p in parts for x in p.pair)
    record(
        benchmark, arms[way](), case=str(case), dtype=str(dtype), ranks=ranks, way=way,
        steps=steps if WAYS[way] else None, factor_bytes=factors,
        one_pass_floor_ms=1e3 * factors / copy_bandwidth(),
    )  # fmt: skip


@pytest.mark.parametrize("way", ["exact", "adaptive (default)", "captured, replayed"])
@pytest.mark.parametrize("clients", [8, 16, 32, 64])
def test_crossover(benchmark, clients, way):
    """Where N × N eigenproblems stop paying: N = 128 … 1024 rows of one 4096² module."""
    case = Case("4096", {(4096, 4096): 1}, clients, 32)
    call = ways(stacks(case, [16], torch.bfloat16), case, 1)[way]()
    record(benchmark, call, case=str(case), dtype="torch.bfloat16", way=way, rows=16 * clients)


@pytest.mark.parametrize("op", ["projector_matmul", "projector_svd"])
@pytest.mark.parametrize("way", ["glora", "formed bases"])
@pytest.mark.parametrize("case", CASES[2:], ids=str)
def test_projectors(benchmark, case, way, op):
    """Σ p_i Q_i Q_iᵀ applied to a block, and its leading eigenvectors by randomized iteration.

    glora goes from the factors to both without a basis, a projector or anything d × d; beside it
    each client's Q_i by Householder QR, stacked, in plain torch.
    """
    (part,) = stacks(case, RANKS["uniform"], torch.float32)
    x, offsets, weights = part.pair[0][0], part.offsets, part.weights
    omega = torch.randn(x.shape[-1], case.rank + 16, device="cuda")

    def formed() -> Tensor:
        q = torch.linalg.qr(x.unflatten(0, (case.clients, -1)).mT)[0]
        return (q * weights.sqrt()[:, None, None]).movedim(0, 1).flatten(1)

    def formed_svd() -> Tensor:
        return torch.svd_lowrank(formed(), case.rank + 16, niter=2)[1].square()

    glora = torch.ops.glora
    call = {
        ("projector_matmul", "glora"): lambda: glora.projector_matmul.factors(
            x, offsets, weights, omega
        ),
        ("projector_matmul", "formed bases"): lambda: (m := formed()) @ (m.mT @ omega),
        ("projector_svd", "glora"): lambda: glora.projector_svd.factors(
            x, offsets, weights, case.rank, power_iters=2
        )[1],
        ("projector_svd", "formed bases"): formed_svd,
    }
    value, other = call[op, "glora"](), call[op, "formed bases"]()
    value, other = (y[..., : case.rank].double() for y in (value, other))
    limit = 1e-5 if op == "projector_matmul" else 0.1
    assert float((value - other).norm() / other.norm()) < limit
    record(benchmark, call[op, way], case=str(case), way=f"{op}, {way}", dtype="torch.float32")


@pytest.mark.parametrize("scheduled", ["all together", "by module"])
def test_schedule(benchmark, scheduled):
    """128 modules in one call, or one after another so that each one's stacks stay in L2."""
    case = Case("4096", {(4096, 4096): 128}, 100, 64)
    (part,) = stacks(case, [16], torch.bfloat16)
    b, a = part.pair
    pieces = [part] if scheduled == "all together" else [
        Stacks((b[l : l + 1], a[l : l + 1]), part.offsets, part.weights, part.scaling)
        for l in range(128)
    ]  # fmt: skip
    call = ways(pieces, case, 1)["captured, replayed"]()
    record(benchmark, call, case=str(case), dtype="torch.bfloat16", way=scheduled)


@pytest.mark.parametrize("problem", ["eigh", "svd", "torch eigh", "torch svd"])
@pytest.mark.parametrize("modules", [1, 224])
@pytest.mark.parametrize("n", [32, 64, 80, 128])
def test_small_problems(benchmark, n, modules, problem):
    """Latency of the batched eigenproblem and SVD, fp64, beside the library's."""
    from glora_ops.kernels.eigh import launch_eigh
    from glora_ops.kernels.svd import launch_svd

    rng = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(modules, n, n, generator=rng, device="cuda", dtype=torch.float64)
    g = x @ x.mT
    solve = {
        "eigh": lambda: launch_eigh(g),
        "svd": lambda: launch_svd(x),
        "torch eigh": lambda: torch.linalg.eigh(g),
        "torch svd": lambda: torch.linalg.svd(x),
    }[problem]
    record(benchmark, solve, case=f"{modules} × {n}²", dtype="torch.float64", way=problem)


@pytest.mark.parametrize("peer", ["implicit randomized SVD", "stacked QR", "dense, svd_lowrank",
                                  "dense, linalg.svd"])  # fmt: skip
@pytest.mark.parametrize("case", [c for c in CASES if len(c.shapes) == 1], ids=str)
def test_peers(benchmark, case, peer):
    """Other answers (the best rank R of the mean), on one module; glora's rows stand beside."""
    (part,) = stacks(case, RANKS["uniform"], torch.float32)
    p, lapack = part.first, peers.Lapack()
    om = peers.omega(p.a.shape[1], case.rank + peers.OVERSAMPLE).cuda()
    call = {
        "implicit randomized SVD": lambda: peers.randomized_svd(p, case.rank, 2, om, lapack),
        "stacked QR": lambda: peers.stacked_qr(p, case.rank, lapack),
        "dense, svd_lowrank": lambda: peers.dense_lowrank(p, case.rank),
        "dense, linalg.svd": lambda: peers.dense_svd(p, case.rank),
    }[peer]
    ours = torch.ops.glora.aggregate(
        *part.pair, part.offsets, part.weights, part.scaling, case.rank, "update"
    )[1][0]
    assert float((call()[1] - ours).norm() / ours.norm()) < 0.1  # a flat spectrum, two steps
    record(benchmark, call, case=str(case), way=peer, dtype="torch.float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["sketch", "times", "accumulate", "core"])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_pass_kernels(benchmark, case, kernel, dtype):
    """Bytes that must move, their floor at the measured copy bandwidth, and the share reached."""
    from glora_ops.kernels import core, product, sketch

    part = stacks(case, [16], dtype)[0]
    b, a = part.pair
    marks, k = part.offsets.cuda(), min(2 * case.rank, 128)
    tests = [torch.ones(k, x.shape[-1], device="cuda", dtype=dtype).mT for x in (b, a)]
    y = torch.randn(b.shape[0], k, b.shape[-1], device="cuda").mT
    z = torch.randn(*b.shape[:2], k, device="cuda")
    u, v = (torch.randn(x.shape[0], case.rank, x.shape[-1], device="cuda").mT for x in (b, a))
    coef = torch.ones(b.shape[:2], device="cuda", dtype=torch.float64)
    columns = {"sketch": 2 * k, "times": k, "accumulate": k, "core": 2 * case.rank}[kernel]
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
    record(benchmark, call, case=str(case), way=kernel, dtype=str(dtype), bytes=moved,
           flops=2 * b.shape[0] * b.shape[1] * b.shape[2] * columns, floor_ms=floor,
           share_of_copy=floor / device_ms(call, cold=True))  # fmt: skip
