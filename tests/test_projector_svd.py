"""`projector_svd`: leading eigenpairs of the mean projector, exact or by subspace iteration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, Recipe, build, norm, problems
from test_projector_matmul import amplified, coordinates, dense

from glora_ops import GloraError, pack
from glora_ops.solvers.nspace_exact import exact_limit

U32 = 2.0**-24


def orthonormal_or_zero(basis: np.ndarray, tolerance: float) -> int:
    """How many columns are there; the others must be zero."""
    alive = np.linalg.norm(basis, axis=0) > 0
    gram = basis.T @ basis
    assert norm(gram - np.diag(alive.astype(float))) <= tolerance
    return int(alive.sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_eigenpairs_of_the_mean_projector(dtype):
    @given(problem=problems((dtype,), loud=1.0), extra=st.integers(0, 3))
    def check(problem, extra):
        packed, left, right, votes = coordinates(problem)
        rank = problem.rank
        for x, t in (left, right):
            d = x.shape[1]
            dtype_out = torch.float64 if dtype == "float64" else torch.float32
            columns = torch.randn(d, extra, generator=torch.Generator().manual_seed(7)) / d
            p = dense(x, packed.offsets, t, votes)
            p = p + columns.double().numpy() @ columns.double().numpy().T
            basis, lam, explained = torch.ops.glora.projector_svd(
                x, packed.offsets, t, votes, rank, extra=columns.to(dtype_out) if extra else None
            )
            assert basis.shape == (d, rank)
            assert basis.dtype == dtype_out
            assert lam.shape == (rank + 16,)
            want = np.linalg.eigvalsh(p)[::-1]
            top = want[0]
            lam, basis = lam.numpy(), basis.double().numpy()
            # Coordinates of ill-conditioned clients are only as orthonormal as Gram matrices say.
            slack = 1e-9 + 64 * 2.0**-53 * amplified(x, packed.offsets, t, votes)
            k = min(d, len(lam))
            assert (abs(lam[:k] - np.maximum(want[:k], 0)) <= slack * max(top, 1)).all()
            assert (lam[k:] <= slack * max(top, 1)).all()
            have = orthonormal_or_zero(basis, 1e-5)
            assert have <= min(rank, d)
            # The basis captures as much of P as the best one does.
            limit = (
                1e-5 * top + slack + 8 * U32 * np.sqrt(amplified(x, packed.offsets, t, votes) * top)
            )
            captured = np.trace(basis.T @ p @ basis)
            assert captured >= want[:rank].sum() - limit * rank
            if p.trace() > 0:
                assert abs(float(explained) - min(want[:rank].sum() / p.trace(), 1)) <= 1e-6 + slack

    check()


def test_wrong_answers_are_rejected():
    """Random directions, one direction short, or the projector's unweighted sum capture less."""
    problem = build(Recipe(seed=3, weights="uneven", ranks=(3, 3, 3, 3)))
    packed, (x, t), _, votes = coordinates(problem)
    p = dense(x, packed.offsets, t, votes)
    basis, lam, _ = torch.ops.glora.projector_svd(x, packed.offsets, t, votes, 4)
    want = np.linalg.eigvalsh(p)[::-1][:4].sum()

    def captured(q):
        return np.trace(q.T @ p @ q)

    best = basis.double().numpy()
    unweighted = torch.ops.glora.projector_svd(x, packed.offsets, t, (votes > 0).double(), 4)[0]
    assert abs(captured(best) - want) < 1e-5
    assert captured(best[:, :3]) < want - 1e-2
    assert captured(unweighted.double().numpy()) < want - 1e-2
    assert captured(np.linalg.qr(np.random.default_rng(0).standard_normal((20, 4)))[0]) < want - 0.1
    assert abs(float(lam[:4].sum()) - want) < 1e-9


def test_factor_form_agrees_with_the_matmul_of_the_same_projectors():
    packed = build(Recipe(seed=1, ranks=(3, 2, 4), spectrum="linear")).packed()
    w = torch.tensor([0.5, 0.2, 0.3])
    p = torch.ops.glora.projector_matmul.factors(packed.b, packed.offsets, w, torch.eye(20))
    basis, lam, explained = torch.ops.glora.projector_svd.factors(packed.b, packed.offsets, w, 5)
    want, vectors = torch.linalg.eigh(p.double())
    assert torch.allclose(lam[:5], want.flip(0)[:5], atol=1e-6)
    assert torch.allclose((vectors[:, -5:].mT @ basis.double()).svd()[1], torch.ones(5).double())
    assert abs(float(explained) - float(want.flip(0)[:5].sum() / p.trace())) < 1e-6


# --- many rows: subspace iteration --------------------------------------------------------------


def decaying(power: float, d: int = 120, clients: int = 320) -> tuple:
    """Clients of rank one whose directions are noise of slowly decaying covariance."""
    rng = np.random.default_rng(0)
    scale = np.arange(1, d + 1) ** -power
    b = rng.standard_normal((clients, d)) * scale
    packed = pack([(torch.from_numpy(row[:, None]).float(), torch.ones(1, 3)) for row in b])
    assert packed.b.shape[0] > exact_limit(8)
    return packed, torch.full((clients,), 1 / clients)


def captured_by(packed, weights, **settings) -> float:
    basis, _, _ = torch.ops.glora.projector_svd.factors(
        packed.b, packed.offsets, weights, 8, **settings
    )
    unit = torch.nn.functional.normalize(packed.b.double(), dim=1)
    return float((unit @ basis.double()).square().sum() / len(unit))


def test_noise_needs_power_steps():
    """A spectrum that decays slowly: without power steps the contract is missed, with it is met."""
    packed, weights = decaying(0.3)
    unit = torch.nn.functional.normalize(packed.b.double(), dim=1)
    best = float(torch.linalg.eigvalsh(unit.T @ unit / len(unit)).flip(0)[:8].sum())
    none, three, adaptive = (captured_by(packed, weights, power_iters=q) for q in (0, 3, -1))
    assert none < best - 1e-2
    assert three > best - 1e-3
    assert adaptive > best - 2e-3
    assert none < three <= best + 1e-6


def test_more_power_steps_never_hurt():
    packed, weights = decaying(0.2)
    captured = [captured_by(packed, weights, power_iters=q) for q in range(5)]
    assert (np.diff(captured) >= -1e-6).all()


def test_eigenvalues_of_the_iteration_are_lower_bounds():
    packed, weights = decaying(0.5)
    _, lam, explained = torch.ops.glora.projector_svd.factors(packed.b, packed.offsets, weights, 8)
    unit = torch.nn.functional.normalize(packed.b.double(), dim=1)
    want = torch.linalg.eigvalsh(unit.T @ unit / len(unit)).flip(0)
    assert (lam[:24] <= want[:24] + 1e-6).all()
    assert torch.allclose(lam[:8], want[:8], atol=2e-3)
    assert abs(float(explained) - float(want[:8].sum())) < 2e-3


def test_a_warm_basis_replaces_power_steps():
    packed, weights = decaying(0.3)
    found = torch.ops.glora.projector_svd.factors(
        packed.b, packed.offsets, weights, 8, power_iters=5
    )[0]
    cold = captured_by(packed, weights, power_iters=0)
    warm = captured_by(packed, weights, power_iters=0, warm=found)
    assert warm > cold + 1e-2


def test_exact_on_low_rank_and_zero_beyond_it():
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((60, 5)))[0]
    clients = [
        (torch.from_numpy(u @ rng.standard_normal((5, 2))).float(), torch.ones(2, 3))
        for _ in range(160)
    ]
    packed = pack(clients)
    basis, lam, explained = torch.ops.glora.projector_svd.factors(
        packed.b, packed.offsets, torch.full((160,), 1 / 160), 8
    )
    assert orthonormal_or_zero(basis.double().numpy(), 1e-5) == 5
    assert norm(u - basis.double().numpy() @ (basis.double().numpy().T @ u)) < 1e-5
    assert float(lam[:5].sum()) == pytest.approx(2, abs=1e-5)
    assert (lam[5:].abs() < 1e-6).all()
    assert float(explained) == pytest.approx(1, abs=1e-5)


def test_same_seed_same_bits_other_seed_same_space():
    packed, weights = decaying(1.5)
    one, two, other = (
        torch.ops.glora.projector_svd.factors(
            packed.b, packed.offsets, weights, 4, power_iters=4, seed=seed
        )[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert (torch.linalg.svdvals(one.mT @ other) > 0.999).all()


def test_batched_modules_are_bit_equal_to_single_ones():
    packed, weights = decaying(0.5)
    x = torch.stack([packed.b, packed.b.flip(1), packed.b * 2])
    together = torch.ops.glora.projector_svd.factors(x, packed.offsets, weights, 8)
    for l in range(3):
        alone = torch.ops.glora.projector_svd.factors(x[l], packed.offsets, weights, 8)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[l])


def test_metadata_is_checked():
    x, offsets, w = torch.randn(5, 8), torch.tensor([0, 2, 5]), torch.ones(2)
    op = torch.ops.glora.projector_svd.factors
    for wrong, says in (
        ({"rank": 0}, "rank"),
        ({"rank": 2, "oversample": 0}, "oversample"),
        ({"rank": 2, "power_iters": -2}, "power_iters"),
        ({"rank": 2, "tol": 0.0}, "tol"),
        ({"rank": 2, "extra": torch.randn(7, 1)}, "extra"),
        ({"rank": 2, "warm": torch.randn(7, 1)}, "warm"),
    ):
        with pytest.raises(GloraError, match=says):
            op(x, offsets, w, **wrong)
