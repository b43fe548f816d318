"""Aggregating factors that lie on the ranks of a process group, by client."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from inspect import signature
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .api import (
    KEPT,
    Client,
    available,
    check_factors,
    names_of,
    place_of,
    scalings_of,
    sources_of,
)
from .api import aggregate as in_one_process
from .arguments import check_settings, check_weights, number, sequence
from .batches import BATCH_BYTES, DEVICE_BATCH_BYTES, Batch, check_ranks, plan, solve
from .errors import Refusal, Refused, clean, require
from .runtime.ranks import NOTHING, Message, Ranks
from .runtime.threads import workers
from .sources import Source
from .state import Factors, ModuleState, State
from .state_report import notes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .distributed_schema import Shape, Told

__all__ = ["aggregate"]

_DEFAULTS = {
    name: signature(in_one_process).parameters[name].default
    for name in (*KEPT, "max_bytes", "client_statistics")
}
_TENSORS = len(fields(ModuleState))


def aggregate(
    my_clients: Sequence[Client],
    weights: Sequence[float] | None = None,
    scalings: Sequence[float | Mapping[str, float]] | None = None,
    rank: int | None = None,
    *,
    names: Sequence[str] | None = None,
    gather: bool = True,
    group: ProcessGroup | None = None,
    timeout: float | None = None,
    device: str | torch.device | None = None,
    **settings: Any,
) -> State | None:
    """Aggregate clients whose factors are spread over the ranks of a process group.

    Collective: every rank of the group calls it, with the clients that it holds, in the same
    settings. The clients are those of rank 0 in their order, then those of rank 1, and so on. To
    the bit the state is that of `glora_ops.aggregate` over all of them in this order, on one kind
    of processor and one version of torch.

    Parameters
    ----------
    my_clients : sequence of (B, A), of mappings from module name to (B, A), or of sources
        As in `glora_ops.aggregate`: this rank's, which may be none. Sources are read here.
    weights, scalings, names : sequence, optional
        As there, one for each of `my_clients`. `weights` and `names` are given by every rank that
        has clients, or by none; by default a client is called by its number among all.
    rank : int, optional
        Server rank R; by default twice the largest rank of any client.
    gather : bool
        True: rank 0 is given the state, on the CPU, the others None. False: every rank is given a
        state of the modules that it solved, which may be none, where it solved them.
    group : ProcessGroup, optional
        One that moves tensors of the CPU (gloo); by default all processes.
    timeout : float, optional
        Seconds that a rank waits for what another has to say or to solve; by default the group's.
    device : str or torch.device, optional
        Where this rank computes; by default where the clients' factors are.
    **settings
        Of `glora_ops.aggregate`: basis, missing, normalise, tau_rel, anchor, oversample,
        power_iters, tol, seed, max_bytes and client_statistics.

    Returns
    -------
    State or None

    Raises
    ------
    Refused
        On every rank, with what any rank refuses or failed in. All is checked, values included,
        before a factor is sent.
    GloraError
        No process group, or one that moves nothing on the CPU. Ranks from which nothing came, by
        number: at once where their process is gone, else after `timeout`. A rank that says what
        does not fit. The group is of no use then.

    Warns
    -----
    GloraWarning
        As `glora_ops.aggregate`, where a state is returned.

    Notes
    -----
    Batches of modules, as `glora_ops.aggregate` makes them, are dealt out to the ranks, the largest
    first, as many at a time as the ranks have threads. Each rank sends its clients' factors of a
    batch to the rank that solves it: of P ranks each sends (P - 1)/P of its factors' bytes once in
    all, and a state of some 4 R (d_out + d_in) bytes a module goes to rank 0. Memory: the rank's
    own clients, and three times the factors of all clients in as many batches as it has threads,
    besides the solver's own. What `robust`, ``rank="auto"``, `warm` and `scratch` need is not kept:
    they are refused by name.

    What ranks say is safetensors with JSON of a closed schema: nothing of it is run.
    """
    from .distributed_schema import Told  # pydantic takes longer to import than the package

    ranks = Ranks.of(group)
    held: list[Source] = []
    out: list[Message] = []
    error: Exception | None = None
    try:
        if timeout is not None:
            seconds = number(timeout) or 0.0
            require(seconds > 0, "timeout", f"{timeout!r:.80}", "seconds > 0, or None")
            ranks = replace(ranks, timeout=timedelta(seconds=seconds))
        asked = _asked({"rank": rank, "gather": gather} | settings)
        my_clients = sequence("my_clients", my_clients, "a list of this rank's clients")
        here = names_of(names, len(my_clients))
        if names is None:
            here = tuple(f"{name} of rank {ranks.rank}" for name in here)
        held = sources_of(my_clients, here)
        check_factors(held, here)
        scale = scalings_of(scalings, held, here)
        mine = _described(held, None if names is None else here, weights, scale)
        place = available(device) if device else place_of(held, here) if held else None
        told = Told.model_validate(
            {"asked": asked, "clients": mine, "threads": torch.get_num_threads(),
             "kind": None if place is None else place.type}
        )  # fmt: skip
        out = [(told, [])] * ranks.size
    except Exception as failure:  # of any kind: the others wait for this rank
        error = failure
    heard = ranks.exchange("saying what they hold", out, error, Told)
    answers: list[Told] = [told for told, _ in heard]
    kind = _agreed(answers)
    place = place or torch.device(kind)
    threads = max(answer.threads for answer in answers)
    clients = _clients(answers)
    called = tuple(str(client.name) for client in clients)
    given = [client.weight for client in clients if client.weight is not None]
    used = check_weights(given or None, called, asked)
    check_ranks(clients, asked)

    largest = max(pair.rank for client in clients for pair in client.modules.values())
    kept = {name: asked[name] for name in KEPT} | {"rank": asked["rank"] or 2 * largest}
    how = {name: x for name, x in kept.items() if name not in ("missing", "normalise")}
    how["client_statistics"] = bool(asked["client_statistics"])
    every = [client.scalings for client in clients]
    limit = asked["max_bytes"]
    wanted = BATCH_BYTES if kind == "cpu" else DEVICE_BATCH_BYTES
    modules = list(dict.fromkeys(name for client in clients for name in client.modules))
    batches = plan(clients, modules, min(wanted, limit or wanted))

    def run(batch: Batch) -> dict[str, ModuleState]:
        return solve(
            clients, batch.modules, used, every, asked["missing"], limit, None, None, None, place,
            **how,
        )  # fmt: skip

    done: dict[str, ModuleState] = {}
    alone = len(batches) == 1 or kind != "cpu"  # as `solve` runs them
    with nullcontext() if alone else workers(threads) as pool:
        for begin in range(0, len(batches), ranks.size * threads):
            dealt = batches[begin : begin + ranks.size * threads]
            shares = [dealt[at :: ranks.size] for at in range(ranks.size)]
            _move(ranks, shares, clients, held)
            solved: dict[str, ModuleState] = {}
            error = None
            try:
                for states in (map if pool is None else pool.map)(run, shares[ranks.rank]):
                    solved |= states
            except Exception as failure:
                error = failure
            if not gather:
                done |= solved
            done |= _gathered(ranks, solved if gather else {}, error)
    if gather and ranks.rank:
        return None
    state = State({m: done[m] for m in modules if m in done}, called, tuple(used), kept)
    for note in notes(state) if done else ():
        if note.category is not None:
            warnings.warn(clean(note.text), note.category, stacklevel=2)
    return state


@dataclass(frozen=True)
class _Known:
    """A client as every rank knows it: number `at` of its holder.

    `arrived` are the factors that are about to be computed with.
    """

    name: str | None
    weight: float | None
    scalings: dict[str, float]
    modules: dict[str, Shape]
    holder: int
    at: int
    arrived: dict[str, Factors] = field(default_factory=dict)

    def factors(self, module: str) -> Factors:
        return self.arrived.pop(module)


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    """Every setting; `GloraError` for one that is none, or is for one process."""
    for name in given.keys() - {"rank", "gather"}:
        require(name in _DEFAULTS, name, f"{given[name]!r:.80}", f"one of {[*_DEFAULTS]}",
                "robust, warm and scratch are for one process")  # fmt: skip
    require(given["rank"] != "auto", "rank", "'auto'", "an integer or None",
            "find the rank by aggregating a few clients, and give it")  # fmt: skip
    asked = check_settings(_DEFAULTS | given)
    return asked | {name: bool(asked[name]) for name in ("gather", "client_statistics")}


def _described(
    sources: Sequence[Source],
    names: Sequence[str] | None,
    weights: Sequence[float] | None,
    scalings: Sequence[dict[str, float]],
) -> list[dict[str, Any]]:
    """Clients as `distributed_schema.Client` has them."""
    count = len(sources)
    if weights is not None:
        weights = sequence("weights", weights, f"one number per client, {count}")
        usable = len(weights) == count and None not in map(number, weights)
        require(usable, "weights", f"{weights!r:.80}", f"one number per client, {count}")
    return [
        {
            "name": None if names is None else names[at],
            "weight": None if weights is None else float(weights[at]),
            "scalings": scalings[at],
            "modules": {
                m: (pair.rank, pair.d_out, pair.d_in, pair.b_dtype, pair.a_dtype)
                for m, pair in source.modules.items()
            },
        }
        for at, source in enumerate(sources)
    ]


def _agreed(answers: Sequence[Told]) -> str:
    """The kind of device that all compute on; raises where settings or kinds differ."""
    first = vars(answers[0].asked)
    for rank, answer in enumerate(answers):
        for name, value in vars(answer.asked).items():
            require(value == first[name], name, f"{value!r} of rank {rank}",
                    f"{first[name]!r} as rank 0's", "give every rank the same")  # fmt: skip
    kinds = {answer.kind: rank for rank, answer in enumerate(answers) if answer.kind}
    require(len(kinds) < 2, "device", " and ".join(f"{k} (rank {r})" for k, r in kinds.items()),
            "one kind on all ranks", "give device, or move the factors first")  # fmt: skip
    return next(iter(kinds), "cpu")


def _clients(answers: Sequence[Told]) -> list[_Known]:
    """All ranks' clients, each with a name of its own; raises where they do not fit each other."""
    clients = [
        _Known(**vars(client), holder=holder, at=at)
        for holder, answer in enumerate(answers)
        for at, client in enumerate(answer.clients)
    ]
    require(any(client.modules for client in clients), "clients", "none with modules",
            "at least one module on any rank")  # fmt: skip
    for what in ("name", "weight"):
        lacking = [getattr(client, what) is None for client in clients]
        if len(set(lacking)) > 1:
            ranks = sorted({c.holder for c, no in zip(clients, lacking, strict=True) if no})
            require(False, f"{what}s", f"none from ranks {ranks}", "some of every rank, or none")
    if clients[0].name is None:
        clients = [replace(client, name=f"client {i}") for i, client in enumerate(clients)]
    names_of([str(client.name) for client in clients], len(clients))
    refusals = []
    first: dict[str, _Known] = {}
    for client in clients:
        for module, pair in client.modules.items():
            other = first.setdefault(module, client)
            shape, expected = ((x.d_out, x.d_in) for x in (pair, other.modules[module]))
            if shape != expected:
                refusals.append(
                    Refusal(
                        "module has another shape", client.name, None, module or None,
                        f"d_out {shape[0]} and d_in {shape[1]}",
                        f"{expected[0]} and {expected[1]} as {other.name}'s",
                        "aggregate adapters of one base model",
                    )
                )  # fmt: skip
    if refusals:
        raise Refused(refusals)
    return clients


def _pairs(
    batches: Sequence[Batch], clients: Sequence[_Known], holder: int
) -> Iterator[tuple[_Known, str]]:
    """What a rank holds for batches, in the order in which it travels."""
    for client in clients:
        if client.holder == holder:
            for batch in batches:
                yield from ((client, name) for name in batch.modules if name in client.modules)


def _move(
    ranks: Ranks,
    shares: Sequence[Sequence[Batch]],
    clients: Sequence[_Known],
    held: Sequence[Source],
) -> None:
    """Send the factors of every rank's batches there."""
    out: list[Message] = []
    error: Exception | None = None
    try:
        for share in shares:
            mine = _pairs(share, clients, ranks.rank)
            out.append((None, [x for client, m in mine for x in held[client.at].factors(m)]))
    except Exception as failure:
        error = failure
    for holder, (_, tensors) in enumerate(ranks.exchange("sending factors", out, error)):
        pairs = list(_pairs(shares[ranks.rank], clients, holder))
        each = _all(tensors, holder, 2 * len(pairs))
        for client, name in pairs:
            client.arrived[name] = next(each), next(each)


def _gathered(
    ranks: Ranks, solved: Mapping[str, ModuleState], error: Exception | None
) -> dict[str, ModuleState]:
    """What all solved, on rank 0; nothing elsewhere."""
    mine = list(solved), [x for m in solved.values() for x in vars(m).values()]
    out = [mine, *(NOTHING for _ in range(1, ranks.size))]
    done: dict[str, ModuleState] = {}
    heard = ranks.exchange("solving", out, error, list[str] | None)
    for rank, (names, tensors) in enumerate(heard):
        each = _all([x.cpu() for x in tensors], rank, _TENSORS * len(names or ()))
        done |= {name: ModuleState(*islice(each, _TENSORS)) for name in names or ()}
    return done


def _all(tensors: Sequence[Tensor], rank: int, count: int) -> Iterator[Tensor]:
    """One after the other, as many as a rank was to send."""
    require(len(tensors) == count, "group", f"{len(tensors)} tensors of rank {rank}", f"{count}",
            "install one version of glora for all ranks")  # fmt: skip
    return iter(tensors)
