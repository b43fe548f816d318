"""What glora says when it will not go on: the thing, its value, what was expected, the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = [
    "GloraError",
    "GloraWarning",
    "Refusal",
    "Refused",
    "clean",
    "listing",
    "require",
    "require_all",
    "unfit",
]


def clean(text: object) -> str:
    """`text` without control characters: names come from clients and could drive the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in str(text))


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


class GloraWarning(UserWarning):
    """A result that stands, with something about it the caller should know."""


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
    """

    problem: str
    client: str | None = None
    file: str | None = None
    tensor: str | None = None
    found: str = ""
    expected: str = ""
    remedy: str = ""

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
        text = "; ".join(parts)
        return f"{', '.join(where)}: {text}" if where else text


class Refused(GloraError):
    """Inputs were refused; every reason that could be found is listed at once, in `refusals`."""

    def __init__(self, refusals: Iterable[Refusal]) -> None:
        refusals = tuple(refusals)
        super().__init__("\n".join(str(r) for r in refusals))
        self.refusals = refusals


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
        f"{name}: got {got}, expected {expected}" + (f"; {remedy}" if remedy else ""),
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
    refusals: list[Refusal] = []
    for claim in claims:
        with listing(refusals):
            require(*claim)
    if refusals:
        raise Refused(refusals)
