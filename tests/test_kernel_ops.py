"""Whole ops in the CUDA vocabulary: against the reference, counted, and blind where they must be.

In Triton's interpreter, tiny, or on a device. Small eigenproblems are slow to interpret: there
most cases take LAPACK's (those kernels have tests of their own), one of each route takes all.
"""

from __future__ import annotations

from unittest.mock import patch

import bounds
import numpy as np
import pytest
import torch
from glora_ops.bindings import ops as bindings_ops
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.cuda import CudaVocabulary
from glora_ops.bindings.ops import Ops
from glora_ops.kernels.launching import Call, observed
from kernel_cases import DEVICE, poisoned
from strategies import BASES, Recipe, build, norm
from test_aggregate import forget_plans, hard_ranks, judge
from torch.utils._python_dispatch import TorchDispatchMode

from glora_ops import STATS, GloraError, algorithm, pack_modules
from glora_ops.linalg.ragged import Ragged
from glora_ops.linalg.random_signs import sign_matrix


class Quick(CudaVocabulary):
    """With LAPACK's small problems in the interpreter."""

    if DEVICE == "cpu":
        eigh, svd, canonical = CpuVocabulary.eigh, CpuVocabulary.svd, CpuVocabulary.canonical


# torch's own, beside the kernels of a captured `aggregate`: the README's.
OPERATIONS = {
    "tall": {"consensus": 221, "projector": 178, "update": 129},
    "N-space": {"consensus": 290, "projector": 217, "update": 181},
}
KERNELS = {
    "tall": {"consensus": 58, "projector": 40, "update": 39},
    "N-space": {"consensus": 124, "projector": 67, "update": 77},
}
# Clients of rank 16 that each solver of fixed steps takes.
CLIENTS = {"tall": (70, 100), "N-space": (8, 16)}
OPS, WHOLE = Ops(Quick(), fixed_steps=True), Ops(CudaVocabulary(), fixed_steps=True)
CPU = Ops(CpuVocabulary(), fixed_steps=True)
HARD = [
    Recipe(seed=2, cut="N", ranks=(1, 4), widen=1, dead=True, scaling="negative"),
    Recipe(seed=3, cut="N", ranks=(2, 3), kind="frozen", condition=100.0, mute=True),
]


def arguments(problem):
    p = problem.packed()
    w, s = torch.from_numpy(problem.weights), torch.from_numpy(problem.scaling)
    return p.b.to(DEVICE), p.a.to(DEVICE), p.offsets, w.to(DEVICE), s.to(DEVICE)


def update(out) -> np.ndarray:
    return ((out[0].double() * out[1][..., None, :]) @ out[2].double().mT).cpu().numpy()


@pytest.mark.parametrize(("steps", "dtype"), [(-1, "bfloat16"), (1, "float32")])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("recipe", HARD, ids=lambda r: r.kind)
def test_aggregate_against_the_reference(recipe, basis, steps, dtype):
    """R = N: W̄ itself within 32·u32·S, ragged, dead, deficient and silent clients; no stray NaN."""
    problem = build(Recipe(**(vars(recipe) | {"dtype": dtype})))
    if basis == "projector" and not hard_ranks(problem).whole:
        pytest.skip("the published rule leaves out what it takes for storage noise")
    with poisoned(), torch.no_grad():
        out = OPS.aggregate(*arguments(problem), problem.rank, basis, power_iters=steps)
    truth = judge(problem, basis).w_bar
    size = bounds.storage_scale(problem.arrays(), problem.weights, problem.scaling)
    assert norm(update(out) - truth) <= bounds.exact_bound(size)
    for name, value, same in bounds.wrong_answers(
        problem.arrays(), problem.weights, problem.scaling, problem.rank, truth
    ):
        far = norm(value - truth)
        assert far > bounds.exact_bound(size) or far <= same, name


@pytest.mark.parametrize("steps", [-1, 1])
def test_every_kernel_together_where_something_is_cut(steps):
    """Small problems by the kernels too; two modules; the CPU's result to the cut's bound."""
    many = [build(Recipe(seed=s, ranks=(2, 1), spectrum="linear")).clients for s in (1, 2)]
    p = pack_modules(many)
    w, s = torch.tensor([0.7, 0.3]), torch.tensor([1.0, -2.0])
    on = (p.b.to(DEVICE), p.a.to(DEVICE), p.offsets, w.to(DEVICE), s.to(DEVICE), 2)
    settings = {"oversample": 2, "power_iters": steps}
    with poisoned(), torch.no_grad():
        got = WHOLE.aggregate(*on, **settings)
    want = CPU.aggregate(p.b, p.a, p.offsets, w, s, 2, **settings)
    assert norm(update(got) - update(want)) < 1e-5 * norm(update(want))
    for x, y in zip(got[3:], want[3:], strict=True):
        assert torch.allclose(x.cpu(), y, rtol=1e-3, atol=1e-5)


def test_the_iterative_solvers_in_these_words(monkeypatch):
    for module in (algorithm, bindings_ops):
        monkeypatch.setattr(module, "exact_limit", lambda rank: 0)
    problem = build(Recipe(seed=1, ranks=(3, 2), spectrum="linear", cut="r"))
    b, a, offsets, w, s = arguments(problem)
    with poisoned(), torch.no_grad():
        got = OPS.aggregate(b, a, offsets, w, s, problem.rank, oversample=2)
    p = problem.packed()
    want = CPU.aggregate(p.b, p.a, offsets, w.cpu(), s.cpu(), problem.rank, oversample=2)
    assert float(got[5][STATS.index("iterative")]) == 1
    assert norm(update(got) - update(want)) < 1e-4 * norm(update(want))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("steps", [-1, 1])
def test_gauges_of_powers_of_two_change_no_bit(basis, steps):
    """2⁻⁸⁰ … 2⁸⁰ on single rows: products stay in range although nothing is scaled."""
    problem = build(Recipe(seed=7, ranks=(3, 2), cut="r", spectrum="linear"))
    b, a, *rest = arguments(problem)
    power = torch.tensor([80, -80, 3, 0, 40], device=DEVICE).double()[:, None].exp2()
    far = ((b * power).float(), (a / power).float(), *rest)
    with torch.no_grad():
        one = OPS.aggregate(b, a, *rest, problem.rank, basis, power_iters=steps)
        two = OPS.aggregate(*far, problem.rank, basis, power_iters=steps)
    for x, y in zip(one, two, strict=True):
        assert torch.equal(x, y)


def test_the_parts_are_the_cpus():
    problem = build(Recipe(seed=5, ranks=(3, 2, 4)))
    b, a, offsets, w, s = arguments(problem)
    (b0, a0), cpu = (problem.packed().b, problem.packed().a), CPU
    w0, s0 = torch.from_numpy(problem.weights), torch.from_numpy(problem.scaling)
    with poisoned(), torch.no_grad():
        got = OPS.canonicalize(b, a, offsets, s)
        want = cpu.canonicalize(b0, a0, offsets, s0)
        assert torch.allclose(got[2].cpu(), want[2], rtol=1e-12)
        omega = torch.randn(b.shape[1], 5)
        for x, y in (
            (
                OPS.projector_matmul(b, offsets, got[0], got[3], omega.to(DEVICE)),
                cpu.projector_matmul(b0, offsets, want[0], want[3], omega),
            ),
            (
                OPS.projector_matmul_factors(b, offsets, w, omega.to(DEVICE)),
                cpu.projector_matmul_factors(b0, offsets, w0, omega),
            ),
            (
                OPS.core(b.mT[:, :4], a.mT[:, :4], b, a, offsets, w, s),
                cpu.core(b0.mT[:, :4], a0.mT[:, :4], b0, a0, offsets, w0, s0),
            ),
            (
                OPS.projector_svd_factors(b, offsets, w, 4)[1],
                cpu.projector_svd_factors(b0, offsets, w0, 4)[1],
            ),
        ):
            assert norm((x.cpu() - y).numpy()) < 1e-5 * norm(y.numpy())
        state = cpu.aggregate(b0, a0, offsets, w0, s0, 4)[:3]
        for pad in ("zero", "trainable"):
            ours = OPS.readout(*(x.to(DEVICE) for x in state), 6, 0.5, pad)
            for x, y in zip(ours, cpu.readout(*state, 6, 0.5, pad), strict=True):
                assert torch.allclose(x.cpu(), y, atol=1e-6)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor made, the kernels' own included."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = any(x.alias_info for x in func._schema.returns)
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and not views:
                self.numbers = max(self.numbers, x.numel())
        return out


# --- launches ----------------------------------------------------------------------------------


class Between(TorchDispatchMode):
    """Names of torch's own operations that are no views: what a device launches beside kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = torch.utils._pytree.tree_leaves(out)
        makes = any(isinstance(x, torch.Tensor) and x.is_meta for x in made)
        view = any(x.alias_info for x in func._schema.returns) and not func._schema.is_mutable
        if makes and not view and not func.__name__.startswith(("empty", "new_empty", "_unsafe")):
            self.names.append(func.__name__)
        return out


def launches(modules: int, ranks: list[int], basis: str, rank: int = 64) -> list[str]:
    """Kernels of a captured `aggregate` with one step at 4096 × 11008, bf16.

    On meta tensors, which have no values: whatever looked at one would raise.
    """
    offsets = torch.tensor([0, *ranks]).cumsum(0)
    b, a = (
        torch.empty(modules, sum(ranks), d, dtype=torch.bfloat16, device="meta")
        for d in (4096, 11008)
    )
    one = torch.ones(len(ranks), device="meta")
    names: list[str] = []

    def record(call: Call) -> bool:
        names.append(call.name)
        return False

    with torch.no_grad(), observed(record):
        out = WHOLE.aggregate(b, a, offsets, one, one, rank, basis, power_iters=1)
    assert out[0].shape == (modules, 4096, rank)
    return names


@pytest.mark.parametrize("route", CLIENTS)
@pytest.mark.parametrize("basis", BASES)
def test_launches_do_not_depend_on_modules_or_clients(basis, route):
    """The anchor included; the counts are the README's."""
    few, many = CLIENTS[route]
    counts = {
        tuple(launches(modules, [16] * clients, basis))
        for modules, clients in ((1, few), (32, few), (1, many), (32, many))
    }
    assert len(counts) == 1
    (names,) = counts
    assert len(names) == KERNELS[route][basis]
    ragged = launches(4, [4, 16, 64] * (30 if route == "tall" else 3), basis)
    assert sorted(ragged) == sorted([*names, *["canonical_kernel"] * 2])


@pytest.mark.parametrize(("steps", "reads"), [(0, 5), (1, 7), (2, 11)])
def test_a_consensus_reads_the_factors_3_and_4q_times(steps, reads):
    """Gram matrices and first products; 1½ + 2q for the anchor, ½ + 2 max(q, 1) for both bases."""
    b, a = (torch.empty(1, 1120, d, dtype=torch.bfloat16, device="meta") for d in (4096, 11008))
    stacks = {x.untyped_storage()._cdata for x in (b, a)}
    one, found = torch.ones(70), []

    def record(call: Call) -> bool:
        operands = [x for k, x in call.arguments.items() if k in ("X0", "X1")]
        held = {x.untyped_storage()._cdata for x in operands}
        found.extend(held & stacks)
        return False

    with torch.no_grad(), observed(record):
        WHOLE.aggregate(b, a, 16 * torch.arange(71), one, one, 64, power_iters=steps)
    assert len(found) == 2 * reads


@pytest.mark.parametrize("route", CLIENTS)
@pytest.mark.parametrize("basis", BASES)
def test_neither_do_the_operations_between_them(basis, route):
    """No library eigenproblem or factorisation, which no graph can record; sums of splits apart.

    No library product either: with another workspace in a graph it may sum in another order.

    A long contraction of few modules is cut so that it fills the device; its parts are one sum.
    """
    found, (few, many) = [], CLIENTS[route]
    for modules, clients in ((1, few), (64, few), (64, many)):
        launches(modules, [16] * clients, basis)  # plans are made once
        with Between() as between:
            launches(modules, [16] * clients, basis)
        assert not [n for n in between.names if "linalg" in n and "vector_norm" not in n]
        assert not [n for n in between.names if "mm" in n or "matmul" in n]
        found.append(len(between.names))
    cut, *others = found
    assert others == [OPERATIONS[route][basis]] * 2
    assert cut <= OPERATIONS[route][basis] + len(launches(1, [16] * few, basis))


def test_projector_ops_are_one_fused_accumulation_and_its_randomized_svd(monkeypatch):
    """times, fold, fold, accumulate a product with Σ p_i Q_i Q_iᵀ; no basis, nothing d × d."""
    modules, rows, d, k = 2, 1600, 4096, 80
    x, weights = torch.empty(modules, rows, d, device="meta"), torch.ones(100, device="meta")
    offsets, omega = 16 * torch.arange(101), torch.empty(modules, d, k, device="meta")
    calls: list[Call] = []
    with torch.no_grad(), observed(lambda call: calls.append(call) or False), Largest() as largest:
        WHOLE.projector_matmul_factors(x, offsets, weights, omega)
    names = [call.name for call in calls]
    assert names[-4:] == ["product_kernel", "fold_kernel", "fold_kernel", "product_kernel"]
    assert set(names[:-4]) == {"sketch_kernel", "eigh_kernel"}
    assert largest.numbers <= modules * max(rows, d) * k
    for module in (algorithm, bindings_ops):
        monkeypatch.setattr(module, "exact_limit", lambda rank: 0)
    small = torch.randn(1, 8, 100, device=DEVICE)
    calls.clear()
    with torch.no_grad(), observed(lambda call: calls.append(call) or True), Largest() as largest:
        OPS.projector_svd_factors(
            small, 2 * torch.arange(5), torch.ones(4, device=DEVICE), 2, 2, power_iters=1
        )
    assert {"product_kernel", "fold_kernel"} <= {call.name for call in calls}
    assert largest.numbers < 100 * 100


class Copies(TorchDispatchMode):
    """Names of calls that turn a CPU tensor into one on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        here = any(isinstance(x, torch.Tensor) and x.is_cpu and x.dim() for x in args)
        if here and any(x.is_meta for x in torch.utils._pytree.tree_leaves(out) if x is not None):
            self.found.append(func.__name__)
        return out


def test_a_repeated_call_copies_nothing_to_the_device():
    """A graph cannot record such a copy: plans and test matrices are kept."""
    launches(2, [3, 5, 9], "consensus", 7)
    with Copies() as copies:
        launches(2, [3, 5, 9], "consensus", 7)
    assert not copies.found
    with Copies() as copies:
        launches(2, [3, 5, 8], "consensus", 7)
    assert copies.found


def test_nothing_that_is_kept_is_first_made_in_a_recording():
    """It would be in memory that dies with the graph: refused, with the remedy."""
    device = torch.device("cuda")
    forget_plans()
    with patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
        for make in (
            lambda: Ragged.of(torch.tensor([0, 2, 5]), 5, device),
            lambda: sign_matrix(0, "left", 40, 4, torch.float32, device),
        ):
            with pytest.raises(GloraError, match="call once, then record"):
                make()


def test_a_plan_is_whole_from_its_first_use():
    """So that no later op makes an index of it, in a recording or not."""
    forget_plans()
    plan = Ragged.of(torch.tensor([0, 2, 5]), 5, torch.device("meta"))
    made = set(vars(plan))
    b, a = (torch.empty(1, 5, d, device="meta") for d in (12, 10))
    one = torch.ones(2, device="meta")
    with torch.no_grad(), observed(lambda call: False):
        WHOLE.aggregate(b, a, torch.tensor([0, 2, 5]), one, one, 2, power_iters=1)
        WHOLE.canonicalize(b, a, torch.tensor([0, 2, 5]), one)
        WHOLE.projector_matmul_factors(b, torch.tensor([0, 2, 5]), one, b.mT[:, :, :3])
    assert set(vars(Ragged.of(torch.tensor([0, 2, 5]), 5, torch.device("meta")))) <= made | {
        "uniform"
    }


def test_the_gram_route_makes_as_few():
    """Both routes' launches on real data, which adaptive routes need; modules and clients apart."""
    seen = set()
    for modules, clients in ((1, 2), (2, 2), (1, 4)):
        b, a = (torch.randn(modules, 2 * clients, d, device=DEVICE) for d in (20, 16))
        names: list[str] = []
        one = torch.ones(clients, device=DEVICE)
        with torch.no_grad(), observed(lambda call, to=names: to.append(call.name) or True):
            OPS.aggregate(b, a, 2 * torch.arange(clients + 1), one, one, 3)
        seen.add(len(names))
    assert len(seen) == 1


# --- fixed steps in N-space ----------------------------------------------------------------------


def many_clients(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Two modules with more rows (14) than a block of 2 + 2 columns, ragged, one client empty."""
    rng, marks = torch.Generator().manual_seed(1), torch.tensor([0, 4, 6, 6, 11, 14])
    b, a = (
        torch.randn(2, 14, d, generator=rng)
        + torch.randn(2, 14, 3, generator=rng) @ torch.randn(2, 3, d, generator=rng)
        for d in (24, 19)
    )
    return b.to(dtype).to(DEVICE), a.to(dtype).to(DEVICE), marks


@pytest.mark.parametrize(
    ("basis", "dtype", "ops"),
    [
        ("consensus", torch.float32, WHOLE),
        ("consensus", torch.bfloat16, OPS),
        ("projector", torch.float16, OPS),
        ("update", torch.float32, OPS),
    ],
)
def test_n_space_in_these_words_is_the_cpus(basis, dtype, ops):
    """No stray NaN, nothing left unwritten; the first with small problems by the kernels too."""
    b, a, marks = many_clients(dtype)
    w, s = torch.full((5,), 0.2), torch.tensor([1.0, 1, 1, -2, 0.5])
    settings = {"basis": basis, "oversample": 2, "power_iters": 1}
    calls: list[Call] = []
    with poisoned(), torch.no_grad(), observed(lambda call: calls.append(call) or True):
        got = ops.aggregate(b, a, marks, w.to(DEVICE), s.to(DEVICE), 2, **settings)
    assert "metric_product_kernel" in {call.name for call in calls}
    want = CPU.aggregate(b.cpu(), a.cpu(), marks, w, s, 2, **settings)
    assert norm(update(got) - update(want)) < 1e-4 * norm(update(want))
    for x, y in zip(got[3:], want[3:], strict=True):
        assert torch.allclose(x.cpu(), y, rtol=1e-2, atol=1e-4)


def test_n_space_in_a_gauge_of_large_powers_of_two_changes_no_bit():
    """2⁻⁸⁰ … 2⁸⁰: squares of rows stay in range although nothing else is scaled."""
    b, a, marks = many_clients()
    one, power = torch.ones(5, device=DEVICE), torch.linspace(-80, 80, 14, device=DEVICE)
    power = power.round().double()[:, None].exp2()
    far = (b * power).float(), (a / power).float()
    with torch.no_grad():
        plain = OPS.aggregate(b, a, marks, one, one, 2, oversample=2, power_iters=1)
        gauged = OPS.aggregate(*far, marks, one, one, 2, oversample=2, power_iters=1)
    for x, y in zip(plain, gauged, strict=True):
        assert torch.equal(x, y)
