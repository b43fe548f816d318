"""A device's clock, its graphs, clients made on it, and the server step as it runs there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.cuda import CudaVocabulary
from glora_ops.bindings.ops import Ops
from torch import Tensor

__all__ = ["LLAMA_7B", "Stacks", "clients", "replayed", "server_step", "timed"]

# d_out × d_in and how many modules of it a Llama-2-7B has: all linear layers.
LLAMA_7B = {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}
L2_BYTES = 2**27  # more than any L2: overwritten, every call starts cold


class _Interpreted(CudaVocabulary):
    """The kernels in Triton's interpreter, but for small problems: those take seconds there."""

    eigh, svd, canonical = CpuVocabulary.eigh, CpuVocabulary.svd, CpuVocabulary.canonical


def server_step(device: str) -> Callable[..., tuple[Tensor, ...]]:
    """``torch.ops.glora.aggregate``; its kernels in the interpreter where there is no device."""
    if device == "cuda":
        return torch.ops.glora.aggregate
    return torch.no_grad()(Ops(_Interpreted(), fixed_steps=True).aggregate)


@dataclass(frozen=True, eq=False)
class Stacks:
    """Clients of one shape's modules: b (L, N, d_out), a (L, N, d_in), and what `aggregate` takes.

    Attributes
    ----------
    offsets : Tensor (K + 1,) int64
    weights, scaling : Tensor (K,)
    """

    b: Tensor
    a: Tensor
    offsets: Tensor
    weights: Tensor
    scaling: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.b, self.a, self.offsets, self.weights, self.scaling

    @property
    def nbytes(self) -> int:
        return self.b.nbytes + self.a.nbytes


def clients(
    shape: tuple[int, int], modules: int, count: int, rank: int, dtype: torch.dtype, device: str
) -> Stacks:
    """Partly shared clients: half of each one's directions are everybody's, half its own."""
    rng = torch.Generator(device=device).manual_seed(0)
    sizes = torch.logspace(0, -0.5, rank, device=device)[:, None]
    own = torch.arange(rank, device=device)[:, None] % 2 > 0

    def stack(d: int) -> Tensor:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, device=device, dtype=dtype)

        x = normal(modules, count, rank, d)
        common = normal(modules, 1, rank, d)
        for l in range(modules):  # in place: twice the factors of a whole model would not fit
            x[l] = (torch.where(own, x[l], common[l] + 0.2 * x[l]) * sizes).to(dtype)
        return x.view(modules, count * rank, d)

    offsets = rank * torch.arange(count + 1)
    weights = torch.full((count,), 1 / count, device=device)
    return Stacks(stack(shape[0]), stack(shape[1]), offsets, weights, torch.ones_like(weights))


def timed(
    call: Callable[[], object], device: str, rounds: int, cold: bool = False
) -> dict[str, Any]:
    """Milliseconds of a call by the device's events: median, quartiles, rounds.

    Cold: what the L2 holds is overwritten before each. Without a device the host's clock runs.
    """
    flush = torch.empty(L2_BYTES // 4, device=device) if cold and device == "cuda" else None
    times = []
    for _ in range(rounds):
        if flush is not None:
            flush.zero_()
        times.append(_once(call, device))
    low, median, high = quantiles(times, n=4) if rounds > 1 else 3 * times
    return {"ms": median, "ms_quartiles": [low, high], "rounds": rounds, "cold": cold}


def _once(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def replayed(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The call as a graph's replay, recorded after one call by itself; it returns what that did."""
    if device == "cpu":
        return call
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
