"""A Flower grid whose nodes live in this process: every message is answered when it is sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from glora_ops.fl.flower import client_app


class LoopGrid(Grid):
    """One node per entry of `configs`; ids are far from the order of the partitions.

    `answer(node, message)` may be replaced by a test; None is no answer at all.
    """

    def __init__(self, configs: Iterable[dict[str, Any]], state_dir: Path) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self.app: ClientApp = client_app(state_dir=state_dir)
        self.configs = {1000 - 7 * i: UserConfig(c) for i, c in enumerate(configs)}
        self.online = set(self.configs)
        self.sent: list[Message] = []
        self.replies: dict[str, Message] = {}
        self._numbers = itertools.count()

    def node(self, client: int) -> int:
        return next(n for n, c in self.configs.items() if c["partition-id"] == client)

    def answer(self, node: int, message: Message) -> Message | None:
        context = Context(1, node, self.configs[node], RecordDict(), UserConfig())
        try:
            return self.app(message, context)
        except Exception as error:
            return Message(Error(code=1, reason=repr(error)), reply_to=message)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            names.append(str(next(self._numbers)))
            message.metadata.__dict__["_message_id"] = names[-1]
            self.sent.append(message)
            reply = self.answer(message.metadata.dst_node_id, message)
            if reply is not None:
                self.replies[names[-1]] = reply
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(name) for name in message_ids if name in self.replies][::-1]

    def send_and_receive(self, *args: Any, **kwargs: Any) -> Iterable[Message]:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError
