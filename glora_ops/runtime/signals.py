"""SIGTERM and Ctrl-C as exceptions, which clear away what is half done, and do not get lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

__all__ = ["Terminated", "heed", "surely", "terminable"]

_come: list[KeyboardInterrupt] = []  # in the current `terminable` block


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def terminable() -> Iterator[None]:
    """End the block with `Terminated` after SIGTERM, with KeyboardInterrupt after Ctrl-C.

    They are raised where the signals come. Foreign code may take them there for errors of its own,
    or drop them (pydantic does both): then they are raised again when the block ends, or earlier by
    `heed`. Signals that somebody else handles are left to them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:  # a second one leaves the clearing away alone
            signal.signal(number, signal.SIG_IGN)
        _come.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise _come[-1]

    with ExitStack() as handlers:
        handlers.callback(_come.clear)
        for number, usual in (
            (signal.SIGTERM, signal.SIG_DFL),
            (signal.SIGINT, signal.default_int_handler),
        ):
            if signal.getsignal(number) is usual:
                handlers.callback(signal.signal, number, usual)
                signal.signal(number, stop)
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            heed()
            raise
        heed()


def heed() -> None:
    """Raise again what a signal has raised and foreign code has dropped."""
    if _come:
        raise _come[-1] from None


def surely(clear: Callable[[], object]) -> None:
    """Clear something away; once more from the start if a signal comes meanwhile."""
    try:
        clear()
    except KeyboardInterrupt:
        clear()
        raise
