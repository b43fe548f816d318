"""Server optimisers against the formulas of their publications, on what each method holds."""

from __future__ import annotations

from typing import Any

import fl_dense as dense
import numpy as np
import pytest
import torch
from test_fl_methods import EQUAL, MIXED, SHAPES, effective, setup, train

from glora_ops.errors import GloraError
from glora_ops.fl.config import Config
from glora_ops.fl.messages import Client
from glora_ops.fl.methods import METHODS, Method
from glora_ops.fl.server import Server
from glora_ops.fl.server_optimiser import ServerOptimiser

Numbers = dict[str, np.ndarray]

AVGM = ServerOptimiser("fedavgm", 0.7, beta=0.8)
ADAM = ServerOptimiser("fedadam", 0.3, beta=0.8, beta2=0.9, tau=0.1)


def held(method: Method, server: Server, of: str) -> Numbers:
    """What the optimiser steps, dense: factors, or the whole update; and the heads."""
    out = {n: x.double().numpy() for n, x in server.dense.items()}
    if of == "factors":
        factors = (
            server.factors or method.opening(server, Client(-1, max(server.setup.ranks))).factors
        )
        for m, (b, a) in factors.items():
            rank = max(server.setup.ranks)
            out[f"{m}/B"] = np.pad(b.double().numpy(), ((0, 0), (0, rank - b.shape[1])))
            out[f"{m}/A"] = np.pad(a.double().numpy(), ((0, rank - a.shape[0]), (0, 0)))
    else:
        for m in SHAPES:
            started = bool(server.svd or server.merged)
            out[m] = effective(method.model(server), m) if started else np.zeros(SHAPES[m])
    return out


@pytest.mark.parametrize("optimiser", [AVGM, ADAM], ids=["fedavgm", "fedadam"])
@pytest.mark.parametrize(
    ("method", "ranks", "of"),
    [
        (METHODS["fedit"](), MIXED, "factors"),
        (METHODS["fedrot"](), EQUAL, "factors"),
        (METHODS["flora"](), MIXED, "update"),
        (METHODS["flexlora"](), MIXED, "update"),
        (METHODS["glora"](mode="adapter", rank=7), MIXED, "update"),
        (METHODS["glora"](mode="restart", rank=7, step=0.5), MIXED, "update"),
    ],
    ids=["fedit", "fedrot", "flora", "flexlora", "glora", "restart"],
)
def test_three_rounds_follow_the_formula(
    optimiser: ServerOptimiser, method: Method, ranks: tuple[int, ...], of: str
) -> None:
    server = method.start(setup(ranks))
    first: Numbers = {}
    second: Numbers = {}
    for _ in range(3):
        replies = train(method, server, 0.3)
        proposal = method.combine(server, replies)
        x, wanted = held(method, server, of), held(method, proposal, of)
        server = optimiser.step(method, server, proposal)
        found = held(method, server, of)
        assert found.keys() == x.keys()
        for name, old in x.items():
            delta = wanted[name] - old
            m = first.get(name, 0.0)
            if optimiser.kind == "fedavgm":
                first[name] = 0.8 * m + delta
                expected = old + 0.7 * first[name]
            else:
                first[name] = 0.8 * m + 0.2 * delta
                second[name] = 0.9 * second.get(name, 0.1**2) + 0.1 * delta**2
                expected = old + 0.3 * first[name] / (np.sqrt(second[name]) + 0.1)
            if name in SHAPES and server.svd:
                expected = dense.truncated(expected, server.svd[name].s.numel())
            scale = max(1.0, float(np.linalg.norm(expected)))
            assert np.linalg.norm(found[name] - expected) <= 2e-5 * scale, name


def test_one_step_of_momentum_at_rate_one_is_the_methods_own_result() -> None:
    method = METHODS["glora"](mode="delta")
    server = method.start(setup(MIXED))
    proposal = method.combine(server, train(method, server))
    stepped = ServerOptimiser("fedavgm", 1.0).step(method, server, proposal)
    for m in SHAPES:
        expected = effective(method.model(proposal), m)
        assert np.allclose(effective(method.model(stepped), m), expected, atol=1e-5)


def test_a_frozen_a_is_never_moved() -> None:
    method = METHODS["ffa"]()
    server = method.start(setup(EQUAL))
    first = method.opening(server, Client(-1, 3)).factors
    for _ in range(2):
        server = ADAM.step(method, server, method.combine(server, train(method, server)))
    for m in SHAPES:
        assert torch.equal(server.factors[m][1], first[m][1])


def test_clients_with_starts_of_their_own_begin_at_the_averaged_a() -> None:
    method = METHODS["fedit"]()
    server = method.start(setup(EQUAL, shared=False))
    proposal = method.combine(server, train(method, server))
    stepped = ServerOptimiser("fedavgm", 0.5).step(method, server, proposal)
    for m in SHAPES:
        assert torch.equal(stepped.factors[m][1], proposal.factors[m][1])
        torch.testing.assert_close(stepped.factors[m][0], 0.5 * proposal.factors[m][0])


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"kind": "fedadam"}, r"server\.lr"),
        ({"kind": "adam", "lr": 1.0}, r"server\.kind"),
        ({"kind": "fedavgm", "lr": 1.0, "beta": 1.0}, r"server\.beta"),
        ({"kind": "fedavgm", "lr": 1.0, "decay": 1.0}, r"server\.decay: unknown key.*beta2"),
    ],
)
def test_a_section_that_does_not_fit_is_refused_by_key(section: dict[str, Any], says: str) -> None:
    arm = {"kind": "glora", "server": section}
    with pytest.raises((GloraError, ValueError), match=says):
        Config.model_validate({"name": "x", "methods": {"it": arm}})
    with pytest.raises(GloraError):
        ServerOptimiser("fedavgm", 0.0)
