"""Which modules a configuration selects, by the names that PEFT compares."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["Targets", "ends_with", "exactly"]


def ends_with(path: str, name: str) -> bool:
    """Whether `name` is `path` or its end after a dot."""
    return path == name or path.endswith("." + name)


def _names(value: Any) -> tuple[str, ...]:
    return tuple(n for n in value if isinstance(n, str)) if isinstance(value, list) else ()


@dataclass(frozen=True)
class Targets:
    """``target_modules`` and what restricts it.

    Attributes
    ----------
    names, excluded : tuple of str
        Ends of module paths; empty where the configuration has a pattern instead.
    plain : bool
        `names` alone decide: no pattern, no exclusion, no choice of layers.
    """

    names: tuple[str, ...]
    excluded: tuple[str, ...]
    plain: bool

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Targets:
        others = ("exclude_modules", "layers_to_transform", "layers_pattern")
        plain = isinstance(raw.get("target_modules"), list) and not any(map(raw.get, others))
        return cls(_names(raw.get("target_modules")), _names(raw.get("exclude_modules")), plain)

    def selects(self, module: str) -> bool | None:
        """Whether `module` is adapted where the model has it; None where that is not told here."""
        if self.excludes(module):
            return False
        named = not self._names.isdisjoint(_ends(module))
        if self.plain or not named:
            return named if self.names else None
        return None

    def excludes(self, module: str) -> bool:
        """Whether `excluded` names `module`."""
        return not self._excluded.isdisjoint(_ends(module))

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.names)

    @cached_property
    def _excluded(self) -> frozenset[str]:
        return frozenset(self.excluded)


def _ends(path: str) -> Iterator[str]:
    """`path` and its ends after dots: looking these up costs the same however many names are."""
    while path:
        yield path
        path = path.partition(".")[2]


def exactly(modules: Iterable[str]) -> str:
    """A pattern for ``exclude_modules`` that leaves `modules` and nothing else."""
    return f"(?!(?:{'|'.join(re.escape(m) for m in sorted(modules))})$).*"
