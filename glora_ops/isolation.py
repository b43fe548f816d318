"""Running numerics free of the caller's global settings, without changing them for anyone else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["exact_products", "one_thread"]

_lock = threading.Lock()
_inside = 0
_saved = "none"


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products are fp32 and nothing is recorded, whatever autocast, tf32 or precision says.

    The precision setting is process-wide: the first thread in saves it and the last one out
    restores it, so that overlapping callers cannot leave it changed.
    """
    global _inside, _saved
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set at run time
    with _lock:
        if _inside == 0:
            _saved = matmul.fp32_precision
            matmul.fp32_precision = "ieee"
        _inside += 1
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                matmul.fp32_precision = _saved


@contextmanager
def one_thread() -> Iterator[None]:
    """Small eigenproblems on one thread: LAPACK is several times slower there on two."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
