"""`core`: C = Σ w_i s_i (UᵀB_i)(A_iV) from the stored factors."""

from __future__ import annotations

import bounds
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, Recipe, build, norm, orthonormal, problems

from glora_ops import GloraError, pack_modules, reference


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_reference(dtype):
    @given(problem=problems((dtype,)), k=st.integers(1, 6), seed=st.integers(0, 99))
    def check(problem, k, seed):
        rng = np.random.default_rng(seed)
        m, n = problem.recipe.m, problem.recipe.n
        u, v = orthonormal(rng, m, min(k, m)), orthonormal(rng, n, min(k + 1, n))
        wide = torch.float64 if dtype == "float64" else torch.float32
        u, v = torch.from_numpy(u).to(wide), torch.from_numpy(v).to(wide)
        packed = problem.packed()
        c = torch.ops.glora.core(
            u,
            v,
            packed.b,
            packed.a,
            packed.offsets,
            torch.from_numpy(problem.weights),
            torch.from_numpy(problem.scaling),
        )
        assert c.dtype == torch.float64
        assert c.shape == (u.shape[1], v.shape[1])
        args = (problem.arrays(), problem.weights, problem.scaling)
        want = reference.core(u.double().numpy(), v.double().numpy(), *args)
        limit = bounds.exact_bound(bounds.storage_scale(*args))
        assert norm(c.numpy() - want) <= limit

    check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_answers_are_rejected(dtype):
    """Zero, the factor mean, unweighted sums and bf16 products miss the bound by far."""
    problem = build(Recipe(seed=1, weights="uneven", scaling="negative", dtype=dtype))
    args = (problem.arrays(), problem.weights, problem.scaling)
    want = reference.core(np.eye(20), np.eye(16), *args)
    limit = bounds.exact_bound(bounds.storage_scale(*args))
    mean = bounds.factor_mean(*args)
    unweighted = reference.core(np.eye(20), np.eye(16), args[0], np.ones(3), problem.scaling)
    coarse = sum(
        w * s * (b.bfloat16() @ a.bfloat16()).double().numpy()
        for (b, a), w, s in zip(problem.clients, problem.weights, problem.scaling, strict=True)
    )
    for wrong in (0 * want, mean, unweighted, coarse):
        assert norm(wrong - want) > 50 * limit


def test_huge_and_tiny_gauges_do_not_overflow():
    problem = build(Recipe(seed=2))
    (b, a), *_ = problem.clients
    plain, far = (pack_modules([[pair]]) for pair in ((b, a), (b * 2.0**100, a * 2.0**-100)))
    u, v = torch.eye(20)[None], torch.eye(16)[None]
    one = torch.ones(1)
    first = torch.ops.glora.core(u, v, plain.b, plain.a, plain.offsets, one, one)
    second = torch.ops.glora.core(u, v, far.b, far.a, far.offsets, one, one)
    assert torch.equal(first, second)


def test_batched_modules_are_bit_equal_to_single_ones():
    many = [build(Recipe(seed=s, ranks=(3, 1, 4))) for s in range(3)]
    batch = pack_modules([p.clients for p in many])
    u, v = torch.randn(3, 20, 4), torch.randn(3, 16, 5)
    w, s = torch.rand(3, 3), torch.randn(3)
    together = torch.ops.glora.core(u, v, batch.b, batch.a, batch.offsets, w, s)
    for l in range(3):
        alone = torch.ops.glora.core(u[l], v[l], batch.b[l], batch.a[l], batch.offsets, w[l], s)
        assert torch.equal(alone, together[l])


def test_metadata_is_checked():
    p = build(Recipe(seed=0)).packed()
    u, v, one = torch.randn(20, 4), torch.randn(16, 4), torch.ones(3)
    op = torch.ops.glora.core
    for args, says in (
        ((u[:19], v, p.b, p.a, p.offsets, one, one), r"^u:"),
        ((u, v[:15], p.b, p.a, p.offsets, one, one), r"^v:"),
        ((u, v, p.b, p.a[:8], p.offsets, one, one), r"^a:"),
        ((u, v, p.b, p.a, p.offsets, torch.ones(2), one), "weights"),
        ((u, v, p.b, p.a, p.offsets, one, torch.ones(4)), "scaling"),
        ((u, v, p.b, p.a, p.offsets.int(), one, one), "offsets"),
    ):
        with pytest.raises(GloraError, match=says):
            op(*args)
