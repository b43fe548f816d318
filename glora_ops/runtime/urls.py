"""URLs of clients, without what they may keep secret: it is dropped where they are read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import shown

__all__ = ["Url", "is_url", "where"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.:/-]+)?://")
_LOCAL = re.compile(r"(file|local)://", re.IGNORECASE)


@dataclass(frozen=True)
class Url:
    """A folder or file behind a URL, with those words of a path that clients need.

    Attributes
    ----------
    text : str
        Without user, password, query, fragment and slashes at the end.
    fault : str
        Why it cannot be used as it was given; nothing of what was dropped stands in it.
    """

    text: str
    fault: str = ""

    @classmethod
    def of(cls, text: str) -> Url:
        head = re.split(r"[?#]", text, maxsplit=1)[0]
        kept = shown(head)
        faults = ["a query or fragment"] * (head != text) + ["a user or password"] * (kept != head)
        faults += ["a chain of protocols"] * ("::" in text)
        faults += ["nothing behind the protocol"] * kept.endswith("://")
        return cls(kept if kept.endswith("://") else kept.rstrip("/"), " and ".join(faults))

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}", self.fault)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in re.split(r"://|/", self.text) if part)

    @property
    def name(self) -> str:
        return self.parts[-1]


def is_url(text: str) -> bool:
    """Whether `text` is a URL of anything but a file of this machine."""
    return _URL.match(text) is not None and _LOCAL.match(text) is None


def where(text: str | os.PathLike[str]) -> Path | Url:
    """What a client's path or URL leads to; an absolute path, also of file://."""
    plain = os.fspath(text)
    if is_url(plain) and not os.path.lexists(plain):
        return Url.of(plain)
    return Path(os.path.abspath(_LOCAL.sub("", plain)))
