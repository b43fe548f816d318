"""Bytes between server and clients, counted the same way for every engine.

A client keeps the tensors of its last message. What it holds bit for bit is named by its digest and
not sent again: a frozen factor or a merged pair travels once. A client that failed may have lost
everything; it is sent everything.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .messages import digest, wire_bytes

__all__ = ["Traffic"]


class Traffic:
    """Which digests each client holds."""

    def __init__(self, wire: str) -> None:
        self.wire = wire
        self.held: dict[int, list[str]] = {}

    def to_send(self, client: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of a message that the client does not hold."""
        held = set(self.held.get(client, ()))
        return {name: x for name, x in tensors.items() if digest(x) not in held}

    def answered(self, client: int, tensors: Mapping[str, Tensor]) -> None:
        """The client has answered a message after which it holds `tensors` (`held_tensors`)."""
        self.held[client] = sorted({digest(x) for x in tensors.values()})

    def failed(self, client: int) -> None:
        self.held.pop(client, None)

    def bytes(self, tensors: Mapping[str, Tensor]) -> int:
        return wire_bytes(tensors, self.wire)
