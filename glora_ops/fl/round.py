"""One round of federated learning."""

from __future__ import annotations

import time
from dataclasses import replace

from .engine_local import Answers, Engine
from .judging import Rule, heed
from .messages import Client
from .methods import Method
from .seeds import numpy_stream
from .server import Server, clients_of
from .server_optimiser import ServerOptimiser

__all__ = ["participants", "run_round"]


def run_round(
    method: Method,
    server: Server,
    engine: Engine,
    asked: list[Client],
    rule: Rule | None = None,
    optimiser: ServerOptimiser | None = None,
) -> tuple[Server, Answers]:
    """Broadcast, train, judge, combine, step. Without a single reply the state stays as it is."""
    work = [(client, method.broadcast(server, client)) for client in asked]
    answers = engine.train(server.round, work)
    if not answers.replies:
        return replace(server, round=server.round + 1, notes={}), answers
    began = time.perf_counter()
    heard, verdict = heed(method, rule, answers.replies)
    after = method.combine(server, heard)
    if optimiser is not None:
        after = optimiser.step(method, server, after)
    seconds = time.perf_counter() - began
    return after, replace(answers, heard=heard, verdict=verdict, combine_seconds=seconds)


def participants(server: Server, fraction: float) -> list[Client]:
    """Who is asked this round: a seeded sample, in client order, the same for every method."""
    setup = server.setup
    count = max(1, round(fraction * len(setup.ranks)))
    rng = numpy_stream(setup.seed, "participants", server.round)
    chosen = rng.choice(len(setup.ranks), size=count, replace=False)
    everyone = clients_of(setup.ranks)
    return [everyone[i] for i in sorted(chosen)]
