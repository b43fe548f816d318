"""What glora says when it will not go on: the thing, its value, what was expected, the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["GloraError", "GloraWarning", "Refusal", "Refused", "require"]


class GloraError(ValueError):
    """Base of every error glora raises on purpose."""


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
    """Inputs were refused; every reason that could be found is listed at once.

    Attributes
    ----------
    refusals : tuple of Refusal
    """

    def __init__(self, refusals: Iterable[Refusal]) -> None:
        self.refusals = tuple(refusals)
        super().__init__("\n".join(str(r) for r in self.refusals))


def require(condition: bool, name: str, got: object, expected: str, remedy: str = "") -> None:
    """Raise `GloraError` naming the argument, its value, what was expected and the remedy."""
    if not condition:
        tail = f"; {remedy}" if remedy else ""
        raise GloraError(f"{name}: got {got}, expected {expected}{tail}")
