"""What only a device can show: graphs replay what was run, bits repeat, opcheck passes on CUDA.

`make test-gpu` runs this, the kernels' tests and the accuracy contract on the device.
"""

from __future__ import annotations

import pytest
import torch
from strategies import BASES
from test_registration import calls, overload

import glora_ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: nothing of this file was tried"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stacks(
    dtype: torch.dtype, ranks: list[int], modules: int = 2, d_out: int = 512, d_in: int = 384
):
    rng = torch.Generator().manual_seed(0)
    b, a = (
        torch.randn(modules, sum(ranks), d, generator=rng).to("cuda", dtype) for d in (d_out, d_in)
    )
    offsets = torch.tensor([0, *ranks]).cumsum(0)
    weights = torch.full((len(ranks),), 1 / len(ranks), device="cuda")
    return b, a, offsets, weights, torch.ones_like(weights)


def on_device(x: object) -> object:
    return x.cuda() if isinstance(x, torch.Tensor) and x.dtype != torch.int64 else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", BASES)
def test_a_replayed_graph_is_the_eager_call_bit_for_bit(basis, dtype):
    args = stacks(dtype, [4, 16, 64, 9] * 4)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.ops.glora.aggregate(*args, 16, basis, power_iters=2)

    eager = step()  # also fills the plans: offsets and signs on the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        for x, y in zip(captured, eager, strict=True):
            assert torch.equal(x, y)
    args[0].mul_(2)  # new factors in the same place: the graph follows
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("steps", [-1, 2])
@pytest.mark.parametrize("basis", BASES)
def test_bits_repeat(basis, steps):
    args = stacks(torch.bfloat16, [16] * 20)
    one, two = (torch.ops.glora.aggregate(*args, 32, basis, power_iters=steps) for _ in range(2))
    for x, y in zip(one, two, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [-1, 4])
@pytest.mark.parametrize("basis", BASES)
def test_the_device_agrees_with_the_cpu(basis, steps, dtype):
    """R = N, nothing cut: both are W̄ to 32·u32·S, and so within 64 of each other."""
    b, a, offsets, w, s = stacks(dtype, [3, 16, 5])
    rank = int(offsets[-1])
    there = torch.ops.glora.aggregate(b, a, offsets, w, s, rank, basis, power_iters=steps)
    here = torch.ops.glora.aggregate(
        b.cpu(), a.cpu(), offsets, w.cpu(), s.cpu(), rank, basis, power_iters=steps
    )
    size = float(here[5][0, glora_ops.STATS.index("storage_scale")])
    x, y = ((o[0].double() * o[1][:, None]).cpu() @ o[2].double().mT.cpu() for o in (there, here))
    assert float((x[0] - y[0]).norm()) <= 64 * 2.0**-24 * size


@pytest.mark.parametrize("name", list(calls(True)))
def test_opcheck(name):
    args, kwargs = calls(True)[name]
    args = tuple(torch.utils._pytree.tree_map(on_device, args))
    torch.library.opcheck(overload(name), args, torch.utils._pytree.tree_map(on_device, kwargs))
