"""Kernels along the long dimension against float64, in Triton's interpreter or on a device.

Errors are judged entry by entry: a sum of n products taken in fp32 errs by at most n·u32 times the
same sum of absolute values, and by far less than rounding one operand to bf16 would.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from glora_ops.bindings.cuda import CudaVocabulary
from glora_ops.kernels import triangular
from glora_ops.kernels.blocks import leading_bits
from glora_ops.kernels.canonical_solve import launch_canonical_solve
from glora_ops.kernels.core import launch_core
from glora_ops.kernels.eigh import launch_eigh
from glora_ops.kernels.fold import launch_fold
from glora_ops.kernels.launching import Call, launch, observed
from glora_ops.kernels.product import launch_accumulate, launch_inner, launch_times
from glora_ops.kernels.readout import launch_readout
from glora_ops.kernels.sketch import launch_sketch
from glora_ops.kernels.svd import launch_svd
from glora_ops.kernels.triangular import launch_triangular
from kernel_cases import DEVICE, DTYPES, guarded, poisoned

from glora_ops.linalg.orthonormal import inverse_cholesky
from glora_ops.linalg.ragged import Ragged

U32 = 2.0**-24
RANKS = [[16], [3, 7, 1, 16, 2], [5, 33, 20]]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).to(DEVICE)


def ragged(ranks: list[int]) -> Ragged:
    offsets = torch.tensor([0, *ranks]).cumsum(0)
    return Ragged.of(offsets, sum(ranks), torch.device(DEVICE))


def assert_close(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, unit: float = U32) -> None:
    """got = x w to n·unit·|x||w|, a bound that bf16 operands must fail."""
    x, w = x.double(), w.double()
    limit = (x.shape[-1] + 2) * unit * (x.abs() @ w.abs()) + 1e-300
    assert got.isfinite().all()
    assert ((got.double() - x @ w).abs() <= limit).all()
    if x.shape[-1] < 2**8 and (w.bfloat16() != w).any():
        assert ((x @ w.bfloat16().double() - x @ w).abs() > limit).any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    ("n", "d", "k"),
    [(16, 64, 16), (37, 70, 5), (1, 33, 17), (65, 40, 1), (20, 40, 70), (9, 40, 170)],
)
def test_times_and_accumulate(n, d, k, dtype):
    """Any size; factors in a NaN frame, so that one stray read shows; outputs poisoned."""
    x, _ = guarded(randn(2, n, d, dtype=dtype))
    w, _ = guarded(randn(2, k, d, seed=1))
    z, _ = guarded(randn(2, n, k, dtype=torch.float64, seed=2))
    unit = 2.0**-53 if dtype == torch.float64 else U32
    with poisoned():
        times, lifted, inner = launch_times(x, w.mT), launch_accumulate(x, z), launch_inner(x, z)
    assert times.dtype == torch.float64
    assert_close(times, x, w.mT, unit)
    assert lifted.mT.is_contiguous()
    assert_close(lifted, x.mT, z if unit < U32 else z.float(), unit)
    assert_close(inner, x.mT, z, 2.0**-53)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contractions_are_cut_and_added_in_order(dtype):
    x, w = randn(1, 5, 1100, dtype=dtype), randn(1, 4, 1100, seed=1).mT
    calls: list[Call] = []
    with poisoned(), observed(lambda call: calls.append(call) or True):
        first, again = launch_times(x, w), launch_times(x, w)
    assert calls[0].arguments["splits0"] == 2
    assert torch.equal(first, again)
    assert_close(first, x, w)


def test_signs_are_shared_by_modules_and_strides_do_not_matter():
    x = randn(40, 3, 12).permute(1, 2, 0)
    signs = randn(1, 40, 6).sign()
    assert_close(launch_times(x, signs), x, signs.expand(3, -1, -1))
    assert torch.equal(launch_times(x, signs), launch_times(x.contiguous(), signs.mT.mT.clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_sides_in_one_launch_are_the_two_launches(dtype):
    """Bit for bit, sides of any sizes; small problems of another shape take a launch each."""
    v, r = CudaVocabulary(), ragged([3, 2])
    rows = [randn(2, 5, d, dtype=dtype, seed=d) for d in (70, 33)]
    y = [randn(2, 4, d, seed=d + 1).mT for d in (70, 33)]
    z, t = ([randn(2, 5, n, dtype=torch.float64, seed=s) for s in (2, 3)] for n in (4, 3))
    c = [randn(2, 4, n, dtype=torch.float64, seed=n) for n in (3, 6)]
    grams = [v.inner(x, x) for x in y]
    uneven = [grams[0], grams[1][:, :3, :3]]
    scale = [z[0][..., 0].abs()] * 2
    calls: list[Call] = []
    for word, launches, *operands in (
        ("times", 1, rows, y), ("inner", 1, y, y), ("lift", 1, rows, z), ("combine", 1, y, c),
        ("product", 1, [x.mT for x in z], z), ("fold", 1, t, scale, [r, r], z),
        ("unfold", 1, t, scale, [r, r], z), ("inverse_cholesky", 1, grams, [1e-12] * 2),
        ("inverse_cholesky", 2, uneven, [1e-12] * 2),
    ):  # fmt: skip
        alone = [getattr(v, word)(*side) for side in zip(*operands, strict=True)]
        calls.clear()
        with poisoned(), observed(lambda call: calls.append(call) or True):
            together = v.each(word, *operands)
        assert len(calls) == launches, word
        assert all(torch.equal(x, w) for x, w in zip(together, alone, strict=True)), word
    onto = [randn(2, n, d, seed=d).mT for n, d in ((3, 70), (6, 33))]
    want = [x + v.combine(a, b) for x, a, b in zip(onto, y, c, strict=True)]
    v.each("combine", y, c, onto)
    assert all(torch.equal(x, w) for x, w in zip(onto, want, strict=True))


def test_what_may_be_many_stands_on_the_axis_that_holds_it():
    """70 000 modules, or clients times modules: only the first axis of a grid takes so many."""
    many, calls = 70_000, []

    def meta(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows, marks = meta(many, 2, 3, dtype=torch.float32), meta(3, dtype=torch.int64)
    u, square = meta(many, 3, 2, dtype=torch.float32), meta(many, 2, 2)
    with observed(lambda call: calls.append(call) or False):
        launch_times(rows, u)
        launch_inner(u, u)
        launch_accumulate(rows, meta(many, 2, 2))
        launch_sketch([rows, rows], marks, 1, [u[0], u[0]])
        launch_fold(meta(many, 2, 1), meta(many, 2), meta(many, 2, 2), marks, 1, back=True)
        launch_core(rows, rows, u, u, meta(many, 2))
        launch_readout(u, u, meta(many, 2, dtype=torch.float32), 2)
        launch_triangular(square, 1e-12)
        launch_eigh(square)
        launch_svd(square)
        launch_canonical_solve(meta(many, 2, 1, 1), meta(many, 2, 1, 1), marks[:2])
    assert len({call.name for call in calls}) == 9
    assert all(call.grid[0] >= many and max(call.grid[1:], default=1) <= 4 for call in calls)
    with pytest.raises(ValueError, match="65 535"):
        launch(split_kernel, (1, many), rows, num_warps=4)


def test_nothing_to_add_is_zero():
    with poisoned():
        assert (launch_accumulate(randn(2, 0, 9), randn(2, 0, 4)) == 0).all()
        assert launch_inner(randn(2, 9, 0), randn(2, 9, 4)).shape == (2, 0, 4)


def test_offsets_beyond_two_to_the_31():
    """The second module starts 2³¹ + 64 elements after the first, of memory mostly untouched."""
    far = 2**31 + 64
    x = torch.empty_strided((2, 3, 40), (far, 40, 1), dtype=torch.float16, device=DEVICE)
    x.copy_(randn(2, 3, 40, dtype=torch.float16))
    w, offsets = randn(1, 40, 4, seed=1).half(), torch.tensor([0, 2, 3], device=DEVICE)
    assert_close(launch_times(x, w), x, w.expand(2, -1, -1))
    assert_close(launch_accumulate(x, w[:, :3].expand(2, -1, -1)), x.mT, w[:, :3])
    (gram,), (z,) = launch_sketch([x], offsets, 2, [w[0]])
    assert_close(gram[:, 0], x[:, :2], x[:, :2].mT, 2.0**-53)
    assert_close(z, x, w.expand(2, -1, -1))


def test_strides_beyond_two_to_the_31_in_all():
    """Entry 39 of a row stands 39 · 2²⁶ elements after its first: a transposed view of a giant."""
    x = torch.empty_strided((1, 3, 40), (1, 1, 2**26), dtype=torch.float16, device=DEVICE)
    x.copy_(randn(1, 3, 40, dtype=torch.float16))
    plain, w = x.contiguous(), randn(1, 40, 4, seed=1).half()
    offsets, coef = torch.tensor([0, 2, 3], device=DEVICE), randn(1, 3).double()
    assert torch.equal(launch_times(x, w), launch_times(plain, w))
    z = w[:, :3].float()
    assert torch.equal(launch_accumulate(x, z), launch_accumulate(plain, z))
    for one, two in zip(
        (*launch_sketch([x], offsets, 2, [w[0]]), launch_core(x, x, w, w, coef)),
        (*launch_sketch([plain], offsets, 2, [w[0]]), launch_core(plain, plain, w, w, coef)),
        strict=True,
    ):
        assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_sketch_reads_both_stacks_once(ranks, dtype):
    """Ragged, dead and dependent rows; two widths in one launch; padding zero, not NaN."""
    r, stacks, tests = ragged(ranks), [], []
    for seed, d in enumerate((70, 41)):
        x = randn(2, r.rows, d, dtype=dtype, seed=seed)
        x[:, 0] = 0
        x[:, -1] = x[:, -2]
        stacks.append(guarded(x)[0])
        tests.append(randn(5, d, seed=9).sign().to(dtype).mT)
    calls: list[Call] = []
    with poisoned(), observed(lambda call: calls.append(call) or True):
        grams, sketches = launch_sketch(stacks, r.marks, r.max_rank, tests)
    assert [call.name for call in calls] == ["sketch_kernel"]
    alone, _ = launch_sketch(stacks[:1], r.marks, r.max_rank)
    assert torch.equal(alone[0], grams[0])
    for x, w, gram, z in zip(stacks, tests, grams, sketches, strict=True):
        blocks = r.pad(x.double())
        assert_close(gram, blocks, blocks.mT, 2.0**-53)
        assert torch.equal(gram == 0, blocks @ blocks.mT == 0)
        assert_close(z, x, w.expand(2, -1, -1))


def test_a_run_of_clients_shares_a_program():
    """Enough clients and modules: four narrow ones to a program, the same Gram matrices."""
    r = ragged([3, 16, 1, 5, 2])
    x = randn(40, r.rows, 16)
    calls: list[Call] = []
    with observed(lambda call: calls.append(call) or False):
        launch_sketch([x, x], r.marks, 16)
    assert calls[0].arguments["CLIENTS"] == 1
    many = ragged([3, 16, 1, 5, 2] * 26)
    with observed(lambda call: calls.append(call) or False):
        launch_sketch([randn(8, many.rows, 16)] * 2, many.marks, 16)
    assert calls[1].arguments["CLIENTS"] == 4
    few = ragged([3, 16, 1, 5, 2])
    arguments = calls[1].arguments | {"CLIENTS": 4}
    y = randn(1, few.rows, 24)
    gram = torch.full((1, 5, 16, 16), torch.nan, dtype=torch.float64, device=DEVICE)
    side = (y, y[0].mT[:, :1], gram, gram, 24, 1, *y.stride(), *y[0].mT.stride())
    constants = {
        k: arguments[k] for k in ("MODE", "EVERY", "GRAM", "SKETCH", "CLIENTS", "R", "BN", "BC")
    }
    launch(calls[1].kernel, (2, 1), *side, *side, few.marks, 5, 16, num_warps=8, **constants)
    blocks = few.pad(y.double())
    assert_close(gram, blocks, blocks.mT, 2.0**-53)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_fold_and_unfold(ranks):
    r, k = ragged(ranks), 7
    t = randn(2, r.rows, r.max_rank, dtype=torch.float64)
    t = t * (torch.arange(r.max_rank, device=DEVICE) < r.ranks[r.owner][:, None])
    z, c = randn(2, r.rows, k, dtype=torch.float64, seed=1), randn(2, r.rows, seed=2).double()
    with poisoned():
        folded = launch_fold(t, c, z, r.marks, r.max_rank, back=False)
        unfolded = launch_fold(t, c, z, r.marks, r.max_rank, back=True)
    blocks = r.pad(t)
    want = c[..., None] * r.unpad(blocks.mT @ r.pad(z))
    assert torch.allclose(folded, want, rtol=0, atol=1e-13 * float(want.abs().max()))
    want = r.unpad(blocks @ r.pad(c[..., None] * z))
    assert unfolded.dtype == torch.float32
    assert torch.allclose(unfolded.double(), want, rtol=0, atol=4 * U32 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k_u", "k_v"), [(27, 6, 9), (80, 16, 16), (5, 1, 3)])
def test_core(rows, k_u, k_v, dtype):
    b, a = (guarded(randn(2, rows, d, dtype=dtype, seed=d))[0] for d in (70, 41))
    u, v = randn(2, k_u, 70, seed=1).mT, randn(2, k_v, 41, seed=2).mT
    coef = randn(2, rows, seed=3).double()
    with poisoned():
        c, z_u, z_v = launch_core(b, a, u, v, coef)
    assert_close(z_u, b, u)
    assert_close(z_v, a, v)
    assert_close(c, z_u.mT, coef[..., None] * z_v, 2.0**-53)


@pytest.mark.parametrize("rank", [3, 6, 20])
def test_readout(rank):
    u, v, root = randn(2, 6, 70).mT, randn(2, 41, 6, seed=1), randn(2, 6, seed=2).abs()
    with poisoned():
        b, a = launch_readout(u, v, root, rank)
    kept = min(rank, 6)
    assert torch.equal(b[..., :kept], (u * root[:, None])[..., :kept])
    assert torch.equal(a[:, :kept], (v * root[:, None]).mT[:, :kept])
    assert not b[..., kept:].any()
    assert not a[:, kept:].any()


@pytest.mark.parametrize(("n", "target"), [(12, ""), (20, ""), (70, ""), (70, "gfx942")])
def test_triangular_is_the_one_of_the_cpu(n, target, monkeypatch):
    """One panel of columns, two, and five; dependent, zero and tiny columns."""
    y = randn(3, 90, n, dtype=torch.float64)
    y[..., 4] = y[..., 1] + y[..., 2]
    y[..., n - 1] = y[..., 1] - y[..., n - 2]
    y[..., 7] = 0
    y[..., 9] *= 1e-9
    y[1] = 0
    gram = y.mT @ y
    if target and DEVICE == "cpu":
        monkeypatch.setattr(triangular, "target_of", lambda g: target)
    with poisoned():
        w = launch_triangular(gram, 1e-12)
    want = inverse_cholesky(gram, 1e-12)
    assert torch.allclose(w, want, rtol=1e-9, atol=1e-12 * float(want.abs().max()))
    assert w.tril(-1).abs().max() == 0


@triton.jit
def split_kernel(X, HIGH, MID, LOW, n, B: tl.constexpr):
    o = tl.arange(0, B)
    x = tl.load(X + o, mask=o < n, other=0.0)
    high = leading_bits(x)
    mid = leading_bits(x - high)
    tl.store(HIGH + o, high, mask=o < n)
    tl.store(MID + o, mid, mask=o < n)
    tl.store(LOW + o, x - high - mid, mask=o < n)


def test_three_bf16_terms_are_an_fp32():
    """Exactly: each is a bf16, and their sum is the number; so is a product with any bf16."""
    x = torch.cat([randn(500) * 10.0 ** torch.arange(-25, 25).repeat(10).to(DEVICE), randn(12)])
    terms = [torch.empty_like(x) for _ in range(3)]
    launch(split_kernel, (1,), x, *terms, 512, num_warps=4, B=512)
    for term in terms:
        assert torch.equal(term, term.bfloat16().float())
    assert torch.equal(sum(term.double() for term in terms), x.double())


@triton.jit
def careless_kernel(Y, n, shift, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(Y + shift + o, 1.0, mask=o < n)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_write_beside_a_buffer_is_seen(shift):
    with poisoned():
        launch(careless_kernel, (1,), torch.empty(9, device=DEVICE), 9, 0, num_warps=1, B=16)
    with pytest.raises(AssertionError, match="a buffer"), poisoned():
        launch(careless_kernel, (1,), torch.empty(9, device=DEVICE), 9, shift, num_warps=1, B=16)
