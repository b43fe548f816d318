"""Facts of real hardware that no interpreter knows: sums, races, grids, captures, host time.

Every one is a risk that reading the kernels could not settle; each row stands alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from glora_ops.bindings.cuda import CudaVocabulary
from torch import Tensor

from glora_ops.linalg.ragged import Ragged
from gpu.device import Stacks, clients, server_step
from gpu.step import Step, main

U32 = 2.0**-24
BUDGET = 32  # of the accuracy contract, in u32


def truncated_sums(step: Step) -> None:
    """Sums of d positive terms: an accumulator cut to 24 bits at each step drifts with d.

    Of the products of one word, and of torch's own, the error of the sum over the sum, in u32.
    """
    v, device = CudaVocabulary(), step.device
    for d in (64,) if step.rehearse else (1024, 4096, 11008):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            rng = torch.Generator().manual_seed(d)
            x = torch.rand(1, 64, d, generator=rng).add(0.5).to(dtype).to(device)
            w = torch.rand(1, 64, d, generator=rng).add(0.5).to(device)
            truth, narrow = x.double() @ w.double().mT, w.to(dtype).mT
            ragged = Ragged.of(torch.tensor([0, 64]), 64, torch.device(device))
            words: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
                "times": (lambda x=x, w=w: v.times(x, w.mT), truth),
                "lift": (lambda x=x, w=w: v.lift(x.mT.contiguous(), w.mT.contiguous()), truth),
                "core": (
                    lambda x=x, w=w: v.core(
                        x,
                        x,
                        w.mT[..., :16],
                        w.mT[..., :16],
                        torch.ones(1, 64, device=device, dtype=torch.float64),
                    )[1],
                    truth[..., :16],
                ),
                "sketch": (
                    lambda x=x, ragged=ragged: v.sketch(
                        [x, x], ragged, 2 * [torch.ones_like(x[:, :16]).mT]
                    )[1][0],
                    x.double().sum(-1, keepdim=True).expand(-1, -1, 16),
                ),
                "torch.bmm": (
                    lambda x=x, y=narrow: fp32_sums(x, y),
                    x.double() @ narrow.double(),
                ),
            }
            for word, (call, want) in words.items():
                with step.row(fact="sum", word=word, d=d, dtype=str(dtype)[6:]) as r:
                    error = (call().double() - want) / want / U32
                    r["error_u32"], r["mean_u32"] = float(error.abs().max()), float(error.mean())
                    if word != "torch.bmm":  # a fact of the library, no fault of ours
                        r["ok"] = r["error_u32"] <= BUDGET


def fp32_sums(x: Tensor, y: Tensor) -> Tensor:
    """The library's product; of 16-bit operands with its sums as they are."""
    halves = x.is_cuda and x.dtype != torch.float32
    return torch.bmm(x, y, out_dtype=torch.float32) if halves else torch.bmm(x.float(), y.float())


def unequal(call: Callable[[], object], times: int) -> int:
    """How many of so many repeats differ from the first in a bit."""
    first = torch.utils._pytree.tree_leaves(call())
    return sum(
        not all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        for again in (torch.utils._pytree.tree_leaves(call()) for _ in range(times))
    )


def repeated_bits(step: Step) -> None:
    """Matrices pass between threads through global memory: a race shows as another bit."""
    v, device, times = CudaVocabulary(), step.device, 1 if step.rehearse else 200
    rng = torch.Generator().manual_seed(0)
    for n in (4,) if step.rehearse else (16, 32, 64, 80, 128):
        x = torch.randn(264, n, n, generator=rng, dtype=torch.float64)[
            : 1 if step.rehearse else 264
        ]
        x = x.to(device)
        g = x @ x.mT
        calls = {
            "eigh": lambda g=g: v.eigh(g),
            "svd": lambda x=x: v.svd(x),
            "inverse_cholesky": lambda g=g: v.inverse_cholesky(g, 1e-14),
        }
        for word, call in calls.items():
            with step.row(fact="bits", of=word, n=n, repeats=times) as r:
                r["unequal"] = unequal(call, times)
                r["ok"] = r["unequal"] == 0
    for rank in (2,) if step.rehearse else (16, 32, 64):
        part = small(step, rank)
        with step.row(fact="bits", of="aggregate", n=rank, repeats=times) as r:
            r["unequal"] = unequal(lambda part=part: one_step(part, device), times)
            r["ok"] = r["unequal"] == 0


def small(step: Step, rank: int, d: int = 512) -> Stacks:
    shape = (24, 16) if step.rehearse else (d, d)
    return clients(shape, 2, 2 if step.rehearse else 20, rank, torch.bfloat16, step.device)


def one_step(part: Stacks, device: str) -> tuple[Tensor, ...]:
    settings = (2, "update") if device == "cpu" else (32, "consensus")
    return server_step(device)(*part.arguments, *settings, power_iters=1)


def long_grids(step: Step) -> None:
    """More than 65 535 blocks of one client each, in the grid's third dimension."""
    v, device = CudaVocabulary(), step.device
    modules, count = (2, 3) if step.rehearse else (700, 100)
    ragged = Ragged.of(torch.arange(count + 1), count, torch.device(device))
    x = torch.randn(modules, count, 16, device=device, dtype=torch.float64)
    with step.row(fact="grid", blocks=modules * count, word="gram") as r:
        error = v.gram(x, ragged)[..., 0, 0] - x.square().sum(-1)
        r["error"] = None if float(error.abs().max()) < 1e-12 else float(error.abs().max())
        r["ok"] = r.pop("error") is None


def capture(step: Step, name: str, d: int, warm: bool) -> None:
    """A graph replays the eager call bit for bit, and leaves nothing dangling when it is gone."""
    with step.row(fact="capture", of=name) as r:
        if step.device == "cpu":
            r["left_out"] = "no graphs without a device"
            return
        part = small(step, 16, d)
        eager = one_step(part, step.device) if warm else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = one_step(part, step.device)
        graph.replay()
        torch.cuda.synchronize()
        values = [x.clone() for x in recorded]
        del graph, recorded
        torch.cuda.empty_cache()
        torch.randn(2**28, device=step.device)  # what the graph owned belongs to others now
        after = one_step(part, step.device)
        r["replay_is_eager"] = all(map(torch.equal, values, eager or after))
        r["calls_after_it_are_eager"] = all(map(torch.equal, after, eager or values))
        r["ok"] = r["replay_is_eager"] and r["calls_after_it_are_eager"]


def replay(step: Step) -> None:
    capture(step, "replay", 512, warm=True)


def cold_capture(step: Step) -> None:
    """Plans, signs and indices are made inside the capture. Last, for it may be refused."""
    capture(step, "capture without a call before", 544, warm=False)


def host_time(step: Step) -> None:
    """Microseconds the host takes for a launch while nothing waits for the device."""
    v, times = CudaVocabulary(), 2 if step.rehearse else 1000
    x = torch.randn(1, 16, 64, device=step.device)
    with step.row(fact="host", of="times", launches=times) as r:
        v.times(x, x.mT)
        began = time.perf_counter()
        for _ in range(times):
            v.times(x, x.mT)
        r["microseconds"] = 1e6 * (time.perf_counter() - began) / times
        v.times(x, x.mT).cpu()


def body(step: Step) -> None:
    for fact in (truncated_sums, long_grids, host_time, replay, repeated_bits, cold_capture):
        with step.row(fact=fact.__name__, whole=True):
            fact(step)


if __name__ == "__main__":
    main(body)
