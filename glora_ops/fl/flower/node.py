"""The client's side: a `ClientApp` that builds the run's plan for itself and trains its part.

A node is client ``partition-id`` of the run. What it is to train comes with every message; where
its data lie and what rank it can afford are its own affair (``--node-config``): ``data-dir``,
``state-dir``, ``rank``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ...errors import GloraError
from ..config import Config
from ..messages import Client, digest, held_tensors, reply_tensors, sent_from
from ..run import Plan
from ..trainer import single_thread
from .codec import Ask, Facts, Trained, Unable, Work, content_of, form_of, tensors_of
from .shelf import Shelf, name_of

__all__ = ["client_app", "plan_text", "run_name"]

STATE_DIR = Path("~/.local/state/glora")
FORGOT = "what the server counts on is no longer in the node's state-dir"


def plan_text(plan: Plan) -> str:
    """What another process needs to build the same plan from its own data."""
    config = plan.config.model_dump(mode="json")
    return json.dumps([config, plan.label, plan.seed, plan.lr], sort_keys=True)


def run_name(plan: str) -> str:
    """Folder of a run in a node's state-dir."""
    return hashlib.blake2b(plan.encode(), digest_size=8).hexdigest()


@lru_cache(maxsize=1)
def _plan(text: str, data_dir: Path | None) -> Plan:
    config, label, seed, lr = json.loads(text)
    return Plan(Config.model_validate(config), label, seed, lr, data_dir)


def client_app(data_dir: Path | None = None, state_dir: Path | None = None) -> ClientApp:
    """The app of a node; ``--node-config`` overrules both folders.

    Parameters
    ----------
    data_dir : path, optional
        Local data, as for ``glora fl run --data-dir``.
    state_dir : path, optional
        What the node keeps between messages; ``~/.local/state/glora`` by default.
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        def facts() -> RecordDict:
            ask = form_of(message.content, Ask)
            return Node(ask.plan, context, data_dir, state_dir).facts()

        return _answer(message, facts)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def learn() -> RecordDict:
            work = form_of(message.content, Work)
            return Node(work.plan, context, data_dir, state_dir).train(work, message.content)

        return _answer(message, learn)

    return app


def _answer(message: Message, work: Callable[[], RecordDict]) -> Message:
    """The reply; what glora refuses is told to the server in its own words."""
    try:
        with single_thread():
            content = work()
    except GloraError as error:
        content = content_of(Unable(reason=str(error)))
    return Message(content, reply_to=message)


class Node:
    """A node in a run."""

    def __init__(
        self, plan: str, context: Context, data_dir: Path | None, state_dir: Path | None
    ) -> None:
        own = context.node_config
        self.plan = _plan(plan, Path(str(own["data-dir"])) if "data-dir" in own else data_dir)
        index, count = own.get("partition-id"), self.plan.config.clients.count
        if not isinstance(index, int) or not 0 <= index < count:
            raise GloraError(
                f"partition-id: got {index}, expected 0 … {count - 1}; one node per client, "
                "--node-config 'partition-id=…'"
            )
        self.index, self.rank = index, int(own.get("rank", self.plan.config.ranks[index]))
        home = Path(str(own["state-dir"])) if "state-dir" in own else state_dir or STATE_DIR
        self.shelf = Shelf(home.expanduser() / run_name(plan) / f"client{index}.safetensors")

    def facts(self) -> RecordDict:
        """The answer to a query."""
        examples = len(self.plan.parts[self.index])
        return content_of(Facts(client=self.index, rank=self.rank, examples=examples))

    def train(self, work: Work, content: RecordDict) -> RecordDict:
        """The answer to a round: what was learnt, or that what the server counts on is gone."""
        wire = self.plan.config.clients.wire
        held = self.shelf.tensors() | {digest(x): x for x in tensors_of(content, wire).values()}
        before = self.shelf.state(work.state)
        if before is None or not held.keys() >= set(work.tensors.values()):
            return content_of(Unable(reason=f"client {self.index}: {FORGOT}", forgot=True))
        tensors = {name: held[key] for name, key in work.tensors.items()}
        sent = sent_from(tensors, work.sent, self.plan.setup.shapes)
        client, rows = Client(work.client, work.rank), self.plan.parts[self.index]
        learnt = self.plan.trainer.train(sent, client, rows, work.round, before)
        after = name_of(learnt.state)
        self.shelf.keep(held_tensors(sent).values(), {work.state: before, after: learnt.state})
        answer = Trained(
            examples=learnt.examples, metrics=learnt.metrics, state=after, process=os.getpid()
        )
        return content_of(answer, reply_tensors(learnt.factors, learnt.dense, sent.train), wire)
