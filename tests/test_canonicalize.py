"""`canonicalize`: ΔW_i = Q_i Σ_i Z_iᵀ from Gram matrices, against QR and SVD in the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, Problem, Recipe, build, distance, norm, problems, regauge

from glora_ops import GloraError, pack, pack_modules, reference

U32, U64 = 2.0**-24, 2.0**-53


def forms(problem: Problem, tau_rel: float = 0.1) -> list[tuple[np.ndarray, ...]]:
    """(Q, σ, Z, f, T_U) of every client, Q and Z made in fp64 from the op's coordinates."""
    packed = problem.packed()
    t_u, t_v, sigma, f = torch.ops.glora.canonicalize(
        packed.b, packed.a, packed.offsets, torch.from_numpy(problem.scaling), tau_rel
    )
    out = []
    for i, (b, a) in enumerate(problem.arrays()):
        rows = slice(int(packed.offsets[i]), int(packed.offsets[i + 1]))
        r = b.shape[1]
        q, z = b @ t_u[rows, :r].numpy(), a.T @ t_v[rows, :r].numpy()
        out.append((q, sigma[rows].numpy(), z, f[rows].numpy(), t_u[rows].numpy()))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_svd_of_each_update(dtype):
    @given(problem=problems((dtype,)))
    def check(problem):
        for (q, sigma, z, f, t_u), (b, a), s in zip(
            forms(problem), problem.arrays(), problem.scaling, strict=True
        ):
            size = reference.storage_norm(b, a, s)
            want = reference.canonical(b, a, s, unit_roundoff=problem.unit)
            r = len(sigma)
            # Nothing beyond the client's own rank, nothing in the padding.
            assert (t_u[:, r:] == 0).all()
            assert (np.diff(sigma) <= 0).all()
            # ΔW comes back to the last digits of fp32 factors, and zero would not pass.
            update = reference.update(b, a, s)
            assert norm((q * sigma) @ z.T - update) <= 4 * U32 * size
            assert size == 0 or norm(update) <= 8 * U32 * size or norm(update) > 4 * U32 * size
            # σ² is as good as a backward error of a few u64·‖G_A‖‖G_B‖.
            full = np.zeros(r)
            full[: len(want.sigma)] = want.sigma
            assert (abs(sigma**2 - full**2) <= 32 * r * U64 * size**2 * (1 + r)).all()
            # Q and Z are orthonormal as far as Gram matrices can tell, dropped columns zero.
            alive = sigma > 0
            for x in (q, z):
                gram = x.T @ x
                assert (gram[~alive] == 0).all()
                slack = 64 * r * U64 * np.outer(*2 * (size / np.where(alive, sigma, np.inf),))
                assert (abs(gram - np.diag(alive.astype(float))) <= slack + 1e-12).all()
            # Soft votes.
            assert (f[~alive] == 0).all()
            if len(want.sigma):
                tau = max(0.1 * sigma[0], 0.5 * problem.unit * size)
                assert np.allclose(f, np.where(alive, sigma**2 / (sigma**2 + tau**2), 0), atol=1e-9)

    check()


@given(problem=problems(("float64",), spectrum="geometric", scaling="negative"))
def test_directions_are_those_of_the_reference(problem):
    for (q, sigma, z, _, _), (b, a), s in zip(
        forms(problem), problem.arrays(), problem.scaling, strict=True
    ):
        want = reference.canonical(b, a, s)
        k = len(want.sigma)
        if k == 0:
            assert (sigma == 0).all()
            continue
        # Compared pairwise, so that the sign of s (it belongs to Z) is seen.
        loss = (reference.storage_norm(b, a, s) / want.sigma[-1]) ** 2 * 1e3 * U64
        for j in range(k):
            mine, theirs = np.outer(q[:, j], z[:, j]), np.outer(want.q[:, j], want.z[:, j])
            assert norm(mine - theirs) <= 1e-9 + loss


@given(problem=problems(("float64",), dead=False), seed=st.integers(0, 99))
def test_singular_values_and_projectors_do_not_depend_on_the_gauge(problem, seed):
    other = regauge(problem, seed, 30.0)
    for mine, theirs, *pairs, s in zip(
        forms(problem),
        forms(other),
        problem.arrays(),
        other.arrays(),
        problem.scaling,
        strict=True,
    ):
        size = max(reference.storage_norm(b, a, s) for b, a in pairs)
        assert (abs(mine[1] - theirs[1]) <= 4 * U32 * size).all()
        soft = [(q * f) @ q.T for q, _, _, f, _ in (mine, theirs)]
        first = max(mine[1][0], 1e-300)
        assert norm(soft[0] - soft[1]) <= 1e-6 + 1e-12 * (size / first) ** 2


def test_power_of_two_gauges_do_not_change_a_bit():
    problem = build(Recipe(seed=5, ranks=(4, 3, 5), dtype="float32"))
    rng = np.random.default_rng(0)
    scaled = []
    for b, a in problem.clients:
        d = torch.from_numpy(2.0 ** rng.integers(-60, 61, b.shape[1])).float()
        scaled.append((b * d, a / d[:, None]))
    one, two = (pack(c) for c in (problem.clients, scaled))
    s = torch.ones(3)
    for x, y in zip(
        torch.ops.glora.canonicalize(one.b, one.a, one.offsets, s)[2:],
        torch.ops.glora.canonicalize(two.b, two.a, two.offsets, s)[2:],
        strict=True,
    ):
        assert torch.equal(x, y)


def test_over_parametrised_updates_have_the_true_rank():
    problem = build(Recipe(seed=1, ranks=(4,), widen=12, dtype="float64"))
    ((_, sigma, _, f, _),) = forms(problem)
    assert sigma.shape == (16,)
    assert int((sigma > 0).sum()) == 4
    assert (f[4:] == 0).all()
    # B's columns alone would say otherwise: they span 4 dimensions too, but not equally.
    ((b, _),) = problem.arrays()
    assert distance(np.linalg.svd(b)[1][:4], sigma[:4]) > 0.1


def test_a_dead_pair_is_dropped_before_any_norm_is_taken():
    (b, a), *_ = build(Recipe(seed=2, ranks=(3,))).clients
    huge = torch.cat([b, torch.full((20, 1), 1e30)], 1), torch.cat([a, torch.zeros(1, 16)])
    with_dead = pack([huge])
    plain = pack([(b, a)])
    s = torch.ones(1)
    want = torch.ops.glora.canonicalize(plain.b, plain.a, plain.offsets, s)
    got = torch.ops.glora.canonicalize(with_dead.b, with_dead.a, with_dead.offsets, s)
    assert torch.allclose(got[2][:3], want[2], rtol=1e-14)
    assert got[2][3] == 0
    assert (got[0][3] == 0).all()


def test_nothing_comes_of_nothing():
    b, a = torch.zeros(3, 5), torch.randn(3, 4)
    for scale in (1.0, 0.0):
        out = torch.ops.glora.canonicalize(
            b if scale else torch.randn(3, 5), a, torch.tensor([0, 1, 3]), torch.full((2,), scale)
        )
        assert all(bool((x == 0).all()) for x in out)


def test_votes_are_softened_by_the_stored_precision():
    """A bf16 gauge of condition 1e4 says little about the weak direction."""
    f = {}
    for dtype in ("float64", "bfloat16"):
        problem = build(Recipe(seed=3, ranks=(3,), condition=1e4, dtype=dtype))
        f[dtype] = forms(problem)[0][3]
    assert f["bfloat16"][0] < 0.9 < f["float64"][0]


def test_tau_rel_zero_counts_every_direction_fully():
    for _, sigma, _, f, _ in forms(build(Recipe(seed=4, dtype="float64")), tau_rel=0.0):
        assert np.allclose(f, sigma > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_modules_are_bit_equal_to_single_ones(dtype):
    problems = [build(Recipe(seed=s, ranks=(3, 1, 4), dtype=dtype)) for s in range(3)]
    batch = pack_modules([p.clients for p in problems])
    s = torch.tensor([1.0, -2.0, 0.5])
    together = torch.ops.glora.canonicalize(batch.b, batch.a, batch.offsets, s)
    for l, p in enumerate(problems):
        one = p.packed()
        alone = torch.ops.glora.canonicalize(one.b, one.a, one.offsets, s)
        for x, y in zip(alone, together, strict=True):
            assert torch.equal(x, y[l])


def test_max_rank_fixes_the_width():
    p = build(Recipe(seed=0)).packed()
    s = torch.ones(3)
    free = torch.ops.glora.canonicalize(p.b, p.a, p.offsets, s)
    wide = torch.ops.glora.canonicalize(p.b, p.a, p.offsets, s, 0.1, 8)
    assert free[0].shape == (9, 4)
    assert wide[0].shape == (9, 8)
    assert torch.allclose(wide[2], free[2], rtol=1e-12)
    with pytest.raises(GloraError, match=r"max_rank.*at least the largest rank, 4"):
        torch.ops.glora.canonicalize(p.b, p.a, p.offsets, s, 0.1, 3)
