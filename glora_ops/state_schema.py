"""The metadata of a state file, typed: what is not described here is refused by name.

Depth is bounded because the schema is closed, size by `MAX_MANY`, `MAX_CLIENTS`, `MAX_NAME` and the
header's own limit. Imported when a state is read or written, because pydantic takes long to import.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from .errors import Refusal

__all__ = ["faults"]

MAX_NAME = 2**13  # characters of a client's or a module's name, and of a path
MAX_MANY = 2**17  # modules, ranks tried, …
MAX_CLIENTS = 2**20  # why: some hundred bytes each, of which a reader keeps a thousand
WEIGHTS_SUM = 1e-9  # fp64 rounding of 2^20 quotients and their sum is a tenth of this


def _name(text: str) -> str:
    if len(text) > MAX_NAME:
        raise ValueError(f"at most {MAX_NAME} characters")
    return text


def _path(text: str) -> str:
    if "\0" in text or not text:
        raise ValueError("a path")
    os.fsencode(text)  # a UnicodeEncodeError, which is a ValueError, where no file can be so named
    return _name(text)


def _kernel(sizes: list[int]) -> list[int]:
    if len(sizes) not in (0, 2):
        raise ValueError("[] or [height, width]")
    return sizes


def _different(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("each name once")
    return names


T = TypeVar("T")
# Validated after the fact: pydantic's own limits on text refuse names that are not UTF-8.
Name = Annotated[str, AfterValidator(_name)]
Place = Annotated[str, AfterValidator(_path)]
Digits = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,9}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Rank = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[FiniteFloat, Field(ge=0, le=1)]
NotNegative = Annotated[FiniteFloat, Field(ge=0)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Many = Annotated[list[T], FailFast(), Field(min_length=1, max_length=MAX_MANY)]
Names = Annotated[Many[Name], AfterValidator(_different)]
OfClients = Annotated[list[T], FailFast(), Field(min_length=1, max_length=MAX_CLIENTS)]
ClientNames = Annotated[OfClients[Name], AfterValidator(_different)]
Basis = Literal["consensus", "projector", "update"]
Missing = Literal["zero", "renormalise"]
Rule = Literal["clip", "gate", "geometric-median"]
Integer64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Section(BaseModel):
    """JSON as it stands: "1" is no number, 1 is no truth value, and no other key is known.

    A default only says that the key may be missing: what is judged is not filled in.
    """

    model_config = ConfigDict(strict=True, extra="forbid")


class Judged(Section):
    """What a robust rule made of one client."""

    norm: NotNegative
    cosine: FiniteFloat | None
    distance: FiniteFloat | None
    scale: Fraction
    trust: NotNegative


class Verdict(Section):
    """What it made of all of them."""

    rule: Rule
    applied: Rule | Literal["none"]
    reason: str
    clip: Positive
    norm_limit: FiniteFloat | None
    cosine_limit: FiniteFloat | None
    left_out: Annotated[list[Name], FailFast(), Field(max_length=MAX_CLIENTS)]
    clients: OfClients[Judged]

    @model_validator(mode="after")
    def _says_why(self) -> Verdict:
        out = [client for client in self.clients if client.trust == 0]
        if out and (self.cosine_limit is None or any(client.cosine is None for client in out)):
            raise ValueError("the cosines that leave a client out")
        if self.norm_limit is None and any(client.scale < 1 for client in self.clients):
            raise ValueError("the limit to which a norm is clipped")
        return self


class Settings(Section):
    """How a state was made."""

    basis: Basis
    missing: Missing
    normalise: bool
    rank: Rank
    tau_rel: NotNegative
    anchor: NotNegative
    oversample: Rank
    power_iters: Annotated[int, Field(ge=-1, lt=2**31)]
    tol: Positive
    seed: Integer64
    captured_target: Fraction = 1.0
    rank_to_captured: Annotated[dict[Digits, Fraction], Field(max_length=MAX_MANY)] = {}
    weights_from: Literal["given", "num_examples", "equal"] = "equal"
    skipped: Annotated[list[str], FailFast()] = []
    remarks: Annotated[list[str], FailFast(), Field(max_length=MAX_CLIENTS)] = []
    dense_from: Annotated[dict[Name, ClientNames], Field(max_length=MAX_MANY)] = {}
    robust: Verdict = None  # type: ignore[assignment]  # absent, but never null


class Layer(Section):
    """What PEFT needs to know of a module."""

    kind: Literal["linear", "conv2d", "embedding", "parameter", "expert"]
    kernel: Annotated[list[Rank], AfterValidator(_kernel)]
    fan_in_fan_out: bool


class Layout(Section):
    """What PEFT folders need beside numbers."""

    base_model: str | None
    revision: str | None
    task_type: str | None
    lora_dropout: Fraction
    modules_to_save: Annotated[list[str], FailFast(), Field(max_length=MAX_MANY)]
    modules: Annotated[dict[Name, Layer], Field(max_length=MAX_MANY)]
    auto_mapping: Annotated[dict[Name, Name], Field(max_length=16)] | None = None
    exact: bool = False
    base_copies: Annotated[list[Name], FailFast(), Field(max_length=MAX_MANY)] = []
    tied: Annotated[dict[Name, Name], Field(max_length=MAX_MANY)] = {}


class Arguments(Section):
    """Of `aggregate_adapters`, as far as they were given: what an update passes on to it."""

    dense: Literal["mean", "refuse"]
    base: str | None
    include: Annotated[list[Name], FailFast(), Field(max_length=MAX_MANY)] = []
    exclude: Annotated[list[Name], FailFast(), Field(max_length=MAX_MANY)] = []
    rank: Rank | Literal["auto"] | None = None
    basis: Basis = "consensus"
    missing: Missing = "zero"
    captured: Fraction = 0.9
    normalise: bool = True
    tau_rel: NotNegative = 0.1
    anchor: NotNegative = 1.0
    oversample: Rank = 16
    power_iters: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    tol: Positive = 1e-3
    seed: Integer64 = 0
    client_statistics: bool = True
    max_bytes: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    robust: Rule | None = None
    clip: Positive = 2.0


class Client(Section):
    """One client's files, as they were."""

    name: Name
    path: Place
    named: bool = False  # by whoever merged it, and not by its path
    weight: FiniteFloat | None
    num_examples: Count | None
    bytes: Count
    sha256: Sha256
    config_sha256: Sha256
    ranks: Many[Rank]
    scalings: Many[FiniteFloat]


class Readouts(Section):
    """The adapters that were written beside the state."""

    ranks: Annotated[list[Rank], FailFast(), Field(max_length=MAX_MANY)]
    pad: Literal["zero", "trainable"]
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"


class Record(Section):
    """What an update needs."""

    arguments: Arguments
    clients: OfClients[Client]
    readouts: Readouts = Readouts(ranks=[], pad="zero")


class Metadata(Section):
    """All of it."""

    format_version: int
    modules: Names
    clients: ClientNames
    weights: OfClients[FiniteFloat]
    settings: Settings
    layout: Layout | None
    record: Record | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Metadata:
        if len(self.weights) != len(self.clients):
            raise ValueError("one weight per client")
        if self.settings.normalise and not (
            min(self.weights) >= 0 and abs(math.fsum(self.weights) - 1) <= WEIGHTS_SUM
        ):
            raise ValueError("normalised weights, none negative, of sum 1")
        verdict = self.settings.robust
        if verdict is not None:
            rows = zip(self.clients, verdict.clients, strict=False)
            left_out = [name for name, client in rows if client.trust == 0]
            if len(verdict.clients) != len(self.clients) or verdict.left_out != left_out:
                raise ValueError("a verdict on each client, and the names of those left out")
        if self.layout is not None and self.layout.modules.keys() != set(self.modules):
            raise ValueError("a layout of the modules there are")
        if self.record is not None:
            if [client.name for client in self.record.clients] != self.clients:
                raise ValueError("a record of the clients there are, in their order")
            if "weights_from" not in self.settings.model_fields_set:
                raise ValueError("settings that say where the weights are from, beside a record")
            given = self.settings.weights_from == "given"
            if any((client.weight is not None) != given for client in self.record.clients):
                raise ValueError("a weight in the record of each client, if weights were given")
        return self


class Checked(Metadata):
    """The same with digests, as they are from format 3 on."""

    tensors: dict[str, Sha256]
    sha256: Sha256


class Beside(Section):
    """The lines of clients that are kept beside the state."""

    clients: Annotated[int, Field(ge=1, le=MAX_CLIENTS)]
    bytes: Annotated[int, Field(ge=1, le=2**31)]
    sha256: Sha256


class Outline(Section):
    """What has to be in order before the clients beside a state are looked for."""

    model_config = ConfigDict(extra="ignore")

    format_version: Literal[4]
    beside: Beside
    tensors: dict[str, Sha256]
    sha256: Sha256


def faults(about: Mapping[str, Any]) -> list[Refusal]:
    """What does not fit in the metadata of a state file, field by field.

    Those of a state whose clients are beside it: first without them, then with.
    """
    checked = Checked if about["format_version"] >= 3 else Metadata
    try:
        (Outline if "beside" in about else checked).model_validate(about)
    except ValidationError as error:
        return [
            Refusal(
                "the metadata do not fit",
                found=_shown(e),
                expected=e["msg"].removeprefix("Value error, "),
            )
            for e in error.errors(include_url=False, include_context=False)
        ]
    return []


def _shown(error: Mapping[str, Any]) -> str:
    """The field and what stands there."""
    if not error["loc"]:
        return "entries that contradict each other"
    missing = error["type"] == "missing"
    found = "nothing" if missing else reprlib.repr(error["input"])[:80]
    return f"{'.'.join(map(str, error['loc']))}: {found}"
