"""Kernels of N-space: overlaps, whitening to pairs of fp16 numbers, products in the metric."""

from __future__ import annotations

import pytest
import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.kernels.metric import launch_metric_energy, launch_metric_product
from glora_ops.kernels.overlaps import launch_overlaps
from glora_ops.kernels.whitened import launch_whitened
from kernel_cases import DEVICE, DTYPES, guarded, poisoned
from test_kernel_passes import assert_close, ragged, randn
from torch import Tensor

CPU = CpuVocabulary()
RANKS = [[16, 16], [3, 7, 0, 16, 2], [5, 33, 20]]


def pair(n: int, modules: int = 2) -> Tensor:
    """Symmetric matrices near the identity, as pairs."""
    g = 0.1 * randn(modules, n, n, seed=n)
    g = torch.eye(n, device=DEVICE) + (g + g.mT) / 2
    hi = g.half()
    return torch.stack([hi, ((g - hi) * 2.0**11).half()])


def value(gamma: Tensor) -> Tensor:
    return gamma[0].double() + gamma[1].double() * 2.0**-11


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("n", "d"), [(16, 64), (70, 40), (1, 33), (129, 20)])
def test_overlaps_are_products_and_symmetric(n, d, dtype):
    """Rows in a NaN frame; every entry written once, the upper ones a mirror to the last bit."""
    x, _ = guarded(randn(2, n, d, dtype=dtype))
    with poisoned():
        got = launch_overlaps(x)
    assert_close(got, x, x.mT, 2.0**-53 if dtype == torch.float64 else 2.0**-24)
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_scaled_on_their_way(dtype):
    """Rows of 2⁻⁸⁰ … 2⁸⁰, whose squares fp32 does not hold: the bits of rows near one."""
    x = randn(1, 40, 50, dtype=dtype)
    power = torch.linspace(-80, 80, 40, device=DEVICE).round().exp2()
    with poisoned():
        got = launch_overlaps((x * power[:, None]).to(dtype), (1 / power)[None])
    assert torch.equal(got, launch_overlaps(x))


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_whitened_is_the_cpus(ranks):
    """Ragged and empty clients, a direction that was dropped: pairs to the last place."""
    r = ragged(ranks)
    grams = [launch_overlaps(randn(2, r.rows, 50, seed=s)) for s in (0, 1)]
    width = r.max_rank
    exists = r.unpad(r.exists[:, None, :].expand(-1, width, -1))
    turns = [randn(2, r.rows, width, dtype=torch.float64, seed=s) * exists for s in (2, 3)]
    turns[1][..., 1] = 0  # nobody's second direction is there
    with poisoned():
        got = launch_whitened(grams, turns, r.marks, width)
    on_cpu = [[x.cpu() for x in xs] for xs in (grams, turns)]
    cpu = type(r)(r.offsets, width, torch.device("cpu"))
    want = CPU.whitened(on_cpu[0], cpu, on_cpu[1])
    assert torch.equal(got, got.mT)
    far = (value(got.cpu()) - value(want)).abs()
    assert float((far / value(want).abs().clamp(min=1)).max()) < 2.0**-21
    own = r.owner[:, None] == r.owner
    assert torch.equal(
        value(got)[2:] * own, torch.diag_embed((r.within != 1).double()).expand(2, -1, -1)
    )


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (37, 5), (70, 80), (1, 1), (65, 130)])
def test_metric_product_is_the_cpus(n, k, precise):
    """Columns of any size, zero ones too; z comes back as it was rounded; z in a NaN frame."""
    z = randn(2, k, n) * torch.logspace(-12, 12, k, device=DEVICE)[:, None]
    z[:, k // 2] *= k == 1
    framed, _ = guarded(z.float())
    gamma = pair(n)
    with poisoned():
        got = launch_metric_product(gamma, framed.mT, precise)
    want = CPU.metric_product(gamma.cpu(), framed.mT.cpu(), precise)
    assert got.mT.is_contiguous()
    entered, image = got.cpu().chunk(2, -2)
    assert torch.equal(entered, want[:, :n])
    scale = value(gamma).cpu().abs() @ entered.double().abs() + 1e-300
    exact = value(gamma).cpu() @ entered.double()
    off = float(((image.double() - exact).abs() / scale).max())
    assert off < (n + 8) * 2.0**-24 if precise else off < 2.0**-10
    assert float(((image - want[:, n:]).abs() / scale).max()) < (n + 2) * 2.0**-24
    if not precise and n > 16:
        assert off > 2.0**-16  # the lower terms are left out


@pytest.mark.parametrize("n", [16, 70, 1])
def test_metric_energy_is_the_sum_of_all_entries(n):
    gamma, d = pair(n, 4), randn(2, n)
    left, right = gamma.chunk(2, 1)
    with poisoned():
        got = launch_metric_energy(left, right, d)
    want = CPU.metric_energy(left.cpu(), right.cpu(), d.cpu())
    assert torch.allclose(got.cpu(), want, rtol=1e-6)
