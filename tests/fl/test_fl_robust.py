"""Robust rules in federated rounds: one verdict a client, for every method, recorded."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import fl_dense as dense
import numpy as np
import pytest
import torch
from fl_runs import config, reproducible, run_small, state
from test_fl_methods import SCALING, SHAPES, close, effective, normal, setup
from torch import Tensor

from glora_ops.errors import GloraError
from glora_ops.fl.judging import Rule, heed
from glora_ops.fl.load import load_runs
from glora_ops.fl.messages import Client, Reply
from glora_ops.fl.methods import METHODS, Method
from glora_ops.fl.records import Run
from glora_ops.fl.report_folder import markdown
from glora_ops.fl.run import Plan, run
from glora_ops.fl.server import Server, clients_of
from glora_ops.fl.summary import summarise
from glora_ops.fl.trainer import Learnt, Trainer
from glora_ops.robust import RULES

EXAMPLES = [10, 30, 20, 15, 25, 20]
EQUAL, MIXED = (3,) * 6, (4, 3, 4, 2, 4, 3)
FLIPPED, LOUD = 1, 4
CASES = [(name, EQUAL) for name in sorted(METHODS)]
CASES += [(name, MIXED) for name in ("fedit", "flora", "flexlora", "glora", "hetlora", "delta")]
CASES += [("delta", EQUAL)]


def method_of(name: str, ranks: tuple[int, ...]) -> Method:
    """A method whose model loses nothing, so that it can be written densely."""
    if name in ("glora", "delta"):
        how = {"glora": "adapter", "delta": "delta"}[name]
        return METHODS["glora"](mode=how, rank=2 * sum(ranks) + 12)
    return METHODS[name](gamma=1.0) if name == "hetlora" else METHODS[name]()


def replies_of(method: Method, server: Server, *, bad: bool) -> list[Reply]:
    """Clients that move alike, but for two: one turns its update round, one is 40 times louder."""
    out = []
    for client in clients_of(server.setup.ranks):
        sent = method.broadcast(server, client)
        factors = {}
        for k, (m, (b, a)) in enumerate(sent.factors.items()):
            seed, r = 100 * server.round + k, a.shape[0]
            left = normal(b.shape[0], 4, seed=seed)[:, :r] + 0.2 * normal(
                *b.shape, seed=seed + 10 * client.index + 1000
            )
            right = normal(4, a.shape[1], seed=seed + 50)[:r]
            factor = {FLIPPED: -1.0, LOUD: 40.0}.get(client.index, 1.0) if bad else 1.0
            if sent.train == "A":
                factors[m] = (b, factor * (a + right))
            else:
                factors[m] = (factor * (b + left), a + right * (sent.train == "both"))
        head = {n: normal(*x.shape, seed=client.index) for n, x in sent.dense.items()}
        out.append(Reply(client, sent, factors, head, EXAMPLES[client.index]))
    return out


def dense_update(method: Method, reply: Reply, module: str) -> np.ndarray:
    b, a = (x.double().numpy() for x in reply.factors[module])
    update = SCALING * b @ a
    if getattr(method, "mode", "") == "delta":
        b, a = (x.double().numpy() for x in reply.sent.factors[module])
        update = update - SCALING * b @ a
    return update


def expected(
    method: Method, name: str, server: Server, replies: list[Reply], rule: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The model after the round, densely, and the head."""
    updates = {m: [dense_update(method, r, m) for r in replies] for m in SHAPES}
    flat = np.stack([np.concatenate([updates[m][i].ravel() for m in SHAPES]) for i in range(6)])
    norms = np.linalg.norm(flat, axis=1)
    weights = norms / norms.sum() if name == "hetlora" else np.array(EXAMPLES) / sum(EXAMPLES)
    trust, scale = dense.verdict(rule, flat, weights.tolist())
    if name == "hetlora":
        weights = norms * scale
    w = weights * trust / (weights @ trust)
    voices = np.array(EXAMPLES) * trust * scale
    heads = [r.dense["head.weight"].double().numpy() for r in replies]
    head = sum(v * h for v, h in zip(voices / voices.sum(), heads, strict=True))
    out = {}
    for m in SHAPES:
        before = effective(method.model(server), m)
        mean = sum(wi * c * x for wi, c, x in zip(w, scale, updates[m], strict=True))
        if name in ("fedit", "hetlora", "fedrot", "fedplora"):
            pairs = []
            for r, c in zip(replies, scale, strict=True):
                b, a = (np.sqrt(c) * x.double().numpy() for x in r.factors[m])
                if name == "fedrot":  # the second round turns by A
                    turn = dense.best_rotation(a @ r.sent.factors[m][1].double().numpy().T)
                    b, a = b @ turn, turn.T @ a
                pairs.append((b, a))
            b, a = dense.zero_padded_mean(pairs, w.tolist())
            out[m] = SCALING * b @ a
        elif name == "flora":
            out[m] = before + mean
        elif name == "fedex":  # what was merged stays, the averaged pair is replaced
            b, a = (x.double().numpy() for x in server.factors[m])
            out[m] = before - SCALING * b @ a + mean
        elif name == "delta":
            b_a = server.svd[m]
            out[m] = ((b_a.u * b_a.s.to(b_a.u.dtype)) @ b_a.v.mT).double().numpy() + mean
        else:
            out[m] = mean
    return out, head


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_every_method_combines_the_judged_replies(
    name: str, ranks: tuple[int, ...], rule: str
) -> None:
    method = method_of(name, ranks)
    server = method.start(setup(ranks))
    server = method.combine(server, replies_of(method, server, bad=False))
    replies = replies_of(method, server, bad=True)
    heard, record = heed(method, Rule(rule, 2.0), replies)
    after = method.combine(server, heard)
    models, head = expected(method, name, server, replies, rule)
    for m in SHAPES:
        assert close(effective(method.model(after), m), models[m], 1e-4)
        plain = effective(method.model(method.combine(server, replies)), m)
        assert not close(plain, models[m], 0.05)  # the rule matters
    assert close(after.dense["head.weight"].numpy(), head, 1e-5)
    assert record is not None
    if rule == "gate" and name != "delta":
        assert record["left_out"] == [f"client {FLIPPED}"]
    if rule == "clip":
        assert record["clients"][LOUD]["scale"] < 0.2


def test_without_a_rule_nothing_is_judged() -> None:
    method = METHODS["fedit"]()
    replies = replies_of(method, method.start(setup(EQUAL)), bad=True)
    heard, record = heed(method, None, replies)
    assert record is None
    assert all(x is y for x, y in zip(heard, replies, strict=True))


def test_hetlora_does_not_prune_whom_the_rule_has_shortened() -> None:
    method = METHODS["hetlora"](gamma=0.5, penalty=0.1)
    server = method.start(setup((4,) * 6))
    server = method.combine(server, replies_of(method, server, bad=False))
    replies = replies_of(method, server, bad=True)
    plain = method.combine(server, replies)
    heard, _ = heed(method, Rule("clip", 2.0), replies)
    assert heard[LOUD].scale < 1
    assert method.combine(server, heard).ranks == plain.ranks


# --- whole runs ------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 2 sends the opposite of what it learnt."""
    plain = Trainer.train

    def train(self: Trainer, sent: Any, client: Client, *more: Any) -> Learnt:
        learnt = plain(self, sent, client, *more)
        if client.index != 2:
            return learnt
        turned: dict[str, tuple[Tensor, Tensor]] = {
            m: (-b, a) for m, (b, a) in learnt.factors.items()
        }
        return replace(learnt, factors=turned)

    monkeypatch.setattr(Trainer, "train", train)


SHARED = {"clients": {"partition": "iid", "count": 5}, "training": {"rounds": 2}}


@pytest.mark.usefixtures("poisoned")
def test_a_run_leaves_out_by_name_records_it_and_resumes_to_the_same_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    how = {"kind": "fedit", "robust": "gate"}
    with caplog.at_level(logging.WARNING, "glora_ops"):
        whole = run_small(tmp_path / "whole" / "seed0", how, **SHARED)
    assert "left client 2 out" in caplog.text
    lines = whole.lines()[1:]
    assert [line["robust"]["left_out"] for line in lines] == [["client 2"]] * 2
    assert all(len(line["clients"]) == 5 for line in lines)  # who answered, heard or not
    assert lines[-1]["alignment"]["cosines"][2][0] < 0 < lines[-1]["alignment"]["cosines"][1][0]

    summary = summarise(*load_runs([tmp_path / "whole"]))
    assert summary["left_out"] == [{"method": "it", "seed": 0, "client": "client 2", "rounds": 2}]
    assert "Left out by robust rules: client 2 (it, seed 0: 2 rounds)" in markdown(summary)

    plan = Plan(config({"it": how}, **SHARED), "it", 0, 0.005)
    run(plan, tmp_path / "half", rounds=1)
    (tmp_path / "half" / "done").unlink()
    run(plan, tmp_path / "half", resume=True)
    half = Run(tmp_path / "half")
    assert [x.get("robust") for x in half.lines()] == [x.get("robust") for x in whole.lines()]
    assert all(torch.equal(x, state(half)[name]) for name, x in state(whole).items())


@pytest.mark.usefixtures("poisoned")
def test_both_engines_judge_alike(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="Flower needs Python 3.11")
    from fl_grid import LoopGrid
    from test_fl_flower import NODES, numbers, run_flower, same_state

    clients = {"partition": "iid"}
    method = {"kind": "glora", "robust": "geometric-median"}
    here = run_small(tmp_path / "local", method, clients=clients)
    there = run_flower(
        tmp_path / "flower", method, LoopGrid(NODES, tmp_path / "nodes"), clients=clients
    )
    assert reproducible(here) == numbers(there)
    assert same_state(here, there)
    trusts = [c["trust"] for c in here.lines()[-1]["robust"]["clients"]]
    assert min(range(4), key=lambda i: trusts[i]) == 2


def test_the_rule_of_the_configuration_is_every_arms_unless_it_has_its_own() -> None:
    made = config({"one": {"kind": "glora"}, "two": {"kind": "flora", "robust": "clip"}})
    assert made.rule("one") is None
    made = made.model_validate(made.model_dump() | {"robust": "gate", "robust_clip": 3.0})
    assert (made.rule("one"), made.rule("two")) == (Rule("gate", 3.0), Rule("clip", 3.0))
    with pytest.raises(ValueError, match=r"robust: .*krum"):
        config({"one": {"kind": "glora", "robust": "krum"}})


def test_a_rule_changes_what_a_run_is(tmp_path: Path) -> None:
    plan = Plan(config({"it": {"kind": "fedit"}}), "it", 0, 0.005)
    run(plan, tmp_path, rounds=1)
    other = Plan(config({"it": {"kind": "fedit", "robust": "gate"}}), "it", 0, 0.005)
    with pytest.raises(GloraError, match="gate"):
        run(other, tmp_path, resume=True)
