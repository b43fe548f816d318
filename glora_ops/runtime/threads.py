"""Running numerics free of the caller's global settings, without changing them for anyone else."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import torch

__all__ = [
    "all_threads",
    "exact_products",
    "keep_freed",
    "one_thread",
    "release_freed",
    "workers",
]

_lock = threading.Lock()
_inside = 0
_saved: list[str] = []


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products are fp32 and nothing is recorded, whatever autocast, tf32 or precision says.

    The precision setting is process-wide: the first thread in saves it and the last one out
    restores it, so that overlapping callers cannot leave it changed.
    """
    global _inside, _saved
    settings = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]  # set at run time
    with _lock:
        if _inside == 0:
            _saved = [matmul.fp32_precision for matmul in settings]
            for matmul in settings:
                matmul.fp32_precision = "ieee"
        _inside += 1
    try:
        with torch.no_grad(), ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for matmul, precision in zip(settings, _saved, strict=True):
                    matmul.fp32_precision = precision


_caller = threading.local()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for the many small steps; `all_threads` gives the caller's back to large ones.

    Small eigenproblems and blocks are faster so (LAPACK is several times slower on two threads
    than on one at order 192), and a busy machine costs one wait a product instead of one a step.

    torch's thread count belongs to the calling thread, so that callers do not disturb each other;
    but every call also leaves its number for threads that have yet to use torch. A caller that
    has one thread anyway therefore sets nothing.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    _caller.threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _caller.threads = None


@contextmanager
def all_threads() -> Iterator[None]:
    """Inside `one_thread`: as many threads as the caller had."""
    threads = getattr(_caller, "threads", None)
    if threads is None or threads == 1:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def _compute_alone() -> None:
    """Give the calling thread one thread of torch's."""
    torch.get_num_threads()  # a thread's first look takes the last number set by anyone
    torch.set_num_threads(1)


@contextmanager
def workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of Python threads, each computing on one thread of its own.

    The calling thread's count stays, and so does what new threads of the process begin with.
    """
    mine = torch.get_num_threads()
    with ThreadPoolExecutor(threads, "glora", _compute_alone) as pool:
        everyone = threading.Barrier(threads)
        list(pool.map(lambda _: everyone.wait(), range(threads)))
        torch.set_num_threads(mine)  # once all have started: theirs was the last number set
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's, where that is the C library."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


_TRIM = _malloc_trim()
# Largest block whose release glibc learns from, less its own header and alignment.
LEARNT = 2**25 - 2**12


def keep_freed() -> None:
    """Have glibc keep up to 64 MB of what a call frees for the next one.

    Otherwise every call faults its blocks in anew, a page at a time: a third of the time of a
    server step. glibc keeps twice the largest block it has seen freed; this one is never touched.
    Where the environment sets its thresholds it does not learn.
    """
    torch.empty(LEARNT, dtype=torch.uint8)


def release_freed() -> None:
    """Give freed memory back to the system, which glibc keeps for every thread up to 64 MB."""
    if _TRIM is not None:
        _TRIM(0)
