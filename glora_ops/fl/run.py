"""A whole run: one configuration, one method, one seed."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import Config
from .diagnostics import alignment, misalignment, own_score, significant, update_facts
from .engine_local import Answers, Engine, LocalEngine
from .messages import Client
from .methods import Method
from .partition import split
from .records import Run, server_about, server_from, server_tensors
from .round import participants, run_round
from .server import Server, Setup
from .tasks.base import Answer, HeldOut, Judged, Task
from .tasks.build import build_task
from .trainer import LocalTraining, Trainer, single_thread

__all__ = ["EngineFactory", "Plan", "local_engine", "partition_of", "run"]

Progress = Callable[[str, int, int], None]
Watch = Callable[[Mapping[str, Any]], None]


class Plan:
    """Everything a run needs before its first round, on the server or on a client's machine.

    What a client needs follows from (config, label, seed, lr, data folder) alone, so that every
    process of a deployment has the same partition, model and streams. `held_out` is what the
    server judges on: a sweep's trials and the runs that are reported share no example.
    """

    def __init__(
        self, config: Config, label: str, seed: int, lr: float, data_dir: Path | None = None,
        held_out: HeldOut = "test",
    ) -> None:  # fmt: skip
        self.config, self.label, self.seed, self.lr = config, label, seed, lr
        self.method: Method = config.method(label)
        self.rule = config.rule(label)
        self.optimiser = config.server_optimiser(label)
        self.task: Task = build_task(config, seed, data_dir, held_out)
        t, c = config.training, config.clients
        self.trainer = Trainer(
            self.task,
            LocalTraining(
                t.steps, t.batch, lr, t.head_lr, t.optimiser, t.optimiser_state, t.weight_decay,
                t.clip, t.dropout, c.gauge, seed, config.model.device,
            ),
        )  # fmt: skip
        self.parts = partition_of(config, self.task, seed)
        self.setup = Setup(
            self.trainer.shapes, config.ranks, c.scaling, self.trainer.dense,
            c.start == "shared", seed,
        )  # fmt: skip


def partition_of(config: Config, task: Task, seed: int) -> list[np.ndarray]:
    """Rows of each client."""
    c = config.clients
    return split(
        task.labels, c.partition, c.count, seed, alpha=c.alpha, at_least=c.at_least,
        shards_per_client=c.shards_per_client,
    )  # fmt: skip


EngineFactory = Callable[[Plan], Engine]


def local_engine(plan: Plan) -> Engine:
    c = plan.config.clients
    return LocalEngine(plan.trainer, plan.parts, c.wire, c.lost, plan.seed)


def run(
    plan: Plan,
    folder: Path,
    *,
    engine: EngineFactory = local_engine,
    resume: bool = False,
    rounds: int | None = None,
    progress: Progress | None = None,
    watch: Watch = lambda line: None,
) -> list[dict[str, Any]]:
    """Run to the end, committing every round; the metrics, round by round.

    Parameters
    ----------
    plan : Plan
    folder : path
        Of this run; see `records`.
    engine : callable
        Plan → Engine.
    resume : bool
        Go on where a killed run stopped; a finished one is left as it is.
    rounds : int, optional
        Instead of the configuration's.
    progress : callable (text, done, total), optional
    watch : callable (line), optional
        Is given every round's line, those of before a restart too.
    """
    record = Run(folder)
    with record.held():
        return _run(record, plan, engine, resume, rounds, progress, watch)


def _run(
    record: Run,
    plan: Plan,
    engine: EngineFactory,
    resume: bool,
    rounds: int | None,
    progress: Progress | None,
    watch: Watch,
) -> list[dict[str, Any]]:
    total = rounds or plan.config.training.rounds
    going_on = record.begin(_about(plan), resume=resume)
    if record.done:
        for line in record.lines():
            watch(line)
        return record.lines()

    def append(line: dict[str, Any]) -> None:
        record.append(line)
        watch(line)

    with single_thread():
        carrier = engine(plan)
        server = plan.method.start(plan.setup)
        if going_on:
            server, tensors, about = record.restore(server)
            carrier.load(tensors, about)
            server = replace(server, setup=plan.setup)  # with the ranks that nodes told before
            for line in record.lines():
                watch(line)
        else:
            append(_line(plan, server, None, Answers([]), total, {})[0])
            record.commit(server, carrier.save())
        while server.round < total:
            begun = time.perf_counter()
            before = server
            asked = participants(server, plan.config.clients.participation)
            server, answers = run_round(
                plan.method, server, carrier, asked, plan.rule, plan.optimiser
            )
            seconds = {"round": time.perf_counter() - begun, "combine": answers.combine_seconds}
            line, judged = _line(plan, server, before, answers, total, seconds)
            append(line)
            if server.round == total:
                record.write_predictions(total, judged)
            # Through the checkpoint's form every round, so that a restart changes no bit.
            server = server_from(server_tensors(server), server_about(server), before)
            record.commit(server, carrier.save())
            if progress is not None:
                what = f"{plan.config.name} {plan.label} seed {plan.seed} lr {plan.lr:g}"
                progress(what, server.round, total)
    record.finish()
    return record.lines()


def _line(
    plan: Plan,
    server: Server,
    before: Server | None,
    answers: Answers,
    total: int,
    seconds: Mapping[str, float],
) -> tuple[dict[str, Any], list[Answer]]:
    """What is recorded of a round, and what the server's model answered."""
    how, last = plan.config.evaluation, server.round == total
    model = plan.method.model(server)
    line: dict[str, Any] = {
        "round": server.round,
        "bytes_down": answers.bytes_down,
        "bytes_up": answers.bytes_up,
        "clients": [
            {**r.metrics, "client": r.client.index, "rank": r.sent.rank, "examples": r.examples}
            for r in answers.replies
        ],
        "failures": [{"client": f.client.index, "reason": f.reason} for f in answers.failures],
        "notes": significant(server.notes),
    }
    if answers.processes:
        clients = {str(client): pid for client, pid in answers.processes.items()}
        line["processes"] = {"server": os.getpid(), "clients": clients}
    if answers.verdict is not None:
        line["robust"] = significant(answers.verdict)
    if before is not None and answers.replies:
        if how.spectra:
            exact = plan.method.exact(before, answers.heard)
            line["update"] = significant(update_facts(model, before.merged, exact))
        if how.agreement == "every" or (how.agreement == "last" and last):
            line["alignment"] = alignment(answers.replies)
            line["misalignment"] = significant(misalignment(answers.replies))
    begun = time.perf_counter()
    answers_of: list[Answer] = []
    if last or server.round % how.every == 0:
        line["metrics"], answers_of = plan.trainer.evaluate(model)
        if how.by_rank == "every" or (how.by_rank == "last" and last):
            line |= _received(plan, server)
    line["seconds"] = {**seconds, "evaluation": time.perf_counter() - begun}
    return line, answers_of


def _received(plan: Plan, server: Server) -> dict[str, Any]:
    """What clients are sent next: its rank, client by client; its metrics, rank by rank; and what
    each client reads of it on held-out examples in its own mix of labels."""
    ranks: list[int] = []
    judged: dict[int, Judged] = {}
    for i, rank in enumerate(plan.setup.ranks):
        sent = plan.method.broadcast(server, Client(i, rank))
        ranks.append(sent.rank)
        if sent.rank not in judged:
            judged[sent.rank] = plan.trainer.evaluate(sent)
    classes = len(plan.task.label_names)
    own = [
        own_score(judged[rank].answers, np.bincount(plan.task.labels[rows], minlength=classes))
        for rank, rows in zip(ranks, plan.parts, strict=True)
    ]
    by_rank = {str(rank): judged[rank].metrics for rank in sorted(judged)}
    return {"by_rank": by_rank, "sent_ranks": ranks, "own": own}


def _about(plan: Plan) -> dict[str, Any]:
    config = plan.config.model_dump(mode="json")
    # A folder's name, not where it lies; whether it is the same model the weights tell.
    config["model"]["name"] = (
        Path(plan.config.model.name).name
        if Path(plan.config.model.name).is_dir()
        else plan.config.model.name
    )
    return {
        "config": config,
        "method": plan.label,
        "seed": plan.seed,
        "lr": plan.lr,
        "metric": plan.task.metric,
        "parameters": plan.trainer.parameters,
        "weights": plan.trainer.weights,
        "examples": [len(rows) for rows in plan.parts],
        "versions": {name: _version(name) for name in ("glora", "torch", "peft", "transformers")},
        "python": platform.python_version(),
        "machine": {"system": platform.system(), "cpu": platform.machine(), "threads": 1},
        "torch": torch.__version__,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
