"""Many short reads, at the same time where they wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from .threads import workers

__all__ = ["READERS", "overlapped"]

#: Reads at a time, and requests of a process; why: most of a millisecond's wait is hidden, and
#: no server minds as many.
READERS = 16
#: Reads that tell whether they wait.
TRIED = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


def overlapped(
    read: Callable[[Item], Result], items: Sequence[Item], waits: bool | None = None
) -> Iterator[Result]:
    """What `read` makes of each item, in their order.

    One after the other, or where reading waits by `READERS` threads: what the system's cache holds
    is parsed under Python's lock, which threads only fight for.

    Parameters
    ----------
    read : callable
        May be called by several threads at once; what it raises for the first item in order is
        raised.
    items : sequence
    waits : bool, optional
        None: reading waits if the first few, one after the other, wait longer than they compute.
    """
    waited = float(waits or 0)
    tried = TRIED if waits is None else 0
    for item in items[:tried]:
        wall, busy = time.perf_counter(), time.thread_time()
        result = read(item)
        busy = time.thread_time() - busy
        waited += time.perf_counter() - wall - 2 * busy
        yield result
    rest = items[tried:]
    if waited <= 0 or not rest:
        yield from map(read, rest)
        return
    with workers(READERS) as pool:
        yield from pool.map(read, rest)
