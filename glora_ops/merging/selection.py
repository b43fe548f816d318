"""Which modules of the clients are aggregated: those that patterns include and do not exclude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from ..adapters.modules import Module
from ..adapters.read import Adapter
from ..errors import Refusal, require

__all__ = ["check_patterns", "is_chosen", "select", "unselected"]


def check_patterns(name: str, patterns: Sequence[str]) -> None:
    """Raise `GloraError` where `patterns` is not a list of patterns."""
    fits = not isinstance(patterns, str) and all(isinstance(p, str) and p for p in patterns)
    require(fits, name, repr(patterns), "a list of patterns such as ['q_proj', '*.layers.0.*']")


def is_chosen(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a module is taken: a pattern matches its path, or the end of it after a dot."""

    def any_matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(path, p) or fnmatchcase(path, f"*.{p}") for p in patterns)

    return (not include or any_matches(include)) and not any_matches(exclude)


def select(
    adapters: Sequence[Adapter], include: Sequence[str], exclude: Sequence[str]
) -> list[Adapter]:
    """Adapters with the modules that are taken; of a parameter's experts all or none.

    Those that shared a layout share what is left of it.
    """
    known: dict[tuple[int, int], tuple[dict[str, Module], dict[str, str]]] = {}
    chosen = []
    for adapter in adapters:
        key = id(adapter.modules), id(adapter.tied)
        if key not in known:
            modules = {
                name: m
                for name, m in adapter.modules.items()
                if is_chosen(m.parameter, include, exclude)
            }
            left_out = adapter.modules.keys() - modules.keys()
            tied = {copy: one for copy, one in adapter.tied.items() if not {copy, one} & left_out}
            known[key] = modules, tied
        modules, tied = known[key]
        chosen.append(replace(adapter, modules=modules, tied=tied))
    return chosen


def unselected(adapter: Adapter, include: Sequence[str], exclude: Sequence[str]) -> Refusal:
    """The refusal of a client of which nothing is taken."""
    return Refusal(
        "no module of the client is included",
        adapter.name,
        found=", ".join(list(adapter.modules)[:3]) + ", …" * (len(adapter.modules) > 3),
        expected=f"modules that match {list(include) or 'anything'}, and none of {list(exclude)}",
        remedy="give other patterns (--include, --exclude); glora inspect names the modules",
    )
