"""Patterns of a configuration, matched at a cost linear in the name.

A pattern speaks of a module where it matches the module's name, or its end after a dot, as PEFT's
``re.match(rf"(.*\\.)?({pattern})$", name)`` finds it. All patterns of a table make one automaton
whose states are followed side by side (Thompson, "Regular expression search algorithm", CACM 1968):
nothing is tried twice, whatever a client wrote. Own code: `re` backtracks, and RE2, which does not,
reads ``\\d``, ``\\w``, ``{,n}`` and ``[[:x:]]`` differently and lacks wheels for some systems.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["GRAMMAR", "PatternError", "Patterns"]

GRAMMAR = (
    "characters, ., [classes], \\d \\w \\s and their opposites, groups with |, *, +, ?, {m,n}, ^ "
    "and $"
)
MAX_STATES = 500_000  # of a table, 200 bytes each; names in full share their beginnings
MAX_STEPS = 10_000_000  # of a table over all names, some seconds
MAX_REPEAT = 1000  # why: a repetition is written out, state by state
MAX_DEPTH = 20  # groups in each other; why: the parser calls itself

_KINDS: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
_COUNTS = re.compile(r"\{(\d*)(,?)(\d*)\}", re.ASCII)


class PatternError(ValueError):
    """A pattern outside the grammar, or beyond a limit."""


@dataclass(frozen=True)
class _Set:
    """Characters of a class: single ones, spans from … to, kinds such as d, or all but these."""

    singles: frozenset[str] = frozenset()
    spans: tuple[tuple[str, str], ...] = ()
    kinds: tuple[str, ...] = ()
    others: bool = False

    def __contains__(self, c: str) -> bool:
        inside = (
            c in self.singles
            or any(low <= c <= high for low, high in self.spans)
            or any(_KINDS[kind.lower()](c) == kind.islower() for kind in self.kinds)
        )
        return inside != self.others

    @property
    def cost(self) -> int:
        return 1 + len(self.spans) + len(self.kinds)


_ANY = _Set(others=True)

# What is parsed: (kind, parts). A "one" is a character or a `_Set`, a "bound" is ^ or $.
_Tree = tuple[str, Any]


class Patterns:
    """A table's patterns, in the order that decides between them.

    Parameters
    ----------
    patterns : iterable of str

    Raises
    ------
    PatternError
        Naming a pattern outside `GRAMMAR`, or the one with which they become too many.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._count = 1  # of states; 0 is the start of every pattern
        # Where to go on after a character, and without one: anywhere, or where ^ or $ holds.
        self._singles: dict[tuple[int, str], int] = {}
        self._sets: dict[int, dict[_Set, int]] = {}
        self._free: dict[int, list[tuple[str, int]]] = {}
        self._ends: dict[int, int] = {}
        self._steps = 0
        for order, pattern in enumerate(patterns):
            try:
                end = self._build(_Parser(pattern).tree(), 0)
            except PatternError as error:
                raise PatternError(f"{pattern[:80]!r}: {error}") from None
            self._ends.setdefault(end, order)

    def first(self, name: str) -> int | None:
        """Place of the first pattern that speaks of the module `name`.

        Raises
        ------
        PatternError
            When all names together have cost more than `MAX_STEPS`.
        """
        active = self._closed({0}, "^")
        for c in name:
            if not active:  # nothing can begin before the next dot
                if c == ".":
                    active = self._closed({0})
                continue
            after = set()
            for state in active:
                if (state, c) in self._singles:
                    after.add(self._singles[state, c])
                for chars, target in self._sets.get(state, {}).items():
                    self._steps += chars.cost
                    if c in chars:
                        after.add(target)
            if c == ".":
                after.add(0)
            active = self._closed(after)
            self._spend(len(active) + 1)
        last = self._closed(active, "$" if name else "^$")
        return min((self._ends[i] for i in last if i in self._ends), default=None)

    def _closed(self, states: set[int], bounds: str = "") -> set[int]:
        """`states` and all that follow without a character, where these `bounds` hold."""
        found, todo = set(states), list(states)
        while todo:
            for bound, target in self._free.get(todo.pop(), ()):
                self._steps += 1
                if bound in bounds and target not in found:
                    found.add(target)
                    todo.append(target)
        return found

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise PatternError(f"the limit of {MAX_STEPS} steps is reached")

    # --- building ----------------------------------------------------------------------------

    def _new(self) -> int:
        if self._count == MAX_STATES:
            raise PatternError(f"with it the patterns have more than {MAX_STATES} states")
        self._count += 1
        return self._count - 1

    def _build(self, tree: _Tree, at: int) -> int:
        """Add states for `tree` from `at` on; where it ends.

        A state that follows on a character has no other way in, so that patterns which begin
        alike share it; every other state is new.
        """
        self._spend(1)
        kind, parts = tree
        if kind == "one":
            single = isinstance(parts, str)
            ways: dict[Any, int] = self._singles if single else self._sets.setdefault(at, {})
            way = (at, parts) if single else parts
            if way not in ways:
                ways[way] = self._new()
            return ways[way]
        if kind == "row":
            for part in parts:
                at = self._build(part, at)
            return at
        if kind == "bound":
            return self._joined([at], parts)
        if kind == "choice":
            return self._joined([self._build(part, at) for part in parts])
        body, least, most = parts
        for _ in range(least):
            at = self._joined([self._build(body, at)])
        if most is None:
            loop = self._joined([at])
            self._free.setdefault(self._build(body, loop), []).append(("", loop))
            return loop
        ways_out = [at]
        for _ in range(most - least):
            ways_out.append(self._build(body, self._joined(ways_out[-1:])))
        return self._joined(ways_out)

    def _joined(self, states: Iterable[int], bound: str = "") -> int:
        end = self._new()
        for state in states:
            self._free.setdefault(state, []).append((bound, end))
        return end


class _Parser:
    """Reads one pattern, from left to right."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0

    def tree(self) -> _Tree:
        tree = self._choice()
        if self._at < len(self._text):
            raise PatternError("a ) without its (")
        return tree

    def _next(self) -> str:
        """The next character, taken; "" at the end."""
        c = self._text[self._at : self._at + 1]
        self._at += 1
        return c

    def _takes(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _choice(self) -> _Tree:
        rows = [self._row()]
        while self._takes("|"):
            rows.append(self._row())
        return rows[0] if len(rows) == 1 else ("choice", rows)

    def _row(self) -> _Tree:
        parts: list[_Tree] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._piece()))
        return "row", parts

    def _piece(self) -> _Tree:
        c = self._next()
        if c == "(":
            return self._group()
        if c == "[":
            return "one", self._class()
        if c == ".":
            return "one", _ANY
        if c in "^$":
            return "bound", c
        if c == "\\":
            return self._escaped()
        if c in "*+?{":
            raise PatternError(f"a {c} with nothing to repeat, or {c} itself without a backslash")
        return "one", c

    def _group(self) -> _Tree:
        if self._takes("?") and not self._takes(":"):
            raise PatternError("a (? that is no (?:")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise PatternError(f"more than {MAX_DEPTH} groups in each other")
        tree = self._choice()
        self._depth -= 1
        if not self._takes(")"):
            raise PatternError("a ( without its )")
        return tree

    def _escaped(self) -> _Tree:
        c = self._next()
        if c and c in "dwsDWS":
            return "one", _Set(kinds=(c,))
        if c == "A":
            return "bound", "^"
        if c == "Z":
            return "bound", "$"
        return "one", self._literal(c)

    def _literal(self, c: str) -> str:
        if not c or (c.isascii() and c.isalnum()):
            raise PatternError(f"\\{c} is unknown")
        return c

    def _class(self) -> _Set:
        others = self._takes("^")
        singles: set[str] = set()
        spans: list[tuple[str, str]] = []
        kinds: list[str] = []
        first = True  # a ] that stands first is one of the characters
        while first or not self._takes("]"):
            first = False
            low = self._member()
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                high = self._member()
                if len(low + high) > 2 or high < low:
                    raise PatternError(f"{low}-{high} is no span")
                spans.append((low, high))
            elif len(low) == 2:
                kinds.append(low[1])
            else:
                singles.add(low)
        return _Set(frozenset(singles), tuple(spans), tuple(kinds), others)

    def _member(self) -> str:
        """A character of a class, or a backslash and the letter of a kind."""
        c = self._next()
        if c in ("", "["):
            raise PatternError("a [ without its ]" if not c else "a [ inside [ ]")
        if c != "\\":
            return c
        c = self._next()
        return "\\" + c if c and c in "dwsDWS" else self._literal(c)

    def _repeated(self, tree: _Tree) -> _Tree:
        counts = self._counts()
        if counts is None:
            return tree
        if tree[0] == "bound":
            raise PatternError(f"a repeated {tree[1]}")
        self._takes("?")  # the shorter match first: it is the same match or none
        if self._text[self._at : self._at + 1] in ("*", "+", "?", "{"):
            raise PatternError("a repetition of a repetition")
        return "repeat", (tree, *counts)

    def _counts(self) -> tuple[int, int | None] | None:
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._takes(sign):
                return counts
        found = _COUNTS.match(self._text, self._at)
        if not found or found.group() in ("{}", "{,}"):
            return None
        self._at = found.end()
        low, comma, high = found.groups()
        least = int(low[:9] or 0)
        most = (int(high[:9]) if high else None) if comma else least
        if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least):
            raise PatternError(f"{found.group()[:20]} is no repetition up to {MAX_REPEAT}")
        return least, most
