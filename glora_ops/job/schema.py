"""The JSON of a job's folder, typed; imported when one is read, because of pydantic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import FailFast, Field, FiniteFloat, model_validator

from ..state_schema import (
    MAX_MANY,
    Arguments,
    Count,
    Many,
    Name,
    Names,
    NotNegative,
    OfClients,
    Place,
    Rank,
    Section,
    Sha256,
)

__all__ = ["Check", "Plan", "Receipt"]

Text = Annotated[str, Field(max_length=200)]


class Files(Section):
    """A client's files as they were when the job was planned."""

    size: Count
    mtime_ns: int
    inode: Count
    num_examples: Count | None
    config_sha256: Sha256


class Object(Section):
    """The same of a client behind a URL."""

    size: Count
    mark: Text
    num_examples: Count | None
    config_sha256: Sha256


class Client(Section):
    """One that was named; without `files` where its headers were not in order."""

    name: Name
    path: Place
    named: bool
    weight: FiniteFloat | None
    kept: bool
    files: Files | Object | None
    sha256: Sha256 | None

    @model_validator(mode="after")
    def _agrees(self) -> Client:
        if self.kept and self.files is None:
            raise ValueError("the files of a client that is kept")
        return self


class Part(Section):
    """Modules that are computed together, and weights saved in full that go with them."""

    modules: Names
    dense: Annotated[list[Name], FailFast(), Field(max_length=MAX_MANY)]
    bytes: Count


class Plan(Section):
    """``plan.json``."""

    format_version: Literal[1]
    arguments: Arguments
    device: Literal["cpu", "cuda"]
    rank: Rank
    max_file_bytes: Count
    skipped: Annotated[list[str], FailFast()]
    clients: OfClients[Client]
    parts: Many[Part]
    checks: Annotated[list[Many[Count]], FailFast(), Field(max_length=MAX_MANY)]
    sha256: Sha256

    @model_validator(mode="after")
    def _agrees(self) -> Plan:
        kept = [i for i, client in enumerate(self.clients) if client.kept]
        if len({client.weight is None for client in self.clients}) > 1:
            raise ValueError("a weight of every client, or of none")
        if len({self.clients[i].name for i in kept}) < len(kept) or not kept:
            raise ValueError("clients of different names")
        unchecked = [i for i in kept if self.clients[i].sha256 is None]
        if [i for check in self.checks for i in check] != unchecked:
            raise ValueError("every client that is kept checked once")
        modules = [name for part in self.parts for name in part.modules]
        dense = [name for part in self.parts for name in part.dense]
        if len(set(modules)) < len(modules) or len(set(dense)) < len(dense):
            raise ValueError("every module and weight in one part")
        return self


class Receipt(Section):
    """``parts/00017.json``: what the part's state is, and what made it."""

    plan: Sha256
    state: Sha256
    bytes: Count
    seconds: NotNegative
    torch: Text
    processor: Text
    sha256: Sha256


class Check(Section):
    """``checked/00003.json``: digests of the tensor files of clients whose values are in order."""

    plan: Sha256
    files: Many[Sha256]
    sha256: Sha256
