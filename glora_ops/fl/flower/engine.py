"""The server's side: rounds over a Flower `Grid`, one message per node."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from pydantic import BaseModel
from torch import Tensor

from ...errors import GloraError, NodeRefusedWarning, require
from ..engine_local import LOST, Answers, lost
from ..messages import (
    Client,
    Failure,
    Reply,
    Sent,
    digest,
    held_tensors,
    on_the_wire,
    reply_from,
    reply_tensors,
    sent_tensors,
)
from ..run import Plan
from ..traffic import Traffic
from .codec import Ask, Facts, Trained, Unable, Work, content_of, form_of, tensors_of
from .node import plan_text

__all__ = ["FlowerEngine"]

POLL = 0.2  # seconds between two looks for replies
LONGEST_REASON = 500  # characters of what a node says

F = TypeVar("F", bound=BaseModel)


class Forgot(GloraError):
    """The node has lost what it kept."""


class FlowerEngine:
    """Sends each client's message to its node and waits for the replies.

    Nodes have other ids in every run and answer in any order. Before the first round each is asked
    which client it is; replies are combined in the clients' order. A node that joins later or comes
    back takes part from the next round on. One that is away, fails, or answers late or wrongly is a
    `Failure` of that round.

    Parameters
    ----------
    grid : Grid
    plan : Plan
        Its ranks become those that the nodes tell.
    patience : float
        Seconds to wait for all nodes before the first round; it then starts with those that came.
    timeout : float
        Seconds to wait for the replies of a round.
    over : threading.Event, optional
        Set when Flower's runtime has ended: no reply will come any more.

    Raises
    ------
    GloraError
        If no client's node came.
    """

    def __init__(
        self,
        grid: Grid,
        plan: Plan,
        *,
        patience: float = 120.0,
        timeout: float = 3600.0,
        over: threading.Event | None = None,
    ) -> None:
        self.grid, self.plan, self.text = grid, plan, plan_text(plan)
        self.patience, self.timeout, self.over = patience, timeout, over or threading.Event()
        self.traffic = Traffic(plan.config.clients.wire)
        self.states: dict[int, str] = {}  # client → name of what its node keeps between rounds
        self.nodes: dict[int, int] = {}  # client → node
        self.ranks: dict[int, int] = {}  # client → rank
        self.refused: dict[int, str] = {}  # node → why
        planned = plan.config.ranks
        deadline = time.monotonic() + patience
        self._meet(deadline)
        while len(self.nodes) + len(self.refused) < len(planned) and time.monotonic() < deadline:
            self._pause()
            self._meet(deadline)
        require(
            bool(self.nodes), "nodes", "none", f"up to {len(planned)}, one per client",
            "; ".join(self.refused.values())
            or "start SuperNodes with --node-config 'partition-id=0', 1, …",
        )  # fmt: skip
        self.ranks = {i: self.ranks.get(i, rank) for i, rank in enumerate(planned)}
        plan.setup = replace(plan.setup, ranks=tuple(self.ranks.values()))

    def train(self, round: int, work: Sequence[tuple[Client, Sent]]) -> Answers:
        self._meet(time.monotonic() + self.patience)
        as_sent = {client: on_the_wire(message, self.traffic.wire) for client, message in work}
        to_nodes: dict[int, RecordDict] = {}
        down = up = 0
        for client, sent in as_sent.items():
            if client.index not in self.nodes:
                continue
            content, size = self._content(round, client, sent)
            down += size
            if not self._lost(round, client):
                to_nodes[self.nodes[client.index]] = content
        answered = self._exchange(to_nodes, MessageType.TRAIN, time.monotonic() + self.timeout)
        replies: list[Reply] = []
        failures: list[Failure] = []
        processes: dict[int, int] = {}
        for client, sent in as_sent.items():
            try:
                message = self._message(round, client, answered)
                reply, size, processes[client.index] = self._reply(client, sent, message)
            except GloraError as error:
                failures.append(Failure(client, str(error)[:LONGEST_REASON]))
                self.traffic.failed(client.index)
                continue
            up += size
            replies.append(reply)
            self.traffic.answered(client.index, held_tensors(sent))
        return Answers(replies, failures, down, up, processes=processes)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Client states stay on their nodes; what is saved is their names."""
        states = {str(i): name for i, name in self.states.items()}
        return {}, {"held": {str(i): names for i, names in self.traffic.held.items()},
                    "states": states, "ranks": list(self.ranks.values())}  # fmt: skip

    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        require("states" in about, "checkpoint", "one of the local engine", "one of Flower's",
                "go on with --engine local, or run anew with another -o")  # fmt: skip
        self.traffic.held = {int(i): list(names) for i, names in about["held"].items()}
        self.states = {int(i): str(name) for i, name in about["states"].items()}
        for i, rank in enumerate(about["ranks"]):
            if i in self.nodes and self.ranks[i] != rank:
                self._refuse(self.nodes.pop(i), _other_rank(i, self.ranks[i], rank))
            self.ranks[i] = rank
        self.plan.setup = replace(self.plan.setup, ranks=tuple(self.ranks.values()))

    # --- nodes -------------------------------------------------------------------------------

    def _meet(self, deadline: float) -> None:
        """Ask the nodes that are new which client they are; forget those that are gone."""
        online = set(self.grid.get_node_ids())
        self.nodes = {client: node for client, node in self.nodes.items() if node in online}
        self.refused = {node: why for node, why in self.refused.items() if node in online}
        new = online - set(self.nodes.values()) - self.refused.keys()
        ask = content_of(Ask(plan=self.text))
        answers = self._exchange(dict.fromkeys(sorted(new), ask), MessageType.QUERY, deadline)
        for node, message in sorted(answers.items()):
            try:
                self._admit(node, self._form(message, Facts))
            except GloraError as error:
                self._refuse(node, str(error))

    def _refuse(self, node: int, why: str) -> None:
        self.refused[node] = why[:LONGEST_REASON]
        warnings.warn(f"node refused: {self.refused[node]}", NodeRefusedWarning, stacklevel=3)

    def _admit(self, node: int, facts: Facts) -> None:
        who, parts = f"node of client {facts.client}", self.plan.parts
        require(facts.client < len(parts), "client", facts.client, f"0 … {len(parts) - 1}")
        require(facts.client not in self.nodes, who, "a second one", "one node per client",
                "another partition-id")  # fmt: skip
        require(facts.examples == len(parts[facts.client]), f"examples of the {who}",
                facts.examples, str(len(parts[facts.client])),
                "the same data and the same versions on every machine")  # fmt: skip
        most = min(map(sum, self.plan.setup.shapes.values()))
        require(facts.rank <= most, f"rank of the {who}", facts.rank, f"at most {most}",
                "no update of the smallest layer needs more")  # fmt: skip
        first = self.ranks.setdefault(facts.client, facts.rank)
        if first != facts.rank:
            raise GloraError(_other_rank(facts.client, facts.rank, first))
        self.nodes[facts.client] = node

    # --- messages ----------------------------------------------------------------------------

    def _content(self, round: int, client: Client, sent: Sent) -> tuple[RecordDict, int]:
        """The message to a client, and its payload in bytes."""
        tensors = sent_tensors(sent)
        part = self.traffic.to_send(client.index, tensors)
        work = Work(
            plan=self.text, client=client.index, rank=client.rank, round=round,
            state=self.states.get(client.index, ""), sent=sent.about,
            tensors={name: digest(x) for name, x in tensors.items()},
        )  # fmt: skip
        return content_of(work, part, self.traffic.wire), self.traffic.bytes(part)

    def _lost(self, round: int, client: Client) -> bool:
        return lost(self.plan.seed, round, client, self.plan.config.clients.lost)

    def _message(self, round: int, client: Client, answered: Mapping[int, Message]) -> Message:
        if client.index not in self.nodes:
            raise GloraError("its node is not connected")
        if self._lost(round, client):
            raise GloraError(LOST)
        if self.nodes[client.index] not in answered:
            raise GloraError(f"no reply within {self.timeout:g} s")
        return answered[self.nodes[client.index]]

    def _form(self, message: Message, kind: type[F]) -> F:
        """What a node answered, where it did what it was asked."""
        if message.has_error():
            raise GloraError(f"Flower error {message.error.code}: {message.error.reason}")
        form: F | Unable = form_of(message.content, kind | Unable)  # type: ignore[arg-type]  # a union
        if isinstance(form, Unable):
            raise Forgot(form.reason) if form.forgot else GloraError(form.reason)
        return form

    def _reply(self, client: Client, sent: Sent, message: Message) -> tuple[Reply, int, int]:
        """The reply, its payload in bytes, and the process it comes from."""
        try:
            learnt = self._form(message, Trained)
        except Forgot:
            self.states.pop(client.index, None)
            raise
        held = len(self.plan.parts[client.index])  # its weight is not the node's to choose
        require(learnt.examples == held, "examples", learnt.examples, f"{held}, as its part has")
        tensors = tensors_of(message.content, self.traffic.wire)
        rank = sent.rank
        asked = {
            m: (b.new_empty(b.shape[0], rank), a.new_empty(rank, a.shape[1]))
            for m, (b, a) in sent.factors.items()
        }
        expected = {n: x.shape for n, x in reply_tensors(asked, sent.dense, sent.train).items()}
        wrong = [n for n in expected.keys() | tensors.keys()
                 if n not in tensors or expected.get(n) != tensors[n].shape]  # fmt: skip
        require(not wrong, "reply", f"{sorted(wrong)[:3]} missing, unknown or of another shape",
                f"{len(expected)} tensors shaped as they were sent")  # fmt: skip
        self.states[client.index] = learnt.state
        factors, dense = reply_from(tensors, sent)
        reply = Reply(client, sent, factors, dense, learnt.examples, learnt.metrics)
        return reply, self.traffic.bytes(tensors), learnt.process

    def _exchange(
        self, contents: Mapping[int, RecordDict], kind: str, deadline: float
    ) -> dict[int, Message]:
        """Send to nodes; what they answer until the deadline, by node."""
        ttl = max(deadline - time.monotonic(), 1.0)  # nobody begins what nobody waits for
        messages = [Message(content, node, kind, ttl=ttl) for node, content in contents.items()]
        self.grid.push_messages(messages)
        waiting = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
        out: dict[int, Message] = {}
        while waiting:
            for message in self.grid.pull_messages(list(waiting)):
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is not None:
                    out[node] = message
            if time.monotonic() > deadline:
                break
            if waiting:
                self._pause()
        return out

    def _pause(self) -> None:
        if self.over.wait(POLL):
            raise GloraError("Flower: the runtime has ended before the run")


def _other_rank(client: int, rank: int, before: int) -> str:
    return (
        f"rank of the node of client {client}: got {rank}, expected {before}, as when the run began"
    )
