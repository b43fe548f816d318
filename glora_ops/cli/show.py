"""What commands print: tables for people, one JSON object for machines, refusals, progress."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from time import monotonic
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..errors import GloraError, Refusal, clean

__all__ = [
    "answering",
    "clean",
    "console",
    "labelled",
    "number",
    "print_json",
    "print_notes",
    "progress",
    "span",
    "table",
]

_STEPS = {
    "headers": "checking headers",
    "values": "reading values",
    "dense": "averaging full weights",
    "modules": "aggregating modules",
}
LOG_EVERY = 30.0  # seconds between lines of progress where there is no terminal


def console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def number(value: float) -> str:
    """Four significant digits, short."""
    return f"{value:.4g}"


def span(values: Sequence[float]) -> str:
    """One value, or the smallest … the largest."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low}…{high}"


def labelled(label: str, style: str, text: str) -> Text:
    """`text` behind a styled label."""
    return Text.assemble((label, style), text)


def table(*columns: str, left: int = 1) -> Table:
    """A plain table whose first `left` columns are text and whose others are numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        made.add_column(
            column, justify="left" if i < left else "right", overflow="fold", no_wrap=i >= left
        )
    return made


def print_notes(notes: Sequence[Mapping[str, Any]]) -> None:
    for note in notes:
        label = ("warning: ", "bold yellow") if note["warning"] else ("note: ", "bold")
        console().print(labelled(*label, clean(note["text"])))


def print_json(facts: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(_finite(facts), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no infinities: null."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def answering(as_json: bool, *, writes: bool) -> Iterator[None]:
    """Turn what glora and the file system refuse into a message and exit code 1.

    `writes` says whether the command was to write anything, and the message that it did not.
    """
    from safetensors import SafetensorError

    try:
        yield
    except GloraError as error:
        _refuse(error.refusals, as_json, writes)
    except (OSError, SafetensorError) as error:
        name = getattr(error, "filename", None)
        _refuse(
            [
                Refusal(
                    "a file cannot be read or written",
                    file=None if name is None else str(name),
                    found=getattr(error, "strerror", None) or str(error),
                    expected="a readable file, or a place that can be written to",
                    remedy="check the path, its permissions and the space on the disk",
                )
            ],
            as_json,
            writes,
        )
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        refusal = Refusal(
            "not enough memory", found=str(error).partition("\n")[0][-200:],
            expected="a result and its inputs that fit",
            remedy="a smaller rank, or fewer clients or modules at a time",
        )  # fmt: skip
        _refuse([refusal], as_json, writes)
    except KeyboardInterrupt:
        console(stderr=True).print("interrupted" + ": nothing is half written" * writes)
        raise


def _refuse(refusals: Sequence[Refusal], as_json: bool, writes: bool) -> None:
    if as_json:
        print_json({"refused": [asdict(refusal) for refusal in refusals]})
    else:
        to = console(stderr=True)
        for refusal in refusals:
            to.print(labelled("refused: ", "bold red", clean(refusal.problem)))
            for name, value in asdict(refusal).items():
                if value and name != "problem":
                    to.print(labelled(f"  {name:<9}", "dim", clean(value)), soft_wrap=True)
        count = "1 problem" if len(refusals) == 1 else f"{len(refusals)} problems"
        to.print(count + "; nothing was written" * writes)
    raise typer.Exit(1)


class _Rate(ProgressColumn):
    """How many a second, once that is known."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{number(speed)}/s")


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Give ``report(step, done, total)``: bars on stderr, or a line now and then in a log."""
    to = console(stderr=True)
    if not to.is_terminal:
        yield _logged(to)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=to, transient=True) as bars:
        tasks = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(_STEPS.get(step, step), total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield report


def _logged(to: Console) -> Callable[[str, int, int], None]:
    said = monotonic()

    def report(step: str, done: int, total: int) -> None:
        nonlocal said
        if monotonic() - said >= LOG_EVERY:
            said = monotonic()
            to.print(f"{clean(_STEPS.get(step, step))}: {done} of {total}", soft_wrap=True)

    return report
