"""glora on a GPU beside the same mathematics and other answers in plain torch on that GPU.

    make bench-gpu        # pytest bench/test_gpu.py --benchmark-json bench/results/gpu.json

A row is one case × way × arm. Device time is taken with events around each call, cold (inputs
rotated through more memory than L2) and warm apart, captured calls also as graph replays. Values
are checked before any clock runs. Nothing here has run on a GPU yet; without one all is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import peers
import pytest
import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.ops import Ops
from torch import Tensor

from glora_ops.ragged import Ragged

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: nothing was timed"
)

# d_out × d_in and how many modules of it a Llama-2-7B has: all linear layers.
LLAMA_7B = {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}
L2_BYTES = 2**27  # more than any L2: inputs cycled through this much memory are cold
ROUNDS = 20


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

    def pair(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return b.float(), a.float(), self.rows(b)[1]

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

    def triangular(self, g: Tensor, drop: float) -> Tensor:
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
        pair = tuple(
            torch.randn(modules, sum(each), d, generator=rng, device="cuda", dtype=dtype)
            for d in (d_out, d_in)
        )
        out.append(Stacks(pair, offsets, weights, torch.ones_like(weights)))  # type: ignore[arg-type]
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
        event_ms_warm=device_ms(call),
        event_ms_cold=device_ms(call, cold=True),
        peak_bytes=torch.cuda.max_memory_allocated(),
    )


def ways(parts: list[Stacks], case: Case, steps: int) -> dict[str, Callable[[], object]]:
    plain = torch.no_grad()(Ops(TorchVocabulary(), captured=True).aggregate)
    compiled = torch.compile(plain, dynamic=False)

    def each(aggregate: Callable[..., Any], **settings: Any) -> Callable[[], object]:
        return lambda: [
            aggregate(*p.pair, p.offsets, p.weights, p.scaling, case.rank, **settings)
            for p in parts
        ]

    glora = torch.ops.glora.aggregate
    captured = each(glora, power_iters=steps)
    return {
        "adaptive (default)": each(glora),
        "captured": captured,
        "captured, replayed": replayed(captured),
        "plain torch": each(plain, power_iters=steps),
        "plain torch, compiled": each(compiled, power_iters=steps),
    }


@pytest.mark.parametrize("way", ["adaptive (default)", "captured", "captured, replayed",
                                 "plain torch", "plain torch, compiled"])  # fmt: skip
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_aggregate(benchmark, case, dtype, ranks, steps, way):
    parts = stacks(case, RANKS[ranks], dtype)
    arms = ways(parts, case, steps)
    u, s, v, *_ = arms["captured"]()[0]  # type: ignore[index]
    other, t, w, *_ = arms["plain torch"]()[0]  # type: ignore[index]
    gap = (u[0].double() * s[0]) @ v[0].double().mT - (other[0].double() * t[0]) @ w[0].double().mT
    assert float(gap.norm() / s[0].norm()) < 5e-2  # one mathematics, another rounding of ties
    factors = sum(x.nbytes for p in parts for x in p.pair)
    record(
        benchmark, arms[way], case=str(case), dtype=str(dtype), ranks=ranks, steps=steps, way=way,
        factor_bytes=factors, one_pass_floor_ms=1e3 * factors / copy_bandwidth(),
    )  # fmt: skip


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
    tests = [torch.ones(x.shape[-1], k, device="cuda", dtype=dtype) for x in (b, a)]
    y = torch.randn(b.shape[0], k, b.shape[-1], device="cuda").mT
    z = torch.randn(*b.shape[:2], k, device="cuda")
    u, v = (torch.randn(x.shape[0], case.rank, x.shape[-1], device="cuda").mT for x in (b, a))
    coef = torch.ones(b.shape[:2], device="cuda", dtype=torch.float64)
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
    record(benchmark, call, case=str(case), kernel=kernel, dtype=str(dtype), bytes=moved,
           floor_ms=floor, share_of_copy=floor / device_ms(call, cold=True))  # fmt: skip
