"""The in-process engine: clients one after the other, in this process, with one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..errors import GloraError, require
from .messages import (
    Client,
    Failure,
    Reply,
    Sent,
    held_tensors,
    on_the_wire,
    reply_from,
    reply_tensors,
    rounded,
    sent_tensors,
)
from .seeds import numpy_stream
from .traffic import Traffic
from .trainer import ClientState, Trainer

__all__ = ["LOST", "Answers", "Engine", "LocalEngine", "lost"]

LOST = "the reply was lost (clients.lost)"


@dataclass(frozen=True, eq=False)
class Answers:
    """What an engine brings back from a round: replies in client order, failures, payload bytes.

    `run_round` fills in `heard`, the replies as a robust rule leaves them, with its `verdict`, and
    `combine_seconds`, what the server took to aggregate. `processes` says which process answered
    for a client, where it was another than this one.
    """

    replies: list[Reply]
    failures: list[Failure] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0
    combine_seconds: float = 0.0
    heard: list[Reply] = field(default_factory=list)
    verdict: dict[str, Any] | None = None
    processes: dict[int, int] = field(default_factory=dict)


class Engine(Protocol):
    """Carries messages to clients and replies back. It knows nothing of methods.

    ``Reply.sent`` is the message as it arrived (after rounding to the wire's precision).
    """

    def train(self, round: int, work: Sequence[tuple[Client, Sent]]) -> Answers:
        """One round of local training; a client that fails becomes a `Failure`."""

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Clients' states and bookkeeping, for the checkpoint: tensors and JSON."""

    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Restore what `save` gave."""


def lost(seed: int, round: int, client: Client, probability: float) -> bool:
    """Whether this reply is one of those that never arrive."""
    return numpy_stream(seed, "lost", round, client.index).random() < probability


class LocalEngine:
    """Trains every client in turn.

    Parameters
    ----------
    trainer : Trainer
    parts : sequence of ndarray
        Rows of each client.
    wire : {"float32", "bfloat16"}
    lost : float
        Probability that a reply is lost, drawn from the run's seed.
    seed : int
    """

    def __init__(
        self, trainer: Trainer, parts: Sequence[np.ndarray], wire: str, lost: float, seed: int
    ) -> None:
        self.trainer, self.parts, self.lost, self.seed = trainer, parts, lost, seed
        self.states: dict[int, ClientState] = {}
        self.traffic = Traffic(wire)

    def train(self, round: int, work: Sequence[tuple[Client, Sent]]) -> Answers:
        replies: list[Reply] = []
        failures: list[Failure] = []
        down = up = 0
        for client, message in work:
            sent = on_the_wire(message, self.traffic.wire)
            tensors = sent_tensors(sent)
            down += self.traffic.bytes(self.traffic.to_send(client.index, tensors))
            try:
                reply, size = self._one(round, client, sent)
            except GloraError as error:
                failures.append(Failure(client, str(error)))
                self.traffic.failed(client.index)
                continue
            up += size
            replies.append(reply)
            self.traffic.answered(client.index, held_tensors(sent))
        return Answers(replies, failures, down, up)

    def _one(self, round: int, client: Client, sent: Sent) -> tuple[Reply, int]:
        if lost(self.seed, round, client, self.lost):
            raise GloraError(LOST)
        state = self.states.get(client.index, {})
        learnt = self.trainer.train(sent, client, self.parts[client.index], round, state)
        self.states[client.index] = learnt.state
        tensors = reply_tensors(learnt.factors, learnt.dense, sent.train)
        arrived = {name: rounded(x, self.traffic.wire) for name, x in tensors.items()}
        factors, dense = reply_from(arrived, sent)
        reply = Reply(client, sent, factors, dense, learnt.examples, learnt.metrics)
        return reply, self.traffic.bytes(tensors)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"{i}/{key}": x for i, s in self.states.items() for key, x in s.items()}
        return tensors, {"held": {str(i): names for i, names in self.traffic.held.items()}}

    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        require("states" not in about, "checkpoint", "one of Flower's", "one of the local engine",
                "go on with --engine flower, or run anew with another -o")  # fmt: skip
        self.states = {}
        for name, x in tensors.items():
            client, _, key = name.partition("/")
            self.states.setdefault(int(client), {})[key] = x
        self.traffic.held = {int(i): list(names) for i, names in about["held"].items()}
