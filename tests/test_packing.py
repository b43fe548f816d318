"""Row stacks: what goes in comes out, whatever the ranks, dtypes and strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, problems

import glora_ops
from glora_ops import GloraError, pack, pack_modules


@given(problem=problems(tuple(DTYPES)))
def test_pack_and_unpack_are_inverse(problem):
    packed = pack(problem.clients)
    (again,) = packed.unpack()
    assert packed.clients == len(problem.clients)
    assert packed.b.is_contiguous()
    assert packed.a.is_contiguous()
    for (b, a), (b2, a2) in zip(problem.clients, again, strict=True):
        assert b2.dtype == b.dtype
        assert torch.equal(b, b2)
        assert torch.equal(a, a2)


def test_rows_are_rank_one_pairs_in_client_order():
    b0, a0 = torch.arange(6.0).view(3, 2), torch.arange(8.0).view(2, 4)
    b1, a1 = torch.ones(3, 1), torch.full((1, 4), 7.0)
    packed = pack([(b0, a0), (b1, a1)])
    assert packed.offsets.tolist() == [0, 2, 3]
    assert packed.offsets.dtype == torch.int64
    assert torch.equal(packed.b, torch.cat([b0.T, b1.T]))
    assert torch.equal(packed.a, torch.cat([a0, a1]))


@given(ranks=st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=3), min_size=2, max_size=4))
def test_modules_with_different_ranks_are_filled_with_zero_rows(ranks):
    modules = [[(torch.randn(5, r), torch.randn(r, 6)) for r in per] for per in ranks]
    packed = pack_modules(modules)
    assert packed.b.shape == (len(ranks), sum(map(max, zip(*ranks, strict=True))), 5)
    assert packed.ranks == tuple(map(tuple, ranks))
    for pairs, again in zip(modules, packed.unpack(), strict=True):
        for (b, a), (b2, a2) in zip(pairs, again, strict=True):
            assert torch.equal(b, b2)
            assert torch.equal(a, a2)
    assert int((packed.b != 0).any(-1).sum()) == sum(map(sum, ranks))


def test_dtypes_are_promoted_per_side():
    half, single = torch.randn(4, 2).bfloat16(), torch.randn(4, 2)
    packed = pack([(half, torch.randn(2, 3).half()), (single, torch.randn(2, 3).half())])
    assert packed.b.dtype == torch.float32
    assert packed.a.dtype == torch.float16


def test_gradients_stay_outside():
    packed = pack([(torch.randn(4, 2, requires_grad=True), torch.randn(2, 3, requires_grad=True))])
    assert not packed.b.requires_grad
    assert not packed.a.requires_grad


def test_any_strides_in():
    b, a = torch.randn(2, 4).T, torch.randn(6, 4)[::3, ::2]
    packed = pack([(b, a)])
    assert torch.equal(packed.b, b.T)
    assert torch.equal(packed.a, a)


B, A = torch.randn(4, 2), torch.randn(2, 3)


@pytest.mark.parametrize(
    ("clients", "says"),
    [
        ([], "clients"),
        ([(B, A[:1])], r"client 0.*one r"),
        ([(B, A), (torch.randn(5, 2), A)], r"client 1.*d_out = 4"),
        ([(B, A), (B, torch.randn(2, 4))], r"client 1.*d_in = 3"),
        ([(B[:, :0], A[:0])], r"client 0.*r ≥ 1"),
        ([(B.long(), A)], r"client 0.*fp32"),
        ([(B[None], A)], r"client 0"),
        ([(B[0, 0], A)], r"client 0.*lora_B float32 \(\)"),
    ],
)
def test_what_does_not_fit_is_named(clients, says):
    with pytest.raises(GloraError, match=says):
        pack(clients)


def test_modules_must_have_the_same_clients():
    with pytest.raises(GloraError, match=r"module 1.*1 clients.*expected 2"):
        pack_modules([[(B, A), (B, A)], [(B, A)]])
    with pytest.raises(GloraError, match="modules"):
        pack_modules([])
    assert glora_ops.Packed is type(pack([(B, A)]))
