"""Long sums on tensor cores that cut instead of rounding, and Gram matrices without fp64 units.

Emulated (truncated.py); on a device these tests would judge the emulation, so they stay here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import bounds
import numpy as np
import pytest
import torch
from glora_ops.bindings.ops import Ops
from glora_ops.kernels import core, fold, precision, product, sketch
from kernel_cases import DEVICE, guarded, poisoned
from torch import Tensor
from truncated import TruncatingVocabulary, truncated_dots, truncated_product

from glora_ops import pack
from glora_ops.linalg.ragged import Ragged

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="an emulation, for the interpreter")
LENGTHS = (1024, 4096, 11008)
# 16 cuts of less than a last place, 2⁻²³, of a partial sum that grows evenly: 8½ of them. The
# second accumulator rounds to nearest, ⌈d/256⌉ times, and its errors mostly cancel.
HOLDS = 8.5 * 2.0**-23


def coherent(d: int) -> tuple[Tensor, Tensor]:
    """Rows (1, 4, d), and columns (1, d, 4) that lie along them: every sum is of one sign."""
    x = torch.rand(1, 4, d, generator=torch.Generator().manual_seed(d)) + 0.5
    return x.bfloat16().float(), torch.nn.functional.normalize(x, dim=-1).mT.contiguous()


def worst(got: Tensor, x: Tensor, w: Tensor) -> float:
    want = x.double() @ w.double()
    return float(((got.double() - want).abs() / want.abs()).max())


def kernels(d: int) -> dict[str, float]:
    """Relative errors of every kernel that sums fp32 products over a long dimension."""
    x, w = coherent(d)
    marks = torch.tensor([0, 2, 4])
    unsplit = patch.object(product, "FILL", 1)
    with truncated_dots(), unsplit, poisoned():
        coef = torch.ones(1, 4, dtype=torch.float64)
        _, z_u, z_v = core.launch_core(x, x, w, w, coef)
        _, (z,) = sketch.launch_sketch([x], marks, 2, [w[0]])
        return {
            "times": worst(product.launch_times(x, w), x, w),
            "accumulate": worst(product.launch_accumulate(w, x.mT).mT, x, w),
            "core, left": worst(z_u, x, w),
            "core, right": worst(z_v, x, w),
            "sketch": worst(z, x, w),
        }


def times(d: int) -> float:
    x, w = coherent(d)
    with truncated_dots(), patch.object(product, "FILL", 1):
        return worst(product.launch_times(x, w), x, w)


def test_coherent_sums_hold_in_every_kernel_of_a_long_dimension():
    errors = kernels(LENGTHS[0])
    assert max(errors.values()) < HOLDS, errors


def test_without_promotion_none_of_them_holds():
    with (
        patch.object(product, "PROMOTED", 2**20),
        patch.object(core, "PROMOTED", 2**20),
        patch.object(sketch, "PROMOTED", 2**20),
    ):
        errors = kernels(LENGTHS[0])
    assert min(errors.values()) > HOLDS, errors


@pytest.mark.parametrize("d", LENGTHS[1:])
def test_longer_ones_are_no_worse(d):
    assert times(d) < HOLDS


@pytest.mark.parametrize("d", LENGTHS)
def test_three_terms_in_one_accumulator_hold_as_well(d):
    """Of an fp32 operand: thrice the cuts, within the whole budget 32·u32; not if unpromoted."""
    x, w = coherent(d)
    assert worst(truncated_product(x, w), x, w) < 32 * bounds.U32
    with patch.object(precision, "PROMOTED", 2**20):
        assert worst(truncated_product(x, w), x, w) > 32 * bounds.U32


# --- the accuracy contract, in the words of the vocabulary ---------------------------------------


def population(kind: str, rng: np.random.Generator) -> list[tuple[Tensor, Tensor]]:
    """Four clients of rank 2 at 4096 × 1024, coherent: no sum over a row cancels."""
    d_out, d_in, rank = 4096, 1024, 2
    shared = rng.uniform(0.5, 1.5, (d_out, rank)), rng.uniform(0.5, 1.5, (rank, d_in))
    out = []
    for i in range(4):
        b, a = rng.uniform(0.5, 1.5, (d_out, rank)), rng.uniform(0.5, 1.5, (rank, d_in))
        if kind == "shared":
            b, a = shared[0] @ rng.uniform(0.5, 1.5, (rank, rank)), shared[1]
        elif kind == "partly shared":
            b[:, 0] = shared[0][:, 0]
        elif kind == "frozen":
            a = shared[1]
        elif kind == "loud":
            b *= 100.0 if i == 0 else 1.0
        elif kind == "deficient":
            b[:, 1], a[1] = b[:, 0], a[0]
        elif kind == "graded":
            b[:, 1] *= 1e-3
        elif kind == "gauged":
            b, a = b * [30.0, 1.0], a / [[30.0], [1.0]]
        out.append((torch.from_numpy(b).bfloat16(), torch.from_numpy(a).bfloat16()))
    return out


KINDS = (
    "disjoint", "shared", "partly shared", "frozen", "loud", "deficient", "graded", "gauged",
)  # fmt: skip


def distance(clients: list[tuple[Tensor, Tensor]], basis: str) -> float:
    """‖Ŵ − W̄‖_F over its bound 32·u32·S, where nothing is cut; without a d × d array."""
    p, count = pack(clients), len(clients)
    w, one = torch.full((count,), 1 / count), torch.ones(count)
    with torch.no_grad():
        ops = Ops(TruncatingVocabulary(), fixed_steps=True)
        u, s, v, *_ = ops.aggregate(
            p.b, p.a, p.offsets, w, one, p.b.shape[-2], basis, oversample=4, power_iters=1
        )
    left = torch.cat([u.double() * s, -p.b.double().mT / count], -1)
    right = torch.cat([v.double(), p.a.double().mT], -1)
    r, t = torch.linalg.qr(left).R, torch.linalg.qr(right).R
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    size = bounds.storage_scale(arrays, w.numpy(), one.numpy())
    return float((r @ t.mT).norm()) / bounds.exact_bound(size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("basis", ["consensus", "update"])
def test_truncated_sums_keep_the_accuracy_contract(kind, basis):
    assert distance(population(kind, np.random.default_rng(0)), basis) <= 1


def test_without_promotion_they_break_it():
    with patch.object(precision, "PROMOTED", 2**20):
        assert distance(population("shared", np.random.default_rng(0)), "consensus") > 1


# --- targets without fp64 units ------------------------------------------------------------------


@contextmanager
def without_doubles() -> Iterator[None]:
    """Kernels as on such a target, their fp32 dots truncated."""
    with ExitStack() as stack:
        for module in (product, core, fold, sketch):
            stack.enter_context(patch.object(module, "precise_mode", lambda x: "slices"))
        stack.enter_context(truncated_dots())
        yield


def graded(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Entries over ten binades, rows of 2^±70, in a frame of NaN."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=rng, dtype=torch.float64)
    x = x * torch.randint(-10, 1, shape, generator=rng).double().exp2()
    ends = torch.linspace(-70, 70, shape[-2]).round()[:, None].double().exp2()
    return guarded((x * ends).to(dtype))[0]


def assert_precise(got: Tensor, x: Tensor, w: Tensor, bits: int) -> None:
    """x w to 2^−bits of the largest products, which fp32 sums are far from."""
    x, w = x.double(), w.double()
    unit = x.shape[-1] * x.abs().amax(-1)[..., None] * w.abs().amax(-2)[..., None, :]
    unit = unit.clamp(min=1e-300)
    error = (got - x @ w).abs() / unit
    assert float(error.max()) < 2.0**-bits
    single = x.float() @ w.float()
    assert float(((single.double() - x @ w).abs() / unit).nan_to_num(1.0).max()) > 2.0**-bits


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 43), (torch.float64, 40)])
def test_inner_products_without_fp64_units(dtype, bits):
    y, z = (graded(1, n, 290, seed=n, dtype=dtype).mT for n in (5, 3))
    with without_doubles(), patch.object(product, "FILL", 1), poisoned():
        got = product.launch_inner(y, z)
    assert_precise(got, y.mT, z, bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [[3, 2, 1], [20]])
def test_gram_matrices_without_fp64_units(ranks, dtype):
    """A row whose largest entry comes last, too: the pair is scaled as its exponent grows."""
    r = Ragged.of(torch.tensor([0, *ranks]).cumsum(0), sum(ranks), torch.device("cpu"))
    x = graded(1, r.rows, 100, seed=1, dtype=dtype)
    x[..., 0, 99] *= 2.0**12
    with without_doubles(), poisoned(), patch.object(sketch, "FILL", 0):
        (gram,), _ = sketch.launch_sketch([x], r.marks, r.max_rank)
    blocks = r.pad(x.double())
    assert_precise(gram, blocks, blocks.mT, 43)


def test_fold_and_core_without_fp64_units():
    r = Ragged.of(torch.tensor([0, 40]), 40, torch.device("cpu"))
    t, one = graded(1, 40, 40, seed=1, dtype=torch.float64), torch.ones(1, 40).double()
    z = graded(1, 5, 40, seed=2, dtype=torch.float64).mT
    b, a = (torch.randn(1, 40, d, generator=torch.Generator().manual_seed(d)) for d in (30, 20))
    u, v = (torch.randn(1, d, 4, generator=torch.Generator().manual_seed(d)) for d in (30, 20))
    with without_doubles(), poisoned():
        folded = fold.launch_fold(t, one, z, r.marks, 40, back=False)
        c, z_u, z_v = core.launch_core(b, a, u, v, one)
    assert_precise(folded, t.mT, z, 40)
    assert torch.allclose(c, z_u.mT @ z_v, rtol=0, atol=2.0**-38 * float(c.abs().max()))


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_103", "gfx942"])
def test_who_has_fp64_units(target):
    """By the device's own name of its capability: sm_86, sm_89 and sm_103 have none."""
    with patch.object(precision, "target_of", lambda x: target):
        mode = precision.precise_mode(torch.ones(1))
    assert mode == ("double" if target in ("sm_80", "sm_90", "gfx942") else "slices")


def test_the_emulated_words_are_those_of_the_kernels():
    """Where w is one term the word and the kernel with truncated dots differ in no bit."""
    x, w = coherent(1024)
    w = w.bfloat16().float()
    with truncated_dots(), patch.object(product, "FILL", 1):
        got = product.launch_times(x, w)
    assert torch.equal(got.float(), truncated_product(x, w))
