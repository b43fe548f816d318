"""SIGTERM and Ctrl-C as exceptions, which clear away what is half done, and do not get lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

__all__ = ["Terminated", "end_at_once", "heed", "surely", "terminable"]

#: What Python does with the signals that end a command.
_USUAL = ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler))

_come: list[KeyboardInterrupt] = []  # in the current `terminable` block


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def end_at_once() -> None:
    """Until a `terminable` block: SIGTERM and Ctrl-C end the process with a line and 128 + signal.

    For the time in which packages are imported: they catch exceptions of any kind, and there is
    nothing to clear away.
    """
    for number, usual in _USUAL:
        if signal.getsignal(number) is usual:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"terminated\n" if number == signal.SIGTERM else b"interrupted\n")
    os._exit(128 + number)


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
        for number, usual in _USUAL:
            before = signal.getsignal(number)
            if before is usual or before is _end:
                handlers.callback(signal.signal, number, before)
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
