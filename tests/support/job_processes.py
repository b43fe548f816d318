"""Processes of a job: started, waited for, found and signalled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LAUNCHER, WORKER = "torch.distributed.run", "glora_ops.job.worker"
QUIET = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}


def started(*arguments: object, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=os.environ | QUIET | more, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def until(found: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for what a process that is running is to bring about."""
    for _ in range(6000):
        if found():
            return
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("nothing came of it in two minutes")


def workers_of(place: Path) -> list[int]:
    """Processes that torchrun started to work on a job."""
    listed = subprocess.run(
        ["ps", "-axwwo", "pid=,args="], capture_output=True, text=True, check=True
    ).stdout
    words = [line.split() for line in listed.splitlines()]
    return [int(x[0]) for x in words if {WORKER, str(place)} < {*x} and LAUNCHER not in x]


def signalled(pids: list[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)
