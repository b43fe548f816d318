"""What the ranks of a process group tell each other, a rank that is gone included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import GloraError, Refusal, Refused, require, unfit

__all__ = ["NOTHING", "Message", "Ranks"]

#: What JSON can say, and tensors.
Message = tuple[Any, list[Tensor]]
NOTHING: Message = (None, [])


@dataclass(frozen=True)
class Ranks:
    """A process group that moves tensors of the CPU.

    Attributes
    ----------
    group : ProcessGroup
    rank, size : int
        This process's, and how many there are.
    timeout : timedelta or None
        How long to wait for another rank; None is the group's.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    timeout: timedelta | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """The ranks of a group, by default of all processes; raises `GloraError` without one."""
        require(
            dist.is_available() and dist.is_initialized(), "group", "none", "a process group",
            'call torch.distributed.init_process_group("gloo") first, under torchrun',
        )  # fmt: skip
        group = group or dist.group.WORLD
        assert group is not None  # there is one
        rank = dist.get_rank(group)
        require(rank >= 0, "group", "one without this process", "one that this process is in")
        moves = dist.get_backend_config(group)
        require("cpu:" in moves, "group", f"one that moves {moves}", "one that moves cpu:gloo",
                'init_process_group("cpu:gloo,cuda:nccl") has both')  # fmt: skip
        return cls(group, rank, dist.get_world_size(group))

    def exchange(
        self,
        doing: str,
        messages: Sequence[Message],
        error: Exception | None = None,
        form: Any = None,
    ) -> list[Message]:
        """`messages[r]` reaches rank r; what the others had for this one, by their ranks.

        An `error` of any rank is raised on all instead. `GloraError` names the ranks from which
        nothing came: every rank is waited for first, so that whoever is here blames none that is.
        So it does a rank whose message is none, or holds no JSON of the type `form`.
        """
        from .letters import packed  # pydantic takes longer to import than the package

        verdict = None if error is None else _refusals(self.rank, error)
        if verdict is not None:
            messages = [NOTHING] * self.size
        others = [peer for peer in range(self.size) if peer != self.rank]
        out = {peer: packed(verdict, *messages[peer]) for peer in others}
        coming = {peer: torch.zeros(1, dtype=torch.int64) for peer in others}
        self._pass(doing, {peer: torch.tensor([len(x)]) for peer, x in out.items()}, coming)
        found = {peer: torch.empty(int(n), dtype=torch.uint8) for peer, n in coming.items()}
        self._pass(doing, out, found)
        out.clear()
        told = {peer: _read(peer, found.pop(peer).numpy().tobytes(), form) for peer in others}
        told[self.rank] = verdict, *messages[self.rank]
        refusals = [refusal for peer in range(self.size) for refusal in told[peer][0] or ()]
        if refusals:
            raise Refused(refusals) from error
        return [told[peer][1:] for peer in range(self.size)]

    def _pass(self, doing: str, out: dict[int, Tensor], into: dict[int, Tensor]) -> None:
        """Send `out` and wait for `into`, of every other rank, whichever of them fails."""
        failed: dict[int, RuntimeError] = {}

        def attempt(peer: int, do: Callable[[], Any]) -> Any:
            try:
                return do()
            except RuntimeError as error:
                failed.setdefault(peer, error)

        begun = []
        for peer, x in out.items():
            send = partial(dist.isend, x, group=self.group, group_dst=peer)
            receive = partial(dist.irecv, into[peer], group=self.group, group_src=peer)
            begun += [(peer, attempt(peer, send)), (peer, attempt(peer, receive))]
        limit = [] if self.timeout is None else [self.timeout]
        for peer, work in begun:
            if work is not None:
                attempt(peer, partial(work.wait, *limit))
        if failed:
            within = f"{self.timeout.total_seconds():g} s" if self.timeout else "the group's time"
            raise unfit(
                "group",
                f"nothing from {' and '.join(f'rank {peer}' for peer in sorted(failed))} of "
                f"{self.size} while {doing}",
                f"every rank's answer within {within}",
                "the output of the first that ended says why; end all ranks and start them again",
            ) from next(iter(failed.values()))


def _refusals(rank: int, error: Exception) -> tuple[Refusal, ...]:
    if isinstance(error, GloraError):
        return error.refusals
    return (
        Refusal(f"rank {rank} failed", found=f"{type(error).__name__}: {error}",
                expected="ranks that end well", remedy="its own output says more"),
    )  # fmt: skip


def _read(
    peer: int, message: bytes, form: Any
) -> tuple[Sequence[Refusal] | None, Any, list[Tensor]]:
    from .letters import unpacked

    try:
        return unpacked(message, form)
    except Exception as error:  # of any kind: whatever came is none of ours
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise unfit(
            "group",
            f"a message of rank {peer} that does not fit ({said:.200})",
            "what this version of glora sends",
            "install one version for all ranks",
        ) from None
