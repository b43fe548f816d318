"""Rows that carry nothing, b_j = 0 or a_j = 0, move no result: not its bits, nor its route."""

from __future__ import annotations

import pytest
import torch
from strategies import BASES
from torch import Tensor

from glora_ops import aggregate, pack, pack_modules

Pair = tuple[Tensor, Tensor]

RANK = 8
D_OUT, D_IN = 160, 150
# Clients × rank on either side of the routes' limits at R = 8: N = 128, and N = d.
SIZES = [(4, 3), (12, 10), (14, 10), (18, 10)]


def clients(count: int, rank: int, seed: int = 0) -> list[Pair]:
    """Slowly falling spectra, so that an iteration ends elsewhere than an exact solution."""
    rng = torch.Generator().manual_seed(seed)
    fall = 0.95 ** torch.arange(rank)
    return [
        (
            torch.randn(D_OUT, rank, generator=rng) * fall,
            torch.randn(rank, D_IN, generator=rng),
        )
        for _ in range(count)
    ]


def with_dead_rows(pairs: list[Pair], how: str, dead: int = 4) -> list[Pair]:
    """`dead` more pairs for every client, with a zero beside something huge or beside a zero."""
    out = []
    for i, (b, a) in enumerate(pairs):
        rank = len(a)
        more_b, more_a = torch.zeros(len(b), dead), torch.zeros(dead, a.shape[1])
        if i % 3 == 0:
            more_a += 1e20
        elif i % 3 == 1:
            more_b -= 1e20
        order = torch.arange(rank + dead)
        if how == "before":
            order = order.roll(dead)
        elif how == "between":
            order = torch.cat([torch.arange(rank), 2.3 * torch.arange(dead) + 0.5]).argsort()
        out.append((torch.cat([b, more_b], 1)[:, order], torch.cat([a, more_a])[order]))
    return out


def of_list(pairs: list[Pair], basis: str) -> tuple[Tensor, ...]:
    b, a = (list(x) for x in zip(*pairs, strict=True))
    one = torch.ones(len(b))
    return torch.ops.glora.aggregate(b, a, one / len(b), one, RANK, basis)


def assert_same(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> None:
    for x, y in zip(one, two, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("how", ["after", "before", "between"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("basis", BASES)
def test_dead_rows_change_no_bit(basis: str, size: tuple[int, int], how: str) -> None:
    lean = clients(*size)
    assert_same(of_list(with_dead_rows(lean, how), basis), of_list(lean, basis))


@pytest.mark.parametrize("basis", BASES)
def test_dead_rows_change_no_bit_of_a_state(basis: str) -> None:
    lean, more = clients(12, 10), with_dead_rows(clients(12, 10), "between")
    one, two = (aggregate(x, rank=RANK, basis=basis).modules[""] for x in (lean, more))
    for name, x in vars(one).items():
        assert torch.equal(x, getattr(two, name)), name


@pytest.mark.parametrize("basis", BASES)
def test_modules_with_different_dead_rows_are_each_as_if_alone(basis: str) -> None:
    """Dead in one module and alive in the next; one with no live row at all."""
    lean = [clients(12, 10, seed) for seed in range(3)]
    lean[1] = [(b[:, :9], a[:9]) for b, a in lean[1]]
    modules = [lean[0], with_dead_rows(lean[1], "between", 1), lean[2]]
    nothing = [(torch.zeros_like(b), a) for b, a in lean[0]]
    batch = pack_modules([*modules, nothing, modules[1]])
    one = torch.ones(12)
    out = torch.ops.glora.aggregate(batch.b, batch.a, batch.offsets, one / 12, one, RANK, basis)
    for l, pairs in ((0, lean[0]), (1, lean[1]), (2, lean[2]), (4, lean[1])):
        assert_same(tuple(x[l] for x in out), of_list(pairs, basis))
    assert not out[0][3].any()
    assert not out[1][3].any()


def means(pairs: list[Pair], factors: bool, **settings: int) -> tuple[Tensor, ...]:
    p, ops = pack(pairs), torch.ops.glora
    one = torch.ones(len(pairs))
    if factors:
        return ops.projector_svd.factors(p.a, p.offsets, one / len(pairs), RANK, **settings)
    _, t, _, f = ops.canonicalize(p.b, p.a, p.offsets, one)
    return ops.projector_svd(p.a, p.offsets, t, f / len(pairs), RANK, **settings)


@pytest.mark.parametrize("how", ["after", "before", "between"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factors", [False, True])
def test_dead_rows_move_no_mean_projector(factors: bool, size: tuple[int, int], how: str) -> None:
    """To rounding, not to the bit: the clients' own eigenproblems are wider by the dead rows.

    Without power steps an iteration is far from the exact route, so that the route shows.
    """
    lean = clients(*size)
    more = with_dead_rows(lean, how)
    if factors:  # what is dead because of its partner is alive as a row of its own
        more = [(b, a * (b != 0).any(0)[:, None]) for b, a in more]
    basis, values, explained = means(lean, factors, power_iters=0)
    other, others, explains = means(more, factors, power_iters=0)
    assert (values - others).abs().max() < 1e-6
    assert (explained - explains).abs() < 1e-6
    overlap = torch.linalg.svdvals(basis.double().mT @ other.double())
    assert overlap.min() > 1 - 1e-5
