"""Runs steps one after another, each a process with a time limit, and writes down how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu.lines import NAME, Lines

__all__ = ["Step", "run"]

BENCH = Path(__file__).resolve().parents[1]
# A step with less than this share of its limit left would mostly compile: it is left out.
USEFUL = 1 / 3


@dataclass(frozen=True)
class Step:
    """One process and the most seconds it may take.

    Attributes
    ----------
    learnt : str
        What it is for, in words.
    asked : bool
        Whether it runs only where `--only` names it.
    command : tuple of str
        In place of ``python -m gpu.NAME``.
    """

    name: str
    seconds: float
    learnt: str
    asked: bool = False
    command: tuple[str, ...] = ()


def run(steps: Iterable[Step], out: Path, seconds: float, rehearse: bool = False) -> list[str]:
    """Run `steps` within `seconds`; the names of those that did not end well.

    Every step gets a line when it starts and one when it ends, `done`, `failed` (its exit status
    is in the line) or `cut` at its limit; one for which no time is left gets one, `skipped`.
    What steps print goes to ``log.txt``.
    """
    until, bad = time.monotonic() + seconds, []
    for step in steps:
        lines = Lines(out / NAME, step=step.name)
        left = until - time.monotonic()
        if left < USEFUL * step.seconds:
            lines.add(
                "skipped", why=f"{max(left, 0):.0f} s left of the {step.seconds:g} s it may take"
            )
            bad.append(step.name)
            continue
        limit = min(step.seconds, left)
        lines.add("start", limit_s=round(limit, 1), learnt=step.learnt)
        outcome = _process(step, out, limit, rehearse)
        lines.add("end", **outcome)
        if outcome["outcome"] != "done":
            bad.append(step.name)
    return bad


def _process(step: Step, out: Path, limit: float, rehearse: bool) -> dict[str, object]:
    """One step from start to end, its children included."""
    command = step.command or (
        sys.executable, "-m", f"gpu.{step.name}", str(out), *(["--rehearse"] if rehearse else [])
    )  # fmt: skip
    # Triton decides at import between interpreter and compiler.
    rehearsal = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if rehearse else {}
    environment = os.environ | rehearsal
    began = time.monotonic()
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n=== {step.name}\n".encode())
        log.flush()
        # Its standard input ends with this process, whatever ends that: steps watch it and go.
        child = subprocess.Popen(
            command, cwd=BENCH, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(child)
    outcome = "cut" if status is None else "failed" if status else "done"
    return {"outcome": outcome, "status": status, "seconds": round(time.monotonic() - began, 1)}


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a step's own session."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        child.stdin.close()
