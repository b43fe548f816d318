"""`readout`: nested slices of one SVD, and padding that can be trained on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Recipe, aggregate, build, norm, problems

from glora_ops import GloraError, reference

U32 = 2.0**-24


def stored(seed: int = 0, rank: int = 8, real: int = 5, m: int = 20, n: int = 16):
    """An SVD of `real` directions in a state of rank `rank`."""
    rng = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(m, rank, generator=rng))
    v, _ = torch.linalg.qr(torch.randn(n, rank, generator=rng))
    s = 2.0 ** -torch.arange(rank, dtype=torch.float64)
    s[real:] = 0
    alive = (s > 0).float()
    return u * alive, s, v * alive


@given(
    problem=problems(("float32", "float64")),
    rank=st.integers(1, 12),
    scaling=st.sampled_from([0.25, 1.0, 2.0, 7.3]),
)
def test_is_the_best_approximation_of_the_servers_update(problem, rank, scaling):
    answer = aggregate(problem, "consensus")
    b, a = torch.ops.glora.readout(answer.u, answer.s, answer.v, rank, scaling)
    assert b.shape == (problem.recipe.m, rank)
    assert a.shape == (rank, problem.recipe.n)
    assert b.is_contiguous()
    assert a.is_contiguous()
    update = scaling * (b.double() @ a.double()).numpy()
    best = reference.optimum(answer.w_hat, rank)
    slack = 32 * U32 * norm(answer.w_hat)
    assert norm(update - answer.w_hat) <= norm(best - answer.w_hat) + slack
    want_b, want_a = reference.readout(
        answer.u.double().numpy(), answer.s.double().numpy(), answer.v.double().numpy(),
        rank, scaling,
    )  # fmt: skip
    assert norm(b.double().numpy() - want_b) <= 4 * U32 * norm(want_b)
    assert norm(a.double().numpy() - want_a) <= 4 * U32 * norm(want_a)
    # Balanced: both factors carry √S.
    assert norm(b.double().numpy()) == pytest.approx(norm(a.double().numpy()), rel=1e-4)


@pytest.mark.parametrize("pad", ["zero", "trainable"])
def test_readouts_are_nested_bit_for_bit(pad):
    u, s, v = stored()
    b12, a12 = torch.ops.glora.readout(u, s, v, 12, 2.0, pad, 3)
    for rank in range(1, 12):
        b, a = torch.ops.glora.readout(u, s, v, rank, 2.0, pad, 3)
        assert torch.equal(b, b12[:, :rank])
        assert torch.equal(a, a12[:rank])


@pytest.mark.parametrize("rank", [3, 5, 8, 12])
def test_padding_does_not_change_the_update_by_a_bit(rank):
    u, s, v = stored()
    zero = torch.ops.glora.readout(u, s, v, rank, 2.0, "zero")
    trainable = torch.ops.glora.readout(u, s, v, rank, 2.0, "trainable", 7)
    assert torch.equal(zero[0], trainable[0])
    assert torch.equal(zero[0] @ zero[1], trainable[0] @ trainable[1])
    assert (zero[1][5:] == 0).all()
    assert (trainable[0][:, 5:] == 0).all()


def test_trainable_rows_are_seeded_unit_rows_orthogonal_to_the_others():
    u, s, v = stored()
    a = torch.ops.glora.readout(u, s, v, 12, 1.0, "trainable", 7)[1].double()
    unit = torch.nn.functional.normalize(a, dim=1)
    assert torch.allclose(a[5:].norm(dim=1), torch.ones(7).double(), atol=1e-6)
    assert torch.allclose(unit @ unit.mT, torch.eye(12).double(), atol=1e-5)
    again = torch.ops.glora.readout(u, s, v, 12, 1.0, "trainable", 7)[1]
    other = torch.ops.glora.readout(u, s, v, 12, 1.0, "trainable", 8)[1]
    assert torch.equal(again.double(), a)
    assert not torch.equal(other[5:], again[5:])
    assert torch.equal(other[:5], again[:5])


def step(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """‖∂L/∂b_j‖ + ‖∂L/∂a_j‖ of every pair in one training step of y = x + (x Aᵀ)Bᵀ."""
    b, a = b.clone().requires_grad_(), a.clone().requires_grad_()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(32, a.shape[1], generator=rng)
    target = torch.randn(32, b.shape[0], generator=rng)
    torch.nn.functional.mse_loss(x @ a.mT @ b.mT, target).backward()
    return b.grad.norm(dim=0) + a.grad.norm(dim=1)


def test_every_pair_of_a_trainable_readout_has_a_gradient():
    u, s, v = stored()
    assert (step(*torch.ops.glora.readout(u, s, v, 12, 1.0, "trainable")) > 1e-4).all()
    # With zeros the pairs beyond the effective rank never learn: the reason for the other kind.
    gradient = step(*torch.ops.glora.readout(u, s, v, 12, 1.0, "zero"))
    assert (gradient[:5] > 1e-4).all()
    assert (gradient[5:] == 0).all()


@pytest.mark.parametrize("basis", ["consensus", "projector", "update"])
def test_a_readout_of_an_aggregation_can_be_trained_on(basis):
    """Effective rank 4 (one space shared by all), read out at rank 10 from R = 8."""
    problem = build(Recipe(seed=3, ranks=(4, 4, 4), kind="rotated", cut="2r", condition=100.0))
    answer = aggregate(problem, basis)
    assert int(answer.stat("effective_rank")) == 4
    b, a = torch.ops.glora.readout(answer.u, answer.s, answer.v, 10, 1.0, "trainable")
    assert (step(b, a) > 1e-4).all()
    # Also from a state that holds nothing at all.
    b, a = torch.ops.glora.readout(0 * answer.u, 0 * answer.s, 0 * answer.v, 4, 1.0, "trainable")
    assert (b == 0).all()
    assert (step(b, a) > 1e-4).all()


def test_more_pairs_than_dimensions():
    """Beyond d_in no orthogonal row is left; the pairs must still learn."""
    u, s, v = stored(rank=4, real=2, m=9, n=6)
    b, a = torch.ops.glora.readout(u, s, v, 10, 1.0, "trainable")
    assert bool(a.isfinite().all())
    assert torch.allclose(a[2:].norm(dim=1), torch.ones(8), atol=1e-5)
    assert (step(b, a) > 1e-5).all()


def test_directions_below_rounding_count_as_zero():
    u, s, v = stored(rank=3, real=3)
    s = torch.tensor([1.0, 1e-3, 4 * U32], dtype=torch.float64)
    b, a = torch.ops.glora.readout(u, s, v, 3)
    assert (b[:, 2] == 0).all()
    assert (a[2] == 0).all()
    assert (b[:, 1] != 0).any()


def test_batched_modules_are_bit_equal_to_single_ones():
    many = [stored(seed) for seed in range(3)]
    u, s, v = (torch.stack(x) for x in zip(*many, strict=True))
    for pad in ("zero", "trainable"):
        b, a = torch.ops.glora.readout(u, s, v, 9, 2.0, pad)
        for l in range(3):
            alone = torch.ops.glora.readout(u[l], s[l], v[l], 9, 2.0, pad)
            assert torch.equal(alone[0], b[l])
            assert torch.equal(alone[1], a[l])


def test_metadata_is_checked():
    u, s, v = stored()
    op = torch.ops.glora.readout
    for args, says in (
        ((u, s, v, 0), "rank"),
        ((u, s, v, 2, 0.0), "scaling"),
        ((u, s, v, 2, -1.0), "scaling"),
        ((u, s, v, 2, 1.0, "noise"), "pad"),
        ((u, s[:4], v, 2), r"^s:"),
    ):
        with pytest.raises(GloraError, match=says):
            op(*args)
