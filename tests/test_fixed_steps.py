"""The fixed steps in the CPU's words: its quality beside the exact route, and its blindness.

In the words it is for it runs in test_kernel_ops.py.
"""

from __future__ import annotations

import bounds
import numpy as np
import pytest
import torch
from glora_ops.bindings.cpu import CpuVocabulary
from glora_ops.bindings.ops import Ops
from strategies import BASES, DTYPES, Recipe, build, norm
from test_aggregate import forget_plans, hard_ranks, judge
from test_quality import disjoint, frozen, noisy, partly, shared, stored
from torch.utils._python_dispatch import TorchDispatchMode

from glora_ops import STATS, algorithm, pack, pack_modules, reference
from glora_ops.linalg.orthonormal import cholesky_qr, inverse_cholesky

OPS = Ops(CpuVocabulary(), fixed_steps=True)
LOOKS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "unique", "masked_select"}


@pytest.fixture(params=["tall", "N-space"])
def route(request, monkeypatch) -> str:
    """Both solvers of fixed steps; where a block holds everything there is but one."""
    if request.param == "tall":
        monkeypatch.setattr(algorithm, "fixed_in_nspace", lambda *_: False)
    return request.param


def run(clients, rank, basis, steps, weights=None, scaling=None):
    p, count = pack(clients), len(clients)
    w = torch.full((count,), 1 / count) if weights is None else torch.as_tensor(weights)
    s = torch.ones(count) if scaling is None else torch.as_tensor(scaling)
    with torch.no_grad():
        return OPS.aggregate(p.b, p.a, p.offsets, w, s, rank, basis, power_iters=steps)


def update(out) -> np.ndarray:
    return ((out[0].double() * out[1]) @ out[2].double().mT).numpy()


def stat(out, name: str) -> float:
    return float(out[5][STATS.index(name)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(seed=1, cut="N"),
        Recipe(seed=2, cut="N", widen=4, dead=True, weights="uneven", scaling="negative"),
        Recipe(seed=3, cut="N", kind="frozen", condition=100.0, mute=True),
        Recipe(seed=4, cut="N", kind="aligned", spectrum="deficient"),
        Recipe(seed=5, ranks=(5, 1, 2, 3, 4, 5), cut="N"),
    ],
    ids=lambda r: f"{r.kind}-{r.spectrum}",
)
def test_exact_where_nothing_is_cut(recipe, basis, dtype):
    """Deficient, dead, silent and ragged clients: W̄ itself, within 32·u32·S, wrong answers not."""
    problem = build(Recipe(**(vars(recipe) | {"dtype": dtype})))
    want = judge(problem, basis)
    if basis == "projector" and not hard_ranks(problem).whole:
        pytest.skip("the published rule leaves out what it takes for storage noise")
    limit = bounds.exact_bound(
        bounds.storage_scale(problem.arrays(), problem.weights, problem.scaling)
    )
    got = run(problem.clients, problem.rank, basis, 2, problem.weights, problem.scaling)
    assert norm(update(got) - want.w_bar) <= limit
    for name, value, same in bounds.wrong_answers(
        problem.arrays(), problem.weights, problem.scaling, problem.rank, want.w_bar
    ):
        far = norm(value - want.w_bar)
        assert far > limit or far <= same, name


class SingleGrams(CpuVocabulary):
    def inner(self, y, z):
        return (y.float().mT @ z.float()).double()


def test_weak_directions_need_gram_matrices_beyond_fp32():
    """Singular values down to 1e-4, R = N: within 32·u32·S; with fp32 Gram matrices far beyond."""
    rng = np.random.default_rng(0)
    root = np.logspace(0, -2, 6)
    clients = []
    for _ in range(4):
        u, v, turn = (np.linalg.qr(rng.standard_normal((d, 6)))[0] for d in (80, 70, 6))
        b, a = (u * root) @ turn, turn.T @ (v * root).T
        clients.append((torch.from_numpy(b).float(), torch.from_numpy(a).float()))
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    weights, ones = np.full(4, 0.25), np.ones(4)
    truth = reference.mean_update(arrays, weights, ones)
    limit = bounds.exact_bound(bounds.storage_scale(arrays, weights, ones))
    p = pack(clients)
    for v, holds in ((CpuVocabulary(), True), (SingleGrams(), False)):
        with torch.no_grad():
            out = Ops(v, fixed_steps=True).aggregate(
                p.b, p.a, p.offsets, torch.full((4,), 0.25), torch.ones(4), 24, "update",
                power_iters=2,
            )  # fmt: skip
        assert (norm(update(out) - truth) <= limit) == holds


@pytest.mark.parametrize("basis", ["consensus", "update"])
@pytest.mark.parametrize("make", [shared, noisy, partly, disjoint, frozen])
def test_four_steps_meet_the_solver_contract(make, basis, route):
    """Captured within 1e-3 and error within 1 % of the exact route; no tall step does not."""
    rng = np.random.default_rng(0)
    clients = stored(rng, make(rng))
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    ones = np.ones(len(clients))
    exact = reference.aggregate(arrays, ones / len(clients), ones, 8, basis)
    size = norm(exact.w_bar)
    limit = bounds.solver_bound(norm(exact.w_hat - exact.w_bar), size)
    if make is frozen and basis == "consensus":
        limit = bounds.frozen_bound(size)
    four, none = run(clients, 8, basis, 4), run(clients, 8, basis, 0)
    assert norm(update(four) - exact.w_bar) <= limit
    held = 1 - (norm(exact.w_hat - exact.w_bar) / size) ** 2
    assert 1 - (norm(update(four) - exact.w_bar) / size) ** 2 >= held - 1e-3
    if make is disjoint and route == "tall":
        assert norm(update(none) - exact.w_bar) > limit


def test_certificates_are_near_the_truth(route):
    """The norm, attainable and captured are estimates here: within 5 % of the exact ones."""
    rng = np.random.default_rng(1)
    for make in (noisy, partly):
        clients = stored(rng, make(rng))
        arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
        w = np.full(len(clients), 1 / len(clients))
        truth = reference.mean_update(arrays, w, np.ones(len(clients)))
        best = norm(reference.optimum(truth, 8)) / norm(truth)
        out = run(clients, 8, "consensus", 2)
        assert stat(out, "norm") == pytest.approx(norm(truth), rel=0.05)
        assert stat(out, "attainable") == pytest.approx(best**2, abs=0.05)
        held = norm(update(out)) ** 2 / norm(truth) ** 2
        assert stat(out, "captured") == pytest.approx(held, abs=0.05)


@pytest.mark.parametrize("basis", BASES)
def test_gauges_of_powers_of_two_change_no_bit_and_others_next_to_none(basis):
    problem = build(Recipe(seed=7, ranks=(3, 2, 4), cut="r", spectrum="linear"))
    plain = run(problem.clients, problem.rank, basis, 2)
    powers = [
        (
            b * 2.0 ** torch.arange(9, 9 + b.shape[1]),
            a / 2.0 ** torch.arange(9, 9 + len(a))[:, None],
        )
        for b, a in problem.clients
    ]
    for x, y in zip(run(powers, problem.rank, basis, 2), plain, strict=True):
        assert torch.equal(x, y)
    if basis == "projector":
        return
    turned = []
    for b, a in problem.clients:
        q = torch.linalg.qr(torch.randn(len(a), len(a), dtype=torch.float64))[0]
        turned.append(((b.double() @ q).float(), (q.mT @ a.double()).float()))
    moved = norm(update(run(turned, problem.rank, basis, 2)) - update(plain))
    assert moved < 1e-5 * norm(update(plain))


class Blind(CpuVocabulary):
    """The CPU looks at magnitudes first, the one thing that a GPU's words do not do."""

    def pair(self, b, a, ragged):
        one = torch.ones((), dtype=torch.float64)
        return b, a, one.expand(b.shape[:-1]), one.expand(len(b), ragged.clients)


class Looking(TorchDispatchMode):
    """Counts calls; a call that reads a value is an error."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        values = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        offsets = values and values[0].dtype == torch.int64
        assert name not in LOOKS or offsets, f"{name} looks at a value"
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("basis", BASES)
def test_looks_at_no_value_and_makes_the_same_calls_for_any_number_of_clients_and_modules(
    basis, route
):
    calls, (few, many) = set(), (8, 40) if route == "N-space" else (4, 40)
    for modules, clients in ((1, few), (5, few), (1, many), (3, many)):
        rng = torch.Generator().manual_seed(clients)
        b, a = (torch.randn(modules, 3 * clients, d, generator=rng) for d in (40, 30))
        one = torch.ones(clients)
        forget_plans()
        with torch.no_grad(), Looking() as looking:
            Ops(Blind(), True).aggregate(
                b, a, 3 * torch.arange(clients + 1), one, one, 4, basis, power_iters=1
            )
        calls.add(looking.calls)
    assert max(calls) <= 1.01 * min(calls)  # the CPU's Gram matrices come in chunks


@pytest.mark.parametrize("basis", BASES)
def test_batched_modules_are_single_ones(basis):
    many = [build(Recipe(seed=s, ranks=(3, 1, 4))).clients for s in range(3)]
    batch = pack_modules(many)
    w, s = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([1.0, -2.0, 0.5])
    with torch.no_grad():
        together = OPS.aggregate(batch.b, batch.a, batch.offsets, w, s, 4, basis, power_iters=1)
        for l in range(3):
            alone = OPS.aggregate(
                batch.b[l], batch.a[l], batch.offsets, w, s, 4, basis, power_iters=1
            )
            for x, y in zip(alone, together, strict=True):
                assert torch.equal(x, y[l])


def test_triangular_is_gram_schmidt_and_survives_dependence():
    y = torch.randn(3, 50, 12, dtype=torch.float64)
    y[..., 4] = y[..., 1] + y[..., 2]
    y[..., 7] = 0
    y[..., 9] *= 1e-9
    y[1] = 0
    w = inverse_cholesky(y.mT @ y, 1e-12)
    assert w.tril(-1).abs().max() == 0
    gram = (y @ w).mT @ (y @ w)
    kept = torch.ones(3, 12, dtype=torch.float64)
    kept[:, 4] = kept[:, 7] = kept[1] = 0
    assert torch.allclose(gram, torch.diag_embed(kept), atol=1e-9)
    q = cholesky_qr(CpuVocabulary(), y.float(), passes=2)
    assert torch.allclose((q.mT @ q).double(), torch.diag_embed(kept), atol=1e-6)
