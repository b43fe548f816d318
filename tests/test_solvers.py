"""Solvers × operators × properties: each solver by name, and each against the exact one."""

from __future__ import annotations

from dataclasses import replace

import bounds
import numpy as np
import pytest
import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.ops import Ops
from strategies import Recipe, build, distance, norm, orthonormal, regauge
from test_aggregate import judge
from test_quality import disjoint, frozen, noisy, partly, shared, stored
from torch.utils._python_dispatch import TorchDispatchMode

from glora_ops import STATS, algorithm, pack, reference
from glora_ops.linalg.ragged import Ragged
from glora_ops.solvers import tall
from glora_ops.solvers.base import Factors, Settings
from glora_ops.solvers.nspace_exact import ExactSolver
from glora_ops.solvers.nspace_iterative import IterativeSolver
from glora_ops.solvers.tall import TallSolver

SOLVERS = {"exact": ExactSolver, "iterative": IterativeSolver, "tall": TallSolver}
EVERY = pytest.mark.parametrize("solver", SOLVERS)
BASES = pytest.mark.parametrize("basis", ["consensus", "projector", "update"])


class Answer:
    """One module by the solver of that name, whatever the number of rows would choose."""

    def __init__(self, solver, clients, rank, basis, weights=None, scaling=None, **settings):
        p, count = pack(clients), len(clients)
        w = np.full(count, 1 / count) if weights is None else weights
        scale = np.ones(count) if scaling is None else scaling
        w, scale = (torch.as_tensor(x).double()[None] for x in (w, scale))
        ragged = Ragged.of(p.offsets, p.b.shape[-2], p.b.device)
        factors = Factors(p.b[None], p.a[None], ragged, scale, torch.finfo(p.b.dtype).eps / 2)
        s = Settings(rank, basis, **settings)
        with torch.no_grad():
            out = algorithm.aggregate(
                SOLVERS[solver](CpuVocabulary(), factors, s), w, s, (None, None)
            )
        self.u, self.s, self.v, *_, self.stats, self.client_stats = (x[0] for x in out)
        self.w_hat = ((self.u.double() * self.s) @ self.v.double().mT).numpy()

    def stat(self, name):
        return float(self.stats[STATS.index(name)])


def by_recipe(solver, problem, basis, **settings):
    return Answer(
        solver, problem.clients, problem.rank, basis, problem.weights, problem.scaling, **settings
    )


HARD = [
    Recipe(seed=1, cut="N"),
    Recipe(seed=2, cut="N", kind="aligned", spectrum="deficient", condition=100.0),
    Recipe(seed=3, cut="N", kind="frozen", condition=100.0, mute=True),
    Recipe(seed=4, cut="N", widen=4, dead=True, weights="uneven", scaling="negative"),
    Recipe(seed=5, ranks=(5, 1, 2, 3, 4, 5), cut="N", weights="one silent"),
    Recipe(seed=6, ranks=(3, 3, 2, 2), kind="cancelling", gap=1e-3, cut="N"),
]


@EVERY
@pytest.mark.parametrize("basis", ["consensus", "update"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("recipe", HARD, ids=lambda r: f"{r.kind}-{r.spectrum}-{r.seed}")
def test_exact_where_the_rank_holds_everything(solver, basis, recipe, dtype):
    """W̄ itself, within 32·u32·S; wrong answers miss the same bound."""
    problem = build(replace(recipe, dtype=dtype))
    want = judge(problem, basis).w_bar
    args = problem.arrays(), problem.weights, problem.scaling
    limit = bounds.exact_bound(bounds.storage_scale(*args))
    wrong = bounds.wrong_answers(*args, problem.rank, want)
    bounds.assert_within(by_recipe(solver, problem, basis).w_hat, want, limit, wrong)


@EVERY
@BASES
@pytest.mark.parametrize("make", [shared, noisy, partly, frozen])
def test_captures_what_the_exact_solver_does(solver, basis, make):
    """Captured within 1e-3 of the reference's, the error within 1.01 × its own + 1e-3·‖W̄‖."""
    rng = np.random.default_rng(0)
    clients = stored(rng, make(rng, count=20, m=180, n=170))
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    want = reference.aggregate(
        arrays, np.full(20, 0.05), np.ones(20), 8, basis, unit_roundoff=2.0**-24
    )
    found, size = Answer(solver, clients, 8, basis), norm(want.w_bar)
    if want.flagged:
        assert found.stat("ambiguous")
        return
    assert found.stat("captured") == pytest.approx(want.captured, abs=1e-3)
    limit = bounds.solver_bound(norm(want.w_hat - want.w_bar), size)
    assert norm(found.w_hat - want.w_bar) <= limit
    assert norm(0 * found.w_hat - want.w_bar) > limit


@EVERY
@BASES
def test_gauge_and_order_change_next_to_nothing(solver, basis):
    problem = build(Recipe(seed=7, m=60, n=50, ranks=(4, 3, 5, 2), kind="partly", dtype="float64"))
    other = regauge(problem, 3, 100.0)
    order = np.array([2, 0, 3, 1])
    turned = replace(
        other,
        clients=[other.clients[i] for i in order],
        weights=other.weights[order],
        scaling=other.scaling[order],
    )
    one, two = (by_recipe(solver, p, basis).w_hat for p in (problem, turned))
    assert distance(two, one) < 1e-7


@EVERY
@BASES
def test_powers_of_two_change_no_bit(solver, basis):
    problem = build(Recipe(seed=8, m=60, n=50, ranks=(4, 3, 5), kind="partly"))
    scaled = []
    for k, (b, a) in enumerate(problem.clients):
        d = 2.0 ** torch.arange(9 * k - 20, 9 * k - 20 + b.shape[1])
        scaled.append((b * d, a / d[:, None]))
    one = by_recipe(solver, problem, basis)
    two = by_recipe(solver, replace(problem, clients=scaled), basis)
    for name in ("u", "s", "v", "stats", "client_stats"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


@EVERY
def test_ties_at_the_cut_are_flagged(solver):
    """Equal, disjoint clients of one spectrum: one of many equally good answers."""
    rng = np.random.default_rng(0)
    u, v = orthonormal(rng, 90, 24), orthonormal(rng, 80, 24)
    clients = [(u[:, k : k + 4], v[:, k : k + 4].T) for k in range(0, 24, 4)]
    clients = [tuple(torch.from_numpy(x.copy()).float() for x in pair) for pair in clients]
    for basis in ("projector", "update"):
        assert Answer(solver, clients, 8, basis).stat("ambiguous")
        assert not Answer(solver, clients, 24, basis).stat("ambiguous")


@EVERY
def test_captured_is_never_above_the_truth(solver):
    """Energies are of what was returned, and the mean's norm is exact where that is cheap."""
    for make in (disjoint, noisy, partly):
        rng = np.random.default_rng(1)
        clients = stored(rng, make(rng))
        found = Answer(solver, clients, 8, "update")
        mean = sum(b.double().numpy() @ a.double().numpy() for b, a in clients) / len(clients)
        truth = 1 - (norm(found.w_hat - mean) / norm(mean)) ** 2
        assert found.stat("captured") <= truth + 1e-4


@pytest.mark.parametrize("solver", ["iterative", "tall"])
@BASES
def test_client_statistics_are_those_of_the_exact_solver(solver, basis):
    rng = np.random.default_rng(2)
    clients = stored(rng, shared(rng, count=12, m=90, n=80, noise=0.05))
    want, found = (Answer(x, clients, 8, basis).client_stats for x in ("exact", solver))
    assert torch.allclose(found, want, rtol=1e-2, atol=5e-3)


@EVERY
def test_without_client_statistics_nothing_else_changes(solver):
    problem = build(Recipe(seed=9, m=60, n=50, ranks=(4, 3, 5), kind="partly", cut="r"))
    full = by_recipe(solver, problem, "update")
    lean = by_recipe(solver, problem, "update", client_statistics=False)
    assert lean.client_stats.shape == (0, 4)
    unknown = {STATS[i] for i in lean.stats.isnan().nonzero()[:, 0].tolist()}
    assert unknown == {"voices", "rho_max", "info_limited"}
    known = ~lean.stats.isnan()
    assert torch.equal(lean.u, full.u)
    assert torch.equal(lean.s, full.s)
    assert torch.allclose(lean.stats[known], full.stats[known], rtol=1e-6)


@pytest.mark.parametrize("basis", ["consensus", "update"])
def test_the_op_gives_the_statistics_for_given_bases(basis):
    rng = np.random.default_rng(3)
    p = pack(stored(rng, noisy(rng)))
    w, s = torch.full((16,), 1 / 16), torch.ones(16)
    u, sigma, v, *_, want = torch.ops.glora.aggregate(p.b, p.a, p.offsets, w, s, 8, basis)
    told = torch.ops.glora.client_stats(p.b, p.a, p.offsets, w, s, u, sigma, v)
    assert torch.allclose(told, want, rtol=1e-4, atol=1e-5)
    other = torch.ops.glora.client_stats(p.b, p.a, p.offsets, w, s, v.flip(1), sigma, u)
    assert not torch.allclose(other, want, rtol=1e-1, atol=1e-2)


@pytest.mark.parametrize("make", [disjoint, partly, frozen, shared])
def test_captured_is_near_the_truth_where_the_norm_is_estimated(make):
    """N² (d_out + d_in) above what N × N Gram matrices may cost: 1e-3 off, as the contract has it.

    One standard deviation over seeds; nothing where the first sketch has missed nothing.
    """
    rng = np.random.default_rng(0)
    clients = stored(rng, make(rng, count=40, r=8, m=1400, n=1360))
    mean = sum(b.double().numpy() @ a.double().numpy() for b, a in clients) / 40
    errors = []
    for seed in range(6):
        found = Answer("tall", clients, 16, "update", seed=seed, client_statistics=False)
        truth = 1 - (norm(found.w_hat - mean) / norm(mean)) ** 2
        errors.append(found.stat("captured") - truth)
    print(f"\n{make.__name__}: {norm(errors) / 6**0.5:.1e}")
    assert norm(errors) / 6**0.5 <= (1e-3 if make in (disjoint, partly) else 1e-6)


@EVERY
@pytest.mark.parametrize("basis", ["consensus", "update"])
@pytest.mark.parametrize(("apart", "condition"), [(1e-3, 10.0), (1e-2, 1e3)])
def test_the_norm_of_what_nearly_cancels_is_told(solver, basis, apart, condition):
    """Clients against clients, in bad gauges: ‖W̄‖ is far below the size of its terms."""
    rng, count, r, m, n = np.random.default_rng(0), 10, 4, 90, 80
    clients = []
    for b, a in zip(rng.standard_normal((5, m, r)), rng.standard_normal((5, r, n)), strict=True):
        for sign in (1, -1):
            left, right = orthonormal(rng, r, r), orthonormal(rng, r, r)
            d = np.geomspace(1, condition, r)
            b_i = sign * b + apart * rng.standard_normal((m, r))
            a_i = a + apart * rng.standard_normal((r, n))
            pair = b_i @ (left * d) @ right.T, (right / d) @ left.T @ a_i
            clients.append(tuple(torch.from_numpy(x).float() for x in pair))
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    weights, ones = np.full(count, 1 / count), np.ones(count)
    size = norm(reference.mean_update(arrays, weights, ones))
    assert bounds.storage_scale(arrays, weights, ones) > 1e3 * size
    assert Answer(solver, clients, 8, basis).stat("norm") == pytest.approx(size, rel=1e-3)


@EVERY
def test_weak_directions_vote_in_any_gauge(solver):
    """Hard votes of directions at 1e-4 of the first, that terms a thousand times as long make."""
    rng, (m, n), count, r = np.random.default_rng(0), (90, 80), 12, 4
    clients = []
    for _ in range(count):
        u, v, left, right = (orthonormal(rng, d, r) for d in (m, n, r, r))
        d = np.geomspace(1, 1e3, r)
        b, a = (u * np.geomspace(1, 1e-4, r)) @ (left * d) @ right.T, (right / d) @ left.T @ v.T
        clients.append((torch.from_numpy(b).float(), torch.from_numpy(a).float()))
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    weights, unit = np.arange(1.0, count + 1) / 78, 2.0**-24
    want = reference.aggregate(arrays, weights, np.ones(count), 6, "projector", unit_roundoff=unit)
    assert not want.flagged
    found = Answer(solver, clients, 6, "projector", weights)
    assert norm(found.w_hat - want.w_hat) <= 1e-3 * norm(want.w_bar)


@pytest.mark.parametrize("solver", ["iterative", "tall"])
def test_what_all_clients_share_is_found_without_a_power_step(solver):
    """What a first block has missed is what rank R must leave: no step is worth its cost."""
    rng = np.random.default_rng(0)
    clients = stored(rng, shared(rng, count=20, m=180, n=170, noise=0.085))
    mean = sum(b.double().numpy() @ a.double().numpy() for b, a in clients) / 20
    found, size = Answer(solver, clients, 8, "update"), norm(mean)
    assert found.stat("power_iters") == 0
    best = norm(reference.optimum(mean, 8) - mean)
    assert norm(found.w_hat - mean) <= bounds.solver_bound(best, size)
    assert norm(0.99 * mean - mean) > bounds.solver_bound(best, size)


@pytest.mark.parametrize("solver", ["iterative", "tall"])
def test_steps_that_are_asked_for_are_taken(solver):
    """Gains of weak directions are below the rounding of the top; only a complete space ends."""
    rng, rank = torch.Generator().manual_seed(0), 8
    u, v = (torch.linalg.qr(torch.randn(160, 144, generator=rng).double()).Q for _ in range(2))
    j = torch.arange(144.0).double()
    sigma = torch.where(j < 4, 1.0, 1e-4 * 0.97**j)
    pairs = zip((u * sigma).float().split(12, 1), v.float().mT.split(12), strict=True)
    found = Answer(solver, list(pairs), rank, "update", np.ones(12), power_iters=8)
    assert ((found.s - sigma[:rank]).abs() < 1e-3 * sigma[:rank]).all()


# --- work ---------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts torch calls that are no views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(x.alias_info for x in func._schema.returns) and not func._schema.is_mutable
        self.count += not view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("basis", "told", "most"),
    [("update", False, 111), ("update", True, 189), ("consensus", True, 278)],
)
def test_small_stacks_take_few_calls(basis, told, most):
    """1024², K = 8, r = 8, R = 16: a call costs more there than what it computes."""
    rng = torch.Generator().manual_seed(0)
    b, a = (torch.randn(64, 1024, generator=rng) for _ in range(2))
    w, ones, offsets = torch.full((8,), 1 / 8), torch.ones(8), torch.arange(0, 65, 8)
    run = Ops(CpuVocabulary()).aggregate  # a mode sees no call inside an op
    run(b, a, offsets, w, ones, 16, basis, client_statistics=told)
    with Calls() as calls:
        run(b, a, offsets, w, ones, 16, basis, client_statistics=told)
    assert calls.count <= most


def test_rows_are_sketched_in_runs_and_what_is_missed_stays_the_same(monkeypatch):
    """Neither the rows of a run nor their number decide, but for the order of a sum."""
    draw = torch.Generator().manual_seed(3)
    b, a = (torch.randn(1, 900, d, generator=draw) for d in (40, 50))
    coef = torch.rand(1, 900, generator=draw, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(1, 40, 6, generator=draw))
    ragged = Ragged.of(torch.arange(0, 901, 3), 900, b.device)
    factors = Factors(b, a, ragged, torch.ones(1, 300).double(), 2.0**-24)
    solver = TallSolver(CpuVocabulary(), factors, Settings(6, "update"))
    images = solver.v.lift(a, coef[..., None] * solver.v.times(b, q))
    counted = []
    sketch = tall.count_sketch

    def spy(stacks, *rest):
        counted.append(stacks[0].shape[-2])
        return sketch(stacks, *rest)

    monkeypatch.setattr(tall, "count_sketch", spy)
    whole = solver._missed(coef, q, images)
    monkeypatch.setattr(tall, "SKETCHED", 256)
    in_runs = solver._missed(coef, q, images)
    assert counted == [900, 900, *[256, 256] * 3, 132, 132]
    assert float((in_runs / whole - 1).abs()) < 1e-5  # u32 times the terms of a sum, cancelling
    dense = b[0].double().mT @ (coef[0, :, None] * a[0])
    left = dense - q[0].double() @ (q[0].double().mT @ dense)
    assert 0.5 < float(whole) / float(left.square().sum()) < 2
