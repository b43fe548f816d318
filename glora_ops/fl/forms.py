"""What the files of a run must hold; anything else is refused by the file's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from ..errors import require, unfit
from ..runtime.reading import parse_json_object, read_bytes, read_json_object
from .config import Config, Label

__all__ = ["read_about", "read_lines", "read_sweep"]

MAX_METRICS_BYTES = 2**31  # why: read whole; a round takes some kilobytes


class Form(BaseModel):
    """Fields beyond these are somebody's own."""

    model_config = ConfigDict(extra="allow", strict=True)


class About(Form):
    """run.json."""

    config: dict[str, Any]
    method: Label
    seed: int = Field(ge=0, lt=2**63)
    lr: FiniteFloat = Field(gt=0)
    metric: str = Field(max_length=100)
    parameters: int
    examples: list[int]
    weights: str | None = None


class OfClient(Form):
    client: int = Field(ge=0)
    rank: int = Field(ge=1)
    examples: int = Field(ge=1)


class Failed(Form):
    client: int = Field(ge=0)
    reason: str


class Update(Form):
    spectrum: list[float] = Field(min_length=1)
    captured: float
    effective_rank: float


class Aligned(Form):
    clients: list[int]
    columns: list[list[float | None]]
    rows: list[list[float | None]]
    cosines: list[list[float | None]] | None = None  # older runs have none


class Judged(Form):
    left_out: list[str]


class Line(Form):
    """One round in metrics.jsonl."""

    round: int = Field(ge=0)
    bytes_down: int = Field(ge=0, lt=2**63)
    bytes_up: int = Field(ge=0, lt=2**63)
    clients: list[OfClient]
    failures: list[Failed]
    notes: dict[str, Any]
    seconds: dict[str, float]
    metrics: dict[str, float] | None = None
    by_rank: dict[str, dict[str, float]] | None = None
    sent_ranks: list[int] | None = None
    own: list[float | None] | None = None
    update: Update | None = None
    robust: Judged | None = None
    alignment: Aligned | None = None
    misalignment: dict[str, float] | None = None

    @model_validator(mode="after")
    def _together(self) -> Line:
        """What one field counts on in another; null where a field may be left out is no value."""
        held = self.model_fields_set
        require(all(getattr(self, name) is not None for name in held & Line.model_fields.keys()),
                "field", "null", "a value, or none of that name")  # fmt: skip
        ranks = map(str, self.sent_ranks or ())
        require((self.by_rank is None) == (self.sent_ranks is None)
                and all(r in (self.by_rank or {}) for r in ranks) and self.sent_ranks != [],
                "sent_ranks", self.sent_ranks, "ranks of by_rank")  # fmt: skip
        for scores in (self.by_rank or {}).values():
            require(scores.keys() == (self.metrics or {}).keys(), "by_rank", sorted(scores),
                    "the metrics of the server's model")  # fmt: skip
        if self.alignment is not None:
            found = self.alignment
            known = {c.client for c in self.clients}
            sides = [x for x in (found.columns, found.rows, found.cosines) if x is not None]
            square = all(
                [len(row) for row in side] == [len(found.clients)] * len(found.clients)
                for side in sides
            )
            require(square and known >= set(found.clients), "alignment", found.clients,
                    "a square over clients of the round")  # fmt: skip
        return self


class Sweep(Form):
    """sweep/METHOD.json."""

    metric: str
    scores: dict[str, float]
    chosen: float
    seed: int


def read_about(path: Path) -> dict[str, Any]:
    """run.json, its configuration with every field."""
    about = read_json_object(path, "run")
    with _of(path):
        About.model_validate(about)
        config = Config.model_validate(about["config"]).model_dump(mode="json")
        require(about["method"] in config["methods"], "method", repr(about["method"]),
                "one of the configuration's")  # fmt: skip
    return about | {"config": config}


def read_lines(path: Path, *, whole: bool) -> list[dict[str, Any]]:
    """metrics.jsonl: a line for round 0, 1, …; a last one that was cut off is dropped.

    With `whole`, of a finished run, none may be cut off and the last has metrics.
    """
    lines = []
    with _of(path):
        texts = read_bytes(path, MAX_METRICS_BYTES).split(b"\n")
        ended = texts.pop() == b""
        for number, text in enumerate(texts):
            lines.append(_line(text, number))
        if whole:
            require(ended and bool(lines) and "metrics" in lines[-1], "lines", len(lines),
                    "those of a finished run, to the end")  # fmt: skip
    return lines


def _line(text: bytes, number: int) -> dict[str, Any]:
    line = parse_json_object(text)
    Line.model_validate(line)
    require(line["round"] == number, f"line {number + 1}", f"round {line['round']}", "one a round")
    return line


def read_sweep(path: Path) -> dict[str, Any]:
    """The outcome of a sweep."""
    outcome = read_json_object(path, "sweep")
    with _of(path):
        Sweep.model_validate(outcome)
    return outcome


@contextmanager
def _of(path: Path) -> Iterator[None]:
    """Name the file in what is refused of its content."""
    try:
        yield
    except (OSError, ValueError) as error:  # pydantic's and glora's own among them
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        else:
            found = str(error)
        raise unfit(
            "run", f"{str(path)!r}, which is damaged ({found})", "a file as glora fl run wrote it",
            "restore it, or run anew into another folder", file=str(path),
        ) from None  # fmt: skip
