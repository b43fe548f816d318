"""One rank of a few: ``rank.py CASE FOLDER RANK SIZE``; what it makes lies in FOLDER."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glora_ops import GloraError, distributed
from glora_ops.distributed import aggregate
from glora_ops.runtime.ranks import Message, Ranks

SHAPES = {"q": (24, 20), "v": (12, 20), "down": (20, 40)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Client = dict[str, tuple[Tensor, Tensor]]
#: How many clients each rank has, and in which settings.
SPLITS: list[tuple[list[int], dict[str, Any]]] = [
    ([7], {}),
    ([4, 3], {"basis": "update", "weights": [3, 1, 2, 0, 1, 4, 2], "rank": 5, "seed": 3}),
    ([0, 7], {"missing": "renormalise", "scalings": [0.5, 1, 2, 1, 1, 3, 1]}),
    ([2, 0, 5], {"names": list("abcdefg"), "client_statistics": False}),
    ([5, 1, 1], {"basis": "update", "normalise": False, "weights": [1, -1, 2, 0.5, 1, 1, 1]}),
]
BYTES = 5_000  # nine modules are then six batches and more
OF_CLIENTS = ("weights", "scalings", "names")


def clients(count: int = 7, layers: int = 3) -> list[Client]:
    """Of different ranks and dtypes; one lacks a module."""
    made = []
    for i in range(count):
        draw, rank, dtype = torch.Generator().manual_seed(i), 2 + i % 3, DTYPES[i // 3 % 3]
        client = {}
        for layer in range(layers):
            for name, (d_out, d_in) in SHAPES.items():
                b, a = (torch.randn(n, m, generator=draw) for n, m in ((d_out, rank), (rank, d_in)))
                client[f"{layer}.{name}"] = b.to(dtype), a.to(dtype)
        made.append(client)
    made[1 % count].pop("1.q")
    return made


def of_rank(splits: list[int], rank: int, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A rank's clients, and the settings with what is theirs only."""
    mine = slice(sum(splits[:rank]), sum(splits[: rank + 1]))
    theirs = {k: x[mine] if k in OF_CLIENTS else x for k, x in settings.items()}
    return clients()[mine], theirs


def agree(folder: Path, rank: int) -> None:
    exchange, sent = Ranks.exchange, 0

    def counted(self: Ranks, doing: str, messages: list[Message], *how: Any) -> Any:
        nonlocal sent
        others = (tensors for to, (_, tensors) in enumerate(messages) if to != self.rank)
        sent += sum(x.nbytes for tensors in others for x in tensors)
        return exchange(self, doing, messages, *how)

    Ranks.exchange = counted  # type: ignore[method-assign]
    for number, (splits, settings) in enumerate(SPLITS):
        group = dist.new_group(list(range(len(splits))))
        if rank < len(splits):
            mine, how = of_rank(splits, rank, settings)
            how |= {"group": group, "max_bytes": 3 * BYTES}
            state = aggregate(mine, **how)
            assert (state is None) == (rank > 0)
            if state is not None:
                state.save(folder / f"{number}")
            sent = 0
            own = aggregate(mine, gather=False, **how)
            assert own is not None
            modules = {m: vars(x) for m, x in own.modules.items()}
            torch.save((modules, sent), folder / f"{number}-{rank}")


def bad(what: str) -> Client:
    client = clients(1)[0]
    b, a = client["0.q"]
    client["0.q"] = {"value": (b * float("nan"), a), "shape": (b[1:], a)}.get(what, (b, a))
    return client


#: What the ranks are given, and what all of them are to say.
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a value": ([{"bad": "value"}, {}, {}], "client 'client 0 of rank 0', tensor '0.q.B'"),
    "two values": ([{}, {"bad": "value"}, {"bad": "value"}], "of rank 1.*of rank 2"),
    "a shape": ([{}, {}, {"bad": "shape"}], "client 'client 2', .*d_out 23.*as client 0's"),
    "a setting": ([{}, {"tol": 0.02}, {}], "tol.*of rank 1.*rank 0"),
    "a rank": ([{"rank": 3}, {"rank": 3}, {"rank": "auto"}], "rank.*auto.*an integer"),
    "robust": ([{"robust": "gate"}, {}, {}], "robust.*one process"),
    "names of some": ([{"names": ["a"]}, {"names": ["b"]}, {}], r"names.*ranks \[2\]"),
    "a name twice": ([{"names": [n]} for n in "aba"], "different names"),
    "weights": ([{"weights": [1, 2]}, {}, {}], "weights.*one number per client"),
    "no weight": ([{"weights": [0]}] * 3, "at least one above zero"),
    "no time": ([{"timeout": 0}, {}, {}], "timeout.*seconds > 0"),
    "no list": ([{"clients": None}, {}, {}], "my_clients.*None"),
    "no clients": ([{"clients": []}] * 3, "at least one module on any rank"),
    "no memory": ([{}, {"fails": MemoryError("full")}, {}], "rank 1 failed.*MemoryError: full"),
    "a lost file": ([{"fails_to_read": OSError("gone")}, {}, {}], "rank 0 failed.*OSError: gone"),
}


class Lost:
    """A client whose factors cannot be read."""

    def __init__(self, client: Client, error: Exception) -> None:
        from glora_ops.api import sources_of

        self.modules = sources_of([client], ["x"])[0].modules
        self.error = error

    def factors(self, module: str) -> None:
        raise self.error


def refuse(folder: Path, rank: int) -> None:
    said = {}
    plain = distributed.solve
    for name, (given, _) in REFUSED.items():
        how = dict(given[rank])
        mine: Any = how.pop("clients", [bad(how.pop("bad", ""))])
        if "fails_to_read" in how:
            mine = [Lost(mine[0], how.pop("fails_to_read"))]
        error = how.pop("fails", None)

        def failing(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        distributed.solve = plain if error is None else failing
        try:
            aggregate(mine, **how)
        except GloraError as e:
            said[name] = str(e)
    (folder / f"{rank}.json").write_text(json.dumps(said))


def lose(
    folder: Path, rank: int, number: int = signal.SIGKILL, timeout: float | None = None
) -> None:
    """Rank 1 is killed or stopped before its second batch."""
    plain, solved = distributed.solve, []

    def solve_or_die(*arguments: Any, **settings: Any) -> Any:
        solved.append(arguments)
        if rank == 1 and len(solved) == 2:
            os.kill(os.getpid(), number)
        return plain(*arguments, **settings)

    distributed.solve = solve_or_die
    try:
        aggregate(clients()[rank::3], max_bytes=BYTES, timeout=timeout)
    except GloraError as error:
        (folder / f"{rank}.json").write_text(json.dumps([len(solved), str(error)]))


def stop(folder: Path, rank: int) -> None:
    lose(folder, rank, signal.SIGSTOP, 5)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    case, folder, rank, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    meeting = f"file://{folder}/ranks"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    {"agree": agree, "refuse": refuse, "lose": lose, "stop": stop}[case](folder, rank)
