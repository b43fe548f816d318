"""What a rank says before anything is sent, typed; imported when one does, because of pydantic."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import BeforeValidator, ConfigDict, Field

from .packing import FLOATS
from .state_schema import (
    Basis,
    Count,
    Integer64,
    Missing,
    NotNegative,
    Positive,
    Rank,
    Section,
)

__all__ = ["Told"]

_DTYPES = {str(dtype): dtype for dtype in FLOATS}
Dtype = Annotated[torch.dtype, BeforeValidator(lambda x: _DTYPES.get(str(x)))]


class Asked(Section):
    """Every setting."""

    rank: Rank | None
    gather: bool
    basis: Basis
    missing: Missing
    normalise: bool
    tau_rel: NotNegative
    anchor: NotNegative
    oversample: Rank
    power_iters: Annotated[int, Field(ge=-1, lt=2**31)]
    tol: Positive
    seed: Integer64
    max_bytes: Annotated[int, Field(ge=1, lt=2**63)] | None
    client_statistics: bool


class Shape(NamedTuple):
    """A factor pair without the factors."""

    rank: Count
    d_out: Count
    d_in: Count
    b_dtype: Dtype
    a_dtype: Dtype


class Client(Section):
    """A client of the rank. A weight may be anything: it is judged beside all others."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    name: str | None
    weight: float | None
    scalings: dict[str, float]
    modules: dict[str, Shape]


class Told(Section):
    """All of it."""

    asked: Asked
    clients: list[Client]
    threads: Annotated[int, Field(ge=1, lt=2**31)]
    kind: str | None
