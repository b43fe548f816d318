"""What is asked of a client whose factors are read module by module, and clients in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .state import Factors

__all__ = ["Held", "InMemory", "Pair", "Reader", "Source"]


class Pair(Protocol):
    """What is known of a factor pair before it is read."""

    @property
    def rank(self) -> int: ...
    @property
    def d_out(self) -> int: ...
    @property
    def d_in(self) -> int: ...
    @property
    def b_dtype(self) -> torch.dtype: ...
    @property
    def a_dtype(self) -> torch.dtype: ...


@runtime_checkable
class Source(Protocol):
    """A client whose factors are read module by module."""

    @property
    def modules(self) -> Mapping[str, Pair]: ...

    def factors(self, module: str) -> Factors:
        """B (d_out, r) and A (r, d_in)."""
        ...


class Reader(Source, Protocol):
    """A source that reads to where the factors are wanted, without a copy on the way."""

    def read_into(self, module: str, b: Tensor, a: Tensor) -> None:
        """Write Bᵀ (r, d_out) and A (r, d_in) into contiguous rows of a stack, in its dtypes."""
        ...


@dataclass(frozen=True)
class Held:
    """A factor pair in memory."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def d_out(self) -> int:
        return self.b.shape[0]

    @property
    def d_in(self) -> int:
        return self.a.shape[1]

    @property
    def b_dtype(self) -> torch.dtype:
        return self.b.dtype

    @property
    def a_dtype(self) -> torch.dtype:
        return self.a.dtype


@dataclass(frozen=True)
class InMemory:
    """A client whose factors the caller holds."""

    modules: dict[str, Held]

    def factors(self, module: str) -> Factors:
        pair = self.modules[module]
        return pair.b, pair.a
