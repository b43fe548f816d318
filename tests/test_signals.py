"""Signals end what is at work even where foreign code drops or renames their exceptions."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from glora_ops.runtime.outputs import new_file, ours
from glora_ops.runtime.signals import Terminated, terminable

BOTH = pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
HANDLERS = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers_come_back():
    yield
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == HANDLERS
    with terminable():  # and nothing is remembered
        pass


def send_and_drop(number):
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def send_and_rename(number):
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt as stop:
        raise ValueError("a pattern that does not match") from stop


@BOTH
@pytest.mark.parametrize("foreign", [send_and_drop, send_and_rename])
def test_the_block_ends_with_the_signal_whatever_foreign_code_made_of_it(foreign, number, error):
    with pytest.raises(error), terminable():
        foreign(number)


@BOTH
def test_nothing_is_put_in_place_after_a_signal(number, error, tmp_path: Path):
    def write():
        with terminable(), new_file(tmp_path / "x", ours) as path:
            path.write_text("whole")
            send_and_drop(number)

    with pytest.raises(error):
        write()
    assert not list(tmp_path.iterdir())


def test_handlers_of_others_are_left_to_them():
    seen = []
    usual = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, usual)
