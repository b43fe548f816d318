"""Errors and warnings: the thing, its value, what was expected, the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

__all__ = [
    "DamagedPartWarning",
    "GloraError",
    "GloraWarning",
    "LeftoverWarning",
    "LowEnergyWarning",
    "NodeRefusedWarning",
    "Refusal",
    "Refusals",
    "Refused",
    "RobustWarning",
    "SkippedClientWarning",
    "StrangerWarning",
    "TaskWarning",
    "TieWarning",
    "UncheckedFileWarning",
    "UnheardWarning",
    "clean",
    "listing",
    "require",
    "require_all",
    "shown",
    "unfit",
]


LONGEST = 500  # characters of a field: values come from anywhere


#: A URL in a text, as it stands or as `pathlib` would have it.
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/{1,2})(?P<rest>[^'\"\n]+)")
_HOST = re.compile(r"[^/?#\s:@]*(:\d*)?(?=[/?#\s]|$)|\[[^]@]*\]")  # and its port


def clean(text: object) -> str:
    """`text` without secrets of URLs and control characters, which could drive the terminal."""
    plain = shown(str(text))
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in plain)


def shown(text: str) -> str:
    """`text` with its URLs cut down to what is no secret: no user, password, query or fragment.

    A signed query gives access to whoever reads it. The user of abfs:// is a container.
    """
    if ":/" not in text:
        return text

    def cut(found: re.Match[str]) -> str:
        scheme, rest = found["scheme"], found["rest"]
        word = rest.split(maxsplit=1)[0] if rest.strip() else ""
        user = word[: word.rfind("@") + 1] if not _HOST.match(rest) else ""
        if scheme.startswith("abfs") and not set(user) & set(":/?#"):
            user = ""
        elif not user and not _HOST.match(rest):
            user = re.split("[/?#]", word)[0]
        return scheme + re.sub(r"[?#]\S+", "", rest[len(user) :])

    return _URL.sub(cut, text)


class GloraError(ValueError):
    """Base of every error glora raises on purpose.

    Attributes
    ----------
    refusals : tuple of Refusal
        What was wrong, in fields; one entry unless several things were (`Refused`).
    """

    def __init__(self, message: str, refusal: Refusal | None = None) -> None:
        super().__init__(clean(message))
        self.refusals: tuple[Refusal, ...] = (refusal or Refusal(message),)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with what it says: workers of a pool raise it in another process."""
        return type(self), (str(self), self.refusals[0])


class GloraWarning(UserWarning):
    """A result that stands, with something about it the caller should know; base of the others."""


class DamagedPartWarning(GloraWarning):
    """A part of a job was damaged, and is made again."""


class LeftoverWarning(GloraWarning):
    """Files of others lie among what a run that was killed left; they are kept."""


class LowEnergyWarning(GloraWarning):
    """The state holds much less of the mean update than its rank could."""


class NodeRefusedWarning(GloraWarning):
    """A node of a federated run was turned away."""


class RobustWarning(GloraWarning):
    """A robust rule left a client out, or another rule was used."""


class SkippedClientWarning(GloraWarning):
    """Clients were refused, and the others aggregated."""


class StrangerWarning(GloraWarning):
    """A client shares no module with the others."""


class TaskWarning(GloraWarning):
    """Data were read in another way than their form suggests."""


class TieWarning(GloraWarning):
    """A cut falls into a tie: the state is one of several equally good ones."""


class UncheckedFileWarning(GloraWarning):
    """A file of a state has a format that carries no checksums."""


class UnheardWarning(GloraWarning):
    """Directions below the precision that factors were stored in have no vote."""


@dataclass(frozen=True)
class Refusal:
    """One reason why an input cannot be used truthfully.

    Parameters
    ----------
    problem : str
        One sentence: what is wrong.
    client, file, tensor : str or None
        Where it is wrong, as far as it applies.
    found, expected : str
        The offending value and what would have been accepted.
    remedy : str
        What the reader can do about it.
    more : int
        How many like it are counted only (`Refusals`).
    """

    problem: str
    client: str | None = None
    file: str | None = None
    tensor: str | None = None
    found: str = ""
    expected: str = ""
    remedy: str = ""
    more: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, str):
                plain = shown(value)
                long = len(plain) > LONGEST
                object.__setattr__(self, name, f"{plain[:LONGEST]}…" if long else plain)

    def __str__(self) -> str:
        where = [
            f"{kind} {value!r}"
            for kind, value in (
                ("client", self.client),
                ("file", self.file),
                ("tensor", self.tensor),
            )
            if value
        ]
        parts = [self.problem]
        if self.found:
            parts.append(f"found {self.found}")
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.remedy:
            parts.append(self.remedy)
        if self.more:
            parts.append(self.rest)
        text = "; ".join(parts)
        return f"{', '.join(where)}: {text}" if where else text

    @property
    def rest(self) -> str:
        """How many like it are not listed."""
        return f"and {self.more:,} more".replace(",", " ")


_OTHERS = Refusal(
    "further problems, of other kinds or clients, are only counted",
    found="more than can be read",
    expected="none",
    remedy="mend those that are listed first",
)


class Refusals(list[Refusal]):
    """Refusals in order: the first `SHOWN` of a kind in one file of one client, the rest counted.

    The last one listed says how many `more` there are, so that what is kept and printed stays
    small however much is wrong. Beyond `LISTED` altogether problems are counted as well.
    """

    SHOWN = 5
    LISTED = 100

    def __init__(self, refusals: Iterable[Refusal] = ()) -> None:
        super().__init__()
        self._places: dict[tuple[str | None, str | None, str], list[int]] = {}
        self.extend(refusals)

    def append(self, refusal: Refusal) -> None:
        kind = (refusal.client, refusal.file, refusal.problem)
        if len(self) >= self.LISTED and kind not in self._places:
            refusal = replace(_OTHERS, more=refusal.more)
            kind = (None, None, refusal.problem)
        places = self._places.setdefault(kind, [])
        if not places or (len(places) < self.SHOWN and len(self) < self.LISTED):
            places.append(len(self))
            super().append(refusal)
        else:
            last = self[places[-1]]
            self[places[-1]] = replace(last, more=last.more + 1 + refusal.more)

    def extend(self, refusals: Iterable[Refusal]) -> None:
        for refusal in refusals:
            self.append(refusal)

    def __iadd__(self, refusals: Iterable[Refusal]) -> Refusals:  # type: ignore[override,misc]  # list's wants itself
        self.extend(refusals)
        return self


class Refused(GloraError):
    """Inputs were refused; the reasons are listed at once, in `refusals`, as `Refusals` does."""

    def __init__(self, refusals: Iterable[Refusal]) -> None:
        refusals = tuple(Refusals(refusals))
        super().__init__("\n".join(str(r) for r in refusals))
        self.refusals = refusals

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.refusals,)


@contextmanager
def listing(refusals: list[Refusal]) -> Iterator[None]:
    """Add what is refused in the block to `refusals`, to be raised with the rest."""
    try:
        yield
    except GloraError as error:
        refusals += error.refusals


def unfit(
    name: str,
    got: object,
    expected: str,
    remedy: str = "",
    *,
    file: str | None = None,
    tensor: str | None = None,
) -> GloraError:
    """The error for an argument: its name, its value, what was expected and the remedy.

    `file` and `tensor` say where the value stands, as far as it stands in one.
    """
    return GloraError(
        f"{name}: got {got!s:.{LONGEST}}, expected {expected}" + (f"; {remedy}" if remedy else ""),
        Refusal(f"{name} cannot be used", None, file, tensor, str(got), expected, remedy),
    )


def require(
    condition: bool, name: str, got: object, expected: str, remedy: str = "", **where: str | None
) -> None:
    """Raise `unfit` unless `condition` holds."""
    if not condition:
        raise unfit(name, got, expected, remedy, **where)


def require_all(*claims: tuple[bool, str, object, str]) -> None:
    """`require` for several arguments, (condition, name, got, expected) each: all are listed."""
    refusals = Refusals()
    for claim in claims:
        with listing(refusals):
            require(*claim)
    if refusals:
        raise Refused(refusals)
