"""What commands print: tables for people, one JSON object for machines, refusals, progress."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import typer
from rich.console import Console
from rich.filesize import decimal
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

from ..errors import GloraError, Refusal, Refusals, clean
from ..runtime.signals import Terminated, terminable
from ..runtime.streams import output_trouble
from .loading import load

__all__ = [
    "Outcome",
    "answering",
    "clean",
    "console",
    "counted",
    "duration",
    "figures",
    "finite",
    "labelled",
    "number",
    "print_json",
    "print_notes",
    "print_skipped",
    "print_untouched",
    "progress",
    "size",
    "span",
    "table",
    "warn",
]

_STEPS = {
    "headers": "checking headers",
    "values": "reading values",
    "dense": "averaging full weights",
    "modules": "aggregating modules",
}
WIDTH = 120  # of files and pipes, so that no table loses a column there
LOG_EVERY = 30.0  # seconds between lines of progress where there is no terminal
LINE = 100  # characters of a line of JSON that holds a field with entries
ENTRY = 4  # spaces before an entry of a field
_quiet = False  # whether the command that is answering was called with --quiet


def console(*, stderr: bool = False) -> Console:
    made = Console(
        stderr=stderr, highlight=False, markup=False, emoji=False, quiet=_quiet and not stderr
    )
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDTH
    return made


def number(value: float) -> str:
    """Four significant digits, short."""
    return f"{value:.4g}"


def figures(value: float) -> str:
    """Four significant digits, zeros at the end as well: for columns."""
    return f"{value:#.4g}".removesuffix(".")


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def size(path: Path) -> str:
    """Bytes of a file, or of all files in a folder, for people."""
    files = path.rglob("*") if path.is_dir() else [path]
    return decimal(sum(file.stat().st_size for file in files if file.is_file()))


def duration(seconds: float) -> str:
    """A time for people: 3.2 s, 2 min 5 s, 1 h 4 min."""
    if seconds < 59.95:  # which would be shown as 60.0
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


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
    """Notes on stdout; with --quiet the warnings among them, on stderr."""
    for note in notes:
        if note["warning"]:
            warn("warning: ", note["text"])
        else:
            console().print(labelled("note: ", "bold", clean(note["text"])))


def print_skipped(skipped: Sequence[str]) -> None:
    """Clients that were left out, and why: the first of them."""
    shown = skipped[: Refusals.LISTED]
    for reason in shown:
        warn("skipped: ", reason)
    if len(shown) < len(skipped):
        console().print(f"and {len(skipped) - len(shown)} more: --json lists them")


def print_untouched(read: str = "nothing was read but headers, and ") -> None:
    """The last line of a dry run."""
    console().print(f"{read}nothing was written", style="dim")


def warn(label: str, text: str) -> None:
    """What is said with --quiet as well, on stderr then."""
    console(stderr=_quiet).print(labelled(label, "bold yellow", clean(text)))


def print_json(facts: Mapping[str, Any]) -> None:
    typer.echo(_laid_out(finite(facts)))


def _laid_out(value: Any, indent: int = 0) -> str:
    """JSON with a line for every field, and for every entry of a field that is long."""
    flat = json.dumps(value, allow_nan=False)
    plain = isinstance(value, list) and not any(isinstance(v, (dict, list)) for v in value)
    short = 0 < indent <= LINE - len(flat)
    if plain or short or indent >= ENTRY or not value or not isinstance(value, (dict, list)):
        return flat
    inner = " " * (indent + 2)
    if isinstance(value, list):
        rows = [_laid_out(v, indent + 2) for v in value]
    else:
        rows = [f"{json.dumps(k)}: {_laid_out(v, indent + 2)}" for k, v in value.items()]
    first, last = "[]" if isinstance(value, list) else "{}"
    return f",\n{inner}".join([f"{first}\n{inner}{rows[0]}", *rows[1:]]) + f"\n{' ' * indent}{last}"


def finite(value: Any) -> Any:
    """JSON has no infinities: null."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Outcome:
    """What a command has written, for what is said where it does not end as it should."""

    writes: bool
    written: list[str] = field(default_factory=list)

    def wrote(self, *paths: Path | None) -> None:
        self.written += [clean(path) for path in paths if path is not None]

    def __str__(self) -> str:
        if self.written:
            return f"; written: {', '.join(self.written)}"
        return "; nothing was written" * self.writes


@contextmanager
def _set_up(quiet: bool, threads: int | None) -> Iterator[None]:
    """What --quiet and --threads ask for, while the command runs."""
    import torch

    global _quiet
    before = torch.get_num_threads()
    _quiet = quiet
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        _quiet = False
        if threads is not None:
            torch.set_num_threads(before)


@contextmanager
def answering(
    as_json: bool, *, writes: bool, kept: str = "", quiet: bool = False, threads: int | None = None
) -> Iterator[Outcome]:
    """Turn what glora and the file system refuse into a message and exit code 1.

    The command tells the outcome what it has written. From then on its exit status stands, whatever
    becomes of what it prints.

    Parameters
    ----------
    writes : bool
        Whether the command is to write anything, and the message to say that it did not.
    kept : str
        What else is said of the files after Ctrl-C (exit code 130) and SIGTERM (143).
    quiet, threads
        As --quiet and --threads.
    """
    load()
    from safetensors import SafetensorError

    outcome = Outcome(writes)
    try:
        with terminable(), _set_up(quiet, threads):
            yield outcome
    except GloraError as error:
        _refuse(error.refusals, as_json, outcome)
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
            outcome,
        )
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        refusal = Refusal(
            "not enough memory",
            found=str(error).partition("\n")[0][-200:],
            expected="a result and its inputs that fit",
            remedy="a smaller rank, or fewer clients or modules at a time",
        )
        _refuse([refusal], as_json, outcome)
    except KeyboardInterrupt as stop:
        what, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        if not outcome.written:
            what += f": {kept}" if kept else ": nothing is half written" * writes
        console(stderr=True).print(f"{what}{outcome if outcome.written else ''}", soft_wrap=True)
        raise typer.Exit(code) from None
    _deliver(outcome)


def _deliver(outcome: Outcome) -> None:
    """Say so where not all of the output could be shown, and what stands all the same."""
    trouble = output_trouble()
    gone = trouble is not None and trouble.errno == errno.EPIPE  # the reader has seen enough
    if trouble is None or (gone and not outcome.written):
        return
    said = f"the output could not be shown: {trouble.strerror}{outcome}"
    console(stderr=True).print(said, soft_wrap=True)
    if not outcome.written:
        raise typer.Exit(1)


def _refuse(refusals: Sequence[Refusal], as_json: bool, outcome: Outcome) -> None:
    if as_json:
        print_json({"refused": [asdict(refusal) for refusal in refusals]})
    if not as_json or output_trouble():
        to = console(stderr=True)
        for refusal in refusals:
            to.print(labelled("refused: ", "bold red", clean(refusal.problem)))
            for name, value in asdict(refusal).items():
                if value and name not in ("problem", "more"):
                    to.print(labelled(f"  {name:<9}", "dim", clean(value)), soft_wrap=True)
            if refusal.more:
                to.print(f"  {refusal.rest}")
        total = sum(1 + refusal.more for refusal in refusals)
        count = "1 problem" if total == 1 else f"{total} problems"
        to.print(f"{count}{outcome}", soft_wrap=True)
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
    if _quiet:
        yield lambda step, done, total: None
        return
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
