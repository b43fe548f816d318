"""Bytes of objects behind URLs, by fsspec: whole or in ranges, with limits and words of our own.

Whatever fsspec, botocore or aiohttp raise may quote a URL with its signature, or a server's page:
only the kind of a failure is passed on, never its text.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import GloraError, Refusal
from .overlap import READERS
from .urls import Url

__all__ = ["REQUEST", "Found", "fetch", "look"]

#: Bytes of one request at most. why: they take longer than its round trip; more would only be
#: more memory, and more to repeat where one is cut.
REQUEST = 2**22
SECONDS = 60.0  # for one request
PAUSES = (0.5, 2.0)  # seconds before a request is tried again that may go well then

T = TypeVar("T")
R = TypeVar("R")

_turn = threading.BoundedSemaphore(READERS)


@dataclass(frozen=True)
class Found:
    """An object: its bytes, and a mark that its server changes with it."""

    size: int
    mark: str


@dataclass(frozen=True)
class _Failure:
    found: str
    remedy: str
    again: bool = False


class _Answered(OSError):
    """A status that is no success, or not what was asked for; raised before a body is read."""

    def __init__(self, status: int) -> None:
        super().__init__("an answer that is not used")
        self.status = status


_ABSENT = _Failure("no such file", "check the URL")
_PACKAGES = {
    "s3": "'glora[s3]'", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "https": "aiohttp",
    "http": "aiohttp",
}  # fmt: skip
_REACH = "check the URL, the network and the server"
_CREDENTIALS = "give credentials as its fsspec package takes them: environment, profile or role"
#: By the names of exceptions, whose packages need not be installed.
_NAMED = {
    "NoCredentialsError": _Failure("no credentials", _CREDENTIALS),
    "PartialCredentialsError": _Failure("incomplete credentials", _CREDENTIALS),
    "DefaultCredentialsError": _Failure("no credentials", _CREDENTIALS),
    "ProfileNotFound": _Failure("no such profile of credentials", _CREDENTIALS),
    "ClientPayloadError": _Failure("a body that was cut", _REACH, again=True),
    "IncompleteReadError": _Failure("a body that was cut", _REACH, again=True),
    "IncompleteRead": _Failure("a body that was cut", _REACH, again=True),
    "ResponseStreamingError": _Failure("a body that was cut", _REACH, again=True),
    "FlexibleChecksumError": _Failure("a body without its checksum", _REACH, again=True),
    "EndpointConnectionError": _Failure("no connection", _REACH, again=True),
    "ClientConnectorError": _Failure("no connection", _REACH, again=True),
    "ServerDisconnectedError": _Failure("a connection that was cut", _REACH, again=True),
}
_KINDS: tuple[tuple[type[BaseException], _Failure], ...] = (
    (TimeoutError, _Failure("no answer in time", _REACH, again=True)),
    (ConnectionError, _Failure("no connection", _REACH, again=True)),
    (PermissionError, _Failure("no permission", _CREDENTIALS)),
    (FileNotFoundError, _ABSENT),
    (OSError, _Failure("a failure of the server", _REACH, again=True)),
)


def look(url: Url) -> Found | None:
    """What an object is, None where there is none.

    Raises
    ------
    GloraError
        For what cannot be reached; for an object without a size, or without ETag, version or time
        of change, by which alone it could be told that it is no longer the same.
    """
    about = _ask(url, "info")
    if about is None or about.get("type") == "directory":
        return None
    size, mark = about.get("size"), _mark(about)
    if type(size) is not int or size < 0 or mark is None:
        lacking = "no size" if mark else "neither ETag nor version nor time of change"
        raise _error(url, _Failure(f"{lacking} of it from the server", "download it"))
    return Found(size, mark)


def fetch(url: Url, begin: int, end: int) -> bytes:
    """Bytes of an object, `REQUEST` of them at a time.

    Raises
    ------
    GloraError
        For what cannot be reached, or comes with fewer or more bytes than asked for.
    """
    pieces = [
        _ask(url, "cat_file", start=at, end=min(at + REQUEST, end))
        for at in range(begin, end, REQUEST)
    ]
    if None in pieces:
        raise _error(url, _ABSENT)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _mark(about: Mapping[str, Any]) -> str | None:
    """What of an object changes with it; servers and packages call it by many names."""
    strong = ("VersionId", "version_id", "generation", "ETag", "etag")
    weak = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")
    found = [str(about[name]) for name in strong if about.get(name)] or [
        str(about[name]) for name in weak if about.get(name)
    ]
    return " ".join(found)[:200] or None


def _ask(url: Url, method: str, **how: Any) -> Any:
    """Call a method of fsspec; None where there is no such object."""
    for pause in (*PAUSES, None):
        failure = None
        with _turn:
            try:
                answer = _call(url, method, **how)
            except Exception as error:
                failure = _failure(error, url)
        if failure is None:
            break
        if failure == _ABSENT:
            return None
        if pause is None or not failure.again:
            raise _error(url, failure)
        time.sleep(pause)
    return answer


def _call(url: Url, method: str, **how: Any) -> Any:
    from fsspec.core import url_to_fs

    http = url.text.lower().startswith(("http://", "https://"))
    system, path = url_to_fs(url.text, **(_strict() if http else {}))
    if system.async_impl:
        how["timeout"] = SECONDS
    if method == "info":
        system.invalidate_cache(path)  # of listings that somebody else may have asked for
    answer = getattr(system, method)(path, **how)
    if method == "cat_file" and len(answer) != how["end"] - how["start"]:
        raise _Cut
    return answer


class _Cut(ConnectionError):
    """Fewer or more bytes than asked for."""


def _strict() -> dict[str, Any]:
    """HTTP without redirects, and without bodies that are not what was asked for."""
    from fsspec.config import conf

    kept = {k: v for name in ("http", "https") for k, v in conf.get(name, {}).items()}
    return {
        "allow_redirects": False,
        "client_kwargs": kept.get("client_kwargs", {}) | {"raise_for_status": _accept},
    }


async def _accept(response: Any) -> None:
    """Raise unless an answer of HTTP is a success, and a range as long as was asked for."""
    if response.status >= 300:
        raise _Answered(response.status)
    wanted = response.request_info.headers.get("Range")
    if wanted is None:
        return
    first, last = wanted.removeprefix("bytes=").split("-")
    length = response.headers.get("Content-Length")
    if length != str(int(last) - int(first) + 1) or "Content-Encoding" in response.headers:
        raise _Answered(response.status)


def _failure(error: BaseException, url: Url) -> _Failure:
    """The kind of a failure, from an exception or those that led to it."""
    protocol = url.parts[0].lower()
    if isinstance(error, ImportError):
        remedy = f"pip install {_PACKAGES.get(protocol, f'what fsspec needs for {protocol}://')}"
        return _Failure("a missing package", remedy)
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        return _Failure("no protocol that fsspec knows", f"one of {', '.join(_PACKAGES)}, …")
    if isinstance(error, _Cut):
        return _Failure("not as many bytes as asked for", _REACH, again=True)
    led = list(_chain(error))
    for one in led:
        if (status := _status(one)) is not None:
            return _answer(status)
    for one in led:
        for kind in type(one).__mro__:
            if kind.__name__ in _NAMED:
                return _NAMED[kind.__name__]
    for one in reversed(led):
        for known, failure in _KINDS:
            if isinstance(one, known):
                return failure
        if "Timeout" in type(one).__name__:
            return _KINDS[0][1]
    return _Failure(f"a failure ({type(error).__name__})", _REACH)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """Of HTTP, as aiohttp and botocore keep it."""
    status = getattr(error, "status", None)
    if status is None:
        response = getattr(error, "response", None)
        about = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        status = about.get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def _answer(status: int) -> _Failure:
    if status == 404:
        return _ABSENT
    found = f"status {status}"
    if status in (401, 403):
        return _Failure(f"{found}, no permission", _CREDENTIALS)
    if 300 <= status < 400:
        return _Failure(f"{found}, a redirect", "name the URL that it leads to")
    if status < 300:
        return _Failure(
            f"{found}, but not the range of bytes that was asked for",
            "name a server that answers range requests, or download it",
        )
    return _Failure(f"{found} of the server", _REACH, again=status >= 500 or status in (408, 429))


def _error(url: Url, failure: _Failure) -> GloraError:
    refusal = Refusal(
        "the object cannot be read", None, str(url), None, failure.found,
        "an object that can be read, and is known by a mark", failure.remedy,
    )  # fmt: skip
    return GloraError(str(refusal), refusal)
