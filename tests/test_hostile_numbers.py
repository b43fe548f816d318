"""Numbers of any size, LAPACK that gives up, absurd ranks, storage limits: right or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from bounds import exact_bound
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.ops import Ops
from strategies import BASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glora_ops import GloraError, GloraWarning, State, aggregate, pack, reference
from glora_ops.runtime.threads import exact_products

Pair = tuple[Tensor, Tensor]
OPS = torch.ops.glora


def drawn(
    ranks: tuple[int, ...] = (2, 3, 1), d_out: int = 5, d_in: int = 6, seed: int = 0
) -> list[Pair]:
    rng = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(d_out, r, generator=rng), torch.randn(r, d_in, generator=rng)) for r in ranks
    ]


def scaled(pairs: list[Pair], sizes: list[tuple[float, float]], dtype: torch.dtype) -> list[Pair]:
    return [
        ((b.double() * size_b).to(dtype), (a.double() * size_a).to(dtype))
        for (b, a), (size_b, size_a) in zip(pairs, sizes, strict=True)
    ]


def update(state: State) -> np.ndarray:
    m = state.modules[""]
    u, s, v = (x.double().numpy().astype(np.longdouble) for x in (m.u, m.s, m.v))
    return (u * s) @ v.T


def assert_exact(pairs: list[Pair], state: State) -> None:
    """Ŵ = W̄ to 32·u32·S, in extended precision: squares of such numbers leave fp64 too."""
    mean, size = np.zeros((), np.longdouble), np.zeros((), np.longdouble)
    for b, a in pairs:
        left, right = (x.double().numpy().astype(np.longdouble) for x in (b, a))
        mean = mean + left @ right / len(pairs)
        size += (np.sqrt((left**2).sum(0)) * np.sqrt((right**2).sum(1))).sum() / len(pairs)
    assert size > 0
    assert np.sqrt(((update(state) - mean) ** 2).sum()) <= exact_bound(1) * size


# --- sizes -------------------------------------------------------------------------------------

TINY, HUGE = 1e-39, 3e37  # subnormal in fp32 and bf16; near their end
SIZES = {
    torch.float32: [(TINY, TINY), (TINY, 1.0), (1.0, TINY), (1e-44, 1e-41), (HUGE, HUGE),
                    (TINY, HUGE), (1e-25, 1e-25), (1e18, 1e18)],
    torch.bfloat16: [(TINY, TINY), (TINY, 1.0), (HUGE, HUGE), (TINY, HUGE)],
    torch.float16: [(1e-7, 1e-7), (1e-7, 1e4), (1e4, 1e4)],
    torch.float64: [(1e-39, 1e-39), (1e38, 1e38), (1e-39, 1e38)],
}  # fmt: skip
ALL = [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("dtype", "size"), ALL)
def test_factors_of_any_size_are_aggregated_within_the_contract(
    basis: str, dtype: torch.dtype, size: tuple[float, float]
) -> None:
    others = [size, (1.0, 1.0), (100.0, 1.0)]
    for sizes in ([size] * 3, others):
        pairs = scaled(drawn(), sizes, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GloraWarning)
            state = aggregate(pairs, rank=6, basis=basis)
        if basis != "projector" or not state.modules[""].stat("info_limited"):
            assert_exact(pairs, state)


@pytest.mark.parametrize("scaling", [1e-30, 1e30, -1e30])
@pytest.mark.parametrize("size", [(TINY, TINY), (HUGE, HUGE), (1e-44, HUGE)])
def test_scalings_that_leave_fp32_with_the_factors_change_nothing_but_the_size(
    size: tuple[float, float], scaling: float
) -> None:
    pairs = scaled(drawn(), [size] * 3, torch.float32)
    plain, times = (aggregate(pairs, None, [s] * 3, 6) for s in (1.0, scaling))
    distance = update(times) / np.longdouble(scaling) - update(plain)
    assert np.abs(distance).max() <= 1e-6 * np.abs(update(plain)).max()


EXPONENTS = [(-110, -110), (-116, 90), (90, 90), (-60, -110)]


@pytest.mark.parametrize("exponents", EXPONENTS)
@pytest.mark.parametrize("shape", [((3, 2, 4), 20, 16, 5), ((12,) * 12, 90, 80, 8)])
@pytest.mark.parametrize("basis", BASES)
def test_powers_of_two_change_no_bit_on_any_route(
    basis: str, shape: tuple[tuple[int, ...], int, int, int], exponents: tuple[int, int]
) -> None:
    """As far as fp32 holds the scaled factors exactly: their entries are cut to 11 bits."""
    ranks, d_out, d_in, rank = shape
    pairs = [(b.half().float(), a.half().float()) for b, a in drawn(ranks, d_out, d_in)]
    factors = [2.0**e for e in exponents]
    other = [(b * factors[0], a * factors[1]) for b, a in pairs]
    plain, moved = (aggregate(x, rank=rank, basis=basis).modules[""] for x in (pairs, other))
    for name in ("u", "v"):
        assert torch.equal(getattr(plain, name), getattr(moved, name)), name
    assert torch.equal(plain.s * factors[0] * factors[1], moved.s)


@pytest.mark.parametrize("exponents", EXPONENTS)
def test_powers_of_two_change_no_bit_of_any_op(exponents: tuple[int, int]) -> None:
    pairs = [(b.half().float(), a.half().float()) for b, a in drawn((3, 2, 4), 20, 16)]
    p, one = pack(pairs), torch.ones(3)
    left, right = (2.0**e for e in exponents)
    b, a = p.b * left, p.a * right
    t_u, t_v, sigma, f = OPS.canonicalize(p.b, p.a, p.offsets, one)
    moved = OPS.canonicalize(b, a, p.offsets, one)
    for x, y in zip((t_u / left, t_v / right, sigma * left * right, f), moved, strict=True):
        assert torch.equal(x, y)
    omega = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    votes = f / 3
    for one_way, other in (
        ((p.a, p.offsets, t_v, votes), (a, p.offsets, moved[1], votes)),
        ((p.a, p.offsets, one / 3), (a, p.offsets, one / 3)),
    ):
        assert torch.equal(
            OPS.projector_matmul(*one_way, omega), OPS.projector_matmul(*other, omega)
        )
        for x, y in zip(OPS.projector_svd(*one_way, 4), OPS.projector_svd(*other, 4), strict=True):
            assert torch.equal(x, y)
    u, v = torch.eye(20, 4), torch.eye(16, 4)
    c, d = (OPS.core(u, v, *x, p.offsets, one / 3, one) for x in ((p.b, p.a), (b, a)))
    assert torch.equal(c * left * right, d)


def test_a_row_whose_partner_is_zero_may_be_as_large_as_it_likes() -> None:
    """Scaled with its client it would overflow, and zero times infinity is no number."""
    b, a = drawn((2,))[0]
    b, a = b * TINY, a * TINY
    b = torch.cat([b, torch.zeros(5, 1)], 1)
    a = torch.cat([a, torch.full((1, 6), 3e38)])
    p, one = pack([(b, a)]), torch.ones(1)
    assert OPS.core(torch.eye(5), torch.eye(6), p.b, p.a, p.offsets, one, one).isfinite().all()
    assert all(x.isfinite().all() for x in OPS.canonicalize(p.b, p.a, p.offsets, one))
    assert_exact([(b, a)], aggregate([(b, a)], rank=3))


def test_an_update_too_large_for_factors_is_not_read_out_as_infinity() -> None:
    pairs = scaled(drawn(), [(HUGE, HUGE)] * 3, torch.float32)
    state = aggregate(pairs, None, [1e30] * 3, 6)
    with pytest.raises(GloraError, match=r"scaling: got 1\.0, expected one at which factors"):
        state.readout(3)
    b, a = state.readout(6, scaling=1e30)
    product = b.double().numpy().astype(np.longdouble) @ a.double().numpy()
    want = update(state) / np.longdouble(1e30)
    assert np.abs(product - want).max() <= 1e-5 * np.abs(want).max()


# --- LAPACK ------------------------------------------------------------------------------------

WAYS = {"small": ((2, 3, 1), 5, 6, 6), "iterated": ((12,) * 12, 90, 80, 8)}


def fails(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, calls: set[int] | None) -> None:
    """`where.name` raises at the calls of these numbers, or at all."""
    real, made = getattr(where, name), [0]
    error = np.linalg.LinAlgError if where is scipy.linalg else torch.linalg.LinAlgError

    def fail(*args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        if calls is None or made[0] in calls:
            raise error("the algorithm failed to converge")
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, fail)


@pytest.mark.parametrize("calls", [{1}, {1, 2}, {2, 3, 4}, {5, 6, 7, 8}, None])
@pytest.mark.parametrize("name", ["eigh", "eigvalsh", "svd", "cholesky_ex"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("basis", BASES)
def test_a_failure_of_lapack_reaches_nobody(
    monkeypatch: pytest.MonkeyPatch, basis: str, way: str, name: str, calls: set[int] | None
) -> None:
    ranks, d_out, d_in, rank = WAYS[way]
    pairs = drawn(ranks, d_out, d_in)
    want = update(aggregate(pairs, rank=rank, basis=basis))
    fails(monkeypatch, torch.linalg, name, calls)
    found = update(aggregate(pairs, rank=rank, basis=basis))
    assert np.linalg.norm((found - want).astype(float)) <= 1e-5 * np.linalg.norm(want.astype(float))


@pytest.mark.parametrize("basis", BASES)
def test_what_no_driver_solves_is_an_error_of_gloras(
    monkeypatch: pytest.MonkeyPatch, basis: str
) -> None:
    for name in ("eigh", "svd"):
        fails(monkeypatch, torch.linalg, name, None)
        fails(monkeypatch, scipy.linalg, name, None)
    with pytest.raises(GloraError, match="that no driver of LAPACK solves"):
        aggregate(drawn(), rank=3, basis=basis)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_end_in_an_error_of_gloras(value: float) -> None:
    """The Python API names the client; an op looks at no value until LAPACK stumbles over it."""
    p, one = pack(drawn()), torch.ones(3)
    b, a = p.b.clone(), p.a.clone()
    a[1, 2] = value
    t = torch.zeros(6, 3, dtype=torch.float64)
    t[:, 0] = 1
    calls: list[Callable[[], Any]] = [
        *(lambda x=x: OPS.aggregate(b, a, p.offsets, one / 3, one, 3, x) for x in BASES),
        lambda: OPS.canonicalize(b, a, p.offsets, one),
        lambda: OPS.projector_svd(a, p.offsets, t, torch.ones(6), 2),
        lambda: OPS.projector_svd(a, p.offsets, one, 2),
    ]
    for call in calls:
        with pytest.raises(GloraError, match="not finite"):
            call()


# --- work --------------------------------------------------------------------------------------


RUN = Ops(CpuVocabulary())  # the ops' bodies: a mode sees no call inside an op


class Work(TorchDispatchMode):
    """Calls, and the numbers that go into products and decompositions."""

    heavy = ("mm", "bmm", "addmm", "baddbmm", "eigh", "svd", "cholesky", "solve_triangular")

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if any(word in func.__name__ for word in self.heavy):
            leaves = torch.utils._pytree.tree_leaves(args)
            self.numbers += sum(x.numel() for x in leaves if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def work(call: Callable[[], Any]) -> tuple[int, int]:
    with exact_products():
        call()  # plans and seeded signs are made once
        with Work() as seen:
            call()
    return seen.calls, seen.numbers


def assert_no_more_work(call: Callable[[int], Any], enough: int, absurd: int) -> None:
    calls, numbers = work(lambda: call(enough))
    most_calls, most_numbers = work(lambda: call(absurd))
    assert most_numbers == numbers
    assert most_calls <= calls + 8  # pads


@pytest.mark.parametrize("basis", BASES)
def test_a_rank_or_an_oversampling_beyond_the_data_costs_no_work(basis: str) -> None:
    p, one = pack(drawn()), torch.ones(3)
    b, a = [x for x, _ in drawn()], [x for _, x in drawn()]
    wide = pack(drawn((12,) * 12, 14, 15))  # more rows than any route takes at once
    ones = torch.ones(12)
    for call, enough in (
        (lambda r: RUN.aggregate(p.b, p.a, p.offsets, one / 3, one, r, basis), 7),
        (lambda r: RUN.aggregate_list(b, a, one / 3, one, r, basis), 7),
        (lambda q: RUN.aggregate(p.b, p.a, p.offsets, one / 3, one, 4, basis, oversample=q), 16),
        (lambda r: RUN.aggregate(wide.b, wide.a, wide.offsets, ones / 12, ones, r, basis), 16),
        (
            lambda q: RUN.aggregate(
                wide.b, wide.a, wide.offsets, ones / 12, ones, 4, basis, oversample=q
            ),
            16,
        ),
    ):
        assert_no_more_work(call, enough, 400)


def test_a_rank_beyond_the_data_costs_no_work_in_the_parts_either() -> None:
    p, one = pack(drawn()), torch.ones(3)
    t_u, _, _, f = RUN.canonicalize(p.b, p.a, p.offsets, one)
    m = aggregate(drawn(), rank=5).modules[""]
    u, s, v = m.u, m.s, m.v
    eye = torch.eye(5, 2)

    def wide(width: int) -> Tensor:
        return torch.nn.functional.pad(t_u, (0, width - t_u.shape[-1]))

    for call, enough in (
        (lambda r: RUN.canonicalize(p.b, p.a, p.offsets, one, max_rank=r), 3),
        (lambda r: RUN.projector_svd(p.b, p.offsets, t_u, f, r), 7),
        (lambda q: RUN.projector_svd(p.b, p.offsets, t_u, f, 2, oversample=q), 16),
        (lambda r: RUN.projector_svd_factors(p.b, p.offsets, one, r), 7),
        (lambda w: RUN.projector_matmul(p.b, p.offsets, wide(w), f, eye), 3),
        (lambda r: RUN.readout(u, s, v, r, 1.0, "zero"), 5),
        (lambda r: RUN.readout(u, s, v, r, 1.0, "trainable"), 5 + 6),
    ):
        assert_no_more_work(call, enough, 400)


@pytest.mark.parametrize("basis", BASES)
def test_steps_end_where_the_space_is_complete(basis: str) -> None:
    """Twelve clients in three common directions each side: no step finds anything new."""
    rng = torch.Generator().manual_seed(0)
    u, v = torch.randn(90, 3, generator=rng), torch.randn(3, 80, generator=rng)
    pairs = [
        (u @ torch.randn(3, 12, generator=rng), torch.randn(12, 3, generator=rng) @ v)
        for _ in range(12)
    ]
    p, one = pack(pairs), torch.ones(12)

    def call(steps: int) -> Any:
        return RUN.aggregate(p.b, p.a, p.offsets, one / 12, one, 8, basis, power_iters=steps)

    assert work(lambda: call(60)) == work(lambda: call(30))
    with pytest.raises(GloraError, match="power_iters: got 1000000, expected -1"):
        call(10**6)


def test_ranks_that_would_be_nothing_but_padding_are_refused() -> None:
    pairs = drawn()
    state = aggregate(pairs, rank=5)
    assert state.readout(1024)[0].shape == (5, 1024)
    assert aggregate(pairs, rank=1024).rank == 1024
    for call, name in (
        (lambda: aggregate(pairs, rank=2_000_000), "rank"),
        (lambda: aggregate(pairs, oversample=2_000_000), "oversample"),
        (lambda: state.readout(999_999_999), "rank"),
        (lambda: state.readout(999_999_999, pad="trainable"), "rank"),
    ):
        with pytest.raises(GloraError, match=rf"{name}: got \d+, expected at most 1024, "):
            call()
    with pytest.raises(GloraError, match="power_iters: got 10000"):
        aggregate(pairs, power_iters=10_000)


def test_a_rank_beyond_the_data_changes_nothing() -> None:
    """The leading columns are those of any rank that is enough."""
    for basis in BASES:
        enough, more = (aggregate(drawn(), rank=r, basis=basis).modules[""] for r in (7, 40))
        for name in ("u", "s", "v"):
            one, two = getattr(enough, name), getattr(more, name)
            assert torch.equal(one, two[..., :7])
            assert not two[..., 7:].any()


# --- storage limits ----------------------------------------------------------------------------


def steep(dtype: torch.dtype) -> list[Pair]:
    rng = torch.Generator().manual_seed(0)
    fall = 8.0 ** -torch.arange(6)
    pairs = [
        (torch.randn(30, 6, generator=rng) * fall, torch.randn(6, 24, generator=rng))
        for _ in range(3)
    ]
    return [(b.to(dtype), a.to(dtype)) for b, a in pairs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_directions_without_a_vote_are_counted_and_told(dtype: torch.dtype) -> None:
    pairs = steep(dtype)
    with pytest.warns(GloraWarning, match="directions below the precision they were stored in"):
        state = aggregate(pairs, rank=18, basis="projector")
    assert state.modules[""].stat("info_limited") == 3
    assert "have no vote" in state.report()
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in pairs]
    want = reference.aggregate(
        arrays, np.full(3, 1 / 3), np.ones(3), 18, "projector",
        unit_roundoff=torch.finfo(dtype).eps / 2,
    )  # fmt: skip
    scale = np.linalg.norm(want.w_bar)
    lost = np.linalg.norm(want.w_hat - want.w_bar) / scale
    print(f"\n{dtype}, projector: {lost:.1e} of the mean has no vote")
    assert lost > 1e-4  # what is told of
    assert np.linalg.norm(update(state).astype(float) - want.w_hat) < 1e-5 * scale


@pytest.mark.parametrize(
    ("dtype", "basis"),
    [(torch.float32, "projector"), (torch.float64, "projector"), (torch.bfloat16, "consensus"),
     (torch.bfloat16, "update")],
)  # fmt: skip
def test_nothing_is_told_where_every_direction_has_a_vote(dtype: torch.dtype, basis: str) -> None:
    pairs = steep(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GloraWarning)
        state = aggregate(pairs, rank=18, basis=basis)
    assert state.modules[""].stat("info_limited") == 0
    assert_exact(pairs, state)
