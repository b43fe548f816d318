"""The reference against properties that need no second program: who judges the judge.

``pytest tests/test_reference.py -s`` prints the measured numbers that docs/mathematics.md quotes.
"""

from __future__ import annotations

import math

import bounds
import numpy as np
import pytest
from scipy import linalg

from glora_ops import reference

BASES = ("consensus", "projector", "update")
U32 = reference.UNIT_ROUNDOFF["float32"]


# ---- clients -------------------------------------------------------------------------------------


def orthonormal(rng, d, r):
    return np.linalg.qr(rng.standard_normal((d, r)))[0]


def random_clients(rng, ranks=(2, 3, 4), m=20, n=16):
    return [
        (rng.standard_normal((m, r)) * 0.7 ** np.arange(r), rng.standard_normal((r, n)))
        for r in ranks
    ]


def frozen(rng, count=8, r=4, m=48, n=40):
    """One A for all, and B that have nothing in common."""
    a = rng.standard_normal((r, n)) / math.sqrt(n)
    return [(rng.standard_normal((m, r)), a) for _ in range(count)]


def disjoint(rng, count=8, r=4, m=48, n=40):
    """Orthogonal updates of one spectrum: every eigenvalue of P̄ ties."""
    u, v = orthonormal(rng, m, count * r), orthonormal(rng, n, count * r)
    spectrum = np.linspace(1, 0.5, r)
    return [
        (u[:, i * r : (i + 1) * r] * spectrum, v[:, i * r : (i + 1) * r].T) for i in range(count)
    ]


def shared(rng, count=8, r=4, m=48, n=40):
    """One column space and one row space for all, plus a little of one's own."""
    u, v = orthonormal(rng, m, r), orthonormal(rng, n, r)
    middle = np.diag(0.8 ** np.arange(r))
    return [
        (
            u @ (middle + 0.2 * rng.standard_normal((r, r))),
            v.T + 0.1 * rng.standard_normal((r, n)) / math.sqrt(n),
        )
        for _ in range(count)
    ]


def partly_shared(rng, count=8, r=4, m=48, n=40):
    """Half of each update in common, half its own."""
    u, v = orthonormal(rng, m, r // 2), orthonormal(rng, n, r // 2)
    middle = np.diag(0.7 ** np.arange(r // 2))
    return [
        (
            np.hstack(
                [
                    u @ (middle + 0.3 * rng.standard_normal((r // 2, r // 2))),
                    rng.standard_normal((m, r - r // 2)) / math.sqrt(m),
                ]
            ),
            np.vstack([v.T, rng.standard_normal((r - r // 2, n)) / math.sqrt(n)]),
        )
        for _ in range(count)
    ]


def loud(rng, count=15, r=4, m=160, n=160, noise=0.05):
    """``count`` clients that agree up to noise, and one of 100 × their norm that does not."""
    u, v = orthonormal(rng, m, r), orthonormal(rng, n, r)
    honest = [
        (
            u * 0.8 ** np.arange(r) + noise * rng.standard_normal((m, r)) / math.sqrt(m),
            v.T + noise * rng.standard_normal((r, n)) / math.sqrt(n),
        )
        for _ in range(count)
    ]
    b, a = rng.standard_normal((m, r)), rng.standard_normal((r, n))
    b *= 100 * np.linalg.norm(honest[0][0] @ honest[0][1]) / np.linalg.norm(b @ a)
    return honest, (b, a)


def regauged(rng, clients, condition=10.0, stored=np.float64):
    """(BG, G⁻¹A) with cond G as given, rounded to ``stored``."""
    out = []
    for b, a in clients:
        r = b.shape[1]
        left, right = orthonormal(rng, r, r), orthonormal(rng, r, r)
        d = np.geomspace(1, condition, r)
        pair = (b @ (left * d) @ right.T, (right / d) @ left.T @ a)
        out.append(tuple(x.astype(stored).astype(np.float64) for x in pair))
    return out


def equal(clients, total=1.0):
    return np.full(len(clients), total / len(clients)), np.full(len(clients), 2.0)


def distance(x, y):
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


@pytest.fixture
def rng():
    return np.random.default_rng(20261122)


@pytest.fixture
def problem(rng):
    """Three clients of ranks 2, 3, 4 with unequal weights and a negative scaling."""
    return random_clients(rng), np.array([0.5, 0.2, 0.3]), np.array([2.0, -1.0, 0.5])


# ---- one client ----------------------------------------------------------------------------------


def test_unit_roundoff_is_half_the_spacing_above_one():
    for name in ("float64", "float32", "float16"):
        assert reference.UNIT_ROUNDOFF[name] == np.finfo(name).eps / 2
    # bfloat16: the neighbour of 1.0 (0x3f80) in the upper half of a float32 is 0x3f81.
    above = np.array([0x3F81 << 16], np.uint32).view(np.float32)[0]
    assert reference.UNIT_ROUNDOFF["bfloat16"] == (above - 1) / 2


def test_balanced_keeps_every_bit_of_the_product(rng):
    b, a = random_clients(rng, (4,))[0]
    b, a = b * 2.0 ** np.array([40, -3, 0, 7]), a * 3.0
    left, right = reference.balanced(b, a)
    for j in range(4):
        assert np.array_equal(np.outer(left[:, j], right[j]), np.outer(b[:, j], a[j]))
    ratio = np.linalg.norm(right, axis=1) / np.linalg.norm(left, axis=0)
    assert (ratio > 0.49).all()
    assert (ratio < 2.01).all()


def test_balanced_forgets_power_of_two_gauges_and_dead_pairs(rng):
    b, a = random_clients(rng, (4,))[0]
    d = 2.0 ** np.array([300, -300, 1, -17])
    scaled = reference.balanced(b * d, a / d[:, None])
    dead = reference.balanced(
        np.insert(b, [0, 2], [[0.0, 1e300]], axis=1), np.insert(a, [0, 2], [[1.0], [0.0]], axis=0)
    )
    for other in (scaled, dead):
        for x, y in zip(other, reference.balanced(b, a), strict=True):
            assert np.array_equal(x, y)


@pytest.mark.parametrize("s", [2.0, -0.5])
def test_canonical_is_the_svd_of_the_update(rng, s):
    b, a = random_clients(rng, (4,))[0]
    form = reference.canonical(b, a, s)
    sigma = linalg.svdvals(s * b @ a)[:4]
    assert np.allclose(form.sigma, sigma, rtol=1e-12)
    assert np.allclose((form.q * form.sigma) @ form.z.T, s * b @ a, atol=1e-13 * sigma[0])
    assert np.allclose(form.q.T @ form.q, np.eye(4), atol=1e-13)
    assert np.allclose(form.z.T @ form.z, np.eye(4), atol=1e-13)
    assert form.tau == pytest.approx(0.1 * sigma[0])
    assert np.allclose(form.f, sigma**2 / (sigma**2 + form.tau**2))
    assert form.rho >= 1


def test_canonical_of_over_parametrised_pairs_has_the_true_rank(rng):
    """Rank 3 stored at r = 6: copies that add up, copies that cancel, and a mixed basis."""
    b, a = random_clients(rng, (3,))[0]
    mix = rng.standard_normal((3, 6))
    padded = (b @ mix, np.linalg.pinv(mix) @ a)
    split = (np.hstack([b, b]), np.vstack([0.3 * a, 0.7 * a]))
    cancelling = (np.hstack([b, b[:, :1], b[:, :1]]), np.vstack([a, a[:1], -a[:1]]))
    truth = reference.canonical(b, a, 1.0)
    for pair in (padded, split, cancelling):
        for hard in (False, True):
            form = reference.canonical(*pair, 1.0, hard=hard)
            assert len(form.sigma) == 3
            assert np.allclose(form.sigma, truth.sigma, rtol=1e-12)
            assert np.allclose(form.q @ form.q.T, truth.q @ truth.q.T, atol=1e-12)


def test_canonical_of_nothing_is_empty(rng):
    b, a = random_clients(rng, (2,))[0]
    for pair, s in (((b, a), 0.0), ((0 * b, a), 1.0), ((np.hstack([b, b]), np.vstack([a, -a])), 1)):
        form = reference.canonical(*pair, s)
        assert form.q.shape == (20, 0)
        assert form.z.shape == (16, 0)
        assert form.rho == 0


def test_information_limit_takes_over_from_the_relative_term(rng):
    """A badly conditioned gauge stored in bfloat16 carries less of the update, and says so."""
    b, a = random_clients(rng, (3,))[0]
    u = reference.UNIT_ROUNDOFF["bfloat16"]
    assert reference.canonical(b, a, 1.0, unit_roundoff=u).tau < 0.2 * linalg.svdvals(b @ a)[0]
    [(b_bad, a_bad)] = regauged(rng, [(b, a)], 1e4)
    form = reference.canonical(b_bad, a_bad, 1.0, unit_roundoff=u)
    assert form.tau == pytest.approx(0.5 * u * form.rho * form.sigma[0])
    assert form.tau > 0.1 * form.sigma[0]


# ---- invariance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("rank", [3, 9])
def test_gauge_permutation_and_over_parametrisation_change_nothing(rng, problem, basis, rank):
    clients, w, s = problem
    want = reference.aggregate(clients, w, s, rank, basis)
    assert not want.flagged
    order = [2, 0, 1]
    mix = rng.standard_normal((2, 5))
    variants = {
        "gauge": (regauged(rng, clients, 1e3), w, s),
        "permutation": ([clients[i] for i in order], w[order], s[order]),
        "over-parametrised": (
            [(clients[0][0] @ mix, np.linalg.pinv(mix) @ clients[0][1]), *clients[1:]],
            w,
            s,
        ),
        "scaling moved into the factors": (
            [(s_i * b, a) for (b, a), s_i in zip(clients, s, strict=True)],
            w,
            np.ones(3),
        ),
        "a client split in two": (
            [clients[0], *clients],
            np.array([0.2, 0.3, 0.2, 0.3]),
            np.array([2.0, *s]),
        ),
    }
    for name, variant in variants.items():
        got = reference.aggregate(*variant, rank, basis)
        assert distance(got.w_hat, want.w_hat) < 1e-10, name
        assert np.allclose(got.s, want.s, atol=1e-10 * want.s[0]), name
        assert got.captured == pytest.approx(want.captured, abs=1e-10), name
        assert got.kappa_w == pytest.approx(want.kappa_w, rel=1e-6), name


@pytest.mark.parametrize("basis", BASES)
def test_power_of_two_gauge_is_bit_equal(rng, problem, basis):
    clients, w, s = problem
    scaled = []
    for b, a in clients:
        d = 2.0 ** rng.integers(-200, 200, b.shape[1])
        scaled.append((b * d, a / d[:, None]))
    want = reference.aggregate(clients, w, s, 3, basis)
    got = reference.aggregate(scaled, w, s, 3, basis)
    assert np.array_equal(got.u, want.u)
    assert np.array_equal(got.s, want.s)
    assert np.array_equal(got.v, want.v)


@pytest.mark.parametrize("basis", BASES)
def test_unnormalised_weights_scale_the_update_and_not_the_bases(problem, basis):
    clients, w, s = problem
    one = reference.aggregate(clients, w, s, 3, basis)
    many = reference.aggregate(clients, 800 * w, s, 3, basis)
    assert distance(many.w_hat, 800 * one.w_hat) < 1e-12
    assert np.allclose(np.abs(many.u.T @ one.u), np.eye(3), atol=1e-10)
    assert many.captured == pytest.approx(one.captured)


def test_zero_updates_and_zero_weights_have_no_voice(rng, problem):
    clients, w, s = problem
    b, a = clients[0]
    silent = [(np.hstack([b, b]), np.vstack([a, -a])), random_clients(rng, (4,))[0]]
    want = reference.aggregate(clients, w, s, 3)
    got = reference.aggregate([*clients, *silent], [*w, 0.0, 0.0], [*s, 1.0, 1.0], 3)
    assert distance(got.w_hat, want.w_hat) < 1e-12
    # With a vote, a client that cancels still has no direction to vote for.
    votes = reference.anchor_weights([*clients, *silent], [*w, 0.5, 0.0], [*s, 1.0, 1.0])
    assert (votes[:3] > 0).all()
    assert (votes[3:] == 0).all()


# ---- exactness and optimality --------------------------------------------------------------------


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("extra", [0, 1, 30])
def test_exact_at_full_rank(problem, basis, extra):
    """R = dim Σ range ΔW_i = 9, one more, and more than there are dimensions."""
    clients, w, s = problem
    got = reference.aggregate(clients, w, s, 9 + extra, basis)
    size = reference.storage_scale(clients, w, s)
    assert size == pytest.approx(bounds.storage_scale(clients, w, s))
    wrong = bounds.wrong_answers(clients, w, s, 9 + extra, got.w_bar)
    verdict = bounds.assert_within(got.w_hat, got.w_bar, 1e-6 * bounds.exact_bound(size), wrong)
    assert verdict.skipped == ()
    assert got.captured == pytest.approx(1, abs=1e-12)
    assert got.effective_rank == 9
    assert got.gap_u == got.gap_v == 1
    assert not got.flagged
    assert (got.s[9:] == 0).all()
    assert (got.u[:, 9:] == 0).all()
    assert (got.v[:, 9:] == 0).all()


def test_frozen_a_is_the_trap(rng):
    """rank W̄ = 4 is not the rank the consensus needs: dim Σ range ΔW_i = 32 is."""
    clients = frozen(rng)
    w, s = equal(clients)
    errors = {
        (basis, rank): distance(x.w_hat, x.w_bar)
        for basis in BASES
        for rank in (4, 32)
        for x in [reference.aggregate(clients, w, s, rank, basis)]
    }
    assert errors["update", 4] < 1e-13
    assert errors["projector", 4] > 0.5
    assert 1e-3 < errors["consensus", 4] < 0.35
    assert max(errors[basis, 32] for basis in BASES) < 1e-13


@pytest.mark.parametrize("rank", [1, 3, 8, 9, 12])
def test_update_is_the_truncated_svd(problem, rank):
    clients, w, s = problem
    got = reference.aggregate(clients, w, s, rank, "update")
    assert distance(got.w_hat, reference.optimum(got.w_bar, rank)) < 1e-12
    assert got.captured == pytest.approx(got.attainable, abs=1e-13)


def test_optimum_is_scipys():
    w = np.random.default_rng(1).standard_normal((12, 9))
    x, sigma, yt = linalg.svd(w)
    assert np.allclose(reference.optimum(w, 4), x[:, :4] @ np.diag(sigma[:4]) @ yt[:4])
    error = np.linalg.norm(w - reference.optimum(w, 4))
    assert error == pytest.approx(np.sqrt((sigma[4:] ** 2).sum()))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("make", [random_clients, frozen, disjoint, shared, partly_shared])
def test_captured_never_exceeds_attainable(rng, basis, make):
    clients = make(rng)
    w, s = equal(clients)
    for rank in (1, 2, 4, 7, 40):
        got = reference.aggregate(clients, w, s, rank, basis)
        assert 0 <= got.captured <= got.attainable + 1e-12
        assert got.attainable <= 1 + 1e-12
        assert got.share.sum() == pytest.approx(1)
        assert (got.align_left <= 1 + 1e-12).all()
        assert (got.align_right <= 1 + 1e-12).all()
        # The error is what is not captured: Ŵ is a projection of W̄.
        error = distance(got.w_hat, got.w_bar)
        assert error**2 == pytest.approx(1 - got.captured, abs=1e-12)


@pytest.mark.parametrize("basis", BASES)
def test_the_result_is_an_svd_with_fixed_signs(problem, basis):
    clients, w, s = problem
    got = reference.aggregate(clients, w, s, 4, basis)
    assert np.allclose(got.u.T @ got.u, np.eye(4), atol=1e-13)
    assert np.allclose(got.v.T @ got.v, np.eye(4), atol=1e-13)
    assert (np.diff(got.s) <= 0).all()
    top = np.abs(got.u).argmax(axis=0)
    assert (got.u[top, np.arange(4)] > 0).all()
    # Each singular space of Ŵ lies in the basis, and the core has the same singular values.
    u, v, _, _ = reference.bases(clients, w, s, 4, basis)
    assert np.allclose(u @ (u.T @ got.u), got.u, atol=1e-12)
    assert np.allclose(linalg.svdvals(reference.core(u, v, clients, w, s)), got.s)


def test_cancelling_clients_give_zero(rng):
    b, a = random_clients(rng, (3,))[0]
    for basis in BASES:
        got = reference.aggregate([(b, a), (b, a)], [0.5, 0.5], [1.0, -1.0], 2, basis)
        assert (got.w_hat == 0).all()
        assert got.captured == got.attainable == 1
        assert got.effective_rank == 0
        assert np.isfinite([got.kappa_p, got.kappa_w, got.gap_u]).all()


# ---- readout -------------------------------------------------------------------------------------


def test_readouts_are_nested_and_carry_the_scaling(problem):
    clients, w, s = problem
    got = reference.aggregate(clients, w, s, 8)
    b8, a8 = reference.readout(got.u, got.s, got.v, 8, 4.0)
    for r in (1, 3, 5):
        b, a = reference.readout(got.u, got.s, got.v, r, 4.0)
        assert np.array_equal(b, b8[:, :r])
        assert np.array_equal(a, a8[:r])
        assert distance(4.0 * b @ a, reference.optimum(got.w_hat, r)) < 1e-12


def test_trainable_padding_changes_no_bit_of_the_update_and_can_learn(problem):
    clients, w, s = problem
    got = reference.aggregate(clients, w, s, 12)
    zero = reference.readout(got.u, got.s, got.v, 12, 1.0)
    b, a = reference.readout(got.u, got.s, got.v, 12, 1.0, "trainable", seed=3)
    assert got.effective_rank == 9
    assert np.array_equal(b @ a, zero[0] @ zero[1])
    assert (zero[1][9:] == 0).all()
    assert (b[:, 9:] == 0).all()
    unit = a / np.linalg.norm(a, axis=1, keepdims=True)
    assert np.allclose(np.linalg.norm(a[9:], axis=1), 1)
    assert np.allclose(unit @ unit.T, np.eye(12), atol=1e-12)
    # dL/dB = G Aᵀ and dL/dA = BᵀG: a pair learns if either is non-zero.
    g = np.random.default_rng(0).standard_normal((20, 16))
    learns = np.linalg.norm(g @ a.T, axis=0) + np.linalg.norm(b.T @ g, axis=1)
    assert (learns > 0).all()
    again = reference.readout(got.u, got.s, got.v, 12, 1.0, "trainable", seed=3)
    assert np.array_equal(a, again[1])
    # More pairs than d_in has room for: still unit rows.
    _, wide = reference.readout(got.u, got.s, got.v, 20, 1.0, "trainable")
    assert np.allclose(np.linalg.norm(wide[9:], axis=1), 1)


# ---- certificates --------------------------------------------------------------------------------


def test_certificates_predict_what_a_perturbation_does(rng):
    """Storing the factors in fp32 moves Ŵ by u32·S·(1 + κ_P + κ_W) and no more."""
    worst = 0.0
    for make in (random_clients, shared, partly_shared, frozen):
        clients = make(rng)
        w, s = equal(clients)
        for basis in BASES:
            want = reference.aggregate(clients, w, s, 3, basis)
            stored = [tuple(x.astype(np.float32).astype(float) for x in pair) for pair in clients]
            got = reference.aggregate(stored, w, s, 3, basis, unit_roundoff=U32)
            if want.flagged:
                continue
            size = reference.storage_scale(clients, w, s)
            wrong = bounds.wrong_answers(clients, w, s, 3, want.w_hat)
            limit = bounds.cut_bound(size, want.kappa_p, want.kappa_w)
            worst = max(worst, bounds.assert_within(got.w_hat, want.w_hat, limit, wrong).ratio)
    print(f"\nfp32 storage: largest change / bound {worst:.2g}")


@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-2])
def test_near_ties_at_the_cut_are_flagged(rng, gap):
    """σ_R and σ_{R+1} of one client's update, a relative ``gap`` apart: a tie for all three."""
    u, v = orthonormal(rng, 20, 4), orthonormal(rng, 16, 4)
    clients = [(u * np.array([1, 0.5, 0.5 * (1 - gap), 0.1]), v.T)]
    for basis in BASES:
        got = reference.aggregate(clients, [1.0], [1.0], 2, basis)
        # f = 1 ties them all, whatever σ is.
        assert got.flagged == (gap < 1e-3 or basis == "projector"), basis
        if basis != "projector" and gap:
            assert got.kappa_w == pytest.approx(1 / gap, rel=1e-6)


def test_projector_is_not_gauge_invariant_on_frozen_a_with_nested_ranks(rng):
    """Must fail: R̄ ties in whole blocks, P̄ everywhere, and an fp32 gauge decides the cut."""
    a = rng.standard_normal((8, 40)) / math.sqrt(40)
    b, ranks = orthonormal(rng, 48, 28), (2, 4, 8, 8, 4, 2)
    starts = np.cumsum((0, *ranks))
    clients = [(b[:, i : i + r], a[:r]) for i, r in zip(starts, ranks, strict=False)]
    w, s = equal(clients)
    moved = {}
    for basis in BASES:
        first, second = (
            reference.aggregate(
                regauged(rng, clients, 10, np.float32), w, s, 6, basis, unit_roundoff=U32
            )
            for _ in range(2)
        )
        moved[basis] = distance(first.w_hat, second.w_hat)
        if basis == "projector":
            assert first.flagged
            assert second.flagged
    print("\nfp32 gauge of condition 10, frozen nested A:", _show(moved, ".1e"))
    assert moved["projector"] > 1e-2
    assert moved["consensus"] < 1e-5
    assert moved["update"] < 1e-5


# ---- what the consensus is for -------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_one_client_one_voice_under_a_loud_client(noise):
    """15 clients agree, but for noise of ``noise`` × what they share; one is 100 × louder."""
    errors = {name: [] for name in (*BASES, "plain mean votes", "optimum of the honest mean")}
    for seed in range(5):
        honest, noisy = loud(np.random.default_rng(seed), noise=noise)
        w, s = equal([*honest, noisy])
        truth = reference.mean_update(honest, *equal(honest))
        answers = {
            basis: reference.aggregate([*honest, noisy], w, s, 4, basis).w_hat for basis in BASES
        }
        answers["plain mean votes"] = _plain_mean_anchor([*honest, noisy], w, s, 4)
        answers["optimum of the honest mean"] = reference.optimum(truth, 4)
        for name, answer in answers.items():
            errors[name].append(distance(answer, truth))
    mean = {name: float(np.mean(e)) for name, e in errors.items()}
    print(f"\nloud client, noise {noise}, error to the honest mean at R = r:", _show(mean, ".2f"))
    for consensus, projector in zip(errors["consensus"], errors["projector"], strict=True):
        assert consensus <= bounds.loud_bound(projector)
    assert mean["update"] > 10 * mean["consensus"]
    assert mean["plain mean votes"] > (5 if noise == 1 else 1.5) * mean["consensus"]


def _plain_mean_anchor(clients, w, s, rank):
    """What the anchor must not be: W̄ itself votes, and the loud client votes twice."""
    p_bar, r_bar = reference.mean_projectors(clients, w, s)
    w_bar = reference.mean_update(clients, w, s)
    x, sigma, yt = linalg.svd(w_bar, full_matrices=False)
    g = reference.ANCHOR * sigma[:rank] ** 2 / (sigma[:rank] ** 2 + sigma[rank - 1] ** 2)
    u = linalg.eigh(p_bar + (x[:, :rank] * g) @ x[:, :rank].T)[1][:, -rank:]
    v = linalg.eigh(r_bar + (yt[:rank].T * g) @ yt[:rank])[1][:, -rank:]
    return u @ (u.T @ w_bar @ v) @ v.T


def test_captured_energy_over_the_optimum_at_the_clients_rank():
    """Where eigenvalues tie, projectors alone pair unrelated directions; the anchor pairs them."""
    table = {}
    for make in (frozen, disjoint, shared, partly_shared):
        for basis in ("projector", "consensus"):
            ratios = []
            for seed in range(3):
                rng = np.random.default_rng(seed)
                clients = make(rng, count=16, m=160, n=160)
                w, s = equal(clients)
                # Ties are decided by rounding: let an fp32 gauge roll the dice.
                clients = regauged(rng, clients, 10, np.float32)
                got = reference.aggregate(clients, w, s, 4, basis, unit_roundoff=U32)
                ratios.append(got.captured / got.attainable)
            table[make.__name__, basis] = float(np.mean(ratios))
    print("\ncaptured at R = r over the optimum, K = 16, r = 4, d = 160 (projector -> consensus):")
    for make in (frozen, disjoint, shared, partly_shared):
        before, after = (table[make.__name__, basis] for basis in ("projector", "consensus"))
        print(f"  {make.__name__:14s} {before:.3f} -> {after:.3f}")
    assert table["disjoint", "projector"] < 0.1
    assert table["frozen", "projector"] < 0.3
    for kind, least in (
        ("frozen", 0.93),
        ("disjoint", 0.97),
        ("shared", 0.98),
        ("partly_shared", 0.95),
    ):
        assert table[kind, "consensus"] > least
        assert table[kind, "consensus"] > table[kind, "projector"] - 0.01


@pytest.mark.parametrize("basis", BASES)
def test_degenerate_problems_have_defined_results(rng, basis):
    b, a = random_clients(rng, (3,))[0]
    none = (np.zeros((20, 0)), np.zeros((0, 16)))
    problems = {
        "nobody moved": ([(0 * b, a), none], [0.5, 0.5], [1.0, 1.0]),
        "no weight": ([(b, a)], [0.0], [1.0]),
        "no scaling": ([(b, a)], [1.0], [0.0]),
        "one client": ([(b, a)], [1.0], [1.0]),
        "one of rank 0": ([(b, a), none], [0.5, 0.5], [1.0, 1.0]),
        "a row and a column": ([(b[:1, :1], a[:1]), (b[:1, 1:2], a[1:2])], [1.0, 2.0], [1.0, 1.0]),
        "more rank than dimensions": ([(b[:2], a[:, :2])], [1.0], [1.0]),
        "tiny": ([(1e-150 * b, 1e-140 * a)], [1.0], [1.0]),
        "huge": ([(1e150 * b, 1e-20 * a)], [1.0], [1.0]),
    }
    for name, (clients, w, s) in problems.items():
        for rank in (1, 3, 25):
            got = reference.aggregate(clients, w, s, rank, basis)
            m, n = clients[0][0].shape[0], clients[0][1].shape[1]
            assert got.u.shape == (m, rank), name
            assert got.v.shape == (n, rank), name
            for field, value in vars(got).items():
                allowed = np.inf if field.startswith("kappa") and got.flagged else 1e300
                assert (np.abs(np.asarray(value, float)) <= allowed).all(), (name, field)
            if rank >= 3:
                error = np.linalg.norm(got.w_hat - got.w_bar)
                assert error <= 1e-13 * reference.storage_scale(clients, w, s), name


@pytest.mark.parametrize("make", [shared, partly_shared, disjoint, frozen])
def test_readout_quality_of_the_consensus(make):
    """R = 2r, rank-r readout against the best rank-r approximation of W̄."""
    worst = 0.0
    for seed in range(3):
        clients = make(np.random.default_rng(seed), count=16, m=160, n=160)
        w, s = equal(clients)
        got = reference.aggregate(clients, w, s, 8)
        b, a = reference.readout(got.u, got.s, got.v, 4, 1.0)
        norm = np.linalg.norm(got.w_bar)
        best = np.linalg.norm(reference.optimum(got.w_bar, 4) - got.w_bar)
        limit = bounds.frozen_bound(norm) if make is frozen else bounds.quality_bound(best, norm)
        worst = max(worst, float(np.linalg.norm(b @ a - got.w_bar)) / limit)
    print(f"\nreadout quality, {make.__name__}: error / bound {worst:.2f}")
    assert worst <= 1


def test_over_parametrised_client_does_not_blur_the_consensus(rng):
    """A rank-4 update stored at r = 16 says the same as at r = 4, also when rounded to fp32."""
    clients = shared(rng)
    w, s = equal(clients)
    want = reference.aggregate(clients, w, s, 4)
    mixed = []
    for b, a in clients:
        mix = rng.standard_normal((4, 16))
        pair = (b @ mix, np.linalg.pinv(mix) @ a)
        mixed.append(tuple(x.astype(np.float32).astype(np.float64) for x in pair))
    got = reference.aggregate(mixed, w, s, 4, unit_roundoff=U32)
    assert distance(got.w_hat, want.w_hat) < 1e-6
    assert np.allclose(got.align_left, want.align_left, atol=1e-6)


# ---- the tolerances themselves -------------------------------------------------------------------


def test_bounds_reject_wrong_answers_and_report_what_they_skip(rng, problem):
    clients, w, s = problem
    truth = reference.mean_update(clients, w, s)
    limit = bounds.exact_bound(bounds.storage_scale(clients, w, s))
    wrong = bounds.wrong_answers(clients, w, s, 9, truth)
    assert bounds.assert_within(truth, truth, limit, wrong).rejected == (
        "zero",
        "factor mean",
        "best rank R-1",
    )
    for name, value, _ in wrong:
        with pytest.raises(AssertionError, match="error/bound"):
            bounds.assert_within(value, truth, limit, wrong, name)
    with pytest.raises(AssertionError, match="exceeds"):
        bounds.assert_within(truth * np.nan, truth, limit, wrong)
    with pytest.raises(AssertionError, match=r"vacuous.*zero"):
        bounds.assert_within(truth, truth, 2 * np.linalg.norm(truth), wrong)
    # Frozen A at one scaling: averaging factors is right there, and is reported as such.
    same_a = frozen(rng)
    w, s = equal(same_a)
    truth = reference.mean_update(same_a, w, s)
    limit = bounds.exact_bound(bounds.storage_scale(same_a, w, s))
    wrong = bounds.wrong_answers(same_a, w, s, 32, truth)
    verdict = bounds.assert_within(truth, truth, limit, wrong)
    assert verdict.skipped == ("factor mean",)
    assert verdict.rejected == ("zero", "best rank R-1")


def _show(values, spec):
    return ", ".join(f"{name} {value:{spec}}" for name, value in values.items())
