"""`projector_matmul`: y = Σ_i x_iᵀ T_i diag(c_i) T_iᵀ x_i Ω, and the form for raw factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, Problem, Recipe, build, norm, problems

from glora_ops import GloraError, pack_modules

U32, U64 = 2.0**-24, 2.0**-53


def coordinates(problem: Problem):
    packed = problem.packed()
    s = torch.from_numpy(problem.scaling)
    t_u, t_v, _, f = torch.ops.glora.canonicalize(packed.b, packed.a, packed.offsets, s)
    owner = torch.repeat_interleave(packed.offsets.diff())
    votes = torch.from_numpy(problem.weights)[owner] * f
    return packed, (packed.b, t_u), (packed.a, t_v), votes


def dense(x, offsets, t, c) -> np.ndarray:
    """The sum of weighted projectors itself, d × d, fp64."""
    x, t, c = x.double().numpy(), t.numpy(), c.numpy()
    total = np.zeros((x.shape[1], x.shape[1]))
    for lo, hi in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        basis = x[lo:hi].T @ t[lo:hi, : hi - lo]
        total += (basis * c[lo:hi]) @ basis.T
    return total


def amplified(x, offsets, t, c) -> float:
    """Σ c ‖|x|ᵀ|t|‖²: what cancellation inside xᵀT can cost, in units of rounding."""
    x, t = x.double().abs(), t.abs()
    total = 0.0
    for lo, hi in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        reach = x[lo:hi].norm() * t[lo:hi].norm(dim=0)[: hi - lo]
        total += float((reach.square() * c[lo:hi]).sum())
    return total


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_mean_projector_times_omega(dtype):
    @given(problem=problems((dtype,)), columns=st.integers(1, 7), seed=st.integers(0, 99))
    def check(problem, columns, seed):
        packed, left, right, votes = coordinates(problem)
        for x, t in (left, right):
            omega = torch.randn(
                x.shape[1], columns, generator=torch.Generator().manual_seed(seed)
            ).double()
            y = torch.ops.glora.projector_matmul(
                x,
                packed.offsets,
                t,
                votes,
                omega.to(torch.float64 if dtype == "float64" else torch.float32),
            )
            assert y.dtype == (torch.float64 if dtype == "float64" else torch.float32)
            assert y.is_contiguous()
            p = dense(x, packed.offsets, t, votes)
            want = p @ (omega if dtype == "float64" else omega.float().double()).numpy()
            unit = U64 if dtype == "float64" else U32
            limit = 8 * unit * amplified(x, packed.offsets, t, votes) * norm(omega.numpy())
            limit += 1e-300
            assert norm(y.double().numpy() - want) <= limit

    check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_answers_are_far_away(dtype):
    """The bound above on a healthy problem rejects zero, x xᵀΩ and unweighted projectors."""
    problem = build(Recipe(seed=3, weights="uneven", dtype=dtype))
    packed, (x, t), _, votes = coordinates(problem)
    omega = torch.randn(20, 5)
    want = dense(x, packed.offsets, t, votes) @ omega.double().numpy()
    limit = 8 * U32 * amplified(x, packed.offsets, t, votes) * norm(omega.numpy())
    y = torch.ops.glora.projector_matmul(x, packed.offsets, t, votes, omega)
    assert norm(y.numpy() - want) <= limit
    raw = x.double().numpy().T @ x.double().numpy() @ omega.double().numpy()
    unweighted = dense(x, packed.offsets, t, torch.ones_like(votes)) @ omega.double().numpy()
    for wrong in (0 * want, raw, unweighted):
        assert norm(wrong - want) > 100 * limit


@given(problem=problems(("float64", "float32", "bfloat16"), spectrum="linear", condition=10.0))
def test_factor_form_is_the_orthogonal_projector_on_each_row_space(problem):
    packed = problem.packed()
    weights = torch.from_numpy(problem.weights)
    for x in (packed.b, packed.a):
        d = x.shape[1]
        omega = torch.randn(d, 3, generator=torch.Generator().manual_seed(0)).to(torch.float64)
        y = torch.ops.glora.projector_matmul.factors(x, packed.offsets, weights, omega)
        want = np.zeros((d, 3))
        hardest = 1.0
        for w, lo, hi in zip(
            problem.weights, packed.offsets[:-1].tolist(), packed.offsets[1:].tolist(), strict=True
        ):
            rows = x[lo:hi].double().numpy()
            length = np.linalg.norm(rows, axis=1)
            if not length.any():
                continue
            rows = rows[length > 0] / length[length > 0, None]
            _, sigma, vt = np.linalg.svd(rows, full_matrices=False)
            if ((sigma > 1e-9 * sigma[0]) & (sigma < 1e-4 * sigma[0])).any():
                return  # a rank that fp64 Gram matrices cannot decide
            kept = vt[sigma > 1e-6 * sigma[0]]
            hardest = max(hardest, sigma[0] / sigma[len(kept) - 1])
            want += w * kept.T @ (kept @ omega.numpy())
        unit = U64 if x.dtype == torch.float64 else U32
        limit = 64 * unit * hardest * norm(omega.numpy()) + 64 * U64 * hardest**2 * norm(
            omega.numpy()
        )
        assert norm(y.double().numpy() - want) <= limit


def test_factor_form_of_redundant_rows_counts_each_direction_once():
    x = torch.eye(4)[[0, 0, 1, 2]] * torch.tensor([1.0, 1e-3, 5.0, 2.0])[:, None]
    y = torch.ops.glora.projector_matmul.factors(
        x, torch.tensor([0, 3, 4]), torch.tensor([0.75, 0.25]), torch.eye(4)
    )
    assert torch.allclose(y, torch.diag(torch.tensor([0.75, 0.75, 0.25, 0.0])), atol=1e-6)


def test_batched_modules_are_bit_equal_to_single_ones():
    many = [build(Recipe(seed=s, ranks=(3, 1, 4))) for s in range(3)]
    batch = pack_modules([p.clients for p in many])
    t, _, _, f = torch.ops.glora.canonicalize(batch.b, batch.a, batch.offsets, torch.ones(3))
    omega = torch.randn(3, 20, 4)
    w = torch.tensor([0.5, 0.2, 0.3])
    fused = torch.ops.glora.projector_matmul(batch.b, batch.offsets, t, f, omega)
    plain = torch.ops.glora.projector_matmul.factors(batch.b, batch.offsets, w, omega)
    for l in range(3):
        one = torch.ops.glora.projector_matmul(batch.b[l], batch.offsets, t[l], f[l], omega[l])
        assert torch.equal(fused[l], one)
        one = torch.ops.glora.projector_matmul.factors(batch.b[l], batch.offsets, w, omega[l])
        assert torch.equal(plain[l], one)


def test_metadata_is_checked():
    x, offsets, t = torch.randn(5, 8), torch.tensor([0, 2, 5]), torch.zeros(5, 3)
    op = torch.ops.glora.projector_matmul
    with pytest.raises(GloraError, match="omega"):
        op(x, offsets, t, torch.ones(5), torch.randn(7, 2))
    with pytest.raises(GloraError, match="row_weights"):
        op(x, offsets, t, torch.ones(4), torch.randn(8, 2))
    with pytest.raises(GloraError, match=r"^t:"):
        op(x, offsets, t[:4], torch.ones(5), torch.randn(8, 2))
    with pytest.raises(GloraError, match="offsets"):
        op(x, torch.tensor([0, 2, 6]), t, torch.ones(5), torch.randn(8, 2))
    with pytest.raises(GloraError, match="weights"):
        op.factors(x, offsets, torch.ones(3), torch.randn(8, 2))
