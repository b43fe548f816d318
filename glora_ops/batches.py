"""Whole models: modules in batches, several solved at a time.

Modules of one shape and like ranks run together, in batches small enough to stay in cache. Each
batch is computed on one thread and as many batches at a time as the caller has threads, which on
small modules is faster than giving every thread to each in turn. What a batch holds and how it is
computed do not depend on the number of threads, so neither does a bit of the result; a model that
is one single batch runs on all of the caller's.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import closing
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from .arguments import check_padding
from .errors import require
from .inner_products import check_pairs, inner_products
from .runtime.arena import LINE, Arena
from .runtime.overlap import overlapped
from .runtime.scratch import empty, in_folder
from .runtime.threads import release_freed, workers
from .sources import InMemory, Source
from .state import ModuleState, State
from .values import is_finite

__all__ = ["Batch", "check_ranks", "compare", "directions", "plan", "solve"]

#: Bytes of factors, as they are computed with, that a batch is filled up to: a call costs the more
#: the fewer modules share it (112 of 1024²: 1.06 ms each at 2²², 0.97 at 2²³). A module may be
#: larger alone.
BATCH_BYTES = 2**23
#: The same away from the CPU, where modules run batch after batch: enough to fill the device.
DEVICE_BATCH_BYTES = 2**30
#: Bytes of factors from which what a batch freed goes back to the system: holes in the heap then
#: take more than the clients, and having them again a hundredth of the time.
LARGE = 2**25
#: Rows of zeros a batch may hold, over those that are not: modules whose ranks differ.
PADDING = 0.25


@dataclass(frozen=True)
class Batch:
    """Modules of one shape that run together.

    Attributes
    ----------
    modules : tuple of str
    rows : tuple of int
        Rows of each client: its largest rank in any of the modules, at least 1.
    """

    modules: tuple[str, ...]
    rows: tuple[int, ...]
    d_out: int
    d_in: int
    b_dtype: torch.dtype
    a_dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of the stacked factors."""
        return self._bytes(self.b_dtype.itemsize, self.a_dtype.itemsize)

    @property
    def piece(self) -> int:
        """Bytes that the stacks take of an arena, the second on a cache line."""
        return self.bytes + -self.b_bytes % LINE

    @property
    def b_bytes(self) -> int:
        return self._bytes(self.b_dtype.itemsize, 0)

    @property
    def working_bytes(self) -> int:
        """Of the same in the precision that is computed in, fp32 at least."""
        return self._bytes(max(4, self.b_dtype.itemsize), max(4, self.a_dtype.itemsize))

    def _bytes(self, b: int, a: int) -> int:
        return len(self.modules) * sum(self.rows) * (self.d_out * b + self.d_in * a)


def directions(sources: Sequence[Source]) -> int:
    """The most directions that the clients can have together in any module."""
    rows: dict[str, int] = defaultdict(int)
    longest: dict[str, int] = {}
    for source in sources:
        for name, pair in source.modules.items():
            rows[name] += pair.rank
            longest[name] = max(pair.d_out, pair.d_in)
    return max(min(rows[name], longest[name]) for name in rows)


def check_ranks(
    sources: Sequence[Source], settings: Mapping[str, Any], readouts: Sequence[int] = ()
) -> None:
    """Refuse ranks, of the state and of adapters to be read out, that would be mostly padding."""
    most = directions(sources)
    for name in ("rank", "oversample"):
        if isinstance(settings.get(name), int):
            check_padding(name, settings[name], most, "all clients together")
    rank = settings.get("rank")
    if rank is None:
        rank = 2 * max(pair.rank for source in sources for pair in source.modules.values())
    for readout in readouts:
        check_padding("readout", readout, most if rank == "auto" else rank, "the state")


def plan(sources: Sequence[Source], modules: Sequence[str], limit: int) -> list[Batch]:
    """Every module in a batch of at most `limit` working bytes, or alone; the largest first."""
    groups: dict[tuple[Any, ...], list[tuple[tuple[int, ...], str]]] = defaultdict(list)
    for name in modules:
        pairs = [source.modules.get(name) for source in sources]
        held = [pair for pair in pairs if pair is not None]
        key = (
            held[0].d_out,
            held[0].d_in,
            reduce(torch.promote_types, (pair.b_dtype for pair in held)),
            reduce(torch.promote_types, (pair.a_dtype for pair in held)),
        )
        ranks = tuple(1 if pair is None else pair.rank for pair in pairs)
        groups[key].append((ranks, name))
    batches = [
        Batch(tuple(names), rows, *key)
        for key, named in groups.items()
        for names, rows in _alike(named, limit, key)
    ]
    return sorted(batches, key=lambda batch: -batch.bytes)


def _alike(
    named: Sequence[tuple[tuple[int, ...], str]], limit: int, key: tuple[Any, ...]
) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Modules of one shape in runs of like ranks.

    More than one is an even number of runs, of like size, so that two threads end together; what a
    run holds does not depend on how many there are, and planned again by itself it stays one.
    """
    names: list[str] = []
    rows: tuple[int, ...] = ()
    used = 0
    size = sum(Batch((name,), ranks, *key).working_bytes for ranks, name in named)
    runs = 1 if size <= limit else 2 * -(-size // (2 * max(limit, 1)))
    most = -(-len(named) // runs)
    for ranks, name in sorted(named, key=lambda item: item[0], reverse=True):
        wider = tuple(map(max, rows or ranks, ranks))
        full = len(names) == most or Batch((*names, name), wider, *key).working_bytes > limit
        padded = (len(names) + 1) * sum(wider) > (1 + PADDING) * (used + sum(ranks))
        if names and (full or padded):
            yield names, rows
            names, used, wider = [], 0, ranks
        names, rows, used = [*names, name], wider, used + sum(ranks)
    yield names, rows


def solve(
    sources: Sequence[Source],
    modules: Sequence[str],
    weights: Sequence[float],
    scalings: Sequence[Mapping[str, float]],
    missing: str,
    max_bytes: int | None,
    scratch: str | None,
    progress: Callable[[int, int], None] | None,
    warm: State | None,
    device: torch.device,
    judge: Callable[[], None] | None = None,
    **settings: Any,
) -> dict[str, ModuleState]:
    """`torch.ops.glora.aggregate` of every module, on `device`.

    `judge` is called where a stack holds a value that is not finite, to say whose it is.

    On the CPU every thread reads, stacks and computes one batch after the other; no more than
    `max_bytes` of stacked factors exist at a time. None makes room for two of the largest module,
    and at least for a batch per thread. A module that is larger than
    `max_bytes` is stacked in a file in the folder `scratch`, alone. Elsewhere batches run one
    after another; bases stay there, certificates, which are read one by one, come to the CPU.
    """
    on_cpu = device.type == "cpu"
    wanted = BATCH_BYTES if on_cpu else DEVICE_BATCH_BYTES
    batches = plan(sources, modules, min(wanted, max_bytes or wanted))
    room = _room(batches[0], len(sources), max_bytes, on_cpu and scratch is not None)

    def place(batch: Batch) -> str | None:
        return scratch if batch.bytes > room else None

    def stack(batch: Batch, memory: Tensor | None = None) -> list[Tensor]:
        with in_folder(place(batch)):
            return _stack(sources, batch, device, memory, judge)

    def compute(batch: Batch, box: list[Tensor]) -> dict[str, ModuleState]:
        present = torch.tensor([[m in source.modules for source in sources] for m in batch.modules])
        w = torch.tensor(weights, dtype=torch.float64) * present
        if missing == "renormalise":
            w = w * (sum(weights) / w.sum(-1, keepdim=True).where(w.any(-1, keepdim=True), 1.0))
        s = torch.tensor(
            [[scale.get(m, 0.0) for scale in scalings] for m in batch.modules], dtype=torch.float64
        )
        start = {} if warm is None else _warm(warm, batch.modules, device)
        offsets, a, b = (box.pop() for _ in range(3))  # nobody else keeps them alive
        with in_folder(place(batch)):
            u, s, v, *told = torch.ops.glora.aggregate(b, a, offsets, w, s, **settings, **start)
        parts = u, s, v, *(x.cpu() for x in told), present
        return {m: ModuleState(*(x[l] for x in parts)) for l, m in enumerate(batch.modules)}

    done: dict[str, ModuleState] = {}

    def finish(states: dict[str, ModuleState]) -> None:
        done.update(states)
        if progress is not None:
            progress(len(done), len(modules))

    if len(batches) == 1 or not on_cpu:
        for batch in batches:
            finish(compute(batch, stack(batch)))
        return done
    with closing(_spread(batches, stack, compute, room)) as results:
        for states in results:
            finish(states)
    return done


def compare(
    sources: Sequence[Source],
    modules: Sequence[str],
    scalings: Sequence[Mapping[str, float]],
    max_bytes: int | None,
    scratch: str | None,
    progress: Callable[[int, int], None] | None,
    device: torch.device,
    judge: Callable[[], None] | None = None,
) -> Tensor:
    """(K, K) fp64: `inner_products` of the clients' updates, summed over modules.

    One module at a time for each thread and in the model's order, so that no bit depends on the
    number of threads; memory and `judge` as in `solve`.
    """
    check_pairs(len(sources))
    batches = [batch for name in modules for batch in plan(sources, [name], 0)]
    largest = max(batches, key=lambda batch: batch.bytes)
    on_cpu = device.type == "cpu"
    room = _room(largest, len(sources), max_bytes, on_cpu and scratch is not None)

    def stack(batch: Batch, memory: Tensor | None = None) -> list[Tensor]:
        with in_folder(scratch if batch.bytes > room else None):
            return _stack(sources, batch, device, memory, judge)

    def products(batch: Batch, box: list[Tensor]) -> Tensor:
        offsets, a, b = (box.pop() for _ in range(3))  # nobody else keeps them alive
        scaling = [scale.get(batch.modules[0], 0.0) for scale in scalings]
        return inner_products(b[0], a[0], offsets, torch.tensor(scaling, dtype=torch.float64))

    def in_turn() -> Generator[Tensor, None, None]:
        for batch in batches:
            yield products(batch, stack(batch))

    total = torch.zeros(len(sources), len(sources), dtype=torch.float64)
    results = _spread(batches, stack, products, room, in_order=True) if on_cpu else in_turn()
    with closing(results):
        for done, found in enumerate(results, start=1):
            total += found
            if progress is not None:
                progress(done, len(batches))
    return total


Result = TypeVar("Result")


def _spread(
    batches: Sequence[Batch],
    stack: Callable[[Batch, Tensor | None], list[Tensor]],
    work: Callable[[Batch, list[Tensor]], Result],
    room: int,
    in_order: bool = False,
) -> Generator[Result, None, None]:
    """What `work` makes of every batch, on as many threads as the caller has.

    No more than can have a stack at a time, though: another would only keep freed memory of its
    own. Each thread stacks its own batches, one thread at a time, in the memory of those that are
    done: `room` bytes together, or those of as many batches as there are threads. A batch that is
    larger is stacked elsewhere, alone.
    """
    sizes = sorted((batch.piece for batch in batches if batch.bytes <= room), reverse=True)
    smallest = sizes[::-1][: torch.get_num_threads()]
    threads = max(sum(together <= room for together in accumulate(smallest)), 1)
    with torch.inference_mode(False):  # the workers write, whatever mode the caller is in
        arena = Arena(max(min(room, sum(sizes[:threads])), *sizes[:1], 1))
    reading, freed = threading.Lock(), threading.Condition()

    def run(at: int) -> Result:
        batch = batches[at]
        fits = batch.bytes <= room
        size = batch.piece if fits else len(arena.memory)
        with reading:
            with freed:
                arena.keep(sum(x.piece for x in batches[at : at + threads] if x.bytes <= room))
                while (piece := arena.take(size)) is None:
                    freed.wait()
            try:
                box = stack(batch, piece if fits else None)
            except BaseException:
                give_back(piece)
                raise
        try:
            return work(batch, box)
        finally:
            give_back(piece)
            if batch.bytes >= LARGE:
                release_freed()

    def give_back(piece: Tensor) -> None:
        with freed:
            arena.give_back(piece)
            freed.notify()

    with workers(threads) as pool:
        if in_order:
            yield from pool.map(run, range(len(batches)))
        else:
            for future in as_completed([pool.submit(run, at) for at in range(len(batches))]):
                yield future.result()


def _room(largest: Batch, clients: int, max_bytes: int | None, in_files: bool) -> int:
    """Bytes of stacked factors that are in memory at a time."""
    require(
        max_bytes is None or largest.bytes <= max_bytes or in_files,
        "max_bytes",
        max_bytes,
        f"at least {largest.bytes}, the factors of {largest.modules[0] or 'one module'!r} from "
        f"{clients} clients",
        "raise it, leave it out, or name a folder for larger ones with scratch",
    )
    return max_bytes or max(2 * largest.bytes, torch.get_num_threads() * BATCH_BYTES)


def _stack(
    sources: Sequence[Source],
    batch: Batch,
    device: torch.device,
    memory: Tensor | None,
    judge: Callable[[], None] | None = None,
) -> list[Tensor]:
    """b (L, N, d_out), a (L, N, d_in), read pair by pair, zeros where short; offsets on the CPU.

    In `memory`, a piece of an arena, if it is given; values are looked at while they are in cache.
    """
    shape_b, shape_a = ((len(batch.modules), sum(batch.rows), d) for d in (batch.d_out, batch.d_in))
    if memory is None:
        make = empty if device.type == "cpu" else partial(torch.empty, device=device)
        b, a = make(shape_b, dtype=batch.b_dtype), make(shape_a, dtype=batch.a_dtype)
    else:
        b = memory[: batch.b_bytes].view(batch.b_dtype).view(shape_b)
        a = memory[batch.piece - (batch.bytes - batch.b_bytes) :].view(batch.a_dtype).view(shape_a)
    offsets = torch.tensor([0, *batch.rows]).cumsum(0)
    rest = []
    for l, name in enumerate(batch.modules):
        if not _joined(sources, name, batch.rows, b[l], a[l]):
            rest.append((l, name))

    def read(of: tuple[Source, int, int]) -> None:
        source, start, rows = of
        for l, name in rest:
            pair = source.modules.get(name)
            end = start if pair is None else start + pair.rank
            if pair is not None:
                _read_into(source, name, b[l, start:end], a[l, start:end])
            if end < start + rows:
                b[l, end : start + rows] = 0
                a[l, end : start + rows] = 0

    if rest:
        placed = list(zip(sources, offsets.tolist(), batch.rows, strict=False))
        waits = any(getattr(source, "waits", False) for source in sources)
        inside = torch.inference_mode()(read) if b.is_inference() else read
        deque(overlapped(inside, placed, waits), maxlen=0)
    if judge is not None and not (is_finite(b) and is_finite(a)):
        judge()
    return [b, a, offsets]


def _joined(
    sources: Sequence[Source], name: str, rows: Sequence[int], b: Tensor, a: Tensor
) -> bool:
    """Stack a module in one call a side, if all its pairs are in memory as they are wanted."""
    wanted, held = (b.dtype, a.dtype, b.device), []
    for source, places in zip(sources, rows, strict=True):
        pair = source.modules.get(name) if isinstance(source, InMemory) else None
        if pair is None or pair.rank != places:
            return False
        if (pair.b.dtype, pair.a.dtype, pair.b.device) != wanted:
            return False
        held.append(pair)
    torch.cat([pair.b.detach().mT for pair in held], out=b)
    torch.cat([pair.a.detach() for pair in held], out=a)
    return True


def _read_into(source: Source, name: str, b: Tensor, a: Tensor) -> None:
    # Asking whether it is a `Reader` by its type takes as long as reading a small factor.
    read_into = getattr(source, "read_into", None)
    if read_into is not None:
        read_into(name, b, a)
    else:
        left, right = source.factors(name)
        b.copy_(left.detach().mT)
        a.copy_(right.detach())


def _warm(state: State, modules: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Bases of an earlier state for a batch, where it knows every module of it."""
    if any(m not in state.modules for m in modules):
        return {}
    return {
        "warm_u": torch.stack([state.modules[m].u for m in modules]).to(device),
        "warm_v": torch.stack([state.modules[m].v for m in modules]).to(device),
    }
