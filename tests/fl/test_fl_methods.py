"""Every method against a dense transcription of its formula, on tiny cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fl_dense as dense
import numpy as np
import pytest
import torch
from torch import Tensor

from glora_ops.errors import GloraError
from glora_ops.fl.diagnostics import update_facts
from glora_ops.fl.gauge import regauge
from glora_ops.fl.messages import Client, Reply, Sent, draw_factors
from glora_ops.fl.methods import METHODS, Method
from glora_ops.fl.methods.base import shares
from glora_ops.fl.methods.fedrot import rotation
from glora_ops.fl.methods.hetlora import tail_size
from glora_ops.fl.server import Server, Setup, clients_of

SHAPES = {"first": (9, 7), "second": (6, 11)}
SCALING = 2.0
EXAMPLES = [10, 30, 20]
EQUAL, MIXED = (3, 3, 3), (1, 2, 4)
ALL = sorted(METHODS)
AVERAGING = ["fedit", "hetlora"]  # and mixed ranks
ONE_RANK = ["ffa", "rolora", "fedex", "fedrot", "fedsvd"]


def setup(ranks: tuple[int, ...], *, shared: bool = True) -> Setup:
    return Setup(SHAPES, ranks, SCALING, {"head.weight": torch.zeros(2, 3)}, shared, seed=5)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def train(method: Method, server: Server, scale: float = 1.0) -> list[Reply]:
    """Replies as if each client had moved what it may train, by a random step of its own."""
    replies = []
    for client in clients_of(server.setup.ranks):
        sent = method.broadcast(server, client)
        factors = {}
        for k, (m, (b, a)) in enumerate(sent.factors.items()):
            seed = 1000 * server.round + 10 * client.index + k
            factors[m] = (
                b + scale * normal(*b.shape, seed=seed) * (sent.train != "A"),
                a + scale * normal(*a.shape, seed=seed + 5) * (sent.train != "B"),
            )
        head = {n: normal(*x.shape, seed=client.index) for n, x in sent.dense.items()}
        replies.append(Reply(client, sent, factors, head, EXAMPLES[client.index]))
    return replies


def rounds(method: Method, ranks: tuple[int, ...], count: int) -> tuple[Server, list[Reply]]:
    """The state before a round `count`, and that round's replies."""
    server = method.start(setup(ranks))
    for _ in range(count):
        server = method.combine(server, train(method, server))
    return server, train(method, server)


def pairs(replies: list[Reply], module: str) -> list[dense.Pair]:
    return [tuple(x.double().numpy() for x in r.factors[module]) for r in replies]


def effective(sent: Sent, module: str) -> np.ndarray:
    """What a message adds to the frozen weights, dense."""
    total = sent.scaling * sent.factors[module][0].double() @ sent.factors[module][1].double()
    for merged in sent.merged:
        total = total + merged[module][0].double() @ merged[module][1].double()
    return total.numpy()


def close(found: np.ndarray, expected: np.ndarray, tol: float = 2e-6) -> bool:
    """Relative Frobenius error of fp32 arithmetic on a few numbers."""
    return bool(np.linalg.norm(found - expected) <= tol * max(1.0, np.linalg.norm(expected)))


WEIGHTS = [x / sum(EXAMPLES) for x in EXAMPLES]


@pytest.mark.parametrize("name", ALL)
def test_heads_are_weighted_means_and_rounds_count(name: str) -> None:
    method = METHODS[name]()
    server, replies = rounds(method, EQUAL, 1)
    after = method.combine(server, replies)
    expected = sum(
        w * r.dense["head.weight"].double() for r, w in zip(replies, WEIGHTS, strict=True)
    )
    torch.testing.assert_close(after.dense["head.weight"].double(), expected, atol=1e-6, rtol=0)
    assert after.round == server.round + 1 == 2
    assert shares(replies) == pytest.approx(WEIGHTS)


@pytest.mark.parametrize("name", sorted({*ALL} - {"fedplora"}))  # its pool is the server's
@pytest.mark.parametrize("rank", [1, 3])
def test_first_message_is_an_untrained_adapter_the_client_draws_itself(
    name: str, rank: int
) -> None:
    method = METHODS[name]()
    sent = method.broadcast(method.start(setup((rank,) * 3)), Client(1, rank))
    assert sent.drawn is not None
    again = draw_factors(SHAPES, rank, sent.drawn)
    for m, (b, a) in sent.factors.items():
        assert torch.equal(a, again[m][1])
        assert not b.any()
        assert a.shape[0] == rank
        assert a.any(1).all()


def test_shared_start_is_nested_and_independent_start_is_not() -> None:
    method = METHODS["glora"]()
    shared, own = (method.start(setup(MIXED, shared=x)) for x in (True, False))
    small, large = (method.broadcast(shared, c).factors["first"][1] for c in clients_of(MIXED)[1:])
    assert torch.equal(small, large[:2])
    small, large = (method.broadcast(own, c).factors["first"][1] for c in clients_of(MIXED)[1:])
    assert not torch.equal(small, large[:2])


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank_methods_refuse_mixed_ranks_by_name(name: str) -> None:
    method = METHODS[name]()
    with pytest.raises(GloraError, match=type(method).__name__):
        method.start(setup(MIXED))


@pytest.mark.parametrize("name", ["ffa", "rolora", "fedsvd", "fedplora"])
def test_frozen_factor_methods_refuse_independent_starts(name: str) -> None:
    with pytest.raises(GloraError, match="shared"):
        METHODS[name]().start(setup(EQUAL, shared=False))


# --- averaging factors -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("ranks", [EQUAL, MIXED])
def test_fedit(ranks: tuple[int, ...], count: int) -> None:
    method = METHODS["fedit"]()
    server, replies = rounds(method, ranks, count)
    after = method.combine(server, replies)
    for m in SHAPES:
        b, a = dense.zero_padded_mean(pairs(replies, m), WEIGHTS)
        assert close(after.factors[m][0].numpy(), b)
        assert close(after.factors[m][1].numpy(), a)
        for client in clients_of(ranks):
            sent = method.broadcast(after, client)
            expected = SCALING * b[:, : client.rank] @ a[: client.rank]
            assert close(effective(sent, m), expected)
            exact = dense.mean_update(pairs(replies, m), WEIGHTS, SCALING)
            assert not close(effective(sent, m), exact)  # averaging factors is not averaging


@pytest.mark.parametrize("count", [0, 2])
def test_ffa_averages_b_exactly_and_never_moves_a(count: int) -> None:
    method = METHODS["ffa"]()
    first = method.broadcast(method.start(setup(EQUAL)), Client(0, 3)).factors
    server, replies = rounds(method, EQUAL, count)
    after = method.combine(server, replies)
    for m in SHAPES:
        assert torch.equal(after.factors[m][1], first[m][1])
        assert close(
            effective(method.model(after), m),
            dense.mean_update(pairs(replies, m), WEIGHTS, SCALING),
        )


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_rolora_takes_turns_and_averages_exactly(count: int) -> None:
    method = METHODS["rolora"]()
    server, replies = rounds(method, EQUAL, count)
    turn = "A" if count % 2 else "B"
    assert {r.sent.train for r in replies} == {turn}
    after = method.combine(server, replies)
    for m in SHAPES:
        frozen = 0 if turn == "A" else 1
        assert torch.equal(after.factors[m][frozen], replies[0].sent.factors[m][frozen])
        assert close(
            effective(method.model(after), m),
            dense.mean_update(pairs(replies, m), WEIGHTS, SCALING),
        )


# --- exact aggregation -----------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [EQUAL, MIXED])
def test_flora_merges_the_exact_mean_and_starts_afresh(ranks: tuple[int, ...]) -> None:
    method = METHODS["flora"]()
    server = method.start(setup(ranks))
    expected = {m: np.zeros(shape) for m, shape in SHAPES.items()}
    seeds = set()
    for _ in range(3):
        replies = train(method, server)
        seeds.add(replies[0].sent.drawn)
        for m in SHAPES:
            expected[m] = expected[m] + dense.mean_update(pairs(replies, m), WEIGHTS, SCALING)
        server = method.combine(server, replies)
        for m in SHAPES:
            assert close(effective(method.model(server), m), expected[m])
        assert not any(b.any() for b, _ in method.broadcast(server, Client(2, 4)).factors.values())
    assert len(seeds) == 3  # a new adapter every round


def test_fedex_model_is_the_exact_mean_every_round() -> None:
    method = METHODS["fedex"]()
    server = method.start(setup(EQUAL))
    residual = {m: np.zeros(shape) for m, shape in SHAPES.items()}
    for _ in range(3):
        replies = train(method, server)
        server = method.combine(server, replies)
        for m in SHAPES:
            exact = dense.mean_update(pairs(replies, m), WEIGHTS, SCALING)
            b, a = dense.zero_padded_mean(pairs(replies, m), WEIGHTS)
            residual[m] = residual[m] + exact - SCALING * b @ a
            assert close(server.factors[m][0].numpy(), b)
            assert close(effective(method.model(server), m), residual[m] + SCALING * b @ a)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("ranks", [EQUAL, MIXED])
def test_flexlora_sends_truncations_of_the_dense_mean(ranks: tuple[int, ...], count: int) -> None:
    method = METHODS["flexlora"]()
    server, replies = rounds(method, ranks, count)
    after = method.combine(server, replies)
    for m in SHAPES:
        exact = dense.mean_update(pairs(replies, m), WEIGHTS, SCALING)
        assert close(effective(method.model(after), m), exact)
        for client in clients_of(ranks):
            sent = method.broadcast(after, client)
            assert sent.factors[m][1].shape[0] == client.rank
            assert close(effective(sent, m), dense.truncated(exact, client.rank), 1e-5)
            rows = sent.factors[m][1]
            torch.testing.assert_close(rows @ rows.mT, torch.eye(client.rank), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("ranks", [EQUAL, MIXED])
def test_raflora_averages_each_slice_over_its_holders(ranks: tuple[int, ...], count: int) -> None:
    method = METHODS["raflora"]()
    server, replies = rounds(method, ranks, count)
    for present in (replies, replies[:2]):  # with mixed ranks nobody holds the last slice
        after = method.combine(server, present)
        for m in SHAPES:
            whole = np.zeros(SHAPES[m])
            low = 0
            for high in sorted(set(ranks)):
                who = [i for i in range(len(present)) if ranks[i] >= high]
                total = sum(EXAMPLES[i] for i in who)
                for i in who:
                    b, a = pairs(present, m)[i]
                    share = EXAMPLES[i] / total
                    whole += share * SCALING * b[:, low:high] @ a[low:high]
                low = high
            assert close(
                effective(method.model(after), m), dense.truncated(whole, max(ranks)), 1e-5
            )
            for client in clients_of(ranks):
                sent = method.broadcast(after, client)
                assert close(effective(sent, m), dense.truncated(whole, client.rank), 1e-5)
                b, a = sent.factors[m]
                torch.testing.assert_close(b.mT @ b, a @ a.mT, atol=1e-4, rtol=1e-4)  # balanced


@pytest.mark.parametrize("ranks", [EQUAL, MIXED])
def test_fedplora_trains_some_modules_and_folds_the_others(ranks: tuple[int, ...]) -> None:
    method = METHODS["fedplora"]()
    server = method.start(setup(ranks))
    picked = set()
    for _ in range(4):
        replies = train(method, server)
        after = method.combine(server, replies)
        for m in SHAPES:
            b0, a0 = (x.double().numpy() for x in server.factors[m])
            for r in replies:
                assert close(effective(r.sent, m), SCALING * b0 @ a0)  # nobody loses anything
            for j in range(max(ranks)):
                found = [x.double().numpy() for x in after.factors[m]]
                b, a, total = np.zeros(len(b0)), np.zeros(a0.shape[1]), 0
                for r, n in zip(replies, EXAMPLES, strict=True):
                    chosen = method.chosen(server, r.client)
                    picked.add((r.client.index, tuple(chosen)))
                    assert len(chosen) == r.client.rank == r.sent.rank
                    if j in chosen:
                        i, total = chosen.index(j), total + n
                        b += n * r.factors[m][0][:, i].double().numpy()
                        a += n * r.factors[m][1][i].double().numpy()
                b, a = (b / total, a / total) if total else (b0[:, j], a0[j])
                assert close(found[0][:, j], b)
                assert close(found[1][j], a)
        server = after
    assert len(picked) > 3 or ranks == EQUAL


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fedsvd_averages_b_exactly_and_puts_its_directions_into_a(count: int) -> None:
    method = METHODS["fedsvd"]()
    server, replies = rounds(method, EQUAL, count)
    assert {r.sent.train for r in replies} == {"B"}
    after = method.combine(server, replies)
    for m in SHAPES:
        exact = dense.mean_update(pairs(replies, m), WEIGHTS, SCALING)
        assert close(effective(method.model(after), m), exact, 1e-5)
        b, a = after.factors[m]
        torch.testing.assert_close(a @ a.mT, torch.eye(3), atol=1e-5, rtol=0)
        off = b.mT @ b
        torch.testing.assert_close(off, torch.diag(off.diagonal()), atol=1e-4, rtol=1e-4)


# --- HetLoRA and FedRot-LoRA -----------------------------------------------------------------


def test_hetlora_weighs_by_norm_and_pads_with_zeros() -> None:
    method = METHODS["hetlora"](gamma=1.0)
    server, replies = rounds(method, MIXED, 1)
    after = method.combine(server, replies)
    norms = [
        np.sqrt(sum(np.linalg.norm(b @ a) ** 2 for b, a in (pairs([r], m)[0] for m in SHAPES)))
        for r in replies
    ]
    weights = [n / sum(norms) for n in norms]
    for m in SHAPES:
        b, a = dense.zero_padded_mean(pairs(replies, m), weights)
        assert close(after.factors[m][0].numpy(), b)
        assert close(after.factors[m][1].numpy(), a)
    assert after.ranks == MIXED  # gamma = 1 never prunes


def test_hetlora_prunes_a_client_whose_tail_shrank_and_no_other() -> None:
    method = METHODS["hetlora"](gamma=0.5, penalty=0.1)
    server, replies = rounds(method, (4, 4, 4), 1)
    tail = replies[0].sent.tail
    assert tail is not None
    assert (tail.keep, tail.strength) == (2, 0.1)
    shrunk = {
        m: (torch.cat([b[:, :2], 0.1 * b[:, 2:]], 1), a)
        for m, (b, a) in replies[1].sent.factors.items()
    }
    replies[1] = replace(replies[1], factors=shrunk)
    assert tail_size(shrunk, tail) == pytest.approx(
        0.1 * tail_size(replies[1].sent.factors, tail), rel=1e-5
    )
    after = method.combine(server, replies)
    assert after.ranks == (4, 2, 4)
    assert method.broadcast(after, Client(1, 4)).factors["first"][1].shape[0] == 2


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_fedrot(count: int, strength: float) -> None:
    method = METHODS["fedrot"](strength=strength)
    server, replies = rounds(method, EQUAL, count)
    after = method.combine(server, replies)
    for m in SHAPES:
        turned = []
        for r, (b, a) in zip(replies, pairs(replies, m), strict=True):
            b_ref, a_ref = (x.double().numpy() for x in r.sent.factors[m])
            best = dense.best_rotation(a @ a_ref.T if count % 2 else b.T @ b_ref)
            soft = (1 - strength) * np.eye(3) + strength * best
            u, _, vt = np.linalg.svd(soft)
            turn = u @ vt if count else np.eye(3)
            turned.append((b @ turn, turn.T @ a))
        b, a = dense.zero_padded_mean(turned, WEIGHTS)
        assert close(after.factors[m][0].numpy(), b, 1e-5)
        assert close(after.factors[m][1].numpy(), a, 1e-5)


def test_fedrot_undoes_a_rotation_of_a_client() -> None:
    a = normal(3, 7, seed=2).double()
    turn = torch.linalg.qr(normal(3, 3, seed=1).double()).Q
    turn = turn * torch.linalg.det(turn)  # of odd size: now a rotation
    turned = turn.mT @ a
    torch.testing.assert_close(rotation(turned @ a.mT, 1.0).mT @ turned, a)
    assert not torch.allclose(rotation(turned @ a.mT, 0.5).mT @ turned, a, atol=1e-2)


# --- glora -----------------------------------------------------------------------------------

BASES = ("consensus", "projector", "update")


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("ranks", [EQUAL, MIXED])
def test_glora_is_the_exact_mean_at_sufficient_rank(ranks: tuple[int, ...], basis: str) -> None:
    method = METHODS["glora"](basis=basis, rank=6)
    server = method.start(setup(ranks))
    replies = train(method, server)
    enough = METHODS["glora"](basis=basis, rank=sum(ranks))
    after = enough.combine(server, replies)
    for m in SHAPES:
        exact = dense.mean_update(pairs(replies, m), WEIGHTS, SCALING)
        assert close(effective(enough.model(after), m), exact, 1e-5)


@pytest.mark.parametrize("ranks", [EQUAL, MIXED])
def test_glora_update_readouts_are_truncated_svds(ranks: tuple[int, ...]) -> None:
    method = METHODS["glora"](basis="update", mode="adapter")
    server, replies = rounds(method, ranks, 1)
    after = method.combine(server, replies)
    for m in SHAPES:
        exact = dense.mean_update(pairs(replies, m), WEIGHTS, SCALING)
        for client in clients_of(ranks):
            sent = method.broadcast(after, client)
            assert close(effective(sent, m), dense.truncated(exact, client.rank), 1e-5)


def test_glora_momentum_is_one_more_client() -> None:
    method = METHODS["glora"](basis="update", mode="adapter", momentum=0.3, rank=4)
    server, replies = rounds(method, MIXED, 1)
    after = method.combine(server, replies)
    for m in SHAPES:
        before = effective(method.model(server), m)
        exact = dense.mean_update(pairs(replies, m), WEIGHTS, SCALING)
        expected = dense.truncated(0.3 * before + 0.7 * exact, 4)
        assert close(effective(method.model(after), m), expected, 1e-5)
        assert not close(expected, dense.truncated(exact, 4), 1e-2)


@pytest.mark.parametrize("basis", BASES)
def test_glora_delta_adds_what_clients_learnt_to_the_whole_state(basis: str) -> None:
    """At a rank that holds everything: W + Σ w_i (ΔW_i − sent_i), whatever the basis and votes."""
    method = METHODS["glora"](basis=basis, mode="delta", rank=6)
    server, replies = rounds(method, (1, 1, 2), 0)
    server = method.combine(server, replies)
    replies = train(method, server)
    after = METHODS["glora"](basis=basis, mode="delta", rank=9).combine(server, replies)
    for m in SHAPES:  # of at most 7 dimensions on one side: rank 9 holds everything
        before = effective(method.model(server), m)
        learnt = [
            dense.update(p, SCALING) - effective(r.sent, m)
            for p, r in zip(pairs(replies, m), replies, strict=True)
        ]
        whole = before + sum(w * d for w, d in zip(WEIGHTS, learnt, strict=True))
        found = effective(METHODS["glora"](basis=basis, mode="delta", rank=9).model(after), m)
        assert close(found, whole, 2e-5)
        assert not close(dense.mean_update(pairs(replies, m), WEIGHTS, SCALING), whole, 1e-2)


def test_glora_delta_keeps_directions_low_rank_clients_were_not_sent() -> None:
    """Clients of rank 1 that learn nothing: adapter mode forgets the rest of W, delta does not."""
    for mode, kept in (("adapter", False), ("delta", True)):
        method = METHODS["glora"](basis="update", mode=mode, rank=4)
        server = method.start(setup((4, 4, 4)))
        server = method.combine(server, train(method, server))
        before = effective(method.model(server), "first")
        idle = []
        for client in clients_of((1, 1, 1)):
            sent = method.broadcast(server, client)
            idle.append(Reply(client, sent, sent.factors, sent.dense, 10))
        after = effective(method.model(method.combine(server, idle)), "first")
        assert close(after, before, 1e-5) is kept


@pytest.mark.parametrize(
    "method", [METHODS["glora"](mode="adapter"), METHODS["flexlora"]()], ids=["glora", "flexlora"]
)
def test_pairs_beyond_the_update_can_learn(method: Method) -> None:
    """A client of larger rank than the update has: every pair it gets has a gradient."""
    server = method.start(setup((1, 1, 1)))
    server = method.combine(replace(server, setup=setup((1, 1, 6))), train(method, server))
    sent = method.broadcast(server, Client(2, 6))
    for b, a in sent.factors.values():
        assert a.shape[0] == 6
        assert (a.norm(dim=1) + b.norm(dim=0) > 1e-3).all()
        assert (a.norm(dim=1) > 1e-4).all()


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("step", [1.0, 0.5])
def test_glora_restart_adds_what_fresh_adapters_learnt(basis: str, step: float) -> None:
    """At a rank that holds everything: W_{t+1} = W_t + γ Σ w_i s B_i A_i, from B = 0 each round."""
    method = METHODS["glora"](basis=basis, mode="restart", rank=11, step=step)
    server = method.start(setup(MIXED))
    expected = {m: np.zeros(shape) for m, shape in SHAPES.items()}
    seeds = set()
    for _ in range(3):
        replies = train(method, server)
        seeds.add(replies[0].sent.drawn)
        for r in replies:
            assert not any(b.any() for b, _ in r.sent.factors.values())
            assert r.sent.rank == r.client.rank
            for m in SHAPES:
                assert close(effective(r.sent, m), expected[m], 2e-5)  # all of W_t, frozen
        server = method.combine(server, replies)
        for m in SHAPES:
            learnt = dense.mean_update(pairs(replies, m), WEIGHTS, SCALING)
            expected[m] = expected[m] + step * learnt
            assert close(effective(method.model(server), m), expected[m], 2e-5)
    assert len(seeds) == 3


@pytest.mark.parametrize("rank", [2, None])
def test_glora_restart_truncates_what_it_keeps_and_what_travels(rank: int | None) -> None:
    method = METHODS["glora"](basis="update", mode="restart", rank=4, context_rank=rank, step=0.7)
    server, replies = rounds(method, MIXED, 2)
    after = method.combine(server, replies)
    for m in SHAPES:
        whole = effective(method.model(server), m)
        for r in replies:
            assert close(effective(r.sent, m), dense.truncated(whole, rank or 4), 1e-5)
        learnt = 0.7 * dense.mean_update(pairs(replies, m), WEIGHTS, SCALING)
        exact = method.exact(server, replies)[m]
        assert close((exact[0].double() @ exact[1].double()).numpy(), whole + learnt, 1e-5)
        expected = dense.truncated(whole + learnt, 4)
        assert close(effective(method.model(after), m), expected, 1e-5)


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("step", [1.0, 0.5])
def test_glora_delta_with_context_trains_a_readout_beside_the_rest(
    rank: int | None, step: float
) -> None:
    """Every client holds W_t whole (of rank q); what it learnt is added, times the step."""
    method = METHODS["glora"](
        basis="update", mode="delta", rank=6, context=True, context_rank=rank, step=step
    )
    server, replies = rounds(method, MIXED, 2)
    after = method.combine(server, replies)
    for m in SHAPES:
        whole = effective(method.model(server), m)
        learnt = np.zeros(SHAPES[m])
        for w, r, p in zip(WEIGHTS, replies, pairs(replies, m), strict=True):
            readout = dense.truncated(whole, r.client.rank)
            held = dense.truncated(whole, max(rank or 6, r.client.rank))
            assert close(effective(replace(r.sent, merged=()), m), readout, 1e-5)
            assert close(effective(r.sent, m), held, 1e-5)
            learnt += w * (dense.update(p, SCALING) - readout)
        expected = dense.truncated(whole + step * learnt, 6)
        assert close(effective(method.model(after), m), expected, 2e-5)


def test_glora_refuses_settings_that_mean_nothing() -> None:
    for bad in ({"mode": "adapter", "momentum": 1.0}, {"rank": 0}, {"momentum": 0.1},
                {"server_vote": 0.0}, {"mode": "adapter", "step": 0.5}, {"step": 0.0},
                {"mode": "delta", "momentum": 0.1}, {"mode": "adapter", "context": True},
                {"context": True}, {"mode": "adapter", "context_rank": 4},
                {"mode": "delta", "context_rank": 4}, {"context_rank": 0}):  # fmt: skip
        with pytest.raises(GloraError):
            METHODS["glora"](**bad)


def test_the_method_written_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "federated.md").read_text()
    code = page.partition("### Adding one")[2].partition("```python")[2].partition("```")[0]
    names: dict[str, Any] = {"__name__": "written_in_the_documentation"}
    exec(code, names)
    method = names["EqualVoices"]()
    server, replies = rounds(method, MIXED, 1)
    after = method.combine(server, replies)
    for m in SHAPES:
        exact = dense.mean_update(pairs(replies, m), [1 / 3] * 3, SCALING)
        sent = method.broadcast(after, Client(1, 2))
        assert close(effective(sent, m), dense.truncated(exact, 2), 1e-5)


# --- gauges ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "invariant"),
    [("glora", True), ("adapter", True), ("delta", True), ("context", True), ("restart", True),
     ("flora", True), ("flexlora", True), ("fedex", True), ("fedit", False), ("hetlora", False),
     ("fedrot", False), ("raflora", True), ("fedplora", False)],
)  # fmt: skip
def test_who_depends_on_the_gauge(name: str, invariant: bool) -> None:
    modes: dict[str, dict[str, Any]] = {
        "adapter": {"mode": "adapter"},
        "delta": {"mode": "delta"},
        "context": {"mode": "delta", "context": True},
        "restart": {"mode": "restart", "step": 0.5},
    }
    method = METHODS["glora"](**modes[name]) if name in modes else METHODS[name]()
    server, replies = rounds(method, EQUAL, 1)
    turned = [replace(r, factors=regauge(r.factors, 10.0, r.client.index)) for r in replies]
    for m in SHAPES:
        for r, t in zip(replies, turned, strict=True):
            assert close(pairs([t], m)[0][0] @ pairs([t], m)[0][1],
                         pairs([r], m)[0][0] @ pairs([r], m)[0][1], 1e-5)  # fmt: skip
        one, other = (
            effective(method.model(method.combine(server, x)), m) for x in (replies, turned)
        )
        assert close(other, one, 1e-4) is invariant


# --- diagnostics -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_captured_energy_and_spectrum_against_dense_matrices(name: str) -> None:
    method = METHODS[name]()
    server, replies = rounds(method, EQUAL, 1)
    after = method.combine(server, replies)
    found = update_facts(method.model(after), server.merged, method.exact(server, replies))
    lost = total = 0.0
    sigma, ranks = np.zeros(11), []
    for m in SHAPES:
        exact = dense.mean_update(pairs(replies, m), WEIGHTS, SCALING)
        if name == "glora":  # a fresh start: what is learnt is added to all of W
            exact = exact + effective(method.model(server), m)
        earlier = (
            sum((p[m][0].double() @ p[m][1].double()).numpy() for p in server.merged)
            if server.merged
            else 0.0
        )
        whole = effective(method.model(after), m)
        lost += np.linalg.norm(whole - earlier - exact) ** 2
        total += np.linalg.norm(exact) ** 2
        s = np.linalg.svd(whole, compute_uv=False)
        sigma[: len(s)] += s**2
        p = s[s > 1e-9 * s[0]] / s.sum()
        ranks.append(np.exp(-(p * np.log(p)).sum()))
    assert found["captured"] == pytest.approx(1 - lost / total, abs=1e-5)
    assert found["effective_rank"] == pytest.approx(np.mean(ranks), rel=1e-3)
    assert found["norm"] == pytest.approx(np.sqrt(sigma.sum()), rel=1e-5)
    assert found["spectrum"] == pytest.approx(np.sqrt(sigma)[: len(found["spectrum"])], abs=1e-4)


def test_the_spectrum_of_a_small_update_keeps_its_digits() -> None:
    method = METHODS["fedit"]()
    server, replies = rounds(method, EQUAL, 0)
    small = [
        replace(r, factors={m: (2.0**-24 * b, a) for m, (b, a) in r.factors.items()})
        for r in replies
    ]
    one, other = (
        np.array(
            update_facts(method.model(method.combine(server, x)), (), method.exact(server, x))[
                "spectrum"
            ]
        )
        for x in (replies, small)
    )
    assert len(one) == len(other) == 3
    assert 2.0**24 * other == pytest.approx(one, rel=1e-6)
