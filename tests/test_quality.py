"""What the server's update is worth: the quality and solver lines of the accuracy contract."""

from __future__ import annotations

import itertools
from collections import defaultdict

import bounds
import numpy as np
import pytest
import torch
from strategies import STATS, distance, norm, orthonormal

from glora_ops import algorithm, pack, reference
from glora_ops.solvers.nspace_exact import exact_limit
from glora_ops.solvers.nspace_iterative import consensus_limit

COUNT, RANK, D = 16, 4, 160


# --- clients of like norms ---------------------------------------------------------------------


def frozen(rng, count=COUNT, r=RANK, m=D, n=D):
    """One A for all, and B that have nothing in common."""
    a = rng.standard_normal((r, n)) / np.sqrt(n)
    return [(rng.standard_normal((m, r)), a) for _ in range(count)]


def disjoint(rng, count=COUNT, r=RANK, m=D, n=D):
    """Orthogonal updates of one spectrum: every eigenvalue of P̄ ties."""
    u, v = orthonormal(rng, m, count * r), orthonormal(rng, n, count * r)
    spectrum = np.linspace(1, 0.5, r)
    return [(u[:, k : k + r] * spectrum, v[:, k : k + r].T) for k in range(0, count * r, r)]


def shared(rng, count=COUNT, r=RANK, m=D, n=D, noise=0.0):
    """One column space and one row space for all, mixed differently, plus noise of one's own."""
    u, v = orthonormal(rng, m, r), orthonormal(rng, n, r)
    middle = np.diag(0.8 ** np.arange(r))
    return [
        (
            u @ (middle + 0.2 * rng.standard_normal((r, r)))
            + noise * rng.standard_normal((m, r)) / np.sqrt(m),
            v.T + noise * rng.standard_normal((r, n)) / np.sqrt(n),
        )
        for _ in range(count)
    ]


def noisy(rng, **shape):
    return shared(rng, noise=0.5, **shape)


def partly(rng, count=COUNT, r=RANK, m=D, n=D):
    """Half of each update in common, half its own."""
    half = r // 2
    u, v = orthonormal(rng, m, half), orthonormal(rng, n, half)
    middle = np.diag(0.7 ** np.arange(half))
    return [
        (
            np.hstack(
                [
                    u @ (middle + 0.3 * rng.standard_normal((half, half))),
                    rng.standard_normal((m, r - half)) / np.sqrt(m),
                ]
            ),
            np.vstack([v.T, rng.standard_normal((r - half, n)) / np.sqrt(n)]),
        )
        for _ in range(count)
    ]


def stored(rng, clients, dtype=torch.float32):
    """In a random gauge of condition 10, as a client would send it."""
    out = []
    for b, a in clients:
        r = b.shape[1]
        left, right = orthonormal(rng, r, r), orthonormal(rng, r, r)
        d = np.geomspace(1, 10, r)
        pair = (b @ (left * d) @ right.T, (right / d) @ left.T @ a)
        out.append(tuple(torch.from_numpy(x).to(dtype) for x in pair))
    return out


class Result:
    """The op, with the dense mean beside it."""

    def __init__(self, clients, rank, basis, weights=None, **settings):
        p = pack(clients)
        k = len(clients)
        w = torch.as_tensor(np.full(k, 1 / k) if weights is None else weights)
        out = torch.ops.glora.aggregate(
            p.b, p.a, p.offsets, w, torch.ones(k), rank, basis, **settings
        )
        self.u, self.s, self.v, *_, self.stats, self.client_stats = out
        arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
        self.w_bar = reference.mean_update(arrays, w.numpy(), np.ones(k))

    def stat(self, name):
        return float(self.stats[STATS.index(name)])

    @property
    def w_hat(self):
        return ((self.u.double() * self.s) @ self.v.double().mT).numpy()

    def readout(self, rank):
        b, a = torch.ops.glora.readout(self.u, self.s, self.v, rank)
        return (b.double() @ a.double()).numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [shared, noisy, partly, disjoint, frozen])
def test_consensus_is_near_the_optimum_on_clients_of_like_norms(make, dtype, seed):
    """R = 2r, rank-r readout; wrong answers (zero, the factor mean, rank r − 1) are far off."""
    rng = np.random.default_rng(seed)
    clients = stored(rng, make(rng), dtype)
    result = Result(clients, 2 * RANK, "consensus")
    size, best = norm(result.w_bar), norm(reference.optimum(result.w_bar, RANK) - result.w_bar)
    limit = bounds.frozen_bound(size) if make is frozen else bounds.quality_bound(best, size)
    assert norm(result.readout(RANK) - result.w_bar) <= limit
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    weights, ones = np.full(COUNT, 1 / COUNT), np.ones(COUNT)
    mean = bounds.factor_mean(arrays, weights, ones)
    assert norm(mean - result.w_bar) > limit
    if make is not disjoint:  # there rank r holds next to nothing, and zero is nearly as good
        assert size > limit
    if make in (shared, frozen):
        assert norm(result.readout(RANK - 1) - result.w_bar) > limit


def test_frozen_a_in_a_narrow_space_costs_more():
    """Six clients of rank 2 in 32 dimensions: the consensus misses its limit, `update` is exact."""
    errors = {"consensus": [], "update": []}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        clients = stored(rng, frozen(rng, count=6, r=2, m=32, n=32))
        for basis, found in errors.items():
            result = Result(clients, 4, basis)
            found.append(distance(result.readout(2), result.w_bar))
    worst = {basis: f"mean {np.mean(e):.3f}, worst {max(e):.3f}" for basis, e in errors.items()}
    print("\nfrozen A, r = 2, d = 32, K = 6:", worst)
    assert bounds.frozen_bound(1.0) < max(errors["consensus"]) < 2 * bounds.frozen_bound(1.0)
    assert np.mean(errors["consensus"]) < bounds.frozen_bound(1.0)
    assert max(errors["update"]) < 1e-6


@pytest.mark.parametrize("make", [shared, noisy, partly, disjoint, frozen])
def test_update_is_the_optimum(make):
    rng = np.random.default_rng(0)
    result = Result(stored(rng, make(rng)), RANK, "update")
    size, best = norm(result.w_bar), norm(reference.optimum(result.w_bar, RANK) - result.w_bar)
    limit = bounds.update_bound(best, size)
    error = norm(result.w_hat - result.w_bar)
    assert error <= limit
    if make is not frozen:
        assert error >= best * (1 - 1e-6)
    # One direction less, the factor mean and zero do not pass.
    for wrong in (result.readout(RANK - 1), 0 * result.w_hat):
        assert norm(wrong - result.w_bar) > limit
    assert result.stat("captured") == pytest.approx(result.stat("attainable"), abs=1e-6)


def loud(rng, noise):
    """Fifteen agree up to noise, one of 100 × their norm does not; and the honest mean."""
    u, v = orthonormal(rng, D, RANK), orthonormal(rng, D, RANK)
    honest = [
        (
            u * 0.8 ** np.arange(RANK) + noise * rng.standard_normal((D, RANK)) / np.sqrt(D),
            v.T + noise * rng.standard_normal((RANK, D)) / np.sqrt(D),
        )
        for _ in range(15)
    ]
    b, a = rng.standard_normal((D, RANK)), rng.standard_normal((RANK, D))
    b *= 100 * norm(honest[0][0] @ honest[0][1]) / norm(b @ a)
    return stored(rng, [*honest, (b, a)]), sum(x @ y for x, y in honest) / 15


@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_one_client_one_voice_under_a_loud_client(noise):
    """Error to the honest mean at R = r."""
    errors = {"consensus": [], "projector": [], "update": []}
    for seed in range(3):
        clients, truth = loud(np.random.default_rng(seed), noise)
        for basis, found in errors.items():
            found.append(distance(Result(clients, RANK, basis).w_hat, truth))
    for consensus, projector in zip(errors["consensus"], errors["projector"], strict=True):
        assert consensus <= bounds.loud_bound(projector)
    assert np.mean(errors["update"]) > 10 * np.mean(errors["consensus"])


SIZES = [(64, 6), (64, 12), (128, 6)]
CONSTANTS = [
    {"anchor": 1.0}, {"anchor": 0.5}, {"anchor": 0.75}, {"anchor": 1.5}, {"anchor": 2.0},
    {"tau_rel": 0.05}, {"tau_rel": 0.2}, {"epsilon": 0.005}, {"epsilon": 0.1},
]  # fmt: skip


def test_the_defaults_keep_every_limit_and_half_the_anchor_does_not(monkeypatch):
    """Few clients in few dimensions, whose spaces overlap by chance: the hardest frozen A.

    R = 2r, rank-r readout, per kind of clients the worst of 10 draws at three sizes: ‖error‖ on
    frozen A (limit 0.12), ‖error‖ − 1.10 × optimum elsewhere (limit 0.03), over ‖W̄‖; beside it the
    error under a loud client over the projector basis's (limit 1.5).
    """
    draws = []
    for (d, count), kind, seed in itertools.product(SIZES, ("equal", "Dirichlet"), range(10)):
        for make in (frozen, disjoint, shared, noisy, partly):
            rng = np.random.default_rng(seed)
            clients = stored(rng, make(rng, count=count, m=d, n=d))
            w = np.full(count, 1 / count) if kind == "equal" else rng.dirichlet(np.ones(count))
            column = f"frozen, {kind}" if make is frozen else make.__name__
            draws.append((column, clients, w))
    heard = [loud(np.random.default_rng(seed), noise) for seed in range(3) for noise in (0.05, 1.0)]
    plain = [distance(Result(clients, RANK, "projector").w_hat, truth) for clients, truth in heard]

    table = {}
    for setting in CONSTANTS:
        settings = dict(setting)
        monkeypatch.setattr(algorithm, "ANCHOR_EPSILON", settings.pop("epsilon", 0.02))
        worst = defaultdict(lambda: -np.inf)
        for column, clients, w in draws:
            result = Result(clients, 2 * RANK, "consensus", w, **settings)
            error, size = norm(result.readout(RANK) - result.w_bar), norm(result.w_bar)
            if "frozen" not in column:
                error -= 1.10 * norm(reference.optimum(result.w_bar, RANK) - result.w_bar)
            worst[column] = max(worst[column], error / size)
        for (clients, truth), projector in zip(heard, plain, strict=True):
            error = distance(Result(clients, RANK, "consensus", **settings).w_hat, truth)
            worst["loud"] = max(worst["loud"], error / projector)
        ((name, value),) = setting.items()
        table[name, value] = dict(worst)
        print(f"\n{name} {value}:", {column: f"{x:.3f}" for column, x in worst.items()}, end="")

    def kept(worst):
        limits = {"loud": bounds.loud_bound(1.0)}
        return all(
            x <= limits.get(column, bounds.frozen_bound(1.0) if "frozen" in column else 0.03)
            for column, x in worst.items()
        )

    assert kept(table["anchor", 1.0])
    assert not kept(table["anchor", 0.5])


@pytest.mark.parametrize(
    ("make", "least"), [(frozen, 0.93), (disjoint, 0.97), (shared, 0.98), (partly, 0.95)]
)
def test_the_anchor_pairs_the_two_sides(make, least):
    """Captured over attainable at R = r, with and without the anchor."""
    ratios = {"consensus": [], "projector": []}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        clients = stored(rng, make(rng))
        for basis, found in ratios.items():
            result = Result(clients, RANK, basis)
            found.append(result.stat("captured") / result.stat("attainable"))
    assert min(ratios["consensus"]) > least
    if make in (frozen, disjoint):
        assert np.mean(ratios["projector"]) < 0.4


# --- the solver against the exact route --------------------------------------------------------


def test_the_route_is_chosen_by_the_number_of_rows():
    rng = np.random.default_rng(0)
    for count, iterative in ((32, 0), (33, 1)):
        assert exact_limit(8) == 128
        clients = stored(rng, shared(rng, count=count, m=40, n=30))
        assert Result(clients, 8, "consensus").stat("iterative") == iterative


@pytest.mark.parametrize("basis", ["consensus", "projector", "update"])
@pytest.mark.parametrize("make", [shared, noisy, partly, frozen])
@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize(("m", "n"), [(90, 70), (400, 360)], ids=["tall blocks", "N-space"])
def test_iterations_keeps_up_with_the_exact_route(make, basis, rank, m, n):
    """N = 320: captured within 1e-3 of the reference's, error ≤ 1.01 × its error + 1e-3·‖W̄‖."""
    rng = np.random.default_rng(0)
    assert (consensus_limit(rank, m, n) >= 320) == (m == 400)
    clients = stored(rng, make(rng, count=80, m=m, n=n))
    result = Result(clients, rank, basis)
    assert result.stat("iterative") == 1
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    want = reference.aggregate(
        arrays, np.full(80, 1 / 80), np.ones(80), rank, basis, unit_roundoff=2.0**-24
    )
    if want.flagged:
        assert result.stat("ambiguous")
        return
    size = norm(want.w_bar)
    assert result.stat("captured") >= bounds.solver_captured(want.captured)
    limit = bounds.solver_bound(norm(want.w_hat - want.w_bar), size)
    assert norm(result.w_hat - result.w_bar) <= limit
    # The certificate is of the update that was returned, up to the probes' estimate of ‖W̄‖.
    true = 1 - (norm(result.w_hat - result.w_bar) / size) ** 2
    assert result.stat("captured") == pytest.approx(true, abs=2e-2)
    assert result.stat("norm") == pytest.approx(size, rel=2e-2)


def test_the_estimated_norm_on_a_flat_spectrum():
    """512 equal directions, of which the iteration meets few: the probes answer for the rest."""
    count, r, d, rank = 32, 16, 1040, 32
    errors = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        u, v = orthonormal(rng, d, count * r), orthonormal(rng, d, count * r)
        clients = [(u[:, k : k + r], v[:, k : k + r].T) for k in range(0, count * r, r)]
        result = Result(stored(rng, clients), rank, "update", seed=seed)
        errors.append(result.stat("norm") / norm(result.w_bar) - 1)
    print(f"relative error of the estimated norm: {np.std(errors):.4f} (one standard deviation)")
    assert np.std(errors) > 1e-4  # exact elsewhere: then this shows nothing
    assert np.abs(errors).max() <= 0.01


@pytest.mark.parametrize("basis", ["consensus", "projector", "update"])
@pytest.mark.parametrize("steps", [-1, 6])
def test_more_steps_in_n_space_never_lose_anything(basis, steps):
    """Nearly dependent clients: N-space is mostly null space, where rounding has room to grow."""
    rng = np.random.default_rng(0)
    count, r, m, n = 20, 8, 1400, 1360
    assert exact_limit(16) < count * r <= consensus_limit(16, m, n)
    shared_u, shared_v = orthonormal(rng, m, r // 2), orthonormal(rng, n, r // 2)
    clients = []
    for _ in range(count):
        b = np.hstack([shared_u, orthonormal(rng, m, r // 2)]) @ rng.standard_normal((r, r))
        b += 0.05 * rng.standard_normal((m, r)) / np.sqrt(m)
        clients.append((b, np.hstack([shared_v, orthonormal(rng, n, r // 2)]).T))
    clients = stored(rng, clients)
    result = Result(clients, 16, basis, power_iters=steps)
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    weights, ones = np.full(count, 1 / count), np.ones(count)
    want = reference.aggregate(arrays, weights, ones, 16, basis, unit_roundoff=2.0**-24)
    assert result.stat("iterative") == 1
    assert result.stat("captured") == pytest.approx(want.captured, abs=1e-3)  # the contract
    # N² overlaps in float32, 6e-8 each, summed: no probes in N-space.
    assert result.stat("norm") == pytest.approx(norm(want.w_bar), rel=1e-5)


def test_mean_projectors_settle_before_the_iteration_stops():
    """One B for all: the row space's eigenvalues lie close, and which are cut decides the core."""
    rng = np.random.default_rng(1)
    count, r, m, n = 14, 16, 244, 443
    b = rng.standard_normal((m, r)) / np.sqrt(m)
    clients = stored(rng, [(b, rng.standard_normal((r, n)) / np.sqrt(n)) for _ in range(count)])
    result = Result(clients, 12, "consensus")
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    weights, ones = np.full(count, 1 / count), np.ones(count)
    want = reference.aggregate(arrays, weights, ones, 12, unit_roundoff=2.0**-24)
    assert result.stat("iterative") == 1
    assert not want.flagged
    assert result.stat("captured") == pytest.approx(want.captured, abs=2e-4)


def test_the_anchor_settles_before_the_iteration_stops():
    """Orthogonal clients: its energies come to rest long before the directions that vote."""
    rng = np.random.default_rng(6)
    count, r, m, n = 46, 4, 198, 294
    b, a = (np.linalg.qr(rng.standard_normal((d, count * r)))[0] for d in (m, n))
    falls = np.exp(-rng.random((count, 1)) * 3 * np.arange(r) / r)
    weights = rng.dirichlet(np.full(count, 0.5)) + 1e-4
    parts = [slice(i * r, i * r + r) for i in range(count)]
    clients = stored(rng, [(b[:, x] * f, a[:, x].T) for x, f in zip(parts, falls, strict=True)])
    p = pack(clients)
    ones = torch.ones(count).double()
    *_, stats, _ = torch.ops.glora.aggregate(p.b, p.a, p.offsets, torch.tensor(weights), ones, 39)
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    want = reference.aggregate(
        arrays, weights / weights.sum(), np.ones(count), 39, unit_roundoff=2.0**-24
    )
    assert stats[STATS.index("iterative")] == 1
    assert not want.flagged
    assert float(stats[STATS.index("captured")]) == pytest.approx(want.captured, abs=2e-4)


@pytest.mark.parametrize("seed", range(4))
def test_n_space_keeps_directions_that_float32_holds(seed):
    """Four large directions and many small ones: columns that mix them round the small ones.

    The same steps in both precisions, apart by a third of what contract (a) allows for rounding.
    """
    p = pack([(torch.tensor(b).float(), torch.tensor(a).float()) for b, a in
              shared(np.random.default_rng(seed), count=100, m=420, n=420, noise=0.3)])  # fmt: skip
    assert exact_limit(16) < p.b.shape[-2] <= consensus_limit(16, 420, 420)
    weights, scaling = torch.full((100,), 0.01, dtype=torch.float64), torch.ones(100).double()
    told = []
    for dtype in (torch.float32, torch.float64):
        u, s, v, _, _, stats, _ = torch.ops.glora.aggregate(
            p.b.to(dtype), p.a.to(dtype), p.offsets, weights, scaling, 16
        )
        told += [dict(zip(STATS, stats.tolist(), strict=True)), (u.double() * s) @ v.double().mT]
    low, found, high, want = told
    assert low["power_iters"] == high["power_iters"]
    limit = bounds.cut_bound(high["storage_scale"], high["kappa_p"], high["kappa_w"])
    assert norm(found - want) <= limit / 3


@pytest.mark.parametrize("basis", ["consensus", "projector", "update"])
@pytest.mark.parametrize(("m", "n"), [(90, 70), (400, 360)], ids=["tall blocks", "N-space"])
def test_iterations_is_exact_where_the_rank_holds_everything(basis, m, n):
    """Spaces of dimension 4 shared by all 80 clients, R = 8: contract (a), exact mode."""
    rng = np.random.default_rng(0)
    clients = stored(rng, shared(rng, count=80, m=m, n=n))
    result = Result(clients, 8, basis)
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    limit = bounds.exact_bound(bounds.storage_scale(arrays, np.full(80, 1 / 80), np.ones(80)))
    assert result.stat("iterative") == 1
    assert norm(result.w_hat - result.w_bar) <= limit


@pytest.mark.parametrize("basis", ["consensus", "update"])
@pytest.mark.parametrize("level", [2e-5, 5e-6, 1e-6])
@pytest.mark.parametrize(("m", "n"), [(200, 180), (400, 360)], ids=["tall blocks", "N-space"])
def test_iterations_is_exact_where_all_but_one_direction_are_weak(level, basis, m, n):
    """Sixteen times one update of rank 12, R = 16: what is weak adds up to many times the bound."""
    rng = np.random.default_rng(0)
    count, r = 16, 12
    u, v = orthonormal(rng, m, r), orthonormal(rng, n, r)
    root = np.sqrt(np.r_[1.0, np.full(r - 1, level)])
    clients = []
    for _ in range(count):
        g = torch.from_numpy(orthonormal(rng, r, r))
        clients.append(((torch.from_numpy(u * root) @ g).float(),
                        (g.mT @ torch.from_numpy(root[:, None] * v.T)).float()))  # fmt: skip
    result = Result(clients, 16, basis)
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
    limit = bounds.exact_bound(
        bounds.storage_scale(arrays, np.full(count, 1 / count), np.ones(count))
    )
    assert result.stat("iterative") == 1
    assert norm(result.w_hat - result.w_bar) <= limit
    assert norm(u[:, :1] @ v[:, :1].T - result.w_bar) > limit


@pytest.mark.parametrize("basis", ["consensus", "update"])
def test_noise_fails_without_power_steps(basis):
    """A spectrum that decays slowly: zero steps miss the solver's contract, three meet it."""
    rng = np.random.default_rng(0)
    m, n, count, r, rank = 150, 140, 100, 4, 8
    decay = np.arange(1, 121) ** -0.35
    u, v = orthonormal(rng, m, 120), orthonormal(rng, n, 120)
    clients = []
    for _ in range(count):
        left = u @ (decay[:, None] * rng.standard_normal((120, r)))
        clients.append((left, (v @ (decay[:, None] * rng.standard_normal((120, r)))).T))
    base = (u * decay) @ v.T
    for k, (b, a) in enumerate(clients):  # something in common, or the mean is noise alone
        j = k % 40
        clients[k] = (
            np.hstack([b, u[:, j : j + 8] * decay[j : j + 8]]),
            np.vstack([a, v[:, j : j + 8].T]),
        )
    assert base.shape == (m, n)
    kept = stored(rng, clients)
    arrays = [(b.double().numpy(), a.double().numpy()) for b, a in kept]
    want = reference.aggregate(
        arrays, np.full(count, 1 / count), np.ones(count), rank, basis, unit_roundoff=2.0**-24
    )
    assert not want.flagged
    captured = {
        q: 1 - distance((x := Result(kept, rank, basis, power_iters=q)).w_hat, x.w_bar) ** 2
        for q in (0, 3, -1)
    }
    assert captured[0] < bounds.solver_captured(want.captured) - 4e-3
    assert captured[3] >= bounds.solver_captured(want.captured)
    assert captured[-1] >= bounds.solver_captured(want.captured)


@pytest.mark.parametrize("power", [-152, -60, -30, 30, 60, 152])
@pytest.mark.parametrize("basis", ["consensus", "projector", "update"])
def test_the_randomized_route_does_not_mind_the_size_of_the_update(basis, power):
    rng = np.random.default_rng(5)
    b = torch.from_numpy(rng.standard_normal((320, 300))).float()
    a = torch.from_numpy(rng.standard_normal((320, 200))).float()
    offsets = torch.arange(0, 321, 16)
    weights, scaling = torch.full((20,), 1 / 20), torch.ones(20)
    want = torch.ops.glora.aggregate(b, a, offsets, weights, scaling, 16, basis)
    for left, right in ((power // 2, power // 2), (power // 2, 0), (0, power // 2)):
        got = torch.ops.glora.aggregate(
            b * 2.0**left, a * 2.0**right, offsets, weights, scaling, 16, basis
        )
        assert got[5][STATS.index("iterative")] == 1
        assert got[0].equal(want[0])
        assert got[2].equal(want[2])
        assert got[1].equal(want[1] * 2.0 ** (left + right))
        assert torch.allclose(got[5][: STATS.index("norm")], want[5][: STATS.index("norm")])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("d", [2, 3, 5, 7, 9, 10, 24])
@pytest.mark.parametrize("basis", ["consensus", "update"])
def test_small_spaces_are_searched_whole(basis, d, seed):
    """A square matrix of signs is often singular, and a direction it misses never comes back."""
    rng = np.random.default_rng(seed)
    for m, n in ((d, 60), (60, d)):
        clients = stored(rng, shared(rng, count=80, r=min(4, d), m=m, n=n))
        result = Result(clients, 8, basis, seed=seed)
        arrays = [(b.double().numpy(), a.double().numpy()) for b, a in clients]
        limit = bounds.exact_bound(bounds.storage_scale(arrays, np.full(80, 1 / 80), np.ones(80)))
        assert result.stat("iterative") == 1
        assert norm(result.w_hat - result.w_bar) <= limit


@pytest.mark.parametrize("basis", ["consensus", "update"])
@pytest.mark.parametrize("known", [0, 1, 8])
@pytest.mark.parametrize(("m", "n", "rank"), [(64, 64, 64), (40, 36, 36), (96, 80, 32)])
def test_a_warm_start_of_lower_rank_loses_nothing(m, n, rank, known, basis):
    """Columns of zeros in `warm_u` and `warm_v` take no other column's place."""
    rng = np.random.default_rng(0)
    clients = [(rng.standard_normal((m, 8)), rng.standard_normal((8, n))) for _ in range(40)]
    kept = stored(rng, clients)
    warm_u, warm_v = (
        torch.from_numpy(np.pad(orthonormal(rng, d, known), ((0, 0), (0, rank - known)))).float()
        for d in (m, n)
    )
    cold = Result(kept, rank, basis)
    warm = Result(kept, rank, basis, warm_u=warm_u, warm_v=warm_v)
    assert warm.stat("iterative") == 1
    assert warm.stat("captured") >= bounds.solver_captured(cold.stat("captured"))
    assert warm.stat("attainable") >= bounds.solver_captured(cold.stat("attainable"))
